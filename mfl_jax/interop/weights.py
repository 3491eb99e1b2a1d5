"""Encoders as a folder of `config.json` and `model.safetensors` with timm's names, both ways. Nothing is unpickled.

timm reads what is written for a ViT or a ResNet of its own shape; any other network gets the same naming, and an
`architecture` that begins with 'mfl_jax/'. The part `mfl` of the config says what timm's has no place for: the view of
evaluation, and size and um per pixel of the tiles, so that the features are those of the run. Checkpoints of DINO and
HIPT are read as well (interop/dino.py).
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.files import read_json, whole, write_json
from mfl_jax import models
from mfl_jax.interop import dino
from mfl_jax.trees import map_named, named_leaves

CONFIG, WEIGHTS, OURS = "config.json", "model.safetensors", "mfl_jax/"
NAMED = {"tiny": "ti", "small": "s", "base": "b"}
VIT = re.compile(r"vit_(tiny|small|base)_patch(8|14|16)(?:_reg(\d+))?(?:_\d+)?(?:_dino)?")
MODEL_ARGS = {"embed_dim": "features", "depth": "blocks", "num_heads": "heads", "reg_tokens": "registers"}
HEADS = re.compile(r"(head|fc)\.(weight|bias)|.*num_batches_tracked")  # of no effect on features
TRAINING_ONLY = ("drop_path", "dropout", "remat", "bn_groups", "bn_momentum")
LARGEST = 8 << 30
TYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "F64": np.float64, "I64": np.int64}


class WeightsError(ValueError):
    """The folder holds no weights that this version can use."""


@dataclass(frozen=True)
class Weights:
    spec: str  # of models.make
    params: Any
    stats: Any
    config: dict[str, Any]
    digest: str  # SHA-256 over both files


# --- names and layouts


def torch_name(name: str) -> str:
    """'layer1_0/bn1/scale' -> 'layer1.0.bn1.weight'."""
    name = re.sub(r"(?<![a-z])(blocks|layer\d|downsample)_(\d+)", r"\1.\2", name.replace("/", "."))
    name = re.sub(r"^phi\.", "phi.0.", name.replace("patch_embed.", "patch_embed.proj."))
    for ours, theirs in (("kernel", "weight"), ("scale", "weight"), ("mean", "running_mean"), ("var", "running_var")):
        name = re.sub(rf"\.{ours}$", f".{theirs}", name)
    return name


def torch_layout(name: str, value: np.ndarray, patch: int | None) -> np.ndarray:
    """Convolutions HWIO -> OIHW, dense layers (in, out) -> (out, in), the patches of a ViT as their convolution."""
    if name.endswith("patch_embed/kernel") and patch:
        value = value.reshape(patch, patch, -1, value.shape[-1])
    if not name.endswith("kernel"):
        return value
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def our_layout(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of torch_layout, to the shape that our leaf has."""
    if name.endswith("kernel"):
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    return np.ascontiguousarray(value).reshape(shape)


