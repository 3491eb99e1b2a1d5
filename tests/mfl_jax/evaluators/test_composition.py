"""Mixture and arrangement of kinds of tile, counted by hand."""

import numpy as np
import pytest

from mfl_jax.evaluators import composition


def columns(rows):
    """Maps of kinds, one a slide: '.' is no tile."""
    found = {"region": [], "x": [], "y": [], "slide": []}
    for slide, lines in enumerate(rows):
        for j, line in enumerate(lines):
            for i, kind in enumerate(line):
                if kind != ".":
                    for name, value in (("region", int(kind)), ("x", 70.0 * i), ("y", 70.0 * j), ("slide", slide)):
                        found[name].append(value)
    return {name: np.array(values) for name, values in found.items()}


def test_the_mixture_is_the_same_where_the_arrangement_is_not():
    given = columns([["0011", "0011"], ["0101", "1010"]])
    ids = np.arange(16)
    mixture = composition.embedded(given, ids, "mixture").features["he"]
    np.testing.assert_array_equal(mixture[:8].mean(0), mixture[8:].mean(0))
    beside = composition.embedded(given, ids, "arrangement").features["he"]
    pairs = [4 * part.sum(0).reshape(2, 2) for part in (beside[:8], beside[8:])]
    np.testing.assert_array_equal(pairs[0], [[8, 2], [2, 8]])
    np.testing.assert_array_equal(pairs[1], [[0, 10], [10, 0]])


def test_tiles_that_hold_little_else_are_told_apart():
    given = columns([["011"]]) | {"region_share": np.array([1.0, 0.6, 0.95])}
    found = composition.embedded(given, np.arange(3), "purity").features["he"]
    np.testing.assert_array_equal(found, [[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]])


def test_neighbours_are_of_one_slide_and_no_farther_than_a_step():
    given = columns([["0.1", "0.."], ["01"], ["1", ".", "."]])
    beside = composition.embedded(given, np.arange(6), "arrangement").features["he"]
    assert beside[1].sum() == beside[5].sum() == 0
    np.testing.assert_array_equal(4 * beside[[0, 2]].sum(0).reshape(2, 2), [[2, 0], [0, 0]])
    np.testing.assert_array_equal(4 * beside[3:5].sum(0).reshape(2, 2), [[0, 1], [1, 0]])


def test_what_is_not_known_is_refused():
    given = columns([["01"]])
    with pytest.raises(ValueError, match="no column 'tissue'"):
        composition.embedded(given, np.arange(2), "mixture", "tissue")
    with pytest.raises(ValueError, match="way is 'both'"):
        composition.embedded(given, np.arange(2), "both")
    given["region"][0] = -1
    with pytest.raises(ValueError, match="not known of 1 tiles"):
        composition.embedded(given, np.arange(2), "mixture")
