"""Pictures of tiles for people: any partner as RGB, a batch as one sheet; of grids of tile features, their first three
principal components as red, green and blue."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from input_pipeline.tileset import Partner, Spec

# blue, green, red, then what is left apart from those and each other
COLOURS = np.array(
    [(70, 110, 255), (60, 230, 90), (255, 70, 60), (255, 220, 40), (230, 80, 255), (60, 220, 230), (255, 255, 255)]
)
GAP = 4
LINE = 14
GRID_SIDE = 128  # px at which a grid is drawn
ABSENT = 235  # grey of a cell without a tile


@dataclass(frozen=True)
class Axes:
    """How features of tiles become colours: the same for all grids of a picture, which can then be compared."""

    mean: np.ndarray  # [D]
    directions: np.ndarray  # [D, 3], fewer where there are fewer features
    low: np.ndarray
    high: np.ndarray

    @staticmethod
    def of(grids: np.ndarray) -> "Axes":
        """From all tiles of [N, H, W, D + 1]."""
        tiles = grids[grids[..., -1] > 0][:, :-1].astype(np.float64)
        if not len(tiles):
            tiles = np.zeros((1, grids.shape[-1] - 1))
        mean = tiles.mean(0)
        directions = np.linalg.svd(tiles - mean, full_matrices=False)[2][:3].T
        directions = directions * np.where(directions.sum(0) < 0, -1, 1)
        low, high = np.percentile((tiles - mean) @ directions, (2, 98), axis=0)
        return Axes(mean, directions, low, high)

    def colours(self, grid: np.ndarray) -> np.ndarray:
        """uint8 [..., H, W, 3]; cells without a tile are light grey."""
        spread = np.maximum(self.high - self.low, 1e-9)
        light = ((grid[..., :-1].astype(np.float64) - self.mean) @ self.directions - self.low) / spread
        light = np.concatenate([light, np.zeros((*light.shape[:-1], 3 - light.shape[-1]))], -1)
        colour = 40 + 180 * np.clip(light, 0, 1)
        return np.where(grid[..., -1:] > 0, colour, ABSENT).astype(np.uint8)


def to_rgb(image: np.ndarray, partner: Partner | None, scale: np.ndarray | None = None) -> np.ndarray:
    """uint8 [H, W, 3] of H&E (partner None), an image or a map: RGB as it is, channels as coloured light, labels as
    colours. `scale` [C] is what is drawn brightest; without it the image's own 99.5th percentile."""
    if partner is None or (partner.kind == "image" and partner.channels == 3 and partner.dtype == "uint8"):
        return image
    if partner.kind == "map":
        return _label_colours(image[..., 0].astype(np.int64))
    if scale is None:
        scale = np.percentile(image.reshape(-1, image.shape[-1]), 99.5, axis=0)
    light = np.clip(image / np.maximum(scale, 1), 0, 1)
    if partner.channels == 1:
        return (255 * np.repeat(light, 3, axis=-1)).astype(np.uint8)
    colours = COLOURS[np.arange(partner.channels) % len(COLOURS)]
    return np.clip(light @ colours, 0, 255).astype(np.uint8)


def _label_colours(labels: np.ndarray) -> np.ndarray:
    mixed = (labels * 2654435761) % 2**32
    colours = np.stack([96 + (mixed >> shift) % 160 for shift in (0, 8, 16)], axis=-1)
    return np.where(labels[..., None] > 0, colours, 0).astype(np.uint8)


def _bars(vector: np.ndarray, height: int, width: int) -> np.ndarray:
    """log(1 + x) of a vector, one column a group of neighbours, as tall as their mean."""
    edges = np.linspace(0, len(vector), min(width, len(vector)) + 1).astype(int)
    means = np.add.reduceat(np.log1p(np.maximum(vector, 0)), edges[:-1]) / np.diff(edges)
    tall = means / max(means.max(), 1e-6) * (height - 1)
    drawn = np.arange(height)[::-1, None] <= tall[None]
    stretched = drawn[:, (np.arange(width) * len(means)) // width]
    return np.where(stretched[..., None], np.array([70, 110, 200]), 245).astype(np.uint8)


def batch_picture(batch: dict, spec: Spec, side: int | None = None) -> np.ndarray:
    """One row a tile: the H&E, then each partner; a missing partner is grey and says so."""
    grid = spec.he_kind == "grid"
    if grid:
        batch = dict(batch) | {"he": Axes.of(batch["he"]).colours(batch["he"])}
    side = side or (GRID_SIDE if grid else spec.size)
    how = Image.Resampling.NEAREST if grid else None
    columns: list[Partner | None] = [None, *spec.partners]
    rows = len(batch["he"])
    sheet = Image.new("RGB", (len(columns) * (side + GAP) + GAP, LINE + rows * (side + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for j, partner in enumerate(columns):
        left = GAP + j * (side + GAP)
        draw.text((left, 1), _title(partner), fill="black")
        for i, picture in enumerate(_column(batch, partner, side)):
            top = LINE + GAP + i * (side + GAP)
            if picture is None:
                draw.rectangle((left, top, left + side - 1, top + side - 1), fill=(190, 190, 190))
                draw.text((left + 6, top + 6), "none", fill="black")
            else:
                sheet.paste(Image.fromarray(picture).resize((side, side), how), (left, top))
    return np.asarray(sheet)


def _title(partner: Partner | None) -> str:
    if partner is None:
        return "H&E"
    if partner.kind == "vector":
        return f"{partner.name} ({partner.length} values)"
    return f"{partner.name}: {', '.join(partner.channel_names[:4])}" if partner.channel_names else partner.name


def _column(batch: dict, partner: Partner | None, side: int) -> list[np.ndarray | None]:
    if partner is None:
        return list(batch["he"])
    images, present = batch[partner.name], batch[f"{partner.name}_mask"]
    if partner.kind == "vector":
        return [_bars(v, side, side) if there else None for v, there in zip(images, present, strict=True)]
    scale = None
    if partner.kind == "image" and present.any():
        scale = np.percentile(images[present].reshape(-1, images.shape[-1]), 99.5, axis=0)
    return [to_rgb(v, partner, scale) if there else None for v, there in zip(images, present, strict=True)]
