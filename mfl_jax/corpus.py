"""Tiles to search in or to sort: features, places and pictures, of a tile set and a run or of a folder of features."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from input_pipeline.tileset import TileSet
    from mfl_jax.evaluators.embed import Embedded
    from mfl_jax.report.maps import Backdrop

NAMES = ("tile", "slide", "case", "x", "y", "mpp", "side")
Pictures = Callable[[Sequence[int]], list[np.ndarray | None]]


@dataclass(frozen=True)
class Corpus:
    """Row i of everything is one tile, whose number for people is `tile`. x and y are its corner and `side` its side in
    level-0 px, mpp is um per level-0 px; nan where not known. Where there is a column `unit` that says 'um' of a tile,
    x, y and side are um, and mpp is not known.
    """

    features: np.ndarray  # float32 [N, D]
    columns: dict[str, np.ndarray]  # NAMES, and whatever else is known of a tile
    pictures: Pictures
    classes: dict[str, tuple[str, ...]]  # of columns that hold classes by number
    trained: tuple[str, ...] | None = None  # cases that the encoder was trained on; None where nothing says
    backdrop: Callable[[np.ndarray], "Backdrop | None"] = lambda rows: None  # of the rows of a slide, to draw over

    def __len__(self) -> int:
        return len(self.features)

    def text(self, name: str, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Values of a column for people."""
        if name not in self.columns:
            near = difflib.get_close_matches(name, self.columns, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"there is no column {name!r} but {', '.join(sorted(self.columns))}{hint}")
        values, names = self.columns[name][np.asarray(rows, np.int64)], self.classes.get(name, ())
        if names:
            return [names[v] if 0 <= v < len(names) else "unknown" for v in values.tolist()]
        return [f"{v:g}" if isinstance(v, float) else str(v) for v in values.tolist()]


def of_tileset(run: Path, tileset: Path, *, batch: int = 256, split: str | None = None, feature: str = "") -> Corpus:
    """Every tile of a set, or of a split, through a run's encoder; ValueError where it was trained on other tiles.

    Without a name, the feature is 'descriptor' where the method gives one (it is made to be searched by), else 'he'.
    """
    from input_pipeline.show import Axes
    from input_pipeline.tileset import TileSet
    from mfl_jax import sharding
    from mfl_jax.arms import partners_of_embed
    from mfl_jax.evaluators.embed import embed_set
    from mfl_jax.report import maps
    from mfl_jax.trained import check_tiles, open_run, read_run

    tiles, (_, facts) = TileSet.open(tileset), read_run(Path(run))
    check_tiles(run, facts, tiles.spec)
    mesh = sharding.make_mesh()
    trained = open_run(run, mesh)
    options: dict[str, Any] = {"batch": batch, "split": split}
    options["partners"] = partners_of_embed(trained)
    found = embed_set(trained.method.embed, trained.params, trained.extra, tiles, mesh, **options)
    feature = feature or ("descriptor" if "descriptor" in found.features else "he")
    if feature not in found.features:
        raise ValueError(f"{run} gives no features {feature!r}; it gives {', '.join(sorted(found.features))}")

    def pictures(rows: Sequence[int]) -> list[np.ndarray | None]:
        he = [tiles.decode(example)["he"] for example in tiles.read(found.ids[np.asarray(rows, np.int64)])]
        if tiles.spec.he_kind == "grid" and he:
            grids = np.array(he)
            he = list(Axes.of(grids).colours(grids))
        return he

    def backdrop(rows: np.ndarray) -> "Backdrop | None":
        if tiles.spec.he_kind == "grid":  # colours of features are not those of another picture of them
            return None
        corners, side = places(columns, rows)
        return maps.of_tiles(corners, side, lambda some: pictures(rows[np.asarray(some)].tolist()))

    names = {"label": tuple(tiles.spec.label_names)} if tiles.spec.label_names else {}
    columns = columns_of(found, tiles)
    return Corpus(found.features[feature], columns, pictures, names, facts.train_cases, backdrop)


def places(columns: Mapping[str, np.ndarray], rows: np.ndarray) -> tuple[np.ndarray, float]:
    """Corners [R, 2] of tiles of a slide, and their side."""
    corners = np.stack([columns[name][rows].astype(np.float64) for name in ("x", "y")], 1)
    return corners, float(columns["side"][rows[0]])


def columns_of(found: "Embedded", tiles: "TileSet") -> dict[str, np.ndarray]:
    """NAMES, and whatever else the tile set knows."""
    columns = dict(found.columns)
    columns |= {name: np.full(len(found), np.nan) for name in ("x", "y", "mpp") if name not in columns}
    columns["tile"] = found.ids
    columns["side"] = tiles.spec.size * tiles.spec.mpp / np.asarray(columns["mpp"], np.float64)
    return columns


