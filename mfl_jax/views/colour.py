"""What a view does to the values of an image once its geometry is settled: [h, w, C] float32 in [0, 1], one row.

Each op has a draw, which alone is random, and an apply, which takes what was drawn. An op that is left out by its
probability p draws neutral parameters, so that all rows run the same program.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mfl_jax.views.geometry import Params, Source, between, nothing, uniforms
from mfl_jax.views.spec import Arg, Op, fraction

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])  # Ruifrok: haematoxylin, eosin, DAB
STAINS = (STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)).astype(np.float32)
UNMIX = np.linalg.inv(STAINS.astype(np.float64)).astype(np.float32)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def mix(image: jax.Array, matrix: Any) -> jax.Array:
    """out[..., d] = sum_c image[..., c] matrix[c, d]; as broadcasts: a fourth of the time of a product, on a CPU."""
    rows = jnp.asarray(matrix)
    return image[..., :1] * rows[0] + image[..., 1:2] * rows[1] + image[..., 2:] * rows[2]


def per_channel(value: Any, channels: int) -> np.ndarray:
    values = np.atleast_1d(np.asarray(value, np.float32))
    return np.broadcast_to(values, (channels,)) if len(values) == 1 else values


# --- colour jitter: brightness, contrast, saturation and hue as torchvision defines them


def draw_jitter(source: Source, args: Params, shape: tuple[int, ...]) -> Params:
    u = uniforms(source, 9)
    on = u[0] < args["p"]
    out = {"hue": jnp.where(on, between(u[1], -args["hue"], args["hue"]), 0.0)}
    for i, name in enumerate(("brightness", "contrast", "saturation")):
        out[name] = jnp.where(on, between(u[2 + i], 1 - args[name], 1 + args[name]), 1.0)
    if args["shuffle"]:
        out["order"] = jnp.argsort(u[5:])
    return out


def brightness(image: jax.Array, factor: Any) -> jax.Array:
    return jnp.clip(image * factor, 0.0, 1.0)


def contrast(image: jax.Array, factor: Any) -> jax.Array:
    """Towards or away from the mean grey of the image."""
    grey = jnp.sum(jnp.mean(image, (0, 1)) * LUMA)
    return jnp.clip(image * factor + (1 - factor) * grey, 0.0, 1.0)


def saturation(image: jax.Array, factor: Any) -> jax.Array:
    return jnp.clip(mix(image, factor * jnp.eye(3) + (1 - factor) * LUMA[:, None]), 0.0, 1.0)


def hue(image: jax.Array, shift: Any) -> jax.Array:
    """Turn the hue of HSV by `shift` of a full circle; value and saturation stay."""
    r, g, b = image[..., :1], image[..., 1:2], image[..., 2:]
    value = jnp.maximum(jnp.maximum(r, g), b)  # not a max over channels: a reduction would be computed once a channel
    chroma = value - jnp.minimum(jnp.minimum(r, g), b)
    unit = 1 / jnp.where(chroma > 0, chroma, 1.0)
    sixth = jnp.where(value == r, (g - b) * unit, jnp.where(value == g, 2 + (b - r) * unit, 4 + (r - g) * unit))
    k = jnp.array([5.0, 3.0, 1.0]) + sixth + 6 * shift
    k = k - 6 * jnp.floor(k / 6)
    return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)


JITTER = (("brightness", brightness), ("contrast", contrast), ("saturation", saturation), ("hue", hue))


def jitter(params: Params, image: jax.Array, args: Params) -> jax.Array:
    if "order" not in params:
        for name, function in JITTER:
            if args[name]:
                image = function(image, params[name])
        return image
    for i in range(4):
        choices = [function(image, params[name]) for name, function in JITTER]
        image = jnp.select([params["order"][i] == j for j in range(4)], choices)
    return image


# --- stains


def draw_hed(source: Source, args: Params, shape: tuple[int, ...]) -> Params:
    beta = args["alpha"] if args["beta"] is None else args["beta"]
    u = uniforms(source, 7)
    on = u[0] < args["p"]
    alpha, shift = between(u[1:4], 1 - args["alpha"], 1 + args["alpha"]), between(u[4:], -beta, beta)
    return {"alpha": jnp.where(on, alpha, 1.0), "beta": jnp.where(on, shift, 0.0)}


def hed(params: Params, image: jax.Array, args: Params) -> jax.Array:
    """Stain s becomes alpha_s s + beta_s, in optical density (base 10); (255 I + 1) / 256 keeps black finite."""
    density = -jnp.log((255 * image + 1) / 256)
    turned = jnp.matmul(UNMIX * params["alpha"], STAINS, precision=lax.Precision.HIGHEST)
    shift = math.log(10.0) * jnp.sum(params["beta"][:, None] * STAINS, 0)
    return jnp.clip((256 * jnp.exp(-mix(density, turned) - shift) - 1) / 255, 0.0, 1.0)


def draw_gray(source: Source, args: Params, shape: tuple[int, ...]) -> Params:
    return {"on": uniforms(source, 1)[0] < args["p"]}


def gray(params: Params, image: jax.Array, args: Params) -> jax.Array:
    on = params["on"].astype(jnp.float32)
    return mix(image, (1 - on) * jnp.eye(3) + on * LUMA[:, None])


# --- blur, solarise, noise, cutout


def draw_blur(source: Source, args: Params, shape: tuple[int, ...]) -> Params:
    u = uniforms(source, 2)
    return {"sigma": jnp.where(u[0] < args["p"], between(u[1], args["min"], args["max"]), 0.01)}


def blur_matrix(sigma: Any, size: int, radius: int) -> jax.Array:
    """[size, size] Gaussian of fixed radius, mirrored about the centre of the edge pixels."""
    i = jnp.arange(size)
    weight = lambda d: jnp.where(jnp.abs(d) <= radius, jnp.exp(-0.5 * (d / sigma) ** 2), 0.0)  # noqa: E731
    here, there = i[:, None], i[None, :]
    matrix = weight(here - there) + jnp.where(there > 0, weight(here + there), 0.0)
    matrix = matrix + jnp.where(there < size - 1, weight(2 * (size - 1) - here - there), 0.0)
    return matrix / matrix.sum(1, keepdims=True)


def blur(params: Params, image: jax.Array, args: Params) -> jax.Array:
    height, width, _ = image.shape
    reach = math.ceil(3 * args["max"])
    rows = blur_matrix(params["sigma"], height, min(reach, height - 1))
    columns = blur_matrix(params["sigma"], width, min(reach, width - 1))
    image = jnp.einsum("ij,jwc->iwc", rows, image, precision=lax.Precision.HIGH)
    return jnp.einsum("ij,hjc->hic", columns, image, precision=lax.Precision.HIGH)


def draw_solarise(source: Source, args: Params, shape: tuple[int, ...]) -> Params:
    return {"threshold": jnp.where(uniforms(source, 1)[0] < args["p"], args["threshold"], 2.0)}


def solarise(params: Params, image: jax.Array, args: Params) -> jax.Array:
    return jnp.where(image >= params["threshold"], 1 - image, image)


def draw_noise(source: Source, args: Params, shape: tuple[int, ...]) -> Params:
    std = jnp.where(uniforms(source, 1)[0] < args["p"], args["std"], 0.0)
    return {"noise": std * jax.random.normal(source.key, shape)}


def noise(params: Params, image: jax.Array, args: Params) -> jax.Array:
    return jnp.clip(image + params["noise"], 0.0, 1.0)


def draw_cutout(source: Source, args: Params, shape: tuple[int, ...]) -> Params:
    u = uniforms(source, 3)
    return {"side": jnp.where(u[0] < args["p"], math.sqrt(args["area"]), 0.0), "row": u[1], "column": u[2]}


def cutout(params: Params, image: jax.Array, args: Params) -> jax.Array:
    """A square around a uniform centre, cut off at the border, becomes the mean colour of the image."""
    height, width, _ = image.shape
    near = lambda n, centre: jnp.abs((jnp.arange(n) + 0.5) / n - centre) < params["side"] / 2  # noqa: E731
    hole = near(height, params["row"])[:, None] & near(width, params["column"])[None, :]
    return jnp.where(hole[..., None], image.mean((0, 1)), image)


# --- channels of fluorescence


def draw_gain(source: Source, args: Params, shape: tuple[int, ...]) -> Params:
    u = uniforms(source, 1 + shape[-1])
    return {"gain": jnp.where(u[0] < args["p"], between(u[1:], 1 - args["share"], 1 + args["share"]), 1.0)}


def gain(params: Params, image: jax.Array, args: Params) -> jax.Array:
    return jnp.clip(image * params["gain"], 0.0, 1.0)


def draw_drop(source: Source, args: Params, shape: tuple[int, ...]) -> Params:
    return {"keep": uniforms(source, shape[-1]) >= args["p"]}


def drop(params: Params, image: jax.Array, args: Params) -> jax.Array:
    return jnp.where(params["keep"], image, 0.0)


def only(params: Params, image: jax.Array, args: Params) -> jax.Array:
    """One channel alone. A partner whose other channels show what the H&E shows anyway teaches less with them."""
    channel = int(args["channel"])
    return image[..., channel : channel + 1]


def scale(params: Params, image: jax.Array, args: Params) -> jax.Array:
    """Fixed levels in the image's own units: black becomes 0 and white 1, beyond them all is cut."""
    black, white = (per_channel(args[name], image.shape[-1]) for name in ("black", "white"))
    return jnp.clip((image - black) / (white - black), 0.0, 1.0)


