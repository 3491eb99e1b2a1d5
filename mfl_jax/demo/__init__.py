"""`mfl demo`: from nothing to an encoder that a denser partner has taught, and the evidence for it, told step by step.

Slides that the phantom draws become a tile set; every arm is trained on it with the same budget; all are evaluated on
cases that none has seen; report.html shows it. Run again, it goes on where it stopped.
"""

import dataclasses
import datetime
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import numpy as np

import mfl_jax
from input_pipeline.cores import available_cores
from input_pipeline.files import save_picture
from input_pipeline.phantom.layout import REGIONS
from input_pipeline.show import batch_picture
from input_pipeline.stream import train_stream
from input_pipeline.tileset import TileSet
from mfl_jax import arms as runs_on_disk
from mfl_jax import compare, evaluation, looks, report, sharding
from mfl_jax import config as configs
from mfl_jax.demo import pictures
from mfl_jax.demo.arms import ARMS, FEW, GPU, SMALL, TARGET, THRESHOLD, Size, spec, train_all
from mfl_jax.demo.cohort import PARTNERS, Cohort, build
from mfl_jax.demo.story import GAINED, HOWTO, QUESTION, TASK_WORDS, answer
from mfl_jax.evaluators import Task, decode
from mfl_jax.findings import ArmRuns

__all__ = ["GPU", "SMALL", "demo"]

TASK = Task("marker", TARGET, THRESHOLD)
PAIRS = (
    ("mfl", "unpaired"),
    ("mfl", "supervised"),
    ("mfl", "random"),
    ("mfl", "colour"),
    ("trident", "unpaired"),
    ("trident", "mfl"),
)
FEW_PAIRS = (("mfl", "supervised_few"), ("mfl", "unpaired"))
KINDS = ("probe", "few_label", "decode", "batch_effect")
DECODED = ("if/DAPI/mean", "if/MARKER/mean", "if/PANCK/mean", "if/CD45/mean", "nuclei/objects", "nuclei/covered")
CACHE = "jax_compilation_cache_dir"
LOOKED_AT = ("unpaired", "mfl", "supervised")


class Clock:
    """Tells what is done, and when; keeps what each part took."""

    def __init__(self) -> None:
        self._start = perf_counter()
        self.spent: dict[str, float] = {}

    def __call__(self, text: str) -> None:
        print(f"[{perf_counter() - self._start:6.1f} s] {text}", flush=True)

    def lap(self, part: str) -> None:
        self.spent[part] = perf_counter() - self._start - sum(self.spent.values())


def demo(
    out: Path,
    size: Size = SMALL,
    *,
    seed: int = 0,
    seeds: int = 1,
    more: str = "",
    workers: int | None = None,
    progress: bool = True,
    data_only: bool = False,
    side_by_side: int | None = None,
) -> Path:
    """Returns the path of the report, or with `data_only` that of a picture of a batch. `more` overrides keys of every
    config; side_by_side is how many runs are trained at a time (a core each, or one on an accelerator).
    ValueError where anything is not as it should be; TrainingFailed where a run failed.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; at least one is trained")
    if side_by_side is not None and side_by_side < 1:
        raise ValueError(f"side_by_side is {side_by_side}; at least one run is trained at a time")
    tell = Clock()
    workers = available_cores() if workers is None else workers
    drawn = {"cases": size.cases, "size": size.slide, "tile": size.tile, "seed": seed}
    cohort = build(out, **drawn, workers=workers, progress=progress, tell=tell)
    tileset = cohort.tileset
    with train_stream(tileset, batch=6, seed=seed) as stream:
        save_picture(out / "batch.png", batch_picture(next(stream), tileset.spec, side=160))
    counts = f"{len(tileset):,} tiles of {len(tileset.slides)} slides of {len(tileset.cases)} cases"
    tell.lap("slides, tiles, registration")
    tell(f"A tile set stands: {counts}. A batch as training will see it: {out / 'batch.png'}")
    if data_only:
        return out / "batch.png"

    side_by_side = side_by_side or (max(workers, 1) if backend() == "cpu" else 1)
    tell(f"Training, {side_by_side} at a time and every arm for as many steps on as many tiles:")
    for arm in ARMS:
        tell(f"  {arm.title} learns from {arm.what}.")
    options: dict[str, Any] = {"seeds": seeds, "more": more, "side_by_side": side_by_side}
    options["environment"] = keep_programs(out / "programs")
    runs = train_all(out, size, out / "set", **options, tell=tell)
    tell.lap("training")
    tell("Evaluating on unseen cases. Until now only the supervised arms have used a label.")
    path = _evaluate(out, size, cohort, runs, seed, more, tell)
    tell(f"Done. Open {path}; all of its figures are in {out / 'results.json'}.")
    return path


def backend() -> str:
    """What jax computes on, asked of another process: an accelerator that this one held would be lost to the runs."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]


def keep_programs(folder: Path) -> dict[str, str]:
    """Compiled programs are kept, and shared by runs that differ in the seed or in the data alone; where the user has
    such a folder, there. -> what tells other processes."""
    least = "jax_persistent_cache_min_compile_time_secs"
    if getattr(jax.config, CACHE) is None:
        jax.config.update(CACHE, str(folder))
        jax.config.update(least, 0.5)
    return {name.upper(): str(getattr(jax.config, name)) for name in (CACHE, least)}


