"""Targets, and that no case is on two sides."""

import numpy as np
import pytest

from mfl_jax.evaluators.tasks import LeakError, Task, check_overlap, masks_of, nested_draw, split_rows

SPLITS = {"train": ["a", "b"], "val": ["c"], "test": ["d", "e"]}


@pytest.mark.parametrize(
    ("changed", "pretrained", "named"),
    [
        ({"test": ["d", "b"]}, (), "both train and test: b"),
        ({"val": ["b"]}, (), "both train and val: b"),
        ({"val": ["d"]}, (), "both val and test: d"),
        ({}, ["a", "e"], "validation or test split: e"),
        ({}, ["c"], "validation or test split: c"),
    ],
)
def test_shared_cases_are_refused_by_name(changed, pretrained, named):
    with pytest.raises(LeakError, match=named):
        check_overlap(SPLITS | changed, pretrained)


def test_transductive_is_said_and_never_covers_the_probes_own_leak():
    assert check_overlap(SPLITS, ["a", "b"]) == ()
    (note,) = check_overlap(SPLITS, ["a", "d", "e"], transductive=True)
    assert note == "transductive: the encoder has seen 2 of 3 validation and test cases"
    with pytest.raises(LeakError, match="both train and test"):
        check_overlap(SPLITS | {"test": ["a"]}, transductive=True)


def test_an_empty_split_is_an_error():
    with pytest.raises(ValueError, match="'test' has no cases"):
        check_overlap({"train": ["a"], "test": []})


def test_targets_by_threshold_class_and_number():
    columns = {"positive": np.array([0.2, 0.5, 0.7, np.nan]), "label": np.array([2, -1, 0, 1], np.int32)}
    target, known = Task("t", "positive", 0.5).read(columns)
    assert target.tolist() == [0, 0, 1, 0]
    assert known.tolist() == [True, True, True, False]
    target, known = Task("t", exclude=(2,)).read(columns)
    assert known.tolist() == [False, False, True, True]
    assert target[known].tolist() == [0, 1]
    target, known = Task("t", "positive", regression=True).read(columns)
    assert target[known].tolist() == [0.2, 0.5, 0.7]
    with pytest.raises(ValueError, match="not whole numbers"):
        Task("t", "positive").read(columns)
    with pytest.raises(ValueError, match="no column 'positiv'"):
        Task("t", "positiv").read(columns)
    with pytest.raises(ValueError, match="no threshold"):
        Task("t", "positive", 0.5, regression=True).read(columns)


def test_rows_of_splits_are_those_with_a_known_target():
    columns = {"case": np.array(list("aabcdde"))}
    rows = split_rows(columns, SPLITS, np.array([1, 0, 1, 1, 1, 1, 0], bool))
    assert [np.flatnonzero(rows[s]).tolist() for s in ("train", "val", "test")] == [[0, 2], [3], [4, 5]]
    with pytest.raises(ValueError, match="split 'train' has a known target"):
        split_rows(columns, SPLITS, np.array([0, 0, 0, 1, 1, 1, 1], bool))


def test_folds_are_of_whole_cases_and_cover_all_of_train_once():
    cases = np.repeat(list("abcdefg"), 3)
    train = np.isin(cases, list("bcdfg"))
    draw = nested_draw(cases, train, np.zeros(21, bool), folds=3, seed=1)
    assert len(draw.pairs) == 3
    assert (np.sum([val for _, val in draw.pairs], axis=0) == train).all()
    for fit, val in draw.pairs:
        assert not set(cases[fit]) & set(cases[val])
        assert ((fit | val) == train).all()
    with pytest.raises(ValueError, match="at least 2 training cases"):
        nested_draw(cases, cases == "a", np.zeros(21, bool), folds=3, seed=1)


def test_the_reported_fit_is_shared_with_the_choosing_one_where_it_is_the_same():
    cases = np.repeat(list("abc"), 2)
    train, val = cases == "a", cases == "b"
    masks, choose, places = masks_of([nested_draw(cases, train, val, folds=2, seed=0)])
    assert (len(masks), places) == (1, [([0], 0)])
    masks, choose, places = masks_of([nested_draw(cases, train, val, folds=2, seed=0, refit=True)] * 2)
    assert places == [([0], 1), ([2], 3)]
    assert (masks[1] == (train | val)).all()
    assert not choose[1].any()
