"""Views of grids of tile features: [h, w, D + 1], where the last channel says whether there is a tile.

Cells are taken, turned and left out as they are, and never mixed: a view of a grid is no resampling. The mask moves
along with the features, and where it is 0 these are 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mfl_jax.views.geometry import (
    GEOMETRY,
    Params,
    Source,
    draw_flip,
    draw_hflip,
    draw_rot90,
    draw_vflip,
    nothing,
    uniforms,
)
from mfl_jax.views.spec import Arg, Op, fraction

CUTS = ("window", "centre")  # the first op of a view, one of these, decides its size
_CELLS = Arg("cells", None, 1.0, 4096.0, integer=True)


def draw_window(source: Source, args: Params, shape: tuple[int, ...]) -> Params:
    """Places [tries, 2] where it lies within the grid, all equally likely."""
    tries = int(args["tries"])
    spare = jnp.array([n - int(args["cells"]) for n in shape[:2]])
    u = uniforms(source, 2 * tries).reshape(tries, 2)
    return {"at": jnp.minimum(jnp.floor(u * (spare + 1)).astype(jnp.int32), spare)}


def window(params: Params, grid: jax.Array, args: Params) -> jax.Array:
    """The first of the drawn places that is at least half as full as the grid, else the fullest of them: at the edge
    of the tissue most windows hold next to nothing."""
    cells, places = int(args["cells"]), params["at"]
    if len(places) == 1:
        return cut(places[0], grid, cells)
    full = jax.vmap(lambda at: cut(at, grid[..., -1:], cells).mean())(places)
    enough = full >= 0.5 * grid[..., -1].mean()
    return cut(places[jnp.where(enough.any(), jnp.argmax(enough), jnp.argmax(full))], grid, cells)


def centre(params: Params, grid: jax.Array, args: Params) -> jax.Array:
    cells = int(args["cells"])
    return cut(jnp.array([(n - cells) // 2 for n in grid.shape[:2]]), grid, cells)


def cut(at: jax.Array, grid: jax.Array, cells: int) -> jax.Array:
    return lax.dynamic_slice(grid, (at[0], at[1], 0), (cells, cells, grid.shape[-1]))


def flipped(params: Params, grid: jax.Array, args: Params) -> jax.Array:
    grid = jnp.where(params["horizontal"], grid[:, ::-1], grid)
    return jnp.where(params["vertical"], grid[::-1], grid)


def turned(params: Params, grid: jax.Array, args: Params) -> jax.Array:
    """As numpy.rot90: counter-clockwise."""
    grid = jnp.where(params["turns"] % 2 == 1, grid.swapaxes(0, 1)[::-1], grid)
    return jnp.where(params["turns"] >= 2, grid[::-1, ::-1], grid)


def draw_drop(source: Source, args: Params, shape: tuple[int, ...]) -> Params:
    return {"keep": jax.random.uniform(source.key, (*shape[:2], 1)) >= args["p"]}


def drop(params: Params, grid: jax.Array, args: Params) -> jax.Array:
    """Tiles that are left out look as background does."""
    return jnp.where(params["keep"], grid, 0.0)


def draw_noise(source: Source, args: Params, shape: tuple[int, ...]) -> Params:
    std = jnp.where(uniforms(source, 1)[0] < args["p"], args["std"], 0.0)
    return {"noise": std * jax.random.normal(source.key, (*shape[:2], shape[2] - 1))}


def noise(params: Params, grid: jax.Array, args: Params) -> jax.Array:
    """On the features of tiles that are there."""
    features, there = grid[..., :-1], grid[..., -1:]
    return jnp.concatenate([features + params["noise"] * there, there], -1)


GRID = {
    "window": Op("geometry", (_CELLS, Arg("tries", 1.0, 1.0, 8.0, integer=True)), draw_window, window),
    "centre": Op("geometry", (_CELLS,), nothing, centre),
    "flip": Op("geometry", (fraction("p", 0.5),), draw_flip, flipped),
    "hflip": Op("geometry", (fraction("p", 0.5),), draw_hflip, flipped),
    "vflip": Op("geometry", (fraction("p", 0.5),), draw_vflip, flipped),
    "rot90": Op("geometry", (), draw_rot90, turned),
    "size": GEOMETRY["size"],
    "drop": Op("augment", (fraction("p", 0.1),), draw_drop, drop),
    "noise": Op("augment", (Arg("std", 0.1, 0.0, 1e3), fraction("p", 1.0)), draw_noise, noise),
}


def apply(calls: Any, sources: Any, grid: jax.Array) -> jax.Array:
    """The ops one after another, each with its own source."""
    for call, source in zip(calls, sources, strict=True):
        op = GRID[call.name]
        grid = op.apply(op.draw(source, call.args, grid.shape), grid, call.args)
    return grid
