"""More From Less (arXiv 2303.10656): distil a dense partner into an H&E-only encoder, cross-modal InfoNCE.

    mfl train --config=configs/mfl.py:phantom --workdir=runs/mfl        # the phantom of `make demo`
    mfl train --config=configs/mfl.py:ihc --workdir=runs/mfl            # the paper's setting, on your own tile set

''            224 px, ResNet-50, projector 8192x3, Adam 1e-4 with per-variable clip 1, batch 128, 100 epochs (paper).
              One accelerator with 40 GB or more; time not yet measured.
phantom       48 px, a compact convnet, 500 steps of 64: 1 to 2 minutes on two CPU cores.
gpu           224 px, ResNet-50, bfloat16, 3,000 steps, on the slides of `mfl demo --gpu-size`. In the demo's
              batches of 64: 700 pairs/s on an H200 beside four other runs.
tiny          two steps of almost nothing, for tests.
Words         partners: if (default), ihc, nuclei, counts, or several, or all; of another name with the kind it is
              like, her2:ihc (kinds: these four, and map, classes in one channel); loss: info_nce (default), vicreg,
              barlow.
Expect        paper: better than unpaired SSL on H&E and near full supervision. On the phantom,
              with all labels, .17 AUC above the first and .03 below the second (three seeds); in the demo's `gpu`,
              .24 above and .01 below (one seed).
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import common

LOSSES = ("info_nce", "vicreg", "barlow")


def get_config(arg: str = "") -> ConfigDict:
    given = common.words(arg, (*common.DENSE, "all", *LOSSES), "mfl")
    kinds = common.partners(given | set(common.PARTNERS if "all" in given else ()))
    small = bool(given & set(common.SIZES))
    config = ConfigDict(common.loop(every=200 if small else 1000))
    config.name, config.method = "mfl", "mfl"
    config.data = common.data(common.tileset(given), batch=128, partners=tuple(kinds))
    config.total = ConfigDict({"epochs": 100})
    config.encoder = common.encoder(given)
    config.views = ConfigDict({"he": common.HE, "eval": "centre|normalise", "size": 224, "paired_geometry": False})
    config.mfl = ConfigDict(common.objective(common.one_of(given, LOSSES, "loss")))
    config.mfl.partners, config.mfl.encoders = tuple(kinds), ConfigDict()
    config.mfl.projector = common.projector(given)
    for partner, kind in kinds.items():
        config.views[partner], config.views[f"eval_{partner}"] = common.DENSE[kind], common.DENSE_EVAL[kind]
        config.mfl.encoders[partner] = common.dense_encoder(given, kind)
    config.optim = ConfigDict({"name": "adam", "lr": 1e-4, "schedule": "cosine", "warmup": "0.1 epochs"})
    config.optim.clip_each = 1.0
    common.sized(config, given)
    return config


def sweep() -> Iterator[str]:
    """What is after the colon, one run each: is it the geometry that is learnt, and what does the temperature do?"""
    for seed in range(3):
        for paired in (False, True):
            yield f"views.paired_geometry={paired},seed={seed}"
        for temperature in (0.05, 0.2, 0.5):
            yield f"mfl.temperature={temperature},seed={seed}"
