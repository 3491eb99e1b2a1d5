"""Metrics of numbers against scipy on examples written out as often as they weigh; intervals; paired differences."""

import json

import numpy as np
import pytest
from scipy import stats

from mfl_jax.evaluators.results import (
    Result,
    class_metrics,
    compare,
    mae,
    mean_score,
    r2,
    spearman,
    value_interval,
    value_metrics,
)


def data(seed=0, n=60):
    rng = np.random.default_rng(seed)
    values = np.round(rng.normal(size=n), 1)
    return values, np.round(0.7 * values + rng.normal(size=n), 1), rng.integers(0, 4, (5, n)).astype(float)


@pytest.mark.parametrize("metric", [r2, mae, spearman, mean_score])
def test_weights_are_repetitions(metric):
    values, scores, weights = data()
    found = metric(values, scores, weights)
    for row, value in zip(weights.astype(int), found, strict=True):
        y, s = np.repeat(values, row), np.repeat(scores, row)
        expected = {
            r2: lambda y, s: 1 - ((y - s) ** 2).sum() / ((y - y.mean()) ** 2).sum(),
            mae: lambda y, s: np.abs(y - s).mean(),
            spearman: lambda y, s: stats.spearmanr(y, s).statistic,
            mean_score: lambda y, s: s.mean(),
        }[metric](y, s)
        assert value == pytest.approx(expected, abs=1e-9)


def test_a_constant_target_has_no_value_but_says_so():
    found, notes = value_metrics(np.ones(10), np.arange(10.0), np.repeat(["a", "b"], 5), resamples=50)
    assert set(found) == {"mae"}
    assert any(n.startswith("r2: no value") and "constant" in n for n in notes)


def test_intervals_are_over_cases():
    """Ten copies of every row change nothing: it is no more evidence."""
    scores = np.random.default_rng(0).integers(0, 100, 40).astype(float)
    cases = np.repeat(np.arange(8), 5)
    one = value_interval(mean_score, scores, scores, cases, resamples=200)
    ten = value_interval(mean_score, *(np.repeat(x, 10) for x in (scores, scores, cases)), resamples=200)
    assert (ten.low, ten.high) == (one.low, one.high)
    assert one.low < scores.mean() < one.high
    assert one.cases == 8
    alike = np.sort(scores)  # rows of a case say the same: eight cases are hardly more than eight rows
    clustered, single = (value_interval(mean_score, alike, alike, c, resamples=200) for c in (cases, np.arange(40)))
    assert clustered.high - clustered.low > 1.5 * (single.high - single.low)


def test_features_without_signal_cover_chance_and_a_wrong_sign_is_seen():
    rng = np.random.default_rng(3)
    labels, cases = rng.integers(0, 2, 400), np.repeat(np.arange(40), 10)
    found, notes = class_metrics(labels, rng.random(400), cases, resamples=400)
    assert found["auc"].low < 0.5 < found["auc"].high
    assert found["kappa"].low < 0 < found["kappa"].high
    assert notes == ()
    good = np.clip(0.3 + 0.4 * labels + 0.1 * rng.normal(size=400), 0, 1)
    right, _ = class_metrics(labels, good, cases, ["auc"], resamples=200)
    wrong, _ = class_metrics(labels, 1 - good, cases, ["auc"], resamples=200)
    assert right["auc"].low > 0.9
    assert wrong["auc"].high < 0.1


def test_one_case_gives_a_value_without_an_interval():
    found, notes = class_metrics(np.array([0, 1, 1]), np.array([0.1, 0.6, 0.9]), np.array(["a"] * 3), ["auc"])
    assert found["auc"].value == 1
    assert np.isnan(found["auc"].low)
    assert notes == ("auc: no interval: an interval needs at least 2 cases to draw from, not 1",)
    result = Result("t", found, np.zeros(3), np.zeros(3), np.zeros(3), np.arange(3), {}, "inductive", notes)
    assert result.floats("probe") == {"probe/auc": 1.0}
    assert json.loads(json.dumps(result.document()))["metrics"]["auc"]["low"] is None


def result(scores, labels, cases, ids=None):
    ids = np.arange(len(labels)) if ids is None else ids
    return Result("t", {}, scores, labels, cases, ids, {}, "inductive")


def test_paired_differences_of_classes_and_numbers():
    rng = np.random.default_rng(4)
    labels, cases = rng.integers(0, 2, 300), np.repeat(np.arange(30), 10)
    noise = rng.normal(size=300)
    arms = {
        "good": [result(labels + 0.5 * noise, labels, cases), result(labels + 0.6 * noise, labels, cases)],
        "worse": result(labels + 2 * noise, labels, cases),
        "same": result(labels + 2 * noise, labels, cases),
    }
    found = {(d.first, d.second): d for d in compare(arms, "auc", resamples=300)}
    assert found["good", "worse"].interval.low > 0.05
    assert found["worse", "same"].interval.value == 0
    assert found["worse", "same"].p_holm == 1
    values = labels + rng.normal(size=300)
    numbers = {k: result(values + s * noise, values, cases) for k, s in (("near", 0.2), ("far", 1.0))}
    (difference,) = compare(numbers, "r2", resamples=300)
    expected = np.mean(noise**2) * (1.0 - 0.04) / np.var(values)
    assert difference.interval.value == pytest.approx(expected)
    assert difference.interval.low > 0


def test_arms_on_other_examples_are_refused():
    labels, cases = np.array([0, 1, 0, 1]), np.array(list("aabb"))
    other = result(np.zeros(4), labels, cases, ids=np.array([0, 1, 2, 4]))
    with pytest.raises(ValueError, match="'b' was tested on other examples"):
        compare({"a": result(np.zeros(4), labels, cases), "b": other}, "auc")


def test_of_several_seeds_the_metric_is_averaged_and_without_resamples_there_is_no_interval():
    values, scores, _ = data()
    seeds, cases = np.stack([scores, scores[::-1], values]), np.repeat(np.arange(12), 5)
    found, notes = value_metrics(values, seeds, cases, resamples=50)
    assert not notes
    for name, each in {"r2": r2, "mae": mae, "spearman": spearman}.items():
        mean = np.mean([each(values, one, np.ones((1, 60)))[0] for one in seeds])
        assert found[name].value == pytest.approx(mean, abs=1e-12)
        assert found[name].low < mean < found[name].high
    alone, _ = value_metrics(values, values, cases, resamples=50)
    assert alone["r2"].low == alone["r2"].high == 1.0
    labels = (values > 0).astype(int)
    for points, none in (
        value_metrics(values, seeds, cases, resamples=0),
        class_metrics(labels, 1 / (1 + np.exp(-seeds)), cases, resamples=0),
    ):
        assert not none
        assert all(np.isfinite(i.value) and np.isnan(i.low) and np.isnan(i.high) for i in points.values())
