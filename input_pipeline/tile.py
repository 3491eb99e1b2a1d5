"""`mfl tile`: a cohort becomes coordinates, quality control and registrations, one folder a slide, and a status table.

    OUT/cohort.json                what was asked for
    OUT/status.csv                 one row a slide: done, empty or failed, and why
    OUT/slides/<id>/tiles.npz      x, y (level-0 px of the outer top left corner) and what is known of each tile
    OUT/slides/<id>/<partner>.transform.json, <partner>.overlay.jpg, qc.jpg, status.json

`status.json` carries a hash of the row, the parameters and the files' names, sizes and times: a slide is done when it
stands there with today's hash and its files are whole, so a rerun redoes what failed, what changed, and nothing else.

A slide is made in `.<id>.part`, which takes the place of the folder when all went well. If that fails, the folder keeps
what an earlier run found, its status says failed, and it counts as done again once the slide's files are as they were:
a disk that was away for a minute costs nothing. A folder that holds anything else is never touched.
"""

import csv
import functools
import io
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from input_pipeline import annotations, cohort, pool
from input_pipeline.describe import partner_like
from input_pipeline.files import only_one, save_picture, write_atomically, write_json
from input_pipeline.ledger import Ledger, Stopwatch
from input_pipeline.slides import grid, qc, register, register_picture, tissue
from input_pipeline.slides.reader import Slide, open_slide
from input_pipeline.slides.transform import Transform
from input_pipeline.tileset.mapped import open_columns, write_columns

VERSION = 1
THUMBNAIL_PX = 4096  # the mask is made at MASK_UM, or coarser where the slide would then be larger than this
MASK_UM = 4.0
PICTURE_PX = 1024
STATES = ("done", "empty", "failed")
WRITTEN = re.compile(
    r"tiles\.npz|qc\.jpg|status\.json|.+\.(transform\.json|overlay\.jpg|part)|\.DS_Store|\._.*|Thumbs\.db"
)
ENLARGED = 0.9  # tiles finer than this share of the slide's own um per pixel are enlarged, which is said aloud


@dataclass(frozen=True)
class Params:
    """All that decides which tiles a slide gives. Sizes in output px at `mpp`."""

    size: int = 256
    mpp: float = 0.5
    step: int | None = None  # None: the size, so that tiles touch and do not overlap
    min_tissue: float = 0.5
    max_pen: float = 0.05  # tiles with more of it under pen or out of focus are left out
    max_blur: float = 0.5
    default_mpp: float | None = None
    registration: str = "bspline"  # how far: coarse | affine | bspline
    max_error_um: float | None = None  # median error of a registration that passes; serial sections need more
    seed: int = 0

    def __post_init__(self):
        if not 8 <= self.size <= 16384 or (self.step is not None and not 1 <= self.step <= 16384):
            raise ValueError(f"size is 8 to 16384 px and step 1 to 16384 px, not {self.size} and {self.step}")
        if not 0.05 <= self.mpp <= 10:
            raise ValueError(f"mpp is 0.05 to 10 um per pixel, not {self.mpp}; 20x is about 0.5")
        for name in ("min_tissue", "max_pen", "max_blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share of the tile, 0 to 1, not {getattr(self, name)}")
        if self.registration not in register.LEVELS:
            raise ValueError(f"registration is {self.registration!r}; allowed: {', '.join(register.LEVELS)}")
        if self.max_error_um is not None and not 0 < self.max_error_um <= 1000:
            raise ValueError(f"max_error_um is above 0 and up to 1000 um, not {self.max_error_um}")


@dataclass
class Report:
    """What a run over a cohort did."""

    rows: list[dict[str, Any]]
    ledger: Ledger = field(default_factory=Ledger)
    kept: int = 0  # slides that were done already

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["state"] == "failed"]


