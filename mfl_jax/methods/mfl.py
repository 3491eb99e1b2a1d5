"""More From Less: an H&E encoder learns from denser partners of the same tissue, which inference does without.

One encoder and one projector a modality, nothing shared; the H&E is paired with each partner. Where a partner is absent
its row is left out of that pair alone.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mfl_jax.data import Facts
from mfl_jax.methods import towers
from mfl_jax.methods.base import Batch, Method, Metrics


def make(reading: Any, facts: Facts, mesh: jax.sharding.Mesh) -> Method:
    options = reading.mfl
    partners = towers.check_partners(tuple(options.partners), facts, "mfl.partners")
    names = ("he", *partners)
    encoders = {"he": reading.encoder} | {p: getattr(options.encoders, p) for p in partners}
    branches = {name: towers.tower(encoders[name], options.projector, reading.dtype) for name in names}
    views, looks = towers.view_plan(reading, facts, *names), towers.eval_views(reading, facts, names)
    pair, scale = towers.pair_loss(options, mesh), towers.learnt_scale(options)

    def init(rng: jax.Array, batch: Batch):
        params, stats = {}, {}
        seen = jax.eval_shape(views, rng, batch)
        for number, name in enumerate(names):
            params[name], stats[name] = branches[name].init(jax.random.fold_in(rng, number), seen[name][0])
        return params | scale, stats

    def loss(params, extra, batch: Batch, rng: jax.Array, step: jax.Array):
        seen = views(rng, batch)
        z, out, total = {}, {}, jnp.float32(0)
        metrics: Metrics = {}
        for number, name in enumerate(names):
            key = jax.random.fold_in(rng, 1000 + number)
            _, z[name], out[name] = branches[name](params[name], extra[name], seen[name][0], key)
        for name in partners:
            mask = towers.batch_mask(batch, name)
            log_scale = params.get("log_scale")
            value, found = pair(z["he"], z[name], mask=mask, slide=batch["slide"], log_scale=log_scale)
            total = total + value / len(partners)
            metrics |= towers.named_metrics(f"he-{name}", {"loss": value} | found)
        return total, (out, metrics | towers.diagnosed(z["he"], z[partners[0]]))

    def update(params, extra, out, step):
        return out

    def embed(params, extra, batch: Batch):
        return {"he": branches["he"].features(params["he"], extra["he"], looks["he"](batch["he"]))}

    return Method(init, loss, update, embed, align=towers.aligned(branches, looks))