def of_folder(folder: Path, slides: Path | None = None, *, mpp: float | None = None) -> Corpus:
    """Files of features by slide, as `mfl extract` and its peers write them; `slides` is a cohort (CSV or folder) whose
    slides the pictures are read from; `mpp` is um per level-0 px, where a file does not say (STAMP's). Where a file
    names no slide, its own name is that; where it names no case, the cohort does, or else TCGA's patient, or else the
    slide is its own case.
    """
    from input_pipeline.features import find_folder, read_bag, side_um
    from mfl_jax.bags import check_alike
    from mfl_jax.report import maps
    from mfl_jax.slides import case_of, read_cohort
    from mfl_jax.store import trained_cases

    known = {} if slides is None else {slide.slide_id: slide for slide in read_cohort(slides)}
    root = find_folder(folder)
    paths = sorted(root.glob("*.h5"))
    features, parts, units = [], [], []
    said: dict[str, Mapping[str, Any]] = {}
    for path in paths:
        bag = read_bag(path, mpp=mpp)
        of_file, coords = bag.features, bag.coords
        slide, case, scale = _said(path)
        scale = scale if scale > 0 or mpp is None else mpp
        side = side_um(bag.notes) if bag.unit == "um" else bag.side
        case = case or (known[slide].case_id if slide in known else case_of(slide))
        size = len(of_file)
        said |= {path.name: bag.notes} if size else {}
        units.append(np.full(size, bag.unit))
        features.append(np.asarray(of_file, np.float32))
        fixed = {"slide": slide, "case": case, "mpp": scale, "side": side}
        parts.append({"x": coords[:, 0], "y": coords[:, 1]} | {k: np.full(size, v) for k, v in fixed.items()})
    lengths = {f.shape[1]: path.name for f, path in zip(features, paths, strict=True) if len(f)}
    if len(lengths) != 1:
        what = f"features of different lengths: {lengths}" if lengths else "no tile"
        raise ValueError(f"{folder} holds {what}")
    check_alike(root, said)
    kept = [i for i, f in enumerate(features) if len(f)]
    columns = {name: np.concatenate([parts[i][name] for i in kept]) for name in NAMES[1:]}
    columns["tile"] = np.arange(len(columns["slide"]))
    if (unit := np.concatenate([units[i] for i in kept]) == "um").any():
        columns["unit"] = np.where(unit, "um", "px")
    files = {name: of.he for name, of in known.items()}

    def backdrop(rows: np.ndarray) -> "Backdrop | None":
        slide, unit = (str(columns[name][rows[0]]) if name in columns else "px" for name in ("slide", "unit"))
        return maps.of_slide(files[slide], known[slide].mpp, unit) if slide in files else None

    every = np.concatenate([features[i] for i in kept])
    return Corpus(every, columns, _of_slides(columns, files), {}, trained_cases(root), backdrop)


def locate(corpus: Corpus, slide: str, x: float, y: float, *, um: bool = False, radius: float = 0.0) -> np.ndarray:
    """Rows of the tile at a place of a slide; with a radius, of all whose centre lies within, the nearest first.

    Places are level-0 px, or um: either is refused where it is not known how the other's tiles lie in it. ValueError
    where no tile is there, with the place of the nearest.
    """
    of_slide = corpus.columns["slide"].astype(str)
    rows = np.flatnonzero(of_slide == slide)
    if not len(rows):
        names = sorted(set(of_slide.tolist()))
        near = difflib.get_close_matches(slide, names, n=1)
        raise ValueError(
            f"there is no slide {slide!r} among {len(names)}, such as {', '.join(names[:3])}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    in_um = corpus.columns["unit"][rows[0]] == "um" if "unit" in corpus.columns else False
    if in_um and not um:
        raise ValueError(
            f"tiles of slide {slide!r} lie at places in um, and its um per px is not known: give the place "
            "in um (--um), or that scale (--mpp)"
        )
    scale = corpus.columns["mpp"][rows].astype(np.float64) if um and not in_um else np.ones(len(rows))
    if not np.isfinite(scale).all():
        raise ValueError(f"um per px of slide {slide!r} is not known: give the place in level-0 px")
    side = np.nan_to_num(corpus.columns["side"][rows].astype(np.float64), nan=1.0) * scale
    corner = np.stack([corpus.columns[c][rows].astype(np.float64) * scale for c in ("x", "y")])
    apart = corner + side / 2 - np.array([[x], [y]])
    inside = np.hypot(*apart) <= radius if radius > 0 else (np.abs(apart) <= side / 2).all(0)
    order = np.argsort(np.hypot(*apart), kind="stable")
    if not inside.any():
        unit, at = "um" if um else "px", corner[:, order[0]]
        raise ValueError(
            f"no tile of slide {slide!r} is at {x:g}, {y:g} {unit}; the nearest has its corner at {at[0]:g}, {at[1]:g}"
        )
    found = rows[order[inside[order]]]
    return found if radius > 0 else found[:1]


def _said(path: Path) -> tuple[str, str, float]:
    """slide_id (else the file's name), case_id (else '') and mpp_level0 of a file."""
    import h5py

    with h5py.File(path, "r") as file:
        notes = dict(file.attrs) | (dict(file["coords"].attrs) if "coords" in file else {})
    names = []
    for key in ("slide_id", "case_id"):
        value = notes.get(key, "")
        value = value.decode() if isinstance(value, bytes) else str(value)
        names.append(value)
    mpp = notes.get("mpp_level0", math.nan)
    return names[0] or path.stem, names[1], float(mpp)


def _of_slides(columns: dict[str, np.ndarray], files: dict[str, Path]) -> Pictures:
    def pictures(rows: Sequence[int]) -> list[np.ndarray | None]:
        return [_cut(files, {name: values[i] for name, values in columns.items()}) for i in rows]

    return pictures


def _cut(files: dict[str, Path], tile: dict[str, Any]) -> np.ndarray | None:
    """None where the cohort has no such slide, or the side of its tiles in px is not known."""
    from input_pipeline.slides.reader import open_slide

    if tile["slide"] not in files or not tile["side"] > 0 or tile.get("unit") == "um":
        return None
    side = max(1, round(float(tile["side"])))
    with open_slide(files[tile["slide"]]) as slide:
        return slide.read_native(0, round(float(tile["x"])), round(float(tile["y"])), side, side)
