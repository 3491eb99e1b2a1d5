"""Tiles as they lie on slides and in tile sets, and `mfl extract` and `mfl regions` of them from the command line."""

import csv
import os
import signal
from dataclasses import replace
from functools import partial

import h5py
import jax
import numpy as np
import psutil
import pytest
from PIL import Image

from input_pipeline import cohort, tile
from input_pipeline.crew import FEW
from input_pipeline.phantom.files import write_svs
from input_pipeline.tileset import TileSet
from input_pipeline.tileset.verify import verify
from mfl_jax import cli, models, slides, store
from mfl_jax.extract import extract
from mfl_jax.interop import weights
from tests.input_pipeline.tileset import samples
from tests.mfl_jax import drawn_slides

SPEC, SIDE = "vit_ti16,features=12,heads=3,blocks=1", 32
PARAMS = tile.Params(size=SIDE, mpp=0.5, default_mpp=0.5, max_blur=1.0)


def draw(path, seed, white=False):
    """640 x 512 px of glass, and on it 448 x 384 px of something like stained tissue, or nothing."""
    noise = np.random.default_rng(seed).normal(0, 1, (512, 640, 3))
    pixels = [247, 246, 248] + 0.5 * noise
    if not white:
        pixels[64:448, 96:544] = [170, 90, 160] + 25 * noise[64:448, 96:544]
    pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def drawn(tmp_path):
    """Two slides, an empty one, and one that is none."""
    folder = tmp_path / "slides"
    folder.mkdir()
    images = {name: draw(folder / f"{name}.png", i, name == "white") for i, name in enumerate(("a", "b", "white"))}
    (folder / "broken.png").write_bytes(b"\x89PNG nothing")
    (folder / "._a.png").write_bytes(b"no slide")
    (folder / "notes.txt").write_text("no slide either")
    return folder, images


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    folder, model, draw = tmp_path_factory.mktemp("weights"), models.make(SPEC), np.random.default_rng(0)
    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), np.float32)
    like = jax.eval_shape(lambda key: model.init(key, image), jax.random.key(0))
    params, stats = jax.tree.map(lambda leaf: draw.uniform(-0.2, 0.3, leaf.shape).astype(np.float32), like)
    ours = {"view": f"centre|size({SIDE})|normalise", "size": SIDE, "mpp": 0.5, "dtype": "float32"}
    weights.save(folder, SPEC, params, stats, side=SIDE, mean=(0.5,) * 3, std=(0.5,) * 3, ours=ours)
    return folder


def read(opened, start, stop):
    out = np.zeros((stop - start, opened.sheet.tile_px, opened.sheet.tile_px, 3), np.uint8)
    opened.read(start, stop, out)
    return out


def test_tiles_of_slides_are_the_pixels_at_their_coordinates(drawn, tmp_path):
    folder, images = drawn
    rows = slides.read_cohort(folder)
    assert [row.slide_id for row in rows] == ["a", "b", "broken", "white"]
    tile.tile_cohort(rows, tmp_path / "tiled", PARAMS, workers=0, progress=False)
    source = slides.of_tiled(tmp_path / "tiled")
    assert (slides.kind_of(tmp_path / "tiled"), source.size, source.mpp, source.overlap) == ("tiled", SIDE, 0.5, 0)
    found = {entry.slide_id: entry for entry in source.entries}
    assert found["broken"].fault.startswith("tiling failed: ")
    assert not found["a"].fault
    opened = found["a"].open()
    coords = opened.sheet.coords
    assert (opened.sheet.extent, opened.sheet.mpp, opened.sheet.side) == ((640, 512), 0.5, SIDE)
    assert len(coords) > 100
    for (x, y), pixels in zip(coords[3:8], read(opened, 3, 8), strict=True):
        np.testing.assert_array_equal(pixels, images["a"][y : y + SIDE, x : x + SIDE])
    assert set(opened.timings) >= {"read", "decode"}
    opened.close()
    empty = found["white"].open()
    assert len(empty.sheet.coords) == 0
    empty.close()
    os.utime(folder / "b.png", ns=(1, 1))
    changed = {entry.slide_id: entry for entry in slides.of_tiled(tmp_path / "tiled").entries}
    assert changed["b"].fault == "its files changed since it was tiled; run mfl tile again"
    assert changed["a"].signature == found["a"].signature


