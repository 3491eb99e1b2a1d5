import io
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline.tileset.mapped import MappedError, open_columns, write_columns


def write(path):
    columns = {
        "a": (np.dtype(np.int64), 7, [np.arange(3), np.arange(4)]),
        "empty": (np.dtype(np.float32), 0, []),
        "long_name_of_a_column": (np.dtype(np.float32), 5, iter([np.linspace(0, 1, 5)])),
        "flag": (np.dtype(np.bool_), 2, [np.array([True, False])]),
    }
    write_columns(path, columns)
    return path


def test_columns_come_back_mapped_aligned_and_readable_by_numpy(tmp_path):
    path = write(tmp_path / "c.npz")
    found = open_columns(path)
    with np.load(path) as peer:
        assert set(peer.files) == set(found)
        for name in found:
            assert found[name].dtype == peer[name].dtype
            assert np.array_equal(found[name], peer[name])
    assert found["a"].tolist() == [0, 1, 2, 0, 1, 2, 3]
    for array in found.values():
        assert not len(array) or (isinstance(array.base, np.memmap) and array.ctypes.data % 64 == 0)
    assert not len(list(tmp_path.glob("*.part")))
    assert set(open_columns(path, {"a"})) == {"a"}
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0] = 1


def test_too_few_rows_are_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(MappedError, match="given 2 rows, 3 were announced"):
        write_columns(tmp_path / "c.npz", {"a": (np.dtype(np.int32), 3, [np.arange(2)])})
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_stored_columns_are_refused(tmp_path):
    path = tmp_path / "c.npz"
    with pytest.raises(MappedError, match="missing"):
        open_columns(path)
    np.savez_compressed(path, a=np.arange(5))
    with pytest.raises(MappedError, match="compressed"):
        open_columns(path)
    np.savez(path, a=np.zeros((2, 3)))
    with pytest.raises(MappedError, match="not one column"):
        open_columns(path)
    np.savez(path, a=np.array([{"pickled": 1}], dtype=object))
    with pytest.raises(MappedError, match="not one column"):
        open_columns(path)
    path.write_bytes(b"PK nothing")
    with pytest.raises(MappedError, match="not a file of columns"):
        open_columns(path)


def test_a_member_that_claims_more_rows_than_it_holds_is_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("a.npy", header.getvalue() + bytes(80))
    with pytest.raises(MappedError, match="size that its"):
        open_columns(tmp_path / "c.npz")


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_file_opens_or_is_refused(tmp_path_factory, data):
    path = write(tmp_path_factory.mktemp("c") / "c.npz")
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(len(raw) - 300, len(raw)))])
    try:
        found = open_columns(path)
    except MappedError:
        return
    assert sum(array.nbytes for array in found.values()) <= len(raw)
