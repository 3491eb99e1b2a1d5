"""Every metric against a search over all pairs in float64, one query at a time; what has no answer is counted."""

import math

import numpy as np
import pytest

from mfl_jax.evaluators import Task, retrieval
from tests.mfl_jax.evaluators.cohort import cohort


def brute(features, group, label, queries, ks, depth):
    """Per query a dict of metrics, or None where there is no answer; and chance of recall."""
    x = features.astype(np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    found, chance = [], []
    for q in queries:
        others = [i for i in range(len(x)) if group[i] != group[q]]
        ranked = sorted(others, key=lambda i: (-(x[i] @ x[q]), i))
        hits = [label[i] == label[q] for i in ranked]
        right = sum(hits)
        if not right:
            found.append(None)
            continue
        one = {f"recall_{k}": float(any(hits[:k])) for k in ks}
        shown = hits[:depth]
        best = min(right, depth)
        one["map"] = sum(sum(shown[: i + 1]) / (i + 1) for i, h in enumerate(shown) if h) / best
        gain = sum(1 / math.log2(i + 2) for i, h in enumerate(shown) if h)
        one["ndcg"] = gain / sum(1 / math.log2(i + 2) for i in range(best))
        found.append(one)
        chance.append([1 - math.comb(len(hits) - right, k) / math.comb(len(hits), k) for k in ks])
    return found, np.mean(chance, 0)


@pytest.mark.parametrize("across", ["case", "slide"])
@pytest.mark.parametrize("depth", [7, 500])
def test_metrics_are_those_of_a_plain_search(across, depth):
    c = cohort(seed=3, cases=12, per_case=14)
    c["columns"]["label"] = np.random.default_rng(0).integers(0, 3, len(c["features"]))
    result = retrieval.evaluate(
        c["features"], c["columns"], c["splits"], Task("t"), across=across, ks=(1, 3), depth=depth, resamples=50
    )
    rows = np.flatnonzero(np.isin(c["columns"]["case"], c["splits"]["test"]))
    group, label = c["columns"][across][rows], c["columns"]["label"][rows]
    expected, chance = brute(c["features"][rows], group, label, range(len(rows)), (1, 3), depth)
    for name in ("recall_1", "recall_3", "map", "ndcg"):
        np.testing.assert_allclose(result.each[name], [e[name] for e in expected], atol=1e-9)
        assert result.metrics[name].value == pytest.approx(np.mean([e[name] for e in expected]))
    assert [result.chance["recall_1"], result.chance["recall_3"]] == pytest.approx(chance)
    assert result.ids.tolist() == rows.tolist()
    assert result.counts == {"bank": len(rows), "queries": len(rows), "without_answer": 0, "unknown": 0}


def test_a_query_without_an_answer_is_counted_and_said():
    """Class 2 lives in one case alone: its tiles find nothing in another one."""
    c = cohort(seed=1)
    test = np.flatnonzero(np.isin(c["columns"]["case"], c["splits"]["test"]))
    c["columns"]["label"] = np.where(np.isin(np.arange(len(c["features"])), test[:5]), 2, c["columns"]["label"])
    result = retrieval.evaluate(c["features"], c["columns"], c["splits"], Task("t"), resamples=50)
    assert result.counts == {"bank": len(test), "queries": len(test), "without_answer": 5, "unknown": 0}
    assert set(result.ids.tolist()) == set(test[5:].tolist())
    assert any("5 of 96 queries have no answer in another case" in note for note in result.notes)
    assert result.floats("r")["r/without_answer"] == 5
    expected, _ = brute(
        c["features"][test], c["columns"]["case"][test], c["columns"]["label"][test], range(len(test)), (1,), 100
    )
    assert [e is None for e in expected] == [i < 5 for i in range(len(test))]
    c["columns"]["label"][test[10:13]] = -1
    result = retrieval.evaluate(c["features"], c["columns"], c["splits"], Task("t"), resamples=50)
    assert result.counts == {"bank": len(test) - 3, "queries": len(test) - 3, "without_answer": 5, "unknown": 3}
    c["columns"]["label"][:] = np.searchsorted(np.unique(c["columns"]["case"]), c["columns"]["case"])
    with pytest.raises(ValueError, match="none of 96 queries has an answer in another case"):
        retrieval.evaluate(c["features"], c["columns"], c["splits"], Task("t"))


def test_tiles_of_other_splits_need_not_be_there():
    c = cohort(seed=2)
    every = retrieval.evaluate(c["features"], c["columns"], c["splits"], Task("t", "label"), resamples=0)
    kept = np.isin(c["columns"]["case"], c["splits"]["test"])
    columns = {name: values[kept] for name, values in c["columns"].items()}
    alone = retrieval.evaluate(c["features"][kept], columns, c["splits"], Task("t", "label"), resamples=0)
    np.testing.assert_array_equal(alone.each["map"], every.each["map"])
    with pytest.raises(ValueError, match="no example of split 'other' has a known target"):
        retrieval.evaluate(c["features"], c["columns"], c["splits"], Task("t", "label"), split="other")


def test_tumour_tiles_are_reported_apart():
    c = cohort(seed=2, signal=2.0)
    result = retrieval.evaluate(c["features"], c["columns"], c["splits"], Task("t"), resamples=50)
    positive = c["columns"]["label"][result.ids] == 1
    for name in result.each:
        assert result.metrics[f"positive_{name}"].value == pytest.approx(result.each[name][positive].mean())
    assert result.counts["positive_queries"] == positive.sum()


def test_queries_are_drawn_by_seed_and_it_is_said():
    c = cohort(seed=2)
    options = {"most": 20, "resamples": 50}
    one, two, other = (
        retrieval.evaluate(c["features"], c["columns"], c["splits"], Task("t"), seed=seed, **options)
        for seed in (0, 0, 1)
    )
    assert len(one.ids) == 20
    assert one.ids.tolist() == two.ids.tolist() != other.ids.tolist()
    assert any("20 of 96 queries" in note for note in one.notes)
    assert one.counts["bank"] == 96


def test_signal_is_found_in_other_cases_and_noise_is_at_chance():
    c = cohort(seed=1, cases=24, dim=2, signal=3.0)
    result = retrieval.evaluate(c["features"], c["columns"], c["splits"], Task("t"), resamples=300)
    assert result.metrics["recall_1"].low > result.chance["recall_1"] + 0.15
    of_noise = [
        retrieval.evaluate(
            np.random.default_rng(seed).normal(size=(len(c["features"]), 8)),
            *(c["columns"], c["splits"], Task("t")),
            resamples=10,
        )
        for seed in range(12)
    ]
    assert abs(np.mean([r.metrics["recall_1"].value for r in of_noise]) - of_noise[0].chance["recall_1"]) < 0.03


def test_features_that_name_the_case_gain_nothing():
    """With the own case left out, what is alike by being of one patient is no answer; on its other slide, it is."""
    rng = np.random.default_rng(5)
    case = np.repeat(np.arange(24), 20)
    slide = case * 2 + np.arange(480) % 2
    label = rng.integers(0, 2, 24)[case]
    features = rng.normal(size=(24, 16))[case] + 0.01 * rng.normal(size=(480, 16))
    columns, splits = {"case": case, "slide": slide, "label": label}, {"train": [0], "test": list(range(1, 24))}
    asked = (features, columns, splits, Task("t"))
    assert retrieval.evaluate(*asked, across="slide", resamples=50).metrics["recall_1"].value == 1
    assert retrieval.evaluate(*asked, resamples=50).metrics["recall_1"].value < 0.8


def test_arms_are_compared_query_by_query():
    c = cohort(seed=1, cases=24, signal=2.0)
    weak = np.random.default_rng(0).normal(size=c["features"].shape)
    good, bad = (
        retrieval.evaluate(x, c["columns"], c["splits"], Task("t"), resamples=50) for x in (c["features"], weak)
    )
    (difference,) = retrieval.compare({"good": [good, good], "bad": bad}, "map", resamples=400)
    assert difference.interval.value == pytest.approx((good.each["map"] - bad.each["map"]).mean())
    assert difference.p_holm < 0.05
    other = retrieval.evaluate(weak, c["columns"], c["splits"], Task("t"), most=9, resamples=50)
    with pytest.raises(ValueError, match="arm 'other' was asked other queries"):
        retrieval.compare({"good": good, "other": other}, "map")
    with pytest.raises(ValueError, match="no metric 'auc'; there are recall_1"):
        retrieval.compare({"good": good, "bad": bad}, "auc")


def test_partners_are_found_both_ways_as_by_a_plain_ranking():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(1100, 8))
    second = first + 0.7 * rng.normal(size=first.shape)
    found = retrieval.cross_modal(
        first, second, {"case": np.arange(1100) % 7}, names=("he", "if"), ks=(1, 10), resamples=50
    )
    assert sorted(found) == ["he_to_if", "if_to_he"]
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (first, second))
    for name, close in (("he_to_if", x @ y.T), ("if_to_he", y @ x.T)):
        rank = np.array([sorted(range(1100), key=lambda j: -row[j]).index(i) + 1 for i, row in enumerate(close)])
        result = found[name]
        assert result.metrics["recall_1"].value == pytest.approx((rank == 1).mean())
        assert result.metrics["recall_10"].value == pytest.approx((rank <= 10).mean())
        assert result.metrics["map"].value == pytest.approx((1 / rank).mean(), rel=1e-6)
        assert result.metrics["ndcg"].value == pytest.approx((1 / np.log2(1 + rank)).mean(), rel=1e-6)
        assert result.counts["median_rank"] == int(np.median(rank))


