"""Views a second on this machine, by op: ours inside jit against a loop over images in Pillow, scikit-image and numpy.

The peer is what a data loader's worker would run on one core for each image; ours may use all cores, as it does in
training, and its time includes drawing the parameters. Same sizes, same values of the parameters, same run.

    python tests/benchmarks/bench_views.py [--seconds 1] [--ops hed,jitter]
"""

import argparse
import time

import jax
import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage
from skimage import color

from mfl_jax.views import parse


def geometry(image: np.ndarray, size: int) -> np.ndarray:
    """Crop, flip and free rotation as one affine map in Pillow."""
    side = image.shape[0]
    zoom, c, s = 0.9 * side / size, np.cos(0.2), np.sin(0.2)
    a, b = -zoom * c, -zoom * s
    shift = side / 2 - (a + b) * size / 2, side / 2 - (-b + a) * size / 2
    matrix = (a, b, shift[0], -b, a, shift[1])
    return np.asarray(
        Image.fromarray(image).transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    )


def jitter(image: np.ndarray, size: int) -> np.ndarray:
    picture = resized(image, size)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhance(picture).enhance(1.2)
    h, s, v = picture.convert("HSV").split()
    h = Image.fromarray(np.asarray(h) + np.uint8(12))
    return np.asarray(Image.merge("HSV", (h, s, v)).convert("RGB"))


def hed(image: np.ndarray, size: int) -> np.ndarray:
    return color.hed2rgb(color.rgb2hed(np.asarray(resized(image, size))) * 1.03 + 0.01)


def blur(image: np.ndarray, size: int) -> np.ndarray:
    return ndimage.gaussian_filter(np.asarray(resized(image, size), np.float32), (1.0, 1.0, 0), radius=(6, 6, 0))


def resized(image: np.ndarray, size: int) -> Image.Image:
    return Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)


def noise(image: np.ndarray, size: int) -> np.ndarray:
    value = np.asarray(resized(image, size), np.float32) / 255
    return np.clip(value + np.float32(0.02) * np.random.default_rng(0).standard_normal(value.shape, np.float32), 0, 1)


def everything(image: np.ndarray, size: int) -> np.ndarray:
    image = geometry(image, size)
    image = (np.clip(hed(image, size), 0, 1) * 255).astype(np.uint8)
    return (blur(jitter(image, size), size) / 255 - 0.5) / 0.25


CASES = {
    "resize": ("centre", lambda image, size: np.asarray(resized(image, size))),
    "crop|flip|rot90|rotate": ("crop(.6,1)|flip|rot90|rotate(20)", geometry),
    "jitter": ("centre|jitter", jitter),
    "hed": ("centre|hed", hed),
    "gray": ("centre|gray(1)", lambda image, size: np.asarray(resized(image, size).convert("L").convert("RGB"))),
    "blur": ("centre|blur(.1,2)", blur),
    "solarise": ("centre|solarise", lambda image, size: np.asarray(ImageOps.solarize(resized(image, size)))),
    "noise": ("centre|noise", noise),
    "geometry|hed|jitter|blur|normalise": ("crop(.6,1)|flip|rot90|rotate(20)|hed|jitter|blur|normalise", everything),
}


def rate(function, count: int, seconds: float) -> float:
    """Calls' examples a second, the best of several rounds."""
    best, end = 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        function()
        now = time.perf_counter()
        best = max(best, count / (now - start))
        if now > end:
            return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    parser.add_argument("--ops", default="", help="some of the rows, by the words in them, joined by commas")
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, {jax.device_count()} device, jax {jax.__version__}")
    print(f"{'view':36s} {'px':>9s} {'ours/s':>9s} {'peer/s':>9s} {'ratio':>6s} {'compile s':>9s}")
    rng, key = np.random.default_rng(0), jax.random.key(0)
    for stored, size, batch in ((64, 64, 256), (256, 224, 32)):
        images = rng.integers(0, 256, (batch, stored, stored, 3), np.uint8)
        on_device = jax.device_put(images)
        for name, (spec, peer) in CASES.items():
            if args.ops and not any(word in name for word in args.ops.split(",")):
                continue
            start = time.perf_counter()
            program = jax.jit(parse(spec, size=size)).lower(key, on_device).compile()
            compiled = time.perf_counter() - start
            ours = rate(lambda p=program, x=on_device: jax.block_until_ready(p(key, x)), batch, args.seconds)
            few = images[:8]
            theirs = rate(lambda f=peer, x=few, n=size: [f(image, n) for image in x], len(few), args.seconds)
            print(
                f"{name:36s} {stored:4d}>{size:4d} {ours:9.0f} {theirs:9.0f} {ours / theirs:6.1f} {compiled:9.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
