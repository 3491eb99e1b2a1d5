"""Features of the tiles of a slide, from files of four layouts.

A folder holds one `<slide_id>.h5` a slide: ours and TRIDENT's (`features`, `coords`, attributes), CLAM's (the same,
without attributes) or STAMP's (`feats`, `coords` in um). Files come from outside: nothing in them is followed or
unpickled, and one that claims more than it holds is refused.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from input_pipeline.files import read_json

ENCODER = "encoder.json"
TRIDENT = ("patch_size", "level0_magnification", "target_magnification")
DEFLATED = 1100  # zlib never makes data smaller than by about 1,032


class BagError(ValueError):
    """A file that holds no bag, or bags that do not belong together."""


@dataclass(frozen=True)
class Bag:
    """What a file holds."""

    features: np.ndarray  # float16 or float32 [N, D]
    coords: np.ndarray  # float64 [N, 2]: corners, in level-0 px, or um where `unit` is that
    side: float  # of a tile in level-0 px; nan where the file does not say
    notes: Mapping[str, Any]  # attributes, of the file and of its coordinates
    unit: str = "px"  # 'um' of STAMP's files where um per px is not known

    def text(self, name: str) -> str:
        """An attribute that is text; '' where there is none."""
        return text(self.notes.get(name))

    def number(self, name: str) -> float:
        """An attribute that is a number; nan where there is none."""
        return number(self.notes.get(name))


def find_folder(folder: str | os.PathLike) -> Path:
    """The folder itself, or the only one below it that holds .h5 files of features (CLAM's h5_files, TRIDENT's
    features_<encoder>)."""
    folder = Path(folder)
    if any(folder.glob("*.h5")):
        return folder
    inner = sorted({p.parent for p in folder.glob("*/*.h5")} | {p.parent for p in folder.glob("*/*/*.h5")})
    inner = [p for p in inner if p.name != "patches"]
    if len(inner) != 1:
        found = ", ".join(str(p.relative_to(folder)) for p in inner[:5]) or "none"
        raise BagError(f"{folder} holds no .h5 files; folders below it that do: {found}. Name one of them")
    return inner[0]


@dataclass(frozen=True)
class Head:
    """What a file says of its features without their being read. None and '' where it does not say."""

    dim: int
    tile_px: int | None
    tile_mpp: float | None  # um per px of a tile
    encoder: str
    encoder_sha256: str
    case_id: str


def encoder_cases(folder: str | os.PathLike, encoder_sha256: str) -> tuple[str, ...] | None:
    """Cases that the encoder of these features was trained on, as `mfl extract` writes beside them, or above where a
    layout has folders of its own; None where nothing says, or says it of another encoder."""
    folder = Path(folder).absolute()
    for place in (folder, *folder.parents[:2]):
        if (place / ENCODER).is_file():
            about = read_json(place / ENCODER, "written by mfl extract")
            told = about.get("train_cases") if about.get("encoder_sha256") == encoder_sha256 else None
            return None if told is None else tuple(map(str, told))
    return None


def read_head(path: str | os.PathLike) -> Head:
    path = Path(path)
    try:
        with h5py.File(path, "r") as file:
            name = "feats" if "feats" in file else "features"
            if not isinstance(file.get(name, getlink=True), h5py.HardLink) or file[name].ndim != 2:
                raise BagError(f"{path} has no features [N, D]")
            notes = dict(file.attrs) | (dict(file["coords"].attrs) if "coords" in file else {})
            dim = int(file[name].shape[1])
    except (OSError, RuntimeError, KeyError, AttributeError) as error:
        raise BagError(f"{path} is not readable as HDF5: {error}") from error
    bag = Bag(np.zeros((0, dim)), np.zeros((0, 2)), math.nan, notes)
    pixels = [n for n in map(bag.number, ("patch_size", "tile_size_px")) if n > 0]
    scale = bag.number("mpp_target")
    if not scale > 0 and pixels and bag.number("tile_size_um") > 0:
        scale = bag.number("tile_size_um") / pixels[0]
    known = bool(notes.get("target_magnification") or scale > 0)  # CLAM's patch_size is of some level, not of a scale
    size = round(pixels[0]) if pixels and known else None
    encoder = bag.text("encoder") or bag.text("extractor")
    return Head(dim, size, scale if scale > 0 else None, encoder, bag.text("encoder_sha256"), bag.text("case_id"))


def read_bag(path: str | os.PathLike, *, mpp: float | None = None) -> Bag:
    path = Path(path)
    if mpp is not None and not 0 < mpp < math.inf:
        raise BagError(f"mpp is um per level-0 px, a number above 0, not {mpp}")
    try:
        with h5py.File(path, "r") as file:
            stamp = "feats" in file
            features = _dataset(path, file, "feats" if stamp else "features")
            coords = _dataset(path, file, "coords").astype(np.float64)
            notes = dict(file.attrs) | dict(file["coords"].attrs)
    except (OSError, RuntimeError, KeyError) as error:
        raise BagError(f"{path} is not readable as HDF5: {error}") from error
    if features.ndim != 2 or coords.shape != (len(features), 2):
        raise BagError(
            f"{path}: features {list(features.shape)} and coords {list(coords.shape)} are not [N, D] and [N, 2]"
        )
    if not np.isfinite(features).all() or not np.isfinite(coords).all():
        raise BagError(f"{path} has features or coords that are not finite")
    features = features if features.dtype == np.float16 else features.astype(np.float32)
    if stamp:
        return Bag(features, *_from_um(path, coords, notes, mpp))
    side = number(notes.get("patch_size_level0"))
    if not side > 0:  # TRIDENT's older files, which have no patch_size_level0
        at_target, level0, target = (number(notes.get(name)) for name in TRIDENT)
        side = at_target * level0 / target if target > 0 else math.nan
    return Bag(features, coords, side if side > 0 else spacing(coords), notes)


def _dataset(path: Path, file: Any, name: str) -> np.ndarray:
    if name not in file or not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise BagError(f"{path} has no dataset {name!r}; it has {sorted(map(str, file))[:10]}")
    data = file[name]
    if not isinstance(data, h5py.Dataset) or data.dtype.kind not in "fiu" or data.is_virtual or data.external:
        raise BagError(f"{path}: {name!r} is no dataset of numbers that lies in this file")
    if data.nbytes > data.id.get_storage_size() * DEFLATED:
        raise BagError(f"{path}: {name!r} claims {data.nbytes:,} bytes and holds {data.id.get_storage_size():,}")
    return data[()]


def side_um(notes: Mapping[str, Any]) -> float:
    """Side of a tile, as STAMP writes it; nan where there is none."""
    return number(notes.get("tile_size_um", notes.get("tile_size")))


def _from_um(
    path: Path, coords: np.ndarray, notes: Mapping[str, Any], mpp: float | None
) -> tuple[np.ndarray, float, Mapping[str, Any], str]:
    """All of a bag but its features."""
    unit = notes.get("unit", "um")
    unit = unit.decode() if isinstance(unit, bytes) else unit
    if unit != "um":
        raise BagError(f"{path}: coords are in {unit!r}; STAMP files hold um")
    scale = number(notes.get("mpp_level0"))  # that by which px became um: no other makes px of them again
    scale = scale if scale > 0 else mpp or math.nan
    if not scale > 0:
        return coords, math.nan, notes, "um"
    return coords / scale, side_um(notes) / scale, notes, "px"


def text(value: Any) -> str:
    """'' for whatever is no text."""
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return value if isinstance(value, str) else ""


def number(value: Any) -> float:
    """nan for whatever is no number."""
    try:
        return float(np.asarray(value).reshape(()))
    except (TypeError, ValueError):
        return math.nan


def spacing(coords: np.ndarray) -> float:
    """CLAM's files do not say how large a tile is: the commonest step along a row or column, of equals the least. Each
    piece of tissue has a grid of its own, so that steps between any two columns say nothing."""
    steps = []
    for along, across in ((0, 1), (1, 0)):
        line = coords[np.lexsort((coords[:, along], coords[:, across]))]
        step, same = np.diff(line[:, along]), np.diff(line[:, across]) == 0
        steps.append(step[same & (step > 0)])
    found, count = np.unique(np.concatenate(steps), return_counts=True)
    return float(found[count.argmax()]) if len(found) else math.nan