def test_a_collapsed_encoder_does_not_find_partners():
    found = retrieval.cross_modal(np.ones((50, 3)), np.ones((50, 3)), {"case": np.arange(50)}, resamples=50)
    assert found["he_to_partner"].metrics["recall_1"].value == 1 / 50


def positions(seed=0, slides=4, tiles=40):
    rng = np.random.default_rng(seed)
    n = slides * tiles
    slide = np.repeat([f"s{i}" for i in range(slides)], tiles)
    columns = {"slide": slide, "case": np.repeat([f"c{i // 2}" for i in range(slides)], tiles)}
    columns |= {
        "x": rng.integers(0, 4000, n),
        "y": rng.integers(0, 4000, n),
        "mpp": np.repeat([0.25, 0.5, 0.5, 0.25], tiles),
    }
    return rng.normal(size=(n, 5)) + 0.001 * columns["x"][:, None], columns


def test_the_distance_ratio_is_that_of_all_pairs():
    features, columns = positions()
    far, near, ratios = [], [], []
    for name in np.unique(columns["slide"]):
        rows = np.flatnonzero(columns["slide"] == name)
        of_far, of_near = [], []
        for i in rows:
            for j in rows[rows > i]:
                um = (
                    math.dist((columns["x"][i], columns["y"][i]), (columns["x"][j], columns["y"][j]))
                    * columns["mpp"][i]
                )
                apart = math.dist(features[i], features[j])
                of_far += [apart] if um > 900 else []
                of_near += [apart] if um < 300 else []
        far, near = far + of_far, near + of_near
        ratios.append(np.mean(of_far) / np.mean(of_near))
    metrics, notes = retrieval.distance_ratio(features, columns, near_um=300, far_um=900, resamples=100)
    assert metrics["addr_global"].value == pytest.approx(np.mean(far) / np.mean(near), rel=1e-9)
    assert metrics["addr_local"].value == pytest.approx(np.mean(ratios), rel=1e-9)
    assert metrics["addr_local"].low < metrics["addr_local"].value < metrics["addr_local"].high
    assert notes == ()


