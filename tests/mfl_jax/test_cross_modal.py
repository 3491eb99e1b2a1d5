"""From H&E to its partner and back, where the partner shows what the H&E shows; and what is refused."""

import csv
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from input_pipeline.tileset import Partner, Record, Spec, finish, write_slide
from mfl_jax import cli, cross_modal, data, methods, train
from tests.mfl_jax import synthetic, toy

SIZE = 8
SPEC = Spec("both", SIZE, 0.5, he_encoding="png", partners=(Partner("if", "image", 3, "uint8", "png"),))
SPLITS = {"train": ["c0", "c1"], "test": ["c2", "c3"]}


def make(reading, facts, mesh):
    """The toy, and both modalities as they are: the partner is the H&E turned to its negative and back."""
    made = toy.make(reading, facts, mesh)

    def pixels(images):
        return images.reshape(len(images), -1).astype(jnp.float32) - 127.5

    return replace(made, align={"if": lambda p, e, b: {"he": pixels(b["he"]), "if": -pixels(b["if"])}})


@pytest.fixture(scope="module", name="made")
def made_fixture(tmp_path_factory, compile_cache):
    root, rng = tmp_path_factory.mktemp("both"), np.random.default_rng(0)
    for i in range(4):
        rows = []
        for k in range(10):
            he = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
            partner = {"if": None if k == 3 else 255 - he}
            rows.append(Record(he, partner, k * 16, 0, 0.25, columns={}, score={}))
        write_slide(root / "set", SPEC, f"s{i}", f"c{i}", rows, {})
    finish(root / "set", SPEC, splits=SPLITS)
    config = toy.config(steps=1, every=0)
    config.data = common.data(str(root / "set"), batch=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods.METHODS, "toy", make)
        train.train(config, root / "run", progress=False)
    return root


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "toy", make)


def test_each_tile_finds_itself_in_the_other_modality_and_those_without_it_are_not_asked(made):
    pairs = cross_modal.embed(made / "run", made / "set")
    assert pairs.he.shape == (18, SIZE * SIZE * 3)
    assert set(pairs.columns["case"]) == {"c2", "c3"}
    np.testing.assert_allclose(pairs.he, pairs.partner)
    found = cross_modal.evaluate(pairs, resamples=50)
    assert list(found) == ["he_to_if", "if_to_he"]
    for result in found.values():
        assert result.metrics["recall_1"].value == 1
        assert result.chance["recall_1"] == pytest.approx(1 / 18)
    shuffled = cross_modal.evaluate(replace(pairs, partner=pairs.partner[::-1]), resamples=50)
    assert shuffled["he_to_if"].metrics["recall_1"].value == 0
    told = cross_modal.told(pairs, found)[0]
    assert told.startswith("he_to_if: recall@1 1.000")
    assert "; mAP 1.000 [1.000, 1.000], nDCG 1.000 [1.000, 1.000]; median rank 1 of 18" in told
    text = "\n".join(cross_modal.told(cross_modal.embed(made / "run", made / "set", split="train"), found))
    assert "transductive: the run was trained on 2 of these 2 cases" in text


@pytest.mark.parametrize("reverse", [False, True])
def test_a_tile_of_one_modality_is_searched_for_in_the_other(made, reverse, tmp_path, capsys):
    asked = ["--run", str(made / "run"), "--tileset", str(made / "set"), "--partner", "if", "--out", str(tmp_path)]
    place = ["--slide", "s1", "--x", "33", "--y", "5", "--k", "3"]
    assert cli.main(["search", *asked, *place, *(["--reverse"] if reverse else [])]) == 0
    assert "query: tile 12, case c1, slide s1" in capsys.readouterr().out
    with open(tmp_path / "hits.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [rows[0][name] for name in ("tile", "cosine")] == ["12", "1.0000"]
    assert (tmp_path / "neighbours.png").is_file()


def test_without_a_query_recall_is_told_both_ways(made, capsys):
    assert cli.main(["search", "--run", str(made / "run"), "--tileset", str(made / "set"), "--partner", "if"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["he_to_if", "if_to_he"]
    assert "recall@1 1.000 [1.000, 1.000] (chance 0.0556)" in lines[0]


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ([], "2 of 4 cases with a class are left out: the encoder was trained on them"),
        (["--split", "train"], "no figure of agreement: the encoder was trained on all 2 cases with a class"),
    ],
)
def test_kinds_of_tile_are_compared_with_classes_in_cases_not_trained_on(made, split, said, tmp_path, capsys):
    asked = ["--run", str(made / "run"), "--tileset", str(made / "set"), *split, "--target", "x", "--threshold", "70"]
    assert cli.main(["clusters", *asked, "--k", "2", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert said in out.splitlines()
    assert ("purity" in out) == (not split)


def test_what_cannot_be_asked_is_said(made, capsys):
    for words, message in (
        (["--partner", "ihc"], "compares H&E with if, not with 'ihc'"),
        (["--partner", "if", "--tile", "3"], "--tile is from 0 to 39"),
        (["--tile", "3", "--reverse"], "--reverse goes with --partner"),
        (["--partner", "if", "--feature", "he"], "takes the projections of training"),
    ):
        assert cli.main(["search", "--run", str(made / "run"), "--tileset", str(made / "set"), *words]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="compares H&E with no partner"):
        cross_modal.chosen(made / "run", {}, "")


@pytest.mark.parametrize("name", ["mfl", "trident"])
def test_methods_that_compare_modalities_project_both_into_one_space(name):
    config = synthetic.tiny(name)
    facts = synthetic.facts(config.data)
    from mfl_jax import config as configs
    from mfl_jax import sharding

    method = methods.make(configs.Reading(config), facts, sharding.make_mesh())
    batch = {k: v for k, v in synthetic.batch(facts, 0).items() if v.dtype.kind != "U"}
    params, extra = jax.eval_shape(method.init, jax.random.key(0), data.batch_shapes(facts, synthetic.BATCH))
    found = jax.eval_shape(method.align["if"], params, extra, {name: batch[name] for name in ("he", "if")})
    assert found["he"].shape == found["if"].shape == (synthetic.BATCH, 16)
    assert list(method.align) == ["if"]
    with config.unlocked():
        del config.views["eval_if"]
    assert not methods.make(configs.Reading(config), facts, sharding.make_mesh()).align
