"""A picture of what the network will see: one row an example, the stored pixels first and then every view."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from input_pipeline.show import Axes
from mfl_jax import data
from mfl_jax.config import Reading
from mfl_jax.methods import towers
from mfl_jax.views import Modality, Plan, View, plan
from mfl_jax.views.partners import MAP

CELL, GAP, HEADER = 128, 6, 30
COLOURS = np.array(  # of channels shown together; the first three are red, green and blue
    [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0.5, 0], [0.5, 0, 1]], np.float32
)


def of_config(config: ConfigDict, path: Path, *, rows: int = 8, seed: int = 0) -> Path:
    """The first tiles that a training with this config and seed reads, and its views of them."""
    if path.suffix != ".png":
        raise ValueError(f"a contact sheet is a .png, not {str(path)!r}")
    if rows < 1:
        raise ValueError(f"a contact sheet has at least one row, not {rows}")
    config = ConfigDict(config.to_dict())
    config.data.batch = rows
    reading = Reading(config)
    facts = data.facts(reading.data)
    names = [name for name in facts.modalities if name in reading.views]
    cropped = "local" in reading.views
    views = towers.crop_plan(reading, facts) if cropped else towers.view_plan(reading, facts, *names)
    stream = data.source(reading.data, seed)(0, None)
    try:
        batch = next(iter(data.checked(stream, facts, rows)))
    finally:
        getattr(stream, "close", lambda: None)()
    batch |= {"local": batch["he"]} if cropped else {}
    return draw(views, batch, path, rows=rows, seed=seed)


def draw(
    specs: Plan | Mapping[str, str],
    batch: Mapping[str, np.ndarray],
    path: str | os.PathLike,
    *,
    modalities: Mapping[str, Modality] | None = None,
    rows: int = 8,
    seed: int = 0,
) -> Path:
    """Write the contact sheet as PNG. A mapping of specs needs `modalities`, as plan() does; a Plan needs nothing."""
    views = specs if isinstance(specs, Plan) else plan(specs, modalities or {})
    stored = {name: np.asarray(batch[name])[:rows] for name, _ in views.views}
    seen = jax.jit(views)(jax.random.key(seed), stored)
    if any(view.kind == "grid" for _, of in views.views for view in of.each()):
        stored, seen, batch = _coloured(stored, seen, batch)
    columns: list[tuple[str, list[np.ndarray]]] = []
    for name, of in views.views:
        each = of.each()
        if name != "local":  # small crops of what stands there already
            columns.append((f"{name}, stored", [picture(pixels, None, each[0]) for pixels in stored[name]]))
        for i, (view, pixels) in enumerate(zip(each, seen[name], strict=True)):
            shown = [picture(undo_normalise(p, view), view, view) for p in np.asarray(pixels)]
            side = f"{view.size} px" if view.size else f"length {pixels.shape[-1]}"
            columns.append((f"{name}, view {i}\n{side}", shown))
    for name in [name for name in ("near_he", "far_he") if name in batch]:
        pixels, there = (np.asarray(batch[entry])[:rows] for entry in (name, name.replace("_he", "_mask")))
        drawn = [p if seen else np.full_like(p, 200) for p, seen in zip(pixels, there, strict=True)]
        columns.append((f"{name}, stored", drawn))
    return _write(columns, Path(path))


def _coloured(
    stored: Mapping[str, np.ndarray], seen: Mapping[str, list], batch: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Grids of tile features as pictures, all by the same axes: those of the stored ones."""
    axes = Axes.of(next(grids for grids in stored.values() if grids.ndim == 4))

    def drawn(grids: Any) -> Any:
        return axes.colours(np.asarray(grids)) if np.ndim(grids) == 4 else grids

    views = {name: [drawn(view) for view in of] for name, of in seen.items()}
    return {n: drawn(g) for n, g in stored.items()}, views, {n: drawn(g) for n, g in batch.items()}


def _write(columns: list[tuple[str, list[np.ndarray]]], path: Path) -> Path:
    height = HEADER + len(columns[0][1]) * (CELL + GAP) + GAP
    sheet = Image.new("RGB", (len(columns) * (CELL + GAP) + GAP, height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (title, pictures) in enumerate(columns):
        left = GAP + i * (CELL + GAP)
        pen.multiline_text((left, 2), title, fill="black", spacing=1)
        for j, array in enumerate(pictures):
            cell = Image.fromarray(array).resize((CELL, CELL), Image.Resampling.NEAREST)
            sheet.paste(cell, (left, HEADER + j * (CELL + GAP)))
    temporary = path.with_name(f".{path.name}.part")
    sheet.save(temporary, format="PNG")
    os.replace(temporary, path)
    return path


def undo_normalise(value: np.ndarray, view: View) -> np.ndarray:
    for call in view.calls:
        if call.name == "normalise":
            value = value * np.asarray(call.args["std"], np.float32) + np.asarray(call.args["mean"], np.float32)
    return value


def picture(value: np.ndarray, seen: View | None, view: View) -> np.ndarray:
    """uint8 RGB of a stored value (seen=None) or of what a view made of it."""
    if view.kind == "vector":
        return bars(value)
    if view.kind == "grid":  # coloured already
        return value
    encoded = seen is not None
    if view.kind == "map":
        names = [call.name for call in view.calls if call.name in MAP]
        if not encoded:
            return palette(value[..., 0].astype(np.int64))
        if names[0] == "onehot":
            classes = int(view.calls[-len(names)].args["classes"])
            shown = palette(value[..., :classes].argmax(-1))
            return np.where(value[..., -1:] > 0, np.uint8(255), shown) if names[-1] == "boundary" else shown
        return false_colour(_stretch(value))
    if not encoded:
        value = value.astype(np.float32) / 255 if value.dtype == np.uint8 else _stretch(value)
    return false_colour(value)


def _stretch(value: np.ndarray) -> np.ndarray:
    value = value.astype(np.float32)
    low, high = value.min((0, 1)), value.max((0, 1))
    return (value - low) / np.where(high > low, high - low, 1.0)


def false_colour(value: np.ndarray) -> np.ndarray:
    """[h, w, C] in [0, 1]: grey, RGB, or a sum of colours; channels beyond the eighth start again."""
    channels = value.shape[-1]
    colours = np.ones((1, 3), np.float32) if channels == 1 else COLOURS[np.arange(channels) % len(COLOURS)]
    return (np.clip(value @ colours, 0, 1) * 255 + 0.5).astype(np.uint8)


def palette(labels: np.ndarray) -> np.ndarray:
    """Background black; the colour of any other label comes from its number alone."""
    hashed = (labels[..., None] * np.array([2654435761, 2246822519, 3266489917])) >> 8
    return np.where(labels[..., None] > 0, 64 + hashed % 192, 0).astype(np.uint8)


def bars(vector: np.ndarray) -> np.ndarray:
    """One column an entry (or a mean over neighbours), from the smallest to the largest value."""
    groups = np.array_split(np.asarray(vector, np.float64), min(CELL, len(vector)))
    level = np.array([group.mean() for group in groups])
    low, span = min(level.min(), 0.0), max(np.ptp(np.append(level, 0.0)), 1e-12)
    filled = np.linspace(1, 0, CELL)[:, None] <= (level - low)[None] / span
    return np.where(filled[..., None], np.array([40, 80, 160]), 255).astype(np.uint8)
