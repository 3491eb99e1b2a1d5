import math
import os

import numpy as np
import pytest

from input_pipeline.tileset import (
    Partner,
    Record,
    Spec,
    TileSet,
    TileSetError,
    finish,
    remove_slide,
    tfrecord,
    write_slide,
    written_slides,
)
from input_pipeline.tileset.verify import verify
from input_pipeline.tileset.writer import pending_files
from tests.input_pipeline.tileset.samples import SIZE, SPEC, contents, record, records, write_set


def test_counts_say_what_was_written(tmp_path):
    assert write_slide(tmp_path, SPEC, "A", "c", records(range(7))) == {
        "tiles": 7,
        "nuclei": 7,
        "planes": 7,
        "markers": 6,
        "ihc": 7,
        "genes": 6,
    }
    assert write_slide(tmp_path, SPEC, "B", "c", [])["tiles"] == 0
    known = written_slides(tmp_path)
    assert {s: (m["case"], m["tiles"]) for s, m in known.items()} == {"A": ("c", 7), "B": ("c", 0)}
    assert known["A"]["spec_sha256"] == SPEC.sha256


BAD_IDS = ["", "a/b", "..", "../a", ".hidden", "a\\b", "a\nb", "a\0b", " a", "x" * 181, "é" * 91, "\u202eabc", 7, None]


@pytest.mark.parametrize("name", BAD_IDS)
def test_an_id_that_could_leave_the_folder_is_refused(tmp_path, name):
    with pytest.raises(TileSetError, match="slide_id"):
        write_slide(tmp_path / "set", SPEC, name, "case", [])
    with pytest.raises(TileSetError, match="case_id"):
        write_slide(tmp_path / "set", SPEC, "slide", name, [])
    with pytest.raises(TileSetError, match="slide_id"):
        remove_slide(tmp_path / "set", name)
    assert not list(tmp_path.iterdir())


def changed(**fields):
    whole = record(0)
    return Record(**({k: getattr(whole, k) for k in whole.__dataclass_fields__} | fields))


def partner(name, array):
    return changed(partners=dict(record(0).partners) | {name: array})


BAD_RECORDS = {
    "label 2 is out of range: -1 .unknown. to 1": changed(label=2),
    "label -2 is out of range": changed(label=-2),
    "he: uint8 .* is expected, not float32": changed(he=np.zeros((SIZE, SIZE, 3), np.float32)),
    r"he: .* not uint8 \(24, 25, 3\)": changed(he=np.zeros((SIZE, SIZE + 1, 3), np.uint8)),
    r"not in the specification": partner("dapi", np.zeros((SIZE, SIZE), np.uint8)),
    r"markers: uint16 .* not uint8": partner("markers", np.zeros((12, 12, 4), np.uint8)),
    r"nuclei: .* 0 to 65535, not 0 to 65536": partner("nuclei", np.eye(SIZE, dtype=np.int32) * 65536),
    r"nuclei: .* not float64": partner("nuclei", np.zeros((SIZE, SIZE))),
    r"genes: a vector of 5 finite values": partner("genes", np.array([1, 2, 3, 4, np.nan])),
    r"genes: a vector of 5 finite .*\(4,\)": partner("genes", np.ones(4)),
    r"scores of \['dapi'\]": changed(score={"dapi": 1.0}),
}


@pytest.mark.parametrize("message", BAD_RECORDS)
def test_a_tile_that_is_not_as_announced_is_refused_and_nothing_is_left(tmp_path, message):
    with pytest.raises(TileSetError, match="slide 'A', tile 1: .*" + message) as caught:
        write_slide(tmp_path, SPEC, "A", "c", [record(0), BAD_RECORDS[message]])
    assert caught.value.slide == "A"
    assert not list((tmp_path / "slides").iterdir())


def test_every_tile_of_a_slide_has_the_same_columns(tmp_path):
    for name, message in (("Bad Name", "name of a column"), ("label", "uses itself"), ("score_x", "uses itself")):
        with pytest.raises(TileSetError, match=message):
            write_slide(tmp_path, SPEC, "A", "c", [changed(columns={name: 1.0})])
    with pytest.raises(TileSetError, match="tile 1: columns"):
        write_slide(tmp_path, SPEC, "A", "c", [record(0), changed(columns={"other": 1.0})])


def test_a_writer_that_fails_half_way_leaves_the_old_slide_as_it_was(tmp_path):
    root = write_set(tmp_path / "set")
    before = contents(root)

    def broken():
        yield record(0)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_slide(root, SPEC, "A 1", "case-1", broken())
    assert contents(root) == before
    assert verify(root, deep=True) == []


