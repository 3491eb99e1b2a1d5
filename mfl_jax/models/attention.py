"""What the CLS token of a transformer attends to: a map a head, of the last block."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mfl_jax.models.grid_vit import GridViT


def of_cls(module: Any, params: Any, x: jax.Array) -> jax.Array:
    """[B, heads, h, w] float32 of a ViT over images, or over regions: shares of attention, 0 of cells without a tile;
    the rest, to a sum of 1, is on the CLS token and the registers themselves."""
    _, kept = module.apply(
        {"params": params}, x, False, capture_intermediates=lambda m, _: m.name == "qkv", mutable=["intermediates"]
    )
    qkv = kept["intermediates"][f"blocks_{module.blocks - 1}"]["attn"]["qkv"]["__call__"][0]
    rows, tokens, wide = qkv.shape
    features = wide // 3 // module.heads
    parts = qkv.astype(jnp.float32).reshape(rows, tokens, 3, module.heads, features)
    query, keys = parts[:, 0, 0], parts[:, :, 1]
    logits = jnp.einsum("bhd,bkhd->bhk", query, keys, precision=jax.lax.Precision.HIGHEST) * features**-0.5
    patch, lead = (1, 1) if isinstance(module, GridViT) else (module.patch, 1 + module.registers)
    height, width = (side // patch for side in x.shape[1:3])
    if isinstance(module, GridViT):
        there = jnp.pad(x[..., -1].reshape(rows, -1) > 0.5, ((0, 0), (lead, 0)), constant_values=True)
        logits = jnp.where(there[:, None], logits, -jnp.inf)
    return nn.softmax(logits, -1)[..., lead:].reshape(rows, module.heads, height, width)
