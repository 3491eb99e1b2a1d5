"""What a slide is made of, as a few prototypes: k-means of the regions of every slide, and which slides are alike.

Two slides are as alike as the best one-to-one matching of their prototypes makes them: the sum of the cosines of
matched pairs. Nothing depends on how many devices share the work, nor on which slides are worked on together.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy.optimize import linear_sum_assignment

from mfl_jax import sharding
from mfl_jax.kmeans import kmeans, kmeans_of_few

SLIDES = 16  # clustered at once on a device: few enough for its cache
CALL = 2**26  # numbers of regions that are put on a device at a time
ROWS, COLUMNS = 64, 1024  # slides compared at once
EXACT = 8  # prototypes up to which all matchings are gone through; 2^K steps, so beyond it the Hungarian method
KEY = 0x51D9  # folded into a key that is used for something else as well
TRANSFER = ("matched", "argmax")


class Prototypes(NamedTuple):
    vectors: np.ndarray  # float32 [S, K, D] of length 1; zero for a slide that is not eligible
    assignment: np.ndarray  # int32 [N]: the cluster of a region within its slide; -1 where that is not eligible
    eligible: np.ndarray  # bool [S]: it has regions enough
    sizes: np.ndarray  # int32 [S, K] regions


class Neighbours(NamedTuple):
    slide: np.ndarray  # int32 [S, n], most alike first, of equals the lower number; -1 where there is none
    score: np.ndarray  # float32 [S, n]: sum of cosines, at most K; -inf where there is none
    transfer: np.ndarray  # int32 [S, n, K]: which prototype of the neighbour stands for each of one's own; or -1


def cluster(
    key: jax.Array,
    features: np.ndarray,
    slide: np.ndarray,
    slides: int,
    k: int,
    *,
    least: int,
    iterations: int = 10,
    restarts: int = 5,
    mesh: Mesh | None = None,
) -> Prototypes:
    """Regions [N, D] of slides [N] (numbers below `slides`) -> k prototypes of each slide with at least `least`.

    Slides of about one size are padded to the same length, a power of two, and clustered together; the key of a slide
    is that of its number. The same features must be given on every process.
    """
    if least < k:
        raise ValueError(f"a slide of {least} regions cannot have {k} prototypes: at least {k} regions are needed")
    mesh = mesh or sharding.make_mesh()
    counts = np.bincount(slide, minlength=slides)
    if len(counts) > slides:
        raise ValueError(f"there are {slides} slides, numbered from 0; a region is of slide {slide.max()}")
    first, order = np.cumsum(counts) - counts, np.argsort(slide, kind="stable")
    eligible = counts >= least
    raw = np.asarray(jax.random.key_data(key))
    vectors = np.zeros((slides, k, features.shape[1]), np.float32)
    assignment, sizes = np.full(len(features), -1, np.int32), np.zeros((slides, k), np.int32)
    lengths = np.array([_length(count) for count in counts.tolist()])
    along = sharding.batch_sharding(mesh)
    for length in np.unique(lengths[eligible]).tolist():
        chosen = np.flatnonzero(eligible & (lengths == length))
        run = _clustering(mesh, k, iterations, restarts)
        for numbers in _calls(chosen, length * features.shape[1], mesh):
            place = np.arange(length)
            mask = place < np.where(numbers >= 0, counts[numbers], 0)[..., None]
            rows = order[np.where(mask, first[numbers][..., None] + place, 0)]
            inputs = (numbers.astype(np.int32), features[rows].astype(np.float32, copy=False), mask)
            centroids, which = map(np.asarray, run(raw, *(sharding.put_whole(array, along) for array in inputs)))
            real = numbers >= 0
            vectors[numbers[real]] = centroids[real]
            assignment[rows[mask]] = which[mask]
    placed = assignment >= 0
    np.add.at(sizes, (slide[placed], assignment[placed]), 1)
    return Prototypes(vectors, assignment, eligible, sizes)


def neighbours(
    vectors: np.ndarray,
    eligible: np.ndarray,
    count: int = 1,
    *,
    kin: np.ndarray | None = None,
    transfer: str = "matched",
    mesh: Mesh | None = None,
) -> Neighbours:
    """The `count` slides most like each eligible one, among the eligible. Slides of one number in `kin` [S] are not
    each other's neighbours; by default a slide is kin to itself alone. transfer='argmax' takes for each prototype the
    neighbour's that is most like it, whether or not another took it too (as released); 'matched' is one to one.
    """
    if transfer not in TRANSFER:
        raise ValueError(f"transfer is {transfer!r}; allowed: {', '.join(TRANSFER)}")
    if count < 1:
        raise ValueError(f"a slide has at least 1 neighbour, not {count}")
    slides, k = vectors.shape[:2]
    known = np.flatnonzero(eligible)
    found = Neighbours(
        np.full((slides, count), -1, np.int32),
        np.full((slides, count), -np.inf, np.float32),
        np.full((slides, count, k), -1, np.int32),
    )
    if len(known) < 2:
        return found
    n = min(count, len(known) - 1)
    own, kin = np.ascontiguousarray(vectors[known], np.float32), (np.arange(slides) if kin is None else kin)[known]
    score, which = _compared(own, kin, n, mesh or sharding.make_mesh()) if k <= EXACT else _bounded(own, kin, n)
    there = score > -np.inf
    found.slide[known, :n], found.score[known, :n] = np.where(there, known[which], -1), score
    for rank in range(n):
        one, other = np.flatnonzero(there[:, rank]), which[there[:, rank], rank]
        found.transfer[known[one], rank] = _transfers(own[one], own[other], transfer)
    return found


def described(found: Prototypes, near: Neighbours) -> dict[str, float]:
    """Sizes of clusters (their evenness is 1 where all are of one size, 0 where one has all) and likeness."""
    sizes = found.sizes[found.eligible].astype(np.float64)
    told = {"eligible_slides": float(found.eligible.sum()), "eligible_regions": float((found.assignment >= 0).mean())}
    if not len(sizes):
        return told
    told |= {f"cluster_{name}": float(of(sizes)) for name, of in (("min", np.min), ("mean", np.mean), ("max", np.max))}
    k = sizes.shape[1]
    if k > 1:
        share = sizes / sizes.sum(1, keepdims=True)
        entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(1)
        told["cluster_evenness"] = float(entropy.mean() / np.log(k))
    told["without_neighbour"] = float((near.slide[found.eligible, 0] < 0).sum())
    first = near.score[near.slide[:, 0] >= 0, 0]
    return told | ({"neighbour_cosine": float(first.mean() / k)} if len(first) else {})


def changes(
    before: np.ndarray, after: np.ndarray, slide: np.ndarray, neighbour: np.ndarray, near: Neighbours
) -> dict[str, float]:
    """Since the last time: the share of regions [N] that are in another cluster, once the clusters of a slide before
    and after are matched as well as they can be, and of slides with another nearest neighbour. Nothing, the first time.
    """
    both, told = (before >= 0) & (after >= 0), {}
    if both.any():
        k = int(max(before.max(), after.max())) + 1
        slides, code = np.unique(slide[both], return_inverse=True)
        tables = np.zeros((len(slides), k, k))
        np.add.at(tables, (code, before[both], after[both]), 1)
        told["assignment_churn"] = float(1 - sum(best_matching(table)[0] for table in tables) / both.sum())
    known = (neighbour[:, 0] >= 0) & (near.slide[:, 0] >= 0)
    if known.any():
        told["neighbour_churn"] = float((neighbour[known, 0] != near.slide[known, 0]).mean())
    return told


def kinds(near: Neighbours, slide: np.ndarray, columns: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The share of slides whose nearest neighbour has their label, and what chance would make it, where the labels of
    all regions of a slide are one; and is of their case."""
    told: dict[str, float] = {}
    one = np.flatnonzero(near.slide[:, 0] >= 0)
    for name, column in (("purity", "label"), ("same_case", "case")):
        if column not in columns:
            continue
        of_slide = one_of(slide, columns[column], len(near.slide))
        kept = one[(of_slide[one] >= 0) & (of_slide[near.slide[one, 0]] >= 0)]
        mine, count = of_slide[kept], np.bincount(of_slide[kept])
        if len(kept) < 2 or (name == "purity" and (count > 0).sum() < 2):
            continue
        told[f"neighbour_{name}"] = float((mine == of_slide[near.slide[kept, 0]]).mean())
        told[f"neighbour_{name}_chance"] = float((count * (count - 1)).sum() / (len(kept) * (len(kept) - 1)))
    return told


