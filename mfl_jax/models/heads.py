"""Networks over vectors: the encoder of a vector modality, projectors, predictors, classifiers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from mfl_jax.models.layers import BatchNorm, Dense, gelu


class Layers(nn.Module):
    """[B, D] -> [B, widths[-1]]: dense layers with (BatchNorm and) ReLU between them.

    A dense layer that BatchNorm follows has no bias. last_bn ends with a BatchNorm without gain, as SimSiam's
    projector does; last_relu ends as the layers between do, as an encoder does.
    """

    widths: tuple[int, ...]
    bn: bool = False
    last_bn: bool = False
    last_relu: bool = False
    dropout: float = 0.0
    bn_groups: int = 1
    bn_momentum: float = 0.9
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, None]:
        norm = {"groups": self.bn_groups, "momentum": self.bn_momentum, "dtype": self.dtype}
        x = x.astype(self.dtype)
        for i, width in enumerate(self.widths):
            inner = i + 1 < len(self.widths) or self.last_relu
            bn = self.bn if inner else self.last_bn
            x = Dense(width, use_bias=not bn, dtype=self.dtype, name=f"dense{i}")(x)
            if bn:
                x = BatchNorm(**norm, affine=inner, relu=inner, name=f"bn{i}")(x, train)
            if inner:
                x = nn.Dropout(self.dropout, deterministic=not train)(x if bn else nn.relu(x))
        return x.astype(jnp.float32), None


class DinoHead(nn.Module):
    """[B, D] -> [B, widths[-1]]: dense layers with (BatchNorm and) GELU between them, as DINO has them before its
    last layer. That is `Directions`, of these rows made of length 1.

    Kernels start with 1/sqrt(inputs), which is the papers' 0.02 at 2,048: with that, a small head would give rows so
    short that to make them of length 1 multiplies gradients by thousands."""

    widths: tuple[int, ...]
    bn: bool = False
    bn_groups: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, None]:
        x = x.astype(self.dtype)
        for i, width in enumerate(self.widths):
            inner = i + 1 < len(self.widths)
            bn = self.bn and inner
            x = Dense(width, use_bias=not bn, dtype=self.dtype, name=f"dense{i}")(x)
            if bn:
                x = BatchNorm(groups=self.bn_groups, dtype=self.dtype, name=f"bn{i}")(x, train)
            x = gelu(x) if inner else x
        return x.astype(jnp.float32), None


class Directions(nn.Module):
    """[B, D] -> [B, out]: the cosine with each of `out` directions, for rows of length 1. A weight-normed layer without
    bias whose gain is fixed at 1: the length of a column of the kernel means nothing."""

    out: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, None]:
        start = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        kernel = self.param("kernel", start, (x.shape[-1], self.out), jnp.float32)
        unit = kernel * lax.rsqrt(jnp.maximum(jnp.sum(kernel * kernel, 0), 1e-24))
        return jnp.matmul(x.astype(self.dtype), unit.astype(self.dtype), preferred_element_type=jnp.float32), None


class PaperHead(nn.Module):
    """BN - dense - ReLU - BN - logits: the classifier that More From Less trains on frozen features."""

    out: int
    hidden: int
    dropout: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, None]:
        x = BatchNorm(dtype=self.dtype, name="bn0")(x, train)
        x = nn.relu(Dense(self.hidden, dtype=self.dtype, name="dense0")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(BatchNorm(dtype=self.dtype, name="bn1")(x, train))
        return Dense(self.out, dtype=self.dtype, name="dense1")(x).astype(jnp.float32), None
