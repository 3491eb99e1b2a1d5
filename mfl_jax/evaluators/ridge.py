"""Ridge regression of many targets at once, in float64 on the host: one eigendecomposition gives every penalty."""

from dataclasses import dataclass

import numpy as np

ALPHAS = tuple(float(a) for a in 10.0 ** np.arange(-3, 5.01, 0.5))


@dataclass(frozen=True)
class Ridge:
    """min over w, b of  sum_i |y_i - b - w x_i|^2 + alpha |w|^2  on standardised features; w for each alpha."""

    mean: np.ndarray
    std: np.ndarray
    weights: np.ndarray  # [A, D, T]
    offset: np.ndarray  # [T]

    def predict(self, features: np.ndarray) -> np.ndarray:
        """[A, N, T]"""
        return ((features - self.mean) / self.std) @ self.weights + self.offset


def fit(features: np.ndarray, targets: np.ndarray, alphas: tuple[float, ...] = ALPHAS) -> Ridge:
    x, y = np.asarray(features, np.float64), np.asarray(targets, np.float64)
    if not len(x):
        raise ValueError("a fit has no rows")
    mean, std = x.mean(0), x.std(0)
    std = np.where(std > 1e-12 * np.maximum(np.abs(mean), 1e-30), std, 1.0)
    x, offset = (x - mean) / std, y.mean(0)
    if len(x) < x.shape[1]:
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        turn, moment, power = vt.T, (s[:, None] * u.T) @ (y - offset), s**2
    else:
        power, turn = np.linalg.eigh(x.T @ x)
        moment = turn.T @ (x.T @ (y - offset))
    weights = np.stack([turn @ (moment / (np.maximum(power, 0) + alpha)[:, None]) for alpha in alphas])
    return Ridge(mean, std, weights, offset)


def nested(
    features: np.ndarray,
    targets: np.ndarray,
    pairs: tuple[tuple[np.ndarray, np.ndarray], ...],
    final: np.ndarray,
    test: np.ndarray,
    alphas: tuple[float, ...] = ALPHAS,
) -> tuple[np.ndarray, np.ndarray]:
    """-> predictions [test rows, T], the alpha of each target [T]: the one with the least squared error over all rows
    to choose by, then fitted on `final`. Masks are bool [N]; the targets are known in all of them.
    """
    errors = np.zeros((len(alphas), targets.shape[1]))
    for train, val in pairs:
        errors += ((fit(features[train], targets[train], alphas).predict(features[val]) - targets[val]) ** 2).sum(1)
    best = errors.shape[0] - 1 - errors[::-1].argmin(0)  # of equals the larger penalty
    every = fit(features[final], targets[final], alphas).predict(features[test])
    predicted = np.take_along_axis(every, best[None, None], 0)[0]
    return predicted, np.asarray(alphas)[best]