def to_torch(params: Any, stats: Any, patch: int | None) -> dict[str, np.ndarray]:
    """Parameters and statistics by torch's names. Registers stand between CLS and patches there, with positions of
    their own, which are zero here."""
    out = {}
    for name, leaf in {**named_leaves(params), **named_leaves(stats)}.items():
        out[torch_name(name)] = np.ascontiguousarray(torch_layout(name, np.asarray(leaf, np.float32), patch))
    for name in [n for n in out if n.endswith("running_var")]:
        out[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    if "reg_token" in out:
        cls, grid = np.split(out["pos_embed"], [1], 1)
        out["pos_embed"] = np.concatenate([cls, np.zeros_like(out["reg_token"]), grid], 1)
    return out


def from_torch(tensors: Mapping[str, np.ndarray], spec: str, what: str) -> tuple[Any, Any]:
    """(params, stats) of models.make(spec); WeightsError lists what is missing, unexpected, or of another shape."""
    model, patch = models.make(spec), patch_of(spec)
    tensors = {name: value for name, value in dino.plain(tensors).items() if not HEADS.fullmatch(name)}
    side, channels = 64, 3
    if patch or is_grid(spec):
        tensors, side = _plain_positions(tensors, patch or 1, what)
    if is_grid(spec):
        channels = 1 + tensors.get("phi.0.weight", np.zeros((1, 1))).shape[-1]
    image = jax.ShapeDtypeStruct((1, side, side, channels), np.float32)
    like = jax.eval_shape(lambda key: model.init(key, image), jax.random.key(0))
    leaves = {torch_name(name): (name, leaf) for tree in like for name, leaf in named_leaves(tree).items()}
    faults = [f"{name} is missing" for name in leaves if name not in tensors]
    faults += [f"{name} is not part of {spec}" for name in tensors if name not in leaves]
    for name in leaves.keys() & tensors.keys():
        ours, leaf = leaves[name]
        expected = torch_layout(ours, np.broadcast_to(np.float32(0), leaf.shape), patch).shape
        if tensors[name].shape != expected:
            faults.append(f"{name} is {list(tensors[name].shape)}, expected {list(expected)}")
        elif not np.isfinite(tensors[name]).all():
            faults.append(f"{name} holds values that are not finite")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise WeightsError(f"{what} does not fit {spec}: {'; '.join(sorted(faults)[:5])}{more}")

    def take(name: str, leaf: Any) -> np.ndarray:
        return our_layout(name, tensors[torch_name(name)], leaf.shape)

    return map_named(take, like[0]), map_named(take, like[1])


def patch_of(spec: str) -> int | None:
    found = re.match(r"vit_[a-z]+(\d+)", spec)
    return int(found[1]) if found else None


def is_grid(spec: str) -> bool:
    """Whether it is over regions, grids of tile features, and not over pictures."""
    return models.parse(spec)[0] == "grid_vit"


def _plain_positions(tensors: Mapping[str, np.ndarray], patch: int, what: str) -> tuple[dict[str, np.ndarray], int]:
    """Positions as our ViT has them, of CLS and patches, and the side of the image they are of. timm has them of the
    registers too, or of the patches alone (no_embed_class)."""
    tensors = dict(tensors)
    positions, registers = tensors.get("pos_embed"), tensors.get("reg_token")
    if (
        positions is None
        or positions.ndim != 3
        or len(positions) != 1
        or (registers is not None and registers.ndim != 3)
    ):
        shape = None if positions is None else list(positions.shape)
        raise WeightsError(f"{what}: pos_embed has the shape [1, tokens, features], not {shape}")
    extra = 0 if registers is None else registers.shape[1]
    for first in (1 + extra, 0):
        count = positions.shape[1] - first
        if count > 0 and math.isqrt(count) ** 2 == count:
            break
    else:
        raise WeightsError(f"{what}: pos_embed has {positions.shape[1]} tokens, which are no square of patches")
    lead, grid = positions[:, :first], positions[:, first:]
    if not first:
        lead = np.zeros((1, 1 + extra, positions.shape[2]), positions.dtype)
    if registers is not None and extra:
        tensors["reg_token"] = registers + lead[:, 1:]
    tensors["pos_embed"] = np.concatenate([lead[:, :1], grid], 1)
    return tensors, patch * math.isqrt(grid.shape[1])


# --- architectures


def architecture(spec: str, side: int) -> dict[str, Any]:
    """What timm calls a spec: 'architecture' and, where it differs from the usual, 'model_args'."""
    name, settings = models.parse(spec)
    settings = {k: v for k, v in settings.items() if k not in TRAINING_ONLY and v not in (0, False, "cls")}
    if name.startswith("resnet") and (not settings or settings == {"width": 1}):
        return {"architecture": name, "global_pool": "avg"}
    if "pos_offset" in settings:  # which timm does not know
        return {"architecture": OURS + ",".join([name, *(f"{k}={_text(v)}" for k, v in settings.items())])}
    if patch := patch_of(spec):
        size = re.match(r"vit_([a-z]+)", name)[1]  # type: ignore[index]
        word = next(word for word, short in NAMED.items() if short == size)
        base = 8 if patch == 8 and size != "ti" else 16
        arguments: dict[str, Any] = {} if patch == base else {"patch_size": patch}
        arguments |= {} if side == 224 else {"img_size": side}
        arguments |= {theirs: settings[ours] for theirs, ours in MODEL_ARGS.items() if ours in settings}
        mean = settings.get("pool") == "mean"
        arguments |= {"global_pool": "avg", "fc_norm": False} if mean else {}
        found: dict[str, Any] = {"architecture": f"vit_{word}_patch{base}_224"}
        found["global_pool"] = "avg" if mean else "token"
        return found | ({"model_args": arguments} if arguments else {})
    return {"architecture": OURS + ",".join([name, *(f"{k}={_text(v)}" for k, v in settings.items())])}


def _text(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def spec_of(config: Mapping[str, Any], what: str) -> str:
    """The inverse of `architecture`, for the networks of timm that have the same structure as ours."""
    name = str(config.get("architecture"))
    if name.startswith(OURS):
        return name.removeprefix(OURS)
    if (theirs := dino.spec_of(name)) is not None:
        given = dict(config.get("model_args") or {})
        known = {k: v for k, v in MODEL_ARGS.items() if v != "registers"}
        if odd := [f"{k}={v!r}" for k, v in given.items() if k not in known or type(v) is not int]:
            raise WeightsError(f"{what}: model_args {', '.join(odd)}; of {name} there are {', '.join(known)}")
        return ",".join([theirs, *(f"{known[k]}={v}" for k, v in given.items())])
    name, arguments = name.partition(".")[0], dict(config.get("model_args") or {})
    pool = arguments.pop("global_pool", config.get("global_pool"))
    if re.fullmatch(r"resnet(18|26|50)", name) and not arguments and pool in (None, "avg", ""):
        return name
    match = VIT.fullmatch(name)
    if not match:
        raise WeightsError(
            f"{what}: the architecture {name!r} is not known; there are resnet18, resnet26, resnet50, and "
            "vit_{tiny,small,base}_patch{8,14,16} with or without registers; of DINO's checkpoints "
            "dino_vit{t,s,b}{8,16}, of HIPT's second level hipt_vit4k_xs"
        )
    patch, registers = arguments.pop("patch_size", int(match[2])), int(match[3] or 0)
    settings: dict[str, Any] = {"registers": registers} if registers else {}
    settings |= {ours: arguments.pop(theirs) for theirs, ours in MODEL_ARGS.items() if theirs in arguments}
    if strange := {k: v for k, v in settings.items() if not isinstance(v, int) or isinstance(v, bool)}:
        raise WeightsError(f"{what}: {strange} in model_args: whole numbers are expected")
    arguments.pop("img_size", None)
    arguments.pop("dynamic_img_size", None)
    if pool == "avg":
        if arguments.pop("fc_norm", None) is not False:
            raise WeightsError(f"{what}: a mean over patches needs model_args fc_norm=false: our norm comes before it")
        settings["pool"] = "mean"
    elif pool not in (None, "token", ""):
        raise WeightsError(f"{what}: global_pool is {pool!r}; allowed: token, avg")
    arguments.pop("no_embed_class", None)
    if arguments or (patch not in (8, 14, 16)):
        raise WeightsError(f"{what}: model_args {arguments or {'patch_size': patch}} are not supported")
    return ",".join([f"vit_{NAMED[match[1]]}{patch}", *(f"{k}={v}" for k, v in settings.items())])


# --- files


def save(
    folder: str | Path, spec: str, params: Any, stats: Any, *, side: int, mean: Any, std: Any, ours: Mapping[str, Any]
) -> None:
    """`side` is that of the image, or grid, the network sees; `ours` becomes the part `mfl` of the config."""
    from safetensors.numpy import save as encode

    folder, tensors, learnt = Path(folder), to_torch(params, stats, patch_of(spec)), side
    if patch := patch_of(spec):
        count = params["pos_embed"].shape[1] - 1
        learnt = patch * math.isqrt(count)
        if (learnt // patch) ** 2 != count:
            raise WeightsError(f"positions of {count} patches, which are no square, cannot be written for timm")
    channels = 1 + params["phi"]["kernel"].shape[0] if is_grid(spec) else 3
    seen = {"input_size": [channels, side, side], "interpolation": "bicubic", "crop_pct": 1.0}
    seen |= {"mean": [float(v) for v in mean], "std": [float(v) for v in std], "num_classes": 0}
    document = architecture(spec, learnt) | {"num_classes": 0, "num_features": models.make(spec).dim}
    with whole(folder / WEIGHTS) as part:
        part.write_bytes(encode(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG, document | {"pretrained_cfg": seen, "mfl": dict(ours)})


def load(folder: str | Path) -> Weights:
    """WeightsError where a file is missing or damaged, or the two do not belong together."""
    folder = Path(folder)
    config = read_json(folder / CONFIG, "the architecture of the weights beside it, as timm writes it")
    if not isinstance(config, dict) or not isinstance(config.get("model_args") or {}, dict):
        raise WeightsError(f"{folder / CONFIG} is no description of an architecture")
    what = str(folder / WEIGHTS)
    try:
        spec = spec_of(config, what)
        models.make(spec)
        params, stats = from_torch(read_tensors(folder / WEIGHTS), spec, what)
    except (TypeError, KeyError) as error:
        raise WeightsError(f"{folder / CONFIG} cannot be used: {error}") from error
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    with open(folder / WEIGHTS, "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return Weights(spec, params, stats, config, digest.hexdigest())


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file as float32."""
    from safetensors import SafetensorError, deserialize

    if not path.is_file():
        raise WeightsError(
            f"there is no {path}; weights of another form are converted with safetensors.torch.save_file"
        )
    if path.stat().st_size > LARGEST:
        raise WeightsError(f"{path} has {path.stat().st_size >> 30} GiB; no encoder that is known here is so large")
    try:
        stored = deserialize(path.read_bytes())
    except SafetensorError as error:
        raise WeightsError(f"{path} is no whole safetensors file: {error}") from error
    if strange := sorted({about["dtype"] for _, about in stored} - set(TYPES)):
        raise WeightsError(f"{path} holds tensors of type {strange}; allowed: {', '.join(TYPES)}")
    return {
        name: np.frombuffer(about["data"], TYPES[about["dtype"]]).reshape(about["shape"]).astype(np.float32)
        for name, about in stored
    }
