"""The MFL train step at 224 px in bfloat16 on one GPU, beside the same step in torch.compile on the same card.

    python tests/benchmarks/bench_gpu.py [--out gpu.json] [--limit 1500] [--cache folder]
    python tests/benchmarks/bench_gpu.py --tiny            # the same code on a CPU, to see that it works

Ours is `mfl_jax.step.make_step` with the method and optimiser of configs/mfl.py: uint8 batches that lie on the device,
two encoders, two projectors of 8192-8192-8192, InfoNCE, Adam with a clip for each variable. The peer is that in torch:
channels_last, autocast to bfloat16, fused Adam, TF32 in the loss, cudnn.benchmark. Both have the same number of
parameters, or the row says so. Views are left out on both sides (uint8 is scaled and shifted, no more); a second row
of ours has the views of the config, from tiles of 256 px.

Each row has a process of its own, so that no memory is held by another; what fails is named in its row, and the rest
goes on. Where a step does not fit, it is tried again with recomputation within blocks, and says so. Utilisation is
that of the encoders and projectors, counted layer by layer (2 a multiply-add, forward and backward), without
recomputation; the second figure is XLA's own count of our whole step, where the backend gives one.

A program of this size takes about a minute to compile, and the whole table some quarter of an hour; --models, --batches
and --who make it smaller, and with --cache a second run compiles less.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu_common import CHANNELS, FULL, TINY, Row, flops

ROOT = Path(__file__).resolve().parents[2]
FIT = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "does not fit")


def card(who: str) -> dict[str, Any]:
    """{} where there is no GPU."""
    if who == "torch":
        import torch

        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        return {"card": name, "version": f"torch {torch.__version__}"}
    import jax

    found = jax.default_backend() == "gpu"
    return {"card": jax.devices()[0].device_kind if found else "", "version": f"jax {jax.__version__}"}


def work(who: str, model: str, batch: int, tiny: bool) -> Iterator[Row]:
    """The rows of one process."""
    sizes, about = TINY if tiny else FULL, {"model": model, "batch": batch, "who": who} | card(who)
    if not about["card"] and not tiny:
        yield about | {"absent": True}
        return
    if who == "torch":
        import gpu_torch

        for eager in (True, False):  # the first takes seconds, and is there if the compilation takes too long
            row = about | {"who": "torch eager" if eager else "torch", "views": False}
            yield from attempts(row, lambda remat: gpu_torch.step(model, batch, sizes, remat, eager))  # noqa: B023
        return
    import gpu_ours

    for views in (False, True):
        yield from attempts(about | {"views": views}, lambda remat: gpu_ours.step(model, batch, sizes, views, remat))  # noqa: B023
    if model == sizes["models"][0] and batch <= 256:
        for name, channels in (("if", 4), ("ihc", 3)):
            row = about | {"model": f"views of he and {name} alone", "views": True}
            yield from attempts(row, lambda _: gpu_ours.views_alone(name, channels, batch, sizes))  # noqa: B023


def attempts(row: Row, measure: Callable[[bool], Row]) -> Iterator[Row]:
    """A row, or its error; what does not fit is tried again with recomputation."""
    for remat in (False, True):
        try:
            yield row | {"remat": remat} | measure(remat)
            return
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            yield row | {"remat": remat, "error": " ".join(text.split())[:300]}
            if not any(word in text for word in FIT):
                return


def children(args: argparse.Namespace) -> Iterator[Row]:
    """The rows of all processes, one process after another, until the time is over."""
    sizes, end = TINY if args.tiny else FULL, time.monotonic() + args.limit
    batches = (4,) if args.tiny else args.batches
    for batch in batches:
        for model in args.models or sizes["models"]:
            for who in args.who:
                left = min(args.row_limit, end - time.monotonic())
                about = {"model": model, "batch": batch, "who": who, "views": False}
                if left < 10:
                    yield about | {"error": "not reached: --limit was over"}
                    continue
                yield from child(about, left, args)


def child(about: Row, seconds: float, args: argparse.Namespace) -> Iterator[Row]:
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    env |= {"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONUNBUFFERED": "1"}
    if args.cache:
        env |= {"JAX_COMPILATION_CACHE_DIR": f"{args.cache}/jax", "TORCHINDUCTOR_CACHE_DIR": f"{args.cache}/torch"}
    command = [sys.executable, __file__, "--worker", about["who"], about["model"], str(about["batch"])]
    command += ["--tiny"] if args.tiny else []
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, env=env, start_new_session=True
        )
        over = threading.Event()

        def stop() -> None:
            over.set()
            os.killpg(process.pid, signal.SIGKILL)

        alarm = threading.Timer(seconds, stop)
        alarm.start()
        assert process.stdout is not None
        doing = "starting"
        for line in process.stdout:
            if line.startswith("ROW "):
                yield json.loads(line.removeprefix("ROW "))
            elif line.startswith("AT "):
                doing = line.removeprefix("AT ").strip()
        code = process.wait()
        alarm.cancel()
        if code:
            said.seek(0)
            why = f"stopped after {seconds:.0f} s, {doing}" if over.is_set() else " ".join(said.read().split())[-300:]
            yield about | {"error": why if over.is_set() else f"ended with {code}: {why}"}


HEAD = (
    "model",
    "pairs",
    "step",
    "ms",
    "pairs/s",
    "img/s",
    "TFLOP/s",
    "MFU",
    "MFU by XLA",
    "GiB",
    "compile s",
    "remark",
)


def shown(row: Row, sizes: dict[str, Any], peak: float) -> list[str]:
    who = row["who"] + (" with views" if row.get("views") and row["model"] in sizes["models"] else "")
    cells = [row["model"], str(row["batch"]), who]
    if "error" in row:
        return cells + ["-"] * 8 + [row["error"].replace("|", "/")]
    rate = 1e3 * row["batch"] / row["ms"]
    cells += [f"{row['ms']:.1f}", f"{rate:.0f}", f"{2 * rate:.0f}"]
    if row["model"] in sizes["models"]:
        row["flops"] = row["batch"] * sum(
            flops(row["model"], sizes["px"], sizes["widths"], channels) for channels in CHANNELS.values()
        )
        counts = [1e3 * n / row["ms"] / 1e12 if n else None for n in (row["flops"], row.get("xla_flops"))]
        cells += [f"{counts[0]:.1f}"] + [f"{100 * n / peak:.1f} %" if n else "-" for n in counts]
    else:
        cells += ["-"] * 3
    cells += [f"{row['peak_gib']:.1f}" if row.get("peak_gib") else "-", f"{row['compile_s']:.0f}"]
    remarks = ["recomputes blocks"] * bool(row.get("remat")) + [f"{row.get('skipped')} skipped"] * bool(
        row.get("skipped")
    )
    remarks += [f"loss {row['loss']:.3f}"] if "loss" in row else []
    return [*cells, ", ".join(remarks)]


def compared(rows: list[Row], sizes: dict[str, Any]) -> Iterator[list[str]]:
    """model, pairs, ours against the peer without views, with views, and the share of the views in our step."""
    done = {(r["model"], r["batch"], r["who"], bool(r.get("views"))): r for r in rows if "ms" in r}
    for model, batch in dict.fromkeys((m, b) for m, b, _, _ in done if m in sizes["models"]):
        bare, full, peer = (
            done.get((model, batch, *which)) for which in (("ours", False), ("ours", True), ("torch", False))
        )
        ratios = [f"{peer['ms'] / ours['ms']:.2f}" if ours and peer else "-" for ours in (bare, full)]
        share = f"{100 * (1 - bare['ms'] / full['ms']):.1f} %" if bare and full else "-"
        same = f"{bare['params'] == peer['params']}" if bare and peer else "-"
        yield [model, str(batch), *ratios, share, same]


def line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the rows as JSON, written anew after each")
    parser.add_argument("--limit", type=float, default=1500.0, help="seconds for everything")
    parser.add_argument("--row-limit", type=float, default=300.0, help="seconds for one process")
    parser.add_argument("--cache", help="folder of compiled programs, for a second run")
    parser.add_argument("--models", nargs="+", choices=FULL["models"])
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 1024], help="pairs")
    parser.add_argument("--who", nargs="+", default=["ours", "torch"], choices=["ours", "torch"])
    parser.add_argument("--peak", type=float, default=989.0, help="dense bfloat16 TFLOP/s of the card (H100, H200)")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        who, model, batch = args.worker
        for row in work(who, model, int(batch), args.tiny):
            print("ROW " + json.dumps(row), flush=True)
        return
    sizes, rows = TINY if args.tiny else FULL, []
    day = datetime.datetime.now().astimezone().date().isoformat()
    for row in children(args):
        if row.get("absent"):
            print(f"no GPU for {row['version']}: nothing is measured (--tiny runs the code on a CPU)")
            return
        if not rows:
            print(f"{day}, {row.get('card') or 'no GPU'}, {sizes['px']} px, bfloat16, peak {args.peak:.0f} TFLOP/s\n")
            print(f"{line(HEAD)}\n{line(['---'] * len(HEAD))}")
        rows.append(row)
        print(line(shown(row, sizes, args.peak)), flush=True)
        if args.out:
            args.out.write_text(json.dumps({"date": day, "peak_tflops": args.peak, "rows": rows}, indent=1) + "\n")
    heads = ("model", "pairs", "peer ms / ours", "the same with views", "share of views", "same parameters")
    print(f"\n{line(heads)}\n{line(['---'] * len(heads))}")
    print("\n".join(line(cells) for cells in compared(rows, sizes)))
    print("\n" + ", ".join(sorted({row["version"] for row in rows if "version" in row})))


if __name__ == "__main__":
    main()
