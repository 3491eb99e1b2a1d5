import numpy as np
import pytest

from input_pipeline.slides.register_fit import apply, compose, fit_affine, fit_displacement


def rotation(degrees, scale=1.0, shift=(0.0, 0.0)):
    a = np.deg2rad(degrees)
    return np.array(
        [[scale * np.cos(a), -scale * np.sin(a), shift[0]], [scale * np.sin(a), scale * np.cos(a), shift[1]]]
    )


@pytest.mark.parametrize("rigid", [True, False])
def test_affine_fit_finds_the_map_among_wrong_pairs(rigid):
    rng = np.random.default_rng(0)
    truth = rotation(7, 1.04, (12.0, -5.0))
    if not rigid:
        truth[0, 1] += 0.05
    source = rng.uniform(0, 1000, (200, 2))
    target = apply(truth, source) + rng.normal(0, 0.3, (200, 2))
    target[:90] = rng.uniform(0, 1000, (90, 2))
    matrix, inliers = fit_affine(source, target, np.ones(200), 2.0, rigid=rigid)
    assert np.linalg.norm(apply(matrix, source) - apply(truth, source), axis=1).max() < 0.3
    assert inliers[90:].mean() > 0.98
    assert inliers[:90].mean() < 0.05


def test_affine_fit_survives_pairs_on_a_line_and_on_one_point():
    line = np.stack([np.linspace(0, 100, 20), np.full(20, 5.0)], 1)
    for source in (line, np.full((20, 2), 3.0)):
        matrix, _ = fit_affine(source, source, np.ones(20), 1.0)
        assert np.isfinite(matrix).all()


def test_compose_applies_the_inner_map_first():
    outer, inner = rotation(30, 1.1, (3, 4)), rotation(-80, 0.9, (-7, 1))
    points = np.array([[0.0, 0.0], [5.0, 2.0], [-3.0, 8.0]])
    np.testing.assert_allclose(apply(compose(outer, inner), points), apply(outer, apply(inner, points)), atol=1e-12)


def wave(points):
    return 10 * np.stack([np.sin(points[:, 1] / 260), np.cos(points[:, 0] / 310)], 1)


def test_displacement_fit_follows_a_wave_through_noise_and_wrong_pairs():
    rng = np.random.default_rng(1)
    points = rng.uniform(0, (2000, 1500), (1200, 2))
    shifts = wave(points) + rng.normal(0, 0.5, points.shape)
    wrong = rng.random(len(points)) < 0.15
    shifts[wrong] += rng.uniform(-40, 40, (int(wrong.sum()), 2))
    field, residual = fit_displacement(points, shifts, np.ones(len(points)), (2000, 1500), 150, 0.1, 2.0)
    inner = rng.uniform((50, 50), (1950, 1450), (2000, 2))
    error = np.linalg.norm(field(inner) - wave(inner), axis=1)
    assert np.median(error) < 0.3
    assert np.percentile(error, 95) < 0.8
    assert np.median(residual[wrong]) > 10 * np.median(residual[~wrong])


def test_the_fitted_field_is_the_one_that_displacement_evaluates():
    rng = np.random.default_rng(2)
    points = rng.uniform(0, 600, (400, 2))
    shifts = rng.normal(0, 5, points.shape)
    field, residual = fit_displacement(points, shifts, np.ones(400), (600, 600), 100, 0.05, 1e9)
    np.testing.assert_allclose(np.linalg.norm(field(points) - shifts, axis=1), residual, atol=1e-9)


def test_a_linear_stretch_is_not_bent_at_the_border():
    y, x = np.mgrid[0:1001:50, 0:1001:50]
    points = np.stack([x.ravel(), y.ravel()], 1).astype(float)
    field, _ = fit_displacement(points, points * 0.01, np.ones(len(points)), (1000, 1000), 150, 1.0, 2.0)
    np.testing.assert_allclose(field(points), points * 0.01, atol=0.2)
