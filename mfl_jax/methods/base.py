"""The method contract: four pure functions, and a fifth for what happens rarely."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

Params = Any
Extra = Any
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


def mean_of_slices(outs: Any) -> Any:
    """The `out` of a whole batch from those of its slices, stacked: right for statistics, which are means."""
    return jax.tree.map(lambda x: x.mean(0) if jnp.issubdtype(x.dtype, jnp.inexact) else x[-1], outs)


@dataclass(frozen=True)
class Refresh:
    """`fn(state) -> extra`, before every step that is a multiple of `every`; it may go over the whole set."""

    every: int
    fn: Callable[..., Extra]


@dataclass(frozen=True)
class Method:
    """What an experiment trains. All that changes lies in params (by gradient) or extra (by `update`), so a checkpoint
    of both is exact; a method that remembers anything elsewhere breaks resume.

    init    (rng, batch)                     -> params, extra
    loss    (params, extra, batch, rng, step) -> loss, (out, metrics)    float32 scalars; gradients go to params only
    update  (params, extra, out, step)       -> extra                    after the optimiser, with the new params
    embed   (params, extra, batch)           -> {name: features [B, D]}  H&E only: all that evaluators ever see
    merge   (outs, stacked by slices)        -> out                      of gradient accumulation; not all are means
    align   {partner: (params, extra, batch) -> {'he': z, partner: z}}   projections in the space that training compared
            the two in; for retrieval from one modality to the other alone, never for figures of H&E
    """

    init: Callable[[jax.Array, Batch], tuple[Params, Extra]]
    loss: Callable[[Params, Extra, Batch, jax.Array, jax.Array], tuple[jax.Array, tuple[Any, Metrics]]]
    update: Callable[[Params, Extra, Any, jax.Array], Extra]
    embed: Callable[[Params, Extra, Batch], dict[str, jax.Array]]
    refresh: Refresh | None = None
    merge: Callable[[Any], Any] = mean_of_slices
    align: Mapping[str, Callable[[Params, Extra, Batch], dict[str, jax.Array]]] = field(default_factory=dict)
