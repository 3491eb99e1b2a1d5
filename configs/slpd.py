"""SLPD (arXiv 2307.10696): DINO on regions, drawn towards prototypes of their slide and of the slide most like it.

    mfl train --config=configs/slpd.py:phantom --workdir=runs/slpd          # regions of the phantom
    mfl train --config=configs/slpd.py --workdir=runs/slpd                  # the paper's setting, on your own regions
    mfl prototypes runs/slpd --tileset data/regions --out prototypes        # what it found in each slide

''            regions of 16 x 16 tiles (`mfl regions`), the region ViT of HIPT, 2 crops of 14 x 14 and 8 of 6 x 6 tiles,
              head 2048-2048-256 and 65,536 classes, AdamW 5e-4 at batch 256, 100 epochs; from epoch 21 on, before
              every epoch, 4 prototypes of each slide with at least 32 regions (paper, lung). Time not yet measured.
phantom       regions of 8 x 8 tiles, 1,024 classes, prototypes after a fifth of 500 steps, 12 times more.
gpu           as the paper's, bfloat16, 3,000 steps; not yet run.
tiny          two steps of almost nothing, for tests.
Words         breast: 2 prototypes of each slide with at least 16 regions (paper, BRCA); argmax: a prototype stands for
              the most alike of the neighbour's, as in the released code, not for the matched one.
Expect        paper: better than HIPT, whose test AUC at 100 % of the slides is .874 (BRCA) and .952 (lung). Here: not
              yet measured.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import common, dino_tiles


def get_config(arg: str = "") -> ConfigDict:
    given = common.words(arg, ("breast", "argmax"), "slpd")
    small = bool(given & set(common.SIZES))
    config = ConfigDict(common.loop(every=200 if small else 1000))
    config.name, config.method = "slpd", "slpd"
    config.data = common.data("demo/regions" if small else "data/regions", batch=64 if small else 256)
    config.total = ConfigDict({"epochs": 100})
    config.encoder = "grid_vit,drop_path=0.1"
    config.views = ConfigDict({"he": "2*window(14)|flip", "local": "8*window(6)|flip", "eval": "centre(14)"})
    config.views.size, config.views.local_size = 14, 6
    config.dino = dino_tiles.dino(given)
    config.slpd = slpd(given)
    config.optim = ConfigDict({"name": "adamw", "lr": 5e-4, "lr_batch": 256, "schedule": "cosine", "end": 2e-3})
    config.optim.warmup, config.optim.clip_norm = "10 epochs", 3.0
    config.optim.weight_decay, config.optim.weight_decay_end = 0.04, 0.4
    config.optim.decay = ((".*/(bias|scale)", 0.0), (".*", 1.0))
    config.optim.freeze = ((".*/last/kernel", "1 epochs"), (".*", False))
    _sized(config, given)
    return config


def slpd(given: set[str]) -> ConfigDict:
    """The options of the method."""
    k, least = (2, 16) if "breast" in given else (4, 32)
    options = {
        "k": k,  # prototypes of a slide
        "min_regions": least,  # of a slide, to have any
        "iterations": 10,
        "restarts": 5,
        "start": "20 epochs",  # done before prototypes are sought
        "every": "1 epochs",
        "neighbours": 1,
        "transfer": "argmax" if "argmax" in given else "matched",
        "intra": 1.0,  # weights of the two terms beside DINO's
        "inter": 1.0,
        "centres": "own",
    }
    return ConfigDict(options)


def _sized(config: ConfigDict, given: set[str]) -> None:
    views, slpd = config.views, config.slpd
    if "tiny" in given:
        config.total, config.data.batch = ConfigDict({"steps": 2}), 8
        config.encoder = "grid_vit,features=16,blocks=1,heads=2"
        views.he, views.local, views.eval, views.size, views.local_size = "2*window|flip", "", "centre", 4, 2
        slpd.k, slpd.min_regions, slpd.start, slpd.every = 2, 4, "1 steps", "2 steps"
    elif "phantom" in given:
        config.total = ConfigDict({"steps": 500})
        config.encoder = "grid_vit,features=96,blocks=2,heads=3,drop_path=0.1"
        views.he, views.local, views.eval, views.size, views.local_size = (
            "2*window|flip",
            "4*window|flip",
            "centre",
            7,
            4,
        )
        slpd.min_regions, slpd.start, slpd.every = 8, "20%", "32 steps"
        config.optim.lr, config.dino.momentum = 2e-3, 0.99
    elif "gpu" in given:
        config.total, config.dtype = ConfigDict({"steps": 3000}), "bfloat16"
        slpd.start, slpd.every = "20%", "100 steps"
    if given & set(common.SIZES):
        config.optim.lr_batch, config.optim.warmup = 0, "0 steps" if "tiny" in given else "5%"
        config.optim.freeze = ((".*/last/kernel", "5%"), (".*", False))


def sweep() -> Iterator[str]:
    """What is after the colon, one run each: each term off and on, prototypes, neighbours, transfer."""
    for seed in range(3):
        for intra, inter in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)):
            yield f"slpd.intra={intra},slpd.inter={inter},seed={seed}"
        for k in (2, 8):
            yield f"slpd.k={k},seed={seed}"
        yield f"slpd.neighbours=3,seed={seed}"
        yield f"argmax,seed={seed}"
        yield f"slpd.centres=shared,seed={seed}"
