"""A run's folder is enough to use the run."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from configs import common
from mfl_jax import data, sharding, train, trained
from mfl_jax.checkpoint import CheckpointError
from tests.input_pipeline.tileset import samples
from tests.input_pipeline.tileset.samples import contents
from tests.mfl_jax import synthetic, toy

pytestmark = pytest.mark.usefixtures("toy_method", "compile_cache")


def test_facts_come_back_from_json_as_they_were(tmp_path):
    wanted = synthetic.facts(common.data("x", batch=8, partners=("if", "nuclei", "counts"), columns=("age",)))
    wanted = replace(wanted, train_cases=("a", "b"))
    wanted.modalities["if"] = replace(wanted.modalities["if"], size=12, mean=(0.5, 0.25), std=(1.0, 2.0))
    found = data.facts_of(json.loads(json.dumps(data.facts_document(wanted))))
    assert found == wanted
    assert all(isinstance(shape, tuple) for shape, _ in found.shapes.values())
    hash(found.modalities["if"])


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_an_opened_run_gives_the_features_of_the_parameters_that_were_evaluated(ema, tmp_path):
    state = toy.run(toy.config(ema=ema), tmp_path)
    before = contents(tmp_path)
    found = trained.open_run(tmp_path)
    assert (found.name, found.step, found.path, found.facts.size) == ("toy", 6, tmp_path, synthetic.SIZE)
    assert contents(tmp_path) == before
    kept = jax.device_get(state.average if ema else state.params)
    synthetic.assert_same(found.params, kept)
    synthetic.assert_same(found.extra, state.extra)
    he = np.random.default_rng(0).integers(0, 256, (5, synthetic.SIZE, synthetic.SIZE, 3), np.uint8)
    features = found.method.embed(found.params, found.extra, {"he": he, "mask": np.ones(5, bool)})["he"]
    expected = (he.reshape(5, -1)[:, :12] / 255.0) @ kept["w"].astype(np.float64) + kept["b"]
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5)


def test_on_another_mesh_every_device_has_all_of_it(tmp_path):
    state = toy.run(toy.config(), tmp_path)
    found = trained.open_run(tmp_path, sharding.make_mesh({"data": 1}, jax.devices()[:1]))
    synthetic.assert_same(found.params, state.params)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((found.params, found.extra)))


def test_the_newest_whole_checkpoint_is_used_and_nothing_is_moved(tmp_path):
    toy.run(toy.config(), tmp_path)
    newest = trained.open_run(tmp_path)
    (tmp_path / "checkpoints" / "6" / "meta.json").write_text("{}")
    (tmp_path / "checkpoints" / "8.part").mkdir()
    before = contents(tmp_path)
    found = trained.open_run(tmp_path)
    assert (newest.step, found.step) == (6, 4)
    assert newest.digest != found.digest
    assert (tmp_path / "checkpoints" / "8.part").is_dir()
    assert contents(tmp_path) == before
    (tmp_path / "checkpoints" / "4" / "meta.json").unlink()
    with pytest.raises(CheckpointError, match=r"can be used: step 6: .*meta.json has changed.*step 4: .*missing"):
        trained.open_run(tmp_path)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(trained.RunError, match="no run: there is no such folder"):
        trained.open_run(tmp_path / "nowhere")
    with pytest.raises(trained.RunError, match=r"no run: it has no config.json.*--workdir of mfl train"):
        trained.open_run(tmp_path)
    toy.run(toy.config(steps=2), tmp_path)
    facts = (tmp_path / "facts.json").read_text()
    (tmp_path / "facts.json").write_text("{}")
    with pytest.raises(trained.RunError, match="cannot be used"):
        trained.open_run(tmp_path)
    (tmp_path / "facts.json").write_text(facts)
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* that can be used"):
        trained.open_run(tmp_path)


def test_a_checkpoint_that_does_not_fit_the_config_is_named(tmp_path):
    toy.run(toy.config(steps=2), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"ema": 0.5}))
    with pytest.raises(CheckpointError, match=r"average/.* is missing"):
        trained.open_run(tmp_path)


def test_a_run_knows_its_cases_and_needs_no_tile_set(tmp_path):
    folder = samples.write_set(tmp_path / "set", splits={"train": ["case-1"], "test": ["case-2"]})
    made = toy.config(steps=2, every=0)
    made.data = common.data(str(folder), batch=4)
    train.train(made, tmp_path / "run", progress=False)
    shutil.rmtree(folder)
    found = trained.open_run(tmp_path / "run")
    assert found.facts.train_cases == ("case-1",)

    other = samples.write_set(tmp_path / "set", splits={"train": ["case-2"], "test": ["case-1"]})
    made.data.tileset, made.total.steps = str(other), 3
    train.train(made, tmp_path / "run", progress=False, override=True)
    assert trained.open_run(tmp_path / "run").facts.train_cases == ("case-1", "case-2")
