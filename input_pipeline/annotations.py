"""What is known of places on a slide (cells, regions, spots), turned into columns or vectors of its tiles."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from input_pipeline.slides.reader import open_slide
from input_pipeline.table import open_table

MAP_PIXELS = 64_000_000
CHUNK = 50_000  # fields that are in memory as text at a time
SPOT_PLACE = ("x_um", "y_um")


def cell_columns(path: Path, corner_um: np.ndarray, side_um: float) -> dict[str, np.ndarray]:
    """`cells`, how many have their centre in the tile, and `positive`, the share that is, of those of which it is known
    (nan where of none; an empty field or nan is not known).

    A cell on a border belongs to the right and lower tile, so each is counted once on a grid without overlap.
    """
    table = read_table(path, ("x_um", "y_um"), optional=("positive",))
    order = np.argsort(table["y_um"], kind="stable")
    x, y = table["x_um"][order], table["y_um"][order]
    positive = table["positive"][order] if "positive" in table else np.full(len(x), np.nan)
    if ((positive < 0) | (positive > 1)).any():
        raise ValueError(
            f"{path}: positive is 0 to 1, or empty, but there are {np.nanmin(positive)} to {np.nanmax(positive)}"
        )
    known = ~np.isnan(positive)
    count, share = np.zeros(len(corner_um), np.int64), np.full(len(corner_um), np.nan)
    for row_y in np.unique(corner_um[:, 1]):
        tiles = np.flatnonzero(corner_um[:, 1] == row_y)
        low, high = np.searchsorted(y, (row_y, row_y + side_um))
        by_x = low + np.argsort(x[low:high], kind="stable")
        first = np.searchsorted(x[by_x], corner_um[tiles, 0])
        last = np.searchsorted(x[by_x], corner_um[tiles, 0] + side_um)
        summed, told = (np.concatenate([[0.0], np.cumsum(v[by_x])]) for v in (np.where(known, positive, 0.0), known))
        count[tiles] = last - first
        with np.errstate(invalid="ignore"):
            share[tiles] = (summed[last] - summed[first]) / (told[last] - told[first])
    return {"cells": count, "positive": share}


def region_columns(path: Path, corner_um: np.ndarray, side_um: float) -> dict[str, np.ndarray]:
    """`region`, the commonest value of a label map under the tile, and `region_share`, its share of the tile."""
    with open_slide(path) as slide:
        if slide.mpp is None:
            raise ValueError(f"{path}: um per pixel unknown: {slide.mpp_reason}")
        if slide.channels != 1 or slide.dtype.kind not in "iu":
            raise ValueError(
                f"{path}: a region map is one channel of whole numbers, not {slide.channels} of {slide.dtype}"
            )
        if slide.width * slide.height > MAP_PIXELS:
            raise ValueError(
                f"{path}: {slide.width} x {slide.height} px is more than a region map needs; make it coarser"
            )
        labels, mpp = slide.read_native(0, 0, 0, slide.width, slide.height)[..., 0], slide.mpp
    region, share = np.zeros(len(corner_um), np.int64), np.zeros(len(corner_um))
    side = max(1, round(side_um / mpp))
    for i, (left, top) in enumerate(np.round(corner_um / mpp).astype(int)):
        left, top = min(left, labels.shape[1] - 1), min(top, labels.shape[0] - 1)
        values, counts = np.unique(labels[top : top + side, left : left + side], return_counts=True)
        region[i], share[i] = values[counts.argmax()], counts.max() / counts.sum()
    return {"region": region, "region_share": share}


def spot_genes(path: Path) -> tuple[str, ...]:
    """Columns of a table of spots that hold numbers, places aside; reads the header and the first row only."""
    with open_table(path, SPOT_PLACE) as (header, rows):
        _, first = next(rows, (0, []))
    genes = [n for n, v in zip(header, first, strict=False) if n not in SPOT_PLACE and _is_number(v)]
    if not genes:
        raise ValueError(f"{path} has no column of numbers beside {' and '.join(SPOT_PLACE)}")
    return tuple(genes)


class SpotTable:
    """Counts of genes at places on a slide, in memory once; the vector of a tile is made when it is asked for."""

    def __init__(self, path: Path, genes: Sequence[str]):
        table = read_table(path, (*SPOT_PLACE, *genes), dtype=np.float32, wide=SPOT_PLACE)
        order = np.argsort(table["y_um"], kind="stable")
        self._x, self._y = table.pop("x_um")[order], table.pop("y_um")[order]
        self._counts = np.empty((len(order), len(genes)), np.float32)
        for i, gene in enumerate(genes):
            self._counts[:, i] = table[gene][order]
        if (self._counts < 0).any():
            raise ValueError(f"{path}: counts are not negative, but the least is {self._counts.min()}")

    def vector(self, corner_um: np.ndarray, side_um: float) -> np.ndarray | None:
        """float32 [genes]: the sum over spots whose centre lies in the tile; None where there is none. A spot on a
        border belongs to the right and lower tile."""
        left, top = corner_um
        low, high = np.searchsorted(self._y, (top, top + side_um))
        inside = (self._x[low:high] >= left) & (self._x[low:high] < left + side_um)
        if not inside.any():
            return None
        return self._counts[low:high][inside].sum(axis=0, dtype=np.float64).astype(np.float32)


def read_table(
    path: Path,
    required: Sequence[str],
    *,
    optional: Sequence[str] = (),
    dtype: type[np.floating] = np.float64,
    wide: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Columns of numbers as `dtype` (`wide` ones float64); required ones are finite everywhere, an optional one that is
    there may be empty in places, which is nan. Little more than these numbers is ever in memory."""
    with open_table(path, required) as (header, rows):
        place = {name: i for i, name in enumerate(header)}
        names = [*dict.fromkeys(required), *(n for n in optional if n in place)]
        types = {n: np.float64 if n in wide else dtype for n in names}
        parts: dict[str, list[np.ndarray]] = {n: [np.zeros(0, types[n])] for n in names}
        while chunk := list(islice(rows, max(1, CHUNK // len(header)))):
            for name in names:
                texts = [row[place[name]] for _, row in chunk]
                values = _numbers(path, name, chunk[0][0], texts, empty=name in optional)
                if name in required and not np.isfinite(values).all():
                    raise ValueError(f"{path}: column {name!r} holds values that are not finite")
                parts[name].append(values.astype(types[name]))
    return {name: np.concatenate(parts.pop(name)) for name in names}


def _numbers(path: Path, name: str, first_row: int, texts: list[str], *, empty: bool) -> np.ndarray:
    try:
        return np.array([t if t.strip() else "nan" for t in texts] if empty else texts, np.float64)
    except ValueError as error:
        raise ValueError(
            f"{path}: column {name!r} holds something that is no number, in row {first_row} or later: {error}"
        ) from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
