"""Classes by votes of the nearest neighbours, which are never of the same slide or case."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mfl_jax.evaluators.probe import check_features, count_classes
from mfl_jax.evaluators.results import Result, class_metrics
from mfl_jax.evaluators.tasks import Task, check_overlap, split_rows
from mfl_jax.topk import search as neighbours

KS = (1, 5, 20, 100)


def vote(
    similarity: np.ndarray, index: np.ndarray, labels: np.ndarray, k: int, classes: int, *, temperature: float = 0.07
) -> np.ndarray:
    """[Q, classes]: labels of the first k neighbours weighted by exp(cosine / temperature); even if none."""
    near, close = index[:, :k], similarity[:, :k].astype(np.float64)
    best = np.where(np.isfinite(close[:, :1]), close[:, :1], 0)
    weights = np.where(near >= 0, np.exp((close - best) / temperature), 0.0)
    one_hot = np.eye(classes)[labels[np.maximum(near, 0)]]
    votes = (weights[..., None] * one_hot).sum(1)
    total = votes.sum(1, keepdims=True)
    return np.where(total > 0, votes / np.where(total > 0, total, 1), 1 / classes)


def evaluate(
    features: np.ndarray,
    columns: Mapping[str, np.ndarray],
    splits: Mapping[str, Sequence],
    task: Task,
    *,
    ks: Sequence[int] = KS,
    across: Sequence[str] = ("slide", "case"),
    temperature: float = 0.07,
    pretrained: Sequence = (),
    transductive: bool = False,
    seed: int = 0,
    resamples: int = 2000,
) -> Result:
    """The bank is the train cases; k is chosen on the val cases, or within train, each example without its own slide
    and case (`across`); reported on the test cases.
    """
    seen = check_overlap(splits, pretrained, transductive=transductive)
    target, known = task.read(columns)
    check_features(features, known)
    rows = split_rows(columns, splits, known)
    classes = count_classes(target, known)
    train, test = np.flatnonzero(rows["train"]), np.flatnonzero(rows["test"])
    val = np.flatnonzero(rows["val"]) if rows["val"].any() else train
    asked = np.concatenate([val, test])
    barred = [(np.asarray(columns[name])[asked], np.asarray(columns[name])[train]) for name in across]
    similarity, index = neighbours(features[asked], features[train], max(ks), barred)
    options: dict[str, Any] = {"classes": classes, "temperature": temperature}
    losses = []
    for k in ks:
        p = vote(similarity[: len(val)], index[: len(val)], target[train], k, **options)
        losses.append(-np.log(np.maximum(p[np.arange(len(val)), target[val]], 1e-3)).mean())
    k = ks[int(np.argmin(losses))]
    scores = vote(similarity[len(val) :], index[len(val) :], target[train], k, **options)
    scores = scores[:, 1] if classes == 2 else scores
    cases = np.asarray(columns["case"])[test]
    metrics, notes = class_metrics(target[test], scores, cases, resamples=resamples, seed=seed)
    mode = "transductive" if seen else "inductive"
    return Result(task.name, metrics, scores, target[test], cases, test, {"k": int(k)}, mode, seen + notes)
