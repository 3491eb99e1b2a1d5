import json
import pickle

import numpy as np
import pytest
from scipy import interpolate

from input_pipeline.slides.transform import Displacement, Transform, load_transform

MATRIX = np.array([[0.8, -0.6, 120.0], [0.6, 0.8, -40.0]])


@pytest.fixture
def points():
    return np.random.default_rng(0).uniform(0, 900, (500, 2))


@pytest.fixture
def field():
    return Displacement((-200, -200), (200, 150), np.random.default_rng(1).uniform(-12, 12, (10, 8, 2)))


def test_an_affine_transform_is_its_matrix(points):
    by_hand = [[0.8 * x - 0.6 * y + 120, 0.6 * x + 0.8 * y - 40] for x, y in points]
    np.testing.assert_allclose(Transform(MATRIX)(points), by_hand)
    square = np.vstack([MATRIX, [0, 0, 1]])
    np.testing.assert_array_equal(Transform(square)(points), Transform(MATRIX)(points))


def test_displacement_passes_through_its_nodes_and_is_constant_outside(field):
    rows, columns = np.mgrid[:10, :8]
    nodes = np.stack([columns * 200.0 - 200, rows * 150.0 - 200], -1)
    np.testing.assert_allclose(field(nodes.reshape(-1, 2)), field.values.reshape(-1, 2), atol=1e-9)
    np.testing.assert_allclose(field(np.array([[-900.0, -900.0]])), field.values[:1, 0], atol=1e-9)


def test_displacement_between_nodes_is_close_to_an_independent_cubic_spline(points):
    x = y = np.arange(-600, 1600, 100.0)
    values = 10 * np.sin(x / 300)[None, :] * np.cos(y / 250)[:, None]
    found = Displacement((-600, -600), (100, 100), np.stack([values, -values], -1))(points)
    oracle = interpolate.RectBivariateSpline(y, x, values)(points[:, 1], points[:, 0], grid=False)
    np.testing.assert_allclose(found[:, 0], oracle, atol=0.02)
    np.testing.assert_allclose(found[:, 1], -oracle, atol=0.02)


def test_displacement_is_added_before_the_matrix(field, points):
    np.testing.assert_allclose(Transform(MATRIX, field)(points), Transform(MATRIX)(points + field(points)))


def test_inverse_undoes(field, points):
    transform = Transform(MATRIX, field)
    np.testing.assert_allclose(transform.inverse(transform(points)), points, atol=1e-3)
    assert transform(points.reshape(5, 100, 2)).shape == (5, 100, 2)


def test_saved_and_loaded_is_the_same(tmp_path, field, points):
    Transform(MATRIX, field, {"score": 0.9}).save(tmp_path / "t.json")
    loaded = load_transform(tmp_path / "t.json")
    np.testing.assert_allclose(loaded(points), Transform(MATRIX, field)(points), atol=1e-3)
    assert loaded.info == {"score": 0.9}
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


@pytest.mark.parametrize(
    "text",
    [
        "0.8,-0.6,120\n0.6,0.8,-40\n",
        "# um\n0.8 -0.6 120\n0.6 0.8 -40\n0 0 1\n",
        "0.8;-0.6;120\r\n0.6;0.8;-40\r\n",
    ],
)
def test_a_matrix_as_text(tmp_path, text, points):
    (tmp_path / "m.csv").write_text(text)
    np.testing.assert_allclose(load_transform(tmp_path / "m.csv")(points), Transform(MATRIX)(points))


def test_a_matrix_as_npy(tmp_path, points):
    np.save(tmp_path / "m.npy", np.vstack([MATRIX, [0, 0, 1]]))
    np.testing.assert_allclose(load_transform(tmp_path / "m.npy")(points), Transform(MATRIX)(points))


def test_a_field_as_npz(tmp_path, field, points):
    arrays = {"unit": "um", "origin": field.origin, "spacing": field.spacing, "values": field.values}
    np.savez(tmp_path / "f.npz", matrix=MATRIX, **arrays)
    np.testing.assert_allclose(load_transform(tmp_path / "f.npz")(points), Transform(MATRIX, field)(points))
    np.savez(tmp_path / "mm.npz", **(arrays | {"unit": "mm"}))
    with pytest.raises(ValueError, match="'mm'; allowed: 'um'"):
        load_transform(tmp_path / "mm.npz")
    np.savez(tmp_path / "short.npz", values=field.values)
    with pytest.raises(ValueError, match="lacks origin, spacing, unit"):
        load_transform(tmp_path / "short.npz")


