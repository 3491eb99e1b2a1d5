"""Runs on disk as arms: what is refused before anything is computed, how they are grouped, what is embedded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from input_pipeline.tileset import Record, Spec, TileSet, finish, write_slide
from mfl_jax import arms, cli, compare, data, methods, report, sharding, train, trained
from mfl_jax.evaluators import LeakError, Task
from mfl_jax.findings import ArmRuns, Seed
from tests.mfl_jax import synthetic, toy

SIZE = 8
SPEC = Spec("small", SIZE, 0.5, he_encoding="png", label_names=("no", "yes"))
SPLITS = {"train": ["c0", "c1", "c2", "c3"], "val": ["c4", "c5"], "test": ["c6", "c7", "c8"]}


def records(rng, count: int):
    """What is labelled is darker."""
    for i in range(count):
        label = int(rng.integers(0, 2))
        he = rng.integers(120 - 60 * label, 250 - 60 * label, (SIZE, SIZE, 3), np.uint8)
        yield Record(he, {}, i * 10.0, 0.0, 0.5, label=label, columns={"dark": float(255 - he.mean())}, score={})


@pytest.fixture(scope="module", name="root")
def root_fixture(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("small") / "set", np.random.default_rng(0)
    for i in range(9):
        write_slide(root, SPEC, f"s{i}", f"c{i}", list(records(rng, 14)), {})
    finish(root, SPEC, splits=SPLITS)
    return root


def config(root: Path, **more) -> ConfigDict:
    made = toy.config(steps=3, every=0, **more)
    made.data = common.data(str(root), batch=8)
    return made


@pytest.fixture(scope="module", name="runs")
def runs_fixture(root, tmp_path_factory, compile_cache):
    """Two seeds of one config, and one run of another; opened in any order they are the same arms."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods.METHODS, "toy", toy.make)
        for name, changed in {"b": {"seed": 1}, "a": {}, "noisy": {"toy__noise": 0.5, "log_every": 2}}.items():
            train.train(config(root, **changed), folder / name, progress=False)
    return folder


@pytest.fixture(autouse=True)
def known(toy_method, compile_cache):
    """Every test knows the toy method."""


def test_runs_that_differ_in_the_seed_alone_are_one_arm(runs, root):
    looked = arms.look([runs / "b", runs / "noisy", runs / "a"], TileSet.open(root))
    grouped = arms.group(looked)
    assert {name: [run.path.name for run in members] for name, members in grouped.items()} == {
        "toy (noise=0.1)": ["a", "b"],
        "toy (noise=0.5)": ["noisy"],
    }
    assert list(arms.group(looked[:1])) == ["toy"]
    with pytest.raises(ValueError, match=r"different seeds; here: .*a \(seed 0\), .*a \(seed 0\)"):
        arms.group(arms.look([runs / "a", runs / "a"], TileSet.open(root)))


def test_runs_that_were_trained_on_other_cases_are_no_seeds_of_one_arm(runs, root):
    first, second = arms.look([runs / "a", runs / "b"], TileSet.open(root))
    elsewhere = replace(second, facts=replace(second.facts, train_cases=("c0", "c1")))
    assert list(arms.group([first, elsewhere])) == [f"toy ({runs / 'a'})", f"toy ({runs / 'b'})"]


def test_names_that_would_be_long_or_alike_are_the_folder(runs, root):
    looked = arms.look([runs / "a", runs / "noisy"], TileSet.open(root))
    for run, text in zip(looked, ("x" * 70, "y" * 70), strict=True):
        run.config.views = text
    assert list(arms.group(looked)) == [f"toy ({runs / 'a'})", f"toy ({runs / 'noisy'})"]


