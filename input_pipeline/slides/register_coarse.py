"""Where a partner lies on its H&E when nothing is known: every rotation, both mirrors, any shift."""

from dataclasses import dataclass

import numpy as np
from scipy import fft, ndimage

from input_pipeline.slides.register_fit import compose, fit_affine
from input_pipeline.slides.similarity import local_shifts, ncc

ANGLES = 90
CANDIDATES = 6
MIN_OVERLAP = 0.35  # of the smaller image


@dataclass(frozen=True)
class Coarse:
    matrix: np.ndarray  # H&E um -> partner um
    score: float  # correlation of blurred nuclear density over the overlap
    mirrored: bool


def warp_image(image: np.ndarray, matrix: np.ndarray, shape: tuple[int, int], fill: float = 0.0) -> np.ndarray:
    """out(p) = image(matrix p), both in pixels from the outer corner."""
    linear, shift = matrix[:, :2], matrix[:, 2]
    offset = (linear @ [0.5, 0.5] + shift - 0.5)[::-1]
    return ndimage.affine_transform(image, linear[::-1, ::-1], offset, shape, np.float32, order=1, cval=fill)


def turn(angle: float, mirror: bool) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]]) @ np.diag([-1.0 if mirror else 1.0, 1.0])


class _Search:
    """Normalised correlation of one image with others over every shift, counting only where both have pixels."""

    def __init__(self, fixed: np.ndarray, moving_side: int):
        self.side = moving_side
        self.shape = tuple(fft.next_fast_len(int(s) + moving_side, real=True) for s in fixed.shape)
        self.ones = np.ones_like(fixed)
        self.fixed = fixed
        self.spectra = [np.conj(fft.rfft2(v, self.shape)) for v in (self.ones, fixed, fixed**2)]

    def best(self, moving: np.ndarray, where: np.ndarray) -> tuple[float, np.ndarray]:
        """Highest correlation and the shift t, (x, y), with moving(p + t) over fixed(p)."""
        one, value, square = (fft.rfft2(v, self.shape) for v in (where, moving * where, moving**2 * where))
        f_one, f_value, f_square = self.spectra

        def sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return fft.irfft2(a * b, self.shape)

        count = np.maximum(sums(f_one, one), 1)
        a, b = sums(f_value, one), sums(f_one, value)
        cross = sums(f_value, value) - a * b / count
        variance = (sums(f_square, one) - a**2 / count) * (sums(f_one, square) - b**2 / count)
        least = MIN_OVERLAP * min(self.fixed.size, float(where.sum()))
        good = (count > least) & (variance > 1e-6 * variance.max())
        score = np.where(good, cross / np.sqrt(np.maximum(variance, 1e-12)), -1)
        at = np.array(np.unravel_index(score.argmax(), score.shape))
        wrapped = np.where(at >= self.side, at - self.shape, at)
        return float(score.max()), wrapped[::-1].astype(float)


def search(fixed: np.ndarray, moving: np.ndarray) -> list[tuple[float, float, bool, np.ndarray]]:
    """(score, angle, mirrored, matrix fixed px -> moving px) of every rotation and mirror, best first."""
    side = int(np.ceil(np.hypot(*moving.shape))) + 2
    engine = _Search(fixed, side)
    middle, centre = np.array(moving.shape[::-1]) / 2, np.full(2, side / 2)
    where_all = np.ones_like(moving)
    found = []
    for mirror in (False, True):
        for angle in np.arange(ANGLES) * 2 * np.pi / ANGLES:
            linear = turn(angle, mirror)
            canvas = np.column_stack([linear, middle - linear @ centre])
            turned, where = (warp_image(v, canvas, (side, side)) for v in (moving, where_all))
            score, shift = engine.best(turned, where)
            matrix = np.column_stack([linear, canvas[:, 2] + linear @ shift])
            found.append((score, float(angle), mirror, matrix))
    return sorted(found, key=lambda v: -v[0])


def _distinct(found: list, count: int) -> list:
    kept: list = []
    for entry in found:
        gap = [abs((entry[1] - k[1] + np.pi) % (2 * np.pi) - np.pi) for k in kept if k[2] == entry[2]]
        if not gap or min(gap) > 0.2:
            kept.append(entry)
        if len(kept) == count:
            break
    return kept


def _refine(fixed: np.ndarray, moving: np.ndarray, matrix: np.ndarray, seed: int) -> tuple[float, np.ndarray]:
    """Shifts of patches, fitted by a similarity and then an affine map; the best correlation met on the way."""
    patch = int(np.clip(min(fixed.shape) // 6, 16, 48)) // 2 * 2
    y, x = np.mgrid[patch : fixed.shape[0] - patch + 1 : patch // 2, patch : fixed.shape[1] - patch + 1 : patch // 2]
    centres = np.stack([x.ravel(), y.ravel()], 1).astype(float)
    ones = np.ones_like(moving)
    best = (-1.0, matrix)
    for rigid in (True, True, True, False, False):
        warped, where = warp_image(moving, matrix, fixed.shape), warp_image(ones, matrix, fixed.shape) > 0.99
        score = ncc(fixed, warped, where) if where.mean() > 0.1 else -1.0
        best = max(best, (score, matrix), key=lambda v: v[0])
        shifts, peak, _ = local_shifts(fixed, warped, where, centres, patch, patch // 2)
        good = peak > 0.2
        if good.sum() < 6:
            break
        step, inliers = fit_affine(
            centres[good], centres[good] + shifts[good], peak[good] ** 2, 2.5 if rigid else 2.0, seed=seed, rigid=rigid
        )
        if inliers.sum() < 5:
            break
        matrix = compose(matrix, step)
    return best


def coarse(fixed: np.ndarray, moving: np.ndarray, mpp: float, seed: int = 0) -> Coarse:
    """`fixed` and `moving`: whole slides as nuclear density at `mpp`, background 0."""
    small_fixed, small_moving = (_halve(ndimage.gaussian_filter(v, 2.0)) for v in (fixed, moving))
    candidates = _distinct(search(small_fixed, small_moving), CANDIDATES)
    soft_fixed, soft_moving = (ndimage.gaussian_filter(v, 1.0) for v in (fixed, moving))
    refined = []
    for _, _, mirror, matrix in candidates:
        full = np.column_stack([matrix[:, :2], matrix[:, 2] * 2])
        score, full = _refine(soft_fixed, soft_moving, full, seed)
        refined.append((score, mirror, full))
    score, mirror, best = max(refined, key=lambda v: v[0])
    matrix = np.column_stack([best[:, :2], best[:, 2] * mpp])
    return Coarse(matrix, score, mirror)


def _halve(image: np.ndarray) -> np.ndarray:
    height, width = (s // 2 * 2 for s in image.shape)
    return image[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3))
