"""From H&E to its partner and back: tiles of one modality asked for among tiles of the other, in the space of training.

Methods that compare modalities say how, as `Method.align`. Nothing here is a figure of H&E alone: the partner is seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mfl_jax.corpus import Corpus, columns_of
from mfl_jax.evaluators import retrieval
from mfl_jax.evaluators.retrieval import Retrieved


@dataclass(frozen=True)
class Pairs:
    """Row i of both is one tile that has the partner; `trained` are cases of the run, `split` the one embedded."""

    he: np.ndarray  # float32 [N, D]
    partner: np.ndarray
    ids: np.ndarray  # of the tile set
    columns: Mapping[str, np.ndarray]
    name: str  # of the partner
    trained: tuple[str, ...]


def embed(run: Path, tileset: Path, partner: str = "", *, batch: int = 256, split: str | None = "test") -> Pairs:
    """Projections of every tile of a split that has the partner. ValueError where the run compares nothing with it."""
    from input_pipeline.tileset import TileSet
    from mfl_jax import sharding
    from mfl_jax.evaluators.embed import embed_set
    from mfl_jax.trained import check_tiles, open_run

    tiles, mesh = TileSet.open(tileset), sharding.make_mesh()
    trained = open_run(run, mesh)
    check_tiles(run, trained.facts, tiles.spec)
    name = chosen(run, trained.method.align, partner)
    if name not in {p.name for p in tiles.spec.partners}:
        raise ValueError(f"{tileset} has no partner {name!r}; it has {', '.join(p.name for p in tiles.spec.partners)}")
    options: dict[str, Any] = {"batch": batch, "split": split, "partners": (name,)}
    found = embed_set(trained.method.align[name], trained.params, trained.extra, tiles, mesh, **options)
    there = np.asarray(tiles.tiles[f"has_{name}"])[found.ids].astype(bool)
    if not there.any():
        raise ValueError(f"no tile of split {split!r} of {tileset} has the partner {name!r}")
    columns = {key: values[there] for key, values in columns_of(found, tiles).items()}
    he, other = found.features["he"][there], found.features[name][there]
    return Pairs(he, other, found.ids[there], columns, name, trained.facts.train_cases)


def chosen(run: Path, align: Mapping[str, Any], partner: str) -> str:
    """The partner asked for, or the only one."""
    if not align:
        raise ValueError(
            f"{run} compares H&E with no partner: runs of mfl and trident do, where the config has views.eval_<partner>"
        )
    if not partner and len(align) == 1:
        return next(iter(align))
    if partner not in align:
        raise ValueError(f"{run} compares H&E with {', '.join(align)}, not with {partner!r}")
    return partner


def evaluate(
    pairs: Pairs, *, ks: Sequence[int] = retrieval.KS, seed: int = 0, resamples: int = 2000
) -> dict[str, Retrieved]:
    """Recall@k both ways, each tile asking for itself in the other modality among all tiles of all slides."""
    names = ("he", pairs.name)
    return retrieval.cross_modal(
        pairs.he, pairs.partner, pairs.columns, names=names, ks=ks, seed=seed, resamples=resamples
    )


def told(pairs: Pairs, found: Mapping[str, Retrieved]) -> list[str]:
    """One line a direction, and what to think of it."""
    lines = []
    for name, result in found.items():
        figures = ", ".join(f"recall@{k.removeprefix('recall_')} {result.metrics[k]} (chance {chance:.4f})"
                            for k, chance in result.chance.items())  # fmt: skip
        lines.append(f"{name}: {figures}; mAP {result.metrics['map']}, nDCG {result.metrics['ndcg']}; "
                     f"median rank {result.counts['median_rank']} of {result.counts['bank']}")  # fmt: skip
        lines += result.notes
    cases = set(pairs.columns["case"].tolist())
    if seen := cases & set(pairs.trained):
        lines.append(f"transductive: the run was trained on {len(seen)} of these {len(cases)} cases")
    return lines


def corpora(pairs: Pairs, tileset: Path) -> tuple[Corpus, Corpus]:
    """(H&E, partner) to be searched in, with pictures of each."""
    from input_pipeline.show import to_rgb
    from input_pipeline.tileset import TileSet

    tiles = TileSet.open(tileset)
    partner = next(p for p in tiles.spec.partners if p.name == pairs.name)

    def he(rows: Sequence[int]) -> list[np.ndarray | None]:
        return [tiles.decode(example)["he"] for example in tiles.read(pairs.ids[np.asarray(rows, np.int64)])]

    def dense(rows: Sequence[int]) -> list[np.ndarray | None]:
        found = tiles.read(pairs.ids[np.asarray(rows, np.int64)])
        images = [tiles.decode(example)[pairs.name] for example in found]
        return [None if image is None or partner.kind == "vector" else to_rgb(image, partner) for image in images]

    columns, names = dict(pairs.columns), tuple(tiles.spec.label_names)
    classes = {"label": names} if names else {}
    return Corpus(pairs.he, columns, he, classes), Corpus(pairs.partner, columns, dense, classes)
