"""Cox's loss against the sum that defines it, in float64; concordance against all pairs, one by one."""

import tracemalloc

import jax
import numpy as np
import pytest

from mfl_jax.evaluators.mil import survival
from mfl_jax.evaluators.mil.survival import Concordance, cox_loss


def oracle(risk, times, events):
    total = 0.0
    for i in range(len(risk)):
        if events[i]:
            total -= risk[i] - np.log(sum(np.exp(risk[j]) for j in range(len(risk)) if times[j] >= times[i]))
    return total / max(sum(events), 1)


def made(n=15, seed=0, spread=1.0):
    draw = np.random.default_rng(seed)
    return draw.standard_normal(n) * spread, draw.integers(1, 7, n), draw.integers(0, 2, n)


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_the_loss_is_the_partial_likelihood_and_rows_left_out_do_not_count(spread):
    risk, times, events = made(spread=spread)
    known = np.arange(15) < 11
    found, grads = jax.jit(jax.value_and_grad(cox_loss))(risk.astype(np.float32), times, events, known)
    kept = risk[:11].astype(np.float32).astype(np.float64)
    assert float(found) == pytest.approx(oracle(kept, times[:11], events[:11]), rel=2e-6)
    for i in range(11):
        step = np.eye(11)[i] * 1e-5
        slope = [oracle(kept + sign * step, times[:11], events[:11]) for sign in (1, -1)]
        assert float(grads[i]) == pytest.approx((slope[0] - slope[1]) / 2e-5, abs=3e-5)
    assert not np.asarray(grads[11:]).any()


def test_without_an_event_there_is_no_loss_and_no_gradient():
    value, grads = jax.value_and_grad(cox_loss)(
        np.ones(4, np.float32), np.arange(4), np.zeros(4, int), np.ones(4, bool)
    )
    assert value == 0
    assert not np.asarray(grads).any()


def by_pairs(risk, times, events, strata):
    right = total = 0.0
    for i in range(len(risk)):
        for j in range(len(risk)):
            later = times[j] > times[i] or (times[j] == times[i] and not events[j])
            if events[i] and later and strata[i] == strata[j]:
                total += 1
                right += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
    return right / total


def test_concordance_counts_pairs_within_folds_and_weights_are_copies():
    risk, times, events = made(20)
    risk[3], strata = risk[4], np.arange(20) % 2
    copies = np.random.default_rng(1).integers(0, 3, 20)
    metric = Concordance(times, events, strata)
    found = metric(times, risk, np.stack([np.ones(20), copies]))
    assert found[0] == pytest.approx(by_pairs(risk, times, events, strata), abs=1e-12)
    rows = np.repeat(np.arange(20), copies)
    # copies of one slide are no pair of themselves with a known order: equal times of two events
    assert found[1] == pytest.approx(by_pairs(risk[rows], times[rows], events[rows], strata[rows]), abs=1e-12)


def test_risks_that_order_perfectly_have_concordance_one_and_reversed_ones_none():
    times, events = np.arange(1, 8), np.ones(7, int)
    metric = Concordance(times, events, np.zeros(7))
    assert metric(times, -times.astype(float), np.ones((1, 7)))[0] == 1
    assert metric(times, times.astype(float), np.ones((1, 7)))[0] == 0


def test_concordance_is_the_same_in_parts_and_never_holds_resamples_by_pairs(monkeypatch):
    risk, times, events = made(200)
    strata, weights = np.arange(200) % 3, np.random.default_rng(1).multinomial(200, np.full(200, 1 / 200), 50) * 1.0
    whole = Concordance(times, events, strata)(times, risk, weights)
    assert np.isfinite(whole).all()
    monkeypatch.setattr(survival, "CHUNK", 7 * 67)
    np.testing.assert_array_equal(Concordance(times, events, strata)(times, risk, weights), whole)
    first, second = np.nonzero(
        ((times[:, None] < times) | ((times[:, None] == times) & (events == 0)))
        & (events[:, None] == 1)
        & (strata[:, None] == strata)
        & ~np.eye(200, dtype=bool)
    )
    mass = weights[:, first] * weights[:, second]
    right = (risk[first] > risk[second]) + 0.5 * (risk[first] == risk[second])
    np.testing.assert_array_equal(whole, mass @ right / mass.sum(1))


def test_concordance_of_many_slides_is_small():
    risk, times, events = made(1000)
    metric, weights = Concordance(times, events, np.zeros(1000)), np.ones((2000, 1000))
    tracemalloc.start()
    metric(times, risk, weights)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 96 << 20
