"""`mfl mil` from files to files."""

import json
from pathlib import Path

import h5py
import pytest
from PIL import Image

from mfl_jax import bags, cli
from mfl_jax.evaluators import mil
from tests.mfl_jax.evaluators.mil import made

SIZES = ["--folds", "2", "--inner", "2", "--seeds", "1", "--epochs", "15", "--tiles", "20", "--lr", "0.05"]


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
    assert cli.main(command(folder, "--heads", "meanpool", "--maps", "1", "--quiet", *SIZES)) == 0
    assert capsys.readouterr().out.startswith(("auc 0.9", "auc 1.000"))
    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["cohort"] == {"Slides": 24, "Cases": 12, "Folds": 2, "Fits": 4}
    assert results["config"]["lr"] == [0.05]
    assert "2 slides have no tile or one" in results["reliability"][0]
    assert (folder / "out" / "report.html").is_file()
    with Image.open(folder / "out" / "pictures" / "roc0.jpg") as picture:
        assert picture.size == (420, 420)


def test_features_that_know_their_encoder_are_labelled_without_a_word(folder, compile_cache, capsys):
    (folder / "features" / "encoder.json").write_text(json.dumps({"train_cases": ["c03", "elsewhere"]}))
    assert cli.main(command(folder, "--heads", "meanpool", "--maps", "0", "--quiet", *SIZES)) == 0
    assert "of 2 cases that the encoder was trained on, 1 are in the table: transductive" in capsys.readouterr().err
    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["reliability"][0] == "Transductive: the encoder was trained on cases of this table (features)."


def test_official_splits_may_name_slides_that_are_left_out(folder):
    table = bags.read_table(folder / "slides.csv")
    (folder / "bad.csv").write_text("slide_id,why\ns03,it is a duplicate\n")
    lines = [f"{s},{'test' if c < 'c04' else 'train'}" for s, c in zip(table.slides, table.cases, strict=True)]
    (folder / "splits.csv").write_text("slide_id,split\n" + "\n".join(lines) + "\n")
    said = []
    kept = bags.without(table, str(folder / "bad.csv"), said.append)
    assert said == ["s03 is left out: it is a duplicate"]
    assert kept.slides == tuple(s for s in table.slides if s != "s03")
    assert kept.labels.tolist() == [y for s, y in zip(table.slides, table.labels, strict=True) if s != "s03"]
    (fold,) = mil.read_splits(folder / "splits.csv", kept, inner=2, left_out=["s03"])
    assert [kept.slides[i] for i in fold.test] == [f"s{i:02d}" for i in (0, 1, 2, 4, 5, 6, 7)]
    with pytest.raises(ValueError, match="1 ids are not in the table: s03"):
        mil.read_splits(folder / "splits.csv", kept, inner=2)


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
