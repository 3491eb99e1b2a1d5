"""Where small patches of H&E lie on a partner that is already roughly in place, measured block by block."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from input_pipeline.slides.mpp import WAY_OUT
from input_pipeline.slides.reader import Slide
from input_pipeline.slides.similarity import is_brightfield, local_shifts, nuclear_density
from input_pipeline.slides.transform import Transform
from input_pipeline.slides.warp import sample_partner

BLOCK_PX = 512  # what is in memory at once, whatever the size of the slide
MAX_PATCHES = 10_000  # bounds the time for whole slides
LEAST_PEAK = 0.1  # a patch whose best correlation is lower says nothing


@dataclass(frozen=True)
class View:
    """A slide as nuclear density."""

    slide: Slide
    mpp: float
    channel: int | None
    white: tuple[float, ...]

    @property
    def extent(self) -> tuple[float, float]:
        return self.slide.width * self.mpp, self.slide.height * self.mpp

    def pixels(self, mpp: float) -> np.ndarray:
        width, height = (max(1, round(v / mpp)) for v in self.extent)
        return self.slide.read_region(0, 0, width, height, mpp)

    def density(self, image: np.ndarray) -> np.ndarray:
        return nuclear_density(image, channel=self.channel, white=self.white)

    def block(self, xy_um: np.ndarray, size: tuple[int, int], mpp: float) -> np.ndarray:
        x, y = xy_um / self.mpp
        return self.density(self.slide.read_region(x, y, *size, mpp))

    def aligned(
        self, transform: Transform, xy_um: np.ndarray, size: tuple[int, int], mpp: float
    ) -> tuple[np.ndarray, np.ndarray]:
        keep = None if self.channel is None else [self.channel]
        corner = (float(xy_um[0]), float(xy_um[1]))
        pixels, inside = sample_partner(self.slide, transform, corner, size, mpp, channels=keep)
        return nuclear_density(pixels, channel=None if keep is None else 0, white=self.white), inside


def view(slide: Slide, channel: int | None, role: str) -> View:
    if slide.mpp is None:
        raise ValueError(f"{slide.path}: mpp unknown, so {role} cannot be registered; {WAY_OUT}")
    if channel is not None and not 0 <= channel < slide.channels:
        raise ValueError(f"{slide.path}: channel {channel} of {slide.channels}; allowed: 0 to {slide.channels - 1}")
    thumbnail = slide.thumbnail(256)
    white: tuple[float, ...] = (255.0, 255.0, 255.0)
    if is_brightfield(thumbnail):
        white = tuple(float(v) for v in np.clip(np.percentile(thumbnail.reshape(-1, 3), 98, axis=0), 160, 255))
    return View(slide, float(slide.mpp), channel, white)


@dataclass(frozen=True)
class Tissue:
    """Where patches may lie: the mask of the H&E slide, at the resolution of the coarse images."""

    mask: np.ndarray
    mpp: float
    extent: tuple[float, float]

    def widened(self, step: float) -> float:
        """`step`, or what MAX_PATCHES allow on so much tissue."""
        return max(step, float(np.sqrt(self.mask.sum() * self.mpp**2 / MAX_PATCHES)))

    def lattice(self, patch_um: float, step: float, offset: float = 0.0) -> np.ndarray:
        """Centres (um) of patches of which half or more is tissue; a wider lattice where there would be too many."""
        step = self.widened(step)
        share = ndimage.uniform_filter(
            self.mask.astype(np.float32), max(1, round(patch_um / self.mpp)), mode="constant"
        )
        axes = [np.arange(patch_um / 2 + offset * step, v - patch_um / 2 + 1e-6, step) for v in self.extent]
        points = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
        last = np.array(self.mask.shape[::-1]) - 1
        column, row = np.minimum((points / self.mpp).astype(int), last).T
        return points[share[row, column] >= 0.5]


@dataclass(frozen=True)
class Flow:
    centres: np.ndarray  # um, H&E frame
    shifts: np.ndarray  # um: where the partner fits best
    peak: np.ndarray  # correlation there
    here: np.ndarray  # correlation without a shift

    @property
    def distance(self) -> np.ndarray:
        return np.linalg.norm(self.shifts, axis=1)


def measure(
    he: View, partner: View, transform: Transform, centres: np.ndarray, mpp: float, patch: int, search: int
) -> Flow:
    """`patch` and `search` in pixels at `mpp`; patches that say nothing are left out."""
    shifts, peak, here = np.zeros((len(centres), 2)), np.full(len(centres), np.nan), np.full(len(centres), np.nan)
    reach = (patch // 2 + search + 1) * mpp
    blocks = np.floor(centres / (BLOCK_PX * mpp)).astype(int)
    for block in np.unique(blocks[:, ::-1], axis=0)[:, ::-1]:
        pick = np.flatnonzero((blocks == block).all(1))
        low = centres[pick].min(0) - reach
        width, height = np.ceil((centres[pick].max(0) + reach - low) / mpp).astype(int).tolist()
        moving, inside = partner.aligned(transform, low, (width, height), mpp)
        if not inside.any():
            continue
        fixed = ndimage.gaussian_filter(he.block(low, (width, height), mpp), 1.0)
        moving = ndimage.gaussian_filter(moving, 1.0)
        local = (centres[pick] - low) / mpp
        shifts[pick], peak[pick], here[pick] = local_shifts(fixed, moving, inside, local, patch, search)
    good = peak > LEAST_PEAK
    return Flow(centres[good], shifts[good] * mpp, peak[good], here[good])
