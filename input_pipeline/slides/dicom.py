"""DICOM whole slide images (extra `dicom`): pydicom reads the headers, frames are our segments.

A level is one instance, so the levels of a slide are the instances of one series in one folder; any of them opens it.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np

from input_pipeline.slides.codecs import check_size, jpeg2000_size, jpeg_size
from input_pipeline.slides.errors import SlideError, UnsupportedFormatError
from input_pipeline.slides.mpp import Candidate
from input_pipeline.slides.segments import MAX_SEGMENTS, Raster, Stored

NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")
JPEG = ("1.2.840.10008.1.2.4.50",)
JPEG2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
COLOURS = ("RGB", "YBR_FULL_422", "YBR_FULL", "YBR_ICT", "YBR_RCT")
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
MAX_INSTANCES = 2000
UNDEFINED = 0xFFFFFFFF


def load(path: Path) -> Stored:
    try:
        import pydicom
    except ImportError:
        raise UnsupportedFormatError("DICOM needs pydicom: pip install -e '.[dicom]' (in the clone)") from None

    with path.open("rb") as file:
        first = pydicom.dcmread(file, stop_before_pixels=True)
        _check(first)
    files = [path, *_siblings(path, first)]
    levels = [_level(file, pydicom) for file in files]
    levels.sort(key=lambda level: -level[0].width)
    sizes = [raster.size for raster, _ in levels]
    if len(set(sizes)) != len(sizes):
        raise SlideError(
            f"the series has several images of one size ({sizes}); focal planes or optical paths as instances are "
            f"not read"
        )
    raster, header = levels[0]
    rgb = raster.samples == 3
    names = ("red", "green", "blue") if rgb else ("channel 0",)
    return Stored("dicom", [[raster] for raster, _ in levels], rgb, names, _spacing(header))


def _siblings(path: Path, first: Any) -> list[Path]:
    import pydicom

    found, wanted = [], ["SeriesInstanceUID", "ImageType", "SOPClassUID"]
    others = [other for other in sorted(path.parent.iterdir()) if other.is_file() and other != path]
    others = [other for other in others if other.suffix.lower() in ("", ".dcm")]
    if len(others) > MAX_INSTANCES:
        raise SlideError(f"its folder holds {len(others)} files; a DICOM slide has a folder of its own")
    for other in others:
        try:
            header = pydicom.dcmread(other, stop_before_pixels=True, specific_tags=wanted)
        except Exception:  # any other file may lie in the folder, and is none of ours
            continue
        if header.get("SeriesInstanceUID") == first.SeriesInstanceUID and "VOLUME" in header.get("ImageType", []):
            found.append(other)
    return found


def _check(header: Any) -> None:
    if header.get("SOPClassUID") != WHOLE_SLIDE:
        raise SlideError("it is DICOM, but no VL Whole Slide Microscopy image")
    if "VOLUME" not in header.get("ImageType", []):
        raise SlideError(f"it is a {'/'.join(header.get('ImageType', []))} image; open an instance of type VOLUME")
    if int(header.get("PlanarConfiguration", 0)) or header.get("PixelRepresentation", 0):
        raise SlideError("DICOM is read with interleaved unsigned samples only")
    if header.BitsAllocated not in (8, 16) or header.BitsStored != header.BitsAllocated:
        raise SlideError(f"DICOM is read with 8 or 16 full bits, not {header.BitsStored} of {header.BitsAllocated}")
    grey, photometric = header.SamplesPerPixel == 1, header.PhotometricInterpretation
    if photometric not in (("MONOCHROME2",) if grey else COLOURS) or header.SamplesPerPixel not in (1, 3):
        raise SlideError(f"DICOM of {header.SamplesPerPixel} samples as {photometric} is not read")


def _level(path: Path, pydicom: Any) -> tuple[Raster, Any]:
    with path.open("rb") as file:
        header = pydicom.dcmread(file, stop_before_pixels=True)
        _check(header)
        syntax = str(header.file_meta.TransferSyntaxUID)
        samples, dtype = int(header.SamplesPerPixel), np.dtype(f"<u{header.BitsAllocated // 8}")
        width, height = int(header.TotalPixelMatrixColumns), int(header.TotalPixelMatrixRows)
        across, down = int(header.Columns), int(header.Rows)
        frames = int(header.get("NumberOfFrames", 1))
        if min(width, height, across, down) < 1 or not 0 < frames <= MAX_SEGMENTS:
            raise SlideError(
                f"a DICOM image of {width} x {height} px in {frames} frames of {across} x {down} is damaged"
            )
        size = across * down * samples * dtype.itemsize
        if syntax in NATIVE:
            start = _pixel_data(file, explicit=syntax != NATIVE[0])[0]
            offsets, counts = start + np.arange(frames, dtype=np.int64) * size, np.full(frames, size, np.int64)
        elif syntax in JPEG + JPEG2000:
            offsets, counts = _fragments(file, frames)
        else:
            raise UnsupportedFormatError(
                f"DICOM transfer syntax {syntax} is not read (only native, JPEG and JPEG 2000)"
            )
    grid = (-(-height // down), -(-width // across))
    offsets, counts = _in_place(header, grid, offsets, counts)
    decode = _decoder(syntax, header.PhotometricInterpretation, (down, across, samples), dtype)
    native = dtype.newbyteorder("=")
    return Raster(width, height, across, down, samples, native, offsets, counts, decode, 1, path), header


def _in_place(
    header: Any, grid: tuple[int, int], offsets: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Frames by their place in the grid; a place without a frame has length 0."""
    rows, columns = grid
    if header.get("DimensionOrganizationType") == "TILED_FULL":
        if len(offsets) != rows * columns:
            raise SlideError(
                f"{len(offsets)} frames do not fill a grid of {rows} x {columns}: several focal planes or optical "
                f"paths in one instance are not read"
            )
        return offsets, counts
    if rows * columns > MAX_SEGMENTS:
        raise SlideError(f"a grid of {rows} x {columns} frames is not believed")
    placed = np.zeros((2, rows * columns), np.int64)
    groups = header.get("PerFrameFunctionalGroupsSequence", [])
    if len(groups) != len(offsets):
        raise SlideError(f"{len(offsets)} frames have {len(groups)} positions")
    for i, group in enumerate(groups):
        place = group.PlanePositionSlideSequence[0]
        row, below = divmod(int(place.RowPositionInTotalImagePixelMatrix) - 1, int(header.Rows))
        column, right = divmod(int(place.ColumnPositionInTotalImagePixelMatrix) - 1, int(header.Columns))
        if below or right or not (0 <= row < rows and 0 <= column < columns) or placed[1, row * columns + column]:
            raise SlideError(f"frame {i} lies off the grid or on another frame")
        placed[:, row * columns + column] = offsets[i], counts[i]
    return placed[0], placed[1]


