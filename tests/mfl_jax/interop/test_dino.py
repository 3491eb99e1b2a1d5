"""Checkpoints as DINO and HIPT name them, against torch's own functions on the same numbers."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mfl_jax import encoder
from mfl_jax.interop import weights
from tests.mfl_jax.interop.test_weights import torch_vit

D, HEADS, BLOCKS = 24, 3, 2
ARGUMENTS = {"embed_dim": D, "depth": BLOCKS, "num_heads": HEADS}


def checkpoint(first: dict[str, tuple[int, ...]], tokens: int) -> dict[str, np.ndarray]:
    """By the names that both give a transformer; `first` is what stands in front of the blocks."""
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, tokens, D), "norm.weight": (D,), "norm.bias": (D,)} | first
    for i in range(BLOCKS):
        for name, shape in (("norm1", (D,)), ("attn.qkv", (3 * D, D)), ("attn.proj", (D, D)), ("norm2", (D,))):
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name, shape in (("mlp.fc1", (4 * D, D)), ("mlp.fc2", (D, 4 * D))):
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    draw = np.random.default_rng(0)
    return {name: draw.uniform(-0.3, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


TILES = checkpoint({"patch_embed.proj.weight": (D, 3, 8, 8), "patch_embed.proj.bias": (D,)}, 1 + 4 * 4)
REGIONS = checkpoint({"phi.0.weight": (D, 5), "phi.0.bias": (D,)}, 1 + 4 * 4)
HEAD = {f"head.{n}": np.ones((2, 2), np.float32) for n in ("mlp.0.weight", "mlp.4.bias", "last_layer.weight_v")}


def written(folder, tensors, architecture, **more):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    document = {"architecture": architecture, "model_args": ARGUMENTS} | more
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def wrapped(tensors, wrapper):
    return {f"{wrapper}{name}": value for name, value in (tensors | HEAD).items()}


def test_a_checkpoint_of_dino_gives_torch_s_features_whatever_it_is_wrapped_in(tmp_path):
    """An input of 48 px resizes the positions of 32 px, by the factor that DINO gives torch."""
    torch, side = pytest.importorskip("torch"), 48
    seen = {"input_size": [3, side, side], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    folder = written(tmp_path / "a", wrapped(TILES, "module.backbone."), "dino_vits8", pretrained_cfg=seen)
    made = encoder.of_weights(folder)
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)
    found = jax.jit(made.apply)(made.params, images, np.ones(3, bool))
    w = {name: torch.tensor(value) for name, value in TILES.items()}
    grid = w["pos_embed"][:, 1:].reshape(1, 4, 4, D).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, scale_factor=((side // 8 + 0.1) / 4,) * 2, mode="bicubic")
    w["pos_embed"] = torch.cat([w["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], 1)
    x = torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = torch_vit(torch, w, x, patch=8, heads=HEADS, registers=0, pool="cls")
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
    assert (made.dim, made.size, made.kind) == (D, side, "image")


def test_a_checkpoint_of_hipt_s_second_level_gives_torch_s_features(tmp_path):
    torch, side = pytest.importorskip("torch"), 6
    f = torch.nn.functional
    made = encoder.of_weights(written(tmp_path / "a", wrapped(REGIONS, "teacher.backbone."), "hipt_vit4k_xs"))
    assert (made.kind, made.channels, made.dim, made.exact, made.mpp) == ("grid", 6, D, False, None)
    grids = np.random.default_rng(0).normal(size=(3, side, side, 6)).astype(np.float16)
    grids[..., -1] = 1
    found = jax.jit(made.apply)(made.params, grids, np.ones(3, bool))
    w = {name: torch.tensor(value) for name, value in REGIONS.items()}
    grid = w["pos_embed"][:, 1:].reshape(1, 4, 4, D).permute(0, 3, 1, 2)
    grid = f.interpolate(grid, scale_factor=((side + 0.1) / 4,) * 2, mode="bicubic")
    w["pos_embed"] = torch.cat([w["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], 1)
    tokens = f.gelu(f.linear(torch.tensor(grids[..., :-1].astype(np.float32)), w["phi.0.weight"], w["phi.0.bias"]))
    # a patch of 1 x 1 whose convolution is the identity: what is left is the transformer that both have
    w |= {"patch_embed.proj.weight": torch.eye(D)[:, :, None, None], "patch_embed.proj.bias": torch.zeros(D)}
    expected = torch_vit(torch, w, tokens.permute(0, 3, 1, 2), patch=1, heads=HEADS, registers=0, pool="cls")
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_of_a_whole_checkpoint_the_teacher_is_taken(tmp_path):
    both = wrapped(TILES, "teacher.module.backbone.") | wrapped(
        {name: value + 1 for name, value in TILES.items()}, "student.module.backbone."
    )
    found = weights.load(written(tmp_path / "a", both, "dino_vits8"))
    np.testing.assert_array_equal(found.params["cls_token"], TILES["cls_token"])
    assert found.spec == "vit_s8,pos_offset=0.1,features=24,blocks=2,heads=3"


def test_regions_written_come_back_and_dino_s_resizing_with_them(tmp_path):
    for name, tensors, side in (("hipt_vit4k_xs", REGIONS, 4), ("dino_vits8", TILES, 32)):
        found = weights.load(written(tmp_path / name, tensors, name))
        kept = {"side": side, "mean": (0.5,) * 3, "std": (0.5,) * 3, "ours": {}}
        weights.save(tmp_path / f"{name} again", found.spec, found.params, found.stats, **kept)
        again = weights.load(tmp_path / f"{name} again")
        assert again.spec == found.spec
        assert weights.to_torch(again.params, again.stats, weights.patch_of(again.spec)).keys() == tensors.keys()
        for key, value in weights.to_torch(again.params, again.stats, weights.patch_of(again.spec)).items():
            np.testing.assert_array_equal(value, tensors[key])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "dino_vitl16"}, r"dino_vit\{t,s,b\}\{8,16\}"),
        ({"model_args": {"depth": "two"}}, "model_args depth='two'"),
        ({"model_args": {"window": 7}}, "model_args window=7"),
        ({"architecture": "hipt_vit4k_xs"}, r"phi\.0\.bias is missing"),
    ],
)
def test_what_does_not_fit_is_said(change, message, tmp_path):
    folder = written(tmp_path / "a", TILES, **{"architecture": "dino_vits8"} | change)
    with pytest.raises(weights.WeightsError, match=message):
        weights.load(folder)
