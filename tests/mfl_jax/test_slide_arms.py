"""Runs and tile sets as arms of slides: what is embedded, by slide; who has seen what; what is refused."""

import numpy as np
import pytest

from configs import common
from input_pipeline.files import read_json, write_json
from input_pipeline.tileset import Record, Spec, TileSet, finish, write_slide
from mfl_jax import bags, data, methods, slide_arms, train, trained
from mfl_jax.config import Reading
from tests.input_pipeline import test_regions
from tests.mfl_jax import toy

SIZE = 8
SPEC = Spec("small", SIZE, 0.5, he_encoding="png", label_names=("no", "yes"))
SPLITS = {"train": ["c0", "c1"], "test": ["c2", "c3", "c4", "c5"]}


@pytest.fixture(scope="module", name="root")
def root_fixture(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 255, (5, SIZE, SIZE, 3), np.uint8)
        records = [Record(he, {}, 8.0 * j, 0.0, 0.5, label=i % 2) for j, he in enumerate(pixels)]
        write_slide(root / "set", SPEC, f"s{i}", f"c{i}", records, {})
    finish(root / "set", SPEC, splits=SPLITS)
    lines = [f"s{i},c{i},{'ny'[i % 2]}" for i in range(6)]
    (root / "slides.csv").write_text("\n".join(["slide_id,case_id,label", *lines, "s6,c6,n", ""]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods.METHODS, "toy", toy.make)
        for seed in (0, 1):
            made = toy.config(steps=1, every=0, seed=seed)
            made.data = common.data(str(root / "set"), batch=8)
            train.train(made, root / f"run{seed}", progress=False)
    return root


@pytest.fixture(autouse=True)
def known(toy_method, compile_cache):
    """Every test knows the toy method."""


def test_seeds_of_a_run_are_bags_of_the_slides_in_the_table(root):
    table = bags.read_table(root / "slides.csv")
    asked = slide_arms.parse([f"toy={root}/run0", f"toy={root}/run1", f"colour={root}/set"], root / "set")
    seen = slide_arms.seen_cases(asked, {})
    assert seen == {"toy": ("c0", "c1"), "colour": ()}
    (runs, colours), digests = slide_arms.collect(asked, table, seen, batch=16)
    assert runs.what == "toy, 1 steps of 8"
    assert digests == {str(root / f"run{i}"): trained.open_run(root / f"run{i}").digest for i in (0, 1)}
    tileset = TileSet.open(root / "set")
    he = np.stack([tileset.decode(example)["he"] for example in tileset.read(range(len(tileset)))])
    x = he.reshape(len(he), -1)[:, :12] / 255.0
    for number, of in enumerate(runs.bags):
        run = trained.open_run(root / f"run{number}")
        expected = x @ np.asarray(run.params["w"], np.float64) + run.params["b"]
        np.testing.assert_allclose(of.features, expected, rtol=1e-4, atol=1e-4)
        assert of.slides == tuple(f"s{i}" for i in range(7))
        assert of.lengths.tolist() == [5] * 6 + [0]
    assert colours.bags[0].features.shape == (30, 15)
    np.testing.assert_allclose(colours.bags[0].features[:, :3], he.mean((1, 2)) / 255, atol=1e-5)


def test_what_is_held_out_is_what_no_arm_has_seen(root):
    table = bags.read_table(root / "slides.csv")
    asked = slide_arms.parse([f"toy={root}/run0@{root}/set", f"x={root}/set"])
    assert asked[0].tileset == root / "set"
    some, notes = slide_arms.kept(table, slide_arms.seen_cases(asked, {"x": ["c5"]}))
    assert some.slides == ("s2", "s3", "s4", "s6")
    assert some.labels.tolist() == [0, 1, 0, 0]
    assert "3 cases" in notes[0]
    with pytest.raises(ValueError, match="every one of the 7 cases was seen"):
        slide_arms.kept(table, {"x": table.cases})


def test_a_set_of_regions_that_does_not_say_whose_tiles_leaves_it_open(root, tmp_path):
    asked = [slide_arms.Asked("toy", root / "run0", tmp_path)]
    manifest = read_json(root / "set" / "manifest.json", "")
    manifest["spec"]["he_kind"] = "grid"
    write_json(tmp_path / "manifest.json", manifest)
    assert slide_arms.seen_cases(asked, {}) == {"toy": None}
    assert slide_arms.seen_cases(asked, {"toy": ["c4"]}) == {"toy": ("c0", "c1", "c4")}
    manifest["spec"]["params"]["train_cases"] = ["c3"]
    write_json(tmp_path / "manifest.json", manifest)
    assert slide_arms.seen_cases(asked, {}) == {"toy": ("c0", "c1", "c3")}


def test_what_is_trained_on_regions_has_seen_what_the_encoder_of_their_tiles_has(tmp_path):
    folder = tmp_path / "features"
    for name in ("a", "b"):
        test_regions.write(folder / f"{name}.h5", test_regions.cells_of(0, 8, 8))
    about = {"encoder": "e", "encoder_sha256": "a" * 64, "train_cases": ["c7", "pa"]}
    write_json(folder / "encoder.json", about)
    test_regions.run(folder, tmp_path / "regions", splits={"train": ["pa"], "test": ["pb"]})
    made = toy.config()
    made.data = common.data(str(tmp_path / "regions"), batch=1)
    assert data.facts(Reading(made).data).train_cases == ("pa", "c7")
    write_json(folder / "encoder.json", about | {"encoder_sha256": "b" * 64})
    test_regions.run(folder, tmp_path / "others", splits={"train": ["pa"], "test": ["pb"]})
    assert slide_arms._behind(tmp_path / "regions") == ("c7", "pa")
    assert slide_arms._behind(tmp_path / "others") is None


def test_what_does_not_fit_is_refused(root, tmp_path):
    with pytest.raises(ValueError, match="say what it embeds"):
        slide_arms.parse([f"toy={root}/run0"])
    (tmp_path / "slides.csv").write_text("slide_id,case_id,label\ns0,c9,n\ns1,c1,y\n")
    wrong = bags.read_table(tmp_path / "slides.csv")
    asked = slide_arms.parse([f"x={root}/set"])
    with pytest.raises(ValueError, match=r"slide 's0' is of case 'c0' in .*, and of 'c9' in the table"):
        slide_arms.collect(asked, wrong, {"x": ()})
    (tmp_path / "slides.csv").write_text("slide_id,case_id,label\nz0,c8,n\nz1,c9,y\n")
    with pytest.raises(ValueError, match="has no slide of the table"):
        slide_arms.collect(asked, bags.read_table(tmp_path / "slides.csv"), {"x": ()})
