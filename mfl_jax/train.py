"""`mfl train`: one linear loop, for every method, on one device or many processes.

The order within a turn is fixed: evaluate, save, refresh, next batch, step. What is evaluated and saved is then always
the state before the step of that number, and a run that is stopped and started again repeats nothing and skips nothing.
"""

import contextlib
import fnmatch
import functools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mfl_jax import config as configs
from mfl_jax import data, evaluators, methods, optim, preempt, sharding, trees, watch
from mfl_jax.checkpoint import Checkpoints
from mfl_jax.evaluators import Embedded, embed_pass
from mfl_jax.methods.base import Method
from mfl_jax.metrics import Metrics, check_writers
from mfl_jax.step import State, averaged, init_state, make_step
from mfl_jax.watch import TrainingFailed

__all__ = ["Plan", "TrainingFailed", "check_unchanged", "plan", "train"]

# Keys that change no number of a run, or are checked where they do: the hash of the tile set is kept with the stream.
FREE = ("name", "log_every", "profile_at", "writers", "checkpoint.*", "mesh.*", "sharding", "evals", "evals.*")
FREE_DATA = ("data.tileset", "data.stall_timeout", "data.on_bad")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A config, read and checked: nothing here is compiled and no data are read."""

    name: str
    facts: data.Facts
    method: Method
    tx: optax.GradientTransformation
    mesh: jax.sharding.Mesh
    rules: tuple
    total: int
    seed: int
    batch: int
    accumulate: int
    ema: float
    log_every: int
    save_every: int
    keep: int
    keep_every: int
    profile_at: int
    writers: tuple[str, ...]
    evaluators: tuple[evaluators.Evaluator, ...]
    source: data.Source


def plan(
    config: ConfigDict,
    *,
    source: data.Source | None = None,
    facts: data.Facts | None = None,
    override: bool = False,
) -> Plan:
    """ValueError for whatever is wrong with a config: a key that is missing or has no effect, a value out of range."""
    reading = configs.Reading(config)
    loop = {
        "seed": configs.whole(reading, "seed", 0),
        "batch": configs.whole(reading.data, "batch", 1),
        "accumulate": configs.whole(reading, "accumulate", 1),
        "log_every": configs.whole(reading, "log_every", 1),
        "save_every": configs.whole(reading.checkpoint, "every", 0),
        "keep": configs.whole(reading.checkpoint, "keep", 2),
        "keep_every": configs.whole(reading.checkpoint, "keep_every", 0),
        "profile_at": configs.whole(reading, "profile_at", -1),
    }
    if not 0 <= reading.ema < 1:
        raise ValueError(f"ema is {reading.ema}; it is 0 (off) or a decay below 1, such as 0.999")
    check_writers(tuple(reading.writers))
    rows, rest = divmod(loop["batch"], loop["accumulate"])
    mesh = sharding.mesh_for(rows, dict(reading.mesh.items()))
    if rest or rows % mesh.shape[sharding.DATA]:
        devices = "" if rest else f"{mesh.shape[sharding.DATA]} devices x "
        raise ValueError(
            f"data.batch is {loop['batch']}, which is not a multiple of {devices}{loop['accumulate']} accumulated "
            "slices"
        )
    given, facts = facts is not None, facts or data.facts(reading.data)
    total = data.total_steps(reading.total, loop["batch"], facts.examples)
    built = Plan(
        name=reading.name,
        facts=facts,
        method=methods.make(reading, facts, mesh),
        tx=optim.make(reading.optim, total_steps=total, batch=loop["batch"], examples=facts.examples),
        mesh=mesh,
        rules=tuple(reading.sharding),
        total=total,
        ema=reading.ema,
        writers=tuple(reading.writers),
        evaluators=evaluators.make(reading.evals, facts, mesh),
        source=source or data.source(reading.data, reading.seed, override),
        **loop,
    )
    if built.method.refresh is not None:
        _check_survey(built, reading.data)
    reading.check_all_read(but="data." if given and source else "")
    return built


def _check_survey(run: Plan, reading: Any) -> None:
    if reading.share != 1:
        raise ValueError(
            f"data.share is {reading.share}, and {run.name} looks at every tile of the split now and then: what it "
            "finds would be of tiles that are not trained on. Leave it at 1, and give a split with fewer cases"
        )
    if not hasattr(run.source, "everything"):
        raise ValueError(f"{run.name} looks at every tile of the split now and then; the source has no everything()")


def train(
    config: ConfigDict,
    workdir: Path,
    *,
    source: data.Source | None = None,
    facts: data.Facts | None = None,
    progress: bool = True,
    override: bool = False,
    stop_at: int | None = None,
) -> State:
    """Train in `workdir`, or go on where the run in it was. Returns the last state, saved.

    source and facts replace the tile set of config.data. `override` goes on although config or data have changed; what
    has is written to the metrics. `stop_at` ends before that step, as a SIGTERM would.
    ValueError: a wrong request (config, workdir, data). TrainingFailed: the numbers went wrong. OSError: a save failed.
    """
    preempt.initialize()
    run = plan(config, source=source, facts=facts, override=override)
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(preempt.locked(workdir))
        end = run.total if stop_at is None else min(stop_at, run.total)
        state, saved, parts = _open(stack, run, config, workdir, end=end, override=override, progress=progress)
        step = int(state.step)
        last_saved = step if saved else -1
        evaluated = step if saved.get("evaluated") else -1

        # ---- the loop: evaluate, save, refresh, next batch, step; do not change this order ----
        while True:
            stopping = preempt.asked_to_stop()
            last = stopping or step >= end
            if step > evaluated and not stopping:
                _evaluate(run, parts, state, step, end)
                evaluated = step
            if step > last_saved and (last or (run.save_every and step and step % run.save_every == 0)):
                _save(parts, state, step, evaluated == step)
                last_saved = step
            if last:
                break
            if run.method.refresh is not None and run.method.refresh.due(step):
                try:
                    state = _refresh(run, parts, state, step)
                except Told:
                    continue  # nothing has changed: it is saved as it was, and refreshed by the run that goes on
            batch = _next_batch(parts, step, end)
            parts.profile.before(step, state)
            with jax.transfer_guard("disallow"):
                state, values = parts.compiled(state, batch)
            parts.watched.dispatched(step, values, batch.get("id"))
            parts.checkpoints.check()
            step += 1
        parts.checkpoints.wait()
        if stopping:
            log.warning("asked to stop: saved at step %d; the same command goes on from there", step)
        return state


class Told(Exception):  # noqa: N818
    """The run was asked to stop in the midst of a survey."""


@dataclass(frozen=True)
class Parts:
    """What is open while a run is at work."""

    metrics: Metrics
    checkpoints: Checkpoints
    stream: Any
    batches: Any
    compiled: Any  # the step; None where none is left to do
    profile: watch.Profile
    watched: watch.Watch


def _open(
    stack: contextlib.ExitStack,
    run: Plan,
    config: ConfigDict,
    workdir: Path,
    *,
    end: int,
    override: bool,
    progress: bool,
) -> tuple[State, dict[str, Any], Parts]:
    """The newest checkpoint that verifies, or a fresh state; what was saved with it; the stream from there on and the
    step, compiled. The stack closes all of it."""
    primary = jax.process_index() == 0
    metrics = stack.enter_context(
        contextlib.closing(Metrics(workdir, run.writers, config.to_dict(), jax.process_index()))
    )
    changed = check_unchanged(config, workdir, override)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=run.keep, keep_every=run.keep_every)
    stack.enter_context(contextlib.closing(checkpoints))
    places, like, example = _shapes(run)
    state, saved = _start(run, checkpoints, places, like, example)
    step = int(state.step)
    stream = run.source(step, saved.get("stream"))
    stack.callback(getattr(stream, "close", lambda: None))
    batches = sharding.prefetch(data.checked(stream, run.facts, run.batch), run.mesh)
    stack.callback(batches.close)
    _note_start(metrics, checkpoints, (*changed, *getattr(stream, "overridden", ())))
    if primary:
        _describe(config, run.facts, workdir, state, progress)
    compiled = _compile(run, places, like, example) if step < end else None
    profile = stack.enter_context(contextlib.closing(watch.Profile(workdir / "profile", run.profile_at)))
    options: dict[str, Any] = {"name": run.name, "start": step, "total": run.total, "batch": run.batch}
    watched = watch.Watch(metrics, every=run.log_every, progress=progress and primary, **options)
    stack.enter_context(contextlib.closing(watched))
    return state, saved, Parts(metrics, checkpoints, stream, batches, compiled, profile, watched)


def _evaluate(run: Plan, parts: Parts, state: State, step: int, end: int) -> None:
    if due := [e for e in run.evaluators if e.due(step, end)]:
        parts.watched.flush()
        for evaluator in due:
            parts.metrics.write(step, evaluator(run.method, averaged(state)))
        parts.watched.paused()


def _save(parts: Parts, state: State, step: int, evaluated: bool) -> None:
    parts.watched.flush()
    described: dict[str, Any] = getattr(parts.stream, "state", dict)()
    meta = {"stream": {**described, "step": step} if described else None, "evaluated": evaluated}
    parts.checkpoints.save(step, state, meta)
    parts.watched.paused()


def _refresh(run: Plan, parts: Parts, state: State, step: int) -> State:
    parts.watched.flush()
    began = time.perf_counter()
    state, values = refreshed(run, state, preempt.asked_to_stop)
    parts.metrics.write(step, values | {"refresh/seconds": time.perf_counter() - began})
    parts.watched.paused()
    return state


def _next_batch(parts: Parts, step: int, end: int) -> dict[str, Any]:
    asked = time.perf_counter()
    batch = next(parts.batches, None)
    parts.watched.waited(time.perf_counter() - asked)
    if batch is None:
        raise ValueError(f"the source ended before step {step}, of {end}")
    return batch


def refreshed(
    run: Plan, state: State, asked_to_stop: Callable[[], bool] = lambda: False
) -> tuple[State, dict[str, float]]:
    """The state with what the method's refresh makes of the whole split, and its metrics. Told, where a survey is
    interrupted."""

    def until_told(stream: Iterable[Any]) -> Iterator[Any]:
        for batch in stream:
            if asked_to_stop():
                raise Told
            yield batch

    def survey(embed: Any, params: Any, extra: Any) -> Embedded:
        with contextlib.closing(source.everything()) as stream:
            return embed_pass(embed, params, extra, until_told(stream), run.mesh)

    source: Any = run.source  # plan() has seen that it has everything()
    assert run.method.refresh is not None
    extra, values = run.method.refresh.fn(state, survey)
    return replace(state, extra=extra), dict(values)


def _shapes(run: Plan) -> tuple[Any, Any, Any]:
    """(where each leaf of the state lies, the state as shapes, a batch as shapes)"""
    example = data.abstract_batch(run.facts, run.batch, run.mesh)
    shapes = jax.eval_shape(functools.partial(init_state, run.method, run.tx, run.seed, ema=run.ema), example)
    places = sharding.place(shapes, run.mesh, run.rules)
    like = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places)
    return places, like, example


def _start(run: Plan, checkpoints: Checkpoints, places: Any, like: Any, example: Any) -> tuple[State, dict[str, Any]]:
    """(the state to go on from, what was saved with it); {} where the run is new."""
    if (restored := checkpoints.restore(like)) is not None:
        return restored[1], restored[2]
    create = functools.partial(init_state, run.method, run.tx, run.seed, example, ema=run.ema)
    return jax.jit(create, out_shardings=places)(), {}


def _compile(run: Plan, places: Any, like: Any, example: Any) -> Any:
    """Ahead of time: a batch of another shape is then an error and no second compilation."""
    step = make_step(run.method, run.tx, accumulate=run.accumulate, ema=run.ema)
    whole = NamedSharding(run.mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(places, whole)).lower(like, example).compile()


def _note_start(metrics: Metrics, checkpoints: Checkpoints, changed: tuple[str, ...]) -> None:
    for step, fault in checkpoints.faults.items():
        metrics.note(step, checkpoint_set_aside=fault)
    if changed:
        metrics.note(-1, changed=list(changed))


def _describe(config: ConfigDict, facts: data.Facts, workdir: Path, state: State, progress: bool) -> None:
    """Leaves config.json, facts.json and parameters.txt in the workdir, and prints the parameters of each part."""
    if (workdir / "facts.json").exists():  # of a run that went on with other data, what it has seen is all of them
        seen = json.loads((workdir / "facts.json").read_text())["train_cases"]
        facts = replace(facts, train_cases=tuple(dict.fromkeys((*seen, *facts.train_cases))))
    texts = {"config.json": configs.to_json(config), "facts.json": json.dumps(data.facts_document(facts), indent=1)}
    for name, text in (texts | {"parameters.txt": trees.overview(state.params)}).items():
        part = workdir / f"{name}.part"
        part.write_text(text + "\n")
        part.replace(workdir / name)
    if progress:
        print(watch.summary(state.params))


def check_unchanged(config: ConfigDict, workdir: Path, override: bool = False) -> tuple[str, ...]:
    """A run goes on with the config it was started with; a change that could alter its numbers is refused."""
    path = workdir / "config.json"
    if not path.exists():
        return ()
    stored = configs.completed(json.loads(path.read_text()))
    old, new = (configs.flatten(of) for of in (stored, json.loads(configs.to_json(config))))
    names = [k for k in sorted(old | new) if old.get(k) != new.get(k)]
    told = {k: f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in names}
    bound = [told[k] for k in names if not any(fnmatch.fnmatch(k, free) for free in (*FREE, *FREE_DATA))]
    if bound and not override:
        raise ValueError(
            f"the run in {workdir} was started with another config: {'; '.join(bound)}. Put it back, use another "
            "workdir, or pass --override on purpose"
        )
    return tuple(told.values())
