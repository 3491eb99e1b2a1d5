"""DINO: a student that sees large and small crops of a tile gives each the class that a slow teacher gives another.

The classes are the directions of the last layer, which nobody named; the teacher, a moving mean of the student, sees
the large crops alone. So that it does not call everything the same, its logits are centred by their own moving mean, or
shared out evenly over the batch (Sinkhorn). Teacher, statistics and centre are in `extra`.

views       he: '2*...', the large crops, of views.size; local: '8*...', the small ones, of views.local_size ('': none)
centring    'centre' or 'sinkhorn'
embed       whose features evaluators see: the 'teacher's, or the 'student's
drop path   of the encoder's spec is the student's alone
BatchNorm   crops of one size are normalised together, and the teacher's by its own batch, as the student's are

Another method with the same student and teacher (slpd) builds on `parts`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mfl_jax import data, losses, models, optim
from mfl_jax.data import Facts
from mfl_jax.methods import towers
from mfl_jax.methods.base import Batch, Method, Metrics

CENTRING = ("centre", "sinkhorn")
EMBEDS = ("teacher", "student")


class Outputs(NamedTuple):
    """Of the views of a batch: [V, B, ...]."""

    features: jax.Array
    bottleneck: jax.Array  # of length 1
    logits: jax.Array


class Seen(NamedTuple):
    """Student and teacher on the views of a batch; the teacher's are the first of the student's."""

    student: Outputs
    teacher: Outputs
    stats: Any
    slow_stats: Any


@dataclass(frozen=True)
class Network:
    """An encoder, the head on it down to a bottleneck, and the last layer."""

    encoder: models.Model
    head: models.Model
    last: models.Model
    dtype: Any

    def init(self, rng: jax.Array, x: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        keys = [jax.random.fold_in(rng, number) for number in range(3)]
        inputs = [x, *(jax.ShapeDtypeStruct((2, m.dim), jnp.float32) for m in (self.encoder, self.head))]
        parts = {"encoder": self.encoder, "head": self.head, "last": self.last}
        made = {n: m.init(k, i) for (n, m), k, i in zip(parts.items(), keys, inputs, strict=True)}
        return {n: params for n, (params, _) in made.items()}, {n: made[n][1] for n in ("encoder", "head")}

    def __call__(self, params: Any, stats: Any, views: Sequence[jax.Array], rng: jax.Array) -> tuple[Outputs, Any]:
        """Views of training, those of one size in one pass; -> outputs, new statistics."""
        options: dict[str, Any] = {"train": True, "dtype": self.dtype}
        features, encoder = [], stats["encoder"]
        for number, same in enumerate(alike(views)):
            key = jax.random.fold_in(rng, number)
            found, encoder = self.encoder.apply(params["encoder"], encoder, together(same), rng=key, **options)
            features.append(found.reshape(-1, len(same), found.shape[-1]))
        rows = jnp.concatenate(features, 1)
        narrow, head = self.head.apply(params["head"], stats["head"], rows.reshape(-1, rows.shape[-1]), **options)
        z = losses.normalise(narrow)
        by_view = lambda y: y.reshape(*rows.shape[:2], -1).swapaxes(0, 1)  # noqa: E731
        outputs = Outputs(rows.swapaxes(0, 1), by_view(z), by_view(self.logits(params, z)))
        return outputs, {"encoder": encoder, "head": head}

    def logits(self, params: Any, bottleneck: jax.Array) -> jax.Array:
        """The last layer on any rows [B, D] of length 1: of a view, or of a prototype."""
        return self.last.apply(params["last"], {}, bottleneck, train=False, dtype=self.dtype)[0]

    def features(self, params: Any, stats: Any, x: jax.Array) -> jax.Array:
        return self.encoder.apply(params["encoder"], stats["encoder"], x, train=False, dtype=self.dtype)[0]

    def bottleneck(self, params: Any, stats: Any, x: jax.Array) -> jax.Array:
        """[B, D] of length 1, with nothing random and the statistics as they are."""
        rows = self.features(params, stats, x)
        return losses.normalise(self.head.apply(params["head"], stats["head"], rows, train=False, dtype=self.dtype)[0])


@dataclass(frozen=True)
class Parts:
    """What a DINO is made of. `see` and `self_loss` are its loss, `updated` and `embed` the rest; another loss can be
    made of what was seen, and more kept in `out` and `extra` beside what is here."""

    views: Callable[[jax.Array, Batch], list[jax.Array]]
    large: int  # so many views, the first ones, are the teacher's too
    look: Callable[[jax.Array], jax.Array]
    student: Network
    teacher: Network
    temperature: Callable[[Any], Any]  # of the teacher, by step
    momentum: Callable[[Any], Any]
    student_temperature: float
    centring: str
    centre_momentum: float
    embeds: str

    def init(self, rng: jax.Array, batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
        params, stats = self.student.init(rng, jax.eval_shape(self.views, rng, batch)[0])
        extra = {"he": stats, "teacher": jax.tree.map(jnp.copy, {"params": params, "stats": stats})}
        centred = {"centre": jnp.zeros(self.student.last.dim)} if self.centring == "centre" else {}
        return {"he": params}, extra | centred

    def see(self, params: Any, extra: Any, batch: Batch, rng: jax.Array) -> Seen:
        views, slow = self.views(rng, batch), extra["teacher"]
        student, stats = self.student(params["he"], extra["he"], views, jax.random.fold_in(rng, 1000))
        teacher, slow_stats = self.teacher(
            slow["params"], slow["stats"], views[: self.large], jax.random.fold_in(rng, 2000)
        )
        return Seen(student, jax.lax.stop_gradient(teacher), stats, slow_stats)

    def self_loss(self, seen: Seen, extra: Any, mask: jax.Array, step: Any) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """(loss, (out, metrics)), of the method contract."""
        logits, temperature = seen.teacher.logits, self.temperature(step)
        out = {"he": seen.stats, "slow": seen.slow_stats}
        if self.centring == "centre":
            targets = losses.centred_targets(logits, extra["centre"], temperature)
            out["centre"] = losses.row_sums(logits, mask)
        else:
            rows, kept = logits.swapaxes(0, 1), jnp.repeat(mask, self.large)
            shared = losses.sinkhorn_targets(rows.reshape(-1, rows.shape[-1]), temperature, mask=kept)
            targets = shared.reshape(rows.shape).swapaxes(0, 1)
        cold: dict[str, Any] = {"temperature": self.student_temperature, "mask": mask}
        value, metrics = losses.dino_ce(seen.student.logits, targets, **cold)
        metrics |= losses.distribution_signs(seen.student.logits[: self.large], targets, **cold)
        metrics |= {
            "teacher_temperature": jnp.float32(temperature),
            "teacher_momentum": jnp.float32(self.momentum(step)),
        }
        return value, (out, metrics | signs(seen, metrics))

    def updated(self, params: Any, extra: Any, out: Any, step: Any) -> dict[str, Any]:
        slow = optim.ema(extra["teacher"]["params"], params["he"], self.momentum(step))
        new = {"he": out["he"], "teacher": {"params": slow, "stats": out["slow"]}}
        if self.centring == "centre":
            new["centre"] = losses.next_centre(extra["centre"], out["centre"], self.centre_momentum)
        return new

    def embedding_of(self, params: Any, extra: Any) -> tuple[Network, Any, Any]:
        """(network, params, statistics) that evaluators see."""
        if self.embeds == "student":
            return self.student, params["he"], extra["he"]
        return self.teacher, extra["teacher"]["params"], extra["teacher"]["stats"]

    def embed(self, params: Any, extra: Any, batch: Batch) -> dict[str, jax.Array]:
        network, params, stats = self.embedding_of(params, extra)
        return {"he": network.features(params, stats, self.look(batch["he"]))}


def make(reading: Any, facts: Facts, mesh: jax.sharding.Mesh) -> Method:
    dino = parts(reading, facts)

    def loss(params, extra, batch: Batch, rng: jax.Array, step: jax.Array):
        return dino.self_loss(dino.see(params, extra, batch, rng), extra, towers.batch_mask(batch), step)

    return Method(dino.init, loss, dino.updated, dino.embed)


def parts(reading: Any, facts: Facts) -> Parts:
    """From config.dino, config.views and config.encoder."""
    options, views = reading.dino, towers.crop_plan(reading, facts)
    large, total = len(dict(views.views)["he"]), data.total_steps(reading.total, reading.data.batch, facts.examples)
    start, end = options.teacher_temperature_start, options.teacher_temperature
    warmup = optim.Clock(total, reading.data.batch, facts.examples).steps(options.teacher_warmup, "dino.teacher_warmup")
    momentum = options.momentum
    made = Parts(
        views=lambda rng, batch: towers.crops(views, rng, batch),
        large=large,
        look=towers.eval_view(reading, facts),
        student=network(reading.encoder, options, reading.dtype),
        teacher=network(still(reading.encoder), options, reading.dtype),
        temperature=lambda step: start + (end - start) * jnp.clip(step / warmup, 0.0, 1.0) if warmup else end,
        momentum=lambda step: optim.ema_decay(step, total, momentum),
        student_temperature=options.student_temperature,
        centring=options.centring,
        centre_momentum=options.centre_momentum,
        embeds=options.embed,
    )
    _check(made, (start, end), momentum)
    return made


def network(encoder: str, options: Any, dtype: str) -> Network:
    model = models.make(encoder)
    head = models.make_head(options.head, model.dim)
    last = models.make_head(f"directions,out={options.out}", head.dim)
    return Network(model, head, last, towers.compute_dtype(dtype))


def still(spec: str) -> str:
    """An encoder's spec without what is random in it while training."""
    name, *settings = spec.split(",")
    return ",".join([name, *(s for s in settings if s.partition("=")[0].strip() not in ("drop_path", "dropout"))])


