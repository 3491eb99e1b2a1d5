"""Plain PNG and JPEG fields: one level, one segment, decoded whole and once."""

import os

import imagecodecs
import numpy as np
from PIL import JpegImagePlugin, PngImagePlugin

from input_pipeline.slides.codecs import over_white
from input_pipeline.slides.errors import SlideError
from input_pipeline.slides.segments import Raster, Stored

SAMPLES = {"L": 1, "I;16": 1, "I": 1, "RGB": 3, "RGBA": 4, "1": 1, "LA": 2}
EXIF_ORIENTATION = 274


def load(path: os.PathLike) -> Stored:
    """A density in dots per inch says how to print, not how the field was seen: mpp is left to the user."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        png = file.read(4) == b"\x89PNG"
        file.seek(0)
        # The plugins read headers alone, and unlike Image.open leave it to us how much is too much.
        image = (PngImagePlugin.PngImageFile if png else JpegImagePlugin.JpegImageFile)(file)
        (width, height), mode = image.size, image.mode
        # A PNG without EXIF would be decoded whole in search of it.
        exif = {} if png and "exif" not in image.info else image.getexif()
        orientation = int(exif.get(EXIF_ORIENTATION, 1))
    depth = _depth(path) if png else 8
    if mode not in SAMPLES or mode == "LA":
        raise SlideError(f"a picture of mode {mode} is not read: convert it to RGB, or to grey if it is a label map")
    rgb = SAMPLES[mode] >= 3
    dtype = np.dtype(np.uint16 if depth == 16 else np.uint8)

    def decode(data: bytes, _: int) -> np.ndarray:
        pixels = imagecodecs.png_decode(data) if png else imagecodecs.jpeg8_decode(data)
        pixels = pixels.reshape(height, width, -1)
        return over_white(pixels) if pixels.shape[2] == 4 else pixels

    raster = Raster(width, height, width, height, 3 if rgb else 1, dtype, [0], [size], decode, orientation)
    names = ("red", "green", "blue") if rgb else ("channel 0",)
    notes = [] if orientation == 1 else [f"turned upright from EXIF orientation {orientation}"]
    return Stored("image", [[raster]], rgb, names, notes=notes)


def _depth(path: os.PathLike) -> int:
    """Bits per sample of a PNG."""
    with open(path, "rb") as file:
        return file.read(25)[24]
