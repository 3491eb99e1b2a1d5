"""`mfl demo`: the whole path on slides that the phantom draws, told step by step. Run again, it goes on from there."""

from pathlib import Path
from time import perf_counter

from input_pipeline import cohort
from input_pipeline.audit import audit
from input_pipeline.files import save_picture
from input_pipeline.pack import Params as PackParams
from input_pipeline.pack import pack
from input_pipeline.phantom import write_cohort
from input_pipeline.pool import available_cores
from input_pipeline.show import batch_picture
from input_pipeline.stream import train_stream
from input_pipeline.tile import Params as TileParams
from input_pipeline.tile import tile_cohort
from input_pipeline.tileset import TileSet
from input_pipeline.tileset.verify import verify

TILE_PX = 64
PARTNERS = ("if", "nuclei")
SPLITS = {"train": 0.6, "val": 0.2, "test": 0.2}


def demo(
    out: Path, *, cases: int = 16, size: int = 1024, seed: int = 0, workers: int | None = None, progress: bool = True
) -> None:
    """Draw, tile, register, pack, verify, look. Raises ValueError where anything is not as it should be."""
    start = perf_counter()
    workers = available_cores() if workers is None else workers

    def tell(text: str) -> None:
        print(f"[{perf_counter() - start:6.1f} s] {text}", flush=True)

    tell(f"Drawing {cases} cases of H&E slides with denser partners of the same tissue: immunofluorescence on slides")
    tell("of its own (turned, shifted, deformed), and a nuclear map. What lies where is known.")
    table = write_cohort(
        out / "slides",
        cases=cases,
        size=size,
        seed=seed,
        partners=PARTNERS,
        workers=max(workers, 1),
        progress=progress,
    )

    tell("Finding the tissue of every slide, laying a grid of tiles, and registering the partner slides to the H&E.")
    tiled = tile_cohort(
        cohort.read(table), out / "tiled", TileParams(size=TILE_PX), workers=workers, progress=progress, say=tell
    )
    print(tiled.ledger.table())
    if tiled.failed:
        raise ValueError(f"{len(tiled.failed)} slides could not be tiled: see {out / 'tiled' / 'status.csv'}")

    tell("Reading every tile and its partners, and packing them into one tile set; splits are by case.")
    params = PackParams(name="phantom")
    packed = pack(out / "tiled", out / "set", params, splits=SPLITS, workers=workers, progress=progress, say=tell)
    print(packed.ledger.table())
    if packed.failed:
        raise ValueError(f"{len(packed.failed)} slides could not be packed: {packed.failed}")

    tell("Verifying every byte of the set, and looking for cases or tiles that two splits share.")
    if faults := verify(out / "set", deep=True, progress=progress):
        raise ValueError(f"the tile set has faults: {'; '.join(faults[:5])}")
    tileset = TileSet.open(out / "set")
    if leaks := audit(tileset, progress=progress):
        raise ValueError(f"splits share something: {'; '.join(str(leak) for leak in leaks[:5])}")

    with train_stream(tileset, batch=6, seed=seed) as stream:
        save_picture(out / "batch.png", batch_picture(next(stream), tileset.spec, side=160))
    counts = f"{len(tileset):,} tiles of {len(tileset.slides)} slides of {len(tileset.cases)} cases"
    tell(f"Done: {counts}. A batch as training will see it: {out / 'batch.png'}")
    print(f"Look also at {out / 'tiled' / 'slides'}: qc.jpg and the overlay of each registration, one folder a slide.")
