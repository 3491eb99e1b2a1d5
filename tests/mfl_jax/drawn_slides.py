"""Slides out of nothing, whose pixels are a function of slide and tile, and an encoder that is easily computed."""

import functools
import threading
import zlib
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from mfl_jax.encoder import Encoder
from mfl_jax.slides import Entry, Source
from mfl_jax.store import Sheet

SIZE, DIM = 8, 5
MATRIX = np.random.default_rng(7).normal(size=(3, DIM)).astype(np.float32)


def pixels(slide: str, row: int) -> np.ndarray:
    return np.random.default_rng((zlib.crc32(slide.encode()), row)).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


@functools.cache
def expected(slide: str, count: int) -> np.ndarray:
    """float64 [count, DIM]"""
    means = [pixels(slide, row).astype(np.float64).mean((0, 1)) / 255 for row in range(count)]
    return np.array(means).reshape(count, 3) @ MATRIX.astype(np.float64)


def encoder(digest: str = "a" * 64, scale: float = 1.0) -> Encoder:
    def apply(params, images, mask):
        return (images.astype(jnp.float32).mean((1, 2)) / 255) @ params

    return Encoder("toy", apply, jnp.asarray(scale * MATRIX), DIM, SIZE, True, 0.5, digest)


def coords(count: int) -> np.ndarray:
    return np.stack([np.arange(count) * 10, np.arange(count) * 20 + 3], axis=1).astype(np.int64)


class Drawn:
    """An open slide; `spoil(slide, row)` may raise. `opened` counts those open now, and the most there were."""

    opened: ClassVar[dict[str, int]] = {}
    lock = threading.Lock()

    def __init__(self, name: str, count: int, spoil=None):
        self.sheet = Sheet(name, f"case of {name}", coords(count), 0.25, "vendor", SIZE, 0.5, 2, (900, 800))
        self.name, self.spoil, self.closed = name, spoil, False
        with self.lock:
            self.opened["now"] = self.opened.get("now", 0) + 1
            self.opened["most"] = max(self.opened.get("most", 0), self.opened["now"])

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        assert not self.closed, "read after close"
        for row in range(start, stop):
            if self.spoil is not None:
                self.spoil(self.name, row)
        out[:] = np.stack([pixels(self.name, row) for row in range(start, stop)])

    @property
    def timings(self) -> dict[str, float]:
        return {"read": 0.001, "decode": 0.002}

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True
        with self.lock:
            self.opened["now"] -= 1


def source(counts: dict[str, int], spoil=None, faults: dict[str, str] | None = None, signature: str = "1") -> Source:
    Drawn.opened.clear()
    faults = faults or {}

    def entry(name: str, count: int) -> Entry:
        return Entry(
            name,
            f"case of {name}",
            {"label": "yes"},
            signature,
            lambda: Drawn(name, count, spoil),
            faults.get(name, ""),
        )

    return Source(tuple(entry(name, count) for name, count in counts.items()), SIZE, 0.5, 2)
