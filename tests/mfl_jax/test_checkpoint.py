"""Checkpoints that were damaged are found, named and passed over; those that do not fit are refused."""

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfl_jax import checkpoint, metrics
from mfl_jax.checkpoint import DIGESTS, META, CheckpointError, Checkpoints, write_digests
from tests.mfl_jax import synthetic, toy

ROOT = Path(__file__).parents[2]


def state(step: int) -> dict:
    return {
        "w": jnp.arange(1000.0).reshape(20, 50) * step,
        "half": jnp.full(3, step, jnp.bfloat16),
        "step": jnp.int32(step),
    }


def like(of: dict | None = None) -> dict:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), of or state(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Steps 2 and 3 of three that were saved, two being kept."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"note": f"step {step}"})
    checkpoints.wait()
    checkpoints.close()
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy")


def restored(folder: Path, wanted=None):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(like() if wanted is None else wanted), checkpoints
    finally:
        checkpoints.close()


def test_the_newest_is_restored_bitwise_with_what_was_saved_beside_it(saved):
    (step, found, meta), checkpoints = restored(saved)
    assert (step, meta, checkpoints.faults, checkpoints.steps()) == (3, {"note": "step 3"}, {}, [2, 3])
    synthetic.assert_same(found, state(3))


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    assert restored(tmp_path)[0] is None


def test_steps_that_are_multiples_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4)
    for step in range(1, 8):
        checkpoints.save(step, {"x": jnp.int32(step)}, {})
    checkpoints.wait()
    checkpoints.close()
    assert checkpoints.steps() == [4, 6, 7]


def test_one_flipped_byte_in_any_file_is_found_and_named_and_the_one_before_is_used(saved, tmp_path, caplog):
    files = [p.relative_to(saved) for p in sorted((saved / "3").rglob("*")) if p.is_file()]
    assert len(files) > 5
    for number, name in enumerate(files):
        folder = shutil.copytree(saved, tmp_path / str(number))
        path = folder / name
        content = bytearray(path.read_bytes())
        if not content:
            content = bytearray(b"\0")
        else:
            content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with caplog.at_level(logging.WARNING):
            (step, found, _), checkpoints = restored(folder)
        assert step == 2, name
        synthetic.assert_same(found, state(2))
        shown = name.relative_to("3").as_posix()
        assert shown in checkpoints.faults[3]
        assert shown in caplog.text
        assert (folder / "broken" / "3").is_dir()
        caplog.clear()
        assert restored(folder)[0][0] == 2  # and again: no crash loop


@pytest.mark.parametrize("fault", ["truncated", "missing", "added", "no digests", "no list", "empty", "future"])
def test_other_damage_is_found_too(copied, fault):
    newest = copied / "3"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if fault == "truncated":
        largest.write_bytes(largest.read_bytes()[:-1])
    elif fault == "missing":
        largest.unlink()
    elif fault == "added":
        (newest / "state" / "more").write_text("x")
    elif fault == "no digests":
        (newest / DIGESTS).unlink()
    elif fault == "no list":
        (newest / DIGESTS).write_text("[]")
    elif fault == "empty":
        shutil.rmtree(newest)
        newest.mkdir()
    elif fault == "future":
        document = json.loads((newest / META).read_text()) | {"version": 99}
        (newest / META).write_text(json.dumps(document))
        write_digests(newest)
    (step, found, _), checkpoints = restored(copied)
    assert step == 2
    assert (fault != "future") or "version 99" in checkpoints.faults[3]
    synthetic.assert_same(found, state(2))


def test_when_none_can_be_used_every_start_is_refused_and_names_the_way_out(copied):
    """A run that began anew by itself would bury weeks of work under a line of its log."""
    for step in (2, 3):
        (copied / str(step) / META).unlink()
    with pytest.raises(CheckpointError, match=r"step 3: meta.json is missing; step 2: meta.json is missing"):
        restored(copied)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*copy can be used\..*remove .*broken or use another"):
        restored(copied)
    shutil.rmtree(copied / "broken")
    assert restored(copied)[0] is None


def test_a_whole_one_that_was_put_back_is_used(copied, saved):
    for step in (2, 3):
        (copied / str(step) / META).unlink()
    with pytest.raises(CheckpointError):
        restored(copied)
    shutil.copytree(saved / "2", copied / "2")
    assert restored(copied)[0][0] == 2


def test_what_was_never_finished_is_removed(copied):
    shutil.copytree(copied / "3", copied / "4.part")
    (_, checkpoints) = restored(copied)
    assert checkpoints.steps() == [2, 3]
    assert not (copied / "4.part").exists()


