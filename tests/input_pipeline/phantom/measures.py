"""Oracles of the phantom's tests: what a linear model sees in colour, and how well a score orders two classes."""

import io

import numpy as np
from PIL import Image

from input_pipeline.phantom import Slide

TILE = 64


def auc(truth: np.ndarray, score: np.ndarray) -> float:
    """Chance that a positive scores higher than a negative."""
    truth = np.asarray(truth, bool)
    order = np.argsort(np.argsort(score, kind="stable"), kind="stable") + 1
    positive = truth.sum()
    return float((order[truth].sum() - positive * (positive + 1) / 2) / (positive * (len(truth) - positive)))


def case_wise_auc(
    features: np.ndarray, truth: np.ndarray, case: np.ndarray, folds: int = 5, ridge: float = 0.01
) -> float:
    """A linear model is fitted on some cases and scores the others."""
    names = np.random.default_rng(0).permutation(np.unique(case))
    fold = np.empty(len(case), int)
    for i, name in enumerate(names):
        fold[case == name] = i % folds
    score = np.empty(len(case))
    for i in range(folds):
        fit, held = fold != i, fold == i
        mean, deviation = features[fit].mean(0), features[fit].std(0) + 1e-6
        x, t = (features[fit] - mean) / deviation, truth[fit] * 2.0 - 1
        weight = np.linalg.solve(x.T @ x / len(x) + ridge * np.eye(x.shape[1]), x.T @ (t - t.mean()) / len(x))
        score[held] = (features[held] - mean) / deviation @ weight
    return auc(truth, score)


def as_file(image: np.ndarray) -> np.ndarray:
    """What a tile looks like after the usual compression, colour at half resolution."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=85)
    return np.asarray(Image.open(file))


def colour(tiles: np.ndarray) -> np.ndarray:
    """[n, features]: mean, deviation and quantiles of red, green, blue and of three stain densities."""
    pixels = tiles.reshape(len(tiles), -1, 3).astype(np.float32)
    stains = np.linalg.inv(np.array([[0.59, 0.72, 0.37], [0.12, 0.93, 0.36], [0.7, -0.1, -0.7]]))
    density = -np.log((pixels + 1) / 256) @ stains.astype(np.float32)
    values = np.concatenate([pixels / 255, density], -1)
    quantiles = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95), axis=1)
    return np.concatenate([values.mean(1), values.std(1), *quantiles], 1)


def cut(image: np.ndarray) -> np.ndarray:
    """[n, TILE, TILE, 3] in rows."""
    n = len(image) // TILE
    tiles = image[: n * TILE, : n * TILE].reshape(n, TILE, n, TILE, 3)
    return tiles.transpose(0, 2, 1, 3, 4).reshape(n * n, TILE, TILE, 3)


def tile_cells(slide: Slide) -> tuple[np.ndarray, np.ndarray]:
    """(cells, positive cells) of every tile that `cut` gives."""
    n = slide.size // TILE
    x, y = ((v / (slide.mpp * TILE)).astype(int) for v in (slide.cells.x, slide.cells.y))
    inside = (x < n) & (y < n)
    index = (y * n + x)[inside]
    return np.bincount(index, minlength=n * n), np.bincount(index, slide.cells.positive[inside], minlength=n * n)
