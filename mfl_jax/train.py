"""`mfl train`: one linear loop, for every method, on one device or many processes.

The order within a turn is fixed: evaluate, save, next batch, step. What is evaluated and saved is then always the state
before the step of that number, and a run that is stopped and started again repeats nothing and skips nothing.
"""

import contextlib
import fnmatch
import functools
import json
import logging
import time
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
    mesh = sharding.make_mesh(dict(reading.mesh.items()))
    pieces = mesh.shape[sharding.DATA] * loop["accumulate"]
    if loop["batch"] % pieces:
        raise ValueError(
            f"data.batch is {loop['batch']}, which is not a multiple of {mesh.shape[sharding.DATA]} devices x "
            f"{loop['accumulate']} accumulated slices"
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
    reading.check_all_read(but="data." if given and source else "")
    return built


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
    primary = jax.process_index() == 0
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(preempt.locked(workdir))
        metrics = Metrics(workdir, run.writers, config.to_dict(), jax.process_index())
        stack.enter_context(contextlib.closing(metrics))
        changed = check_unchanged(config, workdir, override)
        checkpoints = Checkpoints(workdir / "checkpoints", keep=run.keep, keep_every=run.keep_every)
        stack.enter_context(contextlib.closing(checkpoints))

        # ---- the newest checkpoint that verifies, or a fresh state; the stream from there on; the step, compiled ----
        places, like, example = _shapes(run)
        state, saved = _start(run, checkpoints, places, like, example)
        step = int(state.step)
        end = run.total if stop_at is None else min(stop_at, run.total)
        stream = run.source(step, saved.get("stream"))
        stack.callback(getattr(stream, "close", lambda: None))
        batches = sharding.prefetch(data.checked(stream, run.facts, run.batch), run.mesh)
        stack.callback(batches.close)
        _note_start(metrics, checkpoints, (*changed, *getattr(stream, "overridden", ())))
        if primary:
            _describe(config, run.facts, workdir, state, progress)
        compiled: Any = _compile(run, places, like, example) if step < end else None  # a run that has ended
        profile = stack.enter_context(contextlib.closing(watch.Profile(workdir / "profile", run.profile_at)))
        options: dict[str, Any] = {"name": run.name, "start": step, "total": run.total, "batch": run.batch}
        watched = watch.Watch(metrics, every=run.log_every, progress=progress and primary, **options)
        stack.enter_context(contextlib.closing(watched))

        # ---- the loop: evaluate, save, next batch, step; do not change this order ----
        last_saved = step if saved else -1
        evaluated = step if saved.get("evaluated") else -1
        while True:
            stopping = preempt.asked_to_stop()
            due = [e for e in run.evaluators if e.due(step, end)] if step > evaluated and not stopping else []
            if due:
                watched.flush()
                for evaluator in due:
                    metrics.write(step, evaluator(run.method, averaged(state)))
                watched.paused()
            evaluated = evaluated if stopping else step
            last = stopping or step >= end
            if step > last_saved and (last or (run.save_every and step and step % run.save_every == 0)):
                watched.flush()
                described: dict[str, Any] = getattr(stream, "state", dict)()
                meta = {"stream": {**described, "step": step} if described else None, "evaluated": evaluated == step}
                checkpoints.save(step, state, meta)
                last_saved = step
                watched.paused()
            if last:
                break
            if run.method.refresh is not None and step % run.method.refresh.every == 0:
                state = replace(state, extra=run.method.refresh.fn(state))
            asked = time.perf_counter()
            batch = next(batches, None)
            watched.waited(time.perf_counter() - asked)
            if batch is None:
                raise ValueError(f"the source ended before step {step}, of {end}")
            profile.before(step, state)
            with jax.transfer_guard("disallow"):
                state, values = compiled(state, batch)
            watched.dispatched(step, values, batch.get("id"))
            checkpoints.check()
            step += 1
        checkpoints.wait()
        if stopping:
            log.warning("asked to stop: saved at step %d; the same command goes on from there", step)
        return state


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
    old, new = (configs.flatten(json.loads(t)) for t in (path.read_text(), configs.to_json(config)))
    names = [k for k in sorted(old | new) if old.get(k) != new.get(k)]
    told = {k: f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in names}
    bound = [told[k] for k in names if not any(fnmatch.fnmatch(k, free) for free in (*FREE, *FREE_DATA))]
    if bound and not override:
        raise ValueError(
            f"the run in {workdir} was started with another config: {'; '.join(bound)}. Put it back, use another "
            "workdir, or pass --override on purpose"
        )
    return tuple(told.values())
