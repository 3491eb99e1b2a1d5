"""Where the tiles of a slide lie: a regular grid over the tissue mask, and the share of any map under each tile.

Tiles start at the slide's top left corner, lie fully inside the slide, and come in row-major order. A coordinate is the
tile's top left corner in level-0 pixels, rounded down to a whole pixel; the spacing itself is not rounded, so that no
error builds up across the slide.
"""

import math

import numpy as np


def tile_grid(
    mask: np.ndarray,
    mask_mpp: float,
    width: int,
    height: int,
    mpp0: float,
    *,
    size: int,
    mpp: float,
    step: int | None = None,
    min_tissue: float = 0.5,
) -> tuple[np.ndarray, np.ndarray]:
    """Tiles of `size` px at `mpp`, every `step` px, with at least `min_tissue` of their area in the mask.

    -> int64 [n, (x, y)] level-0 px and float32 [n] tissue fraction; n is 0 where the slide is smaller than a tile.
    """
    if not 0.0 <= min_tissue <= 1.0:
        raise ValueError(f"min_tissue is a fraction of the tile's area, 0 to 1, not {min_tissue}")
    if width < 1 or height < 1:
        raise ValueError(f"a slide is at least 1x1 px, not {width}x{height}")
    step = size if step is None else step
    _check(size=size, step=step, mpp=mpp, mpp0=mpp0)
    x = _starts(width, size * mpp / mpp0, step * mpp / mpp0)
    y = _starts(height, size * mpp / mpp0, step * mpp / mpp0)
    coords = np.stack([np.tile(x, len(y)), np.repeat(y, len(x))], axis=1)
    tissue = fraction_of(mask, mask_mpp, coords, mpp0, size=size, mpp=mpp)
    kept = tissue >= min_tissue - 1e-6
    return coords[kept], tissue[kept]


def fraction_of(
    area: np.ndarray, area_mpp: float, coords: np.ndarray, mpp0: float, *, size: int, mpp: float
) -> np.ndarray:
    """Share of each tile that a bool map covers, exact within map pixels; float32 [n]. Beyond the map is False."""
    area = np.asarray(area)
    if area.ndim != 2 or area.dtype != bool:
        raise ValueError(f"a map is bool [height, width], not {area.dtype} {area.shape}")
    coords = np.asarray(coords)
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise ValueError(f"coordinates have shape [n, (x, y)], not {coords.shape}")
    _check(size=size, mpp=mpp, mpp0=mpp0, area_mpp=area_mpp)
    sums = np.zeros((area.shape[0] + 1, area.shape[1] + 1), np.int32 if area.size < 2**31 else np.int64)
    np.cumsum(np.cumsum(area, axis=0, dtype=sums.dtype), axis=1, out=sums[1:, 1:])
    start = coords * (mpp0 / area_mpp)
    side = size * mpp / area_mpp
    (x0, y0), (x1, y1) = start.T, (start + side).T
    covered = _at(sums, y1, x1) - _at(sums, y0, x1) - _at(sums, y1, x0) + _at(sums, y0, x0)
    return np.clip(covered / side**2, 0.0, 1.0).astype(np.float32)


def _check(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is a positive number, not {value}")
        if name in ("size", "step") and value != int(value):
            raise ValueError(f"{name} is a whole number of output pixels, not {value}")


def _starts(length: int, side: float, step: float) -> np.ndarray:
    slack = 1e-6
    count = math.floor((length - side) / step + slack) + 1
    return np.floor(np.arange(count) * step + slack).astype(np.int64)


def _at(sums: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The integral image between its nodes: bilinear, which is exact for pixels of constant value."""
    y, x = (np.clip(v, 0, n - 1) for v, n in zip((y, x), sums.shape, strict=True))
    row, column = (np.minimum(v.astype(np.int64), n - 2) for v, n in zip((y, x), sums.shape, strict=True))
    down, right = y - row, x - column
    top = sums[row, column] * (1 - right) + sums[row, column + 1] * right
    bottom = sums[row + 1, column] * (1 - right) + sums[row + 1, column + 1] * right
    return top * (1 - down) + bottom * down
