"""`mfl slides` from files to files."""

import json

import h5py
import numpy as np
import pytest

from mfl_jax import cli, slide_arms
from tests.mfl_jax.evaluators import slides_made


def write(folder, bags, cases=None):
    folder.mkdir()
    for i, slide in enumerate(bags.slides):
        with h5py.File(folder / f"{slide}.h5", "w") as file:
            file["features"], file["coords"] = bags.features[bags.rows(i)], bags.coords[bags.rows(i)].astype(int)
    if cases is not None:
        (folder / "encoder.json").write_text(json.dumps({"encoder": "dino", "train_cases": list(cases)}))


@pytest.fixture
def folder(tmp_path):
    bags, table = slides_made.slides(cases=24, shift=4.0)
    write(tmp_path / "regions", bags)
    write(tmp_path / "seen", bags, ("c05", "c06"))
    lines = [f"{s},{c},{'ab'[y]}" for s, c, y in zip(table.slides, table.cases, table.labels, strict=True)]
    (tmp_path / "slides.csv").write_text("slide_id,case_id,label\n" + "\n".join(lines) + "\n")
    (tmp_path / "cases.txt").write_text("c01\nc02\n")
    return tmp_path


def command(folder, *more):
    of_files = ["--table", str(folder / "slides.csv"), "--out", str(folder / "out")]
    return ["slides", *of_files, "--folds", "3", "--resamples", "50", "--ways", "knn", *more]


def test_two_seeds_of_an_arm_become_a_report(folder, capsys):
    arm = f"dino={folder / 'regions'}"
    assert cli.main(command(folder, arm, arm, f"other={folder / 'regions'}")) == 0
    printed = capsys.readouterr().out
    assert "Nearest slides; 25 % of the labels" in printed
    results = json.loads((folder / "out" / "results.json").read_text())
    assert [(arm["name"], len(arm["seeds"]), arm["mode"]) for arm in results["arms"]] == [
        ("dino", 2, "unknown"),
        ("other", 1, "unknown"),
    ]
    assert {d["difference"] for d in results["differences"]} == {0.0}
    assert results["cohort"]["Cases"] == 24
    assert "dino: 7 slides have no tile or one; they are kept" in results["reliability"]


def test_cases_of_pre_training_are_refused_marked_or_held_out(folder, capsys):
    given = [f"a={folder / 'regions'}", f"b={folder / 'seen'}", "--pretrained", f"a={folder / 'cases.txt'}"]
    assert cli.main(command(folder, *given)) == 2
    assert "2 of 24 cases that would be tested: c01, c02" in capsys.readouterr().err
    assert cli.main(command(folder, *given, "--transductive")) == 0
    results = json.loads((folder / "out" / "results.json").read_text())
    assert [arm["mode"] for arm in results["arms"]] == ["transductive", "transductive"]
    assert cli.main(command(folder, *given, "--held-out")) == 0
    results = json.loads((folder / "out" / "results.json").read_text())
    assert [arm["mode"] for arm in results["arms"]] == ["inductive", "inductive"]
    assert results["cohort"]["Cases"] == 20
    assert any("4 cases" in note for note in results["reliability"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("x=nowhere",), "nowhere is no folder"),
        (("a={0}/regions", "--pairs", "a"), "--pairs is a:b"),
        (("a={0}/regions", "--pretrained", "b={0}/cases.txt"), "no such arms: b"),
        (("a={0}/regions", "--pretrained", "a=gone"), "--pretrained is NAME=RUN"),
        (("a={0}/regions@{0}",), "is no run"),
        (("a={0}/regions", "--folds", "2"), "at least 3"),
    ],
)
def test_a_wrong_request_is_one_line(folder, more, message, capsys):
    assert cli.main(command(folder, *(text.format(folder) for text in more))) == 2
    assert message in capsys.readouterr().err


def test_files_say_which_cases_their_encoder_saw(folder):
    asked = slide_arms.parse([f"a={folder / 'regions'}", f"b={folder / 'seen'}"])
    assert slide_arms.seen_cases(asked, {}) == {"a": None, "b": ("c05", "c06")}
    assert slide_arms.seen_cases(asked, {"a": ["z"], "b": ["c07"]}) == {"a": ("z",), "b": ("c05", "c06", "c07")}


def test_seeds_of_an_arm_have_one_width(folder):
    bags, table = slides_made.slides(cases=24, dim=3)
    write(folder / "narrow", bags)
    asked = slide_arms.parse([f"a={folder / 'regions'}", f"a={folder / 'narrow'}"])
    with pytest.raises(ValueError, match=r"seeds of arm 'a' have features of \[3, 6\]"):
        slide_arms.collect(asked, table, {"a": None})
    assert np.unique(table.labels).tolist() == [0, 1]
