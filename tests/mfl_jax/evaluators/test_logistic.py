"""The batched logistic fits against scipy's minimum in float64, one by one."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax

from mfl_jax.evaluators import logistic

CS = (1e-3, 0.1, 10.0)


def oracle(x: np.ndarray, y: np.ndarray, c: float, classes: int) -> np.ndarray:
    """[D + 1, outputs] on x as it is; sum of losses + |w|^2 / 2C + 5e-7 n |b|^2, as the documented objective."""
    outputs = 1 if classes == 2 else classes
    x1 = np.concatenate([x, np.ones((len(x), 1))], 1)

    def value(flat):
        w = flat.reshape(-1, outputs)
        z = x1 @ w
        full = np.concatenate([np.zeros_like(z), z], 1) if outputs == 1 else z
        log_p = log_softmax(full, 1)
        ridge = np.full((len(w), 1), 1 / c)
        ridge[-1] = 1e-6 * len(x)
        wrong = np.exp(log_p) - np.eye(classes)[y]
        gradient = x1.T @ (wrong[:, 1:] if outputs == 1 else wrong) + ridge * w
        return -log_p[np.arange(len(y)), y].sum() + 0.5 * (ridge * w * w).sum(), gradient.ravel()

    start = np.zeros(x1.shape[1] * outputs)
    found = minimize(value, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-16, "gtol": 1e-9})
    return found.x.reshape(-1, outputs)


@pytest.mark.parametrize(("classes", "rows", "dim"), [(2, 120, 6), (3, 120, 6), (2, 12, 20)])
def test_every_fit_is_the_minimum(classes, rows, dim):
    rng = np.random.default_rng(classes + dim)
    x = rng.normal(size=(rows, dim)) @ rng.normal(size=(dim, dim)) * 3 + 50
    y = np.minimum((x[:, 0] - 50 > 0) + (x[:, 1] - 50 > 4) * (classes > 2) + 0, classes - 1).astype(int)
    y = np.where(rng.random(rows) < 0.1, rng.integers(0, classes, rows), y)
    masks = np.stack([np.ones(rows, bool), np.arange(rows) < rows // 2, np.arange(rows) % 3 > 0])
    choose = ~masks
    fits = logistic.fit(x.astype(np.float32), y, masks, choose, classes=classes, cs=CS)
    assert fits.converged().all(), fits.residual
    x = x.astype(np.float32).astype(np.float64)
    scaled = (x - x.mean(0)) / x.std(0)
    for j, mask in enumerate(masks):
        for i, c in enumerate(CS):
            w = oracle(scaled[mask], y[mask], c, classes)
            z = np.concatenate([scaled, np.ones((rows, 1))], 1) @ w
            full = np.concatenate([np.zeros_like(z), z], 1) if classes == 2 else z
            log_p = log_softmax(full, 1)
            p = fits.probabilities(j, i, x)
            np.testing.assert_allclose(p, np.exp(log_p[:, 1] if classes == 2 else log_p), atol=2e-4)
            if choose[j].any():
                expected = -log_p[np.arange(rows), y][choose[j]].mean()
                np.testing.assert_allclose(fits.losses[j, i], expected, rtol=1e-3)
            if classes == 2:
                slope = w[:-1, 0] / x.std(0)
                np.testing.assert_allclose(fits.direction(j, i), slope, rtol=5e-3, atol=2e-3 * np.abs(slope).max())


def test_one_class_and_separable_fits_stay_finite():
    x = np.linspace(-1, 1, 20)[:, None].astype(np.float32)
    y = (x[:, 0] > 0).astype(int)
    masks = np.stack([y == 1, np.ones(20, bool)])
    fits = logistic.fit(x, y, masks, ~masks, classes=2, cs=(10.0,))
    assert np.isfinite(fits.weights).all()
    assert fits.probabilities(0, 0, x).min() > 0.99
    p = fits.probabilities(1, 0, x)
    assert ((p > 0.5) == (y == 1)).all()


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(ValueError, match="run up to 2"):
        logistic.fit(np.zeros((4, 2)), np.array([0, 1, 2, 0]), np.ones((1, 4), bool), np.ones((1, 4), bool), classes=2)
