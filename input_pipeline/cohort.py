"""A cohort: which slides belong to which case, where their partners lie, and what is known of them.

A CSV has one row a slide. Paths are relative to the CSV's folder.

    slide_id, case_id, he               required
    partner_<name>                      a file of the same tissue: image pyramid, label map, or table of spots (.csv)
    kind_<name>                         image | map | vector; without it .csv is a vector and everything else an image
    transform_<name>                    H&E um -> partner um; without it an image is registered, and a map or table
                                        lies as the H&E
    mpp_he, mpp_<name>                  um per pixel, where the file does not say or is wrong
    label, label_<x>                    anything; text becomes classes, numbers stay numbers
    cells                               CSV of x_um, y_um, type, positive in the H&E frame -> columns of every tile
    regions                             label map in the H&E frame -> the region of every tile

Other columns have no effect and are named aloud; one that looks like a misspelt one of these is refused.
"""

import difflib
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from input_pipeline.excluded import excluded
from input_pipeline.table import read_rows
from input_pipeline.tileset.spec import check_name, check_text_id

KINDS = ("image", "map", "vector")
SLIDE_SUFFIXES = {".svs", ".tif", ".tiff", ".ndpi", ".scn", ".mrxs", ".qptiff", ".dcm", ".bif", ".png", ".jpg", ".jpeg"}
TABLE_SUFFIXES = {".csv", ".tsv"}
COLUMNS = ("slide_id", "case_id", "he", "mpp_he", "label", "cells", "regions")
PREFIXES = ("partner", "kind", "transform", "mpp", "label")
MADE_HERE = ("cohort.json", "manifest.json")  # folders of results, which may lie among the slides
TCGA = re.compile(r"^(TCGA-\w{2}-\w{4})")


@dataclass(frozen=True)
class Partner:
    name: str
    path: Path
    kind: str
    mpp: float | None = None
    transform: Path | None = None


