"""Layers with the numbers of timm and torch: normalisation, convolution, drop path, resizing of positions."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

MANY_ROWS, WIDE = 512, 192  # of a dense layer whose gradient is worth `product`: in a ViT, not in a convnet
FLASH = True  # attention by cuDNN, in bfloat16 on GPUs that have it


class BatchNorm(nn.Module):
    """Statistics in float32 over the GLOBAL batch, or over `groups` runs of neighbouring rows, as papers that
    trained with a BatchNorm per device had it. The running mean and (unbiased) variance are averaged over groups.

    The squares are taken about the running mean: one pass over the data, without the cancellation of E[x^2] - E[x]^2.
    With `relu` the rectifier that follows is part of it, which spares the gradient a pass over memory.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    groups: int = 1
    affine: bool = True
    relu: bool = False
    scale_init: Callable[..., Any] = nn.initializers.ones
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1]
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        scale = self.param("scale", self.scale_init, (channels,), jnp.float32) if self.affine else jnp.ones(channels)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32) if self.affine else 0.0 * scale
        if not train:
            factor = scale * lax.rsqrt(var.value + self.epsilon)
            y = x.astype(self.dtype) * factor.astype(self.dtype) + (bias - mean.value * factor).astype(self.dtype)
            return nn.relu(y) if self.relu else y
        if x.shape[0] % self.groups:
            raise ValueError(
                f"a batch of {x.shape[0]} rows cannot be normalised in bn_groups={self.groups} equal groups"
            )
        about = lax.stop_gradient(mean.value)
        group = lambda rows: standardise(rows, scale, bias, about, self.epsilon, self.relu)  # noqa: E731
        rows = x.astype(self.dtype).reshape(self.groups, -1, channels)
        if self.groups == 1:
            y, means, variances = group(rows[0])
        else:
            y, means, variances = jax.vmap(group)(rows)
            means, variances = jnp.mean(means, 0), jnp.mean(variances, 0)
        if not self.is_initializing():
            count = rows.shape[1]
            mean.value = self.momentum * mean.value + (1 - self.momentum) * means
            var.value = self.momentum * var.value + (1 - self.momentum) * variances * (count / max(count - 1, 1))
        return y.reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def standardise(
    rows: jax.Array, scale: jax.Array, bias: jax.Array, about: jax.Array, epsilon: float, relu: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(normalised [N, C] as rows are, mean, variance); no gradient goes through the last two. Two axes and no more:
    XLA:CPU takes 60 times as long, forward and back, to sum [1, N, C] over N as to sum [N, C].

    The gradient is written out because what memory is read and written for is most of the time of a convnet on a GPU:
    derived by jax it kept a mask of the rectifier, and summed over the rows in three passes where one will do.
    """
    return _standardise(rows, scale, bias, about, epsilon, relu)[0]


def _standardise(rows, scale, bias, about, epsilon, relu):
    wide = rows.astype(jnp.float32)
    first = jnp.mean(wide - about, 0)
    variance = jnp.maximum(jnp.mean(jnp.square(wide - about), 0) - jnp.square(first), 0.0)
    mean, inverse = first + about, lax.rsqrt(variance + epsilon)
    y = (wide - mean) * (scale * inverse) + bias
    y = jnp.maximum(y, 0.0) if relu else y
    return (y.astype(rows.dtype), mean, variance), (rows, scale, bias, mean, inverse)


def _standardise_gradient(epsilon, relu, kept, given):
    rows, scale, bias, mean, inverse = kept

    def read(rows, slope):
        apart, slope = rows.astype(jnp.float32) - mean, slope.astype(jnp.float32)
        return apart, jnp.where(apart * (scale * inverse) + bias > 0, slope, 0.0) if relu else slope

    # Without the barriers XLA writes the rectifier's mask to memory, to share it.
    apart, slope = read(lax.optimization_barrier(rows), given[0])
    d_bias, d_scale = jnp.sum(slope, 0), jnp.sum(slope * apart, 0) * inverse
    apart, slope = read(*lax.optimization_barrier((rows, given[0], d_bias))[:2])
    count = rows.shape[0]
    d_rows = (scale * inverse) * (slope - d_bias / count - apart * (inverse * d_scale / count))
    return d_rows.astype(rows.dtype), d_scale, d_bias, jnp.zeros_like(mean)


standardise.defvjp(_standardise, _standardise_gradient)


Half = tuple[jax.Array, jax.Array]  # scale and bias of a HalfNorm


class HalfNorm(nn.Module):
    """The first half of a LayerNorm: (x of mean 0 and variance 1, (scale, bias)). The other half is done by the `Dense`
    that follows, which takes scale and bias into its kernel and bias: the same function in fewer passes over x, and
    less of it kept for the gradient."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Half]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        return standard_rows(x, self.epsilon), (scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def standard_rows(x: jax.Array, epsilon: float) -> jax.Array:
    """x with mean 0 and variance 1 over its last axis, computed in float32. Its gradient needs what it gave, and not
    x."""
    return _standard_rows(x, epsilon)[0]


def _standard_rows(x, epsilon):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, -1, keepdims=True)
    variance = jnp.mean(jnp.square(wide), -1, keepdims=True) - jnp.square(mean)
    inverse = lax.rsqrt(jnp.maximum(variance, 0.0) + epsilon)
    y = ((wide - mean) * inverse).astype(x.dtype)
    return y, (y, inverse)


