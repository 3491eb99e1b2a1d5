"""Parameters addressed by name: 'encoder/blocks_0/attn/qkv/kernel'. Rules are regular expressions over these names."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax

T = TypeVar("T")
Rules = Sequence[tuple[str, T]]


def name_of(path: Iterable[Any]) -> str:
    """The name of a leaf from its jax key path."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def named_leaves(tree: Any) -> dict[str, Any]:
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """jax.tree.map whose function is given the name of the leaf first."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(name_of(path), *leaves), tree, *rest)


def nearest(wanted: str, names: Iterable[str], count: int = 3) -> str:
    """The names most like `wanted`, for an error message; `wanted` may be a regular expression."""
    names, plain = list(names), re.sub(r"[^\w/]+", "", wanted)
    found = difflib.get_close_matches(plain, names, n=count, cutoff=0.4)
    found = found or [name for name in names if plain and plain.split("/")[-1] in name][:count] or names[:count]
    return ", ".join(map(repr, found)) or "(there are none)"


def match(rules: Rules, tree: Any, what: str = "rules") -> Any:
    """The tree of each leaf's value: that of the first rule whose pattern matches the whole of its name.

    Every leaf must be covered and every rule must be of use, for a rule with a misspelt name would else change
    nothing and say nothing. A last '.*' may be left with nothing to do.
    """
    names, pairs = list(named_leaves(tree)), rule_pairs(rules, what)
    chosen = {name: next((i for i, (p, _) in enumerate(pairs) if re.fullmatch(p, name)), None) for name in names}
    lost = [name for name in names if chosen[name] is None]
    if lost:
        shown = ", ".join(map(repr, lost[:5]))
        raise ValueError(f"{what}: {len(lost)} of {len(names)} leaves match no rule: {shown}; end the rules with '.*'")
    for i, (pattern, _) in enumerate(pairs):
        if i not in chosen.values() and pattern != ".*":
            hidden = [name for name in names if re.fullmatch(pattern, name)]
            if hidden:
                raise ValueError(
                    f"{what}: {pattern!r} is of no use: earlier rules match {hidden[0]!r} and all it names"
                )
            near = nearest(pattern, names)
            raise ValueError(f"{what}: {pattern!r} matches no leaf (a pattern matches a WHOLE name); near it: {near}")
    return map_named(lambda name, _: pairs[chosen[name] or 0][1], tree)


def rule_pairs(rules: Rules, what: str = "rules") -> list[tuple[str, Any]]:
    """The rules as pairs; one that is not (regular expression, value) is refused."""
    pairs = []
    for rule in rules:
        try:
            pattern, value = rule if not isinstance(rule, str) else ()
            re.compile(pattern)
        except (re.error, TypeError, ValueError) as error:
            raise ValueError(f"{what}: a rule is (regular expression, value), not {rule!r}: {error}") from error
        pairs.append((pattern, value))
    return pairs


def count(tree: Any) -> int:
    """The number of values in a tree of arrays (or of their shapes)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def size_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def overview(tree: Any, title: str = "parameters", **columns: Any) -> str:
    """A table of names, shapes, dtypes and sizes; a further column is a tree of the same structure."""
    leaves = named_leaves(tree)
    extra = {head: named_leaves(column) for head, column in columns.items()}
    rows = [[title, "shape", "dtype", "values", *columns]]
    for name, leaf in leaves.items():
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        rows.append([name, shape, str(leaf.dtype), f"{count(leaf):,}", *(str(c[name]) for c in extra.values())])
    total = ["total", "", f"{size_bytes(tree) / 2**20:.1f} MiB", f"{count(tree):,}", *[""] * len(columns)]
    widths = [max(len(row[i]) for row in [*rows, total]) for i in range(len(total))]
    line = "-" * (sum(widths) + 2 * len(widths) - 2)
    aligned = [
        "  ".join(cell.rjust(widths[i]) if i == 3 else cell.ljust(widths[i]) for i, cell in enumerate(row))
        for row in [*rows, total]
    ]
    return "\n".join(text.rstrip() for text in [aligned[0], line, *aligned[1:-1], line, aligned[-1]])
