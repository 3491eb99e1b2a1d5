import itertools

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw
from scipy import ndimage

from input_pipeline.phantom import draw_partner, draw_slide, paint
from input_pipeline.phantom.layout import BACKGROUND, FAT, GRID, LUMEN
from input_pipeline.slides.tissue import HOLE_UM2, guess_kind, quality_flags, sharpness, tissue_mask

INK = {"blue": (35, 55, 170), "green": (30, 120, 60), "red": (195, 25, 40), "black": (30, 30, 34)}
STAINS = {"he": ((70, 45, 130), (225, 130, 180)), "ihc": ((95, 55, 30), (165, 185, 215))}


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def disc(shape, y, x, radius):
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def slide(truth, mpp, stain="he", seed=0, glass=(243, 241, 240), noise=1.5):
    """Nuclei and fibres of a stain where `truth` is, glass with vignetting and noise elsewhere."""
    rng = np.random.default_rng(seed)
    grain = ndimage.gaussian_filter(rng.normal(size=truth.shape), 4 / mpp)
    fibre = ndimage.gaussian_filter(rng.normal(size=truth.shape), (20 / mpp, 6 / mpp))
    grain, fibre = grain / grain.std(), fibre / fibre.std()
    nucleus, matrix = (np.asarray(colour, float) for colour in STAINS[stain])
    share = 1 / (1 + np.exp(-12 * (grain - 0.5)))[..., None]
    tissue = nucleus * share + (matrix + 12 * fibre[..., None]) * (1 - share)
    shade = 1 - 0.03 * np.linspace(-1, 1, truth.shape[1])[None, :, None] ** 2
    image = np.where(truth[..., None], tissue, np.asarray(glass, float)) * shade
    return np.clip(image + rng.normal(0, noise, image.shape), 0, 255).round().astype(np.uint8)


def fluorescent(truth, mpp, offset=100.0, seed=0, glow=True):
    rng = np.random.default_rng(seed)
    planes = []
    for gain in (400.0, 150.0, 60.0):
        grain = ndimage.gaussian_filter(rng.normal(size=truth.shape), 4 / mpp)
        light = truth * gain * np.exp(grain / grain.std()) + 20 * glow * np.linspace(0, 1, truth.shape[1])
        planes.append(offset + rng.poisson(light + 5) + rng.normal(0, 2, truth.shape))
    return np.clip(np.stack(planes, axis=2), 0, 65535).round().astype(np.uint16)


def pale(image, share=0.8):
    return np.round(image * (1 - share) + 255 * share).astype(np.uint8)


def with_pen(image, mpp, colour, width_um=250, alpha=0.88):
    h, w = image.shape[:2]
    stroke = Image.new("L", (w, h))
    line = [(w * 0.15, h * 0.2), (w * 0.5, h * 0.45), (w * 0.8, h * 0.3), (w * 0.75, h * 0.85)]
    ImageDraw.Draw(stroke).line(line, fill=255, width=round(width_um / mpp), joint="curve")
    stroke = np.asarray(stroke) > 0
    mixed = image.astype(float)
    mixed[stroke] = mixed[stroke] * (1 - alpha) + np.asarray(INK[colour]) * alpha
    return mixed.round().astype(np.uint8), stroke


