import numpy as np
import pytest
import tifffile
from scipy import ndimage

from input_pipeline.slides.reader import Slide, open_slide
from input_pipeline.slides.transform import Displacement, Transform
from input_pipeline.slides.warp import sample_partner


@pytest.fixture
def slide_of(tmp_path):
    made: list[Slide] = []

    def make(pixels, mpp=0.5):
        path = tmp_path / f"{len(made)}.tif"
        rgb = pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        planes = pixels if rgb or pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
        axes = "YXS" if rgb else "YX" if pixels.ndim == 2 else "CYX"
        tifffile.imwrite(
            path,
            planes,
            photometric="rgb" if rgb else "minisblack",
            tile=(128, 128),
            metadata={"axes": axes},
            ome=not rgb,
        )
        made.append(open_slide(path, mpp=mpp))
        return made[-1]

    yield make
    for slide in made:
        slide.close()


def smooth(rng, shape, sigma=4):
    image = ndimage.gaussian_filter(rng.normal(size=shape), (sigma, sigma, 0))
    return (image - image.min()) / np.ptp(image)


def test_identity_copies_pixels(slide_of):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    tile, inside = sample_partner(slide_of(pixels), Transform.identity(), (20.0, 35.0), 128, 0.5)
    np.testing.assert_array_equal(tile, pixels[70:198, 40:168])
    assert inside.all()


@pytest.mark.parametrize("mirror", [False, True])
def test_quarter_turn_and_mirror_move_whole_pixels(slide_of, mirror):
    pixels = np.random.default_rng(1).integers(0, 256, (200, 300, 3), np.uint8)
    expected = np.rot90(pixels[:, ::-1] if mirror else pixels)  # [300, 200]: out[i, j] = in[j, 299 - i], or in[j, i]
    matrix = np.array([[0, 1, 0], [1, 0, 0]]) if mirror else np.array([[0, -1, 150], [1, 0, 0]])
    tile, inside = sample_partner(slide_of(pixels), Transform(matrix), (0.0, 0.0), (200, 300), 0.5)
    np.testing.assert_array_equal(tile, expected)
    assert inside.all()


def test_displacement_and_scale_match_an_interpolation_pixel_by_pixel(slide_of):
    rng = np.random.default_rng(2)
    image = (smooth(rng, (500, 500, 3), 8) * 255).astype(np.uint8)
    field = Displacement((-100, -100), (100, 100), rng.uniform(-3, 3, (6, 6, 2)))
    transform = Transform(np.array([[0.9, -0.3, 45.0], [0.3, 0.9, -10.0]]), field)
    tile, inside = sample_partner(slide_of(image), transform, (60.0, 50.0), 160, 0.55)
    y, x = np.mgrid[:160, :160] + 0.5
    at = transform(np.stack([x, y], -1) * 0.55 + (60.0, 50.0)) / 0.5 - 0.5
    expected = [
        ndimage.map_coordinates(image[..., c].astype(float), [at[..., 1], at[..., 0]], order=1) for c in range(3)
    ]
    assert inside.all()
    assert np.abs(tile - np.stack(expected, -1)).max() <= 1.5


def test_sixteen_bits_and_chosen_channels_survive(slide_of):
    rng = np.random.default_rng(3)
    image = (smooth(rng, (300, 300, 4)) * 65000).astype(np.uint16)
    slide = slide_of(image)
    tile, _ = sample_partner(slide, Transform.identity(), (10.0, 10.0), 100, 0.5)
    np.testing.assert_array_equal(tile, image[20:120, 20:120])
    part, _ = sample_partner(slide, Transform.identity(), (10.0, 10.0), 100, 0.5, channels=[2])
    np.testing.assert_array_equal(part, image[20:120, 20:120, 2:3])


def test_nearest_makes_no_new_labels(slide_of):
    labels = np.repeat(np.repeat(np.array([[3, 40000], [7, 900]], np.uint16), 100, 0), 100, 1)
    turn = np.deg2rad(30)
    matrix = np.array([[np.cos(turn), -np.sin(turn), 30], [np.sin(turn), np.cos(turn), 5]])
    tile, inside = sample_partner(slide_of(labels), Transform(matrix), (0.0, 0.0), 120, 0.5, "nearest")
    assert set(np.unique(tile[inside])) <= {3, 7, 900, 40000}
    assert len(np.unique(tile)) > 2


def test_a_finer_partner_is_averaged_before_it_is_sampled(slide_of):
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 200
    tile, _ = sample_partner(slide_of(stripes, 0.25), Transform.identity(), (8.0, 8.0), 64, 1.0)
    assert np.abs(tile.astype(int) - 100).max() <= 2


def test_outside_is_white_or_0_and_says_so(slide_of):
    rng = np.random.default_rng(4)
    slide = slide_of(rng.integers(0, 200, (200, 200, 3), np.uint8))
    tile, inside = sample_partner(slide, Transform.identity(), (-25.0, 0.0), 100, 0.5)
    assert inside.mean() == 0.5
    assert not inside[:, :50].any()
    assert (tile[:, :49] == 255).all()
    far, nowhere = sample_partner(slide, Transform.identity(), (1e6, 0.0), 100, 0.5)
    assert (far == 255).all()
    assert not nowhere.any()
    dark, _ = sample_partner(slide_of(np.full((200, 200, 2), 9, np.uint16)), Transform.identity(), (1e6, 0.0), 10, 0.5)
    assert dark.shape == (10, 10, 2)
    assert not dark.any()


def test_unknown_order_and_unknown_scale_are_refused(slide_of):
    slide = slide_of(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="'linear' or 'nearest'"):
        sample_partner(slide, Transform.identity(), (0, 0), 8, 0.5, "cubic")
