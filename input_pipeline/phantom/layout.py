"""Where the tissue lies: a smooth mosaic of regions on a coarse grid, drawn from random fields.

Everything here is in micrometres of the H&E frame. Node [i, j] of a field lies at (j + .5, i + .5) * GRID.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree

GRID = 4.0  # um between nodes
REGIONS = ("background", "stroma", "tumour", "immune", "gland", "lumen", "fat", "necrosis", "lesion")
BACKGROUND, STROMA, TUMOUR, IMMUNE, GLAND, LUMEN, FAT, NECROSIS, LESION = range(len(REGIONS))
SUBTYPES = ("alpha", "beta")
TISSUES = ("mixed", "normal")


@dataclass(frozen=True)
class Layout:
    size_um: float  # the slide is a square
    region: np.ndarray  # uint8 [n, n]
    fat_centres: np.ndarray  # [n, 2] um of fat cells, used where the region is fat
    fibre_across: np.ndarray  # um across the fibres, continuous
    fibre_along: np.ndarray
    marker: np.ndarray  # smooth; says nothing about anything else
    density: np.ndarray  # 0..1
    glands: np.ndarray  # [n, (x, y, radius, stretch, angle, wobble, phase)]


def smooth_noise(rng: np.random.Generator, n: int, length: float, octaves: int = 1) -> np.ndarray:
    """[n, n] of zero mean and unit deviation; `length` um is how far neighbours resemble each other."""
    total = np.zeros((n, n), np.float32)
    for octave in range(octaves):
        step = max(length / GRID / 2**octave, 1.0)
        coarse = rng.standard_normal((int(n / step) + 5,) * 2).astype(np.float32)
        x, y = rng.uniform(0.5, 1.5, 2)
        box = (x, y, x + n / step, y + n / step)
        fine = Image.fromarray(coarse).resize((n, n), Image.Resampling.BICUBIC, box=box)
        total += np.asarray(fine) * 0.45**octave
    return (total - total.mean()) / max(float(total.std()), 1e-6)


def hex_points(rng: np.random.Generator, size_um: float, spacing: float, jitter: float) -> np.ndarray:
    """Points about `spacing` um apart all over the slide."""
    rows, columns = int(size_um / (spacing * 0.866)) + 2, int(size_um / spacing) + 2
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float64)
    points = np.stack([(x + 0.5 * (y % 2)) * spacing, y * spacing * 0.866], -1).reshape(-1, 2)
    points += rng.uniform(-jitter, jitter, points.shape) * spacing + rng.uniform(-0.5, 0.5, 2) * spacing
    return points[((points >= 0) & (points < size_um)).all(1)]


def sample_nearest(field: np.ndarray, points: np.ndarray) -> np.ndarray:
    index = np.clip((points / GRID).astype(int), 0, np.asarray(field.shape[1::-1]) - 1)
    return field[index[:, 1], index[:, 0]]


def node_points(n: int) -> np.ndarray:
    centre = (np.arange(n) + 0.5) * GRID
    return np.stack(np.meshgrid(centre, centre), -1)


def _best(field: np.ndarray, among: np.ndarray, count: float) -> np.ndarray:
    """The `count` nodes of `among` where the field is highest: areas are given, only their place is random."""
    count = int(min(count, among.sum()))
    if count == 0:
        return np.zeros_like(among)
    values = field[among]
    return among & (field >= np.partition(values, len(values) - count)[len(values) - count])


def _tissue(rng: np.random.Generator, n: int) -> np.ndarray:
    x, y = np.moveaxis(node_points(n) / (n * GRID) * 2 - 1, -1, 0)
    reach = (np.abs(x) ** 3 + np.abs(y) ** 3) ** (1 / 3)
    size = n * GRID
    outline = 0.86 - reach + 0.10 * smooth_noise(rng, n, size / 3, 3) > 0
    hole = smooth_noise(rng, n, size / 9, 2) > 2.3
    tissue = ndimage.binary_opening(outline, iterations=2) & ~hole
    labels, count = ndimage.label(tissue)
    if count > 1:
        areas = np.bincount(labels.ravel())
        areas[0] = 0
        tissue = areas[labels] > 0.1 * areas.max()
    return tissue


def _glands(rng: np.random.Generator, zone: np.ndarray, size_um: float) -> np.ndarray:
    points = hex_points(rng, size_um, rng.uniform(88, 112), 0.16)
    draws = rng.uniform(size=(len(points), 5))
    keep = sample_nearest(zone, points)
    d = draws[keep]
    columns = [27 + 12 * d[:, 0], 1 + 0.25 * d[:, 1], np.pi * d[:, 2], 0.04 + 0.10 * d[:, 3], 2 * np.pi * d[:, 4]]
    return np.concatenate([points[keep], np.stack(columns, -1)], 1)


def gland_radius(glands: np.ndarray, which: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distance from the centre of gland `which`, as a share of its outline in that direction."""
    x, y, radius, stretch, angle, wobble, phase = glands[which].T
    dx, dy = points[..., 0] - x, points[..., 1] - y
    u, v = dx * np.cos(angle) + dy * np.sin(angle), -dx * np.sin(angle) + dy * np.cos(angle)
    u, v = u / stretch, v * stretch
    return np.hypot(u, v) / (radius * (1 + wobble * np.cos(3 * np.arctan2(v, u) + phase)))


