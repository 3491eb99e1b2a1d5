"""MoCo v2 (arXiv 2003.04297) on tiles of the slides themselves, as in arXiv 2012.03583: features for slide-level tasks.

    mfl train --config=configs/moco.py:phantom --workdir=runs/moco      # the phantom of `make demo`
    mfl train --config=configs/moco.py --workdir=runs/moco              # the paper's setting, on your own tile set

''            224 px, ResNet-50 with BatchNorm in 8 groups and shuffled keys, head 2048-128, queue 65,536, momentum
              .999, temperature .2, SGD .03 at batch 256, 200 epochs (paper). One accelerator; time not yet measured.
phantom       48 px, a compact convnet, queue 1,024, momentum .95, Adam, 500 steps of 64: two CPU cores. Views,
              projector and temperature are those of two_view.py:phantom, and the other keys of a batch are negatives
              as well: queue and slow network are all that differs. Without these (one short run each, not a
              measurement): the noise of the first queue drives the queries together within 10 steps (effective rank
              6.7 -> 2.5); keys that keep up (momentum .9) are told by their age alone (accuracy .88 at rank 1.1).
gpu           224 px, ResNet-50, bfloat16, 3,000 steps of 256, queue 16,384, otherwise as phantom, on the slides of
              `mfl demo --gpu-size`; not yet run.
tiny          two steps of almost nothing, for tests.
Words         near: the key is of a tile within 200 um in the same slide (arXiv 2503.05170), not of the same tile;
              symmetric: both views are query and key in turn.
Expect        paper: Camelyon16 slide AUC .987 with a multiple-instance head on these features.
              On the phantom (README, Evidence): no head is above one on an untrained network; tissue is found in other
              cases with a mAP of .447, colour .405.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import common

VIEW = "crop(.2,1)|flip|jitter(.4,.4,.4,.1,p=.8)|gray(.2)|blur(.1,2,p=.5)|normalise"


def get_config(arg: str = "") -> ConfigDict:
    given = common.words(arg, ("near", "symmetric"), "moco")
    tiny, gpu, short = "tiny" in given, "gpu" in given, bool(given & {"phantom", "gpu"})
    phantom = "phantom" in given
    small = tiny or phantom
    config = ConfigDict(common.loop(every=200 if tiny or short else 1000))
    config.name, config.method = "moco", "moco"
    config.data = common.data(common.tileset(given), batch=128 if small else 256)
    if "near" in given:
        config.data.near_um = 64.0 if small else 200.0
    config.total = ConfigDict({"epochs": 200})
    config.encoder = common.encoder(given) + ("" if small else ",bn_groups=8")
    view = common.HE if short else VIEW
    config.views = ConfigDict({"he": view, "eval": "centre|normalise", "size": 224, "paired_geometry": False})
    queue = 48 if tiny else 1024 if small else 16384 if gpu else 65536
    config.moco = ConfigDict({"queue": queue, "temperature": 0.1 if phantom else 0.2, "batch_negatives": short})
    config.moco.momentum = 0.95 if phantom else 0.99 if small or gpu else 0.999
    config.moco.symmetric, config.moco.second = "symmetric" in given, "near" if "near" in given else "same"
    config.moco.mask_same_slide = False  # rows of the queue that are of the query's slide are no negatives
    head = f"projector,widths={'16-16' if tiny else '2048-128'}"
    config.moco.projector = common.projector(given) if phantom else head
    config.optim = ConfigDict({"lr": 0.03, "schedule": "cosine", "warmup": "0 steps"})
    if small or gpu:
        config.optim.name = "adam"
    else:
        config.optim.name, config.optim.momentum, config.optim.lr_batch = "sgd", 0.9, 256
        config.optim.weight_decay, config.optim.decay = 1e-4, ((".*", 1.0),)
    common.sized(config, given)
    return config


def sweep() -> Iterator[str]:
    """What is after the colon, one run each: what a key is of, what a negative is, and the temperature."""
    for seed in range(3):
        for word in ("", "near,", "symmetric,"):
            yield f"{word}seed={seed}"
        yield f"moco.mask_same_slide=True,seed={seed}"
        for temperature in (0.07, 0.5):
            yield f"moco.temperature={temperature},seed={seed}"
