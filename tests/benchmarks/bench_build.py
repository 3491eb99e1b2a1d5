"""Slides a minute from slide files to a tile set, and the memory it takes, against OpenSlide + Pillow in a simple pool.

Both find tissue on a thumbnail, lay the same grid, read every tile and store it as JPEG; ours also checks blur and pen,
draws a picture of every slide, hashes the file and writes an indexed set with checksums. H&E only: the peer registers
nothing. The two alternate in one run.

    python tests/benchmarks/bench_build.py --slides 12 --rounds 3
    python tests/benchmarks/bench_build.py --slides 50 --rounds 1        # memory over many slides
"""

import argparse
import multiprocessing
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from scipy import ndimage

from input_pipeline import cohort
from input_pipeline.cores import available_cores
from input_pipeline.pack import pack
from input_pipeline.phantom import write_cohort
from input_pipeline.tile import Params, tile_cohort

SIZE, MPP = 256, 0.5


def peer_slide(job: tuple[Path, Path]) -> int:
    """What a short script does: saturation over a threshold, a grid, read_region, a JPEG file a tile."""
    import openslide

    path, out = job
    out.mkdir(parents=True, exist_ok=True)
    with openslide.OpenSlide(path) as slide:
        width, height = slide.dimensions
        thumbnail = slide.get_thumbnail((width // 8, height // 8)).convert("HSV")
        mask = ndimage.binary_opening(np.asarray(thumbnail)[..., 1] > 20, iterations=2)
        count = 0
        for y in range(0, height - SIZE + 1, SIZE):
            for x in range(0, width - SIZE + 1, SIZE):
                if mask[y // 8 : (y + SIZE) // 8, x // 8 : (x + SIZE) // 8].mean() >= 0.5:
                    tile = slide.read_region((x, y), 0, (SIZE, SIZE)).convert("RGB")
                    tile.save(out / f"{x}_{y}.jpg", quality=90)
                    count += 1
    return count


def peer(slides: list[cohort.Slide], out: Path, workers: int) -> int:
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return sum(pool.map(peer_slide, [(s.he, out / s.slide_id) for s in slides]))


def ours(slides: list[cohort.Slide], out: Path, workers: int) -> int:
    tile_cohort(slides, out / "tiled", Params(size=SIZE, mpp=MPP), workers=workers, progress=False)
    report = pack(out / "tiled", out / "set", workers=workers, progress=False)
    return report.counts["tiles"]


def measured(work: Callable[[], int]) -> tuple[int, float, float]:
    """-> tiles, seconds, and the largest sum of resident memory of this process and its children, in GiB."""
    process, peak, done = psutil.Process(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            total = 0
            for p in (process, *process.children(recursive=True)):
                try:
                    total += p.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak = max(peak, total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        tiles = work()
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    return tiles, seconds, peak / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=12)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=available_cores())
    parser.add_argument("--cohort", type=Path, help="an H&E cohort to use again (drawn here when absent)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        table = options.cohort or root / "slides.csv"
        if not table.exists():
            drawn = {"size": options.size, "partners": (), "workers": options.workers}
            write_cohort(table.parent, cases=options.slides, **drawn)
        slides = cohort.read(table)[: options.slides]
        rows: dict[str, list[tuple[int, float, float]]] = {"ours": [], "peer": []}
        for number in range(options.rounds):
            for name, work in (("ours", ours), ("peer", peer)):
                out = root / f"{name}{number}"
                rows[name].append(measured(lambda work=work, out=out: work(slides, out, options.workers)))
                shutil.rmtree(out)
        print(f"{len(slides)} slides, {options.workers} processes, median of {options.rounds}")
        print(f"{'':22}{'tiles':>8}{'seconds':>9}{'slides/min':>12}{'tiles/s':>9}{'peak GiB, all processes':>25}")
        for name, found in rows.items():
            tiles, peak = found[0][0], max(f[2] for f in found)
            seconds = statistics.median(f[1] for f in found)
            title = {"ours": "mfl tile + mfl pack", "peer": "OpenSlide + Pillow"}[name]
            rate = f"{60 * len(slides) / seconds:12.1f}{tiles / seconds:9.0f}"
            print(f"{title:22}{tiles:8}{seconds:9.1f}{rate}{peak:25.2f}")
        ratios = [p[1] / o[1] for o, p in zip(rows["ours"], rows["peer"], strict=True)]
        spread = f"({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"ratio of speed, pair by pair: median {statistics.median(ratios):.2f} {spread}")


if __name__ == "__main__":
    main()
