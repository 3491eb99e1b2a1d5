"""An encoder of a run, exported and read back, gives the features of the run; unfit tiles are refused."""

import json

import jax
import numpy as np
import pytest

from mfl_jax import encoder, methods, sharding
from mfl_jax.config import Reading
from mfl_jax.interop import weights
from mfl_jax.trained import Trained
from tests.mfl_jax import synthetic, toy


def trained(tmp_path, name, words="", **overrides):
    """A run with values that no initialiser gives, without training or compiling one."""
    config = synthetic.tiny(name, words, **overrides)
    facts = synthetic.facts(config.data)
    method = methods.make(Reading(config), facts, sharding.make_mesh())
    batch = {n: jax.ShapeDtypeStruct((8, *shape), dtype) for n, (shape, dtype) in facts.shapes.items()}
    draw = np.random.default_rng(0)
    like = jax.eval_shape(method.init, jax.random.key(0), batch)
    params, extra = jax.tree.map(lambda leaf: draw.uniform(0.1, 0.5, leaf.shape).astype(leaf.dtype), like)
    return Trained(name, config, facts, method, params, extra, 7, tmp_path, "0" * 64)


@pytest.mark.usefixtures("compile_cache")
@pytest.mark.parametrize(
    ("name", "words", "overrides"),
    [
        ("two_view", "", {}),
        ("two_view", "", {"encoder": "vit_ti8,features=12,heads=3,blocks=1,pool=mean", "views__size": 16}),
        ("mfl", "", {"views__eval": "flip(0)|normalise(.5,.25)"}),
        ("supervised", "", {}),
    ],
)
def test_an_exported_encoder_gives_the_features_of_its_run(name, words, overrides, tmp_path, monkeypatch):
    run = trained(tmp_path, name, words, **overrides)
    monkeypatch.setattr(encoder, "open_run", lambda workdir, mesh=None: run)
    encoder.export(tmp_path / "run", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    found, own = encoder.of_weights(tmp_path / "out"), encoder.of_trained(run)
    he = np.random.default_rng(1).integers(0, 256, (3, synthetic.SIZE, synthetic.SIZE, 3), np.uint8)
    mask = np.ones(3, bool)
    expected = jax.jit(run.method.embed)(run.params, run.extra, {"he": he, "mask": mask})["he"]
    for made in (found, own):
        assert (made.size, made.mpp, made.dim, made.exact) == (synthetic.SIZE, 1.0, expected.shape[1], True)
        np.testing.assert_allclose(jax.jit(made.apply)(made.params, he, mask), expected, rtol=1e-6, atol=1e-6)
    assert np.ptp(np.asarray(expected), axis=0).max() > 1e-4, "all tiles have the same features"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_features"] == expected.shape[1]
    if "normalise(.5" in overrides.get("views__eval", ""):
        assert (config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["std"]) == ([0.5] * 3, [0.25] * 3)


def test_the_digest_changes_with_what_decides_the_features(tmp_path):
    base = encoder.of_trained(trained(tmp_path, "two_view"))
    assert encoder.of_trained(trained(tmp_path, "two_view")).digest == base.digest
    other = encoder.of_trained(trained(tmp_path, "two_view", views__eval="flip(0)|normalise(.5,.5)"))
    assert other.digest != base.digest


@pytest.mark.usefixtures("compile_cache")
def test_what_is_more_than_an_encoder_is_not_exported(tmp_path, monkeypatch):
    run = trained(tmp_path, "supervised", "both")
    monkeypatch.setattr(encoder, "open_run", lambda workdir, mesh=None: run)
    with pytest.raises(ValueError, match="its features are not of H&E alone: without 'if'"):
        encoder.export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match="not of H&E alone"):
        encoder.of_run(tmp_path / "run")
    whole = trained(tmp_path, "two_view")
    method = type(whole.method)(
        **{**vars(whole.method), "embed": lambda p, e, b: {"he": 2 * whole.method.embed(p, e, b)["he"]}}
    )
    twice = type(whole)(**{**vars(whole), "method": method})
    monkeypatch.setattr(encoder, "open_run", lambda workdir, mesh=None: twice)
    with pytest.raises(ValueError, match="is more than its encoder"):
        encoder.export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("toy_method", "compile_cache")
def test_of_a_run_on_disk(tmp_path):
    state = toy.run(toy.config(steps=2), tmp_path / "run")
    made = encoder.of_run(tmp_path / "run")
    he = np.random.default_rng(0).integers(0, 256, (4, synthetic.SIZE, synthetic.SIZE, 3), np.uint8)
    wanted = (he.reshape(4, -1)[:, :12] / 255.0) @ np.float64(state.params["w"]) + np.float64(state.params["b"])
    found = jax.jit(made.apply)(made.params, he, np.ones(4, bool))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="keeps no H&E encoder"):
        encoder.export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match="no run: there is no such folder"):
        encoder.of_run(tmp_path / "nowhere")


def made(size=224, mpp=0.5, exact=True):
    return encoder.Encoder("it", lambda p, x, m: x, None, 3, size, exact, mpp, "0")


def test_tiles_of_another_scale_or_size_are_refused_unless_asked_for():
    made().check_tiles(224, 0.5)
    made().check_tiles(224, 0.504)
    with pytest.raises(ValueError, match=r"the tiles are of 256 px; it takes 224 px: tile again"):
        made().check_tiles(256, 0.5)
    with pytest.raises(ValueError, match=r"the tiles are of 0\.25 um per px; it was trained on 0\.5: .* --mpp 0\.25"):
        made().check_tiles(224, 0.25)
    made().check_tiles(224, 0.25, asked=0.25)
    with pytest.raises(ValueError, match=r"--mpp is 0\.5, and the tiles are of 0\.25"):
        made().check_tiles(224, 0.25, asked=0.5)
    made(exact=False, mpp=None).check_tiles(256, 0.25)


def test_weights_that_say_nothing_of_size_are_taken_with_tiles_of_any(tmp_path):
    run = trained(tmp_path, "two_view", encoder="vit_ti8,features=12,heads=3,blocks=1")
    options = {"side": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3, "ours": {}}
    part = run.params["he"]["encoder"]
    weights.save(tmp_path, run.config.encoder, part, {}, **options)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["mfl"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = encoder.of_weights(tmp_path)
    assert (found.exact, found.size, found.mpp, found.name) == (False, 16, None, "vit_tiny_patch16_224")
    given = jax.ShapeDtypeStruct((2, 40, 40, 3), np.uint8), jax.ShapeDtypeStruct((2,), np.bool_)
    assert jax.eval_shape(found.apply, found.params, *given).shape == (2, 12)
