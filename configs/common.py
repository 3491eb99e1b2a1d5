"""Parts that configs share. A config is explicit: what it does not say does not exist, so these return whole parts."""

from ml_collections import ConfigDict


def data(tileset: str, *, batch: int, partners: tuple[str, ...] = (), columns: tuple[str, ...] = ()) -> ConfigDict:
    return ConfigDict(
        {
            "tileset": tileset,  # folder that `mfl pack` wrote
            "split": "train",
            "share": 1.0,  # of its tiles; below 1 the same random part of them for every seed
            "batch": batch,  # global: over all hosts and devices
            "partners": partners,  # those that are read; the others are not even decoded
            "columns": columns,  # of the tile set, beside label, slide and case
            "near_um": 0.0,  # above 0 every tile comes with one so near
            "far_um": 0.0,  # above 0 every tile comes with one of its slide farther away than that
            "balance": "",  # '', 'case', 'slide', or a column of classes: each of them is seen as often
            "on_bad": "raise",  # or 'replace'
            "stall_timeout": 300.0,
        }
    )


def loop(*, every: int, log_every: int = 10) -> dict:
    """What is the same in all experiments, whatever they train."""
    return {
        "seed": 0,
        "dtype": "float32",
        "accumulate": 1,  # slices of the batch, one after another; each is normalised, and contrasted, by itself
        "ema": 0.0,  # above 0 (0.999): evaluators see a moving average of the parameters
        "mesh": ConfigDict({"data": -1}),
        # (pattern of a leaf, axes of the mesh), first match; empty keeps everything whole on every device, while
        # (('.*kernel', (None, 'data')), ('.*kernel', (None, None, None, 'data'))) splits dense layers and convolutions
        "sharding": (),
        "log_every": log_every,
        "checkpoint": ConfigDict({"every": every, "keep": 2, "keep_every": 0}),
        "profile_at": -1,  # a step: it and the two after it are traced into workdir/profile
        "writers": (),  # 'tensorboard', 'wandb'; metrics.jsonl is always written
        "evals": ConfigDict(),
    }


HE = "sides(.75,1)|flip|rotate(20)|jitter(.4,.4,.4,.1,p=.8)|hed(.05)|normalise"
PARTNERS = ("if", "ihc", "nuclei", "counts")  # of the phantom, each of a kind of its own
DENSE = {  # training views of every kind of partner
    "if": "sides(.75,1)|flip|rotate(20)|percentile|gain(.2)",
    "ihc": "sides(.75,1)|flip|rotate(20)|jitter(.4,.4,.4,.1,p=.8)|normalise",
    "nuclei": "sides(.75,1)|flip|rotate(20)|onehot(8,channel=1)|boundary",
    "map": "sides(.75,1)|flip|rotate(20)|onehot(8)|boundary",
    "counts": "log1p|genedrop|permute|noise",
}
DENSE_EVAL = {
    "if": "centre|percentile",
    "ihc": "centre|normalise",
    "nuclei": "centre|onehot(8,channel=1)|boundary",
    "map": "centre|onehot(8)|boundary",
    "counts": "log1p",
}
PHANTOM_ENCODER = "compact,patch=2,widths=32-32-64"
SIZES = ("phantom", "gpu", "tiny")
TINY = {view: DENSE_EVAL[kind].replace("centre", "flip") for kind, view in DENSE.items()}  # quick to compile


def words(arg: str, known: tuple[str, ...], name: str) -> set[str]:
    """The words after the colon, each of them known; at most one says the size. Where kinds of partners are words, so
    are partners of any name, with their kind: 'her2:ihc'."""
    given = set(arg.split(",")) - {""}
    kinds = DENSE.keys() & set(known)
    named = {word for word in given if ":" in word and word.partition(":")[2] in kinds}
    if unknown := given - {*SIZES, *known, *named}:
        also = "; or NAME:KIND for a partner of another name" if kinds else ""
        told = f"{', '.join((*SIZES, *known))}{also}; not {', '.join(sorted(unknown))}"
        raise ValueError(f"configs/{name}.py knows {told}")
    if len(given & set(SIZES)) > 1:
        raise ValueError(f"configs/{name}.py takes one of {', '.join(SIZES)}")
    return given


def partners(given: set[str]) -> dict[str, str]:
    """The kind of every partner that was given; IF where none was."""
    named = dict(sorted(word.split(":", 1) for word in given if ":" in word))
    return {kind: kind for kind in DENSE if kind in given} | named or {"if": "if"}


def partner(given: set[str]) -> tuple[str, str]:
    """(name, kind) of the one partner."""
    if len(found := partners(given)) > 1:
        raise ValueError(f"the partner is one of {', '.join(DENSE)}, not {' and '.join(found)}")
    return next(iter(found.items()))


