"""Tiles and what was found in them, as detections that QuPath opens (File > Import objects)."""

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from input_pipeline.files import whole
from input_pipeline.slides import openslide_backend

Colour = tuple[int, int, int]
ORIGINS = ("image", "bounds")


def write_tiles(
    path: str | Path,
    corners: np.ndarray,
    side: float,
    measurements: Mapping[str, np.ndarray],
    *,
    classes: Sequence[str] | None = None,
    colours: Mapping[str, Colour] | None = None,
    name: str = "tile",
    origin: tuple[float, float] = (0.0, 0.0),
) -> None:
    """One detection a tile: a square of `side` level-0 px at its corner [N, (x, y)], less `origin` (see slide_origin).

    A measurement that is NaN is left out of its tile, as QuPath expects of what was not measured. Ids are a function of
    name and place, so that the same result is the same file. One line a detection: memory does not grow with N.
    """
    corners = np.asarray(corners, np.float64)
    if corners.ndim != 2 or corners.shape[1] != 2 or not np.isfinite(corners).all():
        raise ValueError(f"corners are finite numbers [N, (x, y)], not {corners.dtype} {list(corners.shape)}")
    lengths = {n: len(v) for n, v in {**measurements, "classes": corners if classes is None else classes}.items()}
    if wrong := {n: k for n, k in lengths.items() if k != len(corners)}:
        raise ValueError(f"there are {len(corners)} tiles, and {wrong} values")
    with whole(path) as part, open(part, "w", encoding="utf-8") as file:
        file.write('{"type":"FeatureCollection","features":[')
        for i, corner in enumerate(corners - np.asarray(origin, np.float64)):
            label = None if classes is None else classes[i]
            found = {n: float(v[i]) for n, v in measurements.items() if not math.isnan(v[i])}
            feature = _feature(corner, side, found, label, (colours or {}).get(label or ""), name)
            file.write(("," if i else "") + "\n" + json.dumps(feature, allow_nan=False))
        file.write("\n]}\n")


def _feature(
    corner: np.ndarray, side: float, measurements: dict[str, float], label: str | None, colour: Colour | None, name: str
) -> dict:
    (x0, y0), (x1, y1) = corner.tolist(), (corner + side).tolist()
    properties: dict = {"objectType": "detection", "name": name, "measurements": measurements}
    if label is not None:
        properties["classification"] = {"name": label} | ({"color": list(colour)} if colour else {})
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{name} {label} {x0} {y0} {side}")),
        "geometry": {"type": "Polygon", "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]]},
        "properties": properties,
    }


def slide_origin(slide: str | Path, which: str) -> tuple[float, float]:
    """What QuPath counts from: the corner of the image, or ('bounds': MIRAX and others) of its scanned part, which only
    OpenSlide knows."""
    if which not in ORIGINS:
        raise ValueError(f"the origin is one of {', '.join(ORIGINS)}, not {which!r}")
    if which == "image":
        return 0.0, 0.0
    openslide = openslide_backend.library()
    if openslide is None:
        raise ValueError(f"the origin 'bounds' needs OpenSlide: {openslide_backend.INSTALL}")
    try:
        with openslide.OpenSlide(str(slide)) as opened:
            return tuple(float(opened.properties.get(f"openslide.bounds-{axis}", 0)) for axis in "xy")  # type: ignore
    except openslide.OpenSlideError as error:
        raise ValueError(f"{slide}: OpenSlide cannot say where its bounds are: {error}") from error
