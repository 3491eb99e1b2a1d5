"""What the network sees: augmentation on the device, described by a string.

    view = parse('crop(.6,1)|flip|rot90|rotate(20)|hed(.05)|jitter(.4,p=.8)|blur(p=.5)|normalise', size=224)
    view(key, images)          # uint8 [B, H, W, C] -> float32 [B, 224, 224, C], inside jit

A view is a pure function: the pixels of a row depend on the key, the view's number and the row's number in the GLOBAL
batch alone, so they are the same on any number of devices and hosts. Geometric ops come first and are one resampling
of the stored pixels, whatever their number; values are in [0, 1] from there until `normalise`.

Views of one example:  '2*crop(.4,1)|flip|blur|size(224); 8*crop(.05,.4)|flip|size(96)'  (parse_many: multi-crop).
Views of all modalities of a batch:  plan({'he': ..., 'if': ...}, ...), with geometry shared between modalities or not.
"""

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mfl_jax.views.colour import COLOUR, IMAGENET_MEAN, IMAGENET_STD
from mfl_jax.views.geometry import GEOMETRY, sample_bilinear, sample_nearest, sample_separable, sources
from mfl_jax.views.grids import CUTS, GRID
from mfl_jax.views.grids import apply as apply_grid
from mfl_jax.views.partners import MAP, VECTOR, encoded_channels
from mfl_jax.views.spec import Call, Op, ViewError, canonical, nearest, read

KINDS: dict[str, dict[str, Op]] = {"image": {**GEOMETRY, **COLOUR}, "map": {**GEOMETRY, **MAP}, "vector": VECTOR}
KINDS["grid"] = GRID
STAGES = ("geometry", "scale", "augment", "encode", "normalise")
ONCE = ("size", "scale", "percentile", "normalise")
WHITE = {"uint8": 255.0, "uint16": 65535.0}
VALUES = 0x76616C  # folded into a row key for the colour ops, so that they share nothing with its geometry
Statistic = float | Sequence[float] | None


