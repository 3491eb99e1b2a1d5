"""From the features of several arms to what results.json says of them: pure, and the same for every command.

An arm is one way to train (or not to), its seeds are runs that differ in nothing else. Every figure is of the test
cases; an interval is over cases, with the metric averaged over seeds within each resample; differences are paired on
the same resamples, and corrected by Holm over all that are made.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mfl_jax import distances, findings, statistics
from mfl_jax.evaluators import decode, few_label, knn, paper_head, probe
from mfl_jax.evaluators.results import Result, class_metrics, r2, value_metrics
from mfl_jax.evaluators.tasks import Task, check_overlap, split_rows
from mfl_jax.findings import TITLES, ArmRuns, Asked, Found, Say

if TYPE_CHECKING:
    from input_pipeline.tileset import TileSet

OF_TASK: dict[str, tuple[str, Callable[..., Result]]] = {
    "probe": ("linear probe", probe.evaluate),
    "knn": ("nearest neighbours", knn.evaluate),
    "paper_head": ("small network on frozen features", paper_head.evaluate),
}
WITHOUT_TASK = ("decode", "batch_effect", "distance_ratio")
KINDS = (*OF_TASK, "few_label", "retrieval", "clusters", *WITHOUT_TASK)
OF_RUNS = ("saliency",)  # needs more than features: see looks.py
CLASSES_ONLY = ("knn", "paper_head", "few_label", "retrieval", "clusters", "saliency")
FEW = 0.05  # of the labelled tiles: what arms are compared on, beside all of them
FEW_CASES = 8  # below it, resamples of cases hardly differ, and an interval says little


def check(kinds: Sequence[str], tasks: Sequence[Task], tileset: "TileSet", decoded: Sequence[str] = ()) -> None:
    """ValueError for whatever can be known to be wrong before a tile is read."""
    if not kinds:
        raise ValueError(f"there is nothing to evaluate; there are {', '.join((*KINDS, *OF_RUNS))}")
    for kind in kinds:
        if kind not in (*KINDS, *OF_RUNS):
            near = difflib.get_close_matches(kind, (*KINDS, *OF_RUNS), n=1)
            raise ValueError(
                f"there is no evaluation {kind!r}" + (f"; did you mean {near[0]!r}?" if near else "")
                + f"; there are {', '.join((*KINDS, *OF_RUNS))}"
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
        target, known = task.read(columns)
        tested = target[split_rows(columns, tileset.splits, known)["test"]]
        if task.asking is not None and task.asking not in tested:
            raise ValueError(
                f"class {task.asking} is to ask, and no test tile is of it; there are {set(tested.tolist())}"
            )
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
    few_pairs: Sequence[tuple[str, str]] | None = None,
    targets: Mapping[str, np.ndarray] | None = None,
    limits: tuple[float, float] = (0.0, 0.0),
    across: str = "case",
    slide_probe: bool = True,
    transductive: bool = False,
    resamples: int = 2000,
    seed: int = 0,
    say: Say | None = None,
) -> dict[str, Any]:
    """arms, tasks, differences, labels, curves, intervals and reliability of results.json; the rest is the caller's.

    pairs         arms whose differences are wanted; all pairs where it is None
    few_pairs     the same on FEW of the labels, where an arm that was trained on as few stands beside probes
    targets       summaries of the partners (evaluators.decode.summaries), for the kind 'decode'
    limits        um below which a pair of tiles is near and above which it is far, for the kind 'distance_ratio'
    across        'case' or 'slide': what the neighbours of a tile are not of, for the kind 'retrieval'
    slide_probe   whether 'batch_effect' fits a linear probe over slides, beside what takes no fit

    The key of a metric is 'task/auc' for the probe and 'task/kind/auc' for the others. LeakError where an arm was
    trained on cases of the validation or test split, unless `transductive`, which marks its title.
    """
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"arms have different names, and there is at least one; not {names}")
    asked = Asked(
        columns,
        splits,
        pairs,
        few_pairs,
        slide_probe,
        transductive,
        resamples,
        seed,
        say or (lambda line: None),
        across,
    )
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
            distances.of_slides(able, asked, found)
        elif kind == "distance_ratio":
            distances.ratios(able, asked, limits, found)
        for task in tasks:
            if kind in OF_TASK:
                _of_task(kind, task, able, asked, found)
            elif kind == "few_label":
                _at_few(task, arms, _few_label(task, able, asked, found), asked, found)
            elif kind == "retrieval":
                distances.retrieved(task, able, asked, found)
            elif kind == "clusters":
                distances.clustered(task, able, asked, found)
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
            findings.of_seed(found, arm, number, prefix, result.metrics, result.notes)
        findings.add(found, arm, prefix, *findings.over_seeds(results[arm.name], task, asked))
    if not results:
        return
    shown = ("r2", "spearman", "mae") if task.regression else tuple(TITLES)[: 6 if kind == "probe" else 2]
    classes = np.unique(next(iter(results.values()))[0].labels).size
    rows = [findings.metric(prefix, name, classes) for name in shown]
    found.tasks.append({"name": prefix, "title": f"{task.name}, {what}", "metrics": rows})
    findings.differences(results, shown[0], prefix, asked.pairs, asked, found)


def _few_label(task: Task, arms: Sequence[ArmRuns], asked: Asked, found: Found) -> dict[str, list[few_label.Curve]]:
    every: dict[str, list[few_label.Curve]] = {}
    for arm in arms:
        asked.say(f"label efficiency, {task.name}: {arm.title}")
        curves = every.setdefault(arm.name, [])
        for run in arm.seeds:
            curves.append(few_label.curve(run.features, asked.columns, asked.splits, task, **asked.of(run)))
            findings.note(found, arm, f"{task.name}/few_label", curves[-1].notes)
        for unit in few_label.UNITS:
            points = [[p for p in curve.points if p.unit == unit] for curve in curves]
            line: dict[str, Any] = {"arm": arm.name, "by": unit, "metric": f"{task.name}/auc"}
            line |= {"x": [], "y": [], "low": [], "high": [], "cases": [], "tiles": []}
            counts = [(p.labels, p.cases) for p in points[0]]
            for number, same in enumerate(zip(*points, strict=True)):
                if counts[number] in counts[number + 1 :]:  # so few units that less is not to be had
                    told = (
                        f"{same[0].fraction:.0%} of the {unit} are no fewer labels than the next fraction, and left out"
                    )
                    findings.note(found, arm, f"{task.name}/few_label", [told])
                    continue
                scores = np.concatenate([p.scores for p in same])  # draws of labels and seeds alike
                first = curves[0]
                intervals, notes = class_metrics(first.labels, scores, first.cases, ("auc",), **asked.drawn())
                findings.note(found, arm, f"{task.name}/few_label", notes)
                given = findings.document_of(intervals["auc"]) if "auc" in intervals else {"mean": None}
                line["x"].append(same[0].fraction)
                line["cases"].append(same[0].cases)
                line["tiles"].append(same[0].labels)
                for end, name in (("y", "mean"), ("low", "low"), ("high", "high")):
                    line[end].append(given.get(name))
            found.labels.append(line)
    return every


def _at_few(
    task: Task,
    arms: Sequence[ArmRuns],
    curves: Mapping[str, Sequence[few_label.Curve]],
    asked: Asked,
    found: Found,
) -> None:
    """A table and the paired differences on FEW of the tiles' labels: probes that saw so many, and arms that were
    trained on as many alone, which stand by their own predictions. A seed's figure is the mean over its draws.
    """
    prefix, shown = f"{task.name}/few", ("auc", "balanced_accuracy")
    results: dict[str, list[Result]] = {}
    for arm in arms:
        if arm.name in curves:
            each = [curve.results("tiles", FEW) for curve in curves[arm.name]]
        elif arm.share == FEW and all(task.name in run.predictions for run in arm.seeds):
            options = [(run.predictions[task.name], asked.columns, asked.splits, task) for run in arm.seeds]
            each = [[probe.score(*o, **asked.of(r))] for o, r in zip(options, arm.seeds, strict=True)]
        else:
            continue
        results[arm.name] = [result for draws in each for result in draws]
        intervals, notes = findings.over_seeds(results[arm.name], task, asked, shown)
        findings.add(found, arm, prefix, intervals, notes)
        for number, draws in enumerate(each):
            for name in intervals:
                value = float(np.mean([statistics.measure(name, r.labels, r.scores) for r in draws]))
                found.seeds[arm.name][number][f"{prefix}/{name}"] = findings.finite(value)
    if results:
        classes = np.unique(next(iter(results.values()))[0].labels).size
        title = f"{task.name}, labels of {FEW:.0%} of the tiles"
        rows = [findings.metric(prefix, name, classes) for name in shown]
        found.tasks.append({"name": prefix, "title": title, "metrics": rows})
        findings.differences(results, shown[0], prefix, asked.few_pairs, asked, found)


def _decode(arms: Sequence[ArmRuns], asked: Asked, targets: Mapping[str, np.ndarray], found: Found) -> None:
    known: dict[str, None] = {}
    for arm in arms:
        asked.say(f"decoding the partner: {arm.title}")
        each = []
        for number, run in enumerate(arm.seeds):
            each.append(decode.decode(run.features, targets, asked.columns, asked.splits, **asked.of(run)))
            findings.note(found, arm, "decode", each[-1].notes)
            values = {f"decode/{n}": findings.finite(r.metrics["r2"].value) for n, r in each[-1].results.items()}
            found.seeds[arm.name][number] |= values
        for name, first in each[0].results.items():
            stack = np.stack([one.results[name].scores for one in each])
            found_r2, notes = value_metrics(first.labels, stack, first.cases, {name: r2}, **asked.drawn())
            findings.add(found, arm, "decode", found_r2, notes)
            known[name] = None
    for partner in dict.fromkeys(name.split("/")[0] for name in known):
        of = [name for name in known if name.split("/")[0] == partner]
        rows = [{"key": f"decode/{n}", "title": n.removeprefix(f"{partner}/"), "chance": 0.0} for n in of]
        title = f"{partner}, decoded from the features by ridge regression (R\u00b2)"
        found.tasks.append({"name": f"decode/{partner}", "title": title, "metrics": rows})


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
