"""`mfl eval`: runs and a tile set in, results.json and pictures out. What can be refused is refused before a tile is
read."""

import datetime
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mfl_jax
from mfl_jax import arms, evaluation, looks, sharding
from mfl_jax import config as configs
from mfl_jax.evaluators import decode, projection, retrieval
from mfl_jax.evaluators.tasks import Task
from mfl_jax.findings import ArmRuns
from mfl_jax.report import tables

if TYPE_CHECKING:
    from input_pipeline.tileset import TileSet

POINTS = 600  # of a projection
STAINS = ("label_stain", "label_scanner", "label_site")  # columns that say what a slide looks like and means nothing


def evaluate(
    paths: Sequence[Path],
    tileset: "TileSet",
    task: Task,
    *,
    kinds: Sequence[str] = ("probe",),
    baselines: Sequence[str] = (),
    decoded: Sequence[str] = (),
    truth: str = "",
    feature: str = "he",
    batch: int = 256,
    limits: tuple[float, float] = (0.0, 0.0),
    across: str = "case",
    transductive: bool = False,
    resamples: int = 2000,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], looks.Pictures]:
    """results.json of the runs, and its pictures. `decoded` are the partners of the kind 'decode': all of the set where
    none is named; `truth` is what the maps of the kind 'saliency' are scored against, see looks.truth_of; `limits` the
    near and far um of the kind 'distance_ratio'; `across` what is left out of the answers of the kind 'retrieval'.
    """
    tasks = [task] if set(kinds) - set(evaluation.WITHOUT_TASK) else []
    if "distance_ratio" in kinds:
        retrieval.check_limits(*limits)
    decoded = tuple(decoded) or tuple(partner.name for partner in tileset.spec.partners)
    evaluation.check(kinds, tasks, tileset, decoded)
    shown = looks.truth_of(tileset, truth)
    if "saliency" in kinds:
        if tileset.spec.he_kind != "image":
            raise ValueError(f"saliency is of tiles; {tileset.root} holds regions, which have no pixels")
        looks.check(task, tileset.tiles)
    if unknown := sorted(set(baselines) - set(arms.BASELINES)):
        raise ValueError(f"there is no baseline {', '.join(unknown)}; there are {', '.join(arms.BASELINES)}")
    runs = arms.look(paths, tileset, transductive=transductive)
    firsts = {name: members[0].path for name, members in arms.group(runs).items()}
    options: dict[str, Any] = {"batch": batch, "feature": feature, "baselines": baselines, "tasks": tasks, "say": say}
    found = arms.collect(runs, tileset, sharding.make_mesh(), **options)
    targets = None
    if "decode" in kinds:
        say("reading the partners that are to be decoded")
        targets = decode.summaries(tileset, decoded)
    options = {
        "kinds": kinds,
        "targets": targets,
        "limits": limits,
        "across": across,
        "transductive": transductive,
        "resamples": resamples,
        "say": say,
    }
    results = evaluation.assemble(found.arms, found.columns, tileset.splits, tasks, **options)
    results["reliability"] = [*found.notes, *results["reliability"]]
    sections, pictures = dict[str, Any](), dict[str, np.ndarray]()
    if "saliency" in kinds:
        say("drawing what the encoders look at")
        sections, pictures = looked_at(firsts, found, tileset, task, shown, feature)
    planes = projections(found.arms, found.columns, tileset, tasks)
    if not planes:
        results["reliability"].append(f"no projection: test cases have fewer than {projection.LEAST['pca']} rows")
    described = {
        "title": f"{len(found.arms)} arms on {tileset.spec.name}",
        "question": f"How much of {task.target!r} can be read from frozen features of H&E alone, on unseen cases?"
        if tasks
        else "What do frozen features of H&E alone hold, on unseen cases?",
        "answer": answer(results, len(set(tileset.splits.get("test", ())))),
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": mfl_jax.__version__,
        "cohort": cohort(tileset),
        "projections": planes,
        "config": {str(run.path): json.loads(configs.to_json(run.config)) for run in runs},
        "hashes": {"tile set": tileset.hash} | {f"checkpoint of {path}": d for path, d in found.digests.items()},
    }
    return described | results | sections, pictures


def looked_at(
    firsts: Mapping[str, Path],
    found: arms.Collected,
    tileset: "TileSet",
    task: Task,
    truth: looks.Truth | None,
    feature: str,
) -> tuple[dict[str, Any], looks.Pictures]:
    """The section 'saliency' of the arms that are runs, or why there is none."""
    features = {arm.name: arm.seeds[0].features for arm in found.arms}
    encoders = {name: looks.Encoder(name, path, features[name]) for name, path in firsts.items()}
    try:
        section, pictures = looks.section(encoders, found.columns, tileset, task, truth, feature=feature)
    except looks.NothingToShow as error:
        return {"skipped": {"saliency": str(error)}}, {}
    return {"saliency": section}, pictures


