"""Does a tile find its like in other patients, and its partner among all? And does distance grow along a slide?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mfl_jax import statistics, topk
from mfl_jax.evaluators.probe import check_features
from mfl_jax.evaluators.results import Result, floats, mean_score, over_cases, value_metrics
from mfl_jax.evaluators.tasks import Task, check_overlap
from mfl_jax.statistics import Difference, Interval

KS = (1, 5, 10)
DEPTH = 100  # neighbours that map and ndcg look at
MOST = 5000  # queries, and tiles a slide of distance_ratio
ACROSS = ("case", "slide")


@dataclass(frozen=True)
class Retrieved:
    """recall_k: share of queries with a right answer among the first k. map and ndcg are of the first `depth` answers,
    beside the best that is possible there. A query to which no answer exists has no value: it is counted in `counts`.
    Intervals draw the cases of the queries; the bank stays as it is.
    """

    task: str
    metrics: dict[str, Interval]
    chance: dict[str, float]  # of recall_k, for answers in random order
    counts: dict[str, int]  # bank, queries, without_answer; unknown: tiles of the split that have no class
    each: dict[str, np.ndarray]  # float64 [Q] by metric, of the queries that have an answer
    cases: np.ndarray  # [Q]
    ids: np.ndarray  # [Q] rows of the features
    mode: str = "inductive"
    notes: tuple[str, ...] = ()
    positive: np.ndarray | None = None  # bool [Q]: queries of class 1, where there are two classes

    def floats(self, prefix: str) -> dict[str, float]:
        found = floats(self.metrics, prefix) | {f"{prefix}/{k}_chance": v for k, v in self.chance.items()}
        return found | {f"{prefix}/{name}": float(count) for name, count in self.counts.items()}

    def document(self) -> dict[str, Any]:
        """For JSON; values of single queries stay out, and an end that is not known is NaN."""
        metrics = {k: {"value": m.value, "low": m.low, "high": m.high} for k, m in self.metrics.items()}
        found = {"task": self.task, "mode": self.mode, "metrics": metrics, "chance": self.chance}
        return found | self.counts | {"notes": list(self.notes)}


def evaluate(
    features: np.ndarray,
    columns: Mapping[str, np.ndarray],
    splits: Mapping[str, Sequence],
    task: Task,
    *,
    across: str = "case",
    split: str = "test",
    ks: Sequence[int] = KS,
    depth: int = DEPTH,
    most: int = MOST,
    pretrained: Sequence = (),
    transductive: bool = False,
    seed: int = 0,
    resamples: int = 2000,
) -> Retrieved:
    """Tiles of a split ask for tiles of their own class among the tiles of that split in another case (or, with
    across='slide', on another slide). Of two classes, `positive_...` is of the queries of class 1 alone: tumour tiles.
    """
    seen = check_overlap(splits, pretrained, transductive=transductive)
    if task.regression:
        raise ValueError(f"task {task.name!r}: retrieval needs classes; give a threshold in place of a regression")
    if across not in ACROSS:
        raise ValueError(f"across is {across!r}; allowed: {', '.join(ACROSS)}")
    target, known = task.read(columns)
    check_features(features, known)
    of_split = np.isin(np.asarray(columns["case"]), np.asarray(list(splits.get(split, ()))))
    bank = np.flatnonzero(of_split & known)
    if not len(bank):
        raise ValueError(f"no example of split {split!r} has a known target")
    unknown = int(of_split.sum()) - len(bank)
    queries, notes = _drawn(bank, most, seed, "queries")
    group, label = np.unique(np.asarray(columns[across])[bank], return_inverse=True)[1], target[bank]
    asked = np.searchsorted(bank, queries)
    each, there, chance = answers(features[bank], label, group, asked, ks, depth)
    if not there.any():
        raise ValueError(
            f"task {task.name!r}: none of {len(queries)} queries has an answer in another {across} of split {split!r}"
        )
    cases = np.asarray(columns["case"])[queries]
    metrics, more = _intervals(each, cases[there], "", resamples, seed)
    counts = {"bank": len(bank), "queries": len(queries), "without_answer": int((~there).sum()), "unknown": unknown}
    positive = label[asked] == 1
    if target[known].max() == 1 and (positive & there).any():
        some = {name: values[positive[there]] for name, values in each.items()}
        found, extra = _intervals(some, cases[positive & there], "positive_", resamples, seed)
        metrics, more = metrics | found, more + extra
        counts |= {"positive_queries": int(positive.sum()), "positive_without_answer": int((positive & ~there).sum())}
    if counts["without_answer"]:
        more += (f"{counts['without_answer']} of {len(queries)} queries have no answer in another {across}",)
    mode = "transductive" if seen else "inductive"
    notes = seen + notes + more
    two = positive[there] if target[known].max() == 1 else None
    return Retrieved(task.name, metrics, chance, counts, each, cases[there], queries[there], mode, notes, two)


def answers(
    features: np.ndarray, label: np.ndarray, group: np.ndarray, asked: np.ndarray, ks: Sequence[int], depth: int = DEPTH
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, float]]:
    """Rows `asked` of a bank ask for rows of their label in another group (both numbered from 0): values by metric of
    those queries that have an answer, which they are (bool, of `asked`), and the recall of answers in random order.
    """
    options: dict[str, Any] = {"k": max(*ks, depth), "exclude": [(group[asked], group)]}
    _, index = topk.search(features[asked], features, **options)
    hit = (index >= 0) & (label[np.maximum(index, 0)] == label[asked][:, None])
    table = np.zeros((label.max() + 1, group.max() + 1), np.int64)
    np.add.at(table, (label, group), 1)
    right = table[label[asked]].sum(1) - table[label[asked], group[asked]]
    allowed = len(label) - table.sum(0)[group[asked]]
    there = right > 0
    chance = {f"recall_{k}": _chance(right[there], allowed[there], k) for k in ks} if there.any() else {}
    return _each(hit[there], right[there], ks, depth), there, chance


def cross_modal(
    first: np.ndarray,
    second: np.ndarray,
    columns: Mapping[str, np.ndarray],
    *,
    names: tuple[str, str] = ("he", "partner"),
    ks: Sequence[int] = KS,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Retrieved]:
    """{'he_to_partner': ..., 'partner_to_he': ...}: row i of one modality asks for row i among all of the other, its
    own slide not left out. Both are in one space: projections of a method that compares the two.
    """
    if first.shape != second.shape:
        raise ValueError(f"both modalities have the same rows in one space, not {first.shape} and {second.shape}")
    check_features(first, np.ones(len(columns["case"]), bool))
    check_features(second, np.ones(len(first), bool))
    cases, found = np.asarray(columns["case"]), {}
    for (a, x), (b, y) in (((names[0], first), (names[1], second)), ((names[1], second), (names[0], first))):
        rank = _ranks(topk.unit(x), topk.unit(y))
        each = {f"recall_{k}": (rank <= k).astype(float) for k in ks}
        each |= {"map": 1 / rank, "ndcg": 1 / np.log2(1 + rank)}
        metrics, notes = _intervals(each, cases, "", resamples, seed)
        counts = {"bank": len(x), "queries": len(x), "without_answer": 0, "median_rank": int(np.median(rank))}
        chance = {f"recall_{k}": min(1.0, k / len(x)) for k in ks}
        name = f"{a}_to_{b}"
        found[name] = Retrieved(name, metrics, chance, counts, each, cases, np.arange(len(x)), notes=notes)
    return found


def over_seeds(results: Sequence[Retrieved], *, seed: int = 0, resamples: int = 2000) -> dict[str, Interval]:
    """Metrics of several seeds that were asked the same: the mean over seeds, with an interval over cases."""
    for result in results[1:]:
        if not np.array_equal(result.ids, results[0].ids):
            raise ValueError("seeds were asked different queries: their mean would compare nothing")
    first = results[0]
    each = {name: np.mean([r.each[name] for r in results], 0) for name in first.each}
    found = _intervals(each, first.cases, "", resamples, seed)[0]
    if first.positive is None or not first.positive.any():
        return found
    some = {name: values[first.positive] for name, values in each.items()}
    return found | _intervals(some, first.cases[first.positive], "positive_", resamples, seed)[0]


def as_result(found: Retrieved, metric: str) -> Result:
    """One value a query, for comparisons of arms by results.compare with mean_score."""
    none = np.zeros(len(found.ids), int)
    return Result(found.task, found.metrics, found.each[metric], none, found.cases, found.ids, {}, found.mode)


def compare(arms: Mapping[str, Retrieved | Sequence[Retrieved]], metric: str, **options: Any) -> list[Difference]:
    """Paired differences of a metric between arms, several results an arm being seeds; Holm over all pairs. ValueError
    where the arms were not asked the same.
    """
    stacks, first = {}, None
    for name, given in arms.items():
        results = [given] if isinstance(given, Retrieved) else list(given)
        for result in results:
            first = first or result
            if metric not in result.each:
                raise ValueError(f"there is no metric {metric!r}; there are {', '.join(result.each)}")
            if not np.array_equal(result.ids, first.ids) or not np.array_equal(result.cases, first.cases):
                raise ValueError(f"arm {name!r} was asked other queries: paired differences need the same ones")
        stacks[name] = np.stack([r.each[metric] for r in results])
    if first is None:
        raise ValueError("there are no arms to compare")
    return statistics.compare(mean_score, np.zeros(len(first.ids), int), stacks, first.cases, **options)


def distance_ratio(
    features: np.ndarray | Sequence[np.ndarray],
    columns: Mapping[str, np.ndarray],
    *,
    near_um: float,
    far_um: float,
    most: int = MOST,
    seed: int = 0,
    resamples: int = 2000,
) -> tuple[dict[str, Interval], tuple[str, ...]]:
    """ADDR, the mean Euclidean distance of far pairs over that of near pairs: addr_global over the pairs of all slides,
    addr_local a slide and then the mean; and notes.

    A pair lies on one slide, its centres less than near_um apart or more than far_um; others are not used. Columns x, y
    and mpp give places. A high ratio may be stain and smoothness alone: read it beside retrieval in other cases.
    Features of several seeds, in a list, give the mean of their ratios.
    """
    check_limits(near_um, far_um)
    seeds = [features] if isinstance(features, np.ndarray) else list(features)
    for one in seeds:
        check_features(one, np.ones(len(columns["slide"]), bool))
    at = np.stack([np.asarray(columns[c], np.float64) * np.asarray(columns["mpp"], np.float64) for c in ("x", "y")], 1)
    if not np.isfinite(at).all():
        raise ValueError(f"{np.sum(~np.isfinite(at).all(1))} tiles have no place on their slide (columns x, y, mpp)")
    names, which = np.unique(np.asarray(columns["slide"]), return_inverse=True)
    sums, cases, notes = [], [], []
    for number, _ in enumerate(names):
        rows, drawn = _drawn(np.flatnonzero(which == number), most, seed, "tiles")
        notes += [f"slide {names[number]}: {note}" for note in drawn]
        sums.append([_pair_sums(one[rows], at[rows], near_um, far_um) for one in seeds])
        cases.append(np.asarray(columns["case"])[rows[0]])
    table, of_case = np.array(sums), np.array(cases)
    both = (table[:, 0, 2:] > 0).all(1)
    if not both.any():
        raise ValueError(
            f"no slide has pairs both nearer than {near_um:g} um and farther than {far_um:g} um; the farthest pair is "
            f"{_widest(at, which):.0f} um apart"
        )
    if not both.all():
        notes.append(f"{int((~both).sum())} of {len(names)} slides lack near or far pairs: not in addr_local")
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    found = {"addr_global": over_cases(_global_ratio, table, of_case, **options)}
    found["addr_local"] = over_cases(_local_ratio, table[both], of_case[both], **options)
    return found, tuple(notes)


def check_limits(near_um: float, far_um: float) -> None:
    if not 0 < near_um <= far_um:
        raise ValueError(f"0 < near_um <= far_um, not near_um={near_um} and far_um={far_um}")


def _drawn(rows: np.ndarray, most: int, seed: int, what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    if len(rows) <= most:
        return rows, ()
    kept = np.sort(np.random.default_rng(seed).permutation(len(rows))[:most])
    return rows[kept], (f"{most} of {len(rows)} {what}, drawn by seed {seed}",)


def _each(hit: np.ndarray, right: np.ndarray, ks: Sequence[int], depth: int) -> dict[str, np.ndarray]:
    """By metric, of queries that have `right` > 0 answers; hit [Q, k] by rank."""
    found = {f"recall_{k}": hit[:, :k].any(1).astype(float) for k in ks}
    hit = hit[:, :depth].astype(float)
    rank = np.arange(1, hit.shape[1] + 1)
    best = np.minimum(right, depth)
    gain = 1 / np.log2(1 + np.arange(1, depth + 1))
    found["map"] = (hit * np.cumsum(hit, 1) / rank).sum(1) / best
    found["ndcg"] = hit @ gain[: hit.shape[1]] / np.cumsum(gain)[best - 1]
    return found


def _intervals(
    each: Mapping[str, np.ndarray], cases: np.ndarray, prefix: str, resamples: int, seed: int
) -> tuple[dict[str, Interval], tuple[str, ...]]:
    found: dict[str, Interval] = {}
    notes: tuple[str, ...] = ()
    for name, values in each.items():
        metric = {f"{prefix}{name}": mean_score}
        part, more = value_metrics(values, values, cases, metric, resamples=resamples, seed=seed)
        found, notes = found | part, notes + more
    return found, notes


def _chance(right: np.ndarray, allowed: np.ndarray, k: int) -> float:
    """That k rows drawn from `allowed` hold at least one of `right`: the mean over queries."""
    drawn = np.arange(k)
    left = np.maximum((allowed - right)[:, None] - drawn, 0) / np.maximum(allowed[:, None] - drawn, 1)
    return float(1 - left.prod(1).mean())


def _ranks(x: np.ndarray, y: np.ndarray, block: int = 1024) -> np.ndarray:
    """[N] place of row i of y among all, from 1; of equals the lower row is before."""
    number, found = np.arange(len(y)), []
    for start in range(0, len(x), block):
        own = number[start : start + block]
        close = x[own] @ y.T
        mine = close[np.arange(len(own)), own][:, None]
        before = (close > mine) | ((close == mine) & (number[None] < own[:, None]))
        found.append(1 + before.sum(1))
    return np.concatenate(found)


def _pair_sums(x: np.ndarray, at: np.ndarray, near_um: float, far_um: float, block: int = 512) -> np.ndarray:
    """[4]: sum of feature distances of far pairs and of near pairs, and their numbers; each pair counts twice."""
    x = np.asarray(x, np.float64) - np.mean(x, 0, np.float64)
    length, total = (x**2).sum(1), np.zeros(4)
    for start in range(0, len(x), block):
        rows = np.arange(start, min(start + block, len(x)))
        apart = np.sqrt(np.maximum(length[rows, None] + length - 2 * x[rows] @ x.T, 0))
        um = np.hypot(*(at[rows, None] - at[None]).transpose(2, 0, 1))
        near, far = um < near_um, um > far_um
        near[np.arange(len(rows)), rows] = False
        total += [apart[far].sum(), apart[near].sum(), far.sum(), near.sum()]
    return total


def _global_ratio(values: np.ndarray, sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of sums [slides, seeds, 4]: the mean over seeds, [resamples]."""
    far, near, far_pairs, near_pairs = np.moveaxis(np.tensordot(weights, sums, 1), -1, 0)
    return _over(far * near_pairs, near * far_pairs).mean(1)


def _local_ratio(values: np.ndarray, sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    far, near, far_pairs, near_pairs = np.moveaxis(sums, -1, 0)
    return _over(weights @ _over(far * near_pairs, near * far_pairs).mean(1), weights.sum(1))


def _over(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom > 0)


def _widest(at: np.ndarray, which: np.ndarray) -> float:
    """At least the farthest pair of any slide, by the sides of what its tiles cover."""
    return max(float(np.hypot(*np.ptp(at[which == number], axis=0))) for number in np.unique(which))
