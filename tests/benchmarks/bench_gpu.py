"""The MFL train step at 224 px in bfloat16 on one GPU, beside the same step in torch.compile on the same card; and what
the views, many negatives and extraction cost there.

    python tests/benchmarks/bench_gpu.py [--out gpu.json] [--limit 1500] [--cache folder]
    python tests/benchmarks/bench_gpu.py --out gpu.json --limit 230 --rows ours:resnet50:256 torch:resnet50:256
    python tests/benchmarks/bench_gpu.py --tiny            # the same code on a CPU, to see that it works

A row is who:what:size and words. `ours` is `mfl_jax.step.make_step` with the method and optimiser of configs/mfl.py:
uint8 batches that lie on the device, two encoders, two projectors of 8192-8192-8192, InfoNCE, Adam with a clip for each
variable. `torch` is that in torch: channels_last, autocast to bfloat16, fused Adam, TF32 in the loss, cudnn.benchmark.
Both have the same number of parameters, or the table says so. Views are left out on both sides (uint8 is scaled and
shifted, no more) but for the word `views`: those of the config, from tiles of 256 px. `remat` recomputes within blocks,
and is tried by itself where a step does not fit; `eager` is torch without its compiler; `convs` has 1x1 convolutions
as convolutions, `noflash` has attention without cuDNN, and the words of FLAGS set flags of XLA. `ours:views`,
`ours:info_nce`, `ours:attention` and `extract` are described where they stand.

Each row has a process of its own. Those of a wave compile side by side, then measure one after another, while nothing
else uses the card; the next wave starts its interpreters meanwhile. The rows are written as they come, so that a run
which is stopped keeps them. Utilisation is that of the encoders and projectors, counted layer by layer (2 a
multiply-add, forward and backward), without recomputation. The bandwidth is of the bytes that XLA counts for the whole
step, as if no cache held any.
"""

import argparse
import contextlib
import datetime
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_common import CHANNELS, ENCODERS, FULL, TINY, Job, Row, allowed, flops

ROOT = Path(__file__).resolve().parents[2]
FIT = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "does not fit")
FLAGS = {
    "cublas": "--xla_gpu_enable_triton_gemm=false",
    "untuned": "--xla_gpu_autotune_level=0",
    "nograph": "--xla_gpu_enable_command_buffer=",
    "latency": "--xla_gpu_enable_latency_hiding_scheduler=true",
}
ROWS = (  # waves, the most wanted first
    ("ours:resnet50:256", "torch:resnet50:256"),
    ("ours:vit_s16:256", "torch:vit_s16:256", "extract:vit_s16:512"),
    ("ours:resnet50:256:views", "ours:vit_s16:256:noflash", "ours:attention:256"),
    ("ours:resnet50:256:cublas", "ours:resnet50:256:convs", "ours:info_nce:65536"),
    ("ours:vit_s16:1024",),
    ("torch:vit_s16:1024",),
    ("ours:resnet50:1024",),
    ("torch:resnet50:1024",),
    ("ours:vit_s16:256:views", "extract:vit_b16:512", "torch:resnet50:256:eager"),
)
TINY_ROWS = (
    ("ours:resnet26:4", "torch:resnet26:4:eager"),
    ("ours:vit_ti16:4:views", "ours:views:4:ihc", "extract:vit_ti16:16"),
    ("ours:info_nce:256", "ours:attention:2"),
)


def card(who: str) -> Row:
    """{'card': ''} where there is no GPU."""
    if who == "torch":
        import torch

        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        return {"card": name, "version": f"torch {torch.__version__}"}
    import jax

    found = jax.default_backend() == "gpu"
    return {"card": jax.devices()[0].device_kind if found else "", "version": f"jax {jax.__version__}"}


