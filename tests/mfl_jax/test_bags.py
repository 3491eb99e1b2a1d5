"""Bags read back from every layout, as those tools write them, and refusals of what is no bag."""

import h5py
import numpy as np
import pytest

from mfl_jax import bags, store
from mfl_jax.bags import BagError
from mfl_jax.evaluators.embed import Embedded

LENGTHS = {"a": 5, "b": 1, "c": 0}


def features_of(slide, dtype=np.float32):
    draw = np.random.default_rng(ord(slide))
    return draw.standard_normal((LENGTHS[slide], 4)).astype(dtype), draw.permutation(40)[: 2 * LENGTHS[slide]].reshape(
        -1, 2
    ) * 448


def ours(path, slide):
    x, xy = features_of(slide, np.float16)
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=x, chunks=(1024, 4), maxshape=(None, 4))
        file["coords"] = xy.astype(np.int64)
        file.attrs.update({"slide_id": slide, "case_id": "k", "patch_size_level0": 448, "mpp_level0": 0.25})


def clam(path, slide):
    x, xy = features_of(slide)
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = x, xy.astype(np.int32)


def trident(path, slide):
    x, xy = features_of(slide)
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = x, xy.astype(np.int64)
        file["coords"].attrs.update({"patch_size": 224, "patch_size_level0": 448, "level0_magnification": 40})


def stamp(path, slide):
    x, xy = features_of(slide, np.float16)
    with h5py.File(path, "w") as file:
        file["feats"], file["coords"] = x, (xy * 0.25).astype(np.float32)
        file.attrs.update({"extractor": "e", "unit": "um", "tile_size_um": 112.0, "tile_size_px": 224})


def table_of(folder, text="slide_id,case_id,label\na,p,x\nb,p,y\nc,q,x\n"):
    (folder / "slides.csv").write_text(text)
    return folder / "slides.csv"


@pytest.mark.parametrize(
    ("write", "inner", "mpp", "side"),
    [
        (ours, "", None, 448),
        (clam, "h5_files", None, None),
        (trident, "20x/features_e", None, 448),
        (stamp, "", 0.25, 448),
    ],
)
def test_every_layout_gives_the_same_bags(write, inner, mpp, side, tmp_path):
    (tmp_path / inner).mkdir(parents=True, exist_ok=True)
    for slide in LENGTHS:
        write(tmp_path / inner / f"{slide}.h5", slide)
    found = bags.read_folder(tmp_path, bags.read_table(table_of(tmp_path)), mpp=mpp)
    assert found.slides == ("a", "b", "c")
    assert found.cases == ("p", "p", "q")
    assert found.lengths.tolist() == [5, 1, 0]
    for i, slide in enumerate(LENGTHS):
        x, xy = features_of(slide, np.float16 if write in (ours, stamp) else np.float32)
        assert np.array_equal(found.features[found.rows(i)], x)
        np.testing.assert_allclose(found.coords[found.rows(i)], xy, atol=1e-9)
    if side:
        assert found.tile[0] == side
    assert "2 slides have no tile or one" in found.notes[0]


@pytest.mark.parametrize("name", ["ours", "clam", "trident", "stamp"])
def test_what_mfl_extract_writes_in_any_layout_is_read_back(name, tmp_path):
    layout = store.Layout(name, tmp_path, store.DTYPES[name][0], "encoder", "0" * 64)
    for slide in LENGTHS:
        x, xy = features_of(slide, np.float16)
        sheet = store.Sheet(slide, "p", xy.astype(np.int64), 0.25, "vendor", 224, 0.5, 0, (40_000, 40_000))
        with store.writer(layout, sheet, 4, "key") as data:
            data[:] = x
    found = bags.read_folder(tmp_path, bags.read_table(table_of(tmp_path)))
    for i, slide in enumerate(LENGTHS):
        x, xy = features_of(slide, np.float16)
        assert np.array_equal(found.features[found.rows(i)], x)
        np.testing.assert_allclose(found.coords[found.rows(i)], xy, atol=0.01)
    assert found.tile[0] == pytest.approx(448)


