"""DINO on regions, grids of tile features: the second level of HIPT (arXiv 2206.02647), on which SLPD stands.

    mfl regions slides.csv --run runs/dino --out data/regions              # 16 x 16 tiles, seen by the first level
    mfl train --config=configs/dino_regions.py --workdir=runs/regions      # the papers' setting
    mfl eval runs/regions --tileset data/regions --baselines random,mean   # against the mean of tile features

''            the region ViT (384 to 192 features, 6 blocks, 6 heads), 2 windows of 14 x 14 and 8 of 6 x 6 tiles, head
              2048-2048-256 and 65,536 classes, AdamW 5e-4 at batch 256, weight decay .04 to .4, clip 3, 100 epochs.
              Time not yet measured.
phantom       regions of 8 x 8 tiles: 2 windows of 7 x 7 and 8 of 3 x 3, 96 features, 3 blocks, 1,024 classes, 500 steps
              of 64, for two CPU cores. data.tileset names the set; demo/regions is what it is called here.
gpu           the papers' windows and network in bfloat16, 4,096 classes, 3,000 steps of 256; not yet run.
tiny          two steps of almost nothing, on regions of 4 x 4 tiles or more, for tests.
Words         drop: a tenth of the tiles is left out of every window; turn: windows are turned by right angles as well;
              full: of up to 4 places drawn for a window, the first that is at least half as full as the region.
Expect        papers: what SLPD is compared with (HIPT's lung AUC of KNN on mean region embeddings at 100 %: .889).
              Here: as configs/slpd.py has it.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import common, dino_tiles


def get_config(arg: str = "") -> ConfigDict:
    given = common.words(arg, ("drop", "turn", "full"), "dino_regions")
    small = bool(given & set(common.SIZES))
    config = ConfigDict(common.loop(every=200 if small else 1000))
    config.name, config.method = "dino_regions", "dino"
    config.data = common.data("demo/regions" if small else "data/regions", batch=256)
    config.total = ConfigDict({"epochs": 100})
    config.encoder = "grid_vit,features=192,blocks=6,heads=6,drop_path=0.1"
    window = (
        ("window(tries=4)" if "full" in given else "window")
        + "|flip"
        + "|rot90" * ("turn" in given)
        + "|drop(.1)" * ("drop" in given)
    )
    config.views = ConfigDict({"he": f"2*{window}", "local": f"8*{window}", "eval": "centre"})
    config.views.size, config.views.local_size = 14, 6
    config.dino = dino_tiles.dino(given)
    config.optim = ConfigDict({"name": "adamw", "lr": 5e-4, "lr_batch": 256, "schedule": "cosine", "end": 2e-3})
    config.optim.warmup, config.optim.clip_norm = "10 epochs", 3.0
    config.optim.weight_decay, config.optim.weight_decay_end = 0.04, 0.4
    config.optim.decay = ((".*/(bias|scale)", 0.0), (".*", 1.0))
    config.optim.freeze = ((".*/last/kernel", "1 epochs"), (".*", False))
    if small:
        _sized(config, given)
    return config


def _sized(config: ConfigDict, given: set[str]) -> None:
    """By itself, for `common.sized` knows views of pictures alone."""
    config.optim.lr_batch, config.optim.warmup = 0, "5%"
    config.optim.freeze = ((".*/last/kernel", "5%"), (".*", False))
    if "tiny" in given:
        config.total, config.optim.lr, config.optim.warmup = ConfigDict({"steps": 2}), 1e-3, "0 steps"
        config.encoder, config.data.batch = "grid_vit,features=16,blocks=2,heads=2,drop_path=0.1", 8
        config.views.local = config.views.local.replace("8*", "2*")
        config.views.size, config.views.local_size = 3, 2
    elif "phantom" in given:
        # 1e-3 with a warm-up of 5 % collapses on regions of the phantom within 30 steps
        config.total, config.optim.lr, config.optim.warmup = ConfigDict({"steps": 500}), 2e-4, "20%"
        config.encoder, config.data.batch = "grid_vit,features=96,blocks=3,heads=3,drop_path=0.1", 64
        config.views.size, config.views.local_size, config.dino.momentum = 7, 3, 0.99
    else:
        config.total, config.dtype, config.dino.out = ConfigDict({"steps": 3000}), "bfloat16", 4096


def sweep() -> Iterator[str]:
    """What is after the colon, one run each: how windows are drawn, no small ones, the teacher's pace."""
    for seed in range(3):
        for word in ("", "full,", "turn,", "drop,", "turn,drop,"):
            yield f"{word}seed={seed}"
        yield f"views.local='',seed={seed}"
        for momentum in (0.98, 0.999):
            yield f"dino.momentum={momentum},seed={seed}"
