"""From cells and regions to pixels, block by block, so that a slide of any size needs the memory of one block.

Every stain draws the SAME cells: a partner moves their centres and axes through its transform, no raster is warped.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from ..slides.transform import Transform
from . import cells as cl
from . import layout as lay
from .cells import Cells
from .layout import GRID, Layout
from .look import Look, artefact_maps

BLOCK = 1024
HALO = 16
CHROMATIN_UM = (0.40, 0.95)  # how coarse the chromatin of a negative and of a positive nucleus is
CHROMATIN_LIMIT = 2.5  # deviations
TEXTURE = 512  # px of a texture that repeats; a power of two
IF_CHANNELS = ("DAPI", "MARKER", "PANCK", "CD45")
#                       bg   stroma tumour immune gland lumen fat  necrosis lesion
EOSIN_OF = np.array([0.00, 0.95, 0.80, 0.50, 0.85, 0.03, 0.05, 1.15, 0.75], np.float32)
HAEMATOXYLIN_OF = np.array([0.0, 0.02, 0.14, 0.10, 0.12, 0.0, 0.0, 0.06, 0.16], np.float32)
FIBRE_OF = np.array([0, 1.0, 0.12, 0.35, 0.12, 0, 0, 0.25, 0.12], np.float32)
GRAIN_OF = np.array([0, 0.25, 0.8, 0.8, 0.7, 0, 0, 1.6, 0.8], np.float32)
WALLED = np.array([0, 0, 1.0, 0.0, 0.9, 0, 0, 0, 1.0], np.float32)
WALLED_TYPES = (cl.TUMOUR, cl.EPITHELIAL, cl.LESION, cl.LYMPHOCYTE)
OPEN = np.array([1.0, 0, 0, 0, 0, 1, 0, 0, 0], np.float32)
PEN = np.array([1.6, 1.1, 0.25], np.float32)


@dataclass(frozen=True)
class Canvas:
    """The pixels to fill; without a transform they are the H&E slide's own."""

    width: int
    height: int
    mpp: float
    transform: Transform | None = None


@dataclass(frozen=True)
class Placed:
    """Cells in pixels of a canvas."""

    cells: Cells
    x: np.ndarray
    y: np.ndarray
    a: np.ndarray
    b: np.ndarray
    angle: np.ndarray


def place(cells: Cells, canvas: Canvas) -> Placed:
    points, step = cells.points, np.stack([np.cos(cells.angle), np.sin(cells.angle)], -1)
    ahead = points + step
    if canvas.transform is not None:
        points, ahead = canvas.transform(points), canvas.transform(ahead)
    turn = ahead - points
    scale = np.hypot(*turn.T) / canvas.mpp
    angle = np.arctan2(turn[:, 1], turn[:, 0])
    x, y = (points / canvas.mpp).T
    return Placed(cells, x, y, cells.a * scale, cells.b * scale, angle)


