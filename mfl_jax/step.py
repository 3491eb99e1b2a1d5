"""State, and the one train step that every method takes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mfl_jax import optim
from mfl_jax.methods.base import Batch, Method, Metrics


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that changes during training. What is not here does not exist after a restart."""

    step: jax.Array  # int32: how many steps were taken, skipped ones included
    params: Any
    opt: Any
    extra: Any
    rng: jax.Array  # key data; folded with the step, never split
    skipped: jax.Array  # int32: steps in a row that were not finite, up to now
    skipped_total: jax.Array  # int32
    average: Any = None  # moving average of params, where config.ema is above 0


Step = Callable[[State, Batch], tuple[State, Metrics]]


def init_state(method: Method, tx: optax.GradientTransformation, seed: int, batch: Batch, *, ema: float = 0.0) -> State:
    """A pure function of seed and batch shapes: jit it with out_shardings to create parameters where they will live."""
    key = jax.random.key(seed)
    params, extra = method.init(jax.random.fold_in(key, 0), batch)
    zero = jnp.zeros((), jnp.int32)
    rng = jax.random.key_data(jax.random.fold_in(key, 1))
    average = jax.tree.map(jnp.copy, params) if ema else None
    return State(zero, params, tx.init(params), extra, rng, zero, zero, average)


def averaged(state: State) -> State:
    """The state that is evaluated: with the averaged parameters, where there are such."""
    return state if state.average is None else replace(state, params=state.average)


def make_step(method: Method, tx: optax.GradientTransformation, *, accumulate: int = 1, ema: float = 0.0) -> Step:
    """(state, batch) -> (state, metrics). A step whose loss, gradient or new `extra` is not finite changes nothing but
    the counters: a NaN must enter neither parameters nor statistics, teacher or queue.

    accumulate=k takes the mean gradient of k slices of the batch one after another, for a batch that does not fit.
    Every slice is normalised by itself (as with bn_groups), and a contrastive loss sees the negatives of its slice
    only: the blocked loss is the way to many negatives without that.
    """
    gradient = jax.value_and_grad(method.loss, has_aux=True)

    def whole(state: State, batch: Batch, key: jax.Array):
        (loss, (out, metrics)), grads = gradient(state.params, state.extra, batch, key, state.step)
        return loss, grads, out, metrics

    def sliced(state: State, batch: Batch, key: jax.Array):
        # Row r goes to slice r % k, so that every device works on rows it already has.
        slices = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

        def body(grads, inputs):
            number, part = inputs
            loss, new, out, metrics = whole(state, part, jax.random.fold_in(key, number))
            return jax.tree.map(lambda a, b: a + b / accumulate, grads, new), (loss, out, metrics)

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads, (loss, outs, metrics) = jax.lax.scan(body, zeros, (jnp.arange(accumulate), slices))
        return loss.mean(), grads, method.merge(outs), jax.tree.map(lambda m: m.mean(0), metrics)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        loss, grads, out, metrics = (whole if accumulate == 1 else sliced)(state, batch, key)
        norm = optax.tree.norm(grads)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        extra = method.update(params, state.extra, out, state.step)
        average = optim.ema(state.average, params, ema) if ema else state.average
        ok = jnp.isfinite(loss) & jnp.isfinite(norm) & _all_finite(extra)
        new, old = (params, opt, extra, average), (state.params, state.opt, state.extra, state.average)
        params, opt, extra, average = jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
        skipped = jnp.where(ok, 0, state.skipped + 1).astype(jnp.int32)
        total = state.skipped_total + (~ok).astype(jnp.int32)
        guard = {"loss": loss, "grad_norm": norm, "skipped": skipped, "skipped_total": total}
        return State(state.step + 1, params, opt, extra, state.rng, skipped, total, average), metrics | guard

    return step


def _all_finite(tree: Any) -> jax.Array:
    floating = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in floating], bool))
