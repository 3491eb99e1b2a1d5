"""The step: the guard, gradient accumulation, moving averages, and parameters that are split over devices."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mfl_jax.methods.base import Method, mean_of_slices
from mfl_jax.step import averaged, init_state, make_step
from tests.mfl_jax import synthetic

ROWS = 12


def regression(spoil=None) -> Method:
    """Linear regression, row by row, that keeps a running mean; `spoil` breaks loss, gradient or statistics."""

    def init(rng, batch):
        return {"w": jax.random.normal(rng, (batch["x"].shape[1],))}, {"mean": jnp.zeros(batch["x"].shape[1])}

    def loss(params, extra, batch, rng, step):
        prediction = batch["x"] @ params["w"]
        value = jnp.mean(jnp.square(prediction - batch["y"]))
        mean = 0.9 * extra["mean"] + 0.1 * batch["x"].mean(0)
        if spoil == "gradient":  # of sqrt at 0: infinite, times 0
            value = value + jnp.sum(jnp.sqrt(0 * params["w"]))
        if spoil == "extra":
            mean = mean + jnp.inf
        return value, ({"mean": mean}, {"mean_y": batch["y"].mean()})

    return Method(init, loss, lambda params, extra, out, step: out, lambda params, extra, batch: {"he": batch["x"]})


def batch(step: int = 0) -> dict[str, jax.Array]:
    draw = np.random.default_rng(step)
    return {
        "x": jnp.asarray(draw.normal(size=(ROWS, 3)), jnp.float32),
        "y": jnp.asarray(draw.normal(size=ROWS), jnp.float32),
    }


def started(method: Method, tx=None, **options):
    tx = tx or optax.adam(1e-2)
    return init_state(method, tx, 0, batch(), **options), tx


@pytest.mark.parametrize("spoil", ["gradient", "extra"])
def test_what_is_not_finite_anywhere_changes_nothing(spoil):
    state, tx = started(regression())
    state, _ = make_step(regression(), tx)(state, batch())
    after, values = make_step(regression(spoil), tx)(state, batch(1))
    assert np.isfinite(values["loss"])
    assert synthetic.differing(state, after) == {".step", ".skipped", ".skipped_total"}


@pytest.mark.parametrize("where", ["x", "y"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_nan_in_one_example_changes_nothing(where, accumulate):
    state, tx = started(regression(), ema=0.9)
    step = make_step(regression(), tx, accumulate=accumulate, ema=0.9)
    spoilt = batch(1)
    spoilt[where] = spoilt[where].at[(7,) + (0,) * (spoilt[where].ndim - 1)].set(jnp.nan)
    after, _ = step(state, spoilt)
    assert synthetic.differing(state, after) == {".step", ".skipped", ".skipped_total"}
    again, _ = step(after, spoilt)
    assert (int(again.skipped), int(again.skipped_total), int(again.step)) == (2, 2, 2)
    well, _ = step(again, batch(2))
    assert (int(well.skipped), int(well.skipped_total)) == (0, 2)
    assert ".params['w']" in synthetic.differing(again, well)


def test_accumulated_slices_are_the_whole_batch():
    """Of a loss that is a mean over rows; statistics are means too."""
    state, tx = started(regression(), optax.sgd(0.1))
    whole, whole_values = make_step(regression(), tx)(state, batch())
    for slices in (2, 3, 4, 6):
        sliced, values = make_step(regression(), tx, accumulate=slices)(state, batch())
        for name, value in synthetic.leaves(whole).items():
            np.testing.assert_allclose(synthetic.leaves(sliced)[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        for name, value in whole_values.items():
            np.testing.assert_allclose(values[name], value, rtol=1e-5, err_msg=name)


def test_accumulation_updates_once_with_the_new_parameters():
    seen = []

    def update(params, extra, out, step):
        seen.append(out)
        return {"teacher": 0.5 * extra["teacher"] + 0.5 * params["w"], "mean": out["mean"]}

    def init(rng, first):
        return plain.init(rng, first)[0], {"teacher": jnp.zeros(3), "mean": jnp.zeros(3)}

    plain = regression()
    method = replace(plain, init=init, update=update)
    state, tx = started(method, optax.sgd(0.1))
    after, _ = make_step(method, tx, accumulate=4)(state, batch())
    assert len(seen) == 1
    np.testing.assert_allclose(after.extra["teacher"], after.params["w"] / 2, rtol=1e-6)


def test_merging_keeps_counters_and_averages_statistics():
    outs = {"mean": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "count": jnp.array([5, 6])}
    merged = mean_of_slices(outs)
    np.testing.assert_array_equal(merged["mean"], [2.0, 3.0])
    assert int(merged["count"]) == 6


def test_every_slice_has_a_key_of_its_own_and_every_step():
    def loss(params, extra, batch, rng, step):
        return jnp.sum(params["w"] * jax.random.normal(rng, (3,))), (extra, {"draw": jax.random.normal(rng, ())})

    method = replace(regression(), loss=loss)
    state, tx = started(method)
    draws = set()
    for slices in (1, 2):
        step, now = make_step(method, tx, accumulate=slices), state
        for _ in range(3):
            now, values = step(now, batch())
            draws.add(float(values["draw"]))
    assert len(draws) == 6


def test_the_average_follows_the_parameters_and_is_what_is_evaluated():
    state, tx = started(regression(), ema=0.75)
    after, _ = make_step(regression(), tx, ema=0.75)(state, batch())
    np.testing.assert_allclose(after.average["w"], 0.75 * state.params["w"] + 0.25 * after.params["w"], rtol=1e-6)
    np.testing.assert_array_equal(averaged(after).params["w"], after.average["w"])
    plain, _ = started(regression())
    assert plain.average is None
    assert averaged(plain) is plain


def test_the_state_depends_on_the_seed_and_on_nothing_else():
    method, tx = regression(), optax.adam(1e-3)
    one, again, other = (init_state(method, tx, seed, batch(9)) for seed in (0, 0, 1))
    synthetic.assert_same(one, again)
    assert {".params['w']", ".rng"} <= synthetic.differing(one, other)
