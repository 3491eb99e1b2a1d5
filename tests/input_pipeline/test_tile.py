import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from input_pipeline import cohort, tile
from input_pipeline.files import only_one
from input_pipeline.slides.transform import Transform
from mfl_jax import cli
from tests.input_pipeline.cohort_samples import edit_rows

PARAMS = tile.Params(size=128, mpp=0.5)


def run(table: Path, out: Path, params: tile.Params = PARAMS, workers: int = 0) -> tuple[tile.Report, list[str]]:
    said: list[str] = []
    report = tile.tile_cohort(cohort.read(table), out, params, workers=workers, progress=False, say=said.append)
    return report, said


def without_partners(row: dict) -> None:
    for column in row:
        if column.startswith(("partner_", "kind_", "transform_")):
            row[column] = ""


@pytest.fixture
def plain_csv(cohort_csv):
    """H&E alone, which tiles in no time."""
    edit_rows(cohort_csv, without_partners)
    return cohort_csv


def test_a_cohort_becomes_tiles_pictures_registrations_and_a_table(drawn, tmp_path):
    report, said = run(drawn, tmp_path)
    assert not report.failed
    assert not said
    for row in cohort.read(drawn):
        folder = tmp_path / "slides" / row.slide_id
        status = json.loads((folder / "status.json").read_text())
        assert (status["state"], status["mpp"], status["mpp_source"]) == ("done", 0.5, "vendor")
        with np.load(folder / "tiles.npz", allow_pickle=False) as tiles:
            assert len(tiles["x"]) == status["tiles"] > 10
            assert set(tiles) == {"x", "y", "tissue", "pen", "blur", "cells", "positive", "region", "region_share"}
            assert tiles["x"].max() <= 768 - 128
            assert tiles["tissue"].min() >= 0.5
            corner_um = np.stack([tiles["x"], tiles["y"]], axis=1) * 0.5
            cells = np.loadtxt(row.cells, delimiter=",", skiprows=1, usecols=(1, 2))
            inside = ((cells >= corner_um[3]) & (cells < corner_um[3] + 64)).all(axis=1)
            assert tiles["cells"][3] == inside.sum()
        for partner in ("if", "ihc"):
            found = Transform.load(folder / f"{partner}.transform.json")
            truth = Transform.load(drawn.parent / partner / f"{row.slide_id}_{partner}.truth.json")
            assert np.median(np.linalg.norm(found(cells) - truth(cells), axis=1)) < 2.0
        with Image.open(folder / "qc.jpg") as picture:
            assert max(picture.size) >= 768
        assert (folder / "if.overlay.jpg").exists()
    with open(tmp_path / "status.csv", newline="") as file:
        assert [r["state"] for r in csv.DictReader(file)] == ["done"] * 3
    assert "The limit is" in report.ledger.table()


