"""Slides as scanners write them. Every file appears whole or not at all."""

import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageDraw

from ..files import whole

TILE = 256
JPEG_QUALITY = 85


def write_text(path: Path, text: str) -> None:
    with whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def shrink(image: np.ndarray, by: int) -> np.ndarray:
    """Mean of by x by pixels of [h, w, ...]; a rim that does not fill a pixel is dropped, as scanners do."""
    h, w = image.shape[0] // by, image.shape[1] // by
    if image.dtype == np.uint8 and image.ndim == 3:
        return np.asarray(Image.fromarray(image[: h * by, : w * by]).reduce(by))
    cut = image[: h * by, : w * by].reshape(h, by, w, by, *image.shape[2:])
    total = np.zeros((h, w, *image.shape[2:]), np.float32)
    for i in range(by):
        for j in range(by):
            total += cut[:, i, :, j]
    return (total / by**2 + 0.5).astype(image.dtype)


def _pyramid(
    image: np.ndarray, reduce: Callable[[np.ndarray, int], np.ndarray], smallest: int = 32
) -> list[np.ndarray]:
    """Levels 4 and 16, as long as they are worth having."""
    levels = [image]
    while len(levels) < 3 and min(levels[-1].shape[:2]) // 4 >= smallest:
        levels.append(reduce(levels[-1], 4))
    return levels


def _fit(image: np.ndarray, side: int) -> np.ndarray:
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.BOX)
    return np.asarray(picture)


def _label(name: str) -> np.ndarray:
    picture = Image.new("RGB", (320, 320), (236, 233, 222))
    draw = ImageDraw.Draw(picture)
    draw.text((16, 24), "PHANTOM", fill=(30, 30, 30))
    draw.text((16, 48), name, fill=(30, 30, 30))
    return np.asarray(picture)


def _macro(small: np.ndarray, label: np.ndarray) -> np.ndarray:
    glass = Image.new("RGB", (960, 320), (232, 232, 234))
    glass.paste(Image.fromarray(label), (0, 0))
    picture = Image.fromarray(small)
    picture.thumbnail((480, 240), Image.Resampling.BOX)
    glass.paste(picture, (320 + (640 - picture.width) // 2, (320 - picture.height) // 2))
    return np.asarray(glass)


def write_svs(path: Path, image: np.ndarray, mpp: float, name: str) -> None:
    """Aperio's layout: level 0, thumbnail, lower levels, label, macro; `image` is uint8 [h, w, 3]."""
    h, w = image.shape[:2]
    library = "Aperio Image Library v12.0.15"
    fields = f"AppMag = {_power(mpp)}|MPP = {mpp:.6g}|Filename = {name}|OriginalWidth = {w}|OriginalHeight = {h}"
    levels = _pyramid(image, shrink)
    jpeg: dict = {
        "photometric": "rgb",
        "compression": "jpeg",
        "compressionargs": {"level": JPEG_QUALITY},
        "metadata": None,
        "software": False,
    }
    thumbnail, label = _fit(levels[-1], 768), _label(name)
    per_cm = (1e4 / mpp, 1e4 / mpp)
    with whole(path) as part, tifffile.TiffWriter(part) as tiff:

        def tiled(level: np.ndarray) -> None:
            size = f"{w}x{h}" if level is image else f"{w}x{h} -> {level.shape[1]}x{level.shape[0]}"
            text = f"{library}\r\n{size} [0,0 {w}x{h}] ({TILE}x{TILE}) JPEG/RGB Q={JPEG_QUALITY}|{fields}"
            here: dict = {"resolution": per_cm, "resolutionunit": "CENTIMETER"} if level is image else {}
            tiff.write(level, tile=(TILE, TILE), description=text, **jpeg, **here)

        def extra(picture: np.ndarray, text: str, kind: int) -> None:
            rows = -(-picture.shape[0] // 8) * 8
            tiff.write(picture, rowsperstrip=rows, description=f"{library}\r\n{text}", subfiletype=kind, **jpeg)

        tiled(image)
        shape = f"{thumbnail.shape[1]}x{thumbnail.shape[0]}"
        extra(thumbnail, f"{w}x{h} -> {shape} - |{fields}", 0)
        for level in levels[1:]:
            tiled(level)
        extra(label, f"label {label.shape[1]}x{label.shape[0]}", 1)
        macro = _macro(thumbnail, label)
        extra(macro, f"macro {macro.shape[1]}x{macro.shape[0]}", 9)


def _power(mpp: float) -> int:
    return next((power for power, largest in ((80, 0.15), (40, 0.32), (20, 0.65), (10, 1.3)) if mpp <= largest), 5)


def write_ome(
    path: Path, levels: list[np.ndarray], mpp: float, channels: tuple[str, ...] = (), *, lossy: bool = False
) -> None:
    """A pyramid with SubIFDs: [c, h, w] of named channels, or [h, w, 3] of colour (JPEG when `lossy`)."""
    colour = levels[0].ndim == 3 and levels[0].shape[-1] == 3 and not channels
    metadata: dict = {"axes": "YXS" if colour else "CYX", "UUID": str(uuid.uuid5(uuid.NAMESPACE_OID, path.name))}
    metadata |= {"PhysicalSizeX": mpp, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": mpp, "PhysicalSizeYUnit": "µm"}
    if channels:
        metadata["Channel"] = {"Name": list(channels)}
    how: dict = {"photometric": "rgb" if colour else "minisblack", "tile": (TILE, TILE)}
    if lossy:
        how |= {"compression": "jpeg", "compressionargs": {"level": JPEG_QUALITY}}
    else:
        how |= {
            "compression": "zlib",
            "compressionargs": {"level": 1},
            "predictor": not colour and levels[0].dtype != np.uint8,
        }
    with whole(path) as part, tifffile.TiffWriter(part, bigtiff=True, ome=True) as tiff:
        for i, level in enumerate(levels):
            scale = 1e4 / mpp * level.shape[-1 - colour] / levels[0].shape[-1 - colour]
            how |= {"resolution": (scale, scale), "resolutionunit": "CENTIMETER"}
            kind: dict = {"subfiletype": 1} if i else {"subifds": len(levels) - 1, "metadata": metadata}
            tiff.write(level, **how, **kind)


def write_he_ome(path: Path, image: np.ndarray, mpp: float) -> None:
    write_ome(path, _pyramid(image, shrink), mpp, lossy=True)


def write_channels(path: Path, image: np.ndarray, mpp: float, channels: tuple[str, ...]) -> None:
    """[c, h, w] of light, whose lower levels are means."""
    planes = [_pyramid(plane, shrink) for plane in image]
    write_ome(path, [np.stack(level) for level in zip(*planes, strict=True)], mpp, channels)


def write_map(path: Path, image: np.ndarray, mpp: float, channels: tuple[str, ...]) -> None:
    """[c, h, w] of labels, whose lower levels are picked, never mixed."""
    planes = [_pyramid(plane, lambda level, by: level[by // 2 :: by, by // 2 :: by]) for plane in image]
    write_ome(path, [np.stack(level) for level in zip(*planes, strict=True)], mpp, channels)
