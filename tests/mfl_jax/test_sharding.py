"""The mesh and the prefetch to devices, on eight CPU devices in a process of their own and on whatever is here."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mfl_jax.sharding import batch_sharding, make_mesh, place, prefetch, put

EIGHT = """
import jax, jax.numpy as jnp, numpy as np
from mfl_jax.sharding import batch_sharding, make_mesh, mesh_for, prefetch
mesh = make_mesh({"data": -1, "model": 2})
assert dict(mesh.shape) == {"data": 4, "model": 2}, mesh
rows = {"he": np.arange(16 * 3, dtype=np.uint8).reshape(16, 3), "name": np.array(["a"] * 16)}
(batch,) = prefetch([rows], mesh)
assert batch["he"].sharding.is_equivalent_to(batch_sharding(mesh), 2)
for shard in batch["he"].addressable_shards:
    assert shard.data.shape == (4, 3)
    np.testing.assert_array_equal(np.asarray(shard.data), rows["he"][shard.index])
gram = jax.jit(lambda z: z @ z.T)(batch["he"].astype(jnp.float32))
np.testing.assert_array_equal(np.asarray(gram), rows["he"].astype(np.float32) @ rows["he"].astype(np.float32).T)
try:
    list(prefetch([{"he": np.zeros((6, 1))}], mesh))
except ValueError as error:
    assert "6 rows" in str(error), error
else:
    raise SystemExit("6 rows over 4 devices were not refused")
try:
    make_mesh({"data": 3})
except ValueError as error:
    assert "8 devices" in str(error), error
else:
    raise SystemExit("3 of 8 devices were not refused")
for rows, shape, expected in [
    (16, {"data": -1}, {"data": 8}), (12, {"data": -1}, {"data": 6}), (7, {"data": -1}, {"data": 7}),
    (11, {"data": -1}, {"data": 1}), (12, {"data": 2}, {"data": 2}),
    (10, {"data": -1, "model": 3}, {"data": 2, "model": 3}),
]:
    assert dict(mesh_for(rows, shape).shape) == expected, (rows, shape, mesh_for(rows, shape))
try:
    mesh_for(16, {"data": 9})
except ValueError as error:
    assert "8" in str(error), error
else:
    raise SystemExit("9 of 8 devices were not refused")
print("eight devices are right")
"""


class Source:
    """Counts what was taken, and remembers that it was closed."""

    def __init__(self, count: int):
        self.taken, self.count, self.closed = 0, count, False

    def __iter__(self):
        return self

    def __next__(self):
        if self.taken == self.count:
            raise StopIteration
        self.taken += 1
        return {"x": np.full(8, self.taken, np.int32)}

    def close(self):
        self.closed = True


def test_eight_devices():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", EIGHT], capture_output=True, text=True, env=os.environ | flags, timeout=120
    )
    assert "eight devices are right" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("depth", [0, 1, 2, 9])
def test_prefetch_keeps_order_and_stays_depth_ahead(depth):
    source = Source(6)
    seen = []
    for batch in prefetch(source, make_mesh(), depth):
        seen.append(int(batch["x"][0]))
        assert source.taken == min(len(seen) + depth, 6)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert source.closed


def test_prefetch_closes_its_source_when_closed_and_when_it_fails():
    source = Source(100)
    batches = prefetch(source, make_mesh())
    next(batches)
    batches.close()
    assert source.closed

    class Failing(Source):
        def __next__(self):
            raise OSError("gone")

    failing = Failing(3)
    with pytest.raises(OSError, match="gone"):
        next(prefetch(failing, make_mesh()))
    assert failing.closed


def test_text_stays_on_the_host_and_numbers_arrive_exactly():
    rows = {"id": np.array([5, -1, 2**31 - 1, 0] * 2), "slide": np.array(["a", "bc"] * 4, object), "m": np.eye(8) > 0}
    placed = put(rows, make_mesh())
    assert placed["slide"] is rows["slide"]
    assert isinstance(placed["id"], jax.Array)
    assert placed["m"].dtype == jnp.bool_
    np.testing.assert_array_equal(np.asarray(placed["id"]), rows["id"])
    np.testing.assert_array_equal(np.asarray(placed["m"]), rows["m"])


def test_an_id_that_would_be_cut_is_refused():
    with pytest.raises(ValueError, match=r"'id'.*jax_enable_x64"):
        put({"id": np.array([2**31])}, make_mesh(devices=jax.devices()[:1]))


def test_a_mesh_without_data_and_one_that_does_not_fit_are_refused():
    with pytest.raises(ValueError, match="'data'"):
        batch_sharding(make_mesh({"model": -1}))
    with pytest.raises(ValueError, match=r"does not fit|needs"):
        make_mesh({"data": 10**6})
    with pytest.raises(ValueError, match="one axis may be -1"):
        make_mesh({"data": -1, "model": -1})


def test_rules_place_the_state_by_name_and_a_rule_of_no_use_is_refused():
    mesh = make_mesh()
    shapes = {
        "enc": {"kernel": jax.ShapeDtypeStruct((4, 6), jnp.float32), "bias": jax.ShapeDtypeStruct((6,), jnp.float32)}
    }
    placed = place(shapes, mesh, [(".*/kernel", (None, "data"))])
    assert placed["enc"]["kernel"].spec == PartitionSpec(None, "data")
    assert placed["enc"]["bias"].spec == PartitionSpec()
    assert place(shapes, mesh, [])["enc"]["kernel"].spec == PartitionSpec()
    for rule, message in (
        ((".*/kernal", (None, "data")), "matches no leaf of 2 axes.*'enc/kernel'"),
        ((".*/kernel", ("data",)), "matches no leaf of 1 axes"),
        ((".*/kernel", (None, "fsdp")), "names .*fsdp.*mesh has .*data"),
    ):
        with pytest.raises(ValueError, match=message):
            place(shapes, mesh, [rule])