def test_several_seeds_are_the_mean_of_their_figures():
    features, columns = positions()
    other = features + np.random.default_rng(5).normal(size=features.shape)
    options = {"near_um": 300, "far_um": 900}
    alone = [retrieval.distance_ratio(x, columns, **options, resamples=0)[0] for x in (features, other)]
    both, _ = retrieval.distance_ratio([features, other], columns, **options, resamples=60)
    for name in ("addr_global", "addr_local"):
        assert both[name].value == pytest.approx(np.mean([one[name].value for one in alone]), rel=1e-9)
        assert both[name].low < both[name].value < both[name].high
    c = cohort(seed=3, cases=12, per_case=14)
    noisy = c["features"] + np.random.default_rng(1).normal(size=c["features"].shape)
    found = [
        retrieval.evaluate(x, c["columns"], c["splits"], Task("t", "label"), resamples=0)
        for x in (c["features"], noisy)
    ]
    merged = retrieval.over_seeds(found, resamples=60)
    for name in ("map", "recall_5", "positive_map", "positive_recall_1"):
        assert merged[name].value == pytest.approx(np.mean([one.metrics[name].value for one in found]), rel=1e-9)
    rows = retrieval.as_result(found[0], "map")
    assert rows.scores.mean() == pytest.approx(found[0].metrics["map"].value)
    c["splits"]["test"], c["splits"]["train"] = c["splits"]["train"], c["splits"]["test"]
    swapped = retrieval.evaluate(noisy, c["columns"], c["splits"], Task("t", "label"), resamples=0)
    with pytest.raises(ValueError, match="seeds were asked different queries"):
        retrieval.over_seeds([found[0], swapped])


def test_what_the_distance_ratio_cannot_use_is_said():
    features, columns = positions()
    columns["x"][:40] //= 20
    columns["y"][:40] //= 20
    _, notes = retrieval.distance_ratio(features, columns, near_um=300, far_um=900, most=30, resamples=50)
    assert "1 of 4 slides lack near or far pairs: not in addr_local" in notes
    assert sum("30 of 40 tiles" in note for note in notes) == 4
    with pytest.raises(ValueError, match="farther than 9e\\+06 um; the farthest pair is"):
        retrieval.distance_ratio(features, columns, near_um=300, far_um=9e6)
    with pytest.raises(ValueError, match="0 < near_um <= far_um"):
        retrieval.distance_ratio(features, columns, near_um=300, far_um=200)
    columns["mpp"][3] = np.nan
    with pytest.raises(ValueError, match="1 tiles have no place"):
        retrieval.distance_ratio(features, columns, near_um=300, far_um=900)


def test_leaks_and_wrong_requests_are_refused():
    c = cohort()
    asked = (c["features"], c["columns"], c["splits"])
    with pytest.raises(ValueError, match="pre-training are in the validation or test"):
        retrieval.evaluate(*asked, Task("t"), pretrained=c["splits"]["test"])
    seen = retrieval.evaluate(*asked, Task("t"), pretrained=c["splits"]["test"], transductive=True, resamples=50)
    assert seen.mode == "transductive"
    with pytest.raises(ValueError, match="retrieval needs classes; give a threshold"):
        retrieval.evaluate(*asked, Task("t", "positive", regression=True))
    with pytest.raises(ValueError, match="across is 'patient'; allowed: case, slide"):
        retrieval.evaluate(*asked, Task("t"), across="patient")
