"""Small tile sets with every kind of partner, drawn from a seed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from input_pipeline.tileset import Partner, Record, Spec, finish, write_slide

SIZE = 24
PARTNERS = (
    Partner("nuclei", "map", dtype="uint16"),
    Partner("planes", "map", 2, dtype="uint16"),
    Partner("markers", "image", 4, "uint16", channel_names=("a", "b", "c", "d"), size=12, mpp=1.0),
    Partner("ihc", "image", 3, "uint8", "jpeg"),
    Partner("genes", "vector", dtype="float32", encoding="float32", length=5),
)
SPEC = Spec("demo", SIZE, 0.5, "png", partners=PARTNERS, label_names=("no", "yes"), params={"step": 24})


def record(seed: int, absent: tuple[str, ...] = ()) -> Record:
    rng = np.random.default_rng(seed)
    partners: dict[str, np.ndarray | None] = {
        "nuclei": rng.integers(0, 65536, (SIZE, SIZE)).astype(np.uint16),
        "planes": rng.integers(0, 65536, (SIZE, SIZE, 2)).astype(np.uint16),
        "markers": rng.integers(0, 65536, (12, 12, 4)).astype(np.uint16),
        "ihc": np.full((SIZE, SIZE, 3), rng.integers(0, 256, 3), np.uint8),
        "genes": rng.normal(size=5).astype(np.float32),
    }
    partners |= dict.fromkeys(absent)
    he = rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    score = {"markers": seed / 1000}
    return Record(he, partners, seed * 2.0, seed * 3.0, 0.5, seed % 3 - 1, {"fraction": seed / 7}, score)


def records(seeds: range) -> Iterator[Record]:
    return (record(seed, ("markers", "genes") if seed % 5 == 2 else ()) for seed in seeds)


def write_set(root: Path, spec: Spec = SPEC, splits: dict | None = None) -> Path:
    """Three slides of two cases: 7, 0 and 4 tiles; tile i was drawn from seed i."""
    write_slide(root, spec, "A 1", "case-1", records(range(7)), {"he": {"name": "a.svs"}})
    write_slide(root, spec, "B", "case-2", records(range(0)), {"he": {"name": "b.svs"}})
    write_slide(root, spec, "C", "case-2", records(range(7, 11)), {"he": {"name": "c.svs"}})
    finish(root, spec, splits or {"train": ["case-1"], "test": ["case-2"]})
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
