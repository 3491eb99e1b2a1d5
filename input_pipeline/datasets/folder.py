"""Anyone's image pairs as a tile set: fields of H&E, their aligned partners, and a CSV that says what they are.

    slide_id, case_id, he     required; paths are relative to the CSV's folder
    <partner>                 one column for each partner asked for: a picture of the same field
    mpp                       um per pixel of the H&E field, where its file does not say
    label, split              text; classes are numbers by size, then texts by alphabet; splits by case

Any other column is kept: numbers as columns of every tile, text in the manifest. Fields larger than a tile are cut
into a grid that covers them; what a tile has outside its field is white (or 0 in a partner that is not RGB).
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from input_pipeline import describe
from input_pipeline.cores import available_cores
from input_pipeline.describe import number
from input_pipeline.files import facts as file_facts
from input_pipeline.files import only_one
from input_pipeline.slides.reader import Slide, open_slide
from input_pipeline.table import read_rows
from input_pipeline.tileset import (
    Partner,
    Record,
    Spec,
    TileSetError,
    choose_splits,
    remove_slide,
    write_slide,
)
from input_pipeline.tileset.renew import finish_again, previous, tell_splits
from input_pipeline.tileset.spec import check_name, check_text_id

EDGES = ("pad", "shift", "drop")
_KNOWN = {"slide_id", "case_id", "mpp", "label", "split"}
Row = dict[str, str]


@dataclass(frozen=True)
class _Plan:
    """What is the same for every field."""

    spec: Spec
    folder: Path
    he: str
    step: int
    edges: str
    numbers: tuple[str, ...]
    texts: tuple[str, ...]


@dataclass
class Report:
    manifest: dict[str, Any]
    failed: dict[str, str] = field(default_factory=dict)  # slide_id -> why it is not in the set
    splits: dict[str, int] = field(default_factory=dict)  # cases in each


def import_folder(
    table: str | os.PathLike,
    out: str | os.PathLike,
    *,
    name: str = "folder",
    he: str = "he",
    partners: Mapping[str, Partner] | None = None,
    size: int = 256,
    mpp: float | None = None,
    step: int | None = None,
    edges: str = "pad",
    he_encoding: str = "jpeg",
    jpeg_quality: int = 95,
    splits: Mapping[str, Sequence[str]] | Mapping[str, float] | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Write the tile set `out` from the CSV `table`. A field that fails does not stop the others: the report names it,
    and a rerun does only what is missing. Without any field that could be written, TileSetError.

    `partners` maps a column of the CSV to what is stored of it. `mpp` None is that of the fields, if they share one.
    `edges`: 'pad' covers the field and reaches over it, 'shift' moves the last tile inwards, 'drop' keeps whole tiles
    alone; columns inside_x and inside_y say how many px of a tile lie in the field. Splits are case lists or shares
    ({'train': .8, ...}: drawn by case, stratified by label); None takes the column split, and where there is none keeps
    the splits of a set that is made again; a new one is all 'train'. `workers` are threads, 0 is none beside this one.
    """
    table, out = Path(table), Path(out)
    partners = dict(partners or {})
    rows = read_table(table, {"slide_id", "case_id", he, *partners})
    if edges not in EDGES or (step is not None and step < 1):
        raise TileSetError(f"edges is one of {EDGES} and step at least 1 px, not {edges!r} and {step}")
    if workers is not None and workers < 0:
        raise TileSetError(f"workers is {workers}; allowed: 0 (this thread alone) or more")
    if any(p.kind == "vector" for p in partners.values()):
        raise TileSetError("a folder of images has no vector partners; pack a cohort with tables of spots instead")
    names = describe.classes(r["label"] for r in rows if r.get("label"))
    mpp = mpp or _common_mpp(rows, table.parent, he)
    params = {"importer": "folder", "step": step or size, "edges": edges}
    stored = tuple(replace(p, mpp=size * mpp / (p.size or size)) for p in partners.values())
    spec = Spec(name, size, mpp, he_encoding, jpeg_quality, stored, names, params)
    numbers, texts = _extra_columns(rows, {*_KNOWN, he, *partners})
    plan = _Plan(spec, table.parent, he, step or size, edges, numbers, texts)
    wanted = {row["slide_id"]: row["case_id"] for row in rows}
    with only_one(out):
        old, done = previous(out, spec, wanted)
        labels = [row.get("label", "") for row in rows]
        assignment = choose_splits(splits or _column_split(rows), [*wanted.values()], labels, old, seed=seed)
        columns = dict(zip(partners, stored, strict=True))
        failed = _write_all(plan, out, rows, columns, done, workers, progress)
        for slide, fault in failed.items():
            say(f"{slide} failed: {fault}")
        document = finish_again(out, spec, wanted, failed, assignment, say)
    if not document:
        listed = "\n  ".join(f"{slide}: {fault}" for slide, fault in list(failed.items())[:20])
        raise TileSetError(f"{len(failed)} of {len(rows)} fields failed, so there is no set:\n  {listed}")
    return Report(document, failed, tell_splits(old, document, say))


