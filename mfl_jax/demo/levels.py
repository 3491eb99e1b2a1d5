"""What colab/slpd_on_phantom.py is made of: an encoder of tiles, grids of its features, encoders of regions, slides.

Cases are of two halves, and everything is tested on one of them. Inductive: both levels are trained on the other half.
Transductive: on the half that is tested, without its labels, as the paper does. Both for as many steps. Told: the
second level is trained on the other half, as if the first were perfect: the features of a tile are its kind, no more.
"""

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from input_pipeline.cores import available_cores
from input_pipeline.regions import Params, assemble
from input_pipeline.tileset import TileSet
from mfl_jax import compare, data, metrics, slide_arms, slides, store, sweep, trained
from mfl_jax import config as loader
from mfl_jax.arms import read_curve
from mfl_jax.bags import Table, of_cases, read_folder, read_table
from mfl_jax.demo import keep_programs
from mfl_jax.demo.arms import Arm, Size, spec
from mfl_jax.demo.evidence import Work, command, draw, packed, tell
from mfl_jax.evaluators import composition
from mfl_jax.evaluators.embed import columns_of
from mfl_jax.evaluators.slide_study import SlideArm, Study, key
from mfl_jax.report import tables
from mfl_jax.statistics import Difference
from mfl_jax.watch import TrainingFailed

TOLD = "told"
SETTINGS = {"inductive": "train", "transductive": "test"}  # the split that both levels are trained on
SPLIT = SETTINGS | {TOLD: "train"}
SUFFIX = {"inductive": "", "transductive": "-seen", TOLD: "-told"}  # of the names of arms
BASE = Arm("tiles", "DINO on tiles", "baseline", "two large and four small crops of every tile", "dino_tiles:")
CLAIM = (("slpd", "dino"), ("dino", "mean"), ("slpd-told", "dino-told"), ("dino-told", "mixture"))
KIND = "dominant kind of each tile, by the phantom's own map"
TRUTH = {"mixture": "", "purity": ", and whether it holds another", "arrangement": ", by that of its neighbours"}


@dataclass(frozen=True)
class Levels:
    """How large each level is."""

    tiles: Size
    regions: Size
    side: int  # tiles along a side of a region
    step: int  # tiles from one region to the next
    seeds: int  # of the encoders of regions
    folds: int
    epochs: int | None = None  # of slide-level heads
    resamples: int = 40_000  # p values of hundreds of differences are to have room below 0.05


NARROW = "encoder='grid_vit,features=96,blocks=2,heads=3,drop_path=0.1',views.local='4*window|flip'"
LEVELS = {
    "tiny": Levels(
        Size("tiny", 64, 512, 12), Size("tiny", 64, 512, 12), 4, 2,
        seeds=1, folds=3, epochs=1, resamples=50,
    ),
    "small": Levels(
        Size("phantom", 64, 1536, 48, "total.steps=400,data.batch=32"),
        Size("phantom", 64, 1536, 48, f"total.steps=150,data.batch=32,{NARROW}"),
        side=8, step=4, seeds=3, folds=6, epochs=10,
    ),
    "full": Levels(
        Size("phantom", 64, 2048, 96, "total.steps=500,data.batch=128"),
        Size("phantom", 64, 2048, 96, "total.steps=500,data.batch=128"),
        side=8, step=4, seeds=3, folds=10,
    ),
}  # fmt: skip


def _train(work: Work, folder: Path, specs: Mapping[str, str]) -> dict[str, Path]:
    """Name -> workdir; what is trained already is kept. TrainingFailed where a run fails."""
    for text in specs.values():  # what cannot be is said before the first is trained
        data.facts(loader.Reading(loader.load(text)).data)
    jobs = [sweep.Job(name, text, folder / name) for name, text in specs.items()]
    kept = keep_programs(work.out / "programs")  # seeds differ in no program
    submit = functools.partial(sweep.local, side_by_side=available_cores(), environment=kept)
    if failed := sweep.run(jobs, folder, submit, say=tell):
        raise TrainingFailed("; ".join(f"{name} failed: {why}" for name, why in failed.items()))
    return {job.name: job.workdir for job in jobs}