def test_clam_says_no_side_and_it_is_the_commonest_step(tmp_path):
    """Two pieces of tissue, whose grids are 7 px apart, and a gap in one of them."""
    places = [[0, 0], [450, 0], [1350, 0], [0, 450], [450, 450], [457, 2000], [907, 2000], [907, 2450]]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"], file["coords"] = np.ones((len(places), 2), np.float32), np.array(places)
    assert bags.read_bag(tmp_path / "a.h5")[2] == 450


def test_trident_without_the_side_at_level_0_gives_it_by_magnifications(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"], file["coords"] = np.ones((2, 2), np.float32), np.array([[0, 0], [256, 0]])
        about = {"patch_size": 224, "level0_magnification": 40, "target_magnification": 20, "overlap": 96}
        file["coords"].attrs.update(about)
    assert bags.read_bag(tmp_path / "a.h5")[2] == 448


def test_um_stay_um_where_no_scale_is_known(tmp_path):
    stamp(tmp_path / "a.h5", "a")
    _, coords, side = bags.read_bag(tmp_path / "a.h5")
    np.testing.assert_allclose(coords, features_of("a")[1] * 0.25)
    assert np.isnan(side)


def test_tiles_of_a_set_are_grouped_and_slides_without_any_kept():
    columns = {
        "slide": np.array(["b", "a", "b"]),
        "case": np.array(["q", "p", "q"]),
        "x": np.arange(3),
        "y": np.zeros(3),
    }
    found = bags.from_embedded(Embedded({"he": np.arange(6.0).reshape(3, 2)}, np.arange(3), columns), slides={"c": "r"})
    assert (found.slides, found.cases) == (("a", "b", "c"), ("p", "q", "r"))
    assert found.features.tolist() == [[2, 3], [0, 1], [4, 5]]
    assert found.coords[:, 0].tolist() == [1, 0, 2]
    assert found.offsets.tolist() == [0, 1, 3, 3]


def test_bags_follow_the_order_of_the_table(tmp_path):
    columns = {"slide": np.array(["b", "a", "b"]), "case": np.array(["q", "p", "q"])}
    given = bags.from_embedded(Embedded({"he": np.arange(6.0).reshape(3, 2)}, np.arange(3), columns))
    table = bags.read_table(table_of(tmp_path, "slide_id,case_id,label\nb,q,1\na,p,0\n"))
    found = bags.with_cases(given, table)
    assert found.slides == ("b", "a")
    assert found.features.tolist() == [[0, 1], [4, 5], [2, 3]]
    with pytest.raises(BagError, match="1 slides of the table have no bag: z"):
        bags.with_cases(given, bags.read_table(table_of(tmp_path, "slide_id,case_id,label\nb,q,1\nz,p,0\n")))


def test_classes_are_sorted_as_numbers_where_they_are(tmp_path):
    table = bags.read_table(table_of(tmp_path, "slide_id,case_id,label,he\na,p,10,x/a.svs\nb,p,9,\n"))
    assert table.names == ("9", "10")
    assert table.labels.tolist() == [1, 0]
    assert table.pictures == (tmp_path / "x/a.svs", None)


def test_survival_has_times_and_events(tmp_path):
    path = table_of(tmp_path, "slide_id,case_id,months,event\na,p,3.5,1\nb,q,4,0\nc,r,9,1\n")
    table = bags.read_table(path, time="months")
    assert table.times.tolist() == [3.5, 4, 9]
    assert table.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("text", "time", "message"),
    [
        ("slide_id,case_id,label\na,p,x\na,p,y\n", "", "slide_id 'a' comes more than once"),
        ("slide_id,case_id,label\na,p,x\nb,p,\n", "", "rows 3 lack one of"),
        ("slide_id,case_id,label\na,p,x\nb,p,x\n", "", "one class only, 'x'"),
        ("slide_id,case_id,t,event\na,p,x,1\n", "t", "row 2: t is 'x', not a number"),
        ("slide_id,case_id,t,event\na,p,1,2\n", "t", "event is 0 or 1"),
        ("slide_id,case_id,t,event\na,p,1,1\nb,p,2,0\n", "t", "1 events"),
    ],
)
def test_a_table_that_says_too_little_is_refused(text, time, message, tmp_path):
    with pytest.raises(BagError, match=message):
        bags.read_table(table_of(tmp_path, text), time=time)