def read_table(path: Path, required: set[str]) -> list[Row]:
    """The rows of a CSV, every required column there, every slide id used once."""
    header, rows = read_rows(path, sorted(required))
    if not rows:
        raise TileSetError(f"{path} has no rows, only the columns {header}")
    slides: dict[str, int] = {}
    cases: dict[str, str] = {}
    for line, row in rows:
        for key in ("slide_id", "case_id"):
            if not row[key]:
                raise TileSetError(f"{path}, row {line}: {key} is empty")
            check_text_id(row[key], f"{path}, row {line}: {key}")
        slide, case = row["slide_id"].casefold(), row["case_id"]
        if slide in slides:
            raise TileSetError(
                f"{path}: rows {slides[slide]} and {line} have slide_id {row['slide_id']!r} (capitals do not count)"
            )
        if (other := cases.setdefault(case.casefold(), case)) != case:
            raise TileSetError(
                f"{path}, row {line}: case {case!r} and case {other!r} differ in capitals only; name one"
            )
        slides[slide] = line
    return [row for _, row in rows]


def sample_of(table: str | os.PathLike, column: str) -> Path:
    """The first file that a column names, from which the others can be told."""
    for row in read_table(Path(table), {column}):
        if row[column]:
            return Path(table).parent / row[column]
    raise TileSetError(f"{table}: column {column!r} names no file")


def _field_mpp(row: Row) -> float | None:
    text = row.get("mpp", "")
    value = number(text)
    if text and (value is None or value <= 0):
        raise TileSetError(f"slide {row['slide_id']!r}: mpp is a positive number (um per pixel), not {text!r}")
    return value


def _common_mpp(rows: list[Row], folder: Path, he: str) -> float:
    found = {_field_mpp(row) for row in rows}
    if found == {None}:
        with open_slide(folder / rows[0][he]) as slide:
            found = {slide.mpp}
    if len(found) != 1 or None in found:
        shown = sorted(v for v in found if v is not None)[:5]
        raise TileSetError(f"the fields do not share one mpp ({shown}): give mpp= (um per pixel of the tiles)")
    (mpp,) = found
    assert mpp is not None
    return mpp


