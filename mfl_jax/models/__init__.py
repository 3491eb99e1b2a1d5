"""Networks as two pure functions. The only place that knows Flax.

    model = make("resnet50,width=1")
    params, stats = model.init(key, images)
    features, stats = model.apply(params, stats, images, train=True, rng=key, dtype=jnp.bfloat16)

A spec is a name, then settings: 'vit_s16,registers=4,drop_path=0.1', 'projector,widths=8192-8192,bn'.
"""

import difflib
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mfl_jax.models import attention, grid_vit, resnet, vit
from mfl_jax.models.compact import Compact
from mfl_jax.models.heads import DinoHead, Directions, Layers, PaperHead
from mfl_jax.trees import overview

__all__ = ["Model", "describe", "make", "make_head"]


@dataclass(frozen=True)
class Model:
    """init(rng, x) -> (params, stats), where only the shape of x matters; params are float32, stats those of BatchNorm.

    apply(params, stats, x, *, train, rng=None, dtype=float32, maps=False) -> (features [B, dim] float32, new stats), or
    with maps=True -> (features, maps [B, h, w, channels]). rng is needed while training with dropout or drop path only.
    attention(params, x, *, dtype=float32) -> [B, heads, h, w], of the CLS token in the last block, of a cell without a
    tile 0; None of what is no transformer.
    """

    init: Callable[..., tuple[Any, Any]]
    apply: Callable[..., tuple[Any, Any]]
    dim: int
    name: str
    attention: Callable[..., jax.Array] | None = None


def make(spec: str, **overrides: Any) -> Model:
    """An encoder: resnet18|26|50, vit_{ti,s,b}{8,14,16}, grid_vit, compact, mlp; `overrides` win over the spec."""
    name, settings = parse(spec)
    builder = choose(name, ENCODERS, "encoder")
    return builder(name, **check(builder, settings | overrides, spec))


def make_head(spec: str, in_dim: int) -> Model:
    """A network over vectors of length in_dim: projector, predictor (hidden layer, back to in_dim), linear,
    classifier (the paper's BN - 256 - BN), dino (GELU between), directions (cosines with `out` of them)."""
    name, settings = parse(spec)
    builder = choose(name, HEADS, "head")
    return builder(name, in_dim=in_dim, **check(builder, settings, spec))


def describe(model: Model, params: Any) -> str:
    """The parameter overview that is printed at the start of a run."""
    return overview(params, title=f"{model.name} -> {model.dim}")


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """'name,key=value,flag' -> name, settings; 512-512 is a tuple of integers and a bare flag is True."""
    name, *parts = (part.strip() for part in spec.split(","))
    settings: dict[str, Any] = {}
    for part in parts:
        key, equals, text = part.partition("=")
        if not re.fullmatch(r"[a-z]\w*", key) or key in settings or (equals and not text):
            raise ValueError(f"{spec!r}: {part!r} is no setting (each once); write name,key=value,flag")
        settings[key] = literal(text) if equals else True
    return name, settings


def literal(text: str) -> Any:
    if text in ("true", "True", "false", "False"):
        return text in ("true", "True")
    if re.fullmatch(r"\d+(-\d+)+", text):
        return tuple(map(int, text.split("-")))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def choose(name: str, table: dict[str, Any], what: str) -> Callable[..., Model]:
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no {what} is called {name!r}; there are {', '.join(table)}{hint}")
    return table[name]


def check(builder: Callable[..., Model], settings: dict[str, Any], spec: str) -> dict[str, Any]:
    """Settings of the builder's types; the type of a setting is that of its default."""
    known = {
        k: p for k, p in inspect.signature(builder).parameters.items() if p.kind is p.KEYWORD_ONLY and k != "in_dim"
    }
    result = {}
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{spec!r} has no setting {key!r}; it has {', '.join(known) or 'none'}{hint}")
        wanted = type(known[key].default)
        if wanted is tuple and isinstance(value, int | list) and not isinstance(value, bool):
            value = (value,) if isinstance(value, int) else tuple(value)
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not wanted:
            raise ValueError(
                f"{spec!r}: {key} is of type {wanted.__name__}, as in {known[key].default!r}, not {value!r}"
            )
        usual, numbers = ((n if wanted is tuple else (n,)) for n in (known[key].default, value))
        counted = wanted not in (str, bool)
        if not numbers or (counted and not all(math.isfinite(n) and (n > 0 or n == 0 >= usual[0]) for n in numbers)):
            raise ValueError(f"{spec!r}: {key} is out of range: {value!r}; its default is {known[key].default!r}")
        result[key] = value
    return result


def from_module(module: Any, dim: int, name: str) -> Model:
    def init(rng: jax.Array, x: Any) -> tuple[Any, Any]:
        shape = x.shape
        start = jax.jit(lambda key: module.init({"params": key}, jnp.zeros(shape, jnp.float32), False))
        variables = start(rng)
        return variables["params"], variables.get("batch_stats", {})

    def apply(
        params: Any,
        stats: Any,
        x: jax.Array,
        *,
        train: bool,
        rng: jax.Array | None = None,
        dtype: Any = jnp.float32,
        maps: bool = False,
    ) -> tuple[Any, Any]:
        rngs = {} if rng is None else {"dropout": rng}
        variables = {"params": params, "batch_stats": stats}
        run = module.clone(dtype=dtype)
        if train and stats:
            (features, grid), changed = run.apply(variables, x, True, rngs=rngs, mutable=["batch_stats"])
            stats = changed["batch_stats"]
        else:
            features, grid = run.apply(variables, x, train, rngs=rngs)
        if maps and grid is None:
            raise ValueError(f"{name} works on vectors: it has no maps")
        return (features, grid) if maps else (features, stats)

    def attend(params: Any, x: jax.Array, *, dtype: Any = jnp.float32) -> jax.Array:
        return attention.of_cls(module.clone(dtype=dtype), params, x)

    return Model(init, apply, dim, name, attend if isinstance(module, vit.ViT | grid_vit.GridViT) else None)


