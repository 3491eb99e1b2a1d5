"""Log-sum-exp of all pairs' similarities, by row and by column: plain, in blocks, or round a ring of devices.

The block and ring forms never hold more than [rows here, block] logits. The gradient recomputes them from the two
log-sum-exps, as it needs only exp(logit - row's) and exp(logit - column's).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

Array = jax.Array
EXACT = lax.Precision.HIGHEST


def pair_lse(
    a: Array,
    b: Array,
    scale: Array,
    group: Array | None = None,
    mask: Array | None = None,
    *,
    block: int | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> tuple[Array, Array, Array]:
    """Over logits scale * a @ b.T: log-sum-exp of each row, of each column (both differentiable), largest of each row.

    Pairs of one group other than (i, i), and all pairs of rows that the mask leaves out, do not exist; where nothing
    is left the log-sum-exp is 0 (and the largest -inf).
    """
    size, devices = a.shape[0], 1 if mesh is None else mesh.shape[axis]
    if size % devices:
        raise ValueError(f"a batch of {size} rows cannot be shared by {devices} devices along {axis!r}")
    own = size // devices
    block = min(block or own, own)
    if own % block:
        raise ValueError(f"block={block} must divide the {own} rows of a device")
    index = jnp.arange(size, dtype=jnp.int32)
    group = index if group is None else group.astype(jnp.int32)
    mask = jnp.ones(size, bool) if mask is None else mask.astype(bool)
    keys = jnp.stack([index, group, mask.astype(jnp.int32)], -1)
    if block == size:
        rows, columns, best = whole(a, b, scale, keys)
    else:
        rows, columns, best = streamed(block, mesh, axis, a, b, scale, keys)
    return rows, columns, lax.stop_gradient(best)


def logits_of(a: Array, b: Array, scale: Array, keys_a: Array, keys_b: Array) -> tuple[Array, Array]:
    """Logits [n, m], -inf for pairs that do not exist; and which exist."""
    ka, kb = keys_a[:, None], keys_b[None]
    exists = (ka[..., 2] * kb[..., 2] > 0) & ((ka[..., 1] != kb[..., 1]) | (ka[..., 0] == kb[..., 0]))
    return jnp.where(exists, scale * jnp.matmul(a, b.T, precision=EXACT), -jnp.inf), exists


def finite(lse: Array) -> Array:
    return jnp.where(jnp.isneginf(lse), 0.0, lse)


def whole(a: Array, b: Array, scale: Array, keys: Array) -> tuple[Array, Array, Array]:
    logits, exists = logits_of(a, b, scale, keys, keys)
    some = jnp.any(exists, 1)  # of rows, and of columns: what exists is symmetric
    rows = jax.nn.logsumexp(jnp.where(some[:, None], logits, 0.0), 1)
    columns = jax.nn.logsumexp(jnp.where(some, logits, 0.0), 0)
    return jnp.where(some, rows, 0.0), jnp.where(some, columns, 0.0), jnp.max(logits, 1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def streamed(
    block: int, mesh: Mesh | None, axis: str, a: Array, b: Array, scale: Array, keys: Array
) -> tuple[Array, Array, Array]:
    return forward(block, mesh, axis, a, b, scale, keys)[0]


def forward(block: int, mesh: Mesh | None, axis: str, a: Array, b: Array, scale: Array, keys: Array) -> Any:
    ring = 1 if mesh is None else mesh.shape[axis]
    local = partial(ring_lse, block, ring, axis)
    rows, columns, best = on_mesh(local, mesh, axis, "rr.r", "rrr")(a, b, scale, keys)
    return (finite(rows), finite(columns), best), (a, b, scale, keys, rows, columns)


def backward(block: int, mesh: Mesh | None, axis: str, saved: Any, cotangents: Any) -> Any:
    a, b, scale, keys, rows, columns = saved
    ring = 1 if mesh is None else mesh.shape[axis]
    local = partial(ring_gradient, block, ring, axis)
    run = on_mesh(local, mesh, axis, "rr.rrrrr", "rr.")
    da, db, dscale = run(a, b, scale, keys, rows, columns, cotangents[0], cotangents[1])
    return da, db, dscale, None


streamed.defvjp(forward, backward)


def on_mesh(function: Any, mesh: Mesh | None, axis: str, inputs: str, outputs: str) -> Any:
    """The function of local rows as one of global arrays: 'r' is shared out by rows, '.' is the same everywhere."""
    if mesh is None:
        return function
    spec = {"r": PartitionSpec(axis), ".": PartitionSpec()}
    ins, outs = (tuple(spec[letter] for letter in letters) for letters in (inputs, outputs))
    return jax.shard_map(function, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)


def turn(ring: int, axis: str, tree: Any) -> Any:
    """Hands everything to the next device."""
    if ring == 1:
        return tree
    return lax.ppermute(tree, axis, [(i, (i + 1) % ring) for i in range(ring)])


def cut(block: int, tree: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // block, block, *x.shape[1:]), tree)


def ring_lse(block: int, ring: int, axis: str, a: Array, b: Array, scale: Array, keys: Array) -> Any:
    """Local rows against all columns, which come by one device's worth at a time with what was summed over them."""
    none = jnp.full(a.shape[0], -jnp.inf)

    def one_block(carry: Any, part: Any) -> Any:
        rows, best = carry
        b_block, keys_block, columns = part
        logits, _ = logits_of(a, b_block, scale, keys, keys_block)
        rows = jnp.logaddexp(rows, jax.nn.logsumexp(logits, 1))
        return (rows, jnp.maximum(best, jnp.max(logits, 1))), jnp.logaddexp(columns, jax.nn.logsumexp(logits, 0))

    def one_turn(carry: Any, _: None) -> Any:
        rows, best, b, keys_b, columns = carry
        (rows, best), columns = lax.scan(one_block, (rows, best), cut(block, (b, keys_b, columns)))
        return (rows, best, *turn(ring, axis, (b, keys_b, columns.reshape(-1)))), None

    (rows, best, _, _, columns), _ = lax.scan(one_turn, (none, none, b, keys, none), None, length=ring)
    return rows, columns, best


