import csv
from contextlib import suppress

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline.datasets.folder import import_folder, positions, read_table
from input_pipeline.tileset import Partner, TileSet, TileSetError, finish, write_slide
from input_pipeline.tileset.verify import verify
from tests.input_pipeline.tileset.samples import SPEC, contents

NUCLEI = {"nuclei": Partner("nuclei", "map", dtype="uint16")}
HEADER = ("slide_id", "case_id", "label", "mpp", "he", "nuclei", "stage", "site")


def field(folder, name, height, width, seed):
    """An H&E field and its map: every square of 7 px is an instance of its own."""
    rng = np.random.default_rng(seed)
    he = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    y, x = np.mgrid[:height, :width] // 7
    nuclei = (y * (x.max() + 1) + x + 1).astype(np.uint16)
    (folder / f"{name}.png").write_bytes(imagecodecs.png_encode(he))
    (folder / f"{name}_n.png").write_bytes(imagecodecs.png_encode(nuclei))
    return he, nuclei


def table(folder, rows, header=HEADER, name="table.csv"):
    with open(folder / name, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder / name


@pytest.fixture
def cohort(tmp_path):
    fields = {
        name: field(tmp_path, name, *size, i) for i, (name, size) in enumerate({"a": (64, 64), "b": (50, 90)}.items())
    }
    fields["c"] = field(tmp_path, "c", 20, 30, 9)
    rows = [(n, f"case-{n}", "xy"[n == "b"], 0.5, f"{n}.png", f"{n}_n.png", i, "north") for i, n in enumerate("abc")]
    rows[2] = (*rows[2][:6], "", "")
    return tmp_path, table(tmp_path, rows), fields


def _rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))[1:]


def per_slide(tiles):
    for number, slide in enumerate(tiles.slides):
        rows = range(*tiles.first_row[number : number + 2])
        yield slide, [(i, tiles.decode(e)) for i, e in zip(rows, tiles.read(rows), strict=True)]


@pytest.mark.parametrize("edges", ["pad", "shift"])
def test_every_pixel_of_every_field_is_in_the_tiles(cohort, edges):
    folder, path, fields = cohort
    out = folder / "set"
    import_folder(path, out, partners=NUCLEI, size=32, he_encoding="png", edges=edges)
    assert verify(out, deep=True) == []
    tiles = TileSet.open(out)
    for slide, found in per_slide(tiles):
        he, nuclei = fields[slide]
        seen_he, seen = np.full(he.shape, 7, np.uint8), np.zeros(nuclei.shape, int)
        for i, tile in found:
            x, y = int(tiles.tiles["x"][i]), int(tiles.tiles["y"][i])
            w, h = int(tiles.tiles["inside_x"][i]), int(tiles.tiles["inside_y"][i])
            seen_he[y : y + h, x : x + w] = tile["he"][:h, :w]
            seen[y : y + h, x : x + w] = tile["nuclei"][:h, :w, 0]
            assert (tile["he"][h:] == 255).all()
            assert (tile["nuclei"][h:] == 0).all()
            assert (tile["nuclei"][:, w:] == 0).all()
        assert np.array_equal(seen_he, he)
        assert np.array_equal(seen, nuclei)


def test_columns_classes_and_facts(cohort):
    folder, path, _ = cohort
    shares = {"train": 2 / 3, "test": 1 / 3}
    report = import_folder(path, folder / "set", partners=NUCLEI, size=32, splits=shares, workers=0)
    document = report.manifest
    assert (report.failed, report.splits) == ({}, {n: len(c) for n, c in document["splits"].items()})
    tiles = TileSet.open(folder / "set")
    assert tiles.spec.label_names == ("x", "y")
    assert tiles.spec.mpp == 0.5
    label = {slide: set(tiles.tiles["label"][[i for i, _ in found]].tolist()) for slide, found in per_slide(tiles)}
    assert label == {"a": {0}, "b": {1}, "c": {0}}
    stage = {slide: tiles.tiles["stage"][found[0][0]] for slide, found in per_slide(tiles)}
    assert (stage["a"], stage["b"], np.isnan(stage["c"])) == (0, 1, True)
    source = document["slides"][0]["source"]
    assert source["info"] == {"site": "north"}
    assert source["files"]["he"]["name"] == "a.png"
    assert len(source["files"]["nuclei"]["sha256"]) == 64
    assert sorted(map(len, document["splits"].values())) == [1, 2]