def test_one_bad_slide_is_named_and_a_rerun_redoes_it_alone(plain_csv, tmp_path):
    first = cohort.read(plain_csv)[0]
    whole = first.he.read_bytes()
    first.he.write_bytes(whole[: len(whole) // 3])
    out = tmp_path / "out"
    report, said = run(plain_csv, out, workers=2)
    assert [row["slide_id"] for row in report.failed] == [first.slide_id]
    assert first.he.name in report.failed[0]["reason"]
    assert len(said) == 1
    assert not (out / "slides" / first.slide_id / "tiles.npz").exists()

    others = {p: p.stat().st_mtime_ns for p in out.glob("slides/*/status.json") if p.parent.name != first.slide_id}
    first.he.write_bytes(whole)
    report, said = run(plain_csv, out)
    assert (report.failed, said, report.kept) == ([], [], 2)
    assert all(p.stat().st_mtime_ns == before for p, before in others.items())
    assert run(plain_csv, out)[0].kept == 3


def test_other_parameters_or_files_make_a_slide_stale(plain_csv, tmp_path):
    assert run(plain_csv, tmp_path / "out")[0].kept == 0
    assert run(plain_csv, tmp_path / "out", tile.Params(size=96, mpp=0.5))[0].kept == 0
    edit_rows(plain_csv, lambda row: row.update(mpp_he="0.25") if row["slide_id"].endswith("1") else None)
    ends_in_1 = sum(s.slide_id.endswith("1") for s in cohort.read(plain_csv))
    assert run(plain_csv, tmp_path / "out", tile.Params(size=96, mpp=0.5))[0].kept == 3 - ends_in_1


def test_half_written_output_is_not_taken_for_done(plain_csv, tmp_path):
    run(plain_csv, tmp_path / "out")
    name = cohort.read(plain_csv)[0].slide_id
    (tmp_path / "out" / "slides" / name / "status.json").write_text('{"version": 1, "state": "do')
    assert run(plain_csv, tmp_path / "out")[0].kept == 2


def test_a_missing_file_and_a_blank_slide(plain_csv, tmp_path):
    first, second, _ = cohort.read(plain_csv)
    first.he.unlink()
    second.he.unlink()
    blank = second.he.with_suffix(".png")
    Image.fromarray(np.full((600, 600, 3), 244, np.uint8)).save(blank)
    edit_rows(
        plain_csv, lambda row: row.update(he=str(blank), mpp_he="0.5") if row["slide_id"] == second.slide_id else 0
    )
    report, _ = run(plain_csv, tmp_path / "out")
    states = {row["slide_id"]: (row["state"], row["reason"]) for row in report.rows}
    assert states[first.slide_id][0] == "failed"
    assert "there is no file" in states[first.slide_id][1]
    assert states[second.slide_id] == ("empty", "no tile has enough tissue: see qc.jpg")


def test_unknown_resolution_says_what_to_do(plain_csv, tmp_path):
    first = cohort.read(plain_csv)[0]
    first.he.unlink()
    Image.fromarray(np.full((600, 600, 3), 244, np.uint8)).save(first.he.with_suffix(".png"))
    edit_rows(
        plain_csv,
        lambda row: row.update(he=str(first.he.with_suffix(".png"))) if row["he"].endswith(first.he.name) else 0,
    )
    report, _ = run(plain_csv, tmp_path / "out")
    assert "mpp_he" in report.failed[0]["reason"]
    assert not run(plain_csv, tmp_path / "out", tile.Params(size=128, mpp=0.5, default_mpp=0.5))[0].failed


def test_the_partner_of_another_slide_is_rejected_aloud_and_the_tiles_are_kept(cohort_csv, tmp_path):
    slides = cohort.read(cohort_csv)
    wrong = slides[1].partners[0].path

    def swap(row):
        if row["slide_id"] != slides[0].slide_id:
            return False
        without_partners(row)
        row.update(partner_if=str(wrong), kind_if="image")
        return True

    edit_rows(cohort_csv, swap)
    report, said = run(cohort_csv, tmp_path / "out")
    assert report.rows[0]["state"] == "done"
    assert report.rows[0]["partners_left_out"].startswith("if: ")
    assert len(said) == 1
    assert "partner if is left out" in said[0]


def test_the_command_ends_with_1_when_a_slide_failed(plain_csv, tmp_path, capsys):
    arguments = ["tile", str(plain_csv), "--out", str(tmp_path / "out"), "--size", "128", "--workers", "0", "--quiet"]
    assert cli.main(arguments) == 0
    cohort.read(plain_csv)[0].he.write_bytes(b"no slide")
    assert cli.main(arguments) == 1
    assert "2 done, 0 empty, 1 failed (2 were done before)" in capsys.readouterr().out
    assert cli.main([*arguments, "--min-tissue", "2"]) == 2
    assert "0 to 1, not 2.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [{"size": 4}, {"mpp": 20.0}, {"max_pen": 1.5}, {"registration": "rigid"}, {"step": 0}, {"max_error_um": 0.0}],
)
def test_parameters_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=r"not|allowed"):
        tile.Params(**change)


def test_text_that_a_spreadsheet_would_run_is_quoted():
    assert tile.guard_formula("=cmd|' /C calc'!A0") == "'=cmd|' /C calc'!A0"
    assert tile.guard_formula("tumour") == "tumour"


def times_of(folder: Path) -> dict[str, int]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "status.json"]
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in files}


