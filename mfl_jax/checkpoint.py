"""Checkpoints that are known to be whole, on Orbax. The only file that imports orbax.

Orbax restores flipped bytes and changed dtypes without a word. So a step is written to `<step>.part`, with its meta
and the SHA-256 of each of its files, and then renamed: what has its final name is complete, and what differs from its
digests was damaged later. That is set aside in `broken/`, and the one before is used. Leaves are stored by name, so a
checkpoint says what it holds and a mismatch can be named.
"""

import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mfl_jax.trees import named_leaves

VERSION = 1
DIGESTS, META, STATE = "digests.json", "meta.json", "state"
log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """No checkpoint can be used, or one does not fit the program."""


class Checkpoints:
    """Saves in the background; keeps the newest `keep` steps, and every step that is a multiple of `keep_every`.

    Two are kept at least: the newest may turn out to be damaged. All processes call all methods, in the same order.
    """

    def __init__(self, folder: Path, *, keep: int = 3, keep_every: int = 0):
        self.folder = folder.absolute()
        self.faults: dict[int, str] = {}  # step -> why it was set aside
        self._keep, self._keep_every = max(keep, 2), keep_every
        self._primary = jax.process_index() == 0
        self._writer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if self._primary:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.glob("*.part"):
                shutil.rmtree(part)
        _meet("checkpoint folder")

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Returns when the state is copied; `check` or `wait` later says whether it reached the disk."""
        self.wait()
        named = named_leaves(state)
        described = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in named.items()}
        document = {"version": VERSION, "step": step, "leaves": described, "meta": dict(meta)}
        part = self.folder / f"{step}.part"
        part.mkdir(exist_ok=True)
        self._writer.save(part / STATE, args=ocp.args.StandardSave(named))
        self._thread = threading.Thread(target=self._finish, args=(part, document), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raises what a save in the background has run into (a full disk, say)."""
        if self._error is not None:
            error, self._error = self._error, None
            raise OSError(f"a checkpoint could not be written: {error}") from error

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self.check()
            _meet("checkpoint written")

    def steps(self) -> list[int]:
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit())

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, meta) of the newest checkpoint that verifies; None where there is none at all.

        `like` is a tree of ShapeDtypeStruct with shardings: on any devices, not only on as many as have saved.
        """
        found = self.steps()
        step = _agreed(self._newest_whole(found) if self._primary else None)
        if step is not None:
            return step, *self._read(step, like)
        broken = self.folder / "broken"
        if found or broken.is_dir():
            why = "".join(f"; step {s}: {f}" for s, f in self.faults.items())
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be used{why}. The damaged ones are in {broken}: put a whole one "
                f"back from a copy; or, to start from the beginning, remove {broken} or use another workdir"
            )
        return None

    def close(self) -> None:
        """Waits for what is being written; raises nothing, for it is called when something else has been raised."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            log.error("a checkpoint could not be written: %s", self._error)
        self._writer.close()

    def _finish(self, part: Path, document: Mapping[str, Any]) -> None:
        """On a thread of its own: complete the part, name it, and only then remove what is no longer kept."""
        try:
            self._writer.wait_until_finished()
            if self._primary:
                (part / META).write_text(json.dumps(document, indent=1))
                write_digests(part)
                part.replace(part.with_suffix(""))
                self._prune()
        except BaseException as error:
            self._error = error

    def _prune(self) -> None:
        for step in self.steps()[: -self._keep]:
            if not self._keep_every or step % self._keep_every:
                shutil.rmtree(self.folder / str(step))

    def _newest_whole(self, steps: list[int]) -> int | None:
        for step in reversed(steps):
            fault = _verify(self.folder / str(step))
            if fault is None:
                return step
            log.warning("checkpoint of step %d is not used: %s", step, fault)
            self.faults[step] = fault
            target = self.folder / "broken" / str(step)
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            (self.folder / str(step)).replace(target)
        return None

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        folder = self.folder / str(step)
        document = json.loads((folder / META).read_text())
        wanted = named_leaves(like)
        check_fits(wanted, document["leaves"], f"checkpoint of step {step}")
        restored = self._writer.restore(folder / STATE, args=ocp.args.StandardRestore(wanted))
        return from_names(like, restored), document["meta"]


