"""Tables and pictures of what SLPD found, of tables made by hand and of a run on a set of regions."""

import csv

import numpy as np
import pytest
from PIL import Image

from input_pipeline.tileset import Record, Spec, finish, write_slide
from mfl_jax import cli, data, prototype_maps, train
from mfl_jax.config import Reading
from mfl_jax.methods.slpd import TABLES
from mfl_jax.report.maps import COLOURS
from tests.mfl_jax import synthetic


def made(slides=("a", "b", "c")):
    """Slide a has regions in a row, and b is its neighbour; c has no prototypes."""
    vectors = np.zeros((3, 2, 2), np.float32)
    vectors[0], vectors[1] = np.eye(2), [[0.6, 0.8], [1, 0]]
    tables = {
        "prototypes": vectors,
        "assignment": np.array([0, 0, 1, 0, 1, 1, -1], np.int32),
        "eligible": np.array([True, True, False]),
        "neighbour": np.array([[1, -1], [0, -1], [-1, -1]], np.int32),
        "transfer": np.array([[[1, 0], [-1, -1]], [[1, 0], [-1, -1]], [[-1, -1]] * 2], np.int32),
    }
    of_slide = np.array([0, 0, 0, 1, 1, 1, 2])
    columns = {"x": np.array([0, 10, 20, 0, 10, 20, 0]) + 5.0, "y": np.full(7, 30.0), "side": np.full(7, 10.0)}
    columns |= {"case": np.array(list("pppqqqq")), "label": np.array(["x", "x", "x", "y", "", "y", "y"])}
    return prototype_maps.Found(tables, list(slides), of_slide, columns, 7)


def colour(picture, x, y):
    return tuple(picture[y, x].tolist())


