"""Slides drawn from what is known of their tiles: one cell a tile, coloured by class, with a legend; beside the slide
and over it, where there is a picture of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from input_pipeline.slides.reader import open_slide

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
LONGEST, LEAST, LARGEST, SEEN = 1000, 4, 24, 64  # px: of a slide's longer side, and of a cell; where tissue is seen
EDGE, LINE, FONT, KEY = 12, 24, 15, 18
PAPER, INK, NOTHING = (255, 255, 255), (34, 34, 34), (238, 238, 238)
COVER, BLOCK = 0.55, 256  # of a colour over the slide; tiles that are read at a time


@dataclass(frozen=True)
class Backdrop:
    """A picture of a slide, uint8 RGB; its corner lies at `origin`, and `scale` px of it measure one unit of places."""

    image: np.ndarray
    origin: tuple[float, float]
    scale: float


def of_slide(path: Path, mpp: float | None = None, unit: str = "px") -> Backdrop | None:
    """From the slide's file, for places in level-0 px or, with unit='um', in um: None where um per px are not known
    then, neither by the file nor as `mpp`."""
    with open_slide(path, mpp=mpp) as slide:
        size = 1.0 if unit == "px" else slide.mpp
        image = slide.thumbnail(LONGEST)[..., :3]
        longest = max(slide.width, slide.height)
        return None if size is None else Backdrop(image, (0.0, 0.0), max(image.shape[:2]) / (longest * size))


def of_tiles(corners: np.ndarray, side: float, pictures: Callable[[Sequence[int]], list]) -> Backdrop:
    """From its tiles, each made as small as a cell of the map; `pictures` gives those of some rows of `corners`."""
    low, high = corners.min(0), corners.max(0)
    cell = _cell_px(((high - low) / side).max() + 1, largest=SEEN)
    wide, tall = (int(np.ceil(e * cell)) for e in (high - low) / side + 1)
    canvas = Image.new("RGB", (wide, tall), PAPER)
    for start in range(0, len(corners), BLOCK):
        rows = range(start, min(start + BLOCK, len(corners)))
        places = np.rint((corners[rows] - low) / side * cell).astype(int).tolist()
        for (x, y), tile in zip(places, pictures(rows), strict=True):
            if tile is not None:
                canvas.paste(Image.fromarray(tile).resize((cell, cell), Image.Resampling.BOX), (x, y))
    return Backdrop(np.asarray(canvas), (float(low[0]), float(low[1])), cell / side)


def _cell_px(across: float, least: int = LEAST, largest: int = LARGEST) -> int:
    return int(np.clip(LONGEST / across, least, largest))


def class_map(
    corners: np.ndarray,
    side: float,
    codes: np.ndarray,
    names: Sequence[str],
    title: str = "",
    under: Backdrop | None = None,
) -> np.ndarray:
    """uint8 RGB. corners [N, 2] and `side` of tiles in one unit; codes [N] are places in `names`, -1 draws nothing.
    With a backdrop two pictures: it alone, and the colours over it."""
    if len(names) > MOST:
        raise ValueError(f"a map tells {MOST} classes apart, not {len(names)}")
    if not (np.isfinite(corners).all() and side > 0):
        raise ValueError("a map needs the corners of all tiles, and their side")
    if under is None:
        low, extent = corners.min(0), np.ptp(corners, axis=0) / side + 1
    else:
        low, extent = np.array(under.origin), np.array(under.image.shape[1::-1]) / under.scale / side
    cell = _cell_px(extent.max(), 8 if len(names) > len(COLOURS) else LEAST, LARGEST if under is None else SEEN)
    wide, tall = (int(np.ceil(e * cell)) for e in extent)
    drawn, cover = Image.new("RGB", (wide, tall), NOTHING), Image.new("L", (wide, tall))
    pen, mask = ImageDraw.Draw(drawn), ImageDraw.Draw(cover)
    for (x, y), code in zip(np.rint((corners - low) / side * cell).astype(int).tolist(), codes.tolist(), strict=True):
        if code >= 0:
            _cell(pen, x, y, cell, code)
            mask.rectangle((x, y, x + cell - 1, y + cell - 1), fill=round(255 * COVER))
    panels = [drawn]
    if under is not None:
        slide = Image.fromarray(under.image).resize((wide, tall))
        panels = [slide, Image.composite(drawn, slide, cover)]
    return _with_legend(panels, names, title)


def _with_legend(panels: Sequence[Image.Image], names: Sequence[str], title: str) -> np.ndarray:
    font = ImageFont.load_default(size=FONT)
    legend = KEY + 8 + max(int(font.getlength(name)) for name in names)
    top = EDGE + (LINE if title else 0)
    left = EDGE + sum(panel.width + EDGE for panel in panels)
    size = (
        max(left + legend + EDGE, 2 * EDGE + int(font.getlength(title))),
        max(top + panels[0].height, top + LINE * len(names)) + EDGE,
    )
    canvas = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((EDGE, 6), title, fill=INK, font=font)
    at = EDGE
    for panel in panels:
        canvas.paste(panel, (at, top))
        at += panel.width + EDGE
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