def short(file):
    file["features"], file["coords"] = np.ones((3, 2), np.float32), np.zeros((2, 2))


def not_finite(file):
    file["features"], file["coords"] = np.array([[1.0, np.nan]]), np.zeros((1, 2))


def text(file):
    file["features"], file["coords"] = ["a", "b"], np.zeros((2, 2))


def bomb(file):
    file.create_dataset("features", (10**9, 10**3), np.float32, chunks=(1024, 1000))
    file["coords"] = np.zeros((1, 2))


def outside(file):
    file["features"], file["coords"] = h5py.ExternalLink("other.h5", "/features"), np.zeros((1, 2))


def stored_outside(file):
    file.create_dataset("features", (1, 2), np.float32, external=[("/etc/hostname", 0, 8)])
    file["coords"] = np.zeros((1, 2))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (short, "are not \\[N, D\\] and \\[N, 2\\]"),
        (not_finite, "not finite"),
        (text, "no dataset of numbers"),
        (bomb, "claims 4,000,000,000,000 bytes and holds 0"),
        (outside, "has no dataset 'features'"),
        (stored_outside, "lies in this file"),
    ],
)
def test_a_file_that_is_no_bag_is_refused(write, message, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write(file)
    with pytest.raises(BagError, match=message):
        bags.read_bag(tmp_path / "a.h5")


def test_what_is_no_hdf5_is_refused(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50))
    with pytest.raises(BagError, match="not readable as HDF5"):
        bags.read_bag(tmp_path / "a.h5")


def test_slides_without_a_file_and_other_encoders_are_named(tmp_path):
    table = bags.read_table(table_of(tmp_path))
    with pytest.raises(BagError, match=r"holds no \.h5 files"):
        bags.read_folder(tmp_path, table)
    clam(tmp_path / "a.h5", "a")
    with pytest.raises(BagError, match=r"lacks 2 of 3 slides of the table: b\.h5, c\.h5"):
        bags.read_folder(tmp_path, table)
    clam(tmp_path / "c.h5", "c")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["features"], file["coords"] = np.ones((1, 7), np.float32), np.zeros((1, 2))
    with pytest.raises(BagError, match="different encoders"):
        bags.read_folder(tmp_path, table)


def test_a_slide_id_cannot_leave_the_folder(tmp_path):
    clam(tmp_path / "a.h5", "a")
    table = bags.read_table(table_of(tmp_path, "slide_id,case_id,label\n../a,p,0\nb,p,1\n"))
    with pytest.raises(BagError, match="is not a file's name"):
        bags.read_folder(tmp_path, table)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("encoder_sha256", "b" * 64, f"encoder_sha256 of a.h5 is {'a' * 64}, that of b.h5 {'b' * 64}"),
        ("mpp_target", 1.0, "mpp_target of a.h5 is 0.5, that of b.h5 1"),
        ("patch_size", 448, "patch_size of a.h5 is 224, that of b.h5 448"),
    ],
)
def test_features_that_do_not_belong_together_are_refused(name, value, message, tmp_path):
    table = bags.read_table(table_of(tmp_path))
    for slide in LENGTHS:
        ours(tmp_path / f"{slide}.h5", slide)
    said = {"encoder_sha256": "a" * 64, "mpp_target": 0.5, "patch_size": 224}
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs.update(said)
    assert len(bags.read_folder(tmp_path, table)) == 3  # the others say nothing
    with h5py.File(tmp_path / "b.h5", "a") as file:
        file.attrs.update(said | {name: value})
    with pytest.raises(BagError, match=message + r"\. Give each kind a folder of its own"):
        bags.read_folder(tmp_path, table)


def test_a_patch_size_of_some_level_says_nothing(tmp_path):
    for slide, size in zip(LENGTHS, (256, 512, 256), strict=True):
        clam(tmp_path / f"{slide}.h5", slide)
        with h5py.File(tmp_path / f"{slide}.h5", "a") as file:
            file["coords"].attrs["patch_size"] = size
    assert len(bags.read_folder(tmp_path, bags.read_table(table_of(tmp_path)))) == 3
