import numpy as np
import pytest

from input_pipeline.slides.qc import FLAGGED, KEPT, MAPS, OUTLINE, as_rgb, qc_picture


def picture(**changes):
    mask = np.zeros((50, 60), bool)
    mask[10:40, 10:50] = True
    arguments = {
        "thumbnail": np.full((100, 120, 3), 230, np.uint8),
        "thumbnail_mpp": 4.0,
        "mask": mask,
        "mask_mpp": 8.0,
        "coords": np.array([[200, 200], [400, 200]]),
        "mpp0": 0.5,
        "size": 160,
        "mpp": 0.5,
        "slide_id": "s1",
        "flagged": np.array([False, True]),
    }
    return qc_picture(**(arguments | changes))


def nearest(pixel, colours):
    return min(colours, key=lambda colour: np.abs(np.asarray(colour, int) - pixel).sum())


def test_outline_tiles_and_legend_are_where_they_belong():
    drawn = picture()
    assert drawn.dtype == np.uint8
    assert drawn.shape[1] >= 120
    assert drawn.shape[0] > 140
    assert tuple(drawn[20, 60]) == OUTLINE
    assert tuple(drawn[79, 40]) == OUTLINE
    assert tuple(drawn[5, 5]) == (230, 230, 230)
    for x, colour in ((25, KEPT), (50, FLAGGED)):
        assert nearest(drawn[35, x].astype(int), [KEPT, FLAGGED, (230, 230, 230)]) == colour
        assert tuple(drawn[35, x + 10]) != (230, 230, 230), "the tile is tinted"
    assert (drawn[102:] < 100).any(), "the legend says something"


def test_the_thumbnail_given_is_not_drawn_on():
    thumbnail = np.full((100, 120, 3), 230, np.uint8)
    picture(thumbnail=thumbnail)
    assert (thumbnail == 230).all()


def test_flag_maps_are_tinted():
    pen = np.zeros((50, 60), bool)
    pen[45:50] = True
    drawn = picture(flags={"pen": pen, "blur": np.zeros_like(pen)})
    mixed = 230 * 0.55 + np.asarray(MAPS["pen"]) * 0.45
    assert np.abs(drawn[95, 60] - mixed).max() <= 1
    assert (drawn[85, 60] == 230).all()


def test_no_tiles_tiny_tiles_any_name_any_channels():
    assert picture(coords=np.zeros((0, 2), np.int64), flagged=None).shape[1] >= 120
    many = np.random.default_rng(0).integers(0, 900, (5000, 2))
    picture(coords=many, flagged=None, size=4, slide_id="λ/日本 <b>")
    assert picture(thumbnail=np.random.default_rng(0).integers(0, 4000, (100, 120, 5), np.uint16)).dtype == np.uint8
    with pytest.raises(ValueError, match="1 tile flags for 2 tiles"):
        picture(flagged=np.array([True]))


def test_dark_channels_are_stretched():
    image = np.zeros((50, 50, 3), np.uint16)
    image[10:40, 10:40, 1] = 700
    shown = as_rgb(image)
    assert shown[20, 20].tolist() == [0, 255, 0]
    assert shown[0, 0].tolist() == [0, 0, 0]
