"""What two tile sets, or two splits of one, have in common: cases, slides, source files, and tiles that look alike.

A tile is alike when it shows the same field: encoded again, flipped, turned by quarter turns, a little brighter or
tinted. Found in three steps, so that 10^6 tiles a side fit in memory and time: the signs of 63 low cosine coefficients
(8 bytes a tile; flips and turns of a tile are known permutations of its signs), a search over four bands of 16 bits,
and for what that finds, correlation of the tiles themselves. Blank tiles say nothing and are left out. Not found: tiles
shifted by more than a pixel or two, or cut at another scale.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from input_pipeline.tileset import TileSet

MAX_BITS = 7  # encoding again changes 0 to 3; different tiles of one slide differ in 11 and more
MIN_CONTRAST = 2.0  # grey levels over the whole tile; glass and noise stay below
ALIKE = 0.95
ALIKE_DETAIL = 0.8
SIDE = 64
MIN_SIZE = 16
PAIRS = 1 << 20
_HEX = re.compile(r"[0-9a-f]{32,128}", re.IGNORECASE)
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Finding:
    """`count` things of one kind ('case', 'slide', 'source', 'tile') lie on both sides of `where`; some are named.

    Not `complete`: the search stopped early. With a count of 0 it found nothing until then, which proves nothing.
    """

    kind: str
    where: tuple[str, str]
    count: int
    examples: tuple[str, ...]
    complete: bool = True

    def __str__(self) -> str:
        if not self.count:
            return f"{' and '.join(self.where)} may share near-duplicate tiles: {'; '.join(self.examples)}"
        least = "" if self.complete else "at least "
        more = f", and {self.count - len(self.examples)} more" if self.count > len(self.examples) else ""
        what = {"case": "cases", "slide": "slides", "source": "source files", "tile": "near-duplicate tiles"}[self.kind]
        return f"{' and '.join(self.where)} share {least}{self.count} {what}: {'; '.join(self.examples)}{more}"


@dataclass(frozen=True)
class Side:
    """A tile set or one split of it."""

    name: str
    tileset: TileSet
    ids: np.ndarray
    slides: tuple[dict, ...]  # entries of the manifest


@dataclass(frozen=True)
class Prints:
    """Tiles with something to see, and the signs of their cosine coefficients."""

    ids: np.ndarray
    bits: np.ndarray


def audit(
    a: TileSet,
    b: TileSet | None = None,
    *,
    tiles: bool = True,
    threads: int = 2,
    progress: bool = True,
    examples: int = 10,
    most_checked: int = 20_000,
) -> list[Finding]:
    """Everything shared by `a` and `b`, or without `b` by any two splits of `a`; an empty list when nothing is.

    `tiles=False` looks at names and source files only, which takes no time. At most `most_checked` tiles a pair of
    sides are compared pixel by pixel, the likeliest first; a finding that stopped there says so.
    """
    sides = _sides(a, b)
    findings = [f for pair in itertools.combinations(sides, 2) for f in _shared_names(*pair, examples)]
    if not tiles:
        return findings
    for side in sides:
        if side.tileset.spec.he_kind != "image":
            raise ValueError(
                f"{side.name}: regions have no pixels to compare; audit with tiles=False (--names-only), and the tiles "
                "that they were made of by themselves"
            )
        if side.tileset.spec.size < MIN_SIZE:
            raise ValueError(
                f"{side.name}: tiles of {side.tileset.spec.size} px are too small to compare, {MIN_SIZE} px is the "
                "least; audit with tiles=False"
            )
    with ThreadPoolExecutor(threads) as pool:
        prints = [_prints(side, pool, progress) for side in sides]
        for (one, of_one), (two, of_two) in itertools.combinations(zip(sides, prints, strict=True), 2):
            found = _shared_tiles(one, of_one, two, of_two, pool, progress, examples, most_checked)
            findings += [found] if found else []
    return findings


def _sides(a: TileSet, b: TileSet | None) -> list[Side]:
    if b is not None:
        return [Side(str(t.root), t, t.ids(), tuple(t.manifest["slides"])) for t in (a, b)]
    if len(a.splits) < 2:
        raise ValueError(f"{a.root} has {len(a.splits)} splits: give two tile sets, or one with two splits or more")
    split_of = {case: name for name, cases in a.splits.items() for case in cases}
    entries: dict[str, list[dict]] = {name: [] for name in a.splits}
    for entry in a.manifest["slides"]:
        if entry["case"] in split_of:
            entries[split_of[entry["case"]]].append(entry)
    return [Side(name, a, a.ids(name), tuple(found)) for name, found in entries.items()]


def _shared_names(one: Side, two: Side, examples: int) -> Iterator[Finding]:
    where = (one.name, two.name)
    for kind in ("case", "slide"):
        names, others = ({s[kind].casefold(): s[kind] for s in side.slides} for side in (one, two))
        both = sorted(names[key] for key in names.keys() & others.keys())
        if both:
            yield Finding(kind, where, len(both), tuple(both[:examples]))
    files, others = (_source_files(side) for side in (one, two))
    both = sorted(f"{files[key]} = {others[key]}" for key in files.keys() & others.keys())
    if both:
        yield Finding("source", where, len(both), tuple(both[:examples]))


def _source_files(side: Side) -> dict[tuple, str]:
    """(hash of a file that a slide was made from; or its name and length, where no hash was kept) -> the slide."""
    files: dict[tuple, str] = {}
    for entry in side.slides:
        source = entry.get("source", {})
        keys: list[tuple] = [("sha256", value) for value in _hashes(source)]
        if not keys and isinstance(source.get("he"), str) and isinstance(source.get("bytes"), int):
            keys = [("file", source["he"], source["bytes"])]
        files |= dict.fromkeys(keys, entry["slide"])
    return files


def _hashes(source: dict) -> Iterator[str]:
    """Of images and tables of genes. 'aids' (transforms, cells, regions) may well be equal, if only by being empty."""
    for key, value in source.items():
        if isinstance(value, dict) and key != "aids":
            yield from _hashes(value)
        elif "sha" in key.lower() and "param" not in key and isinstance(value, str) and _HEX.fullmatch(value):
            yield value.lower()


def _batched(items: np.ndarray, size: int) -> list[np.ndarray]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _mapped(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], ahead: int = 8) -> Iterator[R]:
    """pool.map that holds a few results, not all."""
    queue: list = []
    for item in items:
        queue.append(pool.submit(work, item))
        if len(queue) >= ahead:
            yield queue.pop(0).result()
    while queue:
        yield queue.pop(0).result()


def _prints(side: Side, pool: ThreadPoolExecutor, progress: bool) -> Prints:
    def work(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        grey = np.stack([_grey(side.tileset, i) for i in ids])
        bits, contrast = fingerprint(grey)
        return ids[contrast >= MIN_CONTRAST], bits[contrast >= MIN_CONTRAST]

    kept, found = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    with tqdm(total=len(side.ids), desc=f"audit {side.name}", unit="tile", disable=not progress) as bar:
        for batch, (ids, bits) in zip(b := _batched(side.ids, 64), _mapped(pool, work, b), strict=True):
            kept.append(ids)
            found.append(bits)
            bar.update(len(batch))
    return Prints(np.concatenate(kept), np.concatenate(found))


def _grey(tileset: TileSet, i: int) -> np.ndarray:
    he = tileset.decode(tileset.read([i])[0])["he"]
    assert he is not None
    return (he[..., 0].astype(np.float32) + he[..., 1] + he[..., 2]) / np.float32(3)


def area_means(images: np.ndarray, n: int) -> np.ndarray:
    """[..., s, s] -> float32 [..., n, n], pixels cut by an edge counted by their share. No BLAS: its threads would wait
    for each other under ours."""
    for _ in range(2):
        size = images.shape[-2]
        sums = np.zeros((*images.shape[:-2], size + 1, images.shape[-1]), np.float32)
        np.cumsum(images, axis=-2, out=sums[..., 1:, :])
        edges = np.arange(n + 1) * (size / n)
        whole = np.minimum(edges.astype(np.int64), size - 1)
        part = (edges - whole).astype(np.float32)[:, None]
        at = sums[..., whole, :] + part * images[..., whole, :]
        images = np.diff(at, axis=-2).swapaxes(-1, -2) * np.float32(n / size)
    return images


def fingerprint(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Grey tiles [n, s, s] -> signs of the 63 lowest cosine coefficients as a uint64; contrast in grey levels."""
    n = min(32, grey.shape[1])
    cosine = np.cos(np.pi * np.arange(8)[:, None] * (np.arange(n) + 0.5) / n) * np.sqrt(2 / n)
    coefficients = (cosine @ area_means(grey, n) @ cosine.T).reshape(len(grey), 64)
    coefficients[:, 0] = 0
    return _packed(coefficients > 0), np.sqrt((coefficients**2).sum(axis=1)) / n


