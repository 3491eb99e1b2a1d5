"""How long a phantom pair of 4096 x 4096 px takes on one core, drawn and written.

There is no peer that draws paired slides with known truth; the yardstick is the task's limit of 20 s of processor time.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from input_pipeline.phantom.cohort import plan, write_slide

LIMIT = 20.0


def measure(partners: tuple[str, ...], size: int) -> tuple[float, float, float]:
    """(processor seconds, seconds on the clock, MB written)."""
    job = plan(1, 0, size=size, mpp=0.5, tissue="mixed", partners=partners, he_format="svs")[0]
    with tempfile.TemporaryDirectory() as folder:
        processor, clock = time.process_time(), time.perf_counter()
        write_slide(Path(folder), job)
        spent = time.process_time() - processor, time.perf_counter() - clock
        return *spent, sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    print(f"{'files of one slide':28s} {'cpu s':>7s} {'wall s':>7s} {'MB':>7s} {'of limit':>9s}")
    for partners in ((), ("if",), ("if", "ihc", "nuclei", "counts")):
        processor, clock, size = np.median([measure(partners, options.size) for _ in range(options.repeats)], axis=0)
        limit = LIMIT * (options.size / 4096) ** 2
        name = " + ".join(("he", *partners))
        print(f"{name:28s} {processor:7.1f} {clock:7.1f} {size:7.1f} {processor / limit:9.2f}")


if __name__ == "__main__":
    main()
