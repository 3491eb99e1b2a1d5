"""Metrics and intervals against brute force: pairs, thresholds and resamples one at a time, examples repeated."""

import itertools

import numpy as np
import pytest
from scipy import stats

from mfl_jax import statistics as st
from mfl_jax.statistics import METRICS, bootstrap, compare, holm, measure


def data(n=40, classes=2, ties=True, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    if classes == 2:
        scores = rng.random(n) * 0.6 + 0.4 * labels * rng.random(n)
        return labels, np.round(scores, 1) if ties else scores
    scores = rng.random((n, classes)) + 0.5 * np.eye(classes)[labels]
    scores = np.round(scores, 1) + (0.0 if ties else 1e-3 * rng.random((n, classes)))
    return labels, scores / scores.sum(1, keepdims=True)


def brute_auc(positive, score):
    won = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    return sum(won) / len(won)


def brute_precision(positive, score):
    total, before = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        said = score >= threshold
        recall = (said & positive).sum() / positive.sum()
        total += (recall - before) * (said & positive).sum() / said.sum()
        before = recall
    return total


def brute(name, labels, scores):
    binary = scores.ndim == 1
    classes = 2 if binary else scores.shape[1]
    predicted = (scores >= 0.5).astype(int) if binary else scores.argmax(1)
    if name in ("auc", "average_precision"):
        function = brute_auc if name == "auc" else brute_precision
        if binary:
            return function(labels == 1, scores)
        return np.mean([function(labels == k, scores[:, k]) for k in range(classes)])
    if name == "accuracy":
        return np.mean(predicted == labels)
    if name == "balanced_accuracy":
        return np.mean([np.mean(predicted[labels == k] == k) for k in range(classes)])
    if name == "f1":
        each = []
        for k in range(classes):
            hit = np.sum((predicted == k) & (labels == k))
            precision, recall = hit / max(np.sum(predicted == k), 1), hit / np.sum(labels == k)
            each.append(2 * precision * recall / (precision + recall) if hit else 0.0)
        return each[1] if binary else np.mean(each)
    if name == "kappa":
        seen = np.mean(predicted == labels)
        chance = sum(np.mean(predicted == k) * np.mean(labels == k) for k in range(classes))
        return (seen - chance) / (1 - chance)
    raise AssertionError(name)


@pytest.mark.parametrize("name", [name for name in METRICS if name != "ece"])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("ties", [True, False])
def test_a_metric_equals_brute_force_and_a_weight_is_a_repeated_example(name, classes, ties):
    for seed in range(5):
        labels, scores = data(classes=classes, ties=ties, seed=seed)
        assert measure(name, labels, scores) == pytest.approx(brute(name, labels, scores), abs=1e-12)
        weights = np.random.default_rng(seed).integers(0, 4, (3, len(labels)))
        weights[:, :classes] += 1
        expected = [brute(name, np.repeat(labels, w), np.repeat(scores, w, axis=0)) for w in weights]
        np.testing.assert_allclose(METRICS[name](labels, scores, weights.astype(float)), expected, atol=1e-12)


def test_closed_cases():
    labels = np.array([0, 0, 1, 1])
    for name in ("auc", "balanced_accuracy", "accuracy", "f1", "kappa", "average_precision"):
        assert measure(name, labels, np.array([0.1, 0.2, 0.8, 0.9])) == 1.0
    assert measure("auc", labels, np.array([0.9, 0.8, 0.2, 0.1])) == 0.0
    assert measure("auc", labels, np.full(4, 0.5)) == 0.5
    assert measure("average_precision", labels, np.full(4, 0.5)) == 0.5
    assert measure("kappa", labels, np.array([0.1, 0.9, 0.1, 0.9])) == 0.0
    assert measure("kappa", labels, np.array([0.9, 0.9, 0.1, 0.1])) == -1.0
    assert measure("balanced_accuracy", np.array([0] * 9 + [1]), np.zeros(10)) == 0.5
    assert measure("f1", np.array([0, 0, 1, 1]), np.array([0.9, 0.1, 0.9, 0.1])) == 0.5


def test_calibration_error_is_zero_for_honest_and_known_for_boastful_scores():
    rng = np.random.default_rng(0)
    honest = rng.random(200_000)
    labels = (rng.random(200_000) < honest).astype(int)
    assert measure("ece", labels, honest) < 0.01
    boast = np.where(rng.random(200_000) < 0.5, 0.9, 0.1)
    labels = (rng.random(200_000) < np.where(boast > 0.5, 0.7, 0.3)).astype(int)
    assert measure("ece", labels, boast) == pytest.approx(0.2, abs=0.01)
    two = np.stack([1 - boast, boast], 1)
    assert measure("ece", labels, two) == pytest.approx(measure("ece", labels, boast), abs=1e-12)


def test_calibration_bins_have_equal_mass_and_keep_ties_together():
    rng = np.random.default_rng(1)
    scores, n = np.sort(rng.random(150) * 0.5 + 0.5), 150
    labels = rng.integers(0, 2, n)
    expected = sum(abs(np.sum((labels == 1)[b] - scores[b])) for b in np.split(np.arange(n), 15)) / n
    assert measure("ece", labels, scores) == pytest.approx(expected, abs=1e-12)
    tied = np.full(100, 0.8)
    assert measure("ece", np.arange(100) % 2, tied) == pytest.approx(0.3, abs=1e-12)


def test_bootstrap_equals_resampling_cases_one_at_a_time():
    labels, scores = data(60, seed=3)
    cases = np.repeat([f"case {i}" for i in range(12)], 5)
    got = bootstrap("auc", labels, scores, cases, resamples=300, seed=7, method="percentile", level=0.9)
    draws = st.draw_cases(12, 300, 7)
    assert (draws.sum(1) == 12).all()
    names = np.unique(cases)
    values = []
    for draw in draws.astype(int):
        rows = np.concatenate(
            [np.flatnonzero(cases == name) for name, k in zip(names, draw, strict=True) for _ in range(k)]
        )
        values.append(brute_auc(labels[rows] == 1, scores[rows]))
    np.testing.assert_allclose([got.low, got.high], np.quantile(values, [0.05, 0.95]), atol=1e-12)
    assert got.value == pytest.approx(brute_auc(labels == 1, scores))
    assert (got.cases, got.resamples, got.degenerate, got.method) == (12, 300, 0, "percentile")


def test_chunks_change_nothing(monkeypatch):
    labels, scores = data(50, seed=3)
    whole = bootstrap("auc", labels, scores, np.arange(50) // 5, resamples=100)
    monkeypatch.setattr(st, "CHUNK", 50 * 7)
    assert bootstrap("auc", labels, scores, np.arange(50) // 5, resamples=100) == whole


def test_bca_agrees_with_scipy_when_every_example_is_a_case():
    from scipy import stats

    rng = np.random.default_rng(0)
    right = (rng.random(60) < 0.85).astype(float)
    labels = np.ones(60, int)
    labels[:2] = 0
    scores = np.where(labels == 1, right, 1 - right)
    ours = bootstrap("accuracy", labels, scores, np.arange(60), resamples=20_000)
    theirs = stats.bootstrap((right,), np.mean, n_resamples=20_000, method="BCa", rng=rng).confidence_interval
    assert ours.method == "bca"
    assert ours.value == pytest.approx(right.mean())
    assert abs(ours.low - theirs.low) <= 1 / 60 + 1e-9
    assert abs(ours.high - theirs.high) <= 1 / 60 + 1e-9


def test_tiles_of_one_case_do_not_narrow_an_interval():
    rng = np.random.default_rng(0)
    labels, scores = data(30, ties=False, seed=1)
    one = bootstrap("auc", labels, scores, np.arange(30), resamples=1000)
    copies = rng.permutation(np.repeat(np.arange(30), 20))
    many = bootstrap("auc", labels[copies], scores[copies], copies, resamples=1000)
    assert (many.low, many.high) == pytest.approx((one.low, one.high), abs=1e-12)
    naive = bootstrap("auc", labels[copies], scores[copies], np.arange(600), resamples=300)
    assert naive.high - naive.low < 0.5 * (many.high - many.low)


def test_resamples_without_a_class_are_counted_and_too_many_are_refused():
    labels = np.array([0] * 8 + [1, 1])
    scores = np.linspace(0, 1, 10)
    got = bootstrap("auc", labels, scores, np.arange(10), resamples=2000)
    missing = (st.draw_cases(10, 2000, 0)[:, 8:].sum(1) == 0).sum()
    assert got.degenerate == missing > 100
    assert got.method == "percentile (no BCa)"  # every resample has AUC 1
    with pytest.raises(ValueError, match=r"resamples of 3 cases lack a class: too few cases"):
        bootstrap("auc", np.array([0, 0, 1]), np.array([0.1, 0.2, 0.3]), [0, 1, 2], seed=1, resamples=3)


def test_seeds_are_averaged_within_each_resample():
    labels, first = data(60, seed=1)
    second = data(60, seed=1, ties=False)[1]
    cases = np.arange(60) // 4
    both = np.stack([first, second])
    got = bootstrap("auc", labels, both, cases, resamples=200, method="percentile")
    draws = st.draw_cases(15, 200, 0)[:, cases]
    values = (st.auc(labels, first, draws) + st.auc(labels, second, draws)) / 2
    np.testing.assert_allclose([got.low, got.high], np.quantile(values, [0.025, 0.975]), atol=1e-12)
    assert got.value == pytest.approx((measure("auc", labels, first) + measure("auc", labels, second)) / 2)


def test_a_paired_difference_uses_the_same_cases_for_both_arms():
    labels, good = data(80, ties=False, seed=1)
    rng = np.random.default_rng(0)
    arms = {"good": good, "same": good, "worse": good + 0.4 * rng.normal(size=80)}
    cases = np.arange(80) // 4
    same, worse, _ = compare("auc", labels, arms, cases, resamples=500)
    assert (same.first, same.second) == ("good", "same")
    assert (same.interval.low, same.interval.value, same.interval.high, same.p, same.p_holm) == (0, 0, 0, 1, 1)
    draws = st.draw_cases(20, 500, 0)[:, cases]
    values = st.auc(labels, good, draws) - st.auc(labels, arms["worse"], draws)
    assert worse.p == pytest.approx(min(1, 2 * (1 + min((values <= 0).sum(), (values >= 0).sum())) / 501))
    apart = [bootstrap("auc", labels, arms[name], cases, resamples=500) for name in ("good", "worse")]
    unpaired = np.hypot(*[i.high - i.low for i in apart])
    assert worse.interval.high - worse.interval.low < unpaired
    assert worse.p_holm >= worse.p
    (named,) = compare("auc", labels, arms, cases, pairs=[("worse", "good")], resamples=500)
    assert named.interval.value == pytest.approx(-worse.interval.value)
    assert named.p == named.p_holm == worse.p


def test_holm_by_hand_and_against_its_definition():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1, 1])
    assert len(holm([])) == 0
    for p in itertools.permutations([0.001, 0.02, 0.02, 0.5, 0.04]):
        order = sorted(range(5), key=lambda i: p[i])
        expected, top = [0.0] * 5, 0.0
        for rank, i in enumerate(order):
            top = max(top, min(1.0, (5 - rank) * p[i]))
            expected[i] = top
        np.testing.assert_allclose(holm(p), expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metric": "acu"}, "unknown metric 'acu'; there are auc, "),
        ({"labels": np.array([0.0, 1.0, 1.0])}, r"labels are integers \[N\]"),
        ({"labels": np.array([0, 1, 2])}, "labels run from 0 to 1 for scores; found 0 to 2"),
        ({"labels": np.array([1, 1, 1])}, r"auc has no value here: of 2 classes only \[1\] occur"),
        ({"scores": np.array([0.1, np.nan, 0.3])}, "scores are finite; 1 of 3 values are not"),
        ({"scores": np.zeros((2, 2))}, r"scores of 3 examples are \[N\]"),
        ({"cases": [0, 1]}, "cases name one case for each of 3 examples"),
        ({"cases": [0, 0, 0]}, "at least 2 cases"),
        ({"method": "bayes"}, "method is 'bca' or 'percentile'"),
        ({"level": 95}, "level is between 0 and 1, not 95"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(change, said):
    given = {"metric": "auc", "labels": np.array([0, 1, 1]), "scores": np.array([0.1, 0.2, 0.3]), "cases": [0, 1, 2]}
    with pytest.raises(ValueError, match=said):
        bootstrap(**(given | change), resamples=50)


@pytest.mark.slow
def test_intervals_over_cases_cover_the_truth_and_intervals_over_tiles_do_not():
    def sample(cases, seed, tiles=10):
        rng = np.random.default_rng(seed)
        label = np.arange(cases) % 2
        level = rng.normal(0.9 * label, 0.8)
        labels = np.repeat(label, tiles)
        return labels, np.repeat(level, tiles) + rng.normal(size=cases * tiles), np.repeat(np.arange(cases), tiles)

    labels, scores, _ = sample(20_000, 0)
    truth = measure("auc", labels, scores)
    repeats, covered, naive = 300, {"bca": 0, "percentile": 0}, 0
    for seed in range(1, repeats + 1):
        labels, scores, cases = sample(40, seed)
        for method in covered:
            found = bootstrap("auc", labels, scores, cases, resamples=500, seed=seed, method=method)
            covered[method] += found.low <= truth <= found.high
        found = bootstrap("auc", labels, scores, np.arange(len(labels)), resamples=200, seed=seed, method="percentile")
        naive += found.low <= truth <= found.high
    assert all(0.90 <= count / repeats <= 0.985 for count in covered.values()), covered
    assert naive / repeats < 0.75


def test_the_auc_of_resampled_cases_is_that_of_their_weighted_examples():
    """To the bit, with ties, and with resamples that lack a class."""
    rng = np.random.default_rng(3)
    labels = np.concatenate([rng.integers(0, 2, 90), np.ones(30, int)])
    scores = np.stack([np.round(labels * 0.3 + rng.random(120), digits) for digits in (1, 6)])
    code = np.repeat(np.arange(4), 30)
    draws = np.concatenate([st.draw_cases(4, 200, 0), np.eye(4)])
    expected = np.mean([st.auc(labels, one, draws[:, code]) for one in scores], axis=0)
    found = st.resampled(st.auc, labels, scores, code, draws)
    assert np.isnan(found[-1])
    np.testing.assert_array_equal(found, expected)


def test_leaving_out_cases_gives_the_mean_its_interval_and_its_p_by_students_t():
    x = np.random.default_rng(0).normal(0.3, 1, 12)
    found, p = st.jackknife(x.mean(), (x.sum() - x) / 11)
    known = stats.ttest_1samp(x, 0.0)
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval(0.95)))
    assert p == pytest.approx(known.pvalue)
    bounded, _ = st.jackknife(1.0 + 1e-15, np.array([0.9, 1.0, 1.0]), least=0.0, most=1.0)
    assert 0 <= bounded.low < bounded.value == bounded.high == 1
    alone, p = st.jackknife(0.5, np.array([np.nan]))
    assert (alone.value, str(alone)) == (0.5, "0.500")
    assert np.isnan([alone.low, alone.high, p]).all()
