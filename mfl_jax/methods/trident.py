"""TriDeNT: two views of the H&E, which share a tower, and the dense partner with its own; all pairs of branches agree.

The pair of H&E views keeps what the H&E knows by itself, so that a partner which says little does no harm.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mfl_jax.data import Facts
from mfl_jax.methods import towers
from mfl_jax.methods.base import Batch, Method, Metrics


def make(reading: Any, facts: Facts, mesh: jax.sharding.Mesh) -> Method:
    options = reading.trident
    (partner,) = towers.check_partners((options.partner,), facts, "trident.partner")
    he = towers.tower(reading.encoder, options.projector, reading.dtype)
    dense = towers.tower(options.encoder, options.projector, reading.dtype)
    views, looks = towers.view_plan(reading, facts, "he", partner), towers.eval_views(reading, facts, ("he", partner))
    pair, scale = towers.pair_loss(options, mesh), towers.learnt_scale(options)
    count = len(dict(views.views)["he"])
    if count != 2:
        raise ValueError(f"trident takes two views of the H&E; views.he gives {count}: begin it with '2*'")

    def init(rng: jax.Array, batch: Batch):
        seen = jax.eval_shape(views, rng, batch)
        he_params, he_stats = he.init(jax.random.fold_in(rng, 0), seen["he"][0])
        dense_params, dense_stats = dense.init(jax.random.fold_in(rng, 1), seen[partner][0])
        return {"he": he_params, partner: dense_params} | scale, {"he": he_stats, partner: dense_stats}

    def loss(params, extra, batch: Batch, rng: jax.Array, step: jax.Array):
        seen = views(rng, batch)
        first, second, third = (jax.random.fold_in(rng, 1000 + i) for i in range(3))
        _, a, stats = he(params["he"], extra["he"], seen["he"][0], first)
        _, b, stats = he(params["he"], stats, seen["he"][1], second)
        _, z, dense_stats = dense(params[partner], extra[partner], seen[partner][0], third)
        both, there = towers.batch_mask(batch), towers.batch_mask(batch, partner)
        total = jnp.float32(0)
        metrics: Metrics = {}
        pairs = {"he-he": (a, b, both), f"he1-{partner}": (a, z, there), f"he2-{partner}": (b, z, there)}
        for name, (x, y, mask) in pairs.items():
            value, found = pair(x, y, mask=mask, slide=batch["slide"], log_scale=params.get("log_scale"))
            total = total + value
            metrics |= towers.named_metrics(name, {"loss": value} | found)
        return total, ({"he": stats, partner: dense_stats}, metrics | towers.diagnosed(a, b))

    def update(params, extra, out, step):
        return out

    def embed(params, extra, batch: Batch):
        return {"he": he.features(params["he"], extra["he"], looks["he"](batch["he"]))}

    return Method(init, loss, update, embed, align=towers.aligned({"he": he, partner: dense}, looks))
