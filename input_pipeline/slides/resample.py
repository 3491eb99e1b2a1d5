"""One antialiased resample from a float box of pixels: each output pixel is a triangle-weighted mean of the input.

The triangle reaches one output pixel to either side, so an image at ratio 1 is unchanged, and tiles that are cut side
by side join without a seam as long as the input holds `margin` pixels around the box.
"""

import math

import numpy as np
from PIL import Image

from input_pipeline.slides.errors import SlideError

AREA_DTYPES = tuple(np.dtype(name) for name in ("uint8", "int8", "uint16", "int16", "float16", "float32", "float64"))


def margin(ratio: float) -> int:
    """Pixels around the box that the filter can see."""
    return math.ceil(max(ratio, 1.0)) + 1


def resample(pixels: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """The box (left, top, right, bottom) of [h, w, c] pixels at size (width, height), in the same dtype."""
    if pixels.dtype not in AREA_DTYPES:
        allowed = ", ".join(map(str, AREA_DTYPES))
        raise SlideError(f"pixels of {pixels.dtype} cannot be averaged (only {allowed}): read with order='nearest'")
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, box=box))
    planes = [_plane(np.ascontiguousarray(pixels[..., c]), box, size) for c in range(pixels.shape[2])]
    return np.stack(planes, axis=-1)


def _plane(plane: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    dtype = plane.dtype
    if dtype != np.uint8:
        plane = plane.astype(np.float32)
    found = np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR, box=box))
    if dtype.kind in "iu" and dtype != np.uint8:
        limits = np.iinfo(dtype)
        found = np.clip(np.rint(found), limits.min, limits.max)
    return found.astype(dtype)


def nearest(pixels: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """As `resample`, but each output pixel is the input pixel under its centre: for label maps."""
    left, top, right, bottom = box
    columns = np.floor(left + (np.arange(size[0]) + 0.5) * ((right - left) / size[0])).astype(np.int64)
    rows = np.floor(top + (np.arange(size[1]) + 0.5) * ((bottom - top) / size[1])).astype(np.int64)
    columns, rows = columns.clip(0, pixels.shape[1] - 1), rows.clip(0, pixels.shape[0] - 1)
    return pixels[rows[:, None], columns[None, :]]
