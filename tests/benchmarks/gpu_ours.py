"""Our side of bench_gpu.py: the train step of configs/mfl.py on batches that lie on the device, its views alone, and
InfoNCE with many negatives."""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_common import CHANNELS, ENCODERS, GIB, Job, Phases, Row, at, timed

from mfl_jax import config as configs
from mfl_jax import losses, methods, optim, sharding
from mfl_jax.data import Facts, abstract_batch
from mfl_jax.methods import towers
from mfl_jax.models import layers
from mfl_jax.step import init_state, make_step
from mfl_jax.views import Modality

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "mfl.py"


def phases(job: Job, sizes: Row) -> Phases:
    if job.what in ENCODERS:
        return step(job, sizes)
    return {"views": views_alone, "info_nce": info_nce, "attention": attention}[job.what](job, sizes)


def config_of(model: str, batch: int, sizes: Row, words: str = "", remat: bool = False) -> Any:
    config = configs.load(f"{CONFIG}:{words}")
    with config.unlocked():
        config.dtype, config.data.batch, config.views.size = "bfloat16", batch, sizes["px"]
        config.encoder = model + (",remat" if remat else "")
        for partner in config.mfl.partners:
            config.mfl.encoders[partner] = config.encoder
        config.mfl.projector = f"projector,widths={'-'.join(map(str, sizes['widths']))},bn"
    return config


def facts_of(partner: str, channels: int, side: int) -> Facts:
    shapes: dict[str, Any] = {"he": ((side, side, 3), "uint8"), partner: ((side, side, channels), "uint8")}
    shapes |= {f"{partner}_mask": ((), "bool"), "mask": ((), "bool")}
    shapes |= dict.fromkeys(("id", "label", "slide", "case"), ((), "int32"))
    modalities = {"he": Modality(), partner: Modality("image", channels)}
    return Facts(side, 0.5, modalities, shapes, ("a", "b"), 100_000)


def batch_of(facts: Facts, rows: int, mesh: Any) -> dict[str, Any]:
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