def tile_cohort(
    slides: Sequence[cohort.Slide],
    out: str | os.PathLike,
    params: Params | None = None,
    *,
    workers: int | None = None,
    runner: str = "local",
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Never stops at a bad slide; `Report.failed` names them. Interrupted or repeated, it goes on where it was.

    ValueError before anything is written if an input lies where the output goes, or another run is at work there."""
    out, params = Path(out), params or Params()
    _refuse_inputs_in(out / "slides", slides)
    with only_one(out):
        (out / "slides").mkdir(exist_ok=True)
        document = {"version": VERSION, "params": asdict(params), "slides": [s.to_json() for s in slides]}
        write_json(out / "cohort.json", document)
        todo = [s for s in slides if not _still_done(out, s, params)]
        report = Report([], kept=len(slides) - len(todo))
        start, found = perf_counter(), {}
        work = functools.partial(tile_slide, out=out, params=params)
        for outcome in pool.run(work, todo, workers=workers, runner=runner, label="tile", progress=progress):
            name, status = outcome.item.slide_id, outcome.value
            if status is None:
                status = _write_failure(out, outcome.item, params, outcome.error or "")
                say(f"{name} failed: {outcome.error}")
            else:
                report.ledger.add(status["seconds"], status["tiles"])
            for line in status.get("warnings", []):
                say(f"{name}: {line}")
            for partner, reason in status.get("rejected", {}).items():
                say(f"{name}: partner {partner} is left out: {reason}")
            found[name] = status
        report.ledger.wall = perf_counter() - start
        report.rows = [_row(found.get(s.slide_id) or read_status(out, s)) for s in slides]
        write_status_table(out / "status.csv", report.rows)
    return report


def tile_slide(row: cohort.Slide, *, out: Path, params: Params) -> dict[str, Any]:
    """All about one slide, in its own folder; raises where the slide cannot be used, and changes nothing then."""
    if missing := [p for p in row.files() if not p.exists()]:
        raise ValueError(f"there is no file {missing[0]}" + (f" (and {len(missing) - 1} more)" if missing[1:] else ""))
    folder = folder_of(out, row)
    part, old = (folder.with_name(f".{row.slide_id}.{what}") for what in ("part", "old"))
    if strange := _not_ours(folder):
        raise ValueError(
            f"{folder} holds {strange}, which mfl tile did not write: choose another --out, or move it away"
        )
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        status = _work_on(row, part, params)
        write_json(part / "status.json", status)
        if folder.exists():
            os.replace(folder, old)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return status


def _work_on(row: cohort.Slide, folder: Path, params: Params) -> dict[str, Any]:
    watch = Stopwatch()
    with open_slide(row.he, mpp=row.mpp, default_mpp=params.default_mpp) as he:
        watch.readers.append(he)
        warnings = _check_inputs(row, he, params)
        tiles, picture = _tiles(row, he, params, watch)
        with watch("encode+write"):
            write_columns(folder / "tiles.npz", {name: (a.dtype, len(a), [a]) for name, a in tiles.items()})
            save_picture(folder / "qc.jpg", picture)
        rejected, registered = {}, {}
        for partner in row.partners:
            if partner.kind != "image" or partner.transform or not len(tiles["x"]):
                continue
            found = _register(folder, he, partner, params, watch)
            registered[partner.name] = {"channel": found.channel, "score": found.score, "error_um": found.error_um}
            if not found.passed:
                rejected[partner.name] = found.reason
        mpp = {"mpp": he.mpp, "mpp_source": he.mpp_source, "vendor": he.vendor, "notes": [*he.notes, *warnings]}
    state = "done" if len(tiles["x"]) else "empty"
    reason = "" if state == "done" else "no tile has enough tissue: see qc.jpg"
    status = _status(row, params, state, reason=reason, tiles=len(tiles["x"]), seconds=watch.seconds, **mpp)
    return status | {"warnings": warnings, "rejected": rejected, "registered": registered}


def _check_inputs(row: cohort.Slide, he: Slide, params: Params) -> list[str]:
    """What would fail in packing fails here, before the work, and for this slide alone; -> what to say aloud."""
    if not he.is_rgb or he.dtype != np.uint8:
        raise ValueError(
            f"{row.he}: H&E is RGB of 8 bits, this is {he.channels} channels of {he.dtype}; "
            "is it a partner (partner_<name>)?"
        )
    if he.mpp is None:
        raise ValueError(f"{row.he}: um per pixel unknown: {he.mpp_reason}; give it as column mpp_he, or --default-mpp")
    for partner in row.partners:
        if partner.transform:
            register.load_transform(partner.transform)
        if partner.kind == "vector":
            annotations.spot_genes(partner.path)
            continue
        partner_like(partner.path, partner.name, partner.kind)
        with open_slide(partner.path, mpp=partner.mpp, default_mpp=params.default_mpp) as slide:
            if slide.mpp is None:
                way_out = f"give it as column mpp_{partner.name}, or --default-mpp"
                raise ValueError(f"{partner.path}: um per pixel unknown: {slide.mpp_reason}; {way_out}")
            if partner.kind == "map" and slide.dtype.kind not in "iu":
                raise ValueError(f"{partner.path}: a map holds whole numbers, not {slide.dtype}")
    if params.mpp >= ENLARGED * he.mpp:
        return []
    times = f"{he.mpp / params.mpp:.1f} times"
    return [f"tiles of {params.mpp:g} um per pixel are enlarged {times} from a slide of {he.mpp:g}: nothing is gained"]


def _tiles(row: cohort.Slide, he: Slide, params: Params, watch: Stopwatch) -> tuple[dict[str, np.ndarray], np.ndarray]:
    assert he.mpp is not None
    extent = max(he.width, he.height) * he.mpp
    mask_mpp = max(MASK_UM, extent / THUMBNAIL_PX, he.mpp)
    width, height = (max(1, math.ceil(v * he.mpp / mask_mpp)) for v in (he.width, he.height))
    thumbnail = he.read_region(0, 0, width, height, mask_mpp)
    with watch("mask"):
        mask = tissue.tissue_mask(thumbnail, mask_mpp)
        flags = tissue.quality_flags(thumbnail, mask_mpp, mask)
        size, mpp = params.size, params.mpp
        shape = (he.width, he.height, he.mpp)
        least = params.min_tissue
        xy, share = grid.tile_grid(mask, mask_mpp, *shape, size=size, mpp=mpp, step=params.step, min_tissue=least)
        flagged = {n: grid.fraction_of(f, mask_mpp, xy, he.mpp, size=size, mpp=mpp) for n, f in flags.items()}
        keep = (flagged["pen"] <= params.max_pen) & (flagged["blur"] <= params.max_blur)
    columns = {"tissue": share[keep], "pen": flagged["pen"][keep], "blur": flagged["blur"][keep]}
    corner_um = xy[keep] * he.mpp
    with watch("labels"):
        if row.cells:
            columns |= annotations.cell_columns(row.cells, corner_um, params.size * params.mpp)
        if row.regions:
            columns |= annotations.region_columns(row.regions, corner_um, params.size * params.mpp)
    with watch("picture"):
        look, look_mpp = _picture_background(he, thumbnail, mask_mpp)
        picture = qc.qc_picture(
            look,
            look_mpp,
            mask,
            mask_mpp,
            xy,
            mpp0=he.mpp,
            size=size,
            mpp=mpp,
            slide_id=row.slide_id,
            mpp_source=he.mpp_source or "",
            flagged=~keep,
            flags=flags,
        )
    return {"x": xy[keep, 0], "y": xy[keep, 1], **columns}, picture


def _picture_background(he: Slide, thumbnail: np.ndarray, mpp: float) -> tuple[np.ndarray, float]:
    """About PICTURE_PX on the longer side: from the thumbnail where that is large enough, else read again."""
    assert he.mpp is not None
    shrink = max(thumbnail.shape[:2]) // PICTURE_PX
    if shrink >= 1 or thumbnail.dtype != np.uint8 or thumbnail.shape[2] != 3:
        return thumbnail[:: max(shrink, 1), :: max(shrink, 1)], mpp * max(shrink, 1)
    picture_mpp = max(he.mpp, max(he.width, he.height) * he.mpp / PICTURE_PX)
    width, height = (max(1, math.ceil(v * he.mpp / picture_mpp)) for v in (he.width, he.height))
    return he.read_region(0, 0, width, height, picture_mpp), picture_mpp


def _register(
    folder: Path, he: Slide, partner: cohort.Partner, params: Params, watch: Stopwatch
) -> register.Registration:
    """A registration that fails its gate is kept for the eye (overlay, measured transform) and marked rejected."""
    with open_slide(partner.path, mpp=partner.mpp, default_mpp=params.default_mpp) as slide:
        watch.readers.append(slide)
        with watch("register"):
            found = register.register(
                he, slide, level=params.registration, seed=params.seed, max_error_um=params.max_error_um
            )
        measured = ("passed", "reason", "score", "error_um", "error95_um", "mirrored", "channel")
        info = {name: getattr(found, name) for name in measured}
        info |= {n: None for n in ("score", "error_um", "error95_um") if not math.isfinite(info[n])}
        transform = Transform(found.transform.matrix, found.transform.displacement, found.transform.info | info)
        with watch("picture"):
            overlay = register_picture.overlay_picture(he, slide, transform)
        with watch("encode+write"):
            transform.save(folder / f"{partner.name}.transform.json")
            save_picture(folder / f"{partner.name}.overlay.jpg", overlay)
    return found


def folder_of(out: Path, slide: cohort.Slide) -> Path:
    return out / "slides" / slide.slide_id


def is_done(out: Path, slide: cohort.Slide, params: Params) -> bool:
    return _fits(out, slide, params, read_status(out, slide))


def _fits(out: Path, slide: cohort.Slide, params: Params, status: dict[str, Any]) -> bool:
    """Whether `status` is of this row, these parameters and files, and what it tells of is there and whole."""
    if status.get("state") not in ("done", "empty") or status.get("signature") != slide.signature(asdict(params)):
        return False
    folder = folder_of(out, slide)
    try:
        with zipfile.ZipFile(folder / "tiles.npz") as archive:
            damaged = archive.testzip()
        rows = {len(column) for column in open_columns(folder / "tiles.npz").values()}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return False
    transforms = [folder / f"{name}.transform.json" for name in status["registered"]]
    return damaged is None and rows == {status["tiles"]} and all(path.is_file() for path in transforms)


def _still_done(out: Path, slide: cohort.Slide, params: Params) -> bool:
    """is_done, once a failed redo has been forgotten where everything is again as it was before."""
    earlier = read_status(out, slide).get("earlier")
    if earlier and _fits(out, slide, params, earlier):
        write_json(folder_of(out, slide) / "status.json", earlier)
    return is_done(out, slide, params)


def _write_failure(out: Path, slide: cohort.Slide, params: Params, reason: str) -> dict[str, Any]:
    before, folder = read_status(out, slide), folder_of(out, slide)
    earlier = before.get("earlier") if before["state"] == "failed" else before
    status = _status(slide, params, "failed", reason=reason) | ({"earlier": earlier} if earlier else {})
    if not _not_ours(folder):
        write_json(folder / "status.json", status)
    return status


def _not_ours(folder: Path) -> str | None:
    """What a folder holds that mfl tile has not written, if anything."""
    if not folder.is_dir():
        return repr(folder.name) if folder.exists() else None
    held = sorted(folder.iterdir())
    strange = [p for p in held if p.is_dir() or not WRITTEN.fullmatch(p.name)]
    if not strange and held and not (folder / "status.json").exists():
        strange = held
    return repr(strange[0].name) if strange else None


def _refuse_inputs_in(folder: Path, slides: Sequence[cohort.Slide]) -> None:
    for slide in slides:
        for path in slide.files():
            if any(
                p.is_relative_to(f)
                for p, f in ((path.absolute(), folder.absolute()), (path.resolve(), folder.resolve()))
            ):
                raise ValueError(f"{path} lies in {folder}, where the results go: choose another --out")


def read_status(out: Path, slide: cohort.Slide) -> dict[str, Any]:
    """The status of a slide; a slide never looked at, or whose status is damaged, is 'failed' and says so."""
    try:
        status = json.loads((folder_of(out, slide) / "status.json").read_text())
        if status["version"] == VERSION and status["state"] in STATES:
            return status
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {
        "slide_id": slide.slide_id,
        "case_id": slide.case_id,
        "state": "failed",
        "reason": "not done",
        "signature": "",
    }


def _status(slide: cohort.Slide, params: Params, state: str, **facts: Any) -> dict[str, Any]:
    row = {"version": VERSION, "slide_id": slide.slide_id, "case_id": slide.case_id, "state": state}
    return row | {"signature": slide.signature(asdict(params))} | facts


def _row(status: dict[str, Any]) -> dict[str, Any]:
    partners = "; ".join(f"{name}: {reason}" for name, reason in status.get("rejected", {}).items())
    columns = ("slide_id", "case_id", "state", "tiles", "mpp", "mpp_source", "reason")
    return {name: status.get(name, "") for name in columns} | {"partners_left_out": partners}


def write_status_table(path: Path, rows: list[dict[str, Any]]) -> None:
    write_table(path, [{k: guard_formula(v) for k, v in row.items()} for row in rows])


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Verbatim: for programs that look for files by what stands there."""
    buffer = io.StringIO()
    table = csv.DictWriter(buffer, list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    write_atomically(path, buffer.getvalue().encode())


def unguarded(text: str) -> str:
    """What guard_formula was given."""
    return text[1:] if text[:1] == "'" and guard_formula(text[1:]) == text else text


def guard_formula(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula is quoted: ids and error texts come from outside."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