def _smooth(values: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(values, 0.7)


def canvas_fields(layout: Layout, cells: Cells, look: Look, canvas: Canvas) -> dict[str, np.ndarray]:
    """The layout as this canvas sees it, on grids of its own that blocks are enlarged from."""
    shape = (int(np.ceil(canvas.height * canvas.mpp / GRID)), int(np.ceil(canvas.width * canvas.mpp / GRID)))
    points = _he_points(shape, GRID, canvas)
    inside = ((points >= 0) & (points < layout.size_um)).all(-1)
    region = np.where(inside, lay.sample_nearest(layout.region, points.reshape(-1, 2)).reshape(shape), 0)
    node = (points / GRID - 0.5).transpose(2, 0, 1)[::-1]
    names = ("fibre_across", "fibre_along")
    fields = {k: ndimage.map_coordinates(getattr(layout, k), node, order=1, mode="nearest") for k in names}
    fat = region == lay.FAT
    fields |= {
        "eosin": _smooth(EOSIN_OF[region]),
        "haematoxylin": _smooth(HAEMATOXYLIN_OF[region]),
        "fibre": _smooth(FIBRE_OF[region]),
        "grain": _smooth(GRAIN_OF[region]),
        "walled": _smooth(WALLED[region]),
        "open": _smooth(OPEN[region]),
        "fat": _smooth(fat.astype(np.float32)),
        "wall": _walls(cells.points[np.isin(cells.type, WALLED_TYPES)], WALLED[region] > 0, canvas),
        "fat_wall": _walls(layout.fat_centres, fat, canvas),
    }
    if canvas.transform is None:
        fields |= artefact_maps(look, len(layout.region))
    return {k: np.ascontiguousarray(v, np.float32) for k, v in fields.items()}


def _he_points(shape: tuple[int, int], grid: float, canvas: Canvas) -> np.ndarray:
    """[h, w, 2] um of the H&E frame under the nodes of a grid; the bend is worked out on every fourth node."""
    nodes = _nodes(shape, grid)
    if canvas.transform is None:
        return nodes
    straight = Transform(canvas.transform.matrix)
    coarse = _nodes((shape[0] // 4 + 1, shape[1] // 4 + 1), 4 * grid)
    bend = canvas.transform.inverse(coarse, 6) - straight.inverse(coarse)
    here, window = Canvas(shape[1], shape[0], grid), (0, 0, shape[1], shape[0])
    return straight.inverse(nodes) + np.stack([enlarge(bend[..., i], here, window, 4 * grid) for i in (0, 1)], -1)


def _nodes(shape: tuple[int, int], grid: float) -> np.ndarray:
    x, y = ((np.arange(n) + 0.5) * grid for n in shape[::-1])
    return np.stack(np.meshgrid(x, y), -1)


def _walls(centres: np.ndarray, where: np.ndarray, canvas: Canvas) -> np.ndarray:
    """um to the border between two cells, at half the grid, in regions where cells touch."""
    wanted = np.repeat(np.repeat(ndimage.maximum_filter(where, 3), 2, 0), 2, 1)
    wall = np.full(wanted.shape, 9.0, np.float32)
    if len(centres) > 2 and wanted.any():
        wall[wanted] = lay.wall_distance(centres, _he_points(wanted.shape, GRID / 2, canvas)[wanted])
    return wall


def wrapped_blur(image: np.ndarray, sigma: tuple[float, float]) -> np.ndarray:
    """Gaussian blur of an image that repeats; by Fourier transform, so a wide one costs no more than a narrow one."""
    rows, columns = (np.exp(-2 * (np.pi * f * s) ** 2) for f, s in zip(_frequencies(image), sigma, strict=True))
    return np.fft.irfft2(np.fft.rfft2(image) * rows[:, None] * columns, image.shape).astype(np.float32)


def _frequencies(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.fft.fftfreq(image.shape[0]), np.fft.rfftfreq(image.shape[1])


def band_noise(rng: np.random.Generator, sigma: tuple[float, float], size: int = TEXTURE) -> np.ndarray:
    """A texture that repeats, of zero mean and unit deviation."""
    noise = wrapped_blur(rng.standard_normal((size, size)), sigma)
    return (noise - noise.mean()) / noise.std()


def _chromatin(rng: np.random.Generator, look: Look, mpp: float) -> np.ndarray:
    """[negative, positive]: fine and coarse chromatin as the optics show it, of one histogram: colour cannot tell."""
    banks = []
    for size_um in CHROMATIN_UM:
        white = rng.standard_normal((TEXTURE, TEXTURE))
        band = [wrapped_blur(white, (s * size_um / mpp,) * 2) for s in (1.0, 1.8)]
        detail = band[0] / band[0].std() - 0.6 * band[1] / band[1].std()
        bank = wrapped_blur(detail, (look.blur_um / mpp,) * 2)
        banks.append(np.clip((bank - bank.mean()) / bank.std(), -CHROMATIN_LIMIT, CHROMATIN_LIMIT))
    return np.stack(banks)


@dataclass(frozen=True)
class Textures:
    chromatin: np.ndarray
    grain: np.ndarray
    fibre: np.ndarray
    noise: np.ndarray


def draw_textures(look: Look, mpp: float) -> Textures:
    rng = np.random.default_rng([look.seed, 2])
    fibre = band_noise(rng, (22.0, look.fibre_um * 0.9), 1024) + 0.6 * band_noise(
        rng, (12.0, look.fibre_um * 0.35), 1024
    )
    return Textures(
        chromatin=_chromatin(rng, look, mpp),
        grain=band_noise(rng, (0.8 / mpp,) * 2) + 0.7 * band_noise(rng, (3.0 / mpp,) * 2),
        fibre=fibre / fibre.std(),
        noise=rng.standard_normal((TEXTURE, TEXTURE)).astype(np.float32),
    )


@dataclass(frozen=True)
class Patches:
    """A batch of nuclei on small squares: [n, k, k] pixels each."""

    rho: np.ndarray  # distance from the centre as a share of the outline
    inside: np.ndarray  # 0..1 with a soft edge
    texture: np.ndarray
    cells: Cells


Ink = Callable[[Patches], np.ndarray]  # -> [n, planes, k, k]


def _patches(placed: Placed, index: np.ndarray, k: int, bank: np.ndarray, soft: float) -> tuple[Patches, np.ndarray]:
    x, y, a, b = (np.asarray(v[index], np.float32) for v in (placed.x, placed.y, placed.a, placed.b))
    corner = np.stack([np.floor(x), np.floor(y)], -1).astype(int) - k // 2
    span = np.arange(k, dtype=np.float32) + 0.5
    dx = (span + (corner[:, 0] - x)[:, None].astype(np.float32))[:, None, :]
    dy = (span + (corner[:, 1] - y)[:, None].astype(np.float32))[:, :, None]
    c, s = (f(placed.angle[index]).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    u, v = (dx * c + dy * s) / a[:, None, None], (dy * c - dx * s) / b[:, None, None]
    uu, vv = u * u, v * v
    square = uu + vv + 1e-6
    rho = np.sqrt(square)
    cells = placed.cells.take(index)
    p, q, r, t = (cells.bumps[:, i].astype(np.float32)[:, None, None] for i in range(4))
    rho = rho - (p * (uu - vv) + q * (2 * u * v)) / rho - (r * u * (uu - 3 * vv) + t * v * (3 * uu - vv)) / square
    edge = np.sqrt(a * b)[:, None, None] / soft
    inside = np.clip((1 - rho) * edge + 0.5, 0, 1)
    row = ((cells.seed & 511)[:, None] + np.arange(k)) & (TEXTURE - 1)
    column = ((cells.seed >> 9 & 511)[:, None] + np.arange(k)) & (TEXTURE - 1)
    texture = bank[cells.positive.astype(np.intp)[:, None, None], row[:, :, None], column[:, None, :]]
    return Patches(rho, inside, texture, cells), corner


def stamp(
    placed: Placed,
    chromatin_bank: np.ndarray,
    ink: Ink,
    planes: int,
    window: tuple[int, int, int, int],
    reach: float,
    soft: float = 1.4,
):
    """[planes, h, w] of a window (x0, y0, x1, y1): the densest ink wins where cells overlap."""
    x0, y0, x1, y1 = window
    extent = np.ceil(placed.a * reach / 4).astype(int) * 8 + 2
    pad = int(extent.max(initial=2))
    out = np.zeros((planes, y1 - y0 + 2 * pad, x1 - x0 + 2 * pad), np.float32)
    near = (placed.x > x0 - pad / 2) & (placed.x < x1 + pad / 2) & (placed.y > y0 - pad / 2) & (placed.y < y1 + pad / 2)
    for k in np.unique(extent[near]):
        chosen = np.flatnonzero(near & (extent == k))
        for batch in np.array_split(chosen, max(len(chosen) * k * k // 400_000, 1)):
            patches, corner = _patches(placed, batch, int(k), chromatin_bank, soft)
            drawn = ink(patches)
            for (x, y), patch in zip((corner - (x0 - pad, y0 - pad)).tolist(), drawn, strict=True):
                view = out[:, y : y + k, x : x + k]
                np.maximum(view, patch, out=view)
    return out[:, pad:-pad, pad:-pad]


def nuclear_ink(p: Patches) -> np.ndarray:
    """(density, inside, chromatin): the densest ink wins, so chromatin is lifted above 0; `chromatin` undoes that."""
    rim = np.clip((p.rho - 0.72) * 3.2, 0, 0.55)
    density = p.inside * p.cells.dark.astype(np.float32)[:, None, None] * (0.78 + rim)
    return np.stack([density, p.inside, p.inside * (p.texture + CHROMATIN_LIMIT)], 1)


def chromatin(inside: np.ndarray, lifted: np.ndarray) -> np.ndarray:
    return lifted - CHROMATIN_LIMIT * inside


def ihc_ink(p: Patches) -> np.ndarray:
    ring = np.clip(1.25 - np.abs(p.rho - 1.12) / 0.30, 0, 1)
    brown = ring * (p.cells.positive * (0.55 + 0.4 * p.cells.dark)).astype(np.float32)[:, None, None]
    return np.concatenate([nuclear_ink(p), brown[:, None]], 1)


def if_ink(p: Patches) -> np.ndarray:
    bright = (1.5 / (0.5 + p.cells.dark)).astype(np.float32)[:, None, None]
    dapi = p.inside * bright * (0.85 - 0.2 * p.rho)
    ring = np.clip(1.2 - np.abs(p.rho - 1.22) / 0.22, 0, 1)
    wide = np.clip(1.3 - np.abs(p.rho - 1.45) / 0.5, 0, 0.8)
    of = [p.cells.positive, np.isin(p.cells.type, (cl.TUMOUR, cl.EPITHELIAL, cl.LESION)), p.cells.type == cl.LYMPHOCYTE]
    marker, epithelium, leucocyte = (np.asarray(o, np.float32)[:, None, None] for o in of)
    return np.stack([dapi, ring * marker * bright, wide * epithelium, ring * leucocyte * bright], 1)


def nuclei_ink(p: Patches) -> np.ndarray:
    """Instances as whole numbers, so that the larger wins an overlap: `seed` holds the number."""
    inside = (p.rho < 1).astype(np.float32)
    return (inside * p.cells.seed.astype(np.float32)[:, None, None])[:, None]


def enlarge(field: np.ndarray, canvas: Canvas, window: tuple[int, int, int, int], grid: float = GRID) -> np.ndarray:
    """[h, w] of a window: linear between nodes, and the nearest node beyond the last."""
    x0, y0, x1, y1 = window
    scale = canvas.mpp / grid
    rows, columns = (
        np.arange(int(np.floor(a * scale)) - 1, int(np.ceil(b * scale)) + 2) for a, b in ((y0, y1), (x0, x1))
    )
    near = field[np.ix_(np.clip(rows, 0, field.shape[0] - 1), np.clip(columns, 0, field.shape[1] - 1))]
    left, top = x0 * scale - columns[0], y0 * scale - rows[0]
    box = (left, top, left + (x1 - x0) * scale, top + (y1 - y0) * scale)
    image = Image.fromarray(near.astype(np.float32))
    return np.asarray(image.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=box))


def tile(texture: np.ndarray, corner: tuple[int, int] | np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    size, (x, y) = len(texture), corner
    return texture[np.ix_((y + np.arange(shape[0])) % size, (x + np.arange(shape[1])) % size)]
