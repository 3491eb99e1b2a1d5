"""InfoNCE up to 65,536 negatives: does memory grow with the batch, or with its square? Compiled only, nothing is run.

    python tests/benchmarks/bench_infonce.py [--dim 128] [--block 256]

Memory is what XLA reserves for value and gradient beyond arguments and results; the peer is the plain form, whose
logits are a matrix. `power` is the p of memory ~ batch ** p from the row above. Time: bench_losses.py.
"""

import argparse
import math

import jax
from bench_losses import MIB, compiled


def reserved(size: int, dim: int, block: int | None) -> float:
    return compiled(size, dim, block).memory_analysis().temp_size_in_bytes / MIB


def power(sizes: tuple[int, int], memory: tuple[float, float]) -> float:
    return math.log(memory[1] / memory[0]) / math.log(sizes[1] / sizes[0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.dim} features, block {args.block}, float32")
    print(f"{'pairs':>6} {'blocked MiB':>11} {'power':>6} {'plain MiB':>10} {'power':>6} {'plain/blocked':>13}")
    before: tuple[int, float, float] | None = None
    for size in args.sizes:
        blocked, plain = (reserved(size, args.dim, block) for block in (args.block, None))
        powers = ["", ""]
        if before is not None:
            powers = [
                f"{power((before[0], size), (old, new)):.2f}"
                for old, new in zip(before[1:], (blocked, plain), strict=True)
            ]
        print(
            f"{size:6} {blocked:11.1f} {powers[0]:>6} {plain:10.0f} {powers[1]:>6} {plain / blocked:13.0f}", flush=True
        )
        before = size, blocked, plain


if __name__ == "__main__":
    main()
