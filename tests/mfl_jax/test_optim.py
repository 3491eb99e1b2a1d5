"""The chain against optax's own optimisers and numpy, and every refusal."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mfl_jax import optim

PARAMS = {
    "encoder": {"conv": {"kernel": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}},
    "head": {"dense": {"kernel": np.ones((4, 2), np.float32), "bias": np.ones(2, np.float32)}},
}
KERNELS = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", PARAMS)


def gradients(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), PARAMS)


def run(tx, steps=4):
    update = jax.jit(tx.update)
    params, state, seen = PARAMS, tx.init(PARAMS), []
    for step in range(steps):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


def same(ours, theirs):
    for x, y in zip(jax.tree.leaves(run(ours)), jax.tree.leaves(run(theirs)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def make(total_steps=10, batch=None, examples=None, **config):
    return optim.make(config, total_steps=total_steps, batch=batch, examples=examples)


LR = optax.cosine_decay_schedule(0.1, 10)
L2 = optax.add_decayed_weights(0.3, KERNELS)
CASES = {
    "sgd": ({"weight_decay": 0.3, "nesterov": True}, optax.chain(L2, optax.sgd(LR, 0.9, nesterov=True))),
    "adam": ({"weight_decay": 0.3}, optax.chain(L2, optax.adam(LR))),
    "adamw": ({"weight_decay": 0.3, "b2": 0.95}, optax.adamw(LR, b2=0.95, weight_decay=0.3, mask=KERNELS)),
    "lars": ({"weight_decay": 0.3}, optax.lars(LR, 0.3, KERNELS, trust_ratio_mask=KERNELS)),
    "lamb": (
        {"weight_decay": 0.3},
        optax.chain(
            optax.scale_by_adam(eps=1e-6),
            optax.add_decayed_weights(0.3, KERNELS),
            optax.masked(optax.scale_by_trust_ratio(), KERNELS),
            optax.scale_by_learning_rate(LR),
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_against_optax(name):
    settings, theirs = CASES[name]
    same(make(name=name, lr=0.1, **settings), theirs)


def test_lamb_whose_kernels_are_all_there_is_is_optax_lamb():
    params = {"kernel": np.linspace(1, 2, 6, dtype=np.float32).reshape(2, 3)}
    grad = {"kernel": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)}
    ours, theirs = make(name="lamb", lr=0.1, weight_decay=0.3), optax.lamb(LR, weight_decay=0.3)
    updates = [jax.jit(tx.update)(grad, tx.init(params), params)[0]["kernel"] for tx in (ours, theirs)]
    np.testing.assert_allclose(*updates, rtol=1e-6)


def rates(total_steps=100, batch=None, examples=None, **config):
    found = optim.schedule({"lr": 1.0} | config, total_steps=total_steps, batch=batch, examples=examples)
    return lambda *steps: [round(float(found(step)), 4) for step in steps]


def test_schedules():
    assert rates(schedule="constant", warmup=10)(0, 5, 10, 99) == [0, 0.5, 1, 1]
    assert rates(schedule="cosine", warmup=20, end=0.1)(20, 60, 100, 200) == [1, 0.55, 0.1, 0.1]
    assert rates(schedule="linear", end=0.5)(0, 50, 100) == [1, 0.75, 0.5]
    assert rates(schedule="step", milestones=(60, "80%"), warmup=10)(59, 60, 79, 80) == [1, 0.1, 0.1, 0.01]


def test_durations():
    data = {"batch": 20, "examples": 200}
    assert rates(warmup="2 epochs", schedule="constant", **data)(10, 20) == [0.5, 1]
    assert rates(warmup="0.1 epochs", schedule="constant", **data)(0, 1) == [0, 1]
    assert rates(warmup="400 examples", schedule="constant", **data)(10, 20) == [0.5, 1]
    assert rates(warmup="1e2 examples", schedule="constant", **data)(5) == [1]
    assert rates(warmup="20%", schedule="constant")(10) == [0.5]
    assert rates(warmup="20 steps", schedule="constant")(10) == [0.5]
    assert rates(lr_batch=256, batch=512, schedule="constant")(0) == [2]


def test_weight_decay_follows_its_own_cosine():
    tx = make(name="adamw", lr=1.0, schedule="constant", weight_decay=0.1, weight_decay_end=0.5, total_steps=2)
    still = jax.tree.map(np.zeros_like, PARAMS)
    state, shrunk, update = tx.init(PARAMS), [], jax.jit(tx.update)
    for _ in range(4):
        updates, state = update(still, state, PARAMS)
        shrunk.append(float(-updates["head"]["dense"]["kernel"][0, 0]))
        assert not np.any(updates["head"]["dense"]["bias"])
    np.testing.assert_allclose(shrunk, [0.1, 0.3, 0.5, 0.5], rtol=1e-5)


def test_decay_and_rate_by_name():
    rules = {"decay": ((".*/bias", 2.0), (".*", 0.0)), "lr_rules": (("encoder/.*", 0.1), (".*", 1.0))}
    tx = make(name="sgd", lr=1.0, momentum=0.0, schedule="constant", weight_decay=0.25, **rules)
    ones = jax.tree.map(np.ones_like, PARAMS)
    updates, _ = tx.update(ones, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["encoder"]["conv"]["kernel"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["dense"]["kernel"], -1.0, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["dense"]["bias"], -1.5, rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_what_is_frozen_stays_has_no_moments_and_is_not_clipped_with(name):
    settings = {"name": name, "lr": 0.1, "weight_decay": 0.1, "clip_norm": 0.5}
    tx = make(**settings, freeze=(("encoder/.*", True), (".*", False)))
    seen = run(tx)[-1]
    np.testing.assert_array_equal(seen["encoder"]["conv"]["kernel"], PARAMS["encoder"]["conv"]["kernel"])
    assert not [leaf for leaf in jax.tree.leaves(tx.init(PARAMS)) if leaf.shape == (3, 4)]
    alone, head = make(**settings), {"head": PARAMS["head"]}
    expected, _ = alone.update({"head": gradients(0)["head"]}, alone.init(head), head)
    updates, _ = tx.update(gradients(0), tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["head"]["dense"]["bias"], expected["head"]["dense"]["bias"], rtol=1e-6)


def test_a_leaf_can_be_frozen_for_a_while():
    freeze = (("head/.*", "1 epoch"), (".*", False))
    tx = make(lr=0.1, schedule="constant", freeze=freeze, clip_norm=0.5, batch=5, examples=10)
    seen = run(tx)
    start, at = PARAMS["head"]["dense"]["bias"], [p["head"]["dense"]["bias"] for p in seen]
    np.testing.assert_array_equal(at[0], start)
    np.testing.assert_array_equal(at[1], start)
    assert np.all(at[2] != start)
    assert np.all(seen[0]["encoder"]["conv"]["kernel"] != PARAMS["encoder"]["conv"]["kernel"])


def test_clips():
    big = {"a": np.full(4, 3.0, np.float32), "b": np.full(4, 0.1, np.float32), "c": np.zeros(2, np.float32)}
    each = optim.clip_each(big, 1.0)
    np.testing.assert_allclose(np.linalg.norm(each["a"]), 1, rtol=1e-6)
    np.testing.assert_array_equal(each["b"], big["b"])
    np.testing.assert_array_equal(each["c"], 0)
    tx = make(name="sgd", lr=1.0, momentum=0.0, schedule="constant", clip_each=1.0, clip_norm=0.01)
    updates, _ = tx.update(big, tx.init(big), big)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate(jax.tree.leaves(updates))), 0.01, rtol=1e-5)
    np.testing.assert_allclose(updates["a"] / updates["b"], each["a"] / each["b"], rtol=1e-5)


def test_ema():
    old, new = {"x": jnp.float32(1.0)}, {"x": jnp.float32(3.0)}
    np.testing.assert_allclose(optim.ema(old, new, 0.75)["x"], 1.5)
    assert optim.ema(old, new, 1.0)["x"] == 1
    decays = [float(optim.ema_decay(step, 100, 0.9)) for step in (0, 50, 100, 150)]
    np.testing.assert_allclose(decays, [0.9, 0.95, 1, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "adamm"}, "one of sgd, adam, adamw, lars, lamb, not 'adamm'"),
        ({"weight_deacy": 0.1}, "did you mean 'weight_decay'"),
        ({"name": "adamw", "momentum": 0.9}, "optim.momentum has no effect on adamw; it belongs to sgd, lars"),
        ({"lr": 0.0}, "optim.lr is above 0"),
        ({"lr": "fast"}, "optim.lr is a finite number"),
        ({"schedule": "cos"}, "constant, cosine, linear, step, not 'cos'"),
        ({"warmup": 10}, "is 10 steps, but the run has only 10"),
        ({"warmup": "a while"}, "is a duration, such as"),
        ({"warmup": "1 epochs"}, "needs a known batch"),
        ({"warmup": -1}, "is a duration, such as"),
        ({"schedule": "step"}, "optim.milestones"),
        ({"milestones": (3,)}, "optim.milestones"),
        ({"lr_batch": 256}, "needs a known batch"),
        ({"freeze": (("(", True),)}, "optim.freeze: a rule is"),
    ],
)
def test_settings_that_are_wrong_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make(**config)


@pytest.mark.parametrize("key", ["decay", "lr_rules", "freeze"])
def test_rules_must_cover_and_be_of_use(key):
    with pytest.raises(ValueError, match=rf"optim.{key}: 'encoder/conv2/.\*' matches no leaf"):
        make(**{key: (("encoder/conv2/.*", True), (".*", False))}).init(PARAMS)
    with pytest.raises(ValueError, match=rf"optim.{key}: 2 of 3 leaves match no rule"):
        make(**{key: (("encoder/.*", False),)}).init(PARAMS)