def read(folder: Path, like: Mapping[str, Any]) -> tuple[int, Any, str]:
    """(step, tree, digest of the whole) of the newest checkpoint that verifies, without touching what lies there: it
    may be another process's. `like` names the parts of the state that are read ({'params': shapes, ...}).
    """
    faults = {}
    for step in sorted((int(p.name) for p in folder.glob("*") if p.name.isdigit()), reverse=True):
        faults[step] = _verify(folder / str(step))
        if faults[step] is None:
            return (
                step,
                _read_parts(folder / str(step), like),
                json.loads((folder / str(step) / DIGESTS).read_text())[DIGESTS],
            )
    why = "; ".join(f"step {s}: {f}" for s, f in faults.items())
    raise CheckpointError(f"there is no checkpoint in {folder} that can be used" + (f": {why}" if why else ""))


def _read_parts(folder: Path, like: Mapping[str, Any]) -> Any:
    stored = json.loads((folder / META).read_text())["leaves"]
    wanted = named_leaves(like)
    check_fits(
        wanted, {n: v for n, v in stored.items() if n.split("/")[0] in like}, f"checkpoint of step {folder.name}"
    )
    arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        options = ocp.args.PyTreeRestore(item=wanted, restore_args=arguments, partial_restore=True)
        return from_names(like, reader.restore(folder.absolute() / STATE, args=options))


def _meet(where: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def _agreed(step: int | None) -> int | None:
    """What process 0 has found."""
    if jax.process_count() == 1:
        return step
    chosen = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return None if chosen < 0 else chosen


def from_names(like: Any, named: Mapping[str, Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in named_leaves(like)])


def check_fits(wanted: Mapping[str, Any], stored: Mapping[str, Any], what: str) -> None:
    """Nothing is cast or broadcast: names, shapes and dtypes are equal, or an error lists the first five faults."""
    faults = []
    for name in sorted(set(wanted) | set(stored)):
        if name not in stored:
            faults.append(f"{name} is missing")
        elif name not in wanted:
            faults.append(f"{name} is unknown to this program")
        else:
            shape, dtype = tuple(stored[name][0]), stored[name][1]
            if (shape, dtype) != (tuple(wanted[name].shape), str(np.dtype(wanted[name].dtype))):
                faults.append(
                    f"{name} is {dtype}{list(shape)}, expected {wanted[name].dtype}{list(wanted[name].shape)}"
                )
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(f"{what} does not fit the config: {'; '.join(faults[:5])}{more}")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != DIGESTS}


def write_digests(folder: Path) -> None:
    """The digest of every file, and under its own name that of the list, so that damage to the list is not blamed on
    a file it names."""
    digests = {name: _digest(path) for name, path in _files(folder).items()}
    (folder / DIGESTS).write_text(json.dumps(digests | {DIGESTS: _sum(digests)}, indent=1))


def _sum(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None when it is whole and of this version."""
    try:
        expected = json.loads((folder / DIGESTS).read_text())
    except (OSError, ValueError) as error:
        return f"{DIGESTS} is not readable: {error}"
    if not isinstance(expected, dict) or META not in expected:
        return f"{DIGESTS} does not list {META}"
    if expected.pop(DIGESTS, None) != _sum(expected):
        return f"{DIGESTS} has changed since it was written"
    found = _files(folder)
    for name in sorted(set(expected) | set(found)):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} does not belong to it"
        if _digest(found[name]) != expected[name]:
            return f"{name} has changed since it was written"
    version = json.loads((folder / META).read_text())["version"]
    return None if version == VERSION else f"it has version {version!r}, this program reads version {VERSION}"
