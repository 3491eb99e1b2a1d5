"""DINO against a float64 oracle that goes view by view: the loss, the teacher, the centre; what a plan refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp, softmax

from mfl_jax import data, models, train
from mfl_jax.config import Reading
from mfl_jax.methods import dino
from tests.mfl_jax import synthetic

pytestmark = pytest.mark.usefixtures("compile_cache")
MASK = np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)
STEPS = 40
STILL = "vit_ti8,features=16,blocks=2,heads=2"


def planned(words: str = "", **overrides):
    config = synthetic.tiny("dino", words, **{"total__steps": STEPS} | overrides)
    facts = synthetic.facts(config.data)
    return config, facts, train.plan(config, source=synthetic.Source(facts), facts=facts)


@functools.cache
def seen(words: str = "", **overrides):
    """A batch of which two rows do not count, and what student and teacher see of it; they are two networks here."""
    config, facts, run = planned(words, **{"encoder": STILL} | overrides)
    parts = dino.parts(Reading(config), facts)
    start = jax.jit(lambda key: parts.init(key, data.abstract_batch(facts, 8, run.mesh)))
    params, extra = start(jax.random.key(0))
    extra["teacher"]["params"] = start(jax.random.key(1))[0]["he"]
    if "centre" in extra:
        extra["centre"] = jax.random.normal(jax.random.key(2), extra["centre"].shape) * 0.1
    batch = synthetic.batch(facts, 0) | {"mask": MASK}
    found = jax.jit(parts.see)(params, extra, batch, jax.random.key(3))
    return config, parts, params, extra, batch, found


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_every_view_is_seen_as_if_it_came_alone():
    """Crops of one size go through the encoder together, all crops through the head; no view touches another."""
    config, parts, params, extra, batch, found = seen()
    views = jax.jit(parts.views)(jax.random.key(3), batch)
    assert [view.shape[1] for view in views] == [16, 16, 8, 8]
    head = models.make_head(config.dino.head, 16)
    encode = jax.jit(lambda one, view: models.make(STILL).apply(one["encoder"], {}, view, train=False)[0])
    narrow = jax.jit(lambda one, x: head.apply(one["head"], {}, x, train=False)[0])
    for one, every, count in ((params["he"], found.student, 4), (extra["teacher"]["params"], found.teacher, 2)):
        assert every.logits.shape[0] == count
        for view, *outputs in zip(views[:count], *every, strict=True):
            features = encode(one, view)
            z = unit(narrow(one, features))
            kernel = unit(one["last"]["kernel"].T)
            for ours, expected in zip(outputs, (features, z, z @ kernel.T), strict=True):
                np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("centring", ["centre", "sinkhorn"])
def test_the_loss_is_that_of_the_definition_and_rows_that_do_not_count_are_nowhere(centring):
    warming = {"dino__teacher_temperature_start": 0.07, "dino__teacher_warmup": "10 steps"}
    _, parts, params, extra, _, found = seen(dino__centring=centring, **warming)
    student, teacher = (np.float64(x.logits)[:, MASK] for x in (found.student, found.teacher))
    cold = 0.07 - 0.03 * 0.4  # after 4 of 10 steps
    if centring == "centre":
        targets = softmax((teacher - np.float64(extra["centre"])) / cold, -1)
    else:
        logs = np.concatenate(teacher) / cold
        for _ in range(3):
            logs = logs - logsumexp(logs, 0, keepdims=True)
            logs = logs - logsumexp(logs, 1, keepdims=True)
        targets = np.exp(logs).reshape(teacher.shape)
    logs = log_softmax(student / 0.1, -1)
    pairs = [-np.mean(np.sum(targets[t] * logs[s], -1)) for t in range(2) for s in range(4) if s != t]
    assert len(pairs) == 6
    spoilt = jax.tree.map(lambda x: jnp.where(MASK.reshape(1, 8, *[1] * (x.ndim - 2)), x, 7.0), found[:2])
    loss = jax.jit(lambda f: parts.self_loss(f, extra, MASK, 4))
    value, (out, metrics) = loss(dino.Seen(*spoilt, found.stats, found.slow_stats))
    np.testing.assert_allclose(value, np.mean(pairs), rtol=1e-4)
    assert float(metrics["teacher_temperature"]) == pytest.approx(cold)
    if centring == "centre":
        new = parts.updated(params, extra, out, 4)["centre"]
        expected = 0.9 * np.float64(extra["centre"]) + 0.1 * teacher.mean((0, 1))
        np.testing.assert_allclose(new, expected, rtol=1e-4, atol=1e-6)
    else:
        assert "centre" not in out


def test_the_teacher_is_a_mean_that_slows_down_and_its_statistics_are_its_own():
    _, parts, params, extra, _, found = seen()
    out = {"he": found.stats, "slow": found.slow_stats, "centre": {"total": extra["centre"], "count": jnp.float32(0)}}
    for step, decay in ((0, 0.996), (STEPS // 2, 0.998), (STEPS, 1.0)):
        new = parts.updated(params, extra, out, step)
        for ours, old, student in zip(
            *map(jax.tree.leaves, (new["teacher"]["params"], extra["teacher"]["params"], params["he"])), strict=True
        ):
            np.testing.assert_allclose(
                ours, decay * np.float64(old) + (1 - decay) * np.float64(student), rtol=1e-5, atol=1e-7
            )
        np.testing.assert_array_equal(new["centre"], extra["centre"])  # no row counted


def test_only_the_student_drops_paths():
    _, parts, params, extra, batch, _ = seen()
    _, facts, _ = planned()
    config = synthetic.tiny("dino", encoder=f"{STILL},drop_path=0.5,dropout=0.1", total__steps=STEPS)
    dropping = dino.parts(Reading(config), facts)
    views = jax.jit(parts.views)(jax.random.key(3), batch)[:2]
    one, other = (jax.random.key(n) for n in range(2))
    for network, alike in ((dropping.student, False), (dropping.teacher, True)):
        run = jax.jit(lambda key, network=network: network(params["he"], extra["he"], views, key)[0].logits)
        assert np.array_equal(run(one), run(other)) == alike


def test_small_crops_are_not_drawn_as_the_large_ones():
    _, facts, _ = planned()
    config = synthetic.tiny("dino", views__he="2*flip", views__local="2*flip", views__local_size=16, total__steps=9)
    parts = dino.parts(Reading(config), facts)
    views = np.stack(jax.jit(parts.views)(jax.random.key(0), synthetic.batch(facts, 0)))
    same = (views[:, None] == views[None]).all((3, 4, 5))  # [4, 4, rows]: flipped alike by chance in a quarter
    assert [int(same[i, j].sum()) < 8 for i in range(4) for j in range(i)] == [True] * 6
    without = synthetic.tiny("dino", views__local="", total__steps=9)
    alone = dino.parts(Reading(without), facts).views
    assert len(jax.eval_shape(alone, jax.random.key(0), synthetic.batch(facts, 0))) == 2


def test_evaluators_see_the_teacher_unless_they_are_told_not_to():
    _, parts, params, extra, batch, _ = seen()
    _, own, *_ = seen(dino__embed="student")
    look = jax.jit(parts.look)(batch["he"])
    encode = jax.jit(lambda one: models.make(STILL).apply(one["encoder"], {}, look, train=False)[0])
    for made, one in ((parts, extra["teacher"]["params"]), (own, params["he"])):
        found = jax.jit(made.embed)(params, extra, batch)["he"]
        np.testing.assert_allclose(found, encode(one), rtol=1e-4, atol=1e-5)
    z = jax.jit(parts.teacher.bottleneck)(extra["teacher"]["params"], extra["teacher"]["stats"], look)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
    prototypes = parts.teacher.logits(extra["teacher"]["params"], z)
    assert prototypes.shape == (8, parts.student.last.dim)
    assert np.abs(prototypes).max() <= 1 + 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views__he": "flip|normalise"}, "views.he gives 1: begin it with '2"),
        ({"dino__centring": "center"}, "dino.centring is 'center'; allowed: centre, sinkhorn"),
        ({"dino__embed": "both"}, "dino.embed is 'both'; allowed: teacher, student"),
        ({"dino__student_temperature": 0.0}, "above 0"),
        ({"dino__momentum": 1.0}, "dino.momentum is 1.0; it is 0 or more and below 1"),
        ({"dino__teacher_warmup": "some"}, "dino.teacher_warmup is a duration"),
        ({"dino__head": "dino,hiden=8"}, "did you mean 'hidden'"),
        ({"views__local": "2*crop(2,3)"}, "views of 'local'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_compiles(change, message):
    with synthetic.compilations() as compiled, pytest.raises(ValueError, match=message):
        planned(**change)
    assert not compiled
