"""`mfl extract`: slides or tile sets through an encoder, one file of features a slide.

Three things happen at once (flow.py): threads, or processes where there are many cores, read and decode tiles into
batches, which tiles of many slides share, in order and a bounded number ahead; the device is kept busy; what has come
back is written. A slide that fails is named and stops no other. What holds a slide's features is a function of the
encoder, the tiles and the parameters, by whose hash a rerun knows what is left to do.
"""

import contextlib
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from input_pipeline.cohort import is_label
from input_pipeline.cores import available_cores
from input_pipeline.features import number
from input_pipeline.files import only_one
from input_pipeline.ledger import Ledger
from input_pipeline.tile import Report, write_status_table
from mfl_jax import flow, sharding, store
from mfl_jax.encoder import Encoder
from mfl_jax.slides import Entry, Source, Tiles
from mfl_jax.store import Layout

READING = ("read", "decode", "resample")


def extract(
    source: Source,
    encoder: Encoder,
    out: str | os.PathLike,
    *,
    layout: str = "ours",
    dtype: str | None = None,
    batch: int | None = None,
    workers: int | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Never stops at a bad slide; `Report.failed` names them. Interrupted or repeated, it goes on where it was."""
    batch = usual_batch(source.size) if batch is None else batch
    if batch < 1 or (workers is not None and workers < 1):
        raise ValueError(f"batch and workers are at least 1, not {batch} and {workers}")
    if jax.process_count() > 1:
        raise ValueError("extraction runs in one process: give each host its part of the slides, and an --out")
    out, report = Path(out), Report([])
    if layout not in store.DTYPES:
        raise ValueError(f"layout is {layout!r}; allowed: {', '.join(store.DTYPES)}")
    place = Layout(layout, out, dtype or store.DTYPES[layout][0], encoder.name, encoder.digest)
    mesh = sharding.make_mesh() if mesh is None else mesh
    workers = available_cores() if workers is None else workers
    with only_one(out):
        jobs = [_Job(entry, source, place, encoder) for entry in source.entries]
        for path in (p for job in jobs for p in job.files.values()):
            store.remove_parts(path)
        _check_others(place, source, jobs)
        todo = [job for job in jobs if not job.look()]
        report.kept = len(jobs) - len(todo)
        work = [job for job in todo if not job.entry.fault]
        for job in todo:
            if job.entry.fault:
                say(f"{job.entry.slide_id} is left out: {job.entry.fault}")
        report.ledger.crews = dict.fromkeys(READING, ("readers", workers))
        report.ledger.crews |= {"compute": ("device", 1), "host to device": ("lanes", flow.LANES), "write": ("host", 1)}
        with tqdm(total=len(work), desc="extract", unit="slide", disable=not progress) as bar:
            for job in work:
                job.ended = _account(report.ledger, bar, say)
            if work:
                flow.run(work, encoder, source, batch, workers, mesh, report.ledger)
        for job in todo:
            if job.state == "failed":
                job.set_aside()
        report.rows = [job.row() for job in jobs]
        for line in _write_tables(place, report.rows):
            say(line)
        store.write_encoder(place, encoder.cases)
    return report


def usual_batch(size: int) -> int:
    """Tiles of `size` px: on a CPU as many as leave what a layer gives in its caches (ViT-S/16 on two cores: 28 tiles/s
    in batches of 8, 23 in batches of 64)."""
    if jax.default_backend() != "cpu":
        return 256
    return max(8, 4 * jax.device_count()) if size >= 128 else max(64, 32 * jax.device_count())


def _write_tables(place: Layout, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Of all slides in the folder: those of this call, and those of earlier ones that lie there still; what is to be
    said of them comes back."""
    every = [*rows, *store.slides_beside(place, rows)]
    labels = dict.fromkeys(name for row in every for name, value in row.items() if is_label(name) and value)
    every = [
        {name: row[name] for name in row if not is_label(name)} | {name: row.get(name, "") for name in labels}
        for row in every
    ]
    write_status_table(place.out / "status.csv", every)
    return store.write_tables(place, [row for row in every if row["state"] != "failed"])


def _account(ledger: Ledger, bar: Any, say: Callable[[str], None]) -> Callable[["_Job"], None]:
    def ended(job: "_Job") -> None:
        bar.update()
        if job.state == "failed":
            say(f"{job.entry.slide_id} failed: {job.reason}")
        else:
            ledger.add(job.timings, job.count)

    return ended


def _check_others(place: Layout, source: Source, jobs: Sequence["_Job"]) -> None:
    """Features of two encoders, or of tiles of two scales or sizes, would be one set to whoever reads the folder."""
    wanted = {job.files["features"] for job in jobs}
    for path in sorted(p for folder in {w.parent for w in wanted} for p in folder.glob("*.h5")):
        about = store.stored_attributes(path)
        if about is None:
            raise ValueError(
                f"{path} is damaged, or was not written by mfl extract: move it away, or choose another --out"
            )
        if path not in wanted and (other := _other(about, place, source)):
            raise ValueError(
                f"{path} is of a slide that was not asked for, and of {other}: choose another --out, or move it away"
            )


def _other(about: Mapping[str, Any], place: Layout, source: Source) -> str:
    """What a file is of, where it is not of this encoder and of tiles of this scale and size; else ''."""
    if about["encoder_sha256"] != place.sha256:
        return f"another encoder ({about['encoder']})"
    mpp, size = (number(about.get(name)) for name in ("mpp_target", "patch_size"))
    if mpp > 0 and not math.isclose(mpp, source.mpp, rel_tol=1e-3):
        return f"tiles of another scale ({mpp:g} um per px, not {source.mpp:g})"
    if size > 0 and size != source.size:
        return f"tiles of another size ({size:g} px, not {source.size})"
    return ""


class _Job:
    """One slide on its way: from its first tile read to its file. `ended` is called once, when it is done or failed."""

    def __init__(self, entry: Entry, source: Source, place: Layout, encoder: Encoder):
        self.entry, self.place, self.dim = entry, place, encoder.dim
        self.files = place.files(entry.slide_id, source.size, source.mpp, source.overlap)
        said = [store.VERSION, place.name, place.dtype, encoder.digest, encoder.name, entry.signature, entry.case_id]
        self.key = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        self.state, self.reason = ("failed" if entry.fault else "waiting"), entry.fault
        self.ended: Callable[[_Job], None] = lambda job: None
        self.count = self._written = self._unread = 0
        self.mpp: float | str = ""
        self.mpp_source = ""
        self.spent: Counter[str] = Counter()  # seconds by stage of reading
        self._tiles: Tiles | None = None
        self._features: Any = None
        self._file = contextlib.ExitStack()

    @property
    def over(self) -> bool:
        return self.state != "waiting"

    def look(self) -> bool:
        """Whether it was done by an earlier run."""
        about = store.stored_attributes(self.files["features"]) if not self.over else None
        if about is None or about["config_sha256"] != self.key or not all(p.is_file() for p in self.files.values()):
            return False
        self.count, self.mpp, self.mpp_source = int(about["tiles"]), float(about["mpp_level0"]), about["mpp_source"]
        self._name_state()
        return True

    def begin(self) -> range:
        """The rows that are to be read; none where the slide is empty, or cannot be opened."""
        with self.guarded():
            self._tiles = self.entry.open()
            sheet = self._tiles.sheet
            self.count, self.mpp, self.mpp_source = len(sheet.coords), sheet.mpp, sheet.mpp_source
            if self.count:
                return range(self.count)
            self._tiles.close()
            self._open_file()
            self._close_file()
        return range(0)

    def read(self, rows: range, out: np.ndarray) -> None:
        """By any thread."""
        assert self._tiles is not None
        self._tiles.read(rows.start, rows.stop, out)

    def asked(self, count: int) -> None:
        """So many parts more are to be read (-1: one has been, well or not). After the last one nobody reads from the
        slide any more."""
        self._unread += count
        if not self._unread and self._tiles is not None:
            self._tiles.close()
            self._release()

    def _release(self) -> None:
        """Of a slide that is over and read by nobody any more, the state is all that is kept."""
        if self.over and not self._unread:
            self._tiles = None

    def put(self, start: int, features: np.ndarray) -> None:
        """Rows in their order; the file gets its name with the last one."""
        if self.over:
            return
        with self.guarded():
            with np.errstate(over="ignore"):
                stored = features.astype(self.place.dtype)
            if bad := np.flatnonzero(~np.isfinite(stored).all(1)).tolist():
                way_out = "; they are too large for float16: use float32" if np.isfinite(features).all() else ""
                raise ValueError(f"features of {len(bad)} tiles are not finite, the first is {start + bad[0]}{way_out}")
            if self._features is None:
                self._open_file()
            self._features[start : start + len(stored)] = stored
            self._written += len(stored)
            if self._written == self.count:
                self._close_file()

    def _open_file(self) -> None:
        assert self._tiles is not None
        opened = store.writer(self.place, self._tiles.sheet, self.dim, self.key)
        self._features = self._file.enter_context(opened)

    def _close_file(self) -> None:
        self._features = None
        self._file.close()
        self._name_state()
        self.ended(self)
        self._release()

    def _name_state(self) -> None:
        self.state, self.reason = ("done", "") if self.count else ("empty", "no tile has enough tissue")

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """What goes wrong within is this slide's fault, and no other's."""
        try:
            yield
        except (ValueError, MemoryError) as error:
            self._fail(str(error))
        except Exception as error:  # every other slide must still be done; the reason goes into the status table
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        if not self.over:
            self.state, self.reason = "failed", reason
            self.abandon()
            self.ended(self)
            self._release()

    def abandon(self) -> None:
        """Close what is open; a file that is not complete does not get its name."""
        error, self._features = InterruptedError("the slide was given up"), None
        self._file.__exit__(InterruptedError, error, None)

    @property
    def timings(self) -> Counter[str]:
        """Of this process, and of those that read for it."""
        return self.spent + Counter({} if self._tiles is None else self._tiles.timings)

    def set_aside(self) -> None:
        """A file of other parameters or pixels must not pass for today's: it stays, under a name that no one reads."""
        for path in self.files.values():
            if path.is_file():
                os.replace(path, path.with_name(path.name + ".stale"))

    def row(self) -> dict[str, Any]:
        whole = self.state != "failed"
        file = self.files["features"].relative_to(self.place.out).as_posix() if whole else ""
        about: dict[str, Any] = {"slide_id": self.entry.slide_id, "case_id": self.entry.case_id, "state": self.state}
        about |= {"tiles": self.count if whole else "", "mpp": self.mpp, "mpp_source": self.mpp_source}
        return about | {"file": file, "reason": self.reason} | dict(self.entry.labels)
