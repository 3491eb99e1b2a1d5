"""Geometry, levels, threads and memory, on files written here; formats and real files have modules of their own."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile

from input_pipeline.slides.reader import Level, SlideError, best_level, open_slide, pyramid

CM = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}  # 0.5 um per pixel


def write(path, levels, **options):
    options = {"tile": (64, 64), "metadata": None} | options
    with tifffile.TiffWriter(path) as tif:
        for i, level in enumerate(levels):
            tif.write(level, subfiletype=int(i > 0), **(CM if i == 0 else {}), **options)
    return path


def noise(height, width, channels=3, dtype=np.uint8, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    high = 256 if dtype == np.uint8 else 60000
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def ramp(height, width):
    """Linear in x and y, so that any antialiasing filter leaves its value at a point unchanged."""
    y, x = np.mgrid[:height, :width] + 0.5
    return (10 * x + 7 * y).astype(np.float32)


@pytest.fixture(scope="module")
def image():
    return noise(300, 500)


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory, image):
    levels = [image, image[::2, ::2].copy(), image[::4, ::4].copy()]
    return write(tmp_path_factory.mktemp("slides") / "noise.tif", levels, photometric="rgb", compression="zlib")


@pytest.fixture
def slide(slide_path):
    with open_slide(slide_path) as slide:
        yield slide


def test_what_a_slide_says_of_itself(slide, slide_path):
    assert (slide.path, slide.vendor, slide.width, slide.height) == (slide_path, "generic", 500, 300)
    assert slide.levels == (Level(500, 300, 1.0), Level(250, 150, 2.0), Level(125, 75, 4.0))
    assert (slide.channels, slide.channel_names, slide.dtype) == (3, ("red", "green", "blue"), np.uint8)
    assert slide.is_rgb
    assert (slide.mpp, slide.mpp_source) == (0.5, "tiff")


@pytest.mark.parametrize(
    "region", [(0, 0, 64, 64), (64, 128, 64, 64), (10, 20, 300, 200), (0, 0, 500, 300), (499, 299, 1, 1)]
)
def test_native_pixels_are_exact(slide, image, region):
    x, y, width, height = region
    expected = image[y : y + height, x : x + width]
    np.testing.assert_array_equal(slide.read_native(0, x, y, width, height), expected)
    np.testing.assert_array_equal(slide.read_region(x, y, width, height, 0.5), expected)


def test_each_level_is_copied_at_its_own_mpp(slide, image):
    np.testing.assert_array_equal(slide.read_region(8, 16, 40, 30, 1.0), image[::2, ::2][8:38, 4:44])
    np.testing.assert_array_equal(slide.read_region(8, 16, 40, 30, 2.0), image[::4, ::4][4:34, 2:42])


@pytest.mark.parametrize(("x", "y"), [(-20, -30), (480, 280), (-20, 280), (1000, 1000), (-64, 0), (-700, -700)])
def test_outside_is_white_and_inside_is_untouched(slide, image, x, y):
    framed = np.full((300 + 2000, 500 + 2000, 3), 255, np.uint8)
    framed[1000:1300, 1000:1500] = image
    expected = framed[1000 + y : 1064 + y, 1000 + x : 1064 + x]
    np.testing.assert_array_equal(slide.read_region(x, y, 64, 64, 0.5), expected)


def test_outside_is_zero_where_the_slide_is_not_rgb(tmp_path):
    path = write(tmp_path / "grey.tif", [noise(70, 70, 1, np.uint16)], photometric="minisblack")
    with open_slide(path) as slide:
        found = slide.read_region(60, 60, 20, 20, 0.5)
    assert (found[10:] == 0).all()
    assert (found[:, 10:] == 0).all()
    assert found[:10, :10].any()


@pytest.mark.parametrize("mpp", [0.7, 1.4])
def test_fill_does_not_bleed_into_a_resampled_edge(tmp_path, mpp):
    grey = np.full((100, 100, 3), 90, np.uint8)
    with open_slide(write(tmp_path / "grey.tif", [grey], photometric="rgb")) as slide:
        found = slide.read_region(-33.3, -21.7, 200, 200, mpp)
    assert set(np.unique(found)) == {90, 255}
    rows, columns = np.flatnonzero((found[..., 0] == 90).any(1)), np.flatnonzero((found[..., 0] == 90).any(0))
    centre = (np.arange(200) + 0.5) * mpp / 0.5
    assert columns.tolist() == np.flatnonzero((centre - 33.3 >= 0) & (centre - 33.3 < 100)).tolist()
    assert rows.tolist() == np.flatnonzero((centre - 21.7 >= 0) & (centre - 21.7 < 100)).tolist()


def test_a_region_that_begins_outside_holds_the_same_pixels(slide):
    step = 0.7 / 0.5
    inside = slide.read_region(0.3, 0.4, 40, 30, 0.7).astype(int)
    around = slide.read_region(0.3 - 7 * step, 0.4 - 5 * step, 47, 35, 0.7)
    assert np.abs(around[5:, 7:] - inside).max() <= 1
    assert (around[:5] == 255).all()
    assert (around[:, :7] == 255).all()


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
@pytest.mark.parametrize(
    ("x", "y", "mpp"), [(100, 60, 0.7), (33.25, 71.8, 1.0), (50.5, 50.5, 0.5), (40, 40, 0.4), (90, 10, 1.93)]
)
def test_a_pixel_lies_where_its_centre_says(tmp_path, dtype, x, y, mpp):
    with open_slide(write(tmp_path / "ramp.tif", [ramp(400, 400).astype(dtype)], photometric="minisblack")) as slide:
        found = slide.read_region(x, y, 48, 40, mpp)[..., 0].astype(float)
    ratio = mpp / 0.5
    column, row = x + (np.arange(48) + 0.5) * ratio, y + (np.arange(40) + 0.5) * ratio
    expected = 10 * column[None, :] + 7 * row[:, None]
    # The triangle is sampled at whole pixels, so the value of a ramp is off by a small part of a pixel's step.
    assert np.abs(found - expected).max() < 0.12 * 17 + (dtype == np.uint16)
    assert abs((found - expected).mean()) < 0.02 * 17 + 0.5 * (dtype == np.uint16)


def test_levels_lie_on_one_another(tmp_path):
    full = ramp(512, 512)
    mean2 = full.reshape(256, 2, 256, 2).mean((1, 3))
    mean4 = full.reshape(128, 4, 128, 4).mean((1, 3))
    path = write(tmp_path / "ramp.tif", [full, mean2, mean4], photometric="minisblack")
    with (
        open_slide(path) as pyramidal,
        open_slide(write(tmp_path / "flat.tif", [full], photometric="minisblack")) as flat,
    ):
        for mpp in (0.6, 1.0, 1.2, 2.0, 2.3):
            one, other = (s.read_region(101.5, 77.25, 40, 40, mpp) for s in (pyramidal, flat))
            assert np.abs(one - other).max() < 0.12 * 17 * mpp / 0.5


@pytest.mark.parametrize("mpp", [0.7, 1.3, 0.41])
def test_tiles_side_by_side_join_without_a_seam(slide, mpp):
    step = 40 * mpp / 0.5
    whole = slide.read_region(30.3, 20.6, 120, 80, mpp).astype(int)
    for row in range(2):
        for column in range(3):
            tile = slide.read_region(30.3 + column * step, 20.6 + row * step, 40, 40, mpp)
            there = whole[row * 40 : row * 40 + 40, column * 40 : column * 40 + 40]
            assert np.abs(tile - there).max() <= 1


def test_a_large_region_is_read_in_bands_and_looks_the_same(slide, monkeypatch):
    whole = slide.read_region(-13.3, 4.2, 300, 190, 0.77).astype(int)
    monkeypatch.setattr("input_pipeline.slides.reader.BAND_BYTES", 20_000)
    assert np.abs(slide.read_region(-13.3, 4.2, 300, 190, 0.77) - whole).max() <= 1


def test_labels_stay_labels(tmp_path):
    labels = np.kron(np.random.default_rng(0).integers(0, 2**31, (20, 20)), np.ones((10, 10), int)).astype(np.uint32)
    with open_slide(write(tmp_path / "labels.tif", [labels], photometric="minisblack")) as slide:
        found = slide.read_region(20, 30, 50, 50, 0.65, order="nearest")[..., 0]
        at = np.floor((np.arange(50) + 0.5) * 1.3).astype(int)
        np.testing.assert_array_equal(found, labels[30 + at[:, None], 20 + at[None, :]])
        with pytest.raises(SlideError, match="order='nearest'"):
            slide.read_region(20, 30, 50, 50, 0.65)


@pytest.mark.parametrize(
    ("ratio", "level"), [(0.5, 0), (1.0, 0), (1.97, 0), (1.99, 1), (2.0, 1), (3.9, 1), (4.0, 2), (99, 2)]
)
def test_the_best_level_is_the_coarsest_that_is_fine_enough(ratio, level):
    assert best_level([Level(400, 400, 1.0), Level(200, 200, 2.0), Level(100, 100, 4.0)], ratio) == level


@pytest.mark.parametrize(
    ("sizes", "factors"),
    [
        ([(46000, 32914), (11500, 8228), (2875, 2057)], [1, 4, 16]),
        ([(4443, 3567), (2221, 1783)], [1, 2]),
        ([(4443, 3567), (2222, 1784)], [1, 2]),
        ([(300, 250), (150, 125), (75, 62), (37, 31)], [1, 2, 4, 8]),
        ([(1000, 800), (400, 320)], [1, 2.5]),
    ],
)
def test_levels_of_rounded_size(sizes, factors):
    assert [level.downsample for level in pyramid(sizes)] == factors


@pytest.mark.parametrize(
    "sizes", [[(1000, 1000), (500, 250)], [(1000, 1000), (500, 460)], [(100, 100), (50, 50), (80, 80)]]
)
def test_absurd_levels_are_refused(sizes):
    with pytest.raises(SlideError, match=r"pyramid|shrink"):
        pyramid(sizes)


def test_eight_threads_read_what_one_reads(slide_path):
    rng = np.random.default_rng(3)
    regions = [(*rng.uniform(-40, 480, 2), 50, 40, rng.choice([0.5, 0.7, 1.0, 2.2])) for _ in range(200)]
    with open_slide(slide_path) as slide:
        serial = [slide.read_region(*region) for region in regions]
    with open_slide(slide_path, cache_bytes=100_000) as slide, ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(lambda region: slide.read_region(*region), regions))
        assert slide._source._cache.bytes <= 100_000
    for one, other in zip(serial, threaded, strict=True):
        np.testing.assert_array_equal(one, other)


def test_threads_that_want_one_segment_decode_it_once(slide_path):
    decoded, start = [], threading.Barrier(8)
    with open_slide(slide_path) as slide:
        raster = slide._source._levels[0][0]
        decode = raster.decode
        object.__setattr__(raster, "decode", lambda data, index: decoded.append(index) or decode(data, index))

        def read(_):
            start.wait()
            return slide.read_native(0, 0, 0, 128, 64)

        with ThreadPoolExecutor(8) as pool:
            assert len(list(pool.map(read, range(8)))) == 8
    assert sorted(decoded) == [0, 1]


def test_a_closed_slide_holds_no_pixels(slide_path):
    with open_slide(slide_path) as slide:
        slide.read_native(0, 0, 0, 64, 64)
        assert slide._source._cache.bytes > 0
    assert (slide._source._cache.bytes, len(slide._source._cache._kept)) == (0, 0)


def test_the_cache_is_bounded_and_what_is_returned_is_a_copy(slide_path, image):
    with open_slide(slide_path, cache_bytes=50_000) as slide:
        for x in range(0, 448, 64):
            slide.read_native(0, x, 0, 64, 64)[:] = 7
            assert slide._source._cache.bytes <= 50_000
        np.testing.assert_array_equal(slide.read_native(0, 384, 0, 64, 64), image[:64, 384:448])


def test_time_is_counted_by_stage(slide):
    assert slide.timings == {"read": 0.0, "decode": 0.0, "resample": 0.0}
    slide.read_region(0, 0, 64, 64, 0.7)
    first = slide.timings
    assert all(seconds > 0 for seconds in first.values())
    slide.read_region(0, 0, 64, 64, 0.7)
    assert slide.timings["decode"] == first["decode"]
    assert slide.timings["resample"] > first["resample"]


def test_without_mpp_pixels_are_read_and_scale_is_refused(tmp_path, image):
    path = tmp_path / "bare.tif"
    tifffile.imwrite(path, image, photometric="rgb", metadata=None)
    with open_slide(path) as slide:
        assert slide.mpp is None
        np.testing.assert_array_equal(slide.read_native(0, 5, 6, 7, 8), image[6:14, 5:12])
        assert slide.thumbnail(100).shape == (60, 100, 3)
        with pytest.raises(SlideError, match=r"bare\.tif: mpp unknown.*--default-mpp.*default_mpp="):
            slide.read_region(0, 0, 8, 8, 0.5)
    with open_slide(path, default_mpp=0.25) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.25, "default")
    with open_slide(path, mpp=0.5, default_mpp=0.25) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.5, "user")


def test_the_thumbnail_is_the_whole_slide(slide, image):
    found = slide.thumbnail(50)
    assert found.shape == (30, 50, 3)
    blocks = image[::4, ::4].astype(float).mean((0, 1))
    np.testing.assert_allclose(found.mean((0, 1)), blocks, atol=2)
    assert slide.thumbnail(10_000).shape == (300, 500, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 0, 10, 0.5), "at least 1 px"),
        ((0, 0, 10**6, 10**6, 0.5), "read it in parts"),
        ((0, 0, 10, 10, 0.0), "mpp is positive"),
        ((float("nan"), 0, 10, 10, 0.5), "finite"),
    ],
)
def test_absurd_requests_are_refused(slide, arguments, message):
    with pytest.raises(SlideError, match=message):
        slide.read_region(*arguments)


def test_more_refusals(slide, slide_path, tmp_path):
    with pytest.raises(SlideError, match="levels 0 to 2, not 3"):
        slide.read_native(3, 0, 0, 1, 1)
    with pytest.raises(SlideError, match="'nearest', not 'cubic'"):
        slide.read_region(0, 0, 8, 8, 0.5, order="cubic")
    with pytest.raises(SlideError, match="no such file"):
        open_slide(tmp_path / "none.svs")
    with pytest.raises(SlideError, match="backend is"):
        open_slide(slide_path, backend="vips")
    slide.close()
    with pytest.raises(SlideError, match="closed"):
        slide.read_native(0, 0, 0, 500, 300)
