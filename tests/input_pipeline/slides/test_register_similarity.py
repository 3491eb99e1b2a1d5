import numpy as np
import pytest
from scipy import ndimage

from input_pipeline.slides.similarity import local_shifts, ncc, nuclear_channel, nuclear_density, tile_similarity


def nuclei(rng, side=256, count=250, radius=5.0):
    y, x = np.mgrid[:side, :side]
    image = np.zeros((side, side), np.float32)
    for cy, cx in rng.uniform(0, side, (count, 2)):
        image = np.maximum(image, (np.hypot(y - cy, x - cx) < radius).astype(np.float32))
    return ndimage.gaussian_filter(image, 1)


def he_of(density, eosin=0.25):
    od = density[..., None] * (0.65, 0.70, 0.29) + eosin * np.array((0.07, 0.99, 0.11))
    return np.round(255 * 10**-od).astype(np.uint8)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("DAPI", "CD3"), 0),
        (("CD3", "Hoechst 33342"), 1),
        (("CD8", "DNA1"), 1),
        (("a", "b", "Nuclei"), 2),
        (("cDNA5x", "FITC"), None),
        ((), None),
    ],
)
def test_nuclear_channel_is_found_by_name(names, found):
    assert nuclear_channel(names) == found


def test_nuclear_density_follows_haematoxylin_not_eosin_or_dab():
    def density(stain):
        pixel = np.round(255 * 10 ** -np.array(stain)).astype(np.uint8)
        return float(nuclear_density(np.broadcast_to(pixel, (2, 2, 3)))[0, 0])

    haematoxylin = density((0.65, 0.70, 0.29))
    assert density((0, 0, 0)) == 0
    assert density((0.07, 0.99, 0.11)) < 0.15 * haematoxylin
    assert density((0.27, 0.57, 0.78)) < 0.2 * haematoxylin


def test_ncc_is_pearson_correlation_and_0_where_flat():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 20, 30))
    where = rng.random((20, 30)) < 0.5
    assert ncc(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    assert ncc(a, b, where) == pytest.approx(np.corrcoef(a[where], b[where])[0, 1])
    assert ncc(a, -a) == pytest.approx(-1)
    assert ncc(a, np.ones_like(a)) == 0
    assert ncc(a, b, np.zeros_like(where)) == 0


def test_local_shifts_are_known_fractions_of_a_pixel():
    rng = np.random.default_rng(1)
    image = nuclei(rng)
    moved = ndimage.shift(image, (-3.3, 4.6), order=3, mode="reflect")  # moved(p + (4.6, -3.3)) = image(p)
    y, x = np.mgrid[64:200:32, 64:200:32]
    centres = np.stack([x.ravel(), y.ravel()], 1).astype(float)
    shifts, peak, here = local_shifts(image, moved, np.ones(image.shape, bool), centres, 64, 10)
    assert np.linalg.norm(shifts - (4.6, -3.3), axis=1).max() < 0.2
    assert peak.min() > 0.95
    assert (here < peak - 0.2).all()


def test_local_shifts_correlation_matches_the_plain_formula():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 60, 60))
    _, peak, here = local_shifts(a, b, np.ones(a.shape, bool), np.array([[30.0, 30.0]]), 20, 5)
    core = slice(20, 40)
    by_hand = [[ncc(a[core, core], b[20 + j : 40 + j, 20 + i : 40 + i]) for i in range(-5, 6)] for j in range(-5, 6)]
    assert here[0] == pytest.approx(by_hand[5][5], abs=1e-6)
    assert peak[0] == pytest.approx(np.max(by_hand), abs=1e-6)


def test_patches_that_say_nothing_are_nan():
    rng = np.random.default_rng(3)
    image = nuclei(rng)
    inside = np.ones(image.shape, bool)
    inside[:, 128:] = False
    flat = image.copy()
    flat[:, :128] = 0
    centres = np.array([[5.0, 5.0], [180.0, 100.0]])
    assert np.isnan(local_shifts(image, image, inside, centres, 40, 8)[1]).all()
    assert np.isnan(local_shifts(flat, image, np.ones_like(inside), np.array([[60.0, 60.0]]), 40, 8)[1]).all()


def test_tile_similarity_tells_aligned_from_moved_and_foreign():
    rng = np.random.default_rng(4)
    density, foreign = nuclei(rng), nuclei(rng)
    he = he_of(density)
    partner = np.stack([rng.poisson(300, density.shape), 200 + 5000 * density], -1).astype(np.uint16)
    moved = np.roll(partner, (15, 10), (0, 1))
    assert tile_similarity(he, partner) > 0.8
    assert tile_similarity(he, partner, channel=1) == tile_similarity(he, partner)
    assert tile_similarity(he, partner, channel=0) < 0.2
    assert tile_similarity(he, moved) < 0.3
    assert tile_similarity(he, he_of(foreign)) < 0.3
    assert tile_similarity(he, he_of(0.8 * density, eosin=0)) > 0.9
    assert tile_similarity(he, np.zeros_like(partner)) == 0
    half = np.zeros(density.shape, bool)
    half[:, :100] = True
    mixed = np.where(half[..., None], partner, moved)
    assert tile_similarity(he, mixed, inside=half) > 0.8 > tile_similarity(he, mixed)


def test_tiles_of_different_size_are_refused():
    with pytest.raises(ValueError, match="align them first"):
        tile_similarity(np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 1), np.uint16))
