"""Files that are either whole or not there, and folders in which one run works at a time."""

import contextlib
import hashlib
import io
import json
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

BEAT_S = 30.0  # a run touches its lock this often
SILENT_S = 600.0  # a lock of another machine that was not touched for so long belongs to a run that is dead


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name to write to, which gets its real name when all went well and the bytes are on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    with whole(path) as part:
        part.write_bytes(data)


def save_picture(path: str | os.PathLike, picture: np.ndarray) -> None:
    """uint8 [H, W, 3] as PNG or JPEG, by the suffix."""
    format = Image.registered_extensions()[Path(path).suffix]
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format, **({"quality": 88, "subsampling": 0} if format == "JPEG" else {}))
    write_atomically(path, buffer.getvalue())


def facts(path: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file: what a tile set records of its sources."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"name": path.name, "size": os.fstat(file.fileno()).st_size, "sha256": digest}


def write_json(path: str | os.PathLike, document: Any) -> None:
    """JSON that every reader takes: numbers that are not finite become null. What is no JSON is a TypeError."""
    write_atomically(path, json.dumps(_finite(document), indent=1, allow_nan=False).encode())


def _finite(document: Any) -> Any:
    if isinstance(document, float):
        return document if math.isfinite(document) else None
    if isinstance(document, dict):
        return {key: _finite(value) for key, value in document.items()}
    return [_finite(value) for value in document] if isinstance(document, (list, tuple)) else document


def read_json(path: str | os.PathLike, what: str) -> Any:
    """The document, or ValueError naming the file and `what` it should have been."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no {path} ({what})") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} ({what}) is not readable: {error}") from error


@contextlib.contextmanager
def only_one(folder: str | os.PathLike) -> Iterator[None]:
    """Two runs in one folder undo each other's work: ValueError while another one is alive there.

    `.lock` names machine, process and its start, so that what a killed run left behind is known for that and taken
    over: at once on the same machine, after SILENT_S on another one.
    """
    lock = Path(folder) / ".lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    mine = json.dumps(
        {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time(), "at": time.time()}
    )
    _acquire(lock, mine)
    over = threading.Event()
    beat = threading.Thread(target=_beat, args=(lock, over), name="lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        over.set()
        beat.join()
        with contextlib.suppress(OSError):
            if lock.read_text() == mine:
                lock.unlink()


def _beat(lock: Path, over: threading.Event) -> None:
    while not over.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(lock)


def _acquire(lock: Path, mine: str) -> None:
    while True:
        with _mutex(lock.parent):
            with contextlib.suppress(FileNotFoundError):
                if holder := _holder(lock.read_text(), lock.stat().st_mtime):
                    raise ValueError(
                        f"{holder} is at work in {lock.parent}: wait for its end, or choose another folder (if you "
                        f"know that it is gone, delete {lock})"
                    )
                lock.unlink()
            with contextlib.suppress(FileExistsError), open(lock, "x") as file:
                file.write(mine)
                return


@contextlib.contextmanager
def _mutex(folder: Path) -> Iterator[None]:
    """For the instant in which a lock is judged and written: two that find a dead one must not both take it over."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot; then "x" alone must do
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _holder(text: str, touched: float) -> str | None:
    """Who has written the lock, if that run is alive."""
    silent = time.time() - touched
    try:
        found = json.loads(text)
        host, pid, started = str(found["host"]), int(found["pid"]), float(found["started"])
    except (ValueError, KeyError, TypeError):
        return "a run that is just starting" if silent < BEAT_S else None
    if host != socket.gethostname():
        return f"process {pid} on {host} (heard of {silent:.0f} s ago)" if silent < SILENT_S else None
    try:
        process = psutil.Process(pid)
        alive = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 5
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        alive = True
    return f"process {pid} on this machine" if alive else None
