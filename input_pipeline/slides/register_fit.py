"""Smooth maps through noisy point pairs, some of which are plain wrong."""

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import spsolve

from input_pipeline.slides.transform import Displacement


def _solve(source: np.ndarray, target: np.ndarray, weight: np.ndarray, rigid: bool) -> np.ndarray:
    """Weighted least squares; rigid keeps the handedness and one scale (the caller removes a mirror first)."""
    middle = np.average(source, axis=0, weights=weight), np.average(target, axis=0, weights=weight)
    a, b = source - middle[0], target - middle[1]
    if rigid:
        scale = max(float((weight * (a**2).sum(1)).sum()), 1e-12)
        cos = float((weight * (a * b).sum(1)).sum()) / scale
        sin = float((weight * (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0])).sum()) / scale
        linear = np.array([[cos, -sin], [sin, cos]])
    else:
        root = np.sqrt(weight)[:, None]
        linear = np.linalg.lstsq(a * root, b * root, rcond=None)[0].T
    return np.column_stack([linear, middle[1] - linear @ middle[0]])


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:, :2].T + matrix[:, 2]


def compose(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    return np.column_stack([outer[:, :2] @ inner[:, :2], outer[:, :2] @ inner[:, 2] + outer[:, 2]])


def _hypotheses(source: np.ndarray, target: np.ndarray, picks: np.ndarray, rigid: bool) -> np.ndarray:
    """[h, 2, 3] maps through the picked pairs, without those that are singular or far from the identity in scale."""
    if rigid:
        a, b = (v[picks] @ [1, 1j] for v in (source, target))
        gap = a[:, 1] - a[:, 0]
        turn = (b[:, 1] - b[:, 0]) / np.where(abs(gap) > 1e-9, gap, np.inf)
        shift = b[:, 0] - turn * a[:, 0]
        found = np.stack([turn.real, -turn.imag, shift.real, turn.imag, turn.real, shift.imag], 1).reshape(-1, 2, 3)
    else:
        corners = np.concatenate([source[picks], np.ones((*picks.shape, 1))], axis=2)
        spread = float((np.ptp(source, axis=0) ** 2).sum())
        sound = abs(np.linalg.det(corners)) > 1e-3 * max(spread, 1e-9)
        found = np.linalg.solve(corners[sound], target[picks[sound]]).transpose(0, 2, 1)
    area = np.linalg.det(found[:, :, :2])
    return found[(area > 0.5) & (area < 2)]


def fit_affine(
    source: np.ndarray, target: np.ndarray, weight: np.ndarray, tolerance: float, *, seed: int = 0, rigid: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Near-identity map source -> target [2, 3] and the pairs it brings within `tolerance`, by consensus."""

    def close(matrix: np.ndarray) -> np.ndarray:
        return ((apply(matrix, source) - target) ** 2).sum(-1) < tolerance**2

    points = len(source)
    draws = np.random.default_rng(seed).choice(points, (200, 2 if rigid else 3), p=weight / weight.sum())
    tried = np.concatenate([np.eye(2, 3)[None], _hypotheses(source, target, draws, rigid)])
    support = [float(weight[close(matrix)].sum()) for matrix in tried]
    best = tried[int(np.argmax(support))]
    inliers = close(best)
    for _ in range(10):
        if inliers.sum() < 4:
            break
        best = _solve(source[inliers], target[inliers], weight[inliers], rigid)
        inliers = close(best)
    return best, inliers


def fit_displacement(
    points: np.ndarray,
    shifts: np.ndarray,
    weight: np.ndarray,
    extent: tuple[float, float],
    spacing: float,
    smooth: float,
    tolerance: float,
) -> tuple[Displacement, np.ndarray]:
    """A cubic B-spline field over the slide, its bending penalised, refitted without pairs it cannot explain.

    Returns the field and each pair's residual. `tolerance` is the floor of the outlier scale (um).
    """
    rows, columns = (int(np.ceil(v / spacing)) + 3 for v in extent[::-1])
    origin = (-spacing, -spacing)
    design = _basis(points, origin, spacing, (rows, columns))
    bending = smooth * _bending(rows, columns) + 1e-5 * sparse.identity(rows * columns)
    robust = np.ones(len(points))
    for _ in range(8):
        w = sparse.diags(weight * robust)
        coefficients = spsolve((design.T @ w @ design + bending).tocsc(), design.T @ w @ shifts)
        residual = np.linalg.norm(design @ coefficients - shifts, axis=1)
        scale = max(tolerance, 4.0 * float(np.median(residual)))
        robust = np.clip(1 - (residual / scale) ** 2, 0, 1) ** 2
    grid = coefficients.reshape(rows, columns, 2)
    return Displacement(origin, (spacing, spacing), _at_nodes(_at_nodes(grid, 0), 1)), residual


def _at_nodes(coefficients: np.ndarray, axis: int) -> np.ndarray:
    """B-spline coefficients -> values at the nodes, with the mirror boundary that Displacement has."""
    moved = np.moveaxis(coefficients, axis, 0)
    padded = np.concatenate([moved[1:2], moved, moved[-2:-1]])
    return np.moveaxis((padded[:-2] + 4 * padded[1:-1] + padded[2:]) / 6, 0, axis)


def _basis(points: np.ndarray, origin: tuple, spacing: float, shape: tuple[int, int]) -> sparse.csr_matrix:
    """[point, node] cubic B-spline weights; node indices mirrored at the border."""
    taps = []
    for axis, count in ((1, shape[0]), (0, shape[1])):
        at = np.clip((points[:, axis] - origin[axis]) / spacing, 0, count - 1)
        base = np.minimum(np.floor(at).astype(int), count - 2)
        t = at - base
        cubic = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], 1) / 6
        index = np.abs(base[:, None] + np.arange(-1, 3))
        taps.append((np.where(index > count - 1, 2 * (count - 1) - index, index), cubic))
    (row, row_weight), (column, column_weight) = taps
    index = (row[:, :, None] * shape[1] + column[:, None, :]).reshape(len(points), 16)
    values = (row_weight[:, :, None] * column_weight[:, None, :]).reshape(len(points), 16)
    pointer = np.repeat(np.arange(len(points)), 16)
    return sparse.csr_matrix((values.ravel(), (pointer, index.ravel())), (len(points), shape[0] * shape[1]))


def _bending(rows: int, columns: int) -> sparse.csr_matrix:
    def second(n: int) -> sparse.csr_matrix:
        return sparse.diags([1.0, -2.0, 1.0], [0, 1, 2], shape=(n - 2, n))

    def first(n: int) -> sparse.csr_matrix:
        return sparse.diags([-1.0, 1.0], [0, 1], shape=(n - 1, n))

    eye = sparse.identity
    terms = [sparse.kron(second(rows), eye(columns)), sparse.kron(eye(rows), second(columns))]
    terms.append(np.sqrt(2) * sparse.kron(first(rows), first(columns)))
    return sum(term.T @ term for term in terms)
