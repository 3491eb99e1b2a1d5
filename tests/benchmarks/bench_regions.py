"""Regions a second from files of tile features to a tile set of grids, by stage, and from the set to batches.

Files are drawn: `--slides` of a round piece of tissue of about `--tiles-a-slide` tiles of 384 float16 features, as `mfl
extract` writes them. The first table is `mfl regions` (every record is checked, written, synced and read back); then
regions a second out of the stream, by either executor.

    python -m tests.benchmarks.bench_regions --slides 20 --tiles-a-slide 4000 --workers 2
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from input_pipeline.cores import available_cores
from input_pipeline.regions import Params, assemble
from input_pipeline.stream import train_stream
from input_pipeline.tileset import TileSet

PX, MPP, MPP0 = 256, 0.5, 0.2527


def draw_slide(path: Path, tiles: int, dim: int, seed: int) -> int:
    """A disc with holes, about as full as a slide is."""
    rng = np.random.default_rng(seed)
    side = math.ceil(math.sqrt(tiles / 0.6))
    rows, columns = np.mgrid[:side, :side] - (side - 1) / 2
    cells = np.argwhere((np.hypot(rows, columns) < side / 2) & (rng.random((side, side)) < 0.77))[:, ::-1]
    with h5py.File(path, "w") as file:
        features = rng.standard_normal((len(cells), dim), np.float32).astype(np.float16)
        file.create_dataset("features", data=features, chunks=(min(1024, len(cells)), dim))
        file["coords"] = np.floor(cells * (PX * MPP / MPP0)).astype(np.int64)
        about = {"case_id": path.stem, "patch_size": PX, "mpp_level0": MPP0, "mpp_target": MPP, "encoder": "drawn"}
        file.attrs.update(about | {"encoder_sha256": "0" * 64, "config_sha256": "0" * 64})
    return len(cells)


def stream_rate(root: Path, batch: int, seconds: float, executor: str) -> float:
    with TileSet.open(root) as tiles, train_stream(tiles, batch=batch, seed=0, executor=executor, keep=0) as stream:
        next(stream)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            count += len(next(stream)["he"])
        return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=20)
    parser.add_argument("--tiles-a-slide", type=int, default=4000)
    parser.add_argument("--features", type=int, default=384)
    parser.add_argument("--tiles", type=int, default=16, help="along a side of a region")
    parser.add_argument("--workers", type=int, default=available_cores())
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each stream")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "features").mkdir()
        for i in range(options.slides):
            draw_slide(root / "features" / f"s{i:04d}.h5", options.tiles_a_slide, options.features, i)
        work = {"workers": options.workers, "progress": False, "splits": {"train": 1.0}}
        report = assemble(root / "features", root / "set", Params(tiles=options.tiles), **work)
        assert not report.failed, report.failed
        print(report.ledger.table())
        size = sum(path.stat().st_size for path in (root / "set").glob("*.tfrecord"))
        print(
            f"{report.regions} regions with {options.workers} workers: {report.regions / report.ledger.wall:,.0f} "
            f"regions/s; {size / report.regions / 1e3:,.0f} kB a region"
        )
        for executor in ("threads", "tfdata"):
            rate = stream_rate(root / "set", options.batch, options.seconds, executor)
            print(f"stream, {executor}: {rate:,.0f} regions/s ({rate * size / report.regions / 1e6:,.0f} MB/s)")


if __name__ == "__main__":
    main()
