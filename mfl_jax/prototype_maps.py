"""`mfl prototypes`: what SLPD found in each slide, for people to see: a table, maps of clusters, slides side by side.

All of it is in the run's last checkpoint; no region is embedded again.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from input_pipeline.files import save_picture, whole
from input_pipeline.slides.reader import open_slide
from mfl_jax.evaluators.mil.maps import heat
from mfl_jax.report.maps import COLOURS, COVER, class_map, of_slide
from mfl_jax.report.pictures import sheet

SIDE, LONGEST = 240, 900  # px: of a picture on the sheet, of a slide's thumbnail


@dataclass(frozen=True)
class Found:
    """The tables of a run beside the slides and regions they are of. Colours are of a slide's own clusters."""

    tables: dict[str, np.ndarray]  # as in methods/slpd.py
    slides: list[str]
    of_slide: np.ndarray  # int [N]: of regions
    columns: dict[str, np.ndarray]  # [N]: x, y, the corner, and side in level-0 px; case; label as text
    step: int

    def rows(self, slide: int) -> np.ndarray:
        return np.flatnonzero(self.of_slide == slide)

    def one(self, name: str, slide: int) -> str:
        """What all regions of a slide have in common in a column; '' where they differ."""
        values = set(self.columns[name][self.rows(slide)].tolist())
        return values.pop() if len(values) == 1 else ""

    def cells(self, slide: int) -> tuple[np.ndarray, float]:
        """Corners [R, 2] and side to draw regions with: of those that overlap the middle, so that all are seen."""
        rows = self.rows(slide)
        corners, side = np.stack([self.columns[name][rows] for name in ("x", "y")], 1), self.columns["side"][rows[0]]
        apart = np.concatenate([np.diff(np.unique(corners[:, axis])) for axis in range(2)])
        drawn = min([side, *apart.tolist()])
        return corners + (side - drawn) / 2, float(drawn)

    def neighbours(self, slide: int) -> list[tuple[int, int, float]]:
        """(rank, slide, mean cosine of prototypes and what they are matched with)"""
        found, vectors = [], self.tables["prototypes"]
        for rank, other in enumerate(self.tables["neighbour"][slide].tolist()):
            if other >= 0:
                matched = vectors[other][self.tables["transfer"][slide, rank]]
                found.append((rank, other, float((vectors[slide] * matched).sum(1).mean())))
        return found


def read(run: str | Path, tileset: str | Path = "") -> Found:
    """Of a run of slpd and the set it was trained on (by default where its config says). ValueError for others."""
    from mfl_jax.data import open_set
    from mfl_jax.methods.slpd import TABLES
    from mfl_jax.trained import open_run

    trained = open_run(run)
    if missing := set(TABLES) - set(trained.extra):
        raise ValueError(f"{run} keeps no {', '.join(sorted(missing))}: it is no run of slpd. For others: mfl clusters")
    tables = {name: np.asarray(trained.extra[name]) for name in TABLES}
    if not tables["eligible"].any():
        raise ValueError(
            f"{run} has no prototypes yet: it is at step {trained.step}, and looks for them first after slpd.start = "
            f"{trained.config.slpd.start}, in slides of {trained.config.slpd.min_regions} regions or more"
        )
    tiles = open_set(str(tileset or trained.config.data.tileset))
    shapes, has = (len(tables["eligible"]), len(tables["assignment"])), (len(tiles.slides), len(tiles))
    if shapes != has:
        raise ValueError(
            f"{run} was trained on {shapes[0]} slides with {shapes[1]} regions; {tiles.root} has {has[0]} with "
            f"{has[1]}. Give the set it was trained on as --tileset"
        )
    columns = {name: np.asarray(tiles.tiles[name], np.float64) for name in ("x", "y")}
    columns["side"] = tiles.spec.size * tiles.spec.mpp / np.asarray(tiles.tiles["mpp"], np.float64)
    columns["case"] = np.array(tiles.cases)[tiles.tiles["case"]]
    names = np.array([*tiles.spec.label_names, ""])
    label = np.asarray(tiles.tiles["label"])
    columns["label"] = names[np.where((label >= 0) & (label < len(names) - 1), label, -1)]
    return Found(tables, tiles.slides, np.asarray(tiles.tiles["slide"]), columns, trained.step)


def save(folder: Path, found: Found, show: int = 12, slides: Mapping[str, Path] | None = None) -> list[Path]:
    """prototypes.csv of all slides; of the first `show` that have prototypes, map_<slide>.png of clusters, and
    neighbours.png. `slides` are pictures by slide_id, to draw over."""
    shown = np.flatnonzero(found.tables["eligible"])[:show].tolist()
    if unsafe := [s for s in (found.slides[i] for i in shown) if Path(s).name != s or s.startswith(".")]:
        raise ValueError(f"slide_id {unsafe[0]!r} is not a file's name")
    written = [_table(folder / "prototypes.csv", found)]
    for slide in shown:
        codes = found.tables["assignment"][found.rows(slide)]
        names = [f"{k}: {count} regions" for k, count in enumerate(_sizes(found, slide))]
        file = (slides or {}).get(found.slides[slide])
        picture = class_map(*found.cells(slide), codes, names, found.slides[slide], of_slide(file) if file else None)
        written.append(folder / f"map_{found.slides[slide]}.png")
        save_picture(written[-1], picture)
    written.append(folder / "neighbours.png")
    save_picture(written[-1], neighbours_sheet(found, shown, slides or {}))
    return written


