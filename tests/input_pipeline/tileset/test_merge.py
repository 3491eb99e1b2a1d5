import json
import os
import shutil
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest

from input_pipeline.tileset import (
    Record,
    Spec,
    TileSet,
    TileSetError,
    choose_splits,
    finish,
    remove_slide,
    write_slide,
    writer,
)
from input_pipeline.tileset.manifest import read_manifest, split_cases, write_manifest
from input_pipeline.tileset.mapped import open_columns
from input_pipeline.tileset.verify import verify
from tests.input_pipeline.tileset.samples import PARTNERS, SPEC, contents, record, records, write_set

SHARDS = [f"demo-tiles-{n:05d}.tfrecord" for n in range(4)]


@pytest.fixture
def root(tmp_path):
    return write_set(tmp_path / "set")


def identity(path):
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def test_running_it_again_touches_nothing(root):
    before = {p: identity(p) for p in root.rglob("*")}
    finish(root, SPEC)
    finish(root, SPEC, {"train": ["case-1"], "test": ["case-2"]})
    assert {p: identity(p) for p in root.rglob("*")} == before


def test_adding_a_slide_touches_its_own_shard_alone(root):
    before = {name: identity(root / name) for name in SHARDS[:3]}
    old = TileSet.open(root).read(range(11))
    write_slide(root, SPEC, "0 comes first by name", "case-1", records(range(30, 33)))
    finish(root, SPEC)
    tiles = TileSet.open(root)
    assert {name: identity(root / name) for name in SHARDS[:3]} == before
    assert tiles.slides == ["A 1", "B", "C", "0 comes first by name"]
    assert tiles.read(range(11)) == old
    assert tiles.ids("train").tolist() == [*range(7), 11, 12, 13]
    assert verify(root, deep=True) == []


def test_removing_a_slide_touches_its_own_shard_alone_and_its_place_is_used_again(root):
    before = {name: identity(root / name) for name in SHARDS[1:3]}
    remove_slide(root, "A 1")
    finish(root, SPEC)
    assert not (root / SHARDS[0]).exists()
    assert {name: identity(root / name) for name in SHARDS[1:3]} == before
    tiles = TileSet.open(root)
    assert (tiles.slides, tiles.cases, tiles.splits) == (["B", "C"], ["case-2"], {"train": [], "test": ["case-2"]})
    assert np.array_equal(tiles.decode(tiles.read([0])[0])["he"], record(7).he)
    assert verify(root, deep=True) == []
    write_slide(root, SPEC, "D", "case-2", records(range(3)))
    finish(root, SPEC)
    assert TileSet.open(root).slides == ["D", "B", "C"]
    assert verify(root, deep=True) == []


def test_a_set_of_no_tiles_is_a_set(tmp_path):
    write_slide(tmp_path, SPEC, "A", "c", [])
    finish(tmp_path, SPEC)
    tiles = TileSet.open(tmp_path)
    assert (len(tiles), tiles.slides, tiles.ids().tolist(), tiles.ids("train").tolist()) == (0, ["A"], [], [])
    assert verify(tmp_path, deep=True) == []


def test_a_column_that_a_slide_does_not_have_is_nan_there(tmp_path):
    spec = Spec("demo", 8, 0.5, "png")
    tile = np.zeros((8, 8, 3), np.uint8)
    write_slide(tmp_path, spec, "A", "c", [Record(tile, columns={"age": 2**40 + 1})])
    write_slide(tmp_path, spec, "B", "c", [Record(tile, columns={"dose": 0.5})])
    finish(tmp_path, spec)
    tiles = TileSet.open(tmp_path).tiles
    assert tiles["age"][0] == 2**40 + 1
    assert np.isnan(tiles["age"][1])
    assert np.isnan(tiles["dose"][0])