def one_of(slide: np.ndarray, code: np.ndarray, slides: int) -> np.ndarray:
    """[S]: the code that all regions of a slide have, as far as they have one; else -1."""
    known = code >= 0
    lowest, highest = np.full(slides, np.iinfo(np.int64).max), np.full(slides, -1)
    np.minimum.at(lowest, slide[known], code[known])
    np.maximum.at(highest, slide[known], code[known])
    return np.where(lowest == highest, highest, -1)


def best_matching(cosine: np.ndarray) -> tuple[float, np.ndarray]:
    """The Hungarian method: (sum, column of each row) of [K, K]."""
    rows, columns = linear_sum_assignment(cosine, maximize=True)
    return float(cosine[rows, columns].sum()), columns


def best_sums(cosine: jax.Array) -> jax.Array:
    """[K, rows, K, columns] -> [rows, columns]: of all matchings of the K with the K the largest sum.

    The first rows of a matching take some set of columns; whatever the others do, those had best take it in their best
    way. So one best sum for every set of columns is enough: K 2^(K-1) sums in place of K! K.
    """
    k = cosine.shape[0]
    best: list[jax.Array] = [jnp.zeros((), cosine.dtype)]
    for taken in range(1, 2**k):
        row = taken.bit_count() - 1
        ways = [best[taken ^ (1 << j)] + cosine[row, :, j] for j in range(k) if taken >> j & 1]
        best.append(functools.reduce(jnp.maximum, ways))
    return best[-1]


