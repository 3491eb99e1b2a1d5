"""Tiles a second that the stream gives: 224-px H&E JPEG and 224-px partner JPEG, on every core, from a warm page cache.

Peers, alternating with it in one run: (a) a bare loop in as many threads that only decodes the same JPEG bytes, the
most that any stream could give; (b) a PyTorch DataLoader with PIL over the same tiles as files (pip install torch).

    python -m tests.benchmarks.bench_stream --tiles 4000 --repeats 5
"""

import argparse
import statistics
import tempfile
import threading
import time
from importlib import util
from pathlib import Path

import imagecodecs
import numpy as np
from scipy import ndimage

from input_pipeline.cores import available_cores
from input_pipeline.stream import train_stream
from input_pipeline.tileset import Partner, Record, Spec, TileSet, finish, tfrecord, write_slide

SIZE, BATCH, SLIDES = 224, 128, 8


def _tissue(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Pink fibres, blue nuclei and sensor noise; the partner stains some of the nuclei brown."""
    fibre = ndimage.gaussian_filter(rng.standard_normal((side, side)), (1.5, 6))
    nuclei = ndimage.gaussian_filter(rng.standard_normal((side, side)), 4)
    fibre, nuclei = fibre / fibre.std(), np.clip(4 * (nuclei / nuclei.std() - 1), 0, 1)
    texture = ndimage.gaussian_filter(rng.standard_normal((side, side)), 1)
    marked = nuclei * (ndimage.gaussian_filter(rng.standard_normal((side, side)), 20) > 0)
    density = np.stack([nuclei * (1.2 + texture), 0.25 + 0.08 * fibre, marked], axis=-1)

    def stain(vectors):
        image = 245 * np.exp(-density @ np.array(vectors)) + rng.normal(0, 2, (side, side, 3))
        return np.clip(image, 0, 255).astype(np.uint8)

    return stain([[0.6, 0.7, 0.3], [0.1, 0.9, 0.3], [0, 0, 0]]), stain(
        [[0.4, 0.3, 0.1], [0.05, 0.05, 0.05], [0.3, 0.7, 1.2]]
    )


def make(root: Path, tiles: int) -> TileSet:
    rng = np.random.default_rng(0)
    spec = Spec("bench", SIZE, 0.5, partners=(Partner("ihc", "image", channels=3, encoding="jpeg"),))
    he, ihc = _tissue(rng, 2048)
    for slide in range(SLIDES):
        corners = rng.integers(0, 2048 - SIZE, (tiles // SLIDES, 2))
        cut = [(slice(y, y + SIZE), slice(x, x + SIZE)) for y, x in corners]
        records = (Record(he[c], {"ihc": ihc[c]}, x=c[1].start, y=c[0].start, mpp=0.5) for c in cut)
        write_slide(root / "set", spec, f"s{slide}", f"c{slide}", records)
    finish(root / "set", spec, splits={"train": [f"c{s}" for s in range(SLIDES)]})
    tileset = TileSet.open(root / "set")
    (root / "files").mkdir()
    for example in tileset.read(range(len(tileset))):
        features = tfrecord.decode_example(example.payload)
        for name in ("he", "ihc"):
            (root / "files" / f"{example.id}_{name}.jpg").write_bytes(features[name][0])
    return tileset


def bare(root: Path, tiles: int) -> float:
    data = [(root / "files" / f"{i}_{name}.jpg").read_bytes() for i in range(tiles) for name in ("he", "ihc")]

    def loop(part):
        for jpeg in part:
            imagecodecs.jpeg8_decode(jpeg)

    crew = [threading.Thread(target=loop, args=(data[i :: available_cores()],)) for i in range(available_cores())]
    start = time.perf_counter()
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    return tiles / (time.perf_counter() - start)


def ours(tileset: TileSet, executor: str, tiles: int, **options) -> float:
    with train_stream(tileset, batch=BATCH, seed=0, executor=executor, keep=0, **options) as stream:
        for _ in range(4):
            next(stream)
        start = time.perf_counter()
        for _ in range(tiles // BATCH):
            next(stream)
        return tiles // BATCH * BATCH / (time.perf_counter() - start)


def pytorch(root: Path, tiles: int) -> float:
    import torch
    from PIL import Image

    class Files(torch.utils.data.Dataset):
        def __len__(self):
            return tiles + 4 * BATCH

        def __getitem__(self, i):
            names = (root / "files" / f"{i % tiles}_{name}.jpg" for name in ("he", "ihc"))
            return tuple(torch.from_numpy(np.array(Image.open(name).convert("RGB"))) for name in names)

    options = {"shuffle": True, "num_workers": available_cores(), "drop_last": True}
    batches = iter(torch.utils.data.DataLoader(Files(), BATCH, **options))
    for _ in range(4):
        next(batches)
    start = time.perf_counter()
    count = sum(len(he) for he, _ in batches)
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tileset = make(root, arguments.tiles)
        tiles = len(tileset)
        rows = {
            "bare decode loop": lambda: bare(root, tiles),
            "stream, threads": lambda: ours(tileset, "threads", tiles),
            "stream, processes": lambda: ours(tileset, "processes", tiles),
        }
        if util.find_spec("tensorflow"):
            rows["stream, tf.data"] = lambda: ours(tileset, "tfdata", tiles)
        try:
            import torch  # noqa: F401

            rows["PyTorch DataLoader"] = lambda: pytorch(root, tiles)
        except ImportError:
            print("torch is not installed: its row is left out")
        rates: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(arguments.repeats):
            for name, run in rows.items():
                rates[name].append(run())
        size = sum(f.stat().st_size for f in (root / "files").iterdir()) / tiles / 2
        print(f"{tiles} pairs of {SIZE} px, {size / 1024:.1f} KiB a JPEG, {available_cores()} cores, batch {BATCH}")
        print(f"{'':22}{'tiles/s':>9}{'/ bare':>9}{'/ torch':>9}   (medians of ratios within a repeat)")
        for name, values in rates.items():
            line = f"{name:22}{statistics.median(values):9.0f}"
            for peer in ("bare decode loop", "PyTorch DataLoader"):
                if peer in rates:
                    line += f"{statistics.median(a / b for a, b in zip(values, rates[peer], strict=True)):9.2f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
