"""TIFF files of scanners as levels of rasters: what is a level, what is a channel, and what is neither."""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tifffile

from input_pipeline.slides import mpp as scale
from input_pipeline.slides import omexml
from input_pipeline.slides.codecs import COMPRESSIONS, alpha_kind, page_decoder
from input_pipeline.slides.errors import SlideError, UnsupportedFormatError
from input_pipeline.slides.segments import Raster, Stored

MAX_PAGES = 20_000
VENDORS = ("svs", "ome", "ndpi", "scn", "qpi", "philips")
PICTURES = ("thumbnail", "label", "macro", "overview")
NAMES = {"svs": "aperio", "qpi": "qptiff", "scn": "leica"}


def load(path: os.PathLike, z: int | None = None) -> Stored:
    with tifffile.TiffFile(path, _multifile=False) as tif:
        if len(tif.pages) > MAX_PAGES:
            raise SlideError(f"the file has {len(tif.pages)} pages; at most {MAX_PAGES} are read")
        if tif.is_bif:
            raise UnsupportedFormatError("Ventana BIF keeps overlapping tiles that have to be stitched")
        first = tif.pages.first
        omexml.refuse_entities(first.description)
        kind = next((name for name in VENDORS if getattr(tif, f"is_{name}")), "generic")
        series = _series(tif, kind)
        main = max(series, key=lambda s: _area(s.levels[0])) if kind == "scn" else series[0]
        if z is not None and "Z" not in main.axes:
            raise SlideError(f"z={z} asks for a focal plane, and the file is no stack (axes {main.axes})")
        stored = Stored(NAMES.get(kind, kind), [], False, ())
        if kind == "scn" and (regions := sum(s.name.lower() not in PICTURES for s in series)) > 1:
            stored.notes.append(f"the largest of {regions} scanned regions is read")
        groups = [_pages(level, z, stored.notes) for level in _pyramid(main, series, kind)]
        stored.levels = [[raster for page in pages for raster in _rasters(page)] for pages in groups]
        page = groups[0][0].keyframe
        stored.is_rgb = _is_rgb(page) and len(groups[0]) == 1
        stored.channel_names = _channel_names(kind, first.description, groups[0], stored)
        stored.candidates = _candidates(kind, first, page)
        if _orientation(page) != 1:
            stored.notes.append(f"turned upright from TIFF orientation {_orientation(page)}")
        for other in series:
            if other is not main and (name := other.name.strip().lower()) in PICTURES:
                try:
                    pages = _pages(other.levels[0], None, [])
                    stored.associated[name] = [raster for page in pages for raster in _rasters(page)]
                except SlideError as error:
                    stored.notes.append(f"the picture {name!r} is left out: {error}")
        return stored


def _series(tif: tifffile.TiffFile, kind: str) -> Sequence[tifffile.TiffPageSeries]:
    series = [s for s in tif.series if s.kind != "empty" and 0 not in s.shape]
    if not series:
        raise SlideError(f"the file holds no image ({kind} TIFF)")
    return series


def _area(level: tifffile.TiffPageSeries) -> int:
    return level.sizes.get("width", 0) * level.sizes.get("height", 0)


def _pyramid(main: tifffile.TiffPageSeries, series: Sequence[tifffile.TiffPageSeries], kind: str) -> list[Any]:
    """The series' own levels, or, where the writer flagged none, the generic pages that shrink by one ratio."""
    levels = list(main.levels)
    if kind != "generic" or len(levels) > 1:
        return levels
    page = main.keyframe
    for other in series:
        last, key = levels[-1].keyframe, other.keyframe
        if key is page or not key.is_tiled or not page.is_tiled or len(other.pages) != len(main.pages):
            continue
        like = (key.samplesperpixel, key.dtype, key.photometric, other.axes)
        if like != (page.samplesperpixel, page.dtype, page.photometric, main.axes) or key.imagewidth >= last.imagewidth:
            continue
        ratio = page.imagewidth / key.imagewidth
        if abs(page.imagelength / ratio - key.imagelength) <= 1.5:
            levels.append(other)
    return levels


