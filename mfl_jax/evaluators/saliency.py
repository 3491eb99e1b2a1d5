"""What does the encoder look at? Maps of it, and how well they find what a partner shows to be there."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from mfl_jax import sharding
from mfl_jax.evaluators.embed import Embed
from mfl_jax.evaluators.results import floats, mean_score, value_metrics
from mfl_jax.statistics import Interval

Score = Callable[[jax.Array], jax.Array]  # images or maps [B, ...] -> [B]
METHODS = ("integrated", "occlusion")


def integrated_gradients(score: Score, images: jax.Array, baseline: jax.Array | float, *, steps: int = 32) -> jax.Array:
    """[B, H, W], summed over channels; over a tile it sums to score(images) - score(baseline)."""
    images = images.astype(jnp.float32)
    start = jnp.broadcast_to(jnp.asarray(baseline, jnp.float32), images.shape)
    gradient = jax.grad(lambda x: score(x).sum())

    def add(total, number):
        return total + gradient(start + (number + 0.5) / steps * (images - start)), None

    total, _ = lax.scan(add, jnp.zeros_like(images), jnp.arange(steps))
    return ((images - start) * total / steps).sum(-1)


def grad_cam(score: Score, maps: jax.Array, *, positive: bool = True) -> jax.Array:
    """[B, h, w]: maps [B, h, w, D] weighted by the mean gradient of score(maps), as a head on top of maps gives it.

    A head on a CLS token has no gradient to the maps of the last layer; use integrated gradients or occlusion there.
    """
    maps = maps.astype(jnp.float32)
    weights = jax.grad(lambda m: score(m).sum())(maps).mean((1, 2), keepdims=True)
    cam = (weights * maps).sum(-1)
    return jax.nn.relu(cam) if positive else cam


def pooled(direction: jax.Array) -> Score:
    """A linear probe on the mean over the maps, for grad_cam: ResNets, the compact convnet, ViT pool=mean."""
    return lambda maps: maps.mean((1, 2)) @ jnp.asarray(direction, jnp.float32)


def occlusion(score: Score, images: jax.Array, *, patch: int, stride: int, fill: float) -> jax.Array:
    """[B, H, W]: the mean fall of the score over the squares that hide a pixel. Any model, no gradient."""
    _, height, width, _ = images.shape
    if not 0 < stride <= patch <= min(height, width):
        raise ValueError(f"0 < stride <= patch <= {min(height, width)}, not stride {stride} and patch {patch}")
    ys, xs = (np.unique(np.append(np.arange(0, n - patch, stride), n - patch)) for n in (height, width))
    places = jnp.asarray(np.stack(np.meshgrid(ys, xs, indexing="ij"), -1).reshape(-1, 2))
    whole = score(images)
    y, x = jnp.arange(height)[:, None], jnp.arange(width)

    def add(carry, place):
        fall, count = carry
        hidden = (y >= place[0]) & (y < place[0] + patch) & (x >= place[1]) & (x < place[1] + patch)
        lost = whole - score(jnp.where(hidden[..., None], jnp.asarray(fill, images.dtype), images))
        return (fall + lost[:, None, None] * hidden, count + hidden), None

    start = jnp.zeros(images.shape[:3], jnp.float32), jnp.zeros((height, width), jnp.float32)
    (fall, count), _ = lax.scan(add, start, places)
    return fall / count


def maps_of(
    embed: Embed,
    params: Any,
    extra: Any,
    he: np.ndarray,
    direction: np.ndarray,
    *,
    feature: str = "he",
    method: str = "integrated",
    batch: int = 16,
    steps: int = 32,
    patch: int = 0,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """float32 [N, H, W] of any method: what in the tiles (uint8) raises features @ direction, e.g. Result.direction.
    Tiles are spread over `mesh`, that which the parameters lie on.

    The baseline, and what hides a patch, is white: glass without tissue. patch 0 is a quarter of the side.
    """
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
    patch = patch or max(2, he.shape[1] // 4)
    run = functools.partial(_maps, embed, feature, method, steps, patch)
    jitted = jax.jit(run)
    batch, found = batch if mesh is None else sharding.rows_for(batch, mesh), []
    for start in range(0, len(he), batch):
        part = he[start : start + batch]
        padded = np.concatenate([part, np.repeat(part[-1:], batch - len(part), 0)])
        images = padded.astype(np.float32) / 255  # views take fractions of white as they take bytes
        placed = images if mesh is None else sharding.put({"he": images}, mesh)["he"]
        found.append(np.asarray(jitted(params, extra, placed, np.float32(direction)))[: len(part)])
    return np.concatenate(found)


def _maps(embed, feature: str, method: str, steps: int, patch: int, params, extra, images, direction):
    mask = jnp.ones(len(images), bool)

    def score(x):
        return embed(params, extra, {"he": x, "mask": mask})[feature] @ direction

    if method == "integrated":
        return integrated_gradients(score, images, 1.0, steps=steps)
    return occlusion(score, images, patch=patch, stride=max(1, patch // 2), fill=1.0)


def marker_masks(images: np.ndarray, *, sigma: float = 2.0, threshold: float | None = None) -> tuple[np.ndarray, float]:
    """bool [N, H, W] where one channel of a partner, smoothed, is above a threshold: Otsu's over all tiles."""
    from skimage.filters import gaussian, threshold_otsu

    smooth = np.stack([gaussian(np.asarray(image, np.float32), sigma, preserve_range=True) for image in images])
    if threshold is None:
        if np.ptp(smooth) == 0:
            raise ValueError("the marker is the same everywhere: there is nothing to point at")
        threshold = float(threshold_otsu(smooth))
    return smooth > threshold, threshold


