"""Batches are a pure function of (seed, step), whoever reads them; every example is seen once; changes are refused."""

import json
import time

import numpy as np
import pytest

from input_pipeline import order
from input_pipeline.neighbours import Neighbours
from input_pipeline.stream import StreamError, eval_stream, executors, train_stream
from tests.input_pipeline.stream.fixtures import SLIDES, toy_fixture  # noqa: F401

EXECUTORS = ["threads", "processes", "tfdata"]
N_TRAIN = 90


def take(tileset, count, **options):
    defaults = {"batch": 8, "seed": 3, "executor": "threads", "threads": 2}
    with train_stream(tileset, **defaults | options) as stream:
        return [next(stream) for _ in range(count)]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert list(a) == list(b)
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assert_true(batch, truth):
    """Every row holds what was written for its id."""
    ids = batch["id"]
    np.testing.assert_array_equal(batch["he"], truth.he[ids])
    for name, images in truth.partners.items():
        np.testing.assert_array_equal(batch[f"{name}_mask"], truth.present[name][ids])
        np.testing.assert_array_equal(batch[name], images[ids])
    for name in ("slide", "case", "label"):
        np.testing.assert_array_equal(batch[name], getattr(truth, name)[ids])


def test_few_workers_are_threads_and_many_are_processes(toy, monkeypatch):
    with train_stream(toy.tileset(), batch=8, seed=3, threads=2) as stream:
        assert stream.executor == "threads"
    assert executors.choose("auto", executors.FEW, 10**6) == "threads"
    assert executors.choose("auto", executors.FEW + 1, 10**6) == "processes"
    assert executors.choose("auto", 64, executors.SHORT) == "threads"
    monkeypatch.setattr(executors.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs tensorflow"):
        executors.choose("tfdata", 64, 10**6)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_rows_hold_what_was_written(toy, executor):
    for batch in take(toy.tileset(), 13, executor=executor, columns=("depth", "x"), near_um=12, far_um=25):
        assert_true(batch, toy)
        assert batch["mask"].all()
        np.testing.assert_array_equal(batch["depth"], toy.depth[batch["id"]])
        for beside in ("near", "far"):
            np.testing.assert_array_equal(batch[f"{beside}_he"], toy.he[batch[f"{beside}_id"]])


def test_ids_are_the_order_of_the_split(toy):
    tileset = toy.tileset()
    ids = np.concatenate([b["id"] for b in take(tileset, 30)])
    index = order.uniform(np.arange(240), 3, N_TRAIN)
    np.testing.assert_array_equal(ids, tileset.ids("train")[index])
    assert not set(ids) & set(tileset.ids("val"))


@pytest.mark.parametrize("batch", [9, 7, 90])
@pytest.mark.parametrize("blocks", [None, (4, 3)])
def test_each_example_exactly_once_an_epoch(toy, batch, blocks):
    tileset = toy.tileset()
    count = 2 * N_TRAIN // batch + 1
    ids = np.concatenate([b["id"] for b in take(tileset, count, batch=batch, blocks=blocks)])
    for epoch in (0, 1):
        seen = ids[epoch * N_TRAIN : (epoch + 1) * N_TRAIN]
        np.testing.assert_array_equal(np.sort(seen), tileset.ids("train"))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_threads_prefetch_and_executor_change_nothing(toy, executor, threads, prefetch):
    options = {"batch": 32, "near_um": 15, "far_um": 25, "columns": ("depth",)}
    plain = take(toy.tileset(), 4, threads=1, prefetch=0, **options)
    assert_same(plain, take(toy.tileset(), 4, executor=executor, threads=threads, prefetch=prefetch, **options))


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("balance", [None, "case"])
def test_hosts_hold_slices_of_the_same_global_batch(toy, hosts, balance):
    options = {"batch": 40, "balance": balance, "near_um": 15, "far_um": 25}
    whole = take(toy.tileset(), 3, **options)
    parts = [take(toy.tileset(), 3, host=(h, hosts), **options) for h in range(hosts)]
    joined = [{k: np.concatenate([p[t][k] for p in parts]) for k in whole[t]} for t in range(3)]
    assert_same(whole, joined)


@pytest.mark.parametrize("options", [{}, {"balance": "slide"}, {"blocks": (4, 4)}, {"near_um": 15, "far_um": 25}])
def test_rebuilt_before_every_batch(toy, options):
    tileset = toy.tileset()
    whole = take(tileset, 14, **options)
    state = None
    for step in range(14):
        with train_stream(tileset, batch=8, seed=3, executor="threads", state=state, **options) as stream:
            rest = [next(stream) for _ in range(min(3, 14 - step))]
        assert_same(whole[step : step + 3], rest)
        with train_stream(tileset, batch=8, seed=3, executor="threads", state=state, **options) as stream:
            next(stream)
            state = json.loads(json.dumps(stream.state()))
        assert state["step"] == step + 1


def test_rebuilt_once_with_tfdata(toy):
    whole = take(toy.tileset(), 6, executor="tfdata")
    assert_same(whole[4:], take(toy.tileset(), 2, executor="tfdata", start_step=4))


def test_a_share_is_the_same_tiles_for_every_seed_and_lies_in_a_larger_one(toy):
    seen = {}
    for share in (0.3, 0.6):
        for seed in (1, 2):
            batches = take(toy.tileset(), 12, batch=9, seed=seed, share=share)
            seen[share, seed] = {i for b in batches[: round(share * 10)] for i in b["id"].tolist()}
        assert seen[share, 1] == seen[share, 2]
        assert len(seen[share, 1]) == round(share * N_TRAIN)
    assert seen[0.3, 1] < seen[0.6, 1] < set(toy.tileset().ids("train").tolist())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"share": 0.0}, "share is 0.0; it is above 0"),
        ({"share": 1.5}, "share is 1.5"),
        ({"share": 0.5, "balance": "case"}, "leave out balance"),
        ({"share": 0.05}, "batch 8 is larger than the 5 tiles used of split 'train'"),
    ],
)
def test_a_share_that_cannot_be_is_refused(toy, options, said):
    with pytest.raises(StreamError, match=said):
        take(toy.tileset(), 1, **options)


