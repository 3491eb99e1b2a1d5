"""`topk` by faiss, for banks that an approximate index suits: the same calls, and the same answers where it is flat.

Needs the extra `faiss` (pip install 'mfl_jax[faiss]'). Rows that a query must not be given are left out of what faiss
finds, which is asked for more until enough is left. Of equal rows any may come.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mfl_jax.topk import Excluded, unit

MORE = 4  # times as many, where what is left is too few


@dataclass(frozen=True)
class Bank:
    index: Any
    codes: tuple[np.ndarray, ...]
    rows: int


def place(bank: np.ndarray, codes: Sequence[np.ndarray] = (), *, kind: str = "Flat") -> Bank:
    """kind is a name of faiss.index_factory: 'Flat' is exact; 'HNSW32', 'IVF1024,Flat' are not, and may find less."""
    try:
        import faiss
    except ImportError as error:
        raise ValueError("a faiss index needs faiss: pip install 'mfl_jax[faiss]', or do without it") from error
    try:
        index = faiss.index_factory(bank.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"faiss knows no index {kind!r}: {str(error).splitlines()[-1]}") from error
    rows = np.ascontiguousarray(unit(bank))
    if not index.is_trained:
        index.train(rows)
    index.add(rows)
    return Bank(index, tuple(np.asarray(c) for c in codes), len(bank))


def nearest(bank: Bank, queries: np.ndarray, k: int, codes: Sequence[np.ndarray] = ()) -> tuple[np.ndarray, np.ndarray]:
    """As topk.nearest."""
    k, queries = min(k, bank.rows), np.ascontiguousarray(unit(queries))
    close = np.full((len(queries), k), -np.inf, np.float32)
    index = np.full((len(queries), k), -1, np.int64)
    left, wanted = np.arange(len(queries)), k
    while len(left):
        found, at = bank.index.search(queries[left], wanted)
        kept = at >= 0
        for of_queries, of_bank in zip(codes, bank.codes, strict=True):
            kept &= of_bank[np.maximum(at, 0)] != np.asarray(of_queries)[left, None]
        order = np.argsort(~kept, 1, kind="stable")[:, :k]  # those that are kept, nearest first
        here = np.take_along_axis(kept, order, 1)
        close[left] = np.where(here, np.take_along_axis(found, order, 1), -np.inf)
        index[left] = np.where(here, np.take_along_axis(at, order, 1), -1)
        if wanted == bank.rows:
            break
        left = left[kept.sum(1) < k]
        wanted = min(bank.rows, wanted * MORE)
    return close, index


def search(
    queries: np.ndarray, bank: np.ndarray, k: int, exclude: Excluded = (), *, kind: str = "Flat"
) -> tuple[np.ndarray, np.ndarray]:
    """As topk.search."""
    return nearest(place(bank, [b for _, b in exclude], kind=kind), queries, k, [q for q, _ in exclude])
