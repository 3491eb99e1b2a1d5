"""Exact nearest neighbours in a large bank: ours beside faiss (flat) and numpy in blocks, on the same cores.

    python tests/benchmarks/bench_retrieval.py [--rows 1000000] [--dim 128] [--queries 1000] [--k 10]

All find the same rows; the last column says for which share of the answers they do. `excluded` is with rows of the
query's own case left out. Putting the bank in its place is told apart from the search, which is the best of three;
`cores x s` are processor seconds, which say more than the clock where others use the machine.
"""

import argparse
import os
import time

import numpy as np

from mfl_jax import faiss_index, topk

BLOCK = 4096


def blocked(bank: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """The k best of each block, then the best of those: what numpy can do without holding all similarities."""
    best = np.full((len(queries), k), -np.inf, np.float32)
    index = np.zeros((len(queries), k), np.int64)
    for start in range(0, len(bank), BLOCK):
        close = queries @ bank[start : start + BLOCK].T
        some = np.argpartition(-close, min(k, close.shape[1]) - 1, 1)[:, :k]
        both = np.concatenate([best, np.take_along_axis(close, some, 1)], 1)
        at = np.concatenate([index, some + start], 1)
        order = np.argsort(-both, 1, kind="stable")[:, :k]
        best, index = np.take_along_axis(both, order, 1), np.take_along_axis(at, order, 1)
    return index


def seconds(run, repeats: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """[wall, processor] of the best repeat."""
    times, found = [], np.zeros(0)
    for _ in range(repeats):
        start = np.array([time.perf_counter(), time.process_time()])
        found = run()
        times.append(np.array([time.perf_counter(), time.process_time()]) - start)
    return min(times, key=lambda t: t[0]), found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--cases", type=int, default=300)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    bank, queries = (rng.standard_normal((n, args.dim), np.float32) for n in (args.rows, args.queries))
    case, own = (rng.integers(0, args.cases, n) for n in (args.rows, args.queries))
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores; {args.rows} x {args.dim}, {args.queries} queries")
    print(f"{'':18} {'place s':>8} {'search s':>9} {'cores x s':>10} {'peer/ours':>10} {'same':>6}")
    place, (ours, expected) = _ours(bank, queries, args.k)
    print(f"{'ours':18} {place:8.2f} {ours[0]:9.2f} {ours[1]:10.2f}", flush=True)
    place, (taken, _) = _ours(bank, queries, args.k, [case], [own])
    print(f"{'ours, excluded':18} {place:8.2f} {taken[0]:9.2f} {taken[1]:10.2f}", flush=True)
    peers = {
        "numpy, blocked": lambda: _numpy(bank, queries, args.k),
        "faiss, flat": lambda: _faiss(bank, queries, args.k),
    }
    for name, peer in peers.items():
        try:
            place, (taken, found) = peer()
        except ValueError as error:
            print(f"{name:18} {error}")
            continue
        same = (found == expected).mean()
        print(
            f"{name:18} {place:8.2f} {taken[0]:9.2f} {taken[1]:10.2f} {taken[0] / ours[0]:10.2f} {same:6.3f}",
            flush=True,
        )


def _ours(
    bank: np.ndarray, queries: np.ndarray, k: int, codes=(), own=()
) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    start = time.perf_counter()
    placed = topk.place(bank, codes)
    return time.perf_counter() - start, seconds(lambda: topk.nearest(placed, queries, k, own)[1])


def _numpy(bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    start = time.perf_counter()
    rows, asked = topk.unit(bank), topk.unit(queries)
    return time.perf_counter() - start, seconds(lambda: blocked(rows, asked, k), 1)


def _faiss(bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    start = time.perf_counter()
    placed = faiss_index.place(bank)
    return time.perf_counter() - start, seconds(lambda: faiss_index.nearest(placed, queries, k)[1])


if __name__ == "__main__":
    main()
