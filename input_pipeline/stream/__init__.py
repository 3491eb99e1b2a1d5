"""Batches as a pure function of (seed, step): the same on any number of hosts and threads, after any number of stops.

Batch t holds positions t*batch..(t+1)*batch-1 of an endless order (order.py). An epoch of n examples is n positions and
holds each example exactly once; nothing is dropped, so where the batch does not divide n, one batch in every epoch has
the last examples of one epoch and the first of the next. The state of a stream is its step.
"""

import difflib
import hashlib
import json
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from input_pipeline import order
from input_pipeline.cores import available_cores
from input_pipeline.neighbours import Neighbours
from input_pipeline.stream import executors
from input_pipeline.stream.batches import Batches
from input_pipeline.stream.fetching import BAD, Plan, decoded_bytes
from input_pipeline.stream.watchdog import Watchdog
from input_pipeline.tileset import TileSet

CHUNK = 16  # rows; small, so that memory and the time to the first batch stay small
BAD_SHARE = 0.001
OF_SLIDES = ("case", "slide")
BAD_ALLOWED = 10  # bad tiles that are tolerated however few examples were seen
ENDLESS = 1 << 62
KEEP = 512 << 20
Batch = dict[str, np.ndarray]
log = logging.getLogger(__name__)


class StreamError(ValueError):
    """Arguments that make no stream, a state of another stream, or too many bad tiles."""


def train_stream(
    tileset: TileSet,
    *,
    batch: int,
    seed: int,
    start_step: int = 0,
    split: str | None = "train",
    host: tuple[int, int] = (0, 1),
    near_um: float | None = None,
    far_um: float | None = None,
    share: float = 1.0,
    balance: str | None = None,
    blocks: tuple[int, int] | None = None,
    partners: Sequence[str] | None = None,
    require: Sequence[str] = (),
    columns: Sequence[str] = (),
    on_bad: str = "raise",
    executor: str = "auto",
    threads: int | None = None,
    prefetch: int = 2,
    stall_timeout: float | None = 300,
    nice: int = 0,
    keep: int = KEEP,
    state: Mapping[str, Any] | None = None,
    override: bool = False,
) -> "Stream":
    """An endless stream of this host's slices of the global batches.

    near_um   adds near_he, near_id and near_mask: a tile of the same slide within that distance, or the tile itself
    far_um    adds far_he, far_id and far_mask in the same way: a tile of the same slide beyond that distance
    share     of the split's tiles that are used at all, the same ones whatever the seed (few labels)
    balance   'case', 'slide', or a column of classes: every one of them once a round (order.balanced), instead of every
              tile once an epoch
    blocks    (records a block, blocks a window) reads nearly in disk order (order.blockwise), for remote storage
    partners  those to decode (default all); `require` names partners without which a tile is bad
    on_bad    'replace' puts another tile, drawn by position, for a bad one; 'raise' stops and names it
    nice      0 to 19: how far readers step back, where the cores that they decode on are those that compute
    keep      bytes of memory for decoded tiles: where all that are used fit in, threads decode each of them once (near
              and far tiles again, but those that were drawn themselves before)
    state     continues where `Stream.state()` of an earlier run was; a difference is refused, or with `override` logged
    """
    _check_choice("balance", balance, (None, *_classes(tileset)))
    _check_choice("on_bad", on_bad, ("raise", "replace"))
    _check_int("seed", seed, 0, 2**63 - 1)
    _check_int("keep", keep, 0, 2**63 - 1)
    _check_order(balance, blocks, share)
    plan, offsets = _plan(tileset, batch, host, split, partners, require, columns, on_bad, seed, by=balance)
    plan = replace(plan, selection=plan.selection.part(share)) if share < 1 else plan
    if batch > len(plan.selection):
        raise StreamError(f"batch {batch} is larger than the {len(plan.selection)} tiles used of split {split!r}")
    index = _index(len(plan.selection), seed, balance, blocks, offsets)
    near = None if near_um is None else Neighbours(tileset, near_um)
    far = None if far_um is None else Neighbours(tileset, np.inf, _checked_far(far_um))
    plan = replace(plan, index=index, near=near, far=far)
    radius = None if near_um is None else float(near_um)
    arguments: dict[str, Any] = {"batch": int(batch), "split": split, "near_um": radius, "balance": balance}
    arguments |= {"far_um": float(far_um)} if far_um is not None else {}  # absent from states of earlier streams
    arguments |= {"share": float(share)} if share < 1 else {}
    arguments |= {"blocks": [int(b) for b in blocks] if blocks else None}
    arguments |= {"require": sorted(require), "order": order.VERSION}
    identity = _identity(tileset, seed, arguments)
    changed = check_state(state, identity, override=override) if state is not None else ()
    step = start_step if state is None else state["step"]
    _check_int("start_step", step, 0, 2**40)
    plan = replace(plan, kept={}) if decoded_bytes(plan) <= keep else plan
    stream = Stream(plan, executor, threads, prefetch, stall_timeout, identity, start_step=step, nice=nice)
    stream.overridden = changed
    return stream


