"""The partner's pixels in the frame of an H&E tile: one resample, from the best level of the pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from input_pipeline.slides.mpp import WAY_OUT
from input_pipeline.slides.transform import Transform

if TYPE_CHECKING:
    from input_pipeline.slides.reader import Slide

MARGIN = 2  # pixels that bilinear sampling may reach beyond the outermost point


def sample_partner(
    partner: Slide,
    transform: Transform,
    he_xy_um: tuple[float, float],
    size_px: int | tuple[int, int],
    mpp: float,
    order: str = "linear",
    *,
    channels: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The tile whose outer top left corner is `he_xy_um` in the H&E frame, `size_px` (or (width, height)) at `mpp`.

    Returns the partner's pixels [height, width, channels] in its own dtype and a bool [height, width], True where the
    pixel's centre lies on the partner slide. Outside is white (RGB) or 0. order 'nearest' keeps labels whole; 'linear'
    averages blocks first where the partner is finer than `mpp`, so that nothing aliases.
    """
    if order not in ("linear", "nearest"):
        raise ValueError(f"order is 'linear' or 'nearest', not {order!r}")
    if partner.mpp is None:
        raise ValueError(f"{partner.path}: mpp unknown, so it cannot be aligned; {WAY_OUT}")
    width, height = (size_px, size_px) if isinstance(size_px, int) else size_px
    columns, rows = _edges(width, mpp, transform), _edges(height, mpp, transform)
    grid = np.stack(np.meshgrid(columns, rows), axis=-1) * mpp + np.asarray(he_xy_um, np.float64)
    source = transform(grid) / partner.mpp  # level-0 pixels of the partner
    inside = _inside(source, columns, rows, (partner.width, partner.height))
    picked = slice(None) if channels is None else list(channels)
    shape = (height, width, partner.channels if channels is None else len(channels))
    if not inside.any():
        return np.full(shape, 255 if partner.is_rgb else 0, partner.dtype), inside
    ratio = np.sqrt(abs(np.linalg.det(transform.matrix[:, :2]))) * mpp / partner.mpp
    level = max((i for i, v in enumerate(partner.levels) if v.downsample <= ratio * 1.01 or i == 0))
    source = source / partner.levels[level].downsample
    shrink = max(1, round(ratio / partner.levels[level].downsample)) if order == "linear" else 1
    low = np.floor(source.min((0, 1))).astype(int) - MARGIN * shrink
    extent = np.ceil(source.max((0, 1))).astype(int) + MARGIN * shrink - low
    extent = -(-extent // shrink) * shrink
    pixels = partner.read_native(level, int(low[0]), int(low[1]), int(extent[0]), int(extent[1]))
    pixels = _shrink(pixels[..., picked], shrink)
    return _resample(pixels, (source - low) / shrink, columns, rows, order), inside


def _edges(size: int, mpp: float, transform: Transform) -> np.ndarray:
    """Pixel positions between which the map is taken as bilinear: an eighth of the displacement's spacing, or finer."""
    cell = size
    if transform.displacement is not None:
        cell = int(np.clip(min(transform.displacement.spacing) / 8 / mpp, 4, 32))
    return np.round(np.linspace(0, size, -(-size // cell) + 1)).astype(int)


def _inside(source: np.ndarray, columns: np.ndarray, rows: np.ndarray, limit: tuple[int, int]) -> np.ndarray:
    shape = (rows[-1], columns[-1])
    if ((source >= 0) & (source <= limit)).all():
        return np.ones(shape, bool)
    across, down = _weights(columns), _weights(rows)
    x, y = (down @ source[..., i] @ across.T for i in (0, 1))
    return (x >= 0) & (y >= 0) & (x <= limit[0]) & (y <= limit[1])


def _weights(edges: np.ndarray) -> np.ndarray:
    """[pixel, edge]: linear interpolation from edges to pixel centres."""
    centres = np.arange(edges[-1]) + 0.5
    return np.stack([np.interp(centres, edges, unit) for unit in np.eye(len(edges))], axis=1)


def _shrink(pixels: np.ndarray, by: int) -> np.ndarray:
    if by == 1:
        return pixels
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).reduce(by))
    blocks = np.zeros((pixels.shape[0] // by, pixels.shape[1] // by, pixels.shape[2]), np.float32)
    for row in range(by):
        for column in range(by):
            blocks += pixels[row::by, column::by]
    blocks /= by * by
    return np.round(blocks).astype(pixels.dtype) if pixels.dtype.kind in "iu" else blocks.astype(pixels.dtype)


def _resample(pixels: np.ndarray, source: np.ndarray, columns: np.ndarray, rows: np.ndarray, order: str) -> np.ndarray:
    quads = np.concatenate([source[:-1, :-1], source[1:, :-1], source[1:, 1:], source[:-1, 1:]], axis=-1)
    mesh = [
        ((int(columns[i]), int(rows[j]), int(columns[i + 1]), int(rows[j + 1])), tuple(quads[j, i].tolist()))
        for j in range(len(rows) - 1)
        for i in range(len(columns) - 1)
    ]
    size = (int(columns[-1]), int(rows[-1]))
    method = Image.Resampling.BILINEAR if order == "linear" else Image.Resampling.NEAREST

    def warp(plane: np.ndarray) -> np.ndarray:
        image = Image.fromarray(np.ascontiguousarray(plane))
        return np.asarray(image.transform(size, Image.Transform.MESH, mesh, method))

    if pixels.dtype == np.uint8:
        if pixels.shape[2] == 3:
            return warp(pixels)
        return np.stack([warp(pixels[..., c]) for c in range(pixels.shape[2])], axis=-1)
    carrier = np.float32 if pixels.dtype.kind == "f" or order == "linear" else np.int32
    planes = np.stack([warp(pixels[..., c].astype(carrier)) for c in range(pixels.shape[2])], axis=-1)
    if pixels.dtype.kind in "iu" and carrier == np.float32:
        planes = np.round(planes)
    return planes.astype(pixels.dtype)
