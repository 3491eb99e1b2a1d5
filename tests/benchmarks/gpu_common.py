"""What both sides of bench_gpu.py share: the sizes, the count of operations, the clock, what a row is called."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

GIB, CHANNELS = 2**30, {"he": 3, "if": 4}
FULL = {"px": 224, "stored": 256, "widths": (8192, 8192, 8192), "calls": 5, "tiles": 49_152}
TINY = {"px": 32, "stored": 40, "widths": (16, 16), "calls": 1, "tiles": 64}
RESNETS = {"resnet26": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}
VITS = {"vit_ti16": (192, 12, 3), "vit_s16": (384, 12, 6), "vit_b16": (768, 12, 12)}  # features, blocks, heads
ENCODERS = (*RESNETS, *VITS)
ROUNDS = 3
Row = dict[str, Any]
Phases = Iterator[Row | None]  # made ready, compiled, and then the row: the parent says when each may begin


@dataclass(frozen=True)
class Job:
    """'ours:resnet50:256:views': who, what, how many, and words."""

    who: str
    what: str
    size: int
    words: frozenset[str]

    @staticmethod
    def parse(text: str) -> "Job":
        who, what, size, *words = text.split(":")
        return Job(who, what, int(size), frozenset(words))

    @property
    def name(self) -> str:
        return ":".join([self.who, self.what, str(self.size), *sorted(self.words)])


def flops(model: str, px: int, widths: tuple[int, ...], channels: int) -> int:
    """Of one image through encoder and projector, forward and backward; nothing asks for the gradient of the pixels."""
    first, rest, dim = products(model, px, channels)
    rest += sum(a * b for a, b in zip((dim, *widths), widths, strict=False))
    return 4 * first + 6 * rest


def products(model: str, px: int, channels: int) -> tuple[int, int, int]:
    """Multiply-adds of the first layer and of the others, and the features."""
    return (resnet_products if model in RESNETS else vit_products)(model, px, channels)


def resnet_products(model: str, px: int, channels: int) -> tuple[int, int, int]:
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


def allowed(reached: str) -> None:
    """Tells the parent how far we are, and waits until it says go on: nothing else runs while one measures."""
    print(f"READY {reached}", flush=True)
    if not sys.stdin.readline():
        raise SystemExit("the parent is gone")


def timed(run: Callable[[], None], wait: Callable[[], None], calls: int) -> Row:
    """Milliseconds a call: the median of rounds of calls that follow each other without a wait, and the best round."""
    for _ in range(3):
        run()
    wait()
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        rounds.append(1e3 * (time.perf_counter() - start) / calls)
    return {"ms": statistics.median(rounds), "ms_best": min(rounds), "calls": ROUNDS * calls}
