"""Geometric ops against scipy, scikit-image and numpy, given what was drawn; and what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats
from skimage import transform

from mfl_jax.views import geometry as vg
from mfl_jax.views import parse

KEY = jax.random.key(3)
bilinear = jax.jit(vg.sample_bilinear, static_argnums=2)
nearest = jax.jit(vg.sample_nearest, static_argnums=2)


def picture(height=32, width=32, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def draws(spec, count=4000, shape=(64, 64), kind="image"):
    view = parse(spec, size=8, kind=kind)
    (call,) = view.geometry
    op = vg.GEOMETRY[call.name]
    keys = jax.random.split(KEY, count)
    draw = jax.jit(jax.vmap(lambda k: op.draw(vg.sources(k, 1)[0], call.args, shape)))
    return {k: np.asarray(v) for k, v in draw(keys).items()}


def reference(image, matrix, size):
    """Double precision, order 1, mirrored: the same affine map through scipy."""
    height, width = image.shape[:2]
    frame = (np.arange(size) + 0.5) / size - 0.5
    columns, rows = np.meshgrid(frame, frame)
    points = np.einsum("ij,jyx->iyx", np.asarray(matrix, np.float64)[:2], np.stack([columns, rows, np.ones_like(rows)]))
    at = [(points[1] + 0.5) * height - 0.5, (points[0] + 0.5) * width - 0.5]
    planes = [
        ndimage.map_coordinates(image[..., c].astype(float), at, order=1, mode="reflect") for c in range(image.shape[2])
    ]
    return np.stack(planes, -1)


@pytest.mark.parametrize("shape", [(32, 32), (33, 41)])
def test_all_geometric_ops_together_are_one_bilinear_read_at_the_product_of_their_maps(shape):
    view = parse("rotate(30)|crop(.3,1)|flip|rot90|rotate(180)", size=29)
    image = picture(*shape)
    assert vg.block_levels(shape, 29) == 0
    compute = jax.jit(lambda key: (view.matrix(key, shape), vg.sample_bilinear(image, view.matrix(key, shape), 29)))
    for key in jax.random.split(KEY, 8):
        matrix, got = compute(key)
        np.testing.assert_allclose(got, reference(image, matrix, 29), atol=0.02)


def test_a_matrix_is_the_product_in_the_order_written_first_op_on_the_stored_image():
    view = parse("crop(.3,1)|rotate(180)", size=8)
    crop, rotate = view.geometry

    @jax.jit
    def steps(key):
        ops, calls = (vg.GEOMETRY["crop"], vg.GEOMETRY["rotate"]), (crop, rotate)
        return [
            op.apply(op.draw(source, call.args, (8, 8)), None, call.args)
            for op, call, source in zip(ops, calls, vg.sources(key, 2), strict=True)
        ]

    first, second = steps(KEY)
    expected = np.asarray(first, np.float64) @ np.asarray(second, np.float64)
    np.testing.assert_allclose(view.matrix(KEY, (8, 8)), expected, atol=1e-6)
    assert not np.allclose(expected, np.asarray(second) @ np.asarray(first), atol=1e-3)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("across", [False, True])
def test_flips_and_right_angles_are_exact_copies(turns, across):
    image = picture(31, 31)
    flip = vg.flip_matrix({"horizontal": jnp.array(across), "vertical": jnp.array(False)}, None, {})
    matrix = flip @ vg.rot90_matrix({"turns": jnp.array(turns)}, None, {})
    expected = np.rot90(image[:, ::-1] if across else image, turns)
    np.testing.assert_array_equal(bilinear(image, matrix, 31), expected)
    np.testing.assert_array_equal(nearest(image, matrix, 31), expected)


@pytest.mark.parametrize("degrees", [-20.0, 7.0, 135.0])
def test_rotation_is_that_of_scikit_image(degrees):
    image = picture(33, 33)
    matrix = vg.rotate_matrix({"degrees": jnp.array(degrees)}, None, {})
    expected = transform.rotate(image.astype(float), degrees, order=1, mode="symmetric", preserve_range=True)
    np.testing.assert_allclose(bilinear(image, matrix, 33), expected, atol=0.02)


def test_a_crop_at_whole_pixels_is_an_exact_copy():
    image = picture(64, 64)
    params = {"height": 16 / 64, "width": 16 / 64, "top": 8 / 64, "left": 24 / 64}
    got = bilinear(image, vg.crop_matrix(params, None, {}), 16)
    np.testing.assert_allclose(got, image[8:24, 24:40], atol=1e-4)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_strong_reduction_is_the_mean_over_blocks(factor):
    image = picture(64, 64)
    expected = image.reshape(64 // factor, factor, 64 // factor, factor, 3).mean((1, 3))
    np.testing.assert_allclose(bilinear(image, jnp.eye(3), 64 // factor), expected, atol=1e-3)


def test_a_reduced_checkerboard_is_grey_and_not_an_alias():
    board = np.indices((96, 96)).sum(0)[..., None] % 2 * np.full((1, 1, 3), 255, np.uint8)
    reduced = np.asarray(bilinear(board.astype(np.uint8), jnp.eye(3), 32))
    assert np.abs(reduced[1:-1, 1:-1] - 127.5).max() < 1


def test_rotated_corners_are_mirrored_tissue_and_never_black():
    view = parse("rotate(180)", size=32)
    white = np.full((8, 32, 32, 3), 255, np.uint8)
    np.testing.assert_allclose(jax.jit(view)(KEY, white), 1.0, atol=1e-6)


@pytest.mark.parametrize("spec", ["crop(.05,1)|flip|rot90", "centre(.7)", "sides(.3,1)|flip"])
@pytest.mark.parametrize(("source", "size"), [((40, 40), 24), ((40, 40), 56), ((41, 67), 9)])
def test_two_matrix_products_equal_the_gather(spec, source, size):
    view, image = parse(spec, size=size), picture(*source)

    @jax.jit
    def both(key):
        matrix = view.matrix(key, source)
        return vg.sample_separable(image, matrix, size), vg.sample_bilinear(image, matrix, size)

    for key in jax.random.split(KEY, 5):
        separable, gathered = both(key)
        np.testing.assert_allclose(separable, gathered, atol=0.02)


def test_nearest_gives_no_value_that_was_not_there_and_agrees_with_scipy():
    labels = np.random.default_rng(0).choice([0, 7, 500, 65535], (37, 37, 1)).astype(np.uint16)
    view = parse("crop(.3,1)|rotate(180)|onehot(2)", size=41, kind="map", channels=1)
    matrix = np.asarray(jax.jit(lambda key: view.matrix(key, (37, 37)))(KEY))
    got = np.asarray(nearest(labels, matrix, 41))
    assert got.dtype == np.uint16
    assert set(np.unique(got)) <= {0, 7, 500, 65535}
    frame = (np.arange(41) + 0.5) / 41 - 0.5
    x, y = np.meshgrid(frame, frame)
    at = [((matrix[i, 0] * x + matrix[i, 1] * y + matrix[i, 2]) + 0.5) * 37 - 0.5 for i in (1, 0)]
    expected = ndimage.map_coordinates(labels[..., 0], at, order=0, mode="reflect")
    assert np.mean(got[..., 0] != expected) < 0.002  # a coordinate half way between two pixels may go either way


def uniformly(values, low, high):
    return stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3


def test_crop_draws_uniform_areas_places_and_admissible_aspects():
    drawn = draws("crop(.3,.9)")
    area = drawn["height"] * drawn["width"]
    assert uniformly(area, 0.3, 0.9)
    assert max(drawn["height"].max(), drawn["width"].max()) <= 1
    assert (drawn["top"] + drawn["height"]).max() <= 1 + 1e-6
    aspect = np.log(drawn["width"] / drawn["height"])
    limit = np.minimum(np.log(4 / 3), -np.log(area))
    assert uniformly(aspect / limit, -1, 1)
    free = drawn["height"] < 1 - 1e-3
    assert uniformly((drawn["top"] / (1 - drawn["height"]))[free], 0, 1)
    assert uniformly((drawn["left"] / (1 - drawn["width"]))[drawn["width"] < 1 - 1e-3], 0, 1)


def test_the_aspect_of_a_crop_is_in_pixels_also_when_the_image_is_not_square():
    drawn = draws("crop(.2,.3,aspect=1)", shape=(40, 80))
    np.testing.assert_allclose(drawn["width"] * 80, drawn["height"] * 40, rtol=1e-5)
    drawn = draws("crop(.9,1)", shape=(10, 100))
    assert max(drawn["height"].max(), drawn["width"].max()) <= 1
    assert min((drawn["height"] * drawn["width"]).min(), 0.9) >= 0.9 - 1e-5


def test_sides_flips_turns_and_angles_are_drawn_as_promised():
    drawn = draws("sides(.75,1)")
    assert uniformly(drawn["height"], 0.75, 1)
    assert uniformly(drawn["width"], 0.75, 1)
    assert abs(np.corrcoef(drawn["height"], drawn["width"])[0, 1]) < 0.06
    drawn = draws("flip(.3)")
    assert abs(drawn["horizontal"].mean() - 0.3) < 0.03
    assert abs(drawn["vertical"].mean() - 0.3) < 0.03
    assert abs((drawn["vertical"] & drawn["horizontal"]).mean() - 0.09) < 0.02
    assert not draws("hflip(1)")["vertical"].any()
    assert not draws("vflip(1)")["horizontal"].any()
    assert stats.chisquare(np.bincount(draws("rot90")["turns"], minlength=4)).pvalue > 1e-3
    drawn = draws("rotate(20,p=.5)")["degrees"]
    assert abs((drawn == 0).mean() - 0.5) < 0.04
    assert uniformly(drawn[drawn != 0], -20, 20)
