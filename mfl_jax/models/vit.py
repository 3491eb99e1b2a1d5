"""Vision transformers with the structure and numbers of timm (pre-norm, qkv stacked, exact GELU, LayerNorm 1e-6)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mfl_jax.models.layers import Dense, DropPath, Half, HalfNorm, attend, fold_blocks, gelu, resize_grid

SIZES = {"ti": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12)}  # features, blocks, heads
START = nn.initializers.truncated_normal(0.02)


class Attention(nn.Module):
    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, half: Half, there: jax.Array | None = None) -> jax.Array:
        """`there` [B, N]: tokens that are attended to, at least one a row; all of them where it is None."""
        b, n, d = x.shape
        qkv = Dense(3 * d, kernel_init=START, dtype=self.dtype, name="qkv")(x, half)
        mixed = attend(qkv.reshape(b, n, 3, self.heads, d // self.heads), there).reshape(b, n, d)
        return Dense(d, kernel_init=START, dtype=self.dtype, name="proj")(mixed)


class Mlp(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, half: Half) -> jax.Array:
        y = Dense(4 * x.shape[-1], kernel_init=START, dtype=self.dtype, name="fc1")(x, half)
        return Dense(x.shape[-1], kernel_init=START, dtype=self.dtype, name="fc2")(gelu(y))


class Block(nn.Module):
    heads: int
    drop_path: float
    dropout: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, there: jax.Array | None = None) -> jax.Array:
        attention = Attention(self.heads, self.dtype, name="attn")
        for norm, part in (
            ("norm1", lambda y, half: attention(y, half, there)),
            ("norm2", Mlp(self.dtype, name="mlp")),
        ):
            y = part(*HalfNorm(name=norm)(x))
            y = nn.Dropout(self.dropout, deterministic=not train)(y)
            x = x + DropPath(self.drop_path)(y, train)
        return x


class ViT(nn.Module):
    """[B, H, W, C] -> (features [B, D], maps [B, h, w, D]).

    Positions are learnt for the image size of `init` and resized on the fly for any other (a square there).
    """

    features: int
    blocks: int
    heads: int
    patch: int
    registers: int = 0
    pool: str = "cls"
    drop_path: float = 0.0
    dropout: float = 0.0
    remat: bool = False
    pos_offset: float = 0.0  # of layers.cubic_weights
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        patches = fold_blocks(x.astype(self.dtype), self.patch)
        x = Dense(self.features, dtype=self.dtype, name="patch_embed")(patches)
        b, h, w, d = x.shape
        cls = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, d), jnp.float32)
        positions = self.positions(h, w)
        x = x.reshape(b, h * w, d) + positions[:, 1:].astype(self.dtype)
        first = [(cls + positions[:, :1])]
        if self.registers:
            first.append(self.param("reg_token", nn.initializers.normal(1e-6), (1, self.registers, d), jnp.float32))
        lead = jnp.concatenate(first, 1).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(lead, (b, *lead.shape[1:])), x], 1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        for i in range(self.blocks):
            rate = self.drop_path * i / max(self.blocks - 1, 1)
            x = block(self.heads, rate, self.dropout, self.dtype, name=f"blocks_{i}")(x, train)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        maps = x[:, 1 + self.registers :].reshape(b, h, w, d)
        pooled = x[:, 0] if self.pool == "cls" else jnp.mean(maps.astype(jnp.float32), (1, 2))
        return pooled.astype(jnp.float32), maps

    def positions(self, h: int, w: int) -> jax.Array:
        """[1, 1 + h * w, D], the CLS token's first."""
        if self.is_initializing():
            return self.param("pos_embed", START, (1, 1 + h * w, self.features), jnp.float32)
        return resized(self.get_variable("params", "pos_embed"), h, w, self.pos_offset)


def resized(learnt: jax.Array, h: int, w: int, offset: float) -> jax.Array:
    """Positions [1, 1 + side * side, D], the CLS token's first, for a grid of h x w."""
    if learnt.shape[1] == 1 + h * w:
        return learnt
    side = math.isqrt(learnt.shape[1] - 1)
    if side * side != learnt.shape[1] - 1:
        raise ValueError(
            f"positions learnt on a grid of {learnt.shape[1] - 1} patches, which is no square, cannot be resized to"
            f" {h} x {w}; initialise the model on square images, or keep to the size it was initialised on"
        )
    grid = resize_grid(learnt[0, 1:].reshape(side, side, -1), h, w, offset)
    return jnp.concatenate([learnt[:, :1], grid.reshape(1, h * w, -1)], 1)
