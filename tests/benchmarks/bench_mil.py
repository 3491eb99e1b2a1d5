"""Nested folds of DeepMIL as one program, against the same fits one after another in torch, on the same device.

    python tests/benchmarks/bench_mil.py [--bags 270] [--tiles 2000] [--dim 384] [--folds 5] [--seeds 3] [--epochs 5]

Ours and the batched peer train the same number of steps (no early stopping), on up to --sample tiles of each of 16 bags
a step, look at the whole bags of val after each epoch, and predict those of test at the end. That peer takes padded
batches and no loader, all in the memory of the device. The usual peer does as CLAM's loop does: a step for each bag,
with all its tiles, from a DataLoader over bags that lie in memory; so it takes more steps, of twice the tiles. Fits are
alike: of torch's --peer-fits are timed. The time to compile is left out and printed.

On a busy machine torch's threads wait for each other, spinning: there --peer-threads 1 and CPU seconds are fair. On a
CPU both sides are bound by the same matrix products: the last line says how many operations a second each made of
them, and what the machine reaches on one large product. On a GPU torch is bound by launching kernels, one small fit at
a time, and TF32 is allowed on both sides.
"""

import argparse
import os
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch has its part of the device too

import jax
import numpy as np

from mfl_jax import process
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


def torch_head(torch, dim: int):
    nn = torch.nn

    class DeepMIL(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.v, self.u, self.w = (
                nn.Linear(dim, 128),
                nn.Linear(128, 128),
                nn.Linear(128, 128),
                nn.Linear(128, 1),
            )
            self.head = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1))

        def forward(self, x, mask=None):
            h = self.embed(x)
            a = self.w(torch.tanh(self.v(h)) * torch.sigmoid(self.u(h))).squeeze(-1)
            a = torch.softmax(a if mask is None else a.masked_fill(~mask, -torch.inf), -1)
            return self.head((a.unsqueeze(1) @ h).squeeze(1)).squeeze(-1)

    return DeepMIL()


def torch_fit(torch, features, offsets, labels, fit, epochs: int, sample: int, usual: bool) -> None:
    f, device = torch.nn.functional, features.device
    torch.manual_seed(fit.seed)
    model = torch_head(torch, features.shape[1]).to(device)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)

    def learn(logits, wanted):
        optimiser.zero_grad()
        f.binary_cross_entropy_with_logits(logits, wanted).backward()
        optimiser.step()

    def look(rows):
        with torch.inference_mode():
            for row in rows:
                model(features[offsets[row] : offsets[row + 1]][None])

    starts, lengths = (torch.from_numpy(x).to(device) for x in (offsets[:-1], np.diff(offsets)))
    each = torch.arange(sample, device=device)

    def one_epoch():
        for group in torch.from_numpy(np.random.permutation(fit.train)).to(device).split(BATCH):
            length = lengths[group, None]
            spread = ((each + torch.rand(len(group), sample, device=device)) * length / sample).long()
            at = torch.where(length > sample, spread, each).minimum(length - 1) + starts[group, None]
            learn(model(features[at], each < length), labels[group])

    bags = [(features[offsets[row] : offsets[row + 1]].cpu(), labels[row].cpu()) for row in fit.train if usual]
    loader = torch.utils.data.DataLoader(bags, 1, shuffle=True) if usual else None
    for _ in range(epochs):
        if loader is None:
            one_epoch()
        else:
            for bag, label in loader:
                learn(model(bag.to(device)), label.to(device))
        look(fit.val)
    look(fit.test)
    if device.type == "cuda":
        torch.cuda.synchronize()


def operations(args: argparse.Namespace, fits: list, lengths: np.ndarray) -> float:
    """Of the matrix products of all fits: 2 a multiply-add, forward and back; the first layer has no gradient of x."""
    first, gate = args.dim * 128, 2 * 128 * 128
    seen = np.minimum(lengths, args.sample)
    learnt = sum(seen[fit.train].sum() for fit in fits) * (2 * first + 3 * gate)
    looked = sum(args.epochs * lengths[fit.val].sum() + lengths[fit.test].sum() for fit in fits) * (first + gate)
    return 2.0 * (args.epochs * learnt + looked)


