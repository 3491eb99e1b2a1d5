"""The files, read back step by step as each tool reads them."""

import csv

import h5py
import numpy as np
import pytest

from mfl_jax import store
from mfl_jax.extract import extract
from mfl_jax.store import Layout, Sheet
from tests.mfl_jax.drawn_slides import DIM, SIZE, coords, encoder, expected, source

COUNTS = {"a 1": 1100, "b": 3, "empty": 0}
# drawn_slides: level 0 at 0.25 um per px, tiles of SIZE px at 0.5 (twice SIZE there), 2 px overlap, 900 x 800 px
MPP0, SIDE0 = 0.25, 2 * SIZE


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """layout -> folder"""
    root = tmp_path_factory.mktemp("layouts")
    for layout in store.DTYPES:
        report = extract(source(COUNTS), encoder(), root / layout, layout=layout, workers=2, progress=False)
        assert not report.failed
        again = extract(source(COUNTS), encoder(), root / layout, layout=layout, workers=2, progress=False)
        assert again.kept == 3
    return root


def check(found, name, rtol=1e-5):
    assert found.shape == (COUNTS[name], DIM)
    np.testing.assert_allclose(found, expected(name, COUNTS[name]), rtol=rtol, atol=2e-3 if rtol > 1e-4 else 1e-6)


def test_our_layout_has_all_provenance(written):
    for name, count in COUNTS.items():
        with h5py.File(written / "ours" / f"{name}.h5") as file:
            check(file["features"][:], name, 2e-3)
            assert (file["features"].dtype, file["coords"].dtype) == (np.float16, np.int64)
            np.testing.assert_array_equal(file["coords"][:], coords(count))
            about = dict(file.attrs)
            assert file["features"].chunks == (None if not count else (min(count, 1024), DIM))
        assert len(about.pop("config_sha256")) == 64
        assert about == {
            "slide_id": name,
            "case_id": f"case of {name}",
            "patch_size": SIZE,
            "patch_size_level0": SIDE0,
            "mpp_level0": MPP0,
            "mpp_target": 0.5,
            "mpp_source": "vendor",
            "level0_width": 900,
            "level0_height": 800,
            "encoder": "toy",
            "encoder_sha256": "a" * 64,
            "layout": "ours",
            "version": 1,
        }


