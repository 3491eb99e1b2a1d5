"""A NaN is never taken for a number, and recomputation changes none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfl_jax import losses, models, sharding, train
from tests.mfl_jax import synthetic

PAIRS = {
    "info_nce": losses.info_nce,
    "info_nce_blocked": lambda a, b, mask=None: losses.info_nce(a, b, mask=mask, block=2),
    "queue_nce": lambda a, b, mask=None: losses.queue_nce(a, b, jnp.eye(5), mask=mask),
    "simsiam": lambda a, b, mask=None: losses.simsiam(a, b, b, a, mask=mask),
    "byol": lambda a, b, mask=None: losses.byol(a, b, b, a, mask=mask),
    "vicreg": losses.vicreg,
    "barlow": losses.barlow,
}


def drawn(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((6, 5)).astype(np.float32)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_has_no_direction_and_is_not_taken_for_zeros(bad):
    x = drawn(0)
    x[2, 1] = bad
    unit = np.asarray(losses.normalise(jnp.asarray(x)))
    assert np.isnan(unit[2]).any()
    others = np.delete(x, 2, 0).astype(np.float64)
    np.testing.assert_allclose(
        np.delete(unit, 2, 0), others / np.linalg.norm(others, axis=1, keepdims=True), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", PAIRS)
def test_one_row_that_is_not_finite_spoils_the_loss_so_that_the_step_is_skipped(name, bad):
    a, b = drawn(1), drawn(2)
    assert np.isfinite(PAIRS[name](a, b)[0])
    a[4, 0] = bad
    assert not np.isfinite(PAIRS[name](a, b)[0])


@pytest.mark.parametrize("name", PAIRS)
def test_a_row_left_out_may_hold_a_nan_and_reaches_neither_loss_nor_gradient(name):
    """As an oracle, what stands in the row is something else: nothing may change."""
    mask = np.array([True, True, False, True, True, False])
    found = []
    for filling in (0.7, np.nan, np.inf):
        a, b = drawn(3), drawn(4)
        a[~mask], b[~mask] = filling, filling
        value, slopes = jax.value_and_grad(lambda a, b: PAIRS[name](a, b, mask=mask)[0], (0, 1))(a, b)
        found.append([np.asarray(x) for x in (value, *slopes)])
        assert all(np.isfinite(x).all() for x in found[-1])
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, same)


def test_a_nan_in_one_example_is_a_step_skipped_where_nothing_but_the_loss_can_show_it():
    """No BatchNorm that would spread it, and no statistics that it would enter."""
    encoder, head = "mlp,widths=8,bn=false", "projector,widths=16-16"
    config = synthetic.tiny("mfl", "counts", mfl__encoders__counts=encoder, mfl__projector=head, total__steps=3)
    facts = synthetic.facts(config.data)
    run = train.plan(config, source=synthetic.Source(facts), facts=facts)
    places, like, example = train._shapes(run)
    create = functools.partial(train.init_state, run.method, run.tx, run.seed, example, ema=run.ema)
    state = jax.jit(create, out_shardings=places)()
    compiled = train._compile(run, places, like, example)
    for step in range(3):
        batch = synthetic.batch(facts, step)
        if step == 1:
            batch["counts"][5, 2] = np.nan
        before = jax.device_get(state)
        state, values = compiled(state, sharding.put(batch, run.mesh))
        changed = synthetic.differing(before, state)
        if step == 1:
            assert np.isnan(values["loss"])
            assert changed == {".step", ".skipped", ".skipped_total"}
        else:
            assert np.isfinite(values["loss"])
            assert len(changed) > 10
    assert (int(state.skipped), int(state.skipped_total)) == (0, 1)


@pytest.mark.parametrize(
    "spec",
    ["vit_ti8,features=12,heads=3,blocks=1", pytest.param("resnet18,width=0.125,small_stem", marks=pytest.mark.slow)],
)
def test_recomputation_gives_the_same_loss_gradient_and_statistics(spec):
    x = np.random.default_rng(0).standard_normal((4, 16, 16, 3)).astype(np.float32)
    rows = np.random.default_rng(1).standard_normal(4).astype(np.float32)
    found, written = [], []
    for remat in (False, True):
        model = models.make(spec, remat=remat)
        params, stats = model.init(jax.random.key(0), x)
        # The last BatchNorm of a block starts at 0 and would hide it. Kernels stay as they are: were 0.1 added to them,
        # all channels would be alike, and gradients what rounding leaves of them.
        params = jax.tree.map(lambda p: p + 0.1 if p.ndim == 1 else p, params)

        def loss(p, model=model, stats=stats):
            features, new = model.apply(p, stats, x, train=True)
            return jnp.sum(jnp.mean(features**2, 1) * rows), new

        step = jax.value_and_grad(loss, has_aux=True)
        written.append("remat" in str(jax.make_jaxpr(step)(params)))
        found.append(jax.device_get(jax.jit(step)(params)))
    assert written == [False, True]
    (_, slopes) = found[0]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slopes))
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5 * np.abs(one).max())