def cohort(work: Work, levels: Levels) -> TileSet:
    """H&E alone. Of the splits, train (two fifths of the cases) and test, each serves one setting."""
    draw(work.out, levels.tiles, work.seed, "--partners", "")
    return packed(work.out, "train=0.4,test=0.6")


def slide_table(work: Work, tileset: TileSet) -> Table:
    """The slides that are tested."""
    return of_cases(read_table(work.out / "slides" / "slides.csv"), tileset.splits["test"])


def train_tiles(work: Work, levels: Levels) -> dict[str, Path]:
    """One encoder of tiles a setting."""
    specs = {
        setting: spec(BASE, levels.tiles, work.out / "set", 0, f"data.split={split}")
        for setting, split in SETTINGS.items()
    }
    return _train(work, work.out / "tiles", specs)


def features(work: Work, runs: Mapping[str, Path]) -> dict[str, Path]:
    """Every tile of every slide by each encoder, one h5 a slide; both at the same time."""
    found = {setting: work.out / "features" / setting for setting in runs}

    def one(setting: str) -> None:
        command("extract", work.out / "set", "--run", runs[setting], "--out", found[setting], "--quiet")

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, found))
    return found


def told_features(work: Work) -> Path:
    """As `features`, of no encoder: the kind of every tile by the phantom's own map, one of K."""
    tileset, folder = TileSet.open(work.out / "set"), work.out / "features" / TOLD
    ids = np.arange(len(tileset))
    kinds = composition.embedded(columns_of(tileset, ids), ids, "mixture").features["he"]
    store_features(folder, "kinds", tileset, kinds)
    return folder


def store_features(folder: Path, name: str, tileset: TileSet, features: np.ndarray) -> None:
    """Features of every tile, by no trained encoder, one h5 a slide; those that lie there are kept."""
    place = store.Layout("ours", folder, "float16", name, hashlib.sha256(features.tobytes()).hexdigest())
    for i, entry in enumerate(slides.of_tile_set(tileset.root).entries):
        sheet, key = entry.open().sheet, f"{entry.signature} {place.sha256}"
        about = store.stored_attributes(place.files_of(sheet)["features"])
        if about is None or about["config_sha256"] != key:
            with store.writer(place, sheet, features.shape[1], key) as written:
                written[:] = features[tileset.first_row[i] : tileset.first_row[i + 1]]
    store.write_encoder(place, ())


def regions(work: Work, levels: Levels, folders: Mapping[str, Path]) -> dict[str, Path]:
    """A tile set of regions a setting: grids of tile features, with the splits of the cohort."""
    found, splits = {}, TileSet.open(work.out / "set").splits
    for setting, folder in folders.items():
        found[setting] = work.out / "regions" / setting
        params = Params(tiles=levels.side, step=levels.step, min_tissue=0.5)
        given: dict[str, Any] = {"table": work.out / "slides" / "slides.csv", "splits": dict(splits)}
        report = assemble(folder, found[setting], params, **given, workers=0, progress=False, say=tell)
        if report.failed:
            raise ValueError(f"regions of {len(report.failed)} slides failed: {report.failed}")
        made = TileSet.open(found[setting])
        counts = np.bincount(made.tiles["slide"], minlength=len(made.slides))
        tell(f"{len(made):,} regions, {setting}; {counts.min()} to {counts.max()} a slide")
    return found


def train_regions(
    work: Work,
    levels: Levels,
    sets: Mapping[str, Path],
    arms: Mapping[str, Sequence[Arm]],
) -> dict[str, dict[str, list[Path]]]:
    """Setting -> arm -> runs, one a seed; all of them side by side."""
    specs = {
        f"{setting}/{arm.name}-{seed}": spec(arm, levels.regions, sets[setting], seed, f"data.split={SPLIT[setting]}")
        for setting, members in arms.items()
        for seed in range(levels.seeds)
        for arm in members
    }
    flat = {name.replace("/", "-"): text for name, text in specs.items()}
    made = _train(work, work.out / "runs", flat)
    return {
        setting: {arm.name: [made[f"{setting}-{arm.name}-{seed}"] for seed in range(levels.seeds)] for arm in members}
        for setting, members in arms.items()
    }


