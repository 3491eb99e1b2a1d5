"""Agreement of clusters and classes against definitions written out over tiles and pairs of tiles."""

import itertools
import math

import numpy as np
import pytest

from mfl_jax.evaluators import Task, clusters
from mfl_jax.evaluators.results import compare
from tests.mfl_jax.evaluators.cohort import cohort


def plain(a, b):
    n = len(a)
    purity = sum(max(np.sum((a == i) & (b == j)) for j in set(b)) for i in set(a)) / n
    p = lambda m: m.mean()  # noqa: E731
    mutual = sum(
        p((a == i) & (b == j)) * math.log(p((a == i) & (b == j)) / (p(a == i) * p(b == j)))
        for i in set(a)
        for j in set(b)
        if ((a == i) & (b == j)).any()
    )
    entropy = [-sum(p(c == i) * math.log(p(c == i)) for i in set(c)) for c in (a, b)]
    pairs = list(itertools.combinations(range(n), 2))
    same_a, same_b = (np.array([c[i] == c[j] for i, j in pairs]) for c in (a, b))
    expected = same_a.sum() * same_b.sum() / len(pairs)
    ari = ((same_a & same_b).sum() - expected) / ((same_a.sum() + same_b.sum()) / 2 - expected)
    return {"purity": purity, "nmi": mutual / (sum(entropy) / 2), "ari": ari}


def test_measures_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, 60)
    found = np.where(rng.random(60) < 0.6, classes, rng.integers(0, 4, 60))
    result = clusters.agreement(found, classes, rng.integers(0, 6, 60), 4, resamples=100)
    expected = plain(found, classes)
    for name, value in expected.items():
        assert result.metrics[name].value == pytest.approx(value, rel=1e-12)
        assert result.metrics[name].low < value < result.metrics[name].high
    assert result.chance["purity"] == np.bincount(classes).max() / 60
    assert result.table.sum() == 60


def test_a_tile_is_named_right_by_the_other_cases():
    a, b, c = [[3, 0], [0, 2], [0, 0]], [[0, 1], [0, 4], [2, 0]], [[1, 0], [1, 0], [0, 0]]
    tables = np.array([a, b, c])
    # cluster 0 is of class 0 by b and c (a tie, the lower), 0 by a and c, 0 by a and b; cluster 1 of 1, 1, 1; cluster 2
    # is of class 0 by b alone, which has no other case to name it
    assert clusters.named(tables).tolist() == [[5, 5], [4, 7], [1, 2]]
    rows, weights = clusters.named(tables), np.array([[1.0, 1, 1], [2, 0, 1]])
    np.testing.assert_allclose(clusters.share(np.zeros(3), rows, weights), [10 / 14, 11 / 12])


@pytest.mark.parametrize("draw", range(5))
def test_clusters_of_nothing_are_not_told_from_one_cluster_and_lie_within_their_intervals(draw):
    rng = np.random.default_rng(draw)
    cases, classes = np.repeat(np.arange(24), 30), rng.choice(6, 720, p=[0.45, 0.2, 0.15, 0.1, 0.05, 0.05])
    given = (classes, cases, 8)
    noise, one = (clusters.agreement(of, *given) for of in (rng.integers(0, 8, 720), np.zeros(720, int)))
    for result in (noise, one):
        for name, interval in result.metrics.items():
            assert interval.low <= interval.value <= interval.high, name
    assert noise.metrics["ari"].low < 0 < noise.metrics["ari"].high
    assert noise.metrics["named"].low <= noise.chance["named"] == one.metrics["named"].value
    (d,) = compare({"noise": clusters.as_result(noise), "one": clusters.as_result(one)}, clusters.share)
    assert d.p_holm > 0.05 or d.interval.value < 0


def test_of_one_case_nothing_is_named():
    result = clusters.agreement(np.arange(20) % 3, np.arange(20) % 2, np.zeros(20, int), 3)
    assert set(result.metrics) == {"purity", "nmi", "ari"}
    assert np.isnan(result.metrics["purity"].low)
    assert result.notes == ("named has no value: there is one case only",)


def test_weights_are_copies():
    """A case that is drawn twice counts as its tiles twice over."""
    rng = np.random.default_rng(1)
    table = rng.integers(0, 9, (1, 3, 4)).astype(float)
    rows = [(i, j) for i in range(3) for j in range(4) for _ in range(2 * int(table[0, i, j]))]
    a, b = np.array(rows).T
    for name, value in plain(a, b).items():
        assert clusters.MEASURES[name](2 * table)[0] == pytest.approx(value)


def test_clusters_are_in_the_order_of_their_size_and_found_again():
    rng = np.random.default_rng(2)
    which = np.repeat([0, 1, 2], [30, 60, 10])
    features = 5 * np.eye(3)[which] + 0.1 * rng.normal(size=(100, 3))
    found = clusters.find(features, 3)
    assert found.sizes.tolist() == [60, 30, 10]
    assert found.assignment.tolist() == np.array([1, 0, 2])[which].tolist()
    again = clusters.find(features, 3)
    np.testing.assert_array_equal(found.centroids, again.centroids)
    twice = clusters.find(np.concatenate([features, features]), 3, most=100)  # of the compiled shape
    assert twice.assignment.tolist() == found.assignment.tolist() * 2
    assert twice.notes == ("centroids of 100 of 200 tiles, drawn by seed 0",)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    apart = np.linalg.norm(unit - unit[which == 1].mean(0), axis=1)
    near = found.nearest(0, 7)
    assert near.tolist() == sorted(np.flatnonzero(which == 1).tolist(), key=lambda i: apart[i])[:7]
    cases = np.arange(100) % 4
    assert sorted(cases[found.nearest(0, 4, cases)].tolist()) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="k is from 2 to the number of tiles, 100; it is 1"):
        clusters.find(features, 1)


def test_what_is_in_the_features_is_in_the_clusters_of_held_out_cases():
    c = cohort(seed=1, dim=2, signal=8.0)
    result = clusters.evaluate(c["features"], c["columns"], c["splits"], Task("t"), k=4, resamples=100)
    assert result.metrics["named"].low > 0.75 > result.chance["named"] + 0.1
    assert 0.7 < result.metrics["purity"].low < result.metrics["purity"].value < result.metrics["purity"].high == 1
    assert result.mode == "inductive"
    noise = np.random.default_rng(0).normal(size=c["features"].shape)
    result = clusters.evaluate(noise, c["columns"], c["splits"], Task("t"), k=4, resamples=100)
    assert abs(result.metrics["ari"].value) < 0.05
    assert result.floats("c")["c/purity_chance"] == result.chance["purity"]
    with pytest.raises(ValueError, match="clusters are compared with classes"):
        clusters.evaluate(noise, c["columns"], c["splits"], Task("t", "positive", regression=True))
