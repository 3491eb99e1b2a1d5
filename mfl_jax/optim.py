"""Optimisers of optax, schedules, and rules by parameter name.

    make({"name": "adamw", "lr": 1e-4, "warmup": "10 epochs", "weight_decay": 0.05}, total_steps=9000, batch=256, ...)

Keys: name sgd|adam|adamw|lars|lamb; lr, lr_batch (the batch that lr is meant for: lr scales with the batch; 0: it
does not), schedule constant|cosine|linear|step, warmup, end (the last lr as a part of lr), milestones and factor (of
`step`), weight_decay, weight_decay_end (cosine towards it), clip_norm (of all gradients together), clip_each (of each
variable's); and of the optimisers that have them momentum, nesterov, b1, b2, eps, trust. Their defaults stand below.

A duration is a number of steps, or '10 epochs', '1e6 examples', '5%' (of the run), '200 steps'.
Rules are (pattern of a whole name, value): decay (times weight_decay), lr_rules (times lr), freeze (True, False, or a
duration). The first that matches counts, and they must cover every parameter; without decay rules, `kernel`s decay.
A step that the guard skips leaves the count as it was, so schedules count the steps that were taken.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mfl_jax import trees

Schedule = Callable[[Any], Any]

COMMON: dict[str, Any] = {
    "name": "adam", "lr": 1e-4, "lr_batch": 0, "schedule": "cosine", "warmup": 0, "end": 0.0, "milestones": (),
    "factor": 0.1, "weight_decay": 0.0, "weight_decay_end": None, "clip_norm": 0.0, "clip_each": 0.0, "decay": (),
    "lr_rules": (), "freeze": (),
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "nesterov": False},
    "adam": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    "lars": {"momentum": 0.9, "nesterov": False, "trust": 1e-3},
    "lamb": {"b1": 0.9, "b2": 0.999, "eps": 1e-6},
}


def make(
    config: Any, *, total_steps: int, batch: int | None = None, examples: int | None = None
) -> optax.GradientTransformation:
    """The whole optimiser. `config` is anything with items(). Rules are checked against the names of the parameters
    when it is initialised, all else here."""
    clock = Clock(total_steps, batch, examples)
    s = read(config)
    lr, decay = learning_rate(s, clock), weight_decay(s, clock)
    until = [(p, frozen_steps(value, clock)) for p, value in trees.rule_pairs(s["freeze"], "optim.freeze")]
    tx = optax.chain(*clips(s), *direction(s, lr, decay))
    if any(0 < steps < math.inf for _, steps in until):
        tx = thaw(tx, until)

    def labels(params: Any) -> Any:
        return trees.map_named(lambda name, _: "frozen" if lookup(until, name, 0) == math.inf else "free", params)

    if any(steps == math.inf for _, steps in until):
        tx = optax.partition({"free": tx, "frozen": optax.set_to_zero()}, labels)

    def init(params: Any) -> Any:
        for key in ("decay", "lr_rules", "freeze"):
            if s[key]:
                trees.match(s[key], params, f"optim.{key}")
        return tx.init(params)

    return optax.GradientTransformation(init, tx.update)


def schedule(config: Any, *, total_steps: int, batch: int | None = None, examples: int | None = None) -> Schedule:
    """step -> learning rate, as `make` uses it; for logs and plots."""
    return learning_rate(read(config), Clock(total_steps, batch, examples))


def read(config: Any) -> dict[str, Any]:
    """All settings, defaults filled in; ValueError for one that is unknown, or that this optimiser does not have."""
    given = dict(config.items())
    name = given.get("name", COMMON["name"])
    if name not in OWN:
        raise ValueError(f"optim.name is one of {', '.join(OWN)}, not {name!r}")
    known = COMMON | OWN[name]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            owners = [other for other in OWN if key in OWN[other]]
            hint = f"; it belongs to {', '.join(owners)}" if owners else f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"optim.{key} has no effect on {name}{hint}. There are {', '.join(sorted(known))}")
    settings = known | given
    for key, usual in known.items():
        value = settings[key]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(usual, float) and not (number and 0 <= value < math.inf):
            raise ValueError(f"optim.{key} is a finite number that is not negative, not {value!r}")
    if not settings["lr"] > 0:
        raise ValueError(
            f"optim.lr is above 0, not {settings['lr']!r}; to keep parameters as they are, use optim.freeze"
        )
    return settings


class Clock(NamedTuple):
    """What durations are measured by."""

    total: int
    batch: int | None = None
    examples: int | None = None  # in an epoch

    def steps(self, duration: Any, key: str) -> int:
        """A duration in steps, rounded to the nearest."""
        text = str(duration).strip()
        found = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*(steps?|epochs?|examples?|%)?", text)
        if not found or isinstance(duration, bool):
            raise ValueError(f"{key} is a duration, such as 500, '10 epochs', '1e6 examples' or '5%', not {duration!r}")
        number, unit = float(found[1]), (found[2] or "steps").rstrip("s")
        if unit == "%":
            return round(number * self.total / 100)
        if unit == "step":
            return round(number)
        if self.batch is None or (unit == "epoch" and self.examples is None):
            raise ValueError(
                f"{key}={duration!r} needs a known {'batch' if self.batch is None else 'size of the data'}"
            )
        return round(number * (self.examples or 1 if unit == "epoch" else 1) / self.batch)


def learning_rate(s: Mapping[str, Any], clock: Clock) -> Schedule:
    if s["lr_batch"] and clock.batch is None:
        raise ValueError(f"optim.lr_batch={s['lr_batch']} needs a known batch")
    peak = s["lr"] * (clock.batch or 1) / s["lr_batch"] if s["lr_batch"] else s["lr"]
    warmup = clock.steps(s["warmup"], "optim.warmup")
    rest = clock.total - warmup
    if rest <= 0:
        raise ValueError(f"optim.warmup={s['warmup']!r} is {warmup} steps, but the run has only {clock.total}")
    milestones = [clock.steps(m, "optim.milestones") - warmup for m in s["milestones"]]
    if (s["schedule"] == "step") != bool(milestones) or any(m <= 0 for m in milestones):
        raise ValueError(f"optim.milestones come after the warm-up and with schedule='step' only: {s['milestones']!r}")
    shapes: dict[str, Callable[[], Schedule]] = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, s["end"]),
        "linear": lambda: optax.linear_schedule(peak, peak * s["end"], rest),
        "step": lambda: optax.piecewise_constant_schedule(peak, dict.fromkeys(milestones, s["factor"])),
    }
    if s["schedule"] not in shapes:
        raise ValueError(f"optim.schedule is one of {', '.join(shapes)}, not {s['schedule']!r}")
    main = shapes[s["schedule"]]()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup]) if warmup else main


def weight_decay(s: Mapping[str, Any], clock: Clock) -> Schedule:
    start, end = s["weight_decay"], s["weight_decay_end"]
    if end is None:
        return optax.constant_schedule(start)
    return lambda step: cosine(step, clock.total, start, end)


def cosine(step: Any, total: int, start: float, end: float) -> Any:
    """From start to end along half a cosine, then constant."""
    part = jnp.clip(step / total, 0.0, 1.0)
    return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * part))


def lookup(rules: Sequence[tuple[str, Any]], name: str, default: Any) -> Any:
    return next((value for pattern, value in rules if re.fullmatch(pattern, name)), default)


def frozen_steps(value: Any, clock: Clock) -> float:
    if isinstance(value, bool):
        return math.inf if value else 0
    return clock.steps(value, "optim.freeze")


def clips(s: Mapping[str, Any]) -> list[optax.GradientTransformation]:
    each = [optax.stateless(lambda updates, _: clip_each(updates, s["clip_each"]))] if s["clip_each"] else []
    return each + ([optax.clip_by_global_norm(s["clip_norm"])] if s["clip_norm"] else [])


def clip_each(updates: Any, limit: float) -> Any:
    """Each variable's gradient by its own norm, as Keras' clipnorm, which optax lacks."""
    norm = lambda g: jnp.sqrt(jnp.sum(jnp.square(g.astype(jnp.float32))))  # noqa: E731
    return jax.tree.map(lambda g: (g * jnp.minimum(1.0, limit / jnp.maximum(norm(g), 1e-12))).astype(g.dtype), updates)


def direction(s: Mapping[str, Any], lr: Schedule, decay: Schedule) -> list[optax.GradientTransformation]:
    """What follows the clipping. The decay of sgd, adam and lars is part of the gradient, as in torch."""
    name = s["name"]
    rules = s["decay"] or ((r"(.*/)?kernel", 1.0),)
    decays = lambda leaf: lookup(rules, leaf, 0.0)  # noqa: E731
    step = by_name(lambda count, leaf, u, p: u * (-lr(count) * lookup(s["lr_rules"], leaf, 1.0)))
    shrink = by_name(lambda count, leaf, u, p: u + (decay(count) * decays(leaf)) * p if decays(leaf) else u)
    shrinking = [shrink] if s["weight_decay"] or s["weight_decay_end"] else []
    masked = lambda tx: optax.masked(tx, lambda tree: trees.map_named(lambda leaf, _: decays(leaf) > 0, tree))  # noqa: E731
    if name in ("sgd", "lars"):
        trace = [optax.trace(s["momentum"], s["nesterov"])] if s["momentum"] else []
        if name == "sgd":
            return [*shrinking, *trace, step]
        return [*shrinking, masked(optax.scale_by_trust_ratio(trust_coefficient=s["trust"])), step, *trace]
    adam = optax.scale_by_adam(s["b1"], s["b2"], s["eps"])
    if name == "adam":
        return [*shrinking, adam, step]
    return [adam, *shrinking, *([masked(optax.scale_by_trust_ratio())] if name == "lamb" else []), step]


def by_name(change: Callable[..., Any]) -> optax.GradientTransformation:
    """change(count, name, update, parameter) -> update, for every leaf."""

    def update(updates: Any, count: Any, params: Any = None) -> Any:
        if params is None:
            raise ValueError("this optimiser needs the parameters: update(gradients, state, params)")
        new = trees.map_named(lambda name, u, p: change(count, name, u, p).astype(u.dtype), updates, params)
        return new, optax.safe_increment(count)

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def thaw(inner: optax.GradientTransformation, until: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Leaves whose rule gives a number of steps neither send gradients in (to be clipped with) nor move before it."""

    def hold(tree: Any, count: Any) -> Any:
        return trees.map_named(lambda name, u: jnp.where(count >= lookup(until, name, 0), u, 0).astype(u.dtype), tree)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        count, held = state
        updates, held = inner.update(hold(updates, count), held, params)
        return hold(updates, count), (optax.safe_increment(count), held)

    return optax.GradientTransformation(lambda params: (jnp.zeros((), jnp.int32), inner.init(params)), update)


def ema(old: Any, new: Any, decay: Any) -> Any:
    """The moving average of parameters: decay * old + (1 - decay) * new, in the type of `old`."""
    return jax.tree.map(lambda o, n: (o + (1 - decay) * (n.astype(jnp.float32) - o)).astype(o.dtype), old, new)


def ema_decay(step: Any, total: int, start: float = 0.996, end: float = 1.0) -> Any:
    """The teacher's schedule of BYOL and DINO: cosine from start to end."""
    return cosine(step, total, start, end)
