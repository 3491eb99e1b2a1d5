"""From a tile set on disk to what methods must know of it, and to its stream of batches."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

from mfl_jax import sharding
from mfl_jax.views import Modality

if TYPE_CHECKING:
    from input_pipeline.tileset import Spec, TileSet

COLUMNS = ("label", "slide", "case")
# Of readers, where the cores that they decode on are those that compute: 94 % of the time in the step, not 90
# (bench_loop.py).
NICE = 19


@dataclass(frozen=True)
class Facts:
    """What is the same in every batch of a tile set: enough to build a method and its shapes, with no tile read."""

    size: int  # px of a tile; of grids, tiles along a side of a region
    mpp: float  # um per px, or per tile along a side
    modalities: dict[str, Modality]  # 'he' and the partners that are read
    shapes: dict[str, tuple[tuple[int, ...], str]]  # entry of the batch -> shape without the rows, dtype
    label_names: tuple[str, ...]
    examples: int
    train_cases: tuple[str, ...] = ()  # of the split that is trained on, or behind it: no figure may be of them
    slides: int = 0  # of the whole tile set: `slide` and `id` of a batch are below these two; 0 where it is not known
    records: int = 0


def open_set(path: str) -> "TileSet":
    from input_pipeline.tileset import TileSet

    return TileSet.open(path)


def facts(reading: Any) -> Facts:
    """Of the `data` part of a config; reads the manifest and the index only."""
    tileset = open_set(reading.tileset)
    wanted = tuple(reading.partners)
    known = {p.name: p for p in tileset.spec.partners}
    if missing := [name for name in wanted if name not in known]:
        raise ValueError(f"data.partners names {missing}; {reading.tileset} has {sorted(known)}")
    if missing := [name for name in reading.columns if name not in tileset.tiles]:
        raise ValueError(f"data.columns names {missing}; {reading.tileset} has {sorted(tileset.tiles)}")
    spec = tileset.spec
    modalities = {"he": Modality(spec.he_kind, spec.he_channels)}
    shapes: dict[str, tuple[tuple[int, ...], str]] = {"he": (spec.he_shape, spec.he_dtype)}
    for name in wanted:
        partner = known[name]
        channels = partner.length if partner.kind == "vector" else partner.channels
        modalities[name] = Modality(partner.kind, channels or 0)
        shapes[name] = (spec.shape(partner), partner.dtype)
        shapes[f"{name}_mask"] = ((), "bool")
    for beside in (name for name in ("near", "far") if getattr(reading, f"{name}_um")):
        shapes |= {f"{beside}_he": shapes["he"], f"{beside}_mask": ((), "bool")}
    shapes |= {"mask": ((), "bool"), "id": ((), "int32")}
    shapes |= {name: ((), _narrow(tileset.tiles[name].dtype)) for name in (*COLUMNS, *reading.columns)}
    behind = spec.params.get("train_cases", ())  # of the encoder that made the features of a set of regions
    examples, cases = _examples(reading, tileset), tuple(dict.fromkeys((*tileset.splits[reading.split], *behind)))
    whole = {"slides": len(tileset.slides), "records": len(tileset)}
    return Facts(spec.size, spec.mpp, modalities, shapes, spec.label_names, examples, cases, **whole)


def of_spec(spec: "Spec") -> tuple[str, int, int]:
    """What an encoder must know of the records of a set: kind, size and channels."""
    return spec.he_kind, spec.size, spec.he_channels


def of_facts(facts: Facts) -> tuple[str, int, int]:
    of = facts.modalities["he"]
    return of.kind, facts.size, of.channels


def in_words(kind: str, size: int, channels: int, mpp: float | None = None) -> str:
    if kind == "image":
        return f"tiles of {size} px" + ("" if mpp is None else f" at {mpp:g} um/px")
    side = "" if mpp is None else f" of {mpp:g} um"
    return f"regions of {size} x {size} tiles{side} with {channels - 1} features each"


def _examples(reading: Any, tileset: "TileSet") -> int:
    """Tiles of an epoch; ValueError where there are too few for a batch."""
    if not 0 < reading.share <= 1:
        raise ValueError(f"data.share is {reading.share}; it is above 0, and 1 for every tile")
    if not (tiles := len(tileset.ids(reading.split))):
        raise ValueError(f"split {reading.split!r} of {reading.tileset} has no tiles")
    used = math.ceil(tiles * reading.share)
    if reading.batch > used:
        raise ValueError(f"data.batch is {reading.batch}, more than the {used} tiles used of split {reading.split!r}")
    return used


def facts_document(facts: Facts) -> dict[str, Any]:
    """For JSON; `facts_of` gives the same facts back."""
    return dataclasses.asdict(facts)


def facts_of(document: Mapping[str, Any]) -> Facts:
    """KeyError or TypeError where it is not what facts_document makes."""
    read = dict(document)
    read["modalities"] = {name: Modality(**_tuples(of)) for name, of in read["modalities"].items()}
    read["shapes"] = {name: (tuple(shape), str(dtype)) for name, (shape, dtype) in read["shapes"].items()}
    read |= {name: tuple(read[name]) for name in ("label_names", "train_cases")}
    return Facts(**read)


def _tuples(members: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where facts have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in members.items()}


def _narrow(dtype: np.dtype) -> str:
    return str(jax.dtypes.canonicalize_dtype(dtype))


class Source(Protocol):
    """Where batches come from: dicts of host arrays, one global step after another, from the step it is asked for.

    What it returns may have `state()`, which is saved and handed back on resume, `overridden` (what differs from that
    state on purpose, a tuple of text) and `close()`. A method with a refresh needs a source that has `everything()` as
    well: this host's rows of every example once, in batches as an evaluation stream gives them, with a close().
    """

    def __call__(self, step: int, state: Mapping[str, Any] | None) -> Iterator[dict[str, np.ndarray]]: ...


@dataclass(frozen=True)
class SplitSource:
    """A split of a tile set. Called with (step, saved state) it is this host's stream from that step on."""

    tileset: "TileSet"
    seed: int
    override: bool
    options: Mapping[str, Any]  # of train_stream; those that are `shared`, of eval_stream as well
    shared: tuple[str, ...] = ("batch", "split", "partners", "columns", "stall_timeout", "nice")

    def __call__(self, step: int, state: Mapping[str, Any] | None) -> Iterator[dict[str, np.ndarray]]:
        from input_pipeline.stream import train_stream

        place: dict[str, Any] = {"state": state, "override": self.override} if state else {"start_step": step}
        return train_stream(self.tileset, seed=self.seed, host=_host(), **self.options, **place)

    def everything(self) -> Iterator[dict[str, np.ndarray]]:
        """A tile that is bad stops it too, or with on_bad='replace' is left out."""
        from input_pipeline.stream import eval_stream

        on_bad = "mask" if self.options["on_bad"] == "replace" else self.options["on_bad"]
        options = {name: self.options[name] for name in self.shared}
        return eval_stream(self.tileset, host=_host(), on_bad=on_bad, **options)