@dataclass(frozen=True)
class View:
    """One checked spec; hashable, callable, made by parse(). str(view) is its canonical spec: parse gives it back."""

    calls: tuple[Call, ...]
    kind: str
    channels: int

    def __str__(self) -> str:
        return canonical(self.calls)

    @property
    def geometry(self) -> tuple[Call, ...]:
        ops = KINDS[self.kind]
        return tuple(c for c in self.calls if c.name != "size" and ops[c.name].stage == "geometry")

    @property
    def size(self) -> int | None:
        name, arg = (self.calls[0].name, "cells") if self.kind == "grid" else ("size", "pixels")
        return next((int(c.args[arg]) for c in self.calls if c.name == name), None)

    @property
    def out_channels(self) -> int:
        if self.kind != "map":
            return 1 if any(c.name == "only" for c in self.calls) else self.channels
        return int(sum(encoded_channels(c.name, c.args) for c in self.calls if c.name in MAP))

    def __call__(
        self, key: jax.Array, images: jax.Array, *, rows: jax.Array | None = None, geometry: jax.Array | None = None
    ) -> jax.Array:
        """`rows`: global row numbers, 0.. when absent; `geometry`: the key of the geometric ops, `key` when absent."""
        keys = row_keys(key, images, rows)
        return self.apply_rows(keys, keys if geometry is None else row_keys(geometry, images, rows), images)

    def apply_rows(self, keys: jax.Array, geometry_keys: jax.Array, images: jax.Array) -> jax.Array:
        self._check(images)
        return jax.vmap(self.row)(keys, geometry_keys, images)

    def row(self, key: jax.Array, geometry_key: jax.Array, image: jax.Array) -> jax.Array:
        if self.kind == "vector":
            return self._values(key, image.astype(jnp.float32), VECTOR)
        if self.kind == "grid":
            grid = apply_grid(self.geometry, sources(geometry_key, len(self.geometry)), image.astype(jnp.float32))
            return self._values(key, grid, {n: op for n, op in GRID.items() if op.stage != "geometry"})
        matrix = self.matrix(geometry_key, (image.shape[0], image.shape[1]))
        assert self.size is not None
        if self.kind == "map":
            labels = sample_nearest(image, matrix, self.size)
            encoders = [(MAP[c.name], c.args) for c in self.calls if c.name in MAP]
            return jnp.concatenate([op.apply({}, labels, args) for op, args in encoders], -1)
        image, raw = self._sampler()(image, matrix, self.size), image
        scaled = any(c.name == "scale" for c in self.calls)
        unit = 1.0 if scaled else 1 / WHITE.get(str(raw.dtype), 1.0)
        return self._values(key, image * unit, COLOUR)

    def matrix(self, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        """[3, 3] from the frame of the view to that of the stored image."""
        matrix = jnp.eye(3)
        for call, source in zip(self.geometry, sources(key, len(self.geometry)), strict=True):
            op = GEOMETRY[call.name]
            step = op.apply(op.draw(source, call.args, shape), None, call.args)
            matrix = jnp.matmul(matrix, step, precision=jax.lax.Precision.HIGHEST)
        return matrix

    def _sampler(self) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
        turned = any(call.name == "rotate" for call in self.geometry)
        if jax.default_backend() == "tpu" and not turned:
            return sample_separable
        return sample_bilinear

    def _values(self, key: jax.Array, value: jax.Array, ops: Mapping[str, Op]) -> jax.Array:
        calls = [call for call in self.calls if call.name in ops]
        width = max(16, 1 + self.channels if self.kind == "image" else 1)
        every = sources(jax.random.fold_in(key, VALUES), len(calls), width)
        for call, source in zip(calls, every, strict=True):
            op = ops[call.name]
            value = op.apply(op.draw(source, call.args, value.shape), value, call.args)
        return value

    def _check(self, images: jax.Array) -> None:
        wanted = 2 if self.kind == "vector" else 4
        shape = "[rows, length]" if wanted == 2 else f"[rows, height, width, {self.channels}]"
        if images.ndim != wanted or (wanted == 4 and images.shape[-1] != self.channels):
            raise ViewError(f"the view '{self}' takes an array {shape}, not {list(images.shape)}")
        if self.kind == "grid":
            self._check_grid(images)
            return
        whole = jnp.issubdtype(images.dtype, jnp.integer)
        allowed = str(images.dtype) in WHITE or self.kind != "image" or not whole
        if not allowed or (self.kind == "map" and not whole):
            dtypes = "integers" if self.kind == "map" else "uint8, uint16 or floating point"
            raise ViewError(f"the view '{self}' takes {dtypes}, not {images.dtype}")

    def _check_grid(self, grids: jax.Array) -> None:
        if self.size is None or min(grids.shape[1:3]) < self.size or not jnp.issubdtype(grids.dtype, jnp.floating):
            raise ViewError(
                f"the view '{self}' takes floating point grids of {self.size} x {self.size} cells or more, "
                f"not {grids.dtype} {list(grids.shape)}"
            )


def row_keys(key: jax.Array, images: jax.Array, rows: jax.Array | None) -> jax.Array:
    rows = jnp.arange(images.shape[0]) if rows is None else rows
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


def parse(
    spec: str,
    *,
    size: int | None = None,
    kind: str = "image",
    channels: int = 3,
    mean: Statistic = None,
    std: Statistic = None,
) -> View:
    """A view, or a ViewError (a ValueError) that points at the fault.

    `size` is the side of the result in pixels where the spec has no size(n), which may stand anywhere in it; `mean` and
    `std`, of values in [0, 1], are those of a `normalise` without arguments (absent: ImageNet's, for three channels).
    """
    if kind not in KINDS:
        raise ViewError(f"kind is one of {', '.join(KINDS)}, not '{kind}'{nearest(kind, list(KINDS))}")
    others = {name: table for name, table in KINDS.items() if name != kind}
    written = read(spec, KINDS[kind], kind=kind, others=others)
    calls = [call for call in written if call.name != "size"]
    stages = [KINDS[kind][call.name].stage for call in calls]
    for call, stage, before in zip(calls[1:], stages[1:], stages, strict=False):
        if STAGES.index(stage) < STAGES.index(before):
            raise ViewError(
                f"'{call.name}' (position {call.position} of '{spec}') is of stage {stage} and cannot follow {before}; "
                f"the order is {', '.join(STAGES)}: geometric ops are one resampling and so come first"
            )
    for name in ONCE:
        if sum(call.name == name for call in written) > 1:
            raise ViewError(f"'{name}' can be given once in a view: '{spec}'")
    if kind == "map" and "encode" not in stages:
        raise ViewError(f"a view of a label map ends in one or more of {', '.join(MAP)}; '{spec}' has none")
    if kind == "grid":
        calls = _with_cells(calls, written, size, spec)
    elif kind != "vector":
        sizes = [call for call in written if call.name == "size"]
        if not sizes and size is None:
            raise ViewError(f"the view '{spec}' has no size: give size= or add |size(pixels)")
        calls.insert(sum(stage == "geometry" for stage in stages), sizes[0] if sizes else _size_call(size))
    calls = [_with_statistics(call, channels, kind, mean, std) if call.name == "normalise" else call for call in calls]
    for call in calls:
        _check_channels(call, KINDS[kind][call.name], kind, channels)
    return View(tuple(calls), kind, channels)


def _with_cells(calls: list[Call], written: Sequence[Call], size: int | None, spec: str) -> list[Call]:
    """The calls of a grid, of which the first says how many cells it keeps."""
    if not calls or calls[0].name not in CUTS or any(call.name in CUTS for call in calls[1:]):
        raise ViewError(f"a view of a grid begins with {' or '.join(CUTS)}, and has one of them; '{spec}' does not")
    own = calls[0].args["cells"]
    asked = next((call.args["pixels"] for call in written if call.name == "size"), None)
    if own is not None and asked is not None and own != asked:
        raise ViewError(f"'{spec}' keeps {own:g} cells and is of size {asked:g}: say it once")
    cells = next((n for n in (own, asked, size) if n is not None), None)
    if cells is None:
        raise ViewError(f"the view '{spec}' has no size: give size=, or write {calls[0].name}(cells)")
    return [replace(calls[0], values=tuple((calls[0].args | {"cells": float(cells)}).items())), *calls[1:]]


def _size_call(size: int | None) -> Call:
    return read(f"size({size})", GEOMETRY, kind="image", others={})[0]


def _with_statistics(call: Call, channels: int, kind: str, mean: Statistic, std: Statistic) -> Call:
    if call.args["mean"] is not None:
        return call
    if mean is None and std is None and kind == "image" and channels == 3:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    if mean is None or std is None:
        raise ViewError(
            f"'normalise' of {channels} channels needs mean and std: of the data set, or written as normalise(.5,.25), "
            "one number for all channels or one each joined by '-'"
        )
    values = {name: tuple(map(float, np.atleast_1d(value))) for name, value in (("mean", mean), ("std", std))}
    if not all(np.isfinite(v).all() for v in values.values()) or min(values["std"]) <= 0:
        raise ViewError(f"'normalise' needs a finite mean and a std above 0, not {mean} and {std}")
    return replace(call, values=tuple(values.items()))


def _check_channels(call: Call, op: Op, kind: str, channels: int) -> None:
    if op.channels is not None and op.channels != channels:
        raise ViewError(f"'{call.name}' is for {op.channels} channels (RGB); this view has {channels}")
    if (op.stage == "encode" or call.name == "only") and kind != "vector" and call.args["channel"] >= channels:
        what = "a map" if kind == "map" else "an image"
        raise ViewError(f"'{call.name}' reads channel {call.args['channel']:g} of {what} that has {channels}")
    for name, value in call.values:
        if isinstance(value, tuple) and len(value) not in (1, channels) and kind == "image":
            raise ViewError(
                f"'{call.name}': {name} has {len(value)} values for {channels} channels; give 1 or {channels}"
            )


@dataclass(frozen=True)
class Views:
    """Several views of one image, (count, view) each; equal views are one program. Made by parse_many()."""

    parts: tuple[tuple[int, View], ...]

    def __len__(self) -> int:
        return sum(count for count, _ in self.parts)

    def __str__(self) -> str:
        return "; ".join(f"{count}*{view}" if count > 1 else str(view) for count, view in self.parts)

    def each(self) -> list[View]:
        return [view for count, view in self.parts for _ in range(count)]

    def __call__(
        self, key: jax.Array, images: jax.Array, *, rows: jax.Array | None = None, geometry: jax.Array | None = None
    ) -> list[jax.Array]:
        """One [B, size, size, C] a view; the number of a view is folded into its keys."""
        out: list[jax.Array] = []
        fold = jax.vmap(jax.random.fold_in, (None, 0))
        for count, view in self.parts:
            numbers = jnp.arange(len(out), len(out) + count)
            keys = [row_keys_of(fold(k, numbers), images, rows) for k in (key, key if geometry is None else geometry)]
            if count == 1:
                out.append(view.apply_rows(keys[0][0], keys[1][0], images))
            else:
                out += list(jax.vmap(view.apply_rows, (0, 0, None))(keys[0], keys[1], images))
        return out


def row_keys_of(keys: jax.Array, images: jax.Array, rows: jax.Array | None) -> jax.Array:
    return jax.vmap(lambda key: row_keys(key, images, rows))(keys)


def parse_many(text: str, **options: Any) -> Views:
    """'2*crop(.4,1)|flip; 8*crop(.05,.4)|flip|size(96)'; the options are those of parse."""
    parts = []
    for part in text.split(";"):
        match = re.match(r"\s*(\d+)\s*\*(.*)\Z", part, re.DOTALL)
        count, spec = (int(match[1]), match[2]) if match else (1, part)
        if not 1 <= count <= 256:
            raise ViewError(f"a view is taken 1 to 256 times, not {count}: '{part.strip()}'")
        parts.append((count, parse(spec.strip(), **options)))
    return Views(tuple(parts))


@dataclass(frozen=True)
class Modality:
    """What plan() must know of an entry of the batch."""

    kind: str = "image"
    channels: int = 3
    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """The views of every modality of a batch; with paired geometry, view i of all of them looks at the same place."""

    views: tuple[tuple[str, Views], ...]
    paired: bool

    def __call__(
        self, key: jax.Array, batch: Mapping[str, jax.Array], *, rows: jax.Array | None = None
    ) -> dict[str, list[jax.Array]]:
        shared = fold_name(key, "geometry") if self.paired else None
        return {
            name: views(fold_name(key, f"view of {name}"), batch[name], rows=rows, geometry=shared)
            for name, views in self.views
        }


def fold_name(key: jax.Array, name: str) -> jax.Array:
    """A key by name, not by position: another modality beside it changes nothing."""
    return jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))


