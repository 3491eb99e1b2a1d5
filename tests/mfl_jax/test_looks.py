"""What encoders look at, on tiles whose truth was planted, by encoders whose maps are known."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from input_pipeline.tileset import Partner, Record, Spec, TileSet, finish, write_slide
from mfl_jax import looks
from mfl_jax.evaluators import Task

SIZE = 16
PARTNERS = (
    Partner("if", "image", channels=2, dtype="uint16", channel_names=("DAPI", "MARKER")),
    Partner("nuclei", "map", channels=2, dtype="uint16", channel_names=("instance", "type")),
)
SPEC = Spec("planted", SIZE, 0.5, he_encoding="png", partners=PARTNERS, label_names=("no", "yes"))
SPLITS = {"train": ["c0", "c1", "c2"], "test": ["c3", "c4", "c5"]}
TASK = Task("positive", "positive", 0.5)


def records(rng, count: int):
    """A square is dark red, darker where the tile is positive, and bright in the marker; another is dark blue, and a
    nucleus of the map."""
    for i in range(count):
        positive = i % 2
        he = rng.integers(230, 256, (SIZE, SIZE, 3), np.uint8)
        marker, nuclei = np.full((SIZE, SIZE, 2), 100, np.uint16), np.zeros((SIZE, SIZE, 2), np.uint16)
        y, x = rng.integers(0, SIZE - 7, 2)
        he[y : y + 7, x : x + 7, 0] = 120 - 100 * positive
        marker[y : y + 7, x : x + 7, 1] = 5000
        nuclei[:3, :3] = 7
        he[:3, :3, 2] = 20
        columns = {"positive": 0.3 + 0.4 * positive + 0.01 * rng.random(), "label_stain": 2.0}
        yield Record(he, {"if": marker, "nuclei": nuclei}, i * 10.0, 0.0, 0.5, label=positive, columns=columns)


@pytest.fixture(scope="module", name="tileset")
def tileset_fixture(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("planted") / "set", np.random.default_rng(0)
    for i in range(6):
        write_slide(root, SPEC, f"s{i}", f"c{i}", list(records(rng, 10)), {})
    finish(root, SPEC, splits=SPLITS)
    return TileSet.open(root)


@pytest.fixture(name="columns")
def columns_fixture(tileset):
    found = {name: np.asarray(values) for name, values in tileset.tiles.items()}
    return found | {"case": np.array(tileset.cases)[found["case"]]}


def embed(params, extra, batch):
    """Darkness of red, or with other parameters of blue."""
    dark = 1 - batch["he"].astype(jnp.float32)
    return {"he": jnp.stack([dark[..., params["channel"]].sum((1, 2)), jnp.ones(len(dark))], 1)}


@pytest.fixture(name="encoders")
def encoders_fixture(tileset, monkeypatch):
    runs = {
        str(c): SimpleNamespace(method=SimpleNamespace(embed=embed), params={"channel": c}, extra={}) for c in (0, 2)
    }
    monkeypatch.setattr(looks.trained, "open_run", lambda path, mesh: runs[path.name])
    monkeypatch.setattr(looks.arms, "partners_of_embed", lambda run, feature: ())
    he = looks.decoded(tileset, np.arange(len(tileset)), "he") / 255
    made = {}
    for name, channel in (("red", 0), ("blue", 2)):
        features = np.array(embed({"channel": channel}, {}, {"he": jnp.asarray(he)})["he"])
        made[name] = looks.Encoder(name.title(), Path(str(channel)), features)
    return made


def test_an_encoder_that_looks_at_the_marker_is_told_from_one_that_does_not(encoders, columns, tileset):
    truth = looks.truth_of(tileset)
    section, pictures = looks.section(encoders, columns, tileset, TASK, truth)
    red, blue = section["arms"]
    assert (red["arm"], blue["arm"]) == ("red", "blue")
    assert red["mean"] > 0.95
    assert red["low"] <= red["mean"] <= red["high"]
    assert abs(blue["mean"] - 0.5) < 0.3
    assert "30 test tiles of which 20% to 80% are positive" in section["what"]
    assert "MARKER of if" in section["pictures"][0]["caption"]
    assert pictures["saliency"].dtype == np.uint8
    of_map, _ = looks.section({"blue": encoders["blue"]}, columns, tileset, TASK, looks.truth_of(tileset, "nuclei"))
    assert max(of_map["arms"][0]["mean"], 1 - of_map["arms"][0]["mean"]) > 0.95


def test_without_a_truth_there_is_a_sheet_and_no_score(encoders, columns, tileset):
    section, pictures = looks.section(encoders, columns, tileset, TASK, None, tiles=4)
    assert "arms" not in section
    assert "4 test tiles" in section["what"]
    assert set(pictures) == {"saliency"}


def test_an_arm_that_sees_the_partner_is_left_out(encoders, columns, tileset, monkeypatch):
    monkeypatch.setattr(looks.arms, "partners_of_embed", lambda run, feature: ("if",) if run.params["channel"] else ())
    section, _ = looks.section(encoders, columns, tileset, TASK, looks.truth_of(tileset))
    assert [row["arm"] for row in section["arms"]] == ["red"]
    monkeypatch.setattr(looks.arms, "partners_of_embed", lambda run, feature: ("if",))
    with pytest.raises(looks.NothingToShow, match="every arm sees the partner"):
        looks.section(encoders, columns, tileset, TASK, None)


def test_no_fit_tile_is_said(encoders, columns, tileset):
    columns["positive"] = np.where(np.arange(len(tileset)) == 0, 0.5, 0.9)
    with pytest.raises(looks.NothingToShow, match="no test tile of which 20% to 80% are positive"):
        looks.section(encoders, columns, tileset, TASK, None)


def test_what_the_maps_are_scored_against(tileset):
    assert looks.truth_of(tileset) == looks.truth_of(tileset, "if:MARKER")
    assert looks.truth_of(tileset, "if:DAPI").channel == 0
    assert looks.truth_of(tileset, "nuclei").kind == "map"
    assert looks.truth_of(tileset, "none") is None
    unnamed = SimpleNamespace(spec=replace(SPEC, partners=SPEC.partners[1:]))
    assert looks.truth_of(unnamed).partner == "nuclei"
    assert looks.truth_of(SimpleNamespace(spec=replace(SPEC, partners=()))) is None
    for asked, message in (
        ("ihc", "no truth can be had of 'ihc'; the tile set has if, nuclei"),
        ("if:CD4", "'CD4'; it has DAPI"),
    ):
        with pytest.raises(ValueError, match=message):
            looks.truth_of(tileset, asked)


def test_more_or_fewer_classes_than_two_have_no_direction(columns):
    looks.check(Task("label"), columns)
    columns["label"] = columns["label"] + np.arange(len(columns["label"])) % 2
    for task in (Task("label"), Task("positive", "positive", regression=True)):
        with pytest.raises(ValueError, match="saliency is of two classes"):
            looks.check(task, columns)
