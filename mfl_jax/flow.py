"""Tiles on their way: read into batches that slides share, through the device, and back to their slides.

Which tile goes into which row is known before it is read, so that whoever reads writes it there. Rows of a slide that
fails hold whatever was there, and are given to nobody.
"""

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from input_pipeline.crew import FEW, Crew, Shelf
from input_pipeline.ledger import Ledger
from mfl_jax import sharding
from mfl_jax.encoder import Encoder
from mfl_jax.slides import Entry, SlidesApart, Source

PART = 16  # tiles that are read at a time
LANES = 2  # batches on their way to the device at a time: one thread copies less than a GPU computes on
DEPTH = LANES + 1  # batches sent and not come back


class Job(Protocol):
    """A slide, from its first tile read to its file."""

    entry: Entry
    spent: Counter[str]  # seconds of reading by stage

    @property
    def over(self) -> bool: ...  # done or failed
    def begin(self) -> range: ...  # the rows to be read
    def asked(self, count: int) -> None: ...  # so many more parts are to be read; -1: one has been
    def read(self, rows: range, out: np.ndarray) -> None: ...  # by any thread
    def put(self, start: int, features: np.ndarray) -> None: ...
    def guarded(self) -> contextlib.AbstractContextManager[None]: ...  # what goes wrong within is this slide's fault
    def abandon(self) -> None: ...


@dataclass
class Batch:
    place: int
    images: np.ndarray
    spans: list[tuple[Job, int, int, int]] = field(default_factory=list)  # slide, its first row, ours, how many
    filled: int = 0
    unread: int = 0  # parts
    full: bool = False  # no further part will be asked for


class Device:
    """Puts batches on the device, computes there in their order, and brings the features back, in threads of its own,
    so that the device has the next batch when it is done with one."""

    def __init__(self, encoder: Encoder, layout: tuple[tuple[int, ...], str], mesh: Mesh):
        self._params, self._mesh = encoder.params, mesh
        self._lanes = ThreadPoolExecutor(LANES, "mfl-to-device")
        self._there, self._back = ThreadPoolExecutor(1, "mfl-device"), ThreadPoolExecutor(1, "mfl-from-device")
        self._program = compiled(encoder, layout, mesh)  # in this thread: settings of jax are a thread's own
        self._idle = perf_counter()

    def submit(self, made: Batch) -> Future:
        """Of the features, and of the seconds it took by stage."""
        placed = self._lanes.submit(self._put, made)
        return self._back.submit(self._fetch, self._there.submit(self._compute, placed))

    def _put(self, made: Batch) -> tuple[dict[str, Any], float]:
        begin = perf_counter()
        given = {"he": made.images, "mask": np.arange(len(made.images)) < made.filled}
        return jax.block_until_ready(sharding.put(given, self._mesh)), perf_counter() - begin

    def _compute(self, put: Future) -> tuple[jax.Array, float, float]:
        placed, moving = put.result()
        return self._program(self._params, placed["he"], placed["mask"]), perf_counter(), moving

    def _fetch(self, computed: Future) -> tuple[np.ndarray, dict[str, float]]:
        features, began, moving = computed.result()
        found = np.asarray(features, np.float32)
        began, self._idle = max(began, self._idle), perf_counter()  # a batch waits for the one before
        return found, {"host to device": moving, "compute": self._idle - began}

    def close(self) -> None:
        for threads in (self._lanes, self._there, self._back):
            threads.shutdown(wait=True, cancel_futures=True)