def test_tiles_of_a_tile_set_are_its_records(tmp_path):
    source = slides.of_tile_set(samples.write_set(tmp_path))
    assert (slides.kind_of(tmp_path), source.size, source.mpp) == ("tile set", samples.SIZE, 0.5)
    assert [(e.slide_id, e.case_id) for e in source.entries] == [("A 1", "case-1"), ("B", "case-2"), ("C", "case-2")]
    opened = source.entries[2].open()
    wanted = [samples.record(seed) for seed in range(7, 11)]
    for pixels, record in zip(read(opened, 1, 4), wanted[1:], strict=True):
        np.testing.assert_array_equal(pixels, record.he)
    np.testing.assert_array_equal(opened.sheet.coords, [(record.x, record.y) for record in wanted])
    assert (opened.sheet.case_id, opened.sheet.mpp, opened.sheet.side) == ("case-2", 0.5, samples.SIZE)
    assert len(source.entries[1].open().sheet.coords) == 0
    shard = sorted(tmp_path.glob("*.tfrecord*"))[2]
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{shard.name}.*run verify"):
        read(source.entries[2].open(), 0, 4)


def test_slides_are_named_after_their_files(drawn, tmp_path):
    folder, _ = drawn
    (one,) = slides.read_cohort(folder / "a.png")
    assert (one.slide_id, one.case_id, one.he) == ("a", "a", folder / "a.png")
    os.rename(folder / "b.png", folder / "TCGA-AB-1234-01Z-00-DX1.png")
    assert slides.read_cohort(folder)[0].case_id == "TCGA-AB-1234"
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="holds no slides, no folder he/"):
        slides.read_cohort(tmp_path / "nothing")
    (tmp_path / "cohort" / "he").mkdir(parents=True)
    (tmp_path / "cohort" / "ihc").mkdir()
    for name in ("he", "ihc"):
        draw(tmp_path / "cohort" / name / "x.png", 0)
    (row,) = slides.read_cohort(tmp_path / "cohort")
    assert (row.slide_id, row.partners) == ("x", ())


def mfl(*arguments):
    return cli.main([*map(str, arguments), "--quiet", "--workers", "0"])


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_extract_from_slides(drawn, encoder_folder, tmp_path, capsys):
    """Tiled first, read, and written; one bad slide makes the exit status 1, and alone is tried again."""
    folder, _ = drawn
    arguments = ("extract", folder, "--weights", encoder_folder, "--out", tmp_path / "out", "--batch", 16)
    assert mfl(*arguments, "--default-mpp", 0.5) == 1
    printed = capsys.readouterr()
    assert "2 done, 1 empty, 1 failed (0 were done before)" in printed.out
    assert "The limit is" in printed.out
    assert "broken" in printed.err
    table = {row["slide_id"]: row for row in rows_of(tmp_path / "out" / "status.csv")}
    assert {name: row["state"] for name, row in table.items()} == {
        "a": "done",
        "b": "done",
        "broken": "failed",
        "white": "empty",
    }
    with h5py.File(tmp_path / "out" / table["a"]["file"]) as file:
        assert file["features"].shape == (int(table["a"]["tiles"]), 12)
        assert np.ptp(file["features"][:], axis=0).max() > 0
        assert (file.attrs["encoder"], file.attrs["mpp_source"]) == ("vit_tiny_patch16_224", "default")
    draw(folder / "broken.png", 9)
    assert mfl(*arguments, "--default-mpp", 0.5) == 0
    assert "3 done, 1 empty, 0 failed (3 were done before)" in capsys.readouterr().out


def grids(folder):
    found = {}
    with TileSet.open(folder) as tiles:
        for example in tiles.read(range(len(tiles))):
            found.setdefault(example.slide, []).append(tiles.decode(example)["he"])
    return {name: np.stack(of_slide) for name, of_slide in found.items()}