def _packed(signs: np.ndarray) -> np.ndarray:
    return np.packbits(signs, axis=1, bitorder="little").view("<u8").ravel().astype(np.uint64)


def turned(bits: np.ndarray, transpose: bool, up_down: bool, left_right: bool) -> np.ndarray:
    """The fingerprint of `oriented(tile, ...)`, from that of the tile."""
    signs = np.unpackbits(bits.astype("<u8")[:, None].view(np.uint8), axis=1, bitorder="little").reshape(-1, 8, 8)
    if transpose:
        signs = signs.transpose(0, 2, 1)
    odd = np.arange(8) % 2
    flip = (up_down * odd[:, None] + left_right * odd[None, :]) % 2
    flip[0, 0] = 0
    return _packed((signs ^ flip.astype(np.uint8)).reshape(-1, 64))


def oriented(tile: np.ndarray, transpose: bool, up_down: bool, left_right: bool) -> np.ndarray:
    tile = tile.T if transpose else tile
    tile = tile[::-1] if up_down else tile
    return tile[:, ::-1] if left_right else tile


ORIENTATIONS = tuple(itertools.product((False, True), repeat=3))


def nearest(of_one: np.ndarray, of_two: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `of_two` the likeliest row of `of_one` (-1: none), the orientation of it, and the bits that differ.

    Multi-index hashing: whatever differs in at most 3 bits is found, most of what differs in up to MAX_BITS is.
    """
    row = np.full(len(of_two), -1, np.int64)
    orientation = np.zeros(len(of_two), np.int8)
    distance = np.full(len(of_two), MAX_BITS + 1, np.int8)
    for band in range(4):
        shift = np.uint64(16 * band)
        keys = ((of_one >> shift) & np.uint64(0xFFFF)).astype(np.int64)
        order = np.argsort(keys, kind="stable")
        first = np.searchsorted(keys[order], np.arange(65537))
        for number, how in enumerate(ORIENTATIONS):
            probe = turned(of_two, *how)
            keys = ((probe >> shift) & np.uint64(0xFFFF)).astype(np.int64)
            for two, at in _pairs(first[keys], first[keys + 1]):
                one = order[at]
                apart = np.bitwise_count(of_one[one] ^ probe[two]).astype(np.int8)
                good = np.flatnonzero(apart < distance[two])
                good = good[np.lexsort((one[good], apart[good], two[good]))]
                good = good[np.unique(two[good], return_index=True)[1]]
                two = two[good]
                row[two], orientation[two], distance[two] = one[good], number, apart[good]
    return row, orientation, distance


def _pairs(start: np.ndarray, stop: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(i, j) for every j in start[i]:stop[i], about PAIRS at a time."""
    total = np.cumsum(stop - start)
    begin = 0
    while begin < len(total):
        done = total[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(total, done + PAIRS, side="right")))
        length = (stop - start)[begin:end]
        i = np.repeat(np.arange(begin, end), length)
        j = np.arange(len(i)) - np.repeat(np.cumsum(length) - length, length) + start[i]
        if len(i):
            yield i, j
        begin = end


