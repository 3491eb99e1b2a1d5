"""Which cells there are: position, type, marker state and the shape of the nucleus."""

from dataclasses import dataclass, fields, replace

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from . import layout as lay
from .layout import Layout

TYPES = ("fibroblast", "tumour", "lymphocyte", "epithelial", "adipocyte", "necrotic", "lesion")
FIBROBLAST, TUMOUR, LYMPHOCYTE, EPITHELIAL, ADIPOCYTE, NECROTIC, LESION = range(len(TYPES))
#                    fibro tumour lymph epith  fat necrotic lesion
AXIS = np.array([5.6, 4.7, 3.1, 4.4, 4.0, 2.4, 7.2])  # um, geometric mean of the half axes is near 4
RATIO = np.array([2.5, 1.28, 1.10, 1.45, 2.2, 1.3, 1.25])
SPREAD = np.array([0.10, 0.12, 0.07, 0.08, 0.10, 0.30, 0.16])
IRREGULAR = np.array([0.05, 0.05, 0.03, 0.04, 0.05, 0.18, 0.09])
DARK = np.array([0.95, 0.80, 1.20, 0.85, 1.0, 1.3, 0.95])
# region: (um between cells, {type: share})
CROWD = {
    lay.STROMA: (18.5, {FIBROBLAST: 0.88, LYMPHOCYTE: 0.12}),
    lay.TUMOUR: (11.6, {TUMOUR: 0.94, LYMPHOCYTE: 0.06}),
    lay.IMMUNE: (7.0, {LYMPHOCYTE: 0.92, FIBROBLAST: 0.08}),
    lay.GLAND: (11.0, {}),  # cells stand in a row instead, see _lining
    lay.FAT: (13.0, {ADIPOCYTE: 1.0}),
    lay.NECROSIS: (11.0, {NECROTIC: 1.0}),
    lay.LESION: (15.6, {LESION: 0.95, LYMPHOCYTE: 0.05}),
}


@dataclass(frozen=True)
class Cells:
    """One row a cell. `x`, `y`, half axes `a` >= `b` in um of the H&E frame."""

    x: np.ndarray
    y: np.ndarray
    type: np.ndarray  # uint8
    positive: np.ndarray  # bool: carries the marker
    a: np.ndarray
    b: np.ndarray
    angle: np.ndarray
    dark: np.ndarray
    bumps: np.ndarray  # [n, 4] cosine and sine of two and three bumps on the outline
    seed: np.ndarray  # int64: where in the chromatin texture the nucleus lies

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: np.ndarray) -> "Cells":
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @property
    def points(self) -> np.ndarray:
        return np.stack([self.x, self.y], -1)


