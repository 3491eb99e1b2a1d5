"""timm's names and layouts, both ways; a forward pass from them, in torch; and files that are not as they say."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mfl_jax import encoder, models
from mfl_jax.interop import weights
from tests.mfl_jax.synthetic import assert_same

SMALL = "features=24,heads=3,blocks=2"
OURS = {"view": "centre|size(16)|normalise(.5,.25)", "size": 16, "mpp": 0.5, "dtype": "float32"}


def shaken(spec, side=32):
    """Values that no initialiser gives, without compiling one."""
    model, draw = models.make(spec), np.random.default_rng(0)
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    like = jax.eval_shape(lambda key: model.init(key, image), jax.random.key(0))
    return model, *jax.tree.map(lambda leaf: draw.uniform(-0.2, 0.3, leaf.shape).astype(np.float32), like)


def saved(folder, spec, side=32, ours=None):
    model, params, stats = shaken(spec, side)
    mean, std = (0.5, 0.6, 0.7), (0.2, 0.25, 0.3)
    weights.save(folder, spec, params, stats, side=side, mean=mean, std=std, ours=ours or {})
    if ours is None:  # as a stranger would have written it
        change(folder, lambda config: config.pop("mfl"))
    return model, params, stats


def change(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


SPECS = [
    f"vit_ti8,{SMALL}",
    f"vit_s16,{SMALL},registers=3,pool=mean,drop_path=0.1",
    f"vit_b14,{SMALL}",
    "resnet18",
    "resnet26,width=0.125,small_stem",
    "compact,widths=8-16",
]


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_written_comes_back_bit_by_bit(spec, tmp_path):
    side = 28 if "14" in spec else 32
    model, params, stats = saved(tmp_path, spec, side, OURS)
    found = weights.load(tmp_path)
    assert_same(found.params, params)
    assert_same(found.stats, stats)
    assert models.make(found.spec).dim == model.dim == found.config["num_features"]
    assert ("pool=mean" in found.spec, "registers=3" in found.spec) == ("pool=mean" in spec, "registers=3" in spec)
    before = found.digest
    change(tmp_path, lambda config: config.update(name="other"))
    assert weights.load(tmp_path).digest != before


def test_a_vit_has_the_names_and_shapes_of_timm():
    _, params, stats = shaken("vit_s16", 224)
    tensors = weights.to_torch(params, stats, 16)
    assert {n: v.shape for n, v in tensors.items() if not n.startswith("blocks.")} == {
        "cls_token": (1, 1, 384),
        "pos_embed": (1, 197, 384),
        "patch_embed.proj.weight": (384, 3, 16, 16),
        "patch_embed.proj.bias": (384,),
        "norm.weight": (384,),
        "norm.bias": (384,),
    }
    assert {n.removeprefix("blocks.11."): v.shape for n, v in tensors.items() if n.startswith("blocks.11.")} == {
        "norm1.weight": (384,),
        "norm1.bias": (384,),
        "attn.qkv.weight": (1152, 384),
        "attn.qkv.bias": (1152,),
        "attn.proj.weight": (384, 384),
        "attn.proj.bias": (384,),
        "norm2.weight": (384,),
        "norm2.bias": (384,),
        "mlp.fc1.weight": (1536, 384),
        "mlp.fc1.bias": (1536,),
        "mlp.fc2.weight": (384, 1536),
        "mlp.fc2.bias": (384,),
    }
    assert len(tensors) == 6 + 12 * 12
    assert all(v.flags.c_contiguous and v.dtype == np.float32 for v in tensors.values())


def test_a_resnet_has_the_names_and_shapes_of_timm():
    model = models.make("resnet50")
    params, stats = jax.eval_shape(
        lambda key: model.init(key, jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)), jax.random.key(0)
    )
    blank = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), (params, stats))
    tensors = weights.to_torch(*blank, None)
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    for layer, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            prefix = f"layer{layer}.{block}."
            expected = {f"conv{i}.weight" for i in (1, 2, 3)} | {f"bn{i}.{n}" for i in (1, 2, 3) for n in norm}
            if block == 0:
                expected |= {"downsample.0.weight"} | {f"downsample.1.{n}" for n in norm}
            assert {n.removeprefix(prefix) for n in tensors if n.startswith(prefix)} == expected
    assert {n for n in tensors if not n.startswith("layer")} == {"conv1.weight", *(f"bn1.{n}" for n in norm)}
    assert tensors["conv1.weight"].shape == (64, 3, 7, 7)
    assert tensors["layer2.0.conv2.weight"].shape == (128, 128, 3, 3)
    assert tensors["layer4.0.downsample.0.weight"].shape == (2048, 1024, 1, 1)
    assert sum(v.size for n, v in tensors.items() if "running" not in n and "num_" not in n) == 23_508_032


@pytest.mark.parametrize(
    ("spec", "side", "name", "arguments"),
    [
        ("vit_s16", 224, "vit_small_patch16_224", None),
        ("vit_b8,drop_path=0.1,remat", 224, "vit_base_patch8_224", None),
        ("vit_ti8", 64, "vit_tiny_patch16_224", {"patch_size": 8, "img_size": 64}),
        ("vit_s14,registers=4", 224, "vit_small_patch16_224", {"patch_size": 14, "reg_tokens": 4}),
        ("vit_s16,pool=mean", 224, "vit_small_patch16_224", {"global_pool": "avg", "fc_norm": False}),
        ("resnet50,bn_groups=8", 224, "resnet50", None),
        ("resnet50,width=0.5", 224, "mfl_jax/resnet50,width=0.5", None),
        ("resnet18,small_stem", 224, "mfl_jax/resnet18,small_stem=True", None),
        ("compact,widths=8-16", 64, "mfl_jax/compact,widths=8-16", None),
    ],
)
def test_architectures_are_named_as_timm_names_them(spec, side, name, arguments):
    found = weights.architecture(spec, side)
    assert (found["architecture"], found.get("model_args")) == (name, arguments)
    ours, theirs = models.parse(weights.spec_of(found, "x")), models.parse(spec)
    assert ours[0] == theirs[0]
    assert ours[1].items() <= theirs[1].items()


def torch_vit(torch, w, x, *, patch, heads, registers, pool):
    """From timm's names, as timm computes it; positions are resized as DINO does."""
    f, d = torch.nn.functional, w["cls_token"].shape[-1]
    x = f.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], patch)
    lead, grid = w["pos_embed"][:, : 1 + registers], w["pos_embed"][:, 1 + registers :]
    side = round(grid.shape[1] ** 0.5)
    if side != x.shape[-1]:
        grid = grid.reshape(1, side, side, d).permute(0, 3, 1, 2)
        grid = f.interpolate(grid, size=x.shape[2:], mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    first = torch.cat([w["cls_token"], w["reg_token"]], 1) if registers else w["cls_token"]
    t = torch.cat([(first + lead).expand(len(x), -1, -1), x.flatten(2).transpose(1, 2) + grid], 1)
    for i in range(sum(bool(re.fullmatch(r"blocks\.\d+\.norm1\.bias", name)) for name in w)):
        b = {n.removeprefix(f"blocks.{i}."): v for n, v in w.items() if n.startswith(f"blocks.{i}.")}
        h = f.layer_norm(t, (d,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        qkv = f.linear(h, b["attn.qkv.weight"], b["attn.qkv.bias"])
        qkv = qkv.reshape(*t.shape[:2], 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        h = f.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).reshape(t.shape)
        t = t + f.linear(h, b["attn.proj.weight"], b["attn.proj.bias"])
        h = f.layer_norm(t, (d,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        h = f.gelu(f.linear(h, b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
        t = t + f.linear(h, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
    t = f.layer_norm(t, (d,), w["norm.weight"], w["norm.bias"], 1e-6)
    return t[:, 1 + registers :].mean(1) if pool == "mean" else t[:, 0]


@pytest.mark.parametrize(
    ("tile", "side", "kernel"), [(32, 32, "bicubic"), (50, 32, "bicubic"), (20, 48, "bicubic"), (50, 48, "bilinear")]
)
def test_features_of_a_folder_of_timm_are_those_of_torch(tile, side, kernel, tmp_path):
    """Tiles of any size; the positions are those of 32 px, so an input of 48 px resizes them too."""
    torch = pytest.importorskip("torch")
    registers, pool = (2, "mean") if side == 48 else (0, "cls")
    saved(tmp_path, f"vit_ti8,{SMALL}" + (f",registers={registers},pool=mean" if registers else ""), 32)
    change(tmp_path, lambda c: c["pretrained_cfg"].update(input_size=[3, side, side], interpolation=kernel))
    images = np.random.default_rng(0).integers(0, 256, (3, tile, tile, 3), np.uint8)
    made = encoder.of_weights(tmp_path)
    found = jax.jit(made.apply)(made.params, images, np.ones(3, bool))
    x = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    if tile != side:
        options = {"mode": kernel, "align_corners": False, "antialias": True}
        x = torch.nn.functional.interpolate(x, size=(side, side), **options).clamp(0, 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.5, 0.6, 0.7), (0.2, 0.25, 0.3)))
    tensors = {n: torch.tensor(v) for n, v in load_file(tmp_path / "model.safetensors").items()}
    expected = torch_vit(torch, tensors, (x - mean) / std, patch=8, heads=3, registers=registers, pool=pool)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
    assert (made.dim, made.exact, made.mpp) == (24, False, None)


def test_positions_without_those_of_cls_and_registers(tmp_path):
    """timm's no_embed_class: only patches have positions; the others' are zero."""
    _, params, _ = saved(tmp_path, f"vit_ti8,{SMALL},registers=2")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert not tensors["pos_embed"][:, 1:3].any()
    save_file(tensors | {"pos_embed": np.ascontiguousarray(tensors["pos_embed"][:, 3:])}, path)
    found = weights.load(tmp_path).params["pos_embed"]
    np.testing.assert_array_equal(found[:, 1:], np.asarray(params["pos_embed"])[:, 1:])
    assert not found[:, 0].any()


def test_a_head_is_left_out_and_half_precision_is_taken(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    _, params, _ = saved(tmp_path, f"vit_ti8,{SMALL}")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    half = {name: value.astype(np.float16) for name, value in tensors.items()}
    save_file(half | {"head.weight": np.zeros((5, 24), np.float32), "head.bias": np.zeros(5, np.float32)}, path)
    np.testing.assert_array_equal(weights.load(tmp_path).params["cls_token"], np.float16(params["cls_token"]))
    save_file({name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}, path)
    expected = np.asarray(params["cls_token"]).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(weights.load(tmp_path).params["cls_token"], expected)


def test_weights_that_do_not_fit_are_named(tmp_path):
    saved(tmp_path, f"vit_ti8,{SMALL}")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    wrong = dict(tensors) | {"blocks.0.ls1.gamma": np.ones(24, np.float32), "norm.bias": np.zeros(7, np.float32)}
    del wrong["blocks.1.mlp.fc1.bias"]
    save_file(wrong, path)
    with pytest.raises(weights.WeightsError) as error:
        weights.load(tmp_path)
    text = str(error.value)
    assert "blocks.0.ls1.gamma is not part of vit_ti8" in text
    assert "blocks.1.mlp.fc1.bias is missing" in text
    assert "norm.bias is [7], expected [24]" in text
    save_file({n: v for n, v in tensors.items() if not n.startswith("blocks.0")}, path)
    with pytest.raises(weights.WeightsError, match=r"(blocks\.0\.[\w.]+ is missing; ){4}blocks\.0\.[\w.]+ .* 7 more"):
        weights.load(tmp_path)
    save_file(tensors | {"norm.bias": np.full(24, np.nan, np.float32)}, path)
    with pytest.raises(weights.WeightsError, match=r"norm.bias holds values that are not finite"):
        weights.load(tmp_path)
    for tokens in (np.zeros((1, 12, 24), np.float32), np.zeros((17, 24), np.float32)):
        save_file(tensors | {"pos_embed": tokens}, path)
        with pytest.raises(weights.WeightsError, match="pos_embed has"):
            weights.load(tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: b[:-5],
        lambda b: b[: len(b) // 2],
        lambda b: b"",
        lambda b: b"\xff" * 8 + b[8:],
        lambda b: b"\x80\x02" + b,
    ],
)
def test_a_damaged_file_is_an_error_in_words(spoil, tmp_path):
    saved(tmp_path, f"vit_ti8,{SMALL}")
    path = tmp_path / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(weights.WeightsError, match="no whole safetensors file"):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(architecture="vit_large_patch16_224"), "'vit_large_patch16_224' is not known"),
        (lambda c: c.update(architecture="vit_small_patch16_18x2_224"), "is not known"),
        (lambda c: c.update(global_pool="map"), "global_pool is 'map'"),
        (lambda c: c["model_args"].update(init_values=1e-5), "'init_values': 1e-05"),
        (lambda c: c["model_args"].update(depth="2,pool=mean"), "whole numbers are expected"),
        (lambda c: c["model_args"].update(global_pool="avg"), "fc_norm=false"),
        (lambda c: c.update(model_args=[1]), "no description of an architecture"),
        (lambda c: c["pretrained_cfg"].update(interpolation="lanczos"), "does not say what the network takes"),
        (lambda c: c["pretrained_cfg"].update(std=[1, 1]), "does not say what the network takes"),
        (lambda c: c.update(mfl={"size": 16}), "does not say what the network takes"),
    ],
)
def test_a_config_that_says_something_else_is_refused(edit, message, tmp_path):
    saved(tmp_path, f"vit_ti8,{SMALL}")
    change(tmp_path, edit)
    with pytest.raises(ValueError, match=re.escape(message)):
        encoder.of_weights(tmp_path)


def test_a_folder_that_lacks_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config.json"):
        weights.load(tmp_path)
    saved(tmp_path, f"vit_ti8,{SMALL}")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(weights.WeightsError, match="converted with safetensors"):
        weights.load(tmp_path)