def fastest_product(torch, device: str, size: int = 2048) -> float:
    """Operations a second of one large product in torch, the best of a few."""
    x, best = torch.randn(size, size, device=device), 0.0
    for _ in range(8):
        start = time.perf_counter()
        float((x @ x)[0, 0])
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def clock() -> np.ndarray:
    """Wall and CPU seconds: other processes disturb the second less, but threads that wait spinning count in it."""
    return np.array([time.perf_counter(), time.process_time()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in (("bags", 270), ("tiles", 2000), ("dim", 384), ("folds", 5), ("seeds", 3), ("epochs", 5)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--sample", type=int, default=1000, help="tiles of a bag that a step sees")
    parser.add_argument("--fits", type=int, help="of all, how many of ours are timed")
    parser.add_argument("--peer-fits", type=int, default=3)
    parser.add_argument("--peer-threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--together", type=int, help="fits side by side (default: by memory)")
    args = parser.parse_args()
    process.settle()  # as `mfl mil` does
    features, offsets, table = made_up(args.bags, args.tiles, args.dim)
    folds = nested(table, outer=args.folds, inner=args.folds)
    fits = [fit for *_, fit in plan(folds, args.seeds, (1e-3,), (0.0,), 0)][: args.fits]
    settings = Settings(args.epochs, args.epochs, BATCH, args.sample)
    packed, target = pack(features, offsets), target_of(table)
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}; {args.bags} bags of "
          f"about {args.tiles} tiles x {args.dim}; {len(fits)} fits of {args.epochs} epochs")  # fmt: skip
    took = []
    for _ in range(2):  # the first compiles
        start = clock()
        fit_all("deepmil", packed, target, fits, settings, together=args.together)
        took.append(clock() - start)
    work = operations(args, fits, np.diff(offsets)) / len(fits)
    ours = took[1] / len(fits)
    print(f"{'':>14} {'s a fit':>9} {'CPU s':>9} {'torch/ours':>11} {'by CPU s':>9} {'Gop/s':>9} {'by CPU s':>9}")
    print(f"{'ours':>14} {ours[0]:9.3f} {ours[1]:9.3f} {'':>21} {1e-9 * work / ours[0]:9.0f} "
          f"{1e-9 * work / ours[1]:9.0f}  with compiling {took[0][0]:.1f} s in all", flush=True)  # fmt: skip
    peers(args, fits, (features, offsets, table.labels), ours, work)


def peers(args: argparse.Namespace, fits: list, data: tuple, ours: np.ndarray, work: float) -> None:
    try:
        import torch
    except ImportError:
        print(f"{'torch':>14} is not installed")
        return
    torch.set_num_threads(args.peer_threads)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    features, labels = torch.from_numpy(data[0]).to(device), torch.from_numpy(data[2]).float().to(device)
    torch_fit(torch, features, data[1], labels, fits[0], 1, args.sample, False)  # warms up
    for name, usual in (("torch, batched", False), ("torch, usual", True)):
        start = clock()
        for fit in fits[: args.peer_fits]:
            torch_fit(torch, features, data[1], labels, fit, args.epochs, args.sample, usual)
        theirs = (clock() - start) / min(args.peer_fits, len(fits))
        ratio = theirs / ours
        speed = "" if usual else f"{1e-9 * work / theirs[0]:9.0f} {1e-9 * work / theirs[1]:9.0f}"
        print(f"{name:>14} {theirs[0]:9.3f} {theirs[1]:9.3f} {ratio[0]:11.2f} {ratio[1]:9.2f} {speed}", flush=True)
    print(f"one product of 2048 x 2048 in torch: {1e-9 * fastest_product(torch, device):.0f} Gop/s on {device}")


if __name__ == "__main__":
    main()