def test_features_are_those_of_the_run_and_of_its_start(runs, root):
    tileset = TileSet.open(root)
    looked = arms.look([runs / "a", runs / "b"], tileset)
    mesh = sharding.make_mesh()
    found = arms.collect(looked, tileset, mesh, batch=16, baselines=("random", "colour"))
    assert [(arm.name, arm.kind, len(arm.seeds)) for arm in found.arms] == [
        ("toy", "baseline", 2),
        ("random", "baseline", 2),
        ("colour", "baseline", 1),
    ]
    rng = np.random.default_rng(0)
    he = np.stack([record.he for _ in range(9) for record in records(rng, 14)])
    x = he.reshape(len(he), -1)[:, :12] / 255.0
    for number, name in enumerate(("a", "b")):
        run = trained.open_run(runs / name)
        w = np.asarray(run.params["w"], np.float64)
        np.testing.assert_allclose(found.arms[0].seeds[number].features, x @ w + run.params["b"], rtol=1e-4, atol=1e-4)
        began = jax.device_get(trained.initial(run)[0]["w"])
        np.testing.assert_allclose(found.arms[1].seeds[number].features, x @ began, rtol=1e-4, atol=1e-4)
        assert found.digests[str(runs / name)] == run.digest
        assert found.arms[0].seeds[number].pretrained == tuple(SPLITS["train"])
    np.testing.assert_allclose(found.arms[2].seeds[0].features[:, :3], he.mean((1, 2)) / 255, atol=1e-5)
    steps, losses = found.arms[0].seeds[0].curve
    assert steps == [0, 1, 2]
    assert all(np.isfinite(losses))
    assert found.arms[0].budget["examples"] == 24
    assert found.notes == ()


@pytest.mark.parametrize(("blind", "of"), [(1, "toy (noise=0.5)"), (2, "toy (noise=0.1)")])
def test_the_random_encoder_is_of_an_arm_that_needs_no_partner(blind, of, runs, root, monkeypatch):
    """An upper bound may come first; where all need one, the baseline says so."""
    calls, embed = iter(range(9)), arms._embed
    monkeypatch.setattr(arms, "partners_of_embed", lambda run, feature: ("if",) if next(calls) < blind else ())
    monkeypatch.setattr(arms, "_embed", lambda *args, partners=(), **options: embed(*args, **options))
    tileset = TileSet.open(root)
    looked = arms.look([runs / "a", runs / "noisy"], tileset)
    found = arms.collect(looked, tileset, sharding.make_mesh(), batch=16, baselines=("random",))
    last = found.arms[-1]
    assert last.name == "random"
    assert f"the encoder of {of} as it was drawn" in last.what
    assert ("sees if at inference" in last.what) == (blind == 2)


def test_what_a_run_began_with_is_what_training_began_with(root, tmp_path):
    state = train.train(config(root), tmp_path, progress=False, stop_at=0)
    params, extra = trained.initial(trained.open_run(tmp_path))
    synthetic.assert_same(params, state.params)
    synthetic.assert_same(extra, state.extra)
    runs = arms.look([tmp_path], TileSet.open(root))
    found = arms.collect(runs, TileSet.open(root), sharding.make_mesh(), batch=16)
    assert found.notes == (f"{tmp_path} stands at step 0 of 3: it is not finished.",)
    assert found.arms[0].seeds[0].curve is None


def test_cases_that_a_run_was_trained_on_are_refused_in_the_test_split_of_any_set(runs, root, tmp_path):
    other, rng = tmp_path / "other", np.random.default_rng(1)
    for i in range(4):
        write_slide(other, SPEC, f"t{i}", f"c{i}", list(records(rng, 14)), {})
    finish(other, SPEC, splits={"train": ["c0", "c1"], "test": ["c2", "c3"]})
    options = {"resamples": 20, "batch": 16}
    with pytest.raises(LeakError, match=r"a: cases of pre-training .*c2, c3"):
        compare.evaluate([runs / "a"], TileSet.open(other), Task("label"), **options)
    found, _ = compare.evaluate([runs / "a"], TileSet.open(other), Task("label"), transductive=True, **options)
    assert found["arms"][0]["title"] == "toy (transductive)"


def test_tiles_of_another_scale_are_refused(runs, root, tmp_path):
    facts = json.loads((runs / "a" / "facts.json").read_text())
    for changed, message in (
        ({"size": 64}, "tiles of 64 px at 0.5"),
        ({"mpp": 1.0}, "8 px at 1 um/px; the tile set"),
    ):
        run = tmp_path / str(len(message))
        (run / "checkpoints" / "3").mkdir(parents=True)
        (run / "config.json").write_text((runs / "a" / "config.json").read_text())
        (run / "facts.json").write_text(json.dumps(facts | changed))
        with pytest.raises(ValueError, match=message):
            arms.look([run], TileSet.open(root))