def alike(one: np.ndarray, two: np.ndarray) -> bool:
    """Do two grey tiles, turned alike, correlate as a whole, and block by block, where an edge weighs no more than
    its few blocks and blank blocks weigh nothing?"""
    n = min(SIDE, *one.shape, *two.shape) // 8 * 8
    one, two = area_means(one, n), area_means(two, n)
    blocks = [tile.reshape(n // 8, 8, n // 8, 8).swapaxes(1, 2).reshape(-1, 64) for tile in (one, two)]
    lively = np.minimum(*(block.std(axis=1) for block in blocks)) > 1
    if lively.sum() < max(2, len(lively) // 8):
        return False
    detail = np.median([_correlation(a, b) for a, b in zip(blocks[0][lively], blocks[1][lively], strict=True)])
    return _correlation(one, two) >= ALIKE and bool(detail >= ALIKE_DETAIL)


def _correlation(one: np.ndarray, two: np.ndarray) -> float:
    one, two = one - one.mean(), two - two.mean()
    return float((one * two).sum() / max(np.sqrt((one**2).sum() * (two**2).sum()), 1e-9))


def _shared_tiles(
    one: Side,
    of_one: Prints,
    two: Side,
    of_two: Prints,
    pool: ThreadPoolExecutor,
    progress: bool,
    examples: int,
    most: int,
) -> Finding | None:
    row, orientation, distance = nearest(of_one.bits, of_two.bits)
    candidates = np.flatnonzero(row >= 0)
    candidates = candidates[np.argsort(distance[candidates], kind="stable")]
    checked = candidates[:most]

    def work(k: int) -> bool:
        left = _grey(one.tileset, int(of_one.ids[row[k]]))
        right = _grey(two.tileset, int(of_two.ids[k]))
        return alike(left, oriented(right, *ORIENTATIONS[orientation[k]]))

    label = f"audit {one.name}, {two.name}"
    with tqdm(total=len(checked), desc=label, unit="pair", disable=not progress or not len(checked)) as bar:
        found = []
        for k, same in zip(checked, _mapped(pool, work, checked), strict=True):
            if same:
                found.append(k)
            bar.update()
    complete = len(checked) == len(candidates)
    if not found and complete:
        return None
    if not found:
        left = f"only {len(checked)} of {len(candidates)} likely pairs were compared (most_checked)"
        return Finding("tile", (one.name, two.name), 0, (left,), complete=False)
    text = [f"{_place(one, of_one.ids[row[k]])} = {_place(two, of_two.ids[k])}" for k in sorted(found)[:examples]]
    return Finding("tile", (one.name, two.name), len(found), tuple(text), complete)


def _place(side: Side, i: int) -> str:
    return f"tile {i} of {side.tileset.slides[side.tileset.tiles['slide'][i]]}"
