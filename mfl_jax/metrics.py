"""Metrics as they are made: JSON lines always, TensorBoard and Weights & Biases when asked."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

Sink = tuple[Callable[[int, Mapping[str, float]], None], Callable[[], None]]  # write, and end
WRITERS = ("tensorboard", "wandb")


class Metrics:
    """One line a call in `metrics.jsonl`, flushed at once: a process that is killed has lost nothing it reported.

    Of several processes the first writes that file and the others theirs, `metrics-1.jsonl` and so on: what they note
    of their own rows stands there. After a kill, steps since the last checkpoint come twice; the later line counts.
    """

    def __init__(
        self, workdir: Path, writers: tuple[str, ...] = (), config: Mapping[str, Any] | None = None, process: int = 0
    ):
        check_writers(writers)
        self._sinks: list[Sink] = []
        path = workdir / (f"metrics-{process}.jsonl" if process else "metrics.jsonl")
        writers = () if process else writers
        if "tensorboard" in writers:
            self._sinks.append(_tensorboard(workdir))
        if "wandb" in writers:
            self._sinks.append(_wandb(workdir, config or {}))
        self._file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        self._end_last_line(path)

    def _end_last_line(self, path: Path) -> None:
        """A process killed while writing leaves half a line; what follows starts on its own."""
        if path.stat().st_size:
            with open(path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    self._file.write("\n")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        finite = {k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}  # JSON knows no NaN
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for write, _ in self._sinks:
            write(step, numbers)

    def note(self, step: int, **facts: Any) -> None:
        """Something that happened: skipped ids, an override, an alarm."""
        self._file.write(json.dumps({"step": step, "note": facts}, default=str) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        for _, end in self._sinks:
            end()


def check_writers(writers: tuple[str, ...]) -> None:
    if unknown := set(writers) - set(WRITERS):
        raise ValueError(f"writers {sorted(unknown)} are not known; allowed: {', '.join(WRITERS)}")


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the half line of a process that was killed
    return rows


def _tensorboard(workdir: Path) -> Sink:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError("writer 'tensorboard' needs tensorboardX: pip install tensorboardX") from None
    writer = SummaryWriter(str(workdir / "tensorboard"))

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write, writer.close


def _wandb(workdir: Path, config: Mapping[str, Any]) -> Sink:
    try:
        import wandb
    except ImportError:
        raise ValueError("writer 'wandb' needs wandb: pip install wandb") from None
    # Two folders of one name are two runs; a folder that goes on is the same run. WANDB_PROJECT says the project.
    own = f"{workdir.name}-{hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:8]}"
    run = wandb.init(dir=str(workdir), config=dict(config), name=workdir.name, id=own, resume="allow")
    return (lambda step, values: run.log(dict(values), step=step)), run.finish