def test_a_run_without_a_checkpoint_is_refused_before_others_are_embedded(runs, root, tmp_path):
    shutil.copytree(runs / "a", tmp_path / "run", ignore=shutil.ignore_patterns("3"))
    with pytest.raises(trained.RunError, match="run has no checkpoint yet"):
        compare.evaluate([runs / "b", tmp_path / "run"], TileSet.open(root), Task("label"))


def test_the_command_writes_a_record_a_report_and_a_table(runs, root, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["eval", *(str(runs / n) for n in ("a", "b", "noisy")), "--tileset", str(root), "--out", str(out)]
    arguments += ["--task", "probe,knn,saliency", "--baselines", "random,colour", "--resamples", "30", "--batch", "32"]
    assert cli.main(arguments) == 0
    results = json.loads((out / "results.json").read_text())
    report.validate(results)
    assert [arm["name"] for arm in results["arms"]] == ["toy (noise=0.1)", "toy (noise=0.5)", "random", "colour"]
    assert [len(arm["seeds"]) for arm in results["arms"]] == [2, 1, 2, 1]
    assert len(results["differences"]) == 6 * 2
    auc = {arm["name"]: arm["metrics"]["label/auc"] for arm in results["arms"]}
    assert auc["colour"]["mean"] > 0.95
    assert results["answer"].startswith("Best by AUC (label/auc): ")
    planes = results["projections"]
    assert [p["arm"] for p in planes if p["method"] == "PCA"] == [arm["name"] for arm in results["arms"]]
    assert {c["name"]: c.get("names", [])[:2] for c in planes[0]["colours"]} == {
        "label": ["no", "yes"],
        "slide": ["s6", "s7"],
    }
    assert "on 42 test tiles" in results["saliency"]["what"]
    assert "arms" not in results["saliency"]  # no partner says where to look
    assert (out / "pictures" / "saliency.jpg").is_file()
    assert results["hashes"]["tile set"] == TileSet.open(root).hash
    assert "Colour statistics" in (out / "report.html").read_text()
    printed = capsys.readouterr().out
    assert "| Arm | AUC |" in printed
    assert f"{auc['colour']['mean']:.3f} \\[" in printed


def test_rare_tiles_alone_ask_for_their_like(runs, root, tmp_path):
    arguments = ["eval", str(runs / "a"), "--tileset", str(root), "--out", str(tmp_path), "--task", "retrieval"]
    assert cli.main([*arguments, "--asking", "1", "--resamples", "30", "--batch", "32"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["tasks"][0]["title"] == "label, found in other cases, asked by class 1 alone"
    metrics = results["arms"][0]["metrics"]
    assert "label/retrieval/map" in metrics
    assert not [key for key in metrics if "positive" in key]


def test_a_projection_is_coloured_by_what_the_tile_set_knows_of_a_slide(root):
    tileset = TileSet.open(root)
    assert compare.colours(tileset, [Task("dark", "dark", 50.0)]) == ["dark", "label", "slide"]
    known = SimpleNamespace(spec=SPEC, tiles=dict.fromkeys(("slide", "label", "label_scanner", "label_stain")))
    assert compare.colours(known) == ["label", "slide", "label_stain", "label_scanner"]
    codes = compare._colour("label", np.array([0, 1, -1]), ("no", "yes"))
    assert codes == {"name": "label", "values": [0, 1, 2], "names": ["no", "yes", "unknown"]}
    assert compare._colour("depth", np.array([0.12345, np.nan, -1])) == {
        "name": "depth",
        "values": [0.1235, None, -1.0],
    }


def test_a_projection_is_coloured_by_the_classes_that_are_asked_for():
    columns = {"depth": np.array([0.2, 0.7, 3, np.nan, -1]), "case": np.array(["c6", "c7", "c0", "c8", "c6"])}
    tileset = SimpleNamespace(spec=SPEC, splits=SPLITS)
    arm, task = ArmRuns("a", "A", "ours", (Seed(0, np.eye(5)),)), Task("deep", "depth", 0.5, exclude=(-1.0,))
    options = {"shown": ["deep", "depth"], "methods": ["pca"]}
    (drawn,) = compare.projections([arm], columns, tileset, [task], **options)
    assert len(drawn["x"]) == 4, "tiles of test cases alone"
    few = columns | {"case": np.array(["c6", "c7", "c0", "c1", "c2"])}
    assert compare.projections([arm], few, tileset, [task], **options) == []
    classes, numbers = drawn["colours"]
    assert classes == {"name": "deep", "values": [0, 1, 2, 2], "names": ["depth up to 0.5", "above 0.5", "unknown"]}
    assert numbers["values"] == [0.2, 0.7, None, -1.0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--task", ","], "nothing to evaluate; there are probe"),
        (["--task", "probe,kmn"], "no evaluation 'kmn'; did you mean 'knn'?"),
        (["--target", "lable"], "no column 'lable'; did you mean 'label'?"),
        (["--target", "dark"], "not whole numbers; give a threshold"),
        (["--target", "dark", "--regression", "--task", "probe,knn"], "knn take classes"),
        (["--task", "decode", "--decoded", "ihc"], "partners to decode: ['ihc']"),
        (["--task", "saliency", "--truth", "ihc"], "no truth can be had of 'ihc'; the tile set has no picture"),
        (["--baselines", "colours"], "no baseline colours; there are random, colour"),
        (["--asking", "1"], "--asking goes with --task retrieval"),
        (["--asking", "7", "--task", "retrieval"], "class 7 is to ask, and no test tile is of it; there are {0, 1}"),
        (["--feature", "hee"], "gives no features 'hee'; it gives he"),
        (["--tileset", "nowhere"], "nowhere"),
    ],
)
def test_a_wrong_request_is_one_line_before_anything_is_computed(changed, message, runs, root, tmp_path, capsys):
    arguments = ["eval", str(runs / "a"), "--tileset", str(root), "--out", str(tmp_path / "out"), *changed]
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_is_refused_by_name(root, tmp_path, capsys):
    assert cli.main(["eval", str(tmp_path / "runs"), "--tileset", str(root)]) == 2
    assert f"{tmp_path / 'runs'} is no run: there is no such folder" in capsys.readouterr().err


def test_the_partners_that_an_upper_bound_needs_are_found():
    for words, wanted in (("", ()), ("alone", ("if",)), ("both", ("if",))):
        made = synthetic.tiny("supervised", words)
        facts = synthetic.facts(made.data)
        method = methods.make(arms.configs.Reading(made), facts, sharding.make_mesh())
        params, extra = jax.eval_shape(method.init, jax.random.key(0), data.batch_shapes(facts, 8))
        run = trained.Trained("x", made, facts, method, params, extra, 0, Path(), "")
        assert arms.partners_of_embed(run) == wanted


@pytest.mark.parametrize(
    ("changed", "task", "same"),
    [
        ({}, Task("x", "label"), True),
        ({}, Task("x", "positive", 0.5), False),
        ({"target": "positive", "threshold": 0.5}, Task("x", "positive", 0.5), True),
        ({"target": "positive", "threshold": 0.4}, Task("x", "positive", 0.5), False),
        ({"target": "positive"}, Task("x", "positive", regression=True), True),
        ({"target": "label"}, Task("x", "label", regression=True), False),
    ],
)
def test_a_supervised_run_is_scored_by_its_own_head_on_its_own_target_alone(changed, task, same):
    made = synthetic.tiny("supervised")
    with made.unlocked():
        made.supervised.update(changed)
    assert arms.trained_on(made, task) is same
    assert not arms.trained_on(synthetic.tiny("mfl"), task)


def test_predictions_are_the_logits(runs, root, monkeypatch):
    """The toy taken for a supervised method, whose every feature is also its logits."""
    make = methods.METHODS["toy"]

    def with_logits(reading, facts, mesh):
        made = make(reading, facts, mesh)
        return replace(made, embed=lambda p, e, b: made.embed(p, e, b) | {"logits": made.embed(p, e, b)["he"][:, :2]})

    monkeypatch.setitem(methods.METHODS, "toy", with_logits)
    monkeypatch.setattr(arms, "trained_on", lambda config, task: task.name == "own")
    tileset = TileSet.open(root)
    looked, tasks = arms.look([runs / "a"], tileset), [Task("own", "label"), Task("other", "label")]
    found = arms.collect(looked, tileset, sharding.make_mesh(), batch=32, tasks=tasks).arms[0]
    assert found.what.endswith("scored by its own head")
    (seed,) = found.seeds
    assert list(seed.predictions) == ["own"]
    np.testing.assert_array_equal(seed.predictions["own"], seed.features[:, :2])
