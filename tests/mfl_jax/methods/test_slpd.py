"""SLPD's two terms, its centres and its refresh, against float64 restatements that go row by row."""

import functools
import itertools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfl_jax import config as configs
from mfl_jax import losses, metrics, sharding, train, trained
from mfl_jax.config import Reading
from mfl_jax.methods import dino, slpd
from tests.mfl_jax import processes, synthetic

pytestmark = pytest.mark.usefixtures("compile_cache")
K, NEIGHBOURS, REGIONS = 2, 2, 64
INTRA, INTER = 0.7, 0.3


def configured(**more):
    options = {"slpd__neighbours": NEIGHBOURS, "slpd__intra": INTRA, "slpd__inter": INTER}
    return synthetic.tiny("slpd", **options | more)


def planned(**more):
    config = configured(**more)
    facts = synthetic.facts(config.data)
    return train.plan(config, source=synthetic.Source(facts), facts=facts), config


@functools.cache
def rig(centres="own"):
    """(run, parts of DINO, state at the start, the loss and its gradient as a program)"""
    run, config = planned(slpd__centres=centres)
    _, _, example = train._shapes(run)
    state = jax.jit(functools.partial(train.init_state, run.method, run.tx, run.seed, example))()
    program = jax.jit(jax.value_and_grad(run.method.loss, has_aux=True))
    return run, dino.parts(Reading(config), run.facts), state, program


def tables(seed=0):
    """Slide 0 has two neighbours, slide 2 one, slide 4 is not eligible; region 3 of slide 0 was not seen."""
    draw = np.random.default_rng(seed)
    vectors = draw.normal(size=(synthetic.SLIDES, K, 64))
    assignment = draw.integers(0, K, REGIONS)
    assignment[3] = -1
    return {
        "prototypes": (vectors / np.linalg.norm(vectors, axis=2, keepdims=True)).astype(np.float32),
        "assignment": assignment.astype(np.int32),
        "eligible": np.array([True, True, True, True, False]),
        "neighbour": np.array([[2, 3], [0, 2], [1, -1], [2, 0], [-1, -1]], np.int32),
        "transfer": draw.permuted(np.tile(np.arange(K), (synthetic.SLIDES, NEIGHBOURS, 1)), axis=2).astype(np.int32),
        "centre_intra": draw.normal(size=48).astype(np.float32) * 0.1,
        "centre_inter": draw.normal(size=48).astype(np.float32) * 0.1,
    }


def batch(facts):
    made = synthetic.batch(facts, 0)
    made["slide"] = np.array([0, 0, 2, 0, 4, 2, 0, 1], np.int32)
    made["mask"] = np.arange(8) != 6
    assignment = tables()["assignment"]
    assignment[4] = -1  # of the slide that is not eligible
    return made, assignment


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def plain_terms(student, kernel, extra, made, temperature=0.04):
    """{term: (loss, logits that its centre is moved by)}: row by row, view by view, in float64."""
    kernel = np.asarray(kernel).astype(np.float64)
    directions = kernel / np.linalg.norm(kernel, axis=0)
    costs, logits = {"intra": [], "inter": []}, {"intra": [], "inter": []}
    for row in range(8):
        slide, cluster = int(made["slide"][row]), int(extra["assignment"][made["id"][row]])
        if not made["mask"][row] or cluster < 0:
            continue
        found = {"intra": [extra["prototypes"][slide, cluster]], "inter": []}
        for rank, other in enumerate(extra["neighbour"][slide]):
            if other >= 0:
                found["inter"].append(extra["prototypes"][other, extra["transfer"][slide, rank, cluster]])
        for term, vectors in found.items():
            told = []
            for vector in vectors:
                logits[term].append(vector.astype(np.float64) @ directions)
                told.append(np.exp(log_softmax((logits[term][-1] - extra[f"centre_{term}"]) / temperature)))
            if told:
                target = np.mean(told, 0)
                views = [-(target * log_softmax(student[v, row].astype(np.float64) / 0.1)).sum() for v in range(2)]
                costs[term].append(np.mean(views))
    return {term: (np.mean(costs[term]), np.array(logits[term])) for term in costs}


