"""The order: bijections, uniformity, exact cover, exact balance, and no dependence on how it is asked."""

import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from input_pipeline import order

SEEDS = st.integers(0, 2**63 - 1)
GOLDEN = {
    "uniform": [125, 780, 377, 517, 243],
    "blockwise": [192, 613, 621, 377, 329],
    "balanced": [36, 209, 0, 50, 17],
}


def assert_uniform(counts, what):
    """A chi-square test at a level that a right order fails once in a million."""
    assert stats.chisquare(np.ravel(counts)).pvalue > 1e-6, (what, counts)


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_every_size_up_to_300_is_a_bijection(key):
    for size in range(1, 301):
        shuffled = order.index_shuffle(np.arange(size), np.uint64(key), size)
        assert np.array_equal(np.sort(shuffled), np.arange(size)), size


@pytest.mark.parametrize("size", [2**16, 2**16 + 1, 10**6 - 1])
def test_large_sizes_are_bijections(size):
    assert np.array_equal(np.sort(order.index_shuffle(np.arange(size), 7, size)), np.arange(size))


@pytest.mark.parametrize("size", [2**31 - 1, 2**31 + 1, 2**32, 10**12, 2**40 + 1])
def test_huge_sizes_are_injective_in_range_and_even(size):
    rng = np.random.default_rng(0)
    position = np.unique(np.concatenate([rng.integers(0, size, 200_000), [0, 1, size - 2, size - 1]]))
    shuffled = order.index_shuffle(position, 3, size)
    assert shuffled.min() >= 0
    assert shuffled.max() < size
    assert len(np.unique(shuffled)) == len(position)
    assert_uniform(np.bincount(shuffled * 100 // size, minlength=100), size)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_permutation_of_few_is_as_likely(size):
    keys = order.hash64(11, np.arange(24_000))
    rows = order.index_shuffle(np.arange(size)[None], keys[:, None], size)
    found = Counter(map(tuple, rows.tolist()))
    assert len(found) == math.factorial(size)
    assert_uniform(list(found.values()), size)


@pytest.mark.parametrize("size", [8, 31, 32, 33, 40, 64, 100])
def test_every_place_takes_every_index_and_neighbours_part(size):
    rows = order.index_shuffle(np.arange(size)[None], order.hash64(5, np.arange(8_000))[:, None], size)
    for place in (0, 1, size // 2, size - 1):
        assert_uniform(np.bincount(rows[:, place], minlength=size), (size, place))
    step = (rows[:, 1] - rows[:, 0]) % size
    assert_uniform(np.bincount(step, minlength=size)[1:], size)


def test_arrays_of_keys_and_sizes_agree_with_single_ones():
    rng = np.random.default_rng(1)
    size = rng.integers(1, 5000, 300)
    size[:60] = rng.integers(1, 40, 60)
    position, key = rng.integers(0, size), rng.integers(0, 2**63, 300)
    together = order.index_shuffle(position, key, size)
    alone = [int(order.index_shuffle(p, k, n)) for p, k, n in zip(position, key, size, strict=True)]
    assert together.tolist() == alone


def test_a_position_outside_is_refused():
    for position in (-1, 5):
        with pytest.raises(ValueError, match=r"0\.\.size-1"):
            order.index_shuffle(np.array([position]), 0, 5)
    with pytest.raises(ValueError, match="count from 0"):
        order.uniform(np.array([-1]), 0, 5)
    with pytest.raises(ValueError, match="empty"):
        order.uniform(np.array([0]), 0, 0)


def test_the_order_never_changes():
    """Runs resume across releases only while these hold; raise order.VERSION when they must not."""
    assert order.VERSION == 1
    at = np.array([0, 1, 2, 10**6, 10**12])
    assert order.uniform(at, 42, 1000).tolist() == GOLDEN["uniform"]
    assert order.blockwise(at, 42, 1000, block=16, window=4).tolist() == GOLDEN["blockwise"]
    assert order.balanced(at, 42, np.array([0, 3, 50, 51, 1000])).tolist() == GOLDEN["balanced"]


@given(size=st.integers(1, 400), seed=SEEDS, epoch=st.integers(0, 10**9), data=st.data())
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_everything_once(size, seed, epoch, data):
    position = epoch * size + np.arange(size)
    block, window = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 20))
    for ids in (order.uniform(position, seed, size), order.blockwise(position, seed, size, block=block, window=window)):
        assert np.array_equal(np.sort(ids), np.arange(size))


@given(seed=SEEDS, start=st.integers(0, 10**12))
@settings(max_examples=8, deadline=None)
def test_asking_in_pieces_or_out_of_order_changes_nothing(seed, start):
    position = start + np.arange(97)
    mixed = np.random.default_rng(0).permutation(97)
    offsets = np.array([0, 5, 6, 40, 77])
    for ask in (
        lambda p: order.uniform(p, seed, 77),
        lambda p: order.blockwise(p, seed, 77, block=10, window=3),
        lambda p: order.balanced(p, seed, offsets),
    ):
        whole = ask(position)
        assert np.array_equal(whole[mixed], ask(position[mixed]))
        assert whole.tolist() == [int(ask(np.array([p]))[0]) for p in position]


def test_seeds_and_epochs_differ():
    size = 1000
    orders = [order.uniform(e * size + np.arange(size), s, size) for s in range(4) for e in range(4)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.02


def test_blockwise_stays_inside_its_window():
    size, block, window = 10_007, 32, 8
    ids = order.blockwise(np.arange(size), 3, size, block=block, window=window)
    for start in range(0, size - block * window, block * window):
        held = ids[start : start + block * window - block]
        assert len(np.unique(held // block)) <= window + 1
    assert len(np.unique(ids[: block * window] // block)) <= window + 1


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), seed=SEEDS, turn=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_balance_is_exact(sizes, seed, turn):
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    groups = len(sizes)
    laps = math.lcm(*sizes)
    start = turn - turn % laps
    rounds = min(laps, 60)
    index = order.balanced(start * groups + np.arange(rounds * groups), seed, offsets)
    member = np.searchsorted(offsets, index, side="right") - 1
    assert (np.sort(member.reshape(rounds, groups), axis=1) == np.arange(groups)).all()
    for g, size in enumerate(sizes):
        seen = index[member == g]
        whole = seen[: len(seen) // size * size].reshape(-1, size)
        assert (np.sort(whole, axis=1) == offsets[g] + np.arange(size)).all()


def test_a_selection_is_its_ranges():
    ranges = np.array([[3, 5], [10, 11], [20, 26]])
    selection = order.Selection.of(ranges)
    assert len(selection) == 9
    expected = [i for a, b in ranges for i in range(a, b)]
    assert selection.ids(np.arange(9)).tolist() == expected


def test_below_is_even():
    draw = order.hash64(1, np.arange(70_000))
    assert_uniform(np.bincount(order.below(draw, 7), minlength=7), 7)
    assert order.below(draw, 2**32 - 1).max() < 2**32 - 1


@pytest.mark.slow
def test_a_hundred_million_tiles_are_sought_in_no_time():
    start = time.perf_counter()
    order.uniform(10**6 * 1024 + np.arange(1024), 0, 10**8)
    order.blockwise(10**6 * 1024 + np.arange(1024), 0, 10**8, block=64, window=64)
    assert time.perf_counter() - start < 1
