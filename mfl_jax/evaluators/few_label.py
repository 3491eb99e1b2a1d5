"""How many labels does it take? The linear probe on 1 to 100 % of the labelled cases, and of the labelled tiles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mfl_jax import statistics
from mfl_jax.evaluators import logistic
from mfl_jax.evaluators.probe import check_features, chosen_fits, count_classes
from mfl_jax.evaluators.results import Result, class_metrics
from mfl_jax.evaluators.tasks import Draw, Task, check_overlap, nested_draw, split_rows
from mfl_jax.statistics import Interval

FRACTIONS = (0.01, 0.05, 0.1, 0.25, 1.0)
UNITS = ("cases", "tiles")


@dataclass(frozen=True)
class Point:
    unit: str  # what the fraction is of: 'cases' or 'tiles'
    fraction: float
    labels: float  # tiles with a label that were used, train and val together, mean over draws
    cases: float
    scores: np.ndarray  # [draws, test examples(, classes)]
    metrics: dict[str, Interval]  # the mean over draws, its interval over test cases
    spread: dict[str, tuple[float, float]]  # least and greatest of the draws


@dataclass(frozen=True)
class Curve:
    task: str
    points: tuple[Point, ...]
    labels: np.ndarray
    cases: np.ndarray
    ids: np.ndarray
    mode: str
    notes: tuple[str, ...]

    def results(self, unit: str, fraction: float) -> list[Result]:
        """One a draw, as if it were a seed; none where the curve has no such point."""
        same: tuple[Any, ...] = (self.labels, self.cases, self.ids, {}, self.mode)
        points = [p for p in self.points if (p.unit, p.fraction) == (unit, fraction)]
        return [Result(self.task, {}, scores, *same) for p in points for scores in p.scores]

    def floats(self, prefix: str, metric: str = "auc") -> dict[str, float]:
        found = {}
        for p in self.points:
            if metric in p.metrics:
                found[f"{prefix}/{metric}_{p.fraction * 100:g}pc_{p.unit}"] = p.metrics[metric].value
        return found


def subset(
    units: np.ndarray, labels: np.ndarray, rows: np.ndarray, fractions: Sequence[float], seed: int
) -> list[np.ndarray]:
    """bool [N] a fraction: the first units (cases, or single tiles) of one shuffled order, so that draws are nested.

    Where that many hold no example of some class, as many more are taken as it needs.
    """
    names = np.unique(units[rows])
    names = names[np.random.default_rng(seed).permutation(len(names))]
    place = np.full(len(units), len(names))
    order = np.argsort(names)
    place[rows] = order[np.searchsorted(names[order], units[rows])]
    every = max(place[rows & (labels == k)].min() + 1 for k in np.unique(labels[rows]))
    return [rows & (place < max(int(np.ceil(f * len(names))), every)) for f in fractions]


def curve(
    features: np.ndarray,
    columns: Mapping[str, np.ndarray],
    splits: Mapping[str, Sequence],
    task: Task,
    *,
    fractions: Sequence[float] = FRACTIONS,
    units: Sequence[str] = UNITS,
    draws: int = 3,
    folds: int = 5,
    pretrained: Sequence = (),
    transductive: bool = False,
    seed: int = 0,
    cs: tuple[float, ...] = logistic.CS,
    metrics: Sequence[str] = ("auc", "balanced_accuracy"),
    resamples: int = 1000,
) -> Curve:
    """The same share is drawn from the train and from the val cases: choosing the penalty takes labels too. A draw of
    one case, where there is no val split, is folded by tiles.
    """
    if task.regression:
        raise ValueError(f"task {task.name!r}: few-label curves are of classes")
    seen = check_overlap(splits, pretrained, transductive=transductive)
    target, known = task.read(columns)
    check_features(features, known)
    rows, classes = split_rows(columns, splits, known), count_classes(target, known)
    cases, test = np.asarray(columns["case"]), np.flatnonzero(rows["test"])
    planned: list[tuple[str, float, Draw]] = []
    for unit in units:
        for number in range(draws):
            parts = _nested(unit, cases, target, rows, fractions, seed + number)
            for fraction, (train, val) in zip(fractions, parts, strict=True):
                of_fold = cases if len(np.unique(cases[train])) > 1 else np.arange(len(cases))
                draw = nested_draw(of_fold, train, val, folds=folds, seed=seed + number)
                planned.append((unit, fraction, draw))
    fitted = chosen_fits(features, target, [d for _, _, d in planned], test, classes, cs)
    points, notes = [], []
    for unit in units:
        for fraction in fractions:
            here = [i for i, (u, f, _) in enumerate(planned) if (u, f) == (unit, fraction)]
            used = [np.any([m for pair in planned[i][2].pairs for m in pair], axis=0) for i in here]
            scores = np.stack([fitted[i][0] for i in here])
            options = {"resamples": resamples, "seed": seed}
            found, more = class_metrics(target[test], scores, cases[test], metrics, **options)
            each = {m: [statistics.measure(m, target[test], s) for s in scores] for m in found}
            spread = {m: (min(v), max(v)) for m, v in each.items()}
            counts = float(np.mean([u.sum() for u in used])), float(np.mean([len(np.unique(cases[u])) for u in used]))
            points.append(Point(unit, fraction, *counts, scores, found, spread))
            notes += [f"{fraction:g} of {unit}: {note}" for note in more]
    mode = "transductive" if seen else "inductive"
    return Curve(task.name, tuple(points), target[test], cases[test], test, mode, seen + tuple(notes))


def _nested(
    unit: str,
    cases: np.ndarray,
    target: np.ndarray,
    rows: Mapping[str, np.ndarray],
    fractions: Sequence[float],
    seed: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    if unit not in UNITS:
        raise ValueError(f"labels are counted by {' or '.join(UNITS)}, not by {unit!r}")
    of = cases if unit == "cases" else np.arange(len(cases))
    train = subset(of, target, rows["train"], fractions, seed)
    if not rows["val"].any():
        return [(t, np.zeros_like(t)) for t in train]
    return list(zip(train, subset(of, target, rows["val"], fractions, seed), strict=True))