def test_each_term_and_centre_is_that_of_a_plain_restatement():
    run, parts, state, loss = rig()
    made, assignment = batch(run.facts)
    extra = state.extra | tables() | {"assignment": assignment}
    key = jax.random.key(5)
    (value, (out, metrics)), _ = loss(state.params, extra, made, key, jnp.int32(0))
    seen = jax.jit(parts.see)(state.params, extra, made, key)
    expected = plain_terms(np.asarray(seen.student.logits), state.extra["teacher"]["params"]["last"]["kernel"],
                           jax.device_get(extra), made)  # fmt: skip
    for term, (cost, _) in expected.items():
        assert float(metrics[f"loss_{term}"]) == pytest.approx(cost, rel=1e-5), term
    assert [len(logits) for _, logits in expected.values()] == [5, 8]
    total = float(metrics["loss_self"]) + INTRA * expected["intra"][0] + INTER * expected["inter"][0]
    assert float(value) == pytest.approx(total, rel=1e-5)
    assert float(metrics["share_intra"]) == pytest.approx(5 / 7)
    after = jax.jit(run.method.update)(state.params, extra, out, jnp.int32(0))
    for term, (_, logits) in expected.items():
        centre = 0.9 * np.asarray(extra[f"centre_{term}"]).astype(np.float64) + 0.1 * logits.mean(0)
        np.testing.assert_allclose(after[f"centre_{term}"], centre, atol=1e-6)
    for name in slpd.TABLES:
        np.testing.assert_array_equal(after[name], extra[name])
    assert after.keys() == state.extra.keys()


def test_a_shared_centre_moves_by_the_rows_of_both_terms():
    run, _, state, loss = rig("shared")
    made, assignment = batch(run.facts)
    given = {name: value for name, value in tables().items() if name in slpd.TABLES} | {"assignment": assignment}
    extra = state.extra | given
    assert "centre_intra" not in extra
    (_, (out, _)), _ = loss(state.params, extra, made, jax.random.key(5), jnp.int32(0))
    plain = jax.device_get(extra) | dict.fromkeys(("centre_intra", "centre_inter"), np.zeros(48))
    expected = plain_terms(np.zeros((2, 8, 48)), state.extra["teacher"]["params"]["last"]["kernel"], plain, made)
    rows = np.concatenate([logits for _, logits in expected.values()])
    assert float(out["centre_prototypes"]["count"]) == len(rows) == 13
    np.testing.assert_allclose(out["centre_prototypes"]["total"], rows.sum(0), atol=1e-5)


def test_slides_without_prototypes_train_the_loss_of_dino_alone():
    run, _, state, loss = rig()
    made, _ = batch(run.facts)
    given = state.params, state.extra, made, jax.random.key(5), jnp.int32(0)
    (value, (out, metrics)), found = loss(*given)
    assert float(value) == float(metrics["loss_self"])
    assert float(metrics["loss_intra"]) == float(metrics["loss_inter"]) == 0
    config = configured()
    config.unlock()
    config.method = "dino"
    del config.slpd
    facts = run.facts
    plain = train.plan(config, source=synthetic.Source(facts), facts=facts).method
    (expected, _), slopes = jax.jit(jax.value_and_grad(plain.loss, has_aux=True))(*given)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    after = losses.next_centre(state.extra["centre_intra"], out["centre_intra"])
    assert not np.asarray(after).any()


def lloyd(x, start, turns=30):
    """float64 k-means from given centroids -> assignment, inertia."""
    centroids = start.astype(np.float64)
    for _ in range(turns):
        which = ((x[:, None] - centroids) ** 2).sum(-1).argmin(1)
        centroids = np.stack([x[which == k].mean(0) if (which == k).any() else centroids[k] for k in range(K)])
    return which, ((x - centroids[which]) ** 2).sum()


