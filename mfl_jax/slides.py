"""Where the tiles of slides come from: a folder that `mfl tile` wrote, a tile set, or slides, which are tiled first."""

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from input_pipeline import cohort
from input_pipeline import tile as tiling
from input_pipeline.files import read_json
from input_pipeline.slides.reader import open_slide
from input_pipeline.slides.segments import Clock
from input_pipeline.tileset import TileSet
from input_pipeline.tileset.spec import decode_payload
from mfl_jax.store import Sheet

OPEN = 2  # slides, by a process that reads: each has a cache
case_of = cohort.case_of


class Tiles(Protocol):
    """An open slide; `read` may be called by many threads at once."""

    sheet: Sheet

    def read(self, start: int, stop: int, out: np.ndarray) -> None: ...  # out: as Source.layout(stop - start)
    @property
    def timings(self) -> Mapping[str, float]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Entry:
    """A slide; `signature` changes when its tiles do, and `fault` says why there are none. `open` can be pickled."""

    slide_id: str
    case_id: str
    labels: Mapping[str, str]
    signature: str
    open: Callable[[], Tiles]
    fault: str = ""


@dataclass(frozen=True)
class Source:
    entries: tuple[Entry, ...]
    size: int  # px of a tile
    mpp: float  # um per px of it
    overlap: int  # px that neighbours share
    kind: str = "image"  # or 'grid': regions of tile features
    channels: int = 3

    def layout(self, rows: int) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of an array of tiles, or of regions."""
        return (rows, self.size, self.size, self.channels), "uint8" if self.kind == "image" else "float16"


def kind_of(path: Path) -> str:
    """'tile set', 'tiled' or 'slides'."""
    if (path / "manifest.json").is_file():
        return "tile set"
    return "tiled" if (path / "cohort.json").is_file() else "slides"


# --- slides


def read_cohort(path: Path, say: Callable[[str], None] = lambda line: None) -> list[cohort.Slide]:
    """As cohort.read, of the H&E alone; a folder of slides without he/, or one slide, will do as well."""
    if path.is_file() and path.suffix.lower() in cohort.SLIDE_SUFFIXES:
        return cohort.check([_named(path)], path)
    if path.is_dir() and not (path / "he").is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in cohort.SLIDE_SUFFIXES and p.name[0] != ".")
        if not files:
            raise ValueError(
                f"{path} holds no slides, no folder he/ of slides, and nothing that mfl tile or pack wrote"
            )
        return cohort.check([_named(p) for p in files], path)
    return [replace(slide, partners=(), cells=None, regions=None) for slide in cohort.read(path, say=say)]


def _named(path: Path) -> cohort.Slide:
    """The slide is called as its file is, and the case as well but for TCGA's, whose names begin with the patient."""
    stem = path.name.removesuffix(path.suffix).removesuffix(".ome")
    return cohort.Slide(stem, case_of(stem), path)


# --- a folder that mfl tile wrote


def of_tiled(folder: Path) -> Source:
    """Slides that could not be tiled are there, with their fault."""
    document = read_json(folder / "cohort.json", "made by mfl tile")
    if document.get("version") != tiling.VERSION:
        raise ValueError(f"{folder} was tiled by another version ({document.get('version')!r}); run mfl tile again")
    params = tiling.Params(**document["params"])
    entries = []
    for row in map(cohort.Slide.from_json, document["slides"]):
        status = tiling.read_status(folder, row)
        fault = ""
        if status["state"] == "failed":
            fault = f"tiling failed: {status['reason']}"
        elif not tiling.is_done(folder, row, params):
            fault = "its files changed since it was tiled; run mfl tile again"
        start = partial(_Slide, folder, row, params)
        entries.append(Entry(row.slide_id, row.case_id, row.labels, status["signature"], start, fault))
    step = params.size if params.step is None else params.step
    return Source(tuple(entries), params.size, params.mpp, max(0, params.size - step))


class _Slide:
    """Tiles read from a slide at the places that mfl tile found."""

    def __init__(self, folder: Path, row: cohort.Slide, params: tiling.Params):
        with np.load(tiling.folder_of(folder, row) / "tiles.npz", allow_pickle=False) as stored:
            coords = np.stack([stored["x"], stored["y"]], axis=1).astype(np.int64)
        self._params = params
        self._slide = open_slide(row.he, mpp=row.mpp, default_mpp=params.default_mpp)
        if self._slide.mpp is None or not self._slide.is_rgb or self._slide.dtype != np.uint8:
            self._slide.close()
            raise ValueError(f"{row.he}: RGB of 8 bits and of known um per pixel is expected; run mfl tile again")
        step = params.size if params.step is None else params.step
        self.sheet = Sheet(
            row.slide_id,
            row.case_id,
            coords,
            self._slide.mpp,
            self._slide.mpp_source or "",
            params.size,
            params.mpp,
            max(0, params.size - step),
            (self._slide.width, self._slide.height),
        )

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        size, mpp = self._params.size, self._params.mpp
        for row, (x, y) in zip(out, self.sheet.coords[start:stop].tolist(), strict=True):
            row[:] = self._slide.read_region(x, y, size, size, mpp)

    @property
    def timings(self) -> Mapping[str, float]:
        return self._slide.timings

    def close(self) -> None:
        self._slide.close()


