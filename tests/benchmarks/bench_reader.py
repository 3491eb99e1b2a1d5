"""Tiles per second of our reader against OpenSlide, in one process, in one run.

    python tests/benchmarks/bench_reader.py [slide.svs ...] [--size 4096] [--rounds 5]

Both sides read the same places of the same file and end with an RGB array of the same size. Rounds alternate between
the two, each with a freshly opened slide, and the best round of each counts: on a busy machine the best is the least
disturbed. `cpu` is the same ratio in processor time, which neighbours disturb less. `bare` is OpenSlide's read_region
alone, without turning its picture into an RGB array.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import tifffile
from PIL import Image
from scipy import ndimage

from input_pipeline.slides.reader import open_slide

MPP = 0.5
TILE = 224
Place = tuple[float, float]


def write_pyramid(path: Path, size: int) -> Path:
    """A JPEG pyramid with levels 1, 4, 16 and about the detail of a stained section: blobs, fibres and grain."""
    rng = np.random.default_rng(0)
    noise = [ndimage.gaussian_filter(rng.standard_normal((size, size), np.float32), s) * s for s in (1, 3, 12)]
    dye = np.clip(0.5 + sum(noise), 0, 2.5)[..., None]
    image = (255 * np.exp(-dye * np.float32([0.25, 0.55, 0.3]))).astype(np.uint8)
    text = f"Aperio Image Library v12\r\n{size}x{size} (256x256) JPEG/RGB Q=80|AppMag = 20|MPP = {MPP}"
    options = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 80}}
    with tifffile.TiffWriter(path) as tif:
        for step in (1, 4, 16):
            tif.write(np.ascontiguousarray(image[::step, ::step]), description=text, metadata=None, **options)
            if step == 1:
                tif.write(np.ascontiguousarray(image[::8, ::8]), description=text, metadata=None, photometric="rgb")
    return path


def timed(read: Callable[[Place], object], places: Sequence[Place], threads: int) -> tuple[float, float]:
    """Seconds by the clock on the wall, and of processor time in all threads."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    if threads == 1:
        for place in places:
            read(place)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(read, places):
                pass
    return time.perf_counter() - begin, time.process_time() - begin_cpu


def ours(path: Path, places: Sequence[Place], size: int, mpp: float, threads: int) -> tuple[float, float]:
    with open_slide(path, mpp=MPP) as slide:
        return timed(lambda place: slide.read_region(*place, size, size, mpp), places, threads)


def theirs(
    path: Path, places: Sequence[Place], size: int, mpp: float, threads: int, *, bare: bool = False
) -> tuple[float, float]:
    """OpenSlide at the best level, then one antialiased resize by Pillow where the scale differs."""
    with openslide.OpenSlide(path) as slide:
        level = slide.get_best_level_for_downsample(mpp / MPP * 1.01)
        source = round(size * mpp / MPP / slide.level_downsamples[level])

        def read(place: Place) -> object:
            region = slide.read_region((int(place[0]), int(place[1])), level, (source, source))
            if bare:
                return region
            region = region.convert("RGB")
            if source != size:
                region = region.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(region)

        return timed(read, places, threads)


def compare(path: Path, rounds: int) -> None:
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[0]
        grid, width, height = page.tilewidth, page.imagewidth, page.imagelength
    print(f"\n{path.name}: {width} x {height} px, tiles of {grid} px")
    print(f"{'':34}{'threads':>8}{'ours':>10}{'openslide':>11}{'ratio':>7}{'cpu':>7}   (tiles/s)")
    cases = [("on the grid, against bare", grid, MPP, True), ("on the grid", grid, MPP, False)]
    cases += [(f"off the grid, {TILE} px at {mpp} um/px", TILE, mpp, False) for mpp in (0.7, 1.0)]
    for name, size, mpp, bare in cases:
        step = size * mpp / MPP
        places = [(x, y) for y in np.arange(0, height - step + 1, step) for x in np.arange(0, width - step + 1, step)]
        for threads in (1, 2):
            mine, peer = [], []
            for _ in range(rounds):
                mine.append(ours(path, places, size, mpp, threads))
                peer.append(theirs(path, places, size, mpp, threads, bare=bare))
            (wall, cpu), (peer_wall, peer_cpu) = (np.min(rounds_of, axis=0) for rounds_of in (mine, peer))
            rates = f"{len(places) / wall:>10.0f}{len(places) / peer_wall:>11.0f}"
            print(f"{name:34}{threads:>8}{rates}{peer_wall / wall:>7.2f}{peer_cpu / cpu:>7.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", nargs="*", type=Path, help="slides besides the one that is written here")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for path in (write_pyramid(Path(folder) / "pyramid.svs", arguments.size), *arguments.slides):
            compare(path, arguments.rounds)


if __name__ == "__main__":
    main()