def resize(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, [N, h, w] -> [N, height, width]."""
    return np.asarray(jax.image.resize(jnp.asarray(maps, jnp.float32), (len(maps), height, width), "bilinear"))


@dataclass(frozen=True)
class SaliencyScore:
    metrics: dict[str, Interval]  # auc: pixels inside above those outside; pointing: the greatest pixel lies inside
    chance: Mapping[str, float]
    each: dict[str, np.ndarray]  # [tiles used]
    used: np.ndarray  # rows of the tiles that have both inside and outside
    notes: tuple[str, ...]

    def floats(self, prefix: str) -> dict[str, float]:
        return floats(self.metrics, prefix) | {f"{prefix}/{name}_chance": value for name, value in self.chance.items()}


def score_maps(
    saliency: np.ndarray,
    masks: np.ndarray,
    cases: np.ndarray,
    *,
    least: float = 0.01,
    most: float = 0.9,
    seed: int = 0,
    resamples: int = 1000,
) -> SaliencyScore:
    """Mean over tiles whose mask covers `least` to `most` of them, with intervals over cases."""
    if saliency.shape != masks.shape or saliency.ndim != 3:
        raise ValueError(f"saliency and masks are [N, H, W] alike, not {list(saliency.shape)} and {list(masks.shape)}")
    share = masks.mean((1, 2))
    used = np.flatnonzero((share >= least) & (share <= most) & (share > 0) & (share < 1))
    if not len(used):
        raise ValueError(f"no tile has {least:.0%} to {most:.0%} of its pixels inside the mask: nothing to score")
    each = {"auc": np.array([_auc(saliency[i].ravel(), masks[i].ravel()) for i in used])}
    greatest = [saliency[i] == saliency[i].max() for i in used]
    each["pointing"] = np.array([masks[i][top].mean() for i, top in zip(used, greatest, strict=True)])
    out = len(masks) - len(used)
    notes = [f"{out} of {len(masks)} tiles have too little or too much inside"] if out else []
    found: dict[str, Interval] = {}
    for name, values in each.items():
        options: dict[str, Any] = {"seed": seed, "resamples": resamples}
        part, more = value_metrics(values, values, cases[used], {name: mean_score}, **options)
        found |= part
        notes += more
    chance = {"auc": 0.5, "pointing": float(share[used].mean())}
    return SaliencyScore(found, chance, each, used, tuple(notes))


def _auc(values: np.ndarray, inside: np.ndarray) -> float:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[which]
    n = int(inside.sum())
    return float((rank[inside].sum() - n * (n + 1) / 2) / (n * (len(inside) - n)))
