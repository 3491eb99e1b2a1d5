"""A convnet for training on a CPU: resolution is lost only by folding blocks of pixels into channels before a dense
layer (strided and few-channel convolutions are what XLA:CPU is slow at), and all else is 3x3 at >= 32 channels."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mfl_jax.models.layers import BatchNorm, Conv, Dense, fold_blocks


class Compact(nn.Module):
    """[B, H, W, C] -> (features [B, D], maps [B, h, w, D]); stage i has widths[i] channels at H / (patch * 2**i)."""

    widths: tuple[int, ...] = (32, 64, 128)
    blocks: int = 1
    patch: int = 4
    bn_groups: int = 1
    bn_momentum: float = 0.9
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        norm = {"groups": self.bn_groups, "momentum": self.bn_momentum, "dtype": self.dtype}
        x = x.astype(self.dtype)
        for stage, width in enumerate(self.widths):
            x = Dense(width, dtype=self.dtype, name=f"down{stage}")(fold_blocks(x, 2 if stage else self.patch))
            x = BatchNorm(**norm, relu=True, name=f"down{stage}_bn")(x, train)
            for i in range(self.blocks):
                y = Conv(width, 3, dtype=self.dtype, name=f"stage{stage}_{i}_conv1")(x)
                y = BatchNorm(**norm, relu=True, name=f"stage{stage}_{i}_bn1")(y, train)
                y = Conv(width, 3, dtype=self.dtype, name=f"stage{stage}_{i}_conv2")(y)
                start = nn.initializers.zeros
                x = nn.relu(x + BatchNorm(**norm, scale_init=start, name=f"stage{stage}_{i}_bn2")(y, train))
        x = Dense(2 * self.widths[-1], dtype=self.dtype, name="last")(x)
        x = BatchNorm(**norm, relu=True, name="last_bn")(x, train)
        return jnp.mean(x.astype(jnp.float32), (1, 2)), x
