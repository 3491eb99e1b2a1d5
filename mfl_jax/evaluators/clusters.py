"""Which kinds of tile does an encoder see without being told? k-means of features, beside what the tiles are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from mfl_jax import topk
from mfl_jax.evaluators.probe import check_features
from mfl_jax.evaluators.results import Result, floats, leaving_out, over_cases
from mfl_jax.evaluators.tasks import Task, check_overlap, split_rows
from mfl_jax.kmeans import kmeans
from mfl_jax.statistics import Interval, Metric

K, ITERATIONS, RESTARTS = 8, 50, 8
MOST = 100_000  # rows that centroids are found from


@dataclass(frozen=True)
class Clusters:
    """Of features brought to length 1. Cluster 0 is the largest, and so on down."""

    centroids: np.ndarray  # float32 [k, D]
    assignment: np.ndarray  # int64 [N]
    distance: np.ndarray  # float32 [N] to the own centroid
    notes: tuple[str, ...] = ()

    @property
    def sizes(self) -> np.ndarray:
        return np.bincount(self.assignment, minlength=len(self.centroids))

    def nearest(self, cluster: int, count: int, cases: np.ndarray | None = None) -> np.ndarray:
        """Rows of a cluster, nearest to its centroid first; with `cases`, one of each case in turn."""
        rows = np.flatnonzero(self.assignment == cluster)
        rows = rows[np.argsort(self.distance[rows], kind="stable")]
        if cases is None:
            return rows[:count]
        seen: dict[Any, int] = {}
        turn = np.array([seen[c] for c in cases[rows] if seen.update({c: seen.get(c, -1) + 1}) is None], np.int64)
        return rows[np.argsort(turn, kind="stable")][:count]


@dataclass(frozen=True)
class Agreement:
    """named: share of tiles whose class is the commonest of their cluster in the other cases, by which arms are
    compared; purity: the same with the own case among them; nmi: mutual information over the mean entropy; ari: Rand
    index corrected for chance. Of the last three intervals are by leaving out a case at a time."""

    task: str
    metrics: dict[str, Interval]
    chance: dict[str, float]  # of named and purity: all tiles in one cluster
    tables: np.ndarray  # int64 [cases, k, classes] tiles
    cases: np.ndarray  # their names, sorted
    mode: str = "inductive"
    notes: tuple[str, ...] = ()

    @property
    def table(self) -> np.ndarray:
        return self.tables.sum(0)

    def floats(self, prefix: str) -> dict[str, float]:
        return floats(self.metrics, prefix) | {f"{prefix}/{k}_chance": v for k, v in self.chance.items()}


def find(
    features: np.ndarray,
    k: int = K,
    *,
    iterations: int = ITERATIONS,
    restarts: int = RESTARTS,
    most: int = MOST,
    seed: int = 0,
) -> Clusters:
    """All rows in k clusters; the centroids are of at most `most` rows, drawn by seed."""
    check_features(features, np.ones(len(features), bool))
    if not 1 < k <= len(features):
        raise ValueError(f"k is from 2 to the number of tiles, {len(features)}; it is {k}")
    unit = topk.unit(features)
    rows = np.sort(np.random.default_rng(seed).permutation(len(unit))[:most])
    notes = (f"centroids of {len(rows)} of {len(unit)} tiles, drawn by seed {seed}",) if len(rows) < len(unit) else ()
    asked = {"k": k, "iterations": iterations, "restarts": restarts}
    found = kmeans(jax.random.key(seed), unit[rows], np.ones(len(rows), bool), **asked)
    centroids = np.asarray(found.centroids)
    assignment, distance = assign(unit, centroids)
    order = np.argsort(-np.bincount(assignment, minlength=k), kind="stable")
    return Clusters(centroids[order], np.argsort(order)[assignment], distance, notes)


def assign(unit: np.ndarray, centroids: np.ndarray, block: int = 65536) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of each row, and its distance."""
    which, length = [], (centroids**2).sum(1)
    for start in range(0, len(unit), block):
        part = unit[start : start + block]
        which.append((length - 2 * part @ centroids.T).argmin(1))
    found = np.concatenate(which)
    return found, np.linalg.norm(unit - centroids[found], axis=1)


def agreement(
    assignment: np.ndarray,
    target: np.ndarray,
    cases: np.ndarray,
    k: int,
    *,
    task: str = "label",
    resamples: int = 2000,
    seed: int = 0,
) -> Agreement:
    """Of k clusters and classes (both from 0), with intervals over cases, whose tiles keep their clusters."""
    names, code = np.unique(np.asarray(cases), return_inverse=True)
    tables = np.zeros((len(names), k, int(target.max()) + 1), np.int64)
    np.add.at(tables, (code, assignment, target), 1)
    found = _intervals([tables], names, resamples, seed)
    notes = tuple(f"{name} has no value: {why}" for name, why in WHY_NONE.items() if name not in found)
    commonest = float(tables.sum((0, 1)).max() / tables.sum())
    chance = {"named": commonest, "purity": commonest, "ari": 0.0}
    return Agreement(task, found, chance, tables, names, notes=notes)


