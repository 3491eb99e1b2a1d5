"""What the scripts of evidence in colab/ share: one cohort that the phantom draws, runs of many arms, their features.

Every stage is a command of `mfl`, or goes on where it stopped as they do. Cases are of two kinds: those that encoders
are trained on, which have partners, and the others, on which everything is measured.
"""

import argparse
import csv
import datetime
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import numpy as np

import mfl_jax
from input_pipeline.cores import available_cores
from input_pipeline.files import whole
from input_pipeline.tileset import TileSet
from mfl_jax import arms as runs_on_disk
from mfl_jax import compare, evaluation, process, report, sharding, trained
from mfl_jax import config as configs
from mfl_jax.bags import Bags, Table, from_embedded, of_cases, read_table, with_cases
from mfl_jax.demo import keep_programs
from mfl_jax.demo.arms import Arm, Size, train_all
from mfl_jax.evaluators import Embedded, Task, composition, mil
from mfl_jax.findings import ArmRuns, Seed
from mfl_jax.sweep import TRAIN

START = perf_counter()


@dataclass(frozen=True)
class Scale:
    """How large the evidence is."""

    size: Size
    paired: int  # cases that encoders are trained on
    annotated: int  # further cases, H&E alone, for a classifier that is told where lesions lie
    annotated_steps: int
    seeds: int
    folds: int  # outer folds of slide-level heads
    inner: int
    settings: mil.Settings
    resamples: int = 2000


