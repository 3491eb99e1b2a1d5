"""Files from outside are data: damaged or malicious ones end in SlideError, before memory or time is spent."""

import io
import os
import struct
import tracemalloc
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from input_pipeline.slides.reader import SlideError, open_slide

EXAMPLES = int(os.environ.get("MFL_FUZZ", 120))
MANY = pytest.mark.filterwarnings("ignore::ResourceWarning")


def picture(height=70, width=90, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels)).astype(np.uint8)


def tiff_bytes(**options):
    buffer = io.BytesIO()
    options = {"photometric": "rgb", "tile": (32, 32), "metadata": None} | options
    tifffile.imwrite(buffer, picture(), **options)
    return buffer.getvalue()


def svs_bytes():
    buffer, text = io.BytesIO(), "Aperio Image Library v12\r\n90x70 (32x32)|AppMag = 20|MPP = 0.5"
    with tifffile.TiffWriter(buffer) as tif:
        for step in (1, 2):
            tif.write(picture()[::step, ::step].copy(), tile=(32, 32), photometric="rgb", compression="jpeg",
                      description=text, metadata=None)  # fmt: skip
    return buffer.getvalue()


def ome_bytes():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, ome=True, bigtiff=True) as tif:
        tif.write(picture().transpose(2, 0, 1), tile=(32, 32), subifds=1, photometric="minisblack",
                  metadata={"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5})  # fmt: skip
        tif.write(picture().transpose(2, 0, 1)[:, ::2, ::2], tile=(32, 32), subfiletype=1, photometric="minisblack")
    return buffer.getvalue()


def encoded(kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, kind, **options)
    return buffer.getvalue()


SOUND = {
    "plain": tiff_bytes(),
    "zlib": tiff_bytes(compression="zlib", predictor=True),
    "lzw": tiff_bytes(compression="lzw", tile=None, rowsperstrip=11),
    "zstd": tiff_bytes(compression="zstd", bigtiff=True),
    "jpeg": tiff_bytes(compression="jpeg"),
    "jpeg 2000": tiff_bytes(compression="jpeg2000"),
    "svs": svs_bytes(),
    "ome": ome_bytes(),
    "png": encoded("PNG"),
    "jpg": encoded("JPEG"),
}


def use(path, backend="tifffile"):
    with open_slide(path, backend=backend, mpp=0.5) as slide:
        for level in range(len(slide.levels)):
            slide.read_native(level, 0, 0, 90, 70)
        slide.read_region(3.3, 4.4, 20, 20, 0.77)


def refused_or_read(path):
    message = str(path)
    try:
        use(path)
    except SlideError as error:
        message = str(error)
    assert str(path) in message


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "a.tif"


@pytest.mark.parametrize("kind", SOUND)
def test_the_sound_ones_are_read(scratch, kind):
    scratch.write_bytes(SOUND[kind])
    use(scratch)


@MANY
@pytest.mark.parametrize("kind", SOUND)
def test_mutated_bytes_are_read_or_refused(scratch, kind):
    sound = SOUND[kind]

    @settings(max_examples=EXAMPLES, deadline=5000, database=None, derandomize=EXAMPLES == 120,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def check(data):
        mutated = bytearray(sound)
        for _ in range(data.draw(st.integers(1, 6))):
            # Headers and tags lie at either end, and one wrong byte there does the most.
            place = data.draw(st.one_of(st.integers(0, 400), st.integers(-400, -1), st.integers(0, len(sound) - 1)))
            place %= len(sound)
            patch = data.draw(st.one_of(st.binary(min_size=1, max_size=1), st.sampled_from(PATCHES)))
            mutated[place : place + len(patch)] = patch
        if data.draw(st.integers(0, 3)) == 0:
            del mutated[data.draw(st.integers(0, len(mutated))) :]
        scratch.write_bytes(mutated)
        refused_or_read(scratch)

    check()


PATCHES = [
    b"\xff\xff",
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\0\0",
    b"\0\0\0\x80",
    b"\x01\0",
    b"\0" * 8,
    b"\xff" * 8,
]


@MANY
@pytest.mark.parametrize("kind", SOUND)
def test_every_truncation_is_refused_or_read(scratch, kind):
    sound = SOUND[kind]
    for end in np.linspace(0, len(sound) - 1, 40).astype(int):
        scratch.write_bytes(sound[:end])
        refused_or_read(scratch)


def test_a_truncated_slide_says_so(scratch):
    with tifffile.TiffFile(io.BytesIO(SOUND["zlib"])) as tif:
        last = max(tif.pages[0].dataoffsets)
    assert last > max(8, len(SOUND["zlib"]) // 2)
    scratch.write_bytes(SOUND["zlib"][: last + 5])
    with pytest.raises(SlideError, match="truncated"):
        use(scratch)


def tags(code, value, kind="I"):
    """SOUND['zlib'] with one tag overwritten."""
    data = bytearray(SOUND["zlib"])
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as tif:
        tag = tif.pages[0].tags[code]
        assert tag.count == 1
        offset = tag.valueoffset
        letter = {3: "H", 4: "I"}[tag.dtype]
    data[offset : offset + struct.calcsize(letter)] = struct.pack("<" + letter, value)
    return bytes(data)


@pytest.mark.parametrize("side", [10**6, 2**31])
def test_a_giant_claim_costs_nothing(scratch, tmp_path, side):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(picture(), photometric="rgb", rowsperstrip=70, metadata=None, compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tif:
        for name in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tif.pages[0].tags[name].overwrite(side, dtype="I")
    tracemalloc.start()
    with pytest.raises(SlideError, match=r"the file claims an image of \d+ x \d+ px|decodes to \d+ MiB"):
        use(tmp_path / "a.tif")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_too_few_segments_are_refused(scratch):
    scratch.write_bytes(tags(257, 30000))
    with pytest.raises(SlideError, match="needs 2814 segments; the file lists 9 offsets"):
        use(scratch)


@pytest.mark.parametrize("compression", [8, 50000, 5])
def test_a_bomb_in_a_segment_is_never_unpacked(tmp_path, compression):
    pack = {8: zlib.compress, 50000: imagecodecs.zstd_encode, 5: imagecodecs.lzw_encode}[compression]
    bomb = pack(bytes(64 << 20))
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(32, 32), tile=(32, 32), photometric="rgb", compression="zlib", metadata=None)
    data = path.read_bytes()
    path.write_bytes(data + bomb)
    with tifffile.TiffFile(path, mode="r+") as tif:
        page = tif.pages[0]
        page.tags["Compression"].overwrite(compression)
        page.tags["TileOffsets"].overwrite(len(data))
        page.tags["TileByteCounts"].overwrite(len(bomb))
    tracemalloc.start()
    refused_or_read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(bomb) + (8 << 20)


@pytest.mark.parametrize("kind", ["jpeg", "jpeg2000"])
def test_a_codestream_larger_than_its_tile_is_refused_unseen(tmp_path, kind):
    large = np.zeros((3000, 3000, 3), np.uint8)
    encode = imagecodecs.jpeg8_encode if kind == "jpeg" else imagecodecs.jpeg2k_encode
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(32, 32), tile=(32, 32), photometric="rgb", compression=kind, metadata=None)
    data, stream = path.read_bytes(), encode(large)
    path.write_bytes(data + stream)
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages[0].tags["TileOffsets"].overwrite(len(data))
        tif.pages[0].tags["TileByteCounts"].overwrite(len(stream))
    with pytest.raises(SlideError, match="3000 x 3000 px where at most 32 x 32 belong"):
        use(path)


def test_a_giant_picture_is_refused_by_its_header(tmp_path):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    body = b"IDAT" + zlib.compress(bytes(1000))
    idat = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "a.png").write_bytes(header + idat)
    with pytest.raises(SlideError, match="decodes to 28610 MiB"):
        use(tmp_path / "a.png")


def test_entities_of_ome_xml_are_not_expanded(tmp_path):
    data = ome_bytes()
    start = data.index(b"<OME")
    head = data.rindex(b"<?xml", 0, start)
    bomb = b'<?xml version="1.0"?><!DOCTYPE z [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;&a;">]>'
    end = data.index(b"</OME>") + 6
    text = (bomb + data[start:end])[: end - head]
    path = tmp_path / "a.ome.tif"
    path.write_bytes(data[:head] + text.replace(b"</OME", b"")[:-6].ljust(end - head - 6) + b"</OME>" + data[end:])
    with pytest.raises(SlideError, match="document type"):
        open_slide(path)


def test_pages_in_a_ring_end(scratch):
    data = bytearray(tiff_bytes())
    first = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, first)[0]
    struct.pack_into("<I", data, first + 2 + 12 * count, first)
    scratch.write_bytes(data)
    refused_or_read(scratch)


@pytest.mark.parametrize(
    "content", [b"", b"II", b"II*\0", b"MM\0+", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", os.urandom(500)]
)
def test_stubs_are_refused(scratch, content):
    scratch.write_bytes(content)
    for backend in ("tifffile", "auto"):
        with pytest.raises(SlideError, match=r"a\.tif"):
            use(scratch, backend)


def test_a_refused_slide_leaves_no_file_open(scratch):
    scratch.write_bytes(tags(257, 30000))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(SlideError):
            use(scratch)
    assert len(os.listdir("/proc/self/fd")) == before
