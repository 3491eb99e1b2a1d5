"""A picture that shows at a glance whether two slides lie on each other."""

import numpy as np

from input_pipeline.slides.reader import Slide
from input_pipeline.slides.register_flow import View, view
from input_pipeline.slides.similarity import nuclear_channel
from input_pipeline.slides.transform import Transform

GAP = 8


def overlay_picture(
    he: Slide, partner: Slide, transform: Transform, *, channel: int | None = None, size: int = 640
) -> np.ndarray:
    """uint8 RGB [h, w, 3]: before, after, a magnified square of after, and a checkerboard of the pixels after.

    Nuclear density of H&E is magenta, the partner's green: what fits is white or grey, what does not is coloured.
    """
    if channel is None and not partner.is_rgb:
        channel = nuclear_channel(partner.channel_names)
    fixed, moving = view(he, None, "the H&E slide"), view(partner, channel, "the partner")
    mpp = max(fixed.extent) / size
    width, height = (max(1, round(v / mpp)) for v in fixed.extent)
    pixels = he.read_region(0, 0, width, height, mpp)
    density = fixed.density(pixels)
    before, _ = moving.aligned(_centred(fixed, moving), np.zeros(2), (width, height), mpp)
    after, inside = moving.aligned(transform, np.zeros(2), (width, height), mpp)
    board = _checkerboard(_grey(density), _grey(after) * inside, max(16, size // 16))
    panels = [
        _two_colours(density, before),
        _two_colours(density, after),
        _closer(fixed, moving, transform, density, mpp),
    ]
    panels.append(np.repeat(board[..., None], 3, axis=2))
    tall = max(p.shape[0] for p in panels)
    return np.hstack([np.pad(p, ((0, tall - p.shape[0]), (0, GAP), (0, 0)), constant_values=255) for p in panels])


def _centred(fixed: View, moving: View) -> Transform:
    shift = (np.array(moving.extent) - np.array(fixed.extent)) / 2
    return Transform(np.column_stack([np.eye(2), shift]))


def _closer(fixed: View, moving: View, transform: Transform, density: np.ndarray, mpp: float) -> np.ndarray:
    """The square of the slide with most nuclei, at about 1 um per pixel."""
    side = min(density.shape)
    fine = max(1.0, fixed.mpp, moving.mpp)
    window = min(max(8, int(side * fine / mpp)), side)
    sums = np.pad(np.minimum(density, 2 * density.mean()), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    boxes = sums[window:, window:] - sums[:-window, window:] - sums[window:, :-window] + sums[:-window, :-window]
    y, x = np.unravel_index(boxes.argmax(), boxes.shape)
    corner = np.array([x, y]) * mpp
    pixel = window * mpp / side
    partner, _ = moving.aligned(transform, corner, (side, side), pixel)
    return _two_colours(fixed.block(corner, (side, side), pixel), partner)


def _grey(density: np.ndarray) -> np.ndarray:
    low, high = np.percentile(density, (10, 95))  # ink is darker than any nucleus
    return (np.clip((density - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)


def _two_colours(he: np.ndarray, partner: np.ndarray) -> np.ndarray:
    a, b = _grey(he), _grey(partner)
    return np.stack([a, b, a], axis=-1)


def _checkerboard(a: np.ndarray, b: np.ndarray, cell: int) -> np.ndarray:
    y, x = np.indices(a.shape)
    return np.where((y // cell + x // cell) % 2 == 0, a, b)
