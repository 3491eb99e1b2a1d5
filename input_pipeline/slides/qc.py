"""One picture a slide: what was taken as tissue, where the tiles lie, which were flagged, and at which resolution."""

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from input_pipeline.slides.tissue import guess_kind

OUTLINE = (0, 190, 230)
KEPT = (0, 150, 70)
FLAGGED = (235, 120, 0)
MAPS = {"pen": (200, 0, 200), "blur": (0, 90, 255)}
OUTLINED_PX = 6


def qc_picture(
    thumbnail: np.ndarray,
    thumbnail_mpp: float,
    mask: np.ndarray,
    mask_mpp: float,
    coords: np.ndarray,
    *,
    mpp0: float,
    size: int,
    mpp: float,
    slide_id: str = "",
    mpp_source: str = "",
    flagged: np.ndarray | None = None,
    flags: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """uint8 [h, w, 3]: the thumbnail with mask outline, tiles (flagged ones in another colour) and a legend below.

    `flags` are bool maps on the mask's pixels ('pen', 'blur'); `flagged` is bool [n] over the tiles.
    """
    coords = np.asarray(coords).reshape(-1, 2)
    flagged = np.zeros(len(coords), bool) if flagged is None else np.asarray(flagged, bool)
    if len(flagged) != len(coords):
        raise ValueError(f"{len(flagged)} tile flags for {len(coords)} tiles")
    picture = as_rgb(thumbnail)
    shape, ratio = picture.shape[:2], thumbnail_mpp / mask_mpp
    for name, area in (flags or {}).items():
        _tint(picture, _resampled(area, shape, ratio), MAPS.get(name, FLAGGED), 0.45)
    outline = _resampled(mask, shape, ratio)
    outline &= ~ndimage.binary_erosion(outline, iterations=1 + max(shape) // 1000, border_value=1)
    picture = _tiles(picture, coords * (mpp0 / thumbnail_mpp), size * mpp / thumbnail_mpp, flagged)
    picture[outline] = OUTLINE
    counts = f"{len(coords)} tiles of {size} px at {mpp:g} um/px ({size * mpp:g} um), {int(flagged.sum())} flagged"
    source = f" ({mpp_source})" if mpp_source else ""
    lines = [slide_id, f"level 0: {mpp0:.4g} um/px{source}; tissue {100 * mask.mean():.1f} %", counts]
    return _legend(picture, lines, [name for name, area in (flags or {}).items() if area.any()])


def as_rgb(image: np.ndarray) -> np.ndarray:
    """A copy to look at: RGB as it is; other channels stretched (1st to 99.8th percentile) and spread over colours."""
    image = np.asarray(image)
    image = image[..., None] if image.ndim == 2 else image
    if guess_kind(image) == "brightfield":
        return image.copy()
    total = np.zeros((*image.shape[:2], 3), np.float32)
    colours = ((0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, 1)) if image.shape[2] > 1 else ((1, 1, 1),)
    for channel in range(image.shape[2]):
        plane = image[..., channel].astype(np.float32)
        low, high = np.percentile(plane, (1, 99.8))
        plane = np.clip((plane - low) / max(high - low, 1e-12), 0, 1)
        total += plane[..., None] * np.asarray(colours[channel % len(colours)], np.float32)
    return (np.clip(total, 0, 1) * 255).round().astype(np.uint8)


def _resampled(area: np.ndarray, shape: tuple[int, ...], ratio: float) -> np.ndarray:
    rows, columns = (
        np.minimum(((np.arange(n) + 0.5) * ratio).astype(np.int64), limit - 1)
        for n, limit in zip(shape, area.shape, strict=True)
    )
    return area[rows[:, None], columns]


def _tint(picture: np.ndarray, where: np.ndarray, colour: tuple[int, int, int], strength: float) -> None:
    mixed = picture[where] * (1 - strength) + np.asarray(colour) * strength
    picture[where] = mixed.round().astype(np.uint8)


def _tiles(picture: np.ndarray, corners: np.ndarray, side: float, flagged: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image, "RGBA")
    fill, line = (60, 255) if side < OUTLINED_PX else (24, 160)
    for (x, y), bad in zip(corners, flagged, strict=True):
        colour = FLAGGED if bad else KEPT
        box = (x, y, max(x + side - 1, x), max(y + side - 1, y))
        draw.rectangle(box, fill=(*colour, fill), outline=(*colour, line) if side >= OUTLINED_PX else None)
    return np.array(image)


def _legend(picture: np.ndarray, lines: list[str], maps: list[str]) -> np.ndarray:
    font = ImageFont.load_default()
    lines = [line.encode("latin-1", "replace").decode("latin-1") for line in lines if line]
    keys = [("kept", KEPT), ("flagged", FLAGGED), ("mask", OUTLINE), *((m, MAPS.get(m, FLAGGED)) for m in maps)]
    boxes = [font.getbbox(text) for text in (*lines, "  ".join(name + "----" for name, _ in keys))]
    pitch = int(max(box[3] for box in boxes)) + 4
    width = max(picture.shape[1], int(max(box[2] for box in boxes)) + 10)
    image = Image.new("RGB", (width, picture.shape[0] + pitch * (len(lines) + 1) + 6), "white")
    image.paste(Image.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(image)
    y = picture.shape[0] + 4
    for line in lines:
        draw.text((5, y), line, fill="black", font=font)
        y += pitch
    x = 5
    for name, colour in keys:
        draw.rectangle((x, y + 2, x + 8, y + 10), fill=colour)
        draw.text((x + 12, y), name, fill="black", font=font)
        x += 22 + int(font.getbbox(name)[2])
    return np.array(image)
