"""From tile features to a tile set of regions."""

import argparse
from pathlib import Path

from mfl_jax.cli.cohorts import SPLITS_HELP
from mfl_jax.cli.parts import add_command, add_work, say


def add(commands) -> None:
    command = add_command(commands, "regions", regions, "tile features -> a tile set of regions, for grid_vit")
    command.add_argument("features", type=Path, help="folder of h5 files: of mfl extract, CLAM, TRIDENT or STAMP")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--tiles", type=int, default=16, help="along a side of a region (default 16)")
    command.add_argument("--step", type=int, help="tiles from one region to the next (default: side by side)")
    command.add_argument(
        "--min-tissue", type=float, default=0.25, help="least share of a region's cells that hold a tile (default .25)"
    )
    command.add_argument("--tile-size", type=int, help="px of a tile, where the files do not say (CLAM)")
    command.add_argument("--mpp", type=float, help="um per px of a tile, where the files do not say (CLAM, TRIDENT)")
    command.add_argument("--table", type=Path, help="CSV: slide_id, and case_id, label, label_<x> (default: all files)")
    command.add_argument("--name", default="regions", help="of the set (lower case letters, digits, _)")
    command.add_argument("--splits", help=SPLITS_HELP)
    command.add_argument("--split-seed", type=int, default=0)
    add_work(command)


def regions(options: argparse.Namespace) -> int:
    """Cut each slide's tiles into regions and write these as a tile set: grids of features with a mask. Run again, it
    does what failed, what changed, and what is new."""
    from input_pipeline.pack import read_splits
    from input_pipeline.regions import Params, assemble

    names = ("name", "tiles", "step", "min_tissue", "tile_size", "mpp")
    params = Params(**{name: getattr(options, name) for name in names})
    splits = None if options.splits is None else read_splits(options.splits)
    work = {"workers": options.workers, "progress": not options.quiet, "say": say}
    report = assemble(
        options.features, options.out, params, table=options.table, splits=splits, split_seed=options.split_seed, **work
    )
    print(report.ledger.table())
    if report.regions and report.ledger.wall:
        print(f"{report.regions:,} regions: {report.regions / report.ledger.wall:,.0f} regions/s")
    states = [row["state"] for row in report.rows]
    listed = ", ".join(f"{states.count(state)} {state}" for state in ("done", "empty", "failed"))
    print(f"{listed} ({report.kept} were done before); table: {options.out / 'status.csv'}")
    if report.manifest:
        cases = ", ".join(f"{count} {name}" for name, count in report.splits.items())
        print(f"{report.manifest['tiles']:,} regions in {options.out}; cases: {cases}")
    return 1 if report.failed else 0
