"""One block of a slide in one stain: H&E, IHC, fluorescence or the map of nuclei."""

import numpy as np
from scipy import ndimage

from .layout import GRID
from .look import Look
from .render import (
    HALO,
    PEN,
    TEXTURE,
    Canvas,
    Placed,
    Textures,
    chromatin,
    enlarge,
    if_ink,
    ihc_ink,
    nuclear_ink,
    nuclei_ink,
    stamp,
    tile,
)

Window = tuple[int, int, int, int]


def _fibres(up, textures: Textures) -> np.ndarray:
    across = up("fibre_across")
    along = up("fibre_along")
    row, column = (along * 1.0).astype(np.int32) & 1023, (across * 2.0).astype(np.int32) & 1023
    return textures.fibre[row, column]


def _ground(up, look: Look, textures: Textures, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """(eosin, haematoxylin) of everything but nuclei."""
    x0, y0, x1, y1 = window
    grain = tile(textures.grain, (x0, y0), (y1 - y0, x1 - x0))
    fibre, amount = _fibres(up, textures), up("fibre")
    cleft = np.clip((fibre - 1.15) * 1.6, 0, 0.9) * amount
    eosin = up("eosin") * (1 + look.fibre_contrast * amount * fibre) * (1 - cleft)
    eosin = eosin * np.clip(1 + 0.16 * up("grain") * grain, 0, None)
    line = np.clip(1.15 - up("wall", GRID / 2) / 1.1, 0, 1) * up("walled")
    eosin = eosin * (1 - 0.55 * line)
    eosin += up("fat") * 0.75 * np.clip(1.3 - up("fat_wall", GRID / 2) / 1.5, 0, 1)
    tissue = np.clip((0.5 - up("open") + 0.05 * grain) * 5 + 0.5, 0, 1)
    haematoxylin = up("haematoxylin") * np.clip(1 + 0.25 * grain, 0, None) * (1 - 0.5 * line)
    return np.maximum(eosin, 0) * tissue, haematoxylin * tissue


def _wider(window: Window, by: int) -> Window:
    return window[0] - by, window[1] - by, window[2] + by, window[3] + by


def _blurred(plane: np.ndarray, sigma_um: float, canvas: Canvas) -> np.ndarray:
    return ndimage.gaussian_filter(plane, sigma_um / canvas.mpp, truncate=2.5)


def _scan(
    density: list[np.ndarray],
    vectors: list[np.ndarray],
    grey: np.ndarray,
    look: Look,
    textures: Textures,
    window: Window,
    pen: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Beer-Lambert, glass, sensor noise -> uint8 [h, w, 3].

    `grey` is taken from all three channels alike: the compression of a file treats fine and coarse colour differently,
    so a texture with a colour of its own would give itself away in the statistics of colour.
    """
    x0, y0, x1, y1 = window
    shape = (y1 - y0, x1 - x0)
    shift = np.random.default_rng([look.seed, 3, x0 // 64, y0 // 64]).integers(0, 512, (4, 2))
    common = 0.7 * look.noise * tile(textures.noise, shift[3], shape) + 0.5 - 255 * grey
    rgb = np.empty((*shape, 3), np.uint8)
    for c in range(3):
        depth = density[0] * np.float32(vectors[0][c]) + density[1] * np.float32(vectors[1][c]) + pen * PEN[c]
        light = np.exp(-depth) * np.float32(255 * look.tint[c]) + common
        light += np.float32(0.7 * look.noise) * tile(textures.noise, shift[c], shape)
        rgb[..., c] = np.clip(light, 0, 255)
    return rgb


def draw_he(placed: Placed, fields: dict, look: Look, textures: Textures, canvas: Canvas, window: Window) -> np.ndarray:
    wide = _wider(window, HALO)

    def up(name: str, grid: float = GRID) -> np.ndarray:
        return enlarge(fields[name], canvas, wide, grid)

    eosin, ground = _ground(up, look, textures, wide)
    dense, inside, lifted = stamp(placed, textures.chromatin, nuclear_ink, 3, wide, 1.2)
    eosin = eosin * (1 - 0.5 * inside)
    haematoxylin = np.maximum(ground * (1 - inside), dense)
    pen: np.ndarray | float = 0.0
    if "fold" in fields:
        fold = 1 + 1.1 * up("fold")
        eosin, haematoxylin = eosin * fold, haematoxylin * fold
    if "bubble" in fields:
        ring = up("bubble")
        eosin, haematoxylin = eosin * (1 - 0.5 * ring) + 0.12 * ring, haematoxylin * (1 - 0.5 * ring) + 0.25 * ring
    if "pen" in fields:
        pen = up("pen")[HALO:-HALO, HALO:-HALO]
    planes = [_blurred(p, look.blur_um, canvas) for p in (haematoxylin, eosin)]
    grey = look.chromatin * chromatin(inside, lifted)
    if "blur" in fields and (far := up("blur")).any():
        *planes, grey = (p + far * (_blurred(p, 2.6, canvas) - p) for p in (*planes, grey))
    *planes, grey = (p[HALO:-HALO, HALO:-HALO] for p in (*planes, grey))
    return _scan(planes, [look.h, look.e], grey, look, textures, window, pen)


def draw_ihc(
    placed: Placed, fields: dict, look: Look, textures: Textures, canvas: Canvas, window: Window
) -> np.ndarray:
    wide = _wider(window, HALO)

    def up(name: str, grid: float = GRID) -> np.ndarray:
        return enlarge(fields[name], canvas, wide, grid)

    eosin, ground = _ground(up, look, textures, wide)
    dense, inside, lifted, brown = stamp(placed, textures.chromatin, ihc_ink, 4, wide, 1.7)
    haematoxylin = np.maximum(0.10 * eosin + 0.5 * ground * (1 - inside), 0.62 * dense)
    planes = [_blurred(p, look.blur_um, canvas) for p in (haematoxylin, 0.9 * brown + 0.05 * eosin)]
    grey = look.chromatin * chromatin(inside, lifted)
    *planes, grey = (p[HALO:-HALO, HALO:-HALO] for p in (*planes, grey))
    return _scan(planes, [look.h, look.dab], grey, look, textures, window)


def draw_if(placed: Placed, fields: dict, look: Look, textures: Textures, canvas: Canvas, window: Window) -> np.ndarray:
    """uint16 [channels, h, w]."""
    wide = _wider(window, HALO)

    def up(name: str, grid: float = GRID) -> np.ndarray:
        return enlarge(fields[name], canvas, wide, grid)

    eosin, _ = _ground(up, look, textures, wide)
    ground = eosin[HALO:-HALO, HALO:-HALO] * np.float32(look.background)
    planes = stamp(placed, textures.chromatin, if_ink, 4, wide, 2.0)
    shift = np.random.default_rng([look.seed, 4, window[0] // 64, window[1] // 64]).integers(0, 512, (4, 2))
    out = np.empty((4, *ground.shape), np.uint16)
    for c, plane in enumerate(planes):
        light = _blurred(plane, look.blur_um, canvas)[HALO:-HALO, HALO:-HALO]
        light = (light + ground * (0.4, 1.0, 0.8, 1.0)[c]) * np.float32(look.gain[c]) + 60
        light += np.sqrt(light) * 0.4 * tile(textures.noise, shift[c], light.shape)
        out[c] = np.clip(light, 0, 65535)
    return out


def draw_nuclei(placed: Placed, window: Window) -> np.ndarray:
    """float32 [h, w] of cell number + 1, 0 where there is none."""
    return stamp(placed, np.zeros((2, TEXTURE, TEXTURE), np.float32), nuclei_ink, 1, window, 1.2)[0]
