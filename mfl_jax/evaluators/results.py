"""What an evaluation gives back: per-example scores, and metrics with intervals over cases; comparisons of arms."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mfl_jax import statistics
from mfl_jax.statistics import Difference, Interval, Metric

CLASS_METRICS = ("auc", "balanced_accuracy", "accuracy", "f1", "kappa", "average_precision", "ece")


def r2(values: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """1 - squared error / squared deviation from the mean of the same examples; 0 is what a constant gets."""
    total = weights.sum(1)
    mean = _over(weights @ values, total)
    spread = _over(weights @ values**2, total) - mean**2
    error = _over(weights @ (values - scores) ** 2, total)
    return 1 - _over(error, np.where(spread > 1e-12 * np.abs(mean**2 + spread), spread, 0))


def mae(values: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _over(weights @ np.abs(values - scores), weights.sum(1))


def spearman(values: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Correlation of ranks, ties sharing their middle rank; an example of weight 2 counts as two equal ones."""
    a, b = _ranks(values, weights), _ranks(scores, weights)
    total = weights.sum(1, keepdims=True)
    a = a - _over((weights * a).sum(1, keepdims=True), total)
    b = b - _over((weights * b).sum(1, keepdims=True), total)
    return _over((weights * a * b).sum(1), np.sqrt((weights * a * a).sum(1) * (weights * b * b).sum(1)))


