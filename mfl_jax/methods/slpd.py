"""SLPD: DINO on the regions of slides, drawn towards prototypes of their own slide and of the slide most like it.

Now and then the teacher looks at every region of the split. The regions of each slide are clustered into a few
prototypes, and each slide gets as neighbours those whose prototypes are most like its own (prototypes.py). From then on
every crop of a region is also to be what the teacher's present last layer says of the region's prototype (intra), and
of the prototype that stands for it in the neighbour (inter). Prototypes, assignments and neighbours are in `extra`,
beside what DINO keeps there.

The options of DINO are under `dino`, these under `slpd`:
k, iterations, restarts    of the clustering
min_regions  slides with fewer are not clustered: their regions train DINO's loss alone, as all do before `start`
start, every durations: before which step the teacher looks for the first time, and how often from then on
neighbours   of each slide; with several, the mean of what they say
apart        'slide': they are any other slides; 'case': of other patients alone, as the slides of one are alike anyway
transfer     'matched': prototypes of two slides are matched one to one; 'argmax': each takes the most alike, as
             the released code does
intra, inter weights of the two terms; 0 leaves one out, and without both it is DINO
centres      'own': each term centres its logits by their own moving mean; 'shared': by one of both, as released

Labels are looked at in the metrics of a refresh alone: whether neighbours are of one kind.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mfl_jax import data, losses, optim, prototypes, sharding
from mfl_jax.config import whole
from mfl_jax.data import Facts
from mfl_jax.methods import dino, towers
from mfl_jax.methods.base import Batch, Method, Refresh, Survey

TABLES = ("prototypes", "assignment", "eligible", "neighbour", "transfer")
CENTRES = ("own", "shared")
APART = ("slide", "case")
TERMS = ("intra", "inter")


def make(reading: Any, facts: Facts, mesh: jax.sharding.Mesh) -> Method:
    options, parts = reading.slpd, dino.parts(reading, facts)
    weights = {name: getattr(options, name) for name in TERMS}
    terms = [name for name in TERMS if weights[name]]
    centres = {"own": {n: f"centre_{n}" for n in terms}, "shared": dict.fromkeys(terms, "centre_prototypes")}
    asked = _checked(options, facts, weights, reading)
    centre_of = centres[asked["centres"]]

    def init(rng: jax.Array, batch: Batch):
        params, extra = parts.init(rng, batch)
        dim, out = parts.teacher.head.dim, parts.teacher.last.dim
        centred = {name: jnp.zeros(out) for name in centre_of.values()}
        tables = _no_tables(facts, asked["k"], asked["neighbours"], dim) if terms else {}
        return params, extra | centred | tables

    def loss(params, extra, batch: Batch, rng: jax.Array, step: jax.Array):
        seen, mask = parts.see(params, extra, batch, rng), towers.batch_mask(batch)
        value, (out, metrics) = parts.self_loss(seen, extra, mask, step)
        metrics |= {"loss_self": value}
        for name in terms:
            vectors, there = looked_up(extra, batch["id"], batch["slide"], mask, name)
            logits = _last_layer(parts, extra, vectors)
            targets = losses.centred_targets(logits, extra[centre_of[name]], parts.temperature(step))
            cold: dict[str, Any] = {"temperature": parts.student_temperature, "mask": there.any(1)}
            term, _ = losses.prototype_ce(seen.student.logits, _mean_of(targets, there), **cold)
            value += weights[name] * term
            share = losses.masked_mean(there.any(1).astype(jnp.float32), mask)
            metrics |= {f"loss_{name}": term, f"share_{name}": share}
            sums = losses.row_sums(logits.swapaxes(0, 1), there.T)
            before = out.get(centre_of[name])
            out[centre_of[name]] = jax.tree.map(jnp.add, before, sums) if before else sums
        return value, (out, metrics)

    def update(params, extra, out, step):
        kept = {name: extra[name] for name in TABLES if terms}
        for name in centre_of.values():
            kept[name] = losses.next_centre(extra[name], out[name], parts.centre_momentum)
        return parts.updated(params, extra, out, step) | kept

    def bottleneck(params, extra, batch: Batch):
        slow = extra["teacher"]
        return {"region": parts.teacher.bottleneck(slow["params"], slow["stats"], parts.look(batch["he"]))}

    def refresh(state: Any, survey: Survey):
        found = survey(bottleneck, state.params, state.extra)
        tables, metrics = _tables(state, found, facts, asked, mesh)
        placed = {name: sharding.put_whole(array, state.extra[name].sharding) for name, array in tables.items()}
        return state.extra | placed, metrics

    looks = Refresh(asked["every"], asked["start"], refresh) if terms else None
    return Method(init, loss, update, parts.embed, looks)


def looked_up(
    extra: Any, example: jax.Array, slide: jax.Array, mask: jax.Array, term: str
) -> tuple[jax.Array, jax.Array]:
    """(prototypes [B, n, D], which of them there are [B, n]) of rows: the own one (intra), the neighbours' (inter)."""
    cluster = extra["assignment"][jnp.maximum(example, 0)]
    there = mask & (cluster >= 0)
    slide, cluster = jnp.where(there, slide, 0), jnp.where(there, cluster, 0)
    if term == "intra":
        return extra["prototypes"][slide, cluster][:, None], there[:, None]
    neighbour = extra["neighbour"][slide]
    taken = jnp.take_along_axis(extra["transfer"][slide], cluster[:, None, None], 2)[..., 0]
    there = there[:, None] & (neighbour >= 0)
    return extra["prototypes"][jnp.where(there, neighbour, 0), jnp.where(there, taken, 0)], there


