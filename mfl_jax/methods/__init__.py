"""What can be trained. A new method is one file with make(reading, facts, mesh) -> Method, and one entry here."""

import difflib
from typing import Any

import jax

from mfl_jax.data import Facts
from mfl_jax.methods import dino, mfl, moco, siamese, slpd, supervised, trident, two_view
from mfl_jax.methods.base import Method, Refresh

__all__ = ["METHODS", "Method", "Refresh", "make"]

METHODS = {
    "dino": dino.make,
    "mfl": mfl.make,
    "moco": moco.make,
    "siamese": siamese.make,
    "slpd": slpd.make,
    "supervised": supervised.make,
    "trident": trident.make,
    "two_view": two_view.make,
}


def make(reading: Any, facts: Facts, mesh: jax.sharding.Mesh) -> Method:
    """The method that config.method names, with the options under that name."""
    name = reading.method
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no method is called {name!r}; there are {', '.join(METHODS)}{hint}")
    return METHODS[name](reading, facts, mesh)
