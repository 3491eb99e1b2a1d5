"""DICOM whole slide images, written here with pydicom."""

import imagecodecs
import numpy as np
import pytest

from input_pipeline.slides import dicom
from input_pipeline.slides.reader import SlideError, open_slide

pydicom = pytest.importorskip("pydicom")


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def write_dicom(path, image, series, spacing, tile=32, sparse=False, skip=()):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate

    height, width = image.shape[:2]
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    header.SOPClassUID, header.SOPInstanceUID = dicom.WHOLE_SLIDE, pydicom.uid.generate_uid()
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    header.SeriesInstanceUID, header.ImageType = series, ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED"]
    header.Rows = header.Columns = tile
    header.TotalPixelMatrixColumns, header.TotalPixelMatrixRows = width, height
    header.SamplesPerPixel, header.PhotometricInterpretation, header.PlanarConfiguration = 3, "RGB", 0
    header.BitsAllocated = header.BitsStored = 8
    header.HighBit, header.PixelRepresentation = 7, 0
    shared, measures = Dataset(), Dataset()
    measures.PixelSpacing = [spacing / 1000, spacing / 1000]
    shared.PixelMeasuresSequence = [measures]
    header.SharedFunctionalGroupsSequence = [shared]
    frames, places = [], []
    padded = np.pad(image, ((0, -height % tile), (0, -width % tile), (0, 0)))
    for y in range(0, height, tile):
        for x in range(0, width, tile):
            if (x, y) in skip:
                continue
            frames.append(imagecodecs.jpeg2k_encode(padded[y : y + tile, x : x + tile], level=0, codecformat="j2k"))
            group, place = Dataset(), Dataset()
            place.RowPositionInTotalImagePixelMatrix, place.ColumnPositionInTotalImagePixelMatrix = y + 1, x + 1
            group.PlanePositionSlideSequence = [place]
            places.append(group)
    header.NumberOfFrames = len(frames)
    header.DimensionOrganizationType = "TILED_SPARSE" if sparse else "TILED_FULL"
    if sparse:
        header.PerFrameFunctionalGroupsSequence = places
    header.PixelData = encapsulate(frames)
    header["PixelData"].is_undefined_length = True
    header.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("sparse", [False, True])
def test_dicom_levels_are_the_instances_of_a_series(tmp_path, sparse):
    image = noise(100, 130)
    write_dicom(tmp_path / "b.dcm", image[::2, ::2].copy(), "1.2.3", 1.0, sparse=sparse)
    write_dicom(tmp_path / "a.dcm", image, "1.2.3", 0.5, sparse=sparse)
    write_dicom(tmp_path / "other.dcm", image[::4, ::4].copy(), "1.2.4", 2.0)
    (tmp_path / "notes").write_text("no DICOM")
    for name in ("a.dcm", "b.dcm"):
        with open_slide(tmp_path / name) as slide:
            assert (slide.vendor, slide.mpp, slide.mpp_source) == ("dicom", 0.5, "vendor")
            assert [level.downsample for level in slide.levels] == [1, 2]
            np.testing.assert_array_equal(slide.read_native(0, 0, 0, 130, 100), image)
            np.testing.assert_array_equal(slide.read_region(0, 0, 65, 50, 1.0), image[::2, ::2])


def test_a_sparse_dicom_slide_is_white_where_no_frame_is(tmp_path):
    image = noise(96, 96)
    write_dicom(tmp_path / "a.dcm", image, "1.2.3", 0.5, sparse=True, skip={(32, 32)})
    with open_slide(tmp_path / "a.dcm") as slide:
        found = slide.read_native(0, 0, 0, 96, 96)
    assert (found[32:64, 32:64] == 255).all()
    np.testing.assert_array_equal(found[64:], image[64:])
    write_dicom(tmp_path / "a.dcm", image, "1.2.3", 0.5, skip={(32, 32)})
    with pytest.raises(SlideError, match="8 frames do not fill a grid of 3 x 3"):
        open_slide(tmp_path / "a.dcm")


def test_damaged_dicom_is_read_or_refused(tmp_path):
    path = tmp_path / "a.dcm"
    write_dicom(path, noise(64, 64), "1.2.3", 0.5, sparse=True)
    sound, rng = path.read_bytes(), np.random.default_rng(0)
    outcomes = []
    for _ in range(300):
        mutated = bytearray(sound)
        for place in rng.integers(128, 2500, rng.integers(1, 6)):
            mutated[place] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
        path.write_bytes(mutated[: rng.integers(200, len(sound))] if rng.random() < 0.3 else mutated)
        try:
            with open_slide(path, backend="tifffile") as slide:
                slide.read_native(0, 0, 0, 64, 64)
            outcomes.append("read")
        except SlideError:
            outcomes.append("refused")
    assert set(outcomes) == {"read", "refused"}


@pytest.mark.parametrize(
    ("keyword", "value", "message"),
    [
        ("ImageType", ["ORIGINAL", "PRIMARY", "LABEL", "NONE"], "LABEL.*open an instance of type VOLUME"),
        ("SOPClassUID", "1.2.840.10008.5.1.4.1.1.2", "no VL Whole Slide"),
        ("BitsStored", 7, "8 or 16 full bits, not 7 of 8"),
        ("PhotometricInterpretation", "PALETTE COLOR", "as PALETTE COLOR is not read"),
        ("TotalPixelMatrixColumns", 2**31, "frames do not fill"),
    ],
)
def test_what_is_not_read_is_refused(tmp_path, keyword, value, message):
    path = tmp_path / "a.dcm"
    write_dicom(path, noise(64, 64), "1.2.3", 0.5)
    header = pydicom.dcmread(path)
    setattr(header, keyword, value)
    header.save_as(path)
    with pytest.raises(SlideError, match=message):
        open_slide(path, backend="tifffile")


@pytest.mark.parametrize(("row", "column"), [(2, 1), (1, 34), (65, 1), (1, 33)])
def test_frames_off_the_grid_or_on_one_another_are_refused(tmp_path, row, column):
    path = tmp_path / "a.dcm"
    write_dicom(path, noise(64, 64), "1.2.3", 0.5, sparse=True)
    header = pydicom.dcmread(path)
    place = header.PerFrameFunctionalGroupsSequence[0].PlanePositionSlideSequence[0]
    place.RowPositionInTotalImagePixelMatrix, place.ColumnPositionInTotalImagePixelMatrix = row, column
    header.save_as(path)
    with pytest.raises(SlideError, match="off the grid or on another"):
        open_slide(path)
