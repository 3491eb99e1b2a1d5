"""What the CLS token of a transformer attends to: a map a head, of the last block."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def of_cls(module: Any, params: Any, x: jax.Array) -> jax.Array:
    """[B, heads, h, w] float32 of a ViT over images: shares of attention; the rest, to a sum of 1, is on the CLS token
    and the registers themselves."""
    _, kept = module.apply(
        {"params": params}, x, False, capture_intermediates=lambda m, _: m.name == "qkv", mutable=["intermediates"]
    )
    qkv = kept["intermediates"][f"blocks_{module.blocks - 1}"]["attn"]["qkv"]["__call__"][0]
    rows, tokens, wide = qkv.shape
    features = wide // 3 // module.heads
    parts = qkv.astype(jnp.float32).reshape(rows, tokens, 3, module.heads, features)
    query, keys = parts[:, 0, 0], parts[:, :, 1]
    logits = jnp.einsum("bhd,bkhd->bhk", query, keys, precision=jax.lax.Precision.HIGHEST) * features**-0.5
    height, width = (side // module.patch for side in x.shape[1:3])
    return nn.softmax(logits, -1)[..., 1 + module.registers :].reshape(rows, module.heads, height, width)
