"""The script of evidence on two levels, at its smallest size, and the words that follow from its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mfl_jax.demo import levels
from mfl_jax.evaluators import slide_study
from mfl_jax.evaluators.slide_study import SlideArm
from tests.mfl_jax.evaluators import slides_made

ROOT = Path(__file__).parents[3]


def test_a_claim_is_shown_by_its_paired_difference_alone():
    bags, table = slides_made.slides(shift=4.0)
    dull = slides_made.slides(shift=0.0)[0]
    names = ("slpd", "dino", "slpd-told", "dino-told", "mean", "mixture", "purity", "arrangement")
    arms = [SlideArm(n, (dull if n in ("mean", "mixture") else bags,), (), title=n.upper()) for n in names]
    study = slide_study.study(
        arms, table, ("knn", "linear"), folds=4, resamples=4000, retrieve=False, pairs=levels.CLAIM
    )
    told = levels.compared(study, "knn", 1.0, "slpd", "dino")
    assert told.startswith("SLPD 0.9")
    assert told.endswith("+0.000 [+0.000, +0.000], p 1, not shown")
    assert levels.compared(study, "knn", 1.0, "dino", "mean").endswith("shown")
    answer = levels.answer(study)
    assert "SLPD is clearly above DINO in 0 of 4 figures, below in 0; DINO is clearly above MEAN in 4 of 4" in answer
    assert "DINO-TOLD is clearly above MIXTURE in 4 of 4 figures" in answer
    assert "with all labels: SLPD 0.9" in answer
    assert answer.count("DINO-TOLD 0.9") == 1
    assert "2 runs collapsed" in levels.answer(study, ["one", "two"])
    assert "from the arrangement" in levels.written(study)


def test_a_run_that_ended_collapsed_is_named(tmp_path):
    for name, last in (("dino-0", 1.0), ("slpd-0", 0.0)):
        rows = [{"step": 9, "collapsed": 1.0}, {"step": 19, "collapsed": last}, {"step": 20, "note": "saved"}]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = {"transductive": {"dino": [tmp_path / "dino-0"], "slpd": [tmp_path / "slpd-0"]}}
    assert levels.collapsed(runs) == ["Collapsed at step 19: dino-seen, dino-0."]


@pytest.mark.slow
def test_the_script_runs_at_its_smallest_size_and_goes_on(tmp_path):
    command = [sys.executable, "colab/slpd_on_phantom.py", "--out", str(tmp_path / "out"), "--size", "tiny"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    first = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    modes = {arm["name"]: arm["mode"] for arm in results["arms"]}
    assert {name for name, mode in modes.items() if mode == "transductive"} == {"dino-seen", "slpd-seen", "mean-seen"}
    assert set(modes.values()) == {"transductive", "inductive"}
    keys = {d["metric"] for d in results["differences"] if (d["a"], d["b"]) == ("slpd", "abmil")}
    assert keys == {"hipt/1/auc", "hipt/0.25/auc"}
    assert (tmp_path / "out" / "report.html").stat().st_size > 20_000
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0
    assert "0 of 13 runs to train" in again.stdout