def source(reading: Any, seed: int, override: bool = False) -> SplitSource:
    options: dict[str, Any] = {"batch": reading.batch, "split": reading.split, "share": reading.share}
    options |= {"balance": reading.balance or None}
    options |= {"near_um": reading.near_um or None, "far_um": reading.far_um or None}
    options |= {"partners": tuple(reading.partners), "on_bad": reading.on_bad}
    options |= {"columns": (*COLUMNS, *reading.columns), "stall_timeout": reading.stall_timeout}
    options["nice"] = NICE if jax.default_backend() == "cpu" else 0
    return SplitSource(open_set(reading.tileset), seed, override, options)


def _host() -> tuple[int, int]:
    return jax.process_index(), jax.process_count()


def batch_shapes(facts: Facts, rows: int, places: jax.sharding.Sharding | None = None) -> dict[str, Any]:
    return {
        name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=places)
        for name, (shape, dtype) in facts.shapes.items()
    }


def abstract_batch(facts: Facts, batch: int, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    return batch_shapes(facts, batch, sharding.batch_sharding(mesh))


def checked(stream: Iterator[dict[str, np.ndarray]], facts: Facts, batch: int) -> Iterator[dict[str, np.ndarray]]:
    """The entries that facts name, each of the shape that the step was compiled for; the others stay on the host."""
    rows = batch // jax.process_count()
    for given in stream:
        kept = {}
        for name, (shape, dtype) in facts.shapes.items():
            if name not in given:
                raise ValueError(f"the source gives no {name!r}, only {sorted(given)}")
            array = np.asarray(given[name])
            if array.shape != (rows, *shape) or _narrow(array.dtype) != dtype:
                raise ValueError(
                    f"{name!r} is {array.dtype}{list(array.shape)} in a batch, expected {dtype}{[rows, *shape]}"
                )
            kept[name] = array
        yield kept


def total_steps(reading: Any, batch: int, examples: int) -> int:
    """The length of a run; exactly one of steps, epochs, examples is given."""
    given = dict(reading.items())
    if len(given) != 1 or next(iter(given)) not in ("steps", "epochs", "examples"):
        raise ValueError(f"total holds exactly one of steps, epochs, examples, not {given}")
    unit, amount = next(iter(given.items()))
    if not amount > 0:
        raise ValueError(f"total.{unit} is {amount}; it must be above 0")
    per_step = {"steps": 1.0, "epochs": batch / examples, "examples": batch}[unit]
    return max(1, round(amount / per_step))
