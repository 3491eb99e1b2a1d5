import json
import math

import numpy as np
import pytest

from mfl_jax.report import ReportError, validate
from tests.mfl_jax.report import synthetic


def test_valid_results_are_json_and_stay_valid():
    results = synthetic.results()
    validate(results)
    validate(json.loads(json.dumps(results, allow_nan=False)))


def change(results, at, value):
    for key in at[:-1]:
        results = results[key]
    results[at[-1]] = value


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (["title"], 3, "title: 3, where text should be"),
        (["arms"], {}, "arms: dict, where a list should be"),
        (["arms", 1, "kind"], "theirs", "arms[1].kind: 'theirs', which is none of ours, baseline, ceiling"),
        (["arms", 1, "name"], "mfl", "the same name twice"),
        (["arms", 3, "metrics", "positive/auc", "mean"], math.nan, "arms[3].metrics['positive/auc'].mean: nan"),
        (["arms", 3, "metrics", "positive/auc", "low"], 0.99, "is above high"),
        (["arms", 3, "metrics", "positive/auc", "low"], None, "low and high come together"),
        (["arms", 3, "metrics", "positive/auc", "mean"], np.float32(0.5), "where a finite number or null should be"),
        (["arms", 3, "metrics", "positive/auc", "mean"], True, "where a finite number or null should be"),
        (["differences", 0, "b"], "nobody", "differences[0].b: 'nobody'"),
        (["curves", 0, "y"], [1.0], "curves[0]: lists of different lengths"),
        (["labels", 0, "by"], "slides", "labels[0].by: 'slides'"),
        (["labels", 0, "x"], [0, 0.05, 0.1, 1], "where fractions above 0 and up to 1 should be"),
        (["projections", 0, "colours", 0, "values"], [1], "1 of them for 400 points"),
        (["projections", 0, "colours", 0, "names"], ["one"], "is no index into its 1 names"),
        (["saliency", "arms", 0, "arm"], "x", "saliency.arms[0].arm: 'x'"),
        (["skipped"], {"saliancy": "no"}, "skipped: 'saliancy', which is none of"),
        (["config"], {"lr": math.inf}, "config: {'lr': inf}, where JSON without NaN should be"),
        (["saliancy"], {}, None),
    ],
)
def test_faults_are_named_by_their_place(at, value, message):
    results = synthetic.results()
    change(results, at, value)
    if message is None:
        validate(results)  # another key is no fault: the right one is there
        return
    with pytest.raises(ReportError) as error:
        validate(results)
    assert message in str(error.value)


def test_a_misspelt_key_is_asked_about_and_a_missing_one_named():
    results = synthetic.results()
    results["saliancy"] = results.pop("saliency")
    del results["answer"]
    with pytest.raises(ReportError) as error:
        validate(results)
    assert "unknown key 'saliancy'; did you mean 'saliency'?" in str(error.value)
    assert "key 'answer' is missing" in str(error.value)


def test_only_ten_faults_are_listed():
    results = synthetic.results()
    for run in results["curves"]:
        run["x"] = "no"
    with pytest.raises(ReportError, match="and 2 more"):
        validate(results)
