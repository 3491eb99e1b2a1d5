"""InfoNCE with many negatives, value and gradient: memory and time of the blocked form beside the plain one.

    python tests/benchmarks/bench_losses.py [--dim 128] [--block 256]

Memory is what XLA reserves for the compiled program beyond its arguments and results. The plain form is compiled at
every size and run where its logits fit. The peer is the same plain loss in torch, where that is installed.
"""

import argparse
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from mfl_jax import losses

RUN_PLAIN_TO = 8192
MIB = 2**20


def compiled(size: int, dim: int, block: int | None):
    def loss(a, b):
        return losses.info_nce(a, b, temperature=0.1, block=block)[0]

    shape = jax.ShapeDtypeStruct((size, dim), jnp.float32)
    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(shape, shape).compile()


def seconds(run, repeats: int = 2) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def torch_seconds(a: np.ndarray, b: np.ndarray) -> float | None:
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(os.cpu_count() or 1)
    x, y = (torch.tensor(v, requires_grad=True) for v in (a, b))
    right = torch.arange(len(a))

    def run():
        x.grad = y.grad = None
        f = torch.nn.functional
        logits = f.normalize(x, dim=-1) @ f.normalize(y, dim=-1).T / 0.1
        ((f.cross_entropy(logits, right) + f.cross_entropy(logits.T, right)) / 2).backward()

    return seconds(run)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--run-to", type=int, default=16384, help="larger sizes are compiled, not run")
    args = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, block {args.block}, {args.dim} features, float32")
    heads = (("pairs", 8), ("blocked MiB", 12), ("plain MiB", 10), ("blocked s", 10), ("plain s", 8), ("torch s", 8))
    print(*(head.rjust(width) for head, width in heads), " ratio")
    rng = np.random.default_rng(0)
    for size in args.sizes:
        a, b = (rng.standard_normal((size, args.dim)).astype(np.float32) for _ in range(2))
        blocked, plain = compiled(size, args.dim, args.block), compiled(size, args.dim, None)
        memory = [program.memory_analysis().temp_size_in_bytes / MIB for program in (blocked, plain)]
        shown = [f"{size:8}", f"{memory[0]:12.1f}", f"{memory[1]:10.0f}"]
        once = seconds(lambda: jax.block_until_ready(blocked(a, b))) if size <= args.run_to else None  # noqa: B023
        small = size <= min(RUN_PLAIN_TO, args.run_to)
        usual = seconds(lambda: jax.block_until_ready(plain(a, b))) if small else None  # noqa: B023
        peer = torch_seconds(a, b) if small else None
        shown += [
            "-".rjust(width) if t is None else f"{t:{width}.2f}" for t, width in ((once, 10), (usual, 8), (peer, 8))
        ]
        print(*shown, f"{peer / once:6.2f}" if peer and once else "     -", flush=True)


if __name__ == "__main__":
    main()
