"""Tiles found again in a corpus whose truth is known; places on slides; what is written; folders of features."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import tifffile
from PIL import Image

from mfl_jax import cli, corpus, faiss_index, search, sort, topk
from mfl_jax.evaluators import Task
from mfl_jax.report import maps
from mfl_jax.report.maps import COLOURS, MOST, class_map

KINDS = np.eye(3, 8)


def made(pictures: bool = True) -> corpus.Corpus:
    """4 cases of 2 slides of 3 x 4 tiles, 3 kinds in turn; the features tell the kind, and a little the case."""
    n, rng = 96, np.random.default_rng(0)
    kind = np.arange(n) % 3
    case = np.repeat([f"c{i}" for i in range(4)], 24)
    slide = np.array([f"{c}-{i // 12 % 2}" for i, c in enumerate(case)])
    features = KINDS[kind] + 0.1 * np.eye(8)[3 + np.arange(n) // 24] + 0.01 * rng.normal(size=(n, 8))
    columns = {"tile": np.arange(n) + 100, "slide": slide, "case": case, "kind": kind}
    columns |= {"x": np.arange(n) % 4 * 64.0, "y": np.arange(n) // 4 % 3 * 64.0, "label": kind % 2}
    columns |= {"mpp": np.full(n, 0.25), "side": np.full(n, 64.0)}

    def draw(rows):
        return [np.full((8, 8, 3), 60 * kind[i], np.uint8) if pictures else None for i in rows]

    return corpus.Corpus(features.astype(np.float32), columns, draw, {"label": ("even", "odd")})


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("across", search.ACROSS)
def test_the_same_kind_is_found_outside_of_what_is_left_out(across):
    tiles = made()
    hits = search.search(tiles, np.array([30]), 9, across)
    assert (tiles.columns["kind"][hits.rows] == 0).all()
    left_out = {"case": range(24, 48), "slide": range(24, 36), "tile": [30], "nothing": []}[across]
    unit = topk.unit(tiles.features).astype(float)
    close = unit @ unit[30]
    close[np.array(list(left_out), int)] = -np.inf
    assert hits.rows.tolist() == np.argsort(-close, kind="stable")[:9].tolist()
    np.testing.assert_allclose(hits.cosine, close[hits.rows], atol=1e-6)


def test_several_tiles_ask_with_their_mean_and_all_their_cases_are_left_out():
    tiles = made()
    hits = search.search(tiles, np.array([0, 30]), 5)
    assert not set(tiles.columns["case"][hits.rows]) & {"c0", "c1"}
    with pytest.raises(ValueError, match="all 96 tiles are of the query's case"):
        search.search(tiles, np.array([0, 30, 50, 80]), 5)
    with pytest.raises(ValueError, match="across is 'patient'; allowed: case, slide, tile"):
        search.search(tiles, np.array([0]), 5, "patient")


def test_a_place_is_the_tile_that_covers_it():
    tiles = made()
    assert corpus.locate(tiles, "c1-0", 70, 10).tolist() == [25]
    assert corpus.locate(tiles, "c1-0", 70 * 0.25, 10 * 0.25, um=True).tolist() == [25]
    near = corpus.locate(tiles, "c1-0", 96, 96, radius=70)
    assert near[0] == 29
    assert sorted(near.tolist()) == [25, 28, 29, 30, 33]
    with pytest.raises(
        ValueError, match="no tile of slide 'c1-0' is at 900, 10 px; the nearest has its corner at 192, 0"
    ):
        corpus.locate(tiles, "c1-0", 900, 10)
    with pytest.raises(ValueError, match=r"no slide 'c1_0' among 8, .*did you mean 'c1-0'"):
        corpus.locate(tiles, "c1_0", 0, 0)
    tiles.columns["mpp"][:] = np.nan
    with pytest.raises(ValueError, match="um per px of slide 'c1-0' is not known: give the place in level-0 px"):
        corpus.locate(tiles, "c1-0", 1, 1, um=True)


def test_hits_are_written_as_a_table_and_a_picture(tmp_path):
    tiles = made()
    tiles.columns["case"] = np.where(tiles.columns["case"] == "c3", 'c3, "x"', tiles.columns["case"]).astype("U9")
    hits = search.search(tiles, np.array([0]), 60)
    written = search.save(tmp_path / "out", tiles, hits, "label")
    assert [path.name for path in written] == ["hits.csv", "neighbours.png"]
    rows = table(tmp_path / "out" / "hits.csv")
    assert [int(row["tile"]) for row in rows] == (hits.rows + 100).tolist()
    assert {row["case"] for row in rows} == {"c1", "c2", 'c3, "x"'}
    assert {row["label"] for row in rows} == {"even", "odd"}
    picture = pixels(tmp_path / "out" / "neighbours.png")
    assert picture.shape == (8 + 11 * (128 + 22 + 8), 8 + 6 * 136, 3)
    printed = search.printed(search.lines(tiles, hits, "label")).splitlines()
    assert printed[0].split() == ["rank", "cosine", "tile", "case", "slide", "x", "y", "label"]
    assert len(printed) == 61
    assert "tile 100, case c0, slide c0-0, x 0, y 0" in search.described(tiles, hits)
    with pytest.raises(ValueError, match=r"no column 'labl' .*did you mean 'label'"):
        search.lines(tiles, hits, "labl")
    none = search.save(tmp_path / "bare", made(pictures=False), hits)
    assert [path.name for path in none] == ["hits.csv"]


def test_kinds_are_sorted_named_and_mapped(tmp_path):
    tiles = made()
    result = sort.sort(tiles, 3, Task("kind", "kind"))
    assert result.agreement.metrics["ari"].value == 1
    assert sorted(result.names) == [f"{i}: 32 tiles, 100% kind {k}" for i, k in enumerate(_kinds(tiles, result))]
    written = {path.name for path in sort.save(tmp_path, tiles, result)}
    slides = {f"map_c{i}-{j}.png" for i in range(4) for j in range(2)}
    assert written == {
        "clusters.csv",
        "clusters.json",
        "clusters.png",
        *(f"cluster_0{i}.png" for i in range(3)),
        *slides,
    }
    rows = table(tmp_path / "clusters.csv")
    assert [int(row["cluster"]) for row in rows] == result.found.assignment.tolist()
    said = json.loads((tmp_path / "clusters.json").read_text())
    assert said["tiles"] == [32, 32, 32]
    assert said["agreement"]["metrics"]["purity"]["value"] == 1
    assert said["agreement"]["unknown"] == 0
    tiles.columns["kind"][:10] = -1
    some = sort.sort(tiles, 3, Task("kind", "kind"))
    assert (some.unknown, some.agreement.table.sum()) == (10, 86)
    drawn = pixels(tmp_path / "map_c2-1.png")
    for i in np.flatnonzero(tiles.columns["slide"] == "c2-1"):
        x, y = (int(tiles.columns[c][i] / 64 * 24) + 12 + 12 for c in ("x", "y"))
        assert tuple(drawn[y + 24, x]) == COLOURS[result.found.assignment[i]]
    assert sort.document(sort.sort(tiles, 3)).keys() == {"clusters", "tiles", "notes"}
    tiles.columns["slide"] = np.where(tiles.columns["slide"] == "c0-0", "../c0", tiles.columns["slide"]).astype("U9")
    with pytest.raises(ValueError, match=r"slide_id '../c0' is not a file's name"):
        sort.save(tmp_path / "no", tiles, result)
    with pytest.raises(ValueError, match=f"k is from 2 to {MOST}"):
        sort.sort(tiles, MOST + 1)


def test_agreement_is_of_cases_that_the_encoder_was_not_trained_on():
    tiles, task = made(), Task("kind", "kind")
    unknown = sort.sort(tiles, 3, task)
    assert unknown.notes == ("which cases the encoder was trained on is not known: some may be among these",)
    tiles.columns["kind"][24:30] = -1
    wrong = dataclasses.replace(tiles, columns=tiles.columns | {"kind": tiles.columns["kind"].copy()}, trained=("c0",))
    wrong.columns["kind"][:24] = 0  # what the case trained on is called must not matter
    found = sort.sort(wrong, 3, task)
    assert found.found.sizes.sum() == 96
    assert (found.agreement.table.sum(), found.unknown, found.agreement.metrics["purity"].value) == (66, 6, 1)
    assert found.notes == ("1 of 4 cases with a class are left out: the encoder was trained on them",)
    assert sort.document(found)["notes"] == [*found.notes]
    none = sort.sort(dataclasses.replace(tiles, trained=("c0", "c1", "c2", "c3", "c4")), 3, task)
    assert none.agreement is None
    assert none.names == unknown_names(none)
    assert none.notes == ("no figure of agreement: the encoder was trained on all 4 cases with a class",)
    other = sort.sort(dataclasses.replace(tiles, trained=("c10",)), 3, task)
    assert (other.agreement.table.sum(), other.notes) == (90, ())


def unknown_names(result):
    return tuple(f"{i}: {size} tiles" for i, size in enumerate(result.found.sizes))


def test_a_collapsed_encoder_gives_one_cluster_and_its_pictures(tmp_path):
    tiles = made()
    same = corpus.Corpus(np.ones_like(tiles.features), tiles.columns, tiles.pictures, tiles.classes)
    result = sort.sort(same, 3, Task("kind", "kind"))
    assert result.found.sizes.tolist() == [96, 0, 0]
    written = {path.name for path in sort.save(tmp_path, same, result)}
    assert "cluster_00.png" in written
    assert "cluster_01.png" not in written


def _kinds(tiles, result):
    return [int(tiles.columns["kind"][result.found.assignment == i][0]) for i in range(3)]


def test_every_class_of_a_map_looks_different():
    names = [str(i) for i in range(MOST)]
    corners = np.stack([np.arange(MOST) * 10.0, np.zeros(MOST)], 1)
    drawn = class_map(corners, 10.0, np.arange(MOST), names)
    cells = {drawn[12:36, 12 + 24 * i : 36 + 24 * i].tobytes() for i in range(MOST)}
    assert len(cells) == MOST
    absent = class_map(corners, 10.0, np.full(MOST, -1), names)
    assert (absent[12:36, 12 : 12 + 24 * MOST] == 238).all()
    with pytest.raises(ValueError, match=f"tells {MOST} classes apart, not {MOST + 1}"):
        class_map(corners, 10.0, np.arange(MOST), [*names, "more"])


def test_a_map_over_a_slide_is_the_slide_and_beside_it_the_colours_over_it(tmp_path):
    image = np.full((40, 60, 3), 100, np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", resolution=(20_000, 20_000), resolutionunit=3)
    corners = np.array([[10.0, 10], [40, 10]])
    drawn = class_map(corners, 10.0, np.array([1, -1]), ["x", "y"], under=maps.of_slide(tmp_path / "a.tif"))
    at = lambda x, y: drawn[12 + round(6.4 * y), 12 + round(6.4 * x)].tolist()  # noqa: E731
    right = 60 + 12 / 6.4
    mixed = (0.45 * 100 + 0.55 * np.array(COLOURS[1])).round()
    assert at(15, 15) == at(45, 15) == at(right + 45, 15) == at(right + 5, 5) == [100] * 3
    assert np.abs(np.array(at(right + 15, 15)) - mixed).max() <= 1
    assert maps.of_slide(tmp_path / "a.tif", 0.25, "um").scale == pytest.approx(4)
    in_um = class_map(
        corners / 2, 5.0, np.array([1, -1]), ["x", "y"], under=maps.of_slide(tmp_path / "a.tif", unit="um")
    )
    np.testing.assert_array_equal(in_um, drawn)


def test_of_a_long_slide_places_are_by_its_long_side(tmp_path):
    image = np.full((2100, 63, 3), 200, np.uint8)
    image[2000:2010] = 0
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb")
    under = maps.of_slide(tmp_path / "a.tif")
    dark = np.flatnonzero(under.image[:, 5, 0] < 120)
    assert abs(dark.mean() - 2005 * under.scale) < 2


def test_tiles_make_a_picture_of_their_slide(tmp_path):
    shades = np.arange(300) % 250
    corners = np.stack([64.0 * (np.arange(300) % 20) + 7, 64.0 * (np.arange(300) // 20) + 9], 1)
    under = maps.of_tiles(corners, 64.0, lambda rows: [np.full((8, 8, 3), shades[i], np.uint8) for i in rows])
    assert under.origin == (7, 9)
    middles = ((corners - under.origin + 32) * under.scale).astype(int)
    assert under.image[middles[:, 1], middles[:, 0], 0].tolist() == shades.tolist()
    absent = maps.of_tiles(corners, 64.0, lambda rows: [None for _ in rows])
    assert (absent.image == 255).all()


def write_features(root, tiles):
    h5py = pytest.importorskip("h5py")
    root.mkdir()
    for name in np.unique(tiles.columns["slide"]):
        rows = np.flatnonzero(tiles.columns["slide"] == name)
        with h5py.File(root / f"{name}.h5", "w") as file:
            file["features"] = tiles.features[rows].astype(np.float16)
            file["coords"] = np.stack([tiles.columns[c][rows] for c in ("x", "y")], 1).astype(np.int64)
            said = {"slide_id": str(name), "case_id": str(name)[:2], "patch_size_level0": 64, "mpp_level0": 0.25}
            file.attrs.update(said)
    with h5py.File(root / "empty.h5", "w") as file:
        file["features"], file["coords"] = np.zeros((0, 8), np.float32), np.zeros((0, 2), np.int64)


def test_a_folder_of_features_is_searched_as_a_tile_set_is(tmp_path, capsys):
    tiles = made()
    write_features(tmp_path / "features", tiles)
    read = corpus.of_folder(tmp_path / "features")
    for name in ("slide", "case", "x", "y", "mpp", "side"):
        np.testing.assert_array_equal(read.columns[name], tiles.columns[name])
    asked = ["search", "--features", str(tmp_path / "features"), "--k", "4"]
    assert cli.main([*asked, "--slide", "c1-0", "--x", "70", "--y", "10", "--out", str(tmp_path / "hits")]) == 0
    found = table(tmp_path / "hits" / "hits.csv")
    assert [int(row["tile"]) for row in found] == search.search(read, np.array([25]), 4).rows.tolist()
    assert not (tmp_path / "hits" / "neighbours.png").exists()
    asked = ["clusters", "--features", str(tmp_path / "features"), "--k", "3", "--out", str(tmp_path / "kinds")]
    assert cli.main(asked) == 0
    assert "0: 32 tiles" in capsys.readouterr().out
    assert (tmp_path / "kinds" / "map_c3-1.png").exists()


def test_a_folder_says_what_its_encoder_was_trained_on_and_mixes_nothing(tmp_path, capsys):
    h5py = pytest.importorskip("h5py")
    root = tmp_path / "features"
    write_features(root, made())
    assert corpus.of_folder(root).trained is None
    for path in root.glob("*.h5"):
        with h5py.File(path, "a") as file:
            file.attrs.update({"config_sha256": "c", "encoder_sha256": "a" * 64})
    told = {"encoder": "e", "encoder_sha256": "a" * 64, "train_cases": ["c0", "c1", "c2", "c3"]}
    (root / "encoder.json").write_text(json.dumps(told))
    assert corpus.of_folder(root).trained == ("c0", "c1", "c2", "c3")
    asked = ["clusters", "--features", str(root), "--k", "3", "--target", "x", "--threshold", "70"]
    assert cli.main([*asked, "--out", str(tmp_path / "kinds")]) == 0
    said = capsys.readouterr().out
    assert "no figure of agreement: the encoder was trained on all 4 cases" in said
    assert "purity" not in said
    with h5py.File(root / "c2-0.h5", "a") as file:
        file.attrs["encoder_sha256"] = "b" * 64
    with pytest.raises(ValueError, match=r"encoder_sha256 of c0-0\.h5 is a+, that of c2-0\.h5 b+"):
        corpus.of_folder(root)


def test_places_of_stamp_are_um_until_their_scale_is_known(tmp_path, capsys):
    h5py = pytest.importorskip("h5py")
    root = tmp_path / "features"
    root.mkdir()
    for name in ("a", "b"):
        with h5py.File(root / f"{name}.h5", "w") as file:
            file["feats"] = np.eye(4, 8, dtype=np.float16)
            file["coords"] = np.array([[0, 0], [112, 0], [0, 112], [112, 112]], np.float32)
            file.attrs.update({"unit": "um", "tile_size_um": 112.0, "tile_size_px": 224})
    tiles = corpus.of_folder(root)
    assert corpus.locate(tiles, "a", 150, 100, um=True).tolist() == [1]
    with pytest.raises(ValueError, match="at 900, 0 um; the nearest has its corner at 112, 0"):
        corpus.locate(tiles, "a", 900, 0, um=True)
    asked = ["search", "--features", str(root), "--slide", "a", "--x", "150", "--y", "100", "--k", "1"]
    assert cli.main(asked) == 2
    assert "lie at places in um, and its um per px is not known: give the place in um (--um)" in capsys.readouterr().err
    assert cli.main([*asked, "--um"]) == 0
    assert "x 112, y 0, unit um" in capsys.readouterr().out
    assert cli.main([*asked, "--mpp", "0.5", "--x", "300", "--y", "200"]) == 0
    assert "x 224, y 0\n" in capsys.readouterr().out
    told = corpus.of_folder(root, mpp=0.5)
    for name in ("a", "b"):
        with h5py.File(root / f"{name}.h5", "a") as file:
            file.attrs["mpp_level0"] = 0.5
    for known in (told, corpus.of_folder(root)):
        assert "unit" not in known.columns
        assert corpus.locate(known, "a", 300, 200).tolist() == [1]
        assert corpus.locate(known, "a", 150, 100, um=True).tolist() == [1]


def test_pictures_of_a_folder_are_cut_from_its_slides(tmp_path):
    tiles = made()
    write_features(tmp_path / "features", tiles)
    slide = np.random.default_rng(0).integers(0, 256, (192, 256, 3), np.uint8)
    (tmp_path / "he").mkdir()
    tifffile.imwrite(tmp_path / "he" / "c1-0.tif", slide, tile=(64, 64), photometric="rgb")
    (tmp_path / "slides.csv").write_text("slide_id,case_id,he\nc1-0,c1,he/c1-0.tif\n")
    read = corpus.of_folder(tmp_path / "features", tmp_path / "slides.csv")
    cut, absent = read.pictures([29, 0])
    np.testing.assert_array_equal(cut, slide[64:128, 64:128])
    assert absent is None
    hits = search.search(read, np.array([29]), 3)
    assert [path.name for path in search.save(tmp_path, read, hits)] == ["hits.csv", "neighbours.png"]


def test_a_case_that_no_file_names_is_the_cohorts_or_tcgas(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "features").mkdir()
    for name in ("a", "b", "TCGA-AB-1234-01Z"):
        with h5py.File(tmp_path / "features" / f"{name}.h5", "w") as file:
            file["features"], file["coords"] = np.ones((1, 8), np.float32), np.zeros((1, 2), np.int64)
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 64, 3), np.uint8), photometric="rgb")
    (tmp_path / "slides.csv").write_text("slide_id,case_id,he\na,p,a.tif\n")
    read = corpus.of_folder(tmp_path / "features", tmp_path / "slides.csv")
    assert read.columns["case"].tolist() == ["TCGA-AB-1234", "p", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "--tile", "3"], "give --run and --tileset, or --features"),
        (["search", "--features", "no", "--run", "no", "--tile", "3"], "--features takes the place of --run"),
        (["search", "--run", "no", "--tileset", "no", "--tile", "3", "--mpp", "1"], "--slides and --mpp go with"),
        (["search", "--run", "n", "--tileset", "n", "--partner", "if", "--mpp", "1"], "--slides and --mpp go with"),
        (["search", "--features", "{}", "--tile", "3", "--mpp", "0"], "mpp is um per level-0 px, a number above 0"),
        (["search", "--features", "no", "--slide", "s"], "the query is --tile, or --slide with --x and --y"),
        (
            ["search", "--features", "no", "--tile", "0", "--slide", "s", "--x", "0", "--y", "0"],
            "the query is --tile, or",
        ),
        (["search", "--run", "no", "--tileset", "no", "--tile", "0"], "no"),
        (["search", "--features", "{}", "--tile", "96"], "--tile is from 0 to 95"),
        (["clusters", "--features", "{}", "--k", "1", "--out", "out"], "k is from 2 to"),
        (["clusters", "--features", "{}", "--target", "slides", "--out", "out"], "there is no column 'slides'"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    write_features(tmp_path / "features", made())
    monkeypatch.chdir(tmp_path)
    assert cli.main([a.format(tmp_path / "features") for a in arguments]) == 2
    assert message in capsys.readouterr().err


def test_faiss_finds_what_the_exact_search_finds():
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    queries, bank = rng.normal(size=(50, 8)), rng.normal(size=(400, 8))
    codes = [
        (rng.integers(0, 2, 50), np.minimum(rng.integers(0, 9, 400), 1)),
        (rng.integers(0, 3, 50), rng.integers(0, 3, 400)),
    ]
    for given in (codes, []):
        close, index = topk.search(queries, bank, 12, given)
        of_faiss, rows = faiss_index.search(queries, bank, 12, given)
        np.testing.assert_allclose(of_faiss, close, atol=1e-5)
        np.testing.assert_array_equal(rows, index)
    _, rows = faiss_index.search(queries, bank, 400, codes)
    np.testing.assert_array_equal(rows == -1, topk.search(queries, bank, 400, codes)[1] == -1)
    close, rows = faiss_index.search(queries, bank, 5, kind="HNSW16")
    assert (rows == topk.search(queries, bank, 5)[1]).mean() > 0.9
    with pytest.raises(ValueError, match="faiss knows no index 'Flut'"):
        faiss_index.place(bank, kind="Flut")


def test_without_faiss_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ValueError, match=r"pip install 'mfl_jax\[faiss\]'"):
        faiss_index.search(np.eye(3), np.eye(3), 1)
