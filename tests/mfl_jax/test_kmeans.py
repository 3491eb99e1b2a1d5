"""k-means against a float64 restatement, alone and vmapped over slides of different lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfl_jax.kmeans import kmeans, kmeans_of_few, lloyd


def plain_lloyd(x, start, iterations):
    x, centroids = x.astype(np.float64), start.astype(np.float64)
    for _ in range(iterations):
        which = ((x[:, None] - centroids) ** 2).sum(-1).argmin(1)
        for k in range(len(centroids)):
            if (which == k).any():
                centroids[k] = x[which == k].mean(0)
    squared = ((x[:, None] - centroids) ** 2).sum(-1)
    return centroids, squared.argmin(1), squared.min(1).sum()


def blobs(seed, sizes, dim=6, apart=8.0):
    rng = np.random.default_rng(seed)
    which = np.repeat(np.arange(len(sizes)), sizes)
    return (rng.normal(size=(len(sizes), dim)) * apart)[which] + rng.normal(size=(len(which), dim)), which


def test_iterations_are_those_of_a_plain_restatement():
    x, start = np.random.default_rng(0).normal(size=(2, 200, 5)).astype(np.float32)
    start[6] = 100.0  # never nearest: it stays
    found = lloyd(jnp.array(x), jnp.ones(200, bool), jnp.array(start[:7]), 6)
    centroids, which, inertia = plain_lloyd(x, start[:7], 6)
    np.testing.assert_allclose(found.centroids, centroids, atol=1e-5)
    np.testing.assert_array_equal(found.assignment, which)
    assert float(found.inertia) == pytest.approx(inertia, rel=1e-5)
    np.testing.assert_array_equal(found.centroids[6], start[6])


def test_blobs_far_from_zero_are_found():
    x, which = blobs(1, [30, 50, 20, 40])
    found = kmeans(jax.random.key(0), (x + 1000).astype(np.float32), np.ones(len(x), bool), 4, 20, 8)
    assert len({(a, b) for a, b in zip(which.tolist(), np.asarray(found.assignment).tolist(), strict=True)}) == 4
    inertia = sum(((x[which == k] - x[which == k].mean(0)) ** 2).sum() for k in range(4))
    assert float(found.inertia) == pytest.approx(inertia, rel=1e-3)


def test_more_restarts_are_never_worse_and_one_key_gives_one_answer():
    x, _ = blobs(2, [35, 35, 35, 35], apart=1.0)
    x, mask = x.astype(np.float32), np.ones(140, bool)
    many = kmeans(jax.random.key(3), x, mask, 4, 20, 8)
    again = kmeans(jax.random.key(3), x, mask, 4, 20, 8)
    assert all(np.array_equal(a, b) for a, b in zip(many, again, strict=True))
    runs = [kmeans(key, x, mask, 4, 20, 1) for key in jax.random.split(jax.random.key(4), 6)]
    each = [plain_lloyd(x, np.asarray(r.centroids), 0)[2] for r in runs]
    np.testing.assert_allclose([r.inertia for r in runs], each, rtol=1e-5)
    assert max(each) > min(each) * 1.001  # so that choosing means something
    assert float(many.inertia) <= np.median(each)


def test_what_is_masked_out_changes_nothing_under_vmap():
    lengths, k = [40, 25, 3, 1, 0], 4
    x = np.full((5, 40, 6), np.nan, np.float32)
    mask = np.arange(40) < np.array(lengths)[:, None]
    for i, n in enumerate(lengths):
        x[i, :n] = np.random.default_rng(i).normal(size=(n, 6))
    keys = jax.random.split(jax.random.key(0), 5)
    each = jax.vmap(lambda key, x, mask: kmeans(key, x, mask, k, 10, 3))
    found = each(keys, x, mask)
    assert np.isfinite(found.centroids).all()
    assert np.isfinite(found.inertia).all()
    np.testing.assert_array_equal(np.asarray(found.assignment) == -1, ~mask)
    for i, n in enumerate(lengths):
        _, which, inertia = plain_lloyd(x[i, :n], np.asarray(found.centroids[i]), 0)
        np.testing.assert_array_equal(found.assignment[i, :n], which)
        assert float(found.inertia[i]) == pytest.approx(inertia, rel=1e-4, abs=1e-5)
    other = each(keys, np.where(mask[..., None], x, 7.0), mask)
    np.testing.assert_array_equal(other.centroids, found.centroids)
    one = kmeans(keys[1], x[1], mask[1], k, 10, 3)
    np.testing.assert_allclose(one.centroids, found.centroids[1], atol=1e-5)
    assert float(found.inertia[2]) == pytest.approx(0, abs=1e-5)
    assert float(found.inertia[4]) == 0
    np.testing.assert_array_equal(found.centroids[4], 0)


def test_equal_rows_are_one_cluster_without_nan():
    found = kmeans(jax.random.key(0), np.ones((40, 6), np.float32), np.ones(40, bool), 4, 10, 3)
    np.testing.assert_allclose(found.centroids, 1)
    assert float(found.inertia) == 0
    assert set(np.asarray(found.assignment).tolist()) == {0}


@pytest.mark.parametrize("seed", range(4))
def test_of_few_rows_the_same_is_found_from_their_products_alone(seed):
    x, _ = blobs(seed, [13, 9, 14], dim=20, apart=(8.0, 1.0, 0.5, 0.0)[seed])
    x, mask = (x + 3).astype(np.float32), np.arange(36) < (36, 30, 20, 2)[seed]
    x[~mask] = np.nan
    plain = kmeans(jax.random.key(seed), x, mask, 4, 10, 5)
    found = kmeans_of_few(jax.random.key(seed), x, mask, 4, 10, 5)
    np.testing.assert_array_equal(found.assignment, plain.assignment)
    np.testing.assert_allclose(found.centroids, plain.centroids, atol=1e-5)
    assert float(found.inertia) == pytest.approx(float(plain.inertia), rel=1e-4, abs=1e-3)