def _scatter(rng: np.random.Generator, layout: Layout, crowding: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(points, types, angles) of everything that does not stand in a row."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for region, (spacing, mix) in CROWD.items():
        points = lay.hex_points(rng, layout.size_um, spacing * crowding, 0.36)
        chance, pick = rng.uniform(size=(2, len(points)))
        keep = (lay.sample_nearest(layout.region, points) == region) & bool(mix)
        keep &= chance < 0.72 + 0.5 * lay.sample_nearest(layout.density, points)
        if region == lay.FAT:
            keep &= (lay.wall_distance(layout.fat_centres, points) < 2.5) & (pick < 0.35)
            pick = pick / 0.35
        points, pick = points[keep], pick[keep]
        edges = np.cumsum(list(mix.values())) if mix else np.ones(1)
        names = np.array(list(mix) or [0], np.uint8)
        found.append((points, names[np.minimum(np.searchsorted(edges, pick), len(names) - 1)]))
    points = np.concatenate([p for p, _ in found])
    types = np.concatenate([t for _, t in found])
    return points, types, rng.uniform(0, np.pi, len(points))


def _lining(rng: np.random.Generator, layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epithelium: one row of cells round every lumen, each pointing at it."""
    points, angles = [], []
    for x, y, radius, stretch, angle, wobble, phase in layout.glands:
        count = max(int(2 * np.pi * radius * 0.79 / 6.6), 6)
        turn = (np.arange(count) + rng.uniform(-0.22, 0.22, count)) * 2 * np.pi / count
        reach = radius * (0.80 + rng.uniform(-0.05, 0.05, count)) * (1 + wobble * np.cos(3 * turn + phase))
        u, v = reach * np.cos(turn) * stretch, reach * np.sin(turn) / stretch
        c, s = np.cos(angle), np.sin(angle)
        points.append(np.stack([x + u * c - v * s, y + u * s + v * c], -1))
        angles.append(np.arctan2(u * s + v * c, u * c - v * s))
    if not points:
        return np.zeros((0, 2)), np.zeros(0, np.uint8), np.zeros(0)
    where, turn = np.concatenate(points), np.concatenate(angles)
    inside = ((where >= 0) & (where < layout.size_um)).all(1)
    where, turn = where[inside], turn[inside]
    inside = lay.sample_nearest(layout.region, where) == lay.GLAND
    return where[inside], np.full(inside.sum(), EPITHELIAL, np.uint8), turn[inside]


def _along_fibres(layout: Layout, points: np.ndarray) -> np.ndarray:
    dy, dx = np.gradient(layout.fibre_across)
    return np.arctan2(lay.sample_nearest(dx, points), -lay.sample_nearest(dy, points))


def _apart(points: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Indices of cells that do not sit on one another; the later of a pair goes."""
    pairs = cKDTree(points).query_pairs(12.0, output_type="ndarray")
    gap = np.linalg.norm(points[pairs[:, 0]] - points[pairs[:, 1]], axis=1)
    pairs = pairs[gap < 0.86 * (radius[pairs[:, 0]] + radius[pairs[:, 1]])]
    keep = np.ones(len(points), bool)
    keep[pairs.max(1)] = False
    return np.flatnonzero(keep)


def marker_chance(value: np.ndarray, types: np.ndarray) -> np.ndarray:
    """Ranks among the slide's cells of a type: every slide and type is half positive, so neither tells the state."""
    rank = np.empty(len(value))
    for kind in np.unique(types):
        of = np.flatnonzero(types == kind)
        rank[of[np.argsort(value[of], kind="stable")]] = (np.arange(len(of)) + 0.5) / len(of)
    return 0.05 + 0.90 / (1 + np.exp(-(rank - 0.5) * 18))


def draw_cells(rng: np.random.Generator, layout: Layout, crowding: float = 1.0) -> Cells:
    """`crowding` scales the distance between cells of the whole slide."""
    rows = [_lining(rng, layout), _scatter(rng, layout, crowding)]
    points, types, angle = (np.concatenate(column) for column in zip(*rows, strict=True))
    n = len(points)
    size = AXIS[types] * np.exp(SPREAD[types] * rng.standard_normal(n))
    ratio = 1 + (RATIO[types] - 1) * rng.uniform(0.6, 1.4, n)
    a, b = size * np.sqrt(ratio) * 0.93, size / np.sqrt(ratio) * 0.93
    keep = _apart(points, np.sqrt(a * b))
    clear = ndimage.minimum_filter(~np.isin(layout.region, (lay.BACKGROUND, lay.LUMEN)), 3)
    keep = keep[lay.sample_nearest(clear, points[keep])]
    points, types, angle, a, b = points[keep], types[keep], angle[keep], a[keep], b[keep]
    n = len(points)
    positive = rng.uniform(size=n) < marker_chance(lay.sample_nearest(layout.marker, points), types)
    fibrous = types == FIBROBLAST
    angle = np.where(fibrous, _along_fibres(layout, points) + 0.25 * rng.standard_normal(n), angle)
    rounder = np.where(positive, (a / b) ** 0.05, (a / b) ** -0.05)
    bumps = rng.standard_normal((n, 4)) * IRREGULAR[types][:, None]
    dark = DARK[types] * np.exp(0.20 * rng.standard_normal(n))
    seed = rng.integers(0, 1 << 30, n)
    x, y = points.T
    return Cells(x, y, types, positive, a / rounder, b * rounder, angle, dark, bumps, seed)
