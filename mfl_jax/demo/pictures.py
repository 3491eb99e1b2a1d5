"""Sheets of the demo's report: pairs, registration, views, and what the encoders find alike."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.files import read_json
from input_pipeline.show import batch_picture
from input_pipeline.slides.transform import Transform
from input_pipeline.stream import train_stream
from input_pipeline.tileset import TileSet
from mfl_jax import config, contact_sheet, looks
from mfl_jax.evaluators import Task
from mfl_jax.report import pictures as sheets

OVERLAYS, QUERIES, NEAREST = 4, 5, 6

Section = dict[str, Any]
Pictures = dict[str, bytes | np.ndarray]


def pairs(tileset: TileSet, seed: int) -> tuple[Section, Pictures]:
    with train_stream(tileset, batch=6, seed=seed) as stream:
        picture = batch_picture(next(stream), tileset.spec, side=160)
    caption = "Six tiles of training as they are stored: H&E, then the partners, registered and cut at the same place."
    found = {"picture": "pairs", "caption": caption, "alt": "H&E tiles beside immunofluorescence and nuclear maps"}
    return {"what": "The same tissue more than once. H&E is all that is left at the end.", "pictures": [found]}, {
        "pairs": picture
    }


def registration(slides: Path, tiled: Path) -> tuple[list[Section], Pictures]:
    """Of every moved partner: what registration says of itself, and the error against what the phantom knows."""
    rows: list[Section] = []
    shown: Pictures = {}
    for folder in sorted((tiled / "slides").iterdir()):
        status = read_json(folder / "status.json", "the status of a slide")
        for partner, said in status["registered"].items():
            row = {"slide": folder.name, "partner": partner, "score": said["score"]}
            row["passed"] = partner not in status["rejected"]
            row["error_um"] = _true_error(slides, folder, partner)
            if len(shown) < OVERLAYS:
                name = f"overlay-{folder.name}-{partner}"
                shown[name] = (folder / f"{partner}.overlay.jpg").read_bytes()
                row["picture"] = name
            rows.append(row)
    return rows, shown


def _true_error(slides: Path, folder: Path, partner: str) -> float:
    """Median distance, in um, between where the centres of tiles were sent and where they lie."""
    with np.load(folder / "tiles.npz", allow_pickle=False) as file:
        points = np.stack([file["x"], file["y"]], -1).astype(np.float64)
    points *= read_json(folder / "status.json", "the status of a slide")["mpp"]
    found = Transform.load(folder / f"{partner}.transform.json")(points)
    truth = Transform.load(slides / partner / f"{folder.name}_{partner}.truth.json")(points)
    return float(np.median(np.linalg.norm(found - truth, axis=-1)))


def views(specs: Mapping[str, str], folder: Path) -> tuple[Section, Pictures]:
    """One sheet an arm; `specs` are configs by the title of the arm."""
    found: list[Section] = []
    shown: Pictures = {}
    for number, (title, spec) in enumerate(specs.items()):
        path = contact_sheet.of_config(config.load(spec), folder / f"views-{number}.png", rows=5)
        shown[f"views-{number}"] = path.read_bytes()
        path.unlink()
        found.append({"picture": f"views-{number}", "caption": f"{title}: stored pixels, then what the network sees."})
    what = "Every arm sees the H&E through the same views. Blur hides the fine grain of chromatin half of the time."
    return {"what": what, "pictures": found}, shown


def neighbours(
    encoders: Mapping[str, looks.Encoder], columns: Mapping[str, np.ndarray], tileset: TileSet, task: Task
) -> tuple[Section, Pictures]:
    """The nearest tiles of other cases to a few test tiles, one sheet an arm, the same queries for all."""
    labels, known = task.read(columns)
    cases = np.asarray(columns["case"])
    share = np.asarray(columns[task.target], np.float64)
    clear = known & (np.abs(share - 0.5) > 0.4) & (np.asarray(columns["cells"]) >= 4)
    test = np.flatnonzero(np.isin(cases, list(tileset.splits["test"])) & clear)
    draw = np.random.default_rng(1).permutation(test)
    queries = np.concatenate([draw[labels[draw] == k][: (QUERIES + k) // 2] for k in (0, 1)])
    if not len(queries):
        raise looks.NothingToShow("no test tile has enough nuclei of one state")
    words = np.array(["negative", "positive"])
    found: list[Section] = []
    shown: Pictures = {}
    for name, encoder in encoders.items():
        near = _nearest(encoder.features, queries, cases, clear)
        tiles = [list(looks.decoded(tileset, row, "he")) for row in near]
        told = [words[labels[row]].tolist() for row in near]
        sheet = sheets.neighbours_sheet(
            list(looks.decoded(tileset, queries, "he")), tiles, words[labels[queries]].tolist(), told
        )
        shown[f"neighbours-{name}"] = sheet
        right = np.mean(labels[near] == labels[queries][:, None])
        caption = f"{encoder.title}: {right:.0%} of these {near.size} neighbours have the query's marker state."
        found.append({"picture": f"neighbours-{name}", "caption": caption})
    what = "Test tiles, and the tiles of other cases that are nearest by cosine. A whole frame: the same marker state."
    return {"what": what, "pictures": found}, shown


def _nearest(features: np.ndarray, queries: np.ndarray, cases: np.ndarray, clear: np.ndarray) -> np.ndarray:
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    alike = unit[queries] @ unit.T
    alike[(cases[queries][:, None] == cases) | ~clear] = -np.inf
    return np.argsort(-alike, axis=1, kind="stable")[:, :NEAREST]