def over_seeds(results: Sequence[Agreement], *, seed: int = 0, resamples: int = 2000) -> dict[str, Interval]:
    """Of several seeds whose tiles are the same: the mean over seeds, with an interval over cases."""
    return _intervals([result.tables for result in results], results[0].cases, resamples, seed)


def _intervals(tables: Sequence[np.ndarray], cases: np.ndarray, resamples: int, seed: int) -> dict[str, Interval]:
    """Of those measures that have a value. Which tiles are named right is settled before cases are drawn; the others
    are of whole tables, and a case that is drawn twice would agree with itself."""
    found: dict[str, Interval] = {}
    if len(cases) > 1:
        hits = np.mean([named(one) for one in tables], 0)
        found["named"] = over_cases(share, hits, cases, resamples=resamples, seed=seed)
    flat = np.concatenate([one.reshape(len(cases), -1) for one in tables], 1).astype(np.float64)

    def of(measure: str) -> Metric:
        def mean(_: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
            each = np.split(weights @ rows, np.cumsum([one[0].size for one in tables])[:-1], axis=1)
            shapes = [one.shape[1:] for one in tables]
            return np.mean([MEASURES[measure](t.reshape(-1, *s)) for t, s in zip(each, shapes, strict=True)], 0)

        return mean

    found |= {name: leaving_out(of(name), flat, cases, least=LEAST[name]) for name in MEASURES}
    return {name: interval for name, interval in found.items() if np.isfinite(interval.value)}


def as_result(found: Agreement) -> Result:
    """A row a case, for comparisons of arms by results.compare with `share`."""
    rows = np.arange(len(found.cases))
    return Result(
        found.task, found.metrics, named(found.tables), np.zeros(len(rows)), found.cases, rows, {}, found.mode
    )


def evaluate(
    features: np.ndarray,
    columns: Mapping[str, np.ndarray],
    splits: Mapping[str, Sequence],
    task: Task,
    *,
    k: int = K,
    split: str = "test",
    pretrained: Sequence = (),
    transductive: bool = False,
    seed: int = 0,
    resamples: int = 2000,
) -> Agreement:
    """Clusters of the tiles of a split, found without their classes, beside those."""
    seen = check_overlap(splits, pretrained, transductive=transductive)
    if task.regression:
        raise ValueError(f"task {task.name!r}: clusters are compared with classes; give a threshold")
    target, known = task.read(columns)
    check_features(features, known)
    rows = np.flatnonzero(split_rows(columns, splits, known)[split])
    found = find(features[rows], k, seed=seed)
    cases = np.asarray(columns["case"])[rows]
    result = agreement(found.assignment, target[rows], cases, k, task=task.name, resamples=resamples, seed=seed)
    mode = "transductive" if seen else "inductive"
    return replace(result, mode=mode, notes=seen + found.notes + result.notes)


def named(tables: np.ndarray) -> np.ndarray:
    """Of tables [cases, k, classes]: float64 [cases, 2], tiles whose class is the commonest of their cluster in the
    other cases, and tiles. A cluster that no other case has is of no class."""
    others = tables.sum(0) - tables
    name, known = others.argmax(2), others.sum(2) > 0
    right = np.take_along_axis(tables, name[..., None], 2)[..., 0] * known
    return np.stack([right.sum(1), tables.sum((1, 2))], 1).astype(np.float64)


def share(_: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    right, every = (weights @ rows).T
    return _over(right, every)


def purity(table: np.ndarray) -> np.ndarray:
    """Of tables [R, clusters, classes] of counts, as the two below."""
    return _over(table.max(2).sum(1), table.sum((1, 2)))


def nmi(table: np.ndarray) -> np.ndarray:
    share = _over(table, table.sum((1, 2), keepdims=True))
    rows, columns = _entropy(share.sum(2)), _entropy(share.sum(1))
    together = _entropy(share.reshape(len(share), -1))
    return _over(rows + columns - together, (rows + columns) / 2)


def ari(table: np.ndarray) -> np.ndarray:
    both, rows, columns = _pairs(table).sum((1, 2)), _pairs(table.sum(2)).sum(1), _pairs(table.sum(1)).sum(1)
    expected = _over(rows * columns, _pairs(table.sum((1, 2))))
    return _over(both - expected, (rows + columns) / 2 - expected)


MEASURES = {"purity": purity, "nmi": nmi, "ari": ari}
LEAST = {"purity": 0.0, "nmi": 0.0, "ari": -1.0}
WHY_NONE = {"named": "there is one case only"} | dict.fromkeys(("nmi", "ari"), "there is one class only")


def _entropy(share: np.ndarray) -> np.ndarray:
    return -(share * np.log(np.where(share > 0, share, 1))).sum(-1)


def _pairs(count: np.ndarray) -> np.ndarray:
    return count * (count - 1) / 2


def _over(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    top, bottom = np.broadcast_arrays(np.asarray(top, np.float64), np.asarray(bottom, np.float64))
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 1e-12)
