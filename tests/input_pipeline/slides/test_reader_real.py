"""Every file of the folder of real slides reads right, or is refused in so many words."""

from dataclasses import dataclass

import numpy as np
import pytest
import tifffile
from PIL import Image

from input_pipeline.slides.reader import SlideError, open_slide

RGB = ("red", "green", "blue")


@dataclass(frozen=True)
class Expected:
    name: str
    vendor: str
    sizes: tuple[tuple[int, int], ...]
    mpp: tuple[float | None, str | None]
    channels: tuple[str, ...] = RGB
    dtype: str = "uint8"
    oracle: str | None = "tifffile"  # whose pixels are compared
    tolerance: float = 0.0  # mean difference
    openslide: bool = True
    level: int = 0  # the level compared


SLIDES = [
    Expected("CMU-1-Small-Region.svs", "aperio", ((2220, 2967),), (0.499, "vendor")),
    Expected("tcga-cr-7395-01a-01-ts1.svs", "aperio", ((4443, 3567), (2221, 1783)), (None, None), level=1),
    Expected("boxes.tiff", "generic", ((300, 250), (150, 125), (75, 62), (37, 31)), (None, None)),
    Expected(
        "yb10kx5k.zstd.tiff", "generic", ((10000, 5000), (5000, 2500), (2500, 1250), (1250, 625), (625, 312)),
        (None, None), level=1,
    ),
    Expected(
        "multi-channel-z-series.ome.tif", "ome", ((439, 167),), (None, None),
        ("channel 0", "channel 1", "channel 2"), "int8", openslide=False,
    ),
    Expected(
        "small_vectra.qptiff", "qptiff", ((1920, 1440),), (0.49653, "vendor"), ("DAPI", "FITC", "Cy3"), openslide=False
    ),
    Expected("ojpeg-tile.tif", "generic", ((234, 213),), (None, None), oracle="pillow", tolerance=1.5, openslide=False),
    Expected(
        "subsampled.tif", "generic", ((250, 325),), (None, None), oracle="pillow", tolerance=0.01,
        openslide=False,
    ),
    Expected(
        "test_orient1.tif", "generic", ((120, 180), (60, 90), (30, 45)), (None, None), ("channel 0",), oracle="pillow",
    ),
    # OpenSlide leaves turned slides as they lie.
    Expected(
        "test_orient3.tif", "generic", ((120, 180), (60, 90), (30, 45)), (None, None), ("channel 0",), oracle="pillow",
        openslide=False,
    ),
    Expected(
        "test_orient6.tif", "generic", ((180, 120), (90, 60), (45, 30)), (None, None), ("channel 0",), oracle="pillow",
        openslide=False,
    ),
    Expected("camelyon_jpeg2000.dcm", "dicom", ((1696, 812),), (None, None), oracle=None),
    Expected("camelyon_jpeg_ybr.dcm", "dicom", ((1152, 700),), (None, None), oracle=None),
]  # fmt: skip
REFUSED = {"broken.svs": "no TIFF, PNG, JPEG or DICOM", "unopenable.tiff": "TIFF compression 52479 is not read"}
ABSURD = {
    "boxes.tiff": "352.778", "yb10kx5k.zstd.tiff": "352.858", "ojpeg-tile.tif": "338.667",
    "test_orient1.tif": "352.858",
    "camelyon_jpeg2000.dcm": "28.969", "camelyon_jpeg_ybr.dcm": "28.969",
}  # fmt: skip


def oracle(path, expected):
    if expected.oracle == "pillow":
        with Image.open(path) as picture:
            pixels = np.asarray(picture)
    else:
        pixels = tifffile.imread(path, series=0, level=expected.level)
        pixels = pixels[:, 2] if pixels.ndim == 4 else pixels
        pixels = pixels.transpose(1, 2, 0) if expected.channels != RGB else pixels
    return pixels if pixels.ndim == 3 else pixels[..., None]