# --- arms of slides


def truth_arms(work: Work, table: Table) -> list[SlideArm]:
    """What is written on the slides: the mixture of kinds of tile, how many tiles hold several, and which kinds lie
    beside which."""
    tileset = TileSet.open(work.out / "set")
    ids, found = np.arange(len(tileset)), []
    columns = columns_of(tileset, ids)
    for way, beside in TRUTH.items():
        bags = slide_arms.bags_of(composition.embedded(columns, ids, way), "he", table, tileset.root)
        told: dict[str, Any] = {"kind": "ceiling", "what": f"{KIND}{beside}", "skip": ("hipt",)}
        found.append(SlideArm(way, (bags,), (), f"Truth: {way}", **told))
    return found


def colour_arm(work: Work, table: Table) -> SlideArm:
    bags, what = slide_arms.of_set(work.out / "set", table)
    return SlideArm("colour", (bags,), (), "Colour statistics", "baseline", what, skip=("hipt",))


def tile_arms(levels: Levels, folders: Mapping[str, Path], runs: Mapping[str, Path], table: Table) -> list[SlideArm]:
    """The mean of a slide's tile features in each setting; and heads that read its tiles, where regions have HIPT's."""
    found = []
    for setting, folder in folders.items():
        tiles, seen = read_folder(folder, table), trained.read_run(runs[setting])[1].train_cases
        what = "features of DINO on tiles"
        found.append(
            SlideArm(_named("mean", setting), (tiles,), seen, "Mean of tiles", "baseline", what, skip=("hipt",))
        )
        if setting == "inductive":
            for name, title, head in (("abmil", "ABMIL on tiles", "deepmil"), ("clam", "CLAM-SB on tiles", "clam")):
                told: dict[str, Any] = {"instead": {"hipt": head}, "skip": ("knn", "linear", "retrieval")}
                found.append(SlideArm(name, (tiles,) * levels.seeds, seen, title, "baseline", what, **told))
    return found


def region_arms(
    runs: Mapping[str, Mapping[str, Sequence[Path]]],
    sets: Mapping[str, Path],
    arms: Mapping[str, Sequence[Arm]],
    table: Table,
    brief: Sequence[str] = (),
) -> tuple[list[SlideArm], dict[str, str]]:
    """Embeddings of regions by every run, and digests of checkpoints; arms in `brief` are not given to a head."""
    asked, words = [], {}
    for setting, members in arms.items():
        for arm in members:
            name = _named(arm.name, setting)
            asked += [slide_arms.Asked(name, path, sets[setting]) for path in runs[setting][arm.name]]
            words[name] = arm
            if setting == TOLD:
                what = f"{arm.what}; on tiles that say their kind"
                words[name] = replace(arm, title=f"{arm.title} (told kinds)", what=what)
    skip = {name: ("hipt",) for name in words if name in brief}
    seen = slide_arms.seen_cases(asked, {})
    made, digests = slide_arms.collect(asked, table, seen, skip=skip, say=tell)
    told = [replace(a, title=words[a.name].title, kind=words[a.name].kind, what=words[a.name].what) for a in made]
    return told, digests


def _named(name: str, setting: str) -> str:
    return name + SUFFIX[setting]


def collapsed(runs: Mapping[str, Mapping[str, Sequence[Path]]]) -> list[str]:
    """Runs whose features were all alike at the end: their figures say nothing of their method."""
    found = []
    for name, path in _each(runs):
        rows = [row for row in metrics.read(path / "metrics.jsonl") if "collapsed" in row]
        if rows and rows[-1]["collapsed"]:
            found.append(f"Collapsed at step {rows[-1]['step']}: {name}, {path.name}.")
    return found