REFUSED = {
    "case 'case-1' is in split 'train' and in 'test'": {"train": ["case-1"], "test": ["case-2", "case-1"]},
    "case 'case-9', which no slide has": {"train": ["case-9"]},
    "'A 1', which no slide has; is it a slide id": {"train": ["A 1"]},
    "list of case ids": {"train": "case-1"},
    "a split": {"../x": ["case-1"]},
    "format uses itself: 'all'": {"all": ["case-1"]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_splits_are_refused_and_the_set_stays(root, message):
    before = contents(root)
    with pytest.raises(TileSetError, match=message):
        finish(root, SPEC, REFUSED[message])
    assert contents(root) == before


def test_splits_are_kept_and_new_cases_added_to_them(tmp_path):
    write_slide(tmp_path, SPEC, "A", "c1", [record(0)])
    assert finish(tmp_path, SPEC)["splits"] == {"train": ["c1"]}
    write_slide(tmp_path, SPEC, "B", "c2", [record(1)])
    assert finish(tmp_path, SPEC)["splits"] == {"train": ["c1", "c2"]}
    document = finish(tmp_path, SPEC, {"train": ["c2"], "test": []})
    assert (document["splits"], document["cases_without_split"]) == ({"train": ["c2"], "test": []}, ["c1"])
    write_slide(tmp_path, SPEC, "C", "c3", [record(2)])
    document = finish(tmp_path, SPEC)
    assert (document["splits"], document["cases_without_split"]) == ({"train": ["c2", "c3"], "test": []}, ["c1"])
    finish(tmp_path, SPEC, {"train": ["c2"], "test": ["c3"]})
    assert TileSet.open(tmp_path).ids("test").tolist() == [2]


def test_a_case_that_comes_back_finds_its_old_split(root):
    finish(root, SPEC, {"train": ["case-2"], "test": ["case-1"]})
    remove_slide(root, "A 1")
    assert finish(root, SPEC)["splits"] == {"train": ["case-2"], "test": []}
    write_slide(root, SPEC, "A 1", "case-1", records(range(2)))
    assert finish(root, SPEC)["splits"] == {"train": ["case-2"], "test": ["case-1"]}


BAD_RULES = [
    7,
    {"shares": None, "seed": 0},
    {"shares": None, "seed": -1, "absent": {}},
    {"shares": None, "seed": 0, "absent": {"c": "val"}},
    {"shares": None, "seed": 0, "absent": {"c": ["train"]}},
    {"shares": {"train": 1.0}, "seed": 0, "absent": {}},
    {"shares": {"train": 0.5, "test": 0.6}, "seed": 0, "absent": {}},
    {"shares": {"train": True, "test": 0.0}, "seed": 0, "absent": {}},
]


@pytest.mark.parametrize("rule", BAD_RULES)
def test_a_wrong_rule_of_splits_is_refused_even_with_a_right_checksum(root, rule):
    write_manifest(root, read_manifest(root) | {"split_rule": rule})
    with pytest.raises(TileSetError, match=r"split_rule|shares"):
        read_manifest(root)


def test_every_sidecar_is_opened_twice_at_most(root, monkeypatch):
    opened = Counter()

    def counted(path, only=None):
        opened[path.name] += 1
        return open_columns(path, only)

    monkeypatch.setattr(writer, "open_columns", counted)
    (root / "index.npz").unlink()
    finish(root, SPEC)
    assert opened == {"A 1.npz": 2, "B.npz": 2, "C.npz": 2}
    opened.clear()
    finish(root, SPEC)
    assert opened == {"A 1.npz": 1, "B.npz": 1, "C.npz": 1}


def test_slides_of_other_parameters_are_refused(root):
    other = Spec.from_json(SPEC.to_json() | {"params": {"step": 12}})
    with pytest.raises(TileSetError, match="3 of 3 slides were written with another specification"):
        finish(root, other)
    write_slide(root, other, "C", "case-2", [record(1)])
    with pytest.raises(TileSetError, match=r"1 of 3 slides.*first: 'C'"):
        finish(root, SPEC)
    assert len(TileSet.open(root)) == 11


def test_a_renamed_set_leaves_no_shard_of_the_old_name(root):
    other = Spec.from_json(SPEC.to_json() | {"name": "new"})
    for slide, case, seeds in (("A 1", "case-1", range(2)), ("B", "case-2", range(0)), ("C", "case-2", range(3))):
        write_slide(root, other, slide, case, records(seeds))
    finish(root, other)
    assert sorted(p.name for p in root.glob("*.tfrecord")) == [f"new-tiles-{n:05d}.tfrecord" for n in range(3)]
    assert verify(root, deep=True) == []


def test_missing_files_are_refused_by_name(root):
    kept = (root / "slides" / "B.npz").read_bytes()
    (root / "slides" / "B.npz").unlink()
    with pytest.raises(TileSetError, match=r"slides/B.npz is missing; write the slide again, or remove_slide"):
        finish(root, SPEC)
    (root / "slides" / "B.npz").write_bytes(kept)
    (root / SHARDS[0]).unlink()
    with pytest.raises(TileSetError, match="1 shards are missing, first of slide 'A 1'"):
        finish(root, SPEC)
    write_slide(root, SPEC, "A 1", "case-1", records(range(7)), {"he": {"name": "a.svs"}})
    finish(root, SPEC)
    assert verify(root, deep=True) == []


def test_a_damaged_sidecar_does_not_enter_the_index(root):
    (root / "index.npz").unlink()
    path = root / "slides" / "C.npz"
    raw, x = path.read_bytes(), open_columns(path)["x"]
    at = raw.index(x.tobytes())
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    with pytest.raises(TileSetError, match=r"slides/C.npz is damaged; write the slide again"):
        finish(root, SPEC)


def test_finish_before_any_slide_is_refused(tmp_path):
    with pytest.raises(TileSetError, match="no written slides"):
        finish(tmp_path, SPEC)


@pytest.mark.parametrize("name", ["index.npz", "tiles.npz", "features.json", "dataset_info.json", "label.labels.txt"])
def test_a_lost_file_is_made_again_equal_to_the_last_bit(root, name):
    before = contents(root)
    (root / name).unlink()
    finish(root, SPEC)
    assert contents(root) == before


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_text(p.read_text().replace("C", "D"))])
def test_a_lost_or_edited_manifest_is_restored(root, damage):
    before = contents(root)
    damage(root / "manifest.json")
    with pytest.raises(TileSetError):
        TileSet.open(root)
    finish(root, SPEC)
    assert contents(root) == before


