"""How good is a prediction, and how sure can one be: metrics, intervals over cases, paired comparisons. numpy, float64.

The unit of chance is the case (patient): tiles and slides of one case are not independent, so a bootstrap draws cases.
Every metric takes weights [resamples, examples] and gives [resamples]; an example that is drawn twice weighs two. A
resample without one of the classes has no value (nan): it is left out and counted, never patched.

`scores`: [N] the probability of class 1, or [N, K] one column a class; with seeds in front, [S, N] or [S, N, K], in
`bootstrap` and `compare`, which average the metric over seeds within each resample.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy import special

Metric = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
CHUNK = 20_000_000  # weights held at once
BINS = 15


def _columns(scores: np.ndarray) -> np.ndarray:
    """[N, K] from [N] (class 1 of two) or [N, K]."""
    return np.stack([1 - scores, scores], -1) if scores.ndim == 1 else scores


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom > 0)


def confusion(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[R, true class, predicted class]; ties go to the lowest class, and .5 of two classes to class 1."""
    columns = _columns(scores)
    classes = columns.shape[-1]
    predicted = (scores >= 0.5).astype(int) if scores.ndim == 1 else columns.argmax(-1)
    cell = np.zeros((len(labels), classes * classes))
    cell[np.arange(len(labels)), labels * classes + predicted] = 1.0
    return (weights @ cell).reshape(-1, classes, classes)


