"""What both sides of bench_gpu.py share: the sizes, the count of operations, the clock."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

GIB, CHANNELS = 2**30, {"he": 3, "if": 4}
FULL = {"px": 224, "stored": 256, "widths": (8192, 8192, 8192), "models": ("resnet50", "vit_s16"), "seconds": 3.0}
TINY = {"px": 32, "stored": 40, "widths": (16, 16), "models": ("resnet26", "vit_ti16"), "seconds": 0.05}
RESNETS = {"resnet26": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}
VITS = {"vit_ti16": (192, 12, 3), "vit_s16": (384, 12, 6)}  # features, blocks, heads
Row = dict[str, Any]


def flops(model: str, px: int, widths: tuple[int, ...], channels: int) -> int:
    """Of one image through encoder and projector, forward and backward; nothing asks for the gradient of the pixels."""
    first, rest, dim = (resnet_products if model in RESNETS else vit_products)(model, px, channels)
    rest += sum(a * b for a, b in zip((dim, *widths), widths, strict=False))
    return 4 * first + 6 * rest


def resnet_products(model: str, px: int, channels: int) -> tuple[int, int, int]:
    """Multiply-adds of the first layer and of the others, and the features."""
    side = math.ceil(px / 2)
    first, rest, last, side = side**2 * 49 * channels * 64, 0, 64, math.ceil(side / 2)
    for stage, count in enumerate(RESNETS[model]):
        wide = 64 * 2**stage
        for i in range(count):
            before, side = side, math.ceil(side / 2) if stage and not i else side
            rest += before**2 * last * wide + side**2 * (9 * wide * wide + wide * 4 * wide)
            rest += side**2 * last * 4 * wide if not i else 0
            last = 4 * wide
    return first, rest, last


def vit_products(model: str, px: int, channels: int) -> tuple[int, int, int]:
    wide, blocks, _ = VITS[model]
    patches = (px // 16) ** 2
    tokens = patches + 1
    return patches * 256 * channels * wide, blocks * (tokens * 12 * wide**2 + 2 * tokens**2 * wide), wide


def at(what: str) -> None:
    """Tells the parent what is being done, for the row of a process that it has to stop."""
    print(f"AT {what}", flush=True)


def timed(run: Callable[[], None], wait: Callable[[], None], seconds: float) -> dict[str, float]:
    """Milliseconds a call: the median of rounds of calls that follow each other without a wait, and the best round."""
    for _ in range(2):
        run()
    wait()
    start = time.perf_counter()
    run()
    wait()
    count = max(1, min(100, round(seconds / 5 / (time.perf_counter() - start))))
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count):
            run()
        wait()
        rounds.append(1e3 * (time.perf_counter() - start) / count)
    return {"ms": statistics.median(rounds), "ms_best": min(rounds), "calls": 5 * count}
