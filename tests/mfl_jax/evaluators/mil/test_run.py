"""Nested folds from bags to figures: what is chosen by what, what predictions are the mean of, and what is written."""

import csv
import dataclasses
import json
import uuid

import numpy as np
import pytest
import tifffile
from PIL import Image

from input_pipeline.slides.reader import open_slide
from mfl_jax import statistics
from mfl_jax.evaluators import mil
from mfl_jax.evaluators.mil import document, figures, maps, run
from mfl_jax.evaluators.mil.fit import fit_all, pack
from tests.mfl_jax.evaluators.mil import made

SETTINGS = mil.Settings(epochs=12, patience=12, batch=8, tiles=20)
OPTIONS = {"settings": SETTINGS, "lrs": (0.05, 1e-5), "resamples": 100}


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(compile_cache):
    pass


@pytest.fixture(scope="module")
def done():
    given, table = made.bags(slides=32, signal=6.0)
    noise = dataclasses.replace(given, features=np.random.default_rng(1).standard_normal((len(given.features), 5)))
    noise = dataclasses.replace(noise, features=noise.features.astype(np.float32), notes=("made up",))
    folds = mil.nested(table, outer=2, inner=2)
    bags = {"signal": given, "noise": noise}
    return bags, table, mil.study(bags, table, ["meanpool"], folds=folds, seeds=2, **OPTIONS)


def test_signal_is_found_noise_is_not_and_the_difference_is_said(done):
    _, _, study = done
    signal, noise = study.arms
    assert (signal.name, noise.name) == ("signal / meanpool", "noise / meanpool")
    assert signal.result.metrics["auc"].value > 0.9
    assert abs(noise.result.metrics["auc"].value - 0.5) < 0.3
    assert signal.fits == 2 * 2 * 2 * 2
    (difference,) = study.differences
    assert difference.interval.low > 0
    assert study.notes == ("noise: made up",)
    assert all(chosen["lr"] == 0.05 for chosen in signal.chosen.values())


def test_predictions_are_the_mean_over_seeds_and_inner_folds_of_the_settings_chosen(done):
    bags, table, study = done
    planned = run.plan(study.folds, 2, OPTIONS["lrs"], (0.0,), 0)
    given, target = bags["signal"], run.target_of(table)
    fitted = fit_all("meanpool", pack(given.features, given.offsets), target, [p[4] for p in planned], SETTINGS)
    for k, fold in enumerate(study.folds):
        kept = [j for j, (of, _, _, setting, _) in enumerate(planned) if of == k and setting[0] == 0.05]
        assert len(kept) == 4
        expected = np.mean([1 / (1 + np.exp(-fitted.logits[j][:, 0])) for j in kept], 0)
        np.testing.assert_allclose(study.arms[0].result.scores[fold.test], expected, rtol=1e-5)
    scores = study.arms[0].result.scores
    assert study.arms[0].result.metrics["auc"].value == statistics.measure("auc", table.labels, scores)
    fold = study.folds[1]
    of_fold = statistics.measure("auc", table.labels[fold.test], scores[fold.test])
    assert study.arms[0].folds["fold 1"]["auc"] == pytest.approx(of_fold)


def test_attention_is_by_the_fits_that_have_not_seen_the_slide(done):
    bags, _, study = done
    row = int(study.folds[1].test[3])
    params = study.arms[0].used["fold 1"]["head"]["out"]
    scale = study.arms[0].used["fold 1"]
    tiles = bags["signal"].features[bags["signal"].rows(row)].astype(np.float64)
    each = [
        ((tiles - scale["mean"][j]) * scale["inverse"][j]) @ params["w"][j][:, 0] + params["b"][j][0] for j in range(4)
    ]
    found = mil.attention(study.arms[0], bags["signal"], study.folds, row)
    np.testing.assert_allclose(found, np.mean(each, 0), rtol=1e-4, atol=1e-4)


def test_probabilities_of_uneven_classes_are_said_to_be_of_even_ones(done):
    """Heads weigh classes alike: what they say is no frequency where one is much commoner."""
    study = done[2]
    rare = dataclasses.replace(
        study.arms[0].result, labels=(np.arange(len(study.arms[0].result.labels)) < 4).astype(int)
    )
    for result, told in ((study.arms[0].result, False), (rare, True)):
        given = dataclasses.replace(study, arms=(dataclasses.replace(study.arms[0], result=result),))
        assert any("as if all classes were equally frequent" in n for n in document.reliability(given, ())) == told


