"""What results.json holds, and a check that says where it does not.

SCHEMA is the documentation: 'text', 'number', 'maybe' (a number or null: not defined), 'flag', 'any'; [x] is a list of
x; {'*': x} maps any name to x; a key that ends in '?' may be absent. Keys not listed here are allowed (results.json is
also the record of the run), unless one looks like a misspelt key. A number is finite: JSON knows no NaN, write null.

A metric's key is free ('tumour/auc'); `tasks` gives keys their titles and order, and the first metric of the first task
is the one that arms are sorted by. A picture is named by its key among the pictures given to report.write.
"""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

KINDS = ("ours", "baseline", "ceiling")
SECTIONS = (
    "pairs",
    "views",
    "curves",
    "results",
    "figures",
    "labels",
    "projections",
    "saliency",
    "neighbours",
    "ledger",
    "reliability",
    "howto",
    "config",
)

INTERVAL = {"mean": "maybe", "low?": "maybe", "high?": "maybe"}
PICTURE = {"picture": "text", "caption": "text", "alt?": "text"}
ARM = {
    "name": "text",
    "title": "text",
    "kind": "text",  # one of KINDS
    "what?": "text",  # one line: what it has learnt from
    "budget?": {"steps?": "number", "examples?": "number", "wall_s?": "number"},  # wall_s: of one seed
    "seeds?": [{"seed": "number", "metrics": {"*": "maybe"}, "wall_s?": "number"}],
    "metrics": {"*": INTERVAL},  # over seeds and cases
}
SCHEMA: dict[str, Any] = {
    "title": "text",
    "question": "text",
    "answer": "text",  # two sentences
    "created": "text",
    "version": "text",
    "arms": [ARM],
    "intervals?": "text",  # how intervals and p values were made, one sentence
    "cohort?": {"*": "any"},  # facts: {'Cases': 40, ...}
    "tasks?": [
        {
            "name": "text",
            "title": "text",
            "what?": "text",
            "metrics": [{"key": "text", "title": "text", "chance?": "number", "better?": "text"}],  # 'higher'|'lower'
        }
    ],
    "differences?": [
        {
            "a": "text",
            "b": "text",
            "metric": "text",
            "difference": "maybe",  # a minus b
            "low?": "maybe",
            "high?": "maybe",
            "p?": "maybe",
            "p_holm?": "maybe",
        }
    ],
    "curves?": [{"arm": "text", "seed": "number", "x": ["number"], "y": ["maybe"]}],  # training loss by step
    "labels?": [  # label efficiency: x a fraction (0, 1] of the labels
        {
            "arm": "text",
            "by": "text",  # 'cases' or 'tiles'
            "metric": "text",
            "x": ["number"],
            "y": ["maybe"],
            "low?": ["maybe"],
            "high?": ["maybe"],
            "cases?": ["number"],  # that the labels are of, and how many labels, mean over draws
            "tiles?": ["number"],
        }
    ],
    "pairs?": {"what?": "text", "pictures": [PICTURE]},
    "views?": {"what?": "text", "pictures": [PICTURE]},
    "registration?": [
        {
            "slide": "text",
            "partner": "text",
            "error_um?": "maybe",
            "score?": "maybe",
            "passed?": "flag",
            "picture?": "text",
        }
    ],
    "projections?": [
        {
            "arm": "text",
            "method?": "text",  # 'PCA', 'UMAP'
            "point?": "text",  # what each of them is: 'a tile of a test case'
            "x": ["number"],
            "y": ["number"],
            # names: values are their indices (drawn as categories); without names numbers on a scale, or null
            "colours": [{"name": "text", "values": ["maybe"], "names?": ["text"]}],
        }
    ],
    "figures?": {"what?": "text", "pictures": [PICTURE]},  # curves and tables of predictions
    "saliency?": {
        "what?": "text",
        "score?": "text",  # what the score is, for the axis
        "chance?": "number",
        "arms?": [{"arm": "text", **INTERVAL}],
        "pictures?": [PICTURE],
    },
    "neighbours?": {"what?": "text", "pictures": [PICTURE]},
    "ledger?": [{"title": "text", "text?": "text", "seconds?": {"*": "number"}, "tiles?": "number"}],
    "reliability?": ["text"],
    "howto?": [{"what": "text", "command?": "text"}],
    "config?": "any",
    "hashes?": {"*": "text"},
    "skipped?": {"*": "text"},  # section of SECTIONS -> why it had to be left out
}


class ReportError(ValueError):
    pass


def validate(results: Mapping[str, Any]) -> None:
    """ReportError with every fault found (the first ten of them), each by its place: arms[2].metrics['auc'].low ..."""
    faults = list(_faults(results, SCHEMA, "")) or list(_cross(results))
    if faults:
        more = f"\n... and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ReportError("results.json is not as it should be:\n" + "\n".join(faults[:10]) + more)