def test_regions_from_slides(drawn, encoder_folder, tmp_path, capsys):
    """As extract and then regions, with the ledger of both; the features lie in the set and disturb nothing there."""
    folder, _ = drawn
    form = ("--tiles", 4, "--min-tissue", 0.1)
    encoder = ("--weights", encoder_folder, "--default-mpp", 0.5)
    assert mfl("extract", folder, *encoder, "--out", tmp_path / "features") == 1
    assert mfl("regions", tmp_path / "features", *form, "--out", tmp_path / "two") == 0
    capsys.readouterr()
    arguments = ("regions", folder, *encoder, *form, "--out", tmp_path / "one")
    assert mfl(*arguments) == 1  # broken.png
    printed = capsys.readouterr().out
    assert printed.count("The limit is") == 2
    assert f"2 done, 1 empty, 1 failed (0 were done before); table: {tmp_path / 'one' / 'features'}" in printed
    assert f"2 done, 1 empty, 0 failed (0 were done before); table: {tmp_path / 'one' / 'status.csv'}" in printed
    one, two = (grids(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys() == {"a", "b"}
    for name, grid in one.items():
        np.testing.assert_array_equal(grid, two[name])
    assert verify(tmp_path / "one", deep=True) == []
    draw(folder / "broken.png", 9)
    assert mfl(*arguments) == 0
    printed = capsys.readouterr().out
    assert "3 done, 1 empty, 0 failed (3 were done before)" in printed
    assert grids(tmp_path / "one").keys() == {"a", "b", "broken"}
    (folder / "broken.png").unlink()
    capsys.readouterr()
    assert mfl(*arguments) == 0
    assert "1 slides of earlier calls are in" in capsys.readouterr().err
    assert grids(tmp_path / "one").keys() == {"a", "b", "broken"}


def test_regions_from_a_table_of_slides_have_its_labels(drawn, encoder_folder, tmp_path):
    folder, _ = drawn
    table = folder / "slides.csv"
    table.write_text("slide_id,case_id,he,mpp_he,label\nx,p,a.png,0.5,good\ny,q,b.png,0.5,bad\n")
    arguments = ("regions", table, "--weights", encoder_folder, "--tiles", 8, "--min-tissue", 0.1)
    assert mfl(*arguments, "--out", tmp_path / "out") == 0
    with TileSet.open(tmp_path / "out") as tiles:
        assert (tiles.slides, tiles.cases, tiles.spec.label_names) == (["x", "y"], ["p", "q"], ("bad", "good"))
        assert [*dict.fromkeys(tiles.tiles["label"].tolist())] == [1, 0]


def test_slides_without_an_encoder_and_features_with_one_are_refused(drawn, encoder_folder, tmp_path, capsys):
    (folder, _), out = drawn, tmp_path / "out"
    samples.write_set(tmp_path / "set")
    (tmp_path / "features").mkdir()
    h5py.File(tmp_path / "features" / "a.h5", "w").close()
    for given, message in (
        ((folder,), f"{folder} holds 4 slides, and no features of tiles: name the encoder as --run"),
        ((tmp_path / "set",), f"{tmp_path / 'set'} holds what mfl pack wrote, and no features of tiles"),
        ((folder, "--default-mpp", 0.5), "--default-mpp is for slides, with --run or --weights"),
        ((tmp_path / "nowhere",), "holds no .h5 files"),
        ((tmp_path / "features", "--weights", encoder_folder), "holds features already: leave --run and --weights out"),
    ):
        assert mfl("regions", *given, "--out", out) == 2
        assert message in capsys.readouterr().err
    (folder / "a.png").write_bytes(b"")
    one = tmp_path / "one.csv"
    one.write_text(f"slide_id,case_id,he,mpp_he\nx,p,{folder / 'a.png'},0.5\n")
    assert mfl("regions", one, "--weights", encoder_folder, "--out", out) == 1
    assert "there is nothing to cut regions from" in capsys.readouterr().out


def test_extract_from_a_tile_set_in_another_layout(encoder_folder, tmp_path, capsys):
    samples.write_set(tmp_path / "set")
    arguments = ("extract", tmp_path / "set", "--weights", encoder_folder, "--out", tmp_path / "out")
    assert mfl(*arguments, "--layout", "trident") == 2
    assert f"the tiles are of {samples.SIZE} px; vit_tiny_patch16_224 takes {SIDE} px" in capsys.readouterr().err
    assert mfl(*arguments, "--default-mpp", "1") == 2
    assert "--default-mpp is for slides" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("extract", "nowhere", "--weights", "w", "--out", "o"), "there is no w/config.json"),
        (("extract", "nowhere", "--run", "r", "--out", "o"), "r is no run: there is no such folder"),
    ],
)
def test_a_wrong_request_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert mfl(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_export_of_no_run(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path / "no"), "--out", str(tmp_path / "out")]) == 2
    assert "is no run" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_stays_flat_over_200_slides(tmp_path, monkeypatch):
    """Files of their own, 64 tiles each: what one tile of pixels a slide held on to would show (0.8 MB a slide)."""
    pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    write_svs(tmp_path / "first.svs", pixels, 0.5, "first")
    rows = []
    for i in range(200):
        path = tmp_path / f"s{i:03d}.svs"
        path.write_bytes((tmp_path / "first.svs").read_bytes())
        rows.append(cohort.Slide(path.stem, path.stem, path))
    params = tile.Params(size=64, mpp=0.5, min_tissue=0.0, max_blur=1.0, max_pen=1.0)
    tile.tile_cohort(rows, tmp_path / "tiled", params, workers=0, progress=False)
    used, writer = [], store.writer

    def watched(*given):
        used.append(psutil.Process().memory_info().rss / 2**20)
        return writer(*given)

    monkeypatch.setattr(store, "writer", watched)
    made = replace(drawn_slides.encoder(), size=64, exact=True)
    report = extract(slides.of_tiled(tmp_path / "tiled"), made, tmp_path / "out", batch=64, progress=False)
    assert [row["state"] for row in report.rows] == ["done"] * 200
    assert report.rows[0]["tiles"] == 64
    assert np.median(used[-20:]) - np.median(used[40:60]) < 24


