"""Training against a restatement in float64; fits that run together against one alone; what a fit must not see."""

import dataclasses

import jax
import numpy as np
import pytest

from mfl_jax.evaluators.mil import fit as fitting
from mfl_jax.evaluators.mil.fit import Fit, Settings, fit_all, pack, sample_rows, tile_scores
from mfl_jax.evaluators.mil.run import target_of
from mfl_jax.models.mil import make_mil
from tests.mfl_jax.evaluators.mil import made

SETTINGS = Settings(epochs=6, patience=6, batch=16, tiles=100)
TRAIN, VAL, TEST = np.arange(1, 14), np.r_[0, 14:18], np.arange(18, 24)
FIT = Fit(TRAIN, VAL, TEST, seed=5, lr=0.05, decay=0.1)
OTHERS = [dataclasses.replace(FIT, seed=6, lr=0.01), Fit(VAL, TEST, TRAIN, seed=7, lr=0.3)]


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(compile_cache):
    """The programs of this module are few, and used by several tests."""


def fitted(given, table, fits, settings=SETTINGS, spec="meanpool", **options):
    return fit_all(spec, pack(given.features, given.offsets), target_of(table), fits, settings, **options)


def restated(given, table, fit):
    """MeanPool by Adam in float64, every bag whole in every step: -> loss on val by epoch, logits of test."""
    start = make_mil("meanpool").init(jax.random.fold_in(jax.random.key(fit.seed), 0), given.features.shape[1], 1)
    w, b = (np.asarray(start["out"][k], np.float64).ravel() for k in "wb")
    w = np.append(w, b)
    tiles = np.concatenate([given.features[given.rows(s)] for s in fit.train]).astype(np.float64)
    mean, std = tiles.mean(0), tiles.std(0)

    def row(slide):
        x = (given.features[given.rows(slide)].astype(np.float64) - mean) / std
        return np.append(x.sum(0) / max(len(x), 1), 1)

    x, y = np.stack([row(s) for s in range(len(given))]), table.labels
    weight = len(fit.train) / (2 * np.bincount(y[fit.train]))
    first, second, losses, kept = np.zeros_like(w), np.zeros_like(w), [], []
    for step in range(1, SETTINGS.epochs + 1):
        z = x[fit.train] @ w
        wrong = weight[y[fit.train]] * (1 / (1 + np.exp(-z)) - y[fit.train])
        gradient = wrong @ x[fit.train] / len(fit.train)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        move = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        w = w - fit.lr * (move + fit.decay * w)
        z = x[fit.val] @ w
        each = np.log1p(np.exp(z)) - y[fit.val] * z
        losses.append(np.average(each, weights=weight[y[fit.val]]))
        kept.append(x[fit.test] @ w)
    return np.array(losses), kept[int(np.argmin(losses))]


def test_a_fit_is_adam_on_scaled_features_with_balanced_classes():
    given, table = made.bags()
    found = fitted(given, table, [FIT])
    losses, logits = restated(given, table, FIT)
    np.testing.assert_allclose(found.curves[0], losses, rtol=1e-4)
    np.testing.assert_allclose(found.logits[0][:, 0], logits, rtol=1e-3, atol=1e-4)
    assert found.epochs[0] == losses.argmin() + 1
    assert found.losses[0] == pytest.approx(losses.min(), rel=1e-4)


def test_fits_that_run_together_are_what_each_is_alone():
    given, table = made.bags()
    fits = [FIT, *OTHERS]
    together = fitted(given, table, fits, together=3)
    apart = fitted(given, table, fits, together=2)
    np.testing.assert_allclose(together.curves, apart.curves, rtol=1e-5)
    for j, fit in enumerate(fits):
        np.testing.assert_allclose(together.logits[j], apart.logits[j], rtol=1e-4, atol=1e-5)
        losses, logits = restated(given, table, fit)
        np.testing.assert_allclose(together.curves[j], losses, rtol=1e-3)
        np.testing.assert_allclose(together.logits[j][:, 0], logits, rtol=1e-3, atol=1e-3)


