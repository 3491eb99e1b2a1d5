"""The same encoder trained on labels, end to end: the yardstick, and with the partner as input the ceiling.

inputs      ('he',), a partner alone (the teacher that privileged information could be), or both, joined by features
target      'label' (classes of the tile set), or a column; with `threshold` a column is two classes, above it and not
"""

from typing import Any

import jax
import jax.numpy as jnp

from mfl_jax import losses, models
from mfl_jax.data import Facts
from mfl_jax.methods import towers
from mfl_jax.methods.base import Batch, Method


def make(reading: Any, facts: Facts, mesh: jax.sharding.Mesh) -> Method:
    options = reading.supervised
    names = tuple(options.inputs)
    if names != ("he",):
        towers.check_partners(tuple(n for n in names if n != "he"), facts, "supervised.inputs")
    dtype = towers.compute_dtype(reading.dtype)
    encoders = {n: models.make(reading.encoder if n == "he" else getattr(options.encoders, n)) for n in names}
    views = towers.view_plan(reading, facts, *names)
    looks = {n: towers.eval_view(reading, facts, n) for n in names}
    target, outputs = _target(options, facts)
    head = models.make_head(f"{options.head},out={outputs}", sum(e.dim for e in encoders.values()))

    def encode(params, stats, seen, rng, train: bool):
        features, new = [], {}
        for number, name in enumerate(names):
            key = None if rng is None else jax.random.fold_in(rng, 1000 + number)
            value, new[name] = encoders[name].apply(
                params[name], stats[name], seen[name], train=train, rng=key, dtype=dtype
            )
            features.append(value)
        return jnp.concatenate(features, axis=-1), new

    def init(rng: jax.Array, batch: Batch):
        params, stats = {}, {}
        seen = jax.eval_shape(views, rng, batch)
        for number, name in enumerate(names):
            params[name], stats[name] = encoders[name].init(jax.random.fold_in(rng, number), seen[name][0])
        shape = jax.ShapeDtypeStruct((2, sum(e.dim for e in encoders.values())), jnp.float32)
        params["head"], stats["head"] = head.init(jax.random.fold_in(rng, 100), shape)
        return params, stats

    def loss(params, extra, batch: Batch, rng: jax.Array, step: jax.Array):
        seen = {name: each[0] for name, each in views(rng, batch).items()}
        features, out = encode(params, extra, seen, rng, True)
        key = jax.random.fold_in(rng, 2000)
        logits, out["head"] = head.apply(params["head"], extra["head"], features, train=True, rng=key, dtype=dtype)
        mask = towers.batch_mask(batch)
        for name in names:
            mask = mask & (towers.batch_mask(batch, name) if name != "he" else mask)
        value, metrics = target(logits, batch, mask)
        return value, (out, metrics | towers.diagnosed(features))

    def update(params, extra, out, step):
        return out

    def embed(params, extra, batch: Batch):
        seen = {name: looks[name](batch[name]) for name in names}
        features, _ = encode(params, extra, seen, None, False)
        logits, _ = head.apply(params["head"], extra["head"], features, train=False, dtype=dtype)
        return {"he": features, "logits": logits}

    return Method(init, loss, update, embed)


def _target(options: Any, facts: Facts):
    """(loss(logits, batch, mask), number of outputs)."""
    name, threshold = options.target, options.threshold
    if name not in facts.shapes:
        raise ValueError(f"supervised.target is {name!r}, which no batch has; add it to data.columns")
    smoothing = options.label_smoothing
    if name == "label" or threshold is not None:
        classes = 2 if threshold is not None else len(facts.label_names)
        if classes < 2:
            raise ValueError(f"supervised.target 'label' needs two classes or more; the set has {facts.label_names}")

        def classify(logits, batch: Batch, mask):
            values = batch[name]
            known = mask & (values >= 0) & ~jnp.isnan(values.astype(jnp.float32))
            truth = values > threshold if threshold is not None else values
            labels = jnp.where(known, truth, 0).astype(jnp.int32)
            return losses.xent(logits, labels, smoothing=smoothing, mask=known)

        return classify, classes

    def regress(logits, batch: Batch, mask):
        values = batch[name].astype(jnp.float32)
        known = mask & ~jnp.isnan(values)
        return losses.regression(logits[:, 0], jnp.where(known, values, 0.0), mask=known)

    return regress, 1