def test_the_table_says_of_each_slide_what_it_is_made_of_and_who_is_alike(tmp_path):
    written = prototype_maps.save(tmp_path, made())
    assert [path.name for path in written] == ["prototypes.csv", "map_a.png", "map_b.png", "neighbours.png"]
    with open(tmp_path / "prototypes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = {"slide": "a", "case": "p", "label": "x", "regions": "3", "clusters": "2 1"}
    expected |= {"neighbour_1": "b", "cosine_1": "0.9000", "matched_1": "1 0"}
    assert rows[0] == expected | {"neighbour_2": "", "cosine_2": "", "matched_2": ""}
    assert (rows[1]["label"], rows[2]["clusters"], rows[2]["neighbour_1"]) == ("", "", "")


def test_a_neighbour_is_drawn_in_the_colours_of_what_it_is_matched_with(tmp_path):
    found = made()
    assert prototype_maps.matched(found, 0, 0).tolist() == [1, 0, 0]
    found.tables["transfer"][0, 0] = [1, 1]  # argmax: both of a's stand for b's second
    assert prototype_maps.matched(found, 0, 0).tolist() == [-1, 0, 0]
    sheet = prototype_maps.neighbours_sheet(made(), [0], {})
    side, left, top = prototype_maps.SIDE, 8, 30
    middle = [(left + number * (side + 8), top + side // 2) for number in range(2)]
    seen = [[colour(sheet, x + side * k // 6, y) for k in (1, 3, 5)] for x, y in middle]
    assert seen == [[COLOURS[0], COLOURS[0], COLOURS[1]], [COLOURS[1], COLOURS[0], COLOURS[0]]]


def test_over_a_slide_the_colours_lie_where_the_regions_are(tmp_path):
    path = tmp_path / "a.tif"
    Image.new("RGB", (60, 60), (90, 90, 90)).save(path)
    picture = prototype_maps._over_slide(made(), 0, np.array([0, 0, 1]), {"a": path})
    scale = len(picture) / 60
    at = lambda x, y: np.array(colour(picture, int(x * scale), int(y * scale)))  # noqa: E731
    assert at(50, 50).tolist() == [90, 90, 90]
    mixed = [0.45 * 90 + 0.55 * np.array(c) for c in COLOURS[:2]]
    assert np.abs(at(10, 35) - mixed[0]).max() <= 1
    assert np.abs(at(30, 35) - mixed[1]).max() <= 1


def test_a_map_of_a_slide_that_is_at_hand_has_it_beside_and_below(tmp_path):
    Image.new("RGB", (60, 60), (90, 90, 90)).save(tmp_path / "a.tif")
    prototype_maps.save(tmp_path, made(), slides={"a": tmp_path / "a.tif"})
    with Image.open(tmp_path / "map_a.png") as alone, Image.open(tmp_path / "map_b.png") as without:
        over, bare = np.asarray(alone), np.asarray(without)
    cell, top = 64, 36  # px: a region of 10 in the map; above it the title
    left = 12 + 6 * cell + 12  # of the second picture
    there = left + int(1.0 * cell), top + int(3.5 * cell)  # the middle of the first region
    mixed = 0.45 * 90 + 0.55 * np.array(COLOURS[0])
    assert np.abs(np.array(colour(over, *there)) - mixed).max() <= 1
    assert colour(over, there[0] - 6 * cell - 12, there[1]) == colour(over, left + 5, top + 5) == (90, 90, 90)
    assert not (bare == 90).all(-1).any()


def test_of_regions_that_overlap_the_middle_is_drawn():
    found = made()
    assert found.cells(0)[1] == 10
    found.columns["side"][:] = 20.0
    corners, side = found.cells(0)
    assert side == 10
    assert corners.tolist() == [[10, 35], [20, 35], [30, 35]]


def test_a_slide_that_is_no_name_of_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"slide_id '../a' is not a file's name"):
        prototype_maps.save(tmp_path, made(("../a", "b", "c")))


SPEC = Spec("grids", 4, 32.0, he_encoding="float16", he_kind="grid", he_channels=7)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_cache")
def test_a_run_on_regions_is_told_of_by_its_last_checkpoint(tmp_path, capsys):
    """The regions of a slide are of two kinds, and slides are alike in pairs."""
    root, draw = tmp_path / "regions", np.random.default_rng(0)
    middle = draw.normal(size=(3, 2, 6)) * 4
    for slide in range(6):
        grids = []
        for region in range(10):
            grid = np.ones((4, 4, 7), np.float16)
            grid[..., :6] = middle[slide // 2, region % 2] + draw.normal(size=(4, 4, 6)) * 0.1
            grids.append(Record(grid, {}, region * 100.0, 0.0, 0.5, label=-1, columns={}, score={}))
        write_slide(root, SPEC, f"s{slide}", f"c{slide}", grids, {})
    finish(root, SPEC, splits={"train": [f"c{i}" for i in range(5)], "test": ["c5"]})
    config = synthetic.tiny("slpd", data__tileset=str(root), total__steps=4)
    with pytest.raises(ValueError, match="is no run"):
        prototype_maps.read(tmp_path / "run")
    train.train(config, tmp_path / "run", progress=False, stop_at=1)
    with pytest.raises(ValueError, match="has no prototypes yet: it is at step 1"):
        prototype_maps.read(tmp_path / "run")
    state = train.train(config, tmp_path / "run", progress=False)
    found = prototype_maps.read(tmp_path / "run")
    for name in TABLES:
        np.testing.assert_array_equal(found.tables[name], state.extra[name])
    assert found.tables["eligible"].tolist() == [True] * 5 + [False]
    assert (found.tables["assignment"].reshape(6, 10)[:5] >= 0).all()
    for slide in range(5):
        codes = found.tables["assignment"][slide * 10 : slide * 10 + 10]
        assert len({*zip(codes.tolist(), [0, 1] * 5, strict=True)}) == 2
    assert found.tables["neighbour"][:4, 0].tolist() == [1, 0, 3, 2]
    out = tmp_path / "out"
    assert cli.main(["prototypes", str(tmp_path / "run"), "--out", str(out), "--show", "2"]) == 0
    assert "5 of 6 slides have prototypes" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["map_s0.png", "map_s1.png", "neighbours.png", "prototypes.csv"]
    assert data.facts(Reading(config).data).records == 60