def _length(count: int) -> int:
    return max(8, 1 << max(count - 1, 0).bit_length())


def _calls(chosen: np.ndarray, numbers: int, mesh: Mesh):
    """[blocks, SLIDES] of slides at a time, blocks a multiple of the devices; -1 pads."""
    across = mesh.shape[sharding.DATA]
    most = max(CALL // (SLIDES * numbers), 1) * across
    blocks = min(most, -(-len(chosen) // (SLIDES * across)) * across)
    for start in range(0, len(chosen), blocks * SLIDES):
        part = np.full(blocks * SLIDES, -1)
        given = chosen[start : start + blocks * SLIDES]
        part[: len(given)] = given
        yield part.reshape(blocks, SLIDES)


@functools.cache
def _clustering(mesh: Mesh, k: int, iterations: int, restarts: int) -> Callable:
    """(key, numbers [b, s], features [b, s, R, D], mask [b, s, R]) -> unit centroids [b, s, K, D], clusters [b, s, R].
    Blocks of slides are spread over the devices and done one after another, so that every device does the same sums.
    """

    def one(key, number, x, mask):
        run = kmeans_of_few if x.shape[0] <= 2 * x.shape[1] else kmeans
        key = jax.random.fold_in(jax.random.wrap_key_data(key), jnp.maximum(number, 0))
        found = run(key, x, mask, k, iterations, restarts)
        length = jnp.linalg.norm(found.centroids, axis=1, keepdims=True)
        return found.centroids / jnp.maximum(length, 1e-12), found.assignment

    def block(key, *arrays):
        return lax.map(lambda part: jax.vmap(functools.partial(one, key))(*part), arrays)

    return _spread(block, mesh)


def _compared(own: np.ndarray, kin: np.ndarray, n: int, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """(score, place in own) [E, n] of the most alike that are not kin: all against all, a tile of the table at a time.
    Where there are fewer, the score is -inf and the place means nothing."""
    slides, across = len(own), mesh.shape[sharding.DATA]
    parts = -(-slides // COLUMNS)
    wide = -(-slides // (parts * 64)) * 64
    blocks = -(-slides // (ROWS * across)) * across
    code = np.unique(kin, return_inverse=True)[1].astype(np.int32)
    right, left = (
        {"vectors": _tiles(own, *shape), "kin": np.pad(code, (0, math.prod(shape) - slides)).reshape(shape)}
        for shape in ((parts, wide), (blocks, ROWS))
    )
    places = (NamedSharding(mesh, PartitionSpec()), sharding.batch_sharding(mesh))
    placed = [
        jax.tree.map(lambda array, at=at: sharding.put_whole(array, at), tables)
        for tables, at in zip((right, left), places, strict=True)
    ]
    score, which = map(np.asarray, _comparing(mesh, n, slides)(*placed))
    return score.reshape(-1, n)[:slides], which.reshape(-1, n)[:slides]


def _tiles(own: np.ndarray, parts: int, wide: int) -> np.ndarray:
    """[parts, K, wide, D] of [E, K, D], padded."""
    tiles = np.zeros((parts * wide, *own.shape[1:]), np.float32)
    tiles[: len(own)] = own
    return np.ascontiguousarray(tiles.reshape(parts, wide, *own.shape[1:]).swapaxes(1, 2))


@functools.cache
def _comparing(mesh: Mesh, n: int, slides: int) -> Callable:
    """(right, left) -> score and number [b, ROWS, n]; of the two, vectors [parts, K, wide, D] and [b, K, ROWS, D], and
    kin [parts, wide] and [b, ROWS]."""

    def block(right, left):
        parts, k, wide, dim = right["vectors"].shape

        def of_rows(mine):
            def part(best, column):
                start, theirs = column
                a, b = (of["vectors"].reshape(-1, dim) for of in (mine, theirs))
                cosine = jnp.matmul(a, b.T, precision=lax.Precision.HIGHEST)
                sums = best_sums(cosine.reshape(k, -1, k, wide))
                other = start + jnp.arange(wide, dtype=jnp.int32)
                sums = jnp.where((theirs["kin"] == mine["kin"][:, None]) | (other >= slides), -jnp.inf, sums)
                score = jnp.concatenate([best[0], sums], 1)  # what was found before stands first, and wins a tie
                which = jnp.concatenate([best[1], jnp.broadcast_to(other, sums.shape)], 1)
                return _largest(score, which, n), None

            rows = len(mine["kin"])
            none = jnp.full((rows, n), -jnp.inf), jnp.full((rows, n), -1, jnp.int32)
            starts = jnp.arange(parts, dtype=jnp.int32) * wide
            return lax.scan(part, none, (starts, right))[0]

        return lax.map(of_rows, left)

    return _spread(block, mesh)


def _largest(score: jax.Array, which: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """The n largest of each row, of equals the first: by n passes, as sorting is slow and n small."""
    scores, places = [], []
    for _ in range(n):
        at = score.argmax(1, keepdims=True)
        scores.append(jnp.take_along_axis(score, at, 1))
        places.append(jnp.take_along_axis(which, at, 1))
        score = jnp.where(jnp.arange(score.shape[1]) == at, -jnp.inf, score)
    return jnp.concatenate(scores, 1), jnp.concatenate(places, 1)


def _bounded(own: np.ndarray, kin: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """As _compared, for many prototypes: the Hungarian method, on the host, for those slides alone that could be among
    the most alike. No matching is better than every row with its best column, nor every column with its best row.
    """
    slides, k, dim = own.shape
    score, which = np.full((slides, n), -np.inf, np.float32), np.zeros((slides, n), np.int64)
    columns = own.reshape(-1, dim).T
    for one in range(slides):
        cosine = (own[one] @ columns).reshape(k, slides, k)
        bound = np.minimum(cosine.max(2).sum(0), cosine.max(0).sum(1)) + 1e-5 * k
        bound[kin == kin[one]] = -np.inf
        best: list[tuple[float, int]] = []
        for other in np.argsort(-bound, kind="stable")[: np.isfinite(bound).sum()].tolist():
            if len(best) == n and -best[-1][0] > bound[other]:
                break
            best = sorted([*best, (-best_matching(cosine[:, other])[0], other)])[:n]
        for rank, (value, other) in enumerate(best):
            score[one, rank], which[one, rank] = -value, other
    return score, which


def _transfers(own: np.ndarray, other: np.ndarray, transfer: str) -> np.ndarray:
    cosine = np.einsum("skd,sjd->skj", own, other)
    if transfer == "argmax":
        return cosine.argmax(2)
    return np.array([best_matching(one)[1] for one in cosine], np.int64).reshape(cosine.shape[:2])


def _spread(block: Callable, mesh: Mesh) -> Callable:
    """A jitted block(whole, split, split...) whose results are whole on every process."""

    def run(first, *split):
        along = PartitionSpec(sharding.DATA)
        specs = (PartitionSpec(), *[along] * len(split))
        return jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=along, check_vma=False)(first, *split)

    return jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))