def test_itk_files_are_in_millimetres_unless_said_otherwise(tmp_path, points):
    sitk = pytest.importorskip("SimpleITK")
    affine = sitk.AffineTransform(2)
    affine.SetMatrix(MATRIX[:, :2].ravel().tolist())
    affine.SetTranslation((MATRIX[:, 2] / 1000).tolist())
    affine.SetCenter((0.3, 0.2))
    sitk.WriteTransform(affine, str(tmp_path / "a.tfm"))
    expected = np.array([affine.TransformPoint((p / 1000).tolist()) for p in points]) * 1000
    np.testing.assert_allclose(load_transform(tmp_path / "a.tfm")(points), expected, atol=1e-6)
    with pytest.raises(ValueError, match="itk_unit"):
        load_transform(tmp_path / "a.tfm", itk_unit="cm")


def test_itk_displacement_agrees_with_itk(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    y, x = np.mgrid[:60, :50] * 0.02
    values = 0.01 * np.stack([np.sin(x * 6), np.cos(y * 5)], -1)
    image = sitk.GetImageFromArray(values, isVector=True)
    image.SetSpacing((0.02, 0.02))
    image.SetOrigin((0.01, 0.01))
    sitk.WriteImage(image, str(tmp_path / "d.mha"))
    points = np.random.default_rng(2).uniform(100, 900, (200, 2))
    itk = sitk.DisplacementFieldTransform(sitk.Image(image))
    expected = np.array([itk.TransformPoint((p / 1000).tolist()) for p in points]) * 1000
    np.testing.assert_allclose(load_transform(tmp_path / "d.mha")(points), expected, atol=0.02)
    in_um = load_transform(tmp_path / "d.mha", itk_unit="um")(points / 1000)
    np.testing.assert_allclose(in_um * 1000, expected, atol=0.02)
    image.SetSpacing((1.0, 1.0))
    sitk.WriteImage(image, str(tmp_path / "pixels.mha"))
    with pytest.raises(ValueError, match="pixels, not millimetres"):
        load_transform(tmp_path / "pixels.mha")


def test_itk_splines_are_refused_with_the_way_out(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    sitk.WriteTransform(sitk.BSplineTransform(2), str(tmp_path / "b.tfm"))
    with pytest.raises(ValueError, match="TransformToDisplacementFieldFilter"):
        load_transform(tmp_path / "b.tfm")
    sitk.WriteTransform(sitk.AffineTransform(3), str(tmp_path / "three.tfm"))
    with pytest.raises(ValueError, match="3 dimensions"):
        load_transform(tmp_path / "three.tfm")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a file was unpickled",))


def test_nothing_is_unpickled(tmp_path):
    np.save(tmp_path / "o.npy", np.array([Bomb()], object), allow_pickle=True)
    np.savez(tmp_path / "o.npz", unit=np.array(Bomb(), object), origin=0, spacing=0, values=0)
    (tmp_path / "p.npy").write_bytes(pickle.dumps(Bomb()))
    for name in ("o.npy", "o.npz", "p.npy"):
        with pytest.raises(ValueError, match="not a transform file"):
            load_transform(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "{}"),
        ("a.json", "not json"),
        ("a.json", json.dumps({"format": "mfl-transform", "version": 2, "unit": "um"})),
        ("a.json", json.dumps({"format": "mfl-transform", "version": 1, "unit": "mm"})),
        ("a.csv", ""),
        ("a.csv", "1,0\n0,1\n"),
        ("a.csv", "1,0,nan\n0,1,0\n"),
        ("a.csv", "1,0,0\n1,0,0\n"),
        ("a.csv", "x,y,z\n1,0,0\n0,1,0\n"),
        ("a.npz", "junk"),
        ("a.npy", "junk"),
        ("a.tfm", "junk"),
        ("a.mha", "junk"),
        ("a.xfm", "1 0 0"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, name, content):
    if name.endswith((".tfm", ".mha")):
        pytest.importorskip("SimpleITK")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        load_transform(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.json"):
        load_transform(tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("values", "spacing"),
    [
        (np.zeros((1, 4, 2)), (1, 1)),
        (np.zeros((4, 4)), (1, 1)),
        (np.full((4, 4, 2), np.nan), (1, 1)),
        (np.zeros((4, 4, 2)), (0, 1)),
    ],
)
def test_impossible_fields_are_refused(values, spacing):
    with pytest.raises(ValueError, match="displacement field"):
        Displacement((0, 0), spacing, values)
