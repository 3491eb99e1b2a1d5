"""The same encoder and views trained on labels, end to end: the yardstick; and with the partner as input, the ceiling.

    mfl train --config=configs/supervised.py:phantom --workdir=runs/supervised       # the phantom of `make demo`
    mfl train --config=configs/supervised.py:ihc,both --workdir=runs/ceiling         # H&E and IHC, on your own tile set

''            the fully supervised baseline of arXiv 2303.10656: 224 px, ResNet-50, Adam 1e-4, batch 128, 100 epochs.
              One accelerator; time not yet measured.
phantom       48 px, a compact convnet, 500 steps of 64: 1 to 2 minutes on two CPU cores.
gpu           224 px, ResNet-50, bfloat16, 3,000 steps, on the slides of `mfl demo --gpu-size`. In the demo's
              batches of 64: 1,300 tiles/s on an H200 beside four other runs.
tiny          two steps of almost nothing, for tests.
Words         input: H&E (default), alone (the partner only), both; partner: if (default), ihc, nuclei, counts;
              of another name with the kind it is like, her2:ihc (kinds: these four, and map, classes in one channel).
Expect        the most that labels can give to this encoder: an AUC of .92 on the phantom (three seeds), .98 in the
              demo's `gpu` (one seed). `both`: not measured.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    given = common.words(arg, (*common.DENSE, "alone", "both"), "supervised")
    inputs = common.one_of(given, ("he", "alone", "both"), "input")
    partner, kind = common.partner(given)
    used = {"he": (), "alone": (partner,), "both": (partner,)}[inputs]
    if not used and (given & common.DENSE.keys() or any(":" in word for word in given)):
        raise ValueError(f"configs/supervised.py: {partner} is no input; say also alone, or both")
    small = bool(given & set(common.SIZES))
    config = ConfigDict(common.loop(every=200 if small else 1000))
    config.name, config.method = "supervised", "supervised"
    config.data = common.data(common.tileset(given), batch=128, partners=used)
    config.total = ConfigDict({"epochs": 100})
    config.views = ConfigDict({"size": 224, "paired_geometry": False})
    config.supervised = ConfigDict({"inputs": used if inputs == "alone" else ("he", *used), "encoders": ConfigDict()})
    if inputs != "alone":
        config.encoder = common.encoder(given)
        config.views.he, config.views.eval = common.HE, "centre|normalise"
    for name in used:
        config.views[name], config.views[f"eval_{name}"] = common.DENSE[kind], common.DENSE_EVAL[kind]
        config.supervised.encoders[name] = common.dense_encoder(given, kind)
    config.supervised.head = "linear"
    config.supervised.target = "label"  # or a column of data.columns
    config.supervised.threshold = None  # of a column: two classes, above it and not
    config.supervised.label_smoothing = 0.0
    config.optim = ConfigDict({"name": "adam", "lr": 1e-4, "schedule": "cosine", "warmup": "0.1 epochs"})
    config.optim.clip_each = 1.0
    common.sized(config, given)
    return config


def sweep() -> Iterator[str]:
    """What is after the colon, one run each: H&E, and every partner alone and together with it."""
    yield ""
    for partner in common.PARTNERS:
        yield f"{partner},alone"
        yield f"{partner},both"
