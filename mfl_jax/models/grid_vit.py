"""A transformer over a region: a grid of tile features with a mask becomes one embedding (the ViT-4K of HIPT).

A linear layer and GELU in place of patches, then the blocks of models/vit.py. Cells without a tile are attended to by
none, so that an embedding depends on the tiles that are there and on where they lie, and on nothing else.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mfl_jax.models.layers import Dense, gelu
from mfl_jax.models.vit import START, Block, resized

POS_OFFSET = 0.1  # HIPT and DINO resize positions by (n + .1) / side; here always, so that their weights fit


class GridViT(nn.Module):
    """[B, h, w, D + 1], the last channel 1 where a tile is, -> (features [B, F], maps [B, h, w, F], 0 where none is).

    Positions are learnt for the grid of `init` and resized on the fly for any other (a square there). A region without
    any tile gives finite features, all of them alike.
    """

    features: int
    blocks: int
    heads: int
    pool: str = "cls"
    drop_path: float = 0.0
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        b, h, w, _ = x.shape
        grid, there = x[..., :-1], x[..., -1] > 0.5
        grid = jnp.where(there[..., None], grid, 0.0).astype(self.dtype)
        tokens = gelu(Dense(self.features, kernel_init=START, dtype=self.dtype, name="phi")(grid))
        tokens = nn.Dropout(self.dropout, deterministic=not train)(tokens)
        cls = self.param("cls_token", START, (1, 1, self.features), jnp.float32)
        positions = (
            self.param("pos_embed", START, (1, 1 + h * w, self.features), jnp.float32)
            if (self.is_initializing())
            else resized(self.get_variable("params", "pos_embed"), h, w, POS_OFFSET)
        )
        lead = jnp.broadcast_to(cls, (b, 1, self.features)).astype(self.dtype)
        x = jnp.concatenate([lead, tokens.reshape(b, h * w, -1)], 1) + positions.astype(self.dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        seen = jnp.concatenate([jnp.ones((b, 1), bool), there.reshape(b, -1)], 1)
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        for i in range(self.blocks):
            rate = self.drop_path * i / max(self.blocks - 1, 1)
            x = block(self.heads, rate, self.dropout, self.dtype, name=f"blocks_{i}")(x, train, seen)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        maps = jnp.where(there[..., None], x[:, 1:].reshape(b, h, w, -1), 0)
        if self.pool == "cls":
            return x[:, 0].astype(jnp.float32), maps
        count = jnp.maximum(there.sum((1, 2)), 1)[:, None]
        return maps.astype(jnp.float32).sum((1, 2)) / count, maps
