"""A method that compiles in no time and has all that can go wrong: randomness, statistics, a memory of past batches."""

from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import common
from mfl_jax.methods.base import Method
from tests.mfl_jax import synthetic


def make(reading, facts, mesh) -> Method:
    options = reading.toy
    noise, collapse, _ = options.noise, options.collapse, reading.dtype

    def project(params, batch):
        x = batch["he"].astype(jnp.float32).reshape(batch["he"].shape[0], -1)[:, :12] / 255
        return x @ params["w"] + params["b"]

    def init(rng, batch):
        params = {"w": jax.random.normal(rng, (12, 8)), "b": jnp.zeros(8)}
        return params, {"mean": jnp.zeros(8), "queue": jnp.zeros((16, 8)), "seen": jnp.zeros((), jnp.int32)}

    def loss(params, extra, batch, rng, step):
        z = project(params, batch)
        z = z + noise * jax.random.normal(rng, z.shape)
        value = jnp.mean(jnp.square(z - 0.1 * extra["queue"].mean(0) - batch["label"][:, None]))
        out = {"mean": 0.9 * extra["mean"] + 0.1 * z.mean(0), "keys": z}
        return value, (out, {"collapsed": jnp.float32(collapse), "feature_std": z.std()})

    def update(params, extra, out, step):
        queue = jnp.concatenate([out["keys"], extra["queue"]])[: len(extra["queue"])]
        return {"mean": out["mean"], "queue": queue, "seen": extra["seen"] + len(out["keys"])}

    def merge(outs):
        return {"mean": outs["mean"].mean(0), "keys": outs["keys"].reshape(-1, 8)}

    return Method(init, loss, update, lambda params, extra, batch: {"he": project(params, batch)}, merge=merge)


def config(steps: int = 6, *, every: int = 2, **more) -> ConfigDict:
    made = ConfigDict(common.loop(every=every, log_every=1))
    made.name = made.method = "toy"
    made.data = common.data("nowhere", batch=synthetic.BATCH)
    made.total = ConfigDict({"steps": steps})
    made.toy = ConfigDict({"noise": 0.1, "collapse": False})
    made.optim = ConfigDict({"name": "adam", "lr": 1e-2, "schedule": "constant"})
    for name, value in more.items():
        *parents, last = name.split("__")
        node = made
        for parent in parents:
            node = node[parent]
        node[last] = value
    return made


def run(made: ConfigDict, workdir: Path, *, change=None, **options):
    """Train the toy on synthetic batches; METHODS must know it (fixture `toy_method`)."""
    from mfl_jax.train import train

    facts = synthetic.facts(made.data)
    source = synthetic.Source(facts, seed=made.seed, change=change)
    return train(made, workdir, source=source, facts=facts, **{"progress": False, **options})
