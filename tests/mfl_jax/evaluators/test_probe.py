"""The probe from features to held-out figures, against a plain nested fit; chance, signs and leaks."""

import numpy as np
import pytest

from mfl_jax.evaluators import LeakError, Task, evaluate, ridge, score
from mfl_jax.statistics import measure
from tests.mfl_jax.evaluators.cohort import cohort
from tests.mfl_jax.evaluators.test_logistic import oracle

CS = (1e-3, 1e-1, 10.0)
QUICK = {"resamples": 200, "cs": CS}


def test_the_probe_is_the_plain_nested_fit():
    c = cohort()
    result = evaluate(c["features"], c["columns"], c["splits"], Task("t"), **QUICK)
    rows = {s: np.isin(c["columns"]["case"], c["splits"][s]) for s in c["splits"]}
    x, y = c["features"].astype(np.float64), c["columns"]["label"]
    x = (x - x[rows["train"]].mean(0)) / x[rows["train"]].std(0)
    losses, scores = [], []
    for penalty in CS:
        w = oracle(x[rows["train"]], y[rows["train"]], penalty, 2)
        p = 1 / (1 + np.exp(-(np.concatenate([x, np.ones((len(x), 1))], 1) @ w)[:, 0]))
        losses.append(-np.log(np.where(y == 1, p, 1 - p))[rows["val"]].mean())
        scores.append(p[rows["test"]])
    best = int(np.argmin(losses))
    assert result.chosen["C"] == CS[best]
    np.testing.assert_allclose(result.scores, scores[best], atol=2e-4)
    assert result.metrics["auc"].value == pytest.approx(measure("auc", y[rows["test"]], scores[best]), abs=1e-3)
    assert result.mode == "inductive"
    np.testing.assert_array_equal(result.ids, np.flatnonzero(rows["test"]))
    assert result.direction[0] == max(result.direction)


def test_without_signal_the_interval_covers_chance_and_with_it_does_not():
    c = cohort(seed=2, signal=0.0)
    interval = evaluate(c["features"], c["columns"], c["splits"], Task("t"), **QUICK).metrics["auc"]
    assert interval.low < 0.5 < interval.high
    c = cohort(seed=2)
    assert evaluate(c["features"], c["columns"], c["splits"], Task("t"), **QUICK).metrics["auc"].low > 0.6


def test_labels_turned_round_in_the_test_cases_give_the_opposite():
    c = cohort(seed=3)
    test = np.isin(c["columns"]["case"], c["splits"]["test"])
    turned = c["columns"] | {"label": np.where(test, 1 - c["columns"]["label"], c["columns"]["label"])}
    right = evaluate(c["features"], c["columns"], c["splits"], Task("t"), **QUICK).metrics["auc"].value
    wrong = evaluate(c["features"], turned, c["splits"], Task("t"), **QUICK).metrics["auc"].value
    assert wrong == pytest.approx(1 - right)
    assert right > 0.7


def test_leaks_are_refused_or_labelled():
    c = cohort()
    with pytest.raises(LeakError, match="case11"):
        evaluate(c["features"], c["columns"], c["splits"], Task("t"), pretrained=["case11"], **QUICK)
    given = {"pretrained": ["case11"], "transductive": True}
    result = evaluate(c["features"], c["columns"], c["splits"], Task("t"), **given, **QUICK)
    assert result.mode == "transductive"
    assert "transductive" in result.notes[0]


def test_without_a_validation_split_folds_choose_and_test_rows_play_no_part():
    c = cohort(seed=5)
    splits = {"train": c["splits"]["train"] + c["splits"]["val"], "test": c["splits"]["test"]}
    result = evaluate(c["features"], c["columns"], splits, Task("t"), folds=4, **QUICK)
    test = np.isin(c["columns"]["case"], splits["test"])
    spoilt = np.where(test[:, None], c["features"] + 1000, c["features"])
    other = evaluate(spoilt, c["columns"], splits, Task("t"), folds=4, **QUICK)
    assert other.chosen == result.chosen
    np.testing.assert_allclose(other.direction, result.direction, rtol=1e-5)


