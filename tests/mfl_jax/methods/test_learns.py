"""Every method learns to see tissue: on slides of other cases it beats raw pixels, and its own network untrained.

Raw pixels alone are too low a bar for the second purpose of this test: the features of an untrained convnet beat them
too, so that a sign error or a dead view would pass.
"""

import functools

import jax
import numpy as np
import pytest

from input_pipeline import cohort
from input_pipeline.pack import Params as PackParams
from input_pipeline.pack import pack
from input_pipeline.phantom import write_cohort
from input_pipeline.stream import eval_stream
from input_pipeline.tile import Params as TileParams
from input_pipeline.tile import tile_cohort
from input_pipeline.tileset import TileSet
from mfl_jax import config as configs
from mfl_jax import train
from mfl_jax.evaluators.embed import embed_set
from mfl_jax.methods import METHODS
from mfl_jax.step import init_state
from tests.mfl_jax import synthetic

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_cache")]
STEPS, BATCH, NEIGHBOURS = 150, 64, 20
WORDS = {  # the nuclear map lies in the frame of the H&E, and so needs no registration
    "mfl": "nuclei",
    "trident": "nuclei",
    "supervised": "data.columns=['region'],supervised.target=region,supervised.threshold=1.5",
}
RAW, UNTRAINED = 0.1, 0.02  # balanced accuracy by which these are beaten at least


@pytest.fixture(scope="module", name="tileset")
def drawn(tmp_path_factory) -> TileSet:
    root = tmp_path_factory.mktemp("phantom")
    options = {"workers": 2, "progress": False}
    table = write_cohort(root / "slides", cases=8, size=1024, seed=1, partners=("nuclei",), **options)
    tile_cohort(cohort.read(table), root / "tiled", TileParams(size=64), **options)
    pack(root / "tiled", root / "set", PackParams(name="phantom"), splits={"train": 0.5, "test": 0.5}, **options)
    return TileSet.open(root / "set")


def region_accuracy(features: np.ndarray, tileset: TileSet) -> float:
    """Balanced over kinds of tissue: tiles of test cases by the vote of their neighbours among the train cases."""
    region, share = (np.asarray(tileset.tiles[name]) for name in ("region", "region_share"))
    bank = np.intersect1d(tileset.ids("train"), np.flatnonzero((share > 0.8) & (region > 0)))
    asked = np.intersect1d(tileset.ids("test"), np.flatnonzero((share > 0.8) & (region > 0)))
    kinds = [k for k in np.unique(region[bank]) if min(np.sum(region[bank] == k), np.sum(region[asked] == k)) >= 20]
    assert len(kinds) >= 4
    x = features.astype(np.float64) - features[bank].mean(0)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    near = np.argsort(-(x[asked] @ x[bank].T), axis=1)[:, :NEIGHBOURS]
    votes = np.stack([(region[bank][near] == kind).mean(1) for kind in kinds], 1)
    told = np.array(kinds)[votes.argmax(1)]
    return float(np.mean([(told[region[asked] == kind] == kind).mean() for kind in kinds]))


@functools.cache
def raw_pixels(tileset: TileSet) -> float:
    with eval_stream(tileset, batch=256, partners=()) as stream:
        he = np.concatenate([batch["he"][batch["mask"]] for batch in stream])
    return region_accuracy(he.reshape(len(he), -1).astype(np.float32) / 255, tileset)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"slpd"}))  # whose tiles are regions
def test_a_trained_encoder_beats_raw_pixels_and_itself_untrained(name, tileset, tmp_path):
    config = configs.load(f"{synthetic.config_of(name)}:phantom,{WORDS.get(name, '')}")
    with config.unlocked():
        config.data.tileset, config.data.batch = str(tileset.root), BATCH
        config.total = type(config.total)({"steps": STEPS})
        config.encoder = "compact,widths=16-32-64"
    run = train.plan(config)
    like = train._shapes(run)[2]
    untrained = jax.jit(functools.partial(init_state, run.method, run.tx, run.seed, like, ema=run.ema))()
    trained = train.train(config, tmp_path, progress=False)
    assert int(trained.skipped_total) == 0
    found = {}
    for state, when in ((untrained, "before"), (trained, "after")):
        features = embed_set(run.method.embed, state.params, state.extra, tileset, run.mesh, batch=256).features
        found[when] = {part: region_accuracy(features[part], tileset) for part in features if part != "logits"}
    print(name, {"raw": raw_pixels(tileset), **found})
    for part, after in found["after"].items():
        assert after > raw_pixels(tileset) + RAW, (part, found)
        assert after > found["before"][part] + UNTRAINED, (part, found)
