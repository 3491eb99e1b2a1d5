"""Regions from files of tile features: every tile where its coordinates say, whatever wrote the file."""

import csv
import json

import h5py
import numpy as np
import pytest

from input_pipeline.regions import Params, assemble, cut, place
from input_pipeline.tileset import TileSet
from input_pipeline.tileset.verify import verify

MPP, MPP0, PX, DIM = 0.5, 0.2527, 64, 5
PITCH = PX * MPP / MPP0  # 126.63 level-0 px


def cells_of(seed: int, columns: int, rows: int, share: float = 0.7) -> np.ndarray:
    """(column, row) of the tiles of a slide, not from its corner on."""
    there = np.random.default_rng(seed).random((rows, columns)) < share
    return np.argwhere(there)[:, ::-1] + (3, 2)


def features_of(cells: np.ndarray) -> np.ndarray:
    """Every tile tells where it is."""
    values = np.concatenate([cells, cells.sum(1, keepdims=True) / 8, -cells, cells * 0 + 1], 1)[:, :DIM]
    return values.astype(np.float16)


def write(path, cells, *, layout="ours", corner=(0.0, 0.0), **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    coords = np.floor(cells * PITCH + corner + 1e-6)
    with h5py.File(path, "w") as file:
        file["feats" if layout == "stamp" else "features"] = features_of(cells)
        file["coords"] = coords * MPP0 if layout == "stamp" else coords.astype(np.int64)
        if layout == "ours":
            about = {"case_id": "p" + path.stem[0], "patch_size": PX, "patch_size_level0": round(PITCH)}
            about |= {"mpp_level0": MPP0, "mpp_target": MPP, "mpp_source": "vendor", "encoder": "e"}
            file.attrs.update(about | {"encoder_sha256": "a" * 64, "config_sha256": "b" * 64} | more)
        elif layout == "trident":
            file["coords"].attrs.update({"patch_size": PX, "patch_size_level0": round(PITCH)})
            file["coords"].attrs.update({"level0_magnification": 40, "target_magnification": 20})
        elif layout == "stamp":
            file.attrs.update({"extractor": "e", "unit": "um", "tile_size_um": PX * MPP, "tile_size_px": PX})


def run(features, out, **options):
    more = {name: options.pop(name) for name in ("table", "splits") if name in options}
    return assemble(features, out, Params(**({"tiles": 4} | options)), workers=0, progress=False, **more)


def status(out):
    with open(out / "status.csv", newline="") as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def check_slide(tiles, slide, cells, least, side=4, scale=1.0):
    """Against a search for each cell: what lies there, or nothing. -> tiles that are in some region."""
    wanted, seen = {tuple(c): f for c, f in zip(cells.tolist(), features_of(cells), strict=True)}, set()
    number = tiles.slides.index(slide)
    for i in range(*tiles.first_row[number : number + 2]):
        grid = tiles.decode(tiles.read([i])[0])["he"]
        x, y = (float(tiles.tiles[name][i]) / scale / PITCH for name in ("x", "y"))
        assert max(abs(x - round(x)), abs(y - round(y))) < 0.05
        for r in range(side):
            for c in range(side):
                at = (round(x) + c, round(y) + r)
                assert grid[r, c, -1] == (at in wanted)
                np.testing.assert_array_equal(grid[r, c, :-1], wanted.get(at, np.zeros(DIM)))
                if at in wanted:
                    assert at not in seen
                    seen.add(at)
        assert tiles.tiles["tiles"][i] == grid[..., -1].sum() >= least
    return seen


@pytest.mark.parametrize("layout", ["ours", "clam", "trident", "stamp"])
def test_every_tile_is_where_its_coordinates_say(tmp_path, layout):
    given = {"a1": cells_of(1, 9, 7), "a2": cells_of(2, 4, 4), "b1": cells_of(3, 250, 2, 0.9)}
    for name, cells in given.items():
        write(tmp_path / "f" / f"{name}.h5", cells, layout=layout)
    scale = {"clam": {"tile_size": PX, "mpp": MPP}, "trident": {"mpp": MPP}}.get(layout, {})
    report = run(tmp_path / "f", tmp_path / "out", min_tissue=0.01, **scale)
    assert not report.failed
    assert verify(tmp_path / "out", deep=True) == []
    with TileSet.open(tmp_path / "out") as tiles:
        assert (tiles.spec.he_kind, tiles.spec.size, tiles.spec.he_channels) == ("grid", 4, DIM + 1)
        assert tiles.spec.mpp == PX * MPP
        assert len(tiles) == report.regions
        for name, cells in given.items():
            seen = check_slide(tiles, name, cells, 1, scale=MPP0 if layout == "stamp" else 1.0)
            assert len(seen) == len(cells)


def test_regions_of_few_tiles_are_dropped_and_counted_and_every_slide_has_a_row(tmp_path):
    given = {"a1": cells_of(1, 10, 9, 0.6), "b1": cells_of(2, 3, 3, 0.4), "c1": np.zeros((0, 2), int)}
    for name, cells in given.items():
        write(tmp_path / "f" / f"{name}.h5", cells)
    (tmp_path / "f" / "broken.h5").write_bytes(b"no")
    write(tmp_path / "f" / "d1.h5", cells_of(5, 5, 5), encoder_sha256="c" * 64)
    report = run(tmp_path / "f", tmp_path / "out", min_tissue=0.5)
    rows = status(tmp_path / "out")
    assert {name: row["state"] for name, row in rows.items()} == {
        "a1": "done", "b1": "empty", "broken": "failed", "c1": "empty", "d1": "failed"
    }  # fmt: skip
    assert set(report.failed) == {"broken", "d1"}
    assert "not readable as HDF5" in rows["broken"]["reason"]
    assert "encoder_sha256: 'cccc" in rows["d1"]["reason"]
    assert rows["c1"]["reason"] == "the slide has no tiles"
    assert rows["b1"]["reason"] == f"the fullest region has {len(given['b1'])} of 16 tiles"
    with TileSet.open(tmp_path / "out") as tiles:
        kept = check_slide(tiles, "a1", given["a1"], 8)
        assert 0 < len(kept) < len(given["a1"])
        number = len(tiles)
    assert (int(rows["a1"]["regions"]), int(rows["a1"]["tiles"])) == (number, len(given["a1"]))
    everything = list(cut(given["a1"] - given["a1"].min(0), 4, 4))
    assert int(rows["a1"]["dropped"]) == len(everything) - number > 0


def test_a_rerun_does_what_changed_and_no_more(tmp_path):
    for name in ("a1", "b1", "c1"):
        write(tmp_path / "f" / f"{name}.h5", cells_of(ord(name[0]), 6, 6))
    first = run(tmp_path / "f", tmp_path / "out")
    again = run(tmp_path / "f", tmp_path / "out")
    assert (first.kept, again.kept, again.regions) == (0, 3, 0)
    assert again.manifest["hash"] == first.manifest["hash"]
    write(tmp_path / "f" / "b1.h5", cells_of(9, 6, 6))
    (tmp_path / "f" / "c1.h5").unlink()
    write(tmp_path / "f" / "d1.h5", cells_of(8, 6, 6))
    third = run(tmp_path / "f", tmp_path / "out")
    assert third.kept == 1
    with TileSet.open(tmp_path / "out") as tiles:
        assert set(tiles.slides) == {"a1", "b1", "d1"}
        check_slide(tiles, "b1", cells_of(9, 6, 6), 4)
    other = run(tmp_path / "f", tmp_path / "out", min_tissue=0.5)
    assert other.kept == 0
    assert status(tmp_path / "out").keys() == {"a1", "b1", "d1"}


def test_cases_labels_and_columns_come_from_the_table(tmp_path):
    for name in ("a1", "a2", "b1", "c1"):
        write(tmp_path / "f" / f"{name}.h5", cells_of(4, 8, 8, 0.9))
    table = tmp_path / "slides.csv"
    table.write_text("slide_id,case_id,he,label,label_age\na1,A,x.svs,yes,40\nb1,B,,no,\nz1,Z,,yes,3\na2,,,yes,50\n")
    said = []
    report = assemble(
        tmp_path / "f", tmp_path / "out", Params(tiles=4), table=table, workers=0, progress=False, say=said.append,
        splits={"train": ["A", "pa"], "test": ["B"]},
    )  # fmt: skip
    assert report.failed.keys() == {"z1"}
    assert "there are no features" in report.failed["z1"]
    assert any("1 files of" in line for line in said)
    with TileSet.open(tmp_path / "out") as tiles:
        assert tiles.spec.label_names == ("no", "yes")
        case = np.array(tiles.cases)[tiles.tiles["case"]]
        slide = np.array(tiles.slides)[tiles.tiles["slide"]]
        assert dict(zip(slide, case, strict=True)) == {"a1": "A", "a2": "pa", "b1": "B"}
        assert set(tiles.tiles["label"][slide == "a1"]) == {1}
        assert set(tiles.tiles["label"][slide == "b1"]) == {0}
        assert set(tiles.tiles["label_age"][slide == "a2"]) == {50.0}
        assert np.isnan(tiles.tiles["label_age"][slide == "b1"]).all()
        assert tiles.splits == {"train": ["A", "pa"], "test": ["B"]}


def test_pieces_with_grids_of_their_own_are_moved_to_the_grid_of_most_tiles():
    """As CLAM has them; no tile is lost, and none is moved by more than half a tile."""
    big, small = cells_of(1, 8, 8, 0.9), cells_of(2, 3, 3, 0.9)
    coords = np.concatenate([big * 256.0 + (17, 201), small * 256.0 + (17 + 256 * 20 + 90, 201 - 120)])
    cells, corner, moved = place(coords, 256.0)
    assert (cells >= 0).all()
    assert len(set(map(tuple, cells.tolist()))) == len(cells)
    apart = coords - (corner + cells * 256)
    np.testing.assert_allclose(apart[: len(big)], 0, atol=1e-6)
    np.testing.assert_allclose(np.abs(apart[len(big) :]), np.broadcast_to((90, 120), (len(small), 2)), atol=1e-6)
    assert moved == round(120 / 256, 3)
    touching = np.array([[0, 0], [256, 0], [512, 0], [600, 0]] + [[256 * i, 512] for i in range(8)], float)
    cells = place(touching, 256.0)[0]
    assert cells[3].tolist() == [-1, -1]  # its cell is that of the tile at 512, which fills it better
    assert (np.delete(cells, 3, 0) >= 0).all()


@pytest.mark.parametrize(
    ("coords", "pitch", "message"),
    [
        (np.argwhere(np.ones((6, 6))) * 128.0, 256.0, "overlap others: extract without overlap"),
        (np.array([[0, 0], [1e9, 1e9]]), 256.0, "a slide is not so large"),
        (np.array([[0, 0], [1e300, 0]]), 256.0, "a slide is not so large"),
        (np.zeros((3, 2)), np.nan, "does not say how large a tile is"),
    ],
)
def test_coordinates_that_are_no_grid_are_refused(coords, pitch, message):
    with pytest.raises(ValueError, match=message):
        place(coords, pitch)


@pytest.mark.parametrize("step", [4, 3, 1])
def test_regions_cover_every_tile_from_top_to_bottom(step):
    cells = cells_of(3, 11, 6, 0.5)
    cells = cells - cells.min(0)
    found = list(cut(cells, 4, step))
    members = np.concatenate([m.reshape(-1) for _, m in found])
    assert set(members[members >= 0]) == set(range(len(cells)))
    if step == 4:
        assert (np.bincount(members[members >= 0]) == 1).all()
    for at, part in found:
        for r, c in np.argwhere(part >= 0):
            np.testing.assert_array_equal(cells[part[r, c]], at + np.array([c, r]))
    assert [tuple(at[::-1]) for at, _ in found] == sorted(tuple(at[::-1]) for at, _ in found)
    if step == 4:
        left, right = min(at[0] for at, _ in found), max(at[0] for at, _ in found) + 4
        assert abs(-left - (right - 1 - cells[:, 0].max())) <= 1  # centred


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path):
    write(tmp_path / "f" / "a1.h5", cells_of(1, 5, 5))
    with pytest.raises(ValueError, match=r"--mpp is 1, and the files are of 0\.5"):
        run(tmp_path / "f", tmp_path / "out", mpp=1.0)
    write(tmp_path / "g" / "a1.h5", cells_of(1, 5, 5), layout="clam")
    with pytest.raises(ValueError, match="give --tile-size"):
        run(tmp_path / "g", tmp_path / "out")
    for wrong, message in (({"tiles": 0}, "tiles is 1"), ({"step": 5}, "step is 1"), ({"min_tissue": 0}, "min_tissue")):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "f", tmp_path / "out", **wrong)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_features_too_large_for_float16_fail_their_slide_alone(tmp_path):
    for name in ("a1", "b1"):
        write(tmp_path / "f" / f"{name}.h5", cells_of(1, 5, 5))
    with h5py.File(tmp_path / "f" / "b1.h5", "r+") as file:
        del file["features"]
        file["features"] = np.full((len(cells_of(1, 5, 5)), DIM), 1e5, np.float32)
    report = run(tmp_path / "f", tmp_path / "out")
    assert report.failed.keys() == {"b1"}
    assert "too large for float16" in report.failed["b1"]
    assert status(tmp_path / "out")["a1"]["state"] == "done"


def test_a_slide_that_fails_later_keeps_its_regions_of_before(tmp_path):
    for name in ("a1", "b1"):
        write(tmp_path / "f" / f"{name}.h5", cells_of(1, 5, 5))
    run(tmp_path / "f", tmp_path / "out")
    (tmp_path / "f" / "b1.h5").write_bytes(b"no")
    report = run(tmp_path / "f", tmp_path / "out")
    assert report.failed.keys() == {"b1"}
    with TileSet.open(tmp_path / "out") as tiles:
        assert set(tiles.slides) == {"a1", "b1"}
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["spec"]["params"]["importer"] == "regions"
