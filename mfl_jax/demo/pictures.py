"""Sheets of the demo's report: pairs, registration, views, what the encoders look at, and what they find alike."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from input_pipeline.files import read_json
from input_pipeline.show import batch_picture
from input_pipeline.slides.transform import Transform
from input_pipeline.stream import train_stream
from input_pipeline.tileset import TileSet
from mfl_jax import config, contact_sheet, trained
from mfl_jax.evaluators import Task, probe, saliency
from mfl_jax.report import pictures as sheets

MARKER = 1  # channel of the immunofluorescence
OVERLAYS, TILES, DRAWN, QUERIES, NEAREST = 4, 120, 8, 5, 6

Section = dict[str, Any]
Pictures = dict[str, bytes | np.ndarray]


class NothingToShow(ValueError):  # noqa: N818
    """The cohort is so small that no tile is fit for the picture."""


@dataclass(frozen=True)
class Encoder:
    """One arm, as these pictures need it: its first run, and the features of every tile."""

    title: str
    run: trained.Trained
    features: np.ndarray


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
            row = {"slide": folder.name, "partner": partner, "score": said["score"], "passed": True}
            row["error_um"] = _true_error(slides, folder, partner)
            if len(shown) < OVERLAYS:
                name = f"overlay-{folder.name}-{partner}"
                shown[name] = (folder / f"{partner}.overlay.jpg").read_bytes()
                row["picture"] = name
            rows.append(row)
        for partner in status["rejected"]:
            rows.append({"slide": folder.name, "partner": partner, "passed": False})
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


def looked_at(
    encoders: Mapping[str, Encoder], columns: Mapping[str, np.ndarray], tileset: TileSet, task: Task
) -> tuple[Section, Pictures]:
    """Integrated gradients of each arm's linear probe, scored against the marker of the immunofluorescence."""
    ids = _mixed_tiles(tileset, columns, task)
    if not len(ids):
        raise NothingToShow("no test tile holds positive and negative nuclei")
    he, marker = _decoded(tileset, ids, "he"), _decoded(tileset, ids, "if")[..., MARKER]
    rings, _ = saliency.marker_masks(marker)
    masks = np.stack([ndimage.binary_fill_holes(ring) for ring in rings])
    arms: list[Section] = []
    heats: dict[str, np.ndarray] = {}
    for name, encoder in encoders.items():
        fitted = probe.evaluate(encoder.features, columns, tileset.splits, task, resamples=0)
        run = encoder.run
        assert fitted.direction is not None
        heats[name] = saliency.maps_of(run.method.embed, run.params, run.extra, he, fitted.direction, steps=16)
    seen = _seen(next(iter(heats.values())))
    inside = np.ix_(np.arange(len(ids)), np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0)))
    smooth = functools.partial(_smooth, sigma=he.shape[1] / 24)
    for name, heat in heats.items():
        scored = saliency.score_maps(smooth(heat)[inside], masks[inside], columns["case"][ids])
        interval = scored.metrics["auc"]
        arms.append({"arm": name, "mean": interval.value, "low": interval.low, "high": interval.high})
    titles = {encoders[name].title: smooth(heat)[:DRAWN] for name, heat in heats.items()}
    sheet = sheets.saliency_sheet(he[:DRAWN], titles, masks[:DRAWN])
    caption = "What raises the probe's answer in test tiles; outlined in white: where the marker truly is."
    section = {
        "what": f"Integrated gradients on {len(ids)} test tiles that hold positive and negative nuclei.",
        "score": "AUC of the map against the marker, within a tile",
        "chance": 0.5,
        "arms": arms,
        "pictures": [{"picture": "saliency", "caption": caption}],
    }
    return section, {"saliency": sheet}


def _mixed_tiles(tileset: TileSet, columns: Mapping[str, np.ndarray], task: Task) -> np.ndarray:
    """Test tiles with enough nuclei, some of them positive and some not; spread over the test cases."""
    share = np.asarray(columns[task.target], np.float64)
    test = np.isin(columns["case"], list(tileset.splits["test"]))
    mixed = test & (share > 0.2) & (share < 0.8) & np.asarray(columns["has_if"], bool)
    ids = np.flatnonzero(mixed)
    return np.sort(np.random.default_rng(0).permutation(ids)[:TILES])


def _seen(heat: np.ndarray) -> np.ndarray:
    """bool [H, W]: what the evaluation view does not cut off; there every map is 0."""
    return (heat != 0).any(0)


def _smooth(maps: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(maps, (0, sigma, sigma))


def neighbours(
    encoders: Mapping[str, Encoder], columns: Mapping[str, np.ndarray], tileset: TileSet, task: Task
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
        raise NothingToShow("no test tile has enough nuclei of one state")
    words = np.array(["negative", "positive"])
    found: list[Section] = []
    shown: Pictures = {}
    for name, encoder in encoders.items():
        near = _nearest(encoder.features, queries, cases, clear)
        tiles = [list(_decoded(tileset, row, "he")) for row in near]
        told = [words[labels[row]].tolist() for row in near]
        sheet = sheets.neighbours_sheet(
            list(_decoded(tileset, queries, "he")), tiles, words[labels[queries]].tolist(), told
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


def _decoded(tileset: TileSet, ids: np.ndarray, name: str) -> np.ndarray:
    """[n, H, W, C] of tiles that have it."""
    images = [tileset.decode(example)[name] for example in tileset.read(ids.tolist())]
    return np.stack([image for image in images if image is not None])
