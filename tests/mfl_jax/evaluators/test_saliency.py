"""Maps of models whose maps are known, and their score against what was planted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfl_jax import sharding, statistics
from mfl_jax.evaluators import saliency

SIDE = 16


def planted(n: int = 12, seed: int = 0):
    """White noise tiles with one dark blue square each; masks of the squares."""
    rng = np.random.default_rng(seed)
    he, masks = rng.integers(180, 256, (n, SIDE, SIDE, 3), np.uint8), np.zeros((n, SIDE, SIDE), bool)
    for i in range(n):
        y, x = rng.integers(0, SIDE - 5, 2)
        masks[i, y : y + 5, x : x + 5] = True
        he[i][masks[i]] = [20, 20, 120]
    return he, masks


def embed(params, extra, batch):
    """Darkness of red, and something to be ignored: the direction [1, 0] looks at the squares alone."""
    he = batch["he"]
    return {"he": jnp.stack([(1 - he[..., 0]).sum((1, 2)), he[..., 2].sum((1, 2))], 1)}


@pytest.mark.parametrize("method", saliency.METHODS)
def test_a_linear_model_points_at_the_planted_square(method):
    he, masks = planted()
    options = {"method": method, "batch": 8, "steps": 4, "patch": 4}
    maps = saliency.maps_of(embed, {}, {}, he, np.array([1.0, 0.0]), **options)
    spread = saliency.maps_of(embed, {}, {}, he, np.array([1.0, 0.0]), mesh=sharding.make_mesh(), **options)
    np.testing.assert_array_equal(spread, maps)
    assert maps.shape == masks.shape
    found = saliency.score_maps(maps, masks, np.repeat(["a", "b", "c"], 4), resamples=100)
    assert found.metrics["auc"].low > 0.9
    assert found.metrics["pointing"].value == 1
    assert found.chance["pointing"] == pytest.approx(25 / 256)
    turned = saliency.score_maps(-maps, masks, np.repeat(["a", "b", "c"], 4), resamples=100)
    assert turned.metrics["auc"].value == pytest.approx(1 - found.metrics["auc"].value)


def test_integrated_gradients_are_exact_for_a_linear_model_and_complete_for_any():
    rng = np.random.default_rng(0)
    images, weights = rng.random((3, 6, 6, 3)).astype(np.float32), rng.normal(size=(6, 6, 3)).astype(np.float32)
    found = saliency.integrated_gradients(lambda x: (x * weights).sum((1, 2, 3)), jnp.asarray(images), 1.0, steps=2)
    np.testing.assert_allclose(found, ((images - 1) * weights).sum(-1), atol=1e-5)

    def curved(x):
        return jnp.tanh((x * weights).sum((1, 2, 3)) / 4)

    found = saliency.integrated_gradients(curved, jnp.asarray(images), 0.0, steps=256)
    expected = curved(images) - curved(np.zeros_like(images))
    np.testing.assert_allclose(found.sum((1, 2)), expected, atol=1e-4)


def test_grad_cam_of_a_probe_on_pooled_maps_is_the_class_activation_map():
    rng = np.random.default_rng(0)
    maps, direction = rng.normal(size=(2, 3, 4, 5)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    found = saliency.grad_cam(saliency.pooled(direction), jnp.asarray(maps), positive=False)
    np.testing.assert_allclose(found, maps @ direction / 12, atol=1e-5)
    assert (saliency.grad_cam(saliency.pooled(direction), jnp.asarray(maps)) >= 0).all()


def test_occlusion_is_the_mean_fall_over_the_squares_that_hide_a_pixel():
    image = np.zeros((1, 5, 4, 1), np.float32)
    image[0, 0, 0, 0] = 6.0
    found = saliency.occlusion(lambda x: x.sum((1, 2, 3)), jnp.asarray(image), patch=2, stride=1, fill=0.0)
    # The pixel (0, 0) is hidden by one square of its own; (1, 1) by four, one of which hides (0, 0) too.
    assert float(found[0, 0, 0]) == 6
    assert float(found[0, 1, 1]) == pytest.approx(6 / 4)
    assert float(found[0, 4, 3]) == 0
    with pytest.raises(ValueError, match="stride 3 and patch 2"):
        saliency.occlusion(lambda x: x.sum((1, 2, 3)), jnp.asarray(image), patch=2, stride=3, fill=0.0)


def test_the_score_of_a_map_is_the_auc_of_its_pixels_with_ties():
    rng = np.random.default_rng(1)
    maps, masks = np.round(rng.random((3, 8, 8)), 1), rng.random((3, 8, 8)) < 0.3
    found = saliency.score_maps(maps, masks, np.array(["a", "b", "c"]), resamples=50)
    expected = [statistics.measure("auc", m.ravel().astype(int), s.ravel()) for s, m in zip(maps, masks, strict=True)]
    np.testing.assert_allclose(found.each["auc"], expected)
    flat = saliency.score_maps(np.zeros((3, 8, 8)), masks, np.array(["a", "b", "c"]), resamples=50)
    assert flat.metrics["auc"].value == 0.5
    np.testing.assert_allclose(flat.each["pointing"], masks.mean((1, 2)))


def test_tiles_without_marker_are_left_out_and_counted():
    masks = np.zeros((4, 8, 8), bool)
    masks[:2, 2:4, 2:4] = True
    masks[3] = True
    found = saliency.score_maps(np.random.default_rng(0).random((4, 8, 8)), masks, np.arange(4), resamples=50)
    assert found.used.tolist() == [0, 1]
    assert "2 of 4 tiles" in found.notes[0]
    with pytest.raises(ValueError, match="nothing to score"):
        saliency.score_maps(np.zeros((2, 8, 8)), np.zeros((2, 8, 8), bool), np.arange(2))


def test_the_marker_is_where_it_is_bright():
    images = np.random.default_rng(0).integers(0, 500, (2, 32, 32)).astype(np.uint16)
    images[0, 8:20, 8:20] += 20000
    masks, threshold = saliency.marker_masks(images, sigma=1.0)
    assert masks[0, 12:16, 12:16].all()
    assert not masks[1].any()
    assert 500 < threshold < 20000
    with pytest.raises(ValueError, match="same everywhere"):
        saliency.marker_masks(np.ones((2, 8, 8)))


def test_resizing_keeps_a_ramp():
    ramp = np.tile(np.arange(4.0), (1, 4, 1))
    np.testing.assert_allclose(saliency.resize(ramp, 8, 8)[0, 0, 1:-1], np.arange(0.25, 2.8, 0.5), atol=1e-6)
    assert isinstance(saliency.resize(ramp, 8, 8), np.ndarray)
    assert jax.devices()
