"""What is known of a run while it runs: metrics one step late, the guards that end or warn, progress, a profile."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mfl_jax import trees
from mfl_jax.metrics import Metrics

MAX_SKIPS = 10
COLLAPSED_STEPS = 20
log = logging.getLogger(__name__)


class TrainingFailed(RuntimeError):  # noqa: N818
    """The run cannot go on; the last good checkpoint is kept."""


@dataclass(frozen=True)
class Pending:
    """A step that was dispatched and whose metrics nobody has waited for."""

    step: int
    values: Mapping[str, jax.Array]
    ids: jax.Array | None


class Watch:
    """Fetches the metrics of step t-1 when step t is on its way, so that the device never waits for the host.

    Every `every`-th step is written, and the last one before an evaluation, a save or the end.
    """

    def __init__(self, metrics: Metrics, *, name: str, start: int, total: int, batch: int, every: int, progress: bool):
        self._metrics, self._every, self._batch = metrics, every, batch
        self._pending: Pending | None = None
        self._collapsed = 0
        self._waited, self._since, self._steps = 0.0, time.perf_counter(), 0
        self._bar = tqdm(total=total, initial=start, unit="step", desc=name, disable=not progress)

    def dispatched(self, step: int, values: Mapping[str, jax.Array], ids: jax.Array | None) -> None:
        finished, self._pending = self._pending, Pending(step, values, ids)
        if finished is not None:
            self._report(finished, written=finished.step % self._every == 0)

    def flush(self) -> None:
        """Wait for the step that is under way, and write it."""
        finished, self._pending = self._pending, None
        if finished is not None:
            self._report(finished, written=True)

    def waited(self, seconds: float) -> None:
        """For a batch, with nothing else to do."""
        self._waited += seconds

    def paused(self) -> None:
        """An evaluation or a save lay between: it is no part of the rate."""
        self._waited, self._since, self._steps = 0.0, time.perf_counter(), 0

    def close(self) -> None:
        self._bar.close()

    def _report(self, done: Pending, *, written: bool) -> None:
        values = {name: float(value) for name, value in jax.device_get(dict(done.values)).items()}
        self._bar.update()
        self._steps += 1
        self._guard_skips(done, values)
        self._guard_collapse(done, values)
        if written:
            elapsed = max(time.perf_counter() - self._since, 1e-9)
            rate = {"examples_per_second": self._steps * self._batch / elapsed, "input_wait": self._waited / elapsed}
            self._metrics.write(done.step, values | rate)
            self._bar.set_postfix(loss=f"{values['loss']:.4g}", refresh=False)
            self.paused()

    def _guard_skips(self, done: Pending, values: Mapping[str, float]) -> None:
        if not values["skipped"]:
            return
        ids = [] if done.ids is None else _own_rows(done.ids)
        self._metrics.note(done.step, skipped=int(values["skipped"]), loss=str(values["loss"]), ids=ids)
        log.warning("step %d was skipped: its loss or gradient is not finite", done.step)
        if values["skipped"] > MAX_SKIPS:
            raise TrainingFailed(
                f"{MAX_SKIPS + 1} steps in a row, up to step {done.step}, had a loss or gradient that is not finite "
                "and were skipped. The ids of their tiles are in metrics.jsonl and the last checkpoint is good: look "
                "at the tiles, or lower the learning rate"
            )

    def _guard_collapse(self, done: Pending, values: Mapping[str, float]) -> None:
        """Once a run, when the features have looked collapsed for so long that it is no accident of the start."""
        self._collapsed = self._collapsed + 1 if values.get("collapsed") else 0
        if self._collapsed == COLLAPSED_STEPS:
            signs = {k: values[k] for k in ("feature_std", "effective_rank") if k in values}
            self._metrics.note(done.step, collapse=signs)
            log.warning("the features have collapsed for %d steps: %s", COLLAPSED_STEPS, signs)


class Profile:
    """Traces steps `at` to `at` + 2 into a folder, for TensorBoard or Perfetto; with at < 0, never."""

    def __init__(self, folder: Path, at: int):
        self._folder, self._at, self._on = folder, at, False

    def before(self, step: int, state: Any) -> None:
        if step == self._at >= 0:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._on = True
        elif self._on and step >= self._at + 3:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False


def summary(params: Any) -> str:
    """Parameters by tower and part: a table short enough to be printed at every start."""
    groups: dict[str, list[Any]] = {}
    for name, leaf in trees.named_leaves(params).items():
        groups.setdefault("/".join(name.split("/")[:2]), []).append(leaf)
    rows = [(name, *_size(part)) for name, part in groups.items()]
    rows.append(("total", *_size(params)))
    wide = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(f"{n.ljust(wide[0])}  {c.rjust(wide[1])}  {m.rjust(wide[2])}" for n, c, m in rows)


def _size(tree: Any) -> tuple[str, str]:
    return f"{trees.count(tree):,}", f"{trees.size_bytes(tree) / 2**20:.1f} MiB"


def _own_rows(ids: jax.Array) -> list[int]:
    """The ids of this host's rows; every host writes its own."""
    return np.concatenate([np.asarray(s.data) for s in ids.addressable_shards if s.replica_id == 0]).tolist()