def _check_order(balance: str | None, blocks: tuple[int, int] | None, share: float) -> None:
    if balance and blocks:
        raise StreamError("balance and blocks are two different orders: give one of them")
    if not 0 < share <= 1:
        raise StreamError(f"share is {share}; it is above 0, and 1 for every tile")
    if share < 1 and (balance or blocks):
        raise StreamError("a share of the tiles is drawn in uniform order alone: leave out balance and blocks")


def _index(size: int, seed: int, balance: str | None, blocks: tuple[int, int] | None, offsets: np.ndarray) -> Callable:
    """Positions -> places among the tiles used."""
    if balance:
        assert offsets is not None
        return partial(order.balanced, seed=seed, offsets=offsets)
    if blocks:
        return partial(order.blockwise, seed=seed, size=size, block=blocks[0], window=blocks[1])
    return partial(order.uniform, seed=seed, size=size)


def eval_stream(
    tileset: TileSet,
    *,
    batch: int,
    split: str | None = None,
    host: tuple[int, int] = (0, 1),
    partners: Sequence[str] | None = None,
    require: Sequence[str] = (),
    columns: Sequence[str] = (),
    on_bad: str = "raise",
    executor: str = "auto",
    threads: int | None = None,
    prefetch: int = 2,
    stall_timeout: float | None = 300,
    nice: int = 0,
) -> "Stream":
    """Every tile of the split (None: of the set) exactly once, by id; the last batch is padded with mask False, id -1.

    Every host gives the same number of batches. on_bad='mask' leaves a bad tile's row as padding; 'raise' stops.
    """
    _check_choice("on_bad", on_bad, ("raise", "mask"))
    plan, _ = _plan(tileset, batch, host, split, partners, require, columns, on_bad, seed=0)
    plan = replace(plan, stop=len(plan.selection))
    arguments: dict[str, Any] = {"batch": int(batch), "split": split, "evaluation": True, "require": sorted(require)}
    return Stream(plan, executor, threads, prefetch, stall_timeout, _identity(tileset, 0, arguments), nice=nice)


def check_state(state: Mapping[str, Any], now: Mapping[str, Any], *, override: bool = False) -> tuple[str, ...]:
    """What differs between a saved state and the stream that is to continue it; refused unless `override` says so."""
    if not {"step", "seed", "tileset", "stream", "arguments"} <= set(state):
        raise StreamError(f"not the state of a stream: {sorted(state)}")
    old, new = ({"seed": s["seed"], "tile set": s["tileset"], **s["arguments"]} for s in (state, now))
    names = sorted(old | new)
    changed = tuple(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in names if old.get(k) != new.get(k))
    if not changed and state["stream"] != now["stream"]:
        changed = (f"stream hash: {state['stream']} -> {now['stream']}",)
    if changed and not override:
        raise StreamError(
            "the run was started with another stream, and would not see the examples it should: "
            f"{'; '.join(changed)}. Put it back, start a new run, or override this on purpose"
        )
    for difference in changed:
        log.warning("continuing with another stream, as told: %s", difference)
    return changed


