"""Stored segments (tiles, strips, frames) of a slide: read by position, decoded on demand, kept in a bounded cache.

Everything here is in the pixels of one level, and inside it: what lies outside a slide is no business of the store.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np

from input_pipeline.slides.errors import SlideError
from input_pipeline.slides.mpp import Candidate

MAX_SEGMENT_BYTES = 512 << 20
MAX_SIDE = 1 << 22
MAX_PIXELS = 500_000_000_000
MAX_SEGMENTS = 1 << 25

_serial = count()


@dataclass(frozen=True, eq=False)
class Raster:
    """One stored image: where its segments lie in the file and how their bytes become pixels [rows, columns, samples].

    Segments lie row by row. A decoded segment may reach beyond the image and is cropped; it may not fall short of it.
    """

    width: int
    height: int
    segment_width: int
    segment_height: int
    samples: int
    dtype: np.dtype
    offsets: Sequence[int] | np.ndarray
    counts: Sequence[int] | np.ndarray
    decode: Callable[[bytes, int], np.ndarray]
    orientation: int = 1
    path: Path | None = None  # where it is not the slide's own file
    serial: int = field(init=False, default_factory=lambda: next(_serial))

    def __post_init__(self):
        size = f"{self.width} x {self.height} px"
        if min(self.width, self.height, self.segment_width, self.segment_height, self.samples) < 1:
            raise SlideError(
                f"an image of {size} in segments of {self.segment_width} x {self.segment_height} px is empty"
            )
        if max(self.width, self.height) > MAX_SIDE or self.width * self.height > MAX_PIXELS:
            raise SlideError(f"the file claims an image of {size}; at most {MAX_PIXELS:.0e} px are believed")
        if self.segment_bytes > MAX_SEGMENT_BYTES:
            raise SlideError(
                f"one segment of this image of {size} decodes to {self.segment_bytes >> 20} MiB, and at most "
                f"{MAX_SEGMENT_BYTES >> 20} MiB are allocated at once: save it tiled (for example 256 x 256 px)"
            )
        expected = self.columns * -(-self.height // self.segment_height)
        if expected > MAX_SEGMENTS or len(self.offsets) != expected or len(self.counts) != expected:
            raise SlideError(
                f"an image of {size} needs {expected} segments; the file lists {len(self.offsets)} offsets and "
                f"{len(self.counts)} lengths (at most {MAX_SEGMENTS}): it is damaged or unfinished"
            )
        if self.orientation not in range(1, 9):
            raise SlideError(f"orientation is 1 to 8, not {self.orientation}")

    @property
    def columns(self) -> int:
        return -(-self.width // self.segment_width)

    @property
    def segment_bytes(self) -> int:
        rows, columns = min(self.segment_height, MAX_SIDE), min(self.segment_width, MAX_SIDE)
        return rows * columns * self.samples * self.dtype.itemsize

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as seen, which is upright."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


@dataclass
class Stored:
    """What a format's parser hands to the reader: `levels` holds the rasters of every level, largest first."""

    vendor: str
    levels: list[list[Raster]]
    is_rgb: bool
    channel_names: tuple[str, ...]
    candidates: list[Candidate] = field(default_factory=list)
    associated: dict[str, list[Raster]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Clock:
    """Seconds spent by stage, summed over threads."""

    def __init__(self, *stages: str):
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(stages, 0.0)

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._seconds[stage] += seconds

    def read(self) -> dict[str, float]:
        with self._lock:
            return dict(self._seconds)


class SegmentCache:
    """The segments used last, up to a number of bytes, but always the last one.

    No lock over the cache is held while a segment is made, and threads that want the same one wait for one of them.
    """

    def __init__(self, limit: int):
        self._limit, self._bytes = limit, 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._making: dict[tuple[int, int], threading.Lock] = {}

    def get(self, key: tuple[int, int], make: Callable[[], np.ndarray]) -> np.ndarray:
        with self._lock:
            if (found := self._look(key)) is not None:
                return found
            gate = self._making.setdefault(key, threading.Lock())
        with gate:
            with self._lock:
                if (found := self._look(key)) is not None:
                    return found
            try:
                made = make()
                with self._lock:
                    self._keep(key, made)
                return made
            finally:
                with self._lock:
                    self._making.pop(key, None)

    def _look(self, key: tuple[int, int]) -> np.ndarray | None:
        if (found := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
        return found

    def _keep(self, key: tuple[int, int], segment: np.ndarray) -> None:
        before = self._kept.pop(key, None)
        self._kept[key] = segment
        self._bytes += segment.nbytes - (0 if before is None else before.nbytes)
        while self._bytes > self._limit and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    @property
    def bytes(self) -> int:
        return self._bytes


class SegmentSource:
    """Pixels of levels made of rasters; the channels of a level are the samples of its rasters, one after another."""

    def __init__(self, path: Path, levels: Sequence[Sequence[Raster]], fill: int | float, cache_bytes: int):
        """The cache holds a segment of every channel at least, for else each read would decode them all again."""
        self._files: dict[Path, int] = {}
        self._path, self._levels, self._fill = path, levels, fill
        self._cache = SegmentCache(max(cache_bytes, *(sum(r.segment_bytes for r in rasters) for rasters in levels)))
        self.clock = Clock("read", "decode")
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
        for file in {path} | {raster.path or path for rasters in levels for raster in rasters}:
            self._files[file] = os.open(file, flags)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """A copy of [height, width, channels] pixels, all of them inside the level."""
        return self.read_rasters(self._levels[level], x, y, width, height)

    def read_rasters(self, rasters: Sequence[Raster], x: int, y: int, width: int, height: int) -> np.ndarray:
        if len(rasters) == 1:
            return self._upright(rasters[0], x, y, width, height)
        return np.concatenate([self._upright(raster, x, y, width, height) for raster in rasters], axis=2)

    def close(self) -> None:
        """What was decoded goes too: whoever still holds a closed slide, to ask for its size, holds no pixels."""
        self._close_files()
        self._cache.clear()

    def __del__(self) -> None:
        self._close_files()

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _upright(self, raster: Raster, x: int, y: int, width: int, height: int) -> np.ndarray:
        if raster.orientation == 1:
            return self._stored(raster, x, y, width, height)
        turned = raster.orientation >= 5
        if turned:
            x, y, width, height = y, x, height, width
        flip_x, flip_y = raster.orientation in (2, 3, 7, 8), raster.orientation in (3, 4, 6, 7)
        x = raster.width - x - width if flip_x else x
        y = raster.height - y - height if flip_y else y
        pixels = self._stored(raster, x, y, width, height)
        pixels = pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
        return np.ascontiguousarray(pixels.swapaxes(0, 1) if turned else pixels)

    def _stored(self, raster: Raster, x: int, y: int, width: int, height: int) -> np.ndarray:
        columns = range(x // raster.segment_width, (x + width - 1) // raster.segment_width + 1)
        rows = range(y // raster.segment_height, (y + height - 1) // raster.segment_height + 1)
        whole = np.empty((height, width, raster.samples), raster.dtype)
        for row in rows:
            top = row * raster.segment_height
            y0, y1 = max(y, top), min(y + height, top + raster.segment_height)
            for column in columns:
                left = column * raster.segment_width
                x0, x1 = max(x, left), min(x + width, left + raster.segment_width)
                segment = self._segment(raster, row * raster.columns + column)
                part = self._fill if segment is None else segment[y0 - top : y1 - top, x0 - left : x1 - left]
                whole[y0 - y : y1 - y, x0 - x : x1 - x] = part
        return whole

    def _segment(self, raster: Raster, index: int) -> np.ndarray | None:
        """None stands for a segment that the file leaves out."""
        size = int(raster.counts[index])
        if size == 0:
            return None
        return self._cache.get((raster.serial, index), lambda: self._make(raster, index, size))

    def _make(self, raster: Raster, index: int, size: int) -> np.ndarray:
        begin = time.perf_counter()
        data = self._bytes(raster, index, size)
        middle = time.perf_counter()
        segment = self._decoded(raster, data, index)
        self.clock.add("read", middle - begin)
        self.clock.add("decode", time.perf_counter() - middle)
        return segment

    def _bytes(self, raster: Raster, index: int, size: int) -> bytes:
        path = raster.path or self._path
        offset = int(raster.offsets[index])
        if size > MAX_SEGMENT_BYTES:
            raise SlideError(f"{path}: segment {index} claims {size} bytes; at most {MAX_SEGMENT_BYTES} are read")
        try:
            data = os.pread(self._files[path], size, offset)
        except KeyError:
            raise SlideError(f"{path}: this slide has been closed") from None
        except (OSError, OverflowError) as error:
            raise SlideError(f"{path}: segment {index} at byte {offset} cannot be read: {error}") from error
        if len(data) != size:
            raise SlideError(
                f"{path}: segment {index} at byte {offset} has {size} bytes, {len(data)} are there: the file is "
                f"truncated; copy it again"
            )
        return data

    def _decoded(self, raster: Raster, data: bytes, index: int) -> np.ndarray:
        where = f"{raster.path or self._path}: segment {index} at byte {raster.offsets[index]}"
        try:
            segment = raster.decode(data, index)
        except Exception as error:  # decoders of other projects raise whatever they like on damaged bytes
            raise SlideError(f"{where} cannot be decoded: {type(error).__name__}: {error}") from error
        row, column = divmod(index, raster.columns)
        height = min(raster.segment_height, raster.height - row * raster.segment_height)
        width = min(raster.segment_width, raster.width - column * raster.segment_width)
        if segment.ndim != 3 or segment.shape[0] < height or segment.shape[1] < width:
            raise SlideError(f"{where} decodes to {segment.shape}, and {(height, width, raster.samples)} was expected")
        if segment.shape[2] != raster.samples or segment.dtype != raster.dtype:
            raise SlideError(
                f"{where} decodes to {segment.shape[2]} samples of {segment.dtype}, and {raster.samples} of "
                f"{raster.dtype} were expected"
            )
        return segment