def _standard_rows_gradient(epsilon, kept, slope):
    y, inverse = kept
    wide, apart = slope.astype(jnp.float32), y.astype(jnp.float32)
    along = jnp.mean(wide * apart, -1, keepdims=True)
    return ((inverse * (wide - jnp.mean(wide, -1, keepdims=True) - apart * along)).astype(slope.dtype),)


standard_rows.defvjp(_standard_rows, _standard_rows_gradient)


class Dense(nn.Module):
    """x @ kernel + bias with all but the last axis folded into one: XLA:CPU transposes a [B, N, D] operand in the
    gradient, which made the attention block 1.7 times slower. `half` is what a `HalfNorm` left to do."""

    features: int
    use_bias: bool = True
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, half: Half | None = None) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32) if self.use_bias else None
        if half is not None:
            more = jnp.matmul(half[1], kernel, precision=lax.Precision.HIGHEST)
            kernel, bias = half[0][:, None] * kernel, more if bias is None else bias + more
        large = math.prod(x.shape[:-1]) >= MANY_ROWS and min(kernel.shape) >= WIDE
        by = product if large and jax.default_backend() == "cpu" else jnp.matmul
        y = flat_product(x.astype(self.dtype), kernel.astype(self.dtype), by)
        return y if bias is None else y + bias.astype(self.dtype)


