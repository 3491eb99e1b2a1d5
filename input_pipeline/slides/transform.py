"""Where a point of one slide lies on its partner: an affine map and, optionally, a smooth displacement.

Both frames are in micrometres from the outer corner of the top left pixel of level 0, x to the right and y down, so
a transform knows nothing of pixels, pyramids or magnification.

    partner_um = matrix @ (he_um + displacement(he_um), 1)
"""

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import ndimage

from input_pipeline.files import write_atomically

FORMAT = "mfl-transform"
VERSION = 1


@dataclass(frozen=True)
class Displacement:
    """Displacements (um, in the H&E frame) at the nodes of a regular grid; cubic between nodes, constant outside."""

    origin: tuple[float, float]  # (x, y) of node [0, 0]
    spacing: tuple[float, float]  # (x, y) between nodes
    values: np.ndarray  # [rows, columns, (dx, dy)]
    _coefficients: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        values = np.asarray(self.values, np.float64)
        if values.ndim != 3 or values.shape[2] != 2 or min(values.shape[:2]) < 2:
            raise ValueError(f"a displacement field has shape [rows >= 2, columns >= 2, 2], not {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(
                f"a displacement field is finite everywhere; {np.sum(~np.isfinite(values))} values are not"
            )
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
        """[..., (x, y)] in the partner's frame -> the H&E frame: a fixed point, soon reached if all is smooth."""
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
        write_atomically(path, json.dumps(document).encode())

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


ITK_TRANSFORMS = (".tfm", ".h5", ".hdf5")
ITK_IMAGES = (".mha", ".mhd", ".nrrd", ".nii", ".nii.gz")
ITK_UNITS = {"mm": 1000.0, "um": 1.0}


def load_transform(path: str | os.PathLike, *, itk_unit: str = "mm") -> Transform:
    """A transform H&E -> partner, ours or from outside. Frames begin at the outer corner of the first pixel.

    .json             as Transform.save writes it
    .csv .txt .npy    affine matrix, 2x3 or 3x3 ending in 0 0 1, in um
    .npz              arrays `unit` ('um'), `origin` (x, y), `spacing` (x, y), `values` [rows, columns, (dx, dy)], and
                      optionally `matrix`: partner = matrix @ (he + displacement, 1)
    .tfm .h5          ITK: a linear transform or a displacement field transform of two dimensions
    .mha .nrrd .nii   ITK: a displacement image, partner = he + displacement

    ITK maps fixed to moving points, so H&E is the fixed image. Its unit is the millimetre, or what `itk_unit` says.
    """
    path = Path(path)
    name = path.name.lower()
    if not path.is_file():
        raise ValueError(f"{path}: no such transform file")
    if itk_unit not in ITK_UNITS:
        raise ValueError(f"itk_unit is one of {', '.join(ITK_UNITS)}, not {itk_unit!r}")
    if name.endswith(".json"):
        return Transform.load(path)
    readers: dict[tuple[str, ...], Callable[[Path], Transform]] = {
        (".csv", ".txt", ".npy"): _load_matrix,
        (".npz",): _load_field,
        ITK_TRANSFORMS: lambda p: _load_itk_transform(p, ITK_UNITS[itk_unit]),
        ITK_IMAGES: lambda p: _load_itk_image(p, ITK_UNITS[itk_unit]),
    }
    for suffixes, reader in readers.items():
        if name.endswith(suffixes):
            try:
                found = reader(path)
            except (ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
                raise ValueError(f"{path} is not a transform file that this version reads: {error}") from error
            return Transform(found.matrix, found.displacement, {"made": "loaded", "file": path.name})
    allowed = ", ".join((".json", *(s for suffixes in readers for s in suffixes)))
    raise ValueError(f"{path}: unknown kind of transform file; allowed: {allowed}")


def _load_matrix(path: Path) -> Transform:
    if path.suffix.lower() == ".npy":
        return Transform(np.load(path, allow_pickle=False))
    lines = [line.split("#")[0].replace(",", " ").replace(";", " ").split() for line in path.read_text().splitlines()]
    return Transform(np.array([[float(v) for v in line] for line in lines if line]))


def _load_field(path: Path) -> Transform:
    with np.load(path, allow_pickle=False) as arrays:
        missing = {"unit", "origin", "spacing", "values"} - set(arrays.files)
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}; it holds {', '.join(arrays.files) or 'nothing'}")
        if (unit := str(arrays["unit"])) != "um":
            raise ValueError(f"unit is {unit!r}; allowed: 'um'")
        matrix = arrays["matrix"] if "matrix" in arrays.files else np.eye(2, 3)
        return Transform(matrix, Displacement(_pair(arrays["origin"]), _pair(arrays["spacing"]), arrays["values"]))


def _pair(values: np.ndarray) -> tuple[float, float]:
    x, y = (float(v) for v in np.ravel(values))
    return x, y


def _itk():
    try:
        import SimpleITK
    except ImportError as error:
        raise ValueError("an ITK file needs SimpleITK: pip install SimpleITK") from error
    return SimpleITK


def _load_itk_transform(path: Path, unit: float) -> Transform:
    transform = _itk().ReadTransform(str(path)).Downcast()
    if transform.GetDimension() != 2:
        raise ValueError(f"it has {transform.GetDimension()} dimensions; allowed: 2")
    if transform.IsLinear():
        start, right, down = (np.array(transform.TransformPoint(p)) for p in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)))
        return Transform(np.column_stack([right - start, down - start, start * unit]))
    if hasattr(transform, "GetDisplacementField"):
        return _from_image(transform.GetDisplacementField(), unit)
    raise ValueError(
        f"{transform.GetName()} is neither linear nor a displacement field: write it with "
        "SimpleITK.TransformToDisplacementFieldFilter and give the image"
    )


def _load_itk_image(path: Path, unit: float) -> Transform:
    return _from_image(_itk().ReadImage(str(path)), unit)


def _from_image(image, unit: float) -> Transform:
    if image.GetDimension() != 2 or image.GetNumberOfComponentsPerPixel() != 2:
        raise ValueError(
            f"a displacement image has 2 dimensions and 2 components, not {image.GetDimension()} and "
            f"{image.GetNumberOfComponentsPerPixel()}"
        )
    if not np.allclose(image.GetDirection(), (1, 0, 0, 1)):
        raise ValueError(f"its axes are turned (direction {image.GetDirection()}); allowed: the identity")
    if tuple(image.GetSpacing()) == (1.0, 1.0) and unit != 1:
        raise ValueError("its spacing is 1, which is pixels, not millimetres: set spacing and displacements in mm")
    values = _itk().GetArrayFromImage(image).astype(np.float64) * unit
    x, y = image.GetOrigin()
    dx, dy = image.GetSpacing()
    return Transform(np.eye(2, 3), Displacement((x * unit, y * unit), (dx * unit, dy * unit), values))
