"""Registration of a partner slide to H&E through what both show: nuclei.

Coarse: every rotation and mirror, by correlation of nuclear density over all shifts. Then shifts of many small patches,
from coarse to fine pixels, fitted by an affine map and a smooth field with outliers left out. Last, patches that no
fit has seen measure the error that remains, and the gate decides by that.
"""

import time
from dataclasses import dataclass

import numpy as np

from input_pipeline.slides.reader import Slide
from input_pipeline.slides.register_coarse import Coarse, coarse
from input_pipeline.slides.register_fit import compose, fit_affine, fit_displacement
from input_pipeline.slides.register_flow import Flow, Tissue, View, measure, view
from input_pipeline.slides.register_picture import overlay_picture
from input_pipeline.slides.similarity import nuclear_channel
from input_pipeline.slides.tissue import tissue_mask
from input_pipeline.slides.transform import Transform, load_transform

__all__ = ["ALLOWED_UM", "LEVELS", "Registration", "load_transform", "overlay_picture", "register"]

ALLOWED_UM = {"coarse": 50.0, "affine": 25.0, "bspline": 5.0}  # median error that passes, unless the caller says
LEVELS = tuple(ALLOWED_UM)
COARSE_PX = 256  # longer side of the images of the coarse search
FINEST_UM = 1.0  # nuclei are 5 to 10 um across: finer pixels cost time and add nothing
CHANCE = 0.3  # a stage of which a smaller share of patches agrees has found nothing
AGREEMENT = 0.5  # share of unseen patches that must agree
LEAST_PATCHES = 8
MAX_TRIED = 5  # unnamed channels; of more only the first, and the sum of all
CHECK_WANTED, CHECK_PATCHES = 20, 400


@dataclass(frozen=True)
class Field:
    """One pass of the smooth fit; pixels in units of the finest pixel, spacings in um at 1 um per pixel."""

    zoom: int
    patch: int
    step: float
    search: int
    spacing: float
    smooth: float


FIELDS = (
    Field(zoom=4, patch=48, step=96, search=12, spacing=300, smooth=1.0),
    Field(zoom=2, patch=48, step=48, search=12, spacing=150, smooth=0.1),
    Field(zoom=1, patch=64, step=32, search=10, spacing=80, smooth=0.02),
)


@dataclass(frozen=True)
class Registration:
    """`transform` (H&E um -> partner um) is the best found even if `passed` is False; `reason` has the numbers."""

    transform: Transform
    score: float  # median correlation of nuclear density over patches that no fit has seen, in [-1, 1]
    passed: bool
    reason: str
    error_um: float  # median distance from where those patches lie to where they fit best
    error95_um: float
    agreement: float  # share of those patches that fit best within the tolerance
    patches: int
    mirrored: bool
    channel: int | None  # of the partner, taken as nuclei; None: all of them
    stages: tuple[dict, ...] = ()


def register(
    he: Slide,
    partner: Slide,
    *,
    level: str = "bspline",
    seed: int = 0,
    channel: int | None = None,
    max_error_um: float | None = None,
) -> Registration:
    """Where each point of `he` lies on `partner`. The same slides and seed give the same numbers.

    `channel` is the partner's nuclear channel; without it, it is found by name, else by trying (MAX_TRIED).
    `max_error_um` is the median error that passes (ALLOWED_UM): raise it for serial sections, whose nuclei differ.
    """
    if level not in ALLOWED_UM:
        raise ValueError(f"level is one of {', '.join(LEVELS)}, not {level!r}")
    fixed, moving = (
        view(he, None, "the H&E slide"),
        [view(partner, c, "the partner") for c in _channels(partner, channel)],
    )
    allowed = ALLOWED_UM[level] if max_error_um is None else float(max_error_um)
    finest = max(FINEST_UM, fixed.mpp, moving[0].mpp)
    mpp = max(max(*fixed.extent, *moving[0].extent) / COARSE_PX, 2 * finest)
    start = time.monotonic()
    image = fixed.pixels(mpp)
    tissue = Tissue(tissue_mask(image, mpp, kind="brightfield"), mpp, fixed.extent)
    found = [(coarse(_body(fixed.density(image)), _body(v.density(v.pixels(mpp))), mpp, seed), v) for v in moving]
    first, chosen = max(found, key=lambda v: v[0].score)
    stages = [_stage("coarse", mpp, 0, first.score, start)]
    job = _Job(fixed, chosen, tissue, finest, seed, stages)
    transform, reached = job.run(Transform(first.matrix), mpp, level)
    flow, tolerance = job.check(transform, min(reached, max(4 * finest, allowed / 5)), allowed)
    return _judge(transform, flow, tolerance, allowed, first, chosen.channel, tuple(stages))


def _channels(partner: Slide, channel: int | None) -> list[int | None]:
    if channel is not None or partner.is_rgb:
        return [channel]
    named = nuclear_channel(partner.channel_names)
    if named is not None or partner.channels == 1:
        return [named or 0]
    return [*range(partner.channels), None] if partner.channels <= MAX_TRIED else [0, None]


def _body(density: np.ndarray) -> np.ndarray:
    """Background at 0, nuclei near 1, so that single bright specks do not rule the search."""
    low, high = np.percentile(density, (2, 99.5))
    return np.clip((density - low) / max(high - low, 1e-6), 0, 1.5).astype(np.float32)


def _stage(name: str, mpp: float, patches: int, agreement: float, start: float) -> dict:
    seconds = round(time.monotonic() - start, 2)
    return {"stage": name, "mpp": mpp, "patches": patches, "agreement": round(agreement, 3), "seconds": seconds}