def test_another_share_is_no_continuation(toy):
    with train_stream(toy.tileset(), batch=8, seed=3, share=0.5) as stream:
        next(stream)
        state = stream.state()
    with pytest.raises(StreamError, match=r"share: 0[.]5 -> None"):
        take(toy.tileset(), 1, state=state)


def test_seeds_differ(toy):
    a, b = (take(toy.tileset(), 1, batch=64, seed=s)[0]["id"] for s in (1, 2))
    assert (a == b).mean() < 0.2


@pytest.mark.parametrize("by", ["case", "slide", "label"])
def test_balance_visits_each_group_once_a_round(toy, by):
    tileset = toy.tileset()
    groups = {"case": 4, "slide": 5, "label": 3}[by]
    batches = take(tileset, 130 if by == "label" else 40, batch=groups, balance=by)
    first = batches[0][by]
    for batch in batches:
        assert_true(batch, toy)
        np.testing.assert_array_equal(np.sort(batch[by]), np.sort(first))
        assert len(set(batch[by].tolist())) == groups
    ids, codes = (np.concatenate([b[k] for b in batches]) for k in ("id", by))
    for group in set(first.tolist()):
        seen = ids[codes == group]
        members = tileset.ids("train")
        members = members[getattr(toy, by)[members] == group]
        np.testing.assert_array_equal(np.sort(seen[: len(members)]), members)


@pytest.mark.parametrize("radius", [9.0, 10.0, 14.2, 25.0])
def test_near_tiles_are_those_within_the_radius(toy, radius):
    """Against all distances; 10 um is the step of the grid, and reaches the next tile."""
    near = Neighbours(toy.tileset(), radius)
    far, beyond = (Neighbours(toy.tileset(), reach, radius) for reach in (40.0, np.inf))
    for tile in range(len(toy.he)):
        distance = np.hypot(*(toy.xy_um - toy.xy_um[tile]).T)
        same = (toy.slide == toy.slide[tile]) & (np.arange(len(toy.he)) != tile)
        np.testing.assert_array_equal(near.of(tile), np.flatnonzero(same & (distance <= radius)))
        np.testing.assert_array_equal(far.of(tile), np.flatnonzero(same & (distance > radius) & (distance <= 40)))
        np.testing.assert_array_equal(beyond.of(tile), np.flatnonzero(same & (distance > radius)))


