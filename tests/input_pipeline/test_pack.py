import hashlib
import json
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from input_pipeline import cohort, pack, tile
from input_pipeline.files import only_one
from input_pipeline.slides.reader import Slide, open_slide
from input_pipeline.slides.transform import Transform
from input_pipeline.slides.warp import sample_partner
from input_pipeline.tileset import TileSet, finish, write_slide
from input_pipeline.tileset.verify import verify
from mfl_jax import cli
from tests.input_pipeline.cohort_samples import edit_rows
from tests.input_pipeline.tileset.samples import SPEC, contents

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
    report, said = run(own, tmp_path / "set")
    reason = "its files changed since it was tiled; run mfl tile again"
    assert said[0] == f"{slide.slide_id} is left out: {reason}"
    assert report.failed == {slide.slide_id: reason}
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
    table.write_text("slide_id,case_id,split\n1,a,train\n2,b,test\n3,c,train\n4,a,train\n")
    assert pack.read_splits(str(table)) == {"train": ["a", "c"], "test": ["b"]}
    for wrong in ("train", "train=x", "train=0.7,test=0.7", "train=-1", ""):
        with pytest.raises(ValueError, match="splits are like"):
            pack.read_splits(wrong)
    for wrong, message in (("a,", "row 2: case_id or split is empty"), ("a", "row 2: 1 fields")):
        table.write_text(f"case_id,split\n{wrong}\n")
        with pytest.raises(ValueError, match=message):
            pack.read_splits(str(table))


def test_classes_are_in_the_order_of_their_numbers():
    slides = [cohort.Slide(v, v, Path("x"), labels={"label": v}) for v in ("10", "2", "high", "", "1.5")]
    assert pack.Labels.of(slides).names == ("1.5", "2", "10", "high")