def percentile(params: Params, image: jax.Array, args: Params) -> jax.Array:
    """As scale, by percentiles of each channel of this one view: absolute intensity is lost. Flat channels are 0."""
    low, high = jnp.percentile(image, jnp.array([args["low"], args["high"]]), axis=(0, 1))
    span = high - low
    return jnp.where(span > 0, jnp.clip((image - low) / jnp.where(span > 0, span, 1.0), 0.0, 1.0), 0.0)


def normalise(params: Params, value: jax.Array, args: Params) -> jax.Array:
    return (value - jnp.asarray(args["mean"], jnp.float32)) / jnp.asarray(args["std"], jnp.float32)


def _ordered(values: Params) -> str | None:
    low, high = [name for name in ("min", "max", "low", "high") if name in values]
    if values[low] >= values[high] and not (low == "min" and values[low] == values[high]):
        return f"{low}={values[low]:g} is not below {high}={values[high]:g}"
    return None


def _levels(values: Params) -> str | None:
    black, white = (np.asarray(values[name]) for name in ("black", "white"))
    if black.size > 1 and white.size > 1 and black.size != white.size:
        return f"black names {black.size} channels and white {white.size}"
    return None if np.all(black < white) else "black is not below white"


def _statistics(values: Params) -> str | None:
    if (values["mean"] is None) != (values["std"] is None):
        return "mean and std go together"
    return None


