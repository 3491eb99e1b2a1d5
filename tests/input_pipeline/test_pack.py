import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from input_pipeline import cohort, pack, tile
from input_pipeline.slides.reader import open_slide
from input_pipeline.slides.transform import Transform
from input_pipeline.slides.warp import sample_partner
from input_pipeline.tileset import TileSet
from mfl_jax import cli
from tests.input_pipeline.cohort_samples import edit_rows

SPLITS = {"train": ["case0000"], "test": ["case0001"]}


@pytest.fixture(scope="module")
def tiled(drawn, tmp_path_factory) -> Path:
    """Tiled with the truth for transforms, so that these tests need no registration."""
    root = tmp_path_factory.mktemp("pack")
    shutil.copytree(drawn.parent, root / "cohort")
    table = root / "cohort" / drawn.name
    edit_rows(table, lambda row: row.update({f"transform_{p}": row[f"truth_transform_{p}"] for p in ("if", "ihc")}))
    tile.tile_cohort(cohort.read(table), root / "tiled", tile.Params(size=128), workers=0, progress=False)
    return root / "tiled"


@pytest.fixture
def own(tiled, tmp_path) -> Path:
    """A copy of cohort and tiles that a test may break; the paths in it are those of the copy."""
    shutil.copytree(tiled.parent / "cohort", tmp_path / "cohort")
    table = tmp_path / "cohort" / "slides.csv"
    edit_rows(
        table, lambda row: row.update({c: "" for c in row if c.startswith(("partner_i", "kind_i", "transform_i"))})
    )
    tile.tile_cohort(cohort.read(table), tmp_path / "tiled", tile.Params(size=128), workers=0, progress=False)
    return tmp_path / "tiled"


def run(tiled: Path, out: Path, params: pack.Params | None = None, workers: int = 0, splits=SPLITS):
    said: list[str] = []
    report = pack.pack(tiled, out, params, splits=splits, workers=workers, progress=False, say=said.append)
    return report, said


@pytest.fixture(scope="module")
def packed(tiled, tmp_path_factory) -> tuple[TileSet, list[cohort.Slide], pack.Report]:
    out = tmp_path_factory.mktemp("set") / "set"
    report, said = run(tiled, out, workers=2)
    assert not said
    assert not report.failed
    return TileSet.open(out), cohort.read(tiled.parent / "cohort" / "slides.csv"), report


def test_tiles_hold_the_pixels_of_their_place_and_the_partner_of_that_place(packed):
    tileset, slides, _ = packed
    rng = np.random.default_rng(0)
    for number in rng.choice(len(tileset), 12, replace=False):
        row = next(s for s in slides if s.slide_id == tileset.slides[tileset.tiles["slide"][number]])
        x, y = (float(tileset.tiles[c][number]) for c in "xy")
        arrays = tileset.decode(tileset.read(np.array([number]))[0])
        with open_slide(row.he) as he:
            pixels = he.read_region(x, y, 128, 128, 0.5)
        assert np.abs(arrays["he"].astype(int) - pixels).mean() < 3  # JPEG
        for partner in row.partners:
            if partner.kind == "vector" or arrays[partner.name] is None:
                continue
            transform = Transform.load(partner.transform) if partner.transform else Transform.identity()
            order = "nearest" if partner.kind == "map" else "linear"
            with open_slide(partner.path) as slide:
                expected, _ = sample_partner(slide, transform, (x * 0.5, y * 0.5), 128, 0.5, order)
            if partner.name == "ihc":
                assert np.abs(arrays["ihc"].astype(int) - expected).mean() < 3
            else:
                np.testing.assert_array_equal(arrays[partner.name], expected)


def test_labels_columns_counts_and_splits(packed):
    tileset, slides, report = packed
    assert tileset.spec.label_names == ("alpha", "beta")
    assert tileset.splits == SPLITS
    for number, slide_id in enumerate(tileset.slides):
        row = next(s for s in slides if s.slide_id == slide_id)
        tiles = tileset.tiles["slide"] == number
        assert set(tileset.tiles["label"][tiles]) == {tileset.spec.label_names.index(row.labels["label"])}
        assert set(tileset.tiles["label_lesion"][tiles]) == {float(row.labels["label_lesion"])}
    assert {"tissue", "cells", "positive", "region", "region_share"} <= set(tileset.tiles)
    assert report.counts["tiles"] == len(tileset)
    assert report.counts["nuclei"] == len(tileset)
    assert report.counts["counts"] + report.counts["counts: outside"] == len(tileset)
    assert report.counts["counts"] > 0


def test_partners_agree_with_the_truth_of_the_cells(packed):
    """The nuclear map and the gene counts say the same as the table of cells, tile by tile."""
    tileset, _, _ = packed
    examples = tileset.read(np.arange(len(tileset)))
    maps = [tileset.decode(e)["nuclei"] for e in examples]
    nuclei = [len(np.unique(m[..., 0])) - 1 for m in maps]
    assert np.corrcoef(nuclei, tileset.tiles["cells"])[0, 1] > 0.9