def alike(views: Sequence[jax.Array]) -> list[list[jax.Array]]:
    """Neighbouring views of one shape, to be seen in one pass."""
    groups: list[list[jax.Array]] = []
    for view in views:
        if not groups or groups[-1][0].shape != view.shape:
            groups.append([])
        groups[-1].append(view)
    return groups


def together(views: Sequence[jax.Array]) -> jax.Array:
    """Views [B, ...] as one batch in which those of a row follow each other: rows that lie on a device stay there."""
    return jnp.stack(views, 1).reshape(-1, *views[0].shape[1:])


def signs(seen: Seen, metrics: Metrics) -> Metrics:
    """Of collapse: in the student's features, and in what the teacher says. The bottleneck is no place to look: what
    tells the classes apart can lie along few directions of it while the features are rich."""
    found = towers.diagnosed(*seen.student.features[:2])
    uniform, one = metrics["to_uniform"] < 1e-3, metrics["mixture_entropy"] < 1e-2
    return found | {"collapsed": jnp.maximum(found["collapsed"], (uniform | one).astype(jnp.float32))}


def _check(made: Parts, temperatures: tuple[float, float], momentum: float) -> None:
    if made.large < 2:
        raise ValueError(f"dino takes two large crops or more; views.he gives {made.large}: begin it with '2*'")
    for key, value, allowed in (("centring", made.centring, CENTRING), ("embed", made.embeds, EMBEDS)):
        if value not in allowed:
            raise ValueError(f"dino.{key} is {value!r}; allowed: {', '.join(allowed)}")
    if not min(*temperatures, made.student_temperature) > 0:
        raise ValueError(
            f"temperatures of dino are above 0; the teacher's are {temperatures}, the student's is "
            f"{made.student_temperature}"
        )
    for key, decay in (("momentum", momentum), ("centre_momentum", made.centre_momentum)):
        if not 0 <= decay < 1:
            raise ValueError(f"dino.{key} is {decay}; it is 0 or more and below 1")
