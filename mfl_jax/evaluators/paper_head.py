"""More From Less's classifier of frozen features: BN - 256 - BN - softmax, several seeds as one program."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mfl_jax import models
from mfl_jax.evaluators.probe import check_features, count_classes
from mfl_jax.evaluators.results import Result, class_metrics
from mfl_jax.evaluators.tasks import Task, check_overlap, nested_draw, split_rows


def evaluate(
    features: np.ndarray,
    columns: Mapping[str, np.ndarray],
    splits: Mapping[str, Sequence],
    task: Task,
    *,
    epochs: int = 30,
    batch: int = 128,
    lr: float = 1e-3,
    seeds: int = 3,
    pretrained: Sequence = (),
    transductive: bool = False,
    seed: int = 0,
    resamples: int = 2000,
) -> Result:
    """Adam, the epoch chosen by the log loss on the val cases (or one fold of the train cases); probabilities are the
    mean over seeds of the start and the order.
    """
    seen = check_overlap(splits, pretrained, transductive=transductive)
    target, known = task.read(columns)
    check_features(features, known)
    rows, classes = split_rows(columns, splits, known), count_classes(target, known)
    cases = np.asarray(columns["case"])
    train, val = nested_draw(cases, rows["train"], rows["val"], folds=5, seed=seed).pairs[0]
    test = np.flatnonzero(rows["test"])
    batch = min(batch, int(train.sum()))
    data = [features[m].astype(np.float32) for m in (train, val, test)]
    labels = [target[m].astype(np.int32) for m in (train, val)]
    keys = jax.random.split(jax.random.key(seed), seeds)
    options = {"classes": classes, "epochs": epochs, "batch": batch}
    logits, chosen = jax.device_get(_train(keys, *data, *labels, np.float32(lr), **options))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True)).mean(0).astype(np.float64)
    scores = p[:, 1] if classes == 2 else p
    metrics, notes = class_metrics(target[test], scores, cases[test], resamples=resamples, seed=seed)
    mode = "transductive" if seen else "inductive"
    where = {"epoch": chosen.tolist()}
    return Result(task.name, metrics, scores, target[test], cases[test], test, where, mode, seen + notes)


@functools.partial(jax.jit, static_argnames=("classes", "epochs", "batch"))
def _train(keys, train, val, test, labels, val_labels, lr, *, classes: int, epochs: int, batch: int):
    """-> logits of the test rows [seeds, N, K] at the best epoch, that epoch [seeds] (0: before any step)."""
    head = models.make_head(f"classifier,out={classes}", train.shape[1])
    tx = optax.adam(lr)
    steps = len(train) // batch

    def run(params, stats, x):
        return head.apply(params, stats, x, train=False)[0]

    def one(key):
        params, stats = head.init(key, train[:2])
        # Raw features are of any scale; the statistics of the first BatchNorm start where they belong.
        stats = stats | {"bn0": {"mean": train.mean(0), "var": train.var(0) + 1e-6}}

        def step(carry, rows):
            params, stats, opt = carry

            def loss(params):
                logits, new = head.apply(params, stats, train[rows], train=True)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean(), new

            grads, new = jax.grad(loss, has_aux=True)(params)
            updates, opt = tx.update(grads, opt, params)
            return (optax.apply_updates(params, updates), new, opt), None

        def epoch(carry, number):
            now, best = carry
            order = jax.random.permutation(jax.random.fold_in(key, number), len(train))
            now, _ = jax.lax.scan(step, now, order[: steps * batch].reshape(steps, batch))
            return (now, better(now, best, number)), None

        def better(now, best, number):
            logits = run(now[0], now[1], val)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, val_labels).mean()
            new = (loss, number, now[0], now[1])
            return jax.tree.map(lambda a, b: jnp.where(loss < best[0], a, b), new, best)

        now = (params, stats, tx.init(params))
        best = better(now, (jnp.float32(jnp.inf), jnp.int32(0), params, stats), jnp.int32(0))
        (_, best), _ = jax.lax.scan(epoch, (now, best), jnp.arange(1, epochs + 1))
        return run(best[2], best[3], test), best[1]

    return jax.vmap(one)(keys)
