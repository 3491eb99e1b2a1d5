"""What an evaluation is asked for and what it has found so far, in the words of report/schema.py."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mfl_jax.evaluators.results import CLASS_METRICS, Result, class_metrics, compare, value_metrics
from mfl_jax.evaluators.tasks import Task
from mfl_jax.statistics import Difference, Interval

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
    "purity": "Purity",
    "nmi": "Normalised mutual information",
    "ari": "Adjusted Rand index",
    "addr_global": "Far/near, all pairs",
    "addr_local": "Far/near, slide by slide",
}
LOWER = ("ece", "mae")
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
    share: float = 1.0  # of the training tiles, whose labels alone it was trained on: it has a place among few labels


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
    few_pairs: Sequence[tuple[str, str]] | None
    slide_probe: bool
    transductive: bool
    resamples: int
    seed: int
    say: Say
    across: str = "case"  # what neighbours of a tile are not of, in retrieval: its case, or its slide

    def of(self, run: Seed) -> dict[str, Any]:
        """Of one seed only the values are wanted: intervals are made once, over all seeds."""
        options: dict[str, Any] = {"pretrained": run.pretrained, "transductive": self.transductive}
        return options | {"resamples": 0, "seed": self.seed}

    def drawn(self) -> dict[str, Any]:
        return {"resamples": self.resamples, "seed": self.seed}


def over_seeds(
    results: Sequence[Result], task: Task, asked: Asked, names: Sequence[str] = CLASS_METRICS
) -> tuple[Mapping[str, Interval], tuple[str, ...]]:
    """Intervals of all metrics of numbers, or of those named of classes."""
    first, stack = results[0], np.stack([r.scores for r in results])
    if task.regression:
        return value_metrics(first.labels, stack, first.cases, **asked.drawn())
    return class_metrics(first.labels, stack, first.cases, names, **asked.drawn())


def differences(
    results: Mapping[str, Sequence[Any]],
    metric: str,
    prefix: str,
    wanted: Sequence[tuple[str, str]] | None,
    asked: Asked,
    found: Found,
    how: Callable[..., list[Difference]] | None = None,
) -> None:
    """`how` compares (results, pairs), where that is not by resampling a metric that is known by its name."""
    names = list(results)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]] if wanted is None else wanted
    pairs = [pair for pair in pairs if set(pair) <= set(names)]
    if not pairs:
        return
    try:
        compared = how(results, pairs) if how else compare(results, metric, pairs, **asked.drawn())
    except ValueError as error:  # one case, or a class that is missing: there is no interval to be had
        found.notes[f"no differences of {prefix}/{metric}: {error}"] = None
        return
    for d in compared:
        ends = {"difference": d.interval.value, "low": d.interval.low, "high": d.interval.high, "p": d.p}
        found.differences.append({"a": d.first, "b": d.second, "metric": f"{prefix}/{metric}", **ends})


def metric(prefix: str, name: str, classes: int) -> dict[str, Any]:
    chance = {"auc": 0.5, "balanced_accuracy": 1 / classes, "kappa": 0.0, "r2": 0.0, "spearman": 0.0}
    row: dict[str, Any] = {"key": f"{prefix}/{name}", "title": TITLES[name]}
    row |= {"better": "lower"} if name in LOWER else {}
    return row | ({"chance": chance[name]} if name in chance else {})


def add(found: Found, arm: ArmRuns, prefix: str, metrics: Mapping[str, Interval], notes: Sequence[str]) -> None:
    found.metrics[arm.name] |= {f"{prefix}/{name}": document_of(interval) for name, interval in metrics.items()}
    note(found, arm, prefix, notes)


def of_seed(
    found: Found, arm: ArmRuns, number: int, prefix: str, metrics: Mapping[str, Interval], notes: Sequence[str]
) -> None:
    """What the seed of that number has by itself."""
    found.seeds[arm.name][number] |= {f"{prefix}/{name}": finite(interval.value) for name, interval in metrics.items()}
    note(found, arm, prefix, notes)


def note(found: Found, arm: ArmRuns, where: str, notes: Sequence[str]) -> None:
    """Once, though several seeds may say it."""
    found.notes |= {f"{arm.title}, {where}: {note}": None for note in notes}


def document_of(interval: Interval) -> dict[str, float | None]:
    return {"mean": finite(interval.value), "low": finite(interval.low), "high": finite(interval.high)}


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
