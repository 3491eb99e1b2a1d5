"""SLPD's refresh: k-means of every slide and the most alike slide of each, beside faiss and brute-force permutations.

    python tests/benchmarks/bench_prototypes.py [--slides 1041] [--regions 60] [--dim 256] [--k 4] [--grow]

The peer is written as SLPD's paper and code describe it: one faiss k-means a slide (10 turns, 5 restarts), one slide
after another, then for each pair of slides all permutations of their prototypes. `by pairs` goes over each pair once,
with all its permutations in one numpy expression; `at once` is kinder still, one numpy expression a permutation for all
pairs. faiss runs with one thread: on so few rows more threads cost more than they bring (--faiss-threads).

Cohorts are synthetic: a slide's regions lie around k directions of its own. What comes out is compared: the neighbours,
and the squared distances of regions to their centroids (of ours, over those of faiss; the starts differ).
Ours is compiled first, which is told apart. --grow goes on to 10^4 slides, measured, and to 10^5: k-means is measured
on 10^4 of them and multiplied by ten, as slides do not see each other; the comparison is measured for some slides with
all 10^5, and multiplied likewise.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mfl_jax import prototypes, sharding

SOME = 512


def cohort(slides: int, regions: int, dim: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    middle = draw.standard_normal((slides, k, dim), np.float32)
    kind = draw.integers(0, k, (slides, regions))
    x = np.concatenate([0.5 * m[of] for m, of in zip(middle, kind, strict=True)])
    x += draw.standard_normal(x.shape, np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x, np.repeat(np.arange(slides), regions)


def timed(run: Callable[[], Any]) -> tuple[np.ndarray, Any]:
    start = np.array([time.perf_counter(), time.process_time()])
    found = run()
    return np.array([time.perf_counter(), time.process_time()]) - start, found


def by_faiss(x: np.ndarray, slide: np.ndarray, slides: int, k: int, threads: int) -> tuple[np.ndarray, float]:
    import faiss

    faiss.omp_set_num_threads(threads)
    first = np.searchsorted(slide, np.arange(slides + 1))
    found, squared = [], 0.0
    for one in range(slides):
        rows = x[first[one] : first[one + 1]]
        run = faiss.Kmeans(x.shape[1], k, niter=10, nredo=5, min_points_per_centroid=1)
        run.train(rows)
        distance, _ = run.index.search(rows, 1)
        squared += float(distance.sum())
        found.append(run.centroids)
    vectors = np.stack(found)
    return vectors / np.linalg.norm(vectors, axis=2, keepdims=True), squared


def by_pairs(vectors: np.ndarray) -> np.ndarray:
    slides, k, _ = vectors.shape
    permutations, rows = np.array(list(itertools.permutations(range(k)))), np.arange(k)
    score = np.full((slides, slides), -np.inf, np.float32)
    for i in range(slides):
        for j in range(i + 1, slides):
            cosine = vectors[i] @ vectors[j].T
            score[i, j] = score[j, i] = cosine[rows, permutations].sum(1).max()
    return score.argmax(1)


def at_once(vectors: np.ndarray) -> np.ndarray:
    slides, k, dim = vectors.shape
    cosine = (vectors.reshape(-1, dim) @ vectors.reshape(-1, dim).T).reshape(slides, k, slides, k)
    parts = {(a, b): np.ascontiguousarray(cosine[:, a, :, b]) for a, b in itertools.product(range(k), repeat=2)}
    score = np.full((slides, slides), -np.inf, np.float32)
    for order in itertools.permutations(range(k)):
        np.maximum(score, sum(parts[a, order[a]] for a in range(k)), out=score)
    np.fill_diagonal(score, -np.inf)
    return score.argmax(1)


def squares(x: np.ndarray, slide: np.ndarray, found: prototypes.Prototypes) -> float:
    """Of regions to the mean of their cluster."""
    k = found.vectors.shape[1]
    group = slide * k + found.assignment
    order = np.argsort(group, kind="stable")
    size = np.bincount(group, minlength=found.vectors.shape[0] * k)
    sums = np.add.reduceat(x[order].astype(np.float64), (np.cumsum(size) - size)[size > 0], 0)
    return float((x.astype(np.float64) ** 2).sum() - ((sums**2).sum(1) / size[size > 0]).sum())


def ours(x: np.ndarray, slide: np.ndarray, slides: int, k: int, repeats: int = 3):
    """Best of `repeats` of both parts, what was found, and the time of the first call, compilation included."""
    cluster = lambda: prototypes.cluster(jax.random.key(0), x, slide, slides, k, least=k)  # noqa: E731
    (first, _), found = timed(cluster)
    near = lambda: prototypes.neighbours(found.vectors, found.eligible)  # noqa: E731
    (first_near, _), likeness = timed(near)
    parts = [min((timed(part)[0] for _ in range(repeats)), key=lambda t: t[0]) for part in (cluster, near)]
    return parts, found, likeness, first + first_near


def compared(slides: int, k: int, dim: int) -> np.ndarray:
    """[wall, processor] seconds of the comparison of SOME slides with all; the vectors are no matter."""
    mesh = sharding.make_mesh()
    own = np.random.default_rng(0).standard_normal((slides, k, dim), np.float32)
    parts = -(-slides // prototypes.COLUMNS)
    wide = -(-slides // (parts * 64)) * 64
    inputs = []
    for some, shape in ((slides, (parts, wide)), (SOME, (SOME // prototypes.ROWS, prototypes.ROWS))):
        kin = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
        inputs.append({"vectors": prototypes._tiles(own[:some], *shape), "kin": kin})
    run = prototypes._comparing(mesh, 1, slides)
    placed = jax.device_put(inputs)
    jax.block_until_ready(run(*placed))
    return timed(lambda: jax.block_until_ready(run(*placed)))[0]


def row(name: str, kmeans: np.ndarray, matching: np.ndarray, ratio: str = "") -> None:
    both = kmeans + matching
    columns = (kmeans[0], matching[0], both[0], both[1])
    print(f"{name:28} " + " ".join(f"{value:11.2f}" for value in columns) + f" {ratio:>10}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slides", type=int, default=1041)
    parser.add_argument("--regions", type=int, default=60)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--faiss-threads", type=int, default=1)
    parser.add_argument("--grow", action="store_true")
    args = parser.parse_args()
    x, slide = cohort(args.slides, args.regions, args.dim, args.k)
    told = f"{args.slides} slides x {args.regions} regions x {args.dim}, k {args.k}"
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}; {told}")
    heads = (f"{head:>11}" for head in ("k-means s", "matching s", "both s", "cores x s"))
    print(f"{'':28} {' '.join(heads)} {'peer/ours':>10}")
    parts, found, likeness, first = ours(x, slide, args.slides, args.k)
    row("ours", *parts)
    _faiss(args, x, slide, sum(parts)[0], found)
    print(f"ours, first call: {first:.1f} s with compilation")
    alike = (by := at_once(found.vectors)) == likeness.slide[:, 0]
    print(f"same neighbour as by permutations, of our prototypes: {alike.mean():.4f} of {len(by)}")
    if args.grow:
        grow(args)


def _faiss(args: argparse.Namespace, x: np.ndarray, slide: np.ndarray, seconds: float, found: Any) -> None:
    try:
        kmeans, (vectors, squared) = timed(lambda: by_faiss(x, slide, args.slides, args.k, args.faiss_threads))
    except ImportError:
        print("faiss is not installed: pip install faiss-cpu")
        return
    for name, matching in (("faiss, by pairs", by_pairs), ("faiss, at once", at_once)):
        taken, _ = timed(lambda matching=matching: matching(vectors))
        row(name, kmeans, taken, f"{(kmeans + taken)[0] / seconds:.1f}")
    print(f"squared distances, ours over faiss: {squares(x, slide, found) / squared:.4f}")


def grow(args: argparse.Namespace) -> None:
    x, slide = cohort(10_000, args.regions, args.dim, args.k)
    (kmeans, matching), _, _, _ = ours(x, slide, 10_000, args.k, repeats=1)
    row("ours, 10^4", kmeans, matching)
    del x
    block = compared(100_000, args.k, args.dim)
    row("ours, 10^5, computed", 10 * kmeans, block * 100_000 / SOME)
    print(f"10^5 from {SOME} slides with all 10^5 in {block[0]:.2f} s, and ten times the k-means of 10^4")


if __name__ == "__main__":
    main()