def test_clam_reads_features_and_coordinates(written):
    """As its Generic_MIL_Dataset with use_h5 does, and its heatmaps the coordinates."""
    root = written / "clam"
    with open(root / "dataset.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(row.values()) for row in rows] == [[f"case of {name}", name, "yes"] for name in COUNTS]
    for name, count in COUNTS.items():
        with h5py.File(root / "h5_files" / f"{name}.h5", "r") as file:
            features, places = file["features"][:], file["coords"][:]
            assert features.dtype == np.float32
            assert not set(file["features"].attrs) | set(file["coords"].attrs)
        check(features, name)
        np.testing.assert_array_equal(places, coords(count))
        with h5py.File(root / "patches" / f"{name}.h5", "r") as file:
            np.testing.assert_array_equal(file["coords"][:], coords(count))
            about = dict(file["coords"].attrs)
        assert (about["patch_level"], about["patch_size"], about["name"]) == (0, SIDE0, name)
        assert tuple(about["downsample"]) == (1.0, 1.0)
        assert tuple(about["level_dim"]) == tuple(about["downsampled_level_dim"]) == (900, 800)
        assert isinstance(about["save_path"], str)


def test_clam_reads_the_tensors_that_torch_would_have_saved(written):
    torch = pytest.importorskip("torch")
    for name in COUNTS:
        tensor = torch.load(written / "clam" / "pt_files" / f"{name}.pt", weights_only=True)
        assert tensor.dtype == torch.float32
        check(tensor.numpy(), name)


def test_trident_reads_patches_and_features(written):
    root = written / "trident" / f"20x_{SIZE}px_2px_overlap"
    for name, count in COUNTS.items():
        for path in (root / "patches" / f"{name}_patches.h5", root / "features_toy" / f"{name}.h5"):
            with h5py.File(path, "r") as file:
                places, about = file["coords"][:], dict(file["coords"].attrs)
                features = file["features"][:] if "features" in file else None
            assert (places.dtype, places.shape) == (np.int64, (count, 2))
            np.testing.assert_array_equal(places, coords(count))
            assert about == {
                "patch_size": SIZE,
                "patch_size_level0": SIDE0,
                "level0_magnification": 40,
                "target_magnification": 20,
                "overlap": 2,
                "name": name,
                "savetodir": ".",
                "level0_width": 900,
                "level0_height": 800,
            }
            assert int(about["patch_size_level0"]) == about["patch_size_level0"]
        check(features, name, 2e-3 if features.dtype == np.float16 else 1e-5)


def test_stamp_reads_micrometres(written):
    root = written / "stamp"
    with open(root / "slides.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["PATIENT"], row["FILENAME"]) for row in rows] == [(f"case of {n}", f"{n}.h5") for n in COUNTS]
    for row, (name, count) in zip(rows, COUNTS.items(), strict=True):
        with h5py.File(root / row["FILENAME"], "r") as file:
            features, places, about = file["feats"][:], file["coords"][:], dict(file.attrs)
        assert (features.dtype, places.dtype) == (np.float16, np.float32)
        check(features, name, 2e-3)
        np.testing.assert_allclose(places, coords(count) * MPP0, rtol=1e-6)
        assert (about["unit"], about["feat_type"], about["extractor"]) == ("um", "tile", "toy")
        assert (about["tile_size_um"], about["tile_size_px"]) == (SIZE * 0.5, SIZE)
        assert tuple(map(int, about["stamp_version"].split("."))) <= (2, 1, 0)


@pytest.mark.parametrize(
    ("name", "table", "row"), [("clam", "dataset.csv", ["=c", "-x", "+"]), ("stamp", "slides.csv", ["=c", "-x.h5"])]
)
def test_tables_of_others_name_slides_as_their_files_are_named(name, table, row, tmp_path):
    place = Layout(name, tmp_path, store.DTYPES[name][0], "toy", "a" * 64)
    store.write_tables(place, [{"case_id": "=c", "slide_id": "-x", "label": "+"}])
    with open(tmp_path / table, newline="") as file:
        assert list(csv.reader(file))[1:] == [row]


def test_stamp_has_the_labels_by_patient_and_none_where_slides_of_one_differ(tmp_path):
    place = Layout("stamp", tmp_path, "float16", "toy", "a" * 64)
    labels = [("p", "yes", "1"), ("p", "", "2"), ("q", "no", "2"), ("r", "", "1")]
    rows = [
        {"case_id": case, "slide_id": f"s{i}", "label": first, "label_grade": second}
        for i, (case, first, second) in enumerate(labels)
    ]
    said = store.write_tables(place, rows)
    with open(tmp_path / "patients.csv", newline="") as file:
        found = list(csv.reader(file))
    assert found == [["PATIENT", "label", "label_grade"], ["p", "yes", ""], ["q", "no", "2"], ["r", "", "1"]]
    assert said == ("patients.csv: label_grade is left empty for 1 of 3 patients, whose slides differ in it: p",)


def test_clam_has_every_column_of_labels(tmp_path):
    place = Layout("clam", tmp_path, "float32", "toy", "a" * 64)
    store.write_tables(place, [{"case_id": "p", "slide_id": "s", "label_grade": "2"}])
    with open(tmp_path / "dataset.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"case_id": "p", "slide_id": "s", "label": "", "label_grade": "2"}]


def sheet(**changes):
    given = {"slide_id": "s", "case_id": "c", "coords": coords(5), "mpp": 0.2273, "mpp_source": "csv", "tile_px": 224}
    return Sheet(**given | {"tile_mpp": 0.5, "overlap_px": 0, "extent": (1, 1)} | changes)


def test_the_side_at_level_0_is_the_exact_ratio_rounded():
    assert sheet().side == 493  # 224 * 0.5 / 0.2273 = 492.74
    assert [store.magnification(mpp) for mpp in (0.25, 0.2273, 0.5, 1.0, 30.0)] == [40, 44, 20, 10, 1]


@pytest.mark.parametrize("layout", ["ours", "clam", "trident", "stamp"])
def test_a_file_that_is_not_finished_does_not_appear(layout, tmp_path):
    place = Layout(layout, tmp_path, store.DTYPES[layout][0], "enc/oder", "a" * 64)

    def interrupted():
        with store.writer(place, sheet(), 4, "key") as features:
            features[:3] = 1.0
            raise InterruptedError

    with pytest.raises(InterruptedError):
        interrupted()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    with store.writer(place, sheet(), 4, "key") as features:
        features[:] = 1.0
    files = place.files_of(sheet())
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == set(files.values())
    about = store.stored_attributes(files["features"])
    assert about is not None
    assert (about["config_sha256"], about["tiles"]) == ("key", 5)
    assert all(tmp_path in p.resolve().parents for p in files.values())


def test_a_file_that_is_cut_short_is_not_taken_for_whole(tmp_path):
    place = Layout("ours", tmp_path, "float32", "toy", "a" * 64)
    with store.writer(place, sheet(coords=coords(3000)), 8, "key") as features:
        features[:] = 1.0
    path = tmp_path / "s.h5"
    whole = path.read_bytes()
    for share in (0.0, 0.3, 0.7, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        assert store.stored_attributes(path) is None
    assert store.stored_attributes(tmp_path / "nothing.h5") is None
