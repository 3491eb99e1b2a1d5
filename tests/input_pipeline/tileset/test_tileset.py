import contextlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline import tileset
from input_pipeline.tileset import Record, Spec, TileSet, TileSetError, finish, manifest, remove_slide, write_slide
from input_pipeline.tileset.spec import json_sha256
from tests.input_pipeline.tileset.samples import PARTNERS, SPEC, contents, record, records, write_set


@pytest.fixture
def root(tmp_path):
    return write_set(tmp_path / "set")


def test_what_was_written_comes_back(root):
    with TileSet.open(root) as tiles:
        assert len(tiles) == 11
        assert (tiles.slides, tiles.cases) == (["A 1", "B", "C"], ["case-1", "case-2"])
        assert tiles.spec == SPEC
        for example in tiles.read(range(11)):
            i, found = example.id, tiles.decode(example)
            written = record(i, ("markers", "genes") if i % 5 == 2 else ())
            assert np.array_equal(found["he"], written.he)
            for name, value in written.partners.items():
                if value is None:
                    assert found[name] is None
                    continue
                value = value[..., None] if value.ndim == 2 else value
                assert found[name].dtype == value.dtype
                assert found[name].shape == value.shape
                assert np.abs(found[name].astype(float) - value).max() <= (4 if name == "ihc" else 0)


def test_columns_are_one_row_a_tile(root):
    tiles = TileSet.open(root).tiles
    seeds = np.arange(11)
    assert tiles["slide"].tolist() == [0] * 7 + [2] * 4
    assert tiles["case"].tolist() == [0] * 7 + [1] * 4
    assert np.array_equal(tiles["x"], np.float32(seeds * 2.0))
    assert np.array_equal(tiles["y"], np.float32(seeds * 3.0))
    assert np.array_equal(tiles["label"], seeds % 3 - 1)
    assert np.array_equal(tiles["fraction"], seeds / 7)
    assert np.array_equal(tiles["score_markers"], np.float32(seeds / 1000))
    assert np.isnan(tiles["score_ihc"]).all()
    assert np.array_equal(tiles["has_genes"], seeds % 5 != 2)


def test_ids_of_splits_are_those_of_their_cases(root):
    tiles = TileSet.open(root)
    assert tiles.ids("train").tolist() == list(range(7))
    assert tiles.ids("test").tolist() == list(range(7, 11))
    assert tiles.ids().tolist() == list(range(11))
    assert tiles.ranges("test").tolist() == [[7, 11]]
    with pytest.raises(TileSetError, match=r"no split 'val'; there are \['test', 'train'\]"):
        tiles.ids("val")


def test_reads_in_the_order_asked_and_refuses_ids_that_are_not_there(root):
    tiles = TileSet.open(root)
    assert [e.id for e in tiles.read([9, 0, 9, 3])] == [9, 0, 9, 3]
    assert [e.slide for e in tiles.read([9, 0])] == ["C", "A 1"]
    for i in (-1, 11):
        with pytest.raises(TileSetError, match="0 to 10"):
            tiles.read([i])


