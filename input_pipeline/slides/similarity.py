"""What H&E and its partner have in common, nuclei, as a grey image; and how alike two such images are."""

import re
from collections.abc import Sequence

import numpy as np
from scipy import fft, ndimage

NUCLEAR = re.compile(r"dapi|hoechst|\bdna\d*\b|nucle|draq|sytox", re.IGNORECASE)
FLAT = 1e-6


def nuclear_channel(names: Sequence[str]) -> int | None:
    """The first channel that is named as a nuclear stain; None where no name says so."""
    return next((i for i, name in enumerate(names) if NUCLEAR.search(str(name))), None)


def is_brightfield(image: np.ndarray) -> bool:
    return image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


def nuclear_density(image: np.ndarray, *, channel: int | None = None, white: Sequence[float] = (255, 255, 255)):
    """[h, w, C] -> float32 [h, w]: high in nuclei, 0 in bare background.

    RGB: haematoxylin is what absorbs red; the part of it that DAB explains (which absorbs blue far more) is taken away.
    Anything else is fluorescence: the root of `channel`, or of the sum of all, so that no single bright nucleus rules.
    """
    if is_brightfield(image) and channel is None:
        red, blue = (_optical_density(image[..., i], white[i]) for i in (0, 2))
        return np.maximum(red - 0.35 * np.maximum(blue - red, 0), 0)
    plane = image.sum(-1, dtype=np.float32) if channel is None else image[..., channel].astype(np.float32)
    return np.sqrt(np.maximum(plane, 0))


def _optical_density(plane: np.ndarray, white: float) -> np.ndarray:
    table = np.maximum(np.log10((white + 1) / (np.arange(256) + 1)), 0).astype(np.float32)
    return table[plane]


def ncc(a: np.ndarray, b: np.ndarray, where: np.ndarray | None = None) -> float:
    """Pearson correlation over `where`, in [-1, 1]; 0 where either is flat."""
    a, b = (np.ravel(v if where is None else v[where]).astype(np.float64) for v in (a, b))
    if a.size < 2:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt(_dot(a, a) * _dot(b, b))
    return float(np.clip(_dot(a, b) / scale, -1, 1)) if scale > FLAT * a.size else 0.0


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    """Not BLAS, whose threads cost more than they bring here and make sums depend on their number."""
    return float(np.einsum("i,i", a, b))


def tile_similarity(
    he_tile: np.ndarray,
    partner_tile: np.ndarray,
    *,
    channel: int | None = None,
    inside: np.ndarray | None = None,
    sigma: float = 2.0,
) -> float:
    """How well the nuclei of two aligned tiles agree, in [-1, 1]: correlation of blurred nuclear density.

    `channel` is the partner's nuclear channel; without it an image of several channels scores as its best channel.
    `inside` (as sample_partner returns it) limits the comparison to pixels on the partner slide. sigma is in pixels.
    """
    if he_tile.shape[:2] != partner_tile.shape[:2]:
        raise ValueError(f"tiles differ in size: {he_tile.shape[:2]} and {partner_tile.shape[:2]}; align them first")
    if partner_tile.ndim == 2:
        partner_tile = partner_tile[..., None]
    channels: Sequence[int | None] = [channel]
    if channel is None and not is_brightfield(partner_tile):
        channels = range(partner_tile.shape[2])
    he = ndimage.gaussian_filter(nuclear_density(he_tile), sigma)
    partners = [ndimage.gaussian_filter(nuclear_density(partner_tile, channel=c), sigma) for c in channels]
    return max(ncc(he, partner, inside) for partner in partners)


def local_shifts(
    he: np.ndarray, partner: np.ndarray, inside: np.ndarray, centres: np.ndarray, patch: int, search: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each patch of `he` the shift (x, y) px to where `partner` is most like it, correlation there, and at 0.

    Patches that leave the image, are flat, or lie on less than three quarters of partner have correlation nan.
    """
    half, reach = patch // 2, patch // 2 + search
    x, y = np.round(centres).astype(int).T
    shifts = np.zeros((len(centres), 2))
    peak, here = np.full(len(centres), np.nan), np.full(len(centres), np.nan)
    fits = (x >= reach) & (y >= reach) & (x + reach <= he.shape[1]) & (y + reach <= he.shape[0])
    for group in np.array_split(np.flatnonzero(fits), max(1, -(-int(fits.sum()) // 64))):
        if not len(group):
            continue
        crop = [(slice(y[i] - reach, y[i] + reach), slice(x[i] - reach, x[i] + reach)) for i in group]
        core = [(slice(y[i] - half, y[i] + half), slice(x[i] - half, x[i] + half)) for i in group]
        scores = _ncc_maps(np.stack([he[c] for c in core]), np.stack([partner[c] for c in crop]))
        usable = np.array([inside[c].mean() > 0.75 for c in crop]) & (scores.max((1, 2)) > 0)
        group, scores = group[usable], scores[usable]
        if len(group):
            shifts[group], peak[group] = _peaks(scores)
            here[group] = scores[:, search, search]
    return shifts - np.where(np.isnan(peak)[:, None], 0, search), peak, here


def _ncc_maps(templates: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """[n, t, t] in [n, w, w] -> [n, w-t+1, w-t+1]: normalised correlation at every offset, 0 where either is flat."""
    side, size = templates.shape[1], windows.shape[1]
    fast = fft.next_fast_len(size, real=True)
    keep = size - side + 1
    zero_mean = templates - templates.mean((1, 2), keepdims=True)
    windows = windows - windows.mean((1, 2), keepdims=True)
    spectrum = np.conj(fft.rfft2(zero_mean, (fast, fast))) * fft.rfft2(windows, (fast, fast))
    product = fft.irfft2(spectrum, (fast, fast))[:, :keep, :keep]
    total, square = _box_sums(windows, side), _box_sums(windows**2, side)
    variance = np.maximum(square - total**2 / side**2, 0)
    scale = np.sqrt(variance * (zero_mean**2).sum((1, 2), dtype=np.float64)[:, None, None])
    flat = scale <= np.maximum(FLAT, 1e-3 * scale.max((1, 2), keepdims=True))
    return np.where(flat, 0, product / np.where(flat, 1, scale))


def _box_sums(images: np.ndarray, side: int) -> np.ndarray:
    sums = np.zeros((len(images), images.shape[1] + 1, images.shape[2] + 1))
    sums[:, 1:, 1:] = images.astype(np.float64).cumsum(1).cumsum(2)
    return sums[:, side:, side:] - sums[:, :-side, side:] - sums[:, side:, :-side] + sums[:, :-side, :-side]


def _peaks(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position (x, y) and height of the highest point of each map, to a fraction of a pixel by parabolas."""
    count, _, width = scores.shape
    flat = scores.reshape(count, -1).argmax(1)
    rows, columns, index = flat // width, flat % width, np.arange(count)
    padded = np.pad(scores, ((0, 0), (1, 1), (1, 1)), mode="edge")
    centre = padded[index, rows + 1, columns + 1]

    def offset(before: np.ndarray, after: np.ndarray) -> np.ndarray:
        bend = before - 2 * centre + after
        return np.where(bend < -1e-9, np.clip((before - after) / (2 * np.minimum(bend, -1e-9)), -0.5, 0.5), 0)

    dx = offset(padded[index, rows + 1, columns], padded[index, rows + 1, columns + 2])
    dy = offset(padded[index, rows, columns + 1], padded[index, rows + 2, columns + 1])
    return np.stack([columns + dx, rows + dy], axis=1), centre