def test_a_refresh_is_a_clustering_of_what_the_teacher_sees_and_the_best_matching_of_it():
    run, parts, state, _ = rig()
    facts = replace(run.facts, records=80)  # some are of other splits
    config = configured()

    class Shifted(synthetic.Source):
        def everything(self):
            return ({**made, "id": made["id"] + 16} for made in super().everything())

    shifted = train.plan(config, source=Shifted(run.facts), facts=facts)
    before = state.extra | {"assignment": jnp.full(80, -1, jnp.int32)}
    state = replace(state, extra=jax.device_put(before, sharding.NamedSharding(run.mesh, jax.P())))
    new, metrics = train.refreshed(shifted, state)
    again, _ = train.refreshed(shifted, state)
    synthetic.assert_same(new, again)

    found = jax.device_get(new.extra)
    batches = [synthetic.batch(run.facts, step) for step in range(8)]
    see = jax.jit(lambda he: parts.teacher.bottleneck(*state.extra["teacher"].values(), parts.look(he)))
    x = np.concatenate([see(made["he"]) for made in batches]).astype(np.float64)
    slide = np.concatenate([made["slide"] for made in batches])
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)
    assert (found["assignment"][:16] == -1).all()
    which = found["assignment"][16:]
    assert found["eligible"].tolist() == [True, False, True, False, True]
    draw = np.random.default_rng(0)
    for number in (0, 2, 4):
        rows = slide == number
        mean = np.stack([x[rows & (which == k)].mean(0) for k in range(K)])
        unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        np.testing.assert_allclose(found["prototypes"][number], unit, atol=1e-5)
        inertia = ((x[rows] - mean[which[rows]]) ** 2).sum()
        tries = [lloyd(x[rows], x[rows][draw.permutation(rows.sum())[:K]])[1] for _ in range(10)]
        assert inertia <= min(tries) * 1.05
    assert not found["prototypes"][[1, 3]].any()

    vectors = found["prototypes"].astype(np.float64)
    for one in (0, 2, 4):
        sums = {}
        for other, taken in itertools.product({0, 2, 4} - {one}, itertools.permutations(range(K))):
            sums[other, taken] = (vectors[one] * vectors[other][list(taken)]).sum()
        ranked = sorted({other for other, _ in sums}, key=lambda o: -max(v for (p, _), v in sums.items() if p == o))
        assert found["neighbour"][one].tolist() == ranked
        for rank, other in enumerate(ranked):
            best = max((value, taken) for (o, taken), value in sums.items() if o == other)
            assert tuple(found["transfer"][one, rank].tolist()) == best[1]
    assert (found["neighbour"][[1, 3]] == -1).all()
    assert metrics["refresh/eligible_slides"] == 3
    assert "refresh/assignment_churn" not in metrics
    _, metrics = train.refreshed(shifted, new)
    assert metrics["refresh/assignment_churn"] == metrics["refresh/neighbour_churn"] == 0
    untouched = {name for name in found if name not in slpd.TABLES}
    synthetic.assert_same({n: new.extra[n] for n in untouched}, {n: state.extra[n] for n in untouched})


