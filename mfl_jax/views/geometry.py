"""Where a view looks: each geometric op is an affine map, all of a view are one matrix, and pixels are read once.

An op maps the frame of the image that it makes to the frame of the image that it is given; a frame is the square
[-1/2, 1/2]^2 (x right, y down) whatever the size in pixels, so partners of different sizes share one geometry. Beyond
the border an image is mirrored: no black corners. Before a bilinear read the image is averaged over blocks of 2^k
pixels, k the nearest to the zoom (a small mip map), so that a strongly reduced view is not aliased.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mfl_jax.views.spec import Arg, Op, fraction

BLOCK_BIAS = 0.3  # blocks of 2 from a zoom of 1.62 on, of 4 from 3.25 on
FIELD = 0x666C64  # far from the counters that uniform() and split() use under the same key
Params = dict[str, Any]


class Source(NamedTuple):
    """What an op of one row may draw from. All ops share one call of the generator: each costs .25 s to compile."""

    u: jax.Array  # uniform numbers of its own
    key: jax.Array  # for whole fields


def sources(key: jax.Array, count: int, width: int = 16) -> list[Source]:
    """One Source for each of `count` ops."""
    u = jax.random.uniform(key, (count, width))
    return [Source(u[i], jax.random.fold_in(key, FIELD + i)) for i in range(count)]


def uniforms(source: Source, count: int) -> jax.Array:
    assert count <= source.u.shape[0], "a Source is too narrow for its op"
    return source.u[:count]


def between(u: Any, low: Any, high: Any) -> Any:
    return low + (high - low) * u


def affine(a: Any, b: Any, c: Any, d: Any, tx: Any = 0.0, ty: Any = 0.0) -> jax.Array:
    """[[a, b, tx], [c, d, ty], [0, 0, 1]]: x_in = a x_out + b y_out + tx, y_in = c x_out + d y_out + ty."""
    row = [jnp.asarray(v, jnp.float32) for v in (a, b, tx, c, d, ty, 0.0, 0.0, 1.0)]
    return jnp.stack(row).reshape(3, 3)


def draw_crop(source: Source, args: Params, shape: tuple[int, int]) -> Params:
    """A share of the area, U(min, max), and an aspect ratio, log-uniform over those that fit into the image."""
    u = uniforms(source, 4)
    height, width = shape
    area = between(u[0], args["min"], args["max"])
    limit, proportion = math.log(args["aspect"]), math.log(width / height)
    low, high = jnp.log(area) + proportion, proportion - jnp.log(area)
    log_aspect = between(u[1], jnp.clip(-limit, low, high), jnp.clip(limit, low, high))
    h = jnp.minimum(jnp.sqrt(area * jnp.exp(proportion - log_aspect)), 1.0)
    w = jnp.minimum(jnp.sqrt(area * jnp.exp(log_aspect - proportion)), 1.0)
    return {"height": h, "width": w, "top": u[2] * (1 - h), "left": u[3] * (1 - w)}


def draw_sides(source: Source, args: Params, shape: tuple[int, int]) -> Params:
    """Height and width each U(min, max), the crop of More From Less as released."""
    u = uniforms(source, 4)
    h, w = between(u[0], args["min"], args["max"]), between(u[1], args["min"], args["max"])
    return {"height": h, "width": w, "top": u[2] * (1 - h), "left": u[3] * (1 - w)}


def draw_centre(source: Source, args: Params, shape: tuple[int, int]) -> Params:
    side = args["side"]
    return {"height": side, "width": side, "top": (1 - side) / 2, "left": (1 - side) / 2}


def crop_matrix(params: Params, _: None, args: Params) -> jax.Array:
    h, w = params["height"], params["width"]
    return affine(w, 0.0, 0.0, h, params["left"] + (w - 1) / 2, params["top"] + (h - 1) / 2)


def draw_flip(source: Source, args: Params, shape: tuple[int, int]) -> Params:
    on = uniforms(source, 2) < args["p"]
    return {"horizontal": on[0], "vertical": on[1]}


def draw_hflip(source: Source, args: Params, shape: tuple[int, int]) -> Params:
    return {"horizontal": uniforms(source, 1)[0] < args["p"], "vertical": jnp.array(False)}


def draw_vflip(source: Source, args: Params, shape: tuple[int, int]) -> Params:
    return {"horizontal": jnp.array(False), "vertical": uniforms(source, 1)[0] < args["p"]}


def flip_matrix(params: Params, _: None, args: Params) -> jax.Array:
    return affine(jnp.where(params["horizontal"], -1.0, 1.0), 0.0, 0.0, jnp.where(params["vertical"], -1.0, 1.0))


def draw_rot90(source: Source, args: Params, shape: tuple[int, int]) -> Params:
    return {"turns": jnp.floor(4 * uniforms(source, 1)[0]).astype(jnp.int32)}


def rot90_matrix(params: Params, _: None, args: Params) -> jax.Array:
    """As numpy.rot90: counter-clockwise. From a table, since a cosine of 90 degrees is not quite 0."""
    c = jnp.array([1.0, 0.0, -1.0, 0.0])[params["turns"]]
    s = jnp.array([0.0, 1.0, 0.0, -1.0])[params["turns"]]
    return affine(c, -s, s, c)


def draw_rotate(source: Source, args: Params, shape: tuple[int, int]) -> Params:
    u = uniforms(source, 2)
    return {"degrees": jnp.where(u[0] < args["p"], between(u[1], -args["degrees"], args["degrees"]), 0.0)}


def rotate_matrix(params: Params, _: None, args: Params) -> jax.Array:
    """Counter-clockwise on the screen, in the square frame."""
    angle = jnp.deg2rad(params["degrees"])
    return affine(jnp.cos(angle), -jnp.sin(angle), jnp.sin(angle), jnp.cos(angle))


def _ordered(values: Params) -> str | None:
    if values["min"] > values["max"]:
        return f"min={values['min']:g} is above max={values['max']:g}"
    return None


_RANGE = (Arg("min", 0.2, 0.001, 1.0), Arg("max", 1.0, 0.001, 1.0))


def nothing(source: Source, args: Params, shape: tuple[int, ...]) -> Params:
    return {}


def identity_matrix(params: Params, _: None, args: Params) -> jax.Array:
    return jnp.eye(3)


GEOMETRY = {
    "crop": Op("geometry", (*_RANGE, Arg("aspect", 4 / 3, 1.0, 10.0)), draw_crop, crop_matrix, _ordered),
    "sides": Op("geometry", (Arg("min", 0.75, 0.01, 1.0), _RANGE[1]), draw_sides, crop_matrix, _ordered),
    "centre": Op("geometry", (Arg("side", 1.0, 0.01, 1.0),), draw_centre, crop_matrix),
    "flip": Op("geometry", (fraction("p", 0.5),), draw_flip, flip_matrix),
    "hflip": Op("geometry", (fraction("p", 0.5),), draw_hflip, flip_matrix),
    "vflip": Op("geometry", (fraction("p", 0.5),), draw_vflip, flip_matrix),
    "rot90": Op("geometry", (), draw_rot90, rot90_matrix),
    "rotate": Op("geometry", (Arg("degrees", 20.0, 0.0, 180.0), fraction("p", 1.0)), draw_rotate, rotate_matrix),
    "size": Op("geometry", (Arg("pixels", 224.0, 1.0, 4096.0, integer=True),), nothing, identity_matrix),
}


def pixel_coordinates(matrix: jax.Array, source: tuple[int, int], size: int) -> tuple[jax.Array, jax.Array]:
    """(x, y) in source pixels, each [size, size], of the centres of the view's pixels; whole numbers stay exact."""
    height, width = source
    offset = jnp.arange(size, dtype=jnp.float32) - (size - 1) / 2
    columns, rows = offset[None, :], offset[:, None]
    x = matrix[0, 0] * (width / size) * columns + matrix[0, 1] * (width / size) * rows
    y = matrix[1, 0] * (height / size) * columns + matrix[1, 1] * (height / size) * rows
    return x + matrix[0, 2] * width + (width - 1) / 2, y + matrix[1, 2] * height + (height - 1) / 2


