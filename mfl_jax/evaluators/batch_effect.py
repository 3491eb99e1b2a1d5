"""How well does the feature name the slide? What names the slide (stain, scanner) may stand in for what is asked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mfl_jax import topk
from mfl_jax.evaluators import logistic
from mfl_jax.evaluators.probe import check_features
from mfl_jax.evaluators.results import floats, mean_score, value_metrics
from mfl_jax.statistics import Interval

CS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
MOST = 2000  # tiles looked at
MOST_SLIDES = 50  # that a linear probe is asked to tell apart


@dataclass(frozen=True)
class BatchEffect:
    metrics: dict[str, Interval]  # nearest, linear: share of tiles whose slide was named; silhouette: -1 to 1
    chance: dict[str, float]
    notes: tuple[str, ...]

    def floats(self, prefix: str) -> dict[str, float]:
        return floats(self.metrics, prefix) | {f"{prefix}/{name}_chance": value for name, value in self.chance.items()}


def measure(
    features: np.ndarray,
    columns: Mapping[str, np.ndarray],
    *,
    within: str | None = None,
    apart_um: float = 0.0,
    linear: bool = True,
    seed: int = 0,
    resamples: int = 1000,
) -> BatchEffect:
    """The slide of a tile's nearest neighbour, a linear probe over slides (with `linear`; it takes most of the time),
    and the silhouette.

    within    a column ('region'): neighbours are of the same value, so that tissue alone does not name the slide
    apart_um  neighbours of the same slide are at least so far away (columns x, y, mpp), since they overlap or touch
    """
    check_features(features, np.ones(len(columns["slide"]), bool))
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(features))[:MOST])
    x = np.asarray(features[rows], np.float64)
    names, slide = np.unique(np.asarray(columns["slide"])[rows], return_inverse=True)
    cases = np.asarray(columns["case"])[rows]
    if len(names) < 2:
        raise ValueError("to tell slides apart there must be at least 2 with tiles")
    close = _cosine(x)
    allowed = ~np.eye(len(x), dtype=bool)
    if within is not None:
        of = np.asarray(columns[within])[rows]
        allowed &= of[:, None] == of[None]
    if apart_um > 0:
        allowed &= ~((slide[:, None] == slide[None]) & (_distance(columns, rows) < apart_um))
    counts = np.stack([(allowed & (slide == k)[None]).sum(1) for k in range(len(names))], 1)
    own = counts[np.arange(len(x)), slide]
    usable = (own > 0) & (counts.sum(1) > own)
    if not usable.any():
        raise ValueError("no tile has neighbours both of its own slide and of another one")
    nearest = np.where(allowed, close, -np.inf).argmax(1)
    chance = {"nearest": float(np.mean((own / np.maximum(counts.sum(1), 1))[usable]))}
    scores = {"nearest": ((slide[nearest] == slide).astype(float), usable), "silhouette": _silhouette(close, slide)}
    notes = []
    if linear and len(names) <= MOST_SLIDES:
        scores["linear"], chance["linear"] = _linear(x, slide, len(names), rng)
    elif linear:
        notes.append(f"no linear probe over {len(names)} slides: at most {MOST_SLIDES}")
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    found: dict[str, Interval] = {}
    for name, (values, kept) in scores.items():
        part, more = value_metrics(values[kept], values[kept], cases[kept], {name: mean_score}, **options)
        found |= part
        notes += more
    return BatchEffect(found, chance, tuple(notes))


def _cosine(x: np.ndarray) -> np.ndarray:
    unit = topk.unit(x)
    return unit @ unit.T


def _distance(columns: Mapping[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    at = np.stack([np.asarray(columns[k], np.float64)[rows] for k in ("x", "y")], 1)
    return np.hypot(*(at[:, None] - at[None]).transpose(2, 0, 1)) * float(np.asarray(columns["mpp"])[rows].mean())


def _silhouette(close: np.ndarray, slide: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(b - a) / max(a, b) of mean cosine distances: a to the own slide, b to the nearest other one."""
    one_hot = np.eye(slide.max() + 1)[slide]
    size = one_hot.sum(0)
    total = (1 - close) @ one_hot
    own = np.arange(len(slide)), slide
    a = (total[own] - np.diag(1 - close)) / np.maximum(size[slide] - 1, 1)
    other = total / size
    other[own] = np.inf
    b = other.min(1)
    worst = np.maximum(a, b)
    return np.where(worst > 0, (b - a) / np.where(worst > 0, worst, 1), 0.0), size[slide] > 1


def _linear(
    x: np.ndarray, slide: np.ndarray, classes: int, rng: np.random.Generator
) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """Thirds of the tiles take turns: fitted on one, the penalty chosen on the next, named in the last. Chance is
    always naming the largest slide.
    """
    third = rng.permutation(len(x)) % 3
    fits = logistic.fit(
        x,
        slide,
        np.stack([third == j for j in range(3)]),
        np.stack([third == (j + 1) % 3 for j in range(3)]),
        classes=classes,
        cs=CS,
    )
    right = np.zeros(len(x))
    for j in range(3):
        rows = third == (j + 2) % 3
        p = fits.probabilities(j, int(fits.losses[j].argmin()), x[rows])
        said = p.argmax(1) if classes > 2 else (p >= 0.5).astype(int)
        right[rows] = said == slide[rows]
    return (right, np.ones(len(x), bool)), float(np.bincount(slide).max() / len(x))
