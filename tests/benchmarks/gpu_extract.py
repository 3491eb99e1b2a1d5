"""The rows of bench_gpu.py that ask whether `mfl extract` keeps a GPU busy: the encoder's forward pass alone, and fed
from a tile set of JPEGs on the local disk."""

import dataclasses
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from gpu_common import Job, Phases, Row, at, timed

from input_pipeline.cores import available_cores
from input_pipeline.tileset import Record, Spec, finish, write_slide
from mfl_jax import encoder, extract, flow, models, sharding, slides
from mfl_jax.encoder import Encoder
from mfl_jax.interop import weights

SLIDES, MPP = 8, 0.5


def phases(job: Job, sizes: Row) -> Phases:
    """`job.size` is the batch; bfloat16, as a run on a GPU has it."""
    with tempfile.TemporaryDirectory() as folder:
        root, mesh = Path(folder), sharding.make_mesh()
        source = tiles(root / "set", sizes["px"], sizes["tiles"])
        made = encoder_of(root / "weights", job.what, sizes["px"])
        yield None
        at("compiling")
        start = time.perf_counter()
        compiled = flow.compiled(made, source.layout(job.size), mesh)
        row: Row = {"compile_s": time.perf_counter() - start}
        yield None
        at("measuring the forward pass")
        shape = (job.size, sizes["px"], sizes["px"], 3)
        drawn = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        placed, held = sharding.put({"he": drawn, "mask": np.ones(job.size, bool)}, mesh), {}

        def run() -> None:
            held["found"] = compiled(made.params, placed["he"], placed["mask"])

        row |= timed(run, lambda: jax.block_until_ready(held), 4 * sizes["calls"])
        row["forward_per_s"] = 1e3 * job.size / row["ms"]
        at("extracting")
        options: Row = {"batch": job.size, "mesh": mesh, "progress": False, "workers": available_cores()}
        flow.compiled = lambda *_: compiled  # else it is compiled a second time
        for turn in range(2):  # the files of the set are in memory the second time
            report = extract.extract(source, made, root / f"out{turn}", **options)
        if report.failed:
            raise RuntimeError(f"extraction failed: {report.failed[0]['reason']}")
        ledger = report.ledger
        row |= {"extract_per_s": ledger.tiles / ledger.wall, "workers": options["workers"]}
        row |= {"seconds": dict(ledger.seconds), "wall": ledger.wall}
        yield row | {"share": row["extract_per_s"] / row["forward_per_s"]}


def tiles(root: Path, px: int, count: int) -> slides.Source:
    """Smooth colours and a little noise: JPEGs of about the size that those of tissue have."""
    rng, spec = np.random.default_rng(0), Spec("gpu", px, MPP, jpeg_quality=85)
    coarse = rng.normal(size=(32, px // 8, px // 8, 3)).repeat(8, axis=1).repeat(8, axis=2)
    pixels = np.clip(190 + 25 * coarse + rng.normal(size=(32, px, px, 3)) * 6, 0, 255).astype(np.uint8)

    def write(number: int) -> Any:
        rows = (Record(pixels[i % 32], {}, float(i), 0.0, MPP) for i in range(count // SLIDES))
        return write_slide(root, spec, f"s{number}", f"c{number}", rows)

    with ThreadPoolExecutor(SLIDES) as pool:
        list(pool.map(write, range(SLIDES)))
    finish(root, spec)
    return slides.of_tile_set(root)


def encoder_of(folder: Path, spec: str, side: int) -> Encoder:
    """Of random weights: what is measured does not depend on them."""
    model = models.make(spec)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, side, side, 3), np.float32)))
    rng = np.random.default_rng(0)
    params, stats = jax.tree.map(lambda s: 0.02 * rng.standard_normal(s.shape).astype(s.dtype), shapes)
    view = {"view": f"flip(0)|size({side})|normalise(.5,.25)", "size": side, "mpp": MPP, "dtype": "bfloat16"}
    weights.save(folder, spec, params, stats, side=side, mean=(0.5,) * 3, std=(0.25,) * 3, ours=view)
    return dataclasses.replace(encoder.of_weights(folder), name=spec)
