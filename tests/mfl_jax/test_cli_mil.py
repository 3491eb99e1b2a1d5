"""`mfl mil` from files to files."""

import json
from pathlib import Path

import h5py
import pytest
from PIL import Image

from mfl_jax import cli
from tests.mfl_jax.evaluators.mil import made


@pytest.fixture
def folder(tmp_path):
    given, table = made.bags(slides=24, signal=9.0)
    (tmp_path / "features").mkdir()
    for i, slide in enumerate(given.slides):
        with h5py.File(tmp_path / "features" / f"{slide}.h5", "w") as file:
            file["features"], file["coords"] = given.features[given.rows(i)], given.coords[given.rows(i)].astype(int)
            file.attrs["patch_size_level0"] = 64
    lines = [f"{s},{c},{'ab'[y]}" for s, c, y in zip(table.slides, table.cases, table.labels, strict=True)]
    (tmp_path / "slides.csv").write_text("slide_id,case_id,label\n" + "\n".join(lines) + "\n")
    return tmp_path


def command(folder, *more):
    return ["mil", str(folder / "features"), "--table", str(folder / "slides.csv"), "--out", str(folder / "out"), *more]


def test_features_and_a_table_become_a_report(folder, compile_cache, capsys):
    sizes = ["--folds", "2", "--inner", "2", "--seeds", "1", "--epochs", "15", "--tiles", "20", "--lr", "0.05"]
    assert cli.main(command(folder, "--heads", "meanpool", "--maps", "1", "--quiet", *sizes)) == 0
    assert capsys.readouterr().out.startswith(("auc 0.9", "auc 1.000"))
    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["cohort"] == {"Slides": 24, "Cases": 12, "Folds": 2, "Fits": 4}
    assert results["config"]["lr"] == [0.05]
    assert "2 slides have no tile or one" in results["reliability"][0]
    assert (folder / "out" / "report.html").is_file()
    with Image.open(folder / "out" / "pictures" / "roc0.jpg") as picture:
        assert picture.size == (420, 420)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--heads", "deepmill"), "did you mean 'deepmil'"),
        (("--folds", "40"), "40 folds of 12 cases"),
        (("--label", "grade"), "lacks the columns ['grade']"),
        (("--epochs", "0"), "epochs is 0"),
        (("--seeds", "0"), "seeds 0"),
    ],
)
def test_a_wrong_request_is_one_line(folder, more, message, capsys):
    assert cli.main(command(folder, *more)) == 2
    assert message in capsys.readouterr().err


def test_cases_of_pre_training_and_folders_may_have_spaces_and_equals_signs(tmp_path):
    from mfl_jax.cli.mil import _cases, _folders

    (tmp_path / "cases.txt").write_text("case 1\n\n case 2 \n")
    assert _cases(tmp_path / "cases.txt") == ["case 1", "case 2"]
    (tmp_path / "lr=1").mkdir()
    assert _folders([str(tmp_path / "lr=1")]) == {"lr=1": tmp_path / "lr=1"}
    assert _folders(["b=c/d", "e/f"]) == {"b": Path("c/d"), "f": Path("e/f")}


def test_a_list_of_heads_may_have_settings():
    from mfl_jax.cli.mil import _heads

    assert _heads("meanpool,chowder") == ["meanpool", "chowder"]
    assert _heads("chowder,top=5;clam") == ["chowder,top=5", "clam"]
