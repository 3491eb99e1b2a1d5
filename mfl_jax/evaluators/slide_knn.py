"""Slides from embeddings of their regions (or tiles): who is trained on and tested, and the two ways without a network.

The protocol is that of HIPT and SLPD: folds of patients, of which one tests, the next chooses (the penalty, the epoch)
and the others train, all of them or a share; k nearest neighbours, or logistic regression, on the mean embedding of a
slide. Everything here follows the order of the slides it is given: give them sorted by name, and the same slides in
another file give the same figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mfl_jax.bags import Bags, Table
from mfl_jax.evaluators import logistic
from mfl_jax.evaluators.mil.folds import deal

FOLDS, SHARES, K = 10, (0.25, 1.0), 5
DISTANCES = ("euclidean", "cosine")


@dataclass(frozen=True)
class Draw:
    """One fit: rows of the table. val chooses, and nothing sees test before the end."""

    fold: int
    share: float
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def plan(
    table: Table, *, folds: int = FOLDS, shares: Sequence[float] = SHARES, seed: int = 0
) -> dict[float, tuple[Draw, ...]]:
    """By share, a draw a fold. A share is of the cases of each class that a fold trains on, at least one; a smaller
    share is part of a greater one, and every arm gets the same. Val and test are never fewer."""
    if folds < 3:
        raise ValueError(f"folds is {folds}: one tests and one chooses, so that there are at least 3")
    if not shares or not all(0 < share <= 1 for share in shares) or len(set(shares)) < len(shares):
        raise ValueError(f"shares are above 0 and up to 1, each once, not {list(shares)}")
    cases, every = np.asarray(table.cases), np.arange(len(table.slides))
    tests = [test for _, test in deal(cases, table.labels, every, folds, seed)]
    found: dict[float, list[Draw]] = {share: [] for share in shares}
    for k, test in enumerate(tests):
        val = tests[(k + 1) % folds]
        train = np.setdiff1d(every, np.concatenate([val, test]))
        turn = _in_turn(cases[train], table.labels[train], np.random.default_rng([seed, k]))
        for share in shares:
            kept = np.isin(
                cases[train], [case for group in turn for case in group[: max(1, round(share * len(group)))]]
            )
            found[share].append(Draw(k, share, train[kept], val, test))
    for draws in found.values():
        _check(draws, table)
    return {share: tuple(draws) for share, draws in found.items()}


def _in_turn(cases: np.ndarray, labels: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
    """The cases of each class in the order in which shares take them. A case is of the greatest label of its slides."""
    names, of_row = np.unique(cases, return_inverse=True)
    label = np.full(len(names), -1)
    np.maximum.at(label, of_row, labels)
    return [names[generator.permutation(np.flatnonzero(label == k))] for k in np.unique(label)]


def _check(draws: Sequence[Draw], table: Table) -> None:
    for draw in draws:
        for part, rows in (("train", draw.train), ("val", draw.val)):
            lacking = [name for k, name in enumerate(table.names) if not (table.labels[rows] == k).any()]
            if lacking:
                raise ValueError(
                    f"fold {draw.fold} at {draw.share:.0%} of the labels: {part} lacks {lacking[0]!r}. Take fewer "
                    "folds, or put more cases of it in"
                )


def strata(draws: Sequence[Draw]) -> np.ndarray:
    """[S] the fold that tests each slide."""
    found = np.full(sum(len(draw.test) for draw in draws), -1)
    for draw in draws:
        found[draw.test] = draw.fold
    return found


def means(bags: Bags) -> np.ndarray:
    """float64 [S, D] of the embeddings of each slide; a slide without any has the mean of the others: it says nothing
    and is kept."""
    lengths = bags.lengths
    sums = np.zeros((len(bags), bags.features.shape[1]))
    np.add.at(sums, np.repeat(np.arange(len(bags)), lengths), bags.features.astype(np.float64))
    found = sums / np.maximum(lengths, 1)[:, None]
    found[lengths == 0] = found[lengths > 0].mean(0)
    return found


def knn(
    x: np.ndarray, labels: np.ndarray, draws: Sequence[Draw], classes: int, *, k: int = K, distance: str = "euclidean"
) -> np.ndarray:
    """[S] (of class 1 where there are two) or [S, K]: the share of each class among the k nearest slides that a fold
    trains on. Of slides equally far the first counts; with fewer than k, all vote."""
    if distance not in DISTANCES:
        raise ValueError(f"distance is {distance!r}; there are {', '.join(DISTANCES)}")
    if k < 1:
        raise ValueError(f"k is {k}; at least one neighbour votes")
    if distance == "cosine":
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    scores = np.zeros((len(x), classes))
    for draw in draws:
        a, b = x[draw.test] - x[draw.train].mean(0), x[draw.train] - x[draw.train].mean(0)
        apart = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        near = np.argsort(apart, axis=1, kind="stable")[:, :k]
        scores[draw.test] = np.eye(classes)[labels[draw.train[near]]].mean(1)
    return scores[:, 1] if classes == 2 else scores


def linear(
    x: np.ndarray, labels: np.ndarray, draws: Sequence[Draw], classes: int, cs: tuple[float, ...] = logistic.CS
) -> tuple[np.ndarray, list[float]]:
    """Probabilities as in `knn`, and the C that each draw's val chose. All draws and penalties are one program;
    features are standardised over all slides, which needs no label."""
    masks, choose = (_rows([getattr(d, part) for d in draws], len(x)) for part in ("train", "val"))
    fits = logistic.fit(x, labels, masks, choose, classes=classes, cs=cs)
    scores, chosen = np.zeros((len(x), classes)[: 1 if classes == 2 else 2]), []
    for number, draw in enumerate(draws):
        best = int(fits.losses[number].argmin())  # of equals the stronger penalty
        scores[draw.test] = fits.probabilities(number, best, x[draw.test])
        chosen.append(cs[best])
    return scores, chosen


def _rows(lists: Sequence[np.ndarray], slides: int) -> np.ndarray:
    found = np.zeros((len(lists), slides), bool)
    for mask, rows in zip(found, lists, strict=True):
        mask[rows] = True
    return found