def curves(runs: Mapping[str, Mapping[str, Sequence[Path]]]) -> list[dict[str, Any]]:
    """Training losses, as results.json has them."""
    found = []
    for name, path in _each(runs):
        config = trained.read_run(path)[0]
        steps, losses, _ = read_curve(path, config.data.batch)
        line = {"arm": name, "seed": int(config.seed), "x": steps, "y": losses}
        found += [line] if steps else []
    return found


def _each(runs: Mapping[str, Mapping[str, Sequence[Path]]]) -> Iterator[tuple[str, Path]]:
    """Name of the arm and folder of every run."""
    for setting, arms in runs.items():
        for name, paths in arms.items():
            for path in paths:
                yield _named(name, setting), path


# --- claims, in words


def compared(study: Study, way: str, share: float, first: str, second: str) -> str:
    """'A 0.81, B 0.75: +0.06 [0.01, 0.11], p = 0.02', p after Holm's correction, and what that shows."""
    found = {(name, d.first, d.second): d for name, d in study.differences}
    d = found.get((key(way, share, "auc"), first, second))
    titles = {arm.name: arm.title for arm in study.arms}
    told = ", ".join(f"{titles[name]} {_auc(study, name, way, share)}" for name in (first, second))
    return f"{told}: {_verdict(d)}" if d else told


def _auc(study: Study, name: str, way: str, share: float) -> str:
    found = study.scored[name, way, share].metrics.get("auc")
    return tables.figure(found.value if found else None)


def _verdict(d: Difference) -> str:
    apart = f"{d.interval.value:+.3f} [{d.interval.low:+.3f}, {d.interval.high:+.3f}], p {d.p_holm:.3g}"
    if d.p_holm < 0.05:
        return f"{apart}, {'shown' if d.interval.value > 0 else 'the other way round'}"
    return f"{apart}, not shown"


def written(study: Study) -> str:
    """Where the label lies, by the arms of truth."""
    share = max(study.draws)
    told = []
    for way, title in (("knn", "nearest neighbours"), ("linear", "a linear classifier")):
        each = (f"{_auc(study, name, way, share)} from the {name}" for name in TRUTH)
        told.append(f"{title} {', '.join(each)}")
    return f"What is written on the slides (AUC by the phantom's own map of kinds of tile): {'; '.join(told)}."


def answer(study: Study, fallen: Sequence[str] = ()) -> str:
    """How many of the steps of the claim are shown, over ways and shares; then the figures of nearest neighbours."""
    steps = {(name, d.first, d.second): d for name, d in study.differences}
    titles, told = {arm.name: arm.title for arm in study.arms}, []
    for first, second in CLAIM:
        found = [d for (name, a, b), d in steps.items() if (a, b) == (first, second) and name.endswith("/auc")]
        up = sum(d.interval.value > 0 and d.p_holm < 0.05 for d in found)
        down = sum(d.interval.value < 0 and d.p_holm < 0.05 for d in found)
        told.append(
            f"{titles[first]} is clearly above {titles[second]} in {up} of {len(found)} figures, below in {down}"
        )
    warning = f" {len(fallen)} runs collapsed in training: their figures say nothing of their method." if fallen else ""
    arms = dict.fromkeys(name for pair in CLAIM for name in pair)
    each = (f"{titles[name]} {_auc(study, name, 'knn', 1.0)}" for name in arms)
    return f"{'; '.join(told)}.{warning} AUC of nearest neighbours with all labels: {', '.join(each)}."


def record(work: Work, tileset: TileSet, digests: Mapping[str, str]) -> dict[str, Any]:
    """What was made, and where."""
    hashes = {"tile set": tileset.hash} | {f"checkpoint of {path}": digest for path, digest in digests.items()}
    made = compare.cohort(tileset) | {"Size": work.name, "Device": jax.devices()[0].device_kind}
    return {"cohort": {name: made[name] for name in ("Tiles", "Tile", "Size", "Device")}, "hashes": hashes}