def wall_distance(centres: np.ndarray, points: np.ndarray, limit: float = 9.0) -> np.ndarray:
    """um from points to the border between the two nearest centres."""
    distance = cKDTree(centres).query(points, k=2)[0]
    return np.minimum((distance[..., 1] - distance[..., 0]) / 2, limit)


def _draw_glands(region: np.ndarray, glands: np.ndarray) -> None:
    if not len(glands):
        return
    points = node_points(len(region))
    distance, which = cKDTree(glands[:, :2]).query(points.reshape(-1, 2), distance_upper_bound=80.0)
    near = np.flatnonzero(np.isfinite(distance))
    ratio = gland_radius(glands, which[near], points.reshape(-1, 2)[near])
    flat = region.reshape(-1)
    open_here = flat[near] != BACKGROUND
    flat[near[open_here & (ratio < 1)]] = GLAND
    flat[near[open_here & (ratio < 0.52)]] = LUMEN


def _immune_pull(subtype: int, tumour: np.ndarray) -> np.ndarray:
    """Alpha: aggregates hug the nests. Beta: they keep away. The same area in both, so colour does not tell."""
    away = ndimage.distance_transform_edt(~tumour) * GRID if tumour.any() else np.zeros(tumour.shape)
    return (-1.6 if subtype == 0 else 1.6) * np.tanh((away - 40) / 25)


def _lesion(rng: np.random.Generator, region: np.ndarray) -> None:
    """One small focus, about 3 parts in a thousand of the tissue, in stroma away from the edge."""
    n = len(region)
    tissue = region != BACKGROUND
    radius = max(np.sqrt(0.003 * tissue.sum() / np.pi) * GRID, 30.0)
    depth = ndimage.distance_transform_edt(np.pad(tissue, 1))[1:-1, 1:-1] * GRID
    place = (region == STROMA) & (depth > min(1.2 * radius, 0.7 * depth.max()))
    if not place.any():
        place = tissue
    i, j = np.argwhere(place)[rng.integers(place.sum())]
    offset = node_points(n) - (np.array([j, i]) + 0.5) * GRID
    reach = np.hypot(offset[..., 0], offset[..., 1]) / radius
    region[(reach + 0.12 * smooth_noise(rng, n, 40) < 1) & tissue & (region != LUMEN)] = LESION


def _mosaic(rng: np.random.Generator, n: int, subtype: int, tissue_kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(region, gland zone). Shares of area are drawn alike for both subtypes; the subtype is in the arrangement."""
    tissue = _tissue(rng, n)
    area = float(tissue.sum())
    draw = rng.uniform((0.04, 0.12, 0.24, 0.08), (0.12, 0.24, 0.40, 0.15))
    share = dict(zip(("fat", "gland", "tumour", "immune"), draw.tolist(), strict=True))
    nests = (190.0, 75.0)[subtype]
    if tissue_kind == "normal":
        share |= {"tumour": 0.0, "fat": share["fat"] + 0.1, "gland": share["gland"] + 0.18}
    region = np.where(tissue, STROMA, BACKGROUND).astype(np.uint8)
    region[_best(smooth_noise(rng, n, 230, 2), tissue, share["fat"] * area)] = FAT
    zone = _best(smooth_noise(rng, n, 260), region == STROMA, share["gland"] * area)
    nest_noise = smooth_noise(rng, n, nests, 2)
    tumour = _best(nest_noise, (region == STROMA) & ~zone, share["tumour"] * area)
    region[tumour] = TUMOUR
    core = ndimage.distance_transform_edt(tumour) * GRID + 12 * smooth_noise(rng, n, 60)
    necrosis = _best(core, tumour, rng.uniform(0.03, 0.12) * tumour.sum())
    region[necrosis] = NECROSIS
    pull = _immune_pull(subtype, tumour) + smooth_noise(rng, n, 70, 2)
    region[_best(pull, (region == STROMA) & ~zone, share["immune"] * area)] = IMMUNE
    return region, zone


def draw_layout(
    rng: np.random.Generator, size_um: float, *, subtype: int, lesion: bool, tissue: str = "mixed", fibre: float = 0.0
) -> Layout:
    """`fibre` is the slide's main fibre direction in radians."""
    n = int(np.ceil(size_um / GRID))
    region, zone = _mosaic(rng, n, subtype, tissue)
    glands = _glands(
        rng, zone & (ndimage.distance_transform_edt(np.pad(region != BACKGROUND, 1))[1:-1, 1:-1] > 9), size_um
    )
    _draw_glands(region, glands)
    if lesion:
        _lesion(rng, region)
    points = node_points(n)
    centres = hex_points(rng, size_um + 200, rng.uniform(44, 60), 0.3) - 100
    across = points @ np.array([np.cos(fibre), np.sin(fibre)]) + 42 * smooth_noise(rng, n, 170, 2)
    along = points @ np.array([-np.sin(fibre), np.cos(fibre)]) + 42 * smooth_noise(rng, n, 170, 1)
    return Layout(
        size_um=size_um,
        region=region,
        fat_centres=centres,
        fibre_across=across.astype(np.float32),
        fibre_along=along.astype(np.float32),
        marker=smooth_noise(rng, n, 120),
        density=np.clip(0.5 + 0.3 * smooth_noise(rng, n, 150), 0, 1),
        glands=glands,
    )