def test_near_partners_are_near_even_and_say_when_there_is_none(toy):
    tileset = toy.tileset()
    batches = take(tileset, 200, batch=30, near_um=10, partners=())
    ids, near, mask = (np.concatenate([b[k] for b in batches]) for k in ("id", "near_id", "near_mask"))
    single = int(np.flatnonzero(toy.slide == 3)[0])
    np.testing.assert_array_equal(~mask, ids == single)
    np.testing.assert_array_equal(near[~mask], single)
    step = np.hypot(*(toy.xy_um[ids] - toy.xy_um[near]).T)
    assert (step[mask] == 10).all()
    middle = next(t for t in range(len(ids)) if (near[ids == t].size and len(set(near[ids == t].tolist())) == 4))
    counts = np.unique(near[ids == middle], return_counts=True)[1]
    assert counts.min() > counts.sum() / 4 * 0.5


def test_far_partners_are_far_even_and_change_nothing_else(toy):
    options = {"batch": 30, "near_um": 10, "partners": ()}
    batches = take(toy.tileset(), 200, far_um=40, **options)
    ids, far, mask = (np.concatenate([b[k] for b in batches]) for k in ("id", "far_id", "far_mask"))
    apart = np.hypot(*(toy.xy_um[:, None] - toy.xy_um).T)
    reach = np.where(toy.slide[:, None] == toy.slide, apart, 0)
    np.testing.assert_array_equal(mask, (reach > 40).any(1)[ids])
    assert 0 < mask.mean() < 1
    assert (reach[ids, far][mask] > 40).all()
    np.testing.assert_array_equal(far[~mask], ids[~mask])
    corner = int(np.flatnonzero(toy.slide == 5)[0])  # of six rows of seven: 17 tiles or so are far
    drawn, counts = np.unique(far[ids == corner], return_counts=True)
    assert set(drawn) <= set(np.flatnonzero(reach[corner] > 40))
    assert len(drawn) > 0.9 * np.sum(reach[corner] > 40)
    assert counts.max() <= 4 * counts.sum() / len(drawn)
    plain = take(toy.tileset(), 5, **options)
    assert_same(plain, [{k: v for k, v in b.items() if not k.startswith("far_")} for b in batches[:5]])


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_evaluation_holds_everything_once_padded_and_in_step(toy, executor, hosts):
    tileset = toy.tileset()
    parts = []
    for host in range(hosts):
        with eval_stream(tileset, batch=20, host=(host, hosts), executor=executor, columns=("depth",)) as stream:
            parts.append(list(stream))
    assert {len(p) for p in parts} == {6}
    ids = np.concatenate([np.concatenate([p[t]["id"] for p in parts]) for t in range(6)])
    np.testing.assert_array_equal(ids, [*range(113), *[-1] * 7])
    for batch in (b for p in parts for b in p):
        assert batch["he"].shape == (20 // hosts, 16, 16, 3)
        np.testing.assert_array_equal(batch["mask"], batch["id"] >= 0)
        assert_true({k: v[batch["mask"]] for k, v in batch.items()}, toy)
        for name in ("he", "if", "nuclei", "counts", "if_mask", "depth"):
            assert not batch[name][~batch["mask"]].any()


def test_evaluation_of_a_split(toy):
    tileset = toy.tileset()
    with eval_stream(tileset, batch=7, split="val", executor="threads") as stream:
        ids = np.concatenate([b["id"] for b in stream])
    np.testing.assert_array_equal(ids[ids >= 0], tileset.ids("val"))
    assert stream.steps == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "seed: 3 -> 4"),
        ({"batch": 9}, "batch: 8 -> 9"),
        ({"split": "val"}, "split: 'train' -> 'val'"),
        ({"balance": "case"}, "balance: None -> 'case'"),
        ({"near_um": 5}, "near_um: None -> 5.0"),
        ({"far_um": 20}, "far_um: None -> 20.0"),
        ({"blocks": (2, 2)}, r"blocks: None -> \[2, 2\]"),
        ({"require": ("if",)}, r"require: \[\] -> \['if'\]"),
    ],
)
def test_a_changed_stream_is_refused_by_name_and_an_override_is_kept(toy, change, named, caplog):
    tileset = toy.tileset()
    arguments = {"batch": 8, "seed": 3, "executor": "threads"}
    with train_stream(tileset, **arguments) as stream:
        next(stream)
        state = stream.state()
    with pytest.raises(StreamError, match=named):
        train_stream(tileset, **arguments | change, state=state)
    with train_stream(tileset, **arguments | change, state=state, override=True) as stream:
        assert stream.step == 1
        assert len(stream.overridden) == 1
        assert stream.overridden[0] in caplog.text