def test_nothing_of_the_test_slides_reaches_a_fit():
    given, table = made.bags()
    before = fitted(given, table, [FIT])
    features, labels = given.features.copy(), table.labels.copy()
    for slide in TEST:
        features[given.rows(slide)] = 1e3
        labels[slide] = 1 - labels[slide]
    changed = dataclasses.replace(given, features=features)
    after = fitted(changed, dataclasses.replace(table, labels=labels), [FIT])
    for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert not np.allclose(before.logits[0], after.logits[0])


def test_a_fit_ends_when_it_has_not_been_better_for_a_while():
    given, table = made.bags(signal=0.0)
    settings = dataclasses.replace(SETTINGS, epochs=60, patience=3)
    fits = [dataclasses.replace(FIT, lr=lr) for lr in (0.5, 0.02)]
    found = fitted(given, table, fits, settings)
    for j in range(2):
        ran = int(np.isfinite(found.curves[j]).sum())
        assert np.isnan(found.curves[j][ran:]).all()
        assert found.epochs[j] == np.nanargmin(found.curves[j]) + 1
        assert ran == min(found.epochs[j] + 3, 60)
    assert np.isfinite(found.curves[0]).sum() < 60


def test_deepmil_finds_a_third_of_the_tiles_and_says_which():
    given, table = made.bags(slides=40, signal=9.0)
    fits = [Fit(np.arange(2, 24), np.arange(24, 32), np.arange(32, 40), seed, lr=0.01) for seed in range(2)]
    settings = Settings(epochs=40, patience=40, batch=8, tiles=12)
    spec = "deepmil,hidden=8,attention=8,widths=8"
    found = fitted(given, table, fits, settings, spec)
    for logits in found.logits:
        positive = logits[:, 0][table.labels[32:] == 1]
        assert positive.min() > logits[:, 0][table.labels[32:] == 0].max()
    slide = 34
    assert table.labels[slide] == 1
    scores = tile_scores(spec, found.params, given.features[given.rows(slide)])
    shifted = np.arange(len(scores)) < -(-len(scores) // 3)
    assert scores.sum() == pytest.approx(1, abs=1e-5)
    assert scores[shifted].mean() > 2 * scores[~shifted].mean()


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 21, 100_000])
def test_rows_are_drawn_once_each_from_all_over_the_bag(length):
    draw = jax.random.uniform(jax.random.key(length), (200, 9))
    rows, known = jax.jit(jax.vmap(lambda d: sample_rows(d, length)))(draw)
    rows, known = np.asarray(rows), np.asarray(known)
    assert (known.sum(1) == min(length, 8)).all()
    assert rows.min() >= 0
    assert rows.max() < max(length, 1)
    for one, of_bag in zip(rows, known, strict=True):
        assert len(set(one[of_bag])) == of_bag.sum()
    if length == 21:
        counts = np.bincount(rows.ravel(), minlength=21)
        expected = 200 * 8 / 21
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
        assert (np.diff(np.sort(rows, 1), axis=1) <= 5).all()


def test_a_class_that_is_rare_weighs_more_and_all_weigh_one_on_average():
    _, table = made.bags()
    labels = np.array([0, 0, 0, 1, 2, 2])
    target = dataclasses.replace(target_of(table), kind="classes", labels=labels, outputs=3)
    weights = fitting.class_weights(target, np.arange(6))
    assert weights.tolist() == pytest.approx([6 / 9, 6 / 3, 6 / 6])
    assert weights[labels].mean() == pytest.approx(1)


def test_scaling_is_of_the_slides_trained_on_and_leaves_what_does_not_vary():
    given, _ = made.bags()
    features = given.features.copy()
    features[:, 4] = 123.456
    mean, inverse = fitting.scaling(pack(features, given.offsets), TRAIN)
    tiles = np.concatenate([features[given.rows(s)] for s in TRAIN]).astype(np.float64)
    np.testing.assert_allclose(mean, tiles.mean(0), rtol=1e-9)
    np.testing.assert_allclose(inverse[:4], 1 / tiles.std(0)[:4], rtol=1e-9)
    assert inverse[4] == 1


def test_settings_are_at_least_one():
    with pytest.raises(ValueError, match="patience is 0"):
        Settings(patience=0)
