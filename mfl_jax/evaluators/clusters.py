"""Which kinds of tile does an encoder see without being told? k-means of features, beside what the tiles are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from mfl_jax import statistics, topk
from mfl_jax.evaluators.probe import check_features
from mfl_jax.evaluators.results import floats
from mfl_jax.evaluators.tasks import Task, check_overlap, split_rows
from mfl_jax.kmeans import kmeans
from mfl_jax.statistics import Difference, Interval

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
    """ari: Rand index corrected for chance, by which arms are compared; purity: share of tiles that are of the
    commonest class of their cluster; nmi: mutual information over the mean entropy, above 0 for clusters of nothing.
    Intervals are by leaving out a case at a time."""

    task: str
    metrics: dict[str, Interval]
    chance: dict[str, float]  # of ari, and of purity: all tiles in one cluster
    tables: np.ndarray  # int64 [cases, k, classes] tiles
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
    assignment: np.ndarray, target: np.ndarray, cases: np.ndarray, k: int, *, task: str = "label"
) -> Agreement:
    """Of k clusters and classes (both from 0), with intervals over cases, whose tiles keep their clusters."""
    _, code = np.unique(np.asarray(cases), return_inverse=True)
    tables = np.zeros((code.max() + 1, k, int(target.max()) + 1), np.int64)
    np.add.at(tables, (code, assignment, target), 1)
    found = _intervals([tables])
    notes = tuple(f"{name} has no value: there is one class only" for name in MEASURES if name not in found)
    table = tables.sum(0)
    chance = {"ari": 0.0, "purity": float(table.sum(0).max() / table.sum())}
    return Agreement(task, found, chance, tables, notes=notes)


def over_seeds(results: Sequence[Agreement]) -> dict[str, Interval]:
    """Of several seeds whose tiles are the same: the mean over seeds, with an interval over cases."""
    return _intervals([result.tables for result in results])


def compare(arms: Mapping[str, Sequence[Agreement]], pairs: Sequence[tuple[str, str]]) -> list[Difference]:
    """Paired differences of ari, several results an arm being seeds; Holm over all pairs. ValueError where there is no
    interval to be had."""
    values = {name: _left_out("ari", [result.tables for result in results]) for name, results in arms.items()}
    found = [statistics.jackknife(values[a][0] - values[b][0], values[a][1:] - values[b][1:]) for a, b in pairs]
    if not all(np.isfinite(p) for _, p in found):
        raise ValueError("an interval needs at least 2 cases, and 2 classes among their tiles")
    corrected = statistics.holm([p for _, p in found])
    return [Difference(a, b, i, p, float(q)) for (a, b), (i, p), q in zip(pairs, found, corrected, strict=True)]


def _intervals(tables: Sequence[np.ndarray]) -> dict[str, Interval]:
    """Of those measures that have a value."""
    found = {}
    for name, (_, least) in MEASURES.items():
        value, *knife = _left_out(name, tables)
        found[name], _ = statistics.jackknife(float(value), np.array(knife), least=least, most=1.0)
    return {name: interval for name, interval in found.items() if np.isfinite(interval.value)}


def _left_out(name: str, tables: Sequence[np.ndarray]) -> np.ndarray:
    """[1 + cases]: the mean over seeds of a measure of all cases, and without each of them."""
    every = [np.concatenate([one.sum(0)[None], one.sum(0) - one]) for one in tables]
    return np.mean([MEASURES[name][0](one.astype(np.float64)) for one in every], 0)


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
    resamples: int = 0,
) -> Agreement:
    """Clusters of the tiles of a split, found without their classes, beside those. Nothing is resampled: the argument
    is there since other evaluators have it."""
    seen = check_overlap(splits, pretrained, transductive=transductive)
    if task.regression:
        raise ValueError(f"task {task.name!r}: clusters are compared with classes; give a threshold")
    target, known = task.read(columns)
    check_features(features, known)
    rows = np.flatnonzero(split_rows(columns, splits, known)[split])
    found = find(features[rows], k, seed=seed)
    cases = np.asarray(columns["case"])[rows]
    result = agreement(found.assignment, target[rows], cases, k, task=task.name)
    mode = "transductive" if seen else "inductive"
    return replace(result, mode=mode, notes=seen + found.notes + result.notes)


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


MEASURES = {"ari": (ari, -1.0), "purity": (purity, 0.0), "nmi": (nmi, 0.0)}  # and the least that they can be


def _entropy(share: np.ndarray) -> np.ndarray:
    return -(share * np.log(np.where(share > 0, share, 1))).sum(-1)


def _pairs(count: np.ndarray) -> np.ndarray:
    return count * (count - 1) / 2


def _over(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    top, bottom = np.broadcast_arrays(np.asarray(top, np.float64), np.asarray(bottom, np.float64))
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 1e-12)
