"""L2-logistic regression: every penalty, fold and subset of labels as one batched program on the device.

min over w, b of  sum_i m_i loss_i(w, b) + |w|^2 / 2C,  m the 0/1 mask of the fit, b free but for a ridge of 1e-6 that
keeps a fit with one class finite. Truncated Newton, conjugate gradients inside, in float32: features are standardised
and turned to their principal axes first (float64, on the host), which leaves the minimum where it is and makes the
Hessian nearly diagonal.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CS = tuple(float(c) for c in 10.0 ** np.arange(-5, 1.01, 0.5))
BIAS = 1e-6
ROUNDS, INNER, TOLERANCE, STALLED = 60, 100, 3e-6, 3e-4
HELD = 1 << 23  # outputs [fits, rows, classes] that exist at once


@dataclass(frozen=True)
class Axes:
    """x -> (x - mean) / std @ turn"""

    mean: np.ndarray
    std: np.ndarray
    turn: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """float32 [N, r + 1], a column of ones last."""
        turned = ((x - self.mean) / self.std) @ self.turn
        return np.concatenate([turned, np.ones((len(x), 1))], 1).astype(np.float32)


def axes(x: np.ndarray) -> Axes:
    """From the rows that are fitted; no label is needed."""
    x = np.asarray(x, np.float64)
    mean, std = x.mean(0), x.std(0)
    std = np.where(std > 1e-12 * np.maximum(np.abs(mean), 1e-30), std, 1.0)
    scaled = (x - mean) / std
    if len(x) < x.shape[1]:
        return Axes(mean, std, np.linalg.svd(scaled, full_matrices=False)[2].T)
    return Axes(mean, std, np.linalg.eigh(scaled.T @ scaled)[1][:, ::-1])


@dataclass(frozen=True)
class Fits:
    weights: np.ndarray  # [J, C, r + 1, outputs], the bias last
    losses: np.ndarray  # [J, C] mean log loss over the rows to choose by; nan where there are none
    residual: np.ndarray  # [J, C] norm of the preconditioned gradient where the fit ended
    axes: Axes

    def converged(self) -> np.ndarray:
        return self.residual <= STALLED

    def probabilities(self, fit: int, c: int, features: np.ndarray) -> np.ndarray:
        """[N] of class 1 where there are two, else [N, K]."""
        z = self.axes(features).astype(np.float64) @ self.weights[fit, c].astype(np.float64)
        if z.shape[1] == 1:
            return 1 / (1 + np.exp(-np.clip(z[:, 0], -700, 700)))
        z = np.exp(z - z.max(1, keepdims=True))
        return z / z.sum(1, keepdims=True)

    def direction(self, fit: int, c: int, classes: int = 1) -> np.ndarray:
        """[D] by which the raw features give the logit (of class `classes` against the mean of all where > 2)."""
        w = self.weights[fit, c, :-1].astype(np.float64)
        w = w[:, 0] if w.shape[1] == 1 else w[:, classes] - w.mean(1)
        return (self.axes.turn @ w) / self.axes.std


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    masks: np.ndarray,
    choose: np.ndarray,
    *,
    classes: int,
    cs: tuple[float, ...] = CS,
) -> Fits:
    """features [N, D], labels int [N], masks and choose bool [J, N]: all J x len(cs) fits."""
    masks, choose = np.asarray(masks, bool), np.asarray(choose, bool)
    if not masks.any(1).all():
        raise ValueError("a fit has no rows")
    if labels[(masks | choose).any(0)].max() >= classes:
        raise ValueError(f"labels run up to {labels.max()}, but there are {classes} classes")
    turn = axes(features[masks.any(0)])
    used = (masks | choose).any(0)
    rows = turn(np.asarray(features[used], np.float64))
    outputs = 1 if classes == 2 else classes
    together = int(max(1, min(len(masks) * len(cs), HELD // (len(rows) * outputs))))
    inputs = (rows, labels[used].astype(np.int32), masks[:, used], choose[:, used], np.asarray(cs, np.float32))
    weights, losses, residual = jax.device_get(_fit_all(*inputs, outputs=outputs, together=together))
    return Fits(weights, losses, residual, turn)


def row_losses(z: jax.Array, labels: jax.Array) -> jax.Array:
    if z.shape[-1] == 1:
        return jax.nn.softplus(z[:, 0]) - labels * z[:, 0]
    return jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, labels[:, None], -1)[:, 0]


@functools.partial(jax.jit, static_argnames=("outputs", "together"))
def _fit_all(rows, labels, masks, choose, cs, *, outputs: int, together: int):
    fits, penalties = masks.shape[0], cs.shape[0]
    total = fits * penalties
    numbers = jnp.arange(-(-total // together) * together) % total  # the last turn is as full as the others

    def one(number):
        # Fits of one penalty lie together: they need about as many rounds.
        c, j = number // fits, number % fits
        mask = masks[j].astype(jnp.float32)
        count = mask.sum()
        ridge = jnp.full(rows.shape[1], 1 / (cs[c] * count)).at[-1].set(BIAS)
        w, residual = _newton(rows, labels, mask / count, ridge, outputs)
        val = choose[j].astype(jnp.float32)
        # Masked rows may hold no class at all, so they are left out before, not after, the product.
        each = jnp.where(choose[j], row_losses(_times(rows, w), labels), 0.0)
        return w, each.sum() / val.sum(), residual

    flat = lax.map(one, numbers, batch_size=together)
    return jax.tree.map(lambda x: jnp.swapaxes(x[:total].reshape(penalties, fits, *x.shape[1:]), 0, 1), flat)


def _times(a, b):
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _newton(rows, labels, mass, ridge, outputs: int):
    """-> weights [r + 1, outputs], residual."""

    def value(w, z):
        return jnp.sum(mass * row_losses(z, labels)) + 0.5 * jnp.sum(ridge[:, None] * w * w)

    gradient = jax.grad(lambda w: value(w, _times(rows, w)))
    # The Hessian's diagonal at w = 0, where it is largest.
    share = 0.25 if outputs == 1 else (1 - 1 / outputs) / outputs
    inverse = 1 / (share * jnp.sum(mass[:, None] * rows * rows, 0) + ridge + 1e-12)[:, None]

    def body(state):
        w, current, before, g, count, _ = state
        _, product = jax.linearize(gradient, w)
        size = jnp.sqrt(jnp.sum(g * g * inverse))
        step = _conjugate(product, -g, inverse, jnp.minimum(0.1, jnp.sqrt(size)) * size)
        slope = jnp.sum(g * step)
        z, dz = _times(rows, w), _times(rows, step)

        def too_long(t):
            rounding = 1e-6 * jnp.abs(current)
            return (value(w + t * step, z + t * dz) > current + 1e-4 * t * slope + rounding) & (t > 1e-6)

        t = lax.while_loop(too_long, lambda t: t / 2, jnp.float32(1))
        w = w + t * step
        g = gradient(w)
        residual = jnp.sqrt(jnp.sum(g * g * inverse))
        # Where float32 ends, a round no longer gains; early rounds may stall too, and go on.
        done = (residual <= TOLERANCE) | ((residual > 0.5 * before) & (residual < STALLED))
        return w, value(w, z + t * dz), residual, g, count + 1, done | (count + 1 >= ROUNDS)

    start = jnp.zeros((rows.shape[1], outputs), jnp.float32)
    first = gradient(start)
    state = (start, value(start, _times(rows, start)), jnp.float32(jnp.inf), first, 0, False)
    w, _, residual, *_ = lax.while_loop(lambda s: ~s[5], body, state)
    return w, residual


def _conjugate(product, target, inverse, tolerance):
    """Preconditioned conjugate gradients from 0, until the residual is below `tolerance` in the preconditioned norm."""

    def body(state):
        x, r, p, rho, count = state
        q = product(p)
        alpha = rho / jnp.maximum(jnp.sum(p * q), 1e-30)
        x, r = x + alpha * p, r - alpha * q
        y = inverse * r
        new = jnp.sum(r * y)
        return x, r, y + new / jnp.maximum(rho, 1e-30) * p, new, count + 1

    y = inverse * target
    state = (jnp.zeros_like(target), target, y, jnp.sum(target * y), 0)
    return lax.while_loop(lambda s: (jnp.sqrt(s[3]) > tolerance) & (s[4] < INNER), body, state)[0]
