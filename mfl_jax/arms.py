"""Runs on disk as the arms of a comparison: read, checked against a tile set, grouped, embedded once each."""

import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mfl_jax import config as configs
from mfl_jax import data, metrics, trained
from mfl_jax.data import Facts
from mfl_jax.evaluators.embed import Embedded, colour_statistics, embed_set, held_tiles, mean_of_tiles
from mfl_jax.evaluators.tasks import Task, check_overlap
from mfl_jax.findings import ArmRuns, Seed
from mfl_jax.train import FREE, FREE_DATA

if TYPE_CHECKING:
    from input_pipeline.tileset import TileSet

BASELINES = ("random", "colour", "mean")
NAME_LENGTH = 60


@dataclass(frozen=True)
class Asked:
    """A run by what its folder says, before its parameters are read."""

    path: Path
    config: ConfigDict
    facts: Facts


@dataclass(frozen=True)
class Collected:
    arms: tuple[ArmRuns, ...]
    columns: dict[str, np.ndarray]
    digests: dict[str, str]  # of the checkpoint of each run
    notes: tuple[str, ...]


def look(paths: Sequence[Path], tileset: "TileSet", *, transductive: bool = False) -> list[Asked]:
    """Everything that could be wrong with the runs and this tile set, before anything is computed."""
    if not paths:
        raise ValueError("there is no run to evaluate")
    runs = [Asked(Path(path), *trained.read_run(Path(path))) for path in paths]
    for run in runs:
        if not any(p.name.isdigit() for p in (run.path / "checkpoints").iterdir()):
            raise trained.RunError(f"{run.path} has no checkpoint yet")
        trained.check_tiles(run.path, run.facts, tileset.spec)
        try:
            check_overlap(tileset.splits, run.facts.train_cases, transductive=transductive)
        except ValueError as error:
            raise type(error)(f"{run.path}: {error}") from error
    return runs


def group(runs: Sequence[Asked]) -> dict[str, list[Asked]]:
    """Name of an arm -> its runs: those whose configs differ in the seed, or in what changes no number, alone, and that
    were trained on the same cases, wherever their tile sets lay.

    The name is that of the config; where several arms have it, with what they differ in.
    """
    arms: dict[str, list[Asked]] = {}
    keys: dict[str, dict[str, Any]] = {}
    for run in runs:
        told = _telling(run.config)
        key = repr((told, run.facts.examples, run.facts.train_cases))
        arms.setdefault(key, []).append(run)
        keys[key] = told
    found: dict[str, list[Asked]] = {}
    for key, members in arms.items():
        seeds = [run.config.seed for run in members]
        if len(set(seeds)) < len(seeds):
            listed = ", ".join(f"{run.path} (seed {run.config.seed})" for run in members)
            raise ValueError(f"runs of one config have different seeds; here: {listed}")
        like = [told for told in keys.values() if told["name"] == keys[key]["name"]]
        found[_name(keys[key], like, members[0].path, found)] = sorted(members, key=lambda run: run.config.seed)
    return found


def _telling(config: ConfigDict) -> dict[str, Any]:
    free = ("seed", *FREE, *FREE_DATA)
    flat = configs.flatten(config)
    kept = {k: v for k, v in flat.items() if not any(fnmatch.fnmatch(k, f) for f in free)}
    return {"name": config.name, **kept}


def _name(own: Mapping[str, Any], like: Sequence[Mapping[str, Any]], path: Path, taken: Mapping[str, Any]) -> str:
    differing = [key for key in own if any(other.get(key) != own[key] for other in like)]
    added = ", ".join(f"{key.split('.')[-1]}={own[key]}" for key in differing)
    name = f"{own['name']} ({added})" if added else own["name"]
    if len(name) <= NAME_LENGTH and name not in taken and (added or len(like) == 1):
        return name
    return f"{own['name']} ({path})"


