"""Similarity from spatial continuity: tiles close together in a slide are alike, tiles far apart in it are not.

One network, and a descriptor of length 1 on top of it, so that the order of distances is the order of cosines. Every
tile comes with one within data.near_um and one beyond data.far_um of the same slide; tiles between are used by neither,
and a tile without a near (far) one is left out of that pair. Both are of one slide, so stain says nothing about which.

loss        'margin': y d^2 + (1 - y) max(0, gap - d)^2, near and far pairs alike in number; 'triplet': plain distances
embed       'descriptor', what is trained and searched by, and 'he', the encoder's features, which are what every other
            method gives under that name: probes and slide-level heads read those.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mfl_jax import losses
from mfl_jax.data import Facts
from mfl_jax.methods import towers
from mfl_jax.methods.base import Batch, Method

LOSSES = ("margin", "triplet")
SEEN = ("he", "near_he", "far_he")


def make(reading: Any, facts: Facts, mesh: jax.sharding.Mesh) -> Method:
    options = reading.siamese
    kind, gap = options.loss, options.gap
    branch = towers.tower(reading.encoder, options.head, reading.dtype)
    views, look = towers.view_plan(reading, facts, "he"), towers.eval_view(reading, facts)
    _check(reading, kind, gap, len(dict(views.views)["he"]))

    def init(rng: jax.Array, batch: Batch):
        params, stats = branch.init(rng, jax.eval_shape(views, rng, batch)["he"][0])
        return {"he": params}, {"he": stats}

    def loss(params, extra, batch: Batch, rng: jax.Array, step: jax.Array):
        z, stats = [], extra["he"]
        for number, name in enumerate(SEEN):
            (x,) = views(jax.random.fold_in(rng, number), {"he": batch[name]})["he"]
            _, value, stats = branch(params["he"], stats, x, jax.random.fold_in(rng, 1000 + number))
            z.append(losses.normalise(value))
        tile, near, far = z
        close, wide = (towers.batch_mask(batch, name) for name in ("near", "far"))
        if kind == "triplet":
            value, metrics = losses.triplet(tile, near, far, gap=gap, mask=close & wide)
        else:
            ends, kept = jnp.concatenate([near, far]), jnp.concatenate([close, wide])
            of_near = jnp.arange(len(ends)) < len(near)
            value, metrics = losses.margin(jnp.concatenate([tile, tile]), ends, of_near, gap=gap, mask=kept)
        return value, ({"he": stats}, metrics | towers.diagnosed(tile, near))

    def update(params, extra, out, step):
        return out

    def embed(params, extra, batch: Batch):
        unused = jax.random.key(0)
        features, z, _ = branch(params["he"], extra["he"], look(batch["he"]), unused, train=False)
        return {"he": features, "descriptor": losses.normalise(z)}

    return Method(init, loss, update, embed)


def _check(reading: Any, kind: str, gap: float, count: int) -> None:
    near, far = reading.data.near_um, reading.data.far_um
    if kind not in LOSSES:
        raise ValueError(f"siamese.loss is {kind!r}; allowed: {', '.join(LOSSES)}")
    if not 0 < gap <= 2:
        raise ValueError(f"siamese.gap is {gap}; descriptors of length 1 are 0 to 2 apart, so it is above 0, at most 2")
    if not 0 < near <= far:
        raise ValueError(f"siamese needs 0 < data.near_um <= data.far_um, in micrometres, not {near} and {far}")
    if count != 1:
        raise ValueError(f"siamese takes one view of each tile of a pair; views.he gives {count}")
