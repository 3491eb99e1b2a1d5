"""Where a head looks: scores of tiles over the slide as PNG and as QuPath detections, and the tiles at both ends."""

from pathlib import Path

import numpy as np
from PIL import Image

from input_pipeline.files import save_picture
from input_pipeline.slides.reader import SlideError, open_slide
from mfl_jax.bags import Bags
from mfl_jax.interop.geojson import slide_origin, write_tiles
from mfl_jax.report.pictures import HEAT, SIDE, overlay, sheet

LONGEST, TILES, BANDS = 900, 8, 5


def ranks(scores: np.ndarray) -> np.ndarray:
    """[N] in [0, 1], the share of other tiles with a lower score; equal scores share one."""
    low = np.searchsorted(np.sort(scores), scores, "left")
    high = np.searchsorted(np.sort(scores), scores, "right")
    return (low + high - 1) / 2 / max(len(scores) - 1, 1)


def heat(coords: np.ndarray, side: float, level: np.ndarray, width: float, height: float, scale: float) -> np.ndarray:
    """float [h, w] of `level` in [0, 1] on a canvas of width x height level-0 px at `scale`; nan where no tile lies."""
    canvas = np.full((max(1, round(height * scale)), max(1, round(width * scale))), np.nan)
    for (x, y), value in zip(coords, level, strict=True):
        x0, y0, x1, y1 = (round(v * scale) for v in (x, y, x + side, y + side))
        canvas[max(y0, 0) : max(y1, y0 + 1), max(x0, 0) : max(x1, x0 + 1)] = value
    return canvas


def coloured(canvas: np.ndarray) -> np.ndarray:
    """uint8 RGB, white where nothing is known."""
    stops = np.linspace(0, 1, len(HEAT))
    rgb = np.stack([np.interp(np.nan_to_num(canvas), stops, HEAT[:, c]) for c in range(3)], -1)
    return np.where(np.isnan(canvas)[..., None], 255, rgb + 0.5).astype(np.uint8)


def map_picture(coords: np.ndarray, side: float, scores: np.ndarray, slide: Path | None) -> np.ndarray:
    """Ranks of the scores in colour: over the slide in grey where there is one, over white else."""
    level = ranks(scores)
    if slide is None:
        corner = coords.min(0)
        width, height = coords.max(0) - corner + side
        return coloured(heat(coords - corner, side, level, width, height, LONGEST / max(width, height)))
    with open_slide(slide) as opened:
        thumbnail = opened.thumbnail(LONGEST)[..., :3]
        width, height = opened.width, opened.height
    canvas = heat(coords, side, level, width, height, thumbnail.shape[1] / width)[: thumbnail.shape[0]]
    canvas = np.pad(canvas, ((0, thumbnail.shape[0] - len(canvas)), (0, 0)), constant_values=np.nan)
    mixed = overlay(thumbnail, np.nan_to_num(canvas))
    grey = thumbnail.mean(-1, keepdims=True).repeat(3, -1).astype(np.uint8)
    return np.where(np.isnan(canvas)[..., None], grey, mixed)


def ends_sheet(coords: np.ndarray, side: float, scores: np.ndarray, slide: Path) -> np.ndarray:
    """The tiles of the greatest scores above those of the least, each with its score. `side` is in level-0 px, so that
    what a px measures does not matter and need not be known."""
    order = np.argsort(-scores, kind="stable")
    count = min(TILES, max(1, len(order) // 2))
    rows, captions = [], []
    with open_slide(slide, mpp=1.0) as opened:
        mpp = side / SIDE
        for picked in (order[:count], order[::-1][:count]):
            rows.append(
                [opened.read_region(float(coords[i, 0]), float(coords[i, 1]), SIDE, SIDE, mpp)[..., :3] for i in picked]
            )
            captions.append([f"{scores[i]:.3g}" for i in picked])
    return sheet(rows, captions=captions)


def write_maps(
    folder: Path, bags: Bags, row: int, scores: np.ndarray, slide: Path | None, *, origin: str = "image"
) -> tuple[dict[str, np.ndarray], list[str]]:
    """<slide>.png, <slide>.geojson and <slide>_tiles.png; the pictures by kind, and notes on what could not be made."""
    name, coords, side = bags.slides[row], bags.coords[bags.rows(row)], float(bags.tile[row])
    found: dict[str, np.ndarray] = {}
    notes = []
    if not len(coords) or not np.isfinite(coords).all():
        return found, [f"{name}: no map: {'no tile' if not len(coords) else 'coordinates are not known'}"]
    known = np.isfinite(side)
    slide = slide if known else None
    apart = np.diff(np.unique(coords[:, 0]))
    drawn = side if known else float(apart.min()) if len(apart) else 1.0
    if slide is not None and not slide.is_file():
        notes.append(f"{name}: the map is without the slide, which is not at {slide}")
        slide = None
    found["map"] = map_picture(coords, drawn, scores, slide)
    save_picture(folder / f"{name}.png", found["map"])
    if not known:
        return found, [
            *notes,
            f"{name}: no GeoJSON: the side of a tile in level-0 px is not known (for um, give --mpp)",
        ]
    corner = slide_origin(slide, origin) if slide is not None else (0.0, 0.0)
    if slide is None and origin != "image":
        notes.append(f"{name}: positions count from the image's corner: its bounds are not known without the slide")
    band = np.minimum((ranks(scores) * BANDS).astype(int), BANDS - 1)
    classes = [f"fifth {b + 1}" for b in band]
    colours = {f"fifth {b + 1}": (int(r), int(g), int(blue)) for b, (r, g, blue) in enumerate(HEAT)}
    measured = {"score": scores, "rank": ranks(scores)}
    path = folder / f"{name}.geojson"
    write_tiles(path, coords, side, measured, classes=classes, colours=colours, name=name, origin=corner)
    if slide is None:
        return found, [*notes, f"{name}: no sheet of tiles: the table has no slide (a column he)"]
    try:
        found["tiles"] = ends_sheet(coords, side, scores, slide)
        save_picture(folder / f"{name}_tiles.png", found["tiles"])
    except SlideError as error:
        notes.append(f"{name}: no sheet of tiles: {error}")
    return found, notes


def shrunk(picture: np.ndarray, longest: int = 480) -> np.ndarray:
    image = Image.fromarray(picture)
    image.thumbnail((longest, longest))
    return np.asarray(image)
