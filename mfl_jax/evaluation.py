"""From the features of several arms to what results.json says of them: pure, and the same for every command.

An arm is one way to train (or not to), its seeds are runs that differ in nothing else. Every figure is of the test
cases; an interval is over cases, with the metric averaged over seeds within each resample; differences are paired on
the same resamples, and corrected by Holm over all that are made.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mfl_jax import statistics
from mfl_jax.evaluators import batch_effect, decode, few_label, knn, paper_head, probe, retrieval
from mfl_jax.evaluators.results import Result, class_metrics, compare, mean_score, r2, value_metrics
from mfl_jax.evaluators.tasks import Task, check_overlap, split_rows
from mfl_jax.statistics import Interval

if TYPE_CHECKING:
    from input_pipeline.tileset import TileSet

OF_TASK: dict[str, tuple[str, Callable[..., Result]]] = {
    "probe": ("linear probe", probe.evaluate),
    "knn": ("nearest neighbours", knn.evaluate),
    "paper_head": ("small network on frozen features", paper_head.evaluate),
}
WITHOUT_TASK = ("decode", "batch_effect", "distance_ratio")
KINDS = (*OF_TASK, "few_label", "retrieval", *WITHOUT_TASK)
CLASSES_ONLY = ("knn", "paper_head", "few_label", "retrieval")
TITLES = {
    "auc": "AUC",
    "balanced_accuracy": "Balanced accuracy",
    "f1": "F1",
    "kappa": "Kappa",
    "average_precision": "Average precision",
    "ece": "Calibration error",
    "accuracy": "Accuracy",
    "r2": "R\u00b2",
    "spearman": "Rank correlation",
    "mae": "Absolute error",
    "map": "Mean average precision",
    "recall_1": "Recall@1",
    "recall_5": "Recall@5",
    "recall_10": "Recall@10",
    "ndcg": "nDCG",
    "addr_global": "Far/near, all pairs",
    "addr_local": "Far/near, slide by slide",
}
LOWER = ("ece", "mae")
RETRIEVED = ("map", "recall_1", "recall_5", "recall_10", "ndcg")
FEW_CASES = 8  # below it, resamples of cases hardly differ, and an interval says little
Say = Callable[[str], None]


@dataclass(frozen=True)
class Seed:
    """One run of an arm. Row i of everything is row i of the columns."""

    seed: int
    features: np.ndarray  # [N, D]
    # task -> [N] or [N, K]: of a model trained end to end, scored in place of the linear probe
    predictions: Mapping[str, np.ndarray] = field(default_factory=dict)
    wall_s: float | None = None
    curve: tuple[Sequence[float], Sequence[float | None]] | None = None  # steps, training loss
    pretrained: tuple[str, ...] = ()  # cases that it was trained on


@dataclass(frozen=True)
class ArmRuns:
    name: str
    title: str
    kind: str  # 'ours', 'baseline' or 'ceiling'
    seeds: tuple[Seed, ...]
    what: str = ""  # one line: what it has learnt from
    budget: Mapping[str, float] = field(default_factory=dict)  # steps, examples, wall_s
    skip: tuple[str, ...] = ()  # kinds that mean nothing for it: few_label, where it has seen every label


@dataclass
class Found:
    """What has been found so far, in the words of report/schema.py."""

    metrics: dict[str, dict[str, dict[str, float | None]]]  # arm -> key -> mean, low, high
    seeds: dict[str, list[dict[str, float | None]]]  # arm -> of each seed: key -> value
    tasks: list[dict[str, Any]] = field(default_factory=list)
    labels: list[dict[str, Any]] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    transductive: set[str] = field(default_factory=set)  # arms that were trained on cases of val or test


@dataclass(frozen=True)
class Asked:
    """What is the same for every arm."""

    columns: Mapping[str, np.ndarray]
    splits: Mapping[str, Sequence]
    pairs: Sequence[tuple[str, str]] | None
    transductive: bool
    resamples: int
    seed: int
    say: Say

    def of(self, run: Seed) -> dict[str, Any]:
        """Of one seed only the values are wanted: intervals are made once, over all seeds."""
        options: dict[str, Any] = {"pretrained": run.pretrained, "transductive": self.transductive}
        return options | {"resamples": 0, "seed": self.seed}

    def drawn(self) -> dict[str, Any]:
        return {"resamples": self.resamples, "seed": self.seed}


def check(kinds: Sequence[str], tasks: Sequence[Task], tileset: "TileSet", decoded: Sequence[str] = ()) -> None:
    """ValueError for whatever can be known to be wrong before a tile is read."""
    if not kinds:
        raise ValueError(f"there is nothing to evaluate; there are {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1)
            raise ValueError(
                f"there is no evaluation {kind!r}" + (f"; did you mean {near[0]!r}?" if near else "")
                + f"; there are {', '.join(KINDS)}"
            )  # fmt: skip
    columns = dict(tileset.tiles) | {"case": np.array(tileset.cases)[tileset.tiles["case"]]}
    for task in tasks:
        if task.target not in tileset.tiles:
            near = difflib.get_close_matches(task.target, list(tileset.tiles), n=1, cutoff=0.5)
            raise ValueError(
                f"the tile set has no column {task.target!r}" + (f"; did you mean {near[0]!r}?" if near else "")
                + f"; there are {', '.join(sorted(tileset.tiles))}"
            )  # fmt: skip
        if task.regression and (wrong := [kind for kind in kinds if kind in CLASSES_ONLY]):
            raise ValueError(f"{', '.join(wrong)} take classes, and {task.name!r} is a regression: give a threshold")
        split_rows(columns, tileset.splits, task.read(columns)[1])
    if not tasks and (wrong := [kind for kind in kinds if kind not in WITHOUT_TASK]):
        raise ValueError(f"{', '.join(wrong)} need a target, a column of the tile set")
    check_overlap(tileset.splits)
    if "decode" in kinds:
        decode.check_partners(decoded, tileset)


def assemble(
    arms: Sequence[ArmRuns],
    columns: Mapping[str, np.ndarray],
    splits: Mapping[str, Sequence],
    tasks: Sequence[Task],
    *,
    kinds: Sequence[str] = ("probe",),
    pairs: Sequence[tuple[str, str]] | None = None,
    targets: Mapping[str, np.ndarray] | None = None,
    limits: tuple[float, float] = (0.0, 0.0),
    transductive: bool = False,
    resamples: int = 2000,
    seed: int = 0,
    say: Say | None = None,
) -> dict[str, Any]:
    """arms, tasks, differences, labels, curves, intervals and reliability of results.json; the rest is the caller's.

    pairs    arms whose differences are wanted; all pairs where it is None
    targets  summaries of the partners (evaluators.decode.summaries), for the kind 'decode'
    limits   um below which a pair of tiles is near and above which it is far, for the kind 'distance_ratio'

    The key of a metric is 'task/auc' for the probe and 'task/kind/auc' for the others. LeakError where an arm was
    trained on cases of the validation or test split, unless `transductive`, which marks its title.
    """
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"arms have different names, and there is at least one; not {names}")
    asked = Asked(columns, splits, pairs, transductive, resamples, seed, say or (lambda line: None))
    found = Found({name: {} for name in names}, {arm.name: [{} for _ in arm.seeds] for arm in arms})
    for arm in arms:
        for run in arm.seeds:
            if check_overlap(splits, run.pretrained, transductive=transductive):
                found.transductive.add(arm.name)
    for kind in kinds:
        able = [arm for arm in arms if kind not in arm.skip]
        found.notes |= {
            f"{arm.title}: {kind} was left out, for it means nothing here": None for arm in arms if kind in arm.skip
        }
        if kind == "decode":
            _decode(able, asked, targets or {}, found)
        elif kind == "batch_effect":
            _batch_effect(able, asked, found)
        elif kind == "distance_ratio":
            _distance_ratio(able, asked, limits, found)
        for task in tasks:
            if kind in OF_TASK:
                _of_task(kind, task, able, asked, found)
            elif kind == "few_label":
                _few_label(task, able, asked, found)
            elif kind == "retrieval":
                _retrieval(task, able, asked, found)
    return _document(arms, asked, found)


def _of_task(kind: str, task: Task, arms: Sequence[ArmRuns], asked: Asked, found: Found) -> None:
    what, function = OF_TASK[kind]
    prefix = task.name if kind == "probe" else f"{task.name}/{kind}"
    results: dict[str, list[Result]] = {}
    for arm in arms:
        asked.say(f"{what}, {task.name}: {arm.title}")
        for number, run in enumerate(arm.seeds):
            if kind == "probe" and task.name in run.predictions:
                given = run.predictions[task.name]
                result = probe.score(given, asked.columns, asked.splits, task, **asked.of(run))
            else:
                result = function(run.features, asked.columns, asked.splits, task, **asked.of(run))
            results.setdefault(arm.name, []).append(result)
            _note(found, arm, prefix, result.notes)
            found.seeds[arm.name][number] |= {f"{prefix}/{m}": _finite(i.value) for m, i in result.metrics.items()}
        _add(found, arm, prefix, *_over_seeds(results[arm.name], task, asked))
    if not results:
        return
    shown = ("r2", "spearman", "mae") if task.regression else tuple(TITLES)[: 6 if kind == "probe" else 2]
    classes = np.unique(next(iter(results.values()))[0].labels).size
    rows = [_metric(prefix, name, classes) for name in shown]
    found.tasks.append({"name": prefix, "title": f"{task.name}, {what}", "metrics": rows})
    _differences(results, shown[0], prefix, asked, found)


def _over_seeds(results: Sequence[Result], task: Task, asked: Asked) -> tuple[Mapping[str, Interval], tuple[str, ...]]:
    first, stack = results[0], np.stack([r.scores for r in results])
    make = value_metrics if task.regression else class_metrics
    return make(first.labels, stack, first.cases, **asked.drawn())


def _retrieval(task: Task, arms: Sequence[ArmRuns], asked: Asked, found: Found) -> None:
    prefix, chances = f"{task.name}/retrieval", {}
    results: dict[str, list[Result]] = {}
    for arm in arms:
        asked.say(f"retrieval in other cases, {task.name}: {arm.title}")
        each = [
            retrieval.evaluate(run.features, asked.columns, asked.splits, task, **asked.of(run)) for run in arm.seeds
        ]
        for number, one in enumerate(each):
            found.seeds[arm.name][number] |= {f"{prefix}/{m}": _finite(i.value) for m, i in one.metrics.items()}
            _note(found, arm, prefix, one.notes)
        chances = each[0].chance
        _add(found, arm, prefix, retrieval.over_seeds(each, **asked.drawn()), ())
        results[arm.name] = [retrieval.as_result(one, "map") for one in each]
    rows = []
    for name in RETRIEVED:
        chance = {"chance": chances[name]} if name in chances else {}
        rows.append({"key": f"{prefix}/{name}", "title": TITLES[name]} | chance)
        if any(f"{prefix}/positive_{name}" in found.metrics[arm.name] for arm in arms):
            rows.append({"key": f"{prefix}/positive_{name}", "title": f"{TITLES[name]}, class 1"})
    found.tasks.append({"name": prefix, "title": f"{task.name}, found in other cases", "metrics": rows})
    _differences(results, "map", prefix, asked, found, mean_score)


def _distance_ratio(arms: Sequence[ArmRuns], asked: Asked, limits: tuple[float, float], found: Found) -> None:
    rows = np.isin(asked.columns["case"], list(asked.splits["test"]))
    columns = {name: values[rows] for name, values in asked.columns.items()}
    options: dict[str, Any] = {"near_um": limits[0], "far_um": limits[1], "seed": asked.seed}
    for arm in arms:
        asked.say(f"distances along a slide: {arm.title}")
        features = [run.features[rows] for run in arm.seeds]
        ratios, notes = retrieval.distance_ratio(features, columns, **options, resamples=asked.resamples)
        for number, one in enumerate(features):
            alone, _ = retrieval.distance_ratio(one, columns, **options, resamples=0)
            found.seeds[arm.name][number] |= {
                f"addr/{m.removeprefix('addr_')}": _finite(i.value) for m, i in alone.items()
            }
        _add(found, arm, "addr", {name.removeprefix("addr_"): ratio for name, ratio in ratios.items()}, notes)
    what = f"Mean distance of tiles more than {limits[1]:g} um apart over that of tiles within {limits[0]:g} um."
    shown = [{"key": f"addr/{name}", "title": TITLES[f"addr_{name}"], "chance": 1.0} for name in ("global", "local")]
    found.tasks.append({"name": "addr", "title": "Far over near (ADDR)", "what": what, "metrics": shown})


def _differences(
    results: Mapping[str, Sequence[Result]],
    metric: str,
    prefix: str,
    asked: Asked,
    found: Found,
    function: Callable | None = None,
) -> None:
    names = list(results)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]] if asked.pairs is None else asked.pairs
    pairs = [pair for pair in pairs if set(pair) <= set(names)]
    if not pairs:
        return
    try:
        compared = compare(results, function or metric, pairs, **asked.drawn())
    except ValueError as error:  # one case, or a class that is missing: there is no interval to be had
        found.notes[f"no differences of {prefix}/{metric}: {error}"] = None
        return
    for d in compared:
        ends = {"difference": d.interval.value, "low": d.interval.low, "high": d.interval.high, "p": d.p}
        found.differences.append({"a": d.first, "b": d.second, "metric": f"{prefix}/{metric}", **ends})


def _few_label(task: Task, arms: Sequence[ArmRuns], asked: Asked, found: Found) -> None:
    for arm in arms:
        asked.say(f"label efficiency, {task.name}: {arm.title}")
        curves = []
        for run in arm.seeds:
            curves.append(few_label.curve(run.features, asked.columns, asked.splits, task, **asked.of(run)))
            _note(found, arm, f"{task.name}/few_label", curves[-1].notes)
        for unit in few_label.UNITS:
            points = [[p for p in curve.points if p.unit == unit] for curve in curves]
            line: dict[str, Any] = {"arm": arm.name, "by": unit, "metric": f"{task.name}/auc"}
            line |= {"x": [], "y": [], "low": [], "high": []}
            for same in zip(*points, strict=True):
                scores = np.concatenate([p.scores for p in same])  # draws of labels and seeds alike
                first = curves[0]
                intervals, notes = class_metrics(first.labels, scores, first.cases, ("auc",), **asked.drawn())
                _note(found, arm, f"{task.name}/few_label", notes)
                given = _document_of(intervals["auc"]) if "auc" in intervals else {"mean": None}
                line["x"].append(same[0].fraction)
                for end, name in (("y", "mean"), ("low", "low"), ("high", "high")):
                    line[end].append(given.get(name))
            found.labels.append(line)


def _decode(arms: Sequence[ArmRuns], asked: Asked, targets: Mapping[str, np.ndarray], found: Found) -> None:
    known: dict[str, None] = {}
    for arm in arms:
        asked.say(f"decoding the partner: {arm.title}")
        each = []
        for number, run in enumerate(arm.seeds):
            each.append(decode.decode(run.features, targets, asked.columns, asked.splits, **asked.of(run)))
            _note(found, arm, "decode", each[-1].notes)
            values = {f"decode/{n}": _finite(r.metrics["r2"].value) for n, r in each[-1].results.items()}
            found.seeds[arm.name][number] |= values
        for name, first in each[0].results.items():
            stack = np.stack([one.results[name].scores for one in each])
            found_r2, notes = value_metrics(first.labels, stack, first.cases, {name: r2}, **asked.drawn())
            _add(found, arm, "decode", found_r2, notes)
            known[name] = None
    for partner in dict.fromkeys(name.split("/")[0] for name in known):
        of = [name for name in known if name.split("/")[0] == partner]
        rows = [{"key": f"decode/{n}", "title": n.removeprefix(f"{partner}/"), "chance": 0.0} for n in of]
        title = f"{partner}, decoded from the features by ridge regression (R\u00b2)"
        found.tasks.append({"name": f"decode/{partner}", "title": title, "metrics": rows})


def _batch_effect(arms: Sequence[ArmRuns], asked: Asked, found: Found) -> None:
    """Of several seeds the mean, without an interval: its scores are of different neighbours."""
    titles = {"nearest": "Slide of the nearest tile", "linear": "Linear probe", "silhouette": "Silhouette"}
    chances: dict[str, float] = {}
    for arm in arms:
        asked.say(f"batch effect: {arm.title}")
        each = [batch_effect.measure(run.features, asked.columns, **asked.drawn()) for run in arm.seeds]
        for number, one in enumerate(each):
            _note(found, arm, "batch_effect", one.notes)
            values = {f"batch_effect/{m}": _finite(i.value) for m, i in one.metrics.items()}
            found.seeds[arm.name][number] |= values
            chances |= one.chance
        for name, interval in each[0].metrics.items():
            mean = _finite(float(np.mean([one.metrics[name].value for one in each])))
            shown = _document_of(interval) if len(each) == 1 else {"mean": mean}
            found.metrics[arm.name][f"batch_effect/{name}"] = shown
    rows = []
    for name, title in titles.items():
        row = {"key": f"batch_effect/{name}", "title": title, "better": "lower"}
        rows.append(row | ({"chance": chances[name]} if name in chances else {}))
    what = "How well do the features name the slide? What names it (stain, scanner) may stand in for what is asked."
    found.tasks.append({"name": "batch_effect", "title": "Batch effect", "what": what, "metrics": rows})


def _metric(prefix: str, name: str, classes: int) -> dict[str, Any]:
    chance = {"auc": 0.5, "balanced_accuracy": 1 / classes, "kappa": 0.0, "r2": 0.0, "spearman": 0.0}
    row: dict[str, Any] = {"key": f"{prefix}/{name}", "title": TITLES[name]}
    row |= {"better": "lower"} if name in LOWER else {}
    return row | ({"chance": chance[name]} if name in chance else {})


def _add(found: Found, arm: ArmRuns, prefix: str, metrics: Mapping[str, Interval], notes: Sequence[str]) -> None:
    found.metrics[arm.name] |= {f"{prefix}/{name}": _document_of(interval) for name, interval in metrics.items()}
    _note(found, arm, prefix, notes)


def _note(found: Found, arm: ArmRuns, where: str, notes: Sequence[str]) -> None:
    """Once, though several seeds may say it."""
    found.notes |= {f"{arm.title}, {where}: {note}": None for note in notes}


def _document_of(interval: Interval) -> dict[str, float | None]:
    return {"mean": _finite(interval.value), "low": _finite(interval.low), "high": _finite(interval.high)}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _document(arms: Sequence[ArmRuns], asked: Asked, found: Found) -> dict[str, Any]:
    listed, curves = [], []
    for arm in arms:
        seeds = []
        for run, values in zip(arm.seeds, found.seeds[arm.name], strict=True):
            row: dict[str, Any] = {"seed": run.seed, "metrics": values}
            seeds.append(row | ({"wall_s": run.wall_s} if run.wall_s is not None else {}))
            if run.curve is not None:
                curves.append({"arm": arm.name, "seed": run.seed, "x": list(run.curve[0]), "y": list(run.curve[1])})
        title = arm.title + (" (transductive)" if arm.name in found.transductive else "")
        row = {"name": arm.name, "title": title, "kind": arm.kind, "what": arm.what, "budget": dict(arm.budget)}
        listed.append(row | {"seeds": seeds, "metrics": found.metrics[arm.name]})
    corrected = statistics.holm([d["p"] for d in found.differences])
    differences = [d | {"p_holm": float(p)} for d, p in zip(found.differences, corrected, strict=True)]
    held_out = len({case for split in ("val", "test") for case in asked.splits.get(split, ())})
    clean = [arm.title for arm in arms if arm.name not in found.transductive]
    checked = [f"None of the {held_out} validation and test cases was trained on (checked): {', '.join(clean)}."]
    intervals = (
        f"Intervals are 95 % bootstraps over the cases of the test split ({asked.resamples} resamples), the metric "
        "averaged over seeds within each; differences are paired on the same resamples, and their p values corrected "
        "by Holm's method over all of them."
    )
    tested = len(set(asked.splits["test"]))
    if tested < FEW_CASES:
        intervals += f" The test split has {tested} cases only: intervals and p values over so few say little."
    return {
        "arms": listed,
        "tasks": found.tasks,
        "differences": differences,
        "labels": found.labels,
        "curves": curves,
        "intervals": intervals,
        "reliability": [*(checked if clean else []), *found.notes],
    }