def work(job: Job, tiny: bool) -> None:
    """In a process of its own: make ready, compile, measure, each when the parent allows it."""
    about = card(job.who)
    if not about["card"] and not tiny:
        print("ROW " + json.dumps(about | {"absent": True}), flush=True)
        return
    try:
        if job.who == "torch":
            from gpu_torch import step as phases
        elif job.who == "extract":
            from gpu_extract import phases
        else:
            from gpu_ours import phases
        steps = phases(job, TINY if tiny else FULL)
        next(steps)
        allowed("ready")
        next(steps)
        allowed("compiled")
        row = next(steps)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        row = {"error": " ".join(text.split())[:300], "fits": not any(word in text for word in FIT)}
    print("ROW " + json.dumps(about | (row or {})), flush=True)
    sys.stdout.flush()
    os._exit(0)  # what a compiler or a pool still does is of no use, and holds the card


class Worker:
    """The process of a row. `until` waits for what it says next."""

    def __init__(self, job: Job, args: argparse.Namespace, cache: str):
        env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
        env |= {"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONUNBUFFERED": "1"}
        env |= {"JAX_COMPILATION_CACHE_DIR": f"{cache}/jax", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch"}
        flags = [env.get("XLA_FLAGS", ""), *(FLAGS[word] for word in sorted(job.words & set(FLAGS)))]
        env["XLA_FLAGS"] = " ".join(filter(None, flags))
        command = [sys.executable, __file__, "--worker", job.name, *["--tiny"] * args.tiny]
        self.job, self.doing, self.row = job, "starting", None
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said}
        self._process = subprocess.Popen(command, text=True, env=env, start_new_session=True, **options)
        self._heard: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._heard.put(line.strip())
        self._heard.put(None)

    def go(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write("go\n")
            self._process.stdin.flush()

    def until(self, reached: str, end: float) -> bool:
        """False where it has its row instead, which may be an error."""
        while self.row is None:
            try:
                line = self._heard.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                self.row = {"error": f"stopped when the time was over: {self.doing}"}
                break
            if line is None:
                self._said.seek(0)
                text = " ".join(self._said.read().split())[-300:]
                self.row = {"error": f"ended with {self._process.wait()}: {text}"}
            elif line.startswith("ROW "):
                self.row = json.loads(line.removeprefix("ROW "))
            elif line == f"READY {reached}":
                return True
            elif line.startswith("AT "):
                self.doing = line.removeprefix("AT ")
        self.stop()
        return False

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._said.close()


def measured(waves: Sequence[Sequence[str]], args: argparse.Namespace, cache: str) -> Iterator[Row]:
    """The rows of all processes, until the time is over."""
    end = time.monotonic() + args.limit
    left = [[Job.parse(name) for name in wave] for wave in waves]
    workers = [Worker(job, args, cache) for job in left[0]]
    waiting: list[Worker] = []
    try:
        while workers:
            left = left[1:]
            stop = min(end, time.monotonic() + args.wave_limit)
            ready = [worker for worker in workers if worker.until("ready", stop)]
            for worker in ready:
                worker.go()
            waiting = [Worker(job, args, cache) for job in left[0]] if left else []
            for worker in ready:
                worker.until("compiled", stop)
            for worker in workers:
                if worker.row is None:
                    worker.go()
                    worker.until("measured", stop)
                row = about(worker)
                yield row
                if row.get("fits") is False and "remat" not in worker.job.words:
                    left.insert(1 if waiting else 0, [Job.parse(f"{worker.job.name}:remat")])
            workers = waiting or [Worker(job, args, cache) for wave in left[:1] for job in wave]
            if time.monotonic() > end - 10:
                break
    finally:
        for worker in (*workers, *waiting):
            worker.stop()
    unreached = {worker.job.name: worker.job for worker in workers if worker.row is None}
    for job in (*unreached.values(), *(job for wave in left[1 if unreached else 0 :] for job in wave)):
        yield named(job) | {"error": "not reached: the time was over"}


def named(job: Job) -> Row:
    return {"name": job.name, "who": job.who, "what": job.what, "size": job.size, "words": sorted(job.words)}


def about(worker: Worker) -> Row:
    return named(worker.job) | (worker.row or {})


HEAD = ("row", "ms", "pairs or tiles/s", "TFLOP/s", "MFU", "TB/s", "GiB", "compile s", "remark")


def shown(row: Row, sizes: Row, peak: float) -> list[str]:
    if "error" in row:
        return [row["name"], *["-"] * 7, row["error"].replace("|", "/")]
    cells = [row["name"], f"{row['ms']:.1f}", f"{1e3 * row['size'] / row['ms']:,.0f}", "-", "-"]
    remarks = [f"{row['skipped']} skipped"] if row.get("skipped") else []
    if row["what"] in ENCODERS and row["who"] != "extract":
        channels = CHANNELS.values()
        row["flops"] = row["size"] * sum(flops(row["what"], sizes["px"], sizes["widths"], c) for c in channels)
        rate = 1e-9 * row["flops"] / row["ms"]
        cells[3:] = [f"{rate:.1f}", f"{100 * rate / peak:.1f} %"]
        remarks += [f"{2e3 * row['size'] / row['ms']:,.0f} images/s", f"loss {row['loss']:.3f}"]
    cells += [f"{1e-9 * row['xla_bytes'] / row['ms']:.2f}" if row.get("xla_bytes") else "-"]
    cells += [f"{row['peak_gib']:.1f}" if row.get("peak_gib") else "-", f"{row['compile_s']:.0f}"]
    if row["who"] == "extract":
        remarks += [
            f"from a tile set {row['extract_per_s']:,.0f}/s, {row['share']:.2f} of it; {row['workers']} readers"
        ]
    if "temp_gib" in row:
        remarks += [f"temporary {row['temp_gib']:.2f} GiB, plain {row['plain_temp_gib']:.1f} GiB"]
    if row["what"] == "attention":
        errors = [f"{row[f'{name}_{what}_error']:.1e}" for name in ("flash", "plain") for what in ("value", "gradient")]
        remarks += [f"cuDNN {row['flash']}; plain {row['plain_ms']:.2f} ms; errors {' '.join(errors)}"]
    return [*cells, ", ".join(remarks)]


def compared(rows: Sequence[Row]) -> Iterator[list[str]]:
    """model, pairs, peer's time over ours, the share of the views in our step, whether both have as many parameters."""
    done = {(r["what"], r["size"], r["who"], *r["words"]): r for r in rows if "ms" in r and r["what"] in ENCODERS}
    for what, size in dict.fromkeys((key[0], key[1]) for key in done if key[2] != "extract"):
        bare, full, peer = (
            done.get((what, size, *which), done.get((what, size, *which, "remat")))
            for which in (("ours",), ("ours", "views"), ("torch",))
        )
        ratio = f"{peer['ms'] / bare['ms']:.2f}" if bare and peer else "-"
        share = f"{100 * (1 - bare['ms'] / full['ms']):.1f} %" if bare and full else "-"
        same = f"{bare['params'] == peer['params']}" if bare and peer else "-"
        yield [what, str(size), ratio, share, same]


def line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the rows as JSON, written anew after each")
    parser.add_argument("--limit", type=float, default=1500.0, help="seconds for everything")
    parser.add_argument("--wave-limit", type=float, default=400.0, help="seconds for one wave")
    parser.add_argument("--cache", help="folder of compiled programs, for a second run")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="these alone")
    parser.add_argument("--together", type=int, default=3, help="of --rows, how many compile side by side")
    parser.add_argument("--peak", type=float, default=989.0, help="dense bfloat16 TFLOP/s of the card (H100, H200)")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(Job.parse(args.worker), args.tiny)
        return
    waves: Sequence[Sequence[str]] = TINY_ROWS if args.tiny else ROWS
    if args.rows:
        waves = [args.rows[i : i + args.together] for i in range(0, len(args.rows), args.together)]
    with tempfile.TemporaryDirectory() as folder:
        tell(measured(waves, args, args.cache or folder), args)


def tell(found: Iterator[Row], args: argparse.Namespace) -> None:
    sizes, rows = TINY if args.tiny else FULL, []
    day = datetime.datetime.now().astimezone().date().isoformat()
    for row in found:
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
    heads = ("model", "pairs", "peer ms / ours", "share of views", "same parameters")
    print(f"\n{line(heads)}\n{line(['---'] * len(heads))}")
    print("\n".join(line(cells) for cells in compared(rows)))
    print("\n" + ", ".join(sorted({row["version"] for row in rows if "version" in row})))


if __name__ == "__main__":
    main()