def test_a_changed_tile_set_or_order_is_refused(toy):
    arguments = {"batch": 8, "seed": 3, "executor": "threads"}
    state = train_stream(toy.tileset(), **arguments).state()
    with pytest.raises(StreamError, match="tile set: 'other' -> "):
        train_stream(toy.tileset(), **arguments, state=state | {"tileset": "other"})
    with pytest.raises(StreamError, match="order: 0 -> 1"):
        train_stream(toy.tileset(), **arguments, state=state | {"arguments": state["arguments"] | {"order": 0}})
    with pytest.raises(StreamError, match="stream hash"):
        train_stream(toy.tileset(), **arguments, state=state | {"stream": "0"})
    with pytest.raises(StreamError, match="not the state"):
        train_stream(toy.tileset(), **arguments, state={"step": 1})


def test_what_does_not_change_ids_may_change(toy):
    with train_stream(toy.tileset(), batch=8, seed=3, executor="threads") as stream:
        state = stream.state()
    options = {"threads": 1, "prefetch": 0, "columns": ("x",), "on_bad": "replace", "host": (1, 2), "partners": ("if",)}
    train_stream(toy.tileset(), batch=8, seed=3, executor="threads", state=state, **options).close()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch": 0}, "batch is a whole number"),
        ({"batch": 91}, "larger than the 90 tiles"),
        ({"batch": 8, "host": (0, 3)}, "not a multiple of the 3 hosts"),
        ({"host": (2, 2)}, "host index"),
        ({"seed": -1}, "seed is a whole number"),
        ({"keep": -1}, "keep is a whole number"),
        ({"columns": ("dept",)}, "did you mean depth"),
        ({"columns": "depth"}, "a list of columns"),
        ({"partners": ("iff",)}, "did you mean if"),
        ({"require": ("if",), "partners": ()}, "required and not among"),
        ({"balance": "patient"}, r"balance is one of \[None, 'case', 'slide', .*'label'"),
        ({"balance": "depth"}, "a column of classes, which are whole numbers"),
        ({"balance": "case", "blocks": (2, 2)}, "two different orders"),
        ({"on_bad": "ignore"}, "on_bad is one of"),
        ({"executor": "grain"}, "executor is"),
        ({"threads": 0}, "threads is a whole number"),
        ({"split": "test"}, "test"),
        ({"near_um": -1}, "distance in um"),
        ({"near_um": float("inf")}, "distance in um"),
        ({"far_um": 0}, "far_um is a distance"),
        ({"far_um": float("inf")}, "far_um is a distance"),
        ({"stall_timeout": 0}, "stall_timeout"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(toy, wrong, message):
    with pytest.raises(ValueError, match=message):
        train_stream(toy.tileset(), **{"batch": 8, "seed": 3, "executor": "threads"} | wrong)


def test_a_closed_stream_says_so_and_closing_twice_is_fine(toy):
    stream = train_stream(toy.tileset(), batch=8, seed=3, executor="threads")
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(StreamError, match="closed"):
        next(stream)


def test_the_graph_has_no_random_and_no_stateful_function():
    import tensorflow as tf

    data = executors.tf_dataset(lambda n: None, 0, 8, workers=2, ahead=2)
    graph = tf.compat.v1.GraphDef.FromString(data._as_serialized_graph().numpy())
    functions = [n for f in graph.library.function for n in f.node_def]
    names = {n.op for n in [*graph.node, *functions]}
    assert "PyFuncStateless" in names
    assert "ParallelMapDatasetV2" in names
    assert not [n for n in names if "random" in n.lower() or "shuffle" in n.lower() or n in ("PyFunc", "EagerPyFunc")]
    (parallel,) = [n for n in graph.node if n.op == "ParallelMapDatasetV2"]
    assert parallel.attr["deterministic"].s == b"true"


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS)
def test_seeking_to_step_a_million_takes_less_than_a_second(toy, executor):
    take(toy.tileset(), 1, executor=executor)
    start = time.perf_counter()
    take(toy.tileset(), 1, executor=executor, start_step=10**6, near_um=15)
    assert time.perf_counter() - start < 1


def test_the_toy_set_is_as_described(toy):
    assert [int((toy.slide == i).sum()) for i in range(len(SLIDES))] == [n for _, _, n in SLIDES]