def _faults(value: Any, spec: Any, at: str) -> Iterator[str]:
    if isinstance(spec, list):
        if not isinstance(value, list):
            yield f"{at}: {type(value).__name__}, where a list should be"
            return
        for i, item in enumerate(value):
            yield from _faults(item, spec[0], f"{at}[{i}]")
    elif isinstance(spec, dict):
        if not isinstance(value, dict):
            yield f"{at or 'the document'}: {type(value).__name__}, where an object should be"
        elif "*" in spec:
            for key, item in value.items():
                yield from _faults(item, spec["*"], f"{at}[{key!r}]")
        else:
            yield from _members(value, spec, at)
    elif not _fits(value, spec):
        yield f"{at}: {value!r:.60}, where {_MEANS[spec]} should be"


def _members(value: dict, spec: dict, at: str) -> Iterator[str]:
    known = {key.rstrip("?"): (key.endswith("?"), inner) for key, inner in spec.items()}
    absent = [key for key in known if key not in value]
    for key in value:
        if key not in known and (near := difflib.get_close_matches(str(key), absent, 1, 0.8)):
            yield f"{at or 'the document'}: unknown key {key!r}; did you mean {near[0]!r}?"
    for key, (optional, inner) in known.items():
        if key in value:
            yield from _faults(value[key], inner, f"{at}.{key}" if at else key)
        elif not optional:
            yield f"{at or 'the document'}: key {key!r} is missing"


_MEANS = {
    "text": "text",
    "number": "a finite number",
    "maybe": "a finite number or null",
    "flag": "true or false",
    "any": "JSON without NaN",
}


def _fits(value: Any, kind: str) -> bool:
    if kind == "any":
        if isinstance(value, dict):
            return all(isinstance(k, str) and _fits(v, kind) for k, v in value.items())
        if isinstance(value, list):
            return all(_fits(v, kind) for v in value)
        return value is None or isinstance(value, (str, bool)) or _fits(value, "number")
    if kind == "text":
        return isinstance(value, str)
    if kind == "flag":
        return isinstance(value, bool)
    if value is None:
        return kind == "maybe"
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _cross(results: Mapping[str, Any]) -> Iterator[str]:
    """What no single value can show: names that must exist, lengths that must agree, limits."""
    arms = [arm["name"] for arm in results["arms"]]
    if len(set(arms)) < len(arms):
        yield f"arms: the same name twice among {arms}"
    for i, arm in enumerate(results["arms"]):
        yield from _one_of(arm["kind"], KINDS, f"arms[{i}].kind")
        for key, interval in arm["metrics"].items():
            yield from _ordered(interval, f"arms[{i}].metrics[{key!r}]")
    for key in ("curves", "labels", "projections"):
        for i, item in enumerate(results.get(key, [])):
            yield from _one_of(item["arm"], arms, f"{key}[{i}].arm")
            yield from _same_length(item, ("x", "y", "low", "high", "cases", "tiles"), f"{key}[{i}]")
    for i, item in enumerate(results.get("labels", [])):
        yield from _one_of(item["by"], ("cases", "tiles"), f"labels[{i}].by")
        if not all(0 < x <= 1 for x in item["x"]):
            yield f"labels[{i}].x: {item['x']}, where fractions above 0 and up to 1 should be"
    for i, item in enumerate(results.get("differences", [])):
        yield from _one_of(item["a"], arms, f"differences[{i}].a")
        yield from _one_of(item["b"], arms, f"differences[{i}].b")
        yield from _ordered(item, f"differences[{i}]")
    for i, item in enumerate(results.get("projections", [])):
        for j, colour in enumerate(item["colours"]):
            yield from _colour(colour, len(item["x"]), f"projections[{i}].colours[{j}]")
    for i, item in enumerate(results.get("saliency", {}).get("arms", [])):
        yield from _one_of(item["arm"], arms, f"saliency.arms[{i}].arm")
        yield from _ordered(item, f"saliency.arms[{i}]")
    for section in results.get("skipped", {}):
        yield from _one_of(section, SECTIONS, "skipped")


def _one_of(value: str, allowed: Sequence[str], at: str) -> Iterator[str]:
    if value not in allowed:
        yield f"{at}: {value!r}, which is none of {', '.join(allowed)}"


def _ordered(interval: Mapping[str, Any], at: str) -> Iterator[str]:
    low, high = interval.get("low"), interval.get("high")
    if (low is None) != (high is None):
        yield f"{at}: low and high come together, seen low={low} high={high}"
    elif low is not None and low > high:
        yield f"{at}: low {low} is above high {high}"


def _same_length(item: Mapping[str, Any], keys: Sequence[str], at: str) -> Iterator[str]:
    lengths = {key: len(item[key]) for key in keys if key in item}
    if len(set(lengths.values())) > 1:
        yield f"{at}: lists of different lengths {lengths}"


def _colour(colour: Mapping[str, Any], points: int, at: str) -> Iterator[str]:
    if len(colour["values"]) != points:
        yield f"{at}.values: {len(colour['values'])} of them for {points} points"
    if "names" in colour:
        bad = [v for v in colour["values"] if v is None or v != int(v) or not 0 <= v < len(colour["names"])]
        if bad:
            yield f"{at}.values: {bad[0]} is no index into its {len(colour['names'])} names"
