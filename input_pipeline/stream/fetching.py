"""Chunk number -> rows of a batch: the one function that every executor runs, pure but for where it writes.

Chunks are written straight into the arrays of their batch: each further copy costs several percent of the rate.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from input_pipeline import order
from input_pipeline.neighbours import Neighbours
from input_pipeline.tileset import TileSet, TileSetError
from input_pipeline.tileset.spec import Spec, decode_payload

Images = dict[str, np.ndarray | None]  # of one tile, and its vectors

ATTEMPTS = 16  # replacements tried for one bad tile
BAD = "_bad"  # [rows, 3]: ids of the bad tile, near tile and far tile of each row, -1 where all is well
_CODES = {
    "id": np.dtype(np.int64),
    "label": np.dtype(np.int32),
    "slide": np.dtype(np.int32),
    "case": np.dtype(np.int32),
}


@dataclass(frozen=True)
class Plan:
    """All that decides the contents of a stream, and nothing that may differ between two runs of it."""

    tileset: TileSet
    selection: order.Selection
    index: Callable[[np.ndarray], np.ndarray]  # positions -> indices of the selection
    seed: int
    batch: int  # global
    rows: int  # of this host
    host: int
    chunk: int  # rows fetched at a time; divides `rows`
    spec: Spec  # with the partners that are wanted
    columns: tuple[str, ...] = ()
    near: Neighbours | None = None
    far: Neighbours | None = None
    require: tuple[str, ...] = ()
    on_bad: str = "raise"
    stop: int | None = None  # the first position that does not exist; None for an endless stream
    reasons: dict[int, str] = field(default_factory=dict)  # what was wrong with bad tiles, for messages alone
    kept: dict[int, Images] | None = None  # by tile, what was decoded before: for speed alone

    @property
    def images(self) -> tuple[str, ...]:
        return ("he", *(p.name for p in self.spec.partners if p.kind != "vector"))

    @property
    def beside(self) -> dict[str, tuple[Neighbours, int, int]]:
        """What else of the slide stands in a row: name -> (where it is drawn from, stream of draws, column of BAD)."""
        named = {"near": (self.near, 8, 1), "far": (self.far, 9, 2)}
        return {name: (found, draws, column) for name, (found, draws, column) in named.items() if found is not None}

    @property
    def chunks(self) -> int:
        return self.rows // self.chunk


def decoded_bytes(plan: Plan) -> int:
    """Of all tiles that the stream draws from."""
    rows = layout(plan)
    parts = [rows[name] for name in ("he", *(p.name for p in plan.spec.partners))]
    return len(plan.selection) * sum(math.prod(shape[1:]) * np.dtype(dtype).itemsize for shape, dtype in parts)


def layout(plan: Plan) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of the arrays of one batch of this host, which `fetch` writes."""
    n, spec = plan.rows, plan.spec
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {"he": (spec.he_shape, spec.he_dtype)}
    for partner in spec.partners:
        shapes |= {partner.name: (spec.shape(partner), partner.dtype), f"{partner.name}_mask": ((), np.bool_)}
    for name in plan.beside:
        shapes |= {f"{name}_he": shapes["he"], f"{name}_id": ((), np.int64), f"{name}_mask": ((), np.bool_)}
    shapes |= {name: ((), dtype) for name, dtype in _CODES.items()}
    shapes |= {name: ((), plan.tileset.tiles[name].dtype) for name in plan.columns}
    shapes |= {"mask": ((), np.bool_), BAD: ((3,), np.int64)}
    return {name: ((n, *shape), np.dtype(dtype).str) for name, (shape, dtype) in shapes.items()}


def fetch(plan: Plan, number: int, batch: dict[str, np.ndarray]) -> None:
    """Write chunk `number` of this host. Batch t is positions t*batch..(t+1)*batch-1, and hosts hold slices of it."""
    step, part = divmod(number, plan.chunks)
    out = {name: array[part * plan.chunk : (part + 1) * plan.chunk] for name, array in batch.items()}
    position = step * plan.batch + plan.host * plan.rows + part * plan.chunk + np.arange(plan.chunk)
    if plan.stop is not None:
        position = position[position < plan.stop]
    for name in out:
        if out[name].ndim == 1:
            out[name][:] = -1 if name in (*_CODES, "near_id", "far_id") else 0
    out[BAD][:] = -1
    ids = plan.selection.ids(plan.index(position))
    for row in range(plan.chunk):
        if row < len(ids):
            ids[row] = _fill(plan, out, row, int(ids[row]), int(position[row]))
        else:
            _write(plan, out, row, {})
    here = np.flatnonzero(ids >= 0)
    out["mask"][here] = True
    out["id"][here] = ids[here]
    for name in ("label", "slide", "case", *plan.columns):
        out[name][here] = plan.tileset.tiles[name][ids[here]]
    for name in plan.beside:
        _fill_beside(plan, name, out, here, position[here])


