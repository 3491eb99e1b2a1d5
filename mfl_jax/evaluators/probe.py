"""The linear probe: what can be read from frozen features by a linear map, tested on cases that nothing has seen."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mfl_jax.evaluators import logistic, ridge
from mfl_jax.evaluators.results import Result, class_metrics, value_metrics
from mfl_jax.evaluators.tasks import Draw, Task, check_overlap, masks_of, nested_draw, split_rows


def evaluate(
    features: np.ndarray,
    columns: Mapping[str, np.ndarray],
    splits: Mapping[str, Sequence],
    task: Task,
    *,
    pretrained: Sequence = (),
    transductive: bool = False,
    folds: int = 5,
    refit: bool = False,
    seed: int = 0,
    cs: tuple[float, ...] = logistic.CS,
    alphas: tuple[float, ...] = ridge.ALPHAS,
    resamples: int = 2000,
) -> Result:
    """Logistic (or, for a regression, ridge) on the train cases, its penalty chosen on the val cases or by case-wise
    folds of train where there are none, reported on the test cases. columns['case'] and splits name cases alike.
    """
    seen = check_overlap(splits, pretrained, transductive=transductive)
    target, known = task.read(columns)
    check_features(features, known)
    rows = split_rows(columns, splits, known)
    cases = np.asarray(columns["case"])
    draw = nested_draw(cases, rows["train"], rows["val"], folds=folds, seed=seed, refit=refit)
    test = np.flatnonzero(rows["test"])
    chosen: dict[str, Any]
    direction = None
    if task.regression:
        scores, alpha = ridge.nested(features, target[:, None], draw.pairs, draw.final, test, alphas)
        chosen, scores = {"alpha": float(alpha[0])}, scores[:, 0]
        notes = _at_edge("alpha", float(alpha[0]), alphas)
        metrics, more = value_metrics(target[test], scores, cases[test], resamples=resamples, seed=seed)
    else:
        classes = count_classes(target, known)
        (fitted,) = chosen_fits(features, target, [draw], test, classes, cs)
        chosen, scores, notes, direction = {"C": fitted[1]}, fitted[0], fitted[2], fitted[3]
        metrics, more = class_metrics(target[test], scores, cases[test], resamples=resamples, seed=seed)
    mode = "transductive" if seen else "inductive"
    return Result(
        task.name, metrics, scores, target[test], cases[test], test, chosen, mode, seen + notes + more, direction
    )


def score(
    predictions: np.ndarray,
    columns: Mapping[str, np.ndarray],
    splits: Mapping[str, Sequence],
    task: Task,
    *,
    pretrained: Sequence = (),
    transductive: bool = False,
    seed: int = 0,
    resamples: int = 2000,
) -> Result:
    """Predictions that exist already, on the same test examples as `evaluate`: a model trained end to end.

    [N] the probability of class 1 or the predicted value, or [N, K] logits or probabilities of K classes (softmax is
    taken of rows that do not sum to 1).
    """
    seen = check_overlap(splits, pretrained, transductive=transductive)
    target, known = task.read(columns)
    predictions = np.asarray(predictions, np.float64)
    check_features(predictions.reshape(len(predictions), -1), known)
    test = np.flatnonzero(split_rows(columns, splits, known)["test"])
    scores, cases = predictions[test], np.asarray(columns["case"])[test]
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    if task.regression:
        scores = scores.reshape(len(test))
        metrics, notes = value_metrics(target[test], scores, cases, **options)
    else:
        if scores.ndim == 2 and not np.allclose(scores.sum(1), 1, atol=1e-4):
            scores = np.exp(scores - scores.max(1, keepdims=True))
            scores = scores / scores.sum(1, keepdims=True)
        scores = scores[:, 1] if scores.ndim == 2 and scores.shape[1] == 2 else scores
        metrics, notes = class_metrics(target[test], scores, cases, **options)
    mode = "transductive" if seen else "inductive"
    return Result(task.name, metrics, scores, target[test], cases, test, {}, mode, seen + notes)


def chosen_fits(
    features: np.ndarray,
    labels: np.ndarray,
    draws: Sequence[Draw],
    test: np.ndarray,
    classes: int,
    cs: tuple[float, ...] = logistic.CS,
) -> list[tuple[np.ndarray, float, tuple[str, ...], np.ndarray | None]]:
    """Per draw: probabilities of the test rows, the chosen C, notes, and the direction where there are two classes.
    All fits of all draws run as one program.
    """
    masks, choose, places = masks_of(draws)
    fits = logistic.fit(features, labels, masks, choose, classes=classes, cs=cs)
    good = fits.converged()
    found = []
    for draw, (numbers, final) in zip(draws, places, strict=True):
        size = choose[numbers].sum(1)
        losses = np.average(fits.losses[numbers], axis=0, weights=size)
        c = int(losses.argmin())  # of equals the stronger penalty
        notes = _at_edge("C", cs[c], cs)
        if not good[final, c]:
            notes += (f"the fit of draw {draw.name!r} ended with a gradient of {fits.residual[final, c]:.1g}",)
        direction = fits.direction(final, c) if classes == 2 else None
        found.append((fits.probabilities(final, c, features[test]), cs[c], notes, direction))
    return found


def count_classes(labels: np.ndarray, known: np.ndarray) -> int:
    classes = int(labels[known].max()) + 1
    if classes < 2:
        raise ValueError("the target has one class only: there is nothing to tell apart")
    return classes


def check_features(features: np.ndarray, known: np.ndarray) -> None:
    if features.ndim != 2 or len(features) != len(known):
        raise ValueError(f"features are [{len(known)}, D], one row an example, not {list(features.shape)}")
    if not np.isfinite(features).all():
        raise ValueError(f"{np.sum(~np.isfinite(features).all(1))} rows of the features are not finite")


def _at_edge(name: str, value: float, grid: tuple[float, ...]) -> tuple[str, ...]:
    return (f"{name} = {value:g} is at the edge of its grid",) if value in (grid[0], grid[-1]) and len(grid) > 1 else ()
