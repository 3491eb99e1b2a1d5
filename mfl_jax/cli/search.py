"""What lies in an encoder: tiles like one tile (search), kinds of tile (clusters) and of slide (prototypes), what it
attends to (attention)."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mfl_jax.cli.parts import add_command, say

if TYPE_CHECKING:
    import numpy as np

    from mfl_jax.corpus import Corpus


def add(commands) -> None:
    for add in (_add_search, _add_clusters, _add_prototypes, _add_attention):
        add(commands)


def _add_corpus(command: argparse.ArgumentParser) -> None:
    command.add_argument("--run", dest="workdir", type=Path, help="workdir of mfl train, with --tileset")
    command.add_argument("--tileset", type=Path, help="its tiles are embedded")
    command.add_argument("--split", help="tiles of this split of the tile set alone")
    command.add_argument(
        "--feature", default="", help="which of the run's features (default: its descriptor, where it has one, else he)"
    )
    command.add_argument("--features", type=Path, help="in place of both: a folder of .h5 files, as mfl extract writes")
    command.add_argument("--slides", type=Path, help="with --features: the cohort of pictures, and of unnamed cases")
    command.add_argument(
        "--mpp", type=float, help="with --features: um per level-0 px, where a file does not say (STAMP's)"
    )
    command.add_argument("--batch", type=int, default=256)


def _check_of_tileset(options: argparse.Namespace) -> None:
    if options.slides or options.mpp is not None:
        raise ValueError("--slides and --mpp go with --features: a tile set has its pictures and places")


def _corpus(options: argparse.Namespace):
    from mfl_jax import corpus

    if options.features:
        if options.workdir or options.tileset or options.split or options.feature:
            raise ValueError("--features takes the place of --run, --tileset, --split and --feature")
        return corpus.of_folder(options.features, options.slides, mpp=options.mpp)
    _check_of_tileset(options)
    if not (options.workdir and options.tileset):
        raise ValueError("give --run and --tileset, or --features")
    say(f"embedding {options.tileset} with {options.workdir}")
    given = {"batch": options.batch, "split": options.split, "feature": options.feature}
    return corpus.of_tileset(options.workdir, options.tileset, **given)


def _add_search(commands) -> None:
    command = add_command(commands, "search", search, "tiles like this one, in other patients")
    _add_corpus(command)
    command.add_argument("--tile", type=int, help="the query by its number, as search prints it")
    command.add_argument("--slide", help="or by its place: the tile of this slide at --x, --y")
    command.add_argument("--x", type=float, help="level-0 px from the left (um with --um)")
    command.add_argument("--y", type=float, help="level-0 px from the top (um with --um)")
    command.add_argument("--um", action="store_true", help="x, y and radius are um")
    command.add_argument("--radius", type=float, default=0.0, help="ask with the mean of all tiles within")
    command.add_argument("--k", type=int, default=11, help="tiles to find (default 11)")
    command.add_argument("--across", choices=("case", "slide", "tile"), default="case", help="what is left out")
    command.add_argument(
        "--partner", help="search in tiles of this partner by H&E; without a query: recall both ways, over all of them"
    )
    command.add_argument(
        "--reverse", action="store_true", help="with --partner: search in H&E by a tile of the partner"
    )
    command.add_argument("--label", default="", help="a column to print, and to frame the pictures by")
    command.add_argument(
        "--index", default="", help="an index of faiss, such as HNSW32 (default: exact, without faiss)"
    )
    command.add_argument("--out", type=Path, help="folder for hits.csv and neighbours.png")


def search(options: argparse.Namespace) -> int:
    """Find the tiles most similar (cosine) to one tile or region, by default in other cases than its own."""
    from mfl_jax import search

    if options.partner is not None:
        return _across_modalities(options)
    if options.reverse:
        raise ValueError("--reverse goes with --partner")
    _check_query(options)
    tiles = _corpus(options)
    query = _query(options, tiles)
    hits = search.search(tiles, query, options.k, options.across, index=options.index)
    print(f"query: {search.described(tiles, hits, options.label)}")
    print(search.printed(search.lines(tiles, hits, options.label)))
    if options.out:
        print("wrote " + ", ".join(map(str, search.save(options.out, tiles, hits, options.label))))
    return 0


def _check_query(options: argparse.Namespace) -> None:
    by_place = None not in (options.slide, options.x, options.y)
    if by_place == (options.tile is not None):
        raise ValueError("the query is --tile, or --slide with --x and --y")


def _query(options: argparse.Namespace, tiles: "Corpus") -> "np.ndarray":
    """Rows of the tiles that are asked with."""
    import numpy as np

    from mfl_jax import corpus

    if options.tile is None:
        place = (options.slide, options.x, options.y)
        return corpus.locate(tiles, *place, um=options.um, radius=options.radius)
    query = np.flatnonzero(tiles.columns["tile"] == options.tile)
    if not len(query):
        raise ValueError(
            f"--tile is from 0 to {tiles.columns['tile'].max()}, of those searched in: {options.tile} is none"
        )
    return query


def _across_modalities(options: argparse.Namespace) -> int:
    """From H&E to a partner, or back. A tile may find itself: that is what is asked."""
    from mfl_jax import cross_modal, search

    if options.features or not (options.workdir and options.tileset) or options.feature:
        raise ValueError("--partner goes with --run and --tileset, and takes the projections of training")
    _check_of_tileset(options)
    asked = options.tile is not None or options.slide is not None
    if asked:
        _check_query(options)
    say(f"embedding {options.tileset} with {options.workdir}")
    split = options.split or (None if asked else "test")
    pairs = cross_modal.embed(options.workdir, options.tileset, options.partner, batch=options.batch, split=split)
    if not asked:
        print("\n".join(cross_modal.told(pairs, cross_modal.evaluate(pairs))))
        return 0
    he, partner = cross_modal.corpora(pairs, options.tileset)
    bank, asker = (he, partner) if options.reverse else (partner, he)
    query = _query(options, asker)
    hits = search.search(bank, query, options.k, "nothing", index=options.index, asked_by=asker)
    print(f"query: {search.described(asker, hits, options.label)}")
    print(search.printed(search.lines(bank, hits, options.label)))
    if options.out:
        print("wrote " + ", ".join(map(str, search.save(options.out, bank, hits, options.label, asker))))
    return 0


def _add_clusters(commands) -> None:
    command = add_command(commands, "clusters", clusters, "kinds of tile that an encoder sees, and where they lie")
    _add_corpus(command)
    command.add_argument("--k", type=int, default=8, help="clusters (default 8)")
    command.add_argument("--target", help="a column of classes to compare them with, in cases not trained on")
    command.add_argument("--threshold", type=float, help="two classes: above it, and not")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--out", type=Path, required=True, help="folder for the table, the sheets and the maps")


def clusters(options: argparse.Namespace) -> int:
    """k-means of all tiles: clusters.csv, a sheet of tiles for each cluster, and a map of each slide."""
    from mfl_jax import sort
    from mfl_jax.evaluators import Task

    task = Task(options.target, options.target, options.threshold) if options.target else None
    tiles = _corpus(options)
    result = sort.sort(tiles, options.k, task, seed=options.seed)
    print("\n".join(result.names))
    if result.agreement:
        for name, interval in result.agreement.metrics.items():
            chance = result.agreement.chance.get(name)
            print(f"{name} {interval}" + (f" (chance {chance:.3f})" if chance is not None else ""))
        print("\n".join((f"{result.unknown} tiles have no class and are left out of these", *result.agreement.notes)))
    if result.notes:
        print("\n".join(result.notes))
    written = sort.save(options.out, tiles, result)
    print(f"wrote {len(written)} files to {options.out}")
    return 0


def _add_attention(commands) -> None:
    command = add_command(commands, "attention", attention, "a picture of what a trained ViT attends to")
    command.add_argument("workdir", metavar="run", type=Path, help="the workdir of mfl train")
    command.add_argument("--tileset", type=Path, required=True)
    command.add_argument("--split", default="", help="of this split of the tile set alone")
    command.add_argument("--slides", type=Path, help="of regions: the cohort (CSV or folder), to draw them as H&E")
    command.add_argument("--rows", type=int, default=4, help="tiles or regions to draw (default 4)")
    command.add_argument("--seed", type=int, default=0, help="which of them")
    command.add_argument("--out", type=Path, default=Path("attention.png"))


def attention(options: argparse.Namespace) -> int:
    """Draw a few tiles or regions, and over them what the CLS token of the last block attends to, head by head."""
    from input_pipeline.tileset import TileSet
    from mfl_jax import attention
    from mfl_jax.slides import read_cohort

    slides = None if options.slides is None else {slide.slide_id: slide for slide in read_cohort(options.slides)}
    which = {"rows": options.rows, "split": options.split, "seed": options.seed, "slides": slides}
    print(f"wrote {attention.of_run(options.workdir, TileSet.open(options.tileset), options.out, **which)}")
    return 0


def _add_prototypes(commands) -> None:
    command = add_command(
        commands, "prototypes", prototypes, "what a run of slpd found in each slide, and who is alike"
    )
    command.add_argument("workdir", metavar="run", type=Path, help="the workdir of mfl train")
    command.add_argument("--tileset", default="", help="the set it was trained on (default: where it was then)")
    command.add_argument("--slides", type=Path, help="the cohort (CSV or folder), to draw over the slides themselves")
    command.add_argument("--show", type=int, default=12, help="slides to draw (default 12)")
    command.add_argument("--out", type=Path, required=True, help="folder for the table, the maps and the sheet")


def prototypes(options: argparse.Namespace) -> int:
    """Of the last checkpoint: prototypes.csv of all slides, a map of the clusters of each of the first ones, and
    neighbours.png: slides beside those most like them, in the colours of matched prototypes."""
    from mfl_jax import prototype_maps
    from mfl_jax.slides import read_cohort

    if options.show < 1:
        raise ValueError(f"--show is 1 or more, not {options.show}")
    found = prototype_maps.read(options.workdir, options.tileset)
    slides = {} if options.slides is None else {slide.slide_id: slide.he for slide in read_cohort(options.slides)}
    written = prototype_maps.save(options.out, found, options.show, slides)
    print(f"step {found.step}: {int(found.tables['eligible'].sum())} of {len(found.slides)} slides have prototypes")
    print(f"wrote {len(written)} files to {options.out}")
    return 0
