"""Bytes of a TIFF segment -> pixels: tifffile's decoders, behind a guard against headers that promise too much."""

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from input_pipeline.slides import legacy
from input_pipeline.slides.errors import SlideError

COMPRESSIONS = {
    1: "none", 5: "LZW", 6: "old-style JPEG", 7: "JPEG", 8: "deflate", 32946: "deflate", 32773: "PackBits",
    33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000", 50000: "zstd",
}  # fmt: skip
JPEG, JPEG2000 = (6, 7), (33003, 33005, 34712)
APERIO_YCBCR = 33003


def page_decoder(page: Any, width: int, height: int, base: int) -> Callable[[bytes, int], np.ndarray]:
    """f(bytes, index) -> [rows, columns, samples] for segments `base`... of a page; safe to call from any thread."""
    key = page.keyframe
    compression = int(key.compression)
    if compression == 6 and key.tags.valueof(512) is not None:
        return legacy.old_jpeg_decoder(page, width, height)
    if key.photometric == 6 and compression not in JPEG + JPEG2000:
        return legacy.subsampled_decoder(key, width, height)
    decode = key.decode
    jpeg = {"jpegtables": page.jpegtables, "jpegheader": key.jpegheader} if compression in JPEG else {}
    alpha = alpha_kind(key)

    def segment(data: bytes, index: int) -> np.ndarray:
        if compression in JPEG and not jpeg["jpegheader"]:
            check_size(jpeg_size(data), width, height)
        elif compression in JPEG2000:
            check_size(jpeg2000_size(data), width, height)
        pixels = decode(data, base + index, **jpeg)[0][0]
        if compression == APERIO_YCBCR:
            pixels = legacy.ycbcr_to_rgb(pixels)
        if pixels.dtype == bool:
            pixels = pixels.astype(np.uint8)
        return over_white(pixels, premultiplied=alpha == 1) if alpha else pixels

    return segment


def alpha_kind(key: Any) -> int:
    """0 none, 1 the colours are multiplied with it already, 2 they are not."""
    if key.photometric not in (2, 6) or key.samplesperpixel == 3:
        return 0
    kinds = tuple(int(kind) for kind in key.extrasamples)
    if (
        key.samplesperpixel != 4
        or kinds not in ((1,), (2,))
        or key.planarconfig != 1
        or np.dtype(key.dtype).kind == "i"
    ):
        raise SlideError(
            f"a colour image of {key.samplesperpixel} samples per pixel (extra samples {kinds}) is not read: save it "
            f"as RGB, or as channels with photometric interpretation 'black is zero'"
        )
    return kinds[0]


def check_size(size: tuple[int, int], width: int, height: int) -> None:
    if size[0] > width or size[1] > height:
        raise SlideError(f"its header says {size[0]} x {size[1]} px where at most {width} x {height} belong")


def jpeg_size(data: bytes) -> tuple[int, int]:
    """(width, height) from the frame header, without decoding."""
    position = 2
    while position + 9 <= len(data):
        if data[position] != 0xFF:
            raise SlideError("it is no JPEG stream (a marker is missing)")
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, position + 5)
            return width, height
        if marker == 0xDA:
            break
        position += 2 + (
            0 if 0xD0 <= marker <= 0xD8 or marker == 1 else int.from_bytes(data[position + 2 : position + 4])
        )
    raise SlideError("it is no JPEG stream (no frame header)")


def jpeg2000_size(data: bytes) -> tuple[int, int]:
    """(width, height) from the first codestream."""
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(data) < start + 24:
        raise SlideError("it is no JPEG 2000 codestream")
    right, bottom, left, top = struct.unpack_from(">IIII", data, start + 8)
    return right - left, bottom - top


def over_white(pixels: np.ndarray, *, premultiplied: bool = False) -> np.ndarray:
    """RGBA -> RGB as it looks on a white page."""
    high = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1.0
    alpha = pixels[..., 3:].astype(np.float32) / high
    mixed = pixels[..., :3] * (1 if premultiplied else alpha) + high * (1 - alpha)
    if pixels.dtype.kind == "u":
        mixed = np.rint(mixed).clip(0, high)
    return mixed.astype(pixels.dtype)
