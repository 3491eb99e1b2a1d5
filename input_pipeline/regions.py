"""`mfl regions`: features of tiles become a tile set of regions, each a square grid of tile features with a mask.

A slide's tiles lie on a grid of their own size; regions are cut from it side by side, centred on the tissue, and kept
where enough of their cells hold a tile. One shard a slide, redone only where its features or the parameters changed.
"""

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

from input_pipeline import cohort, pool
from input_pipeline.describe import Labels
from input_pipeline.features import Bag, BagError, Head, encoder_cases, find_folder, read_bag, read_head
from input_pipeline.files import facts, only_one
from input_pipeline.ledger import Ledger, Stopwatch
from input_pipeline.table import read_rows
from input_pipeline.tile import write_status_table
from input_pipeline.tileset import Record, Spec, choose_splits, remove_slide, write_slide, written_slides
from input_pipeline.tileset.renew import finish_again, previous, tell_splits

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
MOST_CELLS = 1 << 26  # of the box around a slide's tiles: coordinates come from outside
MOST_SHARED = 0.1  # of the tiles, that lie in a cell with another: pieces of tissue with grids of their own touch


@dataclass(frozen=True)
class Params:
    """All that decides what a set of regions holds, beside the features."""

    name: str = "regions"
    tiles: int = 16  # along a side of a region
    step: int | None = None  # tiles from one region to the next; None: side by side
    min_tissue: float = 0.25  # least share of a region's cells that hold a tile
    tile_size: int | None = None  # px of a tile, and um per px, where the files do not say
    mpp: float | None = None

    def __post_init__(self):
        for what, value in (("tiles", self.tiles), ("step", self.tiles if self.step is None else self.step)):
            if not 1 <= value <= (1024 if what == "tiles" else self.tiles):
                raise ValueError(f"{what} is 1 or more (tiles up to 1024, step up to tiles), not {value}")
        if not 0 < self.min_tissue <= 1:
            raise ValueError(f"min_tissue is a share of a region's cells, above 0 and up to 1, not {self.min_tissue}")


@dataclass
class Report:
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the status table: one a slide
    ledger: Ledger = field(default_factory=Ledger)
    failed: dict[str, str] = field(default_factory=dict)
    regions: int = 0  # made now
    kept: int = 0  # slides that were done before
    manifest: dict[str, Any] = field(default_factory=dict)
    splits: dict[str, int] = field(default_factory=dict)


