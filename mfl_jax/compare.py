"""`mfl eval`: runs and a tile set in, results.json out. What can be refused is refused before a tile is read."""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mfl_jax
from mfl_jax import arms, evaluation, sharding
from mfl_jax import config as configs
from mfl_jax.evaluators import decode, projection, retrieval
from mfl_jax.evaluators.tasks import Task
from mfl_jax.report import tables

if TYPE_CHECKING:
    from input_pipeline.tileset import TileSet

POINTS = 600  # of a projection


def evaluate(
    paths: Sequence[Path],
    tileset: "TileSet",
    task: Task,
    *,
    kinds: Sequence[str] = ("probe",),
    baselines: Sequence[str] = (),
    decoded: Sequence[str] = (),
    feature: str = "he",
    batch: int = 256,
    limits: tuple[float, float] = (0.0, 0.0),
    transductive: bool = False,
    resamples: int = 2000,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """results.json of the runs. `decoded` are the partners of the kind 'decode': all of the set where none is named;
    `limits` the near and far um of the kind 'distance_ratio'."""
    tasks = [task] if set(kinds) - set(evaluation.WITHOUT_TASK) else []
    if "distance_ratio" in kinds:
        retrieval.check_limits(*limits)
    decoded = tuple(decoded) or tuple(partner.name for partner in tileset.spec.partners)
    evaluation.check(kinds, tasks, tileset, decoded)
    if unknown := sorted(set(baselines) - set(arms.BASELINES)):
        raise ValueError(f"there is no baseline {', '.join(unknown)}; there are {', '.join(arms.BASELINES)}")
    runs = arms.look(paths, tileset, transductive=transductive)
    arms.group(runs)
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
        "transductive": transductive,
        "resamples": resamples,
        "say": say,
    }
    results = evaluation.assemble(found.arms, found.columns, tileset.splits, tasks, **options)
    results["reliability"] = [*found.notes, *results["reliability"]]
    colours = [c for c in dict.fromkeys(("slide", *(t.target for t in tasks))) if c in found.columns]
    described = {
        "title": f"{len(found.arms)} arms on {tileset.spec.name}",
        "question": f"How much of {task.target!r} can be read from frozen features of H&E alone, on unseen cases?"
        if tasks
        else "What do frozen features of H&E alone hold, on unseen cases?",
        "answer": answer(results, len(set(tileset.splits.get("test", ())))),
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": mfl_jax.__version__,
        "cohort": cohort(tileset),
        "projections": projections(found.arms, found.columns, colours),
        "config": {str(run.path): json.loads(configs.to_json(run.config)) for run in runs},
        "hashes": {"tile set": tileset.hash} | {f"checkpoint of {path}": d for path, d in found.digests.items()},
    }
    return described | results


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


def projections(
    arms: Sequence[evaluation.ArmRuns],
    columns: Mapping[str, np.ndarray],
    colours: Sequence[str],
    *,
    limit: int = POINTS,
) -> list[dict[str, Any]]:
    """The first seed of every arm on its two principal axes, the same tiles for all of them."""
    made = []
    for arm in arms:
        found = projection.project(arm.seeds[0].features, columns, colour=colours, limit=limit)
        x, y = (found.xy[:, i].round(4).tolist() for i in (0, 1))
        colour = [_colour(name, values) for name, values in found.colours.items()]
        made.append({"arm": arm.name, "method": "PCA", "x": x, "y": y, "colours": colour})
    return made


def _colour(name: str, values: np.ndarray) -> dict[str, Any]:
    if values.dtype.kind in "US":
        names, code = np.unique(values, return_inverse=True)
        return {"name": name, "values": code.tolist(), "names": names.tolist()}
    numbers = np.nan_to_num(values.astype(np.float64), nan=-1.0)
    return {"name": name, "values": numbers.round(4).tolist()}


def cohort(tileset: "TileSet") -> dict[str, Any]:
    splits = ", ".join(f"{len(cases)} {name}" for name, cases in tileset.splits.items())
    tile = f"{tileset.spec.size} px at {tileset.spec.mpp:g} \u00b5m/px"
    return {"Tiles": len(tileset), "Slides": len(tileset.slides), "Cases": splits, "Tile": tile}