# --- a tile set


def of_tile_set(folder: Path) -> Source:
    tileset = TileSet.open(folder)
    spec = tileset.spec
    classes = dict(spec.params.get("classes") or {}) | {"label": spec.label_names}
    entries = []
    for i, about in enumerate(tileset.manifest["slides"]):
        first, stop = int(tileset.first_row[i]), int(tileset.first_row[i + 1])
        columns = {name: tileset.tiles[name][first:stop] for name in tileset.tiles if cohort.is_label(name)}
        labels = {name: _label(name, values, classes.get(name, ())) for name, values in columns.items()}
        signature = f"{spec.sha256} {about['digest']}"
        start = partial(_Packed, tileset, about, first, stop)
        entries.append(Entry(about["slide"], about["case"], labels, signature, start))
    return Source(tuple(entries), spec.size, spec.mpp, _overlap(tileset), spec.he_kind, spec.he_channels)


def _label(column: str, values: np.ndarray, names: Sequence[str]) -> str:
    """Of a slide: that of its tiles; '' where they differ or have none. A number stays one, unless it stands for a
    class, as `label` does always."""
    found = np.unique(values)
    if len(found) != 1 or not np.isfinite(found[0]):
        return ""
    if names or column == "label":
        return names[int(found[0])] if 0 <= found[0] < len(names) else ""
    return np.format_float_positional(found[0], trim="-")


def _overlap(tileset: TileSet) -> int:
    tiled = tileset.spec.params.get("tile") or tileset.spec.params
    step = tiled.get("step") if isinstance(tiled, Mapping) else None
    return max(0, tileset.spec.size - step) if isinstance(step, int) else 0


class _Packed:
    """Tiles of one slide of a tile set; partners are not decoded."""

    def __init__(self, tileset: TileSet, about: Mapping[str, Any], first: int, stop: int):
        self._tileset, self._first = tileset, first
        self._spec = replace(tileset.spec, partners=())
        self._clock = Clock("read", "decode")
        coords = np.stack([tileset.tiles[name][first:stop] for name in ("x", "y")], axis=1).astype(np.int64)
        mpp = float(tileset.tiles["mpp"][first]) if stop > first else float(about["source"].get("mpp") or math.nan)
        source = str(about["source"].get("mpp_source") or "tile set")
        size, scale = self._spec.size, self._spec.mpp
        mpp, source = (mpp, source) if math.isfinite(mpp) and mpp > 0 else (scale, "tile set")
        side = math.ceil(size * scale / mpp)
        extent = (int(coords[:, 0].max()) + side, int(coords[:, 1].max()) + side) if len(coords) else (0, 0)
        overlap = _overlap(tileset)
        self.sheet = Sheet(about["slide"], about["case"], coords, mpp, source, size, scale, overlap, extent)

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        begin = time.perf_counter()
        examples = self._tileset.read(range(self._first + start, self._first + stop))
        between = time.perf_counter()
        self._clock.add("read", between - begin)
        for row, example in zip(out, examples, strict=True):
            try:
                decode_payload(self._spec, example.payload, {"he": row})
            except ValueError as error:
                raise ValueError(f"{example.file}, tile {example.id}: {error}") from error
        self._clock.add("decode", time.perf_counter() - between)

    @property
    def timings(self) -> Mapping[str, float]:
        return self._clock.read()

    def close(self) -> None:
        """The tile set itself is shared by its slides."""


# --- in other processes


class SlidesApart:
    """What a process of the crew does: it opens the slides that it reads from, and keeps the last few open."""

    def __init__(self, entries: Sequence[Callable[[], Tiles]]):
        self._entries = entries
        self._open: OrderedDict[int, Tiles] = OrderedDict()

    def __call__(self, arrays: dict[str, np.ndarray], slide: int, start: int, stop: int, row: int) -> dict[str, float]:
        """The seconds it took, by stage."""
        tiles = self._open.pop(slide, None) or self._entries[slide]()
        self._open[slide] = tiles
        if len(self._open) > OPEN:
            self._open.popitem(last=False)[1].close()
        before = Counter(tiles.timings)
        tiles.read(start, stop, arrays["he"][row : row + stop - start])
        return dict(Counter(tiles.timings) - before)