@dataclass(frozen=True)
class Slide:
    """One row of a cohort."""

    slide_id: str
    case_id: str
    he: Path
    mpp: float | None = None
    partners: tuple[Partner, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    cells: Path | None = None
    regions: Path | None = None

    def files(self) -> list[Path]:
        partners = [p for q in self.partners for p in (q.path, q.transform)]
        return [p for p in (self.he, *partners, self.cells, self.regions) if p is not None]

    def to_json(self) -> dict[str, Any]:
        """Paths are absolute, so that a later step finds the files from anywhere."""
        document = asdict(self)
        for path in ("he", "cells", "regions"):
            document[path] = _absolute(document[path])
        for partner in document["partners"]:
            partner |= {"path": _absolute(partner["path"]), "transform": _absolute(partner["transform"])}
        return document

    @staticmethod
    def from_json(document: dict[str, Any]) -> "Slide":
        def path(value: str | None) -> Path | None:
            return None if value is None else Path(value)

        partners = [
            Partner(**{**p, "path": Path(p["path"]), "transform": path(p["transform"])}) for p in document["partners"]
        ]
        files = {"he": Path(document["he"]), "cells": path(document["cells"]), "regions": path(document["regions"])}
        return Slide(**{**document, **files, "partners": tuple(partners)})

    def signature(self, params: dict) -> str:
        """Changes when the row, the parameters, or the name, size or time of any file does; where the files lie has no
        part in it, so that data may move. A missing file counts as such."""
        row = self.to_json()
        for described in (row, *row["partners"]):
            for column in ("he", "cells", "regions", "path", "transform"):
                if described.get(column):
                    described[column] = Path(described[column]).name
        stats = [(os.path.getsize(p), os.stat(p).st_mtime_ns) if p.exists() else None for p in self.files()]
        text = json.dumps([row, params, stats], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def read(
    path: str | os.PathLike, *, case_pattern: str | None = None, say: Callable[[str], None] = lambda line: None
) -> list[Slide]:
    """A cohort from a CSV, or from a folder `he/` beside folders of partners whose files share the stem of the H&E.

    `say` is told which columns have no effect."""
    path = Path(path)
    if path.is_dir():
        return from_folder(path, case_pattern=case_pattern)
    if not path.exists():
        raise ValueError(
            f"there is no cohort at {path}; give a CSV (slide_id, case_id, he, ...) or a folder holding he/"
        )
    if case_pattern:
        raise ValueError(f"a case pattern is for a folder of slides; {path} has a column case_id")
    return from_csv(path, say)


def without(slides: list[Slide], which: str, say: Callable[[str], None] = lambda line: None) -> list[Slide]:
    """Less those that `which` lists (excluded.py), each of which is named aloud."""
    bad = excluded(which, [slide.slide_id for slide in slides])
    for name, why in bad.items():
        say(f"{name} is left out: {why}")
    if not (kept := [slide for slide in slides if slide.slide_id not in bad]):
        raise ValueError(f"{which} excludes all {len(slides)} slides")
    return kept


def from_csv(path: Path, say: Callable[[str], None] = lambda line: None) -> list[Slide]:
    header, rows = read_rows(path, ("slide_id", "case_id", "he"))
    ignored = [c for c in header if c not in COLUMNS and c.partition("_")[0] not in PREFIXES]
    for column in header:
        if (meant := _misspelt(column)) is not None:
            raise ValueError(
                f"{path}: column {column!r} has no meaning; is it {meant!r}? If not, call it something else"
            )
    if ignored:
        say(f"{path}: columns without effect: {', '.join(ignored)}")
    names = [c.removeprefix("partner_") for c in header if c.startswith("partner_")]
    for column in header:
        prefix, _, name = column.partition("_")
        if prefix in ("kind", "transform", "mpp") and name not in (*names, *(["he"] if prefix == "mpp" else [])):
            raise ValueError(f"{path}: column {column!r} speaks of {name!r}, but there is no column partner_{name}")
    return check([_row(row, names, path, line) for line, row in rows], path)


def is_label(column: str) -> bool:
    return column == "label" or column.startswith("label_")


def _misspelt(column: str) -> str | None:
    """The column that is probably meant by one that has no meaning as it stands."""
    prefix, _, name = column.partition("_")
    if column in COLUMNS or (prefix in PREFIXES and name):
        return None
    if prefix in PREFIXES:
        return f"{prefix}_he" if prefix == "mpp" else f"{prefix}_<name>"
    if near := difflib.get_close_matches(column.lower(), COLUMNS, 1, 0.8):
        return near[0]
    near = difflib.get_close_matches(prefix.lower(), PREFIXES, 1, 0.8) if name else []
    return f"{near[0]}_{name}" if near else None


def _row(row: dict[str, str], names: list[str], csv_path: Path, line: int) -> Slide:
    where = f"{csv_path}, row {line}"

    def get(column: str) -> str:
        return row.get(column, "")

    def file(column: str) -> Path | None:
        return csv_path.parent / get(column) if get(column) else None

    def mpp(column: str) -> float | None:
        try:
            value = float(get(column) or "nan")
        except ValueError:
            value = -1.0
        if get(column) and not 0 < value < float("inf"):
            raise ValueError(f"{where}: {column} is um per pixel, a number above 0, not {get(column)!r}")
        return value if get(column) else None

    partners = []
    for name in names:
        if (source := file(f"partner_{name}")) is None:
            continue
        kind = get(f"kind_{name}") or ("vector" if source.suffix.lower() in TABLE_SUFFIXES else "image")
        if kind not in KINDS:
            raise ValueError(f"{where}: kind_{name} is {kind!r}; allowed: {', '.join(KINDS)}")
        partners.append(Partner(name, source, kind, mpp(f"mpp_{name}"), file(f"transform_{name}")))
    he = file("he")
    if he is None:
        raise ValueError(f"{where}: he, the path of the H&E slide, is empty")
    labels = {c: get(c) for c in row if is_label(c)}
    cells, regions = file("cells"), file("regions")
    return Slide(get("slide_id"), get("case_id"), he, mpp("mpp_he"), tuple(partners), labels, cells, regions)


def from_folder(folder: Path, *, case_pattern: str | None = None) -> list[Slide]:
    """Slides of `folder/he`; every other folder is a partner of its name, results of `mfl tile` and `mfl pack` aside.
    The case is what `case_pattern` captures in the file name, else the TCGA patient, else the whole name."""
    pattern = _pattern(case_pattern)
    folders: dict[str, Path] = {}
    for sub in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if any((sub / name).exists() for name in MADE_HERE):
            continue
        if (name := sub.name.lower()) in folders:
            raise ValueError(f"{folders[name]} and {sub} would be the same partner {name!r}; rename one or give a CSV")
        folders[name] = sub
    if "he" not in folders:
        raise ValueError(
            f"{folder} holds no folder he/ with the H&E slides; or give a CSV (slide_id, case_id, he, ...)"
        )
    he_files = _stems(folders.pop("he"), SLIDE_SUFFIXES)
    partners = {name: _stems(sub, SLIDE_SUFFIXES | TABLE_SUFFIXES) for name, sub in folders.items()}
    slides = []
    for stem, he in he_files.items():
        match = pattern.search(stem)
        if match is None and case_pattern:
            raise ValueError(f"the case pattern {case_pattern!r} finds no case in the name {he.name!r}")
        found = {n: files[stem] for n, files in partners.items() if stem in files}
        kinds = {n: "vector" if p.suffix.lower() in TABLE_SUFFIXES else "image" for n, p in found.items()}
        row = tuple(Partner(n, p, kinds[n]) for n, p in found.items())
        slides.append(Slide(stem, match.group(1) if match else stem, he, partners=row))
    used = {p.path for s in slides for p in s.partners}
    if orphans := [p for files in partners.values() for p in files.values() if p not in used]:
        raise ValueError(f"{len(orphans)} partner files have no H&E slide of the same name, e.g. {orphans[0]}")
    return check(slides, folder)


def _pattern(case_pattern: str | None) -> re.Pattern:
    try:
        pattern = re.compile(case_pattern) if case_pattern else TCGA
    except re.error as error:
        raise ValueError(f"the case pattern {case_pattern!r} is no regular expression: {error}") from error
    if pattern.groups != 1:
        raise ValueError(f"a case pattern has one group, which is the case; {case_pattern!r} has {pattern.groups}")
    return pattern


def _stems(folder: Path, suffixes: set[str]) -> dict[str, Path]:
    """Hidden files (macOS writes a `._x.svs` beside an x.svs on foreign disks) are no slides."""
    found: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith(".")):
        stem = path.name.removesuffix(path.suffix).removesuffix(".ome")
        if stem in found:
            raise ValueError(f"{found[stem]} and {path} would be the same slide {stem!r}; rename one or give a CSV")
        found[stem] = path
    return found


def check(slides: list[Slide], source: Path) -> list[Slide]:
    """What would go wrong later and is cheap to see now. Whether files open is found slide by slide, by the work."""
    if not slides:
        raise ValueError(f"{source} names no slides")
    seen: set[str] = set()
    cases: dict[str, str] = {}
    for slide in slides:
        for what, value in (("slide_id", slide.slide_id), ("case_id", slide.case_id)):
            check_text_id(value, f"{source}: {what}")
        if _alike(slide.slide_id) in seen:
            raise ValueError(f"{source}: slide_id {slide.slide_id!r} stands there twice (case is ignored)")
        seen.add(_alike(slide.slide_id))
        other = cases.setdefault(_alike(slide.case_id), slide.case_id)
        if other != slide.case_id:
            raise ValueError(
                f"{source}: case_id {other!r} and {slide.case_id!r} differ in nothing but how they are written: one "
                "patient would be two; write them alike"
            )
        for partner in slide.partners:
            check_name(partner.name, f"a partner in {source}")
        for label in slide.labels:
            if label != "label":
                check_name(label, f"a column in {source}")
    return slides


def _alike(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def case_of(slide_id: str) -> str:
    """Of a slide of which nothing but the name is known: TCGA's names begin with the patient."""
    patient = TCGA.match(slide_id)
    return patient.group(1) if patient else slide_id
