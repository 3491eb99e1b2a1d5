"""Projection, the batch-effect check, and the paper's head."""

import sys

import numpy as np
import pytest

from mfl_jax.evaluators import Task, batch_effect, evaluate, paper_head, projection
from tests.mfl_jax.evaluators.cohort import cohort


def test_pca_is_the_singular_value_decomposition():
    x = np.random.default_rng(0).normal(size=(50, 4)) * [5, 3, 1, 0.1] + 7
    xy, explained = projection.pca(x)
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(xy), np.abs(u[:, :2] * s[:2]), atol=1e-9)
    np.testing.assert_allclose(explained, (s**2 / (s**2).sum())[:2])
    turned, _ = projection.pca(x[:, [1, 0, 3, 2]])
    np.testing.assert_allclose(turned, xy, atol=1e-9)


def test_points_keep_their_colours():
    c = cohort()
    found = projection.project(c["features"], c["columns"], limit=40, colour=("label", "case"))
    assert found.xy.shape == (40, 2)
    np.testing.assert_array_equal(found.colours["case"], c["columns"]["case"][found.rows])
    with pytest.raises(ValueError, match=r"no columns \['stain'\]"):
        projection.project(c["features"], c["columns"], colour=("stain",))
    with pytest.raises(ValueError, match="one of pca, umap"):
        projection.project(c["features"], c["columns"], method="tsne")


def test_umap_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)  # as where umap-learn is not installed
    c = cohort()
    with pytest.raises(ValueError, match="pip install umap-learn"):
        projection.project(c["features"], c["columns"], method="umap")


def test_features_that_name_the_slide_are_told_from_those_that_do_not():
    c = cohort(cases=6, per_case=20, dim=4, signal=0.0)
    c["features"] = np.random.default_rng(0).normal(size=c["features"].shape)
    clean = batch_effect.measure(c["features"], c["columns"], resamples=200)
    chance = 9 / 119
    assert clean.chance["nearest"] == pytest.approx(chance)
    assert clean.metrics["nearest"].low < chance < clean.metrics["nearest"].high + 0.03
    assert clean.metrics["silhouette"].value < 0.05
    slide = np.unique(c["columns"]["slide"], return_inverse=True)[1]
    spread = np.random.default_rng(1).normal(size=(12, 4)) * 20
    stained = batch_effect.measure(c["features"] + spread[slide], c["columns"], resamples=200)
    assert stained.metrics["nearest"].low > 0.9
    assert stained.metrics["linear"].low > 0.8 > clean.metrics["linear"].high
    assert stained.metrics["silhouette"].low > 0.3


def test_the_silhouette_is_that_of_the_definition():
    rng = np.random.default_rng(0)
    x, slide = rng.normal(size=(15, 3)), np.repeat([0, 1, 2], 5)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    distance = 1 - unit @ unit.T
    found, _ = batch_effect._silhouette(1 - distance, slide)
    for i in range(15):
        own = np.flatnonzero((slide == slide[i]) & (np.arange(15) != i))
        a = distance[i, own].mean()
        b = min(distance[i, slide == k].mean() for k in range(3) if k != slide[i])
        assert found[i] == pytest.approx((b - a) / max(a, b))


def test_within_a_region_and_apart_leave_only_fair_neighbours():
    """Slides differ only because their regions do, or because neighbouring tiles overlap."""
    rng = np.random.default_rng(0)
    region, slide = np.repeat([0, 1], 40), np.repeat(np.arange(4), 20)
    x = np.array([[9.0, 0, 0], [0, 9, 0]])[region] + rng.normal(size=(80, 3))
    columns = {"slide": slide, "case": slide, "region": region}
    far, fair = (batch_effect.measure(x, columns, within=w, resamples=50) for w in (None, "region"))
    assert fair.chance["nearest"] == pytest.approx(19 / 39)
    assert far.chance["nearest"] == pytest.approx(19 / 79)
    place = np.tile(np.arange(20) // 2, 4)
    doubled = rng.normal(size=(4, 10, 3))[slide, place] + 1e-3 * rng.normal(size=(80, 3))
    columns |= {"x": place * 100.0, "y": np.zeros(80), "mpp": np.full(80, 0.5)}
    assert batch_effect.measure(doubled, columns, resamples=50).metrics["nearest"].value == 1
    apart = batch_effect.measure(doubled, columns, apart_um=10.0, resamples=50)
    assert apart.metrics["nearest"].value < 0.6


def test_one_slide_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        batch_effect.measure(np.ones((5, 3)), {"slide": np.zeros(5), "case": np.zeros(5)})


def test_the_papers_head_finds_what_no_linear_probe_can():
    c = cohort(seed=2, per_case=60, dim=4, signal=0.0)
    x = c["features"] * 100 + 1000  # of any scale
    columns = c["columns"] | {"label": (c["features"][:, 0] * c["features"][:, 1] > 0).astype(int)}
    head = paper_head.evaluate(x, columns, c["splits"], Task("t"), epochs=25, batch=32, lr=3e-3, seeds=2, resamples=100)
    linear = evaluate(x, columns, c["splits"], Task("t"), cs=(1e-2,), resamples=100)
    assert head.metrics["auc"].low > 0.85
    assert linear.metrics["auc"].value < 0.7
    assert all(e > 0 for e in head.chosen["epoch"])