def collect(
    runs: Sequence[Asked],
    tileset: "TileSet",
    mesh: jax.sharding.Mesh,
    *,
    batch: int = 256,
    feature: str = "he",
    baselines: Sequence[str] = (),
    tasks: Sequence[Task] = (),
    split: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Collected:
    """Every run embedded once, on all tiles of the set, or of a split. `baselines`: 'random', before it has learnt
    anything the encoder of the first arm that needs no partner (of the first, where all do); 'colour', statistics of
    the colours of a tile; 'mean', of the tile features of a region. A run that was trained on a task's own target is
    scored on it by its own predictions.
    """
    arms: list[ArmRuns] = []
    columns: dict[str, np.ndarray] = {}
    digests: dict[str, str] = {}
    notes: list[str] = []
    untaught: list[Seed] = []
    random_of: tuple[str, tuple[str, ...]] | None = None  # an arm, and the partners that its encoder needs
    _check_baselines(baselines, tileset)
    held = held_tiles(tileset, mesh, batch=batch, split=split)
    embed = functools.partial(_embed, tileset=tileset, mesh=mesh, batch=batch, split=split, held=held)
    count = len(tileset.ids(split))
    for name, members in group(runs).items():
        seeds: list[Seed] = []
        first = trained.open_run(members[0].path, mesh)
        seen = partners_of_embed(first, feature)
        if fresh := "random" in baselines and (random_of is None or (bool(random_of[1]) and not seen)):
            untaught, random_of = [], (name, seen)
        of_arm = functools.partial(embed, first.method.embed, partners=seen)  # one function: seeds share its program
        for asked in members:
            say(f"embedding {count:,} tiles: {asked.path}")
            run = first if asked is members[0] else trained.open_run(asked.path, mesh)
            digests[str(asked.path)] = run.digest
            notes += _unfinished(run)
            found = of_arm(run.params, run.extra)
            columns = found.columns
            seeds.append(_seed(run, found.features, feature, tasks))
            if fresh:
                untaught.append(Seed(run.config.seed, of_arm(*trained.initial(run)).features[feature]))
        arms.append(_arm(name, members[0], tuple(seeds), seen, first.step))
    if random_of is not None:
        what = f"nothing: the encoder of {random_of[0]} as it was drawn"
        what += f"; sees {', '.join(random_of[1])} at inference" if random_of[1] else ""
        arms.append(ArmRuns("random", "Random encoder", "baseline", tuple(untaught), what))
    if "colour" in baselines:
        colours = Seed(0, embed(colour_statistics, {}, {}).features["he"])
        arms.append(ArmRuns("colour", "Colour statistics", "baseline", (colours,), "mean, spread and percentiles"))
    if "mean" in baselines:
        means = Seed(0, embed(mean_of_tiles, {}, {}).features["he"])
        what = "the features of a region's tiles, averaged"
        arms.append(ArmRuns("mean", "Mean of tile features", "baseline", (means,), what))
    return Collected(tuple(arms), columns, digests, tuple(notes))


def _embed(
    embed: Any, params: Any, extra: Any, *, held: Any, partners: tuple[str, ...] = (), **options: Any
) -> Embedded:
    return embed_set(embed, params, extra, partners=partners, held=None if partners else held, **options)


def _check_baselines(baselines: Sequence[str], tileset: "TileSet") -> None:
    kinds = {"colour": "image", "mean": "grid"}
    if wrong := [name for name in baselines if kinds.get(name, tileset.spec.he_kind) != tileset.spec.he_kind]:
        raise ValueError(
            f"the baseline {wrong[0]!r} is for sets of kind {kinds[wrong[0]]!r}: of tiles there are random and colour, "
            "of regions random and mean"
        )


def partners_of_embed(run: trained.Trained, feature: str = "he") -> tuple[str, ...]:
    """Partners that the features are made of: none, but for an upper bound that sees them at inference too.

    ValueError where the method has no such feature.
    """
    shapes = data.batch_shapes(run.facts, 2)
    embed = functools.partial(jax.eval_shape, run.method.embed, run.params, run.extra)
    seen: tuple[str, ...] = ()
    try:
        found = embed({name: shapes[name] for name in ("he", "mask")})
    except KeyError:
        found, seen = embed(shapes), tuple(name for name in run.facts.modalities if name != "he")
    if feature not in found:
        raise ValueError(f"{run.path} gives no features {feature!r}; it gives {', '.join(sorted(found))}")
    return seen


def _seed(run: trained.Trained, features: Mapping[str, np.ndarray], feature: str, tasks: Sequence[Task]) -> Seed:
    steps, losses, wall = read_curve(run.path, run.config.data.batch)
    curve = (steps, losses) if steps else None
    own = {task.name: features["logits"] for task in tasks if trained_on(run.config, task)}
    return Seed(run.config.seed, features[feature], own, wall, curve, run.facts.train_cases)


def trained_on(config: ConfigDict, task: Task) -> bool:
    """Whether the run is supervised by just what the task asks."""
    if config.method != "supervised":
        return False
    asked = config.supervised
    numbers = asked.target != "label" and asked.threshold is None
    return (asked.target, asked.threshold, numbers) == (task.target, task.threshold, task.regression)


def read_curve(workdir: Path, batch: int) -> tuple[list[int], list[float | None], float | None]:
    """Steps, training loss, and seconds in steps (without compilation, evaluations and saves) of a run."""
    path = workdir / "metrics.jsonl"
    rows = {row["step"]: row for row in (metrics.read(path) if path.is_file() else []) if "loss" in row}
    steps = sorted(rows)
    losses = [rows[s]["loss"] if isinstance(rows[s]["loss"], float) else None for s in steps]
    wall, before = 0.0, -1
    for step in steps:
        wall += (step - before) * batch / rows[step]["examples_per_second"]
        before = step
    return steps, losses, wall if steps else None


def _unfinished(run: trained.Trained) -> list[str]:
    batch = run.config.data.batch
    total = data.total_steps(configs.Reading(run.config).total, batch, run.facts.examples)
    return [f"{run.path} stands at step {run.step} of {total}: it is not finished."] if run.step < total else []


def _arm(name: str, asked: Asked, seeds: tuple[Seed, ...], seen: tuple[str, ...], steps: int) -> ArmRuns:
    config, partners = asked.config, [p for p in asked.facts.modalities if p != "he"]
    supervised = config.method == "supervised"
    kind = "ceiling" if supervised else "ours" if partners else "baseline"
    what = f"{config.method}: H&E" + (f" with {', '.join(partners)}" if partners else "")
    what += f"; sees {', '.join(seen)} at inference" if seen else ""
    what += "; scored by its own head" if any(s.predictions for s in seeds) else ""
    budget: dict[str, float] = {"steps": steps, "examples": steps * config.data.batch}
    walls = [s.wall_s for s in seeds if s.wall_s is not None]
    budget |= {"wall_s": float(np.mean(walls))} if walls else {}
    # An encoder that was trained on the labels has seen all of them: few are no fewer for it.
    skip, share = (("few_label",), config.data.share) if supervised else ((), 1.0)
    return ArmRuns(name, name, kind, seeds, what, budget, skip, share)