def test_threads_read_the_same_with_few_open_files(tmp_path, monkeypatch):
    spec = Spec("many", 8, 0.5, "png")
    for n in range(12):
        tile = np.full((8, 8, 3), n, np.uint8)
        write_slide(tmp_path, spec, f"s{n:02}", f"c{n}", [Record(tile)] * 3)
    finish(tmp_path, spec)
    monkeypatch.setattr(tileset, "MAX_OPEN_FILES", 2)
    pread = os.pread

    def slow(*arguments):  # long enough for others to push the file out meanwhile
        time.sleep(0.001)
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", slow)
    tiles = TileSet.open(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    ids = np.random.default_rng(0).integers(0, 36, 400)
    most, lock = 0, threading.Lock()

    def work(i):
        nonlocal most
        value = int(tiles.decode(tiles.read([i])[0])["he"][0, 0, 0])
        with lock:
            most = max(most, len(tiles._open))
        return value

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, ids)) == (ids // 3).tolist()
    assert most <= 2
    tiles.close()
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before


def damage(path, offset, bit=0):
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1 << bit
    path.write_bytes(raw)


@pytest.mark.parametrize("where", ["length", "length crc", "payload", "footer"])
def test_a_flipped_bit_is_an_error_that_names_file_offset_id_and_slide(root, where):
    tiles = TileSet.open(root)
    start, length = int(tiles.index["offset"][8]), int(tiles.index["length"][8])
    at = {"length": 0, "length crc": 9, "payload": 12 + length // 2, "footer": 12 + length + 1}[where]
    damage(root / "demo-tiles-00002.tfrecord", start + at)
    with pytest.raises(TileSetError) as caught:
        tiles.read([8])
    for part in ("demo-tiles-00002.tfrecord", f"offset {start}", "tile 8", "slide 'C'"):
        assert part in str(caught.value)
    error = caught.value
    assert (error.id, error.slide, error.file, error.offset) == (8, "C", "demo-tiles-00002.tfrecord", start)
    assert [e.id for e in tiles.read([7, 9])] == [7, 9]


def test_a_cut_or_missing_shard_is_an_error_that_names_it(root):
    path = root / "demo-tiles-00002.tfrecord"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(TileSetError, match=r"demo-tiles-00002.tfrecord, offset \d+, tile 10, slide 'C'"):
        TileSet.open(root).read([10])
    path.unlink()
    with pytest.raises(TileSetError, match=r"tile 7, slide 'C'.*No such file"):
        TileSet.open(root).read([7])


def test_a_whole_shard_of_another_content_is_found(root, tmp_path):
    write_slide(tmp_path / "other", SPEC, "C", "case-2", records(range(27, 31)))
    finish(tmp_path / "other", SPEC)
    size = (root / "demo-tiles-00002.tfrecord").stat().st_size
    other = (tmp_path / "other" / "demo-tiles-00000.tfrecord").read_bytes()
    (root / "demo-tiles-00002.tfrecord").write_bytes(other[:size].ljust(size, b"\0"))
    with pytest.raises(TileSetError, match="tile 7"):
        TileSet.open(root).read([7])


def fuzzed(tmp_path_factory):
    root = tmp_path_factory.getbasetemp() / "fuzzed"
    return root if root.exists() else write_set(root)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_no_index_makes_a_read_crash_or_take_memory(tmp_path_factory, data):
    tiles = TileSet.open(fuzzed(tmp_path_factory))
    numbers = {"shard": st.integers(-2, 4), "offset": st.integers(-(2**63), 2**63 - 1)}
    numbers |= {"length": st.integers(-(2**31), 2**31 - 1), "crc": st.integers(0, 2**32 - 1)}
    name = data.draw(st.sampled_from(sorted(numbers)))
    column = np.array(tiles.index[name])
    column[3] = data.draw(numbers[name])
    if column[3] == tiles.index[name][3]:
        return
    tiles.index[name] = column
    pread = os.pread

    def bounded(number, size, offset):
        assert size <= os.fstat(number).st_size
        return pread(number, size, offset)

    with mock.patch.object(os, "pread", bounded), pytest.raises(TileSetError, match="tile 3"):
        tiles.read([3])


def one_tile(tmp_path, monkeypatch, **features):
    """A set of one tile whose stored features are replaced after all the checks of the writer."""
    import input_pipeline.tileset.spec as module

    original = module.tfrecord.encode_example
    monkeypatch.setattr(module.tfrecord, "encode_example", lambda found: original(found | features))
    write_slide(tmp_path, SPEC, "S", "c", [record(0)])
    finish(tmp_path, SPEC)
    return TileSet.open(tmp_path)


GREY = imagecodecs.png_encode(np.zeros((24, 24), np.uint8))
BAD = {
    "undecodable": ({"he": b"not a picture"}, "he: "),
    "cut": ({"he": imagecodecs.png_encode(record(0).he)[:-40]}, "he: "),
    "grey": ({"he": GREY}, "he: "),
    "large": ({"he": imagecodecs.png_encode(np.zeros((25, 24, 3), np.uint8))}, "he: "),
    "sixteen bits": ({"he": imagecodecs.png_encode(np.zeros((24, 24, 3), np.uint16))}, "he: "),
    "other codec": ({"he": imagecodecs.jpeg8_encode(np.zeros((24, 24, 3), np.uint8))}, "he: "),
    "no image": ({"he": []}, "he: there is no image"),
    "numbers": ({"he": 3}, "he: "),
    "partner of eight bits": ({"nuclei": GREY}, "nuclei: "),
    "too few planes": ({"markers": imagecodecs.png_encode(np.zeros((36, 12), np.uint16))}, "markers: "),
    "cut jpeg": ({"ihc": imagecodecs.jpeg8_encode(np.zeros((24, 24, 3), np.uint8))[:-2]}, "ihc: .*no end"),
    "nan": ({"genes": np.array([1, 2, np.nan, 4, 5], np.float32)}, "genes: .*NaN"),
    "short vector": ({"genes": np.ones(4, np.float32)}, "genes: .*5 finite values"),
    "vector of integers": ({"genes": np.ones(5, np.int64)}, "genes: "),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_tile_that_is_not_as_announced_is_an_error_with_id_and_slide(tmp_path, monkeypatch, kind):
    features, message = BAD[kind]
    tiles = one_tile(tmp_path, monkeypatch, **features)
    with pytest.raises(TileSetError, match=f"tile 0, slide 'S': {message}") as caught:
        tiles.decode(tiles.read([0])[0])
    assert (caught.value.id, caught.value.slide) == (0, "S")


def test_a_picture_that_claims_to_be_huge_is_refused_before_memory_is_taken(tmp_path, monkeypatch):
    bomb = bytearray(imagecodecs.png_encode(np.zeros((24, 24, 3), np.uint8)))
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    import zlib

    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    tiles = one_tile(tmp_path, monkeypatch, he=bytes(bomb))
    example = tiles.read([0])[0]
    with pytest.raises(TileSetError, match=r"he: .*60000"):
        tiles.decode(example)


def test_an_unfinished_or_absent_set_does_not_open(tmp_path):
    with pytest.raises(TileSetError, match=r"no manifest.json; run finish"):
        TileSet.open(tmp_path)
    write_slide(tmp_path, SPEC, "S", "c", [record(0)])
    with pytest.raises(TileSetError, match=r"no manifest.json; run finish"):
        TileSet.open(tmp_path)


def test_index_and_manifest_must_agree(root, tmp_path):
    other = write_set(tmp_path / "other")
    remove_slide(other, "A 1")
    finish(other, SPEC)
    for name in ("index.npz", "tiles.npz"):
        kept = (root / name).read_bytes()
        (root / name).write_bytes((other / name).read_bytes())
        with pytest.raises(TileSetError, match=f"{name} does not have the 11 rows"):
            TileSet.open(root)
        (root / name).write_bytes(kept)
    (root / "tiles.npz").write_bytes((root / "index.npz").read_bytes())
    with pytest.raises(TileSetError, match="does not have the columns"):
        TileSet.open(root)
    (root / "index.npz").unlink()
    with pytest.raises(TileSetError, match=r"index.npz is missing; run finish"):
        TileSet.open(root)


def edit(root, change, resum):
    document = json.loads((root / "manifest.json").read_text())
    change(document)
    if resum:
        document.pop("sum")
        document["sum"] = json_sha256(document)
    (root / "manifest.json").write_text(json.dumps(document))


EDITS = {
    "future": (lambda d: d.update(version=2), "version 2, this program reads version 1"),
    "other format": (lambda d: d.update(format="x"), "does not say format"),
    "split": (lambda d: d["splits"]["train"].append("case-2"), "is in split"),
    "unknown case": (lambda d: d["splits"]["train"].append("case-9"), "which no slide has"),
    "count": (lambda d: d.update(tiles=12), "another sum"),
    "leaves the folder": (lambda d: d["slides"][0].update(slide="../../x"), "is refused"),
    "name leaves the folder": (lambda d: d["spec"].update(name="../x"), "name of a tile set"),
    "same shard": (lambda d: d["slides"][0].update(shard=2), "same shard"),
    "negative": (lambda d: d["slides"][0].update(tiles=-7), "negative"),
    "type": (lambda d: d.update(slides={}), "not of type list"),
    "partner": (lambda d: d["spec"]["partners"][0].update(kind="video"), "kind is"),
    "digest": (lambda d: d["slides"][0].update(digest="0"), "hash of the set"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_an_edited_manifest_is_refused_even_with_a_right_checksum(root, kind):
    change, message = EDITS[kind]
    edit(root, change, resum=True)
    with pytest.raises(TileSetError, match=message):
        TileSet.open(root)


def test_the_checksum_of_the_manifest_is_checked(root):
    edit(root, lambda d: d["slides"][0]["source"].update(he="another"), resum=False)
    with pytest.raises(TileSetError, match="edited or damaged; finish restores"):
        TileSet.open(root)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_manifest_opens_or_is_refused(tmp_path_factory, data):
    root = fuzzed(tmp_path_factory)
    document = manifest.read_manifest(root)
    target = document
    for _ in range(data.draw(st.integers(0, 3))):
        members = target.values() if isinstance(target, dict) else target
        inner = [v for v in members if isinstance(v, (dict, list)) and v]
        if not inner:
            break
        target = data.draw(st.sampled_from(inner))
    key = data.draw(st.sampled_from(sorted(target) if isinstance(target, dict) else range(len(target))))
    target[key] = data.draw(JSON)
    document["sum"] = json_sha256({k: v for k, v in document.items() if k != "sum"})
    copy = tmp_path_factory.mktemp("copy")
    (copy / "manifest.json").write_text(json.dumps(document))
    for name in ("index.npz", "tiles.npz"):
        os.link(root / name, copy / name)
    with contextlib.suppress(TileSetError):
        TileSet.open(copy)


@given(st.binary(max_size=100))
@settings(max_examples=50, deadline=None)
def test_any_bytes_as_manifest_are_refused(tmp_path_factory, raw):
    root = tmp_path_factory.mktemp("set")
    (root / "manifest.json").write_bytes(raw)
    with pytest.raises(TileSetError):
        TileSet.open(root)


def test_a_deeply_nested_manifest_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(TileSetError):
        TileSet.open(tmp_path)


def test_the_same_slides_give_the_same_bytes(root, tmp_path):
    assert contents(write_set(tmp_path / "again")) == contents(root)


def test_the_hash_changes_with_pixels_columns_splits_and_specification(root, tmp_path):
    hashes = {TileSet.open(root).hash}
    changes = (
        lambda r: write_slide(r, SPEC, "B", "case-2", [record(1)]),
        lambda r: write_slide(r, SPEC, "C", "case-2", records(range(8, 12))),
        lambda r: remove_slide(r, "B"),
    )
    for i, change in enumerate(changes):
        other = write_set(tmp_path / str(i))
        change(other)
        hashes.add(finish(other, SPEC)["hash"])
    hashes.add(finish(root, SPEC, {"train": ["case-2"]})["hash"])
    spec = Spec.from_json(SPEC.to_json() | {"params": {"step": 12}})
    hashes.add(TileSet.open(write_set(tmp_path / "params", spec)).hash)
    assert len(hashes) == 6


def test_the_kinds_of_partner_are_all_in_the_sample():
    assert {(p.kind, p.encoding) for p in PARTNERS} >= {("image", "png"), ("image", "jpeg"), ("map", "png")}
