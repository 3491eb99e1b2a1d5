"""What the demo compares: one config an arm, the same encoder, views of the H&E, batch and number of steps for all."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import configs
from mfl_jax import config as loader
from mfl_jax import data, sweep
from mfl_jax.evaluation import FEW
from mfl_jax.watch import TrainingFailed

TARGET, THRESHOLD = "positive", 0.5
LABELLED = f'supervised.target={TARGET},supervised.threshold={THRESHOLD},data.columns=("{TARGET}",)'


@dataclass(frozen=True)
class Arm:
    name: str
    title: str
    kind: str  # of report/schema.py
    what: str
    config: str  # file of configs/, and its words and overrides


ARMS = (
    Arm("unpaired", "Unpaired SSL", "baseline", "two views of every H&E tile (SimCLR)", "two_view:info_nce"),
    Arm(
        "mfl",
        "MFL",
        "ours",
        "H&E, and the marker's channel of immunofluorescence of the same tissue",
        "mfl:if,info_nce",
    ),
    Arm("trident", "TriDeNT", "ours", "two views of the H&E, and the marker's channel", "trident:if,info_nce"),
    Arm("supervised", "Supervised", "ceiling", "every label of the training cases", f"supervised:{LABELLED}"),
    Arm(
        "supervised_few",
        f"Supervised, {FEW:.0%} of labels",
        "baseline",
        f"labels of {FEW:.0%} of the training tiles, for as many steps",
        f"supervised:{LABELLED},data.share={FEW}",
    ),
)


@dataclass(frozen=True)
class Size:
    """How large all of it is: `word` is that of the configs."""

    word: str
    tile: int  # px
    slide: int  # px
    cases: int
    more: str = ""  # overrides for every arm


SMALL = Size("phantom", tile=64, slide=1024, cases=20)
# Minutes of training on one accelerator. 5 % of the labels are some 90 tiles, and a batch is to be no more. For more:
# --size 8192 --cases 24 --more total.steps=3000,data.batch=128.
GPU = Size("gpu", tile=256, slide=2560, cases=20, more="total.steps=600,data.batch=64")


def spec(arm: Arm, size: Size, tileset: Path, seed: int, more: str = "") -> str:
    """What `mfl train --config` takes for this arm."""
    file, _, words = arm.config.partition(":")
    path = Path(configs.__file__).parent / f"{file}.py"
    parts = (size.word, words, f"name={arm.name}", f'data.tileset="{tileset}"', f"seed={seed}", size.more, more)
    return f"{path}:{','.join(part for part in parts if part)}"


def train_all(
    out: Path,
    size: Size,
    tileset: Path,
    *,
    seeds: int,
    more: str,
    side_by_side: int,
    environment: Mapping[str, str],
    tell: Callable[[str], None],
    arms: Sequence[Arm] = ARMS,
) -> dict[str, list[Path]]:
    """Name of the arm -> the folders of its runs. A run that has ended is kept. TrainingFailed where one fails."""
    for arm in arms:  # what cannot be is said before the first is trained
        data.facts(loader.Reading(loader.load(spec(arm, size, tileset, 0, more))).data)
    runs: dict[str, list[Path]] = {arm.name: [] for arm in arms}
    jobs = []
    for seed in range(seeds):
        for arm in arms:
            name = f"{arm.name}-{seed}"
            jobs.append(sweep.Job(name, spec(arm, size, tileset, seed, more), out / "runs" / name))
            runs[arm.name].append(jobs[-1].workdir)
    submit = functools.partial(sweep.local, side_by_side=side_by_side, environment=environment)
    if failed := sweep.run(jobs, out / "runs", submit, say=tell):
        raise TrainingFailed("; ".join(f"{name} failed: {why}" for name, why in failed.items()))
    return runs