def test_slides_that_lie_where_the_results_go_are_refused_and_stay(plain_csv, tmp_path):
    slide = cohort.read(plain_csv)[0]
    inside = tmp_path / "dl" / "slides" / slide.slide_id / slide.he.name
    inside.parent.mkdir(parents=True)
    shutil.move(slide.he, inside)
    edit_rows(plain_csv, lambda row: row.update(he=str(inside)) if row["slide_id"] == slide.slide_id else None)
    with pytest.raises(ValueError, match=r"lies in .*slides, where the results go"):
        run(plain_csv, tmp_path / "dl")
    assert sorted(p.name for p in (tmp_path / "dl").rglob("*")) == sorted(["slides", slide.slide_id, slide.he.name])

    link = tmp_path / "link.svs"
    link.symlink_to(inside)
    edit_rows(plain_csv, lambda row: row.update(he=str(link)) if row["slide_id"] == slide.slide_id else None)
    with pytest.raises(ValueError, match="where the results go"):
        run(plain_csv, tmp_path / "dl")


@pytest.mark.parametrize("name", ["Slidedat.ini", "status.json/data"])
def test_a_folder_of_something_else_is_left_as_it_is(plain_csv, tmp_path, name):
    edit_rows(plain_csv, only_first(plain_csv))
    first = cohort.read(plain_csv)[0].slide_id
    stranger = tmp_path / "out" / "slides" / first / name
    stranger.parent.mkdir(parents=True)
    stranger.write_text("[GENERAL]")
    for _ in range(2):
        report, _ = run(plain_csv, tmp_path / "out")
        assert "did not write" in report.failed[0]["reason"]
        assert stranger.read_text() == "[GENERAL]"
        assert len(list(stranger.parent.iterdir())) == 1


def only_first(table: Path):
    first = cohort.read(table)[0].slide_id
    return lambda row: row["slide_id"] == first


def test_slides_that_are_away_for_a_while_keep_what_was_found(plain_csv, tmp_path):
    out, he = tmp_path / "out", cohort.read(plain_csv)[0].he.parent
    run(plain_csv, out)
    before = times_of(out / "slides")
    he.rename(tmp_path / "away")
    for _ in range(2):
        report, _ = run(plain_csv, out)
        assert len(report.failed) == 3
        assert all("there is no file" in row["reason"] for row in report.failed)
        assert not any(tile.is_done(out, s, PARAMS) for s in cohort.read(plain_csv))
    (tmp_path / "away").rename(he)
    report, said = run(plain_csv, out)
    assert (report.kept, report.failed, said) == (3, [], [])
    assert times_of(out / "slides") == before
    assert [row["state"] for row in report.rows] == ["done"] * 3


def test_a_slide_that_fails_in_the_middle_keeps_what_was_found(plain_csv, tmp_path, monkeypatch):
    edit_rows(plain_csv, only_first(plain_csv))
    run(plain_csv, tmp_path / "out")
    before = times_of(tmp_path / "out" / "slides")

    def fail(*_, **__):
        raise MemoryError("picture")

    with monkeypatch.context() as patch:
        patch.setattr(tile.qc, "qc_picture", fail)
        assert run(plain_csv, tmp_path / "out", tile.Params(size=96, mpp=0.5))[0].failed
    assert times_of(tmp_path / "out" / "slides") == before
    assert run(plain_csv, tmp_path / "out")[0].kept == 1


def test_what_a_killed_run_left_is_cleared(plain_csv, tmp_path):
    edit_rows(plain_csv, only_first(plain_csv))
    name = cohort.read(plain_csv)[0].slide_id
    left = tmp_path / "out" / "slides" / f".{name}.part"
    left.mkdir(parents=True)
    (left / "tiles.npz").write_bytes(b"half")
    assert not run(plain_csv, tmp_path / "out")[0].failed
    assert [p.name for p in (tmp_path / "out" / "slides").iterdir()] == [name]


@pytest.mark.parametrize("damage", ["removed", "cut", "flipped"])
def test_damaged_tiles_are_made_again(plain_csv, tmp_path, damage):
    edit_rows(plain_csv, only_first(plain_csv))
    run(plain_csv, tmp_path / "out")
    path = tmp_path / "out" / "slides" / cohort.read(plain_csv)[0].slide_id / "tiles.npz"
    whole = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] if damage == "cut" else whole.replace(whole[150:160], b"0123456789"))
    assert run(plain_csv, tmp_path / "out")[0].kept == 0
    assert path.read_bytes() == whole
    assert run(plain_csv, tmp_path / "out")[0].kept == 1


def test_data_that_moved_is_not_done_again(plain_csv, tmp_path):
    run(plain_csv, tmp_path / "out")
    moved = Path(shutil.move(plain_csv.parent, tmp_path / "elsewhere")) / plain_csv.name
    assert run(moved, tmp_path / "out")[0].kept == 3
    assert "elsewhere" in (tmp_path / "out" / "cohort.json").read_text()


