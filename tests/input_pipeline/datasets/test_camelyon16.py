"""The published folder as a table of slides with the official splits; slides that are known to be bad."""

import csv

import pytest

from input_pipeline.cohort import Slide, without
from input_pipeline.datasets.camelyon16 import write_table
from input_pipeline.excluded import excluded
from mfl_jax import bags, cli
from mfl_jax.evaluators import mil


@pytest.fixture
def root(tmp_path):
    train = [f"normal/normal_{i:03d}" for i in (1, 86, 87)] + [f"tumor/tumor_{i:03d}" for i in (1, 2)]
    files = [f"training/{name}" for name in train] + [f"testing/images/test_{i:03d}" for i in (1, 2, 49, 114)]
    for name in files:
        path = tmp_path / f"{name}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    reference = (
        "test_001,Tumor,IDC,Macro\ntest_002,Normal,None,None\ntest_049,Normal,None,None\ntest_114,Tumor,IDC,Micro\n"
    )
    (tmp_path / "testing" / "reference.csv").write_text(reference)
    return tmp_path


def test_the_official_splits_without_the_bad_slides(root, capsys):
    assert cli.main(["camelyon16", str(root), "--out", str(root / "slides.csv")]) == 0
    assert "5 slides".replace("5", "6") in capsys.readouterr().out
    with open(root / "slides.csv", newline="") as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert {name: (row["label"], row["split"]) for name, row in rows.items()} == {
        "normal_001": ("normal", "train"),
        "normal_087": ("normal", "train"),
        "tumor_001": ("tumor", "train"),
        "tumor_002": ("tumor", "train"),
        "test_001": ("tumor", "test"),
        "test_002": ("normal", "test"),
    }
    table = bags.read_table(root / "slides.csv")
    (fold,) = mil.read_splits(root / "slides.csv", table, inner=2)
    assert {table.slides[i] for i in fold.test} == {"test_001", "test_002"}


def test_all_slides_are_there_on_request_and_each_left_out_is_named(root):
    assert write_table(root, root / "all.csv", exclude="") == 9
    said = []
    assert write_table(root, root / "some.csv", say=said.append) == 6
    assert [line.split(" is left out: ")[0] for line in said] == ["normal_086", "test_049", "test_114"]
    (root / "testing" / "reference.csv").write_text("test_001,Benign\n")
    with pytest.raises(ValueError, match="row 1: the second field is Normal or Tumor, not 'benign'"):
        write_table(root, root / "x.csv")


def test_names_are_found_however_numbers_are_written(tmp_path):
    assert set(excluded("camelyon16", ["Normal_86", "normal_1", "Test_049", "test_490"])) == {"Normal_86", "Test_049"}
    (tmp_path / "bad.csv").write_text("slide_id\nb\n")
    slides = [Slide(name, name, tmp_path / name) for name in "ab"]
    assert [slide.slide_id for slide in without(slides, str(tmp_path / "bad.csv"))] == ["a"]
    with pytest.raises(ValueError, match="did you mean 'camelyon16'"):
        excluded("camelyon", ["a"])