def test_finish_killed_at_any_rename_is_not_a_set_and_is_mended_by_running_it_again(tmp_path, monkeypatch):
    def prepare(root):
        write_set(root)
        write_slide(root, SPEC, "A 1", "case-1", records(range(40, 43)))
        write_slide(root, SPEC, "D", "case-1", records(range(50, 52)))
        remove_slide(root, "B")
        return root

    expected = prepare(tmp_path / "expected")
    finish(expected, SPEC)
    start, replace = prepare(tmp_path / "start"), os.replace
    calls = old = 0

    class Killed(BaseException):
        pass

    def die(a, b):
        nonlocal calls
        calls += 1
        if calls == limit:
            raise Killed
        replace(a, b)

    for limit in range(1, 40):
        root = tmp_path / str(limit)
        shutil.copytree(start, root)
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", die)
            try:
                finish(root, SPEC)
            except Killed:
                pass
            else:
                break
        tiles = None
        with suppress(TileSetError):
            tiles = TileSet.open(root)
        if tiles:  # the old set, or none: never a mixture
            old += 1
            assert tiles.slides == ["A 1", "B", "C"]
            assert len(tiles.read(range(11))) == 11
        finish(root, SPEC)
        assert contents(root) == contents(expected)
    assert limit > 8
    assert old == 2  # before either manifest says that finish began


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("absent", [False, True])
def test_tfds_opens_it(tmp_path, absent):
    tfds = pytest.importorskip("tensorflow_datasets")
    seeds = range(2) if not absent else range(7)
    write_slide(tmp_path, SPEC, "A 1", "case-1", records(seeds))
    write_slide(tmp_path, SPEC, "B", "case-2", [])
    write_slide(tmp_path, SPEC, "C", "case-2", records(range(8, 11)))
    write_slide(tmp_path, SPEC, "gone", "case-2", [record(0)])
    finish(tmp_path, SPEC)
    remove_slide(tmp_path, "C")
    finish(tmp_path, SPEC)
    builder = tfds.builder_from_directory(tmp_path)
    assert builder.info.features["label"].names == ["no", "yes"]
    tiles = TileSet.open(tmp_path)
    found = list(builder.as_dataset(split="all").as_numpy_iterator())
    assert len(found) == len(tiles) == len(seeds) + 1
    for theirs, example in zip(found, tiles.read(range(len(tiles))), strict=True):
        ours = tiles.decode(example)
        assert theirs["slide_id"].decode() == example.slide
        assert theirs["case_id"].decode() == tiles.cases[tiles.tiles["case"][example.id]]
        assert theirs["x"] == tiles.tiles["x"][example.id]
        assert theirs["label"] == tiles.tiles["label"][example.id]
        assert np.array_equal(theirs["he"], ours["he"])
        for partner in PARTNERS:
            value, mine = theirs[partner.name], ours[partner.name]
            if absent and partner.name in ("markers", "genes"):  # in a set where some are absent: none or one
                assert (len(value) == 0) == (mine is None)
                if mine is None:
                    continue
                value = value[0] if partner.kind == "image" else value
            if partner.stacked:
                value = np.moveaxis(value.reshape(partner.channels, *mine.shape[:2]), 0, -1)
            assert np.abs(value.astype(float) - mine).max() <= (3 if partner.name == "ihc" else 0)