@pytest.mark.parametrize("call", range(1, 5))
def test_a_writer_killed_at_any_rename_leaves_a_slide_that_is_whole(tmp_path, monkeypatch, call):
    root = write_set(tmp_path / "set")
    calls, replace = 0, os.replace

    class Killed(BaseException):
        pass

    def die(a, b):
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        replace(a, b)

    monkeypatch.setattr(os, "replace", die)
    try:
        write_slide(root, SPEC, "A 1", "case-1", records(range(20, 24)))
        killed = False
    except Killed:
        killed = True
    monkeypatch.setattr(os, "replace", replace)
    assert killed == (call <= 2)
    finish(root, SPEC)
    tiles = TileSet.open(root)
    seed = 0 if killed else 20
    assert np.array_equal(tiles.decode(tiles.read([0])[0])["he"], record(seed).he)
    assert len(tiles) == (11 if killed else 8)
    write_slide(root, SPEC, "A 1", "case-1", records(range(20, 24)))
    finish(root, SPEC)
    assert verify(root, deep=True) == []


def test_what_reached_the_disk_is_read_back(tmp_path, monkeypatch):
    write = tfrecord.write_record

    def lossy(file, payload):
        return write(file, payload[:-1] + bytes([payload[-1] ^ 1])) ^ 1

    monkeypatch.setattr(tfrecord, "write_record", lossy)
    with pytest.raises(TileSetError, match="2 records are on disk, not the 2 written"):
        write_slide(tmp_path, SPEC, "A", "c", records(range(2)))
    assert not list((tmp_path / "slides").iterdir())


def test_writing_again_replaces_and_another_case_is_refused(tmp_path):
    root = write_set(tmp_path / "set")
    write_slide(root, SPEC, "A 1", "case-1", [record(50)])
    write_slide(root, SPEC, "A 1", "case-1", [record(51), record(52)])
    assert len(pending_files(root / "slides", "A 1")) == 1
    assert len(TileSet.open(root)) == 11
    with pytest.raises(TileSetError, match="slide 'A 1' is already there with case 'case-1', now 'case-2'"):
        write_slide(root, SPEC, "A 1", "case-2", [record(50)])
    finish(root, SPEC)
    tiles = TileSet.open(root)
    assert len(tiles) == 6
    assert np.array_equal(tiles.decode(tiles.read([1])[0])["he"], record(52).he)
    assert verify(root, deep=True) == []


def test_ids_that_share_a_beginning_do_not_meet(tmp_path):
    for slide in ("a", "a.b", "a.b.c"):
        write_slide(tmp_path, SPEC, slide, "c", [record(len(slide))])
    write_slide(tmp_path, SPEC, "a", "c", [record(9)])
    finish(tmp_path, SPEC)
    assert TileSet.open(tmp_path).slides == ["a", "a.b", "a.b.c"]
    assert verify(tmp_path, deep=True) == []


def test_a_broken_sidecar_is_named_and_mended_by_writing_again(tmp_path):
    write_slide(tmp_path, SPEC, "A", "c", [record(0)])
    (tmp_path / "slides" / "A.npz").write_bytes(b"PK")
    with pytest.raises(TileSetError, match=r"A.npz is not readable.*write the slide again"):
        finish(tmp_path, SPEC)
    write_slide(tmp_path, SPEC, "A", "c", [record(0)])
    finish(tmp_path, SPEC)


def test_remove_slide_wants_a_slide_that_is_there(tmp_path):
    with pytest.raises(TileSetError, match="there is no slide 'A'"):
        remove_slide(tmp_path, "A")


BAD_SPECS = {
    "name of a tile set": {"name": "My Set"},
    "size": {"size": 0},
    "mpp": {"mpp": math.nan},
    "jpeg_quality": {"jpeg_quality": 101},
    "he_encoding": {"he_encoding": "webp"},
    "two partners": {"partners": (Partner("a"), Partner("a"))},
    "higher than 65500": {"partners": (Partner("a", channels=256, size=4096),)},
    "label names are": {"label_names": ("a\nb",)},
    "two label names": {"label_names": ("a", "a")},
    "params hold": {"params": {"x": object()}},
}


@pytest.mark.parametrize("message", BAD_SPECS)
def test_a_specification_that_cannot_be_is_refused(message):
    with pytest.raises(TileSetError, match=message):
        Spec(**({"name": "demo", "size": 256, "mpp": 0.5} | BAD_SPECS[message]))


BAD_PARTNERS = {
    "name of a partner": {"name": "a b"},
    "uses itself": {"name": "he"},
    "kind is": {"name": "a", "kind": "video"},
    "encoding 'jpeg' is not one of": {"name": "a", "kind": "map", "dtype": "uint16", "encoding": "jpeg"},
    "dtype 'uint16' with encoding 'jpeg'": {"name": "a", "dtype": "uint16", "encoding": "jpeg"},
    "length is": {"name": "a", "kind": "vector", "dtype": "float32", "encoding": "float32"},
    "channels is": {"name": "a", "channels": 257},
    "1 channel names for 2": {"name": "a", "channels": 2, "channel_names": ("x",)},
}


@pytest.mark.parametrize("message", BAD_PARTNERS)
def test_a_partner_that_cannot_be_is_refused(message):
    with pytest.raises(TileSetError, match=message):
        Partner(**BAD_PARTNERS[message])


def test_a_specification_survives_json():
    assert Spec.from_json(SPEC.to_json()) == SPEC
    assert Spec.from_json(SPEC.to_json()).sha256 == SPEC.sha256
