"""A small tile set whose every tile tells which one it is, built once a session, and the truth about it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from input_pipeline.tileset import Partner, Record, Spec, TileSet, finish, write_slide

SIZE = 16
STEP_PX = 20
MPP = 0.5
SLIDES = (("s0", "a", 7), ("s1", "b", 30), ("s2", "c", 12), ("s3", "b", 1), ("s4", "d", 23), ("s5", "e", 40))
SPEC = Spec(
    "toy",
    SIZE,
    0.5,
    he_encoding="png",
    partners=(
        Partner("if", "image", channels=4, dtype="uint16", encoding="png"),
        Partner("nuclei", "map", dtype="uint16", encoding="png", size=8),
        Partner("counts", "vector", dtype="float32", encoding="float32", length=5),
    ),
    label_names=("x", "y", "z"),
)


@dataclass(frozen=True)
class Truth:
    """What each tile of the set was written as, by id."""

    root: Path
    he: np.ndarray
    partners: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    xy_um: np.ndarray
    slide: np.ndarray
    case: np.ndarray
    label: np.ndarray
    depth: np.ndarray

    def tileset(self) -> TileSet:
        return TileSet.open(self.root)


def _records(rng, number: int):
    for i in range(number):
        x, y = (i % 6) * STEP_PX, (i // 6) * STEP_PX
        partners = {
            "if": rng.integers(0, 65536, (SIZE, SIZE, 4), np.uint16),
            "nuclei": rng.integers(0, 9, (8, 8, 1), np.uint16) if i % 3 else None,
            "counts": rng.standard_normal(5).astype(np.float32) if i % 5 else None,
        }
        he = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        yield Record(he, partners, x, y, MPP, label=i % 3, columns={"depth": i / 7}, score={"if": 0.5})


def build(root: Path) -> Truth:
    rng = np.random.default_rng(5)
    rows = [(s, c, r) for s, c, n in SLIDES for r in _records(rng, n)]
    for slide, case, _ in SLIDES:
        write_slide(root, SPEC, slide, case, [r for s, _, r in rows if s == slide], {})
    finish(root, SPEC, splits={"train": ["a", "b", "c", "e"], "val": ["d"]})
    tileset = TileSet.open(root)
    assert tileset.slides == [s for s, _, _ in SLIDES]
    records = [r for _, _, r in rows]

    def stack(name):
        like = next(r.partners[name] for r in records if r.partners[name] is not None)
        found = [r.partners[name] for r in records]
        return np.stack([np.zeros_like(like) if f is None else f for f in found]), np.array(
            [f is not None for f in found]
        )

    partners = {p.name: stack(p.name) for p in SPEC.partners}
    return Truth(
        root,
        np.stack([r.he for r in records]),
        {k: v[0] for k, v in partners.items()},
        {k: v[1] for k, v in partners.items()},
        np.array([[r.x, r.y] for r in records]) * MPP,
        np.array([tileset.slides.index(s) for s, _, _ in rows]),
        np.array([tileset.cases.index(c) for _, c, _ in rows]),
        np.array([r.label for r in records]),
        np.array([r.columns["depth"] for r in records]),
    )


@pytest.fixture(scope="session", name="toy")
def toy_fixture(tmp_path_factory) -> Truth:
    return build(tmp_path_factory.mktemp("toy") / "set")