@pytest.mark.parametrize("of", ["tile set", "tiled"])
def test_processes_read_what_threads_read(of, drawn, tmp_path):
    """With a slide that fails half way, and its seconds by stage."""
    if of == "tile set":
        source = slides.of_tile_set(samples.write_set(tmp_path / "set"))
    else:
        tile.tile_cohort(slides.read_cohort(drawn[0]), tmp_path / "tiled", PARAMS, workers=0, progress=False)
        source = slides.of_tiled(tmp_path / "tiled")
    for workers in (2, FEW + 1):
        made = replace(drawn_slides.encoder(), size=source.size)
        report = extract(source, made, tmp_path / str(workers), batch=7, workers=workers, progress=False)
        assert {row["slide_id"] for row in report.failed} == ({"broken"} if of == "tiled" else set())
        assert report.ledger.seconds["read"] > 0
        assert report.ledger.seconds["decode"] > 0
    files = sorted(path.name for path in (tmp_path / "2").glob("*.h5"))
    assert len(files) == 3
    for name in files:
        with h5py.File(tmp_path / "2" / name) as one, h5py.File(tmp_path / str(FEW + 1) / name) as other:
            np.testing.assert_array_equal(one["features"][:], other["features"][:])


def test_a_reader_that_dies_costs_the_slide_it_was_at(tmp_path):
    source = slides.of_tile_set(samples.write_set(tmp_path / "set"))
    entries = [replace(e, open=partial(Deadly, e.open)) if e.slide_id == "A 1" else e for e in source.entries]
    given = replace(source, entries=tuple(entries))
    made = replace(drawn_slides.encoder(), size=source.size)
    report = extract(given, made, tmp_path / "out", batch=4, workers=FEW + 1, progress=False)
    ((name, reason),) = [(row["slide_id"], row["reason"]) for row in report.failed]
    assert name == "A 1"
    assert "ended by signal 9 (SIGKILL)" in reason
    again = extract(source, made, tmp_path / "out", batch=4, workers=1, progress=False)
    assert (again.kept, again.failed) == (2, [])


class Deadly:
    """A slide that kills the process that reads from it."""

    def __init__(self, start):
        self.real = start()
        self.sheet, self.timings, self.close = self.real.sheet, {}, self.real.close

    def read(self, start, stop, out):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("column", "values", "names", "text"),
    [
        ("label", [1, 1], ("no", "yes"), "yes"),
        ("label", [-1, -1], ("no", "yes"), ""),
        ("label", [0, 1], ("no", "yes"), ""),
        ("label", [2], (), ""),
        ("label_stain", [0.0, 0.0], ("a", "b"), "a"),
        ("label_age", [-1.5, -1.5], (), "-1.5"),
        ("label_day", [20240115.0], (), "20240115"),
        ("label_age", [np.nan], (), ""),
    ],
)
def test_labels_of_a_slide_are_those_of_its_tiles(column, values, names, text):
    assert slides._label(column, np.array(values), names) == text
