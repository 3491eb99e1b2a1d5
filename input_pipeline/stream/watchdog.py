"""A reader that stalls (a dead network file system) must end the process, not hold a cluster in silence for ever."""

import faulthandler
import os
import sys
import threading
import weakref
from collections.abc import Callable

EXIT_CODE = 70
_TICKS = 20


class Watchdog:
    """`with watchdog:` around a wait; unless it ends in `timeout` seconds, all stacks are dumped and the process ends.

    Time is counted in ticks of its own thread, so a process that was suspended is not blamed for the time it slept.
    """

    def __init__(self, timeout: float, what: str, before: Callable[[], None] = lambda: None):
        """`before` lets other processes say what they were doing."""
        self._state = _State(timeout, what, before)
        thread = threading.Thread(target=_watch, args=(self._state,), name="mfl-watchdog", daemon=True)
        weakref.finalize(self, self._state.stopped.set)
        thread.start()

    def __enter__(self) -> None:
        self._state.ticks = 0
        self._state.waiting = True

    def __exit__(self, *_) -> None:
        self._state.waiting = False

    def stop(self) -> None:
        self._state.stopped.set()


class _State:
    def __init__(self, timeout: float, what: str, before: Callable[[], None]):
        if not timeout > 0:
            raise ValueError(f"stall_timeout is a positive number of seconds, or None for no limit; it is {timeout}")
        self.timeout, self.what, self.before = timeout, what, before
        self.ticks, self.waiting, self.stopped = 0, False, threading.Event()


def _watch(state: _State) -> None:
    while not state.stopped.wait(state.timeout / _TICKS):
        state.ticks += 1
        if state.waiting and state.ticks > _TICKS:
            _end(state)


def _end(state: _State) -> None:
    message = (
        f"\n{state.what} gave nothing for {state.timeout:g} s (stall_timeout): the storage or a reader hangs. "
        "What every thread was doing follows; the process ends here and can be started again.\n"
    )
    try:
        os.write(2, message.encode())
        state.before()
        faulthandler.dump_traceback(file=2, all_threads=True)
        sys.stdout.flush()
    finally:
        os._exit(EXIT_CODE)