def test_other_scales_are_resampled_maps_by_the_nearest_pixel(cohort):
    folder, path, fields = cohort
    smooth = np.add.outer(np.arange(64) * 2, np.arange(64))[..., None] + np.array([0, 20, 40])
    (folder / "a.png").write_bytes(imagecodecs.png_encode(smooth.astype(np.uint8)))
    small = Partner("nuclei", "map", dtype="uint16", size=8)
    import_folder(path, folder / "set", partners={"nuclei": small}, size=16, mpp=1.0, he_encoding="png")
    tiles = TileSet.open(folder / "set")
    assert tiles.spec.partners[0].mpp == 2.0
    tile = tiles.decode(tiles.read([0])[0])
    nuclei = fields["a"][1]
    mean = smooth[:32, :32].reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    assert np.abs(tile["he"] - mean)[1:, 1:].max() <= 1
    assert set(np.unique(tile["nuclei"])) <= set(np.unique(nuclei[:32, :32]))
    assert np.array_equal(tiles.tiles["x"][:2], [0, 32])


def test_a_partner_of_another_pixel_size_shows_the_same_place(cohort):
    folder, path, fields = cohort
    for name, (_, nuclei) in fields.items():
        double = nuclei.repeat(2, axis=0).repeat(2, axis=1)
        (folder / f"{name}_n.png").write_bytes(imagecodecs.png_encode(double))
    import_folder(path, folder / "set", partners=NUCLEI, size=32)
    tiles = TileSet.open(folder / "set")
    assert np.array_equal(tiles.decode(tiles.read([3])[0])["nuclei"][..., 0], fields["a"][1][32:64, 32:64])


