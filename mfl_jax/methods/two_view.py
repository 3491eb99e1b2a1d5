"""Unpaired self-supervision on H&E: two views of a tile, or of a tile and one near it, should agree.

objective   info_nce (SimCLR), vicreg, barlow; or byol (a slow teacher) and simsiam (stopped gradients), with predictor
second      'same': the second view is of the same tile; 'near': of the near tile that data.near_um puts beside it
"""

from typing import Any

import jax
import jax.numpy as jnp

from mfl_jax import losses, models, optim
from mfl_jax.data import Facts
from mfl_jax.methods import towers
from mfl_jax.methods.base import Batch, Method

PREDICTED = ("byol", "simsiam")


def make(reading: Any, facts: Facts, mesh: jax.sharding.Mesh) -> Method:
    options = reading.two_view
    branch = towers.tower(reading.encoder, options.projector, reading.dtype)
    views, look = towers.view_plan(reading, facts, "he"), towers.eval_view(reading, facts)
    count = len(dict(views.views)["he"])
    if count != 2:
        raise ValueError(f"two_view takes two views of the H&E; views.he gives {count}: begin it with '2*'")
    second = towers.check_second(options.second, facts, "two_view.second")

    def see(rng: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        first, other = views(rng, batch)["he"]
        if second == "near":
            other = views(rng, {"he": batch["near_he"]})["he"][1]
        return first, other

    def embed(params, extra, batch: Batch):
        return {"he": branch.features(params["he"], extra["he"], look(batch["he"]))}

    parts = (options, branch, see, mesh)
    init, loss, update = _predicted(*parts) if options.objective in PREDICTED else _joint(*parts)
    return Method(init, loss, update, embed)


def _joint(options: Any, branch: towers.Tower, see: Any, mesh: jax.sharding.Mesh):
    """SimCLR, VICReg, Barlow Twins."""
    pair, scale = towers.pair_loss(options, mesh), towers.learnt_scale(options)

    def init(rng: jax.Array, batch: Batch):
        params, stats = branch.init(rng, jax.eval_shape(see, rng, batch)[0])
        return {"he": params} | scale, {"he": stats}

    def loss(params, extra, batch: Batch, rng: jax.Array, step: jax.Array):
        x, y = see(rng, batch)
        _, a, stats = branch(params["he"], extra["he"], x, jax.random.fold_in(rng, 1000))
        _, b, stats = branch(params["he"], stats, y, jax.random.fold_in(rng, 1001))
        mask, log_scale = towers.batch_mask(batch), params.get("log_scale")
        value, metrics = pair(a, b, mask=mask, slide=batch["slide"], log_scale=log_scale)
        return value, ({"he": stats}, metrics | towers.diagnosed(a, b))

    def update(params, extra, out, step):
        return out

    return init, loss, update


def _predicted(options: Any, branch: towers.Tower, see: Any, mesh: jax.sharding.Mesh):
    """BYOL and SimSiam: a predictor on one side, no gradient on the other."""
    predictor = models.make_head(options.predictor, branch.projector.dim)
    byol = options.objective == "byol"
    momentum = options.momentum if byol else 0.0

    def init(rng: jax.Array, batch: Batch):
        params, stats = branch.init(rng, jax.eval_shape(see, rng, batch)[0])
        z = jax.ShapeDtypeStruct((2, branch.projector.dim), jnp.float32)
        head, head_stats = predictor.init(jax.random.fold_in(rng, 2), z)
        extra = {"he": stats, "predictor": head_stats}
        if byol:
            extra["teacher"] = jax.tree.map(jnp.copy, {"params": params, "stats": stats})
        return {"he": params, "predictor": head}, extra

    def loss(params, extra, batch: Batch, rng: jax.Array, step: jax.Array):
        z, p, stats, head = [], [], extra["he"], extra["predictor"]
        teacher = extra.get("teacher")
        targets, slow = [], teacher["stats"] if byol else None
        for number, x in enumerate(see(rng, batch)):
            key = jax.random.fold_in(rng, 1000 + number)
            _, value, stats = branch(params["he"], stats, x, key)
            predicted, head = predictor.apply(params["predictor"], head, value, train=True, dtype=branch.dtype)
            z.append(value)
            p.append(predicted)
            if byol:
                _, target, slow = branch(teacher["params"], slow, x, key)
                targets.append(target)
        mask = towers.batch_mask(batch)
        compare = losses.byol if byol else losses.simsiam
        value, metrics = compare(*p, *(targets if byol else z), mask=mask)
        out = {"he": stats, "predictor": head}
        if byol:
            out["slow"] = slow
        return value, (out, metrics | towers.diagnosed(z[0], z[1]))

    def update(params, extra, out, step):
        new = {"he": out["he"], "predictor": out["predictor"]}
        if byol:
            averaged = optim.ema(extra["teacher"]["params"], params["he"], momentum)
            new["teacher"] = {"params": averaged, "stats": out["slow"]}
        return new

    return init, loss, update
