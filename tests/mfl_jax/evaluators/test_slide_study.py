"""Arms against each other: leaks, order, seeds, what is planted and what is not, and the record on disk."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from mfl_jax import slide_level, statistics
from mfl_jax.evaluators import mil, slide_knn, slide_study
from mfl_jax.evaluators.slide_study import SlideArm
from mfl_jax.evaluators.tasks import LeakError
from tests.mfl_jax.evaluators import slides_made

OPTIONS = {"folds": 4, "resamples": 200, "shares": (1.0, 0.5)}
WAYS = ("knn", "linear", "meanpool")


@pytest.fixture(scope="module")
def done(compile_cache):
    bags, table = slides_made.slides(shift=3.0)
    noise = dataclasses.replace(bags, features=np.random.default_rng(1).standard_normal(bags.features.shape))
    noise = dataclasses.replace(noise, features=noise.features.astype(np.float32))
    arms = [
        SlideArm("signal", (bags,), (), title="Signal"),
        SlideArm("noise", (noise, noise), ("elsewhere",), kind="baseline"),
        SlideArm("again", (bags,), ()),
        SlideArm("unsaid", (noise,), None, skip=("linear", "meanpool")),
    ]
    return arms, table, slide_study.study(arms, table, WAYS, epochs=30, **OPTIONS)


def test_what_is_planted_is_found_what_is_not_is_chance_and_the_difference_is_said(done):
    _, _, study = done
    for way in WAYS[:2]:
        assert study.scored["signal", way, 1.0].metrics["auc"].value > 0.9
    for way in WAYS:
        assert abs(study.scored["noise", way, 1.0].metrics["auc"].value - 0.5) < 0.3
    gaps = {name: d for name, d in study.differences if (d.first, d.second) == ("signal", "noise")}
    assert gaps["knn/1/auc"].interval.low > 0
    assert study.found["signal"].metrics["recall_1"].value > study.found["noise"].metrics["recall_1"].value
    ps = [d.p for _, d in study.differences]
    assert [d.p_holm for _, d in study.differences] == pytest.approx(statistics.holm(ps).tolist())
    assert ("unsaid", "linear", 1.0) not in study.scored


def test_slides_in_another_order_give_the_same_figures(done):
    arms, table, study = done
    mixed = [dataclasses.replace(a, bags=tuple(slides_made.turned(b, table)[0] for b in a.bags)) for a in arms]
    other = slides_made.turned(arms[0].bags[0], table)[1]
    assert other.slides != table.slides
    again = slide_study.study(mixed, other, WAYS, epochs=30, **OPTIONS)
    assert again.table.slides == study.table.slides
    for way in WAYS:
        for share in (1.0, 0.5):
            one, two = (s.scored["signal", way, share].stack for s in (study, again))
            np.testing.assert_allclose(one, two, atol=1e-6)


def test_arms_share_a_program_and_get_what_each_would_alone(done):
    _, _, study = done
    for share in (1.0, 0.5):
        first, other, again = (study.scored[name, "meanpool", share].stack for name in ("signal", "noise", "again"))
        np.testing.assert_allclose(first, again, atol=1e-6)
        assert abs(first - other).max() > 0.1


def test_every_slide_is_tested_also_those_of_no_region_and_of_one(done):
    arms, table, study = done
    assert arms[0].bags[0].lengths[:2].tolist() == [0, 1]
    for scored in study.scored.values():
        assert scored.stack.shape[1] == len(table.slides)
        assert np.isfinite(scored.stack).all()
    assert (study.scored["signal", "linear", 1.0].stack != 0).all()


def test_an_encoder_that_has_seen_a_tested_case_is_refused_or_marked(done):
    arms, table, _ = done
    seen = dataclasses.replace(arms[0], pretrained=("c03", "x"))
    with pytest.raises(LeakError, match="1 of 40 cases that would be tested: c03"):
        slide_study.study([seen], table, ("knn",), **OPTIONS)
    marked = slide_study.study([seen, arms[1]], table, ("knn",), transductive=True, **OPTIONS)
    assert marked.modes == {"signal": "transductive", "noise": "inductive"}
    results = slide_level.results_of(marked, "t", "q")
    assert [arm["title"] for arm in results["arms"]] == ["Signal (transductive)", "noise"]
    assert "Transductive" in results["reliability"][0]


@pytest.mark.slow
def test_a_head_in_place_of_another_and_several_classes(compile_cache):
    bags, table = slides_made.slides(classes=3, shift=4.0)
    arms = [SlideArm("a", (bags,), ()), SlideArm("b", (bags,), (), instead={"meanpool": "maxpool"})]
    study = slide_study.study(arms, table, ("knn", "meanpool"), epochs=3, **OPTIONS | {"shares": (1.0,)})
    assert study.scored["a", "knn", 1.0].stack.shape == (1, len(table.slides), 3)
    assert study.scored["a", "knn", 1.0].metrics["auc"].value > 0.9
    a, b = (study.scored[name, "meanpool", 1.0].stack for name in "ab")
    np.testing.assert_allclose(a.sum(-1), 1, rtol=1e-5)
    assert not np.allclose(a, b)
    assert "b has maxpool" in slide_level.results_of(study, "t", "q")["tasks"][1]["what"]


def test_the_recipe_of_hipt_is_the_papers():
    found = slide_study.recipe("hipt,width=96")
    assert (found.settings.batch, found.settings.epochs, found.lr, found.decay) == (1, 20, 2e-4, 1e-5)
    assert slide_study.recipe("deepmil", 3).settings.epochs == 3


def test_the_auc_within_folds_is_that_of_the_pairs_of_each_fold():
    draw = np.random.default_rng(0)
    labels, fold = draw.integers(0, 2, 40), draw.integers(0, 4, 40)
    scores = draw.integers(0, 6, 40) / 6 + fold  # scales that do not agree
    weights = draw.integers(0, 3, (5, 40)).astype(float)
    found = statistics.auc_within(fold)(labels, scores, weights)
    for w, value in zip(weights, found, strict=True):
        right = pairs = 0.0
        for i in np.flatnonzero(labels == 1):
            for j in np.flatnonzero((labels == 0) & (fold == fold[i])):
                pairs += w[i] * w[j]
                right += w[i] * w[j] * (float(scores[i] > scores[j]) + 0.5 * float(scores[i] == scores[j]))
        assert value == pytest.approx(right / pairs)


def test_the_record_has_figures_folds_and_predictions(done, tmp_path):
    _, _, study = done
    results, page = slide_level.write(tmp_path, study, notes=("made up",), more={"cohort": {"Region": "64 px"}})
    on_disk = json.loads((tmp_path / "results.json").read_text())
    assert on_disk["arms"] == json.loads(json.dumps(results["arms"]))
    noise = on_disk["arms"][1]
    scored = study.scored["noise", "knn", 0.5]
    assert noise["metrics"]["knn/0.5/auc"]["mean"] == scored.metrics["auc"].value
    assert noise["metrics"]["knn/0.5/auc_by_fold"]["mean"] == pytest.approx(np.mean(scored.folds))
    assert len(noise["seeds"]) == 2
    assert {line["metric"] for line in on_disk["labels"]} == {
        "AUC, Nearest slides",
        "AUC, Linear on the mean",
        "AUC, Head meanpool",
    }
    assert {made["arm"] for made in on_disk["projections"]} == {"signal", "noise", "again", "unsaid"}
    assert "unsaid (pre-training unknown)" in page.read_text()
    made = len(study.differences)
    said = f"{made} differences on 200 resamples: after Holm's correction the least p can be {2 * made / 201:.2g}"
    assert any(said in note for note in on_disk["reliability"])
    rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    mean = study.scored["signal", "linear", 1.0].stack.mean(0)
    np.testing.assert_allclose([float(row["signal linear 1"]) for row in rows], mean, rtol=1e-5)
    again = mil.read_splits(tmp_path / "folds.csv", study.table)
    assert [fold.test.tolist() for fold in again] == [sorted(draw.test.tolist()) for draw in study.draws[1.0]]
    assert slide_knn.strata(study.draws[1.0]).tolist() == [int(row["fold"]) for row in rows]


def test_a_wrong_request_is_refused_before_anything_is_fitted(done):
    arms, table, _ = done
    for options, message in (
        ({"ways": ("knnn",)}, "no head of bags is called 'knnn'"),
        ({"pairs": [("signal", "dino")]}, "no such arms: dino"),
        ({"head_seeds": 0}, "head_seeds is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            slide_study.study(arms, table, **{"ways": ("knn",), **OPTIONS, **options})
    with pytest.raises(ValueError, match="a name of its own"):
        slide_study.study([arms[0], arms[0]], table, ("knn",), **OPTIONS)