def test_a_study_on_disk_has_predictions_folds_report_and_maps(done, tmp_path):
    bags, table, study = done
    page = document.write(tmp_path, study, bags, drawn=2)
    rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert [row["slide_id"] for row in rows] == list(table.slides)
    np.testing.assert_allclose([float(r["signal / meanpool"]) for r in rows], study.arms[0].result.scores, rtol=1e-4)
    again = mil.read_splits(tmp_path / "folds.csv", table, inner=2)
    assert [fold.test.tolist() for fold in again] == [sorted(fold.test.tolist()) for fold in study.folds]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["arms"][0]["metrics"]["auc"]["mean"] == study.arms[0].result.metrics["auc"].value
    assert "signal / meanpool has the greatest AUC" in results["answer"]
    assert any("no sheet of tiles" in note for note in results["reliability"])
    assert "signal / meanpool" in page.read_text()
    drawn = sorted((tmp_path / "maps").glob("*.geojson"))
    assert len(drawn) == 2
    row = table.slides.index(drawn[0].stem)
    with Image.open(drawn[0].with_suffix(".png")) as picture:
        assert max(picture.size) == 900
    features = json.loads(drawn[0].read_text())["features"]
    scores = mil.attention(study.arms[0], bags["signal"], study.folds, row)
    assert [f["properties"]["measurements"]["score"] for f in features] == pytest.approx(scores.tolist())
    for feature, corner in zip(features, bags["signal"].coords[bags["signal"].rows(row)].tolist(), strict=True):
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1] == corner
        assert ring[2] == [corner[0] + 64, corner[1] + 64]
        assert feature["properties"]["objectType"] == "detection"
        uuid.UUID(feature["id"])


def test_cases_of_pre_training_mark_the_result(done):
    bags, table, study = done
    noted = {"folds": study.folds, "seeds": 2, **OPTIONS}
    found = mil.study({"signal": bags["signal"]}, table, ["meanpool"], pretrained=["c03"], **noted)
    assert study.arms[0].result.mode == "inductive"
    assert found.arms[0].result.mode == "transductive"
    assert found.arms[0].name == "meanpool"


def test_clam_is_refused_for_survival(done):
    bags, table, _ = done
    timed = dataclasses.replace(table, times=np.arange(32.0) + 1)
    with pytest.raises(ValueError, match="loss over tiles of a class"):
        mil.study(bags, timed, ["clam"])


@pytest.mark.slow
def test_several_classes_and_every_head(tmp_path):
    given, table = made.bags(slides=60, signal=9.0, classes=3)
    heads = [
        "maxpool",
        "chowder,top=3,bottom=3",
        "clam,hidden=16,attention=8",
        "transformer,width=16,heads=2",
        "instance",
    ]
    settings = mil.Settings(epochs=25, patience=25, batch=8, tiles=20)
    folds = mil.nested(table, outer=2, inner=2)
    study = mil.study({"x": given}, table, heads, folds=folds, settings=settings, seeds=1, lrs=(0.01,), resamples=100)
    assert all(arm.result.metrics["auc"].value > 0.75 for arm in study.arms), [a.result.metrics for a in study.arms]
    assert study.arms[0].result.scores.shape == (60, 3)
    assert document.write(tmp_path, study, {"x": given}, drawn=1).is_file()


@pytest.mark.slow
def test_survival(tmp_path):
    given, table = made.bags(slides=60, signal=6.0)
    draw = np.random.default_rng(0)
    times = draw.exponential(np.where(table.labels == 1, 1.0, 8.0)) + 0.01
    events = (draw.uniform(size=60) < 0.8).astype(int)
    table = dataclasses.replace(table, labels=events, names=("censored", "event"), times=times)
    options = {"folds": mil.nested(table, outer=3, inner=2), "seeds": 1, "lrs": (0.02,), "resamples": 100}
    study = mil.study({"x": given}, table, ["meanpool", "instance"], settings=SETTINGS, **options)
    assert study.metric == "c_index"
    assert study.arms[0].result.metrics["c_index"].low > 0.5
    assert len(study.differences) == 1
    assert document.write(tmp_path, study, {"x": given}, drawn=2).is_file()


