"""Arms in, results.json out: figures that can be recomputed by hand, and a document that the report takes."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mfl_jax import evaluation, report
from mfl_jax.evaluation import assemble
from mfl_jax.evaluators import LeakError, Task, clusters, few_label, probe, retrieval
from mfl_jax.findings import ArmRuns, Seed
from tests.mfl_jax.evaluators.cohort import cohort

pytestmark = pytest.mark.usefixtures("compile_cache")
TASK = Task("label")
OPTIONS = {"resamples": 60}


@pytest.fixture(scope="module", name="made")
def made_fixture():
    return cohort()


def arms(made, **weak) -> list[ArmRuns]:
    """'good' has the signal, 'weak' a tenth of it; three seeds and two."""
    good = tuple(Seed(s, cohort()["features"] + 0.1 * noise(s)) for s in range(3))
    dull = made["features"] * np.array([0.1] + [1] * 7, np.float32)
    poor = tuple(Seed(s, dull + 0.3 * noise(10 + s)) for s in range(2))
    return [ArmRuns("good", "Good", "ours", good), ArmRuns("weak", "Weak", "baseline", poor, **weak)]


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(288, 8)).astype(np.float32)


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    above = scores[labels == 1][:, None] - scores[labels == 0][None]
    return float(np.mean(np.where(above == 0, 0.5, above > 0)))


def whole(found: dict) -> dict:
    return {"title": "t", "question": "q", "answer": "a", "created": "now", "version": "0"} | found


def test_a_figure_is_the_mean_over_seeds_and_a_difference_is_of_those_means(made):
    given = arms(made)
    found = assemble(given, made["columns"], made["splits"], [TASK], **OPTIONS)
    report.validate(whole(found))
    json.dumps(found, allow_nan=False)
    expected = {}
    for arm, row in zip(given, found["arms"], strict=True):
        results = [probe.evaluate(s.features, made["columns"], made["splits"], TASK, resamples=0) for s in arm.seeds]
        each = [auc(r.labels, r.scores) for r in results]
        assert [s["metrics"]["label/auc"] for s in row["seeds"]] == pytest.approx(each, abs=1e-12)
        assert [s["seed"] for s in row["seeds"]] == [s.seed for s in arm.seeds]
        interval = row["metrics"]["label/auc"]
        assert interval["mean"] == pytest.approx(np.mean(each), abs=1e-12)
        assert interval["low"] < interval["mean"] < interval["high"]
        expected[arm.name] = np.mean(each)
    (d,) = found["differences"]
    assert (d["a"], d["b"], d["metric"]) == ("good", "weak", "label/auc")
    assert d["difference"] == pytest.approx(expected["good"] - expected["weak"], abs=1e-12)
    assert 0 < d["low"] < d["difference"] < d["high"]
    assert [m["key"] for m in found["tasks"][0]["metrics"]][:2] == ["label/auc", "label/balanced_accuracy"]
    assert "Good, Weak" in found["reliability"][0]


def test_holm_is_over_every_difference_that_is_made(made):
    tasks = [TASK, Task("positive", "positive", 0.5)]
    third = ArmRuns("none", "None", "baseline", (Seed(0, noise(99)),))
    found = assemble([*arms(made), third], made["columns"], made["splits"], tasks, kinds=("probe", "knn"), **OPTIONS)
    rows = found["differences"]
    assert len(rows) == 3 * 2 * 2
    order = sorted(range(len(rows)), key=lambda i: rows[i]["p"])
    worst = 0.0
    for rank, i in enumerate(order):
        worst = max(worst, rows[i]["p"] * (len(rows) - rank))
        assert rows[i]["p_holm"] == pytest.approx(min(1.0, worst))
    assert {t["name"] for t in found["tasks"]} == {"label", "positive", "label/knn", "positive/knn"}
    some = assemble(arms(made), made["columns"], made["splits"], tasks, pairs=[("weak", "good")], **OPTIONS)
    assert [(d["a"], d["b"]) for d in some["differences"]] == [("weak", "good")] * 2


def test_predictions_of_a_trained_head_stand_in_for_the_probe_of_that_task_alone(made):
    truth = made["columns"]["label"].astype(float)
    given = [ArmRuns("end", "End to end", "ceiling", (Seed(0, noise(1), predictions={"label": truth}),))]
    tasks = [TASK, Task("positive", "positive", 0.5)]
    found = assemble(given, made["columns"], made["splits"], tasks, **OPTIONS)["arms"][0]["metrics"]
    assert found["label/auc"]["mean"] == 1.0
    assert found["positive/auc"]["mean"] < 0.8


def test_every_kind_fills_its_section_and_what_is_left_out_is_said(made):
    targets = {"if/a": made["columns"]["positive"], "if/b": np.ones(288), "ihc/c": made["columns"]["positive"] ** 2}
    given = [
        replace(arm, seeds=arm.seeds[:count])
        for arm, count in zip(arms(made, skip=("few_label",)), (2, 1), strict=True)
    ]
    kinds = tuple(kind for kind in evaluation.KINDS if kind != "distance_ratio")  # its tiles have places
    options = {"kinds": kinds, "targets": targets, "resamples": 40}
    found = assemble(given, made["columns"], made["splits"], [TASK], **options)
    report.validate(whole(found))
    keys = set(found["arms"][0]["metrics"])
    assert {"label/auc", "label/knn/auc", "label/paper_head/auc", "decode/if/a", "decode/ihc/c"} <= keys
    assert {"batch_effect/nearest", "batch_effect/linear", "batch_effect/silhouette"} <= keys
    assert "decode/if/b" not in keys
    assert any("if/b does not vary" in note for note in found["reliability"])
    assert "Weak: few_label was left out, for it means nothing here" in found["reliability"]
    assert [(row["arm"], row["by"]) for row in found["labels"]] == [("good", "cases"), ("good", "tiles")]
    assert found["labels"][0]["x"] == [0.1, 0.25, 1.0]  # fewer than one of so few cases is not to be had
    assert any("1% of the cases are no fewer labels than the next" in note for note in found["reliability"])
    for line in found["labels"]:
        assert line["tiles"] == sorted(set(line["tiles"]))
        assert len(line["cases"]) == len(line["x"])
    full = found["arms"][0]["metrics"]["label/auc"]["mean"]
    assert found["labels"][0]["y"][-1] == pytest.approx(full, abs=0.02)
    assert found["labels"][0]["y"][0] < full
    decoded = found["arms"][0]["metrics"]["decode/if/a"]
    assert 0.5 < decoded["low"] < decoded["mean"] < decoded["high"] <= 1
    (effect,) = [task for task in found["tasks"] if task["name"] == "batch_effect"]
    assert all(0 < m["chance"] < 0.2 for m in effect["metrics"] if "chance" in m)
    options = {"kinds": ("batch_effect",), "slide_probe": False, **OPTIONS}
    less = assemble(given, made["columns"], made["splits"], [], **options)
    assert [m["key"].split("/")[1] for m in less["tasks"][0]["metrics"]] == ["nearest", "silhouette"]
    assert set(less["arms"][0]["metrics"]) == {"batch_effect/nearest", "batch_effect/silhouette"}


def test_few_labels_have_a_table_and_a_paired_difference_to_an_arm_that_was_trained_on_as_few(made):
    """The figure is the mean over draws and seeds, the difference that of the figures."""
    truth, draw = made["columns"]["label"].astype(float), np.random.default_rng(5)
    own = tuple(Seed(s, noise(s), {"label": truth + draw.normal(size=288)}) for s in range(2))
    few = ArmRuns("few", "Few", "baseline", own, skip=("few_label",), share=evaluation.FEW)
    full = replace(few, name="full", share=1.0)
    given = [arms(made)[0], few, full]
    options = {"kinds": ("few_label",), "few_pairs": [("good", "few"), ("good", "full")], **OPTIONS}
    found = assemble(given, made["columns"], made["splits"], [TASK], **options)
    report.validate(whole(found))
    test = np.isin(made["columns"]["case"], made["splits"]["test"])
    labels = made["columns"]["label"][test]
    few_auc = [auc(labels, seed.predictions["label"][test]) for seed in own]
    curves = [few_label.curve(s.features, made["columns"], made["splits"], TASK, resamples=0) for s in given[0].seeds]
    points = [p for curve in curves for p in curve.points if (p.unit, p.fraction) == ("tiles", evaluation.FEW)]
    good_auc = [[auc(labels, scores) for scores in point.scores] for point in points]
    shown = {arm["name"]: arm for arm in found["arms"]}
    assert shown["few"]["metrics"]["label/few/auc"]["mean"] == pytest.approx(np.mean(few_auc), abs=1e-9)
    assert shown["good"]["metrics"]["label/few/auc"]["mean"] == pytest.approx(np.mean(good_auc), abs=1e-9)
    each = [seed["metrics"]["label/few/auc"] for seed in shown["good"]["seeds"]]
    assert each == pytest.approx(np.mean(good_auc, 1), abs=1e-9)
    assert "label/few/auc" not in shown["full"]["metrics"]
    (d,) = found["differences"]
    assert (d["a"], d["b"], d["metric"]) == ("good", "few", "label/few/auc")
    assert d["difference"] == pytest.approx(np.mean(good_auc) - np.mean(few_auc), abs=1e-9)
    assert d["low"] < d["difference"] < d["high"]


def test_a_regression_has_metrics_of_its_own(made):
    task = Task("positive", "positive", regression=True)
    found = assemble(arms(made), made["columns"], made["splits"], [task], **OPTIONS)
    report.validate(whole(found))
    values = found["arms"][0]["metrics"]
    assert set(values) == {"positive/r2", "positive/spearman", "positive/mae"}
    each = [s["metrics"]["positive/r2"] for s in found["arms"][0]["seeds"]]
    assert values["positive/r2"]["mean"] == pytest.approx(np.mean(each), abs=1e-12)
    assert values["positive/r2"]["low"] < values["positive/r2"]["mean"] < values["positive/r2"]["high"]


def test_cases_of_pretraining_in_test_are_refused_or_marked(made):
    seen = (made["splits"]["train"][0], made["splits"]["test"][0])
    given = [*arms(made), ArmRuns("leak", "Leak", "ours", (Seed(0, made["features"], pretrained=seen),))]
    with pytest.raises(LeakError, match=made["splits"]["test"][0]):
        assemble(given, made["columns"], made["splits"], [TASK], **OPTIONS)
    found = assemble(given, made["columns"], made["splits"], [TASK], transductive=True, **OPTIONS)
    assert [arm["title"] for arm in found["arms"]] == ["Good", "Weak", "Leak (transductive)"]
    assert "Leak" not in found["reliability"][0]
    assert any("the encoder has seen 1 of" in note for note in found["reliability"])


def test_an_arm_is_marked_whatever_is_evaluated(made):
    given = [ArmRuns("leak", "Leak", "ours", (Seed(0, made["features"], pretrained=(made["splits"]["test"][0],)),))]
    options = {"kinds": ("batch_effect",), "transductive": True}
    found = assemble(given, made["columns"], made["splits"], [], **options, **OPTIONS)
    assert found["arms"][0]["title"] == "Leak (transductive)"
    assert not any("(checked)" in note for note in found["reliability"])


def test_one_test_case_gives_values_without_intervals(made):
    splits = made["splits"] | {"test": made["splits"]["test"][:1]}
    found = assemble(arms(made), made["columns"], splits, [TASK], **OPTIONS)
    report.validate(whole(found))
    assert found["arms"][0]["metrics"]["label/auc"]["mean"] > 0.8
    assert found["arms"][0]["metrics"]["label/auc"]["low"] is None
    assert found["differences"] == []
    assert any("no differences of label/auc: an interval needs at least 2 cases" in n for n in found["reliability"])


def test_few_test_cases_are_said(made):
    few = made["splits"] | {"test": made["splits"]["test"][:3]}
    assert "3 cases only" in assemble(arms(made), made["columns"], few, [TASK], **OPTIONS)["intervals"]
    many = {
        "train": made["splits"]["train"][:4],
        "test": [*made["splits"]["train"][4:], *made["splits"]["test"], "case06", "case07"],
    }
    assert "only" not in assemble(arms(made), made["columns"], many, [TASK], **OPTIONS)["intervals"]


def test_arms_of_one_name_are_refused(made):
    with pytest.raises(ValueError, match="different names"):
        assemble(arms(made)[:1] * 2, made["columns"], made["splits"], [TASK], **OPTIONS)


def test_clusters_are_those_of_their_evaluator_and_compared_pair_by_pair(made):
    given = arms(made)
    found = assemble(given, made["columns"], made["splits"], [TASK], kinds=("clusters",), **OPTIONS)
    report.validate(whole(found))
    means = {}
    for arm, row in zip(given, found["arms"], strict=True):
        each = [clusters.evaluate(s.features, made["columns"], made["splits"], TASK, resamples=0) for s in arm.seeds]
        for name in clusters.MEASURES:
            key, values = f"label/clusters/{name}", [one.metrics[name].value for one in each]
            assert [seed["metrics"][key] for seed in row["seeds"]] == values
            interval = row["metrics"][key]
            assert interval["mean"] == pytest.approx(np.mean(values), abs=1e-12)
            assert interval["low"] <= interval["mean"] <= interval["high"]
        means[arm.name] = row["metrics"]["label/clusters/ari"]["mean"]
    (d,) = found["differences"]
    assert (d["metric"], d["difference"]) == ("label/clusters/ari", pytest.approx(means[d["a"]] - means[d["b"]]))
    assert d["low"] < d["difference"] < d["high"]


def test_few_tiles_and_one_case_are_said_and_stop_nothing(made):
    first = np.flatnonzero(made["columns"]["case"] == "case08")
    for kept, note in (
        (first, "no differences of label/clusters/ari: an interval needs at least 2 cases"),
        (first[:6], "6 test tiles have a class"),
    ):
        rows = np.concatenate([np.flatnonzero(np.isin(made["columns"]["case"], made["splits"]["train"])), kept])
        columns = {name: values[rows] for name, values in made["columns"].items()}
        seeds = [Seed(0, made["features"][rows]), Seed(1, made["features"][rows] ** 3)]
        given = [ArmRuns(name, name, "ours", (seed,)) for name, seed in zip("ab", seeds, strict=True)]
        splits = {"train": made["splits"]["train"], "test": ["case08"]}
        found = assemble(given, columns, splits, [TASK], kinds=("clusters",), **OPTIONS)
        assert found["differences"] == []
        assert any(note in text for text in found["reliability"])


def test_retrieval_and_distances_are_those_of_their_evaluators(made):
    given = arms(made)
    n = len(made["columns"]["case"])
    columns = made["columns"] | {"x": np.arange(n) % 12 * 100.0, "y": np.zeros(n), "mpp": np.ones(n)}
    kinds, limits = ("retrieval", "distance_ratio"), (150.0, 400.0)
    found = assemble(given, columns, made["splits"], [TASK], kinds=kinds, limits=limits, **OPTIONS)
    report.validate(whole(found))
    test = np.isin(columns["case"], made["splits"]["test"])
    of_test = {name: values[test] for name, values in columns.items()}
    for arm, row in zip(given, found["arms"], strict=True):
        each = [retrieval.evaluate(s.features, columns, made["splits"], TASK, resamples=0) for s in arm.seeds]
        expected = np.mean([r.each["map"].mean() for r in each])
        assert row["metrics"]["label/retrieval/map"]["mean"] == pytest.approx(expected, abs=1e-12)
        ratios = [
            retrieval.distance_ratio(s.features[test], of_test, near_um=150, far_um=400, resamples=0)[0]
            for s in arm.seeds
        ]
        expected = np.mean([r["addr_local"].value for r in ratios])
        assert row["metrics"]["addr/local"]["mean"] == pytest.approx(expected, abs=1e-12)
        assert row["seeds"][0]["metrics"]["addr/global"] == pytest.approx(ratios[0]["addr_global"].value)
    (d,) = found["differences"]
    means = [row["metrics"]["label/retrieval/map"]["mean"] for row in found["arms"]]
    assert (d["metric"], d["difference"]) == ("label/retrieval/map", pytest.approx(means[0] - means[1]))
    wide = {"kinds": ("retrieval",), "across": "slide"}
    near = assemble(given[:1], columns, made["splits"], [TASK], **wide, **OPTIONS)
    options = {"across": "slide", "resamples": 0}
    each = [retrieval.evaluate(s.features, columns, made["splits"], TASK, **options) for s in given[0].seeds]
    of_slides = near["arms"][0]["metrics"]["label/retrieval/map"]["mean"]
    assert of_slides == pytest.approx(np.mean([r.each["map"].mean() for r in each]), abs=1e-12)
    assert near["tasks"][0]["title"] == "label, found in other slides"
    keys = {m["key"] for task in found["tasks"] for m in task["metrics"]}
    assert {"label/retrieval/recall_1", "label/retrieval/positive_map", "addr/local"} <= keys
