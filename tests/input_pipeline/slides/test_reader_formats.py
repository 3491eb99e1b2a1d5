"""Codecs, layouts and vendors, each against the pixels that went in or another project's decoder."""

import struct

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from input_pipeline.slides.reader import SlideError, open_slide

CM = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
APERIO = "Aperio Image Library v12\r\n{} (64x64) JPEG/RGB Q=70|AppMag = 20|MPP = 0.4990"


def smooth(height, width, channels=3, dtype=np.uint8, seed=0):
    """Random, but kind to lossy codecs."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 16 + 2, width // 16 + 2, channels)).astype(np.uint8)
    planes = [Image.fromarray(small[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)]
    pixels = np.stack([np.asarray(plane) for plane in planes], axis=-1)
    pixels = pixels if dtype == np.uint8 else (pixels.astype(np.float64) * 200).astype(dtype)
    return pixels if channels > 1 else pixels[..., 0]


def raw_tiff(tags, strips):
    """A TIFF by hand, for what no writer writes; all tags are SHORT, or LONG for offsets and lengths."""
    offsets = [8 + sum(len(strip) for strip in strips[:i]) for i in range(len(strips))]
    tags = dict(sorted((tags | {273: tuple(offsets), 279: tuple(map(len, strips))}).items()))
    start = 8 + sum(map(len, strips))
    extra, entries, after = b"", b"", start + 2 + 12 * len(tags) + 4
    for code, value in tags.items():
        values = value if isinstance(value, tuple) else (value,)
        kind, letter = (4, "I") if code in (273, 279) else (3, "H")
        data = struct.pack(f"<{len(values)}{letter}", *values)
        if len(data) > 4:
            data, extra = struct.pack("<I", after + len(extra)), extra + data
        entries += struct.pack("<HHI", code, kind, len(values)) + data.ljust(4, b"\0")
    head = struct.pack("<2sHI", b"II", 42, start) + b"".join(strips)
    return head + struct.pack("<H", len(tags)) + entries + b"\0" * 4 + extra


def pillow(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def whole(path, **options):
    with open_slide(path, **options) as slide:
        return slide.read_native(0, 0, 0, slide.width, slide.height)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("layout", [{"tile": (64, 48)}, {"rowsperstrip": 7}, {"rowsperstrip": 1000}])
@pytest.mark.parametrize(
    "compression", [{}, {"compression": "zlib", "predictor": True}, {"compression": "lzw"}, {"compression": "zstd"}]
)
def test_lossless(tmp_path, dtype, layout, compression):
    image = smooth(150, 170, 1, dtype)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack", metadata=None, **layout, **compression)
    found = whole(tmp_path / "a.tif")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found[..., 0], image)


@pytest.mark.parametrize("options", [{"bigtiff": True}, {"byteorder": ">"}, {"planarconfig": "separate"}])
def test_containers(tmp_path, options):
    image = smooth(150, 170, 3, np.uint16)
    data = image.transpose(2, 0, 1) if "planarconfig" in options else image
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="rgb", tile=(64, 64), metadata=None, **options)
    found = whole(tmp_path / "a.tif")
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, image)


@pytest.mark.parametrize("layout", [{"tile": (64, 64)}, {"rowsperstrip": 16}])
@pytest.mark.parametrize("subsampling", [(1, 1), (2, 2), (2, 1)])
def test_jpeg_is_what_tifffile_reads(tmp_path, layout, subsampling):
    image, path = smooth(150, 170), tmp_path / "a.tif"
    tifffile.imwrite(
        path, image, photometric="rgb", compression="jpeg", subsampling=subsampling, metadata=None, **layout
    )
    found = whole(path)
    np.testing.assert_array_equal(found, tifffile.imread(path))
    assert np.abs(found.astype(int) - image).mean() < 3
    assert np.abs(found.astype(int) - pillow(path)).mean() < 1


@pytest.mark.parametrize("code", [33003, 33005, 34712])
def test_jpeg_2000(tmp_path, code):
    image, path = smooth(128, 128), tmp_path / "a.tif"
    stored = np.asarray(Image.fromarray(image).convert("YCbCr")) if code == 33003 else image
    tifffile.imwrite(path, stored, photometric="rgb", compression=34712, tile=(64, 64), metadata=None)
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages[0].tags["Compression"].overwrite(code)
    difference = np.abs(whole(path).astype(int) - image)
    assert difference.max() <= (3 if code == 33003 else 0)
    assert difference.mean() < 1


@pytest.mark.parametrize("compression", [1, 5, 8])
@pytest.mark.parametrize("subsampling", [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_subsampled_ycbcr_is_what_libtiff_reads(tmp_path, compression, subsampling):
    across, down = subsampling
    height, width, rows = 45, 38, 16
    blocks_high, blocks_wide = -(-rows // down), -(-width // across)
    units = np.random.default_rng(0).integers(60, 190, (3, blocks_high, blocks_wide, across * down + 2), np.uint8)
    short = -(-(height - 2 * rows) // down)
    blocks = [block.tobytes() for block in (units[0], units[1], units[2, :short])]
    tags = {256: width, 257: height, 258: (8, 8, 8), 262: 6, 277: 3, 278: rows, 530: subsampling}
    encode = {1: bytes, 5: imagecodecs.lzw_encode, 8: imagecodecs.zlib_encode}
    for name, code in (("ours.tif", compression), ("theirs.tif", 5)):  # Pillow asks libtiff for compressed files alone
        (tmp_path / name).write_bytes(raw_tiff(tags | {259: code}, [encode[code](block) for block in blocks]))
    found, expected = whole(tmp_path / "ours.tif").astype(int), pillow(tmp_path / "theirs.tif")
    assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_stands_upright(tmp_path, orientation):
    image, path = smooth(90, 130, 1), tmp_path / "a.tif"
    tag = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(path, image, tile=(32, 48), photometric="minisblack", metadata=None, extratags=tag)
    expected = pillow(path)
    with open_slide(path) as slide:
        assert (slide.height, slide.width) == expected.shape
        np.testing.assert_array_equal(slide.read_native(0, 0, 0, slide.width, slide.height)[..., 0], expected)
        np.testing.assert_array_equal(slide.read_native(0, 11, 7, 70, 60)[..., 0], expected[7:67, 11:81])
        assert len(slide.notes) == int(orientation > 1)


def write_svs(path, image, factors=(4,)):
    size = f"{image.shape[1]}x{image.shape[0]}"
    jpeg = {"photometric": "rgb", "compression": "jpeg", "metadata": None}
    with tifffile.TiffWriter(path) as tif:
        tif.write(image, tile=(64, 64), description=APERIO.format(size), **jpeg)
        thumbnail = image[::5, ::5].copy()
        tif.write(thumbnail, rowsperstrip=16, description=APERIO.format(size + " -> thumbnail"), **jpeg)
        for factor in factors:
            level = image[: image.shape[0] // factor * factor : factor, : image.shape[1] // factor * factor : factor]
            tif.write(level.copy(), tile=(64, 64), description=APERIO.format(size + " -> level"), **jpeg)
        for name, kind in (("label", 1), ("macro", 9)):
            text = f"Aperio Image Library v12\r\n{name} 40x30"
            tif.write(smooth(30, 40), rowsperstrip=30, subfiletype=kind, description=text, **jpeg)


def test_svs_levels_are_levels_and_pictures_are_pictures(tmp_path):
    image, path = smooth(642, 803), tmp_path / "a.svs"
    write_svs(path, image, (4, 16))
    with open_slide(path) as slide:
        assert (slide.vendor, slide.mpp, slide.mpp_source) == ("aperio", 0.499, "vendor")
        assert [(level.width, level.height, level.downsample) for level in slide.levels] == [
            (803, 642, 1.0), (200, 160, 4.0), (50, 40, 16.0),
        ]  # fmt: skip
        assert slide.associated == ("thumbnail", "label", "macro")
        assert slide.read_associated("macro").shape == (30, 40, 3)
        assert slide.read_associated("thumbnail").shape == (129, 161, 3)
        with pytest.raises(SlideError, match="thumbnail, label, macro, not 'barcode'"):
            slide.read_associated("barcode")


def test_openslide_reads_the_same_svs(tmp_path):
    openslide = pytest.importorskip("openslide")
    image, path = smooth(642, 803), tmp_path / "a.svs"
    write_svs(path, image, (4,))
    with open_slide(path) as ours, openslide.OpenSlide(path) as theirs, open_slide(path, backend="openslide") as both:
        assert float(theirs.properties["openslide.mpp-x"]) == ours.mpp == both.mpp
        assert theirs.level_dimensions == tuple((level.width, level.height) for level in ours.levels)
        for level, place in ((0, (100, 64, 130, 70)), (1, (0, 0, 200, 160))):
            x, y, width, height = place
            region = np.asarray(theirs.read_region((x, y), level, (width, height)))[..., :3].astype(int)
            assert np.abs(ours.read_native(level, x, y, width, height) - region).mean() < 1
            np.testing.assert_array_equal(both.read_native(level, x, y, width, height), region)
        assert both.mpp_source == "vendor"
        outside = both.read_region(-50, -50, 40, 40, 0.499)
        assert (outside == 255).all()


def ome(path, levels, axes="CYX", **metadata):
    metadata = {"axes": axes, "PhysicalSizeX": 0.65, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.65,
                "PhysicalSizeYUnit": "µm"} | metadata  # fmt: skip
    options = {"tile": (64, 64), "compression": "zlib", "photometric": "rgb" if axes == "YXS" else "minisblack"}
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as tif:
        tif.write(levels[0], subifds=len(levels) - 1, metadata=metadata, **options)
        for level in levels[1:]:
            tif.write(level, subfiletype=1, **options)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_ome_pyramid_of_channels(tmp_path, dtype):
    full = np.stack([smooth(200, 300, 1, dtype, seed) for seed in range(4)])
    names = ["DAPI", "CD3", "CD8", "panCK"]
    ome(tmp_path / "a.ome.tif", [full, full[:, ::2, ::2], full[:, ::4, ::4]], Channel={"Name": names})
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert (slide.vendor, slide.channels, slide.channel_names) == ("ome", 4, tuple(names))
        assert (slide.mpp, slide.mpp_source, slide.dtype, slide.is_rgb) == (0.65, "ome", dtype, False)
        assert [level.downsample for level in slide.levels] == [1, 2, 4]
        for i, step in enumerate((1, 2, 4)):
            level = full[:, ::step, ::step].transpose(1, 2, 0)
            np.testing.assert_array_equal(slide.read_native(i, 3, 5, 40, 30), level[5:35, 3:43])
        found = slide.read_region(10, 10, 64, 64, 1.0)
    assert (found.shape, found.dtype) == ((64, 64, 4), dtype)


def test_ome_rgb(tmp_path):
    image = smooth(200, 300)
    ome(tmp_path / "a.ome.tif", [image, image[::2, ::2]], "YXS")
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert slide.is_rgb
        assert len(slide.levels) == 2
        np.testing.assert_array_equal(slide.read_native(0, 0, 0, 300, 200), image)
        assert (slide.read_native(0, 290, 190, 20, 20)[10:] == 255).all()


def test_a_focal_plane_is_chosen_and_said(tmp_path):
    stack = np.stack([[smooth(70, 80, 1, seed=10 * c + z) for z in range(5)] for c in range(2)])
    ome(tmp_path / "a.ome.tif", [stack], "CZYX")
    for z, plane in ((None, 2), (0, 0), (4, 4)):
        with open_slide(tmp_path / "a.ome.tif", z=z) as slide:
            np.testing.assert_array_equal(slide.read_native(0, 0, 0, 80, 70), stack[:, plane].transpose(1, 2, 0))
            assert ("focal plane 2 of 0-4" in " ".join(slide.notes)) == (z is None)
    with pytest.raises(SlideError, match="from 0 to 4, not 5"):
        open_slide(tmp_path / "a.ome.tif", z=5)
    tifffile.imwrite(tmp_path / "flat.tif", stack[0, 0], metadata=None)
    with pytest.raises(SlideError, match="no stack"):
        open_slide(tmp_path / "flat.tif", z=1)


def test_what_tifffile_writes_by_itself(tmp_path):
    stack = np.stack([smooth(70, 80, 1, np.uint16, seed) for seed in range(4)])
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack")
    np.testing.assert_array_equal(whole(tmp_path / "a.tif"), stack.transpose(1, 2, 0))


def test_imagej_says_its_unit(tmp_path):
    stack = np.stack([smooth(70, 80, 1, np.uint16, seed) for seed in range(2)])
    options = {"imagej": True, "resolution": (4.0, 4.0), "metadata": {"unit": "um", "axes": "CYX"}}
    tifffile.imwrite(tmp_path / "a.tif", stack, **options)
    with open_slide(tmp_path / "a.tif") as slide:
        assert (slide.mpp, slide.mpp_source) == (0.25, "comment")
        np.testing.assert_array_equal(slide.read_native(0, 0, 0, 80, 70), stack.transpose(1, 2, 0))


def test_time_is_refused(tmp_path):
    ome(tmp_path / "a.ome.tif", [np.stack([smooth(70, 80, 1)] * 3)], "TYX")
    with pytest.raises(SlideError, match="3 images along axis 'T'"):
        open_slide(tmp_path / "a.ome.tif")


def test_a_missing_file_of_a_multi_file_ome_tiff_is_refused(tmp_path):
    path = tmp_path / "a.ome.tif"
    ome(path, [np.stack([smooth(70, 80, 1)] * 2)])
    data = path.read_bytes()
    assert b'SizeC="2"' in data
    path.write_bytes(data.replace(b'SizeC="2"', b'SizeC="3"'))
    with pytest.raises(SlideError, match=r"other files|need"):
        open_slide(path)


def test_an_unflagged_pyramid_of_pages_is_a_pyramid(tmp_path):
    image = smooth(300, 400)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        for step in (1, 2, 4):
            tif.write(image[::step, ::step].copy(), tile=(64, 64), photometric="rgb", metadata=None)
        tif.write(smooth(100, 30), tile=(64, 64), photometric="rgb", metadata=None)
    with open_slide(tmp_path / "a.tif") as slide:
        assert [level.downsample for level in slide.levels] == [1, 2, 4]


def test_a_tile_that_the_file_leaves_out_is_background(tmp_path):
    image = smooth(128, 128)
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(64, 64), photometric="rgb", compression="zlib", metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tif:
        counts = list(tif.pages[0].databytecounts)
        tif.pages[0].tags["TileByteCounts"].overwrite([0, *counts[1:]])
    found = whole(tmp_path / "a.tif")
    assert (found[:64, :64] == 255).all()
    np.testing.assert_array_equal(found[64:], image[64:])


def test_transparency_lies_on_white(tmp_path):
    image = np.dstack([smooth(64, 64), np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))])
    white = Image.new("RGBA", (64, 64), "white")
    expected = np.asarray(Image.alpha_composite(white, Image.fromarray(image)).convert("RGB")).astype(int)
    multiplied = image.copy()
    multiplied[..., :3] = np.rint(image[..., :3] * (image[..., 3:] / 255.0))
    options = {"tile": (32, 32), "photometric": "rgb", "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", image, extrasamples=["unassalpha"], **options)
    tifffile.imwrite(tmp_path / "b.tif", multiplied, extrasamples=["assocalpha"], **options)
    tifffile.imwrite(tmp_path / "c.tif", image, extrasamples=["unspecified"], **options)
    with pytest.raises(SlideError, match=r"4 samples per pixel \(extra samples \(0,\)\)"):
        open_slide(tmp_path / "c.tif")
    Image.fromarray(image).save(tmp_path / "a.png")
    for name in ("a.tif", "b.tif", "a.png"):
        assert np.abs(whole(tmp_path / name).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "grey.png", "grey.jpg", "deep.png", "turned.jpg"])
def test_pictures(tmp_path, name):
    deep, grey = "deep" in name, "grey" in name
    image, path = smooth(150, 170, 1 if grey or deep else 3, np.uint16 if deep else np.uint8), tmp_path / name
    exif = Image.Exif()
    exif[274] = 6 if "turned" in name else 1
    Image.fromarray(image).save(path, **({"exif": exif} if name == "turned.jpg" else {}))
    with Image.open(path) as picture:
        expected = np.asarray(picture.transpose(Image.Transpose.ROTATE_270) if "turned" in name else picture)
    with open_slide(path, mpp=0.25) as slide:
        assert (slide.vendor, slide.mpp_source, slide.is_rgb) == ("image", "user", not (grey or deep))
        found = slide.read_region(0, 0, slide.width, slide.height, 0.25)
    np.testing.assert_array_equal(found.squeeze(), expected)


def test_a_picture_is_decoded_once_even_when_it_exceeds_the_cache(tmp_path):
    Image.fromarray(smooth(400, 400)).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", cache_bytes=1000) as slide:
        slide.read_native(0, 0, 0, 10, 10)
        decode = slide.timings["decode"]
        slide.read_native(0, 200, 200, 10, 10)
        assert slide.timings["decode"] == decode


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}, "photometric interpretation 3"),
        ({"photometric": "miniswhite"}, "photometric interpretation 0"),
        ({"photometric": "minisblack", "compression": "lzma"}, "TIFF compression 34925"),
    ],
)
def test_what_is_not_read_is_refused(tmp_path, options, message):
    tifffile.imwrite(tmp_path / "a.tif", smooth(64, 64, 1), metadata=None, **options)
    with pytest.raises(SlideError, match=message):
        open_slide(tmp_path / "a.tif", backend="tifffile")


def test_a_palette_picture_is_refused(tmp_path):
    Image.fromarray(smooth(20, 20)).quantize(8).save(tmp_path / "a.png")
    with pytest.raises(SlideError, match="mode P is not read: convert it"):
        open_slide(tmp_path / "a.png")


def test_missing_extras_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.mrxs").write_bytes(b"x" * 200)
    monkeypatch.setitem(__import__("sys").modules, "openslide", None)
    with pytest.raises(SlideError, match=r"MIRAX.*pip install -e '.\[openslide\]'"):
        open_slide(tmp_path / "a.mrxs")
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    (tmp_path / "a.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 50)
    with pytest.raises(SlideError, match=r"pip install -e '.\[dicom\]'"):
        open_slide(tmp_path / "a.dcm")
