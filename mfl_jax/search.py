"""`mfl search`: the tiles most like one tile or one place, elsewhere; as a table and as a picture."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from input_pipeline.files import save_picture, whole
from mfl_jax import faiss_index, topk
from mfl_jax.corpus import Corpus
from mfl_jax.report.pictures import sheet

ACROSS = ("case", "slide", "tile", "nothing")
WIDE = 6  # pictures a line
PLACE = ("tile", "case", "slide", "x", "y")


@dataclass(frozen=True)
class Hits:
    query: np.ndarray  # rows of the corpus that were asked with
    rows: np.ndarray  # found, the most similar first
    cosine: np.ndarray


def search(
    corpus: Corpus,
    query: np.ndarray,
    k: int = 10,
    across: str = "case",
    *,
    index: str = "",
    asked_by: Corpus | None = None,
) -> Hits:
    """The k tiles most similar to the mean of the query's features, none of them of its cases (slides, tiles).

    With `asked_by` the query is rows of that corpus: the same tiles, seen in another modality. `index` names an index
    of faiss, such as 'Flat' or 'HNSW32'; without one the search is exact, on the device.
    """
    if across not in ACROSS:
        raise ValueError(f"across is {across!r}; allowed: {', '.join(ACROSS)}")
    if across == "nothing":
        return _found(corpus if asked_by is None else asked_by, corpus, query, k, np.zeros(len(corpus), bool), index)
    codes = np.arange(len(corpus)) if across == "tile" else corpus.columns[across].astype(str)
    _, codes = np.unique(codes, return_inverse=True)
    own = np.isin(codes, codes[query])
    if own.all():
        raise ValueError(f"all {len(corpus)} tiles are of the query's {across}: there is nothing else to search in")
    return _found(corpus if asked_by is None else asked_by, corpus, query, k, own, index)


def _found(asker: Corpus, corpus: Corpus, query: np.ndarray, k: int, own: np.ndarray, index: str) -> Hits:
    asked = topk.unit(asker.features[query]).mean(0, keepdims=True)
    given = (asked, corpus.features, k, [(np.ones(1, bool), own)])
    close, rows = faiss_index.search(*given, kind=index) if index else topk.search(*given)
    found = rows[0] >= 0
    return Hits(query, rows[0][found], close[0][found])


def lines(corpus: Corpus, hits: Hits, label: str = "") -> list[dict[str, str]]:
    """One row a hit, as text: rank, cosine, tile, case, slide, x, y, their unit where it is not px, and the label."""
    names = shown(corpus, label)
    texts = {name: corpus.text(name, hits.rows) for name in names}
    return [
        {"rank": str(i + 1), "cosine": f"{hits.cosine[i]:.4f}"} | {n: texts[n][i] for n in names}
        for i in range(len(hits.rows))
    ]


def shown(corpus: Corpus, label: str = "") -> tuple[str, ...]:
    """Columns that tell people of a tile."""
    return (*PLACE, *(("unit",) if "unit" in corpus.columns else ()), *((label,) if label else ()))


def described(corpus: Corpus, hits: Hits, label: str = "") -> str:
    """The query in words."""
    names = shown(corpus, label)
    first = ", ".join(f"{name} {corpus.text(name, hits.query[:1])[0]}" for name in names)
    return first if len(hits.query) == 1 else f"{len(hits.query)} tiles around {first}"


def printed(rows: list[dict[str, str]]) -> str:
    wide = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    every = [dict(zip(wide, wide, strict=True)), *rows]
    return "\n".join("  ".join(row[name].ljust(width) for name, width in wide.items()).rstrip() for row in every)


def picture(corpus: Corpus, hits: Hits, label: str = "", asked_by: Corpus | None = None) -> np.ndarray:
    """The query, as `asked_by` shows it, then what was found. With a label, a whole frame is a tile of the query's, a
    broken one of another."""
    shown = [int(hits.query[0]), *hits.rows.tolist()]
    names = corpus.text(label or "case", shown)
    if label and corpus.columns[label].dtype.kind in "iufb" and label not in corpus.classes:
        names = [f"{label} {name}" for name in names]
    captions = ["query: " + names[0], *(f"{c:.2f} {name}" for c, name in zip(hits.cosine, names[1:], strict=True))]
    frames = [None, *((name == names[0]) if label else None for name in names[1:])]
    each = [slice(start, start + WIDE) for start in range(0, len(shown), WIDE)]
    tiles = [*(asked_by or corpus).pictures(shown[:1]), *corpus.pictures(shown[1:])]
    return sheet([tiles[s] for s in each], captions=[captions[s] for s in each], frames=[frames[s] for s in each])


def save(folder: Path, corpus: Corpus, hits: Hits, label: str = "", asked_by: Corpus | None = None) -> list[Path]:
    """hits.csv, and neighbours.png where there are pictures."""
    rows = lines(corpus, hits, label)
    with whole(folder / "hits.csv") as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    if all(tile is None for tile in corpus.pictures([int(hits.query[0]), *hits.rows.tolist()])):
        return [folder / "hits.csv"]
    save_picture(folder / "neighbours.png", picture(corpus, hits, label, asked_by))
    return [folder / "hits.csv", folder / "neighbours.png"]
