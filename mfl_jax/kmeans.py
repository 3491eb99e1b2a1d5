"""k-means as one pure function: masked, restarted, and fit for vmap (over slides, say) and jit."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Clustering(NamedTuple):
    centroids: jax.Array  # float32 [k, D]
    assignment: jax.Array  # int32 [N]: the nearest centroid, of equals the first; -1 where the mask is False
    inertia: jax.Array  # float32: sum of squared distances to it


@functools.partial(jax.jit, static_argnames=("k", "iterations", "restarts"))
def kmeans(key: jax.Array, x: jax.Array, mask: jax.Array, k: int, iterations: int, restarts: int) -> Clustering:
    """The best of `restarts` runs, each from centres of its own drawn by k-means++, of the rows [N, D] where mask [N].

    No row that is masked out is counted, whatever is in it. A cluster that loses its last row keeps its centroid; of
    fewer than k different rows some centroids are equal, and of none all are zero. Nothing becomes NaN.
    """
    x = jnp.where(mask[:, None], x.astype(jnp.float32), 0)
    middle = x.sum(0) / jnp.maximum(mask.sum(), 1)
    x = jnp.where(mask[:, None], x - middle, 0)  # distances lose fewer digits around zero
    noise = jax.random.gumbel(key, (restarts, k, x.shape[0]))
    starts = jax.vmap(lambda of_run: plus_plus(of_run, x, mask))(noise)
    found = jax.vmap(lambda start: lloyd(x, mask, start, iterations))(starts)
    best = jax.tree.map(lambda leaf: leaf[found.inertia.argmin()], found)
    return best._replace(centroids=best.centroids + middle)


@functools.partial(jax.jit, static_argnames=("k", "iterations", "restarts"))
def kmeans_of_few(key: jax.Array, x: jax.Array, mask: jax.Array, k: int, iterations: int, restarts: int) -> Clustering:
    """As kmeans, from the same starts, for rows that are few beside what is known of each: N is not far above D.

    A centroid is a mean of rows, so its distances follow from the products of rows with each other. Those are taken
    once, [N, N], and no turn of any restart touches the D columns again.
    """
    x = jnp.where(mask[:, None], x.astype(jnp.float32), 0)
    middle = x.sum(0) / jnp.maximum(mask.sum(), 1)
    x = jnp.where(mask[:, None], x - middle, 0)
    products = _matmul(x, x.T)
    square = jnp.diag(products)

    def draw(squared, of_rows):
        weights = jnp.where(mask, jnp.where((squared * mask).max(1, keepdims=True) > 0, squared, 1), 0)
        chosen = (jnp.where(weights > 0, jnp.log(weights), -jnp.inf) + of_rows).argmax(1)
        apart = square - 2 * products[chosen] + square[chosen, None]
        return jnp.minimum(squared, jnp.maximum(apart, 0)), jax.nn.one_hot(chosen, len(x))

    def apart(shares):
        """[restarts, k, N] squared distances to centroids, less the square of the row."""
        cross = _matmul(shares.reshape(-1, len(x)), products).reshape(shares.shape)
        return (cross * shares).sum(2, keepdims=True) - 2 * cross

    def turn(shares, _):
        member = (apart(shares).argmin(1)[:, None] == jnp.arange(k)[:, None]) & mask
        size = member.sum(2, keepdims=True)
        return jnp.where(size > 0, member / jnp.maximum(size, 1), shares), None

    none = jnp.full((restarts, len(x)), jnp.finfo(jnp.float32).max)
    noise = jax.random.gumbel(key, (restarts, k, len(x)))
    starts = lax.scan(draw, none, noise.swapaxes(0, 1))[1].swapaxes(0, 1)
    shares, _ = lax.scan(turn, starts, None, iterations)
    far = apart(shares)
    inertia = jnp.where(mask, jnp.maximum(far.min(1) + square, 0), 0).sum(1)
    best = inertia.argmin()
    assignment = jnp.where(mask, far[best].argmin(0), -1).astype(jnp.int32)
    return Clustering(_matmul(shares[best], x) + middle, assignment, inertia[best])


def lloyd(x: jax.Array, mask: jax.Array, start: jax.Array, iterations: int) -> Clustering:
    """`iterations` times: rows to the nearest centroid, centroids to the mean of their rows; then rows once more."""

    def turn(centroids, _):
        which, _ = _nearest(x, centroids)
        member = jax.nn.one_hot(jnp.where(mask, which, -1), len(centroids), dtype=jnp.float32)
        size = member.sum(0)[:, None]
        total = _matmul(member.T, x)
        return jnp.where(size > 0, total / jnp.maximum(size, 1), centroids), None

    centroids, _ = lax.scan(turn, start, None, iterations)
    which, squared = _nearest(x, centroids)
    return Clustering(centroids, jnp.where(mask, which, -1), jnp.where(mask, squared, 0).sum())


def plus_plus(noise: jax.Array, x: jax.Array, mask: jax.Array) -> jax.Array:
    """[k, D] rows as first centres, each drawn with chances as its squared distance to those before it; noise is of
    Gumbel's distribution, [k, N].
    """

    def draw(squared, of_row):
        # where all rows are at a centre already, any row
        weights = jnp.where(mask, jnp.where((squared * mask).max() > 0, squared, 1), 0)
        chosen = (jnp.where(weights > 0, jnp.log(weights), -jnp.inf) + of_row).argmax()
        centre = x[chosen]
        return jnp.minimum(squared, ((x - centre) ** 2).sum(1)), centre

    none = jnp.full(x.shape[0], jnp.finfo(jnp.float32).max)
    return lax.scan(draw, none, noise)[1]


def _nearest(x: jax.Array, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    cross = _matmul(x, centroids.T)
    apart = (centroids**2).sum(1) - 2 * cross
    which = apart.argmin(1).astype(jnp.int32)
    return which, jnp.maximum(apart.min(1) + (x**2).sum(1), 0)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
