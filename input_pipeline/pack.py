"""`mfl pack`: tiled slides become a tile set. One shard a slide, redone only where slide or parameters changed."""

import contextlib
import difflib
import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from input_pipeline import annotations, cohort, pool
from input_pipeline import tile as tiling
from input_pipeline.describe import Labels, number, partner_like
from input_pipeline.files import facts, only_one, read_json
from input_pipeline.ledger import Ledger, Stopwatch
from input_pipeline.slides import register, similarity, warp
from input_pipeline.slides.reader import Slide, open_slide
from input_pipeline.slides.transform import Transform
from input_pipeline.table import read_rows
from input_pipeline.tileset import Partner, Record, Spec, choose_splits, remove_slide, write_slide
from input_pipeline.tileset.renew import finish_again, previous, tell_splits

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}


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


@dataclass
class Report:
    ledger: Ledger = field(default_factory=Ledger)
    counts: Counter = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)  # every slide of the cohort that was not packed, and why
    kept: int = 0
    manifest: dict[str, Any] = field(default_factory=dict)  # {} where nothing could be finished
    splits: dict[str, int] = field(default_factory=dict)  # cases in each


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
    """`splits` is case lists, or a share of the cases for each split (by case, balanced over labels). None keeps the
    splits there are, and new cases join them; of a new set it draws SHARES. All that can be refused is, before work."""
    tiled, out, params, report = Path(tiled), Path(out), params or Params(), Report()
    slides, tile_params = _tiled_cohort(tiled)
    _check_lossless(params, slides)
    labels = Labels.of(slides)
    spec = specification(slides, tile_params, params, labels, say)
    with only_one(out):
        old, before = previous(out, spec, [s.slide_id for s in slides])
        cases, classes = [s.case_id for s in slides], [labels.label(s) for s in slides]
        assignment = choose_splits(splits, cases, classes, old, seed=split_seed, default=SHARES)
        usable = _usable(tiled, slides, tile_params, report.failed, say)
        _remove_of_other_cases(out, slides, before, say)
        todo = [s for s in usable if not _is_packed(before.get(s.slide_id), spec, _signature(tiled, s, spec))]
        report.kept = len(usable) - len(todo)
        work = functools.partial(pack_slide, tiled=tiled, out=out, spec=spec, params=params, labels=labels)
        start = perf_counter()
        for outcome in pool.run(work, todo, workers=workers, runner=runner, label="pack", progress=progress):
            if outcome.error is not None:
                report.failed[outcome.item.slide_id] = outcome.error
                say(f"{outcome.item.slide_id} failed: {outcome.error}")
                continue
            report.counts.update(outcome.value["counts"])
            report.ledger.add(outcome.value["seconds"], outcome.value["counts"]["tiles"])
        report.ledger.wall = perf_counter() - start
        wanted = {s.slide_id: s.case_id for s in slides}
        report.manifest = finish_again(out, spec, wanted, report.failed, assignment, say)
    if report.manifest:
        report.splits = tell_splits(old, report.manifest, say)
    return report


def _check_lossless(params: Params, slides: Sequence[cohort.Slide]) -> None:
    names = sorted({p.name for s in slides for p in s.partners})
    for name in params.lossless:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"lossless names {name!r}, which is no partner; there are {names}{hint}")


def _remove_of_other_cases(
    out: Path, slides: Sequence[cohort.Slide], written: dict[str, dict[str, Any]], say: Callable[[str], None]
) -> None:
    for slide in slides:
        if slide.slide_id in written and written[slide.slide_id]["case"] != slide.case_id:
            say(f"{slide.slide_id} is now of case {slide.case_id!r}, not {written.pop(slide.slide_id)['case']!r}")
            remove_slide(out, slide.slide_id)


def _tiled_cohort(tiled: Path) -> tuple[list[cohort.Slide], tiling.Params]:
    document = read_json(tiled / "cohort.json", "made by mfl tile")
    if document.get("version") != tiling.VERSION:
        raise ValueError(f"{tiled} was tiled by another version ({document.get('version')!r}); run mfl tile again")
    return [cohort.Slide.from_json(s) for s in document["slides"]], tiling.Params(**document["params"])


def _usable(
    tiled: Path,
    slides: list[cohort.Slide],
    params: tiling.Params,
    failed: dict[str, str],
    say: Callable[[str], None],
) -> list[cohort.Slide]:
    usable = []
    for slide in slides:
        status = tiling.read_status(tiled, slide)
        if status["state"] == "failed":
            failed[slide.slide_id] = f"tiling failed: {status['reason']}"
        elif not tiling.is_done(tiled, slide, params):
            failed[slide.slide_id] = "its files changed since it was tiled; run mfl tile again"
        else:
            usable.append(slide)
    for slide_id, reason in failed.items():
        say(f"{slide_id} is left out: {reason}")
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
        shares = {name.strip(): value for name, _, share in pairs if (value := number(share)) is not None}
        if not shares or len(shares) != len(pairs) or min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
            raise ValueError(f"splits are like train=0.7,val=0.1,test=0.2 with a sum of 1, or a .csv, not {text!r}")
        return shares
    splits: dict[str, dict[str, None]] = {}  # a table may have one row a slide
    for line, row in read_rows(text, ("case_id", "split"))[1]:
        if not row["case_id"] or not row["split"]:
            raise ValueError(f"{text}, row {line}: case_id or split is empty; leave the row out for a case in no split")
        splits.setdefault(row["split"], {})[row["case_id"]] = None
    return {name: list(cases) for name, cases in splits.items()}