def test_another_tree_shape_or_dtype_is_refused_listing_the_first_five(saved):
    wanted = state(0) | {"w": jnp.zeros((20, 51)), "half": jnp.zeros(3), "a": 1.0 * jnp.zeros(1), "b": jnp.zeros(1)}
    del wanted["step"]
    with pytest.raises(CheckpointError) as caught:
        restored(saved, like(wanted))
    text = str(caught.value)
    for part in ("a is missing", "b is missing", "step is unknown", "half is bfloat16[3], expected float32[3]"):
        assert part in text
    assert "w is float32[20, 50], expected float32[20, 51]" in text
    many = {f"x{i}": jnp.zeros(1) for i in range(9)}
    with pytest.raises(CheckpointError, match=r"x0 is missing.*and 7 more"):
        restored(saved, like(many))


def test_a_full_disk_is_an_error_and_the_failed_step_is_not_listed(tmp_path):
    """No file may grow above 100 kB: what a write in the background meets is what a full disk gives it."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.zeros(10)}, {})
    checkpoints.wait()
    noise = jax.random.normal(jax.random.key(0), (100_000,))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        checkpoints.save(2, {"x": noise}, {})
        with pytest.raises(OSError, match="could not be written"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        checkpoints.close()
    assert checkpoints.steps() == [1]
    found, _ = restored(tmp_path, like({"x": jnp.zeros(10)}))
    assert found[0] == 1
    assert not list(tmp_path.glob("*.part"))


def full_at(step: int):
    """A digest that meets a full disk at one step."""

    def digest(path: Path) -> str:
        if f"{step}.part" in str(path):
            raise OSError(28, "No space left on device")
        return real(path)

    real = checkpoint._digest
    return digest


@pytest.mark.usefixtures("toy_method", "compile_cache")
def test_a_run_whose_save_fails_ends_with_an_error(tmp_path, monkeypatch):
    toy.run(toy.config(), tmp_path, stop_at=2)

    with monkeypatch.context() as patch:
        patch.setattr("mfl_jax.checkpoint._digest", full_at(4))
        with pytest.raises(OSError, match="No space left"):
            toy.run(toy.config(), tmp_path)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"2", "4.part"}
    assert int(toy.run(toy.config(), tmp_path).step) == 6
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"4", "6"}


@pytest.mark.usefixtures("toy_method", "compile_cache")
def test_a_run_goes_on_from_the_one_before_a_damaged_checkpoint(tmp_path):
    whole = toy.run(toy.config(), tmp_path / "whole")
    toy.run(toy.config(), tmp_path / "run", stop_at=4)
    (largest,) = (tmp_path / "run" / "checkpoints" / "4").glob("meta.json")
    largest.write_text(largest.read_text() + " ")
    synthetic.assert_same(whole, toy.run(toy.config(), tmp_path / "run"))
    told = [row for row in metrics.read(tmp_path / "run" / "metrics.jsonl") if "note" in row]
    assert told == [{"step": 4, "note": {"checkpoint_set_aside": "meta.json has changed since it was written"}}]


def test_the_copy_that_is_saved_is_not_touched_by_the_step_that_donates_it(tmp_path):
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = bump({"x": jnp.zeros(1_000_000)})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree, {})
    for _ in range(20):
        tree = bump(tree)
    checkpoints.wait()
    checkpoints.close()
    found, _ = restored(tmp_path, like(tree))
    np.testing.assert_array_equal(np.asarray(found[1]["x"]), 1.0)


EIGHT = """
import sys
from dataclasses import replace
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from mfl_jax import methods, sharding, train
from mfl_jax.checkpoint import Checkpoints
from mfl_jax.step import make_step
from tests.mfl_jax import synthetic, toy
methods.METHODS["toy"] = toy.make
assert len(jax.devices()) == 8
config = toy.config(steps=12, every=0, sharding=((".*/w", (None, "data")),))
facts, folder = synthetic.facts(config.data), Path(sys.argv[1])
saved = toy.run(config, folder, stop_at=2)
assert saved.params["w"].sharding.spec == P(None, "data"), saved.params["w"].sharding
losses = {}
for count in (8, 4, 2, 1):
    mesh = sharding.make_mesh(devices=jax.devices()[:count])
    run = replace(train.plan(config, source=synthetic.Source(facts), facts=facts), mesh=mesh)
    places, like, example = train._shapes(run)
    checkpoints = Checkpoints(folder / "checkpoints")
    step, state, meta = checkpoints.restore(like)
    checkpoints.close()
    assert step == 2 and len(state.params["w"].sharding.device_set) == count
    synthetic.assert_same(state, saved)
    compiled = train._compile(run, places, like, example)
    losses[count] = []
    for step in range(2, 12):
        state, values = compiled(state, sharding.put(synthetic.batch(facts, step), mesh))
        losses[count].append(float(values["loss"]))
assert len(set(losses[8])) == 10
for count in (4, 2, 1):
    np.testing.assert_allclose(losses[count], losses[8], rtol=1e-5)
print("any number of devices goes on")
"""


def test_saved_on_eight_devices_it_goes_on_with_any_number(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", EIGHT, str(tmp_path)]
    told = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert "any number of devices goes on" in told.stdout, told.stderr[-3000:]
