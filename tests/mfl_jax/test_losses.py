"""Every loss against an independent float64 oracle, its gradient against finite differences of it, and edges."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from mfl_jax import losses

ROOT = Path(__file__).parents[2]
SCALES = [1e-4, 1.0, 1e4]


def draw(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# ---- oracles: float64 numpy, written from the definitions


def info_nce(a, b, temperature=0.1, group=None, mask=None):
    kept = np.arange(len(a)) if mask is None else np.flatnonzero(mask)
    za, zb, total = unit(a), unit(b), 0.0
    for x, y in ((za, zb), (zb, za)):
        for i in kept:
            others = [j for j in kept if j == i or group is None or group[j] != group[i]]
            total += logsumexp([x[i] @ y[j] / temperature for j in others]) - x[i] @ y[i] / temperature
    return total / (2 * len(kept))


def vicreg(a, b, released=False):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    n, d = a.shape
    total = (50 if released else 25) * np.mean((a - b) ** 2)
    for x in (a, b):
        std = np.sqrt(x.var(0, ddof=1) + (1e-5 if released else 1e-4))
        total += 25 * np.mean(np.maximum(0, 1 - std)) / 2
        cov = np.cov(x.T) * ((n - 1) / n if released else 1)
        total += sum(cov[i, j] ** 2 for i in range(d) for j in range(d) if i != j) / d
    return total


def barlow(a, b):
    a, b = ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in (np.asarray(a, np.float64), np.asarray(b, np.float64)))
    c = a.T @ b / len(a)
    return np.sum((np.diag(c) - 1) ** 2) + 5e-3 * (np.sum(c**2) - np.sum(np.diag(c) ** 2))


NEAR = np.array([1, 0, 0, 1, 0, 1], bool)


def margin(a, b):
    d = np.linalg.norm(np.asarray(a, np.float64) - b, axis=1)
    return np.mean(np.where(NEAR, d**2, np.maximum(0, 1 - d) ** 2))


def triplet(a, b):
    c = np.roll(b, 1, 0)
    a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
    return np.mean(np.maximum(0, np.linalg.norm(a - b, axis=1) - np.linalg.norm(a - c, axis=1) + 1))


LABELS = np.array([0, 3, 1, 2, 2, 0])


def xent(a, b):
    logs = log_softmax(np.asarray(a, np.float64), -1)
    target = np.eye(a.shape[1])[LABELS] * 0.9 + 0.1 / a.shape[1]
    return -np.mean(np.sum(target * logs, -1))


def huber(a, b):
    e = np.abs(np.asarray(a, np.float64) - b)
    return np.mean(np.where(e < 1, e**2 / 2, e - 0.5))


QUEUE = unit(draw(7, 5, seed=9)).astype(np.float32)


def queue_nce(a, b, group=None, queue_group=None, mask=None):
    losses_of_rows = []
    for i, (q, k) in enumerate(zip(unit(a), unit(b), strict=True)):
        rows = [j for j in range(len(QUEUE)) if group is None or queue_group[j] != group[i]]
        logits = np.array([q @ k, *(q @ QUEUE[j].astype(np.float64) for j in rows)]) / 0.2
        losses_of_rows.append(logsumexp(logits) - logits[0])
    return np.mean(losses_of_rows if mask is None else np.array(losses_of_rows)[mask])


PAIRS = {  # name: (our loss of two arrays, oracle of the same)
    "info_nce": (losses.info_nce, info_nce),
    "info_nce_cold": (
        lambda a, b: losses.info_nce(a, b, temperature=0.01),
        lambda a, b: info_nce(a, b, temperature=0.01),
    ),
    "queue_nce": (lambda a, b: losses.queue_nce(a, b, jnp.asarray(QUEUE)), queue_nce),
    "vicreg": (losses.vicreg, vicreg),
    "vicreg_released": (
        lambda a, b: losses.vicreg(a, b, released=True),
        lambda a, b: vicreg(a, b, released=True),
    ),
    "barlow": (losses.barlow, barlow),
    "margin": (lambda a, b: losses.margin(a, b, jnp.asarray(NEAR)), margin),
    "triplet": (lambda a, b: losses.triplet(a, b, jnp.roll(b, 1, 0)), triplet),
    "xent": (lambda a, b: losses.xent(a, jnp.asarray(LABELS), smoothing=0.1), xent),
    "mse": (losses.regression, lambda a, b: np.mean((np.asarray(a, np.float64) - b) ** 2)),
    "huber": (lambda a, b: losses.regression(a, b, kind="huber"), huber),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", PAIRS)
def test_value_and_gradient_against_the_oracle(name, scale):
    ours, oracle = PAIRS[name]
    a = draw(6, 5, seed=1, scale=scale)
    b = (0.7 * a + 0.5 * draw(6, 5, seed=2, scale=scale)).astype(np.float32)
    (value, metrics), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(a, b)
    expected = oracle(a, b)
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-6)
    assert all(np.isfinite(v) for v in metrics.values())
    way = np.random.default_rng(3).standard_normal(a.shape)
    step = 1e-6 * scale
    wide = np.asarray(a, np.float64)
    slope = (oracle(wide + step * way, b) - oracle(wide - step * way, b)) / (2 * step)
    size = np.linalg.norm(gradient) * np.linalg.norm(way)
    rounding = 1e-9 * abs(expected) / scale  # of the finite difference
    assert abs(np.sum(np.asarray(gradient, np.float64) * way) - slope) <= 2e-4 * size + rounding


def test_info_nce_masks_rows_and_leaves_out_rows_of_one_group():
    a, b = draw(8, 4, seed=1), draw(8, 4, seed=2)
    group, mask = np.array([0, 0, 1, 1, 2, 0, 3, 3]), np.array([1, 1, 1, 0, 1, 1, 1, 0], bool)
    expected = info_nce(a, b, group=group, mask=mask)
    a[3], b[7] = np.nan, np.inf  # rows left out may hold anything
    run = jax.jit(jax.value_and_grad(lambda a: losses.info_nce(a, b, group=group, mask=mask), has_aux=True))
    (value, _), gradient = run(a)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[~mask])


def test_other_keys_of_the_batch_are_negatives_too_but_for_absent_rows_and_those_of_the_group():
    a, b = draw(4, 5, seed=1), draw(4, 5, seed=2)
    group, of_queue, mask = np.array([0, 1, 0, 2]), np.array([0, 0, 1, 3, 1, 0, 1]), np.array([1, 1, 1, 0], bool)
    there = np.array([1, 1, 0, 1, 1, 0, 1], bool)
    expected = []
    for i in range(3):
        q = unit(a)[i]
        rows = [q @ QUEUE[j].astype(np.float64) for j in range(7) if of_queue[j] != group[i] and there[j]]
        rows += [q @ unit(b)[j] for j in range(3) if group[j] != group[i]]
        logits = np.array([q @ unit(b)[i], *rows]) / 0.2
        expected.append(logsumexp(logits) - logits[0])
    a[3] = b[3] = np.nan
    options = {"group": jnp.asarray(group), "queue_group": jnp.asarray(of_queue), "mask": jnp.asarray(mask)}
    options["queue_mask"] = jnp.asarray(there)
    value, _ = losses.queue_nce(a, b, jnp.asarray(QUEUE), batch_negatives=True, **options)
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-5)


def test_the_queue_leaves_out_rows_of_the_same_group_and_gets_no_gradient_nor_do_keys():
    a, b = draw(4, 5, seed=1), draw(4, 5, seed=2)
    group, of_queue, mask = np.array([0, 1, 7, 2]), np.array([0, 0, 1, 3, 1, 0, 1]), np.array([1, 1, 1, 0], bool)
    expected = queue_nce(a, b, group, of_queue, mask)
    a[3] = np.nan

    def loss(a, b, queue):
        return losses.queue_nce(a, b, queue, group=jnp.asarray(group), queue_group=jnp.asarray(of_queue), mask=mask)

    (value, metrics), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(a, b, QUEUE)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    best = [max(unit(a)[i] @ QUEUE[j] for j in range(7) if of_queue[j] != group[i]) for i in range(3)]
    right = np.sum(unit(a)[:3] * unit(b)[:3], -1) >= best
    np.testing.assert_allclose(metrics["accuracy"], right.mean(), rtol=1e-6)
    assert [bool(np.any(g)) for g in gradients] == [True, False, False]
    assert not np.any(gradients[0][3])
    everyone = losses.queue_nce(a[:3], b[:3], QUEUE, group=jnp.zeros(3), queue_group=jnp.zeros(7))
    np.testing.assert_allclose(everyone[0], 0, atol=1e-6)  # no negative is left


def test_a_learnt_temperature_gets_a_gradient_and_stops_at_100():
    a, b = draw(6, 5, seed=1), draw(6, 5, seed=2)
    run = jax.jit(jax.value_and_grad(lambda s: losses.info_nce(a, b, log_scale=s)[0]))
    value, slope = run(jnp.log(10.0))
    np.testing.assert_allclose(value, info_nce(a, b, 0.1), rtol=1e-5)
    h = 1e-5
    expected = (info_nce(a, b, np.exp(-np.log(10) - h)) - info_nce(a, b, np.exp(-np.log(10) + h))) / (2 * h)
    np.testing.assert_allclose(slope, expected, rtol=1e-3)
    np.testing.assert_allclose(losses.info_nce(a, b, log_scale=jnp.float32(50.0))[1]["scale"], 100, rtol=1e-5)


def test_a_temperature_at_its_cap_comes_back_and_goes_no_further():
    a, b = draw(6, 5, seed=1), draw(6, 5, seed=2)
    assert jax.jit(jax.grad(lambda s: losses.info_nce(a, b, log_scale=s)[0]))(5.0) > 0  # pairs that do not agree
    slopes = [jax.grad(lambda s, by=by: by * losses.capped(s))(at) for at in (4.0, 5.0) for by in (-2.0, 2.0)]
    assert slopes == [-2, 2, 0, 2]


@pytest.mark.parametrize("block", [2, 4])
def test_blocked_info_nce_is_the_plain_one(block):
    check_streams(block, None)


def check_streams(block, mesh):
    a, b = draw(16, 4, seed=1), draw(16, 4, seed=2)
    group, mask = np.arange(16) // 3, np.arange(16) % 5 != 4

    def run(**how):
        def loss(a, b, s):
            value, metrics = losses.info_nce(a, b, log_scale=s, group=group, mask=mask, **how)
            return value, metrics["accuracy"]

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(a, b, jnp.float32(1.5))

    plain, streamed = run(), run(block=block, mesh=mesh)
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(streamed), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert abs(plain[1][2]) > 1e-3


def ring_on_eight_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    check_streams(None, mesh)
    check_streams(1, mesh)


def test_ring_info_nce_on_eight_devices_is_the_plain_one():
    code = "import test_losses; test_losses.ring_on_eight_devices()"
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ | flags)
    assert out.returncode == 0, out.stderr[-2000:]


def test_a_batch_that_cannot_be_blocked_is_refused():
    with pytest.raises(ValueError, match="block=5 must divide the 16 rows"):
        losses.info_nce(draw(16, 4), draw(16, 4), block=5)


def test_a_block_of_more_rows_than_a_device_has_is_all_of_them():
    a, b = draw(16, 4), draw(16, 4)
    np.testing.assert_allclose(losses.info_nce(a, b, block=32)[0], losses.info_nce(a, b)[0], rtol=1e-6)


def test_blocked_info_nce_holds_no_square_of_the_batch():
    def memory(size, block):
        x = jax.ShapeDtypeStruct((size, 16), jnp.float32)
        run = jax.grad(lambda a, b: losses.info_nce(a, b, block=block)[0], (0, 1))
        return jax.jit(run).lower(x, x).compile().memory_analysis().temp_size_in_bytes

    small, large = memory(1024, 64), memory(2048, 64)
    assert large < 2.2 * small
    assert large < 2048 * 2048 * 4 / 4 < memory(2048, None)


TWO = {name: ours for name, (ours, _) in PAIRS.items() if name not in ("margin", "xent", "queue_nce")} | {
    "queue_nce": lambda a, b: losses.queue_nce(a, b, jnp.asarray(QUEUE[:, : a.shape[1]])),
    "margin": lambda a, b: losses.margin(a, b, jnp.arange(a.shape[0]) % 2),
    "xent": lambda a, b: losses.xent(a, jnp.arange(a.shape[0]) % a.shape[1]),
    "byol": lambda a, b: losses.byol(a, b, b, a),
    "simsiam": lambda a, b: losses.simsiam(a, b, b, a),
    "info_nce_grouped": lambda a, b: losses.info_nce(a, b, group=jnp.zeros(a.shape[0], jnp.int32)),
    "info_nce_blocked": lambda a, b: losses.info_nce(a, b, block=1),
}


@pytest.mark.parametrize("name", TWO)
def test_one_row_duplicates_and_zeros_give_numbers(name):
    one, run = draw(1, 4), jax.jit(jax.value_and_grad(TWO[name], (0, 1), has_aux=True))
    for a, b in [
        (one, one),
        (np.repeat(one, 4, 0), np.repeat(one, 4, 0)),
        (np.zeros((4, 4), np.float32), draw(4, 4)),
        (np.zeros((4, 4), np.float32), np.zeros((4, 4), np.float32)),
        (draw(4, 4, scale=1e-20), draw(4, 4, scale=1e-20)),
    ]:
        (value, metrics), gradient = run(a, b)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((value, metrics, gradient))), (name, a.shape)


MASKED = {
    "info_nce": lambda a, b, m: losses.info_nce(a, b, mask=m),
    "info_nce_blocked": lambda a, b, m: losses.info_nce(a, b, mask=m, block=1),
    "queue_nce": lambda a, b, m: losses.queue_nce(a, b, jnp.asarray(QUEUE[:, : a.shape[1]]), mask=m),
    "vicreg": lambda a, b, m: losses.vicreg(a, b, mask=m),
    "barlow": lambda a, b, m: losses.barlow(a, b, mask=m),
    "margin": lambda a, b, m: losses.margin(a, b, jnp.arange(a.shape[0]) % 2, mask=m),
    "triplet": lambda a, b, m: losses.triplet(a, b, -b, mask=m),
    "byol": lambda a, b, m: losses.byol(a, b, b, a, mask=m),
    "simsiam": lambda a, b, m: losses.simsiam(a, b, b, a, mask=m),
    "xent": lambda a, b, m: losses.xent(a, jnp.where(m, 1, -1), mask=m),
    "regression": lambda a, b, m: losses.regression(a, b, mask=m),
    "dino_ce": lambda a, b, m: losses.dino_ce(jnp.stack([a, b]), jax.nn.softmax(b)[None], mask=m),
    "prototype_ce": lambda a, b, m: losses.prototype_ce(a[None], jax.nn.softmax(b), mask=m),
}


@pytest.mark.parametrize("name", MASKED)
def test_a_masked_row_counts_for_nothing(name):
    a, b = jnp.asarray(draw(4, 3, seed=1)), jnp.asarray(draw(4, 3, seed=2))
    run = jax.jit(MASKED[name])
    full = run(a, b, jnp.ones(4, bool))[0]
    wide_a, wide_b = (jnp.concatenate([x, jnp.asarray(draw(2, 3, seed=9))]) for x in (a, b))
    mask = jnp.array([1, 1, 1, 1, 0, 0], bool)
    np.testing.assert_allclose(run(wide_a, wide_b, mask)[0], full, rtol=1e-5)


@pytest.mark.parametrize("name", MASKED)
def test_a_batch_that_is_masked_out_costs_nothing(name):
    a, b, mask = jnp.asarray(draw(4, 3, seed=1)), jnp.asarray(draw(4, 3, seed=2)), jnp.zeros(4, bool)
    (value, metrics), gradient = jax.jit(jax.value_and_grad(MASKED[name], (0, 1), has_aux=True))(a, b, mask)
    assert value == 0
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((metrics, gradient)))
    assert not np.any(gradient[0])


def test_byol_and_simsiam_stop_the_gradient_at_the_targets():
    a, b, c, d = (draw(5, 4, seed=i) for i in range(4))
    expected = -np.mean(np.sum(unit(a) * unit(d), -1) + np.sum(unit(b) * unit(c), -1)) / 2
    np.testing.assert_allclose(losses.simsiam(a, b, c, d)[0], expected, rtol=1e-5)
    apart = np.sum((unit(a) - unit(d)) ** 2, -1) + np.sum((unit(b) - unit(c)) ** 2, -1)
    np.testing.assert_allclose(losses.byol(a, b, c, d)[0], np.mean(apart), rtol=1e-5)
    gradients = jax.jit(jax.grad(lambda *x: losses.byol(*x)[0], (0, 1, 2, 3)))(a, b, c, d)
    assert [bool(np.any(g)) for g in gradients] == [True, True, False, False]


def test_collapse_is_seen_in_every_figure_and_health_in_none():
    collapse = jax.jit(losses.collapse)
    healthy = collapse(draw(256, 16), draw(256, 16))
    assert healthy["feature_std"] > 0.95
    assert 13 < healthy["effective_rank"] <= 16
    assert healthy["alignment"] < 1e-6
    assert not losses.looks_collapsed(healthy)
    point = collapse(np.ones((32, 16), np.float32) + 1e-4 * draw(32, 16))
    assert point["feature_std"] < 0.01
    assert point["uniformity"] > -1e-3
    line = collapse(draw(32, 1) * draw(1, 16, seed=1))
    assert line["effective_rank"] < 1.01
    assert losses.looks_collapsed(point)
    assert losses.looks_collapsed(line)
    assert all(np.isfinite(v) for v in losses.collapse(np.zeros((1, 4), np.float32)).values())


def test_uniformity_against_the_definition():
    z = unit(draw(9, 4))
    pairs = [np.exp(-2 * np.sum((z[i] - z[j]) ** 2)) for i in range(9) for j in range(9) if i != j]
    np.testing.assert_allclose(losses.collapse(z)["uniformity"], np.log(np.mean(pairs)), rtol=1e-4)


def test_effective_rank_against_the_spectrum():
    z = draw(50, 6) * np.array([3, 2, 1, 0.5, 0.1, 0.01], np.float32)
    spectrum = np.linalg.eigvalsh(np.cov(z.astype(np.float64).T))
    expected = spectrum.sum() ** 2 / np.sum(spectrum**2)
    np.testing.assert_allclose(losses.collapse(z)["effective_rank"], expected, rtol=1e-4)


def test_class_weights_and_soft_labels():
    logits, weights = draw(4, 3), np.array([1.0, 2.0, 0.5], np.float32)
    labels = np.array([0, 1, 2, 1])
    logs = log_softmax(logits.astype(np.float64), -1)
    expected = -np.mean([weights[y] * logs[i, y] for i, y in enumerate(labels)])
    np.testing.assert_allclose(losses.xent(logits, jnp.asarray(labels), weights=weights)[0], expected, rtol=1e-5)
    soft = jnp.eye(3)[labels]
    np.testing.assert_allclose(losses.xent(logits, soft)[0], losses.xent(logits, jnp.asarray(labels))[0], rtol=1e-6)


def test_an_unknown_regression_is_refused():
    with pytest.raises(ValueError, match="one of mse, huber, not 'l1'"):
        losses.regression(draw(2, 2), draw(2, 2), kind="l1")