class Stream:
    """An iterator of batches (dicts of arrays). Close it, or use it in `with`; the end of the process closes it too."""

    def __init__(
        self,
        plan: Plan,
        executor: str,
        threads: int | None,
        prefetch: int,
        stall_timeout: float | None,
        identity: Mapping[str, Any],
        start_step: int = 0,
        nice: int = 0,
    ):
        workers = available_cores() if threads is None else threads
        _check_int("threads", workers, 1, 1024)
        _check_int("prefetch", prefetch, 0, 1024)
        _check_int("nice", nice, 0, 19)
        self._plan, self._identity, self.step = plan, identity, start_step
        self.steps = None if plan.stop is None else -(-plan.stop // plan.batch)
        self.bad: dict[int, str] = {}  # id -> what was wrong, of the tiles replaced or masked so far
        self.bad_count = 0
        self.seen = 0
        self.overridden: tuple[str, ...] = ()
        last = ENDLESS if self.steps is None else self.steps * plan.chunks
        first, ahead = start_step * plan.chunks, prefetch * plan.chunks
        self.executor = executors.choose(executor, workers, last - first)
        window = -(-(workers + ahead) // plan.chunks) + 2
        self._batches = Batches(plan, window, self.executor == "processes", nice)
        self._watchdog = None
        if stall_timeout is not None:
            self._watchdog = Watchdog(stall_timeout, "the stream", self._batches.dump)
        run = executors.tfdata if self.executor == "tfdata" else executors.threads
        done = run(self._batches.write, first, last, workers=workers, ahead=ahead)
        self._done = self._batches.closed_after(done)
        self._close = weakref.finalize(self, _close, self._done, self._watchdog)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        if self.step == self.steps:
            self.close()
            raise StopIteration
        if not self._close.alive:
            raise StreamError("the stream is closed")
        try:
            batch = self._collect()
            if not self._close.alive:
                raise StreamError("the stream was closed by another thread")
            self._count_bad(batch.pop(BAD), int(batch["mask"].sum()))
        except BaseException:
            self.close()
            self._done.close()  # where another thread had closed the stream, it left that to this one
            raise
        self.step += 1
        return batch

    def state(self) -> dict[str, Any]:
        """What `train_stream(state=...)` continues from: JSON, of the same size at every step."""
        return {"step": self.step, **self._identity}

    def close(self) -> None:
        self._close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _collect(self) -> Batch:
        with self._watchdog or nullcontext():
            for _ in range(self._plan.chunks):
                next(self._done)
        return self._batches.pop(self.step)

    def _count_bad(self, bad: np.ndarray, examples: int) -> None:
        self.seen += examples
        for tile in bad[bad >= 0].tolist():
            if tile not in self.bad:
                self.bad[tile] = self._plan.reasons.get(tile, "")
                log.warning("bad tile: %s", self.bad[tile])
            self.bad_count += 1
        if self.bad_count > max(BAD_ALLOWED, BAD_SHARE * self.seen):
            raise StreamError(
                f"{self.bad_count} of {self.seen} examples were bad, more than {BAD_SHARE:.1%} and {BAD_ALLOWED}: run "
                f"verify and write their slides again. The last: {self.bad[tile]}"
            )


def _close(done: executors.Done, watchdog: Watchdog | None) -> None:
    try:
        with watchdog or nullcontext():
            done.close()
    except ValueError:
        log.debug("another thread waits in the stream, and ends it")
    finally:
        if watchdog is not None:
            watchdog.stop()


def _plan(
    tileset: TileSet,
    batch: int,
    host: tuple[int, int],
    split: str | None,
    partners: Sequence[str] | None,
    require: Sequence[str],
    columns: Sequence[str],
    on_bad: str,
    seed: int,
    by: str | None = None,
) -> tuple[Plan, np.ndarray]:
    index, count = host
    _check_int("host count", count, 1, 2**20)
    _check_int("host index", index, 0, count - 1)
    _check_int("batch", batch, 1, 2**24)
    if batch % count:
        raise StreamError(f"batch {batch} is not a multiple of the {count} hosts; {batch - batch % count or count} is")
    names = [p.name for p in tileset.spec.partners]
    wanted = names if partners is None else list(partners)
    _check_names("partner", [*wanted, *require], names)
    _check_names("column", columns, list(tileset.tiles))
    if double := set(columns) & {"id", "mask", *names}:
        raise StreamError(f"columns {sorted(double)} have the names of other arrays of a batch")
    if lost := set(require) - set(wanted):
        raise StreamError(f"partners {sorted(lost)} are required and not among those to decode, {wanted}")
    spec = replace(tileset.spec, partners=tuple(p for p in tileset.spec.partners if p.name in wanted))
    selection, offsets = select(tileset, split, by)
    rows = batch // count
    plan = Plan(tileset, selection, np.asarray, seed, batch, rows, index, _chunk(rows), spec)
    plan = replace(plan, columns=tuple(columns), require=tuple(require), on_bad=on_bad)
    return plan, offsets


def _chunk(rows: int) -> int:
    """The largest divisor up to CHUNK, or all rows where that is so small that calls would cost more than it saves."""
    best = max(c for c in range(1, min(rows, CHUNK) + 1) if rows % c == 0)
    return best if best >= CHUNK // 4 else rows


def select(tileset: TileSet, split: str | None, by: str | None = None) -> tuple[order.Selection, np.ndarray]:
    """The tiles of a split, in ranges that lie group by group, and the offsets of the groups (of the column `by`)."""
    ranges = tileset.ranges(split)
    if not len(ranges):
        raise StreamError(f"split {split!r} has no tiles; there are {sorted(tileset.splits)}")
    if by is None:
        return order.Selection.of(ranges), np.zeros(0, np.int64)
    if by not in OF_SLIDES:
        return _by_class(np.concatenate([np.arange(a, b) for a, b in ranges]), np.asarray(tileset.tiles[by]))
    starts, stops = tileset.first_row[:-1], tileset.first_row[1:]
    inside = np.searchsorted(ranges[:, 0], starts, side="right") - 1
    kept = (stops > starts) & (inside >= 0) & (stops <= ranges[np.maximum(inside, 0), 1])
    slides = np.stack([starts, stops], axis=1)[kept]
    codes = np.asarray(tileset.tiles[by])[slides[:, 0]]
    arranged = np.argsort(codes, kind="stable")
    selection = order.Selection.of(slides[arranged])
    first = np.flatnonzero(np.diff(codes[arranged], prepend=-1))
    return selection, np.append(selection.offsets[first], len(selection))


def _by_class(ids: np.ndarray, column: np.ndarray) -> tuple[order.Selection, np.ndarray]:
    """As `select`; the tiles of a class do not lie together, so that there are as many ranges as tiles."""
    codes = column[ids]
    if codes.dtype.kind == "f" and not (np.isfinite(codes).all() and (codes % 1 == 0).all()):
        raise StreamError("balance names a column of classes, which are whole numbers: this one holds others")
    arranged = np.argsort(codes, kind="stable")
    first = np.flatnonzero(np.diff(codes[arranged], prepend=codes.min() - 1))
    ids = ids[arranged]
    return order.Selection.of(np.stack([ids, ids + 1], 1)), np.append(first, len(ids))


def _classes(tileset: TileSet) -> list[str]:
    """Columns whose values may be groups; columns that the user gave are floats, whatever they hold."""
    columns = [name for name, values in tileset.tiles.items() if values.dtype.kind in "iubf"]
    return [*OF_SLIDES, *(name for name in columns if name not in (*OF_SLIDES, "x", "y"))]


def _identity(tileset: TileSet, seed: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """on_bad, columns and whatever sets the speed are left out: they do not change which tiles a batch holds."""
    text = json.dumps(arguments, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"seed": int(seed), "tileset": tileset.hash, "stream": digest, "arguments": arguments}


def _checked_far(far_um: float) -> float:
    if not 0 < far_um < np.inf:
        raise StreamError(f"far_um is a distance in um, above 0 and finite, not {far_um!r}")
    return far_um


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise StreamError(f"{name} is a whole number from {low} to {high}, not {value!r}")


def _check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise StreamError(f"{name} is one of {list(allowed)}, not {value!r}")


def _check_names(what: str, given: Sequence[str], allowed: list[str]) -> None:
    if isinstance(given, str):
        raise StreamError(f"a list of {what}s is expected, not the text {given!r}")
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(str(name), allowed, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {sorted(allowed)}"
            raise StreamError(f"the tile set has no {what} {name!r}; {hint}")