def plan(specs: Mapping[str, str], modalities: Mapping[str, Modality], *, paired_geometry: bool = True) -> Plan:
    """Views for the named modalities of a batch; a fault names the modality."""
    parsed = {}
    for name, spec in specs.items():
        if name not in modalities:
            raise ViewError(
                f"views are given for '{name}', which is none of {', '.join(modalities)}{nearest(name, modalities)}"
            )
        of = modalities[name]
        try:
            parsed[name] = parse_many(spec, size=of.size, kind=of.kind, channels=of.channels, mean=of.mean, std=of.std)
        except ViewError as error:
            raise ViewError(f"views of '{name}': {error}") from None
    if paired_geometry:
        _check_paired(parsed)
    return Plan(tuple(parsed.items()), paired_geometry)


def _check_paired(parsed: Mapping[str, Views]) -> None:
    seen: dict[int, tuple[str, View]] = {}
    for name, views in parsed.items():
        for i, view in enumerate(views.each()):
            if view.kind in ("vector", "grid"):  # partners of a grid are vectors
                continue
            other, first = seen.setdefault(i, (name, view))
            if first.geometry != view.geometry:
                raise ViewError(
                    f"paired geometry needs the same geometric ops in view {i} of all modalities; '{other}' has "
                    f"'{canonical(first.geometry)}' and '{name}' has '{canonical(view.geometry)}'. Make them the same, "
                    "or set paired_geometry to false"
                )