def run(
    work: Sequence[Job], encoder: Encoder, source: Source, batch: int, workers: int, mesh: Mesh, ledger: Ledger
) -> None:
    rows = sharding.rows_for(batch, mesh)
    layout, flying = source.layout(rows), deque[tuple[Batch, Future]]()
    ahead = workers + -(-rows // PART)  # parts; in batches:
    apart = workers > FEW
    shelf = Shelf({"he": layout}, -(-ahead * PART // rows) + 2 + DEPTH + 1, shared=apart)
    crew = Crew(SlidesApart([job.entry.open for job in work]), shelf) if apart else None
    device = Device(encoder, layout, mesh)
    start = perf_counter()

    def land() -> None:
        made, future = flying.popleft()
        features, spent = future.result()
        begin = perf_counter()
        for job, first, row, count in made.spans:
            job.put(first, features[row : row + count])
        shelf.give_back(made.place)
        ledger.seconds.update(spent | {"write": perf_counter() - begin})

    try:
        with contextlib.closing(_batches(work, shelf, rows, workers, ahead, crew)) as batches:
            for made in batches:
                if all(job.over for job, *_ in made.spans):
                    shelf.give_back(made.place)
                    continue
                flying.append((made, device.submit(made)))
                while len(flying) > DEPTH or (flying and flying[0][1].done()):
                    land()
        while flying:
            land()
    finally:
        device.close()
        if crew is not None:
            crew.close()
        for job in work:
            job.abandon()
        ledger.wall = perf_counter() - start


def compiled(encoder: Encoder, layout: tuple[tuple[int, ...], str], mesh: Mesh) -> Callable[..., jax.Array]:
    shape, dtype = layout
    places = sharding.batch_sharding(mesh)
    images = jax.ShapeDtypeStruct(shape, dtype, sharding=places)
    mask = jax.ShapeDtypeStruct(shape[:1], np.bool_, sharding=places)
    return jax.jit(encoder.apply).lower(encoder.params, images, mask).compile()


def _batches(
    work: Sequence[Job], shelf: Shelf, rows: int, workers: int, ahead: int, crew: Crew | None
) -> Generator[Batch, None, None]:
    """Full batches, but for the last. Their places on the shelf are the consumer's to give back. At most `ahead` parts
    are read and not yet waited for, which bounds the slides that are open as well."""
    pending: deque[tuple[Job, Batch, Future]] = deque()
    into: Batch | None = None

    def read(number: int, part: range, into: Batch, row: int) -> dict[str, float]:
        if crew is not None:
            return crew.do(into.place, number, part.start, part.stop, row)
        work[number].read(part, into.images[row : row + len(part)])
        return {}

    def take() -> Iterator[Batch]:
        job, into, future = pending.popleft()
        try:
            if not (job.over and future.cancel()):
                with job.guarded():
                    job.spent.update(future.result())
        finally:
            job.asked(-1)
        into.unread -= 1
        if into.full and not into.unread:
            yield into

    with ThreadPoolExecutor(workers, "mfl-reader") as pool, contextlib.closing(_parts(work, shelf, rows)) as parts:
        try:
            for number, part, into, row in parts:
                pending.append((work[number], into, pool.submit(read, number, part, into, row)))
                while len(pending) >= ahead:
                    yield from take()
            if into is not None and into.filled < rows and not into.unread:
                yield into  # all that it holds had come before it was known to be the last
            while pending:
                yield from take()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for job, _, _ in pending:
                job.asked(-1)


def _parts(work: Sequence[Job], shelf: Shelf, rows: int) -> Generator[tuple[int, range, Batch, int], None, None]:
    """Which tiles of which slide go into which batch, and from which row on."""
    into: Batch | None = None
    for number, job in enumerate(work):
        left = job.begin()
        job.asked(1)  # as long as not every part is asked for
        try:
            while left and not job.over:
                if into is None or into.full:
                    place = shelf.take()
                    into = Batch(place, shelf.arrays(place)["he"])
                row = into.filled
                part = left[: min(PART, rows - row)]
                left = left[len(part) :]
                job.asked(1)
                into.spans.append((job, part.start, row, len(part)))
                into.filled, into.unread = row + len(part), into.unread + 1
                into.full = into.filled == rows
                yield number, part, into, row
        finally:
            job.asked(-1)
    if into is not None:
        into.full = True