def _extra_columns(rows: list[Row], used: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of columns of numbers and of columns of text; a name that the format does not allow counts as text."""
    numbers: list[str] = []
    texts: list[str] = []
    for column in (c for c in rows[0] if c not in used):
        values = [row[column] for row in rows if row[column]]
        try:
            check_name(column, "a column")
            numeric = bool(values) and all(number(v) is not None for v in values)
        except TileSetError:
            numeric = False
        (numbers if numeric else texts).append(column)
    return tuple(numbers), tuple(texts)


def _column_split(rows: list[Row]) -> dict[str, list[str]] | None:
    if not any(row.get("split") for row in rows):
        return None
    pairs = dict.fromkeys((row["split"], row["case_id"]) for row in rows if row["split"])
    return {split: [case for s, case in pairs if s == split] for split, _ in pairs}


def _write_all(
    plan: _Plan,
    out: Path,
    rows: list[Row],
    partners: dict[str, Partner],
    done: dict[str, dict[str, Any]],
    workers: int | None,
    progress: bool,
) -> dict[str, str]:
    """slide_id -> why, of every field that could not be written."""

    def work(row: Row) -> str | None:
        try:
            _write_field(plan, out, row, partners, done.get(row["slide_id"]))
        except (ValueError, OSError) as error:
            return str(error)
        return None

    def collect(faults: Iterator[str | None]) -> dict[str, str]:
        bar = tqdm(faults, "import", len(rows), unit="field", disable=not progress)
        return {row["slide_id"]: fault for row, fault in zip(rows, bar, strict=True) if fault is not None}

    if workers == 0:
        return collect(map(work, rows))
    with ThreadPoolExecutor(workers or available_cores()) as threads:
        return collect(threads.map(work, rows))


def _write_field(plan: _Plan, out: Path, row: Row, partners: dict[str, Partner], done: dict[str, Any] | None) -> None:
    paths = {column: plan.folder / row[column] for column in (plan.he, *partners) if row[column]}
    if plan.he not in paths:
        raise TileSetError(f"column {plan.he!r} is empty")
    files = {column: file_facts(path) for column, path in paths.items()}
    facts = {key: row.get(key, "") for key in ("label", "mpp", *plan.numbers)}
    source = {"files": files, "row": facts, "info": {c: row[c] for c in plan.texts}}
    if done and (done["spec_sha256"], done["source"], done["case"]) == (plan.spec.sha256, source, row["case_id"]):
        return
    if done and done["case"] != row["case_id"]:
        remove_slide(out, row["slide_id"])
    records = _records(plan, row, paths, partners)
    write_slide(out, plan.spec, row["slide_id"], row["case_id"], records, source)


def _records(plan: _Plan, row: Row, paths: dict[str, Path], partners: dict[str, Partner]) -> Iterator[Record]:
    spec = plan.spec
    label = spec.label_names.index(row["label"]) if row.get("label") else -1
    numbers = {c: number(row[c]) for c in plan.numbers}
    extra = {c: math.nan if v is None else v for c, v in numbers.items()}
    he = open_slide(paths[plan.he], mpp=_field_mpp(row))
    opened: dict[str, tuple[Slide, float]] = {}
    try:
        if he.mpp is None:
            raise TileSetError(f"its mpp is not known ({he.mpp_reason}): add a column mpp to the CSV")
        for column in (c for c in partners if c in paths):
            opened[column] = _open_partner(paths[column], he)
        scale = spec.mpp / he.mpp  # level-0 pixels per pixel of a tile
        across = (he.width / scale, he.height / scale)
        xs, ys = (positions(length, spec.size, plan.step, plan.edges) for length in across)
        for y in ys:
            for x in xs:
                inside = [min(spec.size, length - p) for length, p in zip(across, (x, y), strict=True)]
                found = {partners[c].name: _cut(spec, partners[c], *opened[c], x, y) for c in opened}
                tile = he.read_region(x * scale, y * scale, spec.size, spec.size, spec.mpp)
                columns = extra | {"inside_x": inside[0], "inside_y": inside[1]}
                yield Record(tile, found, x * scale, y * scale, spec.mpp, label, columns)
    finally:
        for slide in (he, *(s for s, _ in opened.values())):
            slide.close()


def _open_partner(path: Path, he: Slide) -> tuple[Slide, float]:
    """The partner and its mpp: it shows the same field, so its scale follows from its width."""
    with open_slide(path) as probe:
        ratio = he.width / probe.width
        height = probe.height * ratio
    assert he.mpp is not None
    if abs(height - he.height) > max(1.0, ratio):
        raise TileSetError(
            f"{path.name} is no picture of the same field: scaled to its width it is {height:.0f} px high"
        )
    return open_slide(path, mpp=he.mpp * ratio), ratio


def _cut(spec: Spec, partner: Partner, slide: Slide, ratio: float, x: float, y: float) -> np.ndarray:
    side = partner.size or spec.size
    mpp = spec.size * spec.mpp / side
    assert slide.mpp is not None
    scale = spec.mpp / slide.mpp
    order = "nearest" if partner.kind == "map" else "area"
    return slide.read_region(x * scale, y * scale, side, side, mpp, order=order)


def positions(length: float, size: int, step: int, edges: str) -> list[float]:
    """Corners of the tiles along a field of `length` px."""
    length = round(length, 6)
    if edges == "drop":
        return [float(p) for p in range(0, math.floor(length - size) + 1, step)]
    count = max(1, math.ceil((length - size) / step) + 1)
    found = [float(i * step) for i in range(count)]
    if edges == "shift":
        found[-1] = max(0.0, min(found[-1], length - size))
    return found