def flat_product(x: jax.Array, kernel: jax.Array, by: Callable[..., jax.Array] = jnp.matmul) -> jax.Array:
    return by(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel of [N, D]. The gradient of the kernel is made with its longer side along the rows: XLA:CPU takes half
    as long again to make it the other way round."""
    return x @ kernel


def _product_gradient(kept, slope):
    x, kernel = kept
    tall = kernel.shape[0] > kernel.shape[1]
    d_kernel = lax.optimization_barrier(slope.T @ x).T if tall else x.T @ slope
    return slope @ kernel.T, d_kernel


product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_gradient)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, as timm's weights need it, by erf. The derivative is kept in place of x: `jax.nn.gelu` goes by
    erfc, in three passes over memory, which costs an eighth of the time of the MLP block on a CPU."""
    return gelu_and_slope(x)[0]


def gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(jnp.float32)
    share = 0.5 * (1 + lax.erf(wide * np.float32(np.sqrt(0.5))))
    slope = share + wide * jnp.exp(-0.5 * wide * wide) * np.float32(1 / np.sqrt(2 * np.pi))
    return (wide * share).astype(x.dtype), slope.astype(x.dtype)


gelu.defvjp(gelu_and_slope, lambda slope, g: (g * slope,))


def attend(qkv: jax.Array, there: jax.Array | None = None) -> jax.Array:
    """Softmax attention of [B, N, 3, heads, D] to the tokens that are `there` [B, N], at least one a row: [B, N, heads,
    D]. Where cuDNN has it as one kernel the N x N weights never reach memory: a sixth of all that a step of
    ViT-S/16 at 224 px reads and writes. Elsewhere heads come before tokens: XLA:CPU takes a sixth longer to attend the
    other way round.
    """
    width, whole = qkv.shape[-1], there is None
    if FLASH and whole and qkv.dtype == jnp.bfloat16 and width % 8 == 0 and width <= 128 and _has_flash():
        return flash(*jnp.moveaxis(qkv, 2, 0))
    if qkv.dtype == jnp.float32 and jax.default_backend() == "cpu":
        return weighed(qkv, there)
    return _weighed(qkv, there)[0]


@jax.custom_vjp
def weighed(qkv: jax.Array, there: jax.Array | None) -> jax.Array:
    """The gradient is written out: derived by jax it goes over memory in three passes more, to put together that of
    qkv and to sum over what a softmax gave. For exact products alone: the sum is taken from what they gave, and where
    they are rounded (bfloat16, TF32) what all keys have in common would show in the gradient of q."""
    return _weighed(qkv, there)[0]


def _weighed(qkv, there):
    q, k, v = (qkv[:, :, part].transpose(0, 2, 1, 3) for part in range(3))
    q = q * qkv.shape[-1] ** -0.5
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k).astype(jnp.float32)
    if there is not None:
        logits = jnp.where(there[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    weights = nn.softmax(logits, -1).astype(qkv.dtype)
    mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, v).transpose(0, 2, 1, 3)
    return mixed, (q, k, v, weights, mixed)


def _weighed_gradient(kept, slope):
    q, k, v, weights, mixed = kept
    b, heads, n, width = q.shape
    total = jnp.sum(slope * mixed, -1).transpose(0, 2, 1)[..., None]
    slope = slope.transpose(0, 2, 1, 3)
    d_v = jnp.einsum("bhqk,bhqd->bhkd", weights, slope)
    d_logits = weights * (jnp.einsum("bhqd,bhkd->bhqk", slope, v) - total)
    d_q = jnp.einsum("bhqk,bhkd->bhqd", d_logits, k) * width**-0.5
    d_k = jnp.einsum("bhqk,bhqd->bhkd", d_logits, q)
    rows = [x.transpose(0, 2, 1, 3).reshape(b * n, heads * width) for x in (d_q, d_k, d_v)]
    return jnp.concatenate(rows, 1).reshape(b, n, 3, heads, width), None


weighed.defvjp(_weighed, _weighed_gradient)


def flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """jax refuses to differentiate it for an odd number of tokens: one is added, and left out by its length."""
    count, options = q.shape[1], dict[str, Any]()
    if count % 2:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        length = jnp.full(len(q), count, jnp.int32)
        options = {"query_seq_lengths": length, "key_value_seq_lengths": length}
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **options)[:, :count]


def _has_flash() -> bool:
    """NVIDIA's, from Ampere on; the capability of other makers' devices is no number."""
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    return device.platform == "gpu" and capability.replace(".", "").isdigit() and float(capability) >= 8


