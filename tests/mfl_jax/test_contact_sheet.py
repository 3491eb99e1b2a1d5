"""`mfl views`: the first tiles of training, as they are stored and as the network sees them."""

import numpy as np
import pytest
from PIL import Image

from input_pipeline.stream import train_stream
from input_pipeline.tileset import TileSet
from mfl_jax import cli, contact_sheet
from tests.input_pipeline.tileset import samples
from tests.mfl_jax import synthetic

CELL, GAP, HEADER = contact_sheet.CELL, contact_sheet.GAP, contact_sheet.HEADER


def cell(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = HEADER + row * (CELL + GAP), GAP + column * (CELL + GAP)
    return sheet[top : top + CELL, left : left + CELL]


def enlarged(tile: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(tile).resize((CELL, CELL), Image.Resampling.NEAREST))


@pytest.fixture(name="folder")
def folder_fixture(tmp_path):
    return samples.write_set(tmp_path / "set")


@pytest.mark.usefixtures("compile_cache")
def test_rows_are_the_first_tiles_of_training_and_the_seed_chooses_them(folder, tmp_path):
    made = synthetic.tiny("two_view", "near", data__tileset=str(folder), data__batch=6)
    path = contact_sheet.of_config(made, tmp_path / "views.png", rows=3, seed=5)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (HEADER + 3 * (CELL + GAP) + GAP, 4 * (CELL + GAP) + GAP, 3)
    with train_stream(TileSet.open(folder), batch=6, seed=5, split="train", near_um=200.0) as stream:
        batch = next(iter(stream))
    for row in range(3):
        np.testing.assert_array_equal(cell(sheet, row, 0), enlarged(batch["he"][row]))
        shown = enlarged(batch["near_he"][row]) if batch["near_mask"][row] else np.full((CELL, CELL, 3), 200)
        np.testing.assert_array_equal(cell(sheet, row, 3), shown)
        assert all(cell(sheet, row, view).std() > 10 for view in (1, 2)), "a view shows nothing"
    assert made.data.batch == 6
    other = contact_sheet.of_config(made, tmp_path / "other.png", rows=3, seed=6)
    assert not np.array_equal(np.asarray(Image.open(other)), sheet)


@pytest.mark.usefixtures("compile_cache")
def test_small_crops_stand_beside_the_large_ones(folder, tmp_path):
    made = synthetic.tiny("dino", data__tileset=str(folder), data__batch=6)
    sheet = np.asarray(Image.open(contact_sheet.of_config(made, tmp_path / "views.png", rows=2)))
    assert sheet.shape[1] == 5 * (CELL + GAP) + GAP  # stored, two large, two small
    for row in range(2):
        for column, pixels in enumerate((None, 16, 16, 8, 8)):
            found = cell(sheet, row, column)
            assert found.std() > 10
            if pixels:  # enlarged without smoothing
                step = CELL // pixels
                np.testing.assert_array_equal(found, found[::step, ::step].repeat(step, 0).repeat(step, 1))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out", "views.jpg"], "a contact sheet is a .png, not 'views.jpg'"),
        (["--rows", "0"], "at least one row, not 0"),
        ([], "nowhere"),
    ],
)
def test_a_wrong_request_is_one_line(more, message, capsys):
    config = f"{synthetic.CONFIGS / 'mfl.py'}:tiny,data.tileset=nowhere"
    assert cli.main(["views", "--config", config, *more]) == 2
    assert message in capsys.readouterr().err
