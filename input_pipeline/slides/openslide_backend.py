"""Formats left to OpenSlide (extra `openslide`): MIRAX, Hamamatsu VMS, Ventana, Zeiss and others."""

import importlib
import os
import threading
import time
from types import ModuleType
from typing import Any

import numpy as np

from input_pipeline.slides.codecs import over_white
from input_pipeline.slides.errors import SlideError
from input_pipeline.slides.mpp import Candidate, physical
from input_pipeline.slides.segments import Clock, Stored

INSTALL = "pip install -e '.[openslide]' (in the clone)"


def library() -> ModuleType | None:
    try:
        return importlib.import_module("openslide")
    except (ImportError, OSError):
        return None


class OpenSlideSource:
    """Pixels of levels by OpenSlide, over white. It decodes as it reads, so all of its time counts as decoding."""

    def __init__(self, path: os.PathLike, openslide: ModuleType, cache_bytes: int):
        self.clock = Clock("read", "decode")
        self._slide: Any = openslide.OpenSlide(path)
        self._slide.set_cache(openslide.OpenSlideCache(cache_bytes))
        self._lock, self._path = threading.Lock(), path
        self._errors = (openslide.OpenSlideError, OSError)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return self._slide.level_dimensions

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        slide = self._slide
        if slide is None:
            raise SlideError(f"{self._path}: this slide has been closed")
        begin = time.perf_counter()
        factor = slide.level_downsamples[level]
        try:
            region = slide.read_region((round(x * factor), round(y * factor)), level, (width, height))
        except self._errors as error:
            raise SlideError(f"{self._path}: level {level} at ({x}, {y}) cannot be read: {error}") from error
        pixels = over_white(np.asarray(region))
        self.clock.add("decode", time.perf_counter() - begin)
        return pixels

    def stored(self) -> Stored:
        found = self._slide.properties
        x, y = found.get("openslide.mpp-x"), found.get("openslide.mpp-y")
        vendor = found.get("openslide.vendor", "openslide")
        source = "tiff" if vendor == "generic-tiff" else "vendor"
        candidates: list[Candidate] = physical(source, "OpenSlide's mpp-x and mpp-y", x, y) if x else []
        return Stored(vendor, [], True, ("red", "green", "blue"), candidates, notes=["read by OpenSlide"])

    def close(self) -> None:
        with self._lock:
            slide, self._slide = self._slide, None
        if slide is not None:
            slide.close()