@dataclass(frozen=True)
class _Job:
    he: View
    partner: View
    tissue: Tissue
    finest: float
    seed: int
    stages: list[dict]

    def run(self, transform: Transform, mpp: float, level: str) -> tuple[Transform, float]:
        """The best transform and the um per pixel down to which patches agreed on it."""
        reached, halvings = mpp, max(1, round(np.log2(mpp / (2 * self.finest))))
        for pixel in np.geomspace(mpp, 2 * self.finest, halvings + 1)[1:] if level != "coarse" else ():
            better = self._affine(transform, float(pixel))
            if better is None:
                return transform, reached
            transform, reached = better, float(pixel)
        for field in FIELDS if level == "bspline" else ():
            better = self._bspline(transform, field)
            if better is None:
                return transform, reached
            transform, reached = better, min(reached, field.zoom * self.finest)
        return transform, reached

    def check(self, transform: Transform, mpp: float, allowed: float) -> tuple[Flow, float]:
        """Patches between those that were fitted. Far enough is searched that agreeing by chance is rare."""
        start = time.monotonic()
        while len(centres := self.tissue.lattice(96 * mpp, 88 * mpp, offset=0.37)) < CHECK_WANTED and mpp > self.finest:
            mpp = max(mpp / 2, self.finest)
        tolerance = max(4 * mpp, allowed)
        search = max(24, round(3 * tolerance / mpp))
        flow = self._flow(transform, centres, mpp, 96, search, CHECK_PATCHES)
        share = float((flow.distance < tolerance).mean()) if len(flow.centres) else 0.0
        self.stages.append(_stage("check", mpp, len(flow.centres), share, start))
        return flow, tolerance

    def _flow(
        self, transform: Transform, centres: np.ndarray, mpp: float, patch: int, search: int, limit: int | None = None
    ) -> Flow:
        if limit is not None and len(centres) > limit:
            centres = centres[np.linspace(0, len(centres) - 1, limit).astype(int)]
        return measure(self.he, self.partner, transform, centres, mpp, patch, search)

    def _affine(self, transform: Transform, mpp: float) -> Transform | None:
        start = time.monotonic()
        flow = self._flow(transform, self.tissue.lattice(64 * mpp, 32 * mpp), mpp, 64, 16, 300)
        share, better = 0.0, transform
        if len(flow.centres) >= LEAST_PATCHES:
            goal = flow.centres + flow.shifts
            step, inliers = fit_affine(flow.centres, goal, flow.peak**2, max(2.5 * mpp, 12.0), seed=self.seed)
            share, better = float(inliers.mean()), Transform(compose(transform.matrix, step))
        self.stages.append(_stage("affine", mpp, len(flow.centres), share, start))
        return better if share >= CHANCE else None

    def _bspline(self, transform: Transform, field: Field) -> Transform | None:
        """The whole map is fitted anew each time, so that no error of an earlier pass is carried along."""
        start = time.monotonic()
        mpp = field.zoom * self.finest
        centres = self.tissue.lattice(field.patch * mpp, field.step * self.finest)
        flow = self._flow(transform, centres, mpp, field.patch, field.search)
        share, better = 0.0, transform
        if len(flow.centres) >= 2 * LEAST_PATCHES:
            weight, tolerance = flow.peak**2, 2.0 * mpp
            goal = Transform(transform.matrix).inverse(transform(flow.centres + flow.shifts))
            step, _ = fit_affine(flow.centres, goal, weight, 15.0 * self.finest, seed=self.seed)
            wanted = Transform(step).inverse(goal) - flow.centres
            spacing = max(field.spacing * self.finest, 2 * self.tissue.widened(0))
            smooth, residual = fit_displacement(
                flow.centres, wanted, weight, self.tissue.extent, spacing, field.smooth, tolerance
            )
            share = float((residual < 2 * tolerance).mean())
            better = Transform(compose(transform.matrix, step), smooth)
        self.stages.append(_stage("bspline", mpp, len(flow.centres), share, start))
        return better if share >= CHANCE else None


def _judge(
    transform: Transform,
    flow: Flow,
    tolerance: float,
    allowed: float,
    first: Coarse,
    channel: int | None,
    stages: tuple[dict, ...],
) -> Registration:
    patches = len(flow.centres)
    agreement, error, error95, score = 0.0, float("inf"), float("inf"), 0.0
    if patches:
        agreement = float((flow.distance < tolerance).mean())
        error, error95 = (float(v) for v in np.percentile(flow.distance, (50, 95)))
        score = float(np.median(flow.here))
    measured = (
        f"{agreement:.0%} of {patches} unseen patches agree within {tolerance:.3g} um, median error {error:.3g} um, "
        f"correlation {score:.2f}"
    )
    failed = []
    if patches < LEAST_PATCHES:
        failed.append(f"fewer than {LEAST_PATCHES} patches of tissue lie on both slides")
    if agreement < AGREEMENT:
        failed.append(f"less than {AGREEMENT:.0%} agree: another tissue, or too damaged")
    elif error > allowed:
        failed.append(f"the error is above {allowed:g} um: for serial sections raise max_error_um")
    reason = f"{'; '.join(failed)} ({measured})" if failed else measured
    shown = dict(zip(("agreement", "error_um", "error95_um", "score"), (agreement, error, error95, score), strict=True))
    info = {"made": "registered", "stages": list(stages), "patches": patches} | shown
    transform = Transform(transform.matrix, transform.displacement, info)
    return Registration(
        transform, score, not failed, reason, error, error95, agreement, patches, first.mirrored, channel, stages
    )
