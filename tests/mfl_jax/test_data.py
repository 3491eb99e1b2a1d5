"""From a tile set to facts and batches, and the refusal to go on with another one."""

import json
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from mfl_jax import config as configs
from mfl_jax import data, metrics, sharding, train
from mfl_jax.views import Modality
from tests.input_pipeline.stream.test_stream_faults import flip
from tests.input_pipeline.tileset import samples
from tests.mfl_jax import synthetic, toy


def reading(**values) -> configs.Reading:
    return configs.Reading(ConfigDict(values))


@pytest.mark.parametrize(
    ("given", "steps"), [({"steps": 7}, 7), ({"epochs": 2}, 25), ({"examples": 31}, 4), ({"steps": 0.2}, 1)]
)
def test_the_length_of_a_run(given, steps):
    assert data.total_steps(reading(**given), 8, 100) == steps


@pytest.mark.parametrize("given", [{}, {"steps": 1, "epochs": 1}, {"step": 1}, {"steps": 0}, {"epochs": -1}])
def test_a_length_is_given_once_and_above_zero(given):
    with pytest.raises(ValueError, match="total"):
        data.total_steps(reading(**given), 8, 100)


def test_a_batch_is_as_wide_as_the_facts_say():
    facts = synthetic.facts(common.data("x", batch=8, partners=("if", "counts"), columns=("age",)))
    abstract = data.abstract_batch(facts, 8, sharding.make_mesh())
    made = synthetic.batch(facts, 0)
    assert {n: (a.shape, str(a.dtype)) for n, a in abstract.items()} == {
        n: (a.shape, str(a.dtype)) for n, a in made.items()
    }
    (kept,) = data.checked(iter([made | {"near_id": np.zeros(8)}]), facts, 8)
    assert kept.keys() == facts.shapes.keys()
    with pytest.raises(ValueError, match=r"'age' is int32\[8\] in a batch, expected float32\[8\]"):
        next(data.checked(iter([made | {"age": np.zeros(8, np.int32)}]), facts, 8))


@pytest.fixture
def folder(tmp_path):
    return samples.write_set(tmp_path / "set")


def config(folder, **more) -> ConfigDict:
    made = toy.config(**more)
    made.data = common.data(str(folder), batch=4, partners=("markers", "genes", "nuclei"), columns=("fraction",))
    return made


def test_facts_are_those_of_the_batches_that_come(folder):
    part = configs.Reading(config(folder)).data
    facts = data.facts(part)
    assert (facts.size, facts.mpp, facts.label_names, facts.examples) == (samples.SIZE, 0.5, ("no", "yes"), 7)
    assert facts.modalities["markers"] == Modality("image", 4)
    assert facts.modalities["genes"] == Modality("vector", 5)
    assert facts.modalities["nuclei"] == Modality("map", 1)
    stream = data.source(part, 0)(3, None)
    try:
        batch = next(data.checked(stream, facts, 4))
        assert stream.state()["step"] == 4
    finally:
        stream.close()
    placed = sharding.put(batch, sharding.make_mesh())
    abstract = data.abstract_batch(facts, 4, sharding.make_mesh())
    assert {n: (a.shape, a.dtype) for n, a in placed.items()} == {n: (a.shape, a.dtype) for n, a in abstract.items()}


def test_everything_is_each_tile_of_the_split_once(folder):
    part = configs.Reading(config(folder)).data
    tileset = data.open_set(str(folder))
    with data.source(part, 0).everything() as stream:
        batches = list(stream)
    assert [len(batch["id"]) for batch in batches] == [4, 4]
    ids = np.concatenate([batch["id"] for batch in batches])
    assert ids[ids >= 0].tolist() == tileset.ids("train").tolist()
    assert (np.concatenate([batch["mask"] for batch in batches]) == (ids >= 0)).all()
    slides = np.concatenate([batch["slide"] for batch in batches])
    facts = data.facts(part)
    assert (facts.slides, facts.records) == (len(tileset.slides), len(tileset))
    assert ids.max() < facts.records
    assert slides.max() < facts.slides


def test_a_bad_tile_is_left_out_of_everything_where_the_run_replaces_it(folder):
    made = config(folder)
    made.data.on_bad = "replace"
    tileset = data.open_set(str(folder))
    bad = int(tileset.ids("train")[2])
    flip(tileset, bad)
    with data.source(configs.Reading(made).data, 0).everything() as stream:
        ids = np.concatenate([batch["id"] for batch in stream])
    assert bad not in ids
    assert (ids >= 0).sum() == 6


def test_facts_of_an_earlier_release_are_read_and_do_not_know_how_many_slides_there_are():
    facts = synthetic.facts(common.data("x", batch=8))
    document = json.loads(json.dumps(data.facts_document(facts)))
    assert data.facts_of(document) == facts
    earlier = {name: value for name, value in document.items() if name not in ("slides", "records")}
    assert (data.facts_of(earlier).slides, data.facts_of(earlier).records) == (0, 0)


def test_near_and_far_tiles_come_with_the_batch_when_asked(folder):
    near = config(folder)
    near.data.near_um = near.data.far_um = 100.0
    part = configs.Reading(near).data
    stream = data.source(part, 0)(0, None)
    try:
        batch = next(data.checked(stream, data.facts(part), 4))
    finally:
        stream.close()
    for beside in ("near", "far"):
        assert batch[f"{beside}_he"].shape == batch["he"].shape
        assert batch[f"{beside}_mask"].dtype == bool


def test_a_partner_that_the_set_does_not_have_is_named(folder):
    wrong = config(folder)
    wrong.data.partners = ("marker",)
    with pytest.raises(ValueError, match=r"\['marker'\].*markers"):
        data.facts(configs.Reading(wrong).data)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"share": 0.0}, "data.share is 0.0; it is above 0"),
        ({"share": 2.0}, "data.share is 2.0"),
        ({"batch": 8}, "data.batch is 8, more than the 7 tiles used of split 'train'"),
        ({"share": 0.5, "batch": 5}, "data.batch is 5, more than the 4 tiles used"),
        ({"columns": ("age",)}, r"data.columns names \['age'\].*fraction"),
        ({"split": "trian"}, "no split 'trian'"),
    ],
)
def test_what_no_stream_could_give_is_refused_before_one_is_made(folder, changed, message):
    wrong = config(folder)
    wrong.data.update(changed)
    with pytest.raises(ValueError, match=message):
        data.facts(configs.Reading(wrong).data)


@pytest.mark.usefixtures("toy_method", "compile_cache")
def test_a_run_goes_on_with_the_tile_set_it_was_started_with_wherever_that_is(folder, tmp_path):
    whole = train.train(config(folder), tmp_path / "whole", progress=False)
    run = tmp_path / "run"
    train.train(config(folder), run, progress=False, stop_at=3)
    moved = shutil.move(folder, tmp_path / "moved")
    synthetic.assert_same(whole, train.train(config(moved), run, progress=False))

    other, fresh = samples.write_set(tmp_path / "other", splits={"train": ["case-2"]}), tmp_path / "fresh"
    train.train(config(moved), fresh, progress=False, stop_at=3)
    with pytest.raises(ValueError, match=r"tile set: '.*' -> '.*'.*override"):
        train.train(config(other), fresh, progress=False)
    assert int(train.train(config(other), fresh, progress=False, override=True).step) == 6
    (note,) = [row for row in metrics.read(fresh / "metrics.jsonl") if "tile set: " in str(row)]
    assert "changed" in note["note"]
