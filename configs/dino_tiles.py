"""DINO (arXiv 2104.14294) on tiles, the first level of HIPT (arXiv 2206.02647) and of SLPD (arXiv 2307.10696).

    mfl train --config=configs/dino_tiles.py:phantom --workdir=runs/dino    # the phantom of `make demo`
    mfl train --config=configs/dino_tiles.py --workdir=runs/dino            # the papers' setting, on your own tile set

''            256-px tiles, ViT-S/16, 2 crops of 224 and 8 of 96 px, head 2048-2048-256 and 65,536 classes, AdamW
              5e-4 at batch 256, weight decay .04 to .4, clip 3, 100 epochs (HIPT, SLPD). Time not yet measured.
phantom       crops of 48 and 32 px out of tiles of 64, a compact convnet, 1,024 classes, 500 steps of 64.
gpu           ViT-S/16, crops of 224 and 96 px out of tiles of 256, bfloat16, 3,000 steps; not yet run.
tiny          two steps of almost nothing, for tests.
Words         vit, resnet: the encoder; sinkhorn: in place of the centre; registers: four more tokens of the ViT.
Expect        papers: what SLPD and HIPT build on; no figure of its own. Here, on a phantom of 12 cases, 150
              steps, one seed: AUC of nearest neighbours .85 against .77 untrained, of a linear probe .83 as untrained.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import common

COLOUR = "jitter(.4,.4,.2,.1,p=.8)|gray(.2)"
LARGE = f"crop(.4,1)|flip|{COLOUR}|blur(.1,2,p=.5)|normalise"
SMALL = f"crop(.05,.4)|flip|{COLOUR}|blur(.1,2,p=.5)|normalise"
PHANTOM = "flip|rot90|hed(.1)|jitter(.3,.3,.3,.05,p=.8)|blur(.1,2,p=.5)|normalise"  # as common gives every arm


def get_config(arg: str = "") -> ConfigDict:
    given = common.words(arg, ("vit", "resnet", "sinkhorn", "registers"), "dino_tiles")
    small = bool(given & set(common.SIZES))
    config = ConfigDict(common.loop(every=200 if small else 1000))
    config.name, config.method = "dino_tiles", "dino"
    config.data = common.data(common.tileset(given), batch=64 if small else 256)
    config.total = ConfigDict({"epochs": 100})
    config.encoder = encoder(given)
    config.views = ConfigDict({"he": f"2*{LARGE}", "local": f"8*{SMALL}", "eval": "centre|normalise"})
    config.views.size, config.views.local_size = 224, 96
    config.dino = dino(given)
    if not config.encoder.startswith("vit"):
        config.dino.head += ",bn"
    config.optim = ConfigDict({"name": "adamw", "lr": 5e-4, "lr_batch": 256, "schedule": "cosine", "end": 2e-3})
    config.optim.warmup, config.optim.clip_norm = "10 epochs", 3.0
    config.optim.weight_decay, config.optim.weight_decay_end = 0.04, 0.4
    config.optim.decay = ((".*/(bias|scale)", 0.0), (".*", 1.0))
    config.optim.freeze = ((".*/last/kernel", "1 epochs"), (".*", False))
    common.sized(config, given)
    _sized(config, given)
    return config


def encoder(given: set[str]) -> str:
    kind = common.one_of(given, ("vit", "resnet"), "encoder")
    registers = ",registers=4" if "registers" in given else ""
    if kind == "resnet" and "registers" in given:
        raise ValueError("registers are tokens of a ViT; one of 'resnet' and 'registers' can be given")
    if "tiny" in given:
        return (
            "compact,widths=8" if kind == "resnet" else f"vit_ti8,features=16,blocks=2,heads=2,drop_path=0.1{registers}"
        )
    if "phantom" in given:
        vit = f"vit_ti8,features=96,blocks=4,heads=3,drop_path=0.1{registers}"
        return vit if given & {"vit", "registers"} else common.PHANTOM_ENCODER
    return "resnet50" if kind == "resnet" else f"vit_s16,drop_path=0.1{registers}"


def dino(given: set[str]) -> ConfigDict:
    """The options of the method, for regions and SLPD too."""
    hidden, bottleneck, out = 2048, 256, 65536
    if "tiny" in given:
        hidden, bottleneck, out = 32, 64, 48
    elif "phantom" in given:
        hidden, bottleneck, out = 512, 256, 1024
    return ConfigDict(
        {
            "head": f"dino,hidden={hidden},bottleneck={bottleneck}",
            "out": out,  # directions of the last layer, or classes
            "centring": "sinkhorn" if "sinkhorn" in given else "centre",
            "centre_momentum": 0.9,
            "student_temperature": 0.1,
            "teacher_temperature": 0.04,  # after teacher_warmup
            "teacher_temperature_start": 0.04,
            "teacher_warmup": "0 epochs",
            "momentum": 0.996,  # of the teacher; by a cosine to 1
            "embed": "teacher",
        }
    )


def _sized(config: ConfigDict, given: set[str]) -> None:
    """What `common.sized` does not know of: the small crops, and an optimiser with a short time."""
    views = config.views
    if "tiny" in given:
        views.local, views.local_size = "2*flip|normalise", 8
    elif "phantom" in given:
        views.he, views.local, views.local_size = f"2*sides(.75,.75)|{PHANTOM}", f"4*sides(.5,.5)|{PHANTOM}", 32
        config.optim.lr, config.dino.momentum = 2e-3, 0.95
    elif "gpu" in given:
        views.he, views.local = f"2*sides(.875,.875)|{PHANTOM}", f"8*sides(.375,.375)|{PHANTOM}"
    if given & set(common.SIZES):
        config.optim.lr_batch = 0
        config.optim.freeze = ((".*/last/kernel", "5%"), (".*", False))


def sweep() -> Iterator[str]:
    """What is after the colon, one run each: encoder, centring, small crops, the teacher's pace."""
    for seed in range(3):
        for word in ("vit,", "resnet,", "sinkhorn,", "registers,"):
            yield f"{word}seed={seed}"
        yield f"views.local='',seed={seed}"
        for momentum in (0.99, 0.999):
            yield f"dino.momentum={momentum},seed={seed}"
