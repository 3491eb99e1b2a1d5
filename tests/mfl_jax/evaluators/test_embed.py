"""Every example once, by id, whatever the batches, the padding and the devices."""

import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from input_pipeline.tileset import Record, Spec, TileSet, finish, write_slide
from mfl_jax.evaluators.embed import colour_statistics, embed_pass, embed_set, held_tiles
from mfl_jax.sharding import make_mesh


def batches(ids, size: int, *, side: int = 4):
    """Tiles whose pixels hold their id; padded with id -1, and pixels that would be seen if they were not dropped."""
    ids = np.asarray(ids, np.int64)
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        mask = np.arange(size) < len(part)
        part = np.concatenate([part, np.full(size - len(part), -1)])
        he = np.where(mask, part, 255).astype(np.uint8)[:, None, None, None] * np.ones((1, side, side, 3), np.uint8)
        yield {"he": he, "mask": mask, "id": part, "label": (part % 3).astype(np.int32), "depth": part / 7}


def double(params, extra, batch):
    assert set(batch) == {"he", "mask"}, "labels must not reach embed"
    value = batch["he"].astype(jnp.float32).mean((1, 2, 3))
    return {"he": params * jnp.stack([value, value**2], 1) + extra}


@pytest.mark.parametrize("size", [1, 4, 16, 50])
def test_every_example_once_whatever_the_batches(size):
    order = np.random.default_rng(0).permutation(37)
    found = embed_pass(double, 2.0, 1.0, batches(order, size), make_mesh())
    np.testing.assert_array_equal(found.ids, np.arange(37))
    expected = 2.0 * np.stack([np.arange(37), np.arange(37) ** 2], 1) + 1
    np.testing.assert_allclose(found.features["he"], expected, rtol=1e-6)
    np.testing.assert_array_equal(found.columns["label"], np.arange(37) % 3)
    np.testing.assert_array_equal(found.columns["depth"], np.arange(37) / 7)
    assert found.features["he"].dtype == np.float32
    assert set(found.columns) == {"label", "depth"}


def test_an_example_that_comes_twice_is_refused():
    with pytest.raises(ValueError, match=r"\[3\] came more than once"):
        embed_pass(double, 1.0, 0.0, batches([1, 3, 2, 3], 2), make_mesh())


def test_features_that_are_not_finite_are_refused_with_their_tiles():
    def bad(params, extra, batch):
        value = batch["he"].astype(jnp.float32).mean((1, 2))
        return {"he": jnp.where(value == 5, jnp.nan, value)}

    with pytest.raises(ValueError, match=r"'he' of 1 tiles are not finite, the first \[5\]"):
        embed_pass(bad, 0, 0, batches(range(8), 4), make_mesh())


def test_no_batch_is_an_error():
    with pytest.raises(ValueError, match="nothing to embed"):
        embed_pass(double, 0, 0, [], make_mesh())


@pytest.mark.parametrize(("least", "side"), [(0, 6), (0, 7), (250, 6), (255, 6), (0, 1)])
def test_colour_statistics_are_numpys(least, side):
    he = np.random.default_rng(0).integers(least, 256, (5, side, side, 3), np.uint8)
    x = he.reshape(5, -1, 3) / 255
    expected = np.concatenate([x.mean(1), x.std(1), *np.percentile(x, [10, 50, 90], 1)], 1)
    np.testing.assert_allclose(colour_statistics({}, {}, {"he": jnp.asarray(he)})["he"], expected, atol=1e-5)


EIGHT = """
import jax, jax.numpy as jnp, numpy as np
from mfl_jax.evaluators.embed import embed_pass
from mfl_jax.sharding import make_mesh
from tests.mfl_jax.evaluators.test_embed import batches, double
assert len(jax.devices()) == 8
found = embed_pass(double, 2.0, 1.0, batches(np.arange(37)[::-1], 16), make_mesh())
np.testing.assert_array_equal(found.ids, np.arange(37))
np.testing.assert_allclose(found.features["he"][:, 0], 2.0 * np.arange(37) + 1)
print("right on eight")
"""


def test_eight_devices_give_the_same():
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", EIGHT], env=environment, capture_output=True, text=True, timeout=300)
    assert "right on eight" in done.stdout, done.stderr


def test_tiles_that_are_held_are_read_once_and_give_the_same(tmp_path):
    spec, rng = Spec("held", 8, 0.5, he_encoding="png"), np.random.default_rng(0)
    for i in range(3):
        images = rng.integers(0, 256, (7, 8, 8, 3), np.uint8)
        write_slide(
            tmp_path, spec, f"s{i}", f"c{i}", [Record(he, {}, 0, 0, 0.5, columns={}, score={}) for he in images], {}
        )
    finish(tmp_path, spec, splits={"train": ["c0"], "test": ["c1", "c2"]})
    tiles, mesh = TileSet.open(tmp_path), make_mesh()
    held = held_tiles(tiles, mesh, batch=4, split="test")
    assert len(held) == 4
    given = {"batch": 4, "split": "test"}
    read = embed_set(colour_statistics, {}, {}, tiles, mesh, **given)
    for shard in tmp_path.glob("*.tfrecord"):
        shard.unlink()
    again = embed_set(colour_statistics, {}, {}, tiles, mesh, **given, held=held)
    np.testing.assert_array_equal(again.features["he"], read.features["he"])
    np.testing.assert_array_equal(again.columns["case"], read.columns["case"])
    assert held_tiles(tiles, mesh, batch=4, split="test", most=100) is None
