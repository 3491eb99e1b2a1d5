"""Our side of bench_gpu.py: the train step of configs/mfl.py on batches that lie on the device."""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_common import CHANNELS, GIB, Row, at, timed

from mfl_jax import config as configs
from mfl_jax import methods, optim, sharding
from mfl_jax.data import Facts
from mfl_jax.methods import towers
from mfl_jax.step import init_state, make_step
from mfl_jax.views import Modality

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "mfl.py"


def config_of(model: str, batch: int, sizes: dict[str, Any], words: str = "", remat: bool = False) -> Any:
    config = configs.load(f"{CONFIG}:{words}")
    with config.unlocked():
        config.dtype, config.data.batch, config.views.size = "bfloat16", batch, sizes["px"]
        config.encoder = model + (",remat" if remat else "")
        for partner in config.mfl.partners:
            config.mfl.encoders[partner] = config.encoder
        config.mfl.projector = f"projector,widths={'-'.join(map(str, sizes['widths']))},bn"
    return config


def facts_of(partner: str, channels: int, side: int) -> Any:
    shapes: dict[str, Any] = {"he": ((side, side, 3), "uint8"), partner: ((side, side, channels), "uint8")}
    shapes |= {f"{partner}_mask": ((), "bool"), "mask": ((), "bool")}
    shapes |= dict.fromkeys(("id", "label", "slide", "case"), ((), "int32"))
    modalities = {"he": Modality(), partner: Modality("image", channels)}
    return Facts(side, 0.5, modalities, shapes, ("a", "b"), 100_000)


def batch_of(facts: Any, rows: int, mesh: Any) -> dict[str, Any]:
    draw, made = np.random.default_rng(0), {}
    for name, (shape, dtype) in facts.shapes.items():
        if dtype == "uint8":
            made[name] = draw.integers(0, 256, (rows, *shape), np.uint8)
        else:
            made[name] = np.ones(rows, bool) if dtype == "bool" else np.arange(rows, dtype=np.int32)
    return sharding.put(made, mesh)


def state_of(shapes: Any) -> Any:
    """The state of `init_state`, filled on the host: to compile the initialisation takes longer than to measure."""
    drawn = 0.02 * np.random.default_rng(0).standard_normal(1_000_003).astype(np.float32)

    def fill(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        weight = any(word in name for word in ("kernel", "token", "pos_embed")) and ".opt" not in name
        one = any(word in name for word in ("scale", "var")) and ".opt" not in name
        value = np.resize(drawn, leaf.shape) if weight else np.full(leaf.shape, int(one))
        return jax.device_put(value.astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(fill, shapes)


def no_views(reading: Any, facts: Any, *names: str) -> Callable[..., Any]:
    """In place of `towers.view_plan`: bytes to numbers about 0, as the peer has it."""
    return lambda key, batch: {name: ((batch[name].astype(jnp.float32) / 255 - 0.5) / 0.25,) for name in names}


def step(model: str, batch: int, sizes: dict[str, Any], views: bool, remat: bool) -> Row:
    config, mesh = config_of(model, batch, sizes, remat=remat), sharding.make_mesh()
    facts = facts_of("if", CHANNELS["if"], sizes["stored"] if views else sizes["px"])
    kept, reading = towers.view_plan, configs.Reading(config)
    towers.view_plan = kept if views else no_views
    try:
        method = methods.make(reading, facts, mesh)
    finally:
        towers.view_plan = kept
    tx = optim.make(reading.optim, total_steps=10_000, batch=batch, examples=facts.examples)
    rows = batch_of(facts, batch, mesh)
    shapes = jax.eval_shape(functools.partial(init_state, method, tx, 0), rows)
    start = time.perf_counter()
    at(f"compiling the step {'with' if views else 'without'} views")
    lowered = jax.jit(make_step(method, tx), donate_argnums=0).lower(shapes, rows)
    compiled = lowered.compile()
    row: Row = {"compile_s": time.perf_counter() - start, "params": size_of(shapes.params)}
    row |= {"xla_flops": counted(lowered) or counted(compiled), "program_gib": program_bytes(compiled) / GIB}
    about = jax.local_devices()[0].memory_stats() or {}
    if program_bytes(compiled) > about.get("bytes_limit", math.inf):
        raise MemoryError(f"does not fit: {program_bytes(compiled) / GIB:.1f} of {about['bytes_limit'] / GIB:.1f} GiB")
    at("measuring")
    held = {"state": state_of(shapes)}

    def run() -> None:
        held["state"], held["metrics"] = compiled(held["state"], rows)

    row |= timed(run, lambda: jax.block_until_ready(held), sizes["seconds"])
    about = jax.local_devices()[0].memory_stats() or {}
    row["peak_gib"] = about.get("peak_bytes_in_use", program_bytes(compiled)) / GIB
    row["loss"], row["skipped"] = (float(held["metrics"][name]) for name in ("loss", "skipped_total"))
    return row


def counted(program: Any) -> float | None:
    """XLA's count; not every backend has one, of a program before or after it is optimised."""
    found = program.cost_analysis()
    found = found[0] if isinstance(found, list) and found else found
    return found.get("flops") if found else None


def size_of(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def program_bytes(compiled: Any) -> int:
    about = compiled.memory_analysis()
    results = about.output_size_in_bytes - about.alias_size_in_bytes
    return about.argument_size_in_bytes + results + about.temp_size_in_bytes


def views_alone(partner: str, channels: int, batch: int, sizes: dict[str, Any]) -> Row:
    """The views of a batch as a program of their own, whose results are written to memory; within a step less is."""
    mesh, facts = sharding.make_mesh(), facts_of(partner, channels, sizes["stored"])
    views = towers.view_plan(configs.Reading(config_of("compact", batch, sizes, partner)), facts, "he", partner)
    rows, key, held = batch_of(facts, batch, mesh), jax.random.key(0), {}
    start = time.perf_counter()
    compiled = jax.jit(views).lower(key, rows).compile()
    seconds = time.perf_counter() - start

    def run() -> None:
        held["seen"] = compiled(key, rows)

    return {"compile_s": seconds} | timed(run, lambda: jax.block_until_ready(held), sizes["seconds"] / 3)
