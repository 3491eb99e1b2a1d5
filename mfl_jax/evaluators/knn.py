"""Nearest neighbours by cosine: exact, in blocks on the device, and never of the same slide or case."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mfl_jax.evaluators.probe import check_features, count_classes
from mfl_jax.evaluators.results import Result, class_metrics
from mfl_jax.evaluators.tasks import Task, check_overlap, split_rows

KS = (1, 5, 20, 100)
BLOCK = 1024


def neighbours(
    queries: np.ndarray,
    bank: np.ndarray,
    k: int,
    exclude: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    *,
    block: int = BLOCK,
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar rows of the bank: cosine [Q, k], descending, and index [Q, k]; -inf and -1 where fewer are
    allowed. `exclude` holds (codes of queries, codes of bank): rows with an equal code are no neighbours.
    """
    if not len(bank) or k < 1:
        raise ValueError(f"k is at least 1 and the bank has rows, not k={k} and {len(bank)} rows")
    k = min(k, len(bank))
    codes = [np.unique(np.concatenate([q, b]), return_inverse=True)[1].astype(np.int32) for q, b in exclude]
    of_queries = np.stack([c[: len(queries)] for c in codes], 1) if codes else np.zeros((len(queries), 0), np.int32)
    of_bank = np.stack([c[len(queries) :] for c in codes], 1) if codes else np.zeros((len(bank), 0), np.int32)
    size = min(block, max(len(queries), len(bank)))
    inputs = (
        _blocks(_unit(queries), size),
        _blocks(of_queries, size),
        _blocks(_unit(bank), size),
        _blocks(of_bank, size),
    )
    similarity, index = jax.device_get(_search(*inputs, np.int32(len(bank)), k=k))
    similarity, index = (x.reshape(-1, k)[: len(queries)] for x in (similarity, index))
    return similarity, np.where(np.isneginf(similarity), -1, index)


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _blocks(x: np.ndarray, size: int) -> np.ndarray:
    return np.pad(x, ((0, -len(x) % size), (0, 0))).reshape(-1, size, x.shape[1])


@functools.partial(jax.jit, static_argnames="k")
def _search(queries, of_queries, bank, of_bank, rows, *, k: int):
    """Over blocks of queries; in each over blocks of the bank, keeping the k best so far."""
    size = bank.shape[1]

    def one(query):
        q, codes = query

        def scan(best, part):
            number, b, other = part
            at = number * size + jnp.arange(size)
            close = jnp.matmul(q, b.T, precision=lax.Precision.HIGHEST)
            barred = (codes[:, None] == other[None]).any(-1) | (at >= rows)
            close = jnp.concatenate([best[0], jnp.where(barred, -jnp.inf, close)], 1)
            at = jnp.concatenate([best[1], jnp.broadcast_to(at, (q.shape[0], size))], 1)
            top, where = lax.top_k(close, k)
            return (top, jnp.take_along_axis(at, where, 1)), None

        none = jnp.full((q.shape[0], k), -jnp.inf), jnp.zeros((q.shape[0], k), jnp.int32)
        return lax.scan(scan, none, (jnp.arange(bank.shape[0], dtype=jnp.int32), bank, of_bank))[0]

    return lax.map(one, (queries, of_queries))


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
