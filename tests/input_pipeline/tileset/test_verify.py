import os
import re

import imagecodecs
import numpy as np
import pytest

from input_pipeline.tileset import TileSet, finish, tfrecord, write_slide
from input_pipeline.tileset.mapped import open_columns, write_columns
from input_pipeline.tileset.verify import verify
from tests.input_pipeline.tileset.samples import SPEC, contents, record, records, write_set

SHARD = "demo-tiles-00002.tfrecord"


@pytest.fixture
def root(tmp_path):
    return write_set(tmp_path / "set")


def flip(path, at, bit=0):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


def test_a_whole_set_has_no_faults(root):
    assert verify(root) == []
    assert verify(root, deep=True, workers=1) == []


@pytest.mark.parametrize(("where", "what"), [(3, "length"), (10, "length"), (60, "payload"), (-2, "payload")])
def test_a_flipped_bit_in_length_payload_and_footer_is_found_and_named(root, where, what):
    index = TileSet.open(root).index
    offset, length = int(index["offset"][8]), int(index["length"][8])
    flip(root / SHARD, offset + (where if where >= 0 else 16 + length + where))
    faults = verify(root)
    assert len(faults) == 1
    assert re.match(rf"{SHARD}, offset {offset}, tile 8, slide 'C': .*{what}", faults[0])


def test_a_flip_of_any_byte_of_any_file_is_found_or_changes_no_value(root, tmp_path):
    rng = np.random.default_rng(0)
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.stat().st_size):
        kept = path.read_bytes()
        (tmp_path / "kept").write_bytes(kept)
        for at in {0, len(kept) - 1, *rng.integers(0, len(kept), 12).tolist()}:
            flip(path, at, int(rng.integers(8)))
            if not verify(root):  # names, times and padding of a zip have no checksum, and no meaning
                assert path.suffix == ".npz", f"{path.name}, byte {at}"
                found, expected = open_columns(path), open_columns(tmp_path / "kept")
                assert set(found) == set(expected)
                assert all(np.array_equal(found[n], v, equal_nan=True) for n, v in expected.items())
            path.write_bytes(kept)


@pytest.mark.parametrize("cut", [1, 16, 5000])
def test_a_truncated_tail_is_found(root, cut):
    path = root / SHARD
    path.write_bytes(path.read_bytes()[:-cut])
    faults = verify(root)
    assert any(re.match(rf"{SHARD}, offset \d+, tile 10, slide 'C': .*do not fit", f) for f in faults)
    assert any(f.startswith(f"{SHARD}: it has") for f in faults)


def test_bytes_after_the_last_record_are_found(root):
    with open(root / SHARD, "ab") as file:
        tfrecord.write_record(file, b"one more")
    assert any(f.startswith(f"{SHARD}: it has") for f in verify(root))


def test_a_missing_shard_is_found(root):
    (root / SHARD).unlink()
    assert verify(root) == [f"{SHARD}: the shard of slide 'C' is missing"]


def test_swapped_shards_are_found(root):
    os.rename(root / SHARD, root / "x")
    os.rename(root / "demo-tiles-00000.tfrecord", root / SHARD)
    os.rename(root / "x", root / "demo-tiles-00000.tfrecord")
    assert len(verify(root)) > 10


def rewrite(path, **changes):
    columns = {name: np.array(values) for name, values in open_columns(path).items()} | changes
    write_columns(path, {name: (v.dtype, len(v), [v]) for name, v in columns.items()})


@pytest.mark.parametrize("name", ["offset", "length", "crc", "shard"])
def test_an_index_that_is_whole_but_wrong_is_found(root, name):
    column = np.array(TileSet.open(root).index[name])
    column[9] += 1
    rewrite(root / "index.npz", **{name: column})
    faults = verify(root)
    assert any("index.npz" in f and "slide 'C'" in f for f in faults)