@pytest.mark.parametrize("expected", SLIDES, ids=lambda e: e.name)
def test_a_slide_says_what_it_is(real_data, expected):
    with open_slide(real_data(f"slides/{expected.name}"), backend="tifffile") as slide:
        assert slide.vendor == expected.vendor
        assert tuple((level.width, level.height) for level in slide.levels) == expected.sizes
        assert (slide.mpp and round(slide.mpp, 5), slide.mpp_source) == expected.mpp
        assert (slide.channel_names, slide.dtype) == (expected.channels, expected.dtype)
        assert slide.is_rgb == (expected.channels == RGB)
        if expected.mpp[0] is None:
            assert ABSURD.get(expected.name, "") in slide.mpp_reason
            with pytest.raises(SlideError, match="--default-mpp"):
                slide.read_region(0, 0, 8, 8, 0.5)


@pytest.mark.parametrize("expected", [e for e in SLIDES if e.oracle], ids=lambda e: e.name)
def test_pixels_are_what_another_reader_sees(real_data, expected):
    path = real_data(f"slides/{expected.name}")
    with open_slide(path) as slide:
        level = slide.levels[expected.level]
        found = slide.read_native(expected.level, 0, 0, level.width, level.height)
    pixels = oracle(path, expected)
    assert found.shape == pixels.shape
    if expected.tolerance:
        assert np.abs(found.astype(int) - pixels).mean() <= expected.tolerance
    else:
        np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("expected", [e for e in SLIDES if e.openslide], ids=lambda e: e.name)
def test_every_level_agrees_with_openslide(real_data, expected):
    openslide = pytest.importorskip("openslide")
    path = real_data(f"slides/{expected.name}")
    with open_slide(path, backend="tifffile") as ours, openslide.OpenSlide(path) as theirs:
        assert theirs.level_dimensions == expected.sizes
        for number, (width, height) in enumerate(expected.sizes):
            # OpenSlide places regions by its own factor, 2.0004 for 2: only at 0 does it mix no pixels.
            size = min(1000, width), min(1000, height)
            region = np.asarray(theirs.read_region((0, 0), number, size))
            found = ours.read_native(number, 0, 0, *size)
            difference = np.abs(found.astype(int) - region[..., :3])
            assert difference.mean() < 0.5, (number, difference.mean())
            assert difference.max() <= 8, (number, difference.max())


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("backend", ["auto", "tifffile"])
def test_the_rest_is_refused(real_data, name, backend):
    path = real_data(f"slides/{name}")
    with pytest.raises(SlideError, match=REFUSED[name]) as caught:
        open_slide(path, backend=backend)
    assert str(path) in str(caught.value)


def test_no_slide_is_left_out_of_this_table(real_data):
    assert {path.name for path in real_data("slides").iterdir()} == {e.name for e in SLIDES} | set(REFUSED)


def test_labels_and_macros_are_no_levels(real_data):
    with open_slide(real_data("slides/CMU-1-Small-Region.svs")) as slide:
        assert slide.associated == ("thumbnail", "label", "macro")
        assert slide.read_associated("label").shape == (463, 387, 3)
    with open_slide(real_data("slides/small_vectra.qptiff")) as slide:
        assert len(slide.levels) == 1


@pytest.mark.parametrize("mpp", [0.7, 1.1, 0.3])
def test_another_scale_is_what_openslide_and_pillow_make(real_data, mpp):
    openslide = pytest.importorskip("openslide")
    path = real_data("slides/CMU-1-Small-Region.svs")
    with open_slide(path) as ours, openslide.OpenSlide(path) as theirs:
        found = ours.read_region(800.4, 900.7, 200, 150, mpp).astype(int)
        region = theirs.read_region((700, 800), 0, (900, 900)).convert("RGB")
    step = mpp / 0.499
    box = (100.4, 100.7, 100.4 + 200 * step, 100.7 + 150 * step)
    expected = np.asarray(region.resize((200, 150), Image.Resampling.BILINEAR, box=box))
    assert np.abs(found - expected).mean() < 0.5
