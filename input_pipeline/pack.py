"""`mfl pack`: tiled slides become a tile set. One shard a slide, redone only where slide or parameters changed."""

import csv
import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from input_pipeline import annotations, cohort, pool
from input_pipeline import tile as tiling
from input_pipeline.describe import partner_like
from input_pipeline.files import read_json, sha256
from input_pipeline.ledger import Ledger, Stopwatch
from input_pipeline.slides import register, similarity, warp
from input_pipeline.slides.reader import Slide, open_slide
from input_pipeline.slides.transform import Transform
from input_pipeline.tileset import (
    Partner,
    Record,
    Spec,
    choose_splits,
    finish,
    remove_slide,
    write_slide,
    written_slides,
)


@dataclass(frozen=True)
class Params:
    """All that decides what a tile set holds, beside what `mfl tile` decided."""

    name: str = "tiles"
    quality: int = 90
    he_encoding: str = "jpeg"
    lossless: tuple[str, ...] = ()  # partners stored as PNG though they are 8-bit images
    min_score: float | None = None  # a partner tile that agrees less with the H&E is left out; None keeps and scores it
    min_inside: float = 0.98  # share of the tile that must lie on the partner slide

    def __post_init__(self):
        if self.min_score is not None and not -1 <= self.min_score <= 1:
            raise ValueError(f"min_score is a correlation, -1 to 1, not {self.min_score}")
        if not 0 < self.min_inside <= 1:
            raise ValueError(f"min_inside is a share of the tile, above 0 and up to 1, not {self.min_inside}")


@dataclass(frozen=True)
class Labels:
    """Classes over the whole cohort: `label` becomes its class, `label_x` a column of numbers or of classes."""

    names: tuple[str, ...]
    classes: dict[str, tuple[str, ...]]  # label_x -> names, empty where the values are numbers

    @staticmethod
    def of(slides: Sequence[cohort.Slide]) -> "Labels":
        columns = sorted({name for s in slides for name in s.labels})
        values = {name: {s.labels[name] for s in slides if s.labels.get(name)} for name in columns}
        numeric = {name for name in columns if name != "label" and all(map(_is_number, values[name]))}
        classes = {name: () if name in numeric else tuple(sorted(values[name])) for name in columns}
        return Labels(classes.pop("label", ()), classes)

    def label(self, slide: cohort.Slide) -> int:
        value = slide.labels.get("label", "")
        return self.names.index(value) if value else -1

    def columns(self, slide: cohort.Slide) -> dict[str, float]:
        return {name: self._value(name, slide.labels.get(name, "")) for name in self.classes}

    def _value(self, name: str, value: str) -> float:
        if not value:
            return math.nan
        return float(self.classes[name].index(value)) if self.classes[name] else float(value)


@dataclass
class Report:
    ledger: Ledger = field(default_factory=Ledger)
    counts: Counter = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)
    kept: int = 0
    manifest: dict[str, Any] = field(default_factory=dict)


