"""Bags with a known signal, that several tests share."""

import numpy as np

from mfl_jax.bags import Bags, Table


def bags(slides: int = 24, dim: int = 5, longest: int = 30, signal: float = 3.0, classes: int = 2, seed: int = 0):
    """Two slides a case; in a third of the tiles of class k > 0, feature k - 1 is shifted by `signal`. The first slide
    has no tile and the second has one. -> Bags, Table"""
    draw = np.random.default_rng(seed)
    labels = np.repeat(np.arange(-(-slides // 2)) % classes, 2)[:slides]
    lengths = draw.integers(6, longest, slides)
    lengths[:2] = 0, 1
    features = []
    for label, length in zip(labels, lengths, strict=True):
        x = draw.standard_normal((length, dim)).astype(np.float32) * np.arange(1, dim + 1, dtype=np.float32) + 7
        if label:
            x[: -(-length // 3), label - 1] += signal * label
        features.append(x)
    names, cases = tuple(f"s{i:02d}" for i in range(slides)), tuple(f"c{i // 2:02d}" for i in range(slides))
    coords = np.concatenate([np.stack([np.arange(n) % 5, np.arange(n) // 5], 1) * 64.0 for n in lengths])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    given = Bags(np.concatenate(features), coords, offsets, names, cases, np.full(slides, 64.0))
    return given, Table(names, cases, labels, tuple("abc"[:classes]))
