"""From slides on disk to a tile set: phantom, tile, pack, import, verify, audit, show."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from mfl_jax.cli.parts import add_command, add_work, say

EXCLUDE_HELP = "slides to leave out: camelyon16 (those known to be bad), or a CSV (slide_id, why)"
SPLITS_HELP = "shares of the cases, or a CSV: case_id,split (default: as before; a new set has train=.7,val=.1,test=.2)"


def add(commands) -> None:
    for add in (_add_phantom, _add_camelyon16, _add_tile, _add_pack, _add_import, _add_verify, _add_audit, _add_show):
        add(commands)


def _add_phantom(commands) -> None:
    command = add_command(commands, "phantom", phantom, "draw paired slides of known truth")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--cases", type=int, default=6)
    command.add_argument("--size", type=int, default=4096, help="side of a slide in px")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--partners", default="if,ihc,nuclei,counts", help="comma-separated")
    command.add_argument("--prefix", default="case", help="of the names of cases: another for another cohort")
    command.add_argument("--paired", type=int, help="cases that have partners, the first ones (default: all)")
    command.add_argument("--he-format", choices=("svs", "ome"), default="svs")
    add_work(command)


def phantom(options: argparse.Namespace) -> int:
    """Draw a cohort of H&E slides and their partners, as scanners write them, with all truth beside them."""
    from input_pipeline.cores import available_cores
    from input_pipeline.phantom import write_cohort

    partners = tuple(p for p in options.partners.split(",") if p)
    table = write_cohort(
        options.out,
        cases=options.cases,
        size=options.size,
        seed=options.seed,
        partners=partners,
        paired=options.paired,
        prefix=options.prefix,
        workers=available_cores() if options.workers is None else options.workers,
        he_format=options.he_format,
        progress=not options.quiet,
    )
    print(f"cohort: {table}\nnext:   mfl tile {table} --out {options.out / 'tiled'}")
    return 0


def _add_camelyon16(commands) -> None:
    command = add_command(commands, "camelyon16", camelyon16, "the published folder -> a CSV of slides, with splits")
    command.add_argument("root", type=Path, help="the folder that holds training/ and testing/")
    command.add_argument("--out", type=Path, default=Path("camelyon16.csv"))
    command.add_argument("--exclude", default="camelyon16", help=f"{EXCLUDE_HELP}; '' keeps all (default: camelyon16)")


def camelyon16(options: argparse.Namespace) -> int:
    """Write slide_id, case_id, he, label and split: for mfl tile, and as --table and --splits of mfl mil."""
    from input_pipeline.datasets.camelyon16 import write_table

    count = write_table(options.root, options.out, exclude=options.exclude, say=say)
    print(f"{count} slides: {options.out}\nnext:   mfl tile {options.out} --out tiled --size 224 --mpp 0.5")
    return 0


def _add_tile(commands) -> None:
    command = add_command(commands, "tile", tile, "slides -> coordinates, quality control, registration")
    command.add_argument(
        "cohort", type=Path, help="CSV (slide_id, case_id, he, partner_<name>, ...) or a folder with he/"
    )
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--size", type=int, default=256, help="px of a tile (default 256)")
    command.add_argument("--mpp", type=float, default=0.5, help="um per px of a tile (default 0.5)")
    command.add_argument("--step", type=int, help="px between tiles (default: the size)")
    command.add_argument("--min-tissue", type=float, default=0.5, help="least share of tissue (default 0.5)")
    command.add_argument("--max-pen", type=float, default=0.05, help="largest share under pen (default 0.05)")
    command.add_argument("--max-blur", type=float, default=0.5, help="largest share out of focus (default 0.5)")
    command.add_argument("--default-mpp", type=float, help="um per px of slides that do not say")
    command.add_argument("--max-error-um", type=float, help="largest median error of a registration that passes")
    command.add_argument("--registration", choices=("coarse", "affine", "bspline"), default="bspline")
    command.add_argument("--case-pattern", help="for a folder: regular expression whose group is the case")
    command.add_argument("--exclude", default="", help=EXCLUDE_HELP)
    command.add_argument("--runner", choices=("local", "beam"), default="local")
    add_work(command)


def tile(options: argparse.Namespace) -> int:
    """Find the tissue of each slide, lay the grid, register partners. Run again, it redoes what failed or changed."""
    from input_pipeline import cohort
    from input_pipeline.tile import Params, tile_cohort

    names = ("size", "mpp", "step", "min_tissue", "max_pen", "max_blur", "default_mpp", "registration", "max_error_um")
    params = Params(**{name: getattr(options, name) for name in names})
    slides = cohort.read(options.cohort, case_pattern=options.case_pattern, say=say)
    slides = cohort.without(slides, options.exclude, say) if options.exclude else slides
    if options.cohort.is_dir():
        cases = len({s.case_id for s in slides})
        print(f"{len(slides)} slides of {cases} cases, which are guessed from the file names: look at status.csv")
    work = {"workers": options.workers, "runner": options.runner, "progress": not options.quiet, "say": say}
    report = tile_cohort(slides, options.out, params, **work)
    states = [row["state"] for row in report.rows]
    tiles = sum(int(row["tiles"] or 0) for row in report.rows)
    print(report.ledger.table())
    print(f"{states.count('done')} done, {states.count('empty')} empty, {states.count('failed')} failed "
          f"({report.kept} were done before); {tiles:,} tiles; table: {options.out / 'status.csv'}")  # fmt: skip
    return 1 if report.failed else 0


def _add_pack(commands) -> None:
    command = add_command(commands, "pack", pack, "tiled slides -> a tile set")
    command.add_argument("tiled", type=Path, help="the folder that mfl tile wrote")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--name", default="tiles", help="of the set (lower case letters, digits, _)")
    command.add_argument("--quality", type=int, default=90, help="of JPEG")
    command.add_argument("--lossless", default="", help="8-bit partners to store as PNG, comma-separated")
    command.add_argument(
        "--min-score", type=float, help="leave out partner tiles that agree less with the H&E (-1 to 1)"
    )
    command.add_argument("--min-inside", type=float, default=0.98, help="least share of a tile on the partner slide")
    command.add_argument("--splits", help=SPLITS_HELP)
    command.add_argument("--split-seed", type=int, default=0)
    command.add_argument("--runner", choices=("local", "beam"), default="local")
    add_work(command)


def pack(options: argparse.Namespace) -> int:
    """Read, align and compress the tiles of every slide. Run again, it redoes what failed or changed."""
    from input_pipeline.pack import Params, pack, read_splits

    lossless = tuple(p for p in options.lossless.split(",") if p)
    he = "png" if "he" in lossless else "jpeg"
    partners = tuple(p for p in lossless if p != "he")
    params = Params(options.name, options.quality, he, partners, options.min_score, options.min_inside)
    report = pack(
        options.tiled,
        options.out,
        params,
        splits=read_splits(options.splits) if options.splits else None,
        split_seed=options.split_seed,
        workers=options.workers,
        runner=options.runner,
        progress=not options.quiet,
        say=say,
    )
    print(report.ledger.table())
    for what, count in report.counts.items():
        print(f"{count:>10,}  {what}")
    print(f"cases: {_cases(report.splits)}")
    print(f"{len(report.failed)} slides failed ({report.kept} were packed before); next: mfl verify {options.out}")
    return 1 if report.failed else 0


def _add_import(commands) -> None:
    command = add_command(commands, "import", import_pairs, "image pairs and a CSV -> a tile set")
    command.add_argument("table", type=Path, help="CSV: slide_id, case_id, he, one column a partner, mpp, label, split")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--name", default="folder", help="of the set (lower case letters, digits, _)")
    command.add_argument("--image", action="append", default=[], help="a column of partner images (may be repeated)")
    command.add_argument("--map", action="append", default=[], help="a column of label maps (may be repeated)")
    command.add_argument("--size", type=int, default=256, help="px of a tile (default 256)")
    command.add_argument("--mpp", type=float, help="um per px of a tile (default: that of the fields)")
    command.add_argument("--step", type=int, help="px between tiles (default: the size)")
    command.add_argument(
        "--edges", choices=("pad", "shift", "drop"), default="pad", help="what happens at the far edges"
    )
    command.add_argument("--splits", help="shares of the cases, or a CSV: case_id,split (default: the column split)")
    command.add_argument("--split-seed", type=int, default=0)
    add_work(command)


def import_pairs(options: argparse.Namespace) -> int:
    """Cut fields and their aligned partners into tiles. For whole slides, use mfl tile and mfl pack."""
    from input_pipeline.datasets.folder import import_folder, sample_of
    from input_pipeline.describe import partner_like
    from input_pipeline.pack import read_splits

    wanted = [(column, "image") for column in options.image] + [(column, "map") for column in options.map]
    if both := set(options.image) & set(options.map):
        raise ValueError(f"columns {sorted(both)} are given as --image and as --map; say one")
    partners = {column: partner_like(sample_of(options.table, column), column, kind) for column, kind in wanted}
    report = import_folder(
        options.table,
        options.out,
        name=options.name,
        partners=partners,
        size=options.size,
        mpp=options.mpp,
        step=options.step,
        edges=options.edges,
        splits=read_splits(options.splits) if options.splits else None,
        seed=options.split_seed,
        workers=options.workers,
        progress=not options.quiet,
        say=say,
    )
    print(f"{len(report.manifest['slides'])} fields imported; cases: {_cases(report.splits)}")
    print(f"{len(report.failed)} fields failed; next: mfl verify {options.out}")
    return 1 if report.failed else 0


def _cases(splits: Mapping[str, int]) -> str:
    return ", ".join(f"{count} in {name}" for name, count in splits.items()) or "in no split"


def _add_verify(commands) -> None:
    command = add_command(commands, "verify", verify, "find every fault of a tile set")
    command.add_argument("tileset", type=Path)
    command.add_argument("--deep", action="store_true", help="decode every image as well")
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def verify(options: argparse.Namespace) -> int:
    """Read every byte of a tile set and compare it with its checksums, index and manifest."""
    from input_pipeline.tileset import TileSet
    from input_pipeline.tileset.verify import verify

    faults = verify(options.tileset, deep=options.deep, progress=not options.quiet)
    for fault in faults:
        print(fault)
    if faults:
        print(f"{len(faults)} faults in {options.tileset}")
        return 1
    tileset = TileSet.open(options.tileset)
    counts = f"{len(tileset):,} tiles of {len(tileset.slides)} slides, {len(tileset.cases)} cases"
    print(f"{options.tileset} is whole: {counts}")
    return 0


def _add_audit(commands) -> None:
    command = add_command(commands, "audit", audit, "find what two sets, or the splits of one, share")
    command.add_argument("a", type=Path)
    command.add_argument("b", type=Path, nargs="?", help="another set; without it the splits of the first are compared")
    command.add_argument("--names-only", action="store_true", help="cases, slides and files, without the tiles")
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def audit(options: argparse.Namespace) -> int:
    """Cases, slides, files and near-duplicate tiles that stand on both sides; a leak makes the exit status 1."""
    from input_pipeline.audit import audit
    from input_pipeline.cores import available_cores
    from input_pipeline.tileset import TileSet

    b = TileSet.open(options.b) if options.b else None
    tiles, threads = not options.names_only, available_cores()
    findings = audit(TileSet.open(options.a), b, tiles=tiles, threads=threads, progress=not options.quiet)
    for finding in findings:
        print(finding)
    print(f"{len(findings)} findings" if findings else "nothing is shared")
    return 1 if findings else 0


def _add_show(commands) -> None:
    command = add_command(commands, "show", show, "a picture of a batch: H&E tiles and their partners")
    command.add_argument("tileset", type=Path)
    command.add_argument("--out", type=Path, default=Path("batch.png"))
    command.add_argument("--rows", type=int, default=6)
    command.add_argument("--split", default="train")
    command.add_argument("--seed", type=int, default=0)


def show(options: argparse.Namespace) -> int:
    """Draw the first batch that training would see, one row a tile, one column a partner."""
    from input_pipeline.files import save_picture
    from input_pipeline.show import batch_picture
    from input_pipeline.stream import train_stream
    from input_pipeline.tileset import TileSet

    if options.out.suffix not in (".png", ".jpg"):
        raise ValueError(f"--out is a .png or .jpg, not {str(options.out)!r}")
    tileset = TileSet.open(options.tileset)
    with train_stream(tileset, batch=options.rows, seed=options.seed, split=options.split) as stream:
        save_picture(options.out, batch_picture(next(iter(stream)), tileset.spec))
    print(f"wrote {options.out}")
    return 0
