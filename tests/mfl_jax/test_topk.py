"""The k nearest rows against a plain float64 search of all pairs, with what is excluded and with equal rows."""

import numpy as np
import pytest

from mfl_jax import topk


def plain(queries, bank, k, barred):
    q, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries.astype(float), bank.astype(float)))
    close = np.where(barred, -np.inf, q @ b.T)
    index = np.argsort(-close, 1, kind="stable")[:, :k]
    return np.take_along_axis(close, index, 1), index


@pytest.mark.parametrize(("rows", "k", "block"), [(5000, 10, 2**20), (5000, 100, 1500), (700, 700, 300), (41, 6, 7)])
def test_rows_and_order_are_those_of_a_plain_search(rows, k, block):
    rng = np.random.default_rng(rows)
    queries, bank = rng.normal(size=(1100 if rows == 700 else 60, 12)), rng.normal(size=(rows, 12))
    codes = [(rng.integers(0, 5, len(queries)), rng.integers(0, 4, rows))]
    codes.append((rng.integers(0, 9, len(queries)).astype(str), rng.integers(0, 9, rows).astype(str)))
    barred = np.any([q[:, None] == b[None] for q, b in codes], axis=0)
    expected, order = plain(queries, bank, k, barred)
    close, index = topk.search(queries, bank, k, codes, block=block)
    np.testing.assert_allclose(close, expected, atol=2e-6)
    np.testing.assert_array_equal(index == -1, np.isneginf(expected))
    gaps = -np.diff(np.where(np.isneginf(expected), -9, expected), axis=1, prepend=9, append=-9)
    apart = (gaps[:, :-1] > 1e-6) & (gaps[:, 1:] > 1e-6)  # float32 tells it from the ranks beside it
    assert apart.mean() > 0.9 or k > 100
    np.testing.assert_array_equal(index[apart], order[apart])


@pytest.mark.parametrize("block", [2**20, 1000])
def test_of_equal_rows_the_lower_number_is_first(block):
    """Each of 40 different rows comes 100 times, scattered: whole groups hold the same best similarity."""
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(40, 16)).astype(np.float32)
    which = rng.permutation(np.repeat(np.arange(40), 100))
    _, index = topk.search(kinds, kinds[which], 150, block=block)
    for kind in range(40):
        assert index[kind, :100].tolist() == np.flatnonzero(which == kind).tolist()
        assert (np.diff(index[kind, 100:]) > 0).all()


def test_one_bank_serves_many_queries_and_codes_it_has_not():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 8))
    bank = topk.place(x, [np.repeat(["a", "b", "c"], 100)])
    _, index = topk.nearest(bank, x[:5], 3, [np.array(["a", "b", "zz", "", "c"])])
    assert (index[0] >= 100).all()
    assert index[[1, 2, 3, 4], 0].tolist() == [1, 2, 3, 4]
    close, index = topk.nearest(bank, x[:0], 3, [np.array([], "U1")])
    assert close.shape == index.shape == (0, 3)


def test_a_row_of_zeros_is_like_nothing():
    close, index = topk.search(np.zeros((1, 4)), np.eye(4), 2)
    assert close.tolist() == [[0, 0]]
    assert index.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: topk.search(np.eye(3), np.eye(3), 0), "k is at least 1, not 0"),
        (lambda: topk.place(np.zeros((0, 3))), r"at least one row, not \[0, 3\]"),
        (lambda: topk.place(np.eye(3), [np.arange(2)]), r"codes of 3 rows are needed, not of \[2\]"),
        (lambda: topk.nearest(topk.place(np.eye(3), [np.arange(3)]), np.eye(3), 1), "excludes by 1 codes; 0"),
    ],
)
def test_a_wrong_request_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