class Conv(nn.Module):
    """A square convolution with torch's symmetric padding and no bias; kernel [height, width, in, out]."""

    features: int
    size: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", init, shape, jnp.float32)
        return convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """XLA:CPU falls back to a scalar loop, 80 times slower, where the image (or, in the gradient, the result) is
    smaller than the kernel: there, and for 1x1 kernels, it is written as patches and one matrix product."""
    size = kernel.shape[0]
    small = min(x.shape[1], x.shape[2]) // stride < size
    if size == 1 or (small and jax.default_backend() == "cpu"):
        return patch_convolve(x, kernel, stride)
    pad = [(size // 2, size // 2)] * 2
    return lax.conv_general_dilated(x, kernel, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def patch_convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    size, pad = kernel.shape[0], kernel.shape[0] // 2
    if size > 1:
        x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    height, width = ((n - size) // stride * stride + 1 for n in x.shape[1:3])
    shifts = [(i, j) for i in range(size) for j in range(size)]
    patches = jnp.concatenate([x[:, i : i + height : stride, j : j + width : stride] for i, j in shifts], -1)
    return flat_product(patches, kernel.reshape(-1, kernel.shape[-1]))


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """3x3, stride 2, padding 1. The gradient goes by which of the nine was the largest (of equal ones the first), since
    XLA scatters it one number at a time."""
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def _max_pool(x: jax.Array) -> tuple[jax.Array, Half]:
    size = [(n - 1) // 2 * 2 + 1 for n in x.shape[1:3]]
    wide = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    parts = [wide[:, i : i + size[0] : 2, j : j + size[1] : 2] for i in range(3) for j in range(3)]
    best, which = parts[0], jnp.zeros(parts[0].shape, jnp.uint8)
    for k, part in enumerate(parts[1:], 1):
        which, best = jnp.where(part > best, jnp.uint8(k), which), jnp.maximum(best, part)
    return best, (which, jnp.zeros_like(x, shape=(0, *x.shape[1:3])))


def _max_pool_gradient(kept: tuple[jax.Array, jax.Array], slope: jax.Array) -> tuple[jax.Array]:
    which, (height, width) = kept[0], kept[1].shape[1:]
    total: Any = 0.0
    for k in range(9):
        part = jnp.where(which == k, slope, 0).astype(jnp.float32)
        sides = zip(divmod(k, 3), (height, width), which.shape[1:3], strict=True)
        room = [(at, n + 2 - at - (2 * m - 1), 1) for at, n, m in sides]
        total = total + lax.pad(part, jnp.float32(0), [(0, 0, 0), *room, (0, 0, 0)])
    return (total[:, 1:-1, 1:-1].astype(slope.dtype),)


max_pool.defvjp(_max_pool, _max_pool_gradient)


def fold_blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] -> [B, H/size, W/size, size*size*C]: a block of pixels becomes channels, rows before columns."""
    b, h, w, c = x.shape
    if h % size or w % size:
        raise ValueError(f"an image of {h} x {w} px cannot be cut into blocks of {size} px; use a multiple of {size}")
    return x.reshape(b, h // size, size, w // size, size, c).swapaxes(2, 3).reshape(b, h // size, w // size, -1)


class DropPath(nn.Module):
    """Drops whole residual branches, row by row, while training."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or self.rate == 0:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, shape)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


def cubic_weights(old: int, new: int, offset: float = 0.0) -> np.ndarray:
    """[new, old]: torch's bicubic interpolation (a = -0.75, half-pixel centres, clamped edges, no antialiasing), by a
    factor of (new + offset) / old. DINO and HIPT have an offset of 0.1, which moves what is read by up to that many
    cells of `new`: weights that were trained so want the same."""
    a, centre = -0.75, (np.arange(new) + 0.5) * old / (new + offset) - 0.5
    base = np.floor(centre).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        t = np.abs(centre - base - tap)
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
        np.add.at(weights, (np.arange(new), np.clip(base + tap, 0, old - 1)), np.where(t <= 1, near, far))
    return weights


def resize_grid(grid: jax.Array, height: int, width: int, offset: float = 0.0) -> jax.Array:
    """[h, w, D] -> [height, width, D] with torch's bicubic kernel, which `jax.image.resize` (a = -0.5) is not."""
    rows, columns = (cubic_weights(old, new, offset) for old, new in zip(grid.shape, (height, width), strict=False))
    exact = lax.Precision.HIGHEST
    half = jnp.einsum("Hh,hwd->Hwd", rows.astype(np.float32), grid, precision=exact)
    return jnp.einsum("Ww,Hwd->HWd", columns.astype(np.float32), half, precision=exact)
