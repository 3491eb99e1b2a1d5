"""Neighbours against a plain search over all pairs; votes; that a slide never finds itself."""

import numpy as np
import pytest

from mfl_jax.evaluators import Task, knn
from tests.mfl_jax.evaluators.cohort import cohort


def plain(queries, bank, k, barred):
    q, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries.astype(float), bank.astype(float)))
    close = np.where(barred, -np.inf, q @ b.T)
    index = np.argsort(-close, 1, kind="stable")[:, :k]
    return np.take_along_axis(close, index, 1), index


@pytest.mark.parametrize("block", [7, 1024])
def test_neighbours_are_those_of_a_plain_search(block):
    rng = np.random.default_rng(0)
    queries, bank = rng.normal(size=(33, 6)), rng.normal(size=(41, 6))
    slides, cases = (rng.integers(0, 5, n) for n in (33, 41)), (rng.integers(0, 4, n).astype(str) for n in (33, 41))
    pairs = [tuple(slides), tuple(cases)]
    barred = np.any([q[:, None] == b[None] for q, b in pairs], axis=0)
    expected, order = plain(queries, bank, 6, barred)
    similarity, index = knn.neighbours(queries, bank, 6, pairs, block=block)
    np.testing.assert_allclose(similarity, expected, atol=1e-5)
    np.testing.assert_array_equal(index, order)


def test_where_fewer_are_allowed_there_are_fewer():
    x = np.eye(3)
    similarity, index = knn.neighbours(x, x, 9, [(np.array([0, 0, 1]),) * 2])
    assert index[0].tolist() == [2, -1, -1]
    assert np.isneginf(similarity[0, 1:]).all()
    even = knn.vote(np.full((1, 2), -np.inf), np.full((1, 2), -1), np.array([1, 1]), 2, 2)
    assert even.tolist() == [[0.5, 0.5]]


def test_votes_are_weighted_by_similarity():
    found = knn.vote(np.array([[0.9, 0.8, 0.8]]), np.array([[2, 0, 1]]), np.array([0, 0, 1]), 3, 2, temperature=0.1)
    assert found[0, 1] == pytest.approx(1 / (1 + 2 * np.exp(-1)))
    assert knn.vote(np.array([[0.9, 0.8]]), np.array([[2, 0]]), np.array([0, 0, 1]), 1, 2)[0, 1] == 1


def test_a_slide_that_would_find_itself_is_kept_from_it():
    """Features name the slide and nothing else, labels are of the slide: only without the exclusion is it all right."""
    rng = np.random.default_rng(1)
    slide = np.repeat(np.arange(12), 10)
    features = np.eye(12)[slide] + 0.01 * rng.normal(size=(120, 12))
    columns = {"slide": slide, "case": slide // 2, "label": (slide * 7 // 3) % 2}
    splits = {"train": [0, 1, 2, 3], "test": [4, 5]}
    result = knn.evaluate(features, columns, splits, Task("t"), ks=(1, 5), resamples=100)
    assert result.metrics["auc"].value < 0.9
    _, index = knn.neighbours(features, features, 1, [(slide, slide)])
    assert (slide[index[:, 0]] != slide).all()


def test_signal_is_found_on_unseen_cases_and_noise_is_not():
    c = cohort(seed=1, dim=2, signal=2.5)
    assert knn.evaluate(c["features"], c["columns"], c["splits"], Task("t"), resamples=200).metrics["auc"].low > 0.7
    c = cohort(seed=1, signal=0.0)
    interval = knn.evaluate(c["features"], c["columns"], c["splits"], Task("t"), resamples=200).metrics["auc"]
    assert interval.low < 0.5 < interval.high
