"""Being told to stop (SIGTERM), and being the only one at work in a folder."""

import contextlib
import fcntl
import itertools
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import psutil
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 100
CLOCK_SECONDS = 2.0  # how much the system's idea of when a process began may move
COLLECTIVES = "JAX_CPU_COLLECTIVES_IMPLEMENTATION"
log = logging.getLogger(__name__)
_ticks = itertools.count()  # JAX wants a number that only grows, over all runs of this process
_told = threading.Event()


def initialize() -> None:
    """Let SIGTERM be heard, on all processes of a run. Call it before anything else of JAX; again, it does nothing.

    On a cluster that JAX knows (Slurm, TPU, ...), or with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
    set, all processes find each other; else this one is a cluster of one, on a free port of the loopback. In a process
    that has used JAX before (a notebook), a handler of our own listens instead. MFL_HEARTBEAT_SECONDS is how long a
    process may be silent before the others end.
    """
    if jax.distributed.is_initialized() or _told.is_set():
        return
    timeout = int(os.environ.get("MFL_HEARTBEAT_SECONDS", HEARTBEAT_SECONDS))
    many = any(name in os.environ for name in ("SLURM_NTASKS", "TPU_WORKER_HOSTNAMES", "OMPI_COMM_WORLD_SIZE"))
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        count, index = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=timeout)
    elif many:
        jax.distributed.initialize(heartbeat_timeout_seconds=timeout)
    else:
        if COLLECTIVES not in os.environ:
            # By memory, not by TCP as between machines: two CPU devices of a process take half the time for a step.
            jax.config.update(COLLECTIVES.lower(), None)
        try:
            jax.distributed.initialize(f"127.0.0.1:{_free_port()}", 1, 0, heartbeat_timeout_seconds=timeout)
        except RuntimeError:
            _listen()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _listen() -> None:
    if threading.current_thread() is not threading.main_thread():
        log.warning("JAX was used before, and this is not the main thread: a SIGTERM will end the run without a save")
        return
    signal.signal(signal.SIGTERM, lambda number, frame: _told.set())


def asked_to_stop() -> bool:
    """True at the same call on every process, once any of them was sent SIGTERM; and from then on."""
    if not _told.is_set() and multihost_utils.reached_preemption_sync_point(next(_ticks)):
        _told.set()
    return _told.is_set()


class WorkdirBusy(ValueError):  # noqa: N818
    """Another run is at work in this folder."""


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """One run a folder, of however many processes. A lock whose process is gone from this machine is taken over; from
    another machine, never."""
    refusal = _take(workdir) if jax.process_index() == 0 else None
    if jax.process_count() > 1:
        refused = multihost_utils.broadcast_one_to_all(np.int32(refusal is not None))
        refusal = refusal or ("process 0 was refused the workdir" if refused else None)
    if refusal:
        raise WorkdirBusy(refusal)
    try:
        yield
    finally:
        if jax.process_index() == 0:
            (workdir / "lock.json").unlink(missing_ok=True)


def _take(workdir: Path) -> str | None:
    """Why the lock cannot be had; None when it is ours. Runs on one machine that start together decide one by one."""
    path = workdir / "lock.json"
    guard = os.open(workdir, os.O_RDONLY)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if path.exists() and (refusal := _refusal(path)) is not None:
            return refusal
        path.unlink(missing_ok=True)
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
        with open(path, "x") as file:
            file.write(json.dumps(mine | {"process": _started(os.getpid())}))
        return None
    except FileExistsError:
        return f"{path} was made just now by a run on another machine"
    finally:
        os.close(guard)


def _refusal(path: Path) -> str | None:
    try:
        other = json.loads(path.read_text())
        host, pid, age = other["host"], int(other["pid"]), time.time() - float(other["started"])
    except (ValueError, KeyError, TypeError):
        age = time.time() - path.stat().st_mtime
        return f"{path} was made just now by another run; try again in 10 s" if age < 10 else None
    now, then = _started(pid), other.get("process")
    if host == socket.gethostname() and (now is None or then is None or abs(now - then) > CLOCK_SECONDS):
        log.warning("taking over %s: its process %d is gone", path, pid)
        return None
    return (
        f"a run is at work in {path.parent}: host {host}, pid {pid}, since {age / 60:.0f} min. Use another workdir, or "
        f"end that run; if it is gone for certain, remove {path}"
    )


def _started(pid: int) -> float | None:
    """When a process began, which tells it from a later one of the same number; None where there is none."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None