def fetch_apart(plan: Plan, batch: dict[str, np.ndarray], number: int) -> dict[int, str]:
    """`fetch` as a process of a crew does it: it says what was wrong with the bad tiles that it has met."""
    plan.reasons.clear()
    fetch(plan, number, batch)
    return plan.reasons


def _write(plan: Plan, out: dict[str, np.ndarray], row: int, images: Mapping[str, np.ndarray | None]) -> None:
    for name in ("he", *(p.name for p in plan.spec.partners)):
        image = images.get(name)
        if image is None or not np.may_share_memory(image, out[name]):  # else it was decoded into its place
            out[name][row] = 0 if image is None else image
        if name != "he":
            out[f"{name}_mask"][row] = image is not None


def _fill(plan: Plan, out: dict[str, np.ndarray], row: int, tile: int, position: int) -> int:
    """The tile, or by the policy another one or none (-1); returns the id of what stands in the row."""
    wanted = tile
    for attempt in range(ATTEMPTS):
        try:
            images = _decode(plan, wanted, plan.spec, {name: out[name][row] for name in plan.images})
        except TileSetError as error:
            if plan.on_bad == "raise":
                raise
            plan.reasons[wanted] = str(error)
            out[BAD][row, 0] = tile
            if plan.on_bad == "mask":
                _write(plan, out, row, {})
                return -1
            draw = order.hash64(plan.seed, 7, position, attempt)
            wanted = int(plan.selection.ids(order.below(draw, len(plan.selection))))
            continue
        _write(plan, out, row, images)
        return wanted
    raise TileSetError(f"tile {tile} and {ATTEMPTS - 1} replacements in a row are bad: {plan.reasons[wanted]}", id=tile)


def _fill_beside(plan: Plan, name: str, out: dict[str, np.ndarray], rows: np.ndarray, position: np.ndarray) -> None:
    """Near or far tiles; one that is bad counts as one that is not there."""
    neighbours, draws, column = plan.beside[name]
    tiles = out["id"][rows]
    others, found = neighbours.draw(tiles, order.hash64(plan.seed, draws, position))
    he_only = replace(plan.spec, partners=())
    for row, tile, other, there in zip(rows, tiles.tolist(), others.tolist(), found, strict=True):
        image = out["he"][row]
        if there:
            try:
                image = _decode(plan, other, he_only)["he"]
            except TileSetError as error:
                if plan.on_bad == "raise":
                    raise
                plan.reasons[other] = str(error)
                out[BAD][row, column] = other
                other, there = tile, False
        out[f"{name}_he"][row], out[f"{name}_id"][row], out[f"{name}_mask"][row] = image, other, there


def _decode(plan: Plan, tile: int, spec: Spec, into: Mapping[str, np.ndarray] | None = None) -> Images:
    if plan.kept is None:
        return _read(plan, tile, spec, into)
    if (images := plan.kept.get(tile)) is None:
        images = _read(plan, tile, spec, into)
        if spec is plan.spec:  # copies: rows are used again, and a vector holds on to its whole record
            plan.kept[tile] = {name: None if part is None else part.copy() for name, part in images.items()}
    return images


def _read(plan: Plan, tile: int, spec: Spec, into: Mapping[str, np.ndarray] | None = None) -> Images:
    (example,) = plan.tileset.read([tile])
    bad = partial(TileSetError, id=tile, slide=example.slide, file=example.file, offset=example.offset)
    place = f"{example.file}, offset {example.offset}, tile {tile}, slide {example.slide!r}"
    try:
        images = decode_payload(spec, example.payload, into)
    except TileSetError as error:
        raise bad(f"{place}: {error}") from error
    if missing := [p for p in plan.require if p in images and images[p] is None]:
        raise bad(f"{place}: it has no {', '.join(missing)}, which the stream requires")
    return images