def _pixel_data(file: Any, explicit: bool) -> tuple[int, int]:
    """(position of the first byte, length) of the pixel data that the header ends before."""
    head = file.read(12 if explicit else 8)
    if len(head) < 8 or head[:4] != b"\xe0\x7f\x10\x00":
        raise SlideError("the DICOM file holds no pixel data")
    return file.tell(), struct.unpack("<I", head[-4:])[0]


def _fragments(file: Any, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """One fragment a frame, after the offset table (whose word we do not need)."""
    _, length = _pixel_data(file, explicit=True)
    if length != UNDEFINED:
        raise SlideError("compressed DICOM pixel data of a defined length are damaged")
    end = os.fstat(file.fileno()).st_size
    offsets: list[int] = []
    counts: list[int] = []
    while True:
        head = file.read(8)
        if len(head) < 8:
            raise SlideError(f"the DICOM file ends after {len(offsets)} items of pixel data: it is truncated")
        tag, size = head[:4], struct.unpack("<I", head[4:])[0]
        if tag == b"\xfe\xff\xdd\xe0":
            break
        if tag != b"\xfe\xff\x00\xe0" or len(offsets) > frames or file.tell() + size > end:
            raise SlideError(
                f"its pixel data are damaged, truncated, or split into more fragments than {frames} frames"
            )
        offsets.append(file.tell())
        counts.append(size)
        file.seek(size, os.SEEK_CUR)
    if len(offsets) != frames + 1:
        raise SlideError(f"{frames} frames in {len(offsets) - 1} fragments are not read (only one fragment a frame)")
    return np.array(offsets[1:], np.int64), np.array(counts[1:], np.int64)


def _decoder(
    syntax: str, photometric: str, shape: tuple[int, int, int], dtype: np.dtype
) -> Callable[[bytes, int], np.ndarray]:
    height, width, _ = shape
    stored = "RGB" if photometric == "RGB" else None

    def decode(data: bytes, _: int) -> np.ndarray:
        if syntax in JPEG:
            check_size(jpeg_size(data), width, height)
            return imagecodecs.jpeg8_decode(data, colorspace=stored).reshape(shape)
        if syntax in JPEG2000:
            check_size(jpeg2000_size(data), width, height)
            return imagecodecs.jpeg2k_decode(data).reshape(shape)
        return np.frombuffer(data, dtype).astype(dtype.newbyteorder("="), copy=False).reshape(shape)

    return decode


def _spacing(header: Any) -> list[Candidate]:
    """Rows first, in mm."""
    try:
        down, across = header.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
    except (AttributeError, IndexError, ValueError, TypeError):
        return []
    return [Candidate("vendor", float(across) * 1000, float(down) * 1000, "the DICOM pixel spacing")]
