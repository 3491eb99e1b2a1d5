"""Pairs of one slide against the definition of the losses; which pairs count; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfl_jax import data, train
from mfl_jax.config import Reading
from mfl_jax.methods import towers
from tests.mfl_jax import synthetic

pytestmark = pytest.mark.usefixtures("compile_cache")
PLAIN = {"views__he": "centre|normalise"}


def planned(words: str = "", **overrides):
    config = synthetic.tiny("siamese", words, **overrides)
    facts = synthetic.facts(config.data)
    return config, facts, train.plan(config, source=synthetic.Source(facts), facts=facts)


def descriptors(config, facts, params, extra, batch):
    """By the tower alone, in float64 of length 1; every set of tiles is normalised by itself."""
    branch = towers.tower(config.encoder, config.siamese.head, "float32")
    view = towers.eval_view(Reading(synthetic.tiny("siamese", views__eval="centre|normalise")), facts)
    out, stats = [], extra["he"]
    for name in ("he", "near_he", "far_he"):
        _, z, stats = branch(params["he"], stats, view(batch[name]), jax.random.key(0))
        z = np.asarray(z, np.float64)
        out.append(z / np.linalg.norm(z, axis=1, keepdims=True))
    return out, stats


@pytest.mark.parametrize("kind", ["margin", "triplet"])
def test_the_loss_is_that_of_the_pairs_that_are_there(kind):
    config, facts, run = planned(kind, siamese__gap=0.7, **PLAIN)
    batch = synthetic.batch(facts, 0)
    batch["near_mask"], batch["far_mask"] = np.arange(8) % 4 != 0, np.arange(8) % 3 != 1
    params, extra = run.method.init(jax.random.key(0), data.abstract_batch(facts, 8, run.mesh))
    value, (out, metrics) = jax.jit(run.method.loss)(params, extra, batch, jax.random.key(1), jnp.int32(0))
    (tile, near, far), stats = descriptors(config, facts, params, extra, batch)
    close, wide = np.linalg.norm(tile - near, axis=1), np.linalg.norm(tile - far, axis=1)
    is_near, is_far = batch["near_mask"], batch["far_mask"]
    if kind == "margin":
        expected = np.mean([*close[is_near] ** 2, *np.maximum(0, 0.7 - wide[is_far]) ** 2])
        np.testing.assert_allclose(
            [metrics["near"], metrics["far"]], [close[is_near].mean(), wide[is_far].mean()], 1e-4
        )
    else:
        expected = np.mean(np.maximum(0, close - wide + 0.7)[is_near & is_far])
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), out["he"], stats)


def test_the_embedding_is_the_descriptor_beside_the_features_it_stands_on():
    _, facts, run = planned()
    params, extra = run.method.init(jax.random.key(0), data.abstract_batch(facts, 8, run.mesh))
    batch = synthetic.batch(facts, 0)
    found = jax.jit(run.method.embed)(params, extra, {"he": batch["he"]})
    assert set(found) == {"he", "descriptor"}
    kernel, bias = (np.asarray(params["he"]["projector"]["dense0"][name], np.float64) for name in ("kernel", "bias"))
    z = np.asarray(found["he"], np.float64) @ kernel + bias
    assert z.shape == (8, 16)
    np.testing.assert_allclose(found["descriptor"], z / np.linalg.norm(z, axis=1, keepdims=True), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"siamese__loss": "contrastive"}, "'contrastive'; allowed: margin, triplet"),
        ({"siamese__gap": 0.0}, "gap is 0.0"),
        ({"siamese__gap": 2.5}, "at most 2"),
        ({"data__near_um": 0.0}, "data.near_um"),
        ({"data__far_um": 20.0}, "data.near_um <= data.far_um.*64.0 and 20.0"),
        ({"views__he": "2*flip"}, "views.he gives 2"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_compiles(change, message):
    with synthetic.compilations() as compiled, pytest.raises(ValueError, match=f"(?s){message}"):
        planned(**change)
    assert not compiled