def mean_score(values: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean of one number an example, whatever the labels."""
    return _over(weights @ scores, weights.sum(1))


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    _, which = np.unique(values, return_inverse=True)
    order = np.argsort(which, kind="stable")
    starts = np.flatnonzero(np.diff(which[order], prepend=-1))
    mass = np.add.reduceat(weights[:, order], starts, 1)
    return (np.cumsum(mass, 1) - mass / 2)[:, which]


def _over(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom > 0)


VALUE_METRICS: dict[str, Metric] = {"r2": r2, "spearman": spearman, "mae": mae}


def floats(metrics: Mapping[str, Interval], prefix: str) -> dict[str, float]:
    """For a log: value and ends, without ends that are not known."""
    found: dict[str, float] = {}
    for name, interval in metrics.items():
        found[f"{prefix}/{name}"] = interval.value
        if math.isfinite(interval.low):
            found |= {f"{prefix}/{name}_low": interval.low, f"{prefix}/{name}_high": interval.high}
    return found


@dataclass(frozen=True)
class Result:
    task: str
    metrics: dict[str, Interval]  # without those that have no value here, which the notes name
    scores: np.ndarray  # of the test examples: [N] of class 1 (or the predicted value), [N, K] of K classes
    labels: np.ndarray
    cases: np.ndarray
    ids: np.ndarray  # rows of the features that were tested
    chosen: dict[str, Any]
    mode: str  # 'inductive', or 'transductive': test cases were in pre-training
    notes: tuple[str, ...] = ()
    direction: np.ndarray | None = None  # [D] of a linear probe of two classes, on raw features

    def floats(self, prefix: str) -> dict[str, float]:
        return floats(self.metrics, prefix)

    def document(self) -> dict[str, Any]:
        """For JSON; the scores stay out, and an end that is not known is None."""
        metrics = {}
        for name, m in self.metrics.items():
            low, high = (end if math.isfinite(end) else None for end in (m.low, m.high))
            metrics[name] = {"value": m.value, "low": low, "high": high, "method": m.method}
        counts = {"examples": len(self.labels), "cases": len(np.unique(self.cases))}
        found = {"task": self.task, "mode": self.mode, "metrics": metrics, "chosen": self.chosen}
        return found | counts | {"notes": list(self.notes)}


def class_metrics(
    labels: np.ndarray,
    scores: np.ndarray,
    cases: np.ndarray,
    names: Sequence[str] | Mapping[str, str | Metric] = CLASS_METRICS,
    **options: Any,
) -> tuple[dict[str, Interval], tuple[str, ...]]:
    """Intervals by name, and notes: on those with a value but no interval (one case), and those without (one class).

    scores are [N] or [N, K], or of several seeds [S, N], [S, N, K]; with resamples=0 no interval is made.
    """
    given: dict[str, str | Metric] = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    point = {name: functools.partial(statistics.measure, metric, labels, scores) for name, metric in given.items()}
    drawn = {
        name: functools.partial(statistics.bootstrap, metric, labels, scores, cases, **options)
        for name, metric in given.items()
    }
    return _collect(point, drawn if options.get("resamples") != 0 else {}, cases)


def _collect(
    point: Mapping[str, Callable[[], float]], drawn: Mapping[str, Callable[[], Interval]], cases: np.ndarray
) -> tuple[dict[str, Interval], tuple[str, ...]]:
    found: dict[str, Interval] = {}
    faults: dict[str, list[str]] = {}
    for name in point:
        try:
            found[name] = _without(point[name](), cases)
            if name in drawn:
                found[name] = drawn[name]()
        except ValueError as error:
            faults.setdefault(f"{'no interval' if name in found else 'no value'}: {error}", []).append(name)
    return found, tuple(f"{', '.join(names)}: {fault}" for fault, names in faults.items())


def _without(value: float, cases: np.ndarray) -> Interval:
    return statistics.without(value, len(np.unique(cases)))


def value_interval(
    metric: str | Metric,
    values: np.ndarray,
    scores: np.ndarray,
    cases: np.ndarray,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """`statistics.bootstrap` for targets that are numbers: the same resamples of cases, the same intervals. scores are
    [N], or [S, N] of several seeds, over which the metric is averaged."""
    function = VALUE_METRICS[metric] if isinstance(metric, str) else metric
    stack = np.atleast_2d(scores)
    value = _value(function, values, stack)
    names, code = np.unique(np.asarray(cases), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"an interval needs at least 2 cases to draw from, not {len(names)}")
    draws = statistics.draw_cases(len(names), resamples, seed)
    drawn = statistics.resampled(function, values, stack, code, draws)
    knife = statistics.resampled(function, values, stack, code, 1 - np.eye(len(names)))
    return statistics.interval(value, drawn, knife, level=level, method="bca", cases=len(names))


def over_cases(
    function: Metric, table: np.ndarray, cases: np.ndarray, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """The interval of a metric of sums, a row of `table` each (of a slide, of a case); function(_, table, weights).

    Its ends are not known where there is one case, where resamples=0, and where most resamples have no value.
    """
    names, code = np.unique(np.asarray(cases), return_inverse=True)
    none, ones = np.zeros(len(table)), np.ones((1, len(table)))
    value = float(function(none, table, ones)[0])
    if len(names) > 1 and resamples and math.isfinite(value):
        every = (statistics.draw_cases(len(names), resamples, seed), 1 - np.eye(len(names)))
        drawn, knife = (statistics.resampled(function, none, table[None], code, draws) for draws in every)
        if np.isfinite(drawn).sum() >= max(2, len(drawn) / 2):
            return statistics.interval(value, drawn, knife, level=level, method="bca", cases=len(names))
    return _without(value, cases)


def value_metrics(
    values: np.ndarray,
    scores: np.ndarray,
    cases: np.ndarray,
    metrics: Mapping[str, Metric] = VALUE_METRICS,
    **options: Any,
) -> tuple[dict[str, Interval], tuple[str, ...]]:
    """As class_metrics, for targets that are numbers."""
    point = {name: functools.partial(_value, function, values, scores) for name, function in metrics.items()}
    drawn = {
        name: functools.partial(value_interval, function, values, scores, cases, **options)
        for name, function in metrics.items()
    }
    return _collect(point, drawn if options.get("resamples") != 0 else {}, cases)


def _value(function: Metric, values: np.ndarray, scores: np.ndarray) -> float:
    each = [function(values, one, np.ones((1, len(values))))[0] for one in np.atleast_2d(scores)]
    value = float(np.mean(each))
    if math.isnan(value):
        raise ValueError(f"{getattr(function, '__name__', 'the metric')} has no value: the target is constant")
    return value


def compare(
    arms: Mapping[str, Result | Sequence[Result]],
    metric: str | Metric,
    pairs: Sequence[tuple[str, str]] | None = None,
    **options: Any,
) -> list[Difference]:
    """Paired differences of a metric between arms, several results an arm being seeds; Holm over all pairs. A function
    is a metric of values.

    ValueError where the arms were not tested on the same examples.
    """
    stacks: dict[str, np.ndarray] = {}
    first: Result | None = None
    for name, given in arms.items():
        results = [given] if isinstance(given, Result) else list(given)
        for result in results:
            first = first or result
            if not np.array_equal(result.ids, first.ids) or not np.array_equal(result.labels, first.labels):
                raise ValueError(f"arm {name!r} was tested on other examples: paired differences need the same ones")
        stacks[name] = np.stack([r.scores for r in results])
    if first is None:
        raise ValueError("there are no arms to compare")
    if isinstance(metric, str) and metric not in VALUE_METRICS:
        return statistics.compare(metric, first.labels, stacks, first.cases, pairs=pairs, **options)
    return _compare_values(metric, first, stacks, pairs, **options)


def _compare_values(
    metric: str | Metric,
    first: Result,
    stacks: dict[str, np.ndarray],
    pairs: Sequence[tuple[str, str]] | None,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Difference]:
    names = list(stacks)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]] if pairs is None else list(pairs)
    known, code = np.unique(first.cases, return_inverse=True)
    if len(known) < 2:
        raise ValueError(f"a difference needs at least 2 cases to draw from, not {len(known)}")
    every = [np.ones((1, len(known))), statistics.draw_cases(len(known), resamples, seed), 1 - np.eye(len(known))]
    function = VALUE_METRICS[metric] if isinstance(metric, str) else metric
    found = {
        name: [statistics.resampled(function, first.labels, stack, code, draws) for draws in every]
        for name, stack in stacks.items()
    }
    apart = [[a - b for a, b in zip(found[x], found[y], strict=True)] for x, y in pairs]
    options: dict[str, Any] = {"level": level, "method": "bca", "cases": len(known)}
    intervals = [statistics.interval(float(v[0]), drawn, knife, **options) for v, drawn, knife in apart]
    ps = [statistics.two_sided(drawn) for _, drawn, _ in apart]
    corrected = statistics.holm(ps)
    return [Difference(a, b, i, p, float(q)) for (a, b), i, p, q in zip(pairs, intervals, ps, corrected, strict=True)]