def ring_gradient(block: int, ring: int, axis: str, a: Array, b: Array, scale: Array, keys: Array, *rest: Array) -> Any:
    """As ring_lse, with the gradient of the columns travelling along with them."""
    row_lse, column_lse, row_weight, column_weight = rest
    row_lse, column_lse = finite(row_lse), finite(column_lse)

    def one_block(carry: Any, part: Any) -> Any:
        da, dscale = carry
        b_block, keys_block, lse, weight, db = part
        logits, exists = logits_of(a, b_block, scale, keys, keys_block)
        by_row = row_weight[:, None] * jnp.exp(logits - row_lse[:, None])
        slope = jnp.where(exists, by_row + weight * jnp.exp(logits - lse), 0.0)
        da += jnp.matmul(slope, b_block, precision=EXACT)
        dscale += jnp.sum(slope * jnp.where(exists, logits, 0.0))
        return (da, dscale), db + jnp.matmul(slope.T, a, precision=EXACT)

    def one_turn(carry: Any, _: None) -> Any:
        da, dscale, *travels = carry
        (da, dscale), db = lax.scan(one_block, (da, dscale), cut(block, tuple(travels)))
        return (da, dscale, *turn(ring, axis, (*travels[:4], db.reshape(b.shape)))), None

    start = (jnp.zeros_like(a), jnp.float32(0), b, keys, column_lse, column_weight, jnp.zeros_like(b))
    (da, dscale, *_, db), _ = lax.scan(one_turn, start, None, length=ring)
    dscale = dscale / scale
    return scale * da, scale * db, dscale if ring == 1 else lax.psum(dscale, axis)
