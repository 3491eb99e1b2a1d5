"""Tile features by slide, from files (input_pipeline.features) or from an embedded tile set; and tables of what slides
are.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from input_pipeline.excluded import excluded
from input_pipeline.features import BagError, find_folder, number, text
from input_pipeline.features import read_bag as read_file
from input_pipeline.table import read_rows

if TYPE_CHECKING:
    from mfl_jax.evaluators.embed import Embedded

# What files of one folder agree in, where they say it. CLAM's patch_size is of some level, and says nothing without
# a scale beside it.
ALIKE = ("encoder_sha256", "mpp_target", "target_magnification", "tile_size_um", "tile_size_px", "patch_size")
SCALES = ("mpp_target", "target_magnification")


@dataclass(frozen=True)
class Bags:
    """Slide s has the tiles offsets[s]:offsets[s + 1]; none and one are numbers too."""

    features: np.ndarray  # float16 or float32 [T, D]
    coords: np.ndarray  # float64 [T, 2]: corner of a tile, in level-0 px where `tile` is known
    offsets: np.ndarray  # int64 [S + 1]
    slides: tuple[str, ...]
    cases: tuple[str, ...]
    tile: np.ndarray  # float64 [S]: side of a tile in level-0 px; nan where the file does not say
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.slides)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def rows(self, slide: int) -> slice:
        return slice(int(self.offsets[slide]), int(self.offsets[slide + 1]))


@dataclass(frozen=True)
class Table:
    """What is known of slides: classes, or times with events. Rows of the CSV, in its order."""

    slides: tuple[str, ...]
    cases: tuple[str, ...]
    labels: np.ndarray  # int64 [S]; of survival the events
    names: tuple[str, ...]  # of the classes
    times: np.ndarray | None = None  # float64 [S], where the task is survival
    pictures: tuple[Path | None, ...] = ()  # the slides themselves, where the table has a column `he`

    @property
    def survival(self) -> bool:
        return self.times is not None


def read_table(path: str | os.PathLike, target: str = "label", time: str = "", event: str = "event") -> Table:
    """slide_id, case_id and `target`; with `time`, survival: that column and `event` (1: it happened, 0: censored).

    Names of classes are sorted (as numbers, where all are); rows without a target are refused, not dropped.
    """
    path = Path(path)
    wanted = [time, event] if time else [target]
    header, rows = read_rows(path, required=("slide_id", "case_id", *wanted))
    if not rows:
        raise BagError(f"{path} has no rows")
    if empty := [str(n) for n, row in rows if not all(row[c] for c in ("slide_id", "case_id", *wanted))]:
        raise BagError(f"{path}: rows {', '.join(empty[:10])} lack one of slide_id, case_id, {', '.join(wanted)}")
    slides = tuple(row["slide_id"] for _, row in rows)
    if len(set(slides)) < len(slides):
        raise BagError(f"{path}: slide_id {next(s for s in slides if slides.count(s) > 1)!r} comes more than once")
    cases = tuple(row["case_id"] for _, row in rows)
    pictures = tuple((path.parent / row["he"]) if row["he"] else None for _, row in rows) if "he" in header else ()
    if time:
        times = np.array([_number(path, n, row[time], time) for n, row in rows])
        events = np.array([_number(path, n, row[event], event) for n, row in rows])
        if not np.isin(events, (0, 1)).all() or not (times > 0).all():
            raise BagError(f"{path}: {event} is 0 or 1 and {time} is above 0 in every row")
        if events.sum() < 2:
            raise BagError(f"{path}: {int(events.sum())} events: survival cannot be learnt from them")
        return Table(slides, cases, events.astype(np.int64), ("censored", "event"), times, pictures)
    found = [row[target] for _, row in rows]
    names = _class_names(found)
    if len(names) < 2:
        raise BagError(f"{path}: column {target!r} has one class only, {names[0]!r}: there is nothing to tell apart")
    return Table(slides, cases, np.array([names.index(f) for f in found]), names, None, pictures)


def of_cases(table: Table, cases: Sequence[str]) -> Table:
    """The slides of these cases alone."""
    wanted = set(cases)
    return _rows_of(table, [i for i, case in enumerate(table.cases) if case in wanted])


def without(table: Table, which: str, say: Callable[[str], None] = lambda line: None) -> Table:
    """Less the slides that `which` lists (input_pipeline.excluded), each of which is named aloud."""
    bad = excluded(which, table.slides)
    for name, why in bad.items():
        say(f"{name} is left out: {why}")
    return _rows_of(table, [i for i, slide in enumerate(table.slides) if slide not in bad])


def _rows_of(table: Table, kept: Sequence[int]) -> Table:
    if not kept:
        raise BagError(f"none of the {len(table.slides)} slides of the table is left")
    texts = {name: tuple(getattr(table, name)[i] for i in kept) for name in ("slides", "cases")}
    texts |= {"pictures": tuple(table.pictures[i] for i in kept)} if table.pictures else {}
    times = None if table.times is None else table.times[kept]
    return replace(table, labels=table.labels[kept], times=times, **texts)


def _number(path: Path, row: int, text: str, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BagError(f"{path}, row {row}: {column} is {text!r}, not a number")
    return value


def _class_names(found: Sequence[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(set(found), key=float))
    except ValueError:
        return tuple(sorted(set(found)))


def from_embedded(
    found: "Embedded", feature: str = "he", slides: Mapping[str, str] | None = None, tile: float = math.nan
) -> Bags:
    """The tiles of a set by slide; `slides` {slide: case} names those to keep that may have no tile at all.

    Corners are those of the tile set, in level-0 px; it does not know how many of these a tile measures: say `tile`.
    """
    if feature not in found.features:
        raise BagError(f"there are no features {feature!r}, only {sorted(found.features)}")
    of_tile, cases = (np.asarray(found.columns[name]).astype(str) for name in ("slide", "case"))
    listed = dict(zip(of_tile.tolist(), cases.tolist(), strict=True)) | dict(slides or {})
    names = tuple(sorted(listed))
    order = np.argsort(of_tile, kind="stable")
    counts = np.bincount(np.searchsorted(names, of_tile), minlength=len(names))
    xy = [np.asarray(found.columns.get(c, np.full(len(found), np.nan)), np.float64) for c in ("x", "y")]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    coords, sides = np.stack(xy, 1)[order], np.full(len(names), tile)
    return Bags(found.features[feature][order], coords, offsets, names, tuple(listed[n] for n in names), sides)


def read_folder(folder: str | os.PathLike, table: Table, *, mpp: float | None = None) -> Bags:
    """A bag for every slide of the table, in its order. `mpp` (um per level-0 px) is for STAMP files, whose coordinates
    are um; without it, and without our attributes, theirs stay um and `tile` unknown.
    """
    root = find_folder(folder)
    paths = [root / f"{slide}.h5" for slide in table.slides]
    if unsafe := [s for s in table.slides if Path(s).name != s or s.startswith(".")]:
        raise BagError(f"slide_id {unsafe[0]!r} is not a file's name")
    if missing := [path.name for path in paths if not path.is_file()]:
        raise BagError(
            f"{root} lacks {len(missing)} of {len(paths)} slides of the table: {', '.join(missing[:5])}. "
            "Extract them, or take them out of the table"
        )
    found = [read_file(path, mpp=mpp) for path in paths]
    read = [(bag.features, bag.coords, bag.side) for bag in found]
    dims = {f.shape[1]: path.name for (f, _, _), path in zip(read, paths, strict=True) if len(f)}
    if len(dims) > 1:
        raise BagError(f"{root} holds features of different encoders: {dims} (length: a file of it)")
    if not dims:
        raise BagError(f"no slide of the table has a tile in {root}")
    check_alike(root, {path.name: bag.notes for path, bag in zip(paths, found, strict=True) if len(bag.features)})
    dim = next(iter(dims))
    dtype = np.result_type(*{f.dtype for f, _, _ in read if len(f)})
    features = np.concatenate(
        [f.astype(dtype).reshape(-1, dim) if len(f) else np.zeros((0, dim), dtype) for f, *_ in read]
    )
    coords = np.concatenate([c for _, c, _ in read])
    offsets = np.concatenate([[0], np.cumsum([len(f) for f, *_ in read])])
    few = int((np.diff(offsets) < 2).sum())
    extra = len({p.stem for p in root.glob("*.h5")} - set(table.slides))
    notes = [f"{few} slides have no tile or one; they are kept"] if few else []
    notes += [f"{extra} files in {root.name} are of slides that the table does not list"] if extra else []
    tile = np.array([t for *_, t in read])
    return Bags(features, coords, offsets, table.slides, table.cases, tile, tuple(notes))


def check_alike(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Features of two encoders, or of tiles of two scales or sizes, would be one set to whoever reads the folder, for
    they may well be of one length. BagError names two such files by their attributes; one that a file lacks is not
    asked of it."""
    for what in ALIKE:
        first: tuple[str, str | float] | None = None
        for name, notes in files.items():
            value = text(notes.get(what)) or number(notes.get(what))
            if value != value or (what == "patch_size" and not set(SCALES) & set(notes)):
                continue
            first = first or (name, value)
            if not _equal(first[1], value):
                raise BagError(
                    f"{folder} holds features that do not belong together: {what} of {first[0]} is {_shown(first[1])}, "
                    f"that of {name} {_shown(value)}. Give each kind a folder of its own"
                )


def _equal(a: str | float, b: str | float) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    return math.isclose(a, b, rel_tol=1e-3)


def _shown(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def read_bag(path: str | os.PathLike, *, mpp: float | None = None) -> tuple[np.ndarray, np.ndarray, float]:
    """-> features [N, D], corners float64 [N, 2], side of a tile in level-0 px (nan where the file does not say)."""
    found = read_file(path, mpp=mpp)
    return found.features, found.coords, found.side


def with_cases(bags: Bags, table: Table) -> Bags:
    """The bags of the table's slides, in its order: the same task for bags that came without a table."""
    place = {slide: i for i, slide in enumerate(bags.slides)}
    if missing := [s for s in table.slides if s not in place]:
        raise BagError(f"{len(missing)} slides of the table have no bag: {', '.join(missing[:5])}")
    order = [place[s] for s in table.slides]
    rows = np.concatenate([np.arange(bags.offsets[i], bags.offsets[i + 1]) for i in order])
    offsets = np.concatenate([[0], np.cumsum(bags.lengths[order])])
    kept = replace(bags, features=bags.features[rows], coords=bags.coords[rows], offsets=offsets)
    return replace(kept, slides=table.slides, cases=table.cases, tile=bags.tile[order])
