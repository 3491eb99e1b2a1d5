"""What differs from slide to slide and means nothing: stain, focus, noise, scanner, fibres, artefacts."""

from dataclasses import dataclass

import numpy as np

from . import layout as lay
from .layout import GRID

HAEMATOXYLIN = np.array([0.59, 0.72, 0.37])
EOSIN = np.array([0.12, 0.93, 0.36])
DAB = np.array([0.27, 0.57, 0.78])
ARTEFACTS = ("pen", "fold", "bubble", "blur")


@dataclass(frozen=True)
class Look:
    h: np.ndarray  # optical density of one unit of stain in R, G, B
    e: np.ndarray
    dab: np.ndarray
    tint: np.ndarray  # scanner: the colour of bare glass, 0..1
    blur_um: float
    noise: float  # grey levels
    fibre_angle: float
    fibre_um: float  # width of a bundle
    fibre_contrast: float
    crowding: float
    chromatin: float  # contrast, as a share of white
    background: float  # of fluorescence
    gain: np.ndarray  # of four fluorescence channels
    artefacts: tuple[str, ...]
    seed: int

    @property
    def stain(self) -> float:
        """How much denser haematoxylin is than eosin."""
        return float(np.linalg.norm(self.h) / np.linalg.norm(self.e))


def _stain(rng: np.random.Generator, vector: np.ndarray, spread: float, strength: float) -> np.ndarray:
    turned = np.clip(vector + spread * rng.standard_normal(3), 0.02, None)
    return strength * turned / np.linalg.norm(turned)


def draw_look(rng: np.random.Generator, artefact_chance: float = 0.12) -> Look:
    glass = 0.955 + 0.02 * rng.uniform(-1, 1)
    return Look(
        h=_stain(rng, HAEMATOXYLIN, 0.06, np.exp(rng.uniform(-0.28, 0.28)) * 1.25),
        e=_stain(rng, EOSIN, 0.06, np.exp(rng.uniform(-0.35, 0.35)) * 0.62),
        dab=_stain(rng, DAB, 0.03, rng.uniform(0.8, 1.3)),
        tint=glass + 0.012 * rng.standard_normal(3),
        blur_um=float(rng.uniform(0.22, 0.50)),
        noise=float(rng.uniform(1.0, 3.5)),
        fibre_angle=float(rng.uniform(0, np.pi)),
        fibre_um=float(rng.uniform(2.2, 5.0)),
        fibre_contrast=float(rng.uniform(0.18, 0.38)),
        crowding=float(rng.uniform(0.92, 1.12)),
        chromatin=0.7 * float(rng.uniform(0.08, 0.105)),
        background=float(rng.uniform(0.02, 0.08)),
        gain=rng.uniform(0.6, 1.4, 4) * np.array([9000, 7000, 6000, 6000]),
        artefacts=tuple(a for a in ARTEFACTS if rng.uniform() < artefact_chance),
        seed=int(rng.integers(1 << 31)),
    )


def artefact_maps(look: Look, n: int) -> dict[str, np.ndarray]:
    """Each artefact of the slide as a map of 0..1 on the layout's grid."""
    rng = np.random.default_rng([look.seed, 1])
    size = n * GRID
    x, y = np.moveaxis(lay.node_points(n), -1, 0)
    maps = {}
    for name in ARTEFACTS:
        cx, cy, turn, draw = rng.uniform((0.2, 0.2, 0, 0), (0.8, 0.8, np.pi, 1))
        bend = 0.05 * size * lay.smooth_noise(rng, n, size / 2)
        dx, dy = x - cx * size, y - cy * size
        along, across = dx * np.cos(turn) + dy * np.sin(turn), -dx * np.sin(turn) + dy * np.cos(turn) + bend
        stroke = np.clip(((0.15 + 0.15 * draw) * size - np.abs(along)) / 12, 0, 1)
        reach = np.hypot(dx, dy) + 0.3 * bend
        if name == "pen":
            field = np.clip((0.02 * size + 6 - np.abs(across)) / 8, 0, 1) * stroke
        elif name == "fold":
            field = np.clip((0.006 * size + 6 - np.abs(across)) / 5, 0, 1) * stroke
        elif name == "bubble":
            field = np.exp(-(((reach - (0.05 + 0.05 * draw) * size) / 9.0) ** 2))
        else:
            field = np.clip(((0.08 + 0.08 * draw) * size - reach) / 40, 0, 1)
        if name in look.artefacts:
            maps[name] = field.astype(np.float32)
    return maps
