"""One training step (InfoNCE of two views through one encoder, AdamW) against the same in torch, in the same run.

    python tests/benchmarks/bench_models.py [--models vit_ti8 compact resnet18] [--batch 32] [--repeats 7]

The two take turns, and the smallest time of each counts, so that a busy machine disturbs both alike; still, figures at
a load above the number of cores say little. --one-core pins the process to one core and counts CPU time in place of
wall time, which other processes disturb less; a thread that spins counts as work there. The process keeps its memory
and spreads the batch over a device a core (mfl_jax.process), as `mfl train` does; --plain leaves both out.
"""

import argparse
import os
import time

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mfl_jax import losses, process, sharding
from mfl_jax.models import make

PIXELS = 64


def our_step(spec: str, pairs: np.ndarray):
    """Of pairs [batch, 2, H, W, 3]: both views of a pair lie on one device."""
    model, tx = make(spec), optax.adamw(1e-4, weight_decay=0.05)
    mesh = sharding.mesh_for(len(pairs), {"data": -1})
    x = sharding.put({"x": pairs}, mesh)["x"]
    params, stats = model.init(jax.random.key(0), pairs[0])
    state = jax.device_put([params, stats, tx.init(params)], NamedSharding(mesh, PartitionSpec()))

    def loss(params, stats, x):
        z, stats = model.apply(params, stats, x.reshape(-1, *x.shape[2:]), train=True)
        return losses.info_nce(z[::2], z[1::2])[0], stats

    @jax.jit
    def step(params, stats, opt, x):
        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, stats, x)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), stats, opt, value

    def run():
        *state[:], value = step(*state, x)
        jax.block_until_ready((state, value))

    return run


def torch_models(torch):
    nn, f = torch.nn, torch.nn.functional

    def conv(a, b, size, stride=1):
        return nn.Conv2d(a, b, size, stride, size // 2, bias=False)

    class Residual(nn.Module):
        def __init__(self, a, b, stride):
            super().__init__()
            self.body = nn.Sequential(
                conv(a, b, 3, stride), nn.BatchNorm2d(b), nn.ReLU(True), conv(b, b, 3), nn.BatchNorm2d(b)
            )
            self.skip = nn.Identity() if a == b else nn.Sequential(conv(a, b, 1, stride), nn.BatchNorm2d(b))

        def forward(self, x):
            return f.relu(self.skip(x) + self.body(x))

    def resnet18():
        layers = [conv(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(True), nn.MaxPool2d(3, 2, 1)]
        wide = 64
        for stage in range(4):
            for i in range(2):
                layers.append(Residual(wide, 64 * 2**stage, 2 if stage and not i else 1))
                wide = 64 * 2**stage
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def compact(widths=(32, 64, 128), blocks=1, patch=4):
        layers, last = [], 3
        for stage, wide in enumerate(widths):
            size = 2 if stage else patch
            layers += [nn.Conv2d(last, wide, size, size), nn.BatchNorm2d(wide), nn.ReLU(True)]
            layers += [Residual(wide, wide, 1) for _ in range(blocks)]
            last = wide
        layers += [nn.Conv2d(last, 2 * last, 1), nn.BatchNorm2d(2 * last), nn.ReLU(True)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    class Block(nn.Module):
        def __init__(self, d, heads):
            super().__init__()
            self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(d, 1e-6), nn.LayerNorm(d, 1e-6)
            self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
            self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

        def forward(self, x):
            b, n, d = x.shape
            qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
            mixed = f.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).reshape(b, n, d)
            x = x + self.proj(mixed)
            return x + self.mlp(self.norm2(x))

    class ViT(nn.Module):
        def __init__(self, d=192, blocks=12, heads=3, patch=8):
            super().__init__()
            self.embed = nn.Conv2d(3, d, patch, patch)
            self.cls = nn.Parameter(torch.zeros(1, 1, d))
            self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (PIXELS // patch) ** 2, d))
            self.blocks = nn.Sequential(*[Block(d, heads) for _ in range(blocks)])
            self.norm = nn.LayerNorm(d, 1e-6)

        def forward(self, x):
            x = self.embed(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions
            return self.norm(self.blocks(x))[:, 0]

    return {"vit_ti8": ViT, "compact": compact, "resnet18": resnet18}


def torch_step(name: str, pairs: np.ndarray, one_core: bool):
    try:
        import torch
    except ImportError:
        return None, 0
    torch.set_num_threads(1 if one_core else os.cpu_count() or 1)
    f, model = torch.nn.functional, torch_models(torch)[name]().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.05)
    x = np.concatenate([pairs[:, 0], pairs[:, 1]]).transpose(0, 3, 1, 2)
    images = torch.tensor(x).contiguous(memory_format=torch.channels_last)
    right = torch.arange(len(pairs))

    def run():
        optimiser.zero_grad()
        a, b = f.normalize(model(images), dim=-1).chunk(2)
        logits = a @ b.T / 0.1
        ((f.cross_entropy(logits, right) + f.cross_entropy(logits.T, right)) / 2).backward()
        optimiser.step()

    return run, sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["vit_ti8", "compact", "resnet18"])
    parser.add_argument("--batch", type=int, default=32, help="pairs")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--one-core", action="store_true")
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args()
    clock = time.process_time if args.one_core else time.perf_counter
    if args.one_core:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
    if not args.plain:
        process.settle()
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {args.batch} pairs at {PIXELS} px, float32")
    print(f"{'model':>10} {'ours ms':>8} {'torch ms':>9} {'torch/ours':>10}")
    pairs = np.random.default_rng(0).standard_normal((args.batch, 2, PIXELS, PIXELS, 3)).astype(np.float32)
    for name in args.models:
        theirs, _ = torch_step(name, pairs, args.one_core)
        runs = [run for run in (our_step(name, pairs), theirs) if run]
        times: list[list[float]] = [[] for _ in runs]
        for run in runs:
            run()
        for _ in range(args.repeats):
            for run, kept in zip(runs, times, strict=True):
                start = clock()
                run()
                kept.append(1e3 * (clock() - start))
        best = [min(kept) for kept in times]
        peer = f"{best[1]:9.1f} {best[1] / best[0]:10.2f}" if theirs else f"{'-':>9} {'-':>10}"
        print(f"{name:>10} {best[0]:8.1f} {peer}", flush=True)


if __name__ == "__main__":
    main()
