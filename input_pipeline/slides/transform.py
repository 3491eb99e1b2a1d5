"""Where a point of one slide lies on its partner: an affine map and, optionally, a smooth displacement.

Both frames are in micrometres from the outer corner of the top left pixel of level 0, x to the right and y down, so
a transform knows nothing of pixels, pyramids or magnification.

    partner_um = matrix @ (he_um + displacement(he_um), 1)
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import ndimage

FORMAT = "mfl-transform"
VERSION = 1


@dataclass(frozen=True)
class Displacement:
    """Displacements (um, in the H&E frame) at the nodes of a regular grid; cubic between nodes, constant outside."""

    origin: tuple[float, float]  # (x, y) of node [0, 0]
    spacing: tuple[float, float]  # (x, y) between nodes
    values: np.ndarray  # [rows, columns, (dx, dy)]

    def __post_init__(self):
        values = np.asarray(self.values, np.float64)
        if values.ndim != 3 or values.shape[2] != 2 or min(values.shape[:2]) < 2:
            raise ValueError(f"a displacement field has shape [rows >= 2, columns >= 2, 2], not {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"a displacement field is finite everywhere; {np.sum(~np.isfinite(values))} values are not")
        if min(self.spacing) <= 0:
            raise ValueError(f"the spacing of a displacement field is positive, not {self.spacing}")
        coefficients = np.stack([ndimage.spline_filter(values[..., i], mode="mirror") for i in (0, 1)])
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "_coefficients", coefficients)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        node = (points - np.asarray(self.origin)) / np.asarray(self.spacing)
        limit = np.asarray(self.values.shape[1::-1]) - 1.0
        node = np.clip(node, 0.0, limit).T[::-1]
        sample = [ndimage.map_coordinates(c, node, order=3, mode="mirror", prefilter=False) for c in self._coefficients]
        return np.stack(sample, axis=-1)


@dataclass(frozen=True)
class Transform:
    """H&E micrometres -> partner micrometres. `info` says where it came from and how good it is; it has no effect."""

    matrix: np.ndarray  # [2, 3]
    displacement: Displacement | None = None
    info: dict = field(default_factory=dict)

    def __post_init__(self):
        matrix = np.asarray(self.matrix, np.float64)
        if matrix.shape == (3, 3) and np.allclose(matrix[2], (0, 0, 1)):
            matrix = matrix[:2]
        if matrix.shape != (2, 3) or not np.isfinite(matrix).all():
            raise ValueError(f"an affine matrix is 2x3 (or 3x3 ending in 0 0 1) and finite, not\n{matrix}")
        if abs(np.linalg.det(matrix[:, :2])) < 1e-6:
            raise ValueError(f"an affine matrix can be inverted; this one has determinant 0:\n{matrix}")
        object.__setattr__(self, "matrix", matrix)

    @staticmethod
    def identity() -> "Transform":
        return Transform(np.eye(2, 3))

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """[..., (x, y)] in the H&E frame -> [..., (x, y)] in the partner's."""
        points = np.asarray(points, np.float64)
        flat = points.reshape(-1, 2)
        if self.displacement is not None:
            flat = flat + self.displacement(flat)
        return (flat @ self.matrix[:, :2].T + self.matrix[:, 2]).reshape(points.shape)

    def inverse(self, points: np.ndarray, iterations: int = 20) -> np.ndarray:
        """[..., (x, y)] in the partner's frame -> the H&E frame; a fixed point, which a smooth displacement reaches fast."""
        points = np.asarray(points, np.float64)
        goal = (points.reshape(-1, 2) - self.matrix[:, 2]) @ np.linalg.inv(self.matrix[:, :2]).T
        found = goal
        if self.displacement is not None:
            for _ in range(iterations):
                found = goal - self.displacement(found)
        return found.reshape(points.shape)

    def save(self, path: str | os.PathLike) -> None:
        document: dict = {"format": FORMAT, "version": VERSION, "unit": "um", "maps": "he -> partner"}
        document |= {"matrix": self.matrix.tolist(), "info": self.info, "displacement": None}
        if (d := self.displacement) is not None:
            values = np.round(d.values, 4)
            document["displacement"] = {"origin": list(d.origin), "spacing": list(d.spacing), "values": values.tolist()}
        path = Path(path)
        part = path.with_name(path.name + f".{os.getpid()}.part")
        part.write_text(json.dumps(document))
        os.replace(part, path)

    @staticmethod
    def load(path: str | os.PathLike) -> "Transform":
        try:
            document = json.loads(Path(path).read_text())
            if document.get("format") != FORMAT or document.get("version") != VERSION or document.get("unit") != "um":
                raise ValueError(f"expected format {FORMAT!r}, version {VERSION}, unit 'um'")
            d = document["displacement"]
            if d is not None:
                d = Displacement(tuple(d["origin"]), tuple(d["spacing"]), np.asarray(d["values"]))
            return Transform(np.asarray(document["matrix"]), d, document.get("info", {}))
        except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a transform file that this version reads: {error}") from error
