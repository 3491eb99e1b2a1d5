"""Prototypes and likeness of slides, against float64 brute force: all permutations, and SciPy's Hungarian method."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from mfl_jax import prototypes

ROOT = Path(__file__).parents[2]
COUNTS = (40, 3, 14, 0, 33, 12, 60, 16)
LEAST = 12


def cohort(seed=0, counts=COUNTS, k=3, dim=24, apart=6.0):
    """Regions of every slide around k directions of its own, in an order that is not by slide."""
    draw = np.random.default_rng(seed)
    slide = draw.permutation(np.repeat(np.arange(len(counts)), counts))
    kind = draw.integers(0, k, len(slide))
    middle = draw.normal(size=(len(counts), k, dim)) * apart
    x = middle[slide, kind] + draw.normal(size=(len(slide), dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), slide, kind


def clustered(x, slide, slides=8, k=3, **options):
    return prototypes.cluster(jax.random.key(7), x, slide, slides, k, **{"least": LEAST, **options})


@pytest.fixture(scope="module")
def found():
    return clustered(*cohort()[:2])


def test_prototypes_are_the_directions_of_the_means_of_their_regions(found):
    x, slide, kind = cohort()
    assert found.eligible.tolist() == [count >= LEAST for count in COUNTS]
    for number, count in enumerate(COUNTS):
        rows, of = slide == number, found.assignment[slide == number]
        if count < LEAST:
            assert (of == -1).all()
            assert not found.vectors[number].any()
            assert not found.sizes[number].any()
            continue
        assert len({*zip(of.tolist(), kind[rows].tolist(), strict=True)}) == 3  # one cluster a kind
        assert found.sizes[number].tolist() == np.bincount(of, minlength=3).tolist()
        for k in range(3):
            mean = x[rows][of == k].astype(np.float64).mean(0)
            np.testing.assert_allclose(found.vectors[number, k], mean / np.linalg.norm(mean), atol=1e-6)


def test_a_slide_is_clustered_the_same_whatever_is_clustered_with_it(found):
    x, slide, _ = cohort()
    some = np.isin(slide, (2, 6))
    alone = clustered(x[some], slide[some])
    assert np.flatnonzero(alone.eligible).tolist() == [2, 6]
    np.testing.assert_array_equal(alone.assignment, found.assignment[some])
    np.testing.assert_array_equal(alone.vectors[[2, 6]], found.vectors[[2, 6]])


def test_calls_of_few_slides_are_as_one_of_all(found, monkeypatch):
    monkeypatch.setattr(prototypes, "CALL", 1)
    monkeypatch.setattr(prototypes, "SLIDES", 2)
    x, slide, _ = cohort()
    some = np.isin(slide, (2, 5, 7))
    one_by_one = clustered(x[some], slide[some])
    np.testing.assert_array_equal(one_by_one.assignment, found.assignment[some])
    np.testing.assert_allclose(one_by_one.vectors[[2, 5, 7]], found.vectors[[2, 5, 7]], atol=1e-6)


def test_equal_regions_and_long_slides_give_no_nan():
    x = np.ones((40, 24), np.float32)
    same = clustered(x, np.full(40, 4))
    np.testing.assert_allclose(same.vectors[4], 24**-0.5, rtol=1e-5)
    assert not clustered(0 * x, np.full(40, 4)).vectors.any()
    x, slide, kind = cohort(counts=(70,), dim=8)  # more regions than twice the features: the other k-means
    long = clustered(x, slide, slides=1)
    assert len({*zip(long.assignment.tolist(), kind.tolist(), strict=True)}) == 3


def unit(seed, slides, k, dim=6):
    x = np.random.default_rng(seed).normal(size=(slides, k, dim))
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def by_permutations(vectors):
    """float64 [S, S] of the best of all K! matchings."""
    v = vectors.astype(np.float64)
    cosine = np.einsum("iad,jbd->ijab", v, v)
    k = vectors.shape[1]
    return np.max([sum(cosine[:, :, a, p[a]] for a in range(k)) for p in itertools.permutations(range(k))], axis=0)


def check_neighbours(found, best, vectors, eligible, n):
    """Of scores that float32 tells apart, the order; of every neighbour, a matching that reaches its score."""
    best = np.where(eligible[:, None] & eligible & ~np.eye(len(best), dtype=bool), best, -np.inf)
    order = np.argsort(-best, 1, kind="stable")[:, :n]
    score = np.take_along_axis(best, order, 1)
    np.testing.assert_allclose(found.score, score, atol=1e-5)
    np.testing.assert_array_equal(found.slide == -1, np.isneginf(score))
    ranked = np.sort(np.where(np.isneginf(best), -9, best), 1)[:, ::-1]
    clear = (ranked[:, :n] - ranked[:, 1 : n + 1] > 1e-5) & np.isfinite(score)
    clear[:, 1:] &= clear[:, :-1]
    assert clear.sum() > 0
    np.testing.assert_array_equal(found.slide[clear], order[clear])
    for one, rank in np.argwhere(found.slide >= 0):
        other, taken = found.slide[one, rank], found.transfer[one, rank]
        assert sorted(taken) == list(range(vectors.shape[1]))
        reached = (vectors[one].astype(np.float64) * vectors[other][taken]).sum()
        assert reached == pytest.approx(found.score[one, rank], abs=1e-5)


@pytest.mark.parametrize(("k", "n", "slides"), [(1, 1, 7), (2, 3, 40), (3, 2, 5), (4, 1, 130), (5, 2, 70)])
def test_neighbours_are_those_of_all_permutations(k, n, slides):
    vectors = unit(k, slides, k)
    eligible = np.random.default_rng(k).random(slides) < 0.8
    vectors[~eligible] = 0
    found = prototypes.neighbours(vectors, eligible, n)
    check_neighbours(found, by_permutations(vectors), vectors, eligible, n)
    assert (found.slide[~eligible] == -1).all()
    assert not np.isin(found.slide, np.flatnonzero(~eligible)).any()


def by_hungarian(vectors):
    """float64 [S, S] of the best of all matchings."""
    best = np.zeros((len(vectors), len(vectors)))
    for i, j in itertools.product(range(len(vectors)), repeat=2):
        cosine = vectors[i].astype(np.float64) @ vectors[j].T
        best[i, j] = cosine[linear_sum_assignment(cosine, maximize=True)].sum()
    return best


@pytest.mark.parametrize("k", [prototypes.EXACT + 1, 12])
def test_of_many_prototypes_they_are_those_of_the_hungarian_method(k):
    vectors, eligible = unit(k, 14, k), np.ones(14, bool)
    check_neighbours(prototypes.neighbours(vectors, eligible, 2), by_hungarian(vectors), vectors, eligible, 2)


def kindred(seed, slides, k):
    """(vectors, eligible, cases): three slides a case, alike but for a little; the numbers of cases are no places."""
    draw = np.random.default_rng(seed)
    case = draw.permutation(slides) // 3
    vectors = unit(seed, slides, k)[case] + 0.05 * draw.normal(size=(slides, k, 6))
    eligible = draw.random(slides) < 0.8
    vectors = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    vectors[~eligible] = 0
    return vectors, eligible, 7 * case + 3


@pytest.mark.parametrize("transfer", prototypes.TRANSFER)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("k", "slides"), [(1, 12), (3, 70), (prototypes.EXACT, 18), (prototypes.EXACT + 1, 18)])
def test_neighbours_apart_by_case_are_those_of_other_cases(k, slides, n, transfer):
    vectors, eligible, case = kindred(k, slides, k)
    found = prototypes.neighbours(vectors, eligible, n, kin=case, transfer=transfer)
    score = by_hungarian(vectors)
    score[case[:, None] == case] = -np.inf
    score[~eligible], score[:, ~eligible] = -np.inf, -np.inf
    for one, rank in np.ndindex(slides, n):
        ranked = np.sort(score[one])[::-1]
        other, taken = found.slide[one, rank], found.transfer[one, rank]
        assert (other == -1) == np.isneginf(ranked[rank])
        if other < 0:
            assert (taken == -1).all()
            continue
        assert case[other] != case[one]
        assert found.score[one, rank] == pytest.approx(ranked[rank], abs=1e-5)
        assert score[one, other] == pytest.approx(ranked[rank], abs=1e-5)
        cosine = vectors[one].astype(np.float64) @ vectors[other].T
        if transfer == "argmax":
            np.testing.assert_allclose(np.take_along_axis(cosine, taken[:, None], 1)[:, 0], cosine.max(1), atol=1e-6)
        else:
            assert sorted(taken) == list(range(k))
            assert cosine[np.arange(k), taken].sum() == pytest.approx(ranked[rank], abs=1e-5)
    nearest = prototypes.neighbours(vectors, eligible, n).slide[:, 0]
    assert (case[nearest] == case)[eligible].mean() > 0.5  # or the option would do nothing


@pytest.mark.parametrize("k", [2, prototypes.EXACT + 1])
def test_a_slide_with_fewer_slides_of_other_cases_than_asked_for_has_fewer_neighbours(k):
    vectors, eligible = unit(1, 5, k), np.array([True, True, True, True, False])
    found = prototypes.neighbours(vectors, eligible, 3, kin=np.array([4, 4, 4, 9, 2]))
    assert found.slide[:3].tolist() == [[3, -1, -1]] * 3
    assert sorted(found.slide[3].tolist()) == [0, 1, 2]
    assert (found.slide[4] == -1).all()
    assert np.isneginf(found.score[found.slide < 0]).all()
    assert (found.transfer[found.slide < 0] == -1).all()
    alone = prototypes.neighbours(vectors, eligible, 3, kin=np.zeros(5, int))
    assert (alone.slide == -1).all()
    assert (alone.transfer == -1).all()
    assert np.isneginf(alone.score).all()


def test_matchings_of_eight_are_those_of_the_hungarian_method():
    cosine = np.random.default_rng(0).normal(size=(8, 5, 8, 7)).astype(np.float32)
    sums = jax.jit(prototypes.best_sums)(cosine)
    for i, j in itertools.product(range(5), range(7)):
        assert float(sums[i, j]) == pytest.approx(prototypes.best_matching(cosine[:, i, :, j])[0], abs=1e-5)


@pytest.mark.parametrize("kin", [None, np.arange(130) // 3, np.arange(130) < 129])  # the last: one neighbour, or many
def test_tiles_of_the_table_of_any_size_give_the_same(kin, monkeypatch):
    vectors, eligible = unit(3, 130, 4), np.ones(130, bool)
    whole = prototypes.neighbours(vectors, eligible, 2, kin=kin)
    monkeypatch.setattr(prototypes, "ROWS", 8)
    monkeypatch.setattr(prototypes, "COLUMNS", 64)
    prototypes._comparing.cache_clear()
    for one, other in zip(prototypes.neighbours(vectors, eligible, 2, kin=kin), whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert kin is None or (kin[whole.slide] != kin[:, None])[whole.slide >= 0].all()


def test_of_equal_slides_the_lower_number_is_the_neighbour():
    vectors = np.repeat(unit(4, 1, 2), 150, 0)
    found = prototypes.neighbours(vectors, np.ones(150, bool), 2)
    assert found.slide[:3].tolist() == [[1, 2], [0, 2], [0, 1]]
    assert (found.slide[3:] == [0, 1]).all()


def test_argmax_takes_the_most_alike_and_may_take_one_twice():
    vectors = np.array([[[1, 0], [0.8, 0.6]], [[1, 0], [0, 1]]], np.float32)
    eligible = np.ones(2, bool)
    matched = prototypes.neighbours(vectors, eligible)
    taken = prototypes.neighbours(vectors, eligible, transfer="argmax")
    assert matched.transfer.tolist() == [[[0, 1]], [[0, 1]]]
    assert taken.transfer.tolist() == [[[0, 0]], [[0, 1]]]


@pytest.mark.parametrize("known", [0, 1])
def test_a_slide_alone_has_no_neighbour(known):
    found = prototypes.neighbours(unit(0, 3, 2), np.arange(3) < known, 2)
    assert (found.slide == -1).all()
    assert (found.transfer == -1).all()


def near_of(slide):
    slide = np.array(slide, np.int32)[:, None]
    return prototypes.Neighbours(slide, np.where(slide < 0, -np.inf, 1.5).astype(np.float32), slide[..., None])


def test_sizes_and_likeness_in_numbers():
    sizes = np.array([[5, 5], [9, 1], [0, 0]], np.int32)
    assignment = np.array([0] * 20 + [-1] * 5)
    made = prototypes.Prototypes(np.zeros((3, 2, 4)), assignment, np.array([True, True, False]), sizes)
    told = prototypes.described(made, near_of([1, 0, -1]))
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1)) / np.log(2)
    assert told == pytest.approx(
        {"eligible_slides": 2, "eligible_regions": 0.8, "cluster_min": 1, "cluster_mean": 5, "cluster_max": 9,
         "cluster_evenness": (1 + entropy) / 2, "neighbour_cosine": 0.75, "without_neighbour": 0}
    )  # fmt: skip
    assert prototypes.described(made, near_of([1, -1, -1]))["without_neighbour"] == 1
    none = made._replace(eligible=np.zeros(3, bool))
    assert prototypes.described(none, near_of([-1, -1, -1]))["eligible_slides"] == 0


def test_churn_does_not_count_clusters_that_changed_their_number():
    slide = np.repeat([0, 1, 2], 6)
    before = np.array([0, 0, 0, 1, 1, 1] * 2 + [-1] * 6)
    after = np.array([1, 1, 1, 0, 0, 0] + [1, 1, 0, 0, 0, 0] + [0] * 6)
    told = prototypes.changes(before, after, slide, np.array([[1], [0], [-1]]), near_of([1, 2, 0]))
    assert told == pytest.approx({"assignment_churn": 1 / 12, "neighbour_churn": 0.5})
    assert prototypes.changes(before * 0 - 1, after, slide, np.full((3, 1), -1), near_of([1, 2, 0])) == {}


def test_purity_is_of_slides_whose_regions_have_one_label():
    slide, label = np.repeat(np.arange(5), 2), np.array([0, 0, 0, -1, 1, 1, 1, 1, 0, 1])
    case = np.array([7, 7, 7, 7, 8, 8, 9, 9, 9, 9])
    told = prototypes.kinds(near_of([1, 2, 3, 2, 0]), slide, {"label": label, "case": case})
    assert told["neighbour_purity"] == 3 / 4  # 0 -> 1, 2 -> 3, 3 -> 2, not 1 -> 2; slide 4 is of two kinds
    assert told["neighbour_purity_chance"] == pytest.approx(1 / 3)
    assert told["neighbour_same_case"] == 1 / 5
    assert not prototypes.kinds(near_of([1, 0]), np.array([0, 1]), {"label": np.zeros(2, int)})  # of one kind alone


DEVICES = """
import jax, numpy as np
from mfl_jax import prototypes, sharding
from tests.mfl_jax.test_prototypes import cohort, clustered
found = []
for count in (1, 8):
    mesh = sharding.make_mesh(devices=jax.devices()[:count])
    made = clustered(*cohort(counts=(14,) * 40)[:2], slides=40, mesh=mesh)
    for kin in (None, np.arange(40) // 3):
        made += tuple(prototypes.neighbours(made[0], made[2], 2, kin=kin, mesh=mesh))
    found.append(made)
for one, eight in zip(*found):
    assert one.tobytes() == eight.tobytes()
print("the same on", jax.device_count())
"""


def test_eight_devices_find_bit_by_bit_what_one_does():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    told = subprocess.run([sys.executable, "-c", DEVICES], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert told.stdout == "the same on 8\n", told.stderr[-3000:]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clustered(*cohort()[:2], least=2), "a slide of 2 regions cannot have 3 prototypes"),
        (lambda: clustered(*cohort()[:2], slides=4), "there are 4 slides, numbered from 0; a region is of slide 7"),
        (lambda: prototypes.neighbours(unit(0, 3, 2), np.ones(3, bool), 0), "at least 1 neighbour, not 0"),
        (lambda: prototypes.neighbours(unit(0, 3, 2), np.ones(3, bool), transfer="best"), "allowed: matched, argmax"),
    ],
)
def test_a_wrong_request_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