def test_more_classes_than_two():
    c = cohort(seed=6)
    third = (c["features"][:, 0] > 1) + (c["features"][:, 0] > 0).astype(int)
    result = evaluate(c["features"], c["columns"] | {"label": third}, c["splits"], Task("t"), **QUICK)
    assert result.scores.shape == (len(result.labels), 3)
    assert result.metrics["balanced_accuracy"].low > 0.6


def test_a_regression_finds_a_linear_target_and_not_noise():
    c = cohort(seed=7)
    result = evaluate(c["features"], c["columns"], c["splits"], Task("t", "positive", regression=True), resamples=200)
    assert set(result.metrics) == {"r2", "spearman", "mae"}
    assert result.metrics["r2"].low > 0.9
    noise = {"noise": np.random.default_rng(0).normal(size=len(c["features"]))}
    found = evaluate(
        c["features"], c["columns"] | noise, c["splits"], Task("t", "noise", regression=True), resamples=200
    )
    assert found.metrics["r2"].value < 0.05
    assert found.metrics["spearman"].low < 0 < found.metrics["spearman"].high


def test_predictions_that_exist_already_are_scored_on_the_same_examples():
    c = cohort(seed=8)
    x, y = c["features"][:, 0].astype(float), c["columns"]["label"]
    logits = np.stack([-x, x], 1)
    found = score(logits, c["columns"], c["splits"], Task("t"), resamples=100)
    probe = evaluate(c["features"], c["columns"], c["splits"], Task("t"), **QUICK)
    np.testing.assert_array_equal(found.ids, probe.ids)
    np.testing.assert_allclose(found.scores, 1 / (1 + np.exp(-2 * x[found.ids])))
    assert found.metrics["auc"].value == measure("auc", y[found.ids].astype(int), x[found.ids] / 9)
    values = score(x, c["columns"], c["splits"], Task("t", "positive", regression=True), resamples=100)
    assert values.metrics["spearman"].value > 0.9
    with pytest.raises(LeakError):
        score(logits, c["columns"], c["splits"], Task("t"), pretrained=["case09"])


@pytest.mark.parametrize("shape", [(30, 5), (8, 20)])
def test_ridge_is_the_solution_of_the_normal_equations(shape):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=shape) * 4 + 9, rng.normal(size=(shape[0], 3))
    alphas = (0.01, 1.0, 100.0)
    found = ridge.fit(x, y, alphas).predict(x)
    z = np.concatenate([(x - x.mean(0)) / x.std(0), np.ones((len(x), 1))], 1)
    for predicted, alpha in zip(found, alphas, strict=True):
        penalty = alpha * np.diag([1.0] * shape[1] + [0.0])
        np.testing.assert_allclose(predicted, z @ np.linalg.solve(z.T @ z + penalty, z.T @ y), atol=1e-8)


def test_each_target_has_its_own_penalty():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 20))
    y = np.stack([x[:, 0] * 3, rng.normal(size=60)], 1)
    train, val = np.arange(60) < 30, (np.arange(60) >= 30) & (np.arange(60) < 45)
    predicted, alpha = ridge.nested(x, y, ((train, val),), train, np.arange(45, 60))
    assert alpha[0] < 1 < 100 < alpha[1]
    np.testing.assert_allclose(predicted[:, 0], y[45:, 0], atol=0.2)


def test_faults_are_named():
    c = cohort()
    with pytest.raises(ValueError, match="not finite"):
        evaluate(np.where(c["features"] > 3, np.nan, c["features"]), c["columns"], c["splits"], Task("t"))
    with pytest.raises(ValueError, match="one row an example"):
        evaluate(c["features"][:-1], c["columns"], c["splits"], Task("t"))
    with pytest.raises(ValueError, match="one class only"):
        evaluate(c["features"], c["columns"] | {"label": np.zeros(288, int)}, c["splits"], Task("t"))
