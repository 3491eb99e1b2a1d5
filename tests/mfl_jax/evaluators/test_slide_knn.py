"""Folds of patients with a share of the labels, and the two ways without a network, against restatements."""

import numpy as np
import pytest

from mfl_jax import statistics
from mfl_jax.evaluators import slide_knn
from tests.mfl_jax.evaluators import slides_made


def test_folds_test_every_slide_once_and_split_no_patient():
    _, table = slides_made.slides()
    plan = slide_knn.plan(table, folds=5, shares=(0.25, 1.0), seed=3)
    cases = np.asarray(table.cases)
    tested = np.concatenate([draw.test for draw in plan[1.0]])
    assert sorted(tested) == list(range(len(cases)))
    for few, all_of_them in zip(plan[0.25], plan[1.0], strict=True):
        parts = [set(cases[rows]) for rows in (all_of_them.train, all_of_them.val, all_of_them.test)]
        assert sum(map(len, parts)) == len(set(cases)) == 40
        assert len(set.union(*parts)) == 40
        assert set(few.train) < set(all_of_them.train)
        assert (few.val.tolist(), few.test.tolist()) == (all_of_them.val.tolist(), all_of_them.test.tolist())
        kept = set(cases[few.train])
        assert set(few.train) == set(np.flatnonzero(np.isin(cases, list(kept))))
        assert [sum(table.labels[cases == case][0] == k for case in kept) for k in (0, 1)] == [3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 2}, "at least 3"),
        ({"folds": 41}, "41 folds of 40 cases"),
        ({"shares": (0.0,)}, "above 0 and up to 1"),
        ({"shares": (1.0, 1.0)}, "each once"),
        ({"folds": 30}, "val lacks 'b'"),
    ],
)
def test_what_cannot_be_dealt_is_refused(options, message):
    _, table = slides_made.slides()
    with pytest.raises(ValueError, match=message):
        slide_knn.plan(table, **options)


def test_a_mean_is_over_the_regions_of_a_slide_and_an_empty_slide_is_kept():
    bags, _ = slides_made.slides(cases=8)
    found = slide_knn.means(bags)
    expected = [bags.features[bags.rows(i)].astype(np.float64).mean(0) for i in range(1, len(bags))]
    np.testing.assert_allclose(found[1:], expected, rtol=1e-12)
    np.testing.assert_allclose(found[0], np.mean(expected, 0), rtol=1e-12)


@pytest.mark.parametrize("distance", slide_knn.DISTANCES)
@pytest.mark.parametrize("classes", [2, 3])
def test_neighbours_vote_as_counted_one_by_one(classes, distance):
    bags, table = slides_made.slides(cases=24, classes=classes)
    draws = slide_knn.plan(table, folds=4)[1.0]
    x = slide_knn.means(bags) + 100 * (distance == "euclidean")  # far from 0, where squares would lose digits
    found = slide_knn.knn(x, table.labels, draws, classes, k=3, distance=distance)
    for draw in draws:
        for row in draw.test:
            if distance == "cosine":
                near = [-x[row] @ x[i] / np.linalg.norm(x[row]) / np.linalg.norm(x[i]) for i in draw.train]
            else:
                near = [np.linalg.norm(x[row] - x[i]) for i in draw.train]
            votes = table.labels[draw.train[np.argsort(near, kind="stable")[:3]]]
            expected = np.bincount(votes, minlength=classes) / 3
            np.testing.assert_allclose(found[row], expected[1] if classes == 2 else expected)


def test_linear_finds_a_signal_in_the_mean_and_nothing_where_there_is_none():
    for shift, low, high in ((4.0, 0.95, 1.0), (0.0, 0.25, 0.75)):
        bags, table = slides_made.slides(shift=shift)
        draws = slide_knn.plan(table, folds=5)[1.0]
        auc = statistics.auc_within(slide_knn.strata(draws))
        scores, chosen = slide_knn.linear(slide_knn.means(bags), table.labels, draws, 2, (1e-2, 1.0))
        assert low <= statistics.measure(auc, table.labels, scores) <= high
        assert len(chosen) == 5


def test_linear_does_not_look_at_the_labels_it_tests():
    bags, table = slides_made.slides()
    draws = slide_knn.plan(table, folds=5)[1.0]
    x, other = slide_knn.means(bags), table.labels.copy()
    other[draws[0].test] = 1 - other[draws[0].test]
    one = slide_knn.linear(x, table.labels, draws, 2, (0.1, 1.0))[0]
    two = slide_knn.linear(x, other, draws, 2, (0.1, 1.0))[0]
    np.testing.assert_array_equal(one[draws[0].test], two[draws[0].test])
    assert not np.array_equal(one[draws[1].test], two[draws[1].test])