def assemble(
    features: str | os.PathLike,
    out: str | os.PathLike,
    params: Params | None = None,
    *,
    table: str | os.PathLike | None = None,
    splits: Mapping[str, Sequence[str]] | Mapping[str, float] | None = None,
    split_seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Regions of all files of features, or of the slides that `table` (slide_id; case_id, label, label_<x>) lists.

    Never stops at a bad slide: `Report.failed` and status.csv name it. Splits are as those of `pack`.
    """
    out, params, report = Path(out), params or Params(), Report()
    slides, heads = _slides(find_folder(features), table, written_slides(out), report.failed, say)
    labels = Labels.of(slides)
    spec = specification(heads, params, labels, find_folder(features))
    with only_one(out):
        old, before = previous(out, spec, [s.slide_id for s in slides])
        classes = [labels.label(s) for s in slides]
        cases = [s.case_id for s in slides]
        assignment = choose_splits(splits, cases, classes, old, seed=split_seed, default=SHARES)
        for slide in (s for s in slides if s.slide_id in before and before[s.slide_id]["case"] != s.case_id):
            say(f"{slide.slide_id} is now of case {slide.case_id!r}, not {before.pop(slide.slide_id)['case']!r}")
            remove_slide(out, slide.slide_id)
        able = [s for s in slides if s.slide_id not in report.failed]
        todo = [s for s in able if not _is_done(before.get(s.slide_id), spec, s)]
        report.kept = len(able) - len(todo)
        start = perf_counter()
        work = functools.partial(make_slide, out=out, spec=spec, params=params, labels=labels)
        for outcome in pool.run(work, todo, workers=workers, label="regions", progress=progress):
            if outcome.error is not None:
                report.failed[outcome.item.slide_id] = outcome.error
                continue
            report.regions += outcome.value["regions"]
            report.ledger.add(outcome.value["seconds"], outcome.value["tiles"])
        report.ledger.wall = perf_counter() - start
        for slide_id, reason in report.failed.items():
            say(f"{slide_id} failed: {reason}")
        wanted = {s.slide_id: s.case_id for s in slides}
        report.manifest = finish_again(out, spec, wanted, report.failed, assignment, say)
        report.rows = _status(slides, written_slides(out), report.failed, params)
        write_status_table(out / "status.csv", report.rows)
    if report.manifest:
        report.splits = tell_splits(old, report.manifest, say)
    return report


# --- which slides


def _slides(
    root: Path,
    table: str | os.PathLike | None,
    before: Mapping[str, Mapping[str, Any]],
    failed: dict[str, str],
    say: Callable[[str], None],
) -> tuple[list[cohort.Slide], dict[str, Head]]:
    """Every slide that is wanted, its `he` being its file of features; and what the readable files say."""
    paths = {path.stem: path for path in sorted(root.glob("*.h5")) if not path.name.startswith(".")}
    listed: dict[str, dict[str, str]] = {name: {} for name in paths}
    if table is not None:
        listed = _listed(Path(table))
        if extra := paths.keys() - listed.keys():
            say(f"{len(extra)} files of {root} are of slides that {table} does not list: they are left out")
    heads, slides = {}, []
    for name, row in listed.items():
        case = row.get("case_id", "")
        try:
            if name not in paths:
                raise BagError(f"there are no features {root / name}.h5: extract them")
            heads[name] = read_head(paths[name])
            case = case or heads[name].case_id
        except BagError as error:
            failed[name] = str(error)
        labels = {c: value for c, value in row.items() if cohort.is_label(c)}
        case = case or before.get(name, {}).get("case") or cohort.case_of(name)
        slides.append(cohort.Slide(name, case, root / f"{name}.h5", labels=labels))
    return cohort.check(slides, root), heads


def _listed(table: Path) -> dict[str, dict[str, str]]:
    rows = read_rows(table, ("slide_id",))[1]
    found: dict[str, dict[str, str]] = {}
    for line, row in rows:
        if not row["slide_id"] or row["slide_id"] in found:
            raise ValueError(f"{table}, row {line}: slide_id {row['slide_id']!r} is empty, or stands there twice")
        found[row["slide_id"]] = row
    return found


def specification(heads: Mapping[str, Head], params: Params, labels: Labels, folder: Path) -> Spec:
    """That of most files; a file that does not agree fails by itself. It knows the cases that the encoder of the tiles
    has seen, where these are known: what is trained on its regions has seen them too."""
    if not heads:
        raise BagError("there is no readable file of features")
    alike = Counter(_kind(head, params) for head in heads.values())
    dim, size, mpp, encoder, sha = max(alike, key=lambda kind: alike[kind])
    for option, asked, says in (("--tile-size", params.tile_size, size), ("--mpp", params.mpp, mpp)):
        if asked is not None and says is not None and abs(asked / says - 1) > 0.01:
            raise ValueError(f"{option} is {asked:g}, and the files are of {says:g}: leave it out, or extract again")
    if size is None or mpp is None:
        raise BagError("the files do not say how large a tile is: give --tile-size (px) and --mpp (um per px)")
    described: dict[str, Any] = {"importer": "regions", "regions": asdict(params), "tile_px": size, "tile_mpp": mpp}
    described |= {"encoder": encoder, "encoder_sha256": sha, "classes": labels.classes}
    if (seen := encoder_cases(folder, sha)) is not None:
        described["train_cases"] = list(seen)
    return Spec(
        params.name,
        params.tiles,
        size * mpp,
        "float16",
        label_names=labels.names,
        params=described,
        he_kind="grid",
        he_channels=dim + 1,
    )


def _kind(head: Head, params: Params) -> tuple[int, int | None, float | None, str, str]:
    """What the files of a set have in common; what a file does not say is as it was given."""
    size = params.tile_size if head.tile_px is None else head.tile_px
    mpp = params.mpp if head.tile_mpp is None else head.tile_mpp
    return head.dim, size, mpp, head.encoder, head.encoder_sha256


def _is_done(meta: Mapping[str, Any] | None, spec: Spec, slide: cohort.Slide) -> bool:
    return meta is not None and meta["source"].get("signature") == slide.signature({"spec": spec.sha256})


# --- one slide


def make_slide(slide: cohort.Slide, *, out: Path, spec: Spec, params: Params, labels: Labels) -> dict[str, Any]:
    watch = Stopwatch()
    with watch("read"):
        head, bag = read_head(slide.he), read_bag(slide.he)
        if math.isnan(bag.side) and bag.number("tile_size_um") > 0:
            bag = read_bag(slide.he, mpp=1.0)  # STAMP's coordinates, in um
        source: dict[str, Any] = {
            "signature": slide.signature({"spec": spec.sha256}),
            "files": {"features": facts(slide.he)},
        }
    _check_alike(head, spec, params)
    with watch("assemble"):
        mpp = bag.number("mpp_level0")
        pitch = spec.mpp / mpp if mpp > 0 else refined(bag.coords, bag.side)
        mpp = mpp if mpp > 0 else spec.mpp / pitch
        cells, corner, moved = place(bag.coords, pitch)
        found = list(cut(cells, params.tiles, params.step or params.tiles))
    least = math.ceil(params.min_tissue * params.tiles**2 - 1e-9)
    kept = [(at, members) for at, members in found if (members >= 0).sum() >= least]
    fullest = max(((members >= 0).sum() for _, members in found), default=0)
    source |= {"mpp": mpp, "mpp_source": bag.text("mpp_source") or "features", "tiles": len(bag.features)}
    source |= {"dropped": len(found) - len(kept), "fullest": int(fullest), "moved": moved}
    label, known = labels.label(slide), labels.columns(slide)

    def records() -> Iterator[Record]:
        for at, members in kept:
            x, y = corner + at * pitch
            with watch("assemble"):
                grid = filled(bag, members)
            columns = {"tiles": float(grid[..., -1].astype(np.float32).sum()), **known}
            yield Record(grid, {}, float(x), float(y), mpp, label, columns)

    with watch("encode+write"):
        write_slide(out, spec, slide.slide_id, slide.case_id, records(), source)
    return {"regions": len(kept), "tiles": len(bag.features), "seconds": watch.seconds}


def _check_alike(head: Head, spec: Spec, params: Params) -> None:
    says = spec.params
    wanted = (spec.he_channels - 1, says["tile_px"], says["tile_mpp"], says["encoder"], says["encoder_sha256"])
    names = ("features", "px of a tile", "um per px", "encoder", "encoder_sha256")
    for name, found, expected in zip(names, _kind(head, params), wanted, strict=True):
        if found != expected:
            raise BagError(f"{name}: {found!r} here, {expected!r} in most files; extract the slide again")


def refined(coords: np.ndarray, side: float) -> float:
    """The mean step from column to column and row to row: `side` is rounded to whole px in files that say no um, as
    coordinates are, and half a pixel a tile is a tile at the end of a slide."""
    every = np.concatenate([np.diff(np.unique(coords[:, axis])) for axis in (0, 1)])
    near = every[np.abs(every - side) <= 1]
    return float(near.mean()) if len(near) else side


def place(coords: np.ndarray, pitch: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Tiles on a grid of `pitch` level-0 px: cell (column, row) of each, -1 for a tile whose cell another one fills
    better; the corner of cell (0, 0); and how far the farthest tile was moved, in parts of a tile.

    Pieces of tissue may have grids of their own (CLAM): the one that most tiles lie on is taken for all.
    """
    if not pitch > 0:
        raise BagError("the file does not say how large a tile is, and its coordinates do not show it")
    if not len(coords):
        return np.zeros((0, 2), np.int64), np.zeros(2), 0.0
    phase = np.array([_phase(coords[:, axis], pitch) for axis in (0, 1)])
    exact = (coords - phase) / pitch
    if not (np.abs(exact) < 2**40).all() or np.prod(np.ptp(exact, 0) + 1) > MOST_CELLS:
        raise BagError(f"tiles of {pitch:g} px lie {np.ptp(coords, 0).max():g} px apart: a slide is not so large")
    cells = np.round(exact).astype(np.int64)
    off = np.abs(exact - cells).max(1)
    first = cells.min(0)
    key = (cells - first) @ np.array([1, np.ptp(cells[:, 0]) + 1])
    order = np.lexsort((np.arange(len(key)), off, key))
    other = order[1:][key[order[1:]] == key[order[:-1]]]
    if len(other) > MOST_SHARED * len(cells):
        raise BagError(
            f"{len(other)} of {len(cells)} tiles of {pitch:g} px overlap others: extract without overlap (step = size)"
        )
    cells = cells - first
    cells[other] = -1
    return cells, phase + first * pitch, round(float(off.max()), 3)


def _phase(values: np.ndarray, pitch: float) -> float:
    """Where the grid begins that most values lie on, as they are rounded to whole px: a mean around the circle."""
    angle = values / pitch % 1 * 2 * np.pi
    bins = np.bincount((angle * 64 / (2 * np.pi)).astype(int) % 64, minlength=64)
    middle = int(np.argmax(bins + np.roll(bins, 1) + np.roll(bins, -1)))
    centre = (middle + 0.5) * 2 * np.pi / 64
    apart = (angle - centre + np.pi) % (2 * np.pi) - np.pi
    near = apart[np.abs(apart) <= 1.5 * 2 * np.pi / 64 + 1e-9]
    return (centre + near.mean()) / (2 * np.pi) * pitch


def cut(cells: np.ndarray, tiles: int, step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """((column, row) of the first cell, int [tiles, tiles] of tiles or -1) of every region that has any tile, from top
    to bottom. The regions together are centred on the tiles."""
    there = np.flatnonzero(cells[:, 0] >= 0) if len(cells) else np.zeros(0, np.int64)
    if not len(there):
        return
    span = cells[there].max(0) + 1
    count = -(-np.maximum(span - tiles, 0) // step) + 1
    covered = (count - 1) * step + tiles
    before = (covered - span) // 2
    table = np.full(covered[::-1], -1, np.int64)
    table[cells[there, 1] + before[1], cells[there, 0] + before[0]] = there
    for row in range(count[1]):
        for column in range(count[0]):
            members = table[row * step : row * step + tiles, column * step : column * step + tiles]
            if (members >= 0).any():
                yield np.array([column, row]) * step - before, members


def filled(bag: Bag, members: np.ndarray) -> np.ndarray:
    """float16 [tiles, tiles, D + 1]."""
    grid = np.zeros((*members.shape, bag.features.shape[1] + 1), np.float16)
    there = members >= 0
    with np.errstate(over="ignore"):
        grid[there, :-1] = bag.features[members[there]]
    grid[there, -1] = 1
    if not np.isfinite(grid).all():
        raise BagError("features are too large for float16")
    return grid


def _status(
    slides: Sequence[cohort.Slide], written: Mapping[str, dict], failed: Mapping[str, str], params: Params
) -> list[dict[str, Any]]:
    rows = []
    for slide in slides:
        row: dict[str, Any] = {"slide_id": slide.slide_id, "case_id": slide.case_id}
        meta = written.get(slide.slide_id)
        if slide.slide_id in failed or meta is None:
            reason = failed.get(slide.slide_id, "not done")
            rows.append(row | {"state": "failed", "tiles": "", "regions": "", "dropped": "", "reason": reason})
            continue
        source, reason = meta["source"], ""
        if not meta["tiles"]:
            most = f"the fullest region has {source['fullest']} of {params.tiles**2} tiles"
            reason = most if source["tiles"] else "the slide has no tiles"
        state = "done" if meta["tiles"] else "empty"
        counts = {"tiles": source["tiles"], "regions": meta["tiles"], "dropped": source["dropped"]}
        rows.append(row | {"state": state, **counts, "reason": reason})
    return rows