def pack(
    tiled: str | os.PathLike,
    out: str | os.PathLike,
    params: Params | None = None,
    *,
    splits: Mapping[str, Sequence[str]] | Mapping[str, float] | None = None,
    split_seed: int = 0,
    workers: int | None = None,
    runner: str = "local",
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """`splits` is case lists, or a share of the cases for each split (by case, balanced over labels)."""
    tiled, out, params = Path(tiled), Path(out), params or Params()
    slides, tile_params = _tiled_cohort(tiled)
    usable = _usable(tiled, slides, tile_params, say)
    labels = Labels.of(slides)
    spec = specification(usable, tile_params, params, labels)
    before = written_slides(out) if out.exists() else {}
    for gone in sorted(set(before) - {s.slide_id for s in usable}):
        say(f"{gone} is no longer in the cohort (or was left out): removed from the set")
        remove_slide(out, gone)
    todo = [s for s in usable if not _is_packed(before.get(s.slide_id), spec, _signature(tiled, s, spec))]
    report = Report(kept=len(usable) - len(todo))
    work = functools.partial(pack_slide, tiled=tiled, out=out, spec=spec, params=params, labels=labels)
    start = perf_counter()
    for outcome in pool.run(work, todo, workers=workers, runner=runner, label="pack", progress=progress):
        if outcome.error is not None:
            report.failed[outcome.item.slide_id] = outcome.error
            say(f"{outcome.item.slide_id} failed: {outcome.error}")
            if outcome.item.slide_id in before:
                remove_slide(out, outcome.item.slide_id)
            continue
        report.counts.update(outcome.value["counts"])
        report.ledger.add(outcome.value["seconds"], outcome.value["counts"]["tiles"])
    report.ledger.wall = perf_counter() - start
    if len(report.failed) < len(usable):
        cases = {s.case_id: labels.label(s) for s in usable if s.slide_id not in report.failed}
        chosen = choose_splits(splits, list(cases), list(cases.values()), split_seed)
        report.manifest = finish(out, spec, chosen)
    return report


def _tiled_cohort(tiled: Path) -> tuple[list[cohort.Slide], tiling.Params]:
    document = read_json(tiled / "cohort.json", "made by mfl tile")
    if document.get("version") != tiling.VERSION:
        raise ValueError(f"{tiled} was tiled by another version ({document.get('version')!r}); run mfl tile again")
    return [cohort.Slide.from_json(s) for s in document["slides"]], tiling.Params(**document["params"])


def _usable(
    tiled: Path, slides: list[cohort.Slide], params: tiling.Params, say: Callable[[str], None]
) -> list[cohort.Slide]:
    usable = []
    for slide in slides:
        status = tiling.read_status(tiled, slide)
        if status["state"] == "failed":
            say(f"{slide.slide_id} is left out: tiling failed: {status['reason']}")
        elif not tiling.is_done(tiled, slide, params):
            say(f"{slide.slide_id} is left out: its files changed since it was tiled; run mfl tile again")
        else:
            usable.append(slide)
    if not usable:
        raise ValueError(f"no slide of {tiled} is ready to be packed: see {tiled / 'status.csv'}")
    return usable


def _signature(tiled: Path, slide: cohort.Slide, spec: Spec) -> str:
    return slide.signature({"spec": spec.sha256, "tiled": tiling.read_status(tiled, slide)["signature"]})


def _is_packed(meta: dict[str, Any] | None, spec: Spec, signature: str) -> bool:
    return meta is not None and meta["spec_sha256"] == spec.sha256 and meta["source"].get("signature") == signature


def read_splits(text: str) -> dict[str, list[str]] | dict[str, float]:
    """'train=0.7,test=0.3' -> shares; the path of a CSV (case_id, split) -> case lists."""
    if not text.lower().endswith(".csv"):
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        shares = {name.strip(): float(share) for name, _, share in pairs if _is_number(share)}
        if not shares or len(shares) != len(pairs) or min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
            raise ValueError(f"splits are like train=0.7,val=0.1,test=0.2 with a sum of 1, or a .csv, not {text!r}")
        return shares
    with open(text, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if missing := {"case_id", "split"} - set(rows.fieldnames or []):
            raise ValueError(f"{text} lacks the columns {sorted(missing)}; it has {rows.fieldnames}")
        splits: dict[str, list[str]] = {}
        for row in rows:
            splits.setdefault(row["split"].strip(), []).append(row["case_id"].strip())
    return splits


def specification(slides: Sequence[cohort.Slide], tile_params: tiling.Params, params: Params, labels: Labels) -> Spec:
    """What all tiles have in common; partners are as their first slide has them, and every other slide must agree."""
    partners: dict[str, Partner] = {}
    for slide in slides:
        for source in slide.partners:
            if source.kind == "vector":
                genes = set(annotations.spot_genes(source.path))
                known = partners.get(source.name)
                common = sorted(genes & set(known.channel_names) if known else genes)
                partners[source.name] = _vector(source.name, common)
            elif source.name not in partners:
                lossless = source.name in params.lossless
                partners[source.name] = partner_like(source.path, source.name, source.kind, lossless=lossless)
    described = {"tile": asdict(tile_params), "pack": asdict(params), "classes": labels.classes}
    return Spec(
        params.name,
        size=tile_params.size,
        mpp=tile_params.mpp,
        he_encoding=params.he_encoding,
        jpeg_quality=params.quality,
        partners=tuple(partners[name] for name in sorted(partners)),
        label_names=labels.names,
        params=described | {"columns": _column_names(slides, labels)},
    )


def _vector(name: str, genes: Sequence[str]) -> Partner:
    if not genes:
        raise ValueError(f"partner {name!r}: no gene is common to the tables of all slides")
    return Partner(name, "vector", dtype="float32", encoding="float32", channel_names=tuple(genes), length=len(genes))


def _column_names(slides: Sequence[cohort.Slide], labels: Labels) -> list[str]:
    names = ["tissue", "pen", "blur"]
    names += ["cells", "positive"] if any(s.cells for s in slides) else []
    names += ["region", "region_share"] if any(s.regions for s in slides) else []
    return names + list(labels.classes)


def pack_slide(
    row: cohort.Slide, *, tiled: Path, out: Path, spec: Spec, params: Params, labels: Labels
) -> dict[str, Any]:
    watch, dropped = Stopwatch(), Counter[str]()
    status = tiling.read_status(tiled, row)
    with np.load(tiling.folder_of(tiled, row) / "tiles.npz", allow_pickle=False) as stored:
        tiles = dict(stored)
    default = spec.params["tile"]["default_mpp"]
    with open_slide(row.he, mpp=row.mpp, default_mpp=default) as he:
        partners = [_Source(tiled, row, p, spec, he.mpp or math.nan, status, tiles, default) for p in row.partners]
        partners = [p for p in partners if p.name not in status["rejected"]]
        source = {"signature": _signature(tiled, row, spec), "he": row.he.name, "bytes": row.he.stat().st_size}
        with watch("hash"):
            source["he_sha256"] = sha256(row.he)
        source |= {"mpp": he.mpp, "mpp_source": he.mpp_source, "rejected": status["rejected"]}
        source |= {"partners": {p.name: p.path.name for p in row.partners}}
        records = _records(row, he, partners, tiles, spec, params, labels, watch, dropped)
        watch.readers = [he, *(p.slide for p in partners if p.slide)]
        with watch("write"):
            counts = write_slide(out, spec, row.slide_id, row.case_id, records, source)
        for partner in partners:
            partner.close()
    return {"counts": {**counts, **dropped}, "seconds": watch.seconds}


class _Source:
    """One partner of one slide: where its pixels or vectors for a tile come from."""

    def __init__(
        self,
        tiled: Path,
        row: cohort.Slide,
        partner: cohort.Partner,
        spec: Spec,
        he_mpp: float,
        status: dict[str, Any],
        tiles: dict[str, np.ndarray],
        default_mpp: float | None,
    ):
        self.name, self.kind = partner.name, partner.kind
        self.slide: Slide | None = None
        self.transform = Transform.identity()
        self.corners = np.stack([tiles["x"], tiles["y"]], axis=1) * he_mpp
        if partner.kind == "vector":
            wanted = next(p for p in spec.partners if p.name == partner.name).channel_names
            side = spec.size * spec.mpp
            self.vectors = annotations.spot_vectors(partner.path, self.corners, side, genes=wanted)
            return
        self.slide = open_slide(partner.path, mpp=partner.mpp, default_mpp=default_mpp)
        self.channel = similarity.nuclear_channel(self.slide.channel_names)
        if partner.transform:
            self.transform = register.load_transform(partner.transform)
        elif partner.kind == "image" and len(tiles["x"]):
            self.transform = Transform.load(tiling.folder_of(tiled, row) / f"{partner.name}.transform.json")
            self.channel = status["registered"][partner.name]["channel"]

    def tile(self, i: int, size: int, mpp: float) -> tuple[np.ndarray, float]:
        """The partner of tile i, and the share of it that lies on the partner slide."""
        if self.slide is None:
            return self.vectors[i], float(np.isfinite(self.vectors[i, 0]))
        order = "nearest" if self.kind == "map" else "linear"
        pixels, inside = warp.sample_partner(self.slide, self.transform, tuple(self.corners[i]), size, mpp, order)
        return pixels, float(inside.mean())

    def close(self) -> None:
        if self.slide is not None:
            self.slide.close()


def _records(
    row: cohort.Slide,
    he: Slide,
    partners: Sequence[_Source],
    tiles: dict[str, np.ndarray],
    spec: Spec,
    params: Params,
    labels: Labels,
    watch: Stopwatch,
    dropped: Counter,
) -> Iterator[Record]:
    label, known = labels.label(row), labels.columns(row)
    for i in range(len(tiles["x"])):
        x, y = int(tiles["x"][i]), int(tiles["y"][i])
        pixels = he.read_region(x, y, spec.size, spec.size, spec.mpp)
        found: dict[str, np.ndarray | None] = {}
        scores: dict[str, float] = {}
        for partner in partners:
            with watch("resample"):
                image, inside = partner.tile(i, spec.size, spec.mpp)
            if inside < params.min_inside:
                dropped[f"{partner.name}: outside"] += 1
                continue
            if partner.kind == "image":
                with watch("similarity"):
                    scores[partner.name] = similarity.tile_similarity(pixels, image, channel=partner.channel)
                if params.min_score is not None and scores[partner.name] < params.min_score:
                    dropped[f"{partner.name}: score below {params.min_score}"] += 1
                    continue
            found[partner.name] = image
        columns = {n: float(tiles[n][i]) if n in tiles else known.get(n, math.nan) for n in spec.params["columns"]}
        yield Record(pixels, found, float(x), float(y), he.mpp or math.nan, label, columns, scores)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
