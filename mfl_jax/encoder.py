"""An encoder ready to use, from a run or from a folder of weights: tiles of H&E in, or regions of tile features, and
features out; and `mfl export`."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from input_pipeline.files import only_one
from mfl_jax import data, models, sharding, views
from mfl_jax.config import to_json
from mfl_jax.interop import weights
from mfl_jax.methods.towers import compute_dtype
from mfl_jax.trained import Trained, open_run
from mfl_jax.views.colour import IMAGENET_MEAN, IMAGENET_STD

RESIZING = {"bicubic": "cubic", "bilinear": "linear"}
TOLERANCE = 1e-3  # of exported features, against those of the run


@dataclass(frozen=True)
class Encoder:
    """apply(params, uint8 [B, H, W, 3], mask [B]) -> float32 [B, dim]; pure. `params` lie whole on every device. An
    encoder of kind 'grid' takes float16 [B, H, W, channels] in place of pictures."""

    name: str
    apply: Callable[[Any, jax.Array, jax.Array], jax.Array]
    params: Any
    dim: int
    size: int  # px of a tile
    exact: bool  # False: tiles of another size are resized to what the network takes
    mpp: float | None  # um per px of a tile; None where the weights do not say
    digest: str  # SHA-256: another one gives other features
    cases: tuple[str, ...] | None = None  # that it was trained on; None where nothing says
    kind: str = "image"
    channels: int = 3

    def check_tiles(
        self, size: int, mpp: float, *, asked: float | None = None, kind: str = "image", channels: int = 3
    ) -> None:
        """Tiles of another size or scale than the encoder was trained on are refused, unless `asked` is that scale."""
        if (kind, channels) != (self.kind, self.channels):
            has, wants = data.in_words(kind, size, channels), data.in_words(self.kind, self.size, self.channels)
            raise ValueError(f"there are {has}; {self.name} takes {wants}")
        if self.exact and size != self.size:
            raise ValueError(f"the tiles are of {size} px; {self.name} takes {self.size} px: tile again with that size")
        if asked is not None and abs(asked / mpp - 1) > 0.01:
            raise ValueError(f"--mpp is {asked:g}, and the tiles are of {mpp:g} um per px: tile again, or leave it out")
        if asked is None and self.mpp is not None and abs(mpp / self.mpp - 1) > 0.01:
            raise ValueError(
                f"the tiles are of {mpp:g} um per px; {self.name} was trained on {self.mpp:g}: tile again with that, "
                f"or say --mpp {mpp:g} if it is meant so"
            )


def of_run(workdir: str | Path, mesh: Mesh | None = None) -> Encoder:
    """What `Method.embed` calls 'he', of the newest checkpoint that verifies."""
    return of_trained(open_run(workdir, mesh))


def of_trained(run: Trained) -> Encoder:

    def apply(params: Any, images: jax.Array, mask: jax.Array) -> jax.Array:
        return run.method.embed(params[0], params[1], {"he": images, "mask": mask})["he"]

    params, size, of = (run.params, run.extra), run.facts.size, run.facts.modalities["he"]
    try:
        dim = _width(apply, params, *run.facts.shapes["he"])
    except KeyError as error:
        raise ValueError(f"{run.path}: its features are not of H&E alone: without {error} there are none") from error
    deciding = ("method", run.config.method, "encoder", "views", "dtype")
    said = ConfigDict({name: run.config[name] for name in deciding if name in run.config} | {"digest": run.digest})
    digest = hashlib.sha256(to_json(said).encode()).hexdigest()
    known = (run.facts.train_cases, of.kind, of.channels)
    return Encoder(run.name, apply, params, dim, size, True, run.facts.mpp, digest, *known)


def of_weights(folder: str | Path, mesh: Mesh | None = None) -> Encoder:
    """Weights that `mfl export` or timm wrote. Ours say which view they take; for those of timm, tiles are resized
    (bicubic with antialiasing, as Pillow does) and normalised as the config says."""
    found, folder = weights.load(folder), Path(folder)
    model = models.make(found.spec)
    try:
        grid = weights.is_grid(found.spec)
        look, size, exact, mpp, dtype = _input_of_grid(found) if grid else _input(found.config)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise weights.WeightsError(f"{folder / weights.CONFIG} does not say what the network takes: {error}") from error

    def apply(params: Any, images: jax.Array, mask: jax.Array) -> jax.Array:
        return model.apply(*params, look(images), train=False, dtype=dtype)[0]

    whole = NamedSharding(sharding.make_mesh() if mesh is None else mesh, PartitionSpec())
    params = jax.device_put((found.params, found.stats), whole)
    name = (found.config.get("mfl") or {}).get("run") or found.config["architecture"]
    cases = (found.config.get("mfl") or {}).get("train_cases")
    cases = None if cases is None else tuple(map(str, cases))
    kind, channels = ("grid", 1 + found.params["phi"]["kernel"].shape[0]) if grid else ("image", 3)
    dim = _width(apply, params, (size, size, channels), "float16" if grid else "uint8")
    return Encoder(str(name), apply, params, dim, size, exact, mpp, found.digest, cases, kind, channels)


def _input_of_grid(found: weights.Weights) -> tuple[Callable[[jax.Array], jax.Array], int, bool, float | None, Any]:
    """As _input; those of HIPT take whole regions of any size."""
    if ours := found.config.get("mfl"):
        view = views.parse(ours["view"], kind="grid", channels=1 + found.params["phi"]["kernel"].shape[0])
        size, mpp = int(ours["size"]), float(ours["mpp"])
        return lambda grids: view(jax.random.key(0), grids), size, True, mpp, compute_dtype(ours["dtype"])
    side = math.isqrt(found.params["pos_embed"].shape[1] - 1)
    return lambda grids: grids.astype(jnp.float32), side, False, None, jnp.float32


def _input(config: dict[str, Any]) -> tuple[Callable[[jax.Array], jax.Array], int, bool, float | None, Any]:
    """(images -> what the network sees, px of a tile, must tiles be of that size, um per px, dtype)."""
    if ours := config.get("mfl"):
        size, mpp = int(ours["size"]), float(ours["mpp"])
        view = views.parse(ours["view"])
        return lambda images: view(jax.random.key(0), images), size, True, mpp, compute_dtype(ours["dtype"])
    seen = config.get("pretrained_cfg") or config
    side = int(seen.get("input_size", (3, 224, 224))[-1])
    kernel = seen.get("interpolation", "bicubic")
    if kernel not in RESIZING or not 8 <= side <= 4096:
        raise ValueError(f"interpolation {kernel!r} ({' or '.join(RESIZING)}), input_size {side} (8 to 4096)")
    mean, std = (np.asarray(seen.get(k, d), np.float32) for k, d in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
    if mean.shape != (3,) or std.shape != (3,) or not (std > 0).all():
        raise ValueError(f"mean {mean.tolist()} and std {std.tolist()}, three numbers each")

    def look(images: jax.Array) -> jax.Array:
        return (resize(images.astype(jnp.float32) / 255, side, RESIZING[kernel]) - mean) / std

    return look, side, False, None, jnp.float32


def resize(images: jax.Array, side: int, kernel: str) -> jax.Array:
    """[B, H, W, C] in [0, 1] -> [B, side, side, C]; what a cubic kernel overshoots is cut."""
    if images.shape[1:3] == (side, side):
        return images
    shape = (len(images), side, side, images.shape[-1])
    return jnp.clip(jax.image.resize(images, shape, kernel, precision=jax.lax.Precision.HIGHEST), 0.0, 1.0)


def _width(apply: Callable[..., jax.Array], params: Any, shape: tuple[int, ...], dtype: str) -> int:
    rows = jax.ShapeDtypeStruct((2, *shape), jnp.dtype(dtype)), jax.ShapeDtypeStruct((2,), jnp.bool_)
    return int(jax.eval_shape(apply, params, *rows).shape[-1])


def export(workdir: str | Path, out: str | Path) -> dict[str, Any]:
    """The H&E encoder of a run as a folder that timm, or of_weights, reads; -> a few words about it.

    Its features must be those of the run: ValueError, and no file, for a method whose 'he' is more than an encoder.
    """
    run, out = open_run(workdir), Path(out)
    params, stats = part_of(run)
    view = view_of(run)
    _check_export(run, params, stats, view)
    statistics = next((c.args for c in view.calls if c.name == "normalise"), {"mean": (0.0,), "std": (1.0,)})
    mean, std = (np.broadcast_to(statistics[name], (3,)) for name in ("mean", "std"))
    ours = {"view": str(view), "size": run.facts.size, "mpp": run.facts.mpp, "dtype": run.config.dtype}
    ours |= {"run": run.name, "step": run.step, "checkpoint": run.digest, "train_cases": list(run.facts.train_cases)}
    side = view.size or run.facts.size
    with only_one(out):
        on_host = jax.device_get((params, stats))
        weights.save(out, run.config.encoder, *on_host, side=side, mean=mean, std=std, ours=ours)
    name = weights.architecture(run.config.encoder, side)["architecture"]
    return {"architecture": name, "features": models.make(run.config.encoder).dim, "step": run.step}


def view_of(run: Trained) -> views.View:
    """What the H&E encoder sees of a tile in evaluation."""
    modality = run.facts.modalities["he"]
    size, channels = run.config.views.size, modality.channels
    return views.parse(run.config.views.eval, size=size, kind=modality.kind, channels=channels)


def part_of(run: Trained) -> tuple[Any, Any]:
    """(params, statistics) of the H&E encoder alone: the teacher's, where that is what evaluators see of a DINO."""
    found: tuple[Any, Any] = (run.params.get("he"), run.extra.get("he"))
    if "dino" in run.config and run.config.dino.embed == "teacher":
        found = (run.extra["teacher"]["params"], run.extra["teacher"]["stats"])
    if None in found:
        raise ValueError(f"{run.path}: the method {run.config.method!r} keeps no H&E encoder under 'he'")
    params, stats = (part.get("encoder", part) for part in found)
    return params, stats


def _check_export(run: Trained, params: Any, stats: Any, view: views.View) -> None:
    shape, dtype = run.facts.shapes["he"]
    draw = np.random.default_rng(0)
    he = jnp.asarray(draw.integers(0, 2 if dtype == "float16" else 256, (2, *shape)).astype(dtype))
    made = of_trained(run)
    expected = np.asarray(jax.jit(made.apply)(made.params, he, jnp.ones(2, bool)))
    model, dtype = models.make(run.config.encoder), compute_dtype(run.config.dtype)

    def alone(params: Any, stats: Any, he: jax.Array) -> jax.Array:
        return model.apply(params, stats, view(jax.random.key(0), he), train=False, dtype=dtype)[0]

    found = np.asarray(jax.jit(alone)(params, stats, he))
    scale = max(float(np.abs(expected).max()), 1e-6)
    if found.shape != expected.shape or not np.abs(found - expected).max() <= TOLERANCE * scale:
        raise ValueError(f"{run.path}: what {run.config.method!r} embeds is more than its encoder: it is not exported")
