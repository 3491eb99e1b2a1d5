"""What is written on a slide, where a map of its regions is known: the mixture of kinds of tile, and their arrangement.

No encoder: the kind of a tile is a column of the tile set (`region`). As arms among others these say what could be read
from a slide by one that sees every kind and nothing else, and where a label lies.
"""

from collections.abc import Mapping

import numpy as np

from input_pipeline.features import spacing
from mfl_jax.evaluators.embed import Embedded

WAYS = ("mixture", "purity", "arrangement")
PURE = 0.95
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1))


def embedded(columns: Mapping[str, np.ndarray], ids: np.ndarray, way: str, column: str = "region") -> Embedded:
    """'mixture': the kind of each tile, one of K. 'purity' [2 K]: the same, apart for tiles that hold little else;
    tiles where kinds meet hold several, so that it tells of the arrangement too. 'arrangement' [K * K]: for each tile
    the kinds of its neighbours on the four sides, by its own kind; over a slide, which kinds lie beside which.
    """
    if way not in WAYS:
        raise ValueError(f"way is {way!r}; there are {', '.join(WAYS)}")
    if column not in columns:
        raise ValueError(f"the tile set has no column {column!r}: it was made without maps of regions")
    kinds = np.asarray(columns[column]).astype(int)
    if kinds.min() < 0:
        raise ValueError(f"column {column!r} is not known of {int((kinds < 0).sum())} tiles")
    own = np.eye(kinds.max() + 1, dtype=np.float32)[kinds]
    if way == "purity":
        pure = np.asarray(columns[f"{column}_share"])[:, None] >= PURE
        features = np.concatenate([own * pure, own * ~pure], 1)
    else:
        features = own if way == "mixture" else _beside(own, columns)
    return Embedded({"he": features}, ids, dict(columns))


def _beside(own: np.ndarray, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Tiles of a slide are neighbours where their corners are one step of its grid apart along x or along y."""
    found = np.zeros((len(own), own.shape[1], own.shape[1]), np.float32)
    x, y, slides = (np.asarray(columns[name]) for name in ("x", "y", "slide"))
    for slide in np.unique(slides):
        rows = np.flatnonzero(slides == slide)
        at = np.round([x[rows], y[rows]]).astype(np.int64)
        step = spacing(at.T)
        if not step > 0:
            continue  # no two tiles share a row or a column
        place = {(int(a), int(b)): row for a, b, row in zip(*at, rows, strict=True)}
        for a, b, row in zip(*at, rows, strict=True):
            near = [place.get((int(a + dx * step), int(b + dy * step))) for dx, dy in SIDES]
            for other in near:
                if other is not None:
                    found[row] += np.outer(own[row], own[other]) / 4
    return found.reshape(len(own), -1)