def mirror(coordinate: jax.Array, length: Any) -> jax.Array:
    """Reflect about the outer edges of the first and last pixel (scipy's 'reflect')."""
    return length - jnp.abs(length - jnp.mod(coordinate + 0.5, 2 * length)) - 0.5


def sample_nearest(image: jax.Array, matrix: jax.Array, size: int) -> jax.Array:
    """[size, size, C] of the image's own dtype: no value appears that was not there."""
    height, width, channels = image.shape
    x, y = pixel_coordinates(matrix, (height, width), size)
    column = jnp.clip(jnp.floor(mirror(x, width) + 0.5).astype(jnp.int32), 0, width - 1)
    row = jnp.clip(jnp.floor(mirror(y, height) + 0.5).astype(jnp.int32), 0, height - 1)
    return jnp.asarray(image).reshape(-1, channels)[(row * width + column).reshape(-1)].reshape(size, size, channels)


def block_levels(source: tuple[int, int], size: int) -> int:
    """How many mip levels a view can need: a whole image reduced to `size`, and never fewer than 2 blocks a side."""
    most = math.floor(math.log2(max(*source, size) / size) + BLOCK_BIAS)
    return max(0, min(most, int(math.log2(min(source))) - 1))


def zoom_level(matrix: jax.Array, source: tuple[int, int], size: int, levels: int) -> jax.Array:
    """k for blocks of 2^k pixels: log2 of the zoom, rounded with a bias to sharpness."""
    area = jnp.abs(matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0]) * (source[0] * source[1])
    zoom = jnp.maximum(jnp.sqrt(area) / size, 1.0)
    return jnp.clip(jnp.floor(jnp.log2(zoom) + BLOCK_BIAS), 0, levels).astype(jnp.int32)


