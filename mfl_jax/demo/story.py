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
    apart = {(d["a"], d["b"]): d for d in results["differences"]}
    gain, short = apart.get(("mfl", "unpaired")), apart.get(("mfl", "supervised"))
    verdict = "Not clearly" if gain is None or gain["low"] is None or gain["low"] <= 0 else "Yes"
    first = (
        f"{verdict}: on H&E of {cases} unseen cases MFL reaches an AUC of {_told(arms['mfl'])}, unpaired "
        f"self-supervision {_told(arms['unpaired'])} and full supervision {_told(arms['supervised'])}."
    )
    few = _at(results, "mfl", FEW)
    start = "With"
    if gain and short:
        start = f"The paired differences are {_signed(gain)} to unpaired and {_signed(short)} to full supervision; with"
    second = (
        f"{start} labels of {FEW:.0%} of the tiles a probe on MFL reaches {tables.figure(few)}, an encoder trained on "
        f"as few labels alone {tables.figure(arms['supervised_few']['mean'])}."
    )
    return f"{first} {second}" + (FEW_TOLD if cases < FEW_CASES else "")


def _told(metric: Mapping[str, Any]) -> str:
    return f"{tables.figure(metric['mean'])} {tables.interval(metric)}".strip()


def _signed(difference: Mapping[str, Any]) -> str:
    interval = tables.interval(difference)
    return f"{tables.figure(difference['difference'], sign=True)} {interval}".strip()


def _at(results: Mapping[str, Any], arm: str, share: float) -> float | None:
    """On the curve of label efficiency, by tiles."""
    curve = next(line for line in results["labels"] if line["arm"] == arm and line["by"] == "tiles")
    return next((y for x, y in zip(curve["x"], curve["y"], strict=True) if x == share), None)
