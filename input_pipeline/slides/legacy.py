"""Two old ways to store colour in TIFF that tifffile leaves out: subsampled YCbCr without JPEG, JPEG of TIFF 6.0."""

import struct
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import tifffile

from input_pipeline.slides.errors import SlideError


def ycbcr_to_rgb(
    pixels: np.ndarray,
    coefficients: tuple[float, ...] = (0.299, 0.587, 0.114),
    black_white: tuple[float, ...] = (0, 255, 128, 255, 128, 255),
) -> np.ndarray:
    """8-bit YCbCr -> RGB; `black_white` holds the codes of black and white for Y, and of 0 and full for Cb and Cr."""
    if pixels.dtype != np.uint8 or pixels.shape[2] != 3:
        raise SlideError(f"YCbCr is read as 3 samples of uint8, not {pixels.shape[2]} of {pixels.dtype}")
    red, green, blue = coefficients
    zero, full = np.array(black_white[0::2], np.float32), np.array(black_white[1::2], np.float32)
    scaled = (pixels.astype(np.float32) - zero) * (np.array([255, 127, 127], np.float32) / (full - zero))
    y, cb, cr = (scaled[..., i] for i in range(3))
    r = y + (2 - 2 * red) * cr
    b = y + (2 - 2 * blue) * cb
    g = (y - red * r - blue * b) / green
    return np.clip(np.rint(np.stack([r, g, b], axis=-1)), 0, 255).astype(np.uint8)


def _colour(key: Any) -> tuple[tuple[float, ...], tuple[int, int], tuple[float, ...]]:
    coefficients = _ratios(key.tags.valueof(529), (0.299, 0.587, 0.114))
    subsampling = tuple(int(value) for value in key.tags.valueof(530) or (2, 2))
    black_white = _ratios(key.tags.valueof(532), (0, 255, 128, 255, 128, 255))
    if len(subsampling) != 2 or not set(subsampling) <= {1, 2, 4}:
        raise SlideError(f"chroma subsampling is 1, 2 or 4 each way, not {subsampling}")
    if len(coefficients) != 3 or min(coefficients) <= 0 or len(black_white) != 6:
        raise SlideError(f"YCbCr coefficients {coefficients} or reference black and white {black_white} make no sense")
    if any(high == low for low, high in zip(black_white[::2], black_white[1::2], strict=True)):
        raise SlideError(f"reference black and white {black_white} leave no range")
    return coefficients, (subsampling[0], subsampling[1]), black_white


def _ratios(value: Any, default: tuple[float, ...]) -> tuple[float, ...]:
    """Rationals lie flat (numerator, denominator, ...); the lengths 3 and 6 are whole numbers already."""
    if value is None:
        return default
    value = tuple(float(v) for v in value)
    if len(value) == 2 * len(default):
        return tuple(n / d if d else 0.0 for n, d in zip(value[0::2], value[1::2], strict=True))
    return value


def subsampled_decoder(key: Any, width: int, height: int) -> Callable[[bytes, int], np.ndarray]:
    """Blocks of h x v luma samples, then one Cb and one Cr."""
    coefficients, (across, down), black_white = _colour(key)
    if key.predictor != 1 or key.planarconfig != 1 or key.bitspersample != 8 or key.samplesperpixel != 3:
        raise SlideError("subsampled YCbCr is read with 8 bits, 3 interleaved samples and no predictor only")
    decompress = None if key.compression == 1 else tifffile.TIFF.DECOMPRESSORS[key.compression]
    columns, unit = -(-width // across), across * down + 2
    strips = -(-key.imagelength // height)

    def segment(data: bytes, index: int) -> np.ndarray:
        rows = height if key.is_tiled else min(height, key.imagelength - (index % strips) * height)
        blocks = -(-rows // down)
        size = blocks * columns * unit
        raw = data if decompress is None else decompress(data, out=size)
        units = np.frombuffer(raw, np.uint8, size).reshape(blocks, columns, unit)
        luma = units[..., :-2].reshape(blocks, columns, down, across).swapaxes(1, 2)
        luma = luma.reshape(blocks * down, columns * across)[:rows, :width]
        chroma = units[..., -2:].repeat(down, 0).repeat(across, 1)[:rows, :width]
        return ycbcr_to_rgb(np.dstack([luma, chroma]), coefficients, black_white)

    return segment


def old_jpeg_decoder(page: Any, width: int, height: int) -> Callable[[bytes, int], np.ndarray]:
    """TIFF 6.0 keeps JPEG tables in tags and bare scans in segments: each scan gets its header back."""
    key = page.keyframe
    coefficients, subsampling, black_white = _colour(key)
    samples = key.samplesperpixel
    if key.tags.valueof(512) != 1 or key.planarconfig != 1 or key.bitspersample != 8 or samples not in (1, 3):
        raise SlideError("old-style JPEG is read as a baseline scan of 1 or 3 interleaved 8-bit samples only")
    tables = _tables(key, samples)
    if interval := key.tags.valueof(515):
        tables += struct.pack(">HHH", 0xFFDD, 4, int(interval) & 0xFFFF)
    scan = struct.pack(">HHB", 0xFFDA, 6 + 2 * samples, samples)
    scan += b"".join(bytes([i + 1, 17 * i]) for i in range(samples)) + b"\x00\x3f\x00"
    sampling = [subsampling[0] << 4 | subsampling[1] if samples == 3 else 17, 17, 17]
    strips = -(-key.imagelength // height)

    def segment(data: bytes, index: int) -> np.ndarray:
        rows = height if key.is_tiled else min(height, key.imagelength - (index % strips) * height)
        frame = struct.pack(">HHBHHB", 0xFFC0, 8 + 3 * samples, 8, rows, width, samples)
        frame += b"".join(bytes([i + 1, sampling[i], i]) for i in range(samples))
        stream = b"\xff\xd8" + tables + frame + scan + data + b"\xff\xd9"
        if samples == 1:
            return imagecodecs.jpeg8_decode(stream).reshape(rows, width, 1)
        pixels = imagecodecs.jpeg8_decode(stream, colorspace="YCBCR", outcolorspace="YCBCR")
        return ycbcr_to_rgb(pixels, coefficients, black_white)

    return segment


def _tables(key: Any, samples: int) -> bytes:
    file = key.parent.filehandle
    tables = b""
    for tag, kind in ((519, None), (520, 0x00), (521, 0x10)):
        offsets = key.tags.valueof(tag)
        offsets = offsets if isinstance(offsets, tuple) else (offsets,)
        if len(offsets) != samples or not all(isinstance(offset, int) for offset in offsets):
            raise SlideError(f"old-style JPEG needs {samples} tables in tag {tag}, not {offsets}")
        for i, offset in enumerate(offsets):
            file.seek(offset)
            if kind is None:
                body = bytes([i]) + file.read(64)
            else:
                counts = file.read(16)
                body = bytes([kind | i]) + counts + file.read(sum(counts))
            tables += struct.pack(">HH", 0xFFDB if kind is None else 0xFFC4, len(body) + 2) + body
    return tables
