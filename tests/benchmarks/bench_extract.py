"""Tiles a second from slides to features on disk: `mfl extract` against the loop that one would write in PyTorch.

`mfl extract` is run as the command it is. The peer reads the same tiles with OpenSlide in a DataLoader of as many
workers as there are cores, and puts them through the same ViT with the same weights (float32); it writes nothing, and
its clock starts after its first batch. It has the batch that such loops have, and the one that suits its caches best.
Rounds alternate; the best of each counts. The rates of both networks alone, on a batch in memory, say how much of
either is reading.

    python -m tests.benchmarks.bench_extract --slides 2 --size 4096 --arch vit_s16 --peer-batches 64 16 --rounds 2
    python -m tests.benchmarks.bench_extract --tileset data/set    # ours alone: share of the forward pass
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from input_pipeline import cohort, tile
from input_pipeline.cores import available_cores
from mfl_jax import encoder, models, process, sharding, slides
from mfl_jax.encoder import Encoder
from mfl_jax.extract import extract, usual_batch
from mfl_jax.interop import weights
from mfl_jax.sweep import TRAIN
from tests.benchmarks.bench_reader import MPP, write_pyramid

HEADS = {"ti": 3, "s": 6, "b": 12}


def make_weights(folder: Path, spec: str, side: int) -> Encoder:
    model = models.make(spec)
    params, stats = model.init(jax.random.key(0), np.zeros((1, side, side, 3)))
    ours = {"view": f"flip(0)|size({side})|normalise(.5,.25)", "size": side, "mpp": MPP, "dtype": "float32"}
    if jax.default_backend() != "cpu":
        ours["dtype"] = "bfloat16"
    weights.save(folder, spec, params, stats, side=side, mean=(0.5,) * 3, std=(0.25,) * 3, ours=ours)
    return encoder.of_weights(folder)


def make_slides(root: Path, count: int, size: int, side: int) -> slides.Source:
    (root / "slides").mkdir()
    rows = []
    for i in range(count):
        path = root / "slides" / f"s{i}.svs"
        write_pyramid(path, size) if not i else path.write_bytes((root / "slides" / "s0.svs").read_bytes())
        rows.append(cohort.Slide(path.stem, path.stem, path))
    params = tile.Params(size=side, mpp=MPP, min_tissue=0.0, max_blur=1.0, max_pen=1.0)
    tile.tile_cohort(rows, root / "tiled", params, workers=0, progress=False)
    return slides.of_tiled(root / "tiled")


def command(root: Path, out: Path, batch: int) -> float:
    words = ["extract", root / "tiled", "--weights", root / "weights", "--out", out, "--batch", batch, "--quiet"]
    done = subprocess.run([sys.executable, "-c", TRAIN, *map(str, words)], check=True, capture_output=True, text=True)
    print(done.stdout, flush=True)
    tiles, seconds = re.search(r"([0-9,]+) tiles in ([0-9.]+) s", done.stdout).groups()
    return int(tiles.replace(",", "")) / float(seconds)


def ours(source: slides.Source, made: Encoder, out: Path, batch: int) -> float:
    report = extract(source, made, out, batch=batch, progress=False)
    assert not report.failed
    print(report.ledger.table(), flush=True)
    return report.ledger.tiles / report.ledger.wall


def forward(made: Encoder, batch: int, rounds: int) -> float:
    images = np.random.default_rng(0).integers(0, 256, (batch, made.size, made.size, 3), np.uint8)
    given, run = sharding.put({"he": images, "mask": np.ones(batch, bool)}, sharding.make_mesh()), jax.jit(made.apply)
    images, mask = given["he"], given["mask"]
    run(made.params, images, mask).block_until_ready()
    begin = time.perf_counter()
    for _ in range(rounds):
        found = run(made.params, images, mask)
    found.block_until_ready()
    return rounds * batch / (time.perf_counter() - begin)


def torch_model(folder: Path, spec: str) -> Callable:
    import torch
    from safetensors.torch import load_file

    from tests.mfl_jax.interop.test_weights import torch_vit

    tensors = load_file(str(folder / "model.safetensors"))
    options = {"patch": weights.patch_of(spec), "heads": HEADS[re.match(r"vit_([a-z]+)", spec)[1]], "registers": 0}

    def run(images):
        with torch.inference_mode():
            x = (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
            return torch_vit(torch, tensors, x.contiguous(), pool="cls", **options)

    return run


def torch_forward(run: Callable, batch: int, side: int) -> float:
    import torch

    images, best = torch.zeros((batch, side, side, 3), dtype=torch.uint8), np.inf
    for _ in range(4):
        begin = time.perf_counter()
        run(images)
        best = min(best, time.perf_counter() - begin)
    return batch / best


def peer(root: Path, source: slides.Source, run: Callable, batch: int) -> tuple[float, np.ndarray]:
    import torch

    from tests.benchmarks.openslide_tiles import Tiles

    places = []
    for entry in source.entries:
        opened = entry.open()
        places += [(f"{root}/slides/{entry.slide_id}.svs", int(x), int(y)) for x, y in opened.sheet.coords]
        opened.close()

    options = {"num_workers": available_cores(), "multiprocessing_context": "spawn"}  # a fork of jax may hang
    batches = iter(torch.utils.data.DataLoader(Tiles(places, source.size), batch, **options))
    found = [run(next(batches)).numpy()]
    begin = time.perf_counter()
    found += [run(images).numpy() for images in batches]
    return (len(places) - len(found[0])) / (time.perf_counter() - begin), np.concatenate(found)


def from_tileset(folder: Path, arguments: argparse.Namespace, root: Path) -> None:
    source = slides.of_tile_set(folder)
    made = make_weights(root / "weights", arguments.arch, source.size)
    alone = forward(made, arguments.batch, 10)
    rate = ours(source, made, root / "out", arguments.batch)
    device = jax.devices()[0].device_kind
    print(
        f"{device}: {arguments.arch} at {source.size} px alone {alone:,.0f}/s, extraction {rate:,.0f}/s, "
        f"which is {rate / alone:.2f} of it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=2)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tile", type=int, default=224)
    parser.add_argument("--arch", default="vit_s16", help="vit_ti16, vit_s16 or vit_b16")
    parser.add_argument("--batch", type=int, help="ours (default: as mfl extract has it)")
    parser.add_argument("--peer-batches", type=int, nargs="+", default=[64, 16])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tileset", type=Path)
    arguments = parser.parse_args()
    process.spread()
    arguments.batch = arguments.batch or usual_batch(arguments.tile)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if arguments.tileset:
            from_tileset(arguments.tileset, arguments, root)
            return
        made = make_weights(root / "weights", arguments.arch, arguments.tile)
        source = make_slides(root, arguments.slides, arguments.size, arguments.tile)
        run = torch_model(root / "weights", arguments.arch)
        name = f"mfl extract, {arguments.batch}"
        best = dict.fromkeys((name, *(f"PyTorch loop, {batch}" for batch in arguments.peer_batches)), 0.0)
        for number in range(arguments.rounds):
            out = root / f"out{number}"
            best[name] = max(best[name], command(root, out, arguments.batch))
            for batch in arguments.peer_batches:
                rate, features = peer(root, source, run, batch)
                best[f"PyTorch loop, {batch}"] = max(best[f"PyTorch loop, {batch}"], rate)
        compare(root, source, features, out)
        for batch in arguments.peer_batches:
            best[f"torch's network alone, {batch}"] = torch_forward(run, batch, arguments.tile)
        process.keep_memory()  # as `mfl extract` does; not while torch is measured
        best[f"our network alone, {arguments.batch}"] = forward(made, arguments.batch, 5)
        print(f"{len(features)} tiles of {arguments.tile} px, {arguments.arch}, {available_cores()} cores")
        for label, value in best.items():
            print(f"{label:28}{value:9.1f} tiles/s, of which ours is {best[name] / value:.2f}", flush=True)


def compare(root: Path, source: slides.Source, features: np.ndarray, out: Path) -> None:
    import h5py

    found = []
    for entry in source.entries:
        with h5py.File(out / f"{entry.slide_id}.h5") as file:
            found.append(file["features"][:])
    difference = np.abs(np.concatenate(found) - features)
    print(f"largest difference of a feature {difference.max():.3f} (median {np.median(difference):.4f}): JPEG decoders")


if __name__ == "__main__":
    main()
