import json
from pathlib import Path

import jax
import numpy as np
import pytest

from mfl_jax import config, demo
from mfl_jax.demo import arms, pictures, story
from mfl_jax.report import validate
from mfl_jax.watch import TrainingFailed


@pytest.mark.parametrize("size", [demo.SMALL, demo.GPU], ids=lambda size: size.word)
def test_every_arm_has_the_same_budget_and_sees_the_tissue_alike(size):
    made = [config.load(arms.spec(arm, size, Path("set"), 3)) for arm in arms.ARMS]
    assert len({(c.total.steps, c.data.batch, c.optim.lr, c.optim.name, c.encoder, c.views.size) for c in made}) == 1
    assert len({c.views.he.removeprefix("2*") for c in made}) == 1
    assert len({c.views.eval for c in made}) == 1
    assert {c.seed for c in made} == {3}
    assert [c.data.share for c in made] == [1, 1, 1, 1, arms.FEW]
    assert [c.name for c in made] == [arm.name for arm in arms.ARMS]


def results(gain: float | None) -> dict:
    metric = {"mean": 0.9, "low": 0.88, "high": 0.92}
    few = {"mean": 0.85, "low": 0.83, "high": 0.87}
    differences = [
        {"a": "mfl", "b": "unpaired", "metric": "marker/auc", "difference": 0.2, "low": gain, "high": 0.3},
        {"a": "mfl", "b": "supervised", "metric": "marker/auc", "difference": -0.01, "low": -0.02, "high": 0.01},
        {"a": "mfl", "b": "unpaired", "metric": "marker/few/auc", "difference": 9, "low": -9, "high": 9},
        {"a": "mfl", "b": "supervised_few", "metric": "marker/few/auc", "difference": -0.05, "low": -0.06, "high": 0},
    ]
    names = ("mfl", "unpaired", "supervised", "supervised_few")
    return {
        "tasks": [{"metrics": [{"key": "marker/auc"}]}],
        "arms": [{"name": name, "metrics": {"marker/auc": metric, "marker/few/auc": few}} for name in names],
        "differences": differences,
    }


@pytest.mark.parametrize(("gain", "verdict"), [(0.1, "Yes"), (-0.1, "Not clearly"), (None, "Not clearly")])
def test_the_answer_follows_the_interval(gain, verdict):
    said = story.answer(results(gain), 3)
    assert said.startswith(f"{verdict}: on H&E of 3 unseen cases MFL reaches an AUC of 0.900 [0.880, 0.920]")
    assert "labels of 5% of the tiles a probe on MFL reaches 0.850 [0.830, 0.870], an encoder" in said
    assert "0.850 [0.830, 0.870]: a paired difference of \N{MINUS SIGN}0.050 [\N{MINUS SIGN}0.060, 0.000]." in said
    assert "The test cases are few" in said
    assert "The test cases are few" not in story.answer(results(gain), 8)


def test_a_run_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(arms.sweep, "run", lambda jobs, workdir, submit, say: {"mfl-1": "exit status 3"})
    monkeypatch.setattr(arms.data, "facts", lambda reading: None)
    options = {"seeds": 2, "more": "", "side_by_side": 2, "environment": {}, "tell": lambda text: None}
    with pytest.raises(TrainingFailed, match="mfl-1 failed: exit status 3"):
        arms.train_all(tmp_path, demo.SMALL, tmp_path / "set", **options)


def test_programs_are_kept_beside_the_runs_or_where_the_user_has_them(tmp_path):
    names = (demo.CACHE, "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        jax.config.update(demo.CACHE, None)
        assert demo.keep_programs(tmp_path) == {names[0].upper(): str(tmp_path), names[1].upper(): "0.5"}
        assert demo.keep_programs(tmp_path / "other")[names[0].upper()] == str(tmp_path)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_neighbours_are_of_other_cases_and_nearest_first():
    angle = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    features = np.stack([np.cos(angle), np.sin(angle)], 1)
    cases = np.array(["a", "a", "b", "b", "b", "b", "b", "b", "b"])
    clear = np.ones(9, bool)
    clear[3] = False
    near = pictures._nearest(features, np.array([0]), cases, clear)
    assert near.tolist() == [[2, 4, 5, 6, 7, 8]]


@pytest.mark.slow
def test_from_nothing_to_a_report_and_again_without_training(tmp_path, compile_cache, monkeypatch):
    """The whole path, by encoders that are hardly any: what is long here is the start of ten processes. Again, with
    less to evaluate, nothing is trained and the figures are the same.
    """
    size = arms.Size("phantom", tile=64, slide=640, cases=8)
    more = "total.steps=3,optim.warmup='0 steps',data.batch=32,encoder='compact,widths=8',views.size=32"
    options = {"seeds": 2, "more": more, "progress": False}
    path = demo.demo(tmp_path, size, **options)
    found = json.loads((tmp_path / "results.json").read_text())
    validate(found)
    assert path.stat().st_size > 100_000
    named = {arm["name"]: arm for arm in found["arms"]}
    assert set(named) == {"random", "colour", *(arm.name for arm in arms.ARMS)}
    assert all(len(arm["seeds"]) == 2 for arm in found["arms"] if arm["name"] != "colour")
    assert {line["arm"] for line in found["labels"]} == {"random", "colour", "unpaired", "mfl", "trident", "supervised"}
    assert all(row["error_um"] < 5 for row in found["registration"] if row["passed"])
    assert {"marker/auc", "marker/few/auc", "decode/if/MARKER/mean", "batch_effect/nearest"} <= set(
        named["mfl"]["metrics"]
    )
    assert "marker/few/auc" in named["supervised_few"]["metrics"]
    pairs = {(d["a"], d["b"]) for d in found["differences"] if d["metric"] == "marker/few/auc"}
    assert pairs == {("mfl", "supervised_few"), ("mfl", "unpaired")}
    assert {c["name"] for c in found["projections"][0]["colours"]} == {"marker", "slide", "label_stain", "region"}
    assert "saliency" in found or "saliency" in found["skipped"]
    assert set(found["ledger"][0]["seconds"]) >= {"training", "evaluation"}
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("checkpoints/*/*")}
    monkeypatch.setattr(demo, "KINDS", ("probe",))
    monkeypatch.setattr(demo, "LOOKED_AT", ("mfl",))
    demo.demo(tmp_path, size, **options)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("checkpoints/*/*")}
    again = json.loads((tmp_path / "results.json").read_text())
    for arm in again["arms"]:
        assert arm["metrics"] == {key: named[arm["name"]]["metrics"][key] for key in arm["metrics"]}
        assert "marker/auc" in arm["metrics"]
