"""Agreement of clusters and classes against definitions written out over tiles and pairs of tiles."""

import itertools
import math

import numpy as np
import pytest

from mfl_jax.evaluators import Task, clusters
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
    result = clusters.agreement(found, classes, rng.integers(0, 6, 60), 4)
    expected = plain(found, classes)
    for name, value in expected.items():
        assert result.metrics[name].value == pytest.approx(value, rel=1e-12)
        assert result.metrics[name].low < value < result.metrics[name].high
    assert result.chance["purity"] == np.bincount(classes).max() / 60
    assert result.table.sum() == 60


def test_clusters_of_nothing_are_not_told_from_each_other_nor_from_one_cluster():
    """Of 40 draws hardly any, whether the class is of the tile or of the case; and each value lies in its interval."""
    ps: dict[str, list[float]] = {"noise": [], "one": [], "of cases": []}
    for draw in range(40):
        rng = np.random.default_rng(draw)
        cases, classes = np.repeat(np.arange(24), 30), rng.choice(6, 720, p=[0.45, 0.2, 0.15, 0.1, 0.05, 0.05])
        first, second, one = rng.integers(0, 8, 720), rng.integers(0, 4, 720), np.zeros(720, int)
        for name, other, of in (("noise", second, classes), ("one", one, classes), ("of cases", second, cases // 12)):
            pair = {"a": [clusters.agreement(first, of, cases, 8)], "b": [clusters.agreement(other, of, cases, 8)]}
            ps[name].append(clusters.compare(pair, [("a", "b")])[0].p)
            for interval in (i for (result,) in pair.values() for i in result.metrics.values()):
                assert interval.low <= interval.value <= interval.high
    assert all(np.mean(np.array(p) < 0.05) <= 0.125 for p in ps.values()), ps


def test_what_is_learnt_is_told_from_nothing_and_seeds_are_averaged():
    rng = np.random.default_rng(0)
    cases, classes = np.repeat(np.arange(12), 30), rng.integers(0, 3, 360)
    noise = [clusters.agreement(rng.integers(0, 4, 360), classes, cases, 4) for _ in range(2)]
    known = [clusters.agreement(np.where(rng.random(360) < 0.4, classes, 3), classes, cases, 4) for _ in range(3)]
    (d,) = clusters.compare({"known": known, "noise": noise}, [("known", "noise")])
    means = [np.mean([one.metrics["ari"].value for one in of]) for of in (known, noise)]
    assert d.interval.value == pytest.approx(means[0] - means[1])
    assert 0 < d.interval.low < d.interval.value < d.interval.high
    assert d.p == d.p_holm < 1e-3
    assert clusters.over_seeds(known)["ari"].value == pytest.approx(means[0])


def test_of_one_case_there_are_values_and_no_intervals():
    result = clusters.agreement(np.arange(20) % 3, np.arange(20) % 2, np.zeros(20, int), 3)
    assert set(result.metrics) == {"ari", "purity", "nmi"}
    assert all(np.isnan(interval.low) for interval in result.metrics.values())
    with pytest.raises(ValueError, match="an interval needs at least 2 cases"):
        clusters.compare({"a": [result], "b": [result]}, [("a", "b")])


def test_weights_are_copies():
    """A case that is drawn twice counts as its tiles twice over."""
    rng = np.random.default_rng(1)
    table = rng.integers(0, 9, (1, 3, 4)).astype(float)
    rows = [(i, j) for i in range(3) for j in range(4) for _ in range(2 * int(table[0, i, j]))]
    a, b = np.array(rows).T
    for name, value in plain(a, b).items():
        assert clusters.MEASURES[name][0](2 * table)[0] == pytest.approx(value)


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
    assert result.metrics["purity"].value > 0.8 > result.chance["purity"] + 0.1
    assert 0 < result.metrics["ari"].low < result.metrics["ari"].value < result.metrics["ari"].high
    assert result.mode == "inductive"
    noise = np.random.default_rng(0).normal(size=c["features"].shape)
    result = clusters.evaluate(noise, c["columns"], c["splits"], Task("t"), k=4, resamples=100)
    assert abs(result.metrics["ari"].value) < 0.05
    assert result.floats("c")["c/purity_chance"] == result.chance["purity"]
    with pytest.raises(ValueError, match="clusters are compared with classes"):
        clusters.evaluate(noise, c["columns"], c["splits"], Task("t", "positive", regression=True))