def test_a_rerun_writes_only_what_changed(cohort):
    folder, path, _ = cohort
    out = folder / "set"
    import_folder(path, out, partners=NUCLEI, size=32)
    before = {p.name: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    import_folder(path, out, partners=NUCLEI, size=32)
    assert {p.name: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before
    field(folder, "b", 50, 90, 77)
    import_folder(path, out, partners=NUCLEI, size=32)
    after = {p.name: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert {n for n in after if after[n] != before[n] and "tfrecord" in n} == {"folder-tiles-00001.tfrecord"}
    assert verify(out, deep=True) == []
    rows = path.read_text().splitlines()
    path.write_text("\n".join([rows[0], rows[2].replace("case-b", "case-x"), rows[3]]))
    import_folder(path, out, partners=NUCLEI, size=32)
    assert TileSet.open(out).slides == ["b", "c"]
    assert TileSet.open(out).cases == ["case-x", "case-c"]
    assert verify(out, deep=True) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_one_broken_field_does_not_stop_the_others(cohort, workers):
    folder, path, _ = cohort
    good = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(good[:500])
    said: list[str] = []
    options = {"partners": NUCLEI, "size": 32, "workers": workers, "say": said.append}
    report = import_folder(path, folder / "set", **options)
    assert report.failed.keys() == {"b"}
    assert any(line.startswith("b failed: ") for line in said)
    assert TileSet.open(folder / "set").slides == ["a", "c"]
    assert verify(folder / "set", deep=True) == []
    times = {n: (folder / "set" / "slides" / f"{n}.npz").stat().st_mtime_ns for n in "ac"}
    (folder / "b.png").write_bytes(good)
    assert not import_folder(path, folder / "set", **options).failed
    assert times == {n: (folder / "set" / "slides" / f"{n}.npz").stat().st_mtime_ns for n in "ac"}
    assert TileSet.open(folder / "set").slides == ["a", "c", "b"]
    (folder / "b.png").write_bytes(good[:500])
    assert import_folder(path, folder / "set", **options).failed.keys() == {"b"}
    assert said[-1] == "b: its 6 tiles of an earlier run stay in the set"
    assert TileSet.open(folder / "set").slides == ["a", "c", "b"]
    assert verify(folder / "set", deep=True) == []


def test_the_way_out_of_a_damaged_file_works(cohort):
    folder, path, _ = cohort
    import_folder(path, folder / "set", size=32)
    before = contents(folder / "set")
    damaged = folder / "set" / "slides" / "b.npz"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(TileSetError, match=r"b.npz is not readable: .*; delete that file and write the slide again"):
        import_folder(path, folder / "set", size=32)
    damaged.unlink()
    import_folder(path, folder / "set", size=32)
    assert contents(folder / "set") == before


def test_nothing_that_can_be_written_is_an_error(cohort):
    folder, path, _ = cohort
    for name in "abc":
        (folder / f"{name}.png").unlink()
    with pytest.raises(TileSetError, match=r"3 of 3 fields failed, so there is no set(?s:.*)b: "):
        import_folder(path, folder / "set", partners=NUCLEI, size=32)


def test_a_folder_that_holds_another_set_is_refused(cohort):
    folder, path, _ = cohort
    out = folder / "set"
    import_folder(path, out, partners=NUCLEI, size=32)
    before = contents(out)
    with pytest.raises(TileSetError, match="holds a set of name 'folder', this one is of name 'other'"):
        import_folder(path, out, partners=NUCLEI, size=32, name="other")
    rows = [("z", "case-z", "x", 0.5, "a.png", "a_n.png", 1, "north")]
    with pytest.raises(TileSetError, match=r"3 other slides .*none of which is wanted; give another folder"):
        import_folder(table(folder, rows, name="other.csv"), out, partners=NUCLEI, size=32)
    write_slide(folder / "lib", SPEC, "a", "case-a", [])
    finish(folder / "lib", SPEC)
    with pytest.raises(TileSetError, match="holds a set of importer 'pack', this one is of importer 'folder'"):
        import_folder(path, folder / "lib", partners=NUCLEI, size=32, name=SPEC.name)
    assert contents(out) == before


def test_splits_are_kept_and_a_field_that_failed_finds_its_own_again(cohort):
    folder, path, _ = cohort
    lists = {"train": ["case-a", "case-c"], "test": ["case-b"]}
    good = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(good[:500])
    assert import_folder(path, folder / "set", size=32, splits=lists).splits == {"train": 2, "test": 0}
    (folder / "b.png").write_bytes(good)
    assert import_folder(path, folder / "set", size=32).manifest["splits"] == lists


def test_an_empty_cell_is_an_absent_partner(cohort):
    folder, path, _ = cohort
    path.write_text(path.read_text().replace("b_n.png", ""))
    import_folder(path, folder / "set", partners=NUCLEI, size=32)
    tiles = TileSet.open(folder / "set")
    for slide, found in per_slide(tiles):
        assert all((tile["nuclei"] is None) == (slide == "b") for _, tile in found)
    assert verify(folder / "set", deep=True) == []


def test_a_partner_of_another_shape_is_refused(cohort):
    folder, path, _ = cohort
    (folder / "a_n.png").write_bytes(imagecodecs.png_encode(np.zeros((64, 80), np.uint16)))
    with pytest.raises(TileSetError, match=r"a: a_n.png is no picture of the same field"):
        import_folder(table(folder, [_rows(path)[0]], name="a.csv"), folder / "set", partners=NUCLEI, size=32)


def test_the_column_split_is_used_and_a_case_in_two_is_refused(cohort):
    folder, _, _ = cohort
    header = ("slide_id", "case_id", "he", "mpp", "split")
    rows = [("a", "p", "a.png", 0.5, "train"), ("b", "q", "b.png", 0.5, "test"), ("c", "p", "c.png", 0.5, "train")]
    report = import_folder(table(folder, rows, header), folder / "set", size=32)
    assert report.manifest["splits"] == {"train": ["p"], "test": ["q"]}
    rows[2] = ("c", "p", "c.png", 0.5, "test")
    with pytest.raises(TileSetError, match="case 'p' is in split 'train' and in 'test'"):
        import_folder(table(folder, rows, header), folder / "set", size=32)


HEAD = ("slide_id", "case_id", "he", "nuclei")
BAD_TABLES = {
    "lacks the columns .'nuclei'.": [HEAD[:3], ("a", "c", "a.png")],
    "rows 2 and 3 have slide_id 'a'": [HEAD, ("a", "c", "", ""), ("a", "d", "", "")],
    "rows 2 and 3 have slide_id 'A'": [HEAD, ("a", "c", "", ""), ("A", "d", "", "")],
    "row 3: case 'p1' and case 'P1' differ in capitals only": [HEAD, ("a", "P1", "", ""), ("b", "p1", "", "")],
    "row 2: case_id is empty": [HEAD, ("a", " ", "a.png", "")],
    "row 2: 3 fields, the header has 4": [HEAD, ("a", "c", "a.png")],
    "row 3: 5 fields, the header has 4": [HEAD, ("a", "c", "", ""), ("b", "c", "", "", "x")],
    "row 2: slide_id '../a' is refused": [HEAD, ("../a", "c", "a.png", "")],
    "has no rows": [HEAD],
    "two columns are called 'he'": [(*HEAD, "he"), ("a", "c", "", "", "")],
}


@pytest.mark.parametrize("message", BAD_TABLES)
def test_a_table_that_cannot_be_is_refused(tmp_path, message):
    header, *rows = BAD_TABLES[message]
    with pytest.raises(ValueError, match=message):
        read_table(table(tmp_path, rows, header), set(HEAD))


@given(st.binary(max_size=80) | st.text('",\n\0aé', max_size=80).map(str.encode))
@settings(max_examples=200, deadline=None)
def test_any_bytes_as_a_table_are_read_or_refused(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(b"slide_id,case_id,he\n" + raw)
    with suppress(ValueError):
        assert all(set(row) == {"slide_id", "case_id", "he"} for row in read_table(path, {"slide_id"}))


def test_mpp_is_given_or_asked_for(cohort):
    folder, path, _ = cohort
    text = path.read_text()
    path.write_text(text.replace("0.5", "0.25", 1))
    with pytest.raises(TileSetError, match=r"do not share one mpp \(\[0.25, 0.5\]\): give mpp="):
        import_folder(path, folder / "set", size=32)
    path.write_text(text.replace("0.5", "fine", 1))
    with pytest.raises(TileSetError, match=r"mpp is a positive number.*'fine'"):
        import_folder(path, folder / "set", size=32)
    path.write_text(text.replace("0.5", ""))
    with pytest.raises(TileSetError, match="mpp"):
        import_folder(path, folder / "set", size=32)


def test_positions():
    assert positions(1000, 256, 256, "pad") == [0, 256, 512, 768]
    assert positions(1000, 256, 256, "shift") == [0, 256, 512, 744]
    assert positions(1000, 256, 256, "drop") == [0, 256, 512]
    assert positions(1024, 256, 256, "pad") == [0, 256, 512, 768]
    assert positions(100, 256, 256, "pad") == positions(100, 256, 256, "shift") == [0]
    assert positions(100, 256, 256, "drop") == []
    assert positions(512, 256, 128, "pad") == [0, 128, 256]


def test_monuseg_comes_back_nucleus_by_nucleus(real_data, tmp_path):
    path = real_data("monuseg/manifest.csv")
    fractions = {"train": 0.6, "val": 0.2, "test": 0.2}
    document = import_folder(path, tmp_path, name="monuseg", partners=NUCLEI, size=256, splits=fractions).manifest
    tiles = TileSet.open(tmp_path)
    assert len(tiles.cases) == 30
    assert len(tiles) == 30 * 16
    assert len(tiles.spec.label_names) == 7
    assert {name: len(cases) for name, cases in document["splits"].items()} == {"train": 18, "val": 6, "test": 6}
    total = 0
    for slide, found in per_slide(tiles):
        nuclei = set().union(*(np.unique(tile["nuclei"]).tolist() for _, tile in found)) - {0}
        assert len(nuclei) == tiles.tiles["n_nuclei"][found[0][0]], slide
        total += len(nuclei)
    assert total == 16_958
    assert verify(tmp_path, deep=True) == []
