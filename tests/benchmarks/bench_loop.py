"""Where the time of training goes on the demo's config: what the loop, its data and its saves add to the bare step.

    python tests/benchmarks/bench_loop.py [--steps 120] [--save-every 60] [--config configs/mfl.py:phantom]

A small tile set of the demo's shape is written, and `mfl_jax.train.train` runs on it as it is. Every --every steps the
loop is held, and the compiled step runs by itself on the batch that lies there: the two take turns, so that a busy
machine disturbs both alike. `inside the step` is the time of the bare step over that of the loop, of the wall and of
the processor (which counts what decoding takes, also where it costs no time). The other rows are shares of the loop's
wall time, of the main thread: waiting for a batch, handing over the step, waiting for its numbers, saves.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.tileset import Partner, Record, Spec, finish, write_slide
from mfl_jax import config as configs
from mfl_jax import process, sharding, train, watch
from mfl_jax.checkpoint import Checkpoints

SLIDES = 8


def make(root: Path, tiles: int, side: int) -> Path:
    """Smooth colours with a little noise, and four channels of 16 bits."""
    rng = np.random.default_rng(0)
    spec = Spec("bench", side, 0.5, partners=(Partner("if", "image", channels=4, dtype="uint16"),))
    coarse = rng.normal(size=(64, side // 8, side // 8, 3)).repeat(8, axis=1).repeat(8, axis=2)
    he = np.clip(190 + 25 * coarse + rng.normal(size=(64, side, side, 3)) * 6, 0, 255).astype(np.uint8)
    dense = (rng.gamma(2.0, 300.0, (64, side // 4, side // 4, 4)).repeat(4, axis=1).repeat(4, axis=2)).astype(np.uint16)
    dense += rng.integers(0, 64, dense.shape, np.uint16)
    for slide in range(SLIDES):
        records = (Record(he[i % 64], {"if": dense[i % 64]}, float(i), 0.0, 0.5) for i in range(tiles // SLIDES))
        write_slide(root, spec, f"s{slide}", f"c{slide}", records)
    finish(root, spec, splits={"train": [f"c{slide}" for slide in range(SLIDES)]})
    return root


class Held:
    """Stands in for the compiled step: measures its hand-over, and now and then the bare step."""

    def __init__(self, step: Callable[..., Any], spent: dict[str, float], every: int, bare: int):
        self._step, self._spent, self._every, self._count = step, spent, every, 0
        self._bare, self.bare, self.loop, self.paused = bare, [], [], np.zeros(2)
        self._since = clock()

    def __call__(self, state: Any, batch: Any) -> Any:
        if self._count % self._every == 0:
            jax.block_until_ready(state)
            if self._count:
                self.loop.append((clock() - self._since) / self._every)
            begin = clock()
            self._alone(state, batch)
            self.paused += clock() - begin
            self._since = clock()
        self._count += 1
        with counted(self._spent, "hand-over of the step"):
            return self._step(state, batch)

    def _alone(self, state: Any, batch: Any) -> None:
        with jax.transfer_guard("allow"):
            own = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        begin = clock()
        for _ in range(self._bare):
            own, values = self._step(own, batch)
        jax.block_until_ready((own, values))
        self.bare.append((clock() - begin) / self._bare)


class counted:  # noqa: N801  a context manager, used like a function
    def __init__(self, spent: dict[str, float], name: str):
        self._spent, self._name = spent, name

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._spent[self._name] += time.perf_counter() - self._begin


def clock() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def instrument(spent: dict[str, float], every: int, bare: int) -> list[Held]:
    """Puts clocks into the loop; nothing of what it does changes."""
    made: list[Held] = []
    compile_step, prefetch, report, save = train._compile, sharding.prefetch, watch.Watch._report, Checkpoints.save

    def compiled(*arguments: Any) -> Held:
        made.append(Held(compile_step(*arguments), spent, every, bare))
        return made[-1]

    def batches(*arguments: Any, **options: Any) -> Iterator[Any]:
        inner = prefetch(*arguments, **options)
        while True:
            with counted(spent, "waiting for a batch"):
                batch = next(inner, None)
            if batch is None:
                return
            yield batch

    def reported(self: Any, *arguments: Any, **options: Any) -> None:
        with counted(spent, "waiting for numbers"):
            report(self, *arguments, **options)

    def saved(self: Any, *arguments: Any, **options: Any) -> None:
        with counted(spent, "saves"):
            save(self, *arguments, **options)

    train._compile, sharding.prefetch = compiled, batches
    watch.Watch._report, Checkpoints.save = reported, saved
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/mfl.py:phantom")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--save-every", type=int, default=60)
    parser.add_argument("--every", type=int, default=15, help="steps of the loop between bare steps")
    parser.add_argument("--bare", type=int, default=8, help="bare steps at a time")
    parser.add_argument("--tiles", type=int, default=2048)
    parser.add_argument("--side", type=int, default=64)
    args = parser.parse_args()
    process.settle()  # as `mfl train` does
    with tempfile.TemporaryDirectory() as folder:
        root, spent = Path(folder), defaultdict[str, float](float)
        config = configs.load(args.config)
        with config.unlocked():
            config.data.tileset = str(make(root / "set", args.tiles, args.side))
            config.total = {"steps": args.steps}
            config.checkpoint.every = args.save_every
        made = instrument(spent, args.every, args.bare)
        train.train(config, root / "run", progress=False)
        tell(made[0], spent, args)


def tell(held: Held, spent: dict[str, float], args: argparse.Namespace) -> None:
    loop, bare = (np.array([statistics.median(x) for x in np.array(t).T]) for t in (held.loop, held.bare))
    total = sum(x[0] for x in held.loop) * args.every
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}, {args.config}")
    print(f"{'':28}{'wall ms':>10}{'CPU ms':>10}   medians of {len(held.loop)} turns")
    for name, each in (("a step of the loop", loop), ("the bare step", bare)):
        print(f"{name:28}{1e3 * each[0]:10.1f}{1e3 * each[1]:10.1f}")
    print(f"{'inside the step':28}{100 * bare[0] / loop[0]:9.1f}%{100 * bare[1] / loop[1]:9.1f}%")
    for name in ("waiting for a batch", "hand-over of the step", "waiting for numbers", "saves"):
        print(f"{name:28}{100 * spent[name] / total:9.1f}%")


if __name__ == "__main__":
    main()
