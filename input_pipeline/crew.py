"""Arrays that are used again and again, and processes that fill them.

Of threads that decode, each needs the interpreter for some 30 us a tile, so that more than a few hold each other up. A
`Crew` gives each a process: the thread says what is to be done, and waits. What the processes fill is memory of all of
them (a `Shelf`), so that a few words travel and no pixel does.
"""

import contextlib
import faulthandler
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from input_pipeline.pool import ONE_THREAD_EACH, end_with

Layout = Mapping[str, tuple[tuple[int, ...], str]]  # name -> shape and dtype
Arrays = dict[str, np.ndarray]
Work = Callable[..., Any]  # work(arrays of a place, *task)

FEW = 4  # workers: as many threads are as fast as processes, and start at once
ALIGNED = 64
PATIENCE = 5.0  # seconds for a process to end by itself, when nobody asks any more
PROGRAM = "import sys; sys.path[:] = {path!r}; from input_pipeline.crew import serve; serve(*map(int, sys.argv[1:]))"


class CrewError(OSError):
    """A process of the crew died."""


class _Lent(np.ndarray):
    """The memory of one place: whatever looks at a part of it holds this, which can be watched."""


class Shelf:
    """Places for sets of arrays of one layout. What is in a place that is taken is what was left there.

    No lock is held anywhere: places come back from finalizers, which may run in the midst of any line.
    """

    def __init__(self, layout: Layout, places: int, *, shared: bool = False, file: int | None = None, lent: int = 0):
        """`shared`: other processes can open it by `file`, its descriptor. `lent`: how many sets may be lent."""
        self.layout, self.places = dict(layout), places
        self._at, stride = {}, 0
        for name, (shape, dtype) in layout.items():
            self._at[name] = stride
            stride += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // ALIGNED) * ALIGNED
        self._stride = -(-max(stride, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        size = self._stride * places
        self.file = _memory(size) if shared else file
        self._close = weakref.finalize(self, os.close, self.file) if shared and self.file is not None else None
        own = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if self.file is None else {}
        self._memory = mmap.mmap(-1 if self.file is None else self.file, size, **own)
        self._free, self._spare = deque(range(places)), deque(range(lent))

    def take(self) -> int:
        try:
            return self._free.popleft()
        except IndexError:
            raise RuntimeError(f"all {self.places} places are taken") from None

    def give_back(self, place: int) -> None:
        self._free.append(place)

    def arrays(self, place: int) -> Arrays:
        return self._views(self._owner(place))

    def lend(self, place: int) -> Arrays:
        """Its arrays, for someone who may keep them: the place is free again when nothing looks at any of them. Of
        one who keeps many sets, the further ones are copies."""
        owner = self._owner(place)
        try:
            self._spare.pop()
        except IndexError:
            copied = {name: array.copy() for name, array in self._views(owner).items()}
            self.give_back(place)
            return copied
        weakref.finalize(owner, self._returned, place).atexit = False
        return self._views(owner)

    def close(self) -> None:
        """No process can open it any more; the memory goes with the last array."""
        if self._close is not None:
            self._close()

    def _returned(self, place: int) -> None:
        self._free.append(place)
        self._spare.append(0)

    def _owner(self, place: int) -> _Lent:
        return _Lent((self._stride,), np.uint8, self._memory, place * self._stride)

    def _views(self, owner: _Lent) -> Arrays:
        return {name: np.ndarray(*how, buffer=owner, offset=self._at[name]) for name, how in self.layout.items()}


def _memory(size: int) -> int:
    """A file without a name, in memory where the system has such: it is gone when its last user is."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("mfl-shelf")
    else:
        with tempfile.TemporaryFile() as opened:
            file = os.dup(opened.fileno())
    os.ftruncate(file, size)
    return file


def step_back(nice: int) -> None:
    """Cores that others want too are theirs before this thread's, where the system has threads with priorities."""
    if nice and sys.platform == "linux":
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, max(nice, os.getpriority(os.PRIO_PROCESS, 0)))


class Crew:
    """Processes that do `work` on the arrays of a shelf, as many as threads ask at a time; each starts when it is first
    needed, and ends with this process, whatever ends that. `work` is pickled once; `nice` is what they step back by."""

    def __init__(self, work: Work, shelf: Shelf, nice: int = 0):
        self._shelf, self._work = shelf, pickle.dumps((work, nice))
        self._idle: list[_Member] = []
        self._all: set[_Member] = set()
        self._lock, self._closed = threading.Lock(), False

    def do(self, place: int, *task: Any) -> Any:
        """What `work` returns, or raises. CrewError where the process died; the next task gets another one."""
        member = self._asked((place, task))
        try:
            done, value = member.talk.recv()
        except (EOFError, OSError) as error:
            with self._lock:
                self._all.discard(member)
            raise CrewError(member.death()) from error
        except Exception as error:  # of unpickling, after all of it has come
            done, value = False, error
        with self._lock:
            self._idle.append(member)
        if not done:
            raise value
        return value

    def _asked(self, question: Any) -> "_Member":
        """One that is at work on it: an idle one, or where there is none, or it has died meanwhile, a new one."""
        while True:
            with self._lock:
                if self._closed:
                    raise RuntimeError("the crew is closed")
                member = self._idle.pop() if self._idle else None
            if new := member is None:
                member = _Member(self._shelf, self._work)
                with self._lock:
                    self._all.add(member)
            try:
                member.talk.send(question)
                return member
            except OSError as error:
                with self._lock:
                    self._all.discard(member)
                said = member.death()
                if new:
                    raise CrewError(said) from error

    def dump(self) -> None:
        """Every process writes what it is doing to stderr."""
        for member in list(self._all):
            with contextlib.suppress(OSError):
                member.process.send_signal(signal.SIGUSR1)
        time.sleep(1.0)  # for their words, before this process may end: on a busy machine they take their time

    def close(self) -> None:
        """Nobody may be asking."""
        with self._lock:
            self._closed, members = True, list(self._all)
            self._idle, self._all = [], set()
        for member in members:
            member.talk.close()
        for member in members:
            member.end()
        self._shelf.close()


class _Member:
    def __init__(self, shelf: Shelf, work: bytes):
        assert shelf.file is not None
        self.talk, theirs = Pipe()
        life, self._life = Pipe(duplex=False)
        files = (theirs.fileno(), life.fileno(), shelf.file)
        path = [entry for entry in sys.path if isinstance(entry, str)]
        command = [sys.executable, "-c", PROGRAM.format(path=path), *map(str, files)]
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "env": os.environ | ONE_THREAD_EACH}
        self.process = subprocess.Popen(command, pass_fds=files, start_new_session=True, **options)
        theirs.close()
        life.close()
        with contextlib.suppress(OSError):  # it died: the first question says so
            self.talk.send((shelf.layout, shelf.places))
            self.talk.send_bytes(work)

    def end(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self._life.close()

    def death(self) -> str:
        self.talk.close()
        code = self.end()
        if code >= 0:
            return f"a process that reads tiles ended with exit code {code}: what it said is on stderr"
        name = signal.Signals(-code).name
        return f"a process that reads tiles ended by signal {-code} ({name}): out of memory, or a crash in a codec"


def serve(talk_file: int, life_file: int, memory_file: int) -> None:
    """What a process of the crew does until nobody asks any more."""
    end_with(Connection(life_file))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whoever asks may still want batches before it saves
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    talk = Connection(talk_file)
    layout, places = talk.recv()
    shelf = Shelf(layout, places, file=memory_file)
    work, wrong = None, None
    try:
        work, nice = pickle.loads(talk.recv_bytes())
        step_back(nice)
    except Exception as error:  # whoever asks first is told
        wrong = error
    while True:
        try:
            place, task = talk.recv()
        except EOFError:
            return
        try:
            if work is None:
                raise RuntimeError("the work did not reach the process that is to do it") from wrong
            answer = (True, work(shelf.arrays(place), *task))
        except Exception as error:
            error.add_note("".join(traceback.format_exception(error)))
            answer = (False, error)
        talk.send_bytes(_packed(answer))


def _packed(answer: tuple[bool, Any]) -> bytes:
    """An exception can often be pickled and not be made again."""
    try:
        packed = pickle.dumps(answer)
        if not answer[0]:
            pickle.loads(packed)
        return packed
    except Exception:
        return pickle.dumps((False, RuntimeError(f"an answer that cannot be sent: {answer[1]!r}")))
