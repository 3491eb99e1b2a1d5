"""One training step of DINO against the same in plain PyTorch: on tiles, and on grids of tile features.

    python tests/benchmarks/bench_dino.py                                   # two CPU cores, small batches and heads
    python tests/benchmarks/bench_dino.py --device gpu --out dino.json      # the papers' sizes, bfloat16
    python tests/benchmarks/bench_dino.py --tiny                            # the same code on almost nothing

tiles: ViT-S/16, 2 crops of 224 and 8 of 96 px out of 256. grids: the region ViT (192 features, 6 blocks) on 2 crops of
14 x 14 and 8 of 6 x 6 tiles out of 16 x 16. Student and teacher, drop path, head 2048-2048-256, the last layer of
65,536 (--out-classes), centre, clip, AdamW, moving mean: all of `mfl_jax.step.make_step` with the method and optimiser
of configs/dino_tiles.py, and all of it again in torch (dino_torch.py), with torch.compile on a GPU (--eager: without).
Views are left out on both sides: crops are cut from the corner. `ours with views` has those of the config.

On a CPU both sides take turns in one process, and the smallest time of each counts; on a GPU each has a process of its
own. A row that takes more than --row-limit seconds is stopped and says so. img/s counts stored tiles (or regions), each
of which is seen in ten crops. Utilisation counts the products of encoders, heads and last layer alone (2 a
multiply-add, the student's three times), against --peak.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KINDS: dict[str, dict[str, Any]] = {
    "tiles": {"vit": (384, 12, 6), "patch": 16, "large": 224, "small": 96, "stored": 256},
    "grids": {"vit": (192, 6, 6), "patch": 1, "large": 14, "small": 6, "stored": 16},
}
BATCH = {"tiles": {"cpu": 4, "gpu": 64}, "grids": {"cpu": 16, "gpu": 256}}
Row = dict[str, Any]
Side = tuple[Callable[[], None], Callable[[], Any], Row]


def sizes_of(kind: str, args: argparse.Namespace) -> Row:
    sizes = KINDS[kind] | {"features": 384, "head": (2048, 256, args.out_classes)}
    if args.tiny:
        sizes |= {"vit": (24, 2, 2), "features": 8, "head": (16, 8, 32)}
        sizes |= {"large": 64, "small": 32, "stored": 96} if kind == "tiles" else {}
    return sizes


def built(who: str, kind: str, args: argparse.Namespace, batch: int) -> Side:
    if who == "torch":
        import dino_torch

        if args.device == "cpu":
            import torch

            torch.set_num_threads(len(os.sched_getaffinity(0)))
        return dino_torch.step(sizes_of(kind, args), args.device, batch, args.eager or args.device == "cpu")
    import dino_ours

    return dino_ours.step(kind, sizes_of(kind, args), args.device, batch, views="views" in who)


def work(names: list[str], kind: str, args: argparse.Namespace) -> None:
    """Both sides in turn, or one alone; a line a row."""
    from mfl_jax import process

    process.settle()  # as `mfl train` does
    batch = args.batch or (2 if args.tiny else BATCH[kind][args.device])
    sides = {}
    for who in names:
        print(f"AT building {who}", flush=True)
        sides[who] = built(who, kind, args, batch)
    for run, wait, _ in sides.values():
        run()
        wait()
    print("AT measuring", flush=True)
    kept: dict[str, list[float]] = {who: [] for who in names}
    calls = 1 if args.device == "cpu" else 10
    for _ in range(args.repeats):
        for who, (run, wait, _) in sides.items():
            start = time.perf_counter()
            for _ in range(calls):
                run()
            wait()
            kept[who].append(1e3 * (time.perf_counter() - start) / calls)
    for who, (_, _, row) in sides.items():
        after = row.pop("after")()
        print(
            "ROW " + json.dumps({"kind": kind, "who": who, "batch": batch, "ms": min(kept[who])} | row | after),
            flush=True,
        )


def child(names: list[str], kind: str, args: argparse.Namespace, given: list[str]) -> list[Row]:
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    env |= {"JAX_PLATFORMS": "cpu"} if args.device == "cpu" else {}
    command = [sys.executable, __file__, *given, "--worker", kind, *names]
    try:
        told = subprocess.run(command, env=env, capture_output=True, text=True, timeout=args.row_limit)
        lines, why = told.stdout.splitlines(), " ".join(told.stderr.split())[-300:] if told.returncode else ""
    except subprocess.TimeoutExpired as error:
        lines = (error.stdout or b"").decode().splitlines()
        doing = [line.removeprefix("AT ") for line in lines if line.startswith("AT ")]
        why = f"stopped after {args.row_limit:.0f} s, {doing[-1] if doing else 'starting'}"
    rows = [json.loads(line.removeprefix("ROW ")) for line in lines if line.startswith("ROW ")]
    return rows or [{"kind": kind, "who": who, "error": why} for who in names]


def flops(kind: str, sizes: Row, batch: int) -> float:
    """Products of a step: the student's forward and back (3), the teacher's forward (1)."""
    wide, blocks, _ = sizes["vit"]
    hidden, narrow, out = sizes["head"]
    inputs = sizes["features"] if kind == "grids" else 3 * sizes["patch"] ** 2
    head = wide * hidden + hidden * hidden + hidden * narrow + narrow * out

    def crop(side: int) -> int:
        cells = (side // sizes["patch"]) ** 2
        tokens = cells + 1
        return cells * inputs * wide + blocks * (tokens * 12 * wide**2 + 2 * tokens**2 * wide) + head

    large, small = crop(sizes["large"]), crop(sizes["small"])
    return 2.0 * batch * (3 * (2 * large + 8 * small) + 2 * large)


def table(rows: list[Row], args: argparse.Namespace) -> str:
    lines = [
        "| kind | batch | step | ms | img/s | TFLOP/s | MFU | GiB | first step s | torch/ours | loss |",
        "|---" * 11 + "|",
    ]
    peers = {row["kind"]: row["ms"] for row in rows if row["who"] == "torch" and "ms" in row}
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['kind']} | | {row['who']} | {row['error'].replace('|', '/')} |" + " |" * 7)
            continue
        row["flops"] = flops(row["kind"], sizes_of(row["kind"], args), row["batch"])
        rate = row["flops"] / row["ms"] / 1e9
        share = f"{rate / args.peak:.1%}" if args.device == "gpu" else "-"
        peer = f"{peers[row['kind']] / row['ms']:.2f}" if row["kind"] in peers and row["who"] != "torch" else "-"
        memory = f"{row['peak_gib']:.1f}" if row.get("peak_gib") else "-"
        cells = (row["kind"], row["batch"], row["who"], f"{row['ms']:.1f}", f"{1e3 * row['batch'] / row['ms']:.1f}")
        more = (f"{rate:.2f}", share, memory, f"{row['first_s']:.0f}", peer, f"{row['loss']:.3f}")
        lines.append("| " + " | ".join(map(str, (*cells, *more))) + " |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    made.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=["tiles", "grids"])
    made.add_argument("--who", nargs="+", default=["ours", "torch"], help="ours, torch, 'ours with views'")
    made.add_argument("--batch", type=int, default=0, help="stored tiles or regions a step")
    made.add_argument("--out-classes", type=int, default=0, help="of the last layer (default 65,536; 4,096 on a CPU)")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--eager", action="store_true", help="torch without its compiler")
    made.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of the card in bfloat16 (default: an H100)")
    made.add_argument("--row-limit", type=float, default=300.0, help="seconds for what one process does")
    made.add_argument("--out", type=Path, help="JSON of all rows")
    made.add_argument("--tiny", action="store_true")
    made.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    return made


def main() -> None:
    args = parser().parse_args()
    args.out_classes = args.out_classes or (65536 if args.device == "gpu" else 4096)
    if args.worker:
        work(args.worker[1:], args.worker[0], args)
        return
    rows: list[Row] = []
    for kind in args.kinds:
        together = [args.who] if args.device == "cpu" else [[who] for who in args.who]
        for names in together:
            rows += child(names, kind, args, sys.argv[1:])
            if args.out:
                args.out.write_text(json.dumps({"load": os.getloadavg()[0], "rows": rows}, indent=1) + "\n")
    classes = sizes_of("tiles", args)["head"][-1]
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, last layer of {classes:,} classes\n")
    print(table(rows, args))


if __name__ == "__main__":
    main()