@pytest.mark.parametrize("name", ["slide", "case", "label", "x", "fraction", "has_genes"])
def test_a_column_that_is_whole_but_wrong_is_found(root, name):
    column = np.array(TileSet.open(root).tiles[name])
    column[9] = not column[9]
    rewrite(root / "tiles.npz", **{name: column})
    assert any("tiles.npz" in f and "slide 'C'" in f for f in verify(root))


def test_an_index_of_another_count_is_found(root):
    columns = open_columns(root / "index.npz")
    rewrite(root / "index.npz", **{name: np.array(v)[:-1] for name, v in columns.items()})
    assert any("does not have the 11 rows" in f for f in verify(root))


def test_an_edited_manifest_is_found(root):
    path = root / "manifest.json"
    path.write_text(path.read_text().replace('"tiles": 7', '"tiles": 6'))
    assert any("edited or damaged" in f for f in verify(root))


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json", "label.labels.txt", "index.npz", "tiles.npz"])
def test_a_missing_file_is_found(root, name):
    (root / name).unlink()
    assert any(name in f and "missing" in f for f in verify(root))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("demo-tiles-00003.tfrecord", "shard of no slide"),
        ("slides/A 1.tfrecord.part", "writer that died"),
        ("index.npz.part", "writer that died"),
        ("slides/A 1.0123456789abcdef.tfrecord", "waits for finish"),
    ],
)
def test_a_stray_file_is_found(root, name, message):
    (root / name).write_bytes(b"")
    (fault,) = verify(root)
    assert fault.startswith(name)
    assert message in fault


def test_a_slide_written_after_finish_is_found(root):
    write_slide(root, SPEC, "D", "case-2", [record(1)])
    write_slide(root, SPEC, "C", "case-2", records(range(3)))
    faults = verify(root)
    assert any("slides/D.npz is a slide that is not in the manifest" in f for f in faults)
    assert any("slide 'C' was written again after the last finish" in f for f in faults)
    finish(root, SPEC)
    assert verify(root) == []


def test_an_unfinished_set_is_a_fault(tmp_path):
    write_slide(tmp_path, SPEC, "A", "c", [record(0)])
    assert any("no manifest.json; run finish" in f for f in verify(tmp_path))


def test_deep_finds_what_checksums_cannot(tmp_path, monkeypatch):
    original = tfrecord.encode_example
    picture = imagecodecs.png_encode(np.zeros((24, 25, 3), np.uint8))
    for name, value in (("he", picture), ("genes", np.zeros(4, np.float32)), ("label", 0), ("markers", [])):
        with monkeypatch.context() as patch:
            patch.setattr(tfrecord, "encode_example", lambda f, n=name, v=value: original(f | {n: v}))
            write_slide(tmp_path, SPEC, "A", "c", [record(1), record(3)])
        finish(tmp_path, SPEC)
        assert verify(tmp_path) == []
        faults = verify(tmp_path, deep=True)
        assert len(faults) == (1 if name == "label" else 2)
        assert all(name in f and "slide 'A'" in f for f in faults)


def test_many_faults_of_a_shard_are_cut_short(tmp_path):
    write_slide(tmp_path, SPEC, "A", "c", records(range(40)))
    finish(tmp_path, SPEC)
    (tmp_path / "demo-tiles-00000.tfrecord").write_bytes(bytes((tmp_path / "demo-tiles-00000.tfrecord").stat().st_size))
    faults = verify(tmp_path)
    assert len(faults) == 21
    assert "more in the same shard" in faults[-1]


def test_it_changes_nothing(root):
    before = contents(root)
    verify(root, deep=True)
    assert contents(root) == before


def test_no_list_is_searched_once_for_each_slide(root, monkeypatch):
    """With 10^5 slides that alone would take minutes."""

    class Unsearched(list):
        def index(self, *_):
            raise AssertionError("searched")

        __contains__ = index

    opened = TileSet.open

    def unsearched(folder):
        tileset = opened(folder)
        tileset.slides, tileset.cases = Unsearched(tileset.slides), Unsearched(tileset.cases)
        return tileset

    monkeypatch.setattr(TileSet, "open", unsearched)
    assert verify(root, deep=True) == []
