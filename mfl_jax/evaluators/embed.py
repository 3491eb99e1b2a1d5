"""The one pass over a set that all evaluators share: every example through `Method.embed` exactly once."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mfl_jax import sharding

if TYPE_CHECKING:
    from input_pipeline.tileset import TileSet

HELD_BYTES = 2 << 30
Embed = Callable[[Any, Any, Mapping[str, jax.Array]], dict[str, jax.Array]]


@dataclass(frozen=True)
class Embedded:
    """Row i of everything is the example ids[i]; ids ascend, so two passes over one set give the same rows."""

    features: dict[str, np.ndarray]  # float32 [N, D]
    ids: np.ndarray  # int64 [N]
    columns: dict[str, np.ndarray]  # [N]: label, slide, case and whatever else is known of a tile

    def __len__(self) -> int:
        return len(self.ids)


def embed_pass(
    embed: Embed, params: Any, extra: Any, batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh
) -> Embedded:
    """Features and columns of all rows whose `mask` is True. Every process gets all of them.

    Only images, vectors and masks reach `embed`: it cannot see a label. ValueError where an id comes twice or a feature
    is not finite.
    """
    jitted = jax.jit(embed, out_shardings=NamedSharding(mesh, PartitionSpec()))
    features: list[dict[str, np.ndarray]] = []
    rows: list[dict[str, np.ndarray]] = []
    for batch in batches:
        seen = {name: array for name, array in batch.items() if array.ndim > 1 or name.endswith("mask")}
        placed = sharding.put(seen | {"id": batch["id"]}, mesh)
        order = placed.pop("id")
        if jax.process_count() > 1:
            order = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(order)
        out = jitted(params, extra, placed)
        features.append(
            {name: np.asarray(value, np.float32) for name, value in out.items()} | {"id": np.asarray(order)}
        )
        rows.append({name: array for name, array in batch.items() if array.ndim == 1})
    if not rows:
        raise ValueError("there is nothing to embed: the stream has no batch")
    of_device = _by_id({name: np.concatenate([f[name] for f in features]) for name in features[0]})
    of_host = _by_id({name: _everywhere(np.concatenate([r[name] for r in rows])) for name in rows[0]})
    ids = of_host.pop("id")
    assert np.array_equal(ids, of_device.pop("id")), "rows of features and columns differ"
    for name, values in of_device.items():
        if not np.isfinite(values).all():
            bad = ids[~np.isfinite(values).all(tuple(range(1, values.ndim)))]
            raise ValueError(f"features {name!r} of {len(bad)} tiles are not finite, the first {bad[:5].tolist()}")
    return Embedded(of_device, ids, {name: v for name, v in of_host.items() if not name.endswith("mask")})


def colour_statistics(params: Any, extra: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """In place of Method.embed, the least that any encoder should beat: mean, spread and percentiles of the colours."""
    pixels = batch["he"].reshape(len(batch["he"]), -1, batch["he"].shape[-1])
    scaled = pixels.astype(jnp.float32) / 255
    percentiles = _percentiles(pixels, (10.0, 50.0, 90.0)) / 255
    return {"he": jnp.concatenate([scaled.mean(1), scaled.std(1), *percentiles], 1)}


def _percentiles(values: jax.Array, asked: Sequence[float]) -> jax.Array:
    """jnp.percentile of uint8 [B, N, C] along N, by counting, as XLA sorts slowly on a CPU. -> [asked, B, C]"""
    assert values.dtype == jnp.uint8
    place = np.asarray(asked) / 100 * (values.shape[1] - 1)
    ranks = np.stack([np.floor(place), np.ceil(place)]).astype(np.int32)
    count = jax.vmap(jax.vmap(lambda row: jnp.zeros(256, jnp.int32).at[row].add(1)))(values.swapaxes(1, 2))
    low, high = (count.cumsum(-1) <= ranks[..., None, None, None]).sum(-1).astype(jnp.float32)
    return low + (high - low) * jnp.asarray(place % 1, jnp.float32)[:, None, None]


def mean_of_tiles(params: Any, extra: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """In place of Method.embed, of grids of tile features: their mean over the tiles that are there, else 0."""
    grid = batch["he"].astype(jnp.float32)
    count = jnp.maximum(grid[..., -1].sum((1, 2)), 1.0)
    return {"he": (grid[..., :-1] * grid[..., -1:]).sum((1, 2)) / count[:, None]}


def held_tiles(
    tileset: "TileSet", mesh: Mesh, *, batch: int, split: str | None = None, most: int = HELD_BYTES
) -> list[dict[str, np.ndarray]] | None:
    """The H&E of a split, read and decoded once for the many encoders that are to see it; None where it takes more
    bytes than `most`, or is read by several hosts."""
    from input_pipeline.stream import eval_stream

    of_one = math.prod(tileset.spec.he_shape) * np.dtype(tileset.spec.he_dtype).itemsize
    if len(tileset.ids(split)) * of_one > most or jax.process_count() > 1:
        return None
    with eval_stream(tileset, batch=sharding.rows_for(batch, mesh), split=split, partners=()) as batches:
        return list(batches)


def embed_set(
    embed: Embed,
    params: Any,
    extra: Any,
    tileset: "TileSet",
    mesh: Mesh,
    *,
    batch: int,
    split: str | None = None,
    partners: tuple[str, ...] = (),
    stall_timeout: float | None = 300,
    held: Iterable[Mapping[str, np.ndarray]] | None = None,
) -> Embedded:
    """Every tile of a split, with all columns of the tile set; slide and case as names.

    `batch` is rounded up to the devices. `partners` are decoded and given to embed; leave them out unless the method
    needs them (an upper bound that sees the partner at inference). `held` are the batches of `held_tiles`, which are
    not read again.
    """
    from input_pipeline.stream import eval_stream

    if held is not None:
        found = embed_pass(embed, params, extra, held, mesh)
    else:
        host = (jax.process_index(), jax.process_count())
        rows = sharding.rows_for(batch, mesh)
        options: dict[str, Any] = {"batch": rows, "split": split, "partners": partners, "host": host}
        with eval_stream(tileset, stall_timeout=stall_timeout, **options) as batches:
            found = embed_pass(embed, params, extra, batches, mesh)
    expected = tileset.ids(split)
    if not np.array_equal(found.ids, expected):
        raise ValueError(f"{len(found)} of {len(expected)} tiles were embedded; verify the tile set")
    return replace(found, columns=columns_of(tileset, found.ids))


def columns_of(tileset: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """All columns of these tiles; slide and case as names."""
    columns = {name: np.asarray(values[ids]) for name, values in tileset.tiles.items()}
    names = {"slide": np.array(tileset.slides), "case": np.array(tileset.cases)}
    return columns | {name: of[columns[name]] for name, of in names.items()}


def _by_id(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Padding has id -1."""
    ids = rows["id"]
    kept = np.flatnonzero(ids >= 0)
    kept = kept[np.argsort(ids[kept], kind="stable")]
    unique, counts = np.unique(ids[kept], return_counts=True)
    if len(unique) < len(kept):
        raise ValueError(
            f"tiles {unique[counts > 1][:5].tolist()} came more than once: evaluate on an evaluation stream"
        )
    return {name: array[kept] for name, array in rows.items()}


def _everywhere(array: np.ndarray) -> np.ndarray:
    """All processes' rows, bit by bit (jax would narrow 64-bit columns)."""
    if jax.process_count() == 1:
        return array
    raw = np.ascontiguousarray(array).view(np.uint8).reshape(len(array), -1)
    return np.ascontiguousarray(multihost_utils.process_allgather(raw, tiled=True)).view(array.dtype)[:, 0]
