"""What a partner says of a tile, and how much of it features hold on unseen cases."""

import numpy as np
import pytest

from input_pipeline.tileset import Partner
from mfl_jax.evaluators import LeakError, compare, decode
from tests.mfl_jax.evaluators.cohort import cohort


def test_summaries_of_an_image_are_numpys_and_nan_where_it_is_absent():
    partner = Partner("if", "image", channels=2, dtype="uint16", encoding="png", channel_names=("DAPI", "MARKER"))
    values = np.random.default_rng(0).integers(0, 60000, (3, 8, 8, 2), np.uint16)
    found = decode.summarise(partner, values, np.array([True, True, False]))
    assert set(found) == {f"if/{c}/{s}" for c in ("DAPI", "MARKER") for s in ("mean", "p50", "p95")}
    assert found["if/MARKER/mean"][1] == pytest.approx(values[1, ..., 1].astype(float).mean())
    assert found["if/DAPI/p95"][0] == pytest.approx(np.percentile(values[0, ..., 0], 95))
    assert np.isnan(found["if/DAPI/p50"][2])


def test_summaries_of_a_map_count_its_objects_and_types():
    partner = Partner("nuclei", "map", channels=2, dtype="uint16", encoding="png", channel_names=("instance", "type"))
    values = np.zeros((2, 4, 4, 2), np.uint16)
    values[0, 0, :2, 0], values[0, 2, 2, 0], values[0, 0, :2, 1] = 7, 900, 3
    found = decode.summarise(partner, values, np.ones(2, bool))
    assert found["nuclei/objects"].tolist() == [2, 0]
    assert found["nuclei/covered"].tolist() == [3 / 16, 0]
    assert found["nuclei/type3/share"].tolist() == [2 / 16, 0]


def test_summaries_of_counts_are_logarithms():
    partner = Partner("counts", "vector", length=2, dtype="float32", encoding="float32", channel_names=("A", "B"))
    found = decode.summarise(partner, np.array([[0.0, 9.0]], np.float32), np.ones(1, bool))
    assert found["counts/A"][0] == 0
    assert found["counts/B"][0] == pytest.approx(np.log(10))


def test_what_is_in_the_features_is_found_and_what_is_not_is_not():
    c = cohort()
    rng = np.random.default_rng(0)
    x = c["features"]
    some = np.where(rng.random(len(x)) < 0.2, np.nan, x[:, 1] - x[:, 2])
    targets = {"if/there": 3 * x[:, 1] + 100, "if/noise": rng.normal(size=len(x)), "ihc/some": some}
    targets["if/same"] = np.ones(len(x))
    found = decode.decode(x, targets, c["columns"], c["splits"], resamples=200)
    assert found.results["if/there"].metrics["r2"].low > 0.99
    assert found.results["ihc/some"].metrics["r2"].low > 0.99
    assert found.results["if/noise"].metrics["r2"].value < 0.05
    assert "if/same does not vary" in found.notes
    assert found.mode == "inductive"
    test = np.flatnonzero(np.isin(c["columns"]["case"], c["splits"]["test"]))
    np.testing.assert_allclose(found.results["if/there"].scores, targets["if/there"][test], atol=0.2)
    assert len(found.results["ihc/some"].scores) == np.isfinite(some[test]).sum()
    floats = found.floats("decode")
    assert floats["decode/r2_median"] == np.median([r.metrics["r2"].value for r in found.results.values()])


def test_what_an_arm_gained_is_a_paired_difference():
    c = cohort()
    with_it, without = (
        decode.decode(x, {"if/there": c["features"][:, 1]}, c["columns"], c["splits"], resamples=100).results
        for x in (c["features"], c["features"][:, 2:])
    )
    (difference,) = compare({"with": with_it["if/there"], "without": without["if/there"]}, "r2", resamples=200)
    assert difference.interval.low > 0.5


def test_leaks_are_refused():
    c = cohort()
    with pytest.raises(LeakError):
        decode.decode(c["features"], {}, c["columns"], c["splits"], pretrained=["case10"])
