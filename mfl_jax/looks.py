"""What do encoders look at? Maps of a probe's answer, and how well they find what a partner shows to be there.

A section of results.json and its sheet of tiles, for `mfl eval` and for the demo. The partner is looked at to score the
maps, and by nothing else: maps are of the H&E alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from mfl_jax import arms, sharding, trained
from mfl_jax.evaluators import probe, saliency
from mfl_jax.evaluators.tasks import Task
from mfl_jax.report import pictures as sheets

if TYPE_CHECKING:
    from input_pipeline.tileset import Partner, TileSet

MARKER = "marker"  # what a channel is called, in any case of letters, that a truth is taken from unasked
TILES, DRAWN, STEPS = 120, 8, 8
MIXED = (0.2, 0.8)  # shares of a tile that hold some of both
NONE = "none"

Section = dict[str, Any]
Pictures = dict[str, np.ndarray]


class NothingToShow(ValueError):  # noqa: N818
    """No tile is fit for the picture."""


@dataclass(frozen=True)
class Encoder:
    """One arm, as its pictures need it: its first run, and the features of every tile."""

    title: str
    path: Path
    features: np.ndarray


@dataclass(frozen=True)
class Truth:
    """Where a partner shows something: where a channel of an image is bright, where a map has an object."""

    partner: str
    kind: str
    channel: int
    told: str

    def masks(self, images: np.ndarray) -> np.ndarray:
        """bool [N, H, W]; a ring that is bright is filled."""
        if self.kind == "map":
            return images[..., self.channel] > 0
        rings, _ = saliency.marker_masks(images[..., self.channel])
        return np.stack([ndimage.binary_fill_holes(ring) for ring in rings])


def truth_of(tileset: "TileSet", asked: str = "") -> Truth | None:
    """'if:MARKER' is a channel of an image, 'nuclei' the objects of a map. Unasked, a channel that is called a marker,
    else the first map; None where the set has neither, or 'none' is asked.
    """
    partners = {p.name: p for p in tileset.spec.partners if p.kind != "vector"}
    if not asked:
        for partner in partners.values():
            for number, name in enumerate(partner.channel_names or ()):
                if partner.kind == "image" and name.lower() == MARKER:
                    return _truth(partner, number)
        return next((_truth(p, 0) for p in partners.values() if p.kind == "map"), None)
    name, _, channel = asked.partition(":")
    if asked == NONE:
        return None
    if name not in partners:
        raise ValueError(f"no truth can be had of {name!r}; the tile set has {', '.join(partners) or 'no picture'}")
    names = list(partners[name].channel_names or [str(i) for i in range(partners[name].channels or 1)])
    if (channel or names[0]) not in names:
        raise ValueError(f"{name!r} has no channel {channel!r}; it has {', '.join(names)}")
    return _truth(partners[name], names.index(channel or names[0]))


def _truth(partner: "Partner", channel: int) -> Truth:
    names = partner.channel_names or ()
    told = f"{names[channel]} of {partner.name}" if len(names) > 1 and partner.kind == "image" else partner.name
    return Truth(partner.name, partner.kind, channel, told)


def check(task: Task, columns: Mapping[str, np.ndarray]) -> None:
    """ValueError unless the probe has one direction to look along."""
    target, known = task.read(columns)
    if task.regression or probe.count_classes(target, known) != 2:
        raise ValueError(f"saliency is of two classes; give {task.target!r} a threshold")


def section(
    encoders: Mapping[str, Encoder],
    columns: Mapping[str, np.ndarray],
    tileset: "TileSet",
    task: Task,
    truth: Truth | None,
    *,
    feature: str = "he",
    tiles: int = TILES,
) -> tuple[Section, Pictures]:
    """Integrated gradients of each arm's linear probe on test tiles, scored within each tile against the truth.

    An arm that sees the partner when it is used is left out. NothingToShow where no tile or no arm is left.
    """
    ids = _chosen(tileset, columns, task, truth, tiles)
    he = decoded(tileset, ids, "he")
    masks = _fitted(truth.masks(decoded(tileset, ids, truth.partner)), he.shape[1]) if truth else None
    maps: dict[str, np.ndarray] = {}
    mesh = sharding.make_mesh()
    for name, encoder in encoders.items():
        run = trained.open_run(encoder.path, mesh)
        if arms.partners_of_embed(run, feature):
            continue
        direction = probe.evaluate(encoder.features, columns, tileset.splits, task, resamples=0).direction
        assert direction is not None
        options: dict[str, Any] = {"feature": feature, "steps": STEPS, "mesh": mesh}
        maps[name] = saliency.maps_of(run.method.embed, run.params, run.extra, he, direction, **options)
    if not maps:
        raise NothingToShow("every arm sees the partner when it is used")
    smooth = {name: ndimage.gaussian_filter(m, (0, *[he.shape[1] / 24] * 2)) for name, m in maps.items()}
    found: Section = {"what": f"Integrated gradients of the probe on {len(ids)} test tiles{_which(task, columns)}."}
    caption = f"What raises the probe's answer to {task.name!r} in test tiles."
    if truth is not None and masks is not None:
        caption += f" Outlined in white: {truth.told}."
        found |= {"score": f"AUC of the map against {truth.told}, within a tile", "chance": 0.5}
        found["arms"] = scores(smooth, masks, columns["case"][ids], seen=(next(iter(maps.values())) != 0).any(0))
    titles = {encoders[name].title: m[:DRAWN] for name, m in smooth.items()}
    sheet = sheets.saliency_sheet(he[:DRAWN], titles, None if masks is None else masks[:DRAWN])
    return found | {"pictures": [{"picture": "saliency", "caption": caption}]}, {"saliency": sheet}


def _fitted(masks: np.ndarray, side: int) -> np.ndarray:
    """A partner may have been stored with other pixels than the H&E."""
    places = ((np.arange(side) + 0.5) * masks.shape[1] / side).astype(int)
    return masks[:, places][:, :, places]


def scores(
    maps: Mapping[str, np.ndarray], masks: np.ndarray, cases: np.ndarray, *, seen: np.ndarray
) -> list[dict[str, Any]]:
    """Of every arm, with intervals over cases. `seen` [H, W]: what the view of evaluation does not cut off."""
    inside = np.ix_(np.arange(len(masks)), np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0)))
    rows = []
    for name, map_ in maps.items():
        try:
            auc = saliency.score_maps(map_[inside], masks[inside], cases).metrics["auc"]
        except ValueError as error:
            raise NothingToShow(str(error)) from error
        ends = {end: v if np.isfinite(v) else None for end, v in (("low", auc.low), ("high", auc.high))}
        rows.append({"arm": name, "mean": auc.value, **ends})
    return rows


def _chosen(
    tileset: "TileSet", columns: Mapping[str, np.ndarray], task: Task, truth: Truth | None, tiles: int
) -> np.ndarray:
    """Test tiles that have the partner, spread over the test cases; where the target is a share, those with some of
    both, since in the others there is nothing to tell apart."""
    fit = np.isin(columns["case"], list(tileset.splits["test"])) & task.read(columns)[1]
    if truth is not None:
        fit &= np.asarray(columns.get(f"has_{truth.partner}", fit), bool)
    if _shares(task, columns):
        share = np.asarray(columns[task.target], np.float64)
        fit &= (share > MIXED[0]) & (share < MIXED[1])
    ids = np.flatnonzero(fit)
    if not len(ids):
        raise NothingToShow(f"no test tile{_which(task, columns)} has what the maps are compared with")
    return np.sort(np.random.default_rng(0).permutation(ids)[:tiles])


def _shares(task: Task, columns: Mapping[str, np.ndarray]) -> bool:
    values = np.asarray(columns[task.target], np.float64)
    values = values[np.isfinite(values)]
    within = (values >= 0).all() and (values <= 1).all() and ((values > 0) & (values < 1)).any()
    return task.threshold is not None and bool(within)


def _which(task: Task, columns: Mapping[str, np.ndarray]) -> str:
    return f" of which {MIXED[0]:.0%} to {MIXED[1]:.0%} are {task.target}" if _shares(task, columns) else ""


def decoded(tileset: "TileSet", ids: np.ndarray | Sequence[int], name: str) -> np.ndarray:
    """[n, H, W, C] of tiles that have it."""
    images = [tileset.decode(example)[name] for example in tileset.read(np.asarray(ids).tolist())]
    return np.stack([image for image in images if image is not None])
