"""Views of grids of tile features: every op against numpy, cells that stay what they are, a mask that moves along."""

import jax
import numpy as np
import pytest

from mfl_jax.views import parse, parse_many

KEY = jax.random.key(5)
ROWS = 64


def grids(rows=ROWS, side=6, features=3):
    """Float16, every cell a number of its own, and about a third of them background."""
    made = np.arange(rows * side * side * features).reshape(rows, side, side, features) % 2039 + 1.0
    there = np.random.default_rng(1).random((rows, side, side, 1)) < 0.67
    return np.concatenate([made * there, there], -1).astype(np.float16)


def view(spec, size=None, channels=4):
    return jax.jit(parse(spec, size=size, kind="grid", channels=channels))


def matches(seen, candidates):
    """Which of the candidates every row is; each row is exactly one of them."""
    found = [[np.array_equal(row, c) for c in of] for row, of in zip(seen, candidates, strict=True)]
    assert all(sum(row) == 1 for row in found)
    return np.array([row.index(True) for row in found])


def test_a_window_is_a_piece_of_the_grid_as_it_is_and_every_place_comes_up():
    stored = grids()
    seen = np.asarray(view("window", 4)(KEY, stored))
    assert seen.shape == (ROWS, 4, 4, 4)
    assert seen.dtype == np.float32
    places = [(i, j) for i in range(3) for j in range(3)]
    at = matches(seen, [[grid[i : i + 4, j : j + 4] for i, j in places] for grid in stored])
    assert set(at) == set(range(9))
    assert np.array_equal(np.asarray(view("window(6)")(KEY, stored)), stored)


def test_a_window_with_more_tries_is_half_as_full_as_the_grid_or_the_fullest_that_was_drawn():
    stored = grids(side=8)
    stored[:, :, 3:] = 0  # tissue at the edge: most windows of 3 x 3 hold nothing of it
    stored[0] = 0
    once, often = (np.asarray(view(f"window(3,{tries})")(KEY, stored))[..., -1].mean((1, 2)) for tries in (1, 8))
    enough = 0.5 * stored[..., -1].astype(np.float64).mean((1, 2))
    assert (once[1:] == 0).mean() > 0.3
    assert (often[1:] >= enough[1:]).mean() > 0.95
    assert (often >= once).mean() > 0.8
    assert often[0] == 0
    whole = [[g[i : i + 3, j : j + 3] for i in range(6) for j in range(6)] for g in grids(side=8)]
    seen = np.asarray(view("window(3,tries=4)")(KEY, grids(side=8)))
    assert len(set(matches(seen, whole))) > 20


def test_the_view_of_evaluation_is_the_middle():
    stored = grids(3, side=16)
    np.testing.assert_array_equal(view("centre", 14)(KEY, stored), stored[:, 1:15, 1:15])
    np.testing.assert_array_equal(view("centre(5)", 14)(KEY, stored), stored[:, 5:10, 5:10])


def test_flips_and_turns_are_those_of_numpy():
    stored = grids()
    flips = [[g, g[:, ::-1], g[::-1], g[::-1, ::-1]] for g in stored]
    assert set(matches(np.asarray(view("window(6)|flip")(KEY, stored)), flips)) == {0, 1, 2, 3}
    turns = [[np.rot90(g, k) for k in range(4)] for g in stored]
    assert set(matches(np.asarray(view("window(6)|rot90")(KEY, stored)), turns)) == {0, 1, 2, 3}
    np.testing.assert_array_equal(view("window(6)|vflip(1)|hflip(1)")(KEY, stored), stored[:, ::-1, ::-1])
    np.testing.assert_array_equal(view("window(6)|flip(0)")(KEY, stored), stored)


def test_tiles_are_dropped_whole_and_noise_is_of_tiles_that_are_there():
    stored = grids()
    seen = np.asarray(view("window(6)|drop(.25)")(KEY, stored))
    kept = (seen == stored).all(-1)
    assert not seen[~kept].any()
    there = stored[..., -1] == 1
    share = 1 - kept[there].mean()
    assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / there.sum())
    noisy = np.asarray(view("window(6)|noise(.5,p=.5)")(KEY, stored))
    changed = (noisy != stored).any((1, 2, 3))
    assert 0.25 < changed.mean() < 0.75
    np.testing.assert_array_equal(noisy[..., -1], stored[..., -1])
    assert not noisy[~there].any()
    added = (noisy - stored.astype(np.float32))[there & changed[:, None, None]][:, :-1]
    assert abs(added.std() - 0.5) < 0.02
    assert abs(added.mean()) < 0.03


def test_many_crops_by_one_key_and_each_its_own():
    stored = grids(4)
    views = parse_many("2*window|flip; 3*window|flip|size(2)", size=5, kind="grid", channels=4)
    assert str(views) == "2*window(5,1)|flip(0.5); 3*window(2,1)|flip(0.5)"
    assert str(parse_many(str(views), kind="grid", channels=4)) == str(views)
    seen = [np.asarray(v) for v in jax.jit(views)(KEY, stored)]
    assert [v.shape for v in seen] == [(4, 5, 5, 4)] * 2 + [(4, 2, 2, 4)] * 3
    assert not np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[2], seen[3])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flip", "begins with window or centre"),
        ("window|centre", "has one of them"),
        ("crop(.5)", "'crop' is an op of image views, and this is a view of kind 'grid'"),
        ("window(4)|size(5)", "say it once"),
        ("window", "has no size"),
        ("window(4)|drop|flip", "'flip' .* cannot follow augment"),
    ],
)
def test_what_is_no_view_of_a_grid_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        parse(spec, kind="grid", channels=4)


@pytest.mark.parametrize("given", [grids(2, side=3), grids(2).astype(np.uint8), grids(2, features=5)])
def test_grids_that_are_too_small_or_no_features_are_refused(given):
    with pytest.raises(ValueError, match="the view 'window"):
        parse("window(4)", kind="grid", channels=4)(KEY, given)