def accuracy(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    table = confusion(labels, scores, weights)
    return _ratio(np.trace(table, axis1=1, axis2=2), table.sum((1, 2)))


def balanced_accuracy(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean recall over classes."""
    table = confusion(labels, scores, weights)
    return _ratio(np.diagonal(table, axis1=1, axis2=2), table.sum(2)).mean(1)


def f1(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of class 1 when there are two classes, the mean over classes when there are more."""
    table = confusion(labels, scores, weights)
    hit, true, said = np.diagonal(table, axis1=1, axis2=2), table.sum(2), table.sum(1)
    each = np.where(true > 0, _ratio(2 * hit, true + said), np.nan)
    return each[:, 1] if table.shape[1] == 2 else each.mean(1)


def kappa(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Cohen's, unweighted."""
    table = confusion(labels, scores, weights)
    total = table.sum((1, 2))
    expected = _ratio((table.sum(1) * table.sum(2)).sum(1), total**2)
    return _ratio(_ratio(np.trace(table, axis1=1, axis2=2), total) - expected, 1 - expected)


def _by_threshold(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of positives and negatives at each distinct score, the highest first: two [R, distinct]."""
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=np.inf))
    weights, positive = weights[:, order], positive[order]
    return np.add.reduceat(weights * positive, starts, 1), np.add.reduceat(weights * ~positive, starts, 1)


def _one_against_rest(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray, binary: Metric) -> np.ndarray:
    if _columns(scores).shape[-1] == 2:
        return binary(labels == 1, _columns(scores)[:, 1], weights)
    return np.mean([binary(labels == k, scores[:, k], weights) for k in range(scores.shape[1])], axis=0)


def _auc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    hits, misses = _by_threshold(positive, score, weights)
    above = np.cumsum(hits, 1) - hits / 2
    return _ratio((misses * above).sum(1), misses.sum(1) * hits.sum(1))


def auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Chance that a positive scores above a negative, ties one half; several classes: mean of one against the rest."""
    return _one_against_rest(labels, scores, weights, _auc)


def auc_within(strata: np.ndarray) -> Metric:
    """`auc` of examples that are only compared within their stratum [N], such as the fold that tested them: pairs are
    counted over all strata, so that fits of different folds need not agree in scale, and chance is 0.5 for any size."""
    groups = [np.flatnonzero(strata == name) for name in np.unique(strata)]

    def binary(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
        right, pairs = np.zeros(len(weights)), np.zeros(len(weights))
        for rows in groups:
            hits, misses = _by_threshold(positive[rows], score[rows], weights[:, rows])
            right += (misses * (np.cumsum(hits, 1) - hits / 2)).sum(1)
            pairs += misses.sum(1) * hits.sum(1)
        return _ratio(right, pairs)

    def auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return _one_against_rest(labels, scores, weights, binary)

    return auc


def _average_precision(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    hits, misses = _by_threshold(positive, score, weights)
    found = np.cumsum(hits, 1)
    said = found + np.cumsum(misses, 1)
    precision = np.divide(found, said, out=np.zeros_like(found), where=said > 0)
    return _ratio((precision * hits).sum(1), hits.sum(1))


def average_precision(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum over thresholds of precision times the step in recall, without interpolation."""
    return _one_against_rest(labels, scores, weights, _average_precision)


def ece(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error of the most likely class, 15 bins of equal mass; equal confidences share a bin."""
    columns = _columns(scores)
    confidence, right = columns.max(-1), columns.argmax(-1) == labels
    if scores.ndim == 1:
        right = (scores >= 0.5) == (labels == 1)
    _, which, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - counts / 2
    bins = np.minimum((middle / counts.sum() * BINS).astype(int), BINS - 1)[which]
    gap = np.zeros((len(labels), BINS))
    gap[np.arange(len(labels)), bins] = right - confidence
    return _ratio(np.abs(weights @ gap).sum(1), weights.sum(1))


METRICS: dict[str, Metric] = {
    "auc": auc,
    "balanced_accuracy": balanced_accuracy,
    "accuracy": accuracy,
    "f1": f1,
    "kappa": kappa,
    "average_precision": average_precision,
    "ece": ece,
}


def measure(metric: str | Metric, labels: np.ndarray, scores: np.ndarray) -> float:
    """The metric of one set of predictions; a ValueError where it has none (an absent class)."""
    function, labels, stack = _prepare(metric, labels, scores)
    return float(np.mean([_value(function, labels, one) for one in stack]))


def _value(function: Metric, labels: np.ndarray, scores: np.ndarray) -> float:
    value = float(function(labels, scores, np.ones((1, len(labels))))[0])
    if math.isnan(value):
        present = np.unique(labels).tolist()
        raise ValueError(
            f"{getattr(function, '__name__', 'the metric')} has no value here: of {_columns(scores).shape[-1]} classes "
            f"only {present} occur among the labels. Evaluate on cases of every class"
        )
    return value


def _prepare(
    metric: str | Metric, labels: np.ndarray, scores: np.ndarray, arm: str = "scores"
) -> tuple[Metric, np.ndarray, np.ndarray]:
    """The function, int labels [N] and float64 scores [S, N] or [S, N, K]."""
    if isinstance(metric, str):
        if metric not in METRICS:
            raise ValueError(f"unknown metric '{metric}'; there are {', '.join(METRICS)}")
        metric = METRICS[metric]
    labels, stack = np.asarray(labels), np.asarray(scores, np.float64)
    if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels are integers [N], N > 0, not {labels.dtype} {list(labels.shape)}")
    # The examples are the first axis whose length fits: [N], [N, K], [S, N] or [S, N, K].
    if stack.shape[:1] == labels.shape and stack.ndim < 3:
        stack = stack[None]
    if stack.ndim not in (2, 3) or stack.shape[1] != len(labels):
        raise ValueError(
            f"{arm} of {len(labels)} examples are [N], [N, K], [S, N] or [S, N, K], not {list(stack.shape)}"
        )
    if not np.isfinite(stack).all():
        raise ValueError(f"{arm} are finite; {np.sum(~np.isfinite(stack))} of {stack.size} values are not")
    classes = stack.shape[2] if stack.ndim == 3 else 2
    if classes < 2 or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels run from 0 to {classes - 1} for {arm}; found {labels.min()} to {labels.max()}")
    return metric, labels, stack


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float
    level: float
    method: str  # 'bca', 'percentile', 'percentile (no BCa)' where the correction has no value, 'jackknife', 'none'
    cases: int
    resamples: int
    degenerate: int  # resamples left out: a class was missing

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" [{self.low:.3f}, {self.high:.3f}]" if math.isfinite(self.low) else "")


@dataclass(frozen=True)
class Difference:
    """first - second, on the same resamples of cases; p is two-sided, p_holm corrected for all that were compared."""

    first: str
    second: str
    interval: Interval
    p: float
    p_holm: float


def draw_cases(cases: int, resamples: int, seed: int) -> np.ndarray:
    """[resamples, cases] how often each case is drawn, with replacement."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.multinomial(cases, np.full(cases, 1 / cases), resamples).astype(np.float64)


def resampled(
    function: Metric, labels: np.ndarray, stack: np.ndarray, code: np.ndarray, draws: np.ndarray
) -> np.ndarray:
    """[R] the mean over seeds of the metric, per row of draws [R, cases]; nan where it has no value."""
    if function is auc and stack.ndim == 2 and draws.shape[1] * len(labels) <= CHUNK:
        return np.mean([_auc_of_cases(labels == 1, scores, code, draws) for scores in stack], axis=0)
    rows = max(1, CHUNK // len(labels))
    out = []
    for start in range(0, len(draws), rows):
        weights = draws[start : start + rows][:, code]
        out.append(np.mean([function(labels, scores, weights) for scores in stack], axis=0))
    return np.concatenate(out)


def _auc_of_cases(positive: np.ndarray, score: np.ndarray, code: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """As `auc` of draws[:, code], to the bit, in a hundredth of the time: how often positives of one case are above
    negatives of another is counted once, and a resample only weighs these counts."""
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=np.inf))
    of_case = np.eye(draws.shape[1])[code[order]]
    hits, misses = (np.add.reduceat(of_case * side[order, None], starts, 0) for side in (positive, ~positive))
    above = misses.T @ (np.cumsum(hits, 0) - hits / 2)
    return _ratio(((draws @ above) * draws).sum(1), (draws @ hits.sum(0)) * (draws @ misses.sum(0)))


def _codes(cases: Sequence | np.ndarray, examples: int) -> tuple[np.ndarray, int]:
    names, code = np.unique(np.asarray(cases), return_inverse=True)
    if code.shape != (examples,):
        raise ValueError(f"cases name one case for each of {examples} examples, not {list(np.shape(cases))}")
    if len(names) < 2:
        raise ValueError(f"an interval needs at least 2 cases to draw from, not {len(names)}")
    return code, len(names)


def bootstrap(
    metric: str | Metric,
    labels: np.ndarray,
    scores: np.ndarray,
    cases: Sequence | np.ndarray,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    method: str = "bca",
) -> Interval:
    """The metric with an interval over cases; method 'bca' (bias-corrected and accelerated) or 'percentile'."""
    function, labels, stack = _prepare(metric, labels, scores)
    code, count = _codes(cases, len(labels))
    value = float(np.mean([_value(function, labels, one) for one in stack]))
    values = resampled(function, labels, stack, code, draw_cases(count, resamples, seed))
    knife = resampled(function, labels, stack, code, 1 - np.eye(count)) if method == "bca" else None
    return interval(value, values, knife, level=level, method=method, cases=count)


def interval(
    value: float, values: np.ndarray, knife: np.ndarray | None, *, level: float, method: str, cases: int
) -> Interval:
    """From resampled values [R] and, for BCa, those that leave out one case each [cases]."""
    if method not in ("bca", "percentile"):
        raise ValueError(f"method is 'bca' or 'percentile', not '{method}'")
    if not 0 < level < 1:
        raise ValueError(f"level is between 0 and 1, not {level}")
    kept = values[np.isfinite(values)]
    if len(kept) < 2 or len(kept) < len(values) / 2:
        raise ValueError(
            f"{len(values) - len(kept)} of {len(values)} resamples of {cases} cases lack a class: too few cases of "
            "some class for an interval"
        )
    quantiles = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca":
        assert knife is not None
        corrected = _bca(value, kept, knife[np.isfinite(knife)], quantiles)
        quantiles, method = (quantiles, "percentile (no BCa)") if corrected is None else (corrected, method)
    low, high = np.quantile(kept, quantiles)
    return Interval(value, float(low), float(high), level, method, cases, len(values), len(values) - len(kept))


def without(value: float, cases: int) -> Interval:
    """A value whose interval is not known, which is not the same as a narrow one."""
    return Interval(value, math.nan, math.nan, math.nan, "none", cases, 0, 0)


def jackknife(
    value: float, knife: np.ndarray, *, least: float = -math.inf, most: float = math.inf, level: float = 0.95
) -> tuple[Interval, float]:
    """From values that leave out one case each [cases]: an interval, within `least` and `most`, and p of the value
    being 0, by Student's t; neither is known of fewer than two cases. For metrics that a tile would raise which is
    drawn twice, as it always agrees with itself."""
    kept, value = knife[np.isfinite(knife)], min(max(value, least), most)
    if len(kept) < max(2, len(knife) / 2) or not math.isfinite(value):
        return without(value, len(knife)), math.nan
    free = len(kept) - 1
    error = math.sqrt(free / len(kept) * np.sum((kept - kept.mean()) ** 2))
    reach = error * float(special.stdtrit(free, (1 + level) / 2))
    p = 2 * float(special.stdtr(free, -abs(value) / error)) if error > 0 else float(value == 0)
    return Interval(value, max(value - reach, least), min(value + reach, most), level, "jackknife", len(knife), 0, 0), p


def _bca(value: float, kept: np.ndarray, knife: np.ndarray, quantiles: np.ndarray) -> np.ndarray | None:
    """Efron's corrected quantiles, or None where the bias or the acceleration has no value."""
    below = float(np.mean(kept < value) + np.mean(kept <= value)) / 2
    apart = knife.mean() - knife if len(knife) else np.zeros(1)
    spread = np.sum(apart**2)
    if not 0 < below < 1 or spread < 1e-24:
        return None
    normal = NormalDist()
    bias, acceleration = normal.inv_cdf(below), np.sum(apart**3) / (6 * spread**1.5)
    out = []
    for quantile in quantiles:
        z = bias + normal.inv_cdf(float(quantile))
        scale = 1 - acceleration * z
        if scale <= 0:
            return None
        out.append(normal.cdf(bias + z / scale))
    return np.array(out)


def compare(
    metric: str | Metric,
    labels: np.ndarray,
    arms: Mapping[str, np.ndarray],
    cases: Sequence | np.ndarray,
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    method: str = "bca",
) -> list[Difference]:
    """Paired differences between arms (all pairs unless named): one set of resampled cases for all arms and seeds.

    p = 2 min(P(d* <= 0), P(d* >= 0)) over the resampled differences, each with one added; Holm over the pairs.
    """
    pairs = [(a, b) for i, a in enumerate(arms) for b in list(arms)[i + 1 :]] if pairs is None else list(pairs)
    missing = sorted({name for pair in pairs for name in pair} - set(arms))
    if missing:
        raise ValueError(f"no such arms: {', '.join(missing)}; there are {', '.join(arms)}")
    code, count = _codes(cases, len(np.asarray(labels)))
    draws, leave = draw_cases(count, resamples, seed), 1 - np.eye(count)
    points, drawn, knives = {}, {}, {}
    for name in {name: None for pair in pairs for name in pair}:
        function, checked, stack = _prepare(metric, labels, arms[name], f"scores of '{name}'")
        points[name] = float(np.mean([_value(function, checked, one) for one in stack]))
        drawn[name] = resampled(function, checked, stack, code, draws)
        knives[name] = resampled(function, checked, stack, code, leave)
    found, ps = [], []
    for first, second in pairs:
        values = drawn[first] - drawn[second]
        knife = knives[first] - knives[second]
        value = points[first] - points[second]
        found.append(interval(value, values, knife, level=level, method=method, cases=count))
        ps.append(two_sided(values))
    corrected = holm(ps)
    return [Difference(a, b, i, p, float(q)) for (a, b), i, p, q in zip(pairs, found, ps, corrected, strict=True)]


def two_sided(differences: np.ndarray) -> float:
    kept = differences[np.isfinite(differences)]
    tail = min(np.sum(kept <= 0), np.sum(kept >= 0))
    return float(min(1.0, 2 * (tail + 1) / (len(kept) + 1)))


def holm(p: Sequence[float]) -> np.ndarray:
    """Adjusted p-values, in the order given."""
    values = np.asarray(p, np.float64)
    order = np.argsort(values, kind="stable")
    factors = len(values) - np.arange(len(values))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * factors), 1.0) if len(values) else values
    return adjusted
