"""Unpaired self-supervision on H&E, the baseline that a dense partner must beat: two views through one encoder.

    mfl train --config=configs/two_view.py:phantom --workdir=runs/ssl            # the phantom of `make demo`
    mfl train --config=configs/two_view.py:vicreg --workdir=runs/ssl             # on your own tile set

''            as configs/mfl.py (arXiv 2303.10656 compares in this way): 224 px, ResNet-50, projector 8192x3,
              Adam 1e-4 with per-variable clip 1, batch 128, 100 epochs. One accelerator; time not yet measured.
phantom       48 px, a compact convnet, 500 steps of 64: 1 to 2 minutes on two CPU cores.
gpu           224 px, ResNet-50, bfloat16, 3,000 steps, on the slides of `mfl demo --gpu-size`. In the demo's
              batches of 64: 1,600 tiles/s on an H200 beside four other runs.
tiny          two steps of almost nothing, for tests.
Words         loss: info_nce (SimCLR, default), vicreg, barlow, byol, simsiam; near: the second view is of a tile within
              200 um (phantom: 64 um) in the same slide (arXiv 2503.05170), not of the same tile.
Expect        on the phantom .17 AUC below MFL with all labels (three seeds, of .13 to .22).
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import common

LOSSES = ("info_nce", "vicreg", "barlow", "byol", "simsiam")


def get_config(arg: str = "") -> ConfigDict:
    given = common.words(arg, (*LOSSES, "near"), "two_view")
    small = bool(given & set(common.SIZES))
    config = ConfigDict(common.loop(every=200 if small else 1000))
    config.name, config.method = "two_view", "two_view"
    config.data = common.data(common.tileset(given), batch=128)
    config.data.near_um = (64.0 if "phantom" in given else 200.0) if "near" in given else 0.0
    config.total = ConfigDict({"epochs": 100})
    config.encoder = common.encoder(given)
    config.views = ConfigDict({"he": f"2*{common.HE}", "eval": "centre|normalise", "size": 224})
    config.views.paired_geometry = False
    config.two_view = ConfigDict(common.objective(common.one_of(given, LOSSES, "loss")))
    config.two_view.second = "near" if "near" in given else "same"
    config.two_view.projector = common.projector(given)
    if "tiny" in given and "predictor" in config.two_view:
        config.two_view.predictor = "predictor,hidden=8"
    config.optim = ConfigDict({"name": "adam", "lr": 1e-4, "schedule": "cosine", "warmup": "0.1 epochs"})
    config.optim.clip_each = 1.0
    common.sized(config, given)
    return config


def sweep() -> Iterator[str]:
    """What is after the colon, one run each: every loss, from the same tile and from a near one."""
    for loss in LOSSES:
        yield loss
        yield f"{loss},near"
