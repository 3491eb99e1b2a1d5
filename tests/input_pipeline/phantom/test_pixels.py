"""Pixels agree with the truth, and colour does not give the marker away."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from input_pipeline.phantom import draw_partner, draw_slide, paint, paint_nuclei
from input_pipeline.phantom import layout as lay
from input_pipeline.phantom.render import IF_CHANNELS
from tests.input_pipeline.phantom.measures import as_file, auc, case_wise_auc, colour, cut, tile_cells


@pytest.fixture(scope="module")
def slide():
    return draw_slide(11, 0, 0, size=1024, artefact_chance=0)


def at(image: np.ndarray, points_um: np.ndarray, mpp: float) -> np.ndarray:
    """Values of [h, w] at points."""
    index = np.floor(points_um / mpp).astype(int)
    height, width = image.shape
    assert (index >= 0).all()
    assert (index < (width, height)).all()
    return image[index[:, 1], index[:, 0]].astype(float)


def ring(slide, reach: float) -> np.ndarray:
    """[8, cells, 2]: um round every nucleus, at `reach` times its half axes."""
    c = slide.cells
    turn = np.arange(8)[:, None] * np.pi / 4
    u, v = reach * c.a * np.cos(turn), reach * c.b * np.sin(turn)
    cos, sin = np.cos(c.angle), np.sin(c.angle)
    return np.stack([c.x + u * cos - v * sin, c.y + u * sin + v * cos], -1)


def test_fluorescence_lies_where_the_transform_says(slide):
    canvas, _ = draw_partner(slide, "if")
    image = paint(slide, "if").astype(float)
    dapi, marker = image[IF_CHANNELS.index("DAPI")], image[IF_CHANNELS.index("MARKER")]
    centres = canvas.transform(slide.cells.points)
    nuclei = at(dapi, centres, canvas.mpp)
    random = np.random.default_rng(0).uniform(0, (canvas.width, canvas.height), (5000, 2)) * canvas.mpp
    assert (
        auc(np.arange(len(nuclei) + 5000) < len(nuclei), np.concatenate([nuclei, at(dapi, random, canvas.mpp)])) > 0.93
    )
    glow = at(marker, canvas.transform(ring(slide, 1.2).reshape(-1, 2)), canvas.mpp).reshape(8, -1).mean(0)
    assert auc(slide.cells.positive, glow) > 0.97
    wrong = at(dapi, np.clip(centres + 8.0, 0, np.array([canvas.width, canvas.height]) * canvas.mpp - 1), canvas.mpp)
    assert np.median(nuclei) > 2 * np.median(wrong)


def test_brown_lies_round_positive_cells(slide):
    canvas, _ = draw_partner(slide, "ihc")
    image = paint(slide, "ihc").astype(float)
    brown = image[..., 0] - image[..., 2]
    points = canvas.transform(ring(slide, 1.12).reshape(-1, 2))
    assert auc(slide.cells.positive, at(brown, points, canvas.mpp).reshape(8, -1).mean(0)) > 0.97


def test_partners_turn_shift_scale_and_bend():
    turns, bends = [], []
    for case in range(12):
        slide = draw_slide(2, case, 0, size=2048)
        canvas, _ = draw_partner(slide, "if")
        t = canvas.transform
        turns.append(np.arctan2(t.matrix[1, 0], t.matrix[0, 0]))
        scale = np.sqrt(np.linalg.det(t.matrix[:, :2]))
        assert 0.96 < scale < 1.04
        assert canvas.mpp != slide.mpp
        inside = lay.node_points(len(slide.layout.region))[slide.layout.region != lay.BACKGROUND]
        moved = t(inside)
        assert (moved > 0).all()
        assert (moved < np.array([canvas.width, canvas.height]) * canvas.mpp).all()
        bends.append(np.linalg.norm(t.displacement(inside), axis=1).max())
        assert np.abs(t.inverse(moved[::50]) - inside[::50]).max() < 0.01
    assert np.ptp(turns) > 3
    assert 3 < max(bends) <= 15.1


def test_the_map_of_nuclei_names_every_cell(slide):
    instance, kind = paint_nuclei(slide)
    c = slide.cells
    found = at(instance, c.points, slide.mpp)
    assert (found == np.arange(len(c)) + 1).mean() > 0.97
    assert (at(kind, c.points, slide.mpp) == c.type + 1).mean() > 0.97
    area = np.bincount(instance.ravel(), minlength=len(c) + 1)[1:] * slide.mpp**2
    assert abs(np.median(area / (np.pi * c.a * c.b)) - 1) < 0.08


def test_haematoxylin_lies_on_nuclei_and_glass_is_white(slide):
    he = paint(slide).astype(float)
    inside = paint_nuclei(slide)[0] > 0
    glass = np.repeat(np.repeat(slide.layout.region == lay.BACKGROUND, 8, 0), 8, 1)
    glass = ndimage.binary_erosion(glass, iterations=12) & ~inside
    assert he[glass].mean() > 225
    assert he[inside, 0].mean() < he[~inside & ~glass, 0].mean() - 50


def test_blocks_join_without_a_seam(slide):
    """A block drawn apart is the same, sensor noise aside, as that part of a larger one."""
    from input_pipeline.phantom.slide import painter

    still = replace(slide, look=replace(slide.look, noise=0.0))
    draw = painter(still, "he", still.canvas, still.look)
    whole = draw((0, 0, 1024, 1024)).astype(int)
    part = draw((512, 256, 1024, 768)).astype(int)
    assert np.abs(whole[256:768, 512:] - part).max() <= 3


@pytest.mark.parametrize("compressed", [False, True])
def test_chromatin_does_not_move_any_statistic_of_colour(compressed):
    """The same tissue with every cell negative, then positive: no mean, deviation or quantile tells them apart."""
    before, after = [], []
    for case in range(3):
        slide = draw_slide(31, case, 0, size=512, subtype=case % 2)
        enough = tile_cells(slide)[0] >= 3
        for state, into in ((False, before), (True, after)):
            cells = replace(slide.cells, positive=np.full(len(slide.cells), state))
            image = paint(replace(slide, cells=cells))
            into.append(colour(cut(as_file(image) if compressed else image))[enough])
    a, b = np.concatenate(before), np.concatenate(after)
    assert (np.abs(b.mean(0) - a.mean(0)) / a.std(0)).max() < 0.05


def test_chromatin_tells_positive_neighbourhoods():
    """A detector made by hand, knowing where nuclei are: the share of fine detail in the texture of a tile's nuclei."""
    truth, score = [], []
    for case in range(4):
        slide = draw_slide(41, case, 0, size=512, artefact_chance=0)
        grey = as_file(paint(slide)).astype(float).mean(-1)
        inside = ndimage.binary_erosion(paint_nuclei(slide)[0] > 0, iterations=2)
        fine = (grey - ndimage.gaussian_filter(grey, 1.2)) ** 2 * inside
        coarse = (ndimage.gaussian_filter(grey, 1.2) - ndimage.gaussian_filter(grey, 3.0)) ** 2 * inside
        energy = [e.reshape(8, 64, 8, 64).sum((1, 3)).ravel() for e in (fine, coarse)]
        cells, positive = tile_cells(slide)
        use = (cells >= 4) & (np.abs(positive / np.maximum(cells, 1) - 0.5) > 0.2)
        ratio = np.log((energy[1] + 1) / (energy[0] + 1))[use]
        score.append(ratio - np.median(ratio))
        truth.append((positive / np.maximum(cells, 1))[use] > 0.5)
    assert auc(np.concatenate(truth), np.concatenate(score)) > 0.85


@pytest.mark.slow
def test_colour_statistics_do_not_tell_marker_subtype_or_lesion():
    rows, truth, case, labels = [], [], [], []
    for i in range(120):
        subtype, lesion = i % 2, i // 2 % 2
        slide = draw_slide(51, i, 0, size=1024, subtype=subtype, lesion=bool(lesion))
        cells, positive = tile_cells(slide)
        use = (cells >= 3) & (positive * 2 != cells)
        rows.append(colour(cut(as_file(paint(slide)))[use]))
        truth.append((positive / np.maximum(cells, 1))[use] > 0.5)
        case.append(np.full(use.sum(), i))
        labels.append(np.tile((subtype, lesion), (use.sum(), 1)))
    features, case = np.concatenate(rows), np.concatenate(case)
    subtype, lesion = np.concatenate(labels).T.astype(bool)
    assert abs(case_wise_auc(features, np.concatenate(truth), case) - 0.5) <= 0.05
    assert abs(case_wise_auc(features, subtype, case) - 0.5) <= 0.05
    assert case_wise_auc(features, lesion, case) < 0.65
