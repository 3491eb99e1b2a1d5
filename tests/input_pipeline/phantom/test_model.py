"""What is drawn, before any pixel: regions, cells, labels, counts."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import cKDTree

from input_pipeline.phantom import cells as cl
from input_pipeline.phantom import draw_slide
from input_pipeline.phantom import layout as lay
from input_pipeline.phantom.cohort import plan
from input_pipeline.phantom.counts import GENES, draw_counts


def shares(region: np.ndarray) -> np.ndarray:
    return np.bincount(region.ravel(), minlength=len(lay.REGIONS)) / (region != lay.BACKGROUND).sum()


@pytest.fixture(scope="module")
def large():
    return draw_slide(3, 0, 0, size=4096, subtype=0, lesion=True)


def test_all_regions_and_types_are_there(large):
    assert set(np.unique(large.layout.region)) == set(range(len(lay.REGIONS)))
    assert set(np.unique(large.cells.type)) == set(range(len(cl.TYPES)))
    assert 8_000 < len(large.cells) < 60_000


def test_regions_are_a_smooth_mosaic(large):
    region = large.layout.region
    shift = int(32 / lay.GRID)
    same = (region[:, shift:] == region[:, :-shift]).mean()
    assert same > 0.75
    far = (region[:, len(region) // 2 :] == region[:, : len(region) // 2]).mean()
    assert far < same - 0.2


def test_cells_do_not_sit_on_one_another_nor_on_glass(large):
    c = large.cells
    on = lay.sample_nearest(large.layout.region, c.points)
    assert not np.isin(on, (lay.BACKGROUND, lay.LUMEN)).any()
    distance = cKDTree(c.points).query(c.points, k=2)[0][:, 1]
    assert distance.min() > 2.0
    assert (c.a >= c.b * 0.99).mean() > 0.97


def test_lesion_is_rare_and_only_where_it_is_told():
    for case in range(4):
        ill, well = (draw_slide(5, case, 0, size=4096, lesion=on, tissue="normal") for on in (True, False))
        share = shares(ill.layout.region)[lay.LESION]
        assert 0.001 < share < 0.006
        assert not (well.layout.region == lay.LESION).any()
        assert not (well.cells.type == cl.LESION).any()
        _, count = ndimage.label(ill.layout.region == lay.LESION)
        assert count <= 3
        assert not (ill.layout.region == lay.TUMOUR).any()


def test_subtype_is_in_the_arrangement_not_in_the_areas():
    nearness, areas = np.zeros((10, 2)), np.zeros((10, 2, len(lay.REGIONS)))
    for case in range(10):
        for subtype in (0, 1):
            region = draw_slide(7, case, 0, size=2048, subtype=subtype).layout.region
            away = ndimage.distance_transform_edt(region != lay.TUMOUR) * lay.GRID
            nearness[case, subtype] = np.median(away[region == lay.IMMUNE])
            areas[case, subtype] = shares(region)
    assert (nearness[:, 0] + 10 < nearness[:, 1]).all()
    gap = np.abs(areas[:, 0] - areas[:, 1]).mean(0)
    between_cases = areas[:, 0].std(0)
    assert (gap[[lay.TUMOUR, lay.IMMUNE, lay.FAT]] < 0.02).all()
    assert between_cases[lay.TUMOUR] > 2 * gap[lay.TUMOUR]


def test_marker_is_smooth_balanced_and_independent(large):
    c = large.cells
    for kind in range(len(cl.TYPES)):
        of = c.type == kind
        assert abs(c.positive[of].mean() - 0.5) < 3 / np.sqrt(of.sum())
    near = cKDTree(c.points).query(c.points, k=6)[1][:, 1:]
    agree = np.corrcoef(c.positive, c.positive[near].mean(1))[0, 1]
    assert agree > 0.6
    per_cell = [np.corrcoef(c.positive, value)[0, 1] for value in (c.dark, c.a * c.b)]
    assert np.abs(per_cell).max() < 0.05
    density = lay.sample_nearest(large.layout.density, c.points)
    assert abs(np.corrcoef(c.positive, density)[0, 1]) < 0.2  # both are smooth: few neighbourhoods are independent


def test_counts_follow_types_and_marker_and_are_over_dispersed(large):
    centres, counts = draw_counts(large)
    inside = cKDTree(large.cells.points).query_ball_point(centres, 27.5)
    c = large.cells
    tumour = np.array([(c.type[i] == cl.TUMOUR).sum() for i in inside])
    positive = np.array([c.positive[i].sum() for i in inside])
    names = list(GENES)
    log = np.log1p(counts)
    assert np.corrcoef(log[:, names.index("TUMOUR_1")], np.log1p(tumour))[0, 1] > 0.8
    assert np.corrcoef(log[:, names.index("MARKER_1")], np.log1p(positive))[0, 1] > 0.7
    full = counts[(tumour > np.quantile(tumour, 0.8))][:, names.index("TUMOUR_1")]
    assert full.var() > 2 * full.mean()


def test_labels_are_balanced_over_cases_and_crossed():
    jobs = plan(40, 1, size=512, mpp=0.5, tissue="mixed", partners=(), he_format="svs")
    cases = {j.case_id: (j.subtype, any(k.lesion for k in jobs if k.case_id == j.case_id)) for j in jobs}
    pairs = list(cases.values())
    assert len(pairs) == 40
    assert [pairs.count(p) for p in ((0, False), (0, True), (1, False), (1, True))] == [10] * 4
    per_case = [sum(j.case_id == c for j in jobs) for c in cases]
    assert set(per_case) == {1, 2, 3}
    assert len({j.subtype for j in jobs if j.case_id == "case0000"}) == 1


def test_cases_past_those_that_are_paired_are_the_same_without_partners():
    common = {"size": 512, "mpp": 0.5, "tissue": "mixed", "partners": ("if",), "he_format": "svs"}
    every, some = plan(6, 1, **common), plan(6, 1, paired=2, **common)
    assert [j.partners for j in some] == [("if",) if j.case < 2 else () for j in some]
    assert [replace(j, partners=()) for j in some] == [replace(j, partners=()) for j in every]


def test_the_same_key_gives_the_same_slide_and_another_another():
    one, again, other = (draw_slide(*key, size=512) for key in ((1, 2, 0), (1, 2, 0), (1, 2, 1)))
    assert np.array_equal(one.cells.points, again.cells.points)
    assert np.array_equal(one.layout.region, again.layout.region)
    assert one.look.fibre_angle == again.look.fibre_angle != other.look.fibre_angle
    assert not np.array_equal(one.layout.region, other.layout.region)
