"""Features as points in a plane, to be looked at. PCA always; UMAP where umap-learn is installed, which is optional."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEAST = {"pca": 3, "umap": 16}  # rows that make a picture; `project` itself refuses fewer than those of PCA
METHODS = tuple(LEAST)


@dataclass(frozen=True)
class Projection:
    method: str
    xy: np.ndarray  # float32 [n, 2]
    rows: np.ndarray  # int64 [n]: of the features
    colours: dict[str, np.ndarray]  # [n] each: names or numbers
    explained: tuple[float, float] | None  # share of the variance on each axis, of PCA


def project(
    features: np.ndarray,
    columns: Mapping[str, np.ndarray],
    *,
    method: str = "pca",
    colour: Sequence[str] = ("label", "slide"),
    limit: int = 4000,
    seed: int = 0,
) -> Projection:
    """At most `limit` rows, drawn by seed. Features are brought to length 1 first: neighbours are by cosine too."""
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
    if missing := [name for name in colour if name not in columns]:
        raise ValueError(f"no columns {missing} to colour by; there are {sorted(columns)}")
    if features.ndim != 2 or len(features) < LEAST["pca"] or features.shape[1] < 2:
        raise ValueError(f"a plane needs at least {LEAST['pca']} rows of 2 features, not {list(features.shape)}")
    rows = np.sort(np.random.default_rng(seed).permutation(len(features))[:limit])
    x = np.asarray(features[rows], np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    xy, explained = (*pca(x),) if method == "pca" else (_umap(x, seed), None)
    colours = {name: np.asarray(columns[name])[rows] for name in colour}
    return Projection(method, xy.astype(np.float32), rows, colours, explained)


def pca(x: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """[N, 2] on the axes of most variance, and their shares of it; the largest entry of an axis is positive."""
    centred = np.asarray(x, np.float64) - x.mean(0)
    power, axes = np.linalg.eigh(centred.T @ centred)
    axes, power = axes[:, ::-1][:, :2], np.maximum(power[::-1], 0)
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), [0, 1]])
    total = max(power.sum(), 1e-30)
    return centred @ axes, (float(power[0] / total), float(power[1] / total))


def _umap(x: np.ndarray, seed: int) -> np.ndarray:
    try:
        import umap
    except ImportError as error:
        raise ValueError("method 'umap' needs umap-learn (pip install umap-learn); 'pca' needs nothing") from error
    neighbours = min(15, len(x) - 1)
    return umap.UMAP(n_neighbors=neighbours, metric="cosine", random_state=seed, n_jobs=1).fit_transform(x)
