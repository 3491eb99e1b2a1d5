"""The same function over many slides: on a pool of processes or on Apache Beam. One bad slide never stops the rest."""

import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from input_pipeline.cores import available_cores

RUNNERS = ("local", "beam")
ONE_THREAD_EACH = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"), "1"
)  # for the environment of processes, of which there are as many as cores
SLIDES_PER_POOL = 25  # a core; then its processes are replaced: what a C library leaks cannot add up over a cohort


@dataclass(frozen=True)
class Outcome:
    item: Any
    value: Any = None
    error: str | None = None


def run(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    workers: int | None = None,
    runner: str = "local",
    label: str = "slides",
    progress: bool = True,
) -> Iterator[Outcome]:
    """Outcomes in the order in which they end. workers=0 works in this process, which a debugger can follow.

    Stopped early (an exception here, Ctrl-C, the death of this process by any signal), the processes end at once, in
    the middle of a slide: the work must leave nothing half-written that looks whole.
    """
    if runner not in RUNNERS:
        raise ValueError(f"runner is {runner!r}; allowed: {', '.join(RUNNERS)}")
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}; allowed: 0 (this process) or more")
    workers = available_cores() if workers is None else workers
    if runner == "beam":
        outcomes = _beam(function, items)
    elif workers == 0:
        outcomes = (_guarded(function, item) for item in items)
    else:
        outcomes = _processes(function, items, min(workers, max(len(items), 1)))
    with tqdm(total=len(items), desc=label, unit="slide", disable=not progress) as bar:
        for outcome in outcomes:
            bar.update()
            yield outcome


def _guarded(function: Callable[[Any], Any], item: Any) -> Outcome:
    try:
        return Outcome(item, function(item))
    except ValueError as error:
        return Outcome(item, error=str(error))
    except MemoryError as error:
        return Outcome(item, error=f"out of memory: {error}")
    except Exception as error:  # every other slide must still be done; where it happened goes into the status table
        frames = traceback.extract_tb(error.__traceback__)
        return Outcome(item, error=f"{type(error).__name__}: {error} ({frames[-1].name}, line {frames[-1].lineno})")


def _processes(function: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterator[Outcome]:
    """A process that dies (killed, segmentation fault) takes the pool with it: what was under way is tried once more,
    each alone, so that the slide to blame is known and the others are not lost."""
    suspects: list[Any] = []
    left = list(reversed(items))
    while left:
        running: dict[Future, Any] = {}
        budget = SLIDES_PER_POOL * workers
        with _pool(workers) as pool, contextlib.suppress(BrokenProcessPool):
            while (left and budget) or running:
                while left and budget and len(running) < 2 * workers:
                    running[pool.submit(_guarded, function, left[-1])] = left[-1]
                    left.pop()
                    budget -= 1
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    outcome = future.result()
                    del running[future]
                    yield outcome
        suspects.extend(running.values())
    for item in suspects:
        with _pool(1) as pool:
            try:
                outcome = pool.submit(_guarded, function, item).result()
            except BrokenProcessPool:
                outcome = Outcome(item, error="the process working on it died (out of memory, or a crash in a codec)")
            yield outcome


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each: spawned, since a fork of threads may deadlock. They live as long as the far end of
    a pipe is open here: the system closes it whatever ends this process, we close it when something goes wrong."""
    before = {name: os.environ.get(name) for name in ONE_THREAD_EACH}
    os.environ.update(ONE_THREAD_EACH)
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    # max_tasks_per_child of ProcessPoolExecutor is known to deadlock
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with, initargs=(theirs,))
    try:
        yield pool
        pool.shutdown(wait=True)
    finally:
        ours.close()
        pool.shutdown(wait=True, cancel_futures=True)
        theirs.close()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def end_with(pipe: Connection) -> None:
    """End this process as soon as the other end of `pipe` closes. Ctrl-C is the business of the process that has it."""

    def watch() -> None:
        pipe.poll(None)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, name="parent", daemon=True).start()


def _beam(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Outcome]:
    """Beam reads its own options (--runner, --direct_num_workers, ...) from BEAM_OPTIONS. A slide writes its own files;
    only its status travels, as JSON through text files in a folder that all workers see (BEAM_TEMP)."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise ValueError("runner 'beam' needs Apache Beam: pip install 'mfl_jax[beam]'") from None

    def work(numbered: tuple[int, Any]) -> str:
        outcome = _guarded(function, numbered[1])
        return json.dumps([numbered[0], outcome.value, outcome.error])

    options = PipelineOptions(os.environ.get("BEAM_OPTIONS", "").split())
    with tempfile.TemporaryDirectory(dir=os.environ.get("BEAM_TEMP")) as folder:
        with beam.Pipeline(options=options) as pipeline:
            numbered = pipeline | beam.Create(list(enumerate(items))) | beam.Reshuffle()
            _ = numbered | beam.Map(work) | beam.io.WriteToText(os.path.join(folder, "outcome"))
        for path in sorted(Path(folder).iterdir()):
            for line in path.read_text().splitlines():
                number, value, error = json.loads(line)
                yield Outcome(items[number], value, error)
