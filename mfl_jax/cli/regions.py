"""From tile features, or from slides, to a tile set of regions."""

import argparse
from pathlib import Path

from mfl_jax.cli.cohorts import SPLITS_HELP
from mfl_jax.cli.features import add_encoder, extracted
from mfl_jax.cli.parts import add_command, add_work, say


def add(commands) -> None:
    command = add_command(commands, "regions", regions, "tile features, or slides -> a tile set of regions")
    command.add_argument(
        "source",
        type=Path,
        help="folder of h5 files (mfl extract, CLAM, TRIDENT, STAMP); with --run or --weights, what mfl extract takes",
    )
    command.add_argument("--out", type=Path, required=True)
    add_encoder(command, required=False)
    command.add_argument("--tiles", type=int, default=16, help="along a side of a region (default 16)")
    command.add_argument("--step", type=int, help="tiles from one region to the next (default: side by side)")
    command.add_argument(
        "--min-tissue", type=float, default=0.25, help="least share of a region's cells that hold a tile (default .25)"
    )
    command.add_argument("--tile-size", type=int, help="px of a tile, where the files do not say (CLAM)")
    command.add_argument(
        "--mpp", type=float, help="um per px of a tile, where neither the files (CLAM, TRIDENT) nor the encoder says it"
    )
    command.add_argument(
        "--table",
        type=Path,
        help="CSV: slide_id, and case_id, label, label_<x> (default: SOURCE, if that is a CSV; else all files, without "
        "labels)",
    )
    command.add_argument("--name", default="regions", help="of the set (lower case letters, digits, _)")
    command.add_argument("--splits", help=SPLITS_HELP)
    command.add_argument("--split-seed", type=int, default=0)
    add_work(command)


def regions(options: argparse.Namespace) -> int:
    """Cut each slide's tiles into regions and write these as a tile set: grids of features with a mask. With --run or
    --weights the features are extracted first, into OUT/features, as mfl extract does. Run again, it does what failed,
    what changed, and what is new."""
    from input_pipeline.pack import read_splits
    from input_pipeline.regions import Params, assemble

    names = ("name", "tiles", "step", "min_tissue", "tile_size", "mpp")
    params = Params(**{name: getattr(options, name) for name in names})
    splits = None if options.splits is None else read_splits(options.splits)
    table = options.source if options.table is None and options.source.suffix.lower() == ".csv" else options.table
    if table is not None and not table.is_file():  # said before hours of extraction
        raise ValueError(f"there is no table {table}")
    features, failed = _features(options)
    if failed and not any(features.glob("*.h5")):
        print("no slide has features: there is nothing to cut regions from")
        return 1
    work = {"workers": options.workers, "progress": not options.quiet, "say": say}
    report = assemble(features, options.out, params, table=table, splits=splits, split_seed=options.split_seed, **work)
    print(report.ledger.table())
    if report.regions and report.ledger.wall:
        print(f"{report.regions:,} regions: {report.regions / report.ledger.wall:,.0f} regions/s")
    states = [row["state"] for row in report.rows]
    listed = ", ".join(f"{states.count(state)} {state}" for state in ("done", "empty", "failed"))
    print(f"{listed} ({report.kept} were done before); table: {options.out / 'status.csv'}")
    if report.manifest:
        cases = ", ".join(f"{count} {name}" for name, count in report.splits.items())
        print(f"{report.manifest['tiles']:,} regions in {options.out}; cases: {cases}")
    return 1 if failed or report.failed else 0


def _features(options: argparse.Namespace) -> tuple[Path, bool]:
    """(the folder of features, whether the extraction of any slide failed)"""
    from input_pipeline.features import BagError, find_folder

    source = options.source
    if options.workdir or options.weights:
        if source.is_dir() and any(source.glob("*.h5")):
            raise ValueError(f"{source} holds features already: leave --run and --weights out")
        if options.tile_size is not None:
            raise ValueError("--tile-size is for files of features: with --run or --weights the encoder says it")
        features = options.out / "features"
        report = extracted(options, features)
        asked = {row["slide_id"] for row in report.rows}
        if others := sorted(path.stem for path in features.glob("*.h5") if path.stem not in asked):
            say(
                f"{len(others)} slides of earlier calls are in {features}, and in the set as well: {others[0]}, ...; "
                "delete their files to leave them out"
            )
        return features, bool(report.failed)
    if options.default_mpp is not None:
        raise ValueError("--default-mpp is for slides, with --run or --weights: a folder of features takes --mpp")
    try:
        return find_folder(source), False
    except BagError:
        if (held := _held(source)) is None:
            raise
        raise ValueError(
            f"{source} holds {held}, and no features of tiles: name the encoder as --run (a workdir of mfl train) or "
            "--weights (a folder)"
        ) from None


def _held(source: Path) -> str | None:
    """What there is to extract features from."""
    from mfl_jax import slides

    if (kind := slides.kind_of(source)) != "slides":
        return f"what mfl {'tile' if kind == 'tiled' else 'pack'} wrote"
    try:
        return f"{len(slides.read_cohort(source))} slides"
    except ValueError:
        return None