def specification(
    slides: Sequence[cohort.Slide],
    tile_params: tiling.Params,
    params: Params,
    labels: Labels,
    say: Callable[[str], None] = lambda line: None,
) -> Spec:
    """What all tiles have in common. A partner is as the first slide has it whose file can be read; slides that do not
    agree fail by themselves. Gene tables are cut to the genes that all have, less tables that have none of the rest."""
    partners: dict[str, Partner] = {}
    genes: dict[str, list[set[str]]] = {}
    for slide in slides:
        for source in slide.partners:
            try:
                if source.kind == "vector":
                    genes.setdefault(source.name, []).append(set(annotations.spot_genes(source.path)))
                elif source.name not in partners:
                    lossless = source.name in params.lossless
                    partners[source.name] = partner_like(source.path, source.name, source.kind, lossless=lossless)
            except (ValueError, OSError) as error:
                say(f"{slide.slide_id}: partner {source.name} cannot be read: {error}")
    partners |= {name: _vector(name, common_genes(tables)) for name, tables in genes.items()}
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


def common_genes(tables: Sequence[set[str]]) -> list[str]:
    """What all tables have that have the gene which most have: one odd table must not empty the set."""
    count = Counter(gene for table in tables for gene in table)
    commonest = min(count, key=lambda gene: (-count[gene], gene))
    return sorted(set.intersection(*(table for table in tables if commonest in table)))


def _vector(name: str, genes: Sequence[str]) -> Partner:
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
    with contextlib.ExitStack() as stack:
        he = stack.enter_context(open_slide(row.he, mpp=row.mpp, default_mpp=default))
        watch.readers.append(he)
        partners = []
        for partner in row.partners:
            if partner.name not in status["rejected"]:
                partners.append(_Source(tiled, row, partner, spec, he.mpp or math.nan, status, tiles))
                if (slide := partners[-1].slide) is not None:
                    stack.enter_context(slide)
                    watch.readers.append(slide)
        with watch("hash"):
            source = {"signature": _signature(tiled, row, spec), **_source_files(row, status["rejected"])}
        source |= {"mpp": he.mpp, "mpp_source": he.mpp_source, "rejected": status["rejected"]}
        records = _records(row, he, partners, tiles, spec, params, labels, watch, dropped)
        with watch("encode+write"):
            counts = write_slide(out, spec, row.slide_id, row.case_id, records, source)
    return {"counts": {**counts, **dropped}, "seconds": watch.seconds}


def _source_files(row: cohort.Slide, rejected: Collection[str]) -> dict[str, Any]:
    """Name, size and hash of all that a slide's tiles are made from. 'aids' may be equal without a leak."""
    used = [p for p in row.partners if p.name not in rejected]
    files = {"he": row.he} | {p.name: p.path for p in used}
    aids = {f"transform_{p.name}": p.transform for p in used} | {"cells": row.cells, "regions": row.regions}
    found = [{name: facts(path) for name, path in paths.items() if path} for paths in (files, aids)]
    return {"files": found[0], "aids": found[1]}


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
    ):
        self.name, self.kind, self.path = partner.name, partner.kind, partner.path
        self.slide: Slide | None = None
        self.transform = Transform.identity()
        self.corners = np.stack([tiles["x"], tiles["y"]], axis=1) * he_mpp
        stored = next((p for p in spec.partners if p.name == partner.name), None)
        if stored is None:
            raise ValueError(f"{partner.path}: there is no slide of which partner {partner.name!r} can be read")
        if partner.kind == "vector":
            self.spots = annotations.SpotTable(partner.path, stored.channel_names)
            return
        if partner.transform:
            self.transform = register.load_transform(partner.transform)
        elif partner.kind == "image" and len(tiles["x"]):
            self.transform = Transform.load(tiling.folder_of(tiled, row) / f"{partner.name}.transform.json")
        default = spec.params["tile"]["default_mpp"]
        self.slide = open_slide(partner.path, mpp=partner.mpp, default_mpp=default)
        self.channel = similarity.nuclear_channel(self.slide.channel_names)
        if not partner.transform and partner.name in status["registered"]:
            self.channel = status["registered"][partner.name]["channel"]

    def tile(self, i: int, size: int, mpp: float) -> tuple[np.ndarray | None, float]:
        """The partner of tile i, and the share of it that lies on the partner slide."""
        if self.slide is None:
            vector = self.spots.vector(self.corners[i], size * mpp)
            return vector, float(vector is not None)
        order = "nearest" if self.kind == "map" else "linear"
        pixels, inside = warp.sample_partner(self.slide, self.transform, tuple(self.corners[i]), size, mpp, order)
        return pixels, float(inside.mean())


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
            if image is None or inside < params.min_inside:
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