def answer(results: Mapping[str, Any], cases: int) -> str:
    """The best arms by the first metric with their intervals, and how many differences stand, on so many test cases."""
    metric = next((task["metrics"][0] for task in results["tasks"] if task["metrics"]), None)
    if metric is None:
        return "No figure could be made: see what is said under reliability."
    ranked = [arm for arm in tables.sorted_arms(results, metric) if arm["metrics"].get(metric["key"])]
    told = [
        f"{arm['title']} {tables.figure(item['mean'])} {tables.interval(item)}".strip()
        for arm in ranked[:3]
        for item in [arm["metrics"][metric["key"]]]
    ]
    rows = results["differences"]
    clear = sum(row["p_holm"] < 0.05 for row in rows)
    found = f"Best by {metric['title']} ({metric['key']}): {'; '.join(told)}."
    if cases < evaluation.FEW_CASES:
        return f"{found} There are {cases} test cases only, on which no difference can be told from chance."
    return found + (
        f" Of {len(rows)} paired differences, {clear} are below p = 0.05 after Holm's correction." if rows else ""
    )


def colours(tileset: "TileSet", tasks: Sequence[Task] = (), more: Sequence[str] = ()) -> list[str]:
    """Columns to colour a projection by: what is asked, the label, the slide, and its stain or scanner where the tile
    set knows it."""
    labels = ("label",) if tileset.spec.label_names else ()
    asked = [task.name if task.threshold is not None else task.target for task in tasks]
    names = (*asked, *labels, "slide", *STAINS, *more)
    return [name for name in dict.fromkeys(names) if name in asked or name in tileset.tiles]


def class_names(tileset: "TileSet") -> dict[str, Sequence[str]]:
    """Of the columns that are classes: what each code is called."""
    classes = {name: known for name, known in tileset.spec.params.get("classes", {}).items() if known}
    return classes | ({"label": tileset.spec.label_names} if tileset.spec.label_names else {})


def projections(
    arms: Sequence[ArmRuns],
    columns: Mapping[str, np.ndarray],
    tileset: "TileSet",
    tasks: Sequence[Task] = (),
    *,
    shown: Sequence[str] | None = None,
    names: Mapping[str, Sequence[str]] = {},
    methods: Sequence[str] | None = None,
    limit: int = POINTS,
) -> list[dict[str, Any]]:
    """The first seed of every arm in a plane, the same tiles of test cases for all of them: on its two principal axes,
    and by UMAP where umap-learn is installed; none where they are fewer than it takes. Coloured by `shown`, or
    colours(); a task with a threshold is a column of its own, and `names` are of classes that the tile set does not
    name."""
    if methods is None:
        methods = [m for m in projection.METHODS if m == "pca" or importlib.util.find_spec("umap")]
    shown = colours(tileset, tasks) if shown is None else shown
    asked, named = _classes_asked(tasks, columns)
    names = {**class_names(tileset), **names, **named}
    held = np.isin(columns["case"], list(tileset.splits["test"]))
    methods = [m for m in methods if held.sum() >= projection.LEAST[m]]
    columns = {name: np.asarray(values)[held] for name, values in {**columns, **asked}.items()}
    options: dict[str, Any] = {"colour": shown, "limit": limit}
    point = f"a {'region' if tileset.spec.he_kind == 'grid' else 'tile'} of a test case"
    made = []
    for method in methods:
        for arm in arms:
            found = projection.project(arm.seeds[0].features[held], columns, method=method, **options)
            x, y = (found.xy[:, i].round(4).tolist() for i in (0, 1))
            colour = [_colour(name, values, names.get(name, ())) for name, values in found.colours.items()]
            what = {"arm": arm.name, "method": method.upper(), "point": point}
            made.append({**what, "x": x, "y": y, "colours": colour})
    return made


def _colour(name: str, values: np.ndarray, classes: Sequence[str] = ()) -> dict[str, Any]:
    if values.dtype.kind in "US":
        names, code = np.unique(values, return_inverse=True)
        return {"name": name, "values": code.tolist(), "names": names.tolist()}
    numbers = values.astype(np.float64)
    if classes:
        code = np.where(numbers >= 0, numbers, len(classes)).astype(int)
        unknown = ["unknown"] if (code == len(classes)).any() else []
        return {"name": name, "values": code.tolist(), "names": [*classes, *unknown]}
    return {"name": name, "values": [round(v, 4) if math.isfinite(v) else None for v in numbers.tolist()]}


def _classes_asked(
    tasks: Sequence[Task], columns: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, Sequence[str]]]:
    """The two classes that a task's threshold makes: codes by task, negative where unknown, and their names."""
    codes: dict[str, np.ndarray] = {}
    names: dict[str, Sequence[str]] = {}
    for task in tasks:
        if task.threshold is not None:
            code, known = task.read(columns)
            codes[task.name] = np.where(known, code, -1)
            names[task.name] = (f"{task.target} up to {task.threshold:g}", f"above {task.threshold:g}")
    return codes, names


def cohort(tileset: "TileSet") -> dict[str, Any]:
    splits = ", ".join(f"{len(cases)} {name}" for name, cases in tileset.splits.items())
    spec, what = tileset.spec, "Tile"
    tile = f"{spec.size} px at {spec.mpp:g} \u00b5m/px"
    if spec.he_kind == "grid":
        what, tile = "Region", f"{spec.size} x {spec.size} tiles of {spec.mpp:g} \u00b5m"
    return {f"{what}s": len(tileset), "Slides": len(tileset.slides), "Cases": splits, what: tile}
