"""Registration against the truth of the phantom, and its gate against partners that do not belong."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import tifffile

from input_pipeline.phantom import write_cohort
from input_pipeline.slides import register as module
from input_pipeline.slides.reader import Slide, open_slide
from input_pipeline.slides.register import Registration, overlay_picture, register
from input_pipeline.slides.register_fit import compose
from input_pipeline.slides.register_flow import Tissue, view
from input_pipeline.slides.transform import Transform


def mpp_of(slide: Slide) -> float:
    assert slide.mpp is not None
    return slide.mpp


class Pair:
    """An H&E slide of the phantom, a partner, the truth, and where cells lie."""

    def __init__(self, root, slide_id, name):
        suffix = {"if": ".ome.tif", "ihc": ".svs"}[name]
        self.he = open_slide(root / "he" / f"{slide_id}.svs")
        self.partner = open_slide(root / name / f"{slide_id}{suffix}")
        self.truth = Transform.load(root / name / f"{slide_id}_{name}.truth.json")
        with open(root / "truth" / f"{slide_id}_cells.csv") as file:
            self.cells = np.array([[float(row["x_um"]), float(row["y_um"])] for row in csv.DictReader(file)])

    def errors(self, found: Registration) -> np.ndarray:
        return np.linalg.norm(found.transform(self.cells) - self.truth(self.cells), axis=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs")
    write_cohort(out, cases=2, size=1536, seed=8, partners=("if", "ihc"), progress=False)
    return out


@pytest.fixture(scope="module")
def if_pair(root):
    return Pair(root, "case0000-1", "if")


@pytest.fixture(scope="module")
def ihc_pair(root):
    return Pair(root, "case0000-1", "ihc")


@pytest.fixture(scope="module")
def registered(if_pair):
    return register(if_pair.he, if_pair.partner)


def test_fluorescence_is_found_to_two_um(if_pair, registered):
    error = if_pair.errors(registered)
    assert registered.passed, registered.reason
    assert np.median(error) <= 2
    assert np.percentile(error, 95) <= 5
    assert registered.channel == 0
    assert not registered.mirrored
    assert 0 < registered.score <= 1
    assert registered.agreement > 0.9
    assert registered.error_um <= 2


def test_a_mirrored_ihc_partner_is_found_to_two_um(tmp_path, ihc_pair):
    pixels = ihc_pair.partner.read_native(0, 0, 0, ihc_pair.partner.width, ihc_pair.partner.height)[:, ::-1]
    tifffile.imwrite(tmp_path / "mirror.tif", pixels, photometric="rgb", tile=(256, 256))
    with open_slide(tmp_path / "mirror.tif", mpp=ihc_pair.partner.mpp) as partner:
        found = register(ihc_pair.he, partner)
    right = np.array([partner.width * mpp_of(partner), 0.0]) + ihc_pair.truth(ihc_pair.cells) * (-1, 1)
    error = np.linalg.norm(found.transform(ihc_pair.cells) - right, axis=1)
    assert found.passed, found.reason
    assert found.mirrored, found.reason
    assert np.median(error) <= 2
    assert np.percentile(error, 95) <= 5


def test_half_of_a_partner_is_enough(tmp_path, if_pair):
    slide = if_pair.partner
    pixels = slide.read_native(0, 0, 0, slide.width * 6 // 10, slide.height)
    tifffile.imwrite(
        tmp_path / "half.ome.tif",
        np.moveaxis(pixels, -1, 0),
        photometric="minisblack",
        tile=(256, 256),
        metadata={"axes": "CYX"},
    )
    with open_slide(tmp_path / "half.ome.tif", mpp=slide.mpp) as partner:
        found = register(if_pair.he, partner, channel=0)
    there = if_pair.truth(if_pair.cells)[:, 0] < partner.width * mpp_of(partner) - 50
    error = if_pair.errors(found)[there]
    assert found.passed, found.reason
    assert np.median(error) <= 2
    assert np.percentile(error, 95) <= 5


@pytest.mark.parametrize("level", module.LEVELS)
def test_the_partner_of_another_slide_is_rejected(root, if_pair, level):
    foreign = Pair(root, "case0001-1", "if").partner
    found = register(if_pair.he, foreign, level=level)
    assert not found.passed
    assert "another tissue" in found.reason
    assert "unseen patches agree" in found.reason
    assert found.agreement < 0.3


def test_unnamed_channels_are_tried_and_the_nuclear_one_is_found(tmp_path, if_pair):
    slide = if_pair.partner
    pixels = slide.read_native(0, 0, 0, slide.width, slide.height)[..., [1, 0]]
    tifffile.imwrite(
        tmp_path / "unnamed.tif",
        np.moveaxis(pixels, -1, 0),
        photometric="minisblack",
        tile=(256, 256),
        metadata={"axes": "CYX"},
    )
    with open_slide(tmp_path / "unnamed.tif", mpp=slide.mpp) as partner:
        found = register(if_pair.he, partner, level="affine")
    assert found.channel == 1, found.reason
    assert found.passed, found.reason


@pytest.mark.parametrize("level", ["coarse", "affine"])
def test_lower_levels_stop_there_and_know_their_error(if_pair, level):
    found = register(if_pair.he, if_pair.partner, level=level)
    assert found.passed, found.reason
    assert found.transform.displacement is None, found.reason
    assert {s["stage"] for s in found.stages} == {"coarse", "check"} | ({"affine"} if level == "affine" else set())
    error = np.median(if_pair.errors(found))
    assert error <= module.ALLOWED_UM[level]
    assert found.error_um == pytest.approx(error, abs=4)


def test_the_same_slides_and_seed_give_the_same_numbers(if_pair):
    first, second = (register(if_pair.he, if_pair.partner, level="affine", seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.transform.matrix, second.transform.matrix)
    assert first.error_um == second.error_um
    assert first.score == second.score


def test_the_check_measures_an_error_that_was_put_in(if_pair):
    he, partner = view(if_pair.he, None, "he"), view(if_pair.partner, 0, "partner")
    tissue = Tissue(np.ones((96, 96), bool), he.extent[0] / 96, he.extent)
    job = module._Job(he, partner, tissue, 1.0, 0, [])
    for shift in ((0.0, 0.0), (6.0, -8.0)):
        off = Transform(compose(np.column_stack([np.eye(2), shift]), if_pair.truth.matrix), if_pair.truth.displacement)
        flow, _ = job.check(off, 1.0, 5.0)
        assert np.median(flow.distance) * abs(np.linalg.det(off.matrix[:, :2])) ** 0.5 == pytest.approx(
            np.hypot(*shift), abs=0.6
        )


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"distance": 0.5, "patches": 7}, "fewer than 8"),
        ({"distance": 9.0, "patches": 50}, "less than 50% agree"),
        ({"distance": 0.5, "patches": 50}, None),
        ({"distance": 3.0, "patches": 50, "allowed": 2.0}, "above 2 um"),
    ],
)
def test_the_gate_names_what_it_measured(registered, change, word):
    count = change["patches"]
    shifts = np.tile([change["distance"], 0.0], (count, 1))
    flow = module.Flow(np.zeros((count, 2)), shifts, np.full(count, 0.9), np.full(count, 0.8))
    first = module.Coarse(np.eye(2, 3), 0.9, False)
    found = module._judge(Transform.identity(), flow, 4.0, change.get("allowed", 5.0), first, None, ())
    assert found.passed == (word is None)
    assert f"of {count} unseen patches" in found.reason
    assert word is None or word in found.reason


def test_blank_slides_are_rejected_with_a_reason(tmp_path, if_pair):
    tifffile.imwrite(tmp_path / "blank.tif", np.zeros((900, 900), np.uint16))
    tifffile.imwrite(tmp_path / "white.tif", np.full((900, 900, 3), 245, np.uint8), photometric="rgb")
    with open_slide(tmp_path / "blank.tif", mpp=0.5) as blank, open_slide(tmp_path / "white.tif", mpp=0.5) as white:
        for he, partner in ((if_pair.he, blank), (white, if_pair.partner), (white, blank)):
            found = register(he, partner)
            assert not found.passed
            assert "fewer than 8 patches" in found.reason


def test_what_cannot_be_registered_is_refused(tmp_path, if_pair):
    with pytest.raises(ValueError, match="coarse, affine, bspline"):
        register(if_pair.he, if_pair.partner, level="rigid")
    with pytest.raises(ValueError, match="allowed: 0 to"):
        register(if_pair.he, if_pair.partner, channel=9)
    tifffile.imwrite(tmp_path / "no_mpp.tif", np.zeros((64, 64, 3), np.uint8), photometric="rgb")
    with open_slide(tmp_path / "no_mpp.tif") as slide, pytest.raises(ValueError, match="--default-mpp"):
        register(if_pair.he, slide)


def test_the_overlay_is_grey_after_and_coloured_before(if_pair, registered):
    picture = overlay_picture(if_pair.he, if_pair.partner, registered.transform, size=256).astype(int)
    assert picture.dtype == int
    assert picture.shape[2] == 3
    colour = np.abs(picture[..., 0] - picture[..., 1])
    before, after = colour[:256, :250].mean(), colour[:256, 270:520].mean()
    assert after < 0.6 * before


def test_the_result_survives_its_file(tmp_path, if_pair, registered):
    registered.transform.save(tmp_path / "t.json")
    loaded = module.load_transform(tmp_path / "t.json")
    np.testing.assert_allclose(loaded(if_pair.cells), registered.transform(if_pair.cells), atol=1e-3)
    assert loaded.info["error_um"] == registered.error_um
    assert replace(registered, transform=loaded).transform.info["stages"][0]["stage"] == "coarse"


@pytest.mark.slow
def test_serial_sections_are_placed_or_rejected_never_taken_on_trust(real_data):
    he, partner = (
        open_slide(real_data(f"her2st/data/ST-imgs/C/{n}/5714_HE_BT_{m}.jpg"), mpp=0.67)
        for n, m in (("C2", "C2"), ("C3", "D1"))
    )
    found = register(he, partner)
    assert found.passed == (found.agreement >= 0.5 and found.error_um <= 5)
    assert f"{found.patches} unseen patches" in found.reason


@pytest.mark.slow
@pytest.mark.parametrize("size", [2048, 4096])  # the smaller, the shorter the waves of the same deformation
def test_twenty_pairs(tmp_path, size):
    write_cohort(tmp_path, cases=7, size=size, seed=3, partners=("if", "ihc"), progress=False)
    slides = sorted(p.stem for p in (tmp_path / "he").iterdir())[:10]
    assert len(slides) == 10
    for slide_id in slides:
        for name in ("if", "ihc"):
            pair = Pair(tmp_path, slide_id, name)
            found = register(pair.he, pair.partner)
            error = pair.errors(found)
            assert found.passed, (slide_id, name, found.reason)
            assert np.median(error) <= 2, (slide_id, name)
            assert np.percentile(error, 95) <= 5, (slide_id, name)
