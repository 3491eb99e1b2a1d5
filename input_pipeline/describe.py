"""How a partner will be stored, seen from one of its files."""

import os

from input_pipeline.slides.reader import open_slide
from input_pipeline.tileset import Partner

ENCODINGS = {"uint8": "jpeg", "uint16": "png"}


def partner_like(path: str | os.PathLike, name: str, kind: str, *, lossless: bool = False) -> Partner:
    """Channels, dtype and channel names as the file has them; 8-bit images as JPEG, or PNG where `lossless`."""
    with open_slide(path) as slide:
        dtype, channels, names = slide.dtype.name, slide.channels, slide.channel_names
    if kind == "map":
        return Partner(name, "map", channels, "uint16", "png", names)
    if dtype not in ENCODINGS:
        raise ValueError(f"{path}: pixels are {dtype}; a partner image has {' or '.join(ENCODINGS)}")
    return Partner(name, "image", channels, dtype, "png" if lossless else ENCODINGS[dtype], names)
