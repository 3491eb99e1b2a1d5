"""The loop, on a method that compiles in no time; the real methods run in methods/test_contract.py."""

import json
import logging
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from mfl_jax import methods, metrics, train
from mfl_jax.methods.base import Refresh
from tests.mfl_jax import synthetic, toy

pytestmark = pytest.mark.usefixtures("toy_method", "compile_cache")


def rows(workdir: Path) -> list[dict]:
    return [row for row in metrics.read(workdir / "metrics.jsonl") if "note" not in row]


def notes(workdir: Path) -> list[dict]:
    return [row["note"] for row in metrics.read(workdir / "metrics.jsonl") if "note" in row]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compile_cache):
    """An uninterrupted run of six steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods.METHODS, "toy", toy.make)
        workdir = tmp_path_factory.mktemp("whole")
        return toy.run(toy.config(ema=0.9), workdir), workdir


def test_stopped_at_any_step_and_run_again_it_ends_bitwise_equal(whole, tmp_path):
    for stop in range(7):
        workdir = tmp_path / str(stop)
        toy.run(toy.config(ema=0.9), workdir, stop_at=stop)
        ended = toy.run(toy.config(ema=0.9), workdir)
        assert int(ended.step) == 6
        synthetic.assert_same(whole[0], ended)
    assert len(synthetic.differing(whole[0], toy.run(toy.config(ema=0.9, seed=1), tmp_path / "other"))) > 5


def test_metrics_are_written_for_every_step_that_is_due_and_for_the_last(tmp_path):
    toy.run(toy.config(steps=6, every=0, log_every=4), tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [0, 4, 5]
    assert all(np.isfinite(row["loss"]) and row["examples_per_second"] > 0 for row in rows(tmp_path))


def test_what_a_run_leaves_in_its_folder(whole):
    left = {path.name for path in whole[1].iterdir()}
    assert left == {"checkpoints", "config.json", "facts.json", "metrics.jsonl", "parameters.txt"}
    assert "104" in (whole[1] / "parameters.txt").read_text()  # 12 * 8 + 8
    assert {p.name for p in (whole[1] / "checkpoints").iterdir()} == {"4", "6"}


@dataclass
class Recorder:
    """An evaluator that is due at every second step and at the end."""

    seen: list

    def due(self, step: int, end: int) -> bool:
        return step % 2 == 0 or step == end

    def __call__(self, method, state):
        assert int(state.step) not in [s for s, _ in self.seen], "evaluated twice"
        self.seen.append((int(state.step), jax.device_get(state.params["w"])))
        return {"probe/auc": 0.5}


def test_evaluation_comes_before_the_save_and_is_not_repeated_after_a_stop(tmp_path, monkeypatch):
    recorder = Recorder([])
    monkeypatch.setattr(train.evaluators, "make", lambda evals, facts, mesh: (recorder,))
    config = toy.config(steps=5)
    toy.run(config, tmp_path, stop_at=4)
    toy.run(config, tmp_path)
    assert [step for step, _ in recorder.seen] == [0, 2, 4, 5]
    order = [(row["step"], "probe/auc" in row) for row in rows(tmp_path)]
    assert order == [
        (0, True),
        (0, False),
        (1, False),
        (2, True),
        (2, False),
        (3, False),
        (4, True),
        (4, False),
        (5, True),
    ]


def test_evaluators_see_the_averaged_parameters(tmp_path, monkeypatch):
    recorder = Recorder([])
    monkeypatch.setattr(train.evaluators, "make", lambda evals, facts, mesh: (recorder,))
    state = toy.run(toy.config(steps=2, ema=0.5), tmp_path)
    np.testing.assert_array_equal(recorder.seen[-1][1], jax.device_get(state.average["w"]))
    assert not np.array_equal(recorder.seen[-1][1], jax.device_get(state.params["w"]))


def test_one_compilation_a_run(tmp_path):
    counts: list[int] = []
    with synthetic.compilations() as compiled:
        change = lambda step, batch: (counts.append(len(compiled)), batch)[1]  # noqa: E731
        toy.run(toy.config(steps=12, every=0), tmp_path, change=change)
    assert counts[4] == counts[-1], compiled[counts[4] :]
    assert counts[-1] > 0


def test_an_implicit_transfer_in_the_step_is_an_error(tmp_path, monkeypatch):
    def careless(reading, facts, mesh):
        made = toy.make(reading, facts, mesh)
        return replace(made, refresh=Refresh(1, 0, lambda state, survey: (jax.device_get(state.extra), {})))

    monkeypatch.setitem(methods.METHODS, "toy", careless)
    with pytest.raises(Exception, match=r"[Dd]isallowed host-to-device transfer"):
        toy.run(toy.config(), tmp_path)


def refreshing(called, start=0):
    """The toy with a refresh at every third step that counts the tiles of the whole split, and what it saw of them."""

    def make(reading, facts, mesh):
        def embed(params, extra, batch):
            return {"he": batch["he"].reshape(len(batch["he"]), -1)[:, :4]}

        def fn(state, survey):
            found = survey(embed, state.params, state.extra)
            assert found.ids.tolist() == list(range(facts.examples))
            pixels = np.concatenate([synthetic.batch(facts, step)["he"] for step in range(8)])
            np.testing.assert_array_equal(found.features["he"], pixels.reshape(64, -1)[:, :4])
            called.append(int(state.step))
            seen = jax.device_put(np.int32(1000 * len(found)), state.extra["seen"].sharding)
            return state.extra | {"seen": seen}, {"refreshed": len(found)}

        return replace(toy.make(reading, facts, mesh), refresh=Refresh(3, start, fn))

    return make


@pytest.mark.parametrize(("start", "steps"), [(0, [0, 3, 6]), (2, [2, 5])])
def test_a_refresh_sees_the_whole_split_before_every_step_that_is_due(start, steps, tmp_path, monkeypatch):
    monkeypatch.setitem(methods.METHODS, "toy", refreshing(called := [], start))
    state = toy.run(toy.config(steps=7), tmp_path)
    assert called == steps
    assert [row["step"] for row in rows(tmp_path) if row.get("refreshed") == 64] == steps
    assert int(state.extra["seen"]) == 64000 + (7 - steps[-1]) * synthetic.BATCH


def test_stopped_at_or_between_refreshes_it_ends_as_if_never_stopped(tmp_path, monkeypatch):
    monkeypatch.setitem(methods.METHODS, "toy", refreshing([], 2))
    whole = toy.run(toy.config(steps=7), tmp_path / "whole")
    for stop in (2, 4, 5):
        toy.run(toy.config(steps=7), tmp_path / str(stop), stop_at=stop)
        monkeypatch.setitem(methods.METHODS, "toy", refreshing(called := [], 2))
        synthetic.assert_same(whole, toy.run(toy.config(steps=7), tmp_path / str(stop)))
        assert called == [step for step in (2, 5) if step >= stop]


def test_told_to_stop_in_the_midst_of_a_survey_it_saves_what_was_before_and_goes_on_with_the_refresh(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(methods.METHODS, "toy", refreshing(called := [], 5))
    whole = toy.run(toy.config(steps=7), tmp_path / "whole")
    asked = []
    monkeypatch.setattr(train.preempt, "asked_to_stop", lambda: asked.append(1) or len(asked) > 9)
    toy.run(toy.config(steps=7), tmp_path / "told")
    assert called == [5]
    assert len(asked) == 6 + 4 + 1  # before steps 0 to 5, for batches of the survey, and at the end
    assert {path.name for path in (tmp_path / "told" / "checkpoints").iterdir()} == {"4", "5"}
    monkeypatch.undo()
    monkeypatch.setitem(methods.METHODS, "toy", refreshing(called := [], 5))
    synthetic.assert_same(whole, toy.run(toy.config(steps=7), tmp_path / "told"))
    assert called == [5]


def test_a_refresh_is_refused_of_a_part_of_the_split_or_a_source_that_cannot_show_it_all(tmp_path, monkeypatch):
    monkeypatch.setitem(methods.METHODS, "toy", refreshing([]))
    with pytest.raises(ValueError, match=r"data.share is 0.5.*every tile of the split"):
        toy.run(toy.config(data__share=0.5), tmp_path)
    facts = synthetic.facts(toy.config().data)
    with pytest.raises(ValueError, match=r"the source has no everything"):
        train.train(toy.config(), tmp_path, source=lambda step, state: iter(()), facts=facts, progress=False)


def test_a_changed_config_is_refused_by_name_and_an_override_is_noted(tmp_path):
    toy.run(toy.config(), tmp_path, stop_at=2)
    with pytest.raises(ValueError, match=r"optim.lr: 0.01 -> 0.02.*--override"):
        toy.run(toy.config(optim__lr=0.02), tmp_path)
    with pytest.raises(ValueError, match=r"seed: 0 -> 1"):
        toy.run(toy.config(seed=1), tmp_path)
    toy.run(toy.config(optim__lr=0.02), tmp_path, override=True, stop_at=3)
    assert {"changed": ["optim.lr: 0.01 -> 0.02"]} in notes(tmp_path)
    toy.run(toy.config(optim__lr=0.02), tmp_path)  # which is now the config of the run


def test_what_changes_no_number_may_change(whole, tmp_path):
    toy.run(toy.config(ema=0.9), tmp_path, stop_at=3)
    ended = toy.run(toy.config(ema=0.9, log_every=3, every=5), tmp_path)
    synthetic.assert_same(whole[0], ended)
    assert any("log_every: 1 -> 3" in str(note) for note in notes(tmp_path))


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    def intrude(step, batch):
        if step == 1:
            with pytest.raises(ValueError, match=f"host {socket.gethostname()}, pid {os.getpid()}, since 0 min"):
                toy.run(toy.config(), tmp_path)
        return batch

    toy.run(toy.config(), tmp_path, change=intrude)
    assert not (tmp_path / "lock.json").exists()


def nan_at(*steps):
    """Batches of these steps have a NaN in one entry of one vector."""

    def change(step, batch):
        if step in steps:
            batch["counts"] = batch["counts"].copy()
            batch["counts"][3, 0] = np.nan
        return batch

    return change


@pytest.fixture
def vector_toy(toy_method, monkeypatch):
    """The toy, which also looks at a vector that may hold a NaN."""

    def make(reading, facts, mesh):
        made = toy.make(reading, facts, mesh)

        def loss(params, extra, batch, rng, step):
            value, (out, found) = made.loss(params, extra, batch, rng, step)
            out["mean"] = out["mean"] + 1e-3 * batch["counts"].mean()
            return value + 1e-3 * batch["counts"].mean() * params["b"].sum(), (out, found)

        return replace(made, loss=loss)

    monkeypatch.setitem(methods.METHODS, "toy", make)


@pytest.mark.usefixtures("vector_toy")
def test_a_step_that_is_not_finite_is_skipped_and_its_ids_are_noted(tmp_path):
    states = {}
    for stop in (2, 3, 4):
        states[stop] = toy.run(
            toy.config(steps=4, data__partners=("counts",)), tmp_path, change=nan_at(2), stop_at=stop
        )
    changed = synthetic.differing(states[2], states[3])
    assert changed == {".step", ".skipped", ".skipped_total"}
    assert (int(states[3].skipped), int(states[4].skipped), int(states[4].skipped_total)) == (1, 0, 1)
    assert "['w']" in "".join(synthetic.differing(states[3], states[4]))
    (note,) = [n for n in notes(tmp_path) if "skipped" in n]
    assert note["ids"] == list(range(16, 24))


@pytest.mark.usefixtures("vector_toy")
def test_more_than_ten_skips_in_a_row_stop_the_run(tmp_path):
    config = toy.config(steps=40, data__partners=("counts",))
    with pytest.raises(train.TrainingFailed, match="11 steps in a row, up to step 15"):
        toy.run(config, tmp_path, change=nan_at(*range(5, 40)))
    assert sum("skipped" in note for note in notes(tmp_path)) == 11
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept[-1] >= 14
    ended = toy.run(config, tmp_path)  # the data are mended
    assert int(ended.step) == 40
    assert all(np.isfinite(leaf).all() for leaf in synthetic.leaves(ended.params).values())


def test_a_collapse_is_told_once_within_a_hundred_steps(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        toy.run(toy.config(steps=100, every=0, log_every=50, toy__collapse=True), tmp_path)
    found = [row for row in metrics.read(tmp_path / "metrics.jsonl") if "collapse" in row.get("note", {})]
    assert [row["step"] for row in found] == [19]
    assert "collapsed" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "toyy"}, "did you mean 'toy'"),
        ({"optim__name": "adan"}, "adan"),
        ({"optim__lrr": 1.0}, "optim.lrr"),
        ({"toy__noize": 1.0}, "without effect: toy.noize"),
        ({"data__batch": 7, "accumulate": 2}, "data.batch is 7"),
        ({"data__batch": 0}, "data.batch is a whole number of 1 or more"),
        ({"checkpoint__keep": 1}, "checkpoint.keep is a whole number of 2 or more"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"writers": ("tensorbord",)}, "tensorbord"),
        ({"mesh__data": 3}, "3"),
        ({"total__epochs": 1}, "exactly one of steps, epochs, examples"),
        ({"sharding": ((".*kernal", ("data", None)),)}, "kernal"),
        ({"data__partners": ("if",), "supervised": 1}, "supervised"),
    ],
)
def test_a_bad_config_ends_at_once_in_a_value_error(change, message, tmp_path):
    def never(step, state):
        raise AssertionError("the data were looked at")

    config = toy.config(**change)
    start = time.perf_counter()
    with synthetic.compilations() as compiled, pytest.raises(ValueError, match=message):
        train.train(config, tmp_path, source=never, facts=synthetic.facts(config.data), progress=False)
    assert time.perf_counter() - start < 2
    assert not compiled


def test_a_source_that_ends_or_gives_something_else_is_named(tmp_path):
    config = toy.config()
    facts = synthetic.facts(config.data)
    few = [synthetic.batch(facts, step) for step in range(2)]
    with pytest.raises(ValueError, match="ended before step 2"):
        train.train(config, tmp_path / "a", source=lambda step, state: iter(few), facts=facts, progress=False)
    for change, message in (
        (lambda step, batch: batch | {"he": batch["he"][:, :8]}, r"'he' is uint8\[8, 8, 16, 3\].*\[8, 16, 16, 3\]"),
        (lambda step, batch: {k: v for k, v in batch.items() if k != "mask"}, "no 'mask'"),
    ):
        with pytest.raises(ValueError, match=message):
            toy.run(config, tmp_path / "b", change=change)


def test_a_profile_is_written_on_request(tmp_path):
    toy.run(toy.config(steps=5, profile_at=1), tmp_path / "a")
    assert list((tmp_path / "a" / "profile").rglob("*.xplane.pb"))
    toy.run(toy.config(steps=2, profile_at=1), tmp_path / "b")  # ends while the trace is on
    assert list((tmp_path / "b" / "profile").rglob("*.xplane.pb"))


def test_progress_says_what_is_trained_and_how_far(tmp_path, capfd):
    toy.run(toy.config(), tmp_path, progress=True)
    told = capfd.readouterr()
    assert "total" in told.out
    assert "104" in told.out
    assert "toy: 100%" in told.err
    assert "6/6" in told.err


def test_it_runs_where_tensorflow_is_not(tmp_path):
    code = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "torch"):
    sys.modules[name] = None
from pathlib import Path
from mfl_jax import methods
from tests.mfl_jax import toy
methods.METHODS["toy"] = toy.make
state = toy.run(toy.config(steps=2), Path(sys.argv[1]))
assert int(state.step) == 2
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
    assert json.loads((tmp_path / "config.json").read_text())["method"] == "toy"
