"""A run's folder, opened to be used: the method, and the parameters that were trained. No tile set is needed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from input_pipeline.files import read_json
from mfl_jax import checkpoint, data, methods, sharding
from mfl_jax import config as configs
from mfl_jax.config import Reading
from mfl_jax.data import Facts
from mfl_jax.methods.base import Method

if TYPE_CHECKING:
    from input_pipeline.tileset import Spec


class RunError(ValueError):
    """The folder is no run, or one that cannot be used."""


@dataclass(frozen=True)
class Trained:
    """`method.embed(params, extra, batch)` gives features; params are the averaged ones where the run has such."""

    name: str
    config: ConfigDict
    facts: Facts
    method: Method
    params: Any
    extra: Any
    step: int
    path: Path
    digest: str  # SHA-256 over the digests of the checkpoint's files


def open_run(workdir: str | Path, mesh: Mesh | None = None) -> Trained:
    """The newest checkpoint that verifies, whole on every device of `mesh` (default: all devices). Nothing is written.

    RunError where the folder is no run; CheckpointError where no checkpoint is whole, or it does not fit the config.
    """
    workdir = Path(workdir)
    config, facts = read_run(workdir)
    reading = Reading(config)
    mesh = sharding.make_mesh() if mesh is None else mesh
    method = methods.make(reading, facts, mesh)
    params, extra = jax.eval_shape(method.init, jax.random.key(0), data.batch_shapes(facts, reading.data.batch))
    averaged = "average" if reading.ema else "params"
    shapes = {averaged: params, "extra": extra}
    whole = NamedSharding(mesh, PartitionSpec())
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole), shapes)
    step, tree, digest = checkpoint.read(workdir / "checkpoints", like)
    return Trained(reading.name, config, facts, method, tree[averaged], tree["extra"], step, workdir, digest)


def check_tiles(path: str | Path, facts: Facts, spec: "Spec") -> None:
    """ValueError where tiles, or regions of them, are not of the kind, size and scale that the run was trained on."""
    has, wants = data.of_spec(spec), data.of_facts(facts)
    if has != wants or not math.isclose(facts.mpp, spec.mpp, rel_tol=0.02):
        trained, given = data.in_words(*wants, facts.mpp), data.in_words(*has, spec.mpp)
        raise ValueError(f"{path} was trained on {trained}; the tile set has {given}")


def initial(run: Trained) -> tuple[Any, Any]:
    """(params, extra) that the run began with: what its encoder is without training."""
    key = jax.random.fold_in(jax.random.key(run.config.seed), 0)
    rows = data.batch_shapes(run.facts, run.config.data.batch)
    return jax.jit(lambda: run.method.init(key, rows))()


def read_run(workdir: Path) -> tuple[ConfigDict, Facts]:
    """What a run was asked for and what its tiles were, without its parameters. RunError where that is not known."""
    if not (workdir / "config.json").is_file() or not (workdir / "checkpoints").is_dir():
        what = "it has no config.json with checkpoints/ beside it" if workdir.is_dir() else "there is no such folder"
        raise RunError(f"{workdir} is no run: {what}. A run is the --workdir of mfl train")
    try:
        facts = data.facts_of(read_json(workdir / "facts.json", "what the tiles of a run were"))
        config = ConfigDict(_tuples(configs.completed(read_json(workdir / "config.json", "the config of a run"))))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{workdir} cannot be used: {error}") from error
    return config, facts


def _tuples(value: Any) -> Any:
    """JSON has lists where configs have tuples."""
    if isinstance(value, Mapping):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
