"""`mfl clusters`: the tiles of a corpus by kind, for people to name: a table, a sheet a cluster, a map a
slide, over the slide itself."""

import csv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.cores import available_cores
from input_pipeline.files import save_picture, whole, write_json
from mfl_jax import search
from mfl_jax.corpus import Corpus, places
from mfl_jax.evaluators import clusters
from mfl_jax.evaluators.clusters import Agreement, Clusters
from mfl_jax.evaluators.tasks import Task
from mfl_jax.report.maps import MOST, class_map
from mfl_jax.report.pictures import sheet

ACROSS, DOWN = 6, 4  # pictures on the sheet of a cluster
SHOWN = 8  # of each cluster, on the one sheet of all


@dataclass(frozen=True)
class Sorted:
    found: Clusters
    agreement: Agreement | None
    names: tuple[str, ...]  # of clusters: number, tiles, and the commonest class where classes are asked for
    unknown: int = 0  # tiles without a class, which the agreement leaves out
    notes: tuple[str, ...] = ()  # on the cases that it leaves out


def sort(corpus: Corpus, k: int, task: Task | None = None, *, seed: int = 0) -> Sorted:
    """k clusters of all tiles and, with a task, how far they are its classes: of the tiles whose class is known, in
    cases that the encoder was not trained on."""
    if not 1 < k <= MOST:
        raise ValueError(f"k is from 2 to {MOST}, which a map can tell apart; it is {k}")
    agreed, common = None, [""] * k
    target, known = task.read(corpus.columns) if task else (np.zeros(0, int), np.zeros(0, bool))
    found = clusters.find(corpus.features, k, seed=seed)
    unseen, notes = _unseen(corpus, known) if task else (known, ())
    unknown = int((unseen & ~known).sum())
    known = known & unseen
    if task and known.any():
        of = (found.assignment[known], target[known], corpus.columns["case"][known], k)
        agreed = clusters.agreement(*of, task=task.name)
        for number, row in enumerate(agreed.table):
            if row.sum():
                common[number] = f", {row.max() / row.sum():.0%} {_class_name(corpus, task, int(row.argmax()))}"
    names = tuple(f"{i}: {size} tiles{common[i]}" for i, size in enumerate(found.sizes))
    return Sorted(found, agreed, names, unknown, notes)


def _unseen(corpus: Corpus, known: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """bool [N], whether the encoder was not trained on the case of a tile; and what is to be said of that."""
    cases = corpus.columns["case"].astype(str)
    seen = np.isin(cases, np.asarray(corpus.trained or (), str))
    if not known.any():
        return ~seen, ("no figure of agreement: no tile has a class",)
    if corpus.trained is None:
        return ~seen, ("which cases the encoder was trained on is not known: some may be among these",)
    every, out = len(np.unique(cases[known])), len(np.unique(cases[known & seen]))
    if out == every:
        return ~seen, (f"no figure of agreement: the encoder was trained on all {every} cases with a class",)
    if out:
        return ~seen, (f"{out} of {every} cases with a class are left out: the encoder was trained on them",)
    return ~seen, ()


def save(folder: Path, corpus: Corpus, result: Sorted) -> list[Path]:
    """clusters.csv and .json; clusters.png and cluster_<n>.png of pictures; map_<slide>.png where places are known."""
    names, of_tile = np.unique(corpus.columns["slide"].astype(str), return_inverse=True)
    slides = names.tolist()
    if unsafe := [s for s in slides if Path(s).name != s or s.startswith(".")]:
        raise ValueError(f"slide_id {unsafe[0]!r} is not a file's name")
    written = [_table(folder / "clusters.csv", corpus, result), folder / "clusters.json"]
    write_json(folder / "clusters.json", document(result))
    cases, found = corpus.columns["case"].astype(str), result.found
    rows = [found.nearest(number, ACROSS * DOWN, cases).tolist() for number in range(len(found.centroids))]
    tiles = [corpus.pictures(of) for of in rows]
    if any(tile is not None for of in tiles for tile in of):
        first = [[*of[:SHOWN], *[None] * (SHOWN - len(of))] for of in tiles]
        captions = [[*name.split(", "), *[""] * (SHOWN - 1 - name.count(", "))] for name in result.names]
        pictures = {"clusters.png": sheet(first, captions=captions)}
        for number, of in enumerate(tiles):
            if not of:  # fewer kinds of tile than clusters
                continue
            lines = [slice(start, start + ACROSS) for start in range(0, len(of), ACROSS)]
            below = [[cases[i] for i in rows[number][s]] for s in lines]
            pictures[f"cluster_{number:02d}.png"] = sheet([of[s] for s in lines], captions=below)
        for name, picture in pictures.items():
            save_picture(folder / name, picture)
            written.append(folder / name)
    with ThreadPoolExecutor(available_cores()) as pool:  # decoding is most of it
        of_slide = np.split(np.argsort(of_tile, kind="stable"), np.cumsum(np.bincount(of_tile))[:-1])
        maps = pool.map(lambda slide, rows: _map(folder, corpus, result, slide, rows), slides, of_slide)
        return written + [path for path in maps if path]


def document(result: Sorted) -> dict[str, Any]:
    """For JSON: sizes, names, and the agreement with classes."""
    found = {
        "clusters": list(result.names),
        "tiles": result.found.sizes.tolist(),
        "notes": [*result.found.notes, *result.notes],
    }
    if result.agreement is None:
        return found
    metrics = {n: {"value": m.value, "low": m.low, "high": m.high} for n, m in result.agreement.metrics.items()}
    agreed: dict[str, Any] = {"task": result.agreement.task, "metrics": metrics, "chance": result.agreement.chance}
    agreed |= {"unknown": result.unknown, "notes": list(result.agreement.notes)}
    return found | {"agreement": agreed | {"table": result.agreement.table.tolist()}}


def _class_name(corpus: Corpus, task: Task, number: int) -> str:
    if task.threshold is not None:
        return f"{task.target} {'>' if number else '<='} {task.threshold:g}"
    names = corpus.classes.get(task.target, ())
    return names[number] if number < len(names) else f"{task.target} {number}"


def _table(path: Path, corpus: Corpus, result: Sorted) -> Path:
    every = range(len(corpus))
    columns = {name: corpus.text(name, every) for name in search.shown(corpus)}
    with whole(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "cluster"])
        writer.writerows(zip(*columns.values(), result.found.assignment.tolist(), strict=True))
    return path


def _map(folder: Path, corpus: Corpus, result: Sorted, slide: str, rows: np.ndarray) -> Path | None:
    """None where it is not known where the tiles lie, or how large they are."""
    corners, side = places(corpus.columns, rows)
    if not (np.isfinite(corners).all() and side > 0):
        return None
    path = folder / f"map_{slide}.png"
    codes = result.found.assignment[rows]
    save_picture(path, class_map(corners, side, codes, result.names, slide, corpus.backdrop(rows)))
    return path
