"""What joint-embedding methods share: towers (encoder and projector), views of a batch, the loss of a pair."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mfl_jax import losses, models, views
from mfl_jax.data import Facts
from mfl_jax.methods.base import Batch, Metrics

PairLoss = Callable[..., tuple[jax.Array, Metrics]]
OBJECTIVES = ("info_nce", "vicreg", "barlow")


@dataclass(frozen=True)
class Tower:
    """An encoder and the projector on top of it; the projector is thrown away after training."""

    encoder: models.Model
    projector: models.Model
    dtype: Any

    def init(self, rng: jax.Array, x: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
        encoder, encoder_stats = self.encoder.init(jax.random.fold_in(rng, 0), x)
        features = jax.ShapeDtypeStruct((x.shape[0], self.encoder.dim), jnp.float32)
        projector, projector_stats = self.projector.init(jax.random.fold_in(rng, 1), features)
        return {"encoder": encoder, "projector": projector}, {"encoder": encoder_stats, "projector": projector_stats}

    def __call__(
        self, params: Any, stats: Any, x: jax.Array, rng: jax.Array, *, train: bool = True
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """-> features, projection, new statistics."""
        options: dict[str, Any] = {"train": train, "rng": rng, "dtype": self.dtype}
        features, encoder = self.encoder.apply(params["encoder"], stats["encoder"], x, **options)
        z, projector = self.projector.apply(params["projector"], stats["projector"], features, **options)
        return features, z, {"encoder": encoder, "projector": projector}

    def features(self, params: Any, stats: Any, x: jax.Array) -> jax.Array:
        return self.encoder.apply(params["encoder"], stats["encoder"], x, train=False, dtype=self.dtype)[0]


def tower(encoder: str, projector: str, dtype: str) -> Tower:
    model = models.make(encoder)
    return Tower(model, models.make_head(projector, model.dim), compute_dtype(dtype))


def compute_dtype(name: str) -> Any:
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {name!r}; allowed: float32, bfloat16 (parameters and losses are float32 in both)")
    return jnp.dtype(name)


def view_plan(reading: Any, facts: Facts, *names: str) -> views.Plan:
    """The training views of the named modalities; views.size is the side of each in pixels where it is not given."""
    specs = {name: getattr(reading.views, name) for name in names}
    sized = {n: views.Modality(m.kind, m.channels, reading.views.size) for n, m in facts.modalities.items()}
    return views.plan(specs, sized, paired_geometry=reading.views.paired_geometry)


def crop_plan(reading: Any, facts: Facts) -> views.Plan:
    """Large and small crops of the same tile: views.he, and views.local of side views.local_size, where it is not ''.
    Their keys differ by name, so that the first small crop is not drawn as the first large one."""
    of, size = facts.modalities["he"], reading.views.size
    specs, sizes = {"he": reading.views.he}, {"he": size, "local": reading.views.local_size}
    if reading.views.local:
        specs["local"] = reading.views.local
    return views.plan(specs, {n: views.Modality(of.kind, of.channels, sizes[n]) for n in specs}, paired_geometry=False)


def crops(plan: views.Plan, rng: jax.Array, batch: Batch) -> list[jax.Array]:
    """All views of a crop_plan, the large ones first."""
    seen = plan(rng, dict.fromkeys(("he", "local"), batch["he"]))
    return [*seen["he"], *seen.get("local", ())]


def eval_view(reading: Any, facts: Facts, name: str = "he") -> Callable[[jax.Array], jax.Array]:
    """The view of evaluation: views.eval (views.eval_<partner>), in which nothing is random."""
    spec = getattr(reading.views, "eval" if name == "he" else f"eval_{name}")
    modality = facts.modalities[name]
    view = views.parse(spec, size=reading.views.size, kind=modality.kind, channels=modality.channels)
    return lambda images: view(jax.random.key(0), images)


def aligned(branches: Mapping[str, Tower], looks: Mapping[str, Callable[[jax.Array], jax.Array]]) -> dict[str, Any]:
    """Method.align of a method that keeps the tower of every modality under its name: one entry a partner that has a
    view of evaluation."""

    def project(name: str, params: Any, extra: Any, batch: Batch) -> jax.Array:
        unused = jax.random.key(0)
        return branches[name](params[name], extra[name], looks[name](batch[name]), unused, train=False)[1]

    def both(partner: str, params: Any, extra: Any, batch: Batch) -> dict[str, jax.Array]:
        return {name: project(name, params, extra, batch) for name in ("he", partner)}

    return {name: functools.partial(both, name) for name in looks if name != "he"}


def eval_views(reading: Any, facts: Facts, names: tuple[str, ...]) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Of the H&E, and of the partners whose view of evaluation the config has: runs of before did not say it."""
    told = [name for name in names if name == "he" or f"eval_{name}" in reading.views]
    return {name: eval_view(reading, facts, name) for name in told}


