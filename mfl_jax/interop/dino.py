"""Checkpoints of DINO and of HIPT as folders that weights.load reads: what they call networks and parameters.

A checkpoint is turned into a safetensors file once, by whoever trusts it (nothing is unpickled here):

    python -c "import torch; from safetensors.torch import save_file as save; save({k: v.contiguous() for k, v in
    torch.load('dino.pth', map_location='cpu', weights_only=True)['teacher'].items()}, 'folder/model.safetensors')"

and `folder/config.json` says what it is, and how pixels were normalised, which no checkpoint does:

    {"architecture": "dino_vits16", "pretrained_cfg": {"input_size": [3, 256, 256], "mean": [...], "std": [...]}}

Architectures: dino_vit{t,s,b}{8,16} of tiles, and hipt_vit4k_xs of regions, which needs no pretrained_cfg. Both resize
positions by (n + .1) / side, so that ours do.
"""

import re
from collections.abc import Mapping

import numpy as np

TILES = re.compile(r"dino_vit(t|s|b)(8|16)")
REGIONS = "hipt_vit4k_xs"
SIZES = {"t": "ti", "s": "s", "b": "b"}
WRAPPERS = ("module.", "teacher.", "backbone.")
HEAD = re.compile(r"head\.(mlp\..*|last_layer\..*)")


def spec_of(architecture: str) -> str | None:
    """Of models.make; None where the name is none of these."""
    if match := TILES.fullmatch(architecture):
        return f"vit_{SIZES[match[1]]}{match[2]},pos_offset=0.1"
    return "grid_vit" if architecture == REGIONS else None


def plain(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The encoder's tensors by timm's names: of a whole checkpoint the teacher's, without wrappers and without the head
    that training alone needs."""
    if any(name.startswith("teacher.") for name in tensors):
        tensors = {name: value for name, value in tensors.items() if name.startswith("teacher.")}
    found = {}
    for name, value in tensors.items():
        while wrapper := next((w for w in WRAPPERS if name.startswith(w)), None):
            name = name.removeprefix(wrapper)
        if not HEAD.fullmatch(name):
            found[name] = value
    return found
