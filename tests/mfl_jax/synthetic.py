"""Batches out of nothing, so that training is tested without tensorflow, a tile set or a disk full of slides."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mfl_jax import config as configs
from mfl_jax.data import Facts
from mfl_jax.views import Modality

SIZE, BATCH, SLIDES = 16, 8, 5
CELLS, FEATURES = 4, 6  # of a region
CONFIGS = Path(__file__).parents[2] / "configs"
OF_METHOD = {"dino": "dino_tiles"}  # the config that a method is tested by, where it is called otherwise
PARTNERS = {
    "if": (Modality("image", 4), (SIZE, SIZE, 4), "uint16"),
    "ihc": (Modality("image", 3), (SIZE, SIZE, 3), "uint8"),
    "nuclei": (Modality("map", 2), (SIZE, SIZE, 2), "uint16"),
    "counts": (Modality("vector", 12), (12,), "float32"),
}


def facts(data: ConfigDict, examples: int = 64) -> Facts:
    """What `data.facts` would say of a tile set with the partners that a config reads; of one of regions, where the
    path that the config names ends so."""
    size, modalities = SIZE, {"he": Modality()}
    shapes: dict[str, tuple[tuple[int, ...], str]] = {"he": ((SIZE, SIZE, 3), "uint8")}
    if data.tileset.endswith("regions"):
        size, modalities = CELLS, {"he": Modality("grid", FEATURES + 1)}
        shapes = {"he": ((CELLS, CELLS, FEATURES + 1), "float16")}
    for name in data.partners:
        modalities[name], shape, dtype = PARTNERS[name]
        shapes |= {name: (shape, dtype), f"{name}_mask": ((), "bool")}
    for beside in (name for name in ("near", "far") if data[f"{name}_um"]):
        shapes |= {f"{beside}_he": shapes["he"], f"{beside}_mask": ((), "bool")}
    shapes |= {"mask": ((), "bool"), "id": ((), "int32")}
    shapes |= dict.fromkeys(("label", "slide", "case"), ((), "int32"))
    shapes |= dict.fromkeys(data.columns, ((), "float32"))
    return Facts(size, 1.0, modalities, shapes, ("a", "b", "c"), examples, slides=SLIDES, records=examples)


def batch(facts: Facts, step: int, *, rows: int = BATCH, seed: int = 0) -> dict[str, np.ndarray]:
    """A pure function of (seed, step); every partner shows, faintly, what the label says."""
    draw = np.random.default_rng((seed, step))
    label = draw.integers(0, len(facts.label_names), rows).astype(np.int32)
    made: dict[str, np.ndarray] = {}
    for name, (shape, dtype) in facts.shapes.items():
        if dtype == "bool":
            made[name] = np.ones(rows, bool)
        elif dtype == "uint8":
            made[name] = (
                draw.integers(0, 156, (rows, *shape)).astype(np.uint8)
                + (label * 40).astype(np.uint8)[:, None, None, None]
            )
        elif dtype == "float16":
            there = draw.random((rows, *shape[:2], 1)) < 0.8
            tiles = draw.normal(size=(rows, *shape[:2], shape[2] - 1)) + label[:, None, None, None]
            made[name] = np.concatenate([tiles * there, there], -1).astype(np.float16)
        elif dtype == "uint16":
            made[name] = draw.integers(0, 5, (rows, *shape)).astype(np.uint16)
        elif shape:
            made[name] = (draw.poisson(3.0, (rows, *shape)) + label[:, None]).astype(np.float32)
        else:
            made[name] = draw.normal(size=rows).astype(np.float32)
    made |= {
        "label": label,
        "slide": label * 2,
        "case": label,
        "id": ((step * rows + np.arange(rows)) % facts.examples).astype(np.int32),
    }
    return {name: made[name] for name in facts.shapes}


class Source:
    """Endless; `change(step, batch)` may spoil a batch, and `state` is checked on resume as a real stream does."""

    def __init__(self, facts: Facts, *, rows: int = BATCH, seed: int = 0, change=None, hosts: tuple[int, int] = (0, 1)):
        self.facts, self.rows, self.seed, self.change, self.hosts = facts, rows, seed, change, hosts
        self.asked: list[int] = []

    def __call__(self, step: int, state: Mapping[str, Any] | None) -> Iterator[dict[str, np.ndarray]]:
        assert state is None or (state["step"], state["seed"]) == (step, self.seed), state
        self.asked.append(step)
        return Run(self, step)

    def everything(self) -> Iterator[dict[str, np.ndarray]]:
        """The batches of the first epoch."""
        stream = Run(self, 0)
        for _ in range(self.facts.examples // self.rows):
            yield next(stream)


class Run:
    def __init__(self, source: Source, step: int):
        self.source, self.step, self.closed = source, step, False

    def __iter__(self) -> "Run":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        made = batch(self.source.facts, self.step, rows=self.source.rows, seed=self.source.seed)
        if self.source.change is not None:
            made = self.source.change(self.step, made)
        self.step += 1
        index, count = self.source.hosts
        part = self.source.rows // count
        return {name: array[index * part : (index + 1) * part] for name, array in made.items()}

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "seed": self.source.seed}

    def close(self) -> None:
        self.closed = True


def config_of(name: str) -> Path:
    return CONFIGS / f"{OF_METHOD.get(name, name)}.py"


def tiny(name: str, words: str = "", **overrides: Any) -> ConfigDict:
    """The config of that name or method as tiny, with more words and, by full name (dots as two underscores), other
    values."""
    config = configs.load(f"{config_of(name)}:tiny" + (f",{words}" if words else ""))
    with config.unlocked():
        for key, value in overrides.items():
            node = config
            *parents, last = key.split("__")
            for parent in parents:
                node = node[parent]
            node[last] = value
    return config


def leaves(tree: Any) -> dict[str, np.ndarray]:
    found = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


def assert_same(a: Any, b: Any) -> None:
    """Bitwise, leaf by leaf."""
    one, other = leaves(a), leaves(b)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert value.tobytes() == other[name].tobytes(), name


def differing(a: Any, b: Any) -> set[str]:
    one, other = leaves(a), leaves(b)
    return {name for name in one if one[name].tobytes() != other[name].tobytes()}


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The programs that the backend compiles within."""
    names: list[str] = []

    def listen(event: str, seconds: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(about))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