def build_resnet(
    name: str,
    *,
    width: float = 1.0,
    small_stem: bool = False,
    bn_groups: int = 1,
    bn_momentum: float = 0.9,
    remat: bool = False,
) -> Model:
    depth = int(name.removeprefix("resnet"))
    module = resnet.ResNet(depth, width, small_stem, bn_groups, bn_momentum, remat)
    return from_module(module, resnet.feature_count(depth, width), name)


def build_vit(
    name: str,
    *,
    registers: int = 0,
    pool: str = "cls",
    drop_path: float = 0.0,
    dropout: float = 0.0,
    remat: bool = False,
    features: int = 0,
    blocks: int = 0,
    heads: int = 0,
    pos_offset: float = 0.0,
) -> Model:
    """features, blocks and heads, where not 0, replace those of the named size. Weights of DINO want pos_offset=0.1."""
    size, patch = re.fullmatch(r"vit_([a-z]+)(\d+)", name).groups()  # type: ignore[union-attr]
    d, n, h = (given or usual for given, usual in zip((features, blocks, heads), vit.SIZES[size], strict=True))
    _check_blocks(name, d, h, pool, drop_path, dropout)
    return from_module(vit.ViT(d, n, h, int(patch), registers, pool, drop_path, dropout, remat, pos_offset), d, name)


def build_grid_vit(
    name: str,
    *,
    features: int = 192,
    blocks: int = 6,
    heads: int = 6,
    pool: str = "cls",
    drop_path: float = 0.0,
    dropout: float = 0.0,
    remat: bool = False,
) -> Model:
    """Over grids of tile features; the numbers are HIPT's."""
    _check_blocks(name, features, heads, pool, drop_path, dropout)
    return from_module(grid_vit.GridViT(features, blocks, heads, pool, drop_path, dropout, remat), features, name)


def _check_blocks(name: str, features: int, heads: int, pool: str, drop_path: float, dropout: float) -> None:
    if features % heads:
        raise ValueError(f"{name}: {features} features cannot be shared by {heads} heads")
    if pool not in ("cls", "mean"):
        raise ValueError(f"{name}: pool is cls or mean, not {pool!r}")
    if max(drop_path, dropout) >= 1:
        raise ValueError(f"{name}: drop_path and dropout are below 1, not {drop_path} and {dropout}")


def build_compact(
    name: str,
    *,
    widths: tuple[int, ...] = (32, 64, 128),
    blocks: int = 1,
    patch: int = 4,
    bn_groups: int = 1,
    bn_momentum: float = 0.9,
) -> Model:
    return from_module(Compact(widths, blocks, patch, bn_groups, bn_momentum), 2 * widths[-1], name)


def build_mlp(
    name: str, *, widths: tuple[int, ...] = (512, 512), bn: bool = True, dropout: float = 0.0, bn_groups: int = 1
) -> Model:
    return from_module(Layers(widths, bn, bn, True, dropout, bn_groups), widths[-1], name)


def build_projector(
    name: str,
    *,
    in_dim: int,
    widths: tuple[int, ...] = (2048, 2048, 2048),
    bn: bool = False,
    last_bn: bool = False,
    bn_groups: int = 1,
) -> Model:
    return from_module(Layers(widths, bn, last_bn, bn_groups=bn_groups), widths[-1], name)


def build_predictor(name: str, *, in_dim: int, hidden: int = 512, bn: bool = True, bn_groups: int = 1) -> Model:
    return from_module(Layers((hidden, in_dim), bn, bn_groups=bn_groups), in_dim, name)


def build_dino(
    name: str,
    *,
    in_dim: int,
    hidden: int = 2048,
    layers: int = 3,
    bottleneck: int = 256,
    bn: bool = False,
    bn_groups: int = 1,
) -> Model:
    return from_module(DinoHead((hidden,) * (layers - 1) + (bottleneck,), bn, bn_groups), bottleneck, name)


def build_directions(name: str, *, in_dim: int, out: int = 65536) -> Model:
    return from_module(Directions(out), out, name)


def build_linear(name: str, *, in_dim: int, out: int = 2) -> Model:
    return from_module(Layers((out,)), out, name)


def build_classifier(name: str, *, in_dim: int, out: int = 2, hidden: int = 256, dropout: float = 0.0) -> Model:
    return from_module(PaperHead(out, hidden, dropout), out, name)


ENCODERS = {
    **{f"resnet{depth}": build_resnet for depth in resnet.DEPTHS},
    **{f"vit_{size}{patch}": build_vit for size in vit.SIZES for patch in (8, 14, 16)},
    "grid_vit": build_grid_vit,
    "compact": build_compact,
    "mlp": build_mlp,
}
HEADS = {
    "projector": build_projector,
    "predictor": build_predictor,
    "linear": build_linear,
    "dino": build_dino,
    "directions": build_directions,
    "classifier": build_classifier,
}
