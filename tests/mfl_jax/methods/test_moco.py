"""The queue against a float64 oracle that goes through it key by key; the slow network; what a plan refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from mfl_jax import data, methods, train
from mfl_jax.config import Reading
from mfl_jax.methods import moco
from tests.mfl_jax import synthetic

pytestmark = pytest.mark.usefixtures("compile_cache")
DECAY = 0.9


def planned(words: str = "", **overrides):
    config = synthetic.tiny("moco", words, **{"total__steps": 4, "moco__momentum": DECAY} | overrides)
    facts = synthetic.facts(config.data)
    return config, facts, train.plan(config, source=synthetic.Source(facts), facts=facts)


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@functools.cache
def trace(words: str, **overrides):
    """Queries and keys of a few steps by the towers alone, with the states before and after, on the host."""
    config, facts, run = planned(words, **overrides)
    batches = [synthetic.batch(facts, step) for step in range(8)]
    params, extra = run.method.init(jax.random.key(0), data.abstract_batch(facts, 8, run.mesh))
    loss = jax.jit(jax.value_and_grad(run.method.loss, has_aux=True))
    steps = []
    for number, batch in enumerate(batches):
        (value, (out, metrics)), grads = loss(params, extra, batch, jax.random.key(number), jnp.int32(number))
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        after = run.method.update(moved, extra, out, jnp.int32(number))
        steps.append(jax.device_get((batch, params, extra, out, value, metrics, moved, after)))
        params, extra = moved, after
    return config, run, steps


def test_the_queue_holds_the_latest_keys_oldest_replaced_first():
    config, _, steps = trace("")
    size, rows = config.moco.queue, config.data.batch
    queue = np.array(steps[0][2]["queue"])
    slides = np.full(size, -1)
    np.testing.assert_allclose(np.linalg.norm(queue, axis=1), 1, rtol=1e-6)
    assert np.abs(np.mean(queue)) < 0.05
    for number, (batch, _, before, out, _, _, _, after) in enumerate(steps):
        np.testing.assert_array_equal(before["queue"], queue)
        at = number * rows % size
        assert int(before["pointer"]) == at
        for i in range(rows):
            queue[(at + i) % size] = out["keys"][i, 0]
            slides[(at + i) % size] = batch["slide"][i]
        np.testing.assert_array_equal(after["queue"], queue)
        np.testing.assert_array_equal(after["queue_slide"], slides)
    assert len(steps) * rows > size  # it went round


def test_the_slow_network_is_the_mean_of_all_networks_before():
    _, _, steps = trace("")
    slow = jax.tree.map(np.float64, steps[0][1]["he"])
    for _, _, before, _, _, _, moved, after in steps:
        jax.tree.map(lambda s, b: np.testing.assert_allclose(b, s, rtol=1e-5, atol=1e-6), slow, before["key"]["params"])
        slow = jax.tree.map(lambda s, p: DECAY * s + (1 - DECAY) * p, slow, moved["he"])
        changed = jax.tree.map(lambda a, b: np.abs(a - b).max(initial=0.0), moved["he"], after["key"]["params"])
        assert max(jax.tree.leaves(changed)) > 0


@pytest.mark.parametrize("words", ["", "near", "symmetric"])
def test_the_loss_is_that_of_the_definition(words):
    """Queries by the network, keys by the slow one, both from the views that the config draws."""
    config, run, steps = trace(words, moco__mask_same_slide=words == "near")
    batch, params, extra, out, value, _, _, _ = steps[-1]
    reading = Reading(config)
    branch = methods.towers.tower(config.encoder, config.moco.projector, "float32")
    see = moco._views(reading, run.facts)
    rng = jax.random.key(len(steps) - 1)
    x, y = see(rng, batch)
    slow, total, keys = extra["key"]["stats"], [], []
    stats = extra["he"]
    for first, second in ((x, y), (y, x))[: 2 if words == "symmetric" else 1]:
        _, q, stats = branch(params["he"], stats, first, rng)
        _, k, slow = branch(extra["key"]["params"], slow, second, rng)
        q, k, queue = unit(q), unit(k), np.asarray(extra["queue"], np.float64)
        keys.append(k)
        for i in range(len(q)):
            own = words == "near"
            others = [j for j in range(len(queue)) if not own or extra["queue_slide"][j] != batch["slide"][i]]
            logits = np.array([q[i] @ k[i], *(q[i] @ queue[j] for j in others)]) / config.moco.temperature
            total.append(logsumexp(logits) - logits[0])
    np.testing.assert_allclose(value, np.mean(total), rtol=1e-5)
    np.testing.assert_allclose(out["keys"], np.stack(keys, 1), rtol=1e-4, atol=1e-5)
    if words == "near":
        assert not np.array_equal(batch["he"], batch["near_he"])
        assert set(batch["slide"]) & set(extra["queue_slide"])


def test_a_row_that_does_not_count_leaves_the_queue_what_was_there():
    _, _, steps = trace("")
    batch, _, extra, out, *_ = steps[3]
    mask = np.arange(8) % 3 != 0
    new = moco._enqueued(extra, out["keys"], batch["slide"], mask)
    rows = int(extra["pointer"]) + np.arange(8)
    np.testing.assert_array_equal(new["queue"][rows[~mask]], extra["queue"][rows[~mask]])
    np.testing.assert_array_equal(new["queue"][rows[mask]], out["keys"][mask, 0])
    np.testing.assert_array_equal(new["queue_slide"][rows[mask]], batch["slide"][mask])


def test_an_accumulated_batch_enqueues_its_rows_in_order():
    keys, slide = np.random.default_rng(0).normal(size=(8, 2, 3)), np.arange(8)
    sliced = {n: x.reshape(4, 2, *x.shape[1:]).swapaxes(0, 1) for n, x in (("keys", keys), ("slide", slide))}
    outs = {"he": np.array([1.0, 3.0]), "slow": np.zeros(2), "mask": np.ones((2, 4), bool), **sliced}
    merged = moco._merge(jax.tree.map(jnp.asarray, outs))
    np.testing.assert_allclose(merged["keys"], keys, rtol=1e-6)
    np.testing.assert_array_equal(merged["slide"], slide)
    assert (float(merged["he"]), merged["mask"].shape) == (2.0, (8,))


def test_in_groups_a_key_is_normalised_with_other_rows_than_its_query():
    """With the networks equal and the views without chance, only the groups make key and query differ."""
    for groups in (1, 2):
        spec = f"compact,widths=8,bn_groups={groups}"
        _, facts, run = planned(views__he="centre|normalise", encoder=spec)
        params, extra = run.method.init(jax.random.key(0), data.abstract_batch(facts, 8, run.mesh))
        loss = jax.jit(run.method.loss)
        _, (out, metrics) = loss(params, extra, synthetic.batch(facts, 0), jax.random.key(1), jnp.int32(0))
        if groups == 1:
            np.testing.assert_allclose(metrics["positive_cosine"], 1, rtol=1e-6)
            whole = np.asarray(out["keys"][:, 0])
        else:
            assert metrics["positive_cosine"] < 0.99
            own = whole @ np.asarray(out["keys"][:, 0]).T  # each key is still that of its own row
            assert np.sum(own.argmax(1) == np.arange(8)) >= 6


@pytest.mark.parametrize(
    ("words", "change", "message"),
    [
        ("", {"moco__queue": 20}, "20, which is not a multiple of the 8 keys.*16 is"),
        ("symmetric", {"moco__queue": 24}, "multiple of the 16 keys.*16 is"),
        ("", {"moco__queue": 0}, "8 is"),
        ("", {"moco__momentum": 1.0}, "below 1"),
        ("", {"moco__second": "near"}, "moco.second is 'near'.*near_um"),
        ("", {"moco__second": "far"}, "allowed: 'same'"),
        ("", {"views__he": "2*flip"}, "views.he gives 2"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_compiles(words, change, message):
    with synthetic.compilations() as compiled, pytest.raises(ValueError, match=f"(?s){message}"):
        planned(words, **change)
    assert not compiled
