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


def expected(image, p, heads, patch, registers):
    side = image.shape[0] // patch
    tokens = []
    for i in range(side):
        for j in range(side):
            block = image[i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].reshape(-1)
            tokens.append(dense(block, p["patch_embed"]) + p["pos_embed"][0, 1 + i * side + j])
    x = np.stack([p["cls_token"][0, 0] + p["pos_embed"][0, 0], *p["reg_token"][0], *tokens])
    for number in range(2):
        block = p[f"blocks_{number}"]
        added, weights = attended(norm(x, block["norm1"]), block["attn"], heads)
        x = x + added
        hidden = dense(norm(x, block["norm2"]), block["mlp"]["fc1"])
        x = x + dense(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, block["mlp"]["fc2"])
    return weights[:, 0, 1 + registers :].reshape(heads, side, side)


def test_the_maps_are_those_of_the_definition():
    model, x = make(SPEC), np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)
    params, _ = model.init(jax.random.key(0), x)
    shake = np.random.default_rng(1)  # weights as they start hardly look anywhere
    params = jax.tree.map(lambda p: (p + 0.3 * shake.normal(size=p.shape)).astype(np.float32), params)
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


@pytest.mark.parametrize("spec", ["compact", "resnet18", "mlp"])
def test_a_network_without_a_cls_token_has_none(spec):
    assert make(spec).attention is None
