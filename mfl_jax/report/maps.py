"""Slides drawn from what is known of their tiles: one cell a tile, coloured by class, with a legend."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# after Okabe and Ito; a ninth class and on have the same colours again, with a mark
COLOURS = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
    (0, 0, 0),
)
MARKS = ("", "dot", "bar", "post")
MOST = len(COLOURS) * len(MARKS)  # classes that can be told apart
LONGEST, LEAST, LARGEST = 1000, 4, 24  # px: of a slide's longer side, and of a cell
EDGE, LINE, FONT, KEY = 12, 24, 15, 18
PAPER, INK, NOTHING = (255, 255, 255), (34, 34, 34), (238, 238, 238)


def class_map(corners: np.ndarray, side: float, codes: np.ndarray, names: Sequence[str], title: str = "") -> np.ndarray:
    """uint8 RGB. corners [N, 2] and `side` of tiles in one unit; codes [N] are places in `names`, -1 draws nothing."""
    if len(names) > MOST:
        raise ValueError(f"a map tells {MOST} classes apart, not {len(names)}")
    if not (np.isfinite(corners).all() and side > 0):
        raise ValueError("a map needs the corners of all tiles, and their side")
    low = corners.min(0)
    extent = (corners.max(0) - low) / side + 1
    cell = int(np.clip(LONGEST / extent.max(), 8 if len(names) > len(COLOURS) else LEAST, LARGEST))
    wide, tall = (int(np.ceil(e * cell)) for e in extent)
    font = ImageFont.load_default(size=FONT)
    legend = KEY + 8 + max(int(font.getlength(name)) for name in names)
    top = EDGE + (LINE if title else 0)
    size = (
        max(wide + 3 * EDGE + legend, 2 * EDGE + int(font.getlength(title))),
        max(top + tall, top + LINE * len(names)) + EDGE,
    )
    canvas = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((EDGE, 6), title, fill=INK, font=font)
    pen.rectangle((EDGE, top, EDGE + wide - 1, top + tall - 1), fill=NOTHING)
    places = np.rint((corners - low) / side * cell).astype(int) + np.array([EDGE, top])
    for (x, y), code in zip(places.tolist(), codes.tolist(), strict=True):
        if code >= 0:
            _cell(pen, x, y, cell, code)
    left = wide + 2 * EDGE
    for code, name in enumerate(names):
        _cell(pen, left, top + code * LINE, KEY, code)
        pen.text((left + KEY + 8, top + code * LINE), name, fill=INK, font=font)
    return np.asarray(canvas)


def _cell(pen: ImageDraw.ImageDraw, x: int, y: int, side: int, code: int) -> None:
    pen.rectangle((x, y, x + side - 1, y + side - 1), fill=COLOURS[code % len(COLOURS)])
    mark, third = MARKS[code // len(COLOURS)], side // 3
    across, down = (third if mark in ("dot", "post") else 0), (third if mark in ("dot", "bar") else 0)
    if mark:
        pen.rectangle((x + across, y + down, x + side - 1 - across, y + side - 1 - down), fill=PAPER)