def shrunk(image, factor):
    """Area means, as a reader's thumbnail would be."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return np.asarray(image.convert("RGB").resize([round(n / factor) for n in image.size], Image.Resampling.BOX))


@pytest.fixture(scope="module")
def shape():
    truth = disc((500, 600), 250, 280, 180) | disc((500, 600), 90, 500, 50)
    return truth & ~disc((500, 600), 230, 300, 40)


@pytest.mark.parametrize("stain", ["he", "ihc"])
@pytest.mark.parametrize("share", [0, 0.8])
@pytest.mark.parametrize("mpp", [2.0, 4.0, 8.0])
def test_a_known_mask_is_found_in_dark_and_pale_stains(shape, stain, share, mpp):
    image = pale(slide(shape, mpp, stain), share)
    assert overlap(tissue_mask(image, mpp), shape) > 0.93


@pytest.mark.parametrize("glass", [(255, 255, 255), (215, 212, 208), (238, 232, 214)])
def test_the_colour_of_the_glass_does_not_matter(shape, glass):
    assert overlap(tissue_mask(slide(shape, 4.0, glass=glass), 4.0), shape) > 0.93


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [0, 1.5, 3])
def test_a_blank_slide_has_no_tissue(seed, noise):
    nothing = np.zeros((400, 500), bool)
    assert not tissue_mask(slide(nothing, 4.0, seed=seed, noise=noise), 4.0).any()
    assert not tissue_mask(fluorescent(nothing, 4.0, seed=seed), 4.0).any()


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_constant_image_has_no_tissue(value, dtype):
    assert not tissue_mask(np.full((60, 50, 3), value, dtype), 4.0).any()


def test_a_field_inside_the_tissue_is_all_tissue():
    whole = np.ones((250, 250), bool)
    assert tissue_mask(slide(whole, 2.0), 2.0).all()
    assert tissue_mask(fluorescent(whole, 2.0, offset=0.0), 2.0).all()


def test_large_holes_are_kept_out_and_small_ones_filled():
    mpp, whole = 4.0, np.ones((500, 500), bool)
    small, large = disc(whole.shape, 130, 130, 8), disc(whole.shape, 350, 350, 40)
    assert small.sum() * mpp**2 < HOLE_UM2 < large.sum() * mpp**2
    mask = tissue_mask(slide(whole & ~small & ~large, mpp), mpp)
    assert mask[small].all()
    assert mask[ndimage.binary_erosion(large, iterations=5)].sum() == 0


def test_specks_are_dropped_and_a_small_biopsy_is_kept():
    speck, biopsy = disc((400, 400), 80, 80, 9), disc((400, 400), 280, 280, 30)
    mask = tissue_mask(slide(speck | biopsy, 4.0), 4.0)
    assert not mask[:150, :150].any()
    assert overlap(mask, biopsy) > 0.85


def test_a_smear_of_dye_is_background(shape):
    image = slide(shape, 4.0).astype(float)
    smear = np.exp(-(((np.arange(600) - 520) / 60.0) ** 2))[None, :, None] * (~shape)[..., None]
    smeared = np.clip(image * (1 - smear * (0.0, 0.12, 0.05)), 0, 255).round().astype(np.uint8)
    assert overlap(tissue_mask(smeared, 4.0), shape) > 0.93


def test_padding_of_the_scanner_is_background(shape):
    for colour in (0, 255):
        image = np.pad(slide(shape, 4.0), ((100, 0), (0, 150), (0, 0)), constant_values=colour)
        assert overlap(tissue_mask(image, 4.0), np.pad(shape, ((100, 0), (0, 150)))) > 0.93


@pytest.mark.parametrize("colour", INK)
@pytest.mark.parametrize("stain", ["he", "ihc"])
def test_pen_is_flagged_and_kept_out(shape, colour, stain):
    image, stroke = with_pen(slide(shape, 4.0, stain), 4.0, colour)
    mask = tissue_mask(image, 4.0)
    pen = quality_flags(image, 4.0, mask)["pen"]
    assert pen[stroke].mean() > 0.95
    assert pen[~ndimage.binary_dilation(stroke, iterations=20)].mean() < 0.01
    assert mask[stroke].mean() < 0.02
    assert overlap(mask, shape & ~stroke) > 0.85


def test_a_grey_coverslip_edge_is_kept_out(shape):
    image = slide(shape, 4.0)
    image[:, 20:28] = (120, 122, 121)
    mask = tissue_mask(image, 4.0)
    assert not mask[:, :60].any()
    assert overlap(mask, shape) > 0.93


def test_fluorescence_ignores_offset_glow_and_bit_depth(shape):
    image = fluorescent(shape, 4.0, offset=700.0)
    assert guess_kind(image) == "fluorescence"
    assert overlap(tissue_mask(image, 4.0), shape) > 0.85
    assert np.array_equal(tissue_mask(image, 4.0), tissue_mask(image.astype(np.float32), 4.0))
    assert overlap(tissue_mask((image / 16).clip(0, 255).astype(np.uint8), 4.0), shape) > 0.85


def test_kind_and_arguments_are_checked(shape):
    image = slide(shape, 4.0)
    assert guess_kind(image) == "brightfield"
    with pytest.raises(ValueError, match="auto, brightfield, fluorescence"):
        tissue_mask(image, 4.0, kind="he")
    with pytest.raises(ValueError, match="uint8"):
        tissue_mask(image.astype(np.uint16), 4.0, kind="brightfield")
    with pytest.raises(ValueError, match="mpp"):
        tissue_mask(image, 0.0)
    with pytest.raises(ValueError, match="shape"):
        tissue_mask(np.zeros((0, 5, 3), np.uint8), 4.0)
    with pytest.raises(ValueError, match="1 values are NaN"):
        tissue_mask(np.where(np.arange(9).reshape(3, 3) == 4, np.nan, 1.0), 4.0)
    with pytest.raises(ValueError, match="differ in size"):
        quality_flags(image, 4.0, np.zeros((3, 3), bool))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 400), (7, 5)])
@pytest.mark.parametrize("mpp", [0.25, 4.0, 100.0])
def test_tiny_images_do_not_fail(size, mpp):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    mask = tissue_mask(image, mpp)
    assert mask.shape == size
    assert mask.dtype == bool
    assert {name: area.shape for name, area in quality_flags(image, mpp, mask).items()} == {"pen": size, "blur": size}


def test_the_same_pixels_give_the_same_mask_and_the_image_is_left_alone(shape):
    image = slide(shape, 4.0)
    before = image.copy()
    assert np.array_equal(tissue_mask(image, 4.0), tissue_mask(image.copy(), 4.0))
    assert np.array_equal(image, before)


@pytest.mark.parametrize("share", [0, 0.6])
def test_blur_is_flagged_where_it_is(share):
    mpp, whole = 2.0, np.ones((400, 400), bool)
    image = pale(slide(whole, mpp), share)
    soft = np.stack([ndimage.gaussian_filter(image[..., c].astype(float), 4 / mpp) for c in range(3)], axis=2)
    image[:, 200:] = soft[:, 200:].round().astype(np.uint8)
    blur = quality_flags(image, mpp, whole)["blur"]
    assert blur[50:-50, 260:-50].mean() > 0.95
    assert blur[:, :140].mean() < 0.02


def test_sharpness_orders_focus_and_is_free_of_contrast():
    image = slide(np.ones((256, 256), bool), 2.0, noise=0.5).astype(float)
    scores = []
    for sigma in (0, 1, 2, 4):
        tile = np.stack([ndimage.gaussian_filter(image[..., c], sigma) for c in range(3)], axis=2) if sigma else image
        scores.append(sharpness(tile.round().astype(np.uint8), 2.0))
    assert all(a > 2 * b for a, b in itertools.pairwise(scores))
    assert sharpness(pale(image, 0.5), 2.0) == pytest.approx(scores[0], rel=0.15)
    assert np.isnan(sharpness(np.full((64, 64, 3), 240, np.uint8), 2.0))


@pytest.mark.parametrize("seed", range(3))
def test_phantom_tissue_without_lumen_is_found(seed):
    drawn = draw_slide(seed, size=1024, artefact_chance=0.0)
    image = shrunk(paint(drawn), 4.0 / drawn.mpp)
    tissue = ~np.isin(drawn.layout.region, (BACKGROUND, LUMEN))
    mask = tissue_mask(image, 4.0)
    assert mask.shape == tissue.shape
    assert overlap(mask, tissue) > 0.9
    flags = quality_flags(shrunk(paint(drawn), 2.0 / drawn.mpp), 2.0, mask.repeat(2, 0).repeat(2, 1))
    assert flags["pen"].mean() < 1e-3
    assert flags["blur"].mean() < 0.05


@pytest.mark.parametrize("stain", ["if", "ihc"])
def test_phantom_partners_are_found_where_the_transform_says(stain):
    drawn = draw_slide(5, size=1024)
    canvas, _ = draw_partner(drawn, stain)
    image = paint(drawn, stain)
    image = np.moveaxis(image, 0, -1) if stain == "if" else image
    rows, columns = np.indices((canvas.height, canvas.width))
    at = canvas.transform.inverse(np.stack([columns, rows], -1)[::8, ::8] * canvas.mpp) / GRID
    region = drawn.layout.region
    inside = ((at >= 0) & (at < region.shape[0])).all(axis=-1)
    x, y = np.clip(at, 0, region.shape[0] - 1).astype(int).transpose(2, 0, 1)
    tissue = inside & (region[y, x] != BACKGROUND) & (region[y, x] != LUMEN) & (region[y, x] != FAT)
    mask = tissue_mask(image, canvas.mpp)
    assert guess_kind(image) == ("fluorescence" if stain == "if" else "brightfield")
    assert mask[::8, ::8][tissue].mean() > 0.93
    assert overlap(mask[::8, ::8], tissue) > 0.75


@pytest.fixture(scope="module")
def section(real_data):
    """A section of a spatial transcriptomics slide, with an eosin smear beside it and a dotted glass, at 8 um/px."""
    path = real_data("her2st/data/ST-imgs/C/C6/5714_HE_BT_E2.jpg")
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        image = Image.open(path)
        image.draft("RGB", (image.width // 8, image.height // 8))
        return shrunk(image, 8 / (8 * 0.69))
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def test_real_section(section):
    mask = tissue_mask(section, 8.0)
    assert 0.15 < mask.mean() < 0.19
    labels, _count = ndimage.label(mask)
    assert (labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])).sum() > 0.98 * mask.sum()
    assert not mask[:180].any(), "the dots above are no tissue"
    assert not mask[650:].any(), "the smear below is no tissue"
    assert overlap(tissue_mask(pale(section), 8.0), mask) > 0.95
    flags = quality_flags(section, 8.0, mask)
    assert flags["pen"].mean() < 1e-3
    assert flags["blur"][mask].mean() < 0.02


@pytest.mark.parametrize(
    ("name", "mpp0", "share"), [("CMU-1-Small-Region.svs", 0.499, 0.394), ("tcga-cr-7395-01a-01-ts1.svs", 0.5, 0.639)]
)
def test_real_slides(real_data, name, mpp0, share):
    image = shrunk(tifffile.imread(real_data(f"slides/{name}")), 4 / mpp0)
    mask = tissue_mask(image, 4.0)
    assert mask.mean() == pytest.approx(share, abs=0.02)
    assert overlap(tissue_mask(pale(image), 4.0), mask) > 0.93
    flags = quality_flags(image, 4.0, mask)
    assert flags["pen"].mean() < 1e-3
    assert flags["blur"][mask].mean() < 0.02
    for colour in INK:
        drawn, stroke = with_pen(image, 4.0, colour)
        found = tissue_mask(drawn, 4.0)
        assert found[stroke].mean() < 0.03, colour
        assert overlap(found, mask & ~stroke) > 0.85, colour


def test_real_fields_are_all_tissue_and_sharp(real_data):
    for path in sorted(real_data("monuseg/he").glob("*.jpg")):
        image = shrunk(Image.open(path), 8)
        mask = tissue_mask(image, 2.0)
        assert mask.mean() > 0.97, path.name
        flags = quality_flags(image, 2.0, mask)
        assert not flags["pen"].any(), path.name
        assert flags["blur"].mean() < 0.05, path.name


def test_real_fluorescence(real_data):
    image = np.moveaxis(tifffile.imread(real_data("slides/small_vectra.qptiff"), series=0), 0, -1)
    core = disc(image.shape[:2], 705, 660, 655)
    mask = tissue_mask(image, 0.5)
    assert overlap(mask, core) > 0.9
    assert tissue_mask(image[500:1100, 200:800], 0.5).all()
    assert not tissue_mask(image[:, 1450:], 0.5).any()
    flags = quality_flags(image, 0.5, mask)
    assert not flags["pen"].any()
    assert flags["blur"].mean() < 0.05
    assert overlap(tissue_mask(image.astype(np.uint16) * 200 + 300, 0.5), mask) > 0.99
