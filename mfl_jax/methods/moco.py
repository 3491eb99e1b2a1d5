"""MoCo v2: a query agrees with the key of the same tile, against a queue of keys of earlier batches.

Keys come from a slow copy of the query's network, which gets no gradient. The network, the queue with the slide of
every row, and the place where the next keys go are all in `extra`.

second      'same': the key is another view of the tile; 'near': of the near tile that data.near_um puts beside it
symmetric   both views are query and key in turn: the mean of two losses, and both keys enter the queue
negatives   the queue; with batch_negatives the other keys of the batch too. Rows of the queue are older than a key, and
            were normalised with other batches: of the queue alone a key is told by that, whatever the tile shows. A
            slow key network and a small learning rate hide it; short trainings have neither. The noise that a queue
            begins with, which drives all queries together, is then no negative.
BatchNorm   over the global batch, query and key of a batch share its statistics, by which a key can be told from the
            queue. With bn_groups in the encoder's spec the keys' rows are normalised in groups of another, random
            order: this is what "shuffling BN" does, with a group where MoCo has a device.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mfl_jax import losses, models, optim
from mfl_jax.data import Facts
from mfl_jax.methods import towers
from mfl_jax.methods.base import Batch, Method, Metrics, mean_of_slices

NO_SLIDE = -1  # of the noise that a queue begins with: a negative for everyone, or with batch_negatives for none


def make(reading: Any, facts: Facts, mesh: jax.sharding.Mesh) -> Method:
    options = reading.moco
    branch = towers.tower(reading.encoder, options.projector, reading.dtype)
    look, see = towers.eval_view(reading, facts), _views(reading, facts)
    ways = 2 if options.symmetric else 1
    temperature, apart, size = options.temperature, options.mask_same_slide, options.queue
    beside = options.batch_negatives
    decay = _checked(size, reading.data.batch * ways, options.momentum)
    shuffled = models.parse(reading.encoder)[1].get("bn_groups", 1) > 1

    def key_of(params, stats, x, rng):
        if not shuffled:
            _, z, stats = branch(params, stats, x, rng)
            return z, stats
        order = jax.random.permutation(jax.random.fold_in(rng, 1), len(x))
        _, z, stats = branch(params, stats, x[order], rng)
        return z[jnp.argsort(order)], stats

    def init(rng: jax.Array, batch: Batch):
        params, stats = branch.init(rng, jax.eval_shape(see, rng, batch)[0])
        noise = jax.random.normal(jax.random.fold_in(rng, 2), (size, branch.projector.dim))
        extra = {"he": stats, "key": jax.tree.map(jnp.copy, {"params": params, "stats": stats})}
        extra |= {"queue": losses.normalise(noise), "queue_slide": jnp.full(size, NO_SLIDE, jnp.int32)}
        return {"he": params}, extra | {"pointer": jnp.zeros((), jnp.int32)}

    def loss(params, extra, batch: Batch, rng: jax.Array, step: jax.Array):
        first, second = see(rng, batch)
        mask, slide = towers.batch_mask(batch), batch["slide"]
        rows = {"mask": mask, "group": slide if apart else None, "queue_group": extra["queue_slide"]}
        rows["queue_mask"] = extra["queue_slide"] != NO_SLIDE if beside else None
        stats, slow = extra["he"], extra["key"]["stats"]
        found: list[tuple[jax.Array, Metrics]] = []
        queries, keys = [], []
        for number, (x, y) in enumerate(((first, second), (second, first))[:ways]):
            key, other = (jax.random.fold_in(rng, start + number) for start in (1000, 2000))
            _, q, stats = branch(params["he"], stats, x, key)
            k, slow = key_of(extra["key"]["params"], slow, y, other)
            found.append(
                losses.queue_nce(q, k, extra["queue"], temperature=temperature, batch_negatives=beside, **rows)
            )
            queries.append(q)
            keys.append(losses.normalise(k))
        value, metrics = jax.tree.map(lambda *each: sum(each) / ways, *found)
        out = {"he": stats, "slow": slow, "keys": jnp.stack(keys, 1), "slide": slide, "mask": mask}
        return value, (out, metrics | towers.diagnosed(queries[0], keys[0]))

    def update(params, extra, out, step):
        slow = {"params": optim.ema(extra["key"]["params"], params["he"], decay), "stats": out["slow"]}
        return {"he": out["he"], "key": slow} | _enqueued(extra, out["keys"], out["slide"], out["mask"])

    def embed(params, extra, batch: Batch):
        return {"he": branch.features(params["he"], extra["he"], look(batch["he"]))}

    return Method(init, loss, update, embed, merge=_merge)


def _views(reading: Any, facts: Facts):
    views = towers.view_plan(reading, facts, "he")
    if (count := len(dict(views.views)["he"])) != 1:
        raise ValueError(f"moco draws its one view twice, for the query and the key; views.he gives {count}")
    second = "near_he" if towers.check_second(reading.moco.second, facts, "moco.second") == "near" else "he"

    def see(rng: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        first, other = (jax.random.fold_in(rng, number) for number in range(2))
        return views(first, batch)["he"][0], views(other, {"he": batch[second]})["he"][0]

    return see


def _checked(size: int, fresh: int, momentum: float) -> float:
    if size < 1 or size % fresh:
        near = max(fresh, size - size % fresh)
        raise ValueError(
            f"moco.queue is {size}, which is not a multiple of the {fresh} keys of a step (data.batch, twice that when "
            f"symmetric); {near} is"
        )
    if not 0 <= momentum < 1:
        raise ValueError(f"moco.momentum is {momentum}; it is 0 or more and below 1, such as 0.999")
    return momentum


def _enqueued(extra: Any, keys: jax.Array, slide: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """The queue with the keys [B, ways, D] of a step in place of the oldest; a row left out keeps what was there."""
    ways = keys.shape[1]
    keys, slide, mask = keys.reshape(-1, keys.shape[-1]), jnp.repeat(slide, ways), jnp.repeat(mask, ways)
    at, size = extra["pointer"], len(extra["queue"])
    rows = jnp.where(mask[:, None], keys, lax.dynamic_slice_in_dim(extra["queue"], at, len(keys)))
    slides = jnp.where(mask, slide, lax.dynamic_slice_in_dim(extra["queue_slide"], at, len(keys)))
    return {
        "queue": lax.dynamic_update_slice_in_dim(extra["queue"], rows, at, 0),
        "queue_slide": lax.dynamic_update_slice_in_dim(extra["queue_slide"], slides, at, 0),
        "pointer": (at + len(keys)) % size,
    }


def _merge(outs: Any) -> Any:
    """Means of statistics; keys, slides and masks one after another, in the order of the whole batch's rows."""
    rows = {name: outs[name] for name in ("keys", "slide", "mask")}
    joined = {name: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]) for name, x in rows.items()}
    return mean_of_slices({name: outs[name] for name in ("he", "slow")}) | joined
