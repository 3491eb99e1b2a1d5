"""Which example stands at which position: pure functions of (seed, position), without state or tables of permutations.

A position counts examples from the start of training, over epochs, up to 10^12 and beyond. Every function takes arrays
of positions in any order, so any worker on any host can ask for any part of the order, and resuming is free.
"""

import math
from dataclasses import dataclass

import numpy as np

VERSION = 1  # part of the stream hash: raise it whenever any function here gives other ids for the same arguments
_ROUNDS = 6
_SMALL = 32  # a Feistel network this small is not random enough; up to here hashes are sorted instead
_PIECE = 1 << 17  # positions shuffled at a time: bounds the temporaries at a few MB
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash64(*words) -> np.ndarray:
    """A 64-bit hash of integers (arrays broadcast); the order of the words matters."""
    state = np.asarray(np.uint64(0))
    with np.errstate(over="ignore"):
        for word in words:
            state = np.asarray(_mix((state ^ np.asarray(word).astype(np.uint64)) + _GOLDEN))
    return state


def below(draw: np.ndarray, limit) -> np.ndarray:
    """Uniform integers in [0, limit) from 64-bit hashes, for limits below 2^32."""
    return (((draw >> np.uint64(32)) * np.asarray(limit).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def index_shuffle(position, key, size) -> np.ndarray:
    """A keyed pseudo-random permutation of range(size), evaluated at `position`; each argument may be an array.

    An alternating Feistel network on the smallest power of two that holds `size`, walked until it falls inside; for
    small sizes the rank of the position's hash among all of them.
    """
    position, key, size = np.asarray(position), np.asarray(key).astype(np.uint64), np.asarray(size).astype(np.uint64)
    shape = np.broadcast_shapes(position.shape, key.shape, size.shape)
    if position.size and ((position < 0).any() or (position.astype(np.uint64) >= size).any()):
        raise ValueError(f"positions to shuffle lie in 0..size-1; they span {position.min()}..{position.max()}")
    position = np.broadcast_to(position, shape).reshape(-1)
    key, size = (np.broadcast_to(v, shape).reshape(-1) if v.ndim else v for v in (key, size))
    shuffled = np.empty(position.size, np.int64)
    for start in range(0, position.size, _PIECE):
        piece = slice(start, start + _PIECE)
        shuffled[piece] = _permute(position[piece], *(v[piece] if v.ndim else v for v in (key, size)))
    return shuffled.reshape(shape)


def uniform(position, seed: int, size: int) -> np.ndarray:
    """Epoch e is positions e*size..(e+1)*size-1, and holds every index exactly once, in an order of its own."""
    epoch, place = _divide(position, size)
    return index_shuffle(place, _key(hash64(seed, 1, epoch)), size)


def blockwise(position, seed: int, size: int, *, block: int, window: int) -> np.ndarray:
    """As `uniform`, but near in the order is near on the disk, for reads that are remote.

    Blocks of `block` consecutive indices are permuted, then the contents of every `window` blocks are shuffled. The
    last, short block stands anywhere among the others.
    """
    if block < 1 or window < 1:
        raise ValueError(f"block and window are at least 1, not {block} and {window}")
    epoch, place = _divide(position, size)
    full, tail = divmod(size, block)
    slots, gap = full + (tail > 0), (block - tail) % block
    short = (hash64(seed, 2, epoch) % np.uint64(slots)).astype(np.int64) if tail else np.full(place.shape, slots)

    def padded(place):
        return place + gap * (place >= short * block + tail)

    def start(slot):
        return np.minimum(slot * block - gap * (slot > short), size)

    first = padded(place) // (block * window) * window
    inside = index_shuffle(place - start(first), hash64(seed, 3, epoch, first), start(first + window) - start(first))
    slot, offset = _divide(padded(start(first) + inside), block)
    rank = slot - (slot > short)
    rank = np.where(slot == short, 0, rank)
    chosen = index_shuffle(rank, hash64(seed, 4, epoch), full) if full else rank
    return np.where(slot == short, full, chosen) * block + offset


def balanced(position, seed: int, offsets: np.ndarray) -> np.ndarray:
    """Round r is positions r*G..(r+1)*G-1 and visits each of the G groups once, in an order of its own.

    Group g is the indices offsets[g]..offsets[g+1]-1; one of n members gives each of them once in every n rounds. So
    members of small groups are seen more often than those of large ones, which is the purpose.
    """
    count = len(offsets) - 1
    turn, place = _divide(position, count)
    chosen = index_shuffle(place, _key(hash64(seed, 5, turn)), count)
    start = offsets[chosen]
    size = offsets[chosen + 1] - start
    lap, place = turn // size, turn % size
    return start + index_shuffle(place, hash64(seed, 6, chosen, lap), size)


@dataclass(frozen=True)
class Selection:
    """Ids as ranges, in memory of the ranges alone: index i of the selection is the i-th id, range after range."""

    starts: np.ndarray  # int64 [k]: the first id of each range
    offsets: np.ndarray  # int64 [k + 1]: the index at which each range begins

    @staticmethod
    def of(ranges: np.ndarray) -> "Selection":
        """From int64 [k, 2] of [start, stop), none of them empty."""
        return Selection(ranges[:, 0], np.concatenate([[0], np.cumsum(ranges[:, 1] - ranges[:, 0])]).astype(np.int64))

    def part(self, share: float) -> "Selection":
        """The first ceil(share * n) of one fixed random order of them, so that a smaller part lies in a larger one."""
        n = len(self)
        kept = np.sort(index_shuffle(np.arange(math.ceil(share * n)), hash64(10), n))
        ids = self.ids(kept)
        return Selection.of(np.stack([ids, ids + 1], 1))

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def ids(self, index: np.ndarray) -> np.ndarray:
        place = np.searchsorted(self.offsets, index, side="right") - 1
        return self.starts[place] + (index - self.offsets[place])


def _divide(position, size: int) -> tuple[np.ndarray, np.ndarray]:
    position = np.asarray(position, np.int64)
    if size < 1:
        raise ValueError("an order needs at least one example; the selection is empty")
    if position.size and position.min() < 0:
        raise ValueError(f"positions count from 0, not from {position.min()}")
    quotient = position // size
    return quotient, position - quotient * size


def _key(key: np.ndarray) -> np.ndarray:
    """A single key where all are equal (one epoch, mostly), which spares the work of hashing it for every position."""
    return key.reshape(-1)[0] if key.size and (key == key.reshape(-1)[0]).all() else key


def _mix(word: np.ndarray) -> np.ndarray:
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def _permute(position: np.ndarray, key: np.ndarray, size: np.ndarray) -> np.ndarray:
    if not size.ndim:
        return (_rank if size <= _SMALL else _walk)(position, key, size)
    shuffled = np.empty(position.size, np.int64)
    small = size <= _SMALL
    for method, some in ((_rank, small), (_walk, ~small)):
        if some.any():
            shuffled[some] = method(position[some], key[some] if key.ndim else key, size[some])
    return shuffled


def _rank(position: np.ndarray, key: np.ndarray, size: np.ndarray) -> np.ndarray:
    own = hash64(key, position)
    rank = np.zeros(position.size, np.int64)
    for other in range(int(size.max(initial=0))):
        draw = hash64(key, other)
        rank += (other < size) & ((draw < own) | ((draw == own) & (other < position)))
    return rank


def _walk(position: np.ndarray, key: np.ndarray, size: np.ndarray) -> np.ndarray:
    bits = np.ceil(np.log2(size.astype(np.float64))).astype(np.uint64)
    bits = bits + (np.left_shift(np.uint64(1), bits) < size)
    value = _feistel(position.astype(np.uint64), key, bits)
    outside = np.flatnonzero(value >= size)
    while outside.size:
        k, s, b = (v[outside] if v.ndim else v for v in (key, size, bits))
        again = _feistel(value[outside], k, b)
        value[outside] = again
        outside = outside[again >= s]
    return value.astype(np.int64)


def _feistel(value: np.ndarray, key: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """A bijection of bits-wide words (up to 62 bits); halves are at most 32 bits wide, and hashed as such."""
    low = (bits + np.uint64(1)) >> np.uint64(1)
    one = np.uint64(1)
    low_mask = (np.left_shift(one, low) - one).astype(np.uint32)
    high_mask = (np.left_shift(one, bits - low) - one).astype(np.uint32)
    high_half, low_half = (value >> low).astype(np.uint32), value.astype(np.uint32) & low_mask
    for turn in range(_ROUNDS):
        round_key = hash64(key, turn)
        if turn % 2:
            low_half ^= _scramble(high_half, round_key) & low_mask
        else:
            high_half ^= _scramble(low_half, round_key) & high_mask
    return np.left_shift(high_half.astype(np.uint64), low) | low_half


def _scramble(half: np.ndarray, key: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        word = half + key.astype(np.uint32)
        word ^= word >> np.uint32(16)
        word *= np.uint32(0x85EBCA6B)
        word ^= (key >> np.uint64(32)).astype(np.uint32)
        word ^= word >> np.uint32(13)
        word *= np.uint32(0xC2B2AE35)
        word ^= word >> np.uint32(16)
    return word