def all_convolutions(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """In place of `layers.convolve`, which has 1x1 as a matrix product: the word 'convs'."""
    pad = [(kernel.shape[0] // 2,) * 2] * 2
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pad, dimension_numbers=dims)


def step(job: Job, sizes: Row) -> Phases:
    views = "views" in job.words
    config = config_of(job.what, job.size, sizes, remat="remat" in job.words)
    facts = facts_of("if", CHANNELS["if"], sizes["stored"] if views else sizes["px"])
    reading = configs.Reading(config)
    if not views:
        towers.view_plan = no_views
    if "convs" in job.words:
        layers.convolve = all_convolutions
    layers.FLASH = "noflash" not in job.words
    mesh = sharding.make_mesh()
    method = methods.make(reading, facts, mesh)
    tx = optim.make(reading.optim, total_steps=10_000, batch=job.size, examples=facts.examples)
    like = abstract_batch(facts, job.size, mesh)
    shapes = jax.eval_shape(functools.partial(init_state, method, tx, 0), like)
    lowered = jax.jit(make_step(method, tx), donate_argnums=0).lower(shapes, like)
    yield None
    start = time.perf_counter()
    at("compiling")
    compiled = lowered.compile()
    row: Row = {"compile_s": time.perf_counter() - start, "params": size_of(shapes.params)}
    row |= counts_of(compiled) | {"program_gib": program_bytes(compiled) / GIB}
    about = jax.local_devices()[0].memory_stats() or {}
    if program_bytes(compiled) > about.get("bytes_limit", math.inf):
        raise MemoryError(f"does not fit: {program_bytes(compiled) / GIB:.1f} of {about['bytes_limit'] / GIB:.1f} GiB")
    rows, held = batch_of(facts, job.size, mesh), {"state": state_of(shapes)}
    yield None
    at("measuring")

    def run() -> None:
        held["state"], held["metrics"] = compiled(held["state"], rows)

    row |= timed(run, lambda: jax.block_until_ready(held), sizes["calls"]) | memory_of(compiled)
    row["loss"], row["skipped"] = (float(held["metrics"][name]) for name in ("loss", "skipped_total"))
    yield row


def counts_of(program: Any) -> Row:
    """XLA's own counts, where the backend has them; of bytes as they would be if nothing stayed in a cache."""
    found = program.cost_analysis()
    found = found[0] if isinstance(found, list) and found else found or {}
    return {"xla_flops": found.get("flops"), "xla_bytes": found.get("bytes accessed")}


def memory_of(compiled: Any) -> Row:
    about = jax.local_devices()[0].memory_stats() or {}
    return {"peak_gib": about.get("peak_bytes_in_use", program_bytes(compiled)) / GIB}


def size_of(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def program_bytes(compiled: Any) -> int:
    about = compiled.memory_analysis()
    results = about.output_size_in_bytes - about.alias_size_in_bytes
    return about.argument_size_in_bytes + results + about.temp_size_in_bytes


def views_alone(job: Job, sizes: Row) -> Phases:
    """The views of a batch as a program of their own, whose results are written to memory; within a step less is."""
    partner = next(iter(job.words & {"ihc"}), "if")
    facts, mesh = facts_of(partner, {"if": 4, "ihc": 3}[partner], sizes["stored"]), sharding.make_mesh()
    views = towers.view_plan(configs.Reading(config_of("compact", job.size, sizes, partner)), facts, "he", partner)
    lowered = jax.jit(views).lower(jax.eval_shape(lambda: jax.random.key(0)), abstract_batch(facts, job.size, mesh))
    yield None
    start = time.perf_counter()
    at("compiling")
    compiled = lowered.compile()
    row: Row = {"compile_s": time.perf_counter() - start} | counts_of(compiled)
    yield None
    at("measuring")
    rows, key, held = batch_of(facts, job.size, mesh), jax.random.key(0), {}

    def run() -> None:
        held["seen"] = compiled(key, rows)

    yield row | timed(run, lambda: jax.block_until_ready(held), sizes["calls"]) | memory_of(compiled)


def info_nce(job: Job, sizes: Row, dim: int = 128) -> Phases:
    """Value and gradient with the logits of `block` columns at a time; beside it what the plain form would reserve."""
    side = min(2048, job.size // 4)
    shape = jax.ShapeDtypeStruct((job.size, dim), jnp.float32)

    def lowered(block: int | None) -> Any:
        value = jax.value_and_grad(lambda a, b: losses.info_nce(a, b, temperature=0.1, block=block)[0], (0, 1))
        return jax.jit(value).lower(shape, shape)

    both = [lowered(block) for block in (side, None)]
    yield None
    start = time.perf_counter()
    at("compiling")
    blocked, plain = (program.compile() for program in both)
    row: Row = {"compile_s": time.perf_counter() - start, "block": side}
    names = (("temp_gib", blocked), ("plain_temp_gib", plain))
    row |= {name: program.memory_analysis().temp_size_in_bytes / GIB for name, program in names}
    yield None
    at("measuring")
    draw, held = np.random.default_rng(0), {}
    a, b = (jax.device_put(draw.standard_normal((job.size, dim)).astype(np.float32)) for _ in range(2))

    def run() -> None:
        held["found"] = blocked(a, b)

    yield row | timed(run, lambda: jax.block_until_ready(held), sizes["calls"]) | memory_of(blocked)


def attention(job: Job, sizes: Row) -> Phases:
    """Value and gradient of one attention of ViT-S/16, by cuDNN where it has it; how far both ways are from float32."""
    heads, wide = (6, 64) if sizes["px"] == 224 else (2, 16)
    shape = (job.size, 1 + (sizes["px"] // 16) ** 2, 3, heads, wide)
    given = (*shape[:2], heads, wide)

    def both(qkv: jax.Array, slope: jax.Array) -> Any:
        value, back = jax.vjp(layers.attend, qkv)
        return value, back(slope)[0]

    def lowered(flash: bool, dtype: Any) -> Any:
        layers.FLASH = flash
        like = (jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(given, dtype))
        return jax.jit(lambda *x: both(*x)).lower(*like)

    programs = {"flash": (True, jnp.bfloat16), "plain": (False, jnp.bfloat16), "exact": (False, jnp.float32)}
    with jax.default_matmul_precision("highest"):
        made = {name: lowered(*options) for name, options in programs.items()}
    yield None
    start = time.perf_counter()
    at("compiling")
    run = {name: program.compile() for name, program in made.items()}
    row: Row = {"compile_s": time.perf_counter() - start}
    yield None
    at("measuring")
    draw = np.random.default_rng(0)
    data = [jnp.asarray(draw.standard_normal(size), jnp.bfloat16) for size in (shape, given)]
    right = run["exact"](*(x.astype(jnp.float32) for x in data))
    for name in ("plain", "flash"):
        held: dict[str, Any] = {}

        def once(name: str = name, held: dict[str, Any] = held) -> None:
            held["found"] = run[name](*data)

        row |= {f"{name}_{key}": x for key, x in timed(once, lambda h=held: jax.block_until_ready(h), 20).items()}
        pairs = zip(("value", "gradient"), held["found"], right, strict=True)
        row |= {f"{name}_{what}_error": distance(found, exact) for what, found, exact in pairs}
    yield row | {"ms": row["flash_ms"], "flash": layers._has_flash()}


def distance(found: jax.Array, right: jax.Array) -> float:
    return float(jnp.linalg.norm(found.astype(jnp.float32) - right) / jnp.linalg.norm(right))
