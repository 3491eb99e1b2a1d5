"""Colour ops against scikit-image, scipy and numpy, given what was drawn; and what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats
from skimage import color

from mfl_jax.views import KINDS, parse
from mfl_jax.views import colour as vc
from mfl_jax.views.geometry import sources
from mfl_jax.views.spec import read

KEY = jax.random.key(5)


def see(view, images):
    return np.asarray(jax.jit(view)(KEY, images))


GREY = np.array([0.299, 0.587, 0.114])


def picture(height=24, width=24, channels=3, seed=0):
    return np.random.default_rng(seed).random((height, width, channels)).astype(np.float32)


def op_and_args(spec):
    (call,) = read(spec, KINDS["image"], kind="image", others={})
    return KINDS["image"][call.name], call.args


def draws(spec, count=4000, shape=(8, 8, 3)):
    op, args = op_and_args(spec)
    keys = jax.random.split(KEY, count)
    drawn = jax.jit(jax.vmap(lambda k: op.draw(sources(k, 1)[0], args, shape)))(keys)
    return {name: np.asarray(value) for name, value in drawn.items()}


def apply(spec, params, image):
    op, args = op_and_args(spec)
    return np.asarray(op.apply(params, jnp.asarray(image), args))


def uniformly(values, low, high):
    return stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.7])
def test_brightness_contrast_and_saturation_blend_with_black_mean_grey_and_grey(factor):
    image = picture()
    grey = image @ GREY
    for got, other in (
        (vc.brightness(image, factor), 0.0),
        (vc.contrast(image, factor), grey.mean()),
        (vc.saturation(image, factor), grey[..., None]),
    ):
        np.testing.assert_allclose(got, np.clip(factor * image + (1 - factor) * other, 0, 1), atol=1e-5)


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.05, 0.5])
def test_hue_turns_the_hue_of_scikit_image(shift):
    special = np.array([[[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0.3, 0.3, 0.3], [1, 0, 1]]])
    for image in (picture(), special.astype(np.float32)):
        hsv = color.rgb2hsv(image.astype(np.float64))
        hsv[..., 0] = (hsv[..., 0] + shift) % 1
        np.testing.assert_allclose(vc.hue(jnp.asarray(image), shift), color.hsv2rgb(hsv), atol=1e-5)


def test_jitter_applies_brightness_contrast_saturation_hue_in_turn_or_in_the_order_drawn():
    image, params = picture(), {"brightness": 0.7, "contrast": 1.3, "saturation": 0.6, "hue": 0.08}
    expected = jnp.asarray(image)
    for name, function in vc.JITTER:
        expected = function(expected, params[name])
    np.testing.assert_allclose(apply("jitter", params, image), expected, atol=1e-6)
    order = [3, 1, 0, 2]
    expected = jnp.asarray(image)
    for i in order:
        expected = vc.JITTER[i][1](expected, params[vc.JITTER[i][0]])
    np.testing.assert_allclose(apply("jitter", params | {"order": jnp.array(order)}, image), expected, atol=1e-6)


def test_hed_moves_each_stain_alone_in_optical_density():
    image = picture()
    alpha, beta = np.array([1.1, 0.9, 1.05]), np.array([0.05, -0.02, 0.01])
    got = apply("hed(.1)", {"alpha": jnp.asarray(alpha), "beta": jnp.asarray(beta)}, image)
    ruifrok = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    ruifrok /= np.linalg.norm(ruifrok, axis=1, keepdims=True)
    stains = -np.log10((255 * image.astype(np.float64) + 1) / 256) @ np.linalg.inv(ruifrok)
    expected = (256 * 10 ** -((stains * alpha + beta) @ ruifrok) - 1) / 255
    np.testing.assert_allclose(got, np.clip(expected, 0, 1), atol=2e-5)
    published = color.rgb_from_hed / np.linalg.norm(color.rgb_from_hed, axis=1, keepdims=True)
    np.testing.assert_allclose(vc.STAINS, published, atol=1e-6)


def test_gray_is_rec_601_in_all_channels_or_nothing():
    image = picture()
    grey = np.repeat((image @ GREY)[..., None], 3, -1)
    np.testing.assert_allclose(apply("gray", {"on": jnp.array(True)}, image), grey, atol=1e-6)
    np.testing.assert_allclose(apply("gray", {"on": jnp.array(False)}, image), image, atol=1e-6)


@pytest.mark.parametrize(("sigma", "channels"), [(0.3, 3), (1.0, 1), (2.0, 5)])
@pytest.mark.parametrize("size", [24, 5])
def test_blur_is_the_gaussian_filter_of_scipy(sigma, channels, size):
    image = picture(size, size, channels)
    expected, radius = image.astype(np.float64), min(6, size - 1)
    for axis in (0, 1):
        expected = ndimage.gaussian_filter1d(expected, sigma, axis=axis, mode="mirror", radius=radius)
    np.testing.assert_allclose(apply("blur(.1,2)", {"sigma": jnp.array(sigma)}, image), expected, atol=1e-5)


def test_solarise_noise_cutout_gain_and_drop():
    image = picture()
    np.testing.assert_allclose(
        apply("solarise", {"threshold": 0.5}, image), np.where(image >= 0.5, 1 - image, image), atol=1e-7
    )
    noise = np.random.default_rng(1).normal(0, 0.3, image.shape).astype(np.float32)
    np.testing.assert_allclose(apply("noise", {"noise": noise}, image), np.clip(image + noise, 0, 1), atol=1e-6)
    got = apply("cutout(.25)", {"side": 0.5, "row": 0.5, "column": 1.0}, image)
    expected = image.copy()
    expected[6:18, 18:] = image.mean((0, 1))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    gains = np.array([0.8, 1.0, 1.9], np.float32)
    np.testing.assert_allclose(apply("gain", {"gain": gains}, image), np.clip(image * gains, 0, 1), atol=1e-6)
    kept = apply("drop", {"keep": jnp.array([True, False, True])}, image)
    np.testing.assert_array_equal(kept, image * np.array([1, 0, 1], np.float32))


def test_levels_of_sixteen_bits_are_fixed_or_by_percentile():
    raw = np.random.default_rng(0).integers(0, 5000, (2, 16, 16, 2)).astype(np.uint16)
    got = see(parse("scale(4095-2000,100-0)", size=16, channels=2), raw)
    expected = np.clip((raw - np.array([100.0, 0])) / np.array([3995.0, 2000]), 0, 1)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    np.testing.assert_allclose(see(parse("size(16)", channels=2), raw), raw / 65535, atol=1e-7)
    low, high = np.percentile(raw, [5, 95], axis=(1, 2), keepdims=True)
    got = see(parse("percentile(95,5)", size=16, channels=2), raw)
    np.testing.assert_allclose(got, np.clip((raw - low) / (high - low), 0, 1), atol=1e-4)
    assert not np.any(see(parse("percentile", size=16, channels=2), np.full_like(raw, 4000)))


def test_normalise_uses_the_statistics_given():
    raw = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    got = see(parse("normalise", size=8, mean=(0.7, 0.5, 0.6), std=(0.2, 0.3, 0.1)), raw)
    np.testing.assert_allclose(got, (raw / 255 - [0.7, 0.5, 0.6]) / [0.2, 0.3, 0.1], atol=1e-5)


def test_jitter_and_hed_draw_uniform_factors_and_leave_out_the_share_they_should():
    drawn = draws("jitter(.4,.3,.2,.1,p=.8)")
    on = drawn["brightness"] != 1
    assert abs(on.mean() - 0.8) < 0.03
    for name, reach in (("brightness", 0.4), ("contrast", 0.3), ("saturation", 0.2)):
        assert uniformly(drawn[name][on], 1 - reach, 1 + reach)
        assert np.all(drawn[name][~on] == 1)
    assert uniformly(drawn["hue"][on], -0.1, 0.1)
    assert abs(np.corrcoef(drawn["brightness"][on], drawn["contrast"][on])[0, 1]) < 0.06
    orders = draws("jitter(shuffle=1)")["order"]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3
    drawn = draws("hed(.05,.02,p=.5)")
    on = drawn["beta"].any(1)
    assert abs(on.mean() - 0.5) < 0.04
    for stain in range(3):
        assert uniformly(drawn["alpha"][on, stain], 0.95, 1.05)
        assert uniformly(drawn["beta"][on, stain], -0.02, 0.02)
    assert np.all(drawn["alpha"][~on] == 1)
    assert uniformly(draws("hed(.07)")["beta"][:, 0], -0.07, 0.07)


def test_the_other_ops_draw_what_they_promise():
    sigma = draws("blur(.1,2,p=.5)")["sigma"]
    on = sigma > 0.05
    assert abs(on.mean() - 0.5) < 0.04
    assert uniformly(sigma[on], 0.1, 2)
    assert abs((draws("solarise(p=.2,threshold=.4)")["threshold"] == np.float32(0.4)).mean() - 0.2) < 0.03
    assert abs(draws("gray(.2)")["on"].mean() - 0.2) < 0.03
    noise = draws("noise(.02)", 500)["noise"]
    assert stats.kstest(noise[:, 0].ravel()[:2000], "norm", (0, 0.02)).pvalue > 1e-3
    drawn = draws("cutout(.25,p=.5)")
    assert set(np.unique(drawn["side"])) == {0.0, 0.5}
    assert uniformly(drawn["row"], 0, 1)
    assert uniformly(draws("gain(.3)", shape=(8, 8, 12))["gain"][:, 11], 0.7, 1.3)
    assert abs(draws("drop(.1)")["keep"].mean() - 0.9) < 0.02


EVERY = "jitter(1,1,1,.5)|hed(1)|gray(.5)|blur(.05,9)|solarise(p=.5)|noise(1)|cutout(1)"


def test_extremes_stay_finite_and_in_range():
    flat = np.repeat(np.array([0, 1, 128, 255], np.uint8), 8)[:, None, None, None] * np.ones((16, 16, 3), np.uint8)
    view = parse(f"crop(.001,1,aspect=10)|flip|rot90|rotate(180)|{EVERY}", size=8)
    got = see(view, flat)
    assert np.isfinite(got).all()
    assert got.min() >= 0
    assert got.max() <= 1


def test_ops_left_out_change_nothing():
    raw = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    view = parse("jitter(p=0)|hed(p=0)|gray(0)|gain(p=0)|drop(0)|blur(p=0)|solarise(0)|noise(p=0)|cutout(p=0)", size=8)
    np.testing.assert_allclose(see(view, raw), raw / 255, atol=1e-5)
