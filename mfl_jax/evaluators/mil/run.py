"""From bags and a table to out-of-fold predictions of every head on every set of features, and what they are worth."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mfl_jax import statistics
from mfl_jax.bags import Bags, Table, with_cases
from mfl_jax.evaluators import results
from mfl_jax.evaluators.mil import folds as splits
from mfl_jax.evaluators.mil.fit import Fit, Fitted, Settings, Target, fit_all, pack, tile_scores
from mfl_jax.evaluators.mil.folds import Fold
from mfl_jax.evaluators.mil.survival import Concordance
from mfl_jax.evaluators.results import Result, class_metrics
from mfl_jax.models.mil import make_mil
from mfl_jax.statistics import Difference

BINARY = ("auc", "balanced_accuracy", "average_precision", "f1", "ece")
C_INDEX = "c_index"
Say = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Arm:
    """One head on one set of features. `result` is of the mean over seeds and inner folds; `seeds` of each seed."""

    name: str
    features: str
    head: str
    result: Result
    seeds: tuple[dict[str, float], ...]
    folds: dict[str, dict[str, float]]  # per fold, of the mean over seeds
    chosen: dict[str, dict[str, float]]  # per fold: lr, decay, and the mean best epoch
    fits: int
    used: dict[str, Any]  # per fold: parameters of the fits that its predictions are the mean of, leaves [J, ...]


@dataclass(frozen=True)
class Study:
    table: Table
    folds: tuple[Fold, ...]
    arms: tuple[Arm, ...]
    differences: tuple[Difference, ...]
    metric: str
    notes: tuple[str, ...]


def target_of(table: Table) -> Target:
    if table.times is not None:
        return Target("survival", table.labels, 1, table.times)
    classes = len(table.names)
    return Target("binary" if classes == 2 else "classes", table.labels, 1 if classes == 2 else classes)


def study(
    bags: Mapping[str, Bags],
    table: Table,
    heads: Sequence[str],
    *,
    folds: Sequence[Fold] | None = None,
    settings: Settings | None = None,
    seeds: int = 3,
    lrs: Sequence[float] = (1e-3,),
    decays: Sequence[float] = (0.0,),
    pretrained: Sequence[str] | Mapping[str, Sequence[str]] = (),
    resamples: int = 2000,
    seed: int = 0,
    say: Say | None = None,
) -> Study:
    """Every head of `heads` on every set of `bags` {name: bags}, in the same folds (default: nested, five of five).

    Of the settings lrs x decays, each fold takes those of the least loss on its inner folds' val; its test slides are
    predicted by all those fits together. `pretrained` are the cases that the encoder has seen, or those of each set of
    features by its name, which marks the result.
    """
    settings = settings or Settings()
    _check(bags, heads, seeds, lrs, decays, table.survival)
    chosen = tuple(folds) if folds is not None else splits.nested(table, seed=seed)
    splits.check(chosen, table)
    target = target_of(table)
    planned = plan(chosen, seeds, lrs, decays, seed)
    options = {"resamples": resamples, "seed": seed}
    seen_by = pretrained if isinstance(pretrained, Mapping) else dict.fromkeys(bags, pretrained)
    arms = []
    for name, given in bags.items():
        mode = "transductive" if set(seen_by.get(name, ())) & set(table.cases) else "inductive"
        ours = with_cases(given, table)
        packed = pack(ours.features, ours.offsets)
        for head in heads:
            tell = functools.partial(say, f"{name} {head}") if say else None
            fitted = fit_all(head, packed, target, [fit for *_, fit in planned], settings, progress=tell)
            arm = f"{name} / {head}" if len(bags) > 1 else head
            arms.append(_arm(arm, name, head, table, chosen, planned, fitted, target, seeds, options, mode))
    metric = C_INDEX if table.survival else "auc"
    notes = tuple(f"{name}: {note}" for name, given in bags.items() for note in given.notes)
    seen = {row for fold in chosen for train, val in fold.inner for row in (*train, *val, *fold.test)}
    if absent := len(table.slides) - len(seen):
        notes += (f"{absent} slides of the table are in no fold: nothing is trained on them or tested",)
    return Study(table, chosen, tuple(arms), _differences(arms, metric, table, chosen, options), metric, notes)


def _check(
    bags: Mapping, heads: Sequence[str], seeds: int, lrs: Sequence[float], decays: Sequence[float], survival: bool
) -> None:
    if not bags or not heads or len(set(heads)) < len(heads):
        raise ValueError(f"there is at least one set of features and one head, each once; seen {list(heads)}")
    for head in heads:
        if make_mil(head).instance and survival:
            raise ValueError(f"head {head!r} has a loss over tiles of a class, which survival does not have")
    if seeds < 1 or not lrs or not decays or min(lrs) <= 0 or min(decays) < 0:
        raise ValueError(f"seeds {seeds}, lrs {list(lrs)}, decays {list(decays)}: one or more of each, none negative")


Planned = tuple[int, int, int, tuple[float, float], Fit]


def plan(folds: Sequence[Fold], seeds: int, lrs: Sequence[float], decays: Sequence[float], seed: int) -> list[Planned]:
    """(fold, inner fold, seed, (lr, decay), fit), all that are to be trained."""
    found: list[Planned] = []
    for k, fold in enumerate(folds):
        for i, (train, val) in enumerate(fold.inner):
            for s in range(seeds):
                start = int(np.random.SeedSequence([seed, k, i, s]).generate_state(1)[0])
                for lr in lrs:
                    for decay in decays:
                        found.append((k, i, s, (lr, decay), Fit(train, val, fold.test, start, lr, decay)))
    return found


def probabilities(logits: np.ndarray, kind: str) -> np.ndarray:
    """[N] of class 1, [N, K], or [N] risks."""
    if kind == "survival":
        return logits[:, 0]
    if kind == "binary":
        return 1 / (1 + np.exp(-np.clip(logits[:, 0], -700, 700)))
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def _arm(
    name: str,
    features: str,
    head: str,
    table: Table,
    folds: Sequence[Fold],
    planned: Sequence[Planned],
    fitted: Fitted,
    target: Target,
    seeds: int,
    options: Mapping[str, int],
    mode: str,
) -> Arm:
    shape = (len(table.slides),) if target.outputs == 1 else (len(table.slides), target.outputs)
    total, count, chosen, used, per_fold = np.zeros((seeds, *shape)), np.zeros(len(table.slides)), {}, {}, {}
    counted: list[int] = []
    for k, fold in enumerate(folds):
        mine = [j for j, p in enumerate(planned) if p[0] == k]
        grid = list(dict.fromkeys(planned[j][3] for j in mine))
        mean = {g: float(np.mean([fitted.losses[j] for j in mine if planned[j][3] == g])) for g in grid}
        best = min(grid, key=lambda g: mean[g])
        if not math.isfinite(mean[best]):
            raise ValueError(f"{name}, {fold.name}: some fit's loss was never finite: scale the features, or lower lr")
        kept = [j for j in mine if planned[j][3] == best]
        counted += kept
        every = [
            [probabilities(fitted.logits[j], target.kind) for j in kept if planned[j][2] == s] for s in range(seeds)
        ]
        of_seeds = np.mean(every, axis=1)
        total[:, fold.test] += of_seeds
        count[fold.test] += 1
        per_fold[fold.name] = _values(table, [fold], fold.test, of_seeds.mean(0))
        epoch = float(np.mean(fitted.epochs[kept]))
        chosen[fold.name] = {"lr": best[0], "decay": best[1], "epoch": epoch, "loss": mean[best]}
        used[fold.name] = jax.tree.map(lambda leaf, kept=kept: leaf[kept], fitted.params)
    tested = np.flatnonzero(count)
    stack = total[:, tested] / count[tested].reshape(-1, *[1] * (len(shape) - 1))
    notes = _unfinished(fitted.curves[counted])
    notes += () if count.max() == 1 else ("slides are tested in several folds: their predictions are averaged",)
    result = _result(table, folds, tested, stack.mean(0), options, mode, notes)
    of_seed = tuple(_values(table, folds, tested, scores) for scores in stack)
    return Arm(name, features, head, result, of_seed, per_fold, chosen, len(planned), used)


def _unfinished(curves: np.ndarray) -> tuple[str, ...]:
    """Few slides make few steps an epoch, and heads that are not done look as if the features held nothing."""
    cut = int(np.isfinite(curves[:, -1]).sum())
    if 2 * cut <= len(curves):
        return ()
    return (f"{cut} of {len(curves)} fits were cut short by the limit of {curves.shape[1]} epochs: allow more",)


def strata(folds: Sequence[Fold], rows: np.ndarray) -> np.ndarray:
    """The (first) fold in which each row is tested."""
    found = np.full(int(rows.max()) + 1, -1)
    for k, fold in reversed(list(enumerate(folds))):
        found[fold.test[fold.test < len(found)]] = k
    return found[rows]


def _concordance(table: Table, folds: Sequence[Fold], rows: np.ndarray) -> Concordance:
    assert table.times is not None
    return Concordance(table.times[rows], table.labels[rows], strata(folds, rows))


def _result(
    table: Table,
    folds: Sequence[Fold],
    rows: np.ndarray,
    scores: np.ndarray,
    options: Mapping[str, int],
    mode: str,
    notes: tuple[str, ...],
) -> Result:
    labels, cases = table.labels[rows], np.asarray(table.cases)[rows]
    if table.survival:
        metric = {C_INDEX: _concordance(table, folds, rows)}
        metrics, more = results.value_metrics(labels, scores, cases, metric, **options)
    else:
        metrics, more = class_metrics(labels, scores, cases, BINARY, **options)
    return Result("slides", metrics, scores, labels, cases, rows, {}, mode, notes + more)


def _values(table: Table, folds: Sequence[Fold], rows: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Without those that have no value, such as the AUC of a fold that tests one class."""
    names: Sequence[str] = (C_INDEX,) if table.survival else BINARY
    found = {}
    for name in names:
        try:
            if table.survival:
                one = _concordance(table, folds, rows)(table.labels[rows], scores, np.ones((1, len(rows))))
                found[name] = float(one[0])
            else:
                found[name] = statistics.measure(name, table.labels[rows], scores)
        except ValueError:
            continue
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _differences(
    arms: Sequence[Arm], metric: str, table: Table, folds: Sequence[Fold], options: Mapping[str, int]
) -> tuple[Difference, ...]:
    if len(arms) < 2 or not options["resamples"]:
        return ()
    given = {arm.name: arm.result for arm in arms}
    function = _concordance(table, folds, arms[0].result.ids) if table.survival else metric
    return tuple(results.compare(given, function, None, **options))