def sample_bilinear(image: jax.Array, matrix: jax.Array, size: int) -> jax.Array:
    """[size, size, C] float32 in the image's units."""
    height, width, channels = image.shape
    levels = block_levels((height, width), size)
    if levels == 0:
        x, y = pixel_coordinates(matrix, (height, width), size)
        values = jnp.asarray(image).reshape(-1, channels)
        return _bilinear(values, x, y, 0, height, width, (height, width)).reshape(size, size, channels)
    values, offsets, heights, widths = _mip(image.astype(jnp.float32), levels)
    level = zoom_level(matrix, (height, width), size, levels)
    x, y = pixel_coordinates(matrix, (height, width), size)
    x, y, block = mirror(x, width), mirror(y, height), 2.0**level
    x, y = (x + 0.5) / block - 0.5, (y + 0.5) / block - 0.5
    offset, h, w = (jnp.asarray(v)[level] for v in (offsets, heights, widths))
    return _bilinear(values, x, y, offset, h, w, None).reshape(size, size, channels)


def _mip(image: jax.Array, levels: int) -> tuple[jax.Array, np.ndarray, np.ndarray, np.ndarray]:
    """All levels in one [pixels, C] array, with where each starts and its size; an odd last row is left out."""
    channels, layers = image.shape[-1], [image]
    for _ in range(levels):
        last = layers[-1]
        h, w = last.shape[0] // 2, last.shape[1] // 2
        layers.append(last[: 2 * h, : 2 * w].reshape(h, 2, w, 2, channels).mean((1, 3)))
    shapes = np.array([layer.shape[:2] for layer in layers])
    starts = np.concatenate([[0], np.cumsum(shapes.prod(1))[:-1]])
    return jnp.concatenate([layer.reshape(-1, channels) for layer in layers]), starts, shapes[:, 0], shapes[:, 1]


def _bilinear(
    values: jax.Array, x: jax.Array, y: jax.Array, offset: Any, height: Any, width: Any, fold: tuple[int, int] | None
) -> jax.Array:
    """[pixels of the view, C] from a flat image; fold mirrors the coordinates into an image of that size first."""
    if fold:
        x, y = mirror(x, fold[1]), mirror(y, fold[0])
    x, y = x.reshape(-1), y.reshape(-1)
    left, top = jnp.floor(x), jnp.floor(y)
    fx, fy = (x - left)[:, None], (y - top)[:, None]
    left, top = left.astype(jnp.int32), top.astype(jnp.int32)

    def at(row: jax.Array, column: jax.Array) -> jax.Array:
        index = offset + jnp.clip(row, 0, height - 1) * width + jnp.clip(column, 0, width - 1)
        return values.at[index].get(mode="promise_in_bounds").astype(jnp.float32)

    upper = at(top, left) * (1 - fx) + at(top, left + 1) * fx
    lower = at(top + 1, left) * (1 - fx) + at(top + 1, left + 1) * fx
    return upper * (1 - fy) + lower * fy


def sample_separable(image: jax.Array, matrix: jax.Array, size: int) -> jax.Array:
    """As sample_bilinear for a view of crops, flips and right angles alone: two matrix products, no gather.

    For TPUs, where a gather is slow. On a CPU the gather is 4 to 7 times as fast.
    """
    height, width, channels = image.shape
    levels = block_levels((height, width), size)
    level = zoom_level(matrix, (height, width), size, levels)
    turned = jnp.abs(matrix[0, 1]) > jnp.abs(matrix[0, 0])
    x = _weights(matrix[0, 0] + matrix[0, 1], matrix[0, 2], width, size, level)
    y = _weights(matrix[1, 0] + matrix[1, 1], matrix[1, 2], height, size, level)
    rows = image.astype(jnp.float32).transpose(0, 2, 1).reshape(height, channels * width)
    half = jnp.matmul(y, rows, precision=lax.Precision.HIGHEST).reshape(size * channels, width)
    view = jnp.matmul(half, x.T, precision=lax.Precision.HIGHEST).reshape(size, channels, size)
    return jnp.where(turned, view.transpose(2, 0, 1), view.transpose(0, 2, 1))


def _weights(zoom: jax.Array, shift: jax.Array, length: int, size: int, level: jax.Array) -> jax.Array:
    """[size, length]: bilinear over blocks of 2^level pixels, edges held."""
    block = (2**level).astype(jnp.int32)
    blocks = length // block
    centre = zoom * (length / size) * (jnp.arange(size) - (size - 1) / 2) + shift * length + (length - 1) / 2
    centre = jnp.clip((mirror(centre, length) + 0.5) / block - 0.5, 0, blocks - 1)
    pixel = jnp.arange(length)
    weight = jnp.maximum(0.0, 1 - jnp.abs(centre[:, None] - (pixel // block)[None, :]))
    return jnp.where(pixel < blocks * block, weight / block, 0.0)
