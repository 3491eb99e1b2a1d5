"""Who is trained on, chosen by and tested: nested folds of cases, or official splits from files."""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mfl_jax.bags import BagError, Table
from mfl_jax.evaluators.tasks import LeakError

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Fold:
    """Rows of the table. Each of `inner` is (train, val): early stopping and the choice of settings see val, and
    nothing sees test before the end."""

    name: str
    inner: tuple[tuple[np.ndarray, np.ndarray], ...]
    test: np.ndarray


def nested(table: Table, *, outer: int = 5, inner: int = 5, seed: int = 0) -> tuple[Fold, ...]:
    """Cases are dealt to `outer` folds, class by class; those that are not tested, again, to `inner` ones."""
    cases = np.asarray(table.cases)
    every = np.arange(len(cases))
    folds = []
    for k, (train, test) in enumerate(deal(cases, table.labels, every, outer, seed)):
        folds.append(Fold(f"fold {k}", deal(cases, table.labels, train, inner, seed + 1 + k), test))
    return tuple(folds)


def deal(
    cases: np.ndarray, labels: np.ndarray, rows: np.ndarray, folds: int, seed: int
) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """(the others, the fold) of `rows`, for each fold. A case is of the greatest label of its slides."""
    names, of_row = np.unique(cases[rows], return_inverse=True)
    if not 2 <= folds <= len(names):
        raise ValueError(f"{folds} folds of {len(names)} cases: there are from 2 folds to as many as cases")
    label = np.full(len(names), -1)
    np.maximum.at(label, of_row, labels[rows])
    generator = np.random.default_rng(seed)
    dealt = np.concatenate([generator.permutation(np.flatnonzero(label == k)) for k in np.unique(label)])
    place = np.empty(len(names), int)
    place[dealt] = np.arange(len(names)) % folds
    return tuple((rows[place[of_row] != k], rows[place[of_row] == k]) for k in range(folds))


def read_splits(
    path: str | Path, table: Table, *, inner: int = 5, seed: int = 0, left_out: Sequence[str] = ()
) -> tuple[Fold, ...]:
    """A folder of CLAM's splits_<i>.csv, one such file, or a CSV of slide_id or case_id, split and, for several, fold.

    Where a fold has no val, its train cases are dealt to `inner` folds, as `nested` deals those of the same place: the
    folds.csv of a study gives its folds again. Slides that were `left_out` of the table may be named and are in no
    fold. LeakError where a case is on two sides.
    """
    path = Path(path)
    dealt: dict[str, Any] = {"inner": inner, "seed": seed, "left_out": left_out}
    if path.is_dir():
        files = sorted((p for p in path.iterdir() if re.fullmatch(r"splits_\d+\.csv", p.name)), key=_number)
        if not files:
            raise BagError(f"{path} has no splits_0.csv, splits_1.csv, ...")
        return tuple(fold for file in files for fold in read_splits(file, table, **dealt))
    rows = _csv(path)
    header = [name.strip() for name in rows[0]]
    columns = _of_clam(path, header, rows[1:]) if {"train", "test"} <= set(header) else _of_rows(path, header, rows[1:])
    return tuple(
        _fold(path, n, part, table, inner, seed + 1 + k, left_out) for k, (n, part) in enumerate(columns.items())
    )


def _number(path: Path) -> int:
    return int(re.findall(r"\d+", path.name)[0])


def _csv(path: Path) -> list[list[str]]:
    """CLAM's first column has no name, which the project's own tables must have."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BagError(f"{path} cannot be read as a table of splits: {error}") from error
    if len(rows) < 2:
        raise BagError(f"{path} has no rows")
    return rows


def _of_clam(path: Path, header: list[str], rows: list[list[str]]) -> dict[str, dict[str, list[str]]]:
    found: dict[str, list[str]] = {part: [] for part in PARTS}
    for row in rows:
        for name, cell in zip(header, row, strict=False):
            if name in found and cell.strip():
                found[name].append(cell.strip())
    return {path.stem: found}


def _of_rows(path: Path, header: list[str], rows: list[list[str]]) -> dict[str, dict[str, list[str]]]:
    who = next((name for name in ("slide_id", "case_id") if name in header), None)
    if who is None or "split" not in header:
        raise BagError(f"{path} has the columns {header}; give slide_id or case_id with split (and fold), or CLAM's")
    found: dict[str, dict[str, list[str]]] = {}
    for number, row in enumerate(rows, 2):
        cells = dict(zip(header, map(str.strip, row), strict=False))
        part = {"validation": "val", "valid": "val"}.get(cells.get("split", ""), cells.get("split", ""))
        if part not in PARTS:
            raise BagError(f"{path}, row {number}: split is {part!r}, not one of {', '.join(PARTS)}")
        name = f"fold {cells['fold']}" if cells.get("fold") else path.stem
        found.setdefault(name, {p: [] for p in PARTS})[part].append(cells[who])
    return found


def _fold(
    path: Path,
    name: str,
    parts: dict[str, list[str]],
    table: Table,
    inner: int,
    seed: int,
    left_out: Sequence[str],
) -> Fold:
    slides, cases = np.asarray(table.slides), np.asarray(table.cases)
    known = {*table.slides, *table.cases, *left_out}
    if strange := sorted({s for part in parts.values() for s in part} - known):
        raise BagError(f"{path}: {len(strange)} ids are not in the table: {', '.join(strange[:5])}")
    rows = {p: np.flatnonzero(np.isin(slides, ids) | np.isin(cases, ids)) for p, ids in parts.items()}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        if shared := sorted(set(cases[rows[a]]) & set(cases[rows[b]])):
            raise LeakError(f"{path}, {name}: cases in both {a} and {b}: {', '.join(shared[:10])}")
    for part in ("train", "test"):
        if not len(rows[part]):
            raise BagError(f"{path}, {name}: {part} has no slides")
    if len(rows["val"]):
        return Fold(name, ((rows["train"], rows["val"]),), rows["test"])
    return Fold(name, deal(cases, table.labels, rows["train"], inner, seed), rows["test"])


def check(folds: Sequence[Fold], table: Table) -> None:
    """Every fit needs every class (survival: an event) to learn from and to be judged by."""
    classes = len(table.names)
    for fold in folds:
        for train, val in fold.inner:
            lacking = [
                f"{part} lacks {table.names[k]!r}"
                for part, rows in (("train", train), ("val", val))
                for k in ((1,) if table.survival else range(classes))
                if not (table.labels[rows] == k).any()
            ]
            if lacking:
                raise ValueError(f"{fold.name}: {lacking[0]}: take fewer folds, or put more cases of it in")
