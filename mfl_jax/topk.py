"""The k most similar rows of a bank by cosine: exact, on the device, and never of a group that a query must not see.

In a first pass over the bank only the best of every few consecutive rows is kept: the k best rows lie in the k groups
whose best rows are best. The rows of those groups are compared again, all in the same way. Of equal rows the one of the
lower number comes first.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BLOCK = 2048  # rows of the bank that are compared at once
SLAB = 2**20  # rows of the bank in one call
QUERIES = 1024  # in one call
CHUNK = 2**20  # numbers that are gathered at once
Excluded = Sequence[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Bank:
    """Rows of length 1 on the device, and what they are excluded by."""

    slabs: tuple[jax.Array, ...]  # [blocks, BLOCK, D] each, the last one padded
    codes: tuple[jax.Array, ...]  # int32 [blocks, BLOCK, kinds of codes]
    names: tuple[np.ndarray, ...]  # of each kind of code: the value of a code
    rows: int

    def encode(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """int32 [rows, kinds]; -1 for what no row of the bank has."""
        if len(values) != len(self.names):
            raise ValueError(f"the bank excludes by {len(self.names)} codes; {len(values)} of the queries are given")
        found = []
        for names, given in zip(self.names, values, strict=True):
            asked, which = np.unique(np.asarray(given), return_inverse=True)
            place = np.searchsorted(names, asked)
            there = names[np.minimum(place, len(names) - 1)] == asked
            found.append(np.where(there, place, -1)[which])
        return np.stack(found, 1).astype(np.int32)


def place(bank: np.ndarray, codes: Sequence[np.ndarray] = (), *, block: int = SLAB) -> Bank:
    """Put a bank [N, D] on the device. `codes`: [N] each, such as cases; a query is never given rows of its own code.
    `block` rows are searched in one call.
    """
    if bank.ndim != 2 or not len(bank):
        raise ValueError(f"a bank is [rows, features] with at least one row, not {list(bank.shape)}")
    if any(len(c) != len(bank) for c in codes):
        raise ValueError(f"codes of {len(bank)} rows are needed, not of {[len(c) for c in codes]}")
    pairs = [np.unique(np.asarray(c), return_inverse=True) for c in codes]
    of_rows = np.stack([p[1] for p in pairs], 1).astype(np.int32) if pairs else np.zeros((len(bank), 0), np.int32)
    size = min(block, len(bank))
    grain = 128 if size >= 128 else 8
    block = min(BLOCK, -(-size // grain) * grain)
    size = -(-size // block) * block
    slabs, coded = [], []
    for start in range(0, len(bank), size):
        part = slice(start, start + size)
        slabs.append(jax.device_put(_blocks(unit(bank[part]), block)))
        coded.append(jax.device_put(_blocks(of_rows[part], block)))
    return Bank(tuple(slabs), tuple(coded), tuple(p[0] for p in pairs), len(bank))


def nearest(bank: Bank, queries: np.ndarray, k: int, codes: Sequence[np.ndarray] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Cosine float32 [Q, k], descending, and row int64 [Q, k]; -inf and -1 where fewer rows are allowed."""
    if k < 1:
        raise ValueError(f"k is at least 1, not {k}")
    k, of_queries = min(k, bank.rows), bank.encode(codes) if bank.names else np.zeros((len(queries), 0), np.int32)
    block = min(QUERIES, max(-(-len(queries) // 8), 1) * 8)
    found = [
        _of_block(bank, queries[start : start + block], of_queries[start : start + block], k, block)
        for start in range(0, len(queries), block)
    ]
    if not found:
        return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
    return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])


def search(
    queries: np.ndarray, bank: np.ndarray, k: int, exclude: Excluded = (), *, block: int = SLAB
) -> tuple[np.ndarray, np.ndarray]:
    """`nearest` in a bank that is used once; `exclude` holds (codes of queries, codes of bank)."""
    return nearest(place(bank, [b for _, b in exclude], block=block), queries, k, [q for q, _ in exclude])


def unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _blocks(x: np.ndarray, size: int) -> np.ndarray:
    return np.pad(x, ((0, -len(x) % size), (0, 0))).reshape(-(-len(x) // size), size, x.shape[1])


def _of_block(bank: Bank, queries: np.ndarray, codes: np.ndarray, k: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    count = len(queries)
    queries, codes = (np.pad(x, ((0, size - count), (0, 0))) for x in (unit(queries), codes))
    start, parts = 0, []
    for rows, of_rows in zip(bank.slabs, bank.codes, strict=True):
        held = rows.shape[0] * rows.shape[1]
        asked = {"k": min(k, held), "group": _group(held, k, rows.shape[1])}
        close, index = _search(queries, codes, rows, of_rows, np.int32(bank.rows - start), **asked)
        parts.append((np.asarray(close), np.asarray(index, np.int64) + start))
        start += held
    close, index = (np.concatenate(p, 1)[:count] for p in zip(*parts, strict=True))
    if len(parts) > 1:
        order = np.argsort(-close, 1, kind="stable")[:, :k]
        close, index = np.take_along_axis(close, order, 1), np.take_along_axis(index, order, 1)
    return close, np.where(np.isneginf(close), -1, index)


def _group(rows: int, k: int, block: int) -> int:
    """Rows a group: many make the second pass long, few the choice of groups. A power of 2, so that it divides."""
    best = 2 ** round(np.log2(max(1.0, np.sqrt(rows / (20 * k)))))
    return int(np.clip(best, 8, 8 if block % 128 else 128))


@functools.partial(jax.jit, static_argnames=("k", "group"))
def _search(queries, of_queries, bank, of_bank, rows, *, k: int, group: int):
    size, dim = bank.shape[1], bank.shape[2]
    groups = bank.shape[0] * size // group

    def best_of_groups(part):
        number, block, codes = part
        close = jnp.matmul(block, queries.T, precision=lax.Precision.HIGHEST)
        barred = (number * size + jnp.arange(size) >= rows)[:, None]
        for kind in range(codes.shape[1]):
            barred |= codes[:, kind, None] == of_queries[None, :, kind]
        return jnp.where(barred, -jnp.inf, close).reshape(size // group, group, -1).max(1)

    best = lax.map(best_of_groups, (jnp.arange(bank.shape[0], dtype=jnp.int32), bank, of_bank))
    _, chosen = lax.top_k(best.reshape(groups, -1).T, min(k, groups))
    chosen = jnp.sort(chosen, 1)  # so that of equal rows the first is the lowest
    bank, of_bank = bank.reshape(groups, group, dim), of_bank.reshape(groups, group, -1)

    def compare(asked):
        query, codes, of_groups = asked
        at = (of_groups[:, None] * group + jnp.arange(group)).reshape(-1)
        close = jnp.matmul(bank[of_groups].reshape(-1, dim), query, precision=lax.Precision.HIGHEST)
        barred = (at >= rows) | (of_bank[of_groups].reshape(at.shape[0], -1) == codes).any(-1)
        close, where = lax.top_k(jnp.where(barred, -jnp.inf, close), k)
        return close, at[where]

    together = max(1, CHUNK // (chosen.shape[1] * group * dim))
    return lax.map(compare, (queries, of_queries, chosen), batch_size=together)
