"""The mesh, where a batch lies on it, and batches put there ahead of the step that needs them."""

import contextlib
import re
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mfl_jax import trees

DATA = "data"


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the given axes (default: all devices along `data`); one axis may be -1, for what is left.

    The axis types are Auto: the compiler places what is not said. jax's default is Explicit, where z @ z.T fails.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(shape or {DATA: -1})
    known = int(np.prod([n for n in sizes.values() if n != -1]))
    free = [axis for axis, n in sizes.items() if n == -1]
    if len(free) > 1 or any(n < 1 and n != -1 for n in sizes.values()) or len(devices) % known:
        raise ValueError(
            f"a mesh of {sizes} does not fit {len(devices)} devices: one axis may be -1, the product is fixed"
        )
    sizes |= {axis: len(devices) // known for axis in free}
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise ValueError(f"a mesh of {sizes} needs {np.prod(list(sizes.values()))} devices; there are {len(devices)}")
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


def mesh_for(rows: int, shape: Mapping[str, int]) -> Mesh:
    """A mesh of all devices. Those of a CPU are its cores, which other devices use as well (process.py): of them it has
    as many as `rows` divide over, the same number of each process."""
    if jax.default_backend() == "cpu":
        own = [jax.local_devices(process) for process in range(jax.process_count())]
        for count in range(min(map(len, own)), 0, -1):
            with contextlib.suppress(ValueError):  # of a shape that so many do not fit
                mesh = make_mesh(shape, [device for devices in own for device in devices[:count]])
                if rows % mesh.shape[DATA] == 0:
                    return mesh
    return make_mesh(shape)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows along `data`, everything else whole on every device."""
    if DATA not in mesh.axis_names:
        raise ValueError(f"a mesh for batches has an axis {DATA!r}, not only {mesh.axis_names}")
    return NamedSharding(mesh, PartitionSpec(DATA))


def rows_for(batch: int, mesh: Mesh) -> int:
    """The least number of rows, `batch` or more, that divides over the mesh; for passes that pad what is short."""
    across = mesh.shape[DATA]
    return -(-batch // across) * across


def put(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """This host's rows -> global arrays over the mesh. Columns of text stay as they are, on the host.

    64-bit columns become 32-bit unless jax_enable_x64 is set, as everywhere in jax; an id that does not fit is refused.
    """
    sharding, across = batch_sharding(mesh), mesh.shape[DATA]
    placed: dict[str, Any] = {}
    for name, array in batch.items():
        if array.dtype.kind in "OSUT":
            placed[name] = array
            continue
        rows = len(array) * jax.process_count()
        if rows % across:
            raise ValueError(f"a batch of {rows} rows does not divide over the {across} devices of axis {DATA!r}")
        narrow = jax.dtypes.canonicalize_dtype(array.dtype)
        if narrow != array.dtype and array.dtype.kind in "iu" and array.size:
            limits = np.iinfo(narrow)
            if array.min() < limits.min or array.max() > limits.max:
                raise ValueError(f"column {name!r} holds values beyond {narrow}: set jax_enable_x64, or leave it out")
        placed[name] = jax.make_array_from_process_local_data(sharding, array.astype(narrow, copy=False))
    return placed


def put_whole(array: np.ndarray, places: NamedSharding) -> jax.Array:
    """On the devices as `places` says: of an array that every process holds whole."""
    return jax.make_array_from_callback(array.shape, places, lambda index: array[index])


def prefetch(
    batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh, depth: int = 2
) -> Generator[dict[str, Any], None, None]:
    """Batches on the devices, up to `depth` of them besides the one in use; transfers run while the step computes.

    Closes its source when it ends, is closed, or fails. The source is ahead of the consumer by what is held here, so a
    run that is to be resumed counts the steps it has done, and does not ask the source.
    """
    if depth < 0:
        raise ValueError(f"depth is at least 0, not {depth}")
    source = iter(batches)
    held: deque[dict[str, Any]] = deque()
    try:
        for batch in source:
            held.append(put(batch, mesh))
            if len(held) > depth:
                yield held.popleft()
        while held:
            yield held.popleft()
    finally:
        held.clear()
        getattr(batches, "close", lambda: None)()


def place(shapes: Any, mesh: Mesh, rules: Sequence[tuple[str, Sequence[str | None]]]) -> Any:
    """A tree of shardings for the state: by the first rule whose pattern matches a leaf's name, the whole elsewhere.

    A rule is (pattern, axis of the mesh or None for each axis of the leaf), e.g. ('.*kernel', (None, 'fsdp')). A leaf
    that the axis does not divide is kept whole: statistics and counters have no use for being split. The axis may be
    `data` itself: every device then keeps its part of parameters and optimiser, and gathers when it computes.
    """
    names = {name: leaf.ndim for name, leaf in trees.named_leaves(shapes).items()}
    for pattern, axes in rules:
        if not any(re.fullmatch(pattern, name) and len(axes) == ndim for name, ndim in names.items()):
            raise ValueError(
                f"sharding rule ({pattern!r}, {tuple(axes)}) matches no leaf of {len(axes)} axes (a pattern matches a "
                f"WHOLE name); near it: {trees.nearest(pattern, names)}"
            )

    def one(name: str, leaf: Any) -> NamedSharding:
        for pattern, axes in rules:
            if re.fullmatch(pattern, name) and len(axes) == leaf.ndim:
                if unknown := {a for a in axes if a is not None} - set(mesh.axis_names):
                    raise ValueError(f"sharding rule {pattern!r} names {unknown}; the mesh has {mesh.axis_names}")
                if all(a is None or n % mesh.shape[a] == 0 for a, n in zip(axes, leaf.shape, strict=True)):
                    return NamedSharding(mesh, PartitionSpec(*axes))
        return NamedSharding(mesh, PartitionSpec())

    return trees.map_named(one, shapes)
