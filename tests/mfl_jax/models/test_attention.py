"""Attention of the CLS token against float64 numpy, from the weights alone: block by block, head by head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, softmax

from mfl_jax.models import make

SPEC = "vit_ti8,features=12,blocks=2,heads=3,registers=2"


def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def attended(x, p, heads):
    """(what attention adds [N, D], weights [heads, N, N]) of one row of tokens."""
    q, k, v = np.split(dense(x, p["qkv"]), 3, -1)
    wide, mixed, weights = x.shape[1] // heads, [], []
    for head in range(heads):
        part = slice(head * wide, (head + 1) * wide)
        weights.append(softmax(q[:, part] @ k[:, part].T / np.sqrt(wide), -1))
        mixed.append(weights[-1] @ v[:, part])
    return dense(np.concatenate(mixed, -1), p["proj"]), np.stack(weights)


def of_last(x, p, heads):
    """Weights [heads, N] of the first of tokens x [N, D], in the second of two blocks."""
    for number in range(2):
        block = p[f"blocks_{number}"]
        added, weights = attended(norm(x, block["norm1"]), block["attn"], heads)
        x = x + added
        hidden = dense(norm(x, block["norm2"]), block["mlp"]["fc1"])
        x = x + dense(gelu(hidden), block["mlp"]["fc2"])
    return weights[:, 0]


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def expected(image, p, heads, patch, registers):
    side = image.shape[0] // patch
    tokens = []
    for i in range(side):
        for j in range(side):
            block = image[i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].reshape(-1)
            tokens.append(dense(block, p["patch_embed"]) + p["pos_embed"][0, 1 + i * side + j])
    x = np.stack([p["cls_token"][0, 0] + p["pos_embed"][0, 0], *p["reg_token"][0], *tokens])
    return of_last(x, p, heads)[:, 1 + registers :].reshape(heads, side, side)


def made(spec, x):
    model, draw = make(spec), np.random.default_rng(1)
    params, _ = model.init(jax.random.key(0), x)  # as they start, they hardly look anywhere
    return model, jax.tree.map(lambda p: (p + 0.3 * draw.normal(size=p.shape)).astype(np.float32), params)


def test_the_maps_are_those_of_the_definition():
    x = np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)
    model, params = made(SPEC, x)
    found = jax.jit(model.attention)(params, x)
    wide = jax.tree.map(np.float64, params)
    assert found.shape == (2, 3, 3, 3)
    for row in range(2):
        maps = expected(np.float64(x[row]), wide, 3, 8, 2)
        assert maps.std() > 0.01
        np.testing.assert_allclose(found[row], maps, rtol=1e-3, atol=1e-5)
    assert np.all(np.sum(found, (2, 3)) < 1)  # the rest is on the CLS token and the registers
    half = jax.jit(lambda p, x: model.attention(p, x, dtype=jnp.bfloat16))(params, x)
    np.testing.assert_allclose(half, found, atol=0.05)


def test_maps_of_regions_are_those_of_the_tiles_that_are_there():
    """Tiles that are not there are no tokens of the oracle at all; the last region has none."""
    draw = np.random.default_rng(0)
    there = draw.random((3, 4, 4)) < np.array([0.5, 0.9, 0])[:, None, None]
    x = np.concatenate([draw.normal(size=(3, 4, 4, 5)), there[..., None]], -1).astype(np.float32)
    model, params = made("grid_vit,features=12,blocks=2,heads=3", x)
    found, wide = np.asarray(jax.jit(model.attention)(params, x)), jax.tree.map(np.float64, params)
    assert found.shape == (3, 3, 4, 4)
    for grid, maps, cells in zip(np.float64(x), found, there, strict=True):
        own = gelu(dense(grid[cells][:, :-1], wide["phi"])) + wide["pos_embed"][0, 1:].reshape(4, 4, -1)[cells]
        weights = of_last(np.stack([wide["cls_token"][0, 0] + wide["pos_embed"][0, 0], *own]), wide, 3)
        assert not maps[:, ~cells].any()
        np.testing.assert_allclose(maps[:, cells], weights[:, 1:], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(maps.sum((1, 2)) + weights[:, 0], 1, atol=1e-5)
    assert found[:2].std() > 0.01
    assert not found[2].any()
    x[~there] = np.array([np.nan] * 5 + [0])
    np.testing.assert_array_equal(jax.jit(model.attention)(params, x), found)


@pytest.mark.parametrize("spec", ["compact", "resnet18", "mlp"])
def test_a_network_without_a_cls_token_has_none(spec):
    assert make(spec).attention is None