def check_partners(wanted: tuple[str, ...], facts: Facts, where: str) -> tuple[str, ...]:
    if not wanted or (missing := [p for p in wanted if p not in facts.modalities or p == "he"]):
        have = sorted(set(facts.modalities) - {"he"})
        raise ValueError(f"{where} names {missing if wanted else 'no partner'}; data.partners reads {have}")
    return wanted


def check_second(second: str, facts: Facts, where: str) -> str:
    """What the second view is of: 'same' is the tile itself, 'near' the near tile that stands beside it."""
    if second not in ("same", "near") or (second == "near" and "near_he" not in facts.shapes):
        raise ValueError(f"{where} is {second!r}; allowed: 'same', or 'near' with data.near_um above 0")
    return second


def pair_loss(reading: Any, mesh: jax.sharding.Mesh) -> PairLoss:
    """The objective of two projections of the same tiles: loss(a, b, mask=, slide=, log_scale=).

    With mask_same_slide, tiles of one slide are not each other's negatives: neighbours often show the same tissue.
    """
    name = reading.objective
    if name == "info_nce":
        same, block = reading.mask_same_slide, reading.block
        options = {"temperature": reading.temperature, "block": block or None, "mesh": mesh if block else None}

        def contrast(a, b, *, mask=None, slide=None, log_scale=None):
            return losses.info_nce(a, b, mask=mask, group=slide if same else None, log_scale=log_scale, **options)

        return contrast
    if name == "vicreg":
        released = reading.released_balance
        return lambda a, b, *, mask=None, slide=None, log_scale=None: losses.vicreg(a, b, mask=mask, released=released)
    if name == "barlow":
        redundancy = reading.redundancy
        return lambda a, b, *, mask=None, slide=None, log_scale=None: losses.barlow(
            a, b, mask=mask, redundancy=redundancy
        )
    raise ValueError(f"the objective is {name!r}; allowed: {', '.join(OBJECTIVES)}")


def learnt_scale(reading: Any) -> dict[str, jax.Array]:
    """{'log_scale': ...} where the temperature is learnt, else nothing; part of params."""
    if reading.objective != "info_nce" or not reading.learn_temperature:
        return {}
    return {"log_scale": jnp.log(jnp.float32(1 / reading.temperature))}


def diagnosed(z: jax.Array, other: jax.Array | None = None) -> Metrics:
    """Signs of collapse, and the alarm as 0 or 1."""
    metrics = losses.collapse(z, other)
    return metrics | {"collapsed": losses.looks_collapsed(metrics).astype(jnp.float32)}


def batch_mask(batch: Batch, name: str = "") -> jax.Array:
    """Rows that count: no padding, and the partner there."""
    return batch["mask"] & batch[f"{name}_mask"] if name else batch["mask"]


def named_metrics(prefix: str, metrics: Mapping[str, jax.Array]) -> Metrics:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
