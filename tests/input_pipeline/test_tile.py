import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from input_pipeline import cohort, tile
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
    "change", [{"size": 4}, {"mpp": 20.0}, {"max_pen": 1.5}, {"registration": "rigid"}, {"step": 0}]
)
def test_parameters_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=r"not|allowed"):
        tile.Params(**change)


def test_text_that_a_spreadsheet_would_run_is_quoted():
    assert tile.guard_formula("=cmd|' /C calc'!A0") == "'=cmd|' /C calc'!A0"
    assert tile.guard_formula("tumour") == "tumour"
