"""Do numbered pieces of work in parallel and ahead of the consumer, and say in order which are done.

Three executors do the same thing: Python threads; processes, for each of which a thread waits; and tf.data. All are
generators: closing one stops its workers and waits for what they have in hand.
"""

import contextlib
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from importlib import util
from queue import SimpleQueue

from input_pipeline.crew import FEW

Work = Callable[[int], None]
Done = Generator[int, None, None]
SHORT = 256  # pieces of work
NAMES = ("auto", "threads", "processes", "tfdata")


def choose(executor: str, workers: int, pieces: int) -> str:
    """'auto' is threads where workers or pieces of work are few, and processes where they are many: threads, and
    tf.data just as well, are held up there by the interpreter, which only one of them has at a time: 16 threads stream
    3,200 pairs a second and 16 processes, which take a second to start, 14,400 (bench_stream.py)."""
    if executor not in NAMES:
        raise ValueError(f"executor is one of {', '.join(map(repr, NAMES))}, not {executor!r}")
    if executor == "tfdata" and util.find_spec("tensorflow") is None:
        raise ValueError("executor 'tfdata' needs tensorflow: pip install tensorflow-cpu, or use executor='auto'")
    if executor != "auto":
        return executor
    return "processes" if workers > FEW and pieces > SHORT else "threads"


def threads(work: Work, first: int, stop: int, *, workers: int, ahead: int) -> Done:
    """Daemon threads, not a ThreadPoolExecutor: at exit the interpreter waits for that before a watchdog can look."""
    tasks: SimpleQueue = SimpleQueue()
    crew = [threading.Thread(target=_crew, args=(work, tasks), name="mfl-stream", daemon=True) for _ in range(workers)]
    pending: deque[Future] = deque()
    try:
        for thread in crew:
            thread.start()
        submitted = first
        for number in range(first, stop):
            while submitted < stop and submitted - number < workers + ahead:
                pending.append(Future())
                tasks.put((pending[-1], submitted))
                submitted += 1
            pending.popleft().result()
            yield number
    finally:
        for future in pending:
            future.cancel()
        for _ in crew:
            tasks.put(None)
        for thread in crew:
            if thread.ident is not None:
                thread.join()


def _crew(work: Work, tasks: SimpleQueue) -> None:
    while (task := tasks.get()) is not None:
        future, number = task
        if future.set_running_or_notify_cancel():
            try:
                work(number)
                future.set_result(None)
            except BaseException as error:
                future.set_exception(error)
        del task, future


def _tensorflow():
    for name, value in (("TF_CPP_MIN_LOG_LEVEL", "2"), ("TF_ENABLE_ONEDNN_OPTS", "0")):
        os.environ.setdefault(
            name, value
        )  # else every start prints what the CPU can do; nothing here is computed by it
    import tensorflow

    return tensorflow


def tf_dataset(work: Work, first: int, stop: int, *, workers: int, ahead: int):
    """The tf.data graph: a range and one Python function, in order; nothing random and nothing stateful."""
    tf = _tensorflow()

    def done(number):
        work(int(number))
        return number

    def call(number):
        return tf.ensure_shape(tf.numpy_function(done, [number], tf.int64, stateful=False), [])

    options = tf.data.Options()
    options.autotune.enabled = False
    options.deterministic = True
    options.threading.private_threadpool_size = workers
    data = tf.data.Dataset.range(first, stop).map(call, num_parallel_calls=workers, deterministic=True)
    return (data.prefetch(ahead) if ahead else data).with_options(options)


def tfdata(work: Work, first: int, stop: int, *, workers: int, ahead: int) -> Done:
    """Imports tensorflow here and now, not in the first batch, where it would count as a stall."""
    tf = _tensorflow()

    with contextlib.suppress(RuntimeError):  # already initialised: then it is the user's own choice
        tf.config.set_visible_devices([], "GPU")
    failures: dict[int, Exception] = {}
    closed = threading.Event()

    def guarded(number: int) -> None:
        if closed.is_set():
            return
        try:
            work(number)
        except Exception as error:
            failures[number] = error
            raise

    return _drain(tf_dataset(guarded, first, stop, workers=workers, ahead=ahead), first, failures, closed)


def _drain(dataset, first: int, failures: dict[int, Exception], closed: threading.Event) -> Done:
    """Must be closed before the interpreter ends: a call into Python that is still wanted then would wait for ever."""
    errors = _tensorflow().errors

    iterator = dataset.as_numpy_iterator()
    number = first
    try:
        for done in iterator:
            assert int(done) == number
            yield number
            number += 1
    except errors.OpError as error:
        _forget(error)
        raise failures.get(number, error) from None
    except BaseException as error:
        _forget(error)
        raise
    finally:
        closed.set()
        del iterator  # waits for the calls in hand


def _forget(error: BaseException | None) -> None:
    """Let go of what the frames of an error hold: an iterator that outlives us hangs the interpreter when it ends."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
