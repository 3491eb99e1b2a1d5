"""Our side of bench_dino.py: the step of configs/dino_tiles.py or dino_regions.py on rows that lie on the device."""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mfl_jax import config as configs
from mfl_jax import data, methods, optim, sharding, trees
from mfl_jax.data import Facts, abstract_batch
from mfl_jax.methods import towers
from mfl_jax.step import init_state, make_step
from mfl_jax.views import Modality

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SETS = {"tiles": ("dino_tiles.py", "vit_s16"), "grids": ("dino_regions.py", "grid_vit")}


def config_of(kind: str, sizes: dict[str, Any], device: str, batch: int) -> Any:
    file, encoder = SETS[kind]
    config = configs.load(str(CONFIGS / file))
    wide, count, heads = sizes["vit"]
    hidden, narrow, out = sizes["head"]
    with config.unlocked():
        config.encoder = f"{encoder},features={wide},blocks={count},heads={heads},drop_path=0.1"
        config.dtype = "bfloat16" if device == "gpu" else "float32"
        config.data.batch, config.views.size, config.views.local_size = batch, sizes["large"], sizes["small"]
        config.dino.head, config.dino.out = f"dino,hidden={hidden},bottleneck={narrow}", out
    return config


def facts_of(kind: str, sizes: dict[str, Any]) -> Facts:
    grids, side = kind == "grids", sizes["stored"]
    channels = sizes["features"] + 1 if grids else 3
    shapes: dict[str, Any] = {"he": ((side, side, channels), "float32" if grids else "uint8"), "mask": ((), "bool")}
    shapes |= dict.fromkeys(("id", "label", "slide", "case"), ((), "int32"))
    return Facts(side, 0.5, {"he": Modality("grid" if grids else "image", channels)}, shapes, ("a", "b"), 100_000)


def rows_of(facts: Facts, batch: int) -> dict[str, np.ndarray]:
    draw, rows = np.random.default_rng(0), {}
    for name, (shape, dtype) in facts.shapes.items():
        if dtype == "float32":
            rows[name] = draw.normal(size=(batch, *shape)).astype(np.float32)
            rows[name][..., -1] = 1  # every tile is there
        elif name == "he":
            rows[name] = draw.integers(0, 256, (batch, *shape), np.uint8)
        else:
            rows[name] = np.ones(batch, bool) if dtype == "bool" else np.arange(batch, dtype=np.int32)
    return rows


def corners(sizes: dict[str, Any]) -> Any:
    """In place of `towers.crops`: crops of the corner, each moved by as many cells as its number."""

    def crops(plan: Any, rng: jax.Array, batch: Any) -> list[jax.Array]:
        he = batch["he"]
        x = (he.astype(jnp.float32) / 255 - 0.5) / 0.25 if he.dtype == jnp.uint8 else he
        made = []
        for side, count in ((sizes["large"], 2), (sizes["small"], 8)):
            room = x.shape[1] - side + 1
            made += [x[:, i % room : i % room + side, :side] for i in range(count)]
        return made

    return crops


def step(kind: str, sizes: dict[str, Any], device: str, batch: int, views: bool) -> tuple[Any, Any, dict[str, Any]]:
    """(one step, what waits for it, facts)"""
    config, facts, mesh = config_of(kind, sizes, device, batch), facts_of(kind, sizes), sharding.make_mesh()
    if not views:
        towers.crops = corners(sizes)
    method = methods.make(configs.Reading(config), facts, mesh)
    total = data.total_steps(config.total, batch, facts.examples)
    tx = optim.make(config.optim, total_steps=total, batch=batch, examples=facts.examples)
    like, rows = abstract_batch(facts, batch, mesh), sharding.put(rows_of(facts, batch), mesh)
    start = time.perf_counter()
    state = jax.jit(functools.partial(init_state, method, tx, 0))(rows)
    shapes = jax.eval_shape(lambda: state)
    compiled = jax.jit(make_step(method, tx), donate_argnums=0).lower(shapes, like).compile()
    held: dict[str, Any] = {"state": state}

    def run() -> None:
        held["state"], held["metrics"] = compiled(held["state"], rows)

    def wait() -> None:
        jax.block_until_ready(held)

    run()
    wait()
    row: dict[str, Any] = {"first_s": time.perf_counter() - start, "params": trees.count(shapes.params)}
    row |= {"version": f"jax {jax.__version__}", "loss": float(held["metrics"]["loss"])}

    def after() -> dict[str, Any]:
        about = jax.local_devices()[0].memory_stats() or {}
        return {"peak_gib": about["peak_bytes_in_use"] / 2**30} if about else {}

    return run, wait, row | {"after": after}