def _last_layer(parts: dino.Parts, extra: Any, vectors: jax.Array) -> jax.Array:
    """What the teacher says at present of prototypes [B, n, D]."""
    logits = parts.teacher.logits(extra["teacher"]["params"], vectors.reshape(-1, vectors.shape[-1]))
    return jax.lax.stop_gradient(logits.reshape(*vectors.shape[:2], -1))


def _mean_of(targets: jax.Array, there: jax.Array) -> jax.Array:
    """[B, K] of [B, n, K]: of those that are there; of none, of all, so that it is a distribution."""
    share = jnp.where(there.any(1, keepdims=True), there, True).astype(jnp.float32)
    return jnp.einsum("bnk,bn->bk", targets, share / share.sum(1, keepdims=True))


def _no_tables(facts: Facts, k: int, neighbours: int, dim: int) -> dict[str, jax.Array]:
    return {
        "prototypes": jnp.zeros((facts.slides, k, dim)),
        "assignment": jnp.full(facts.records, -1, jnp.int32),
        "eligible": jnp.zeros(facts.slides, bool),
        "neighbour": jnp.full((facts.slides, neighbours), -1, jnp.int32),
        "transfer": jnp.full((facts.slides, neighbours, k), -1, jnp.int32),
    }


def _tables(
    state: Any, found: Any, facts: Facts, asked: Mapping[str, Any], mesh: jax.sharding.Mesh
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """What is in TABLES after a look at every region, and how it differs from what was there before."""
    step, slide = int(state.step), found.columns["slide"].astype(np.int64)
    key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(np.asarray(state.rng))), np.int32(step))
    key = jax.random.fold_in(key, prototypes.KEY)
    turns = {name: asked[name] for name in ("iterations", "restarts")}
    made = prototypes.cluster(
        key, found.features["region"], slide, facts.slides, asked["k"], least=asked["min_regions"], mesh=mesh, **turns
    )
    kin = _cases(slide, found.columns["case"], made.eligible) if asked["apart"] == "case" else None
    near = prototypes.neighbours(
        made.vectors, made.eligible, asked["neighbours"], kin=kin, transfer=asked["transfer"], mesh=mesh
    )
    assignment = np.full(facts.records, -1, np.int32)
    assignment[found.ids] = made.assignment
    before = {name: np.asarray(state.extra[name]) for name in ("assignment", "neighbour", "eligible")}
    metrics = prototypes.described(made, near) | prototypes.kinds(near, slide, found.columns)
    metrics |= prototypes.changes(before["assignment"][found.ids], made.assignment, slide, before["neighbour"], near)
    tables = {"prototypes": made.vectors, "assignment": assignment, "eligible": made.eligible}
    tables |= {"neighbour": near.slide, "transfer": near.transfer}
    return tables, {f"refresh/{name}": value for name, value in metrics.items()}


def _cases(slide: np.ndarray, case: np.ndarray, eligible: np.ndarray) -> np.ndarray:
    """[S], of regions [N]."""
    of_slide = prototypes.one_of(slide, case, len(eligible))
    if len(unknown := np.flatnonzero(eligible & (of_slide < 0))):
        raise ValueError(
            f"the regions of slide {unknown[0]} are not of one case ({len(unknown)} such slides), which slpd.apart = "
            "'case' must know: mend the tile set, or take slpd.apart = 'slide'"
        )
    return of_slide


def _checked(options: Any, facts: Facts, weights: Mapping[str, float], reading: Any) -> dict[str, Any]:
    """The options, in steps where they are durations."""
    counts = {"k": 1, "iterations": 1, "restarts": 1, "min_regions": 1, "neighbours": 1}
    asked: dict[str, Any] = {name: whole(options, name, least) for name, least in counts.items()}
    batch = reading.data.batch
    clock = optim.Clock(data.total_steps(reading.total, batch, facts.examples), batch, facts.examples)
    asked |= {name: clock.steps(getattr(options, name), f"slpd.{name}") for name in ("start", "every")}
    asked["every"] = max(asked["every"], 1)
    if asked["min_regions"] < asked["k"]:
        raise ValueError(
            f"slpd.min_regions is {asked['min_regions']}, and so many regions make no slpd.k = {asked['k']} clusters: "
            "it is at least k"
        )
    for name, allowed in (("transfer", prototypes.TRANSFER), ("centres", CENTRES), ("apart", APART)):
        asked[name] = getattr(options, name)
        if asked[name] not in allowed:
            raise ValueError(f"slpd.{name} is {asked[name]!r}; allowed: {', '.join(allowed)}")
    for name, value in weights.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"slpd.{name} is {value}; it is a weight, 0 (off) or above")
    if not (facts.slides and facts.records):
        raise ValueError("how many slides and regions there are is not known: a run of an earlier release has no slpd")
    return asked
