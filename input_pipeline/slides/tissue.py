"""Which pixels of a thumbnail are tissue, and which of those are covered by pen or out of focus.

Everything is measured against the slide itself (its background, its typical tissue) and in micrometres, so one set of
numbers serves H&E, IHC, pale and dark stains and any working resolution of about 2 to 16 um per pixel. Deterministic.

Decisions a user can see
- A hole (lumen, tear, gap) of HOLE_UM2 or more is kept out; smaller ones, adipocytes among them, count as tissue, so
  fat is tissue. A separate piece under SPECK_UM2 is dropped.
- Ink of blue, green, red or black pen, coverslip edges and other neutral (uncoloured) marks are kept out. A large pool
  of pure red chromogen (AEC) looks like red ink and is kept out too; a brightfield image without colour has no tissue.
- A smear of dye without structure (eosin halo) is background.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

KINDS = ("auto", "brightfield", "fluorescence")
HOLE_UM2 = 12_500.0  # one 224-px tile at 0.5 um/px
SPECK_UM2 = 12_500.0
INK_UM2 = 6_000.0
WORK_UM = 4.0
WORK_PIXELS = 1_500_000
BLUR_PIXELS = 8_000_000
WINDOW_UM = 32.0
BLUR_WINDOW_UM = 96.0
BLUR_RATIO = 0.09
WHITE = 240.0


class Density(NamedTuple):
    """Optical density over the background: smoothed [C, h, w], the strongest channel [h, w], and its local texture."""

    planes: np.ndarray
    peak: np.ndarray
    texture: np.ndarray
    floor: float


def tissue_mask(image: np.ndarray, mpp: float, *, kind: str = "auto") -> np.ndarray:
    """[h, w, C] pixels at `mpp` um -> bool [h, w]; empty for a blank slide, all of it for a field inside the tissue."""
    image = _checked(image, mpp)
    if kind not in KINDS:
        raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")
    if kind == "auto":
        kind = guess_kind(image)
    if kind == "brightfield" and image.dtype != np.uint8:
        raise ValueError(f"a brightfield image has uint8 pixels, not {image.dtype}; is it kind='fluorescence'?")
    work, factor = _reduced(image, mpp, WORK_UM)
    mask = (_brightfield if kind == "brightfield" else _fluorescence)(work, mpp * factor)
    return _enlarged(mask, factor, image.shape)


def quality_flags(image: np.ndarray, mpp: float, mask: np.ndarray) -> dict[str, np.ndarray]:
    """{'pen', 'blur'}: bool [h, w] maps of a thumbnail (2 to 4 um per pixel is best); no pen in fluorescence.

    `pen` is found anywhere, `blur` only inside the mask. Blur narrower than about one pixel (sigma < mpp) does not
    show in a thumbnail: use `sharpness` on a tile for that. Pixels without any structure are never called blurred.
    """
    image = _checked(image, mpp)
    if mask.shape != image.shape[:2]:
        raise ValueError(f"the mask {mask.shape} and the image {image.shape[:2]} differ in size")
    if guess_kind(image) == "fluorescence":
        nothing = np.zeros(mask.shape, bool)
        return {"pen": nothing, "blur": _blurred(image, mpp) & mask}
    work, factor = _reduced(image, mpp, WORK_UM)
    pen = _enlarged(_ink(_density(work, mpp * factor), mpp * factor), factor, image.shape)
    return {"pen": pen, "blur": _blurred(image, mpp) & mask & ~pen}


def sharpness(image: np.ndarray, mpp: float) -> float:
    """High over middle frequency energy of one tile: free of stain and contrast; nan where there is no structure.

    Seen at the resolution given; below BLUR_RATIO the tile is out of focus by more than about one pixel.
    """
    image = _checked(image, mpp)
    high, middle, usable = _bands(image.mean(axis=2, dtype=np.float32), None)
    return float(high / middle) if usable else float("nan")


def guess_kind(image: np.ndarray) -> str:
    """Brightfield is 8-bit RGB and mostly bright; padding of pure black says nothing."""
    if image.dtype != np.uint8 or image.shape[2] != 3:
        return "fluorescence"
    brightest = image[::4, ::4].max(axis=2)
    seen = brightest[brightest > 0]
    return "brightfield" if seen.size and np.median(seen) >= 96 else "fluorescence"


def _checked(image: np.ndarray, mpp: float) -> np.ndarray:
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or min(image.shape) < 1:
        raise ValueError(f"an image has shape [height, width, channels], none of them 0; not {image.shape}")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise ValueError(f"pixels are finite; {np.sum(~np.isfinite(image))} values are NaN or infinite")
    if not 0.01 <= mpp <= 1000:
        raise ValueError(f"mpp is micrometres per pixel of the image given, 0.01 to 1000, not {mpp}")
    return image


def _reduced(image: np.ndarray, mpp: float, target: float, pixels: int = WORK_PIXELS) -> tuple[np.ndarray, int]:
    """float32 [C, h, w], means of `factor` px blocks: a pixel is near `target` um, and memory is bounded."""
    h, w, channels = image.shape
    factor = max(1, int(target / mpp + 1e-6), int(np.ceil(np.sqrt(h * w / pixels))))
    factor = min(factor, h, w)
    if factor == 1:
        return np.ascontiguousarray(np.moveaxis(image, 2, 0), np.float32), 1
    short = [-n % factor for n in (h, w)]
    if any(short):
        image = np.pad(image, ((0, short[0]), (0, short[1]), (0, 0)), mode="edge")
    blocks = image.reshape(image.shape[0] // factor, factor, -1, factor * channels)
    total = np.zeros((blocks.shape[0], blocks.shape[2], factor * channels), np.float32)
    for row in range(factor):
        total += blocks[:, row]
    means = total.reshape(*total.shape[:2], factor, channels).sum(axis=2) / factor**2
    return np.ascontiguousarray(np.moveaxis(means, 2, 0)), factor


def _enlarged(mask: np.ndarray, factor: int, shape: tuple[int, ...]) -> np.ndarray:
    if factor > 1:
        mask = mask.repeat(factor, axis=0).repeat(factor, axis=1)
    return np.ascontiguousarray(mask[: shape[0], : shape[1]])


def _box(image: np.ndarray, size_px: float) -> np.ndarray:
    return ndimage.uniform_filter(image, max(3, round(size_px) | 1), mode="nearest")


def _soft(image: np.ndarray, mpp: float) -> np.ndarray:
    sigma = max(0.6, 6.0 / mpp)
    return ndimage.gaussian_filter(image, sigma, mode="nearest", truncate=2.5)


def _otsu(values: np.ndarray, bins: int = 256) -> float:
    counts, edges = np.histogram(values, bins)
    centres = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)
    mass = np.cumsum(counts * centres)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = below * above * (mass / below - (mass[-1] - mass) / above) ** 2
    return float(centres[np.nanargmax(spread[:-1])]) if np.ptp(values) > 0 else float(edges[-1])


def _deviation(image: np.ndarray, size_px: float) -> np.ndarray:
    """Local standard deviation about the local mean; a slope (vignetting, glow, halo) adds nothing."""
    detail = image - _box(image, size_px)
    return np.sqrt(np.maximum(_box(detail * detail, size_px), 0))


def _background(work: np.ndarray, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """The light of bare glass per channel, and which pixels are glass for sure; WHITE at least where none is seen.

    Glass is the commonest bright level among pixels without structure. Pure white or black is padding by the scanner.
    """
    grey = work.mean(axis=0)
    padding = (work.min(axis=0) >= 254.5) | (work.max(axis=0) <= 0.5)
    if padding.mean() > 0.98:
        return np.full(len(work), 255.0, np.float32), padding
    sample = work[:, ~padding]
    bright = np.percentile(sample[:, :: max(1, sample.shape[1] // 200_000)], 98, axis=1).astype(np.float32)
    flat = _deviation(ndimage.gaussian_filter(grey, max(0.6, 4.0 / mpp), truncate=2.5), 5) < 1.2
    flat &= ~padding & (grey > max(bright.mean() - 40, 150))
    if flat.any():
        commonest = np.bincount(grey[flat].astype(np.int64)).argmax()
        glass = flat & (np.abs(grey - commonest) < 8)
        level = np.median(work[:, glass], axis=1)
        if glass.mean() > 0.01 and np.ptp(level) < 45 and bright.mean() - level.mean() < 8:
            return level, glass
    return np.maximum(bright, WHITE), np.zeros_like(padding)


def _density(work: np.ndarray, mpp: float) -> Density:
    level, glass = _background(work, mpp)
    density, texture = _optical(work, level, mpp)
    noise = float(np.median(texture[glass])) if glass.any() else 0.0
    if noise > 0.006:  # no glass is as rough as this: it was pale tissue
        density, texture = _optical(work, np.maximum(level, WHITE), mpp)
        noise = 0.0
    planes = np.stack([_soft(plane, mpp) for plane in density])
    return Density(planes, planes.max(axis=0), texture, max(0.004, 2.5 * noise))


def _optical(work: np.ndarray, level: np.ndarray, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    level = level[:, None, None]
    work = np.where(work.max(axis=0) <= 0.5, level, work)
    density = np.log10(level / np.clip(work, 1.0, level))
    return density, _deviation(density.mean(axis=0), WINDOW_UM / mpp)


def _brightfield(work: np.ndarray, mpp: float) -> np.ndarray:
    density = _density(work, mpp)
    peak, texture = density.peak, density.texture
    stained = (peak > max(0.012, _otsu(peak))) & (texture > density.floor)
    if not stained.any():
        return stained
    typical, rough = np.median(peak[stained]), np.median(texture[stained])
    strong = (peak > max(0.012, 0.3 * typical)) & (texture > max(density.floor, 0.12 * rough))
    strong |= peak > max(0.08, 0.35 * typical)
    faint = (peak > max(0.012, 0.05 * typical)) & (texture > max(density.floor, 0.25 * rough))
    mask = strong | _beyond_rim(faint, strong, mpp)
    if len(work) != 3:
        return _cleaned(mask, mpp)
    ink = _ink(density, mpp)
    return _cleaned(mask & ~_neutral(density.planes) & ~ink, mpp) & ~ink


def _beyond_rim(faint: np.ndarray, strong: np.ndarray, mpp: float) -> np.ndarray:
    """Faint tissue (fat, pale stroma) without the rim that smoothing leaves around what is strong."""
    steps = max(1, round(24 / mpp))
    apart = faint & ~ndimage.binary_dilation(strong, iterations=steps)
    return faint & ndimage.binary_dilation(apart, iterations=steps)


def _neutral(planes: np.ndarray) -> np.ndarray:
    """Grey marks: every stain takes clearly more of one colour than of another."""
    high, low = planes.max(axis=0), planes.min(axis=0)
    return (high > 0.05) & (high - low < 0.15 * high)


def _ink(density: Density, mpp: float) -> np.ndarray:
    """Pen: a colour that no stain has, strong, over an area no cell has; then its paler rim."""
    red, green, blue = density.planes
    like_blue = (red > 0.85 * green) & ((blue < 0.35 * red) | ((red > 0.8) & (blue < 0.65 * red)))
    like_green = (red > 1.15 * green) & (blue > 1.15 * green)
    like_red = (blue > 0.65 * green) & (red < 0.38 * green)
    like_black = _neutral(density.planes) & (density.peak > 0.35)
    core = (
        (like_blue & (red > 0.4))
        | (like_green & (red > 0.25))
        | (like_red & (green > 0.5) & (blue > 0.75 * green))
        | like_black
    )
    core = _large(ndimage.binary_opening(core, iterations=max(1, round(8 / mpp))), INK_UM2 / mpp**2)
    if not core.any():
        return core
    around = ndimage.binary_dilation(core, iterations=max(1, round(40 / mpp)))
    rim = (like_blue | like_green | like_red | _neutral(density.planes)) & around
    ink = ndimage.binary_dilation(core | rim, iterations=max(1, round(12 / mpp)))
    return ~_large(~ink, INK_UM2 / mpp**2)


def _fluorescence(work: np.ndarray, mpp: float) -> np.ndarray:
    """Tissue glows in some channel; autofluorescence is enough."""
    return _cleaned(np.logical_or.reduce([_glow(channel, mpp) for channel in work]), mpp)


def _glow(channel: np.ndarray, mpp: float) -> np.ndarray:
    """Glass is smooth whatever its brightness (offset, glow, vignetting), tissue is rough: two classes of texture.

    With one class only, the field is all tissue if it is rough against its own brightness, else bare glass.
    """
    soft = _soft(channel, mpp)
    rough = _deviation(channel, WINDOW_UM / mpp)
    smallest = max(float(np.percentile(rough, 99)) * 1e-4, 1e-12)
    rough = np.log(np.maximum(rough, smallest))
    upper = rough > _otsu(rough)
    if not upper.any() or upper.all():
        return np.zeros(channel.shape, bool)
    contrast = np.median(rough[upper]) - np.median(rough[~upper])
    if contrast < np.log(4):
        relative = np.exp(np.median(rough)) / max(float(np.median(soft)), 1e-12)
        return np.full(channel.shape, relative > 0.15)
    base, typical = np.median(soft[~upper]), np.median(soft[upper])
    return (rough > np.median(rough[upper]) + np.log(0.15)) & (soft - base > 0.25 * (typical - base)) & (typical > base)


def _large(mask: np.ndarray, pixels: float) -> np.ndarray:
    labels, count = ndimage.label(mask)
    if not count:
        return mask
    keep = np.bincount(labels.ravel()) >= pixels
    keep[0] = False
    return keep[labels]


def _cleaned(mask: np.ndarray, mpp: float) -> np.ndarray:
    """Close gaps of a septum's width, fill what is no lumen, drop what is no tissue."""
    radius = max(1, round(8 / mpp))
    wide = np.pad(mask, radius, mode="edge")
    mask = ndimage.binary_closing(wide, iterations=radius)[radius:-radius, radius:-radius] | mask
    mask = ~_large_holes(~mask, HOLE_UM2 / mpp**2)
    return _large(mask, min(SPECK_UM2 / mpp**2, 0.5 * mask.size))


def _large_holes(outside: np.ndarray, pixels: float) -> np.ndarray:
    """The background at the border of the image may go on beyond it, so a small part of it there is judged alike."""
    return _large(outside, min(pixels, 0.5 * outside.size))


def _blurred(image: np.ndarray, mpp: float) -> np.ndarray:
    work, factor = _reduced(image, mpp, 2.0, BLUR_PIXELS)
    high, middle, usable = _bands(work.mean(axis=0), BLUR_WINDOW_UM / (mpp * factor))
    return _enlarged(usable & (high < BLUR_RATIO * middle), factor, image.shape)


def _bands(grey: np.ndarray, window: float | None):
    """Energy of the finest octave and of the next two, local means over `window` px or, without one, of the whole."""
    fine = grey - ndimage.gaussian_filter(grey, 0.8, mode="nearest")
    coarse = ndimage.gaussian_filter(grey, 1.2, mode="nearest") - ndimage.gaussian_filter(grey, 6.0, mode="nearest")
    mean = (lambda x: _box(x, window)) if window else np.mean
    high, middle = mean(fine * fine), mean(coarse * coarse)
    return high, middle, middle > (0.008 * grey.mean()) ** 2