def _evaluate(
    out: Path, size: Size, cohort: Cohort, runs: Mapping[str, Sequence[Path]], seed: int, more: str, tell: Clock
) -> Path:
    tileset, mesh = cohort.tileset, sharding.make_mesh()
    found = runs_on_disk.look([path for paths in runs.values() for path in paths], tileset)
    options: dict[str, Any] = {"baselines": ("random", "colour"), "tasks": [TASK], "say": lambda line: None}
    collected = runs_on_disk.collect(found, tileset, mesh, **options)
    arms = _named(collected.arms)
    evaluation.check(KINDS, [TASK], tileset, PARTNERS)
    targets = {n: v for n, v in decode.summaries(tileset, PARTNERS).items() if n in DECODED}
    options = {"kinds": KINDS, "pairs": PAIRS, "few_pairs": FEW_PAIRS, "targets": targets, "say": tell}
    options["slide_probe"] = False  # over 44 slides it costs as much as all other evaluations together
    results = evaluation.assemble(arms, collected.columns, tileset.splits, [TASK], **options)
    results["labels"].append(_few_labels(results))
    words = {TASK.name: TASK_WORDS} | {f"decode/{name}": GAINED for name in PARTNERS[:1]}
    results["tasks"] = [task | words.get(task["name"], {}) for task in results["tasks"]]

    tell.lap("evaluation")
    tell("Drawing what the encoders look at, and what they find alike.")
    sections, shown = _pictures(out, size, cohort, runs, arms, collected.columns, seed, more)
    tell.lap("pictures")
    described = {
        "title": "More from less, on the phantom",
        "question": QUESTION,
        "answer": answer(results, len(tileset.splits["test"])),
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": mfl_jax.__version__,
        "cohort": compare.cohort(tileset),
        "projections": _projections(arms, collected.columns, tileset),
        "ledger": [{"title": "The demo", "seconds": tell.spent}]
        + [_ledger(title, ledger) for title, ledger in cohort.ledgers.items() if ledger.tiles],
        "howto": HOWTO,
        "config": {arm.name: json.loads(configs.to_json(configs.load(_spec(arm, size, out, more)))) for arm in ARMS},
        "hashes": {"tile set": tileset.hash} | {f"checkpoint of {p}": d for p, d in collected.digests.items()},
    }
    results["reliability"] = [*collected.notes, *results["reliability"]]
    return report.save(out, described | results | sections, shown)


def _named(arms: Sequence[ArmRuns]) -> list[ArmRuns]:
    """In the demo's order and words. Labels of a supervised arm were used in training: it has no few-label probe."""
    known = {arm.name: arm for arm in arms}
    told = []
    for arm in ARMS:
        skip = ("few_label",) if arm.name.startswith("supervised") else ()
        words: dict[str, Any] = {"title": arm.title, "kind": arm.kind, "what": arm.what, "skip": skip}
        told.append(dataclasses.replace(known[arm.name], **words))
    random = dataclasses.replace(known["random"], what="nothing: its weights are as they were drawn")
    colour = dataclasses.replace(known["colour"], what="mean, spread and percentiles of the colours of a tile")
    return [random, colour, *told]


def _projections(arms: Sequence[ArmRuns], columns: Mapping[str, np.ndarray], tileset: TileSet) -> list[dict[str, Any]]:
    shown = [name for name in compare.colours(tileset, [TASK], ("region",)) if name != "label"]
    return compare.projections(arms, columns, tileset, [TASK], shown=shown, names={"region": REGIONS})


def _few_labels(results: Mapping[str, Any]) -> dict[str, Any]:
    """The two supervised arms as one curve: each point was trained from the start on its share of the labels."""
    key = f"{TASK.name}/auc"
    of = {arm["name"]: arm["metrics"][key] for arm in results["arms"]}
    points = [of["supervised_few"], of["supervised"]]
    ends = {end: [point[name] for point in points] for end, name in (("y", "mean"), ("low", "low"), ("high", "high"))}
    return {"arm": "supervised", "by": "tiles", "metric": key, "x": [FEW, 1.0], **ends}


def _pictures(
    out: Path,
    size: Size,
    cohort: Cohort,
    runs: Mapping[str, Sequence[Path]],
    arms: Sequence[ArmRuns],
    columns: Mapping[str, np.ndarray],
    seed: int,
    more: str,
) -> tuple[dict[str, Any], pictures.Pictures]:
    tileset: TileSet = cohort.tileset
    features = {arm.name: arm.seeds[0].features for arm in arms}
    encoders = {
        arm.name: looks.Encoder(arm.title, runs[arm.name][0], features[arm.name])
        for arm in ARMS
        if arm.name in LOOKED_AT
    }
    specs = {arm.title: _spec(arm, size, out, more) for arm in ARMS if arm.name in ("unpaired", "mfl")}
    made: dict[str, tuple[Any, Mapping[str, Any]]] = {
        "pairs": pictures.pairs(tileset, seed),
        "registration": pictures.registration(out / "slides", out / "tiled"),
        "views": pictures.views(specs, out),
    }
    skipped = {}
    look = functools.partial(looks.section, truth=looks.truth_of(tileset))
    drawn: dict[str, Callable] = {"saliency": look, "neighbours": pictures.neighbours}
    for name, draw in drawn.items():
        try:
            made[name] = draw(encoders, columns, tileset, TASK)
        except looks.NothingToShow as error:
            skipped[name] = str(error)
    return {"skipped": skipped} | {name: section for name, (section, _) in made.items()}, {
        name: picture for _, shown in made.values() for name, picture in shown.items()
    }


def _spec(arm, size: Size, out: Path, more: str) -> str:
    return spec(arm, size, out / "set", 0, more)


def _ledger(title: str, ledger) -> dict[str, Any]:
    seconds = {stage: float(spent) for stage, spent in ledger.seconds.items()}
    return {"title": title, "text": ledger.table(), "seconds": seconds, "tiles": ledger.tiles}