WRONG = {
    "lower case": {"splits": {"Train": 0.5, "test": 0.5}},
    "'case9999', which no slide has": {"splits": {"train": ["case9999"]}},
    "lossless names 'nuclie', which is no partner; .*did you mean 'nuclei'": {
        "params": pack.Params(lossless=("nuclie",))
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_request_is_refused_before_any_work(own, tmp_path, monkeypatch, message):
    monkeypatch.setattr(pack, "pack_slide", None)
    with pytest.raises(ValueError, match=message):
        run(own, tmp_path / "set", **WRONG[message])
    assert not list(tmp_path.glob("set/*.json"))


def test_a_folder_that_holds_another_set_is_refused(own, tmp_path):
    out = tmp_path / "set"
    write_slide(out, SPEC, "other", "c", [])
    finish(out, SPEC)
    before = contents(out)
    with pytest.raises(ValueError, match="holds a set of name 'demo', this one is of name 'tiles'"):
        run(own, out)
    with pytest.raises(ValueError, match=r"1 other slides \('other', ...\), none of which is wanted"):
        run(own, out, pack.Params(name="demo"))
    with pytest.raises(ValueError, match="a folder that mfl tile wrote"):
        run(own, own)
    assert contents(out) == before


def test_a_second_run_in_the_same_folder_is_refused(own, tmp_path):
    with only_one(tmp_path / "set"), pytest.raises(ValueError, match="at work in"):
        run(own, tmp_path / "set")


def test_a_slide_that_fails_later_keeps_its_tiles_while_the_parameters_are_the_same(own, tmp_path):
    out = tmp_path / "set"
    run(own, out)
    slide = cohort.read(tmp_path / "cohort" / "slides.csv")[0]
    tiles = {entry["slide"]: entry["tiles"] for entry in TileSet.open(out).manifest["slides"]}
    slide.he.touch()
    report, said = run(own, out)
    assert report.failed.keys() == {slide.slide_id}
    assert f"{slide.slide_id}: its {tiles[slide.slide_id]} tiles of an earlier run stay in the set" in said
    assert slide.slide_id in TileSet.open(out).slides
    report, said = run(own, out, pack.Params(quality=50))
    assert any(f"{slide.slide_id} is removed from the set" in line for line in said)
    assert slide.slide_id not in TileSet.open(out).slides
    assert verify(out) == []


def test_a_slide_that_changed_its_case_moves_with_it(own, tmp_path):
    run(own, tmp_path / "set")
    slide = cohort.read(tmp_path / "cohort" / "slides.csv")[0]
    edit_rows(
        tmp_path / "cohort" / "slides.csv",
        lambda row: row.update(case_id="new") if row["slide_id"] == slide.slide_id else None,
    )
    retile(own, tmp_path)
    report, said = run(own, tmp_path / "set", splits=None)
    assert not report.failed
    assert f"{slide.slide_id} is now of case 'new', not {slide.case_id!r}" in said
    assert any(line.startswith("1 cases join a split: new ") for line in said)
    assert "new" in TileSet.open(tmp_path / "set").cases
    assert verify(tmp_path / "set") == []


def test_splits_stay_as_they_were_until_others_are_asked_for(own, tmp_path):
    out = tmp_path / "set"
    swapped = {"train": ["case0001"], "test": ["case0000"]}
    assert run(own, out, splits=swapped)[0].splits == {"train": 1, "test": 1}
    report, said = run(own, out, splits=None)
    assert (report.manifest["splits"], said) == (swapped, [])
    report, said = run(own, out, splits={"train": 1.0, "test": 0.0})
    assert report.splits == {"train": 2, "test": 0}
    assert said == [
        "1 of 2 cases change their split, as was asked for (first: 'case0000' from 'test' to 'train')",
        "split 'test' is empty: there are 2 cases",
    ]


def test_a_case_whose_slides_all_failed_does_not_block_the_set_and_finds_its_split_later(own, tmp_path):
    out = tmp_path / "set"
    (slide,) = (s for s in cohort.read(tmp_path / "cohort" / "slides.csv") if s.case_id == lone_case(tmp_path))
    good = slide.he.read_bytes()
    slide.he.write_bytes(b"no slide")
    retile(own, tmp_path)
    lists = {"train": sorted({"case0000", "case0001"} - {slide.case_id}), "test": [slide.case_id]}
    report, said = run(own, out, splits=lists)
    assert report.failed.keys() == {slide.slide_id}
    assert report.manifest["splits"] == {**lists, "test": []}
    assert "split 'test' is empty: there are 1 cases" in said
    slide.he.write_bytes(good)
    retile(own, tmp_path)
    report, said = run(own, out, splits=None)
    assert not report.failed
    assert report.manifest["splits"] == lists


def lone_case(folder: Path) -> str:
    counts = Counter(s.case_id for s in cohort.read(folder / "cohort" / "slides.csv"))
    return min(counts, key=lambda case: counts[case])


def retile(tiled: Path, folder: Path) -> None:
    slides = cohort.read(folder / "cohort" / "slides.csv")
    tile.tile_cohort(slides, tiled, tile.Params(size=128), workers=0, progress=False)


def test_a_new_set_draws_its_splits(own, tmp_path):
    report, said = run(own, tmp_path / "set", splits=None)
    assert report.splits.keys() == pack.SHARES.keys()
    assert sum(report.splits.values()) == 2
    assert any("is empty" in line for line in said)
    assert report.manifest["split_rule"]["shares"] == pack.SHARES


def test_hashes_of_all_files_are_in_the_manifest_and_partners_left_out_are_not_opened(own, tmp_path):
    slides = cohort.read(tmp_path / "cohort" / "slides.csv")
    status = own / "slides" / slides[0].slide_id / "status.json"
    document = json.loads(status.read_text())
    status.write_text(json.dumps(document | {"rejected": {"nuclei": "by hand"}}))
    opened = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "open_slide", lambda path, **how: opened.append(path) or open_slide(path, **how))
        report, _ = run(own, tmp_path / "set")
    partner = {p.name: p for p in slides[0].partners}
    assert partner["nuclei"].path not in opened
    entries = {entry["slide"]: entry["source"] for entry in report.manifest["slides"]}
    assert entries[slides[0].slide_id]["files"].keys() == {"he", "counts"}
    source = entries[slides[1].slide_id]
    paths = {"he": slides[1].he} | {p.name: p.path for p in slides[1].partners}
    expected = {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in paths.items()}
    assert {n: facts["sha256"] for n, facts in source["files"].items()} == expected
    assert source["aids"].keys() == {"cells", "regions"}
    assert "encode+write" in report.ledger.seconds


def test_files_are_closed_when_a_slide_fails(own, tmp_path, monkeypatch):
    opened, closed = [], []
    close = Slide.close

    def kept(path, **how):
        opened.append(open_slide(path, **how))
        return opened[-1]

    def broken(*_):
        raise ValueError("broken")

    monkeypatch.setattr(pack, "open_slide", kept)
    monkeypatch.setattr(Slide, "close", lambda slide: closed.append(slide) or close(slide))
    monkeypatch.setattr(pack.warp, "sample_partner", broken)
    report, said = run(own, tmp_path / "set")
    assert report.failed == dict.fromkeys(report.failed, "broken")
    assert len(report.failed) == 3
    assert len(opened) == 6
    assert all(any(slide is other for other in closed) for slide in opened)
    assert said[-1] == f"no slide was written to {tmp_path / 'set'}"


def test_one_broken_map_and_one_odd_gene_table_fail_alone(own, tmp_path):
    slides = cohort.read(tmp_path / "cohort" / "slides.csv")
    files = [
        next(p.path for p in s.partners if p.name == n) for s, n in zip(slides, ("nuclei", "counts"), strict=False)
    ]
    files[0].write_bytes(b"no picture")
    files[1].write_text("x_um,y_um,OTHER\n1,1,1\n")
    for row in slides[:2]:  # as if they had broken right after tiling
        status = own / "slides" / row.slide_id / "status.json"
        document = json.loads(status.read_text())
        status.write_text(json.dumps(document | {"signature": row.signature(asdict(tile.Params(size=128)))}))
    report, _ = run(own, tmp_path / "set")
    assert report.failed.keys() == {s.slide_id for s in slides[:2]}
    tileset = TileSet.open(tmp_path / "set")
    assert tileset.slides == [slides[2].slide_id]
    assert len(next(p for p in tileset.spec.partners if p.name == "counts").channel_names) > 1


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