SCALES = {
    "tiny": Scale(
        Size("tiny", 64, 640, 12),
        paired=3, annotated=6, annotated_steps=3,
        seeds=1, folds=2, inner=2, settings=mil.Settings(epochs=2, batch=8), resamples=100,
    ),
    "small": Scale(
        Size("phantom", 64, 1024, 40, "total.steps=200"),
        paired=16, annotated=128, annotated_steps=900,
        seeds=3, folds=4, inner=2, settings=mil.Settings(epochs=150, patience=30),
    ),
    "full": Scale(
        Size("phantom", 64, 2048, 80, "total.steps=600,data.batch=128"),
        paired=32, annotated=160, annotated_steps=2000,
        seeds=3, folds=5, inner=3, settings=mil.Settings(epochs=150, patience=30),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Where a script writes; the cohort and the runs lie beside, for the other scripts of the same size."""

    out: Path
    scale: Scale
    name: str
    seed: int

    @property
    def shared(self) -> Path:
        return self.out.parent / f"phantom-{self.name}"


def options(doc: str, out: str) -> Work:
    """Of the command line; arguments that a notebook's kernel was started with are not ours."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--size", choices=tuple(SCALES), default="small")
    parser.add_argument("--seed", type=int, default=0, help="of the slides that are drawn")
    given, _ = parser.parse_known_args()
    process.settle()
    return Work(given.out, SCALES[given.size], given.size, given.seed)


def tell(text: str) -> None:
    print(f"[{perf_counter() - START:6.1f} s] {text}", flush=True)


def command(*arguments: Any) -> None:
    """`mfl ...`, in a process of its own. SystemExit where it fails: its words are on the screen."""
    words = [str(word) for word in arguments]
    tell("mfl " + " ".join(words))
    if code := subprocess.run([sys.executable, "-c", TRAIN, *words]).returncode:
        raise SystemExit(f"mfl {words[0]} ended with status {code}")


def draw(at: Path, size: Size, seed: int, *options: Any) -> None:
    """Slides of the phantom, and their tiles."""
    drawn = ("--cases", size.cases, "--size", size.slide, "--seed", seed, *options)
    command("phantom", "--out", at / "slides", *drawn, "--quiet")
    command("tile", at / "slides" / "slides.csv", "--out", at / "tiled", "--size", size.tile, "--quiet")


def packed(at: Path, splits: str | Path) -> TileSet:
    command("pack", at / "tiled", "--out", at / "set", "--splits", splits, "--quiet")
    return TileSet.open(at / "set")


def cohort(work: Work) -> TileSet:
    """Slides, tiles, and a tile set with the splits train (paired cases) and test (the others)."""
    at, paired = work.shared, work.scale.paired
    draw(at, work.scale.size, work.seed, "--partners", "if", "--paired", paired)
    with open(at / "slides" / "cases.csv", newline="", encoding="utf-8") as file:
        cases = [row["case_id"] for row in csv.DictReader(file)]
    with whole(at / "splits.csv") as part, open(part, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerows([("case_id", "split"), *((c, "train" if i < paired else "test") for i, c in enumerate(cases))])
    return packed(at, at / "splits.csv")


def annotated(work: Work) -> TileSet:
    """Further cases, H&E alone, for the ceiling: a slide has few tiles in a lesion, and the paired cases few slides."""
    at, size = work.shared / "annotated", replace(work.scale.size, cases=work.scale.annotated)
    draw(at, size, work.seed + 1, "--partners", "", "--prefix", "annotated")
    return packed(at, "train=1")


def train(work: Work, tileset: TileSet, arms: Sequence[Arm], more: str = "") -> dict[str, list[Path]]:
    """Every arm with every seed, in `runs` beside the set, side by side: on an accelerator as many as there are cores,
    for each is small."""
    tell(f"Training {len(arms)} arms, {work.scale.seeds} seeds each, side by side; what is trained already is kept:")
    for arm in arms:
        tell(f"  {arm.title} learns from {arm.what}.")
    chosen: dict[str, Any] = {"seeds": work.scale.seeds, "more": more, "side_by_side": available_cores()}
    chosen["environment"] = keep_programs(work.shared / "programs")  # seeds differ in no program
    return train_all(tileset.root.parent, work.scale.size, tileset.root, arms=arms, tell=tell, **chosen)


@dataclass(frozen=True)
class Found:
    """Features of the test cases."""

    arms: tuple[ArmRuns, ...]
    columns: Mapping[str, np.ndarray]
    digests: Mapping[str, str]
    notes: tuple[str, ...]

    def embedded(self, seed: Seed) -> Embedded:
        return Embedded({"he": seed.features}, np.arange(len(seed.features)), dict(self.columns))


def features(
    work: Work, tileset: TileSet, runs: Mapping[str, Sequence[Path]], arms: Sequence[Arm], **options: Any
) -> Found:
    """Of the test cases, by every run and by what has learnt nothing: a random encoder, and colour statistics."""
    mesh, words = sharding.make_mesh(), {arm.name: arm for arm in arms}
    asked = runs_on_disk.look([path for paths in runs.values() for path in paths], tileset)
    given: dict[str, Any] = {"split": "test", "say": tell} | options
    made = runs_on_disk.collect(asked, tileset, mesh, **given)
    told = []
    for arm in made.arms:
        known = words.get(arm.name)
        told.append(replace(arm, title=known.title, kind=known.kind, what=known.what) if known else arm)
    ranks = (f"{arm.title} {np.mean([effective_rank(s.features) for s in arm.seeds]):.1f}" for arm in told)
    spread = f"Effective rank of the features, each scaled to deviation 1 (mean over seeds): {', '.join(ranks)}."
    tell(spread)
    return Found(tuple(told), made.columns, made.digests, (*made.notes, spread))


def effective_rank(features: np.ndarray, rows: int = 4000) -> float:
    """The participation ratio of the spectrum of a part of the rows: how many directions the features make use of."""
    x = np.asarray(features[:: max(1, len(features) // rows)], np.float64)
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)
    power = np.linalg.eigvalsh(x.T @ x)
    return float(power.sum() ** 2 / np.square(power).sum())


def named(arm: ArmRuns, name: str, title: str) -> ArmRuns:
    return replace(arm, name=name, title=title)


def without(found: Found, *names: str) -> Found:
    return replace(found, arms=tuple(arm for arm in found.arms if arm.name not in names))


def told_kinds(found: Found) -> Found:
    """With one arm more, of no encoder: the kind of every tile, apart for tiles that hold others too, by the phantom's
    own map. What heads make of it is what so many slides suffice for, whatever the encoder."""
    ids = np.arange(len(found.columns["region"]))
    seed = Seed(0, composition.embedded(found.columns, ids, "purity").features["he"])
    arm = ArmRuns(
        "told",
        "Told kinds",
        "ceiling",
        (seed,),
        "the kind of every tile, and whether it holds others, by the phantom's own map",
    )
    return replace(found, arms=(*found.arms, arm))


# --- slides from bags of tiles


def slide_table(work: Work, tileset: TileSet, label: str) -> Table:
    return of_cases(read_table(work.shared / "slides" / "slides.csv", label), tileset.splits["test"])


def slide_arms(
    work: Work, found: Found, table: Table, task: str, heads: Sequence[str], say: Callable[[str], None] = tell
) -> list[ArmRuns]:
    """One arm a head on the features of an encoder, its seeds those of the encoder: slides, predicted out of fold.

    Heads are trained side by side, in threads: compiling one keeps one core busy.
    """
    with ThreadPoolExecutor(min(len(heads), available_cores())) as pool:
        scores = list(pool.map(lambda head: _out_of_fold(work, found, table, task, head, say), heads))
    every = []
    for i, arm in enumerate(found.arms):
        for number, head in enumerate(heads):
            runs = tuple(_seed(s, task, x) for s, x in zip(arm.seeds, scores[number][i], strict=True))
            if number:
                runs = tuple(replace(run, curve=None) for run in runs)  # one training is drawn once
            every.append(replace(arm, name=f"{arm.name}/{head}", title=f"{arm.title}, {head}", seeds=runs))
    return every


def _out_of_fold(
    work: Work, found: Found, table: Table, task: str, head: str, say: Callable[[str], None]
) -> list[list[np.ndarray]]:
    """[slides] of every seed of every arm; what an earlier run has found is kept."""
    scale, every = work.scale, []
    folds = mil.nested(table, outer=scale.folds, inner=scale.inner, seed=work.seed)
    chosen: dict[str, Any] = {"folds": folds, "settings": scale.settings, "seeds": 1, "resamples": 0}
    for arm in found.arms:
        say(f"{task}: {head} on {arm.title}")
        of_seeds = []
        for seed in arm.seeds:
            kept = work.out / "predictions" / task / head / f"{arm.name}-{seed.seed}.npz"
            if (scores := _stored(kept, work, found, table)) is None:
                bags = _bags(found, seed, table)
                study = mil.study({arm.name: bags}, table, (head,), pretrained=seed.pretrained, **chosen)
                scores = study.arms[0].result.scores
                with whole(kept) as part, open(part, "wb") as file:
                    np.savez(file, key=np.array(_key(work, found, table)), scores=scores)
            of_seeds.append(scores)
        every.append(of_seeds)
    return every


def _bags(found: Found, seed: Seed, table: Table) -> Bags:
    listed = dict(zip(table.slides, table.cases, strict=True))
    return with_cases(from_embedded(found.embedded(seed), slides=listed), table)


def _key(work: Work, found: Found, table: Table) -> str:
    """Of all that decides a prediction."""
    scale = (work.scale.folds, work.scale.inner, repr(work.scale.settings), work.seed)
    return json.dumps([scale, sorted(found.digests.values()), table.slides, table.labels.tolist()])


def _stored(path: Path, work: Work, found: Found, table: Table) -> np.ndarray | None:
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as file:
        return file["scores"] if str(file["key"]) == _key(work, found, table) else None


def ceiling(found: Found, arm: str, tile_task: str, table: Table, task: str, top: int) -> ArmRuns:
    """A tile classifier as an arm of slides: the mean of its `top` greatest tile scores."""
    of = next(a for a in found.arms if a.name == arm)
    runs = []
    for seed in of.seeds:
        logits = np.asarray(seed.predictions[tile_task], np.float64)
        bags = _bags(found, replace(seed, features=(logits[:, 1] - logits[:, 0])[:, None]), table)
        runs.append(_seed(seed, task, mil.top_mean(bags.features[:, 0], bags.offsets, top)))
    name = f"{arm}/top{top}"
    return replace(of, name=name, title=f"{of.title}, mean of the {top} greatest", kind="ceiling", seeds=tuple(runs))


def _seed(seed: Seed, task: str, scores: np.ndarray) -> Seed:
    return replace(seed, features=np.zeros((len(scores), 1)), predictions={task: scores})


def judge_slides(
    work: Work, tileset: TileSet, table: Table, task: str, arms: Sequence[ArmRuns], pairs: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Arms, intervals over cases and paired differences of slide-level predictions, as `evaluation.assemble` has them.

    A row is a slide; one more stands for the cases of pre-training, so that it can be checked that none is tested.
    """
    train = tileset.splits["train"]
    columns = {"case": np.array([*table.cases, train[0]]), task: np.append(table.labels, 0)}
    given = [replace(arm, seeds=tuple(_longer(s, task) for s in arm.seeds)) for arm in arms]
    splits = {"train": list(train), "test": list(tileset.splits["test"])}
    drawn: dict[str, Any] = {"pairs": pairs, "resamples": work.scale.resamples}
    return evaluation.assemble(given, columns, splits, [Task(task, task)], **drawn)


def _longer(seed: Seed, task: str) -> Seed:
    scores = np.append(seed.predictions[task], 0.5)
    return replace(seed, features=np.zeros((len(scores), 1)), predictions={task: scores})


# --- tiles among tiles


def judge_tiles(
    work: Work,
    tileset: TileSet,
    found: Found,
    arms: Sequence[ArmRuns],
    tasks: Sequence[Task],
    pairs: Sequence[tuple[str, str]],
    limits: tuple[float, float],
) -> dict[str, Any]:
    """Retrieval in other cases, and distances along a slide, of every arm."""
    splits = {name: list(tileset.splits[name]) for name in ("train", "test")}
    drawn: dict[str, Any] = {"pairs": pairs, "limits": limits, "resamples": work.scale.resamples, "say": tell}
    kinds = ("retrieval", "distance_ratio")
    return evaluation.assemble(arms, found.columns, splits, tasks, kinds=kinds, **drawn)


# --- one document


def save(
    work: Work,
    tileset: TileSet,
    results: Sequence[Mapping[str, Any]],
    runs: Mapping[str, Sequence[Path]],
    found: Found,
    words: Mapping[str, str],
    others: Mapping[str, TileSet] = {},
) -> Path:
    """results.json and report.html; `words` are title, question and answer, `others` are further sets that were used.
    Arms of several results are one list."""
    merged: dict[str, Any] = {"arms": {}, "tasks": [], "differences": [], "reliability": {}, "curves": []}
    for part in results:
        for arm in part["arms"]:
            fresh = arm | {"metrics": {}, "seeds": [s | {"metrics": {}} for s in arm["seeds"]]}
            known = merged["arms"].setdefault(arm["name"], fresh)
            known["metrics"] |= arm["metrics"]
            for mine, theirs in zip(known["seeds"], arm["seeds"], strict=True):
                mine["metrics"] |= theirs["metrics"]
        merged["tasks"] += part["tasks"]
        merged["differences"] += part["differences"]
        merged["reliability"] |= dict.fromkeys(part["reliability"])
        merged["curves"] = merged["curves"] or part["curves"]
    counts = {name: f"{len(t):,} tiles, {len(t.slides)} slides, {len(t.cases)} cases" for name, t in others.items()}
    hashes = {f"tile set, {name}": other.hash for name, other in others.items()}
    document = {
        **words,
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": mfl_jax.__version__,
        "intervals": results[0]["intervals"],
        "cohort": compare.cohort(tileset) | counts | {"Size": work.name, "Device": jax.devices()[0].device_kind},
        "arms": list(merged["arms"].values()),
        "tasks": merged["tasks"],
        "differences": merged["differences"],
        "curves": merged["curves"],
        "reliability": [*found.notes, *merged["reliability"]],
        "config": {name: json.loads(configs.to_json(trained.read_run(paths[0])[0])) for name, paths in runs.items()},
        "hashes": {"tile set": tileset.hash} | hashes | {f"checkpoint of {p}": d for p, d in found.digests.items()},
    }
    return report.save(work.out, document, {})
