"""Any region of a slide at any mpp.

    with open_slide("a.svs") as slide:
        tile = slide.read_region(x, y, 256, 256, mpp=0.5)

Positions are level-0 pixels measured from the outer corner of the top left pixel, so pixel (0, 0) covers [0, 1) x
[0, 1). Scale is micrometres per pixel and nothing else.
"""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from input_pipeline.slides import dicom, openslide_backend, picture, tiff
from input_pipeline.slides import mpp as scale
from input_pipeline.slides.errors import SlideError, UnsupportedFormatError
from input_pipeline.slides.resample import margin, nearest, resample
from input_pipeline.slides.segments import Clock, Raster, SegmentSource, Stored

__all__ = ["Level", "Slide", "SlideError", "open_slide"]

MAX_OUTPUT_BYTES = 1 << 30
BAND_BYTES = 64 << 20
LEVEL_TOLERANCE = 0.01
COPY_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Level:
    width: int
    height: int
    downsample: float


class Source(Protocol):
    clock: Clock

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray: ...
    def close(self) -> None: ...


class Slide:
    """An open slide. Any number of threads may read from it; a process that forks opens its own.

    `notes` says what was chosen for the user (a focal plane, an orientation), `mpp_reason` why `mpp` is None.
    """

    def __init__(
        self, path: Path, stored: Stored, levels: tuple[Level, ...], dtype: Any, found: scale.Scale, source: Source
    ):
        self.path, self.vendor, self.levels = path, stored.vendor, levels
        self.width, self.height = levels[0].width, levels[0].height
        self.channel_names, self.channels = stored.channel_names, len(stored.channel_names)
        self.dtype, self.is_rgb = np.dtype(dtype), stored.is_rgb
        self.mpp, self.mpp_source, self.mpp_reason = found.mpp, found.source, found.reason
        self.notes = tuple(stored.notes)
        self._fill = fill_value(self.dtype) if self.is_rgb else 0
        self._associated = stored.associated
        self._clock = Clock("resample")
        self._source = source

    def read_region(
        self, x: float, y: float, width: int, height: int, mpp: float, *, order: str = "area"
    ) -> np.ndarray:
        """[height, width, channels] at `mpp`, its outer top left corner at level-0 (x, y).

        Pixels are copied where the ratio to a level is 1 and the offset whole, and resampled once otherwise. Outside
        the slide is white for RGB and 0 for the rest. `order='nearest'` keeps labels.
        """
        if self.mpp is None:
            raise SlideError(f"{self.path}: mpp unknown: {self.mpp_reason}; {scale.WAY_OUT}")
        if order not in ("area", "nearest"):
            raise SlideError(f"order is 'area' or 'nearest', not {order!r}")
        if not (math.isfinite(mpp) and mpp > 0 and math.isfinite(x) and math.isfinite(y)):
            raise SlideError(f"x, y and mpp are finite and mpp is positive, not {x}, {y}, {mpp}")
        return self._read_ratio(float(x), float(y), width, height, mpp / self.mpp, order)

    def read_native(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Pixels of one level as stored, in its own coordinates, filled outside."""
        if not 0 <= level < len(self.levels):
            raise SlideError(f"{self.path} has levels 0 to {len(self.levels) - 1}, not {level}")
        self._check_size(width, height)
        size = self.levels[level]
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, size.width), min(y + height, size.height)
        if (x0, y0, x1, y1) == (x, y, x + width, y + height):
            return self._source.read(level, x, y, width, height)
        whole = np.full((height, width, self.channels), self._fill, self.dtype)
        if x1 > x0 and y1 > y0:
            whole[y0 - y : y1 - y, x0 - x : x1 - x] = self._source.read(level, x0, y0, x1 - x0, y1 - y0)
        return whole

    def thumbnail(self, max_side: int = 1024) -> np.ndarray:
        """The whole slide with its longer side at most `max_side` px; needs no mpp."""
        ratio = max(1.0, max(self.width, self.height) / max_side)
        width, height = max(1, round(self.width / ratio)), max(1, round(self.height / ratio))
        return self._read_ratio(0.0, 0.0, width, height, ratio, "area")

    @property
    def associated(self) -> tuple[str, ...]:
        """Names of the pictures that are no level (thumbnail, label, macro)."""
        return tuple(self._associated)

    def read_associated(self, name: str) -> np.ndarray:
        if name not in self._associated or not isinstance(self._source, SegmentSource):
            raise SlideError(f"{self.path} has the pictures {', '.join(self._associated) or 'none'}, not {name!r}")
        rasters = self._associated[name]
        self._check_size(*rasters[0].size)
        return self._source.read_rasters(rasters, 0, 0, *rasters[0].size)

    @property
    def timings(self) -> dict[str, float]:
        """Seconds in read, decode and resample since opening, summed over threads."""
        return self._source.clock.read() | self._clock.read()

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        scale_text = "unknown mpp" if self.mpp is None else f"{self.mpp:.4g} um/px ({self.mpp_source})"
        return f"<Slide {self.path.name}: {self.vendor}, {self.width} x {self.height} px, {scale_text}>"

    def _check_size(self, width: int, height: int) -> None:
        if width < 1 or height < 1 or width * height * self.channels * self.dtype.itemsize > MAX_OUTPUT_BYTES:
            raise SlideError(
                f"a region has at least 1 px and at most {MAX_OUTPUT_BYTES >> 20} MiB, not {width} x {height} px: read "
                f"it in parts"
            )

    def _read_ratio(self, x: float, y: float, width: int, height: int, ratio: float, order: str) -> np.ndarray:
        """`ratio`: level-0 pixels per output pixel."""
        self._check_size(width, height)
        number = best_level(self.levels, ratio)
        level = self.levels[number]
        step = ratio / level.downsample
        left, top = x / level.downsample, y / level.downsample
        if abs(step - 1) <= COPY_TOLERANCE and max(abs(left - round(left)), abs(top - round(top))) < 1e-4:
            return self.read_native(number, round(left), round(top), width, height)
        inside_x = _inside(left, step, width, level.width)
        inside_y = _inside(top, step, height, level.height)
        if len(inside_x) == width and len(inside_y) == height:
            return self._resampled(number, left, top, width, height, step, order)
        whole = np.full((height, width, self.channels), self._fill, self.dtype)
        if inside_x and inside_y:
            whole[inside_y.start : inside_y.stop, inside_x.start : inside_x.stop] = self._resampled(
                number,
                left + inside_x.start * step,
                top + inside_y.start * step,
                len(inside_x),
                len(inside_y),
                step,
                order,
            )
        return whole

    def _resampled(
        self, number: int, left: float, top: float, width: int, height: int, step: float, order: str
    ) -> np.ndarray:
        """A box whose output pixels all have their centre inside the level, in bands that bound the memory."""
        if width * height > 1 and width * height * step**2 * self.channels * self.dtype.itemsize > BAND_BYTES:
            # By rows while there are any, for a strip that is cut into columns is decoded for each of them.
            if height > 1:
                half = height // 2
                parts = [(left, top, width, half), (left, top + half * step, width, height - half)]
            else:
                half = width // 2
                parts = [(left, top, half, height), (left + half * step, top, width - half, height)]
            read = [self._resampled(number, *part, step, order) for part in parts]
            return np.concatenate(read, axis=0 if height > 1 else 1)
        level = self.levels[number]
        around = margin(step)
        x0, y0 = max(math.floor(left) - around, 0), max(math.floor(top) - around, 0)
        x1 = min(math.ceil(left + width * step) + around, level.width)
        y1 = min(math.ceil(top + height * step) + around, level.height)
        pixels = self._source.read(number, x0, y0, x1 - x0, y1 - y0)
        begin = time.perf_counter()
        box = (left - x0, top - y0, left - x0 + width * step, top - y0 + height * step)
        pixels, box = _reaching(pixels, box)
        found = (resample if order == "area" else nearest)(pixels, box, (width, height))
        self._clock.add("resample", time.perf_counter() - begin)
        return found


def open_slide(
    path: str | os.PathLike,
    *,
    mpp: float | None = None,
    default_mpp: float | None = None,
    cache_bytes: int = 64 << 20,
    backend: str = "auto",
    z: int | None = None,
) -> Slide:
    """A slide, or SlideError. `mpp` overrules the file, `default_mpp` serves where it says nothing.

    backend 'auto' reads by itself what it can, and turns to OpenSlide (extra `openslide`) for formats it does not know.
    `z` is the focal plane of a stack; None is the middle one, and is noted.
    """
    path = Path(path)
    if backend not in ("auto", "tifffile", "openslide"):
        raise SlideError(f"backend is 'auto', 'tifffile' or 'openslide', not {backend!r}")
    if not path.is_file():
        raise SlideError(f"{path}: no such file")
    if cache_bytes < 0:
        raise SlideError(f"cache_bytes is 0 or more, not {cache_bytes}")
    try:
        if backend == "openslide":
            return _by_openslide(path, mpp, default_mpp, cache_bytes, None)
        try:
            return _by_ourselves(path, mpp, default_mpp, cache_bytes, z)
        except UnsupportedFormatError as reason:
            if backend == "tifffile":
                raise
            return _by_openslide(path, mpp, default_mpp, cache_bytes, reason)
    except SlideError as error:
        raise SlideError(f"{path}: {error}") from error
    except Exception as error:  # parsers of damaged files raise whatever they like
        raise SlideError(f"{path} is not a slide that this version reads: {type(error).__name__}: {error}") from error


def _by_ourselves(path: Path, mpp: float | None, default: float | None, cache_bytes: int, z: int | None) -> Slide:
    stored = _load(path, z)
    sizes = [_level_size(rasters) for rasters in stored.levels]
    dtype = stored.levels[0][0].dtype
    for rasters in stored.levels:
        samples, dtypes = sum(raster.samples for raster in rasters), {raster.dtype for raster in rasters}
        if samples != len(stored.channel_names) or dtypes != {dtype}:
            raise SlideError(
                f"one level has {samples} channels of {dtypes}, level 0 {len(stored.channel_names)} of {dtype}"
            )
    found = scale.resolve(stored.candidates, mpp, default)
    levels = pyramid(sizes)
    fill = fill_value(dtype) if stored.is_rgb else 0
    return Slide(path, stored, levels, dtype, found, SegmentSource(path, stored.levels, fill, cache_bytes))


def _by_openslide(
    path: Path, mpp: float | None, default: float | None, cache_bytes: int, reason: UnsupportedFormatError | None
) -> Slide:
    openslide = openslide_backend.library()
    if openslide is None:
        because = f"{reason}; " if reason else ""
        raise SlideError(f"{because}OpenSlide may read it, and is not installed: {openslide_backend.INSTALL}")
    try:
        source = openslide_backend.OpenSlideSource(path, openslide, cache_bytes)
    except openslide.OpenSlideError as error:
        raise SlideError(f"{reason or 'OpenSlide was asked for'}; OpenSlide says: {error}") from error
    try:
        stored = source.stored()
        return Slide(
            path, stored, pyramid(source.sizes), np.uint8, scale.resolve(stored.candidates, mpp, default), source
        )
    except BaseException:
        source.close()
        raise


def _load(path: Path, z: int | None) -> Stored:
    with path.open("rb") as file:
        head = file.read(132)
    if path.suffix.lower() == ".mrxs":
        raise UnsupportedFormatError("MIRAX keeps its pixels in a folder beside this file")
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff")):
        return picture.load(path)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return tiff.load(path, z)
    if head[128:132] == b"DICM":
        return dicom.load(path)
    raise UnsupportedFormatError(
        f"it starts with {head[:8]!r}, which is no TIFF, PNG, JPEG or DICOM: the file is damaged or of another format"
    )


def fill_value(dtype: np.dtype) -> int | float:
    """White."""
    return int(np.iinfo(dtype).max) if dtype.kind in "iu" else 1.0


def best_level(levels: Sequence[Level], ratio: float) -> int:
    """The coarsest level that is not coarser than asked (but for rounding)."""
    fits = [i for i, level in enumerate(levels) if level.downsample <= ratio * (1 + LEVEL_TOLERANCE)]
    return max(fits, key=lambda i: levels[i].downsample) if fits else 0


def pyramid(sizes: Sequence[tuple[int, int]]) -> tuple[Level, ...]:
    """Scanners round level sizes, so a whole factor is taken where it explains both sides within a pixel."""
    width0, height0 = sizes[0]
    levels: list[Level] = []
    for width, height in sizes:
        by_x, by_y = width0 / width, height0 / height
        whole = round((by_x * width + by_y * height) / (width + height))
        if whole >= 1 and abs(width0 / whole - width) < 1 and abs(height0 / whole - height) < 1:
            factor = float(whole)
        else:
            factor = by_x if width >= height else by_y
        if abs(width0 / factor - width) > 1.5 + 0.01 * width or abs(height0 / factor - height) > 1.5 + 0.01 * height:
            raise SlideError(
                f"a level of {width} x {height} px is {by_x:.4g} times narrower, {by_y:.4g} times lower than level 0 "
                f"({width0} x {height0} px): not one pyramid"
            )
        if levels and factor < levels[-1].downsample:
            raise SlideError(f"the levels do not shrink: {[list(size) for size in sizes]}")
        levels.append(Level(width, height, factor))
    return tuple(levels)


def _level_size(rasters: Sequence[Raster]) -> tuple[int, int]:
    sizes = {raster.size for raster in rasters}
    if len(sizes) != 1:
        raise SlideError(f"the channels of one level differ in size: {sorted(sizes)}")
    return sizes.pop()


def _inside(start: float, step: float, count: int, size: int) -> range:
    """Output pixels whose centre lies in [0, size)."""
    first = max(0, math.ceil(-start / step - 0.5))
    last = min(count, math.ceil((size - start) / step - 0.5))
    return range(first, max(first, last))


def _reaching(
    pixels: np.ndarray, box: tuple[float, float, float, float]
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """At the slide's rim the box reaches over the pixels by less than half an output pixel: the last ones repeat."""
    left, top, right, bottom = box
    pad_x = (max(0, math.ceil(-left)), max(0, math.ceil(right - pixels.shape[1])))
    pad_y = (max(0, math.ceil(-top)), max(0, math.ceil(bottom - pixels.shape[0])))
    if not any(pad_x + pad_y):
        return pixels, box
    pixels = np.pad(pixels, (pad_y, pad_x, (0, 0)), mode="edge")
    return pixels, (left + pad_x[0], top + pad_y[0], right + pad_x[0], bottom + pad_y[0])
