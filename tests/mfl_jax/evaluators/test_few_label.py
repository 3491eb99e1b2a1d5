"""Draws are nested, of whole cases where they say so, and hold every class; the curve rises."""

import itertools

import numpy as np
import pytest

from mfl_jax.evaluators import Task, evaluate, few_label
from tests.mfl_jax.evaluators.cohort import cohort

FRACTIONS = (0.01, 0.25, 0.5, 1.0)


@pytest.mark.parametrize("seed", range(4))
def test_draws_of_cases_are_nested_and_whole(seed):
    c = cohort(cases=20, per_case=5)
    cases, labels = c["columns"]["case"], c["columns"]["label"]
    rows = np.isin(cases, sorted(set(cases))[:16])
    drawn = few_label.subset(cases, labels, rows, FRACTIONS, seed)
    for smaller, larger in itertools.pairwise(drawn):
        assert (larger | ~smaller).all()
    for fraction, mask in zip(FRACTIONS, drawn, strict=True):
        used = set(cases[mask])
        assert (mask == np.isin(cases, list(used)) & rows).all()
        assert set(labels[mask]) == {0, 1}
        if fraction >= 0.25:
            assert len(used) == int(np.ceil(16 * fraction))
    assert (drawn[-1] == rows).all()


def test_draws_of_tiles_count_tiles_and_differ_by_seed():
    labels = np.arange(200) % 2
    rows = np.arange(200) < 100
    drawn = few_label.subset(np.arange(200), labels, rows, (0.1, 0.5), 0)
    assert [m.sum() for m in drawn] == [10, 50]
    other = few_label.subset(np.arange(200), labels, rows, (0.1, 0.5), 1)
    assert (drawn[0] != other[0]).any()


def test_a_rare_class_is_waited_for():
    labels = (np.arange(50) == 49).astype(int)
    (drawn,) = few_label.subset(np.arange(50), labels, np.ones(50, bool), (0.02,), 0)
    assert drawn[49]


def test_the_curve_rises_and_ends_at_the_probe():
    c = cohort(cases=18, per_case=20, dim=30, signal=1.2)
    options = {"fractions": (0.02, 0.2, 1.0), "draws": 3, "cs": (1e-3, 1e-1), "resamples": 100}
    curve = few_label.curve(c["features"], c["columns"], c["splits"], Task("t"), **options)
    points = {(p.unit, p.fraction): p for p in curve.points}
    for unit in ("cases", "tiles"):
        assert points[unit, 0.02].metrics["auc"].value < points[unit, 1.0].metrics["auc"].value - 0.03
        assert points[unit, 0.02].labels < points[unit, 0.2].labels < points[unit, 1.0].labels == 12 * 20
        assert len(points[unit, 0.2].scores) == 3
        low, high = points[unit, 0.02].spread["auc"]
        assert low < points[unit, 0.02].metrics["auc"].value < high
    assert (points["cases", 0.2].cases, points["cases", 0.2].labels) == (2 + 1, 3 * 20)  # of 9 train and 3 val
    assert points["tiles", 0.2].cases > 10
    whole = evaluate(c["features"], c["columns"], c["splits"], Task("t"), cs=(1e-3, 1e-1), resamples=100)
    np.testing.assert_allclose(points["tiles", 1.0].scores[0], whole.scores, atol=1e-5)
    assert curve.floats("few")["few/auc_100pc_cases"] == pytest.approx(whole.metrics["auc"].value)