def test_the_similarity_of_every_partner_tile_is_recorded(packed):
    tileset, _, _ = packed
    for name in ("if", "ihc"):
        score = tileset.tiles[f"score_{name}"]
        assert np.nanmedian(score) > 0.5
        assert (np.isnan(score) | (np.abs(score) <= 1)).all()
    assert np.isnan(tileset.tiles["score_nuclei"]).all()


def test_a_gate_leaves_out_partner_tiles_and_counts_them(tiled, packed, tmp_path):
    tileset, _, _ = packed
    least = float(np.nanmedian(tileset.tiles["score_if"]))
    report, _ = run(tiled, tmp_path / "set", pack.Params(min_score=least))
    gated = TileSet.open(tmp_path / "set")
    below = np.nansum(tileset.tiles["score_if"] < least)
    assert report.counts[f"if: score below {least}"] == below > 0
    assert gated.tiles["has_if"].sum() == tileset.tiles["has_if"].sum() - below


def test_a_rerun_redoes_nothing_and_another_quality_everything(own, tmp_path):
    out = tmp_path / "set"
    assert run(own, out)[0].kept == 0
    before = TileSet.open(out).hash
    assert run(own, out)[0].kept == 3
    assert TileSet.open(out).hash == before
    assert run(own, out, pack.Params(quality=50))[0].kept == 0
    assert TileSet.open(out).hash != before


def test_a_slide_that_left_the_cohort_leaves_the_set(own, tmp_path):
    out, table = tmp_path / "set", tmp_path / "cohort" / "slides.csv"
    run(own, out)
    gone = cohort.read(table)[1].slide_id
    edit_rows(table, lambda row: row["slide_id"] != gone)
    tile.tile_cohort(cohort.read(table), own, tile.Params(size=128), workers=0, progress=False)
    report, said = run(own, out)
    assert report.kept == 2
    assert any(gone in line for line in said)
    assert gone not in TileSet.open(out).slides


def test_a_slide_changed_since_tiling_is_left_out_aloud(own, tmp_path):
    slide = cohort.read(tmp_path / "cohort" / "slides.csv")[0]
    slide.he.touch()
    _, said = run(own, tmp_path / "set")
    assert said == [f"{slide.slide_id} is left out: its files changed since it was tiled; run mfl tile again"]
    assert slide.slide_id not in TileSet.open(tmp_path / "set").slides


def test_the_command_packs_verifies_and_shows(own, tmp_path, capsys):
    out = tmp_path / "set"
    common = ["--workers", "0", "--quiet"]
    assert cli.main(["pack", str(own), "--out", str(out), "--splits", "train=0.5,test=0.5", *common]) == 0
    assert "0 slides failed" in capsys.readouterr().out
    assert cli.main(["verify", str(out), "--deep", "--quiet"]) == 0
    assert cli.main(["audit", str(out), "--quiet"]) == 0
    assert cli.main(["show", str(out), "--out", str(tmp_path / "batch.png"), "--rows", "2"]) == 0
    assert (tmp_path / "batch.png").stat().st_size > 10_000
    shard = next(out.glob("*.tfrecord"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert cli.main(["verify", str(out), "--quiet"]) == 1
    assert shard.name in capsys.readouterr().out


def test_labels_become_classes_and_numbers_stay_numbers():
    rows = [("a", "low", "1.5"), ("b", "high", ""), ("a", "", "2")]
    slides = [
        cohort.Slide(f"s{i}", "c", Path("x"), labels={"label": a, "label_grade": b, "label_age": c})
        for i, (a, b, c) in enumerate(rows)
    ]
    labels = pack.Labels.of(slides)
    assert labels.names == ("a", "b")
    assert [labels.label(s) for s in slides] == [0, 1, 0]
    assert labels.classes == {"label_grade": ("high", "low"), "label_age": ()}
    assert labels.columns(slides[0]) == {"label_grade": 1.0, "label_age": 1.5}
    assert np.isnan(labels.columns(slides[1])["label_age"])


def test_splits_are_read_from_text_and_from_a_table(tmp_path):
    assert pack.read_splits("train=0.7, test=0.3") == {"train": 0.7, "test": 0.3}
    table = tmp_path / "splits.csv"
    table.write_text("case_id,split\na,train\nb,test\nc,train\n")
    assert pack.read_splits(str(table)) == {"train": ["a", "c"], "test": ["b"]}
    for wrong in ("train", "train=x", "train=0.7,test=0.7", "train=-1", ""):
        with pytest.raises(ValueError, match="splits are like"):
            pack.read_splits(wrong)


def test_gene_tables_are_reduced_to_what_all_slides_have(tmp_path):
    slides = []
    for name, genes in (("a", "X,Y,Z"), ("b", "Z,X")):
        (tmp_path / f"{name}.csv").write_text(f"x_um,y_um,{genes}\n1,1,{','.join('1' for _ in genes.split(','))}\n")
        slides.append(
            cohort.Slide(name, name, Path("x"), partners=(cohort.Partner("rna", tmp_path / f"{name}.csv", "vector"),))
        )
    spec = pack.specification(slides, tile.Params(), pack.Params(), pack.Labels.of(slides))
    assert spec.partners[0].channel_names == ("X", "Z")
    assert Counter(p.name for p in spec.partners) == {"rna": 1}