def write_table(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(n for row in rows for n in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_partner_that_cannot_be_packed_fails_its_slide_alone_and_before_the_work(plain_csv, tmp_path):
    slide = cohort.read(plain_csv)[0]
    (tmp_path / "broken.tif").write_bytes(b"II*\0 no slide")
    (tmp_path / "notes.csv").write_text("x_um,y_um,note\n1,2,seen\n")
    (tmp_path / "places.csv").write_text("x,y,CD8A\n1,2,3\n")
    (tmp_path / "broken.json").write_text("{}")
    deep = np.zeros((600, 600, 3), np.uint16)
    tifffile.imwrite(tmp_path / "deep.ome.tif", deep, metadata={"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5})
    floats = np.zeros((600, 600), np.float32)
    tifffile.imwrite(tmp_path / "floats.ome.tif", floats, metadata={"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5})
    Image.fromarray(np.zeros((600, 600), np.uint8)).save(tmp_path / "no_mpp.png")
    changes = {
        "fine": {},
        "map": {"partner_a": "broken.tif", "kind_a": "map"},
        "float_map": {"partner_a": "floats.ome.tif", "kind_a": "map"},
        "float_image": {"partner_a": "floats.ome.tif"},
        "unknown_mpp": {"partner_a": "no_mpp.png", "kind_a": "map"},
        "no_genes": {"partner_a": "notes.csv"},
        "no_places": {"partner_a": "places.csv"},
        "transform": {"partner_a": str(slide.he), "transform_a": "broken.json"},
        "he_of_16_bits": {"he": "deep.ome.tif"},
    }
    rows = [{"slide_id": name, "case_id": "c", "he": str(slide.he)} | change for name, change in changes.items()]
    report, _ = run(write_table(tmp_path / "cohort.csv", rows), tmp_path / "out")
    reasons = {row["slide_id"]: row["reason"] for row in report.failed}
    assert sorted(reasons) == sorted(set(changes) - {"fine"})
    for name, part in {
        "map": "broken.tif",
        "float_map": "a map holds whole numbers, not float32",
        "float_image": "pixels are float32",
        "unknown_mpp": "mpp_a",
        "no_genes": "no column of numbers",
        "no_places": "lacks the columns",
        "transform": "broken.json",
        "he_of_16_bits": "H&E is RGB of 8 bits, this is 3 channels of uint16",
    }.items():
        assert part in reasons[name]
    assert (report.ledger.slides, report.ledger.tiles) == (1, report.rows[0]["tiles"])


def test_tiles_finer_than_the_slide_are_said_aloud(plain_csv, tmp_path):
    edit_rows(plain_csv, only_first(plain_csv))
    report, said = run(plain_csv, tmp_path / "out", tile.Params(size=128, mpp=0.25))
    assert not report.failed
    assert len(said) == 1
    assert "tiles of 0.25 um per pixel are enlarged 2.0 times from a slide of 0.5" in said[0]
    status = tile.read_status(tmp_path / "out", cohort.read(plain_csv)[0])
    assert any("enlarged" in note for note in status["notes"])
    assert run(plain_csv, tmp_path / "out", tile.Params(size=128, mpp=0.5))[1] == []


def test_the_gate_of_registration_is_as_narrow_as_asked_for(cohort_csv, tmp_path):
    def only_if(row):
        if row["slide_id"] != first:
            return False
        for column in row:
            if column.startswith(("partner_", "kind_", "transform_")) and not column.endswith("_if"):
                row[column] = ""
        return True

    first = cohort.read(cohort_csv)[0].slide_id
    edit_rows(cohort_csv, only_if)
    _, said = run(cohort_csv, tmp_path / "out", tile.Params(size=128, mpp=0.5, max_error_um=0.01))
    assert len(said) == 1
    assert "partner if is left out" in said[0]


def test_two_runs_do_not_work_in_one_folder(plain_csv, tmp_path):
    edit_rows(plain_csv, only_first(plain_csv))
    with only_one(tmp_path / "out"), pytest.raises(ValueError, match="at work"):
        run(plain_csv, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    assert not run(plain_csv, tmp_path / "out")[0].failed
    assert not (tmp_path / "out" / ".lock").exists()
