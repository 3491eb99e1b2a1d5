"""From files of tile features to regions, and what is done with them: facts, pictures, extraction, evaluation."""

import h5py
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from input_pipeline.show import ABSENT, Axes, batch_picture
from input_pipeline.stream import train_stream
from input_pipeline.tileset import TileSet
from mfl_jax import arms, cli, compare, contact_sheet, data, slides, train
from mfl_jax import config as configs
from mfl_jax.encoder import Encoder
from mfl_jax.evaluators import Task
from mfl_jax.evaluators.embed import mean_of_tiles
from mfl_jax.extract import extract
from tests.input_pipeline.test_regions import cells_of, write
from tests.input_pipeline.tileset import samples
from tests.mfl_jax import synthetic, toy

SLIDES = {f"s{i}": f"c{i}" for i in range(6)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Six slides of six cases through the command; the label of a slide is the parity of its number."""
    folder = tmp_path_factory.mktemp("regions")
    for i, name in enumerate(SLIDES):
        write(folder / "features" / f"{name}.h5", cells_of(i, 12, 9, 0.8))
    rows = [f"{name},{case},{'ab'[i % 2]}" for i, (name, case) in enumerate(SLIDES.items())]
    (folder / "slides.csv").write_text("\n".join(["slide_id,case_id,label", *rows]) + "\n")
    cases = [f"{case},{'train' if i < 3 else 'test'}" for i, case in enumerate(SLIDES.values())]
    (folder / "splits.csv").write_text("\n".join(["case_id,split", *cases]) + "\n")
    (folder / "features" / "bad.h5").write_bytes(b"no")
    arguments = ["regions", str(folder / "features"), "--out", str(folder / "set"), "--tiles", "4", "--workers", "0"]
    arguments += ["--table", str(folder / "slides.csv"), "--splits", str(folder / "splits.csv"), "--quiet"]
    assert cli.main(arguments) == 0
    assert (folder / "set" / "status.csv").is_file()
    return folder / "set"


def stored(root):
    with TileSet.open(root) as tiles:
        return np.stack([tiles.decode(e)["he"] for e in tiles.read(range(len(tiles)))])


def test_the_command_says_what_it_did_and_ends_with_1_where_a_slide_failed(root, tmp_path, capsys):
    features = root.parent / "features"
    arguments = ["regions", str(features), "--out", str(tmp_path / "out"), "--tiles", "4", "--workers", "0", "--quiet"]
    assert cli.main(arguments) == 1
    said = capsys.readouterr()
    assert "bad failed: " in said.err
    assert "6 done, 0 empty, 1 failed (0 were done before)" in said.out
    assert "regions/s" in said.out
    assert "assemble" in said.out
    assert cli.main([*arguments, "--min-tissue", "2"]) == 2
    assert "min_tissue is a share" in capsys.readouterr().err


def test_facts_say_what_a_batch_of_regions_is(root):
    part = configs.Reading(synthetic.tiny("dino_regions", data__tileset=str(root), data__batch=4)).data
    facts = data.facts(part)
    assert (facts.size, facts.mpp, facts.label_names) == (4, 32.0, ("a", "b"))
    assert (facts.modalities["he"].kind, facts.modalities["he"].channels) == ("grid", 6)
    assert facts.shapes["he"] == ((4, 4, 6), "float16")
    assert data.facts_of(data.facts_document(facts)) == facts
    with train_stream(TileSet.open(root), batch=4, seed=0, executor="threads") as stream:
        batch = next(iter(data.checked(stream, facts, 4)))
    assert batch["he"].dtype == np.float16


def test_the_mean_of_tile_features_is_over_tiles_that_are_there():
    grids = synthetic.batch(synthetic.facts(synthetic.tiny("dino_regions").data), 0)["he"]
    grids[3] = 0
    found = np.asarray(mean_of_tiles(None, None, {"he": jnp.asarray(grids)})["he"])
    for row, grid in enumerate(grids.astype(np.float64)):
        tiles = grid[grid[..., -1] == 1][:, :-1]
        np.testing.assert_allclose(found[row], tiles.mean(0) if len(tiles) else 0, rtol=1e-4, atol=1e-5)


def test_regions_are_embedded_to_one_file_a_slide_in_their_order(root, tmp_path):
    def apply(params, grids, mask):
        return mean_of_tiles(None, None, {"he": grids})["he"] * params

    made = Encoder("mean", apply, jnp.float32(2), 5, 4, True, 32.0, "a" * 64, kind="grid", channels=6)
    source = slides.of_tile_set(root)
    made.check_tiles(source.size, source.mpp, kind=source.kind, channels=source.channels)
    report = extract(source, made, tmp_path, batch=8, workers=2, dtype="float32", progress=False)
    assert not report.failed
    whole, tiles = stored(root).astype(np.float32), TileSet.open(root)
    means = whole[..., :-1].sum((1, 2)) / whole[..., -1].sum((1, 2))[:, None]
    for i, name in enumerate(tiles.slides):
        with h5py.File(tmp_path / f"{name}.h5") as file:
            rows = slice(*tiles.first_row[i : i + 2])
            np.testing.assert_allclose(file["features"][:], 2 * means[rows], rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(file["coords"][:, 0], tiles.tiles["x"][rows].astype(np.int64))
            side = 4 * 32 / file.attrs["mpp_level0"]
            assert file.attrs["patch_size_level0"] == round(side)
    with pytest.raises(ValueError, match="there are tiles of 4 px; mean takes regions of 4 x 4 tiles with 5 features"):
        made.check_tiles(4, 32.0)


@pytest.mark.usefixtures("toy_method", "compile_cache")
def test_a_run_on_regions_is_trained_and_compared_with_the_mean_of_tiles(root, tmp_path):
    made = toy.config(2, data=toy.config().data)
    made.data.tileset, made.data.batch = str(root), 4
    train.train(made, tmp_path / "run", progress=False)
    tiles, task = TileSet.open(root), Task("label")
    found = compare.evaluate([tmp_path / "run"], tiles, task, baselines=("mean",), resamples=20, batch=8)
    assert [arm["name"] for arm in found["arms"]] == ["toy", "mean"]
    with pytest.raises(ValueError, match="baseline 'colour' is for sets of kind 'image'"):
        compare.evaluate([tmp_path / "run"], tiles, task, baselines=("colour",))
    others = TileSet.open(samples.write_set(tmp_path / "images"))
    with pytest.raises(
        ValueError, match=r"regions of 4 x 4 tiles of 32 um with 5 features each; the tile set has tiles"
    ):
        arms.look([tmp_path / "run"], others)


def test_pictures_of_regions_are_of_their_principal_components(root, tmp_path):
    grids = stored(root)
    axes = Axes.of(grids)
    there = grids[..., -1] == 1
    tiles = grids[there][:, :-1].astype(np.float64)
    values = np.linalg.eigh(np.cov(tiles.T))[0][::-1][:3]
    np.testing.assert_allclose(((tiles - axes.mean) @ axes.directions).var(0, ddof=1), values, rtol=1e-6, atol=1e-9)
    drawn = axes.colours(grids)
    assert (drawn[~there] == ABSENT).all()
    assert (drawn[there] < ABSENT).all()
    assert axes.colours(np.zeros((2, 2, 6))).max() == ABSENT
    assert Axes.of(grids[..., 3:]).colours(grids[..., 3:]).shape == drawn.shape
    with TileSet.open(root) as tiles, train_stream(tiles, batch=2, seed=0, executor="threads") as stream:
        batch = next(stream)
        sheet = batch_picture(batch, tiles.spec)
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 8
    config = synthetic.tiny("dino_regions", data__tileset=str(root))
    path = contact_sheet.of_config(config, tmp_path / "views.png", rows=2)
    assert len(np.unique(np.asarray(Image.open(path)).reshape(-1, 3), axis=0)) > 8
