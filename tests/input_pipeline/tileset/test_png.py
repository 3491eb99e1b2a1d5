"""16-bit PNG without libpng: its pixels are those of libpng, and what is not whole is an error."""

import struct
import zlib

import imagecodecs
import numpy as np
import pytest

from input_pipeline.tileset import png

RNG = np.random.default_rng(0)


def pixels(*shape: int, dtype=np.uint16) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.mark.parametrize("shape", [(1, 2), (5, 7), (64, 16), (200, 90), (5, 7, 3), (90, 110, 3)])
def test_pixels_are_those_of_libpng_and_come_without_it(shape, monkeypatch):
    array = pixels(*shape)
    data = png.encode(array)
    np.testing.assert_array_equal(imagecodecs.png_decode(data), array)
    monkeypatch.setattr(imagecodecs, "png_decode", None)
    out = np.zeros(shape, np.uint16)
    png.decode(data, out)
    np.testing.assert_array_equal(out, array)


def test_a_picture_of_many_chunks():
    array = pixels(40, 50)
    data = png.encode(array)
    start = data.index(b"IDAT") + 4
    (size,) = struct.unpack_from(">I", data, start - 8)
    packed, cut = data[start : start + size], size // 3
    chunks = b"".join(chunk(b"IDAT", part) for part in (packed[:cut], packed[cut:]))
    out = np.zeros(array.shape, np.uint16)
    assert png._undone(data[: start - 8] + chunks + data[start + size + 4 :], out)
    np.testing.assert_array_equal(out, array)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("options", [{"filter": 8}, {"filter": 0x20}, {"filter": 0x40}, {"filter": 0xF8, "level": 9}])
@pytest.mark.parametrize("shape", [(40, 50), (40, 50, 3), (40, 1), (1, 1)])
def test_other_filters_are_read_by_libpng(options, shape):
    array = pixels(*shape) // 64
    out = np.zeros(shape, np.uint16)
    png.decode(bytes(imagecodecs.png_encode(array, **options)), out)
    np.testing.assert_array_equal(out, array)


def test_eight_bits():
    array = pixels(30, 20, 3, dtype=np.uint8)
    out = np.zeros(array.shape, np.uint8)
    png.decode(png.encode(array), out)
    np.testing.assert_array_equal(out, array)


@pytest.mark.parametrize("wrong", [(20, 30), (30, 21), (30, 20, 3)])
def test_another_shape_is_an_error(wrong):
    with pytest.raises((ValueError, RuntimeError)):
        png.decode(png.encode(pixels(30, 20)), np.zeros(wrong, np.uint16))


@pytest.mark.parametrize("shape", [(5, 7, 2), (5, 7, 4), (3, 1, 3)])
def test_what_has_alpha_or_one_column_is_libpngs(shape):
    array, out = pixels(*shape), np.zeros(shape, np.uint16)
    png.decode(png.encode(array), out)
    np.testing.assert_array_equal(out, array)


def test_fewer_rows_than_the_head_says():
    """All checksums are right."""
    array = pixels(6, 9)
    stored = zlib.decompress(png._packed(png.encode(array)))
    with pytest.raises((ValueError, RuntimeError)):
        png.decode(rebuilt(array, zlib.compress(stored[: len(stored) * 5 // 6])), array.copy())


def test_a_wrong_sum_of_the_pixels_alone():
    """The chunk's own checksum is right, so this one is all that guards the pixels."""
    array = pixels(6, 9)
    packed = bytearray(png._packed(png.encode(array)))
    packed[-1] ^= 1
    with pytest.raises((ValueError, RuntimeError)):
        png.decode(rebuilt(array, bytes(packed)), array.copy())


def rebuilt(array: np.ndarray, packed: bytes) -> bytes:
    """The picture with other contents of its IDAT."""
    return png.encode(array)[:33] + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_no_damage_gives_other_pixels():
    """Cut anywhere, or with a byte changed: an error, or what was stored (a chunk's checksum may be all that broke)."""
    array = pixels(6, 9) // 256
    data = png.encode(array)
    broken = [data[:end] for end in range(len(data))]
    for at in range(len(data)):
        broken += [data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :] for flip in (1, 0x80, 0xFF)]
    refused = 0
    for damaged in broken:
        out = np.zeros(array.shape, np.uint16)
        try:
            png.decode(damaged, out)
        except (ValueError, RuntimeError):
            refused += 1
        else:
            np.testing.assert_array_equal(out, array)
    assert refused > 0.8 * len(broken)
