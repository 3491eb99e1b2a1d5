"""Nested folds of DeepMIL as one program, against the same fits one after another in torch, on the same cores.

    python tests/benchmarks/bench_mil.py [--bags 270] [--tiles 2000] [--dim 384] [--folds 5] [--seeds 3] [--epochs 5]

Both train the same number of steps (no early stopping), on up to --sample tiles of each of 16 bags a step, look at the
whole bags of val after each epoch, and predict those of test at the end. Torch takes padded batches and no loader, all
in memory; of its fits, which are alike, --peer-fits are timed. The time to compile is left out and printed.

On a busy machine torch's threads wait for each other, spinning: there --peer-threads 1 and CPU seconds are fair. On a
CPU both sides are bound by the same matrix products.
"""

import argparse
import os
import time

import jax
import numpy as np

from mfl_jax.bags import Table
from mfl_jax.evaluators.mil import Settings, nested
from mfl_jax.evaluators.mil.fit import fit_all, pack
from mfl_jax.evaluators.mil.run import plan, target_of

BATCH = 16


def made_up(bags: int, tiles: int, dim: int) -> tuple[np.ndarray, np.ndarray, Table]:
    """Bags of half to one and a half times `tiles`; a hundredth of the tiles of class 1 differ."""
    draw = np.random.default_rng(0)
    lengths, labels = draw.integers(tiles // 2, tiles + tiles // 2, bags), np.arange(bags) % 2
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    features = draw.standard_normal((offsets[-1], dim), np.float32)
    for start, length in zip(offsets[:-1][labels == 1], lengths[labels == 1], strict=True):
        features[start : start + max(1, length // 100), 0] += 4
    names = tuple(f"slide{i}" for i in range(bags))
    return features, offsets, Table(names, names, labels, ("a", "b"))


def torch_fit(torch, features, offsets, labels, fit, epochs: int, sample: int) -> None:
    nn, f = torch.nn, torch.nn.functional

    class DeepMIL(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.embed, self.v, self.u, self.w = (
                nn.Linear(dim, 128),
                nn.Linear(128, 128),
                nn.Linear(128, 128),
                nn.Linear(128, 1),
            )
            self.head = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1))

        def forward(self, x, mask):
            h = self.embed(x)
            a = self.w(torch.tanh(self.v(h)) * torch.sigmoid(self.u(h))).squeeze(-1)
            a = torch.softmax(a.masked_fill(~mask, -torch.inf), -1)
            return self.head((a.unsqueeze(1) @ h).squeeze(1)).squeeze(-1)

    torch.manual_seed(fit.seed)
    model = DeepMIL(features.shape[1])
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)

    def look(rows):
        with torch.inference_mode():
            for row in rows:
                bag = features[offsets[row] : offsets[row + 1]][None]
                model(bag, torch.ones(bag.shape[:2], dtype=torch.bool))

    for _ in range(epochs):
        for group in torch.from_numpy(np.random.permutation(fit.train)).split(BATCH):
            x, mask = (
                torch.zeros(len(group), sample, features.shape[1]),
                torch.zeros(len(group), sample, dtype=torch.bool),
            )
            for i, row in enumerate(group.tolist()):
                at = torch.randperm(int(offsets[row + 1] - offsets[row]))[:sample] + int(offsets[row])
                torch.index_select(features, 0, at, out=x[i, : len(at)])
                mask[i, : len(at)] = True
            optimiser.zero_grad()
            f.binary_cross_entropy_with_logits(model(x, mask), labels[group]).backward()
            optimiser.step()
        look(fit.val)
    look(fit.test)


def clock() -> np.ndarray:
    """Wall and CPU seconds: other processes disturb the second less, but threads that wait spinning count in it."""
    return np.array([time.perf_counter(), time.process_time()])


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, usual in (("bags", 270), ("tiles", 2000), ("dim", 384), ("folds", 5), ("seeds", 3), ("epochs", 5)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--sample", type=int, default=1000, help="tiles of a bag that a step sees")
    parser.add_argument("--head", default="deepmil", help="torch has deepmil alone")
    parser.add_argument("--peer-fits", type=int, default=3)
    parser.add_argument("--peer-threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--together", type=int, help="fits side by side (default: by memory)")
    args = parser.parse_args()
    features, offsets, table = made_up(args.bags, args.tiles, args.dim)
    folds = nested(table, outer=args.folds, inner=args.folds)
    fits = [fit for *_, fit in plan(folds, args.seeds, (1e-3,), (0.0,), 0)]
    settings = Settings(args.epochs, args.epochs, BATCH, args.sample)
    packed, target = pack(features, offsets), target_of(table)
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {jax.default_backend()}; {args.bags} bags of about "
          f"{args.tiles} tiles x {args.dim}; {len(fits)} fits of {args.epochs} epochs")  # fmt: skip
    took = []
    for _ in range(2):  # the first compiles
        start = clock()
        fit_all(args.head, packed, target, fits, settings, together=args.together)
        took.append(clock() - start)
    ours = took[1] / len(fits)
    print(f"{'':>8} {'s a fit':>9} {'CPU s':>9} {'s in all':>9} {'torch/ours':>11} {'by CPU s':>9}")
    print(f"{'ours':>8} {ours[0]:9.2f} {ours[1]:9.2f} {took[1][0]:9.1f}    (with compiling: {took[0][0]:.1f} s)")
    try:
        import torch
    except ImportError:
        print(f"{'torch':>8} is not installed")
        return
    torch.set_num_threads(args.peer_threads)
    tensors = torch.from_numpy(features), torch.from_numpy(table.labels).float()
    start = clock()
    for fit in fits[: args.peer_fits]:
        torch_fit(torch, tensors[0], offsets, tensors[1], fit, args.epochs, args.sample)
    theirs = (clock() - start) / min(args.peer_fits, len(fits))
    ratio = theirs / ours
    print(
        f"{'torch':>8} {theirs[0]:9.2f} {theirs[1]:9.2f} {theirs[0] * len(fits):9.1f} {ratio[0]:11.2f} {ratio[1]:9.2f}"
    )


if __name__ == "__main__":
    main()