def attention(arm: Arm, bags: Bags, folds: Sequence[Fold], row: int) -> np.ndarray:
    """[N] of a slide by the fits that have not seen it: the mean over them, and over the folds that test it."""
    of = [tile_scores(arm.head, arm.used[f.name], bags.features[bags.rows(row)]) for f in folds if row in f.test]
    if not of:
        raise ValueError(f"slide {bags.slides[row]!r} is tested in no fold")
    return np.mean(of, axis=0)


def spread(arm: Arm, metric: str) -> tuple[float, float, float]:
    """Least, mean and greatest over folds; nan where no fold has a value."""
    values = [f[metric] for f in arm.folds.values() if metric in f]
    return (min(values), float(np.mean(values)), max(values)) if values else (math.nan,) * 3


def top_mean(scores: np.ndarray, offsets: np.ndarray, top: int) -> np.ndarray:
    """[S] the mean of each bag's `top` greatest tile scores, what a tile classifier says of a slide; of all of them
    where there are fewer, and the least score there is for a bag without tiles."""
    if top < 1:
        raise ValueError(f"top is {top}; it is 1 or more")
    bags = [np.sort(scores[a:b])[::-1][:top] for a, b in itertools.pairwise(offsets)]
    return np.array([bag.mean() if len(bag) else scores.min() for bag in bags])
