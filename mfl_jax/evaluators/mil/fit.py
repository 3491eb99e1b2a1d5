"""All fits of one head as one program: folds, seeds and settings are rows of a batch, each with its own early stopping.

Bags lie on the device end to end. A step of a fit takes `batch` of its bags and up to `tiles` tiles of each; validation
and test take whole bags, in buckets of similar length. A fit keeps the parameters of its best epoch inside the program,
and ends after `patience` epochs that were no better, or `epochs`.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from mfl_jax.evaluators.mil.survival import cox_loss
from mfl_jax.models.mil import MILHead, make_mil

SHORTEST = 64  # tiles: shorter bags share a bucket
TOGETHER_TILES = 16_384  # of whole bags that are looked at together
HELD_BYTES = 96 << 20  # of one step of the fits that run together, on a CPU; a sixth of the memory elsewhere


@dataclass(frozen=True)
class Settings:
    """Of training, the same for all fits of a head."""

    epochs: int = 40
    patience: int = 8
    batch: int = 16
    tiles: int = 1000
    scale: bool = True  # features to mean 0 and deviation 1 over the tiles that a fit is trained on

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "scale" and value < 1:
                raise ValueError(f"{name} is {value}; it is 1 or more")


@dataclass(frozen=True)
class Fit:
    """One row of the batch: who is trained on, who chooses the epoch, who is tested; and the settings that vary."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    seed: int
    lr: float = 1e-3
    decay: float = 0.0


@dataclass(frozen=True)
class Target:
    """kind: 'binary' (one logit), 'classes' (one each) or 'survival' (one risk)."""

    kind: str
    labels: np.ndarray  # int [S]
    outputs: int
    times: np.ndarray | None = None


@dataclass(frozen=True)
class Fitted:
    params: Any  # {'head', 'mean', 'inverse'}, leaves [J, ...]
    losses: np.ndarray  # [J] of the best epoch, on val; inf where no epoch was finite
    epochs: np.ndarray  # [J] the best one, from 1
    curves: np.ndarray  # [J, epochs] loss on val; nan after the end
    logits: list[np.ndarray]  # of each fit's test rows [len(test), outputs]


@dataclass(frozen=True)
class Packed:
    """Bags on the device, with as many empty rows at the end as the longest bag has."""

    features: jax.Array  # [T + longest, D]
    starts: jax.Array
    lengths: jax.Array
    buckets: tuple[int, ...]  # padded lengths
    of_slide: np.ndarray  # the bucket of each slide
    moments: tuple[np.ndarray, np.ndarray, np.ndarray]  # of each slide, float64: tiles, sums and squares about `centre`
    centre: np.ndarray


