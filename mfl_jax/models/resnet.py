"""ResNet v1.5 (the stride sits on the 3x3), with the structure and numbers of timm so that weights can be exchanged."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mfl_jax.models.layers import BatchNorm, Conv, max_pool

# depth: (blocks of each stage, are they bottlenecks)
DEPTHS = {18: ((2, 2, 2, 2), False), 26: ((2, 2, 2, 2), True), 50: ((3, 4, 6, 3), True)}


class Block(nn.Module):
    """Two 3x3 convolutions, or 1x1 - 3x3 - 1x1, about a shortcut."""

    features: int
    stride: int
    bottleneck: bool
    norm: dict[str, Any]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        out = self.features * (4 if self.bottleneck else 1)
        sizes = (1, 3, 1) if self.bottleneck else (3, 3)
        widths = (self.features, self.features, out)[-len(sizes) :]
        y = x
        for i, (size, width) in enumerate(zip(sizes, widths, strict=True), 1):
            stride = self.stride if i == (2 if self.bottleneck else 1) else 1
            last = i == len(sizes)
            y = Conv(width, size, stride, self.dtype, name=f"conv{i}")(y)
            start = nn.initializers.zeros if last else nn.initializers.ones
            options: dict[str, Any] = {"scale_init": start, "relu": not last, "dtype": self.dtype}
            y = BatchNorm(**self.norm, **options, name=f"bn{i}")(y, train)
        if x.shape[-1] != out or self.stride != 1:
            x = Conv(out, 1, self.stride, self.dtype, name="downsample_0")(x)
            x = BatchNorm(**self.norm, dtype=self.dtype, name="downsample_1")(x, train)
        return nn.relu(x.astype(self.dtype) + y)


class ResNet(nn.Module):
    """[B, H, W, C] -> (features [B, D], maps [B, h, w, D]); the small stem (3x3, no pooling) is for images < 100 px."""

    depth: int
    width: float = 1.0
    small_stem: bool = False
    bn_groups: int = 1
    bn_momentum: float = 0.9
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        counts, bottleneck = DEPTHS[self.depth]
        norm: dict[str, Any] = {"groups": self.bn_groups, "momentum": self.bn_momentum}
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        base = round(64 * self.width)
        x = Conv(base, 3 if self.small_stem else 7, 1 if self.small_stem else 2, self.dtype, name="conv1")(x)
        x = BatchNorm(**norm, relu=True, dtype=self.dtype, name="bn1")(x, train)
        x = x if self.small_stem else max_pool(x)
        for stage, count in enumerate(counts):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                name = f"layer{stage + 1}_{i}"
                x = block(base * 2**stage, stride, bottleneck, norm, self.dtype, name=name)(x, train)
        return jnp.mean(x.astype(jnp.float32), (1, 2)), x


def feature_count(depth: int, width: float) -> int:
    return round(64 * width) * 8 * (4 if DEPTHS[depth][1] else 1)
