"""Anyone's image pairs as a tile set: fields of H&E, their aligned partners, and a CSV that says what they are.

    slide_id, case_id, he     required; paths are relative to the CSV's folder
    <partner>                 one column for each partner asked for: a picture of the same field
    mpp                       um per pixel of the H&E field, where its file does not say
    label, split              text; classes in alphabetical order, splits by case

Any other column is kept: numbers as columns of every tile, text in the manifest. Fields larger than a tile are cut
into a grid that covers them; what a tile has outside its field is white (or 0 in a partner that is not RGB).
"""

import csv
import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from input_pipeline.slides.reader import Slide, open_slide
from input_pipeline.tileset import (
    Partner,
    Record,
    Spec,
    TileSetError,
    choose_splits,
    finish,
    remove_slide,
    write_slide,
    written_slides,
)
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
) -> dict[str, Any]:
    """Write the tile set `out` from the CSV `table` and return its manifest.

    `partners` maps a column of the CSV to what is stored of it. `mpp` None is that of the fields, if they share one.
    `edges`: 'pad' covers the field and reaches over it, 'shift' moves the last tile inwards, 'drop' keeps whole tiles
    alone; columns inside_x and inside_y say how many px of a tile lie in the field. Splits are
    case lists or shares ({'train': .8, ...}: drawn by case, stratified by label); None takes the column split.

    A field that fails does not stop the others; the error at the end names each, and a rerun does only what is missing.
    """
    table, out = Path(table), Path(out)
    partners = dict(partners or {})
    rows = read_table(table, {"slide_id", "case_id", he, *partners})
    if edges not in EDGES or (step is not None and step < 1):
        raise TileSetError(f"edges is one of {EDGES} and step at least 1 px, not {edges!r} and {step}")
    if any(p.kind == "vector" for p in partners.values()):
        raise TileSetError("a folder of images has no vector partners; pack a cohort with tables of spots instead")
    names = tuple(sorted({r["label"] for r in rows if r.get("label")}, key=_natural))
    mpp = mpp or _common_mpp(rows, table.parent, he)
    params = {"importer": "folder", "step": step or size, "edges": edges}
    stored = tuple(replace(p, mpp=size * mpp / (p.size or size)) for p in partners.values())
    spec = Spec(name, size, mpp, he_encoding, jpeg_quality, stored, names, params)
    numbers, texts = _extra_columns(rows, {*_KNOWN, he, *partners})
    plan = _Plan(spec, table.parent, he, step or size, edges, numbers, texts)
    columns = dict(zip(partners, stored, strict=True))
    _write_all(plan, out, rows, columns, workers, progress)
    return finish(out, spec, _splits(rows, splits, seed))


def read_table(path: Path, required: set[str]) -> list[Row]:
    """The rows of a CSV, every required cell filled, every slide id used once."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restkey="", strict=True)
            rows = [dict(row) for row in reader]
            header = list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TileSetError(f"{path} cannot be read as a CSV: {error}") from error
    if missing := required - set(header):
        raise TileSetError(f"{path} has no column {sorted(missing)}; it has {header}")
    if len(set(header)) != len(header) or not rows:
        raise TileSetError(f"{path} has no rows, or two columns of the same name: {header}")
    seen: dict[str, int] = {}
    for line, row in enumerate(rows, 2):
        if None in row.values() or "" in row:
            raise TileSetError(f"{path}, row {line}: it does not have the {len(header)} cells of the header")
        for key in row:
            row[key] = row[key].strip()
        if empty := [key for key in ("slide_id", "case_id") if not row[key]]:
            raise TileSetError(f"{path}, row {line}: {empty[0]} is empty")
        check_text_id(row["slide_id"], f"{path}, row {line}: slide_id")
        check_text_id(row["case_id"], f"{path}, row {line}: case_id")
        if row["slide_id"] in seen:
            raise TileSetError(f"{path}: rows {seen[row['slide_id']]} and {line} have slide_id {row['slide_id']!r}")
        seen[row["slide_id"]] = line
    return rows


def sample_of(table: str | os.PathLike, column: str) -> Path:
    """The first file that a column names, from which the others can be told."""
    for row in read_table(Path(table), {column}):
        if row[column]:
            return Path(table).parent / row[column]
    raise TileSetError(f"{table}: column {column!r} names no file")


def _natural(text: str) -> tuple[float, str]:
    number = _number(text)
    return (math.inf, text) if number is None else (number, text)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _field_mpp(row: Row) -> float | None:
    text = row.get("mpp", "")
    value = _number(text)
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
            numeric = bool(values) and all(_number(v) is not None for v in values)
        except TileSetError:
            numeric = False
        (numbers if numeric else texts).append(column)
    return tuple(numbers), tuple(texts)


def _splits(rows: list[Row], splits: Mapping[str, Any] | None, seed: int) -> Mapping[str, Sequence[str]] | None:
    if splits:
        return choose_splits(splits, [r["case_id"] for r in rows], [r.get("label", "") for r in rows], seed)
    if not any(row.get("split") for row in rows):
        return None
    pairs = dict.fromkeys((row["split"], row["case_id"]) for row in rows if row["split"])
    return {split: [case for s, case in pairs if s == split] for split, _ in pairs}


def _write_all(
    plan: _Plan, out: Path, rows: list[Row], partners: dict[str, Partner], workers: int | None, progress: bool
) -> None:
    (out / "slides").mkdir(parents=True, exist_ok=True)
    done = written_slides(out)
    for slide in set(done) - {row["slide_id"] for row in rows}:
        remove_slide(out, slide)

    def work(row: Row) -> str | None:
        try:
            _write_field(plan, out, row, partners, done.get(row["slide_id"]))
        except (ValueError, OSError) as error:
            return f"{row['slide_id']}: {error}"
        return None

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        results = list(tqdm(pool.map(work, rows), "import", len(rows), unit="field", disable=not progress))
    if failed := [fault for fault in results if fault]:
        listed = "\n  ".join(failed[:20])
        raise TileSetError(
            f"{len(failed)} of {len(rows)} fields failed, the others are written; mend these and run again:\n  {listed}"
        )


def _write_field(plan: _Plan, out: Path, row: Row, partners: dict[str, Partner], done: dict[str, Any] | None) -> None:
    paths = {column: plan.folder / row[column] for column in (plan.he, *partners) if row[column]}
    if plan.he not in paths:
        raise TileSetError(f"column {plan.he!r} is empty")
    files = {column: _file_facts(path) for column, path in paths.items()}
    facts = {key: row.get(key, "") for key in ("label", "mpp", *plan.numbers)}
    source = {"files": files, "row": facts, "info": {c: row[c] for c in plan.texts}}
    if done and (done["spec_sha256"], done["source"], done["case"]) == (plan.spec.sha256, source, row["case_id"]):
        return
    if done and done["case"] != row["case_id"]:
        remove_slide(out, row["slide_id"])
    records = _records(plan, row, paths, partners)
    write_slide(out, plan.spec, row["slide_id"], row["case_id"], records, source)


def _file_facts(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"name": path.name, "size": os.fstat(file.fileno()).st_size, "sha256": digest}


def _records(plan: _Plan, row: Row, paths: dict[str, Path], partners: dict[str, Partner]) -> Iterator[Record]:
    spec = plan.spec
    label = spec.label_names.index(row["label"]) if row.get("label") else -1
    numbers = {c: _number(row[c]) for c in plan.numbers}
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