def test_a_slide_of_a_tile_classifier_is_the_mean_of_its_greatest_scores():
    scores, offsets = np.array([3.0, 1.0, 2.0, 5.0, -4.0]), np.array([0, 3, 3, 4, 5])
    np.testing.assert_allclose(mil.top_mean(scores, offsets, 2), [2.5, -4.0, 5.0, -4.0])
    np.testing.assert_allclose(mil.top_mean(scores, offsets, 1), [3.0, -4.0, 5.0, -4.0])
    with pytest.raises(ValueError, match="top is 0; it is 1 or more"):
        mil.top_mean(scores, offsets, 0)


def test_the_curve_has_the_area_that_statistics_give():
    draw = np.random.default_rng(0)
    labels, scores = draw.integers(0, 2, 80), draw.integers(0, 20, 80) / 20
    x, y = figures.roc(labels == 1, scores)
    area = float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))
    assert area == pytest.approx(statistics.measure("auc", labels, scores), abs=1e-12)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)


def test_survival_falls_by_those_who_die_among_those_who_are_left():
    x, y = figures.kaplan_meier(np.array([1, 2, 2, 3, 5]), np.array([1, 1, 0, 0, 1]))
    assert x.tolist() == [0, 1, 1, 2, 2, 3, 3, 5, 5]
    np.testing.assert_allclose(y, [1, 1, 0.8, 0.8, 0.6, 0.6, 0.6, 0.6, 0])


def test_calibration_is_what_was_said_and_what_was_so():
    x, y = figures.calibration(np.array([0, 0, 1, 0, 1, 1, 1, 1, 1, 0] * 2), np.linspace(0, 1, 20))
    assert len(x) == len(y) == 4
    np.testing.assert_allclose(x[0], np.linspace(0, 1, 20)[:5].mean())
    np.testing.assert_allclose(y, [0.4, 0.8, 0.4, 0.8])


def test_ranks_share_ties_and_a_map_has_a_cell_a_tile():
    assert maps.ranks(np.array([3.0, 1.0, 3.0, 9.0])).tolist() == [0.5, 0, 0.5, 1]
    picture = maps.map_picture(np.array([[0.0, 0], [64, 0], [0, 64]]), 64.0, np.array([0.0, 1, 2]), None)
    assert picture.shape == (900, 900, 3)
    assert (picture[700, 700] == 255).all()
    assert len({tuple(picture[y, x]) for y, x in ((200, 200), (200, 700), (700, 200))}) == 3


def test_the_tiles_at_both_ends_need_no_scale(tmp_path):
    """The side of a tile is known in px, so that a slide whose file has no mpp gives what one with any mpp gives."""
    pixels = np.zeros((128, 256, 3), np.uint8)
    pixels[:64, 64:128], pixels[64:, 192:] = (200, 0, 0), (0, 0, 200)
    bare, scaled = {}, {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    for name, said in (("bare", bare), ("scaled", scaled)):
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels, tile=(64, 64), photometric="rgb", **said)
    with open_slide(tmp_path / "bare.tif") as opened:
        assert opened.mpp is None
    coords, scores = np.array([[64.0, 0.0], [192.0, 64.0]]), np.array([2.0, 1.0])
    found, other = (maps.ends_sheet(coords, 64.0, scores, tmp_path / f"{name}.tif") for name in ("bare", "scaled"))
    np.testing.assert_array_equal(found, other)
    colours = {tuple(c) for c in found.reshape(-1, 3).tolist()}
    assert {(200, 0, 0), (0, 0, 200)} <= colours


def test_heads_that_the_limit_of_epochs_cut_short_are_said_to_be():
    curves = np.linspace(1, 0.1, 6) * np.ones((4, 1))
    assert run._unfinished(curves) == ("4 of 4 fits were cut short by the limit of 6 epochs: allow more",)
    curves[:2, 4:] = np.nan  # they had ended by themselves
    assert run._unfinished(curves) == ()
    given, table = made.bags(slides=32, signal=6.0)
    options = OPTIONS | {"settings": dataclasses.replace(SETTINGS, epochs=2, patience=5)}
    study = mil.study({"signal": given}, table, ["meanpool"], folds=mil.nested(table, outer=2, inner=2), **options)
    assert "cut short by the limit of 2 epochs" in study.arms[0].result.notes[0]