_P = fraction("p", 1.0)
_FOUR = tuple(fraction(name, 0.4) for name in ("brightness", "contrast", "saturation"))
NORMALISE = Op(
    "normalise",
    (Arg("mean", None, 0.0, 1e9, many=True), Arg("std", None, 1e-6, 1e9, many=True)),
    nothing,
    normalise,
    _statistics,
)

COLOUR = {
    "only": Op("scale", (Arg("channel", 0.0, 0.0, 255.0, integer=True),), nothing, only),
    "scale": Op(
        "scale",
        (Arg("white", (65535.0,), 1e-6, 1e9, many=True), Arg("black", (0.0,), 0.0, 1e9, many=True)),
        nothing,
        scale,
        _levels,
    ),
    "percentile": Op(
        "scale", (Arg("high", 99.5, 0.0, 100.0), Arg("low", 0.0, 0.0, 100.0)), nothing, percentile, _ordered
    ),
    "jitter": Op(
        "augment",
        (*_FOUR, Arg("hue", 0.1, 0.0, 0.5), _P, Arg("shuffle", 0.0, 0.0, 1.0, integer=True)),
        draw_jitter,
        jitter,
        channels=3,
    ),
    "hed": Op("augment", (fraction("alpha", 0.05), fraction("beta", None), _P), draw_hed, hed, channels=3),
    "gray": Op("augment", (fraction("p", 0.2),), draw_gray, gray, channels=3),
    "gain": Op("augment", (fraction("share", 0.2), _P), draw_gain, gain),
    "drop": Op("augment", (fraction("p", 0.1),), draw_drop, drop),
    "blur": Op("augment", (Arg("min", 0.1, 0.05, 50.0), Arg("max", 2.0, 0.05, 50.0), _P), draw_blur, blur, _ordered),
    "solarise": Op("augment", (_P, fraction("threshold", 0.5)), draw_solarise, solarise),
    "noise": Op("augment", (fraction("std", 0.02), _P), draw_noise, noise),
    "cutout": Op("augment", (fraction("area", 0.1), _P), draw_cutout, cutout),
    "normalise": NORMALISE,
}
