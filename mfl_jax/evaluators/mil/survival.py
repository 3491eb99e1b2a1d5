"""Cox's partial likelihood, and how well risks order the times: Harrell's concordance, within folds."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LOW = -1e30
CHUNK = 2_500_000  # weights held at once, three times over


def cox_loss(risk: jax.Array, times: jax.Array, events: jax.Array, known: jax.Array) -> jax.Array:
    """Minus the log partial likelihood an event (Breslow's for ties), of the rows that are `known`; 0 without one."""
    at_risk = (times[None] >= times[:, None]) & known[None]
    z = jnp.where(at_risk, risk[None], LOW)
    top = lax.stop_gradient(z.max(1, keepdims=True))
    total = jnp.where(at_risk, jnp.exp(z - top), 0.0).sum(1)
    counted = known & (events > 0)
    each = jnp.where(counted, jnp.log(jnp.where(counted, total, 1.0)) + top[:, 0] - risk, 0.0)
    return each.sum() / jnp.maximum(counted.sum(), 1)


class Concordance:
    """A metric as those of statistics: (anything, risks [N], weights [R, N]) -> [R].

    Of the pairs within one stratum of which it is known who died first, the share in which that one has the higher
    risk (ties one half). Risks of different fits have no common scale, so strata are folds.
    """

    def __init__(self, times: np.ndarray, events: np.ndarray, strata: np.ndarray):
        self._strata = []
        for name in np.unique(strata):
            rows = np.flatnonzero(strata == name)
            time, event = times[rows], events[rows]
            earlier = (time[:, None] < time[None]) | ((time[:, None] == time[None]) & (event[None] == 0))
            pairs = earlier & (event[:, None] == 1)
            np.fill_diagonal(pairs, False)
            self._strata.append((rows, pairs))

    def __call__(self, values: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Pairs are summed as w' P w for each stratum, a few resamples at once: an array of resamples by pairs would be
        of gigabytes."""
        found, total = np.zeros(len(weights)), np.zeros(len(weights))
        for rows, pairs in self._strata:
            apart = scores[rows, None] - scores[None, rows]
            right, known = pairs * ((apart > 0) + 0.5 * (apart == 0)), pairs.astype(np.float64)
            step = max(1, CHUNK // len(rows))
            for start in range(0, len(weights), step):
                part = slice(start, start + step)
                drawn = weights[part][:, rows]
                found[part] += ((drawn @ right) * drawn).sum(1)
                total[part] += ((drawn @ known) * drawn).sum(1)
        return np.divide(found, total, out=np.full(len(weights), np.nan), where=total > 0)
