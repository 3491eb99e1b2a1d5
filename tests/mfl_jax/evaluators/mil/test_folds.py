"""Folds keep cases together and classes alike; official splits are read as they are written; leaks are refused."""

import numpy as np
import pytest

from mfl_jax.bags import BagError, Table
from mfl_jax.evaluators.mil import folds
from mfl_jax.evaluators.tasks import LeakError


def table(cases=20, per_case=2, classes=2):
    names = [f"c{i:02d}" for i in range(cases) for _ in range(per_case)]
    slides = tuple(f"{name}-{i}" for i, name in enumerate(names))
    labels = np.repeat(np.arange(cases) % classes, per_case)
    return Table(slides, tuple(names), labels, tuple("abc"[:classes]))


def test_nested_folds_test_every_slide_once_and_never_split_a_case():
    given = table()
    found = folds.nested(given, outer=5, inner=4, seed=3)
    cases = np.asarray(given.cases)
    assert sorted(np.concatenate([f.test for f in found])) == list(range(40))
    for fold in found:
        assert len(fold.inner) == 4
        assert (given.labels[fold.test] == 1).sum() == 4
        vals = np.concatenate([val for _, val in fold.inner])
        assert sorted([*vals, *fold.test]) == list(range(40))
        for train, val in fold.inner:
            sides = [set(cases[rows]) for rows in (train, val, fold.test)]
            assert sum(map(len, sides)) == 20
            assert not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]


def test_folds_are_a_function_of_the_seed():
    def tests(seed):
        return [fold.test.tolist() for fold in folds.nested(table(), seed=seed)]

    assert tests(1) == tests(1) != tests(2)


def test_splits_of_clam_are_read_with_their_ragged_columns(tmp_path):
    given = table(4, 1)
    a, b, c, d = given.slides
    (tmp_path / "splits_0.csv").write_text(f",train,val,test\n0,{a},{c},{d}\n1,{b},,\n")
    (tmp_path / "splits_10.csv").write_text(f",train,val,test\n0,{c},{a},{b}\n1,{d},,\n")
    (tmp_path / "splits_0_bool.csv").write_text("not read")
    first, second = folds.read_splits(tmp_path, given)
    assert [first.name, second.name] == ["splits_0", "splits_10"]
    assert [rows.tolist() for rows in (*first.inner[0], first.test)] == [[0, 1], [2], [3]]
    assert second.test.tolist() == [1]


def test_a_split_without_val_is_dealt_by_case(tmp_path):
    given = table(6, 2)
    lines = [f"{case},{'test' if case == 'c05' else 'train'}" for case in dict.fromkeys(given.cases)]
    (tmp_path / "split.csv").write_text("case_id,split\n" + "\n".join(lines))
    (fold,) = folds.read_splits(tmp_path / "split.csv", given, inner=2)
    assert fold.test.tolist() == [10, 11]
    assert len(fold.inner) == 2
    assert sorted(np.concatenate([val for _, val in fold.inner])) == list(range(10))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (",train,val,test\n0,c00-0,c01-2,c00-1\n", LeakError, "cases in both train and test: c00"),
        (",train,val,test\n0,c00-0,,zz\n", BagError, "1 ids are not in the table: zz"),
        (",train,val,test\n0,c00-0,,\n", BagError, "test has no slides"),
        ("slide_id,split\nc00-0,trian\n", BagError, "row 2: split is 'trian'"),
        ("name,split\nc00-0,train\n", BagError, "give slide_id or case_id with split"),
    ],
)
def test_splits_that_cannot_be_used_are_refused(text, error, message, tmp_path):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(error, match=message):
        folds.read_splits(tmp_path / "s.csv", table())


def test_a_fold_without_a_class_is_named():
    given = table(4, 1)
    fold = folds.Fold("fold 0", ((np.array([0, 2]), np.array([1])),), np.array([3]))
    with pytest.raises(ValueError, match="fold 0: train lacks 'b'"):
        folds.check([fold], given)


def test_more_folds_than_cases_are_refused():
    with pytest.raises(ValueError, match="5 folds of 3 cases"):
        folds.nested(table(3, 2))
