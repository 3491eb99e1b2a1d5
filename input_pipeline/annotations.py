"""What is known of places on a slide (cells, regions), turned into columns of its tiles."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from input_pipeline.slides.reader import open_slide

MAP_PIXELS = 64_000_000
SPOT_PLACE = ("x_um", "y_um")


def cell_columns(path: Path, corner_um: np.ndarray, side_um: float) -> dict[str, np.ndarray]:
    """`cells`, how many have their centre in the tile, and `positive`, the share of them that is (nan where none are).

    A cell on a border belongs to the right and lower tile, so each is counted once on a grid without overlap.
    """
    table = read_table(path, ("x_um", "y_um"), optional=("positive",))
    order = np.argsort(table["y_um"], kind="stable")
    x, y = table["x_um"][order], table["y_um"][order]
    positive = table["positive"][order] if "positive" in table else np.full(len(x), np.nan)
    count, share = np.zeros(len(corner_um), np.int64), np.full(len(corner_um), np.nan)
    for row_y in np.unique(corner_um[:, 1]):
        tiles = np.flatnonzero(corner_um[:, 1] == row_y)
        low, high = np.searchsorted(y, (row_y, row_y + side_um))
        by_x = np.argsort(x[low:high], kind="stable")
        across = x[low:high][by_x]
        summed = np.concatenate([[0.0], np.cumsum(positive[low:high][by_x])])
        first = np.searchsorted(across, corner_um[tiles, 0])
        last = np.searchsorted(across, corner_um[tiles, 0] + side_um)
        count[tiles] = last - first
        with np.errstate(invalid="ignore"):
            share[tiles] = (summed[last] - summed[first]) / (last - first)
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
    """Columns of a table of spots that hold numbers, places aside; reads the first two lines only."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, delimiter=_delimiter(path))
        header, first = next(rows, []), next(rows, [])
    genes = [n for n, v in zip(header, first, strict=False) if n not in SPOT_PLACE and _is_number(v)]
    if not genes:
        raise ValueError(f"{path} has no column of numbers beside {' and '.join(SPOT_PLACE)}")
    return tuple(genes)


def spot_vectors(path: Path, corner_um: np.ndarray, side_um: float, genes: Sequence[str]) -> np.ndarray:
    """float32 [tiles, genes]: counts of the spots whose centre lies in the tile, summed; nan where there is none."""
    table = read_table(path, (*SPOT_PLACE, *genes))
    counts = np.stack([table[g] for g in genes], axis=1)
    if (counts < 0).any():
        raise ValueError(f"{path}: counts are not negative, but the least is {counts.min()}")
    spots = np.stack([table[name] for name in SPOT_PLACE], axis=1)
    vectors = np.full((len(corner_um), len(genes)), np.nan, np.float32)
    for i, corner in enumerate(corner_um):
        inside = ((spots >= corner) & (spots < corner + side_um)).all(axis=1)
        if inside.any():
            vectors[i] = counts[inside].sum(axis=0)
    return vectors


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def read_table(path: Path, required: Sequence[str], *, optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Columns of numbers of a CSV or TSV as float64; the required ones are finite everywhere."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, delimiter=_delimiter(path))
        header = next(rows, [])
        if missing := [name for name in required if name not in header]:
            raise ValueError(f"{path} lacks the columns {missing[:10]}; it has {header[:20]}")
        body = [row for row in rows if row]
    if ragged := next((i for i, row in enumerate(body, start=2) if len(row) != len(header)), None):
        raise ValueError(f"{path}, row {ragged}: {len(body[ragged - 2])} fields, the header has {len(header)}")
    columns = {}
    for name in dict.fromkeys((*required, *(n for n in optional if n in header))):
        place = header.index(name)
        try:
            columns[name] = np.array([row[place] for row in body], np.float64)
        except ValueError as error:
            raise ValueError(f"{path}: column {name!r} holds something that is no number: {error}") from None
        if name in required and not np.isfinite(columns[name]).all():
            raise ValueError(f"{path}: column {name!r} holds values that are not finite")
    return columns


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
