"""What did the encoder gain from its partner? Summaries of the partner predicted from H&E, on unseen cases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mfl_jax.evaluators import ridge
from mfl_jax.evaluators.probe import check_features
from mfl_jax.evaluators.results import Result, r2, value_metrics
from mfl_jax.evaluators.tasks import check_overlap, nested_draw, split_rows

if TYPE_CHECKING:
    from input_pipeline.tileset import Partner, TileSet

PERCENTILES = (50, 95)
MAX_TYPES = 64


def summarise(partner: "Partner", values: np.ndarray, present: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers a tile, nan where the partner is absent: of an image the mean and percentiles of each channel, of a map
    its objects and the share of each type, of a vector log(1 + x) of each entry.
    """
    if partner.kind == "image":
        found = {}
        for c, channel in enumerate(_names(partner)):
            pixels = values[..., c].reshape(len(values), -1)
            found[f"{channel}/mean"] = pixels.mean(1, dtype=np.float64)
            found |= {
                f"{channel}/p{q}": v for q, v in zip(PERCENTILES, np.percentile(pixels, PERCENTILES, 1), strict=True)
            }
    elif partner.kind == "map":
        found = _of_map(partner, values)
    else:
        found = {n: np.log1p(np.maximum(values[:, i], 0)) for i, n in enumerate(_names(partner))}
    return {f"{partner.name}/{k}": np.where(present, np.asarray(v, np.float64), np.nan) for k, v in found.items()}


def _of_map(partner: "Partner", values: np.ndarray) -> dict[str, np.ndarray]:
    found = {}
    for c, channel in enumerate(_names(partner)):
        codes = values[..., c].reshape(len(values), -1)
        if channel == "instance":
            found["objects"] = np.array([len(np.unique(row[row > 0])) for row in codes], float)
            found["covered"] = (codes > 0).mean(1)
        else:
            for code in np.unique(codes[(codes > 0) & (codes <= MAX_TYPES)]):
                found[f"{channel}{code}/share"] = (codes == code).mean(1)
    return found


def _names(partner: "Partner") -> tuple[str, ...]:
    count = partner.length if partner.kind == "vector" else partner.channels
    return tuple(partner.channel_names or ()) or tuple(str(i) for i in range(count or 0))


def check_partners(names: Sequence[str], tileset: "TileSet") -> None:
    known = [p.name for p in tileset.spec.partners]
    if not names or (missing := sorted(set(names) - set(known))):
        raise ValueError(f"partners to decode: {missing if names else 'none given'}; the tile set has {known}")


def summaries(tileset: "TileSet", names: Sequence[str], *, batch: int = 64) -> dict[str, np.ndarray]:
    """Of every tile, by id. No device is used; the result does not depend on any encoder, so it is made once."""
    from input_pipeline.stream import eval_stream

    check_partners(names, tileset)
    partners = [p for p in tileset.spec.partners if p.name in names]
    parts: list[dict[str, np.ndarray]] = []
    present: list[dict[str, np.ndarray]] = []
    with eval_stream(tileset, batch=batch, partners=tuple(names)) as batches:
        for rows in batches:
            kept = rows["mask"]
            found = {"id": rows["id"][kept]}
            for partner in partners:
                found |= summarise(partner, rows[partner.name][kept], rows[f"{partner.name}_mask"][kept])
            parts.append(found)
            present.append({p.name: rows[f"{p.name}_mask"][kept] for p in partners})
    # A type that no tile of a batch has is missing from its summaries: its share is 0 there.
    for name in dict.fromkeys(n for part in parts for n in part if n != "id"):
        for part, there in zip(parts, present, strict=True):
            part.setdefault(name, np.where(there[name.split("/")[0]], 0.0, np.nan))
    joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    order = np.argsort(joined.pop("id"), kind="stable")
    return {name: values[order] for name, values in joined.items()}


@dataclass(frozen=True)
class Decoded:
    """One result a target, with R2 as its metric; `compare` takes those of one target from several arms."""

    results: dict[str, Result]
    mode: str
    notes: tuple[str, ...]

    def floats(self, prefix: str) -> dict[str, float]:
        found = {f"{prefix}/r2/{n}": r.metrics["r2"].value for n, r in self.results.items()}
        return found | ({f"{prefix}/r2_median": float(np.median(list(found.values())))} if found else {})


def decode(
    features: np.ndarray,
    targets: Mapping[str, np.ndarray],
    columns: Mapping[str, np.ndarray],
    splits: Mapping[str, Sequence],
    *,
    pretrained: Sequence = (),
    transductive: bool = False,
    folds: int = 5,
    alphas: tuple[float, ...] = ridge.ALPHAS,
    seed: int = 0,
    resamples: int = 1000,
) -> Decoded:
    """Ridge to every target, on the tiles that have all targets of its partner; a target that does not vary is noted.

    R2 below 0 is worse than the mean of the test cases. Where the partner was in training, features of train cases
    may hold it by heart; the penalty is chosen on, and the figure is of, cases that were not.
    """
    notes = list(check_overlap(splits, pretrained, transductive=transductive))
    mode = "transductive" if notes else "inductive"
    cases = np.asarray(columns["case"])
    check_features(features, np.ones(len(cases), bool))
    groups: dict[bytes, list[str]] = {}
    for name, values in targets.items():
        groups.setdefault(np.isfinite(values).tobytes(), []).append(name)
    results: dict[str, Result] = {}
    for pattern, names in groups.items():
        known = np.frombuffer(pattern, bool)
        rows = split_rows(columns, splits, known)
        draw = nested_draw(cases, rows["train"], rows["val"], folds=folds, seed=seed)
        varied = [n for n in names if all(np.ptp(targets[n][rows[s]]) > 0 for s in ("train", "test"))]
        notes += [f"{n} does not vary" for n in names if n not in varied]
        if not varied:
            continue
        test = np.flatnonzero(rows["test"])
        stacked = np.where(known[:, None], np.stack([targets[n] for n in varied], 1), 0.0)
        guesses, chosen = ridge.nested(features, stacked, draw.pairs, draw.final, test, alphas)
        options: dict[str, Any] = {"resamples": resamples, "seed": seed}
        for t, name in enumerate(varied):
            truth, guess, alpha = stacked[test, t], guesses[:, t], {"alpha": float(chosen[t])}
            metrics, more = value_metrics(truth, guess, cases[test], {"r2": r2}, **options)
            results[name] = Result(name, metrics, guess, truth, cases[test], test, alpha, mode, more)
    return Decoded(results, mode, tuple(notes))
