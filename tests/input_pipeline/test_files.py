import numpy as np
import pytest
from PIL import Image

from input_pipeline import files


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def test_a_picture_is_written_in_the_format_of_its_name(tmp_path):
    files.save_picture(tmp_path / "a.png", picture())
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), picture())
    files.save_picture(tmp_path / "a.jpg", np.full((8, 8, 3), (200, 30, 90), np.uint8))
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "JPEG"
        assert np.abs(np.asarray(image)[4, 4].astype(int) - (200, 30, 90)).max() < 8


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"n": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {"n": 2})
    assert files.read_json(path, "a test") == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_document_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*a\.json \(made by a test\)"):
        files.read_json(tmp_path / "a.json", "made by a test")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="not readable"):
        files.read_json(tmp_path / "a.json", "made by a test")