def pack(features: np.ndarray, offsets: np.ndarray) -> Packed:
    if offsets[-1] >= 1 << 30:
        raise ValueError(f"{offsets[-1]:,} tiles are more than one device takes; keep fewer of each slide")
    lengths = np.diff(offsets)
    power = np.ceil(np.log2(np.maximum(lengths, SHORTEST))).astype(int)
    kinds, of_slide = np.unique(power, return_inverse=True)
    buckets = tuple(int(-(-max(lengths[of_slide == k].max(), 8) // 8) * 8) for k in range(len(kinds)))
    padding = np.zeros((max(buckets), features.shape[1]), features.dtype)
    starts, counts = (jnp.asarray(np.asarray(x, np.int32)) for x in (offsets[:-1], lengths))
    centre = features[:: max(1, len(features) // 10_000)].mean(0, dtype=np.float64)
    sums = np.zeros((2, len(lengths), features.shape[1]))
    for i, (a, b) in enumerate(itertools.pairwise(offsets)):
        bag = features[a:b].astype(np.float64) - centre
        sums[:, i] = bag.sum(0), np.square(bag).sum(0)
    placed = jnp.asarray(np.concatenate([features, padding]))
    return Packed(placed, starts, counts, buckets, of_slide, (lengths, *sums), centre)


def scaling(packed: Packed, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and inverse deviation [D] over all tiles of these slides; what does not vary is left as wide as it is."""
    count, first, second = (m[train].sum(0) for m in packed.moments)
    mean = first / max(count, 1)
    std = np.sqrt(np.maximum(second / max(count, 1) - mean**2, 0))
    varies = std > 1e-6 * np.maximum(np.abs(mean + packed.centre), 1e-12)
    return mean + packed.centre, 1 / np.where(varies, std, 1.0)


def fit_all(
    spec: str,
    packed: Packed,
    target: Target,
    fits: Sequence[Fit],
    settings: Settings,
    *,
    together: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Fitted:
    """`together` fits run side by side (default: as many as memory allows); the figures do not depend on it."""
    head = make_mil(spec)
    rows = _rows(packed, target, fits, settings.scale)
    together = together or _fitting(packed, head, target, len(fits), settings)
    device = _device(packed, target)
    run = functools.partial(
        _run, spec=spec, kind=target.kind, outputs=target.outputs, settings=settings, buckets=packed.buckets
    )
    parts = []
    for start in range(0, len(fits), together):
        take = np.arange(start, start + together) % len(fits)  # the last turn is as full as the others
        parts.append(jax.device_get(run(device, jax.tree.map(lambda x, t=take: x[t], rows))))
        if progress:
            progress(min(start + together, len(fits)), len(fits))
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(fits)], *parts)
    logits = [_in_order(whole["test"], rows["test"], j, fit.test) for j, fit in enumerate(fits)]
    curves = np.where(np.arange(settings.epochs) < whole["ran"][:, None], whole["curve"], np.nan)
    return Fitted(whole["params"], whole["loss"], whole["epoch"], curves, logits)


def _device(packed: Packed, target: Target) -> dict[str, jax.Array]:
    times = np.zeros(len(target.labels)) if target.times is None else target.times
    rank = np.unique(times, return_inverse=True)[1]  # only the order counts, and float32 would merge close times
    known = {"labels": target.labels.astype(np.int32), "times": rank.astype(np.int32)}
    placed = {name: jnp.asarray(value) for name, value in known.items()}
    return placed | {"features": packed.features, "starts": packed.starts, "lengths": packed.lengths}


def _rows(packed: Packed, target: Target, fits: Sequence[Fit], scale: bool) -> dict[str, Any]:
    """Everything that differs between fits, padded to one shape: -1 is no slide."""
    weights = [class_weights(target, fit.train) for fit in fits]
    dim = packed.features.shape[1]
    scales = [scaling(packed, fit.train) if scale else (np.zeros(dim), np.ones(dim)) for fit in fits]
    return {
        "train": _padded([fit.train for fit in fits], 1),
        "val": _bucketed(packed, [fit.val for fit in fits]),
        "test": _bucketed(packed, [fit.test for fit in fits]),
        "weights": np.stack(weights).astype(np.float32),
        "mean": np.stack([mean for mean, _ in scales]).astype(np.float32),
        "inverse": np.stack([inverse for _, inverse in scales]).astype(np.float32),
        "lr": np.array([fit.lr for fit in fits], np.float32),
        "decay": np.array([fit.decay for fit in fits], np.float32),
        "seed": np.array([fit.seed for fit in fits], np.uint32),
    }


def class_weights(target: Target, train: np.ndarray) -> np.ndarray:
    """[classes] so that every class weighs the same among the bags trained on; 1 on average over them."""
    classes = max(target.outputs, 2)
    if target.kind == "survival":
        return np.ones(classes)
    counts = np.bincount(target.labels[train], minlength=classes)
    return len(train) / (np.maximum(counts, 1) * np.count_nonzero(counts))


def _padded(lists: Sequence[np.ndarray], multiple: int) -> np.ndarray:
    width = -(-max(map(len, lists)) // multiple) * multiple
    return np.stack([np.pad(rows, (0, width - len(rows)), constant_values=-1) for rows in lists]).astype(np.int32)


def _bucketed(packed: Packed, lists: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    return tuple(
        _padded([rows[packed.of_slide[rows] == k] for rows in lists], _side_by_side(length))
        for k, length in enumerate(packed.buckets)
    )


def _side_by_side(length: int) -> int:
    return max(1, min(16, TOGETHER_TILES // length))


def _in_order(logits: Sequence[np.ndarray], rows: Sequence[np.ndarray], fit: int, test: np.ndarray) -> np.ndarray:
    slides = np.concatenate([r[fit] for r in rows])
    values = np.concatenate([v[fit] for v in logits])[slides >= 0]
    order = np.argsort(slides[slides >= 0], kind="stable")
    found = slides[slides >= 0][order]
    return values[order][np.searchsorted(found, test)].astype(np.float64)


def _fitting(packed: Packed, head: MILHead, target: Target, fits: int, settings: Settings) -> int:
    dim = packed.features.shape[1]
    shapes = jax.eval_shape(lambda key: head.init(key, dim, target.outputs), jax.random.key(0))
    params = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    tiles = settings.batch * min(settings.tiles, max(packed.buckets))
    held = 4 * (tiles * (dim + head.held) + 5 * params)
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    return int(max(1, min(fits, max(HELD_BYTES, memory // 6) // held)))


def bag_loss(logits: jax.Array, labels: jax.Array, kind: str) -> jax.Array:
    """[B] log loss of [B, outputs]."""
    if kind == "binary":
        return jax.nn.softplus(logits[:, 0]) - labels * logits[:, 0]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]


def sample_rows(draw: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """From uniform numbers [count + 1]: rows [count] of a bag of `length` tiles, and which exist; none comes twice.

    All of them where there are no more than `count`. Else one of each of `count` equal stretches of the bag, turned by
    a random amount: each tile is as likely as any other, and tiles come from all over the slide.
    """
    count = len(draw) - 1
    i = jnp.arange(count + 1)
    ends = (length // count) * i + ((length % count) * i) // count  # length * i may pass 2^31
    start, width = ends[:-1], jnp.diff(ends)
    inside = jnp.minimum((draw[1:] * width).astype(jnp.int32), jnp.maximum(width - 1, 0))
    turned = start + inside + jnp.minimum((draw[0] * length).astype(jnp.int32), length - 1)
    i = i[:-1]
    rows = jnp.where(length > count, turned % jnp.maximum(length, 1), jnp.minimum(i, jnp.maximum(length - 1, 0)))
    return rows, i < length


@functools.partial(jax.jit, static_argnames=("spec", "kind", "outputs", "settings", "buckets"))
def _run(device, rows, *, spec: str, kind: str, outputs: int, settings: Settings, buckets: tuple[int, ...]):
    head = make_mil(spec)
    one = functools.partial(
        _one, device=device, head=head, kind=kind, outputs=outputs, settings=settings, buckets=buckets
    )
    return jax.vmap(one)(rows)


def _one(rows, *, device, head: MILHead, kind: str, outputs: int, settings: Settings, buckets: tuple[int, ...]):
    """One fit from its start to its test."""
    key = jax.random.key(rows["seed"])
    tx = optax.scale_by_adam()
    params = head.init(jax.random.fold_in(key, 0), device["features"].shape[1], outputs)
    steps = -(-rows["train"].shape[0] // settings.batch)
    count = min(settings.tiles, max(buckets))
    loss_of = functools.partial(_loss, device=device, rows=rows, head=head, kind=kind, count=count)

    def step(state, inputs):
        params, opt = state
        slides, key = inputs
        grads = jax.grad(loss_of)(params, slides, key)
        moves, new = tx.update(grads, opt)
        moved = jax.tree.map(lambda p, m: p - rows["lr"] * (m + rows["decay"] * p), params, moves)
        used = (slides >= 0).any()  # fits of fewer bags have empty steps at the end of an epoch
        return jax.tree.map(lambda a, b: jnp.where(used, a, b), (moved, new), (params, opt)), None

    def epoch(state):
        params, opt, best, best_loss, best_epoch, number, curve = state
        of_epoch = jax.random.fold_in(key, number + 1)
        slides = _shuffled(of_epoch, rows["train"], steps * settings.batch).reshape(steps, settings.batch)
        keys = jax.random.split(jax.random.fold_in(of_epoch, 1), steps)
        (params, opt), _ = lax.scan(step, (params, opt), (slides, keys))
        loss = _validation(params, device=device, rows=rows, head=head, kind=kind, buckets=buckets)
        better = loss < best_loss
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), params, best)
        best_loss, best_epoch = jnp.where(better, loss, best_loss), jnp.where(better, number + 1, best_epoch)
        return params, opt, best, best_loss, best_epoch, number + 1, curve.at[number].set(loss)

    def unfinished(state):
        *_, best_epoch, number, _ = state
        return (number < settings.epochs) & (number - best_epoch < settings.patience)

    start = (params, tx.init(params), params, jnp.inf, 0, 0, jnp.zeros(settings.epochs))
    _, _, best, loss, chosen, ran, curve = lax.while_loop(unfinished, epoch, start)
    test = whole_bags(best, device, rows, rows["test"], head, buckets)
    kept = {"head": best, "mean": rows["mean"], "inverse": rows["inverse"]}
    return {"params": kept, "loss": loss, "epoch": chosen, "ran": ran, "curve": curve, "test": test}


def _shuffled(key: jax.Array, slides: jax.Array, width: int) -> jax.Array:
    """Its slides in a random order, then -1 to fill the width."""
    draw = jnp.where(slides >= 0, jax.random.uniform(key, slides.shape), 2.0)
    mixed = slides[jnp.argsort(draw)]
    return jnp.pad(mixed, (0, width - len(mixed)), constant_values=-1)


def _loss(params, slides, key, *, device, rows, head: MILHead, kind: str, count: int):
    known, slides = slides >= 0, jnp.maximum(slides, 0)
    lengths = jnp.where(known, device["lengths"][slides], 0)
    at, mask = jax.vmap(sample_rows)(jax.random.uniform(key, (len(slides), count + 1)), lengths)
    keys = jax.random.split(jax.random.fold_in(key, 1), len(slides))  # of dropout
    bags = scaled(device["features"][device["starts"][slides][:, None] + at], rows)
    logits, _ = jax.vmap(lambda b, m, k: head.apply(params, b, m, k, True))(bags, mask, keys)
    labels = device["labels"][slides]
    if kind == "survival":
        return cox_loss(logits[:, 0], device["times"][slides], labels, known)
    total = head.bag_weight * bag_loss(logits, labels, kind)
    if head.instance:
        inner = jax.vmap(functools.partial(head.instance, params))(bags, mask, labels)
        total = total + (1 - head.bag_weight) * inner
    return jnp.where(known, total * rows["weights"][labels], 0.0).sum() / jnp.maximum(known.sum(), 1)


def _validation(params, *, device, rows, head: MILHead, kind: str, buckets: tuple[int, ...]):
    logits = jnp.concatenate(whole_bags(params, device, rows, rows["val"], head, buckets))
    slides = jnp.concatenate(rows["val"])
    known, slides = slides >= 0, jnp.maximum(slides, 0)
    labels = device["labels"][slides]
    if kind == "survival":
        return cox_loss(logits[:, 0], device["times"][slides], labels, known)
    weights = jnp.where(known, rows["weights"][labels], 0.0)
    each = jnp.where(known, bag_loss(logits, labels, kind), 0.0)
    return (weights * each).sum() / jnp.maximum(weights.sum(), 1e-30)


def scaled(bag: jax.Array, rows) -> jax.Array:
    return (bag.astype(jnp.float32) - rows["mean"]) * rows["inverse"]


def whole_bags(
    params, device, rows, slides: Sequence[jax.Array], head: MILHead, buckets: tuple[int, ...]
) -> list[jax.Array]:
    """Logits [len, outputs] of every bucket's slides (-1: an empty bag), all tiles of each."""

    def of(length: int, bag: jax.Array) -> jax.Array:
        known, at = bag >= 0, jnp.maximum(bag, 0)
        features = lax.dynamic_slice_in_dim(device["features"], device["starts"][at], length)
        mask = jnp.arange(length) < jnp.where(known, device["lengths"][at], 0)
        return head.apply(params, scaled(features, rows), mask, None, False)[0]

    found = []
    for length, bags in zip(buckets, slides, strict=True):
        if not len(bags):
            found.append(jnp.zeros((0, jax.eval_shape(lambda b, n=length: of(n, b), jnp.int32(0)).shape[0])))
            continue
        groups = bags.reshape(-1, _side_by_side(length))
        logits = lax.map(lambda group, n=length: jax.vmap(functools.partial(of, n))(group), groups)
        found.append(logits.reshape(len(bags), -1))
    return found


@functools.partial(jax.jit, static_argnames=("spec",))
def _attention(params, bag, mask, *, spec: str):
    head = make_mil(spec)
    return jax.vmap(lambda p: head.apply(p["head"], scaled(bag, p), mask, None, False)[1])(params)


def tile_scores(spec: str, params: Any, bag: np.ndarray) -> np.ndarray:
    """[N] what the tiles of one bag add, the mean over the fits in `params` (leaves [J, ...])."""
    length = max(SHORTEST, 1 << int(np.ceil(np.log2(max(len(bag), 1)))))
    padded = np.zeros((length, bag.shape[1]), np.float32)
    padded[: len(bag)] = bag
    scores = _attention(params, padded, np.arange(length) < len(bag), spec=spec)
    return np.asarray(scores, np.float64).mean(0)[: len(bag)]
