"""Similarity from spatial continuity (arXiv 1905.08139): near tiles of a slide are alike, far ones are not; no labels.

    mfl train --config=configs/siamese.py:phantom --workdir=runs/siamese      # the phantom of `make demo`
    mfl train --config=configs/siamese.py:triplet --workdir=runs/siamese      # on your own tile set

''            224 px, ResNet-50, descriptor of 128, Adam 1e-3 (paper); near below 896 um and far above 3,360 um,
              which are 1,792 and 6,720 px at 0.5 um; batch 128, 100 epochs, descriptors of length 1: our choices.
              One accelerator; time not yet measured.
phantom       48 px, a compact convnet, near 64 um and far 200 um, 500 steps of 64: two CPU cores.
gpu           224 px, ResNet-50, bfloat16, near 200 um and far 800 um, 3,000 steps, on the slides of
              `mfl demo --gpu-size`; not yet run.
tiny          two steps of almost nothing, for tests.
Words         loss: margin (default), triplet.
Expect        paper: tumour retrieval and far/near distance ratio above ImageNet features and a generic self-supervised
              method. The ratio alone rewards stain and smoothness: read it beside retrieval across cases. On
              the phantom (README, Evidence): tissue with a mAP of .482, above all others; the ratio 1.37, colour 1.49.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import common

LOSSES = ("margin", "triplet")
VIEW = "flip|rotate(20)|jitter(.1,.1,.1,.05,p=.8)|normalise"


def get_config(arg: str = "") -> ConfigDict:
    given = common.words(arg, LOSSES, "siamese")
    sized = bool(given & set(common.SIZES))
    config = ConfigDict(common.loop(every=200 if sized else 1000))
    config.name, config.method = "siamese", "siamese"
    config.data = common.data(common.tileset(given), batch=128)
    config.data.near_um, config.data.far_um = (64.0, 200.0) if sized else (896.0, 3360.0)
    if "gpu" in given:  # a tile measures 128 um
        config.data.near_um, config.data.far_um = 200.0, 800.0
    config.total = ConfigDict({"epochs": 100})
    config.encoder = common.encoder(given)
    side = ".75" if "phantom" in given else ".875"
    cropped = VIEW.replace("flip|rotate(20)", f"sides({side},{side})|flip|rot90")
    view = cropped if given & {"phantom", "gpu"} else VIEW
    config.views = ConfigDict({"he": view, "eval": "centre|normalise", "size": 224, "paired_geometry": False})
    config.siamese = ConfigDict({"loss": common.one_of(given, LOSSES, "loss"), "gap": 1.0})
    config.siamese.head = f"projector,widths={16 if 'tiny' in given else 128}"
    config.optim = ConfigDict({"name": "adam", "lr": 1e-3, "schedule": "cosine", "warmup": "0 steps"})
    common.sized(config, given)
    return config


def sweep() -> Iterator[str]:
    """What is after the colon, one run each: the loss, and how far a far tile is."""
    for seed in range(3):
        for loss in LOSSES:
            yield f"{loss},seed={seed}"
            yield f"{loss},data.far_um=1700.,seed={seed}"
