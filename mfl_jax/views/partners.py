"""Views of partners that are no photographs: label maps, which stay discrete, and vectors such as gene counts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mfl_jax.views.colour import NORMALISE
from mfl_jax.views.geometry import Params, Source, nothing, uniforms
from mfl_jax.views.spec import Arg, Op, fraction

# --- maps: [h, w, channels] of whole numbers, 0 is background; each encoder gives float32 [h, w, its own channels]


def _channel(labels: jax.Array, args: Params) -> jax.Array:
    return labels[..., int(args["channel"])].astype(jnp.int32)


def onehot(params: Params, labels: jax.Array, args: Params) -> jax.Array:
    """`classes` channels, background included; a label of `classes` or above is 0 in all of them."""
    return jax.nn.one_hot(_channel(labels, args), int(args["classes"]), dtype=jnp.float32)


def embedding_table(classes: int, dims: int) -> np.ndarray:
    """[classes, dims] fixed unit vectors; background is 0. Depends on nothing but the two numbers."""
    table = np.random.Generator(np.random.PCG64(0)).standard_normal((classes, dims))
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    table[0] = 0.0
    return table.astype(np.float32)


def embed(params: Params, labels: jax.Array, args: Params) -> jax.Array:
    """A fixed random vector a type: many types in few channels. A label of `classes` or above is background."""
    label = _channel(labels, args)
    table = jnp.asarray(embedding_table(int(args["classes"]), int(args["dims"])))
    return table[jnp.where(label < len(table), label, 0)]


def foreground(params: Params, labels: jax.Array, args: Params) -> jax.Array:
    return (_channel(labels, args) > 0).astype(jnp.float32)[..., None]


def boundary(params: Params, labels: jax.Array, args: Params) -> jax.Array:
    """1 on labelled pixels with one of four neighbours labelled otherwise; the border of the view is no boundary."""
    label = _channel(labels, args)
    padded = jnp.pad(label, 1, mode="edge")
    around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    edge = jnp.stack([label != other for other in around]).any(0)
    return (edge & (label > 0)).astype(jnp.float32)[..., None]


_CHANNEL = Arg("channel", 0.0, 0.0, 255.0, integer=True)
_CLASSES = Arg("classes", 2.0, 2.0, 4096.0, integer=True)

MAP = {
    "onehot": Op("encode", (_CLASSES, _CHANNEL), nothing, onehot),
    "embed": Op("encode", (_CLASSES, Arg("dims", 8.0, 1.0, 1024.0, integer=True), _CHANNEL), nothing, embed),
    "foreground": Op("encode", (_CHANNEL,), nothing, foreground),
    "boundary": Op("encode", (_CHANNEL,), nothing, boundary),
}


def encoded_channels(name: str, args: dict[str, Any]) -> int:
    return {"onehot": args.get("classes", 1), "embed": args.get("dims", 1)}.get(name, 1)


# --- vectors: [D] float32


def log1p(params: Params, vector: jax.Array, args: Params) -> jax.Array:
    """log(1 + counts scaled to a sum of `total`); total=0 leaves the sum alone. All zero stays all zero."""
    if args["total"]:
        total = vector.sum()
        vector = vector * (args["total"] / jnp.where(total > 0, total, 1.0))
    return jnp.log1p(vector)


def draw_genedrop(source: Source, args: Params, shape: tuple[int, ...]) -> Params:
    share = uniforms(source, 1)[0] * args["max"]
    return {"keep": jax.random.uniform(source.key, shape) >= share}


def genedrop(params: Params, vector: jax.Array, args: Params) -> jax.Array:
    return jnp.where(params["keep"], vector, 0.0)


def draw_permute(source: Source, args: Params, shape: tuple[int, ...]) -> Params:
    """source: where each entry's value comes from. A share U(0, max) of the entries is permuted among itself."""
    which, order = jax.random.uniform(source.key, (2, *shape))
    chosen = which < uniforms(source, 1)[0] * args["max"]
    places = jnp.argsort(~chosen, stable=True)
    rank = jnp.where(chosen, order, 2.0)
    return {"source": jnp.zeros(shape, jnp.int32).at[places].set(jnp.argsort(rank, stable=True).astype(jnp.int32))}


def permute(params: Params, vector: jax.Array, args: Params) -> jax.Array:
    return vector[params["source"]]


def draw_vector_noise(source: Source, args: Params, shape: tuple[int, ...]) -> Params:
    std = jnp.where(uniforms(source, 1)[0] < args["p"], args["std"], 0.0)
    return {"noise": std * jax.random.normal(source.key, shape)}


def vector_noise(params: Params, vector: jax.Array, args: Params) -> jax.Array:
    return vector + params["noise"]


VECTOR = {
    "log1p": Op("augment", (Arg("total", 1e4, 0.0, 1e12),), nothing, log1p),
    "genedrop": Op("augment", (fraction("max", 0.2),), draw_genedrop, genedrop),
    "permute": Op("augment", (fraction("max", 0.1),), draw_permute, permute),
    "noise": Op("augment", (Arg("std", 0.1, 0.0, 1e3), fraction("p", 1.0)), draw_vector_noise, vector_noise),
    "normalise": NORMALISE,
}
