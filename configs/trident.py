"""TriDeNT (arXiv 2312.02111): two views of the H&E and the dense partner, all pairs of branches agree.

    mfl train --config=configs/trident.py:phantom --workdir=runs/trident     # the phantom of `make demo`
    mfl train --config=configs/trident.py:ihc --workdir=runs/trident         # the paper's setting, on your own tile set

''            224 px, ResNet-50, projector 8192x3, VICReg, Adam 1e-4 with 10 % warm-up, batch 256, 100 epochs (paper).
              One accelerator with 80 GB; with less, accumulate=2, where losses and statistics are of 128 pairs and not
              of 256. Time not yet measured.
phantom       48 px, a compact convnet, 500 steps of 64: 1 to 2 minutes on two CPU cores.
gpu           224 px, ResNet-50, bfloat16, 3,000 steps, on the slides of `mfl demo --gpu-size`. In the demo's
              batches of 64: 1,200 pairs/s on an H200 beside two other runs.
tiny          two steps of almost nothing, for tests.
Words         partner: if (default), ihc, nuclei, counts; of another name with the kind it is like, her2:ihc (kinds:
              these four, and map, classes in one channel); loss: vicreg (default), info_nce (temperature 0.5), barlow.
Expect        paper: above MFL where the partner says little, near it elsewhere. On the phantom,
              with all labels, .03 AUC above (three seeds); in the demo's `gpu`, .005 (one seed).
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import common

LOSSES = ("vicreg", "info_nce", "barlow")


def get_config(arg: str = "") -> ConfigDict:
    given = common.words(arg, (*common.DENSE, *LOSSES), "trident")
    partner, kind = common.partner(given)
    small = bool(given & set(common.SIZES))
    config = ConfigDict(common.loop(every=200 if small else 1000))
    config.name, config.method = "trident", "trident"
    config.data = common.data(common.tileset(given), batch=128 if small else 256, partners=(partner,))
    config.total = ConfigDict({"epochs": 100})
    config.encoder = common.encoder(given)
    config.views = ConfigDict({"he": f"2*{common.HE}", partner: common.DENSE[kind], "eval": "centre|normalise"})
    config.views[f"eval_{partner}"] = common.DENSE_EVAL[kind]
    config.views.size, config.views.paired_geometry = 224, False
    config.trident = ConfigDict(common.objective(common.one_of(given, LOSSES, "loss"), temperature=0.5))
    config.trident.partner, config.trident.encoder = partner, common.dense_encoder(given, kind)
    config.trident.projector = common.projector(given)
    config.optim = ConfigDict({"name": "adam", "lr": 1e-4, "schedule": "cosine", "warmup": "10%"})
    common.sized(config, given)
    return config


def sweep() -> Iterator[str]:
    """What is after the colon, one run each: every partner, three seeds."""
    for seed in range(3):
        for partner in common.PARTNERS:
            yield f"{partner},seed={seed}"