def test_neighbours_of_other_cases_alone():
    """Slides 0 and 2 are of one case."""
    state = rig()[2]
    config = configured(slpd__apart="case")
    facts = synthetic.facts(config.data)

    def refreshed(case_of):
        change = lambda step, made: made | {"case": np.asarray(case_of(made), np.int32)}  # noqa: E731
        new, told = train.refreshed(
            train.plan(config, source=synthetic.Source(facts, change=change), facts=facts), state
        )
        return jax.device_get(new.extra), told

    found, told = refreshed(lambda made: made["slide"] // 4)
    assert found["neighbour"][[0, 2]].tolist() == [[4, -1]] * 2
    assert sorted(found["neighbour"][4].tolist()) == [0, 2]
    assert (found["transfer"][[0, 2], 1] == -1).all()
    assert told["refresh/neighbour_same_case"] == 0
    assert np.isfinite([*told.values()]).all()
    alone, told = refreshed(lambda made: 0 * made["slide"])
    assert (alone["neighbour"] == -1).all()
    assert np.isfinite([*told.values()]).all()
    for name in ("prototypes", "assignment", "eligible"):
        np.testing.assert_array_equal(found[name], alone[name])
    with pytest.raises(
        ValueError, match=r"the regions of slide 0 are not of one case \(3 such slides\).*apart = 'slide'"
    ):
        refreshed(lambda made: made["id"])


def test_a_run_that_did_not_say_from_whom_neighbours_may_come_is_opened_and_goes_on(tmp_path):
    config = configured()
    facts = synthetic.facts(config.data)
    train.train(config, tmp_path, source=synthetic.Source(facts), facts=facts, progress=False, stop_at=1)
    kept = json.loads((tmp_path / "config.json").read_text())
    assert kept["slpd"].pop("apart") == "slide"
    (tmp_path / "config.json").write_text(json.dumps(kept))
    found = trained.open_run(tmp_path)
    assert found.extra["neighbour"].shape == (synthetic.SLIDES, NEIGHBOURS)
    asked = {"source": synthetic.Source(facts), "facts": facts, "progress": False, "stop_at": 2}
    assert int(train.train(config, tmp_path, **asked).step) == 2
    with pytest.raises(ValueError, match=r"slpd.apart: 'slide' -> 'case'"):
        train.train(configured(slpd__apart="case"), tmp_path, **asked)


def test_slices_of_a_batch_move_the_centres_as_the_whole_batch_does():
    run, _, state, loss = rig()
    made, assignment = batch(run.facts)
    extra = state.extra | tables() | {"assignment": assignment}
    whole = loss(state.params, extra, made, jax.random.key(0), jnp.int32(0))[0][1][0]
    doubled = [{n: np.concatenate([x[i::2]] * 2) for n, x in made.items()} for i in range(2)]  # of one shape
    outs = [loss(state.params, extra, part, jax.random.key(0), jnp.int32(0))[0][1][0] for part in doubled]
    merged = run.method.merge(jax.tree.map(lambda *parts: jnp.stack(parts), *outs))
    for name in ("centre_intra", "centre_inter"):
        mean = {n: sums["total"] / sums["count"] for n, sums in (("whole", whole[name]), ("merged", merged[name]))}
        np.testing.assert_allclose(mean["merged"], mean["whole"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slpd__min_regions": 1}, r"slpd.min_regions is 1, and so many regions make no slpd.k = 2 clusters"),
        ({"slpd__k": 0}, "slpd.k is a whole number of 1 or more"),
        ({"slpd__transfer": "best"}, "slpd.transfer is 'best'; allowed: matched, argmax"),
        ({"slpd__apart": "patient"}, "slpd.apart is 'patient'; allowed: slide, case"),
        ({"slpd__centres": "one"}, "slpd.centres is 'one'; allowed: own, shared"),
        ({"slpd__inter": -1.0}, "slpd.inter is -1.0; it is a weight"),
        ({"slpd__start": "soon"}, "slpd.start is a duration"),
        ({"data__share": 0.5}, r"data.share is 0.5.*Leave it at 1"),
    ],
)
def test_a_wrong_option_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        planned(**change)


def test_facts_of_an_earlier_release_are_refused_and_weights_of_zero_leave_a_term_out():
    config = configured(slpd__intra=0.0)
    facts = synthetic.facts(config.data)
    with pytest.raises(ValueError, match="how many slides and regions there are is not known"):
        train.plan(config, source=synthetic.Source(facts), facts=replace(facts, slides=0))
    method = train.plan(config, source=synthetic.Source(facts), facts=facts).method
    _, extra = jax.eval_shape(method.init, jax.random.key(0), synthetic.batch(facts, 0))
    assert "centre_intra" not in extra
    assert "centre_inter" in extra
    config.slpd.inter = 0.0
    method = train.plan(config, source=synthetic.Source(facts), facts=facts).method
    _, extra = jax.eval_shape(method.init, jax.random.key(0), synthetic.batch(facts, 0))
    assert extra.keys() == {"he", "teacher", "centre"}
    assert method.refresh is None


def test_the_first_look_is_after_as_many_epochs_as_the_paper_says():
    config = configs.load("configs/slpd.py")
    facts = synthetic.facts(config.data, examples=25_600)
    refresh = train.plan(config, source=synthetic.Source(facts), facts=facts).method.refresh
    assert (refresh.start, refresh.every) == (2000, 100)
    assert [step for step in range(2301) if refresh.due(step)] == [2000, 2100, 2200, 2300]


RUN = """
import json, sys
from pathlib import Path
from mfl_jax import preempt, train
from tests.mfl_jax import synthetic
preempt.initialize()
import jax, numpy as np
config = synthetic.tiny("slpd", total__steps=4, slpd__every="2 steps", optim__name="sgd", log_every=1)
facts = synthetic.facts(config.data)
source = synthetic.Source(facts, hosts=(jax.process_index(), jax.process_count()))
state = train.train(config, Path(sys.argv[1]), source=source, facts=facts, progress=False)
tables = {n: np.asarray(state.extra[n]) for n in ("assignment", "neighbour", "transfer", "eligible")}
print(json.dumps({n: t.astype(int).tolist() for n, t in tables.items()}), flush=True)
"""


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path):
    (one,) = processes.completed(RUN, (tmp_path / "one",), 1)
    assert set(processes.completed(RUN, (tmp_path / "two",), 2)) == {one}
    assert -1 not in json.loads(one)["assignment"]
    curves = [
        [row["loss"] for row in metrics.read(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("one", "two")
    ]
    assert len(curves[0]) == 4
    np.testing.assert_allclose(*curves, rtol=1e-5)
