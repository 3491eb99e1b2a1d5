import io

import numpy as np
import pytest
from PIL import Image

from mfl_jax.report import pictures


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)


@pytest.mark.parametrize("limit", [200_000, 60_000, 8_000, 2_000])
def test_jpeg_keeps_its_limit_and_shape(noise, limit):
    data = pictures.jpeg(noise, limit)
    assert len(data) <= limit
    width, height = pictures.size(data)
    assert width / height == pytest.approx(4 / 3, rel=0.1)


def test_a_file_that_fits_is_kept_and_a_larger_one_made_smaller(noise):
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    png = buffer.getvalue()
    assert pictures.jpeg(png, len(png)) is png
    assert len(pictures.jpeg(png, 50_000)) <= 50_000


@pytest.mark.parametrize("bad", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8)])
def test_other_arrays_are_refused(bad):
    with pytest.raises(ValueError, match=r"it should be uint8 \[height, width, 3\]"):
        pictures.jpeg(bad)


def test_room_is_shared_and_what_small_ones_leave_goes_to_large_ones():
    sizes = [100_000, 4_000_000, 900_000]
    room = pictures.room([bytes(size) for size in sizes], 3_000_000)
    assert room == 2_000_000
    assert sum(min(size, room) for size in sizes) <= 3_000_000
    assert pictures.room([bytes(10)], 3_000_000) == 3_000_000
    assert pictures.room([], 3_000_000) == 3_000_000


def test_sheet_puts_pictures_in_their_cells():
    red, blue = np.full((32, 32, 3), (200, 0, 0), np.uint8), np.full((8, 8, 3), (0, 0, 200), np.uint8)
    made = pictures.sheet([[red, blue], [None, red]], side=32)
    gap = pictures.GAP
    assert made.shape == (gap + 2 * (32 + gap), gap + 2 * (32 + gap), 3)
    at = [gap + 31, gap + 31 + 32 + gap]  # the last pixel of each: no letter reaches it
    cell = [[made[y, x].tolist() for x in at] for y in at]
    assert cell == [[[200, 0, 0], [0, 0, 200]], [list(pictures.NOTHING), [200, 0, 0]]]


def test_overlay_is_lightest_where_the_heat_is_and_outlines_the_truth():
    he = np.full((64, 64, 3), 120, np.uint8)
    heat = np.zeros((8, 8))
    heat[2, 2] = 1.0
    made = pictures.overlay(he, heat).astype(int)
    assert np.unravel_index(made.sum(-1).argmax(), (64, 64)) == (pytest.approx(19.5, abs=4), pytest.approx(19.5, abs=4))
    truth = np.zeros((64, 64), bool)
    truth[20:50, 20:50] = True
    marked = pictures.overlay(he, heat, truth)
    assert (marked[20, 20:50] == 255).all()
    assert (marked[21, 30] == 0).all()
    assert (marked[~truth] == pictures.overlay(he, heat)[~truth]).all()
    assert (marked[35, 35] == pictures.overlay(he, heat)[35, 35]).all()


def test_a_flat_map_is_no_fault():
    he = np.full((16, 16, 3), 120, np.uint8)
    flat = pictures.overlay(he, np.full((4, 4), 3.0), np.zeros((4, 4), bool))
    assert (flat == flat[0, 0]).all()


def test_saliency_sheet_has_a_column_an_arm():
    he = np.full((3, 16, 16, 3), 120, np.uint8)
    heats = {"a": np.random.default_rng(0).random((3, 4, 4)), "b": np.zeros((3, 4, 4))}
    one = pictures.sheet([[he[0]]], columns=["x"], side=32)
    made = pictures.saliency_sheet(he, heats, np.ones((3, 16, 16), bool), side=32)
    assert made.shape[1] - one.shape[1] == 2 * (32 + pictures.GAP)
    assert made.shape[0] - one.shape[0] == 2 * (32 + pictures.GAP)


def test_neighbours_of_another_label_have_a_broken_frame():
    tile = np.full((16, 16, 3), 120, np.uint8)
    made = pictures.neighbours_sheet([tile], [[tile, tile]], ["p"], [["p", "q"]], side=64)
    left = pictures.GAP + np.arange(3) * (64 + pictures.GAP)
    top = pictures.GAP + pictures.TITLE
    edges = [made[top - 2, x : x + 64].tolist() for x in left]
    assert all(colour == list(pictures.PAPER) for colour in edges[0])
    assert all(colour == list(pictures.SAME) for colour in edges[1])
    assert {tuple(colour) for colour in edges[2]} == {pictures.PAPER, pictures.OTHER}


def test_long_titles_stay_in_their_column():
    tile = np.full((16, 16, 3), 120, np.uint8)
    made = pictures.sheet([[tile, tile]], columns=["W" * 80, ""], side=64)
    assert (made[: pictures.TITLE, pictures.GAP + 64 :] == 255).all()