def neighbours_sheet(found: Found, shown: list[int], slides: Mapping[str, Path]) -> np.ndarray:
    """A slide a row: itself, and the slides most like it, in the colours of the prototypes that theirs are matched
    with. A frame says whether the label is the same, where both are known."""
    most = found.tables["neighbour"].shape[1]
    rows, captions, frames = [], [], []
    frame: list[bool | None]
    for slide in shown:
        own = found.tables["assignment"][found.rows(slide)]
        label = found.one("label", slide)
        row, below, frame = [_over_slide(found, slide, own, slides)], [_caption(found, slide)], [None]
        for rank, other, cosine in found.neighbours(slide):
            row.append(_over_slide(found, other, matched(found, slide, rank), slides))
            below.append(f"{cosine:.3f} {_caption(found, other)}")
            theirs = found.one("label", other)
            frame.append(theirs == label if theirs and label else None)
        spare = 1 + most - len(row)
        rows.append([*row, *[None] * spare])
        captions.append([*below, *[""] * spare])
        frames.append([*frame, *[None] * spare])
    columns = ["slide", *(f"nearest {rank + 1}" for rank in range(most))]
    return sheet(rows, columns=columns, captions=captions, frames=frames, side=SIDE)


def matched(found: Found, slide: int, rank: int) -> np.ndarray:
    """For the regions of a neighbour, the cluster of `slide` that their cluster stands for; -1 where for none."""
    other = int(found.tables["neighbour"][slide, rank])
    stands = np.full(found.tables["prototypes"].shape[1] + 1, -1)  # the last: of a region without a cluster
    for own, theirs in reversed(list(enumerate(found.tables["transfer"][slide, rank].tolist()))):
        stands[theirs] = own
    return stands[found.tables["assignment"][found.rows(other)]]


def _caption(found: Found, slide: int) -> str:
    label = found.one("label", slide)
    return found.slides[slide] + (f" ({label})" if label else "")


def _sizes(found: Found, slide: int) -> list[int]:
    codes = found.tables["assignment"][found.rows(slide)]
    return np.bincount(codes[codes >= 0], minlength=found.tables["prototypes"].shape[1]).tolist()


def _over_slide(found: Found, slide: int, codes: np.ndarray, slides: Mapping[str, Path]) -> np.ndarray:
    """A square picture: regions in the colour of their code, over the slide in grey or over white; -1 is not drawn."""
    (corners, side), path = found.cells(slide), slides.get(found.slides[slide])
    if path is None:
        corners = corners - corners.min(0)
        width, height = (corners.max(0) + side).tolist()
        scale = LONGEST / max(width, height)
        base = np.full((max(1, round(height * scale)), max(1, round(width * scale)), 3), 255.0)
    else:
        with open_slide(path) as opened:
            base = opened.thumbnail(LONGEST)[..., :3].mean(-1, keepdims=True).repeat(3, -1)
            width, height, scale = opened.width, opened.height, base.shape[1] / opened.width
    drawn = codes >= 0
    canvas = heat(corners[drawn], side, codes[drawn].astype(np.float64), width, height, scale)
    known = np.zeros(base.shape[:2], bool)
    tall, wide = (min(a, b) for a, b in zip(base.shape, canvas.shape, strict=False))
    known[:tall, :wide] = ~np.isnan(canvas[:tall, :wide])
    colour = np.zeros_like(base)
    colour[known] = np.array(COLOURS)[canvas[:tall, :wide][known[:tall, :wide]].astype(int) % len(COLOURS)]
    cover = (1.0 if path is None else COVER) * known[..., None]
    return _square(np.rint(base * (1 - cover) + colour * cover).astype(np.uint8))


def _square(picture: np.ndarray) -> np.ndarray:
    tall, wide = picture.shape[:2]
    side = max(tall, wide)
    above, left = (side - tall) // 2, (side - wide) // 2
    room = ((above, side - tall - above), (left, side - wide - left), (0, 0))
    return np.pad(picture, room, constant_values=255)


def _table(path: Path, found: Found) -> Path:
    most = found.tables["neighbour"].shape[1]
    heads = ["slide", "case", "label", "regions", "clusters"]
    heads += [f"{name}_{rank + 1}" for rank in range(most) for name in ("neighbour", "cosine", "matched")]
    with whole(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(heads)
        for slide, name in enumerate(found.slides):
            sizes = " ".join(map(str, _sizes(found, slide))) if found.tables["eligible"][slide] else ""
            row = [name, found.one("case", slide), found.one("label", slide), len(found.rows(slide)), sizes]
            for rank, other, cosine in found.neighbours(slide):
                taken = " ".join(map(str, found.tables["transfer"][slide, rank].tolist()))
                row += [found.slides[other], f"{cosine:.4f}", taken]
            writer.writerow([*row, *[""] * (len(heads) - len(row))])
    return path
