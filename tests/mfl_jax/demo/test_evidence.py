"""Slides from features of several encoders as arms of one comparison, and the words that follow from its figures."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from mfl_jax import report, trained
from mfl_jax.bags import Table
from mfl_jax.demo import claims, evidence
from mfl_jax.evaluators import LeakError, mil
from mfl_jax.findings import ArmRuns, Seed

ROOT = Path(__file__).parents[3]
CASES, TILES, DIM = 16, 12, 4


class Tiles:
    splits: ClassVar = {"train": ["seen"], "test": [f"c{i:02d}" for i in range(CASES)]}


def made(tmp_path, pretrained=("seen",)):
    """A slide a case; one tile of the positive ones is told by feature 0 of the good encoder, of two seeds."""
    rng = np.random.default_rng(0)
    labels = np.arange(CASES) % 2
    case = np.repeat(Tiles.splits["test"], TILES)
    columns = {"case": case, "slide": case, "x": np.tile(np.arange(TILES), CASES), "y": np.zeros(len(case))}
    marked = np.arange(len(case)) % TILES == 5
    seeds = []
    for seed in range(2):
        features = rng.normal(size=(len(case), DIM)).astype(np.float32)
        features[:, 0] += 8 * (marked & (np.repeat(labels, TILES) == 1))
        logits = np.stack([np.zeros(len(case)), features[:, 0]], 1)
        seeds.append(Seed(seed, features, {"tile": logits}, pretrained=tuple(pretrained)))
    dull = tuple(replace(s, features=rng.normal(size=s.features.shape).astype(np.float32)) for s in seeds)
    arms = (ArmRuns("good", "Good", "ours", tuple(seeds)), ArmRuns("dull", "Dull", "baseline", dull))
    found = evidence.Found(arms, columns, {"run": "digest"}, ())
    table = Table(tuple(Tiles.splits["test"]), tuple(Tiles.splits["test"]), labels, ("0", "1"))
    scale = replace(
        evidence.SCALES["tiny"],
        folds=2,
        inner=2,
        resamples=80,
        settings=mil.Settings(epochs=150, batch=8, patience=150),
    )
    return evidence.Work(tmp_path / "out", scale, "tiny", 0), found, table


def test_heads_on_encoders_become_arms_and_are_not_trained_twice(tmp_path, compile_cache, monkeypatch):
    work, found, table = made(tmp_path)
    heads = ("maxpool", "meanpool")
    arms = evidence.slide_arms(work, found, table, "lesion", heads, say=lambda line: None)
    names = [f"{encoder}/{head}" for encoder in ("good", "dull") for head in heads]
    assert [(arm.name, len(arm.seeds)) for arm in arms] == [(name, 2) for name in names]
    arms.append(evidence.ceiling(found, "good", "tile", table, "lesion", top=1))
    pairs = [("good/maxpool", "dull/maxpool"), ("good/maxpool", "good/top1")]
    judged = evidence.judge_slides(work, Tiles, table, "lesion", arms, pairs)
    report.validate({"title": "t", "question": "q", "answer": "a", "created": "now", "version": "0"} | judged)
    auc = {arm["name"]: arm["metrics"]["lesion/auc"]["mean"] for arm in judged["arms"]}
    assert auc["good/top1"] == 1
    assert auc["good/maxpool"] > 0.8 > auc["dull/maxpool"]
    assert "1 cases" not in judged["intervals"]
    monkeypatch.setattr(evidence.mil, "study", lambda *given, **more: pytest.fail("trained again"))
    again = evidence.slide_arms(work, found, table, "lesion", heads, say=lambda line: None)
    for one, other in zip(arms, again, strict=False):
        np.testing.assert_array_equal(one.seeds[1].predictions["lesion"], other.seeds[1].predictions["lesion"])
    assert evidence._stored(tmp_path / "none.npz", work, found, table) is None
    kept = work.out / "predictions" / "lesion" / "maxpool" / "good-0.npz"
    assert evidence._stored(kept, work, found, table) is not None
    assert evidence._stored(kept, work, replace(found, digests={"run": "another"}), table) is None


def test_told_kinds_are_an_arm_that_has_seen_no_case():
    kinds = np.array([0, 2, 2, 1])
    columns = {"region": kinds, "region_share": np.array([1.0, 1.0, 0.6, 0.5])}
    found = evidence.told_kinds(evidence.Found((), columns, {}, ()))
    (arm,) = found.arms
    assert (arm.name, arm.kind, arm.seeds[0].pretrained) == ("told", "ceiling", ())
    assert arm.seeds[0].features.argmax(1).tolist() == [0, 2, 5, 4]


def test_the_effective_rank_is_the_number_of_independent_directions():
    x = np.random.default_rng(0).normal(size=(9000, 3))
    assert evidence.effective_rank(x) == pytest.approx(3, abs=0.05)
    assert evidence.effective_rank(np.concatenate([x, 5 * x, -x], 1)) == pytest.approx(3, abs=0.05)
    assert evidence.effective_rank(x[:, :1] * np.ones((1, 8))) == pytest.approx(1, abs=1e-6)


def test_an_encoder_that_has_seen_a_tested_case_is_refused(tmp_path):
    work, found, table = made(tmp_path, pretrained=("c03",))
    arms = [evidence.ceiling(found, "good", "tile", table, "lesion", top=1)]
    with pytest.raises(LeakError, match="cases of pre-training are in the validation or test split: c03"):
        evidence.judge_slides(work, Tiles, table, "lesion", arms, [])


def judged(gain: tuple, short: tuple) -> dict:
    """Two heads on one encoder, above `random` by `gain` (difference, low, high, p), to the ceiling by `short`."""

    def row(a, b, difference, low, high, p):
        return {"a": a, "b": b, "metric": "lesion/auc", "difference": difference, "low": low, "high": high, "p_holm": p}

    means = {"ssl/a": 0.9, "ssl/b": 0.95, "random/a": 0.7, "random/b": 0.7, "where": 0.96}
    arms = [
        {"name": n, "title": n.upper(), "metrics": {"lesion/auc": {"mean": m, "low": m - 0.1, "high": 1.0}}}
        for n, m in means.items()
    ]
    rows = [row(f"ssl/{h}", f"random/{h}", *gain) for h in "ab"] + [row("ssl/b", "where", *short)]
    return {"arms": arms, "differences": rows}


@pytest.mark.parametrize(
    ("gain", "short", "first", "second"),
    [
        ((0.2, 0.1, 0.3, 0.01), (-0.01, -0.015, 0.0, 1.0), "lifts every head above random", "within 0.02 of it."),
        (
            (0.2, -0.1, 0.3, 0.2),
            (-0.01, -0.05, 0.0, 1.0),
            "lifts 0 of 2 heads clearly",
            "is likelier than not, and not shown.",
        ),
        ((-0.2, -0.3, -0.1, 0.01), (-0.2, -0.3, -0.1, 0.01), "and lowers 2 above", "not within 0.02 of it."),
        ((0.2, 0.1, 0.3, 0.01), (-0.03, -0.05, 0.0, 1.0), "lifts every head", "is unlikely, and not shown."),
        ((0.2, 0.1, 0.3, 0.01), (-0.03, None, None, 1.0), "lifts every head", "there are too few cases to say more."),
    ],
)
def test_claims_follow_intervals(gain, short, first, second):
    found = judged(gain, short)
    assert first in claims.lifted(found, "lesion", ("a", "b"), ("ssl",), "random")
    told = "Lesion, ssl/a: a 0.900 [0.800, 1.000], b 0.950 [0.850, 1.000]."
    assert claims.reached(found, "lesion", ("a", "b"), "ssl") == told
    said = claims.near_ceiling(found, "lesion", ("a", "b"), ("ssl",), "where", within=0.02)
    assert said.startswith("The best head without such labels, SSL/B, has an AUC of 0.950, the ceiling 0.960")
    assert said.endswith(second)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mil_on_phantom", "retrieval_on_phantom"])
def test_a_script_runs_to_its_report_and_goes_on(name, tmp_path_factory):
    out = tmp_path_factory.getbasetemp() / "evidence" / name  # both share slides and runs
    command = [sys.executable, str(ROOT / "colab" / f"{name}.py"), "--out", str(out), "--size", "tiny"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, check=True, env=environment, timeout=1200, cwd=tmp_path_factory.getbasetemp())
    results = json.loads((out / "results.json").read_text())
    report.validate(results)
    assert (out / "report.html").stat().st_size > 10_000
    assert not any("transductive" in arm["title"] for arm in results["arms"])
    keys = {metric["key"] for task in results["tasks"] for metric in task["metrics"]}
    wanted = {"lesion/auc", "subtype/auc"} if name.startswith("mil") else {"tissue/retrieval/map", "addr/local"}
    assert wanted <= keys
    if name.startswith("mil"):
        config, facts, *_ = trained.read_run(out.parent / "phantom-tiny" / "annotated" / "runs" / "where-0")
        assert len(facts.train_cases) == evidence.SCALES["tiny"].annotated
        assert all(case.startswith("annotated") for case in facts.train_cases)
        steps = evidence.SCALES["tiny"].annotated_steps
        assert results["config"]["where"]["total"]["steps"] == config.total.steps == steps
        assert "tile set, Slides of the ceiling" in results["hashes"]
