"""A trained encoder put to use: extract, export."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mfl_jax.cli.parts import add_command, add_work, say

if TYPE_CHECKING:
    from input_pipeline.tile import Report
    from mfl_jax.encoder import Encoder
    from mfl_jax.slides import Source


def add(commands) -> None:
    for add in (_add_extract, _add_export):
        add(commands)


def _add_extract(commands) -> None:
    command = add_command(commands, "extract", extract, "slides, or a tile set, through an encoder: one h5 a slide")
    command.add_argument("source", type=Path, help="slides (CSV, folder, one file), what mfl tile wrote, or a tile set")
    add_encoder(command, required=True)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--layout", choices=("ours", "clam", "trident", "stamp"), default="ours")
    command.add_argument(
        "--dtype", choices=("float16", "float32"), help="of the features (default: as the layout has it)"
    )
    command.add_argument(
        "--mpp", type=float, help="um per px of the tiles, where it is not what the encoder was trained on"
    )
    add_work(command)


def add_encoder(command: argparse.ArgumentParser, *, required: bool) -> None:
    """What `extracted` reads, beside --mpp and what add_work adds."""
    which = command.add_mutually_exclusive_group(required=required)
    which.add_argument("--run", dest="workdir", type=Path, help="the workdir of mfl train")
    which.add_argument(
        "--weights", type=Path, help="a folder with config.json and model.safetensors, of ours, timm, DINO, HIPT"
    )
    command.add_argument(
        "--batch",
        type=int,
        help="tiles at a time, over all devices (default 256; on a CPU 8, or 64 where tiles are small)",
    )
    command.add_argument("--default-mpp", type=float, help="um per px of slides that do not say")


def extract(options: argparse.Namespace) -> int:
    """Features of every tile of every slide. Run again, it does what failed, what changed, and what is new. Slides that
    were not tiled are tiled first, into OUT/tiled."""
    return 1 if extracted(options, options.out, layout=options.layout, dtype=options.dtype).failed else 0


def extracted(options: argparse.Namespace, out: Path, layout: str = "ours", dtype: str | None = None) -> "Report":
    """options.source through options.workdir or options.weights, into `out`; where the time went is printed."""
    from mfl_jax import encoder
    from mfl_jax.extract import extract

    made = encoder.of_run(options.workdir) if options.workdir else encoder.of_weights(options.weights)
    source = _source(options, out, made)
    made.check_tiles(source.size, source.mpp, asked=options.mpp, kind=source.kind, channels=source.channels)
    threads = None if options.workers is None else max(1, options.workers)
    work = {"batch": options.batch, "workers": threads, "progress": not options.quiet, "say": say}
    report = extract(source, made, out, layout=layout, dtype=dtype, **work)
    print(report.ledger.table())
    states = [row["state"] for row in report.rows]
    print(f"{states.count('done')} done, {states.count('empty')} empty, {states.count('failed')} failed "
          f"({report.kept} were done before); table: {out / 'status.csv'}")  # fmt: skip
    return report


def _source(options: argparse.Namespace, out: Path, made: "Encoder") -> "Source":
    from input_pipeline import tile
    from mfl_jax import slides

    kind = slides.kind_of(options.source)
    if kind == "slides":
        mpp = made.mpp if options.mpp is None else options.mpp
        if mpp is None:
            raise ValueError(
                f"{made.name} does not say for which scale it was trained: give it as --mpp (20x is about .5)"
            )
        params = tile.Params(size=made.size, mpp=mpp, default_mpp=options.default_mpp)
        work = {"workers": options.workers, "progress": not options.quiet, "say": say}
        tile.tile_cohort(slides.read_cohort(options.source, say), out / "tiled", params, **work)
        return slides.of_tiled(out / "tiled")
    if options.default_mpp is not None:
        raise ValueError(f"--default-mpp is for slides; {options.source} is tiled already")
    return slides.of_tile_set(options.source) if kind == "tile set" else slides.of_tiled(options.source)


def _add_export(commands) -> None:
    command = add_command(commands, "export", export, "the H&E encoder of a run, as weights that timm reads")
    command.add_argument("workdir", metavar="run", type=Path, help="the workdir of mfl train")
    command.add_argument("--out", type=Path, required=True)


def export(options: argparse.Namespace) -> int:
    """Write config.json and model.safetensors, which mfl extract --weights reads as well."""
    from mfl_jax.encoder import export

    found = export(options.workdir, options.out)
    print(f"{found['architecture']}, {found['features']} features, step {found['step']}: {options.out}")
    return 0