def one_of(given: set[str], choices: tuple[str, ...], what: str) -> str:
    """The one of the choices that was given; the first where none was."""
    chosen = [choice for choice in choices if choice in given]
    if len(chosen) > 1:
        raise ValueError(f"the {what} is one of {', '.join(choices)}, not {' and '.join(chosen)}")
    return chosen[0] if chosen else choices[0]


def sized(config: ConfigDict, given: set[str]) -> None:
    """What the words 'phantom', 'gpu' and 'tiny' change; what the methods' own options say is theirs to shrink."""
    if "tiny" in given:
        config.total, config.optim.warmup, config.optim.lr = ConfigDict({"steps": 2}), "0 steps", 1e-3
        config.data.batch, config.views.size = 8, 16
        he = config.views.get("he", "").removeprefix("2*")
        _replace(config.views, TINY | {he: "flip|normalise"})
    elif "phantom" in given:
        config.total, config.optim.lr, config.optim.warmup = ConfigDict({"steps": 500}), 6e-3, "5%"
        config.data.batch, config.views.size = 64, 48
        _phantom_views(config.views, 0.75)
    elif "gpu" in given:
        _phantom_views(config.views, 0.875)
        config.total, config.optim.lr, config.optim.warmup = ConfigDict({"steps": 3000}), 1e-3, "5%"
        config.dtype = "bfloat16"


def _phantom_views(views: ConfigDict, side: float) -> None:
    """A crop of `side` of the tile, without resampling, since what tells the phantom's cells apart is 0.4 um fine, and
    blur, as SimCLR and MoCo v2 have it. The same for every arm of the demo, so that none has an advantage of its own;
    moco and siamese train with views of their own.
    """
    crop, centre = f"sides({side},{side})|flip|rot90", f"centre({side})"
    nuclei = "onehot(8,channel=1)|boundary"
    told = {
        HE: f"{crop}|hed(.1)|jitter(.3,.3,.3,.05,p=.8)|blur(.1,2,p=.5)|normalise",
        DENSE["if"]: f"{crop}|only(1)|scale(10000)|gain(.2)",
        DENSE["ihc"]: f"{crop}|jitter(.3,.3,.3,.05,p=.8)|normalise",
        DENSE["nuclei"]: f"{crop}|{nuclei}",
        "centre|normalise": f"{centre}|normalise",
        DENSE_EVAL["if"]: f"{centre}|only(1)|scale(10000)",
        DENSE_EVAL["nuclei"]: f"{centre}|{nuclei}",
    }
    _replace(views, told)


def _replace(views: ConfigDict, by: dict[str, str]) -> None:
    for name, view in views.items():
        if isinstance(view, str):
            copies = "2*" if view.startswith("2*") else ""
            text = view.removeprefix("2*")
            views[name] = copies + by.get(text, text)


def encoder(given: set[str], kind: str = "image") -> str:
    """Of the H&E and of partners that are pictures: the paper's, a convnet that is fast on a CPU, or hardly any.

    BatchNorm is over the global batch. To imitate a paper that had one per device, 'resnet50,bn_groups=8' normalises 8
    runs of neighbouring rows by themselves (a projector takes bn_groups too). 'resnet50,remat' and 'vit_s16,remat' keep
    no activations within blocks: less memory for a third more time.
    """
    if kind == "vector":
        return "mlp,widths=8-8" if "tiny" in given else "mlp,widths=512-512"
    return "compact,widths=8" if "tiny" in given else PHANTOM_ENCODER if "phantom" in given else "resnet50"


def dense_encoder(given: set[str], kind: str) -> str:
    """What a partner shows is plain to see: on the phantom a coarser encoder does."""
    if "phantom" in given and kind != "counts":
        return "compact,patch=4,widths=32-64"
    return encoder(given, "vector" if kind == "counts" else "image")


def projector(given: set[str]) -> str:
    sizes = {"tiny": "16-16", "phantom": "128-128", "gpu": "2048-2048"}
    widths = next((sizes[word] for word in sizes if word in given), "8192-8192-8192")
    return f"projector,widths={widths},bn"


def tileset(given: set[str]) -> str:
    return "demo/set" if given & set(SIZES) else "data/set"


def objective(name: str = "info_nce", *, temperature: float = 0.1) -> dict:
    """The options of a joint-embedding objective; only those it has."""
    return {
        "info_nce": {
            "objective": "info_nce",
            "temperature": temperature,
            "learn_temperature": False,
            "mask_same_slide": False,  # tiles of a slide are no negatives of each other
            "block": 0,  # above 0: logits exist this many columns at a time, and memory is linear in the batch
        },
        "vicreg": {"objective": "vicreg", "released_balance": False},
        "barlow": {"objective": "barlow", "redundancy": 5e-3},
        "byol": {"objective": "byol", "momentum": 0.996, "predictor": "predictor,hidden=512"},
        "simsiam": {"objective": "simsiam", "predictor": "predictor,hidden=512"},
    }[name]