def test_every_number_of_the_manifest_is_that_of_the_files(root):
    document = read_manifest(root)
    assert [s["bytes"] for s in document["slides"]] == [(root / name).stat().st_size for name in SHARDS[:3]]
    info = json.loads((root / "dataset_info.json").read_text())
    assert info["splits"][0]["shardLengths"] == ["7", "0", "4"]
    assert document["slides"][0]["source"] == {"he": {"name": "a.svs"}}


def test_split_cases_is_by_case_stratified_and_the_same_in_any_order():
    cases = [f"c{i // 2}" for i in range(120)]
    labels = ["rare" if i // 2 < 20 else "often" for i in range(120)]
    fractions = {"train": 0.6, "val": 0.2, "test": 0.2}
    splits = split_cases(cases, labels, fractions, seed=1)
    assert sorted(c for members in splits.values() for c in members) == sorted(set(cases))
    rare = {name: sum(int(c[1:]) < 20 for c in members) for name, members in splits.items()}
    assert {name: len(members) for name, members in splits.items()} == {"train": 36, "val": 12, "test": 12}
    assert rare == {"train": 12, "val": 4, "test": 4}
    order = np.random.default_rng(0).permutation(120)
    again = split_cases(
        [cases[i] for i in order], [labels[i] for i in order], {"train": 0.6, "val": 0.2, "test": 0.2}, 1
    )
    assert again == splits
    assert split_cases(cases, labels, fractions, seed=2) != splits
    with pytest.raises(TileSetError, match="sum to 1"):
        split_cases(cases, labels, {"train": 0.6})


def test_splits_of_shares_are_sticky():
    shares = {"train": 0.5, "val": 0.25, "test": 0.25}
    cases = [f"c{i:02}" for i in range(40)]
    labels = [i % 2 for i in range(40)]

    def manifest_of(assignment, present):
        splits = assignment.splits(present)
        return {"cases": present, "splits": splits, "split_rule": assignment.rule(present)}

    first = choose_splits(shares, cases[:20], labels[:20], seed=3)
    assert {n: len(c) for n, c in first.splits(cases).items()} == {"train": 10, "val": 5, "test": 5}
    old = manifest_of(first, cases[:20])
    for again in (None, shares):  # 20 new cases, one of the old ones is away
        second = choose_splits(again, cases[1:], labels[1:], old, seed=3)
        assert all(second.of[case] == first.of[case] for case in cases[:20])
        counts = {n: len(c) for n, c in second.splits(cases[1:]).items()}
        assert all(abs(counts[n] - share * 39) <= 1 for n, share in shares.items())
        third = choose_splits(None, cases, labels, manifest_of(second, cases[1:]))
        assert third.of == second.of
    other = choose_splits({"train": 0.25, "val": 0.25, "test": 0.5}, cases[:20], labels[:20], old, seed=3)
    assert {n: len(c) for n, c in other.splits(cases).items()} == {"train": 5, "val": 5, "test": 10}


def test_new_cases_join_lists_by_the_share_these_have():
    lists = {"train": ["a", "b", "c"], "test": ["d"]}
    first = choose_splits(lists, [*"abcde"], [0] * 5)
    old = {"cases": [*"abcde"], "splits": first.splits("abcde"), "split_rule": first.rule("abcde")}
    new = [f"n{i}" for i in range(40)]
    second = choose_splits(None, [*"abcde", *new], [0] * 45, old)
    assert {n: len(c) for n, c in second.splits(second.of).items()} == {"train": 33, "test": 11}
    assert second.of["e"] is None


@pytest.mark.parametrize("shares", [{"train": 0.7}, {"Train": 1.0}, {"train": 0.5, "test": ["a"]}, {"train": np.nan}])
def test_wrong_shares_are_refused(shares):
    with pytest.raises(TileSetError, match=r"sum to 1|lower case|all shares"):
        choose_splits(shares, ["a"], [0])