def _pages(level: tifffile.TiffPageSeries, z: int | None, notes: list[str]) -> list[Any]:
    """The pages of one level, one for each channel: one time, one focal plane."""
    axes, shape = level.axes, level.shape
    if not set("YX") <= set(axes):
        raise SlideError(f"an image with axes {axes!r} has no rows and columns")
    leading = [(axis, n) for axis, n in zip(axes, shape, strict=True) if axis not in "YXS"]
    chosen: list[Any] = []
    for axis, n in leading:
        if axis == "Z":
            plane = n // 2 if z is None else z
            if not 0 <= plane < n:
                raise SlideError(f"z is a focal plane from 0 to {n - 1}, not {z}")
            if (
                z is None
                and n > 1
                and (note := f"focal plane {plane} of 0-{n - 1} (the middle one) is read") not in notes
            ):
                notes.append(note)
            chosen.append([plane])
        elif axis in "CIQR" or n == 1:
            chosen.append(range(n))
        else:
            raise SlideError(f"the file holds {n} images along axis {axis!r} (axes {axes}); save one of them by itself")
    expected = math.prod(n for _, n in leading)
    pages = list(level.pages)
    if len(pages) != expected:
        raise SlideError(
            f"axes {axes} of shape {shape} need {expected} pages; the file has {len(pages)}: save it again"
        )
    picked = np.arange(expected).reshape([n for _, n in leading] or [1])
    picked = picked[np.ix_(*chosen)] if chosen else picked
    found = [pages[i] for i in picked.ravel()]
    if any(page is None for page in found):
        raise SlideError("some planes lie in other files (a multi-file OME-TIFF); save the slide as one file")
    return found


def _rasters(page: Any) -> list[Raster]:
    key = page.keyframe
    _check(key)
    planes, samples = (key.samplesperpixel, 1) if key.planarconfig == 2 else (1, key.samplesperpixel)
    tiled = key.is_tiled
    width, height = (
        (key.tilewidth, key.tilelength) if tiled else (key.imagewidth, min(key.rowsperstrip, key.imagelength))
    )
    per_plane = -(-key.imagewidth // max(width, 1)) * -(-key.imagelength // max(height, 1))
    offsets, counts = page.dataoffsets, page.databytecounts
    rasters = []
    for plane in range(planes):
        part = slice(plane * per_plane, (plane + 1) * per_plane)
        rasters.append(
            Raster(
                width=key.imagewidth,
                height=key.imagelength,
                segment_width=width,
                segment_height=height,
                samples=min(samples, 3) if _is_rgb(key) else samples,
                dtype=np.dtype(np.uint8) if key.dtype == bool else np.dtype(key.dtype).newbyteorder("="),
                offsets=offsets[part],
                counts=counts[part],
                decode=page_decoder(page, width, height, part.start),
                orientation=_orientation(key),
            )
        )
    return rasters


def _orientation(key: Any) -> int:
    return int(key.tags.valueof(274) or 1)


def _is_rgb(key: Any) -> bool:
    return key.photometric in (2, 6) and key.samplesperpixel in (3, 4)


def _check(key: Any) -> None:
    if key.compression not in COMPRESSIONS:
        allowed = ", ".join(sorted(set(COMPRESSIONS.values())))
        raise UnsupportedFormatError(
            f"TIFF compression {int(key.compression)} is not read (only {allowed}): save it with one of these"
        )
    if key.photometric not in (1, 2, 6):
        raise SlideError(
            f"TIFF photometric interpretation {int(key.photometric)} is not read (only grey with 0 for black, RGB, "
            f"YCbCr): convert it to RGB, or to grey if it is a label map"
        )
    if key.photometric in (2, 6) and key.samplesperpixel < 3:
        raise SlideError(f"a colour image has 3 samples per pixel, not {key.samplesperpixel}")
    alpha_kind(key)
    if key.imagedepth != 1 or getattr(key, "tiledepth", 1) not in (0, 1):
        raise SlideError("a TIFF with depth (SGI volumes) is not a slide")
    if key.dtype is None or np.dtype(key.dtype).kind not in "biuf":
        raise SlideError(f"pixels of {key.dtype} are not read (only integers and floats)")


def _channel_names(kind: str, description: str, pages: Sequence[Any], stored: Stored) -> tuple[str, ...]:
    count = sum(raster.samples for raster in stored.levels[0])
    names: list[str] = []
    if stored.is_rgb and count == 3:
        return ("red", "green", "blue")
    if kind == "ome":
        names = omexml.channel_names(description)
    elif kind == "qpi":
        names = [omexml.qptiff_name(page.description) for page in pages if getattr(page, "description", "")]
    names = names if len(names) == count else [""] * count
    return tuple(name or f"channel {i}" for i, name in enumerate(names))


def _candidates(kind: str, first: Any, page: Any) -> list[scale.Candidate]:
    description, found = first.description, []
    if kind == "svs":
        found += scale.aperio(description)
    elif kind == "ome":
        found += omexml.physical_size(description)
    elif kind == "scn":
        found += omexml.leica_size(description, page.imagewidth, page.imagelength)
    elif kind == "philips":
        found += omexml.philips_size(description)
    x, y, unit = (page.tags.valueof(code) for code in (282, 283, 296))
    if kind not in ("svs", "ome"):
        found += scale.imagej(description, x, y) or scale.comment(description)
    source = "vendor" if kind in ("ndpi", "qpi", "scn") else "tiff"
    resolution = scale.tiff_resolution(x, y, None if unit is None else int(unit))
    return found + [scale.Candidate(source, c.x, c.y, c.where) for c in resolution]
