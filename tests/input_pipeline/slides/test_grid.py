import numpy as np
import pytest

from input_pipeline.slides.grid import fraction_of, tile_grid


def oracle(mask, mask_mpp, x, y, side, mpp0):
    """Area of the tile that lies in the mask, pixel by pixel, as a share of the tile."""
    x0, y0, width = x * mpp0, y * mpp0, side * mpp0
    total = 0.0
    for row in range(mask.shape[0]):
        high = max(0.0, min(y0 + width, (row + 1) * mask_mpp) - max(y0, row * mask_mpp))
        for column in range(mask.shape[1]):
            if mask[row, column] and high:
                wide = max(0.0, min(x0 + width, (column + 1) * mask_mpp) - max(x0, column * mask_mpp))
                total += high * wide
    return total / width**2


@pytest.mark.parametrize(
    ("mask_mpp", "mpp0", "size", "mpp", "step"),
    [
        (4.0, 0.5, 64, 0.5, None),
        (4.0, 0.47, 64, 0.5, 50),
        (3.3, 0.26, 40, 1.0, 17),
        (7.9, 0.5, 10, 0.31, 300),
        (8, 1, 9, 2, 4),
    ],
)
def test_against_brute_force(mask_mpp, mpp0, size, mpp, step):
    width, height = 611, 397
    rng = np.random.default_rng(3)
    mask = rng.random((round(height * mpp0 / mask_mpp), round(width * mpp0 / mask_mpp))) < 0.6
    side, pitch = size * mpp / mpp0, (step or size) * mpp / mpp0
    expected = []
    y = 0
    while y * pitch + side <= height + 1e-6:
        x = 0
        while x * pitch + side <= width + 1e-6:
            corner = int(x * pitch + 1e-6), int(y * pitch + 1e-6)
            expected.append((*corner, oracle(mask, mask_mpp, *corner, side, mpp0)))
            x += 1
        y += 1
    expected = [row for row in expected if row[2] >= 0.55]
    coords, tissue = tile_grid(mask, mask_mpp, width, height, mpp0, size=size, mpp=mpp, step=step, min_tissue=0.55)
    assert len(expected) > 3
    assert len(coords) == len(expected)
    assert coords.dtype == np.int64
    assert tissue.dtype == np.float32
    assert coords.tolist() == [list(row[:2]) for row in expected]
    assert np.allclose(tissue, [row[2] for row in expected], atol=1e-5)


def test_the_last_tile_ends_exactly_at_the_edge():
    mask = np.ones((32, 32), bool)
    coords, tissue = tile_grid(mask, 4.0, 256, 256, 0.5, size=64, mpp=0.5)
    assert len(coords) == 16
    assert coords.max() == 192
    assert (tissue == 1).all()
    coords, _ = tile_grid(mask, 4.0, 255, 256, 0.5, size=64, mpp=0.5)
    assert len(coords) == 12
    assert coords[:, 0].max() == 128
    for length in (1000, 1111, 3000):
        for mpp0 in (0.2499, 0.25, 0.2201, 0.503):
            coords, _ = tile_grid(mask, 100.0, length, length, mpp0, size=64, mpp=0.5, min_tissue=0)
            side = 64 * 0.5 / mpp0
            assert coords.max() + side <= length + 1e-3
            assert coords.max() + 2 * side > length - 1


def test_no_error_builds_up_over_a_wide_slide():
    mask = np.ones((20, 2000), bool)
    coords, _ = tile_grid(mask, 16.0, 123_000, 1_000, 0.26, size=224, mpp=0.5, min_tissue=0)
    first_row = coords[coords[:, 1] == 0, 0]
    assert np.abs(first_row - np.arange(len(first_row)) * 224 * 0.5 / 0.26).max() <= 1


def test_no_tiles():
    for mask, size in ((np.zeros((32, 32), bool), 64), (np.ones((32, 32), bool), 300)):
        coords, tissue = tile_grid(mask, 4.0, 256, 256, 0.5, size=size, mpp=0.5)
        assert coords.shape == (0, 2)
        assert tissue.shape == (0,)
        assert coords.dtype == np.int64
        assert tissue.dtype == np.float32


def test_beyond_the_map_is_not_covered():
    area = np.ones((10, 10), bool)
    coords = np.array([[0, 0], [32, 0], [36, 36], [40, 0], [-4, 0], [10**9, 0]])
    assert fraction_of(area, 4.0, coords, 1.0, size=8, mpp=1.0).tolist() == [1, 1, 0.25, 0, 0.5, 0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": 0}, "size"),
        ({"size": 2.5}, "whole"),
        ({"step": -1}, "step"),
        ({"mpp": float("nan")}, "mpp"),
        ({"min_tissue": 1.5}, "0 to 1"),
    ],
)
def test_arguments_are_checked(change, said):
    arguments = {"size": 64, "mpp": 0.5} | change
    with pytest.raises(ValueError, match=said):
        tile_grid(np.ones((32, 32), bool), 4.0, 256, 256, 0.5, **arguments)


def test_maps_are_bool():
    with pytest.raises(ValueError, match="bool"):
        fraction_of(np.ones((3, 3)), 4.0, np.zeros((1, 2)), 0.5, size=2, mpp=0.5)
    with pytest.raises(ValueError, match="1x1"):
        tile_grid(np.ones((32, 32), bool), 4.0, 0, 256, 0.5, size=64, mpp=0.5)
