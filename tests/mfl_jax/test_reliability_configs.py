"""Every config as `:tiny`, on a real tile set with the real stream: two steps, evaluators, a save, a restore."""

import json
from pathlib import Path

import numpy as np
import pytest

from input_pipeline.tileset import Partner, Record, Spec, finish, write_slide
from mfl_jax import metrics, train, trained
from tests.mfl_jax import synthetic

pytestmark = pytest.mark.usefixtures("compile_cache")
SIZE = synthetic.SIZE
CONFIGS = sorted(p.stem for p in synthetic.CONFIGS.glob("[!_]*.py") if p.stem != "common")
SPEC = Spec(
    "small",
    SIZE,
    0.5,
    he_encoding="png",
    partners=tuple(
        Partner(name, of.kind, length=of.channels, dtype=dtype, encoding="float32")
        if of.kind == "vector"
        else Partner(name, of.kind, channels=of.channels, dtype=dtype, encoding="png")
        for name, (of, _, dtype) in synthetic.PARTNERS.items()
    ),
    label_names=("no", "yes"),
)


def records(draw: np.random.Generator, count: int):
    """What is labelled is darker."""
    for i in range(count):
        label = i % 2
        he = draw.integers(120 - 60 * label, 250 - 60 * label, (SIZE, SIZE, 3), np.uint8)
        partners = {}
        for name, (_, shape, dtype) in synthetic.PARTNERS.items():
            partners[name] = (draw.integers(0, 5, shape) + label).astype(dtype)
        yield Record(he, partners, i * 60.0, 0.0, 0.5, label=label, columns={"dark": float(255 - he.mean())}, score={})


REGIONS = Spec(
    "small",
    synthetic.CELLS,
    32.0,
    "float16",
    label_names=SPEC.label_names,
    he_kind="grid",
    he_channels=synthetic.FEATURES + 1,
)


def regions(draw: np.random.Generator, count: int):
    """What is labelled has greater features."""
    for i in range(count):
        there = draw.random((synthetic.CELLS, synthetic.CELLS, 1)) < 0.8
        tiles = draw.normal(size=(synthetic.CELLS, synthetic.CELLS, synthetic.FEATURES)) + i % 2
        grid = np.concatenate([tiles * there, there], -1).astype(np.float16)
        yield Record(grid, {}, i * 600.0, 0.0, 0.5, label=i % 2)


@pytest.fixture(scope="module", name="root")
def root_fixture(tmp_path_factory) -> Path:
    """The folder of a set of tiles, and of one of regions."""
    root, draw = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    for name, spec, drawn in (("set", SPEC, records), ("regions", REGIONS, regions)):
        for i in range(8):
            write_slide(root / name, spec, f"s{i}", f"c{i}", list(drawn(draw, 10)), {})
        splits = {"train": ["c0", "c1", "c2", "c3"], "val": ["c4", "c5"], "test": ["c6", "c7"]}
        finish(root / name, spec, splits=splits)
    return root


def configured(name: str, folder: Path):
    root = folder / Path(synthetic.tiny(name).data.tileset).name
    shared = {"every": 1, "tileset": str(root), "batch": 16, "feature": "he", "partners": (), "resamples": 20}
    of_task = {"target": "label", "threshold": None, "regression": False, "pretrained": "train", "transductive": False}
    evals = {
        "probe": {"kind": "probe", **shared, **of_task},
        "near": {"kind": "knn", **shared, **of_task},
        "batch": {"kind": "batch_effect", **shared},
    }
    return synthetic.tiny(name, data__tileset=str(root), evals=evals, log_every=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_trains_is_evaluated_saved_and_restored(name, root, tmp_path):
    config = configured(name, root)
    state = train.train(config, tmp_path, progress=False)
    assert (int(state.step), int(state.skipped_total)) == (2, 0)
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [0, 1]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    for wanted in ("probe/auc", "near/auc", "batch/nearest"):
        assert [row["step"] for row in rows if wanted in row] == [0, 1, 2]
        assert all(np.isfinite(row[wanted]) for row in rows if wanted in row)

    again = train.train(config, tmp_path, progress=False)  # restored, and nothing left to do
    synthetic.assert_same(state, again)
    assert metrics.read(tmp_path / "metrics.jsonl") == rows
    found = trained.open_run(tmp_path)
    assert found.step == 2
    synthetic.assert_same(found.params, state.params if state.average is None else state.average)
    assert json.loads((tmp_path / "config.json").read_text())["evals"]["near"]["kind"] == "knn"
