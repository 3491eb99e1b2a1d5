"""Gene counts of spots on a hexagonal lattice, from the cells that lie in them."""

import numpy as np
from scipy.spatial import cKDTree

from .cells import TYPES
from .slide import Slide

SPOT_UM = 55.0
PITCH_UM = 100.0
PER_TYPE = 3
MARKER_GENES = 3
COMMON_GENES = 8
GENES = (
    *(f"{name.upper()}_{i + 1}" for name in TYPES for i in range(PER_TYPE)),
    *(f"MARKER_{i + 1}" for i in range(MARKER_GENES)),
    *(f"COMMON_{i + 1}" for i in range(COMMON_GENES)),
)
DISPERSION = 4.0


def _profiles() -> tuple[np.ndarray, np.ndarray]:
    """Molecules per cell: [types, genes] and, on top for a positive cell, [genes]. The same for every slide."""
    rng = np.random.default_rng(7)
    types = np.full((len(TYPES), len(GENES)), 0.05)
    for i in range(len(TYPES)):
        types[i, i * PER_TYPE : (i + 1) * PER_TYPE] = rng.uniform(3, 8, PER_TYPE)
    types[:, -COMMON_GENES:] = rng.uniform(1, 5, COMMON_GENES)
    marker = np.zeros(len(GENES))
    marker[len(TYPES) * PER_TYPE : -COMMON_GENES] = rng.uniform(4, 8, MARKER_GENES)
    return types, marker


def draw_counts(slide: Slide) -> tuple[np.ndarray, np.ndarray]:
    """(centres um [n, 2], counts int64 [n, genes]) of spots that lie on tissue; over-dispersed, with a slide effect."""
    rng = slide.rng(20)
    size_um = slide.size * slide.mpp
    rows, columns = int(size_um / (PITCH_UM * 0.866)) + 1, int(size_um / PITCH_UM) + 1
    y, x = np.mgrid[0:rows, 0:columns].astype(float)
    centres = np.stack([(x + 0.5 * (y % 2)) * PITCH_UM, y * PITCH_UM * 0.866], -1).reshape(-1, 2) + PITCH_UM / 2
    centres = centres[((centres > SPOT_UM / 2) & (centres < size_um - SPOT_UM / 2)).all(1)]
    inside = cKDTree(slide.cells.points).query_ball_point(centres, SPOT_UM / 2)
    keep = [i for i, found in enumerate(inside) if found]
    types, marker = _profiles()
    mean = np.array(
        [types[slide.cells.type[inside[i]]].sum(0) + marker * slide.cells.positive[inside[i]].sum() for i in keep]
    )
    mean = mean.reshape(-1, len(GENES)) * np.exp(0.35 * rng.standard_normal(len(GENES)))
    mean = mean * np.exp(0.3 * rng.standard_normal((len(mean), 1)))
    return centres[keep], rng.poisson(mean * rng.gamma(DISPERSION, 1 / DISPERSION, mean.shape))


def counts_csv(slide: Slide) -> str:
    centres, counts = draw_counts(slide)
    lines = [",".join(("spot", "x_um", "y_um", *GENES))]
    for i, ((x, y), row) in enumerate(zip(centres, counts, strict=True)):
        lines.append(f"spot{i + 1:05d},{x:.2f},{y:.2f}," + ",".join(map(str, row)))
    return "\n".join(lines) + "\n"
