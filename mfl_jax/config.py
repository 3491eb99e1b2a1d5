"""Configs are programs: `configs/<name>.py` has get_config(arg) and returns a ConfigDict. This file loads, overrides
and checks them; what a key means is said where it stands in the config and read where it is used.
"""

import ast
import difflib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

import configs

INSTALLED = Path(configs.__file__).parent
SINCE = {"moco.batch_negatives": False, "slpd.apart": "slide"}  # what runs did before there were these keys


def load(spec: str) -> ConfigDict:
    """'configs/mfl.py:tiny,optim.lr=1e-3' -> the config of get_config('tiny'), with the overrides, locked.

    After the colon, words go to get_config and `key=value` overrides a key that exists, by its full name.
    """
    path, _, argument = spec.partition(":")
    parts = [part.strip() for part in _split(argument)]
    words = ",".join(p for p in parts if p and "=" not in p)
    config = module(path).get_config(words)
    config.lock()
    for part in parts:
        if "=" in part:
            name, _, text = part.partition("=")
            override(config, name.strip(), text.strip())
    return config


def _split(argument: str) -> list[str]:
    """At commas outside brackets and quotes, so that a view or a list may hold commas."""
    parts, depth, quote = [""], 0, ""
    for letter in argument:
        if letter == "," and not depth and not quote:
            parts.append("")
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        parts[-1] += letter
    return parts


def module(path: str) -> ModuleType:
    """The program that a config is, run: it has get_config(arg), and may have sweep().

    'configs/<name>.py' is found wherever one is, as a file of this folder or else as installed.
    """
    file = Path(path)
    if not file.is_file() and file.parent == Path("configs") and (INSTALLED / file.name).is_file():
        file = INSTALLED / file.name
    if not file.is_file():
        known = sorted(
            (Path("configs") / p.name if p.parent == INSTALLED else p).as_posix()
            for p in (file.parent if file.parent.is_dir() else INSTALLED).glob("[!_]*.py")
        )
        raise ValueError(f"there is no config {path!r}{_nearest(path, known)}")
    found = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    assert found is not None
    assert found.loader is not None
    made = importlib.util.module_from_spec(found)
    found.loader.exec_module(made)
    if not hasattr(made, "get_config"):
        raise ValueError(f"{path} has no function get_config(arg)")
    return made


def override(config: ConfigDict, name: str, text: str) -> None:
    """Set an existing key from text; the type may not change, but a whole number may stand for a float."""
    *parents, last = name.split(".")
    node: Any = config
    for parent in parents:
        if not isinstance(node, ConfigDict) or parent not in node:
            raise ValueError(f"the config has no key {name!r}{_nearest(name, flatten(config))}")
        node = node[parent]
    if not isinstance(node, ConfigDict) or last not in node:
        raise ValueError(f"the config has no key {name!r}{_nearest(name, flatten(config))}")
    old = node[last]
    value = _parse(text) if not isinstance(old, str) else _unquoted(text)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    if old is not None and value is not None and type(value) is not type(old):
        raise ValueError(f"{name} is {old!r}, of type {type(old).__name__}; {text!r} is not")
    node[last] = value


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _parse(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{'optim.lr': 1e-3, ...}: every leaf by its full name."""
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict | FrozenConfigDict | Mapping):
            leaves |= flatten(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves


def _nearest(name: str, known: Iterator[str] | Mapping[str, Any] | list[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; there are {', '.join(sorted(names)[:40])}"


class Reading:
    """A config that remembers which keys were read, so that a key which has no effect is found before training."""

    def __init__(self, config: ConfigDict, name: str = "", seen: set[str] | None = None):
        self._config, self._name = config, name
        self._seen: set[str] = set() if seen is None else seen

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_"):
            raise AttributeError(key)
        name = f"{self._name}{key}"
        if key not in self._config:
            raise ValueError(f"the config lacks the key {name!r}{_nearest(name, flatten(self._config, self._name))}")
        value = self._config[key]
        if isinstance(value, ConfigDict):
            return Reading(value, f"{name}.", self._seen)
        self._seen.add(name)
        return value

    def __contains__(self, key: str) -> bool:
        return key in self._config

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def full_name(self, key: str) -> str:
        return f"{self._name}{key}"

    def items(self) -> Iterator[tuple[str, Any]]:
        return ((key, getattr(self, key)) for key in self._config)

    def check_all_read(self, but: str = "") -> None:
        """ValueError for keys that nothing has read; call it on the root after everything is built, before compiling.

        Keys that begin with `but` may stay unread: those of data, where batches come from elsewhere.
        """
        unread = sorted(k for k in set(flatten(self._config)) - self._seen if not (but and k.startswith(but)))
        if unread:
            raise ValueError(f"keys of the config without effect: {', '.join(unread)}; remove them, or mend the name")


def whole(reading: Reading, key: str, least: int) -> int:
    """A whole number of at least `least`."""
    value = getattr(reading, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{reading.full_name(key)} is a whole number of {least} or more, not {value!r}")
    return value


def completed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config as it was stored, with what it was too early to say."""
    found = dict(document)
    for name, value in SINCE.items():
        section, _, key = name.partition(".")
        if section in found:
            found[section] = {key: value} | found[section]
    return found


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=1, sort_keys=True, default=list)
