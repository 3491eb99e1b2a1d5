"""A cohort of phantom slides on disk, with a `slides.csv` that the tiling step takes as it is."""

import csv
import hashlib
import io
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..tileset.spec import check_text_id
from . import files
from .cells import TYPES
from .counts import counts_csv
from .layout import GRID, REGIONS, SUBTYPES, TISSUES
from .render import IF_CHANNELS
from .slide import Slide, draw_partner, draw_slide, look_of, paint, paint_nuclei

VERSION = 3  # of what is drawn: raise it whenever the same seed gives other pixels
PARTNERS = {"if": "image", "ihc": "image", "nuclei": "map", "counts": "vector"}
MOVED = ("if", "ihc")  # partners with a frame of their own
FORMATS = {"svs": ".svs", "ome": ".ome.tif"}


class PhantomError(ValueError):
    """A cohort that cannot be drawn as asked."""


@dataclass(frozen=True)
class Job:
    """One slide, and everything its files depend on."""

    seed: int
    case: int
    slide: int
    slide_id: str
    case_id: str
    subtype: int
    lesion: bool
    size: int
    mpp: float
    tissue: str
    partners: tuple[str, ...]
    he_format: str
    version: int = VERSION

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def plan(
    cases: int,
    seed: int,
    *,
    paired: int | None = None,
    prefix: str = "case",
    partners: tuple[str, ...] = (),
    **common,
) -> list[Job]:
    """Which slides there will be. Labels are balanced over cases and drawn apart from everything that is seen; cases
    past the first `paired` have no partners.
    """
    rng = np.random.default_rng([seed, 99])
    order = rng.permutation(cases)
    jobs = []
    for case in range(cases):
        slides = int(np.random.default_rng([seed, case, 98]).integers(1, 4))
        for slide in range(slides):
            subtype, with_lesion = int(order[case] % 2), bool(order[case] // 2 % 2)
            lesion = with_lesion and (slide == 0 or bool(np.random.default_rng([seed, case, slide, 97]).integers(2)))
            case_id = f"{prefix}{case:04d}"
            rest = common | {"partners": partners if paired is None or case < paired else ()}
            jobs.append(Job(seed, case, slide, f"{case_id}-{slide + 1}", case_id, subtype, lesion, **rest))
    return jobs


def _check(
    cases: int, size: int, mpp: float, partners: tuple[str, ...], workers: int, he_format: str, tissue: str
) -> None:
    for name, value, least in (("cases", cases, 1), ("size", size, 512), ("workers", workers, 1)):
        if value < least:
            raise PhantomError(f"{name} is {value}; it must be at least {least}")
    if not 0.1 <= mpp <= 2:
        raise PhantomError(f"mpp is {mpp}; nuclei can be drawn from 0.1 to 2 um per pixel")
    if unknown := set(partners) - set(PARTNERS):
        raise PhantomError(f"unknown partner {', '.join(sorted(unknown))}; there are {', '.join(PARTNERS)}")
    for name, choice, allowed in (("he_format", he_format, tuple(FORMATS)), ("tissue", tissue, TISSUES)):
        if choice not in allowed:
            raise PhantomError(f"{name} is {choice!r}; it is one of {', '.join(allowed)}")


def _paths(job: Job) -> dict[str, str]:
    """Column of slides.csv -> path within the cohort."""
    name = job.slide_id
    ends = {"if": ".ome.tif", "ihc": ".svs", "nuclei": ".ome.tif", "counts": ".csv"}
    paths = {"he": f"he/{name}{FORMATS[job.he_format]}"}
    paths |= {f"partner_{p}": f"{p}/{name}{ends[p]}" for p in job.partners}
    paths |= {f"truth_transform_{p}": f"{p}/{name}_{p}.truth.json" for p in job.partners if p in MOVED}
    return paths | {"cells": f"truth/{name}_cells.csv", "regions": f"truth/{name}_regions.ome.tif"}


def _cells_csv(slide: Slide) -> str:
    c = slide.cells
    rows = zip(c.x.tolist(), c.y.tolist(), c.type.tolist(), c.positive.tolist(), strict=True)
    lines = [f"{i},{x:.3f},{y:.3f},{TYPES[t]},{int(p)}" for i, (x, y, t, p) in enumerate(rows)]
    return "\n".join(["id,x_um,y_um,type,positive", *lines]) + "\n"


def _write_partner(slide: Slide, name: str, path: Path, truth: Path | None) -> None:
    if name == "counts":
        files.write_text(path, counts_csv(slide))
    elif name == "nuclei":
        files.write_map(path, paint_nuclei(slide), slide.mpp, ("instance", "type"))
    else:
        canvas, _ = draw_partner(slide, name)
        image = paint(slide, name)
        if name == "if":
            files.write_channels(path, image, canvas.mpp, IF_CHANNELS)
        else:
            files.write_svs(path, image, canvas.mpp, path.stem)
        assert canvas.transform is not None
        assert truth is not None
        canvas.transform.save(truth)


def write_slide(out: Path, job: Job) -> dict[str, str]:
    """Draw and write one slide, unless it is there already; -> its row of slides.csv."""
    paths, receipt = _paths(job), out / "truth" / f"{job.slide_id}.json"
    row = {
        "slide_id": job.slide_id,
        "case_id": job.case_id,
        "label": SUBTYPES[job.subtype],
        "label_lesion": str(int(job.lesion)),
        "label_stain": f"{look_of((job.seed, job.case, job.slide)).stain:.3f}",
    }
    row |= paths
    for p in job.partners:
        row[f"kind_{p}"] = PARTNERS[p]
    if _kept(out, job, receipt):
        return row
    receipt.unlink(missing_ok=True)
    slide = draw_slide(
        job.seed,
        job.case,
        job.slide,
        size=job.size,
        mpp=job.mpp,
        subtype=job.subtype,
        lesion=job.lesion,
        tissue=job.tissue,
    )
    he = paint(slide)
    if job.he_format == "svs":
        files.write_svs(out / paths["he"], he, job.mpp, job.slide_id)
    else:
        files.write_he_ome(out / paths["he"], he, job.mpp)
    del he
    for p in job.partners:
        truth = paths.get(f"truth_transform_{p}")
        _write_partner(slide, p, out / paths[f"partner_{p}"], out / truth if truth else None)
    files.write_text(out / paths["cells"], _cells_csv(slide))
    files.write_map(out / paths["regions"], slide.layout.region[None], GRID, ("region",))
    sizes = {p: (out / p).stat().st_size for p in paths.values()}
    document = {"hash": job.hash, "files": sizes, "artefacts": slide.look.artefacts, "cells": len(slide.cells)}
    files.write_text(receipt, json.dumps(document, indent=1))
    return row


def _kept(out: Path, job: Job, receipt: Path) -> bool:
    """True when an earlier run wrote this very slide and its files still have their sizes."""
    try:
        document = json.loads(receipt.read_text())
        same = document["hash"] == job.hash
        return same and all((out / p).stat().st_size == size for p, size in document["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _table(rows: list[dict[str, str]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _cases(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    cases: dict[str, dict[str, str]] = {}
    for row in rows:
        case = cases.setdefault(
            row["case_id"], {"case_id": row["case_id"], "slides": "0", "label": row["label"], "label_lesion": "0"}
        )
        case["slides"] = str(int(case["slides"]) + 1)
        case["label_lesion"] = max(case["label_lesion"], row["label_lesion"])
    return list(cases.values())


def _run(out: Path, jobs: list[Job], workers: int, progress: bool) -> list[dict[str, str]]:
    bar = tqdm(total=len(jobs), desc="phantom slides", unit="slide", disable=None if progress else True)
    rows: dict[str, dict[str, str]] = {}
    with bar:
        if workers == 1:
            for job in jobs:
                rows[job.slide_id] = write_slide(out, job)
                bar.update()
        else:
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                futures = {pool.submit(write_slide, out, job): job for job in jobs}
                for future in as_completed(futures):
                    rows[futures[future].slide_id] = future.result()
                    bar.update()
    return [rows[job.slide_id] for job in jobs]


def write_cohort(
    out: str | Path,
    *,
    cases: int = 6,
    size: int = 4096,
    mpp: float = 0.5,
    seed: int = 0,
    partners: tuple[str, ...] = ("if", "ihc", "nuclei", "counts"),
    workers: int = 1,
    he_format: str = "svs",
    tissue: str = "mixed",
    paired: int | None = None,
    prefix: str = "case",
    progress: bool = True,
) -> Path:
    """Draw cases of 1-3 slides of `size` x `size` pixels and write them with their truth; -> the cohort's slides.csv.
    Of `paired` (None: all) cases, the first ones, there are partners; of the others the H&E alone. Their names begin
    with `prefix`: patients of two cohorts are different ones.

    The same seed gives the same files for any number of workers. A slide that is there and was drawn with the same
    parameters is kept, so a killed run continues.
    """
    partners = tuple(partners)
    check_text_id(f"{prefix}0000", "the name of a case")
    _check(cases, size, mpp, partners, workers, he_format, tissue)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for folder in ("he", "truth", *PARTNERS):
        for stale in (out / folder).glob("*.part"):
            stale.unlink()
    common: dict[str, Any] = {"size": size, "mpp": mpp, "tissue": tissue, "partners": partners, "he_format": he_format}
    jobs = plan(cases, seed, paired=paired, prefix=prefix, **common)
    files.write_text(out / "regions.json", json.dumps({"mpp": GRID, "names": REGIONS, "cell_types": TYPES}, indent=1))
    rows = _run(out, jobs, workers, progress)
    files.write_text(out / "cases.csv", _table(_cases(rows)))
    files.write_text(out / "slides.csv", _table(rows))
    return out / "slides.csv"
