"""The first half of `mfl demo`: slides that the phantom draws become a verified tile set."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from input_pipeline import cohort
from input_pipeline.audit import audit
from input_pipeline.ledger import Ledger
from input_pipeline.pack import Params as PackParams
from input_pipeline.pack import pack
from input_pipeline.phantom import write_cohort
from input_pipeline.tile import Params as TileParams
from input_pipeline.tile import tile_cohort
from input_pipeline.tileset import TileSet
from input_pipeline.tileset.verify import verify

PARTNERS = ("if", "nuclei")
SPLITS = {"train": 0.5, "val": 0.1, "test": 0.4}  # many test cases: intervals are over them


@dataclass(frozen=True)
class Cohort:
    tileset: TileSet
    ledgers: dict[str, Ledger]  # of what was done now: nothing, where it was there already


def build(
    out: Path, *, cases: int, size: int, tile: int, seed: int, workers: int, progress: bool, tell: Callable[[str], None]
) -> Cohort:
    """Draw, tile, register, pack, verify, audit. Run again, it goes on. ValueError where anything is wrong."""
    tell(f"Drawing H&E slides of {cases} cases, and denser partners of the same tissue. What lies where is known.")
    tell("The partners: immunofluorescence on slides of its own (turned, shifted, deformed), and a nuclear map.")
    drawn: dict[str, Any] = {
        "cases": cases,
        "size": size,
        "seed": seed,
        "partners": PARTNERS,
        "workers": max(workers, 1),
    }
    table = write_cohort(out / "slides", **drawn, progress=progress)

    tell("Finding the tissue of every slide, laying a grid of tiles, and registering the partner slides to the H&E.")
    params = TileParams(size=tile)
    work: dict[str, Any] = {"workers": workers, "progress": progress, "say": tell}
    tiled = tile_cohort(cohort.read(table), out / "tiled", params, **work)
    print(tiled.ledger.table())
    if tiled.failed:
        raise ValueError(f"{len(tiled.failed)} slides could not be tiled: see {out / 'tiled' / 'status.csv'}")

    tell("Reading every tile and its partners, and packing them into one tile set; splits are by case.")
    packed = pack(out / "tiled", out / "set", PackParams(name="phantom"), splits=SPLITS, **work)
    print(packed.ledger.table())
    if packed.failed:
        raise ValueError(f"{len(packed.failed)} slides could not be packed: {packed.failed}")

    tell("Verifying every byte of the set, and looking for cases or tiles that two splits share.")
    if faults := verify(out / "set", deep=True, progress=progress):
        raise ValueError(f"the tile set has faults: {'; '.join(faults[:5])}")
    tileset = TileSet.open(out / "set")
    if leaks := audit(tileset, progress=progress):
        raise ValueError(f"splits share something: {'; '.join(str(leak) for leak in leaks[:5])}")
    return Cohort(tileset, {"Slides to tiles, with registration": tiled.ledger, "Tiles to a tile set": packed.ledger})
