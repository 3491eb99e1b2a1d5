"""The words of the demo's report."""

from collections.abc import Mapping
from typing import Any

from mfl_jax.demo.arms import FEW
from mfl_jax.evaluation import FEW_CASES
from mfl_jax.report import tables

QUESTION = (
    "Does an encoder of routine H&E learn more when immunofluorescence of the same tissue teaches it, though it never "
    "sees any when it is used?"
)
TASK_WORDS = {
    "title": "Marker-positive tiles, from H&E alone",
    "what": "Are more than half of the nuclei of a tile positive? H&E has no stain for it: positive nuclei differ in "
    "the grain of their chromatin alone, and colour says nothing. The figures are of the test cases. The features are "
    "frozen and a linear probe reads them; the supervised arms answer themselves.",
}
GAINED = {
    "title": "What the encoder gained: the immunofluorescence, from H&E alone",
    "what": "Mean brightness of each channel of a test tile, by ridge regression on frozen features of its H&E. 1 is "
    "perfect, 0 is what the mean of all tiles gives. MFL was taught by MARKER alone.",
}
FEW_TOLD = (
    " The test cases are few: resamples of them hardly differ, and the intervals are narrower than they should be."
)
HOWTO = [
    {"what": "Your slides: a folder he/ beside folders of partners, or a CSV (see the README)."},
    {"what": "Tissue, tiles, registration", "command": "mfl tile slides.csv --out data/tiled --size 224 --mpp 0.5"},
    {"what": "One tile set, split by case", "command": "mfl pack data/tiled --out data/set"},
    {
        "what": "Training; the same command goes on with a run that was stopped",
        "command": "mfl train --config configs/mfl.py:if --workdir runs/mfl",
    },
    {
        "what": "What it is worth, with intervals over cases",
        "command": "mfl eval runs/mfl --tileset data/set --target label --baselines random,colour",
    },
]


def answer(results: Mapping[str, Any], cases: int) -> str:
    """Two sentences, of whatever came out; a third where the test cases are so few that intervals say little."""
    key = results["tasks"][0]["metrics"][0]["key"]
    arms = {arm["name"]: arm["metrics"][key] for arm in results["arms"]}
    apart = {(d["a"], d["b"]): d for d in results["differences"] if d["metric"] == key}
    gain, short = apart.get(("mfl", "unpaired")), apart.get(("mfl", "supervised"))
    verdict = "Not clearly" if gain is None or gain["low"] is None or gain["low"] <= 0 else "Yes"
    first = (
        f"{verdict}: on H&E of {cases} unseen cases MFL reaches an AUC of {_told(arms['mfl'])}, unpaired "
        f"self-supervision {_told(arms['unpaired'])} and full supervision {_told(arms['supervised'])}."
    )
    start = "With"
    if gain and short:
        start = f"The paired differences are {_signed(gain)} to unpaired and {_signed(short)} to full supervision; with"
    few_key = key.replace("/", "/few/", 1)
    few = {arm["name"]: arm["metrics"].get(few_key, {"mean": None}) for arm in results["arms"]}
    apart = {(d["a"], d["b"]): d for d in results["differences"] if d["metric"] == few_key}
    second = (
        f"{start} labels of {FEW:.0%} of the tiles a probe on MFL reaches {_told(few['mfl'])}, an encoder trained on "
        f"as few labels alone {_told(few['supervised_few'])}"
    )
    less = apart.get(("mfl", "supervised_few"))
    second += f": a paired difference of {_signed(less)}." if less else "."
    return f"{first} {second}" + (FEW_TOLD if cases < FEW_CASES else "")


def _told(metric: Mapping[str, Any]) -> str:
    return f"{tables.figure(metric['mean'])} {tables.interval(metric)}".strip()


def _signed(difference: Mapping[str, Any]) -> str:
    interval = tables.interval(difference)
    return f"{tables.figure(difference['difference'], sign=True)} {interval}".strip()
