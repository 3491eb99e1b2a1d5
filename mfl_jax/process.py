"""What a process that computes settles first, before jax is asked for its devices: `mfl` does, and the benchmarks.

Both are of CPUs. XLA runs part of a program on one core, however many there are (half of a convnet's step, a tenth of a
ViT's): a batch spread over a device a core keeps them all at work. It allocates the scratch memory of a program anew
whenever it runs, and glibc maps and unmaps what is large: every page is then cleared and entered again, which took a
fifth of a training step of a ViT, a tenth of the demo's.
"""

import contextlib
import ctypes
import os
import sys

from input_pipeline.cores import available_cores

DEVICES = "JAX_NUM_CPU_DEVICES"  # of the environment, read when jax is imported
OURS = "MFL_NUM_CPU_DEVICES"  # what a process of mfl has said itself: a job on another machine has other cores
MOST_DEVICES = 4  # each holds parameters and optimiser of its own, and waits for the slowest; more cores are shared
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # of mallopt(3)
_SETTINGS = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 256 << 20}


def settle() -> None:
    keep_memory()
    spread()


def spread() -> int:
    """A device of jax a core; 0 where the user has said how many, or jax has found its devices already."""
    said = os.environ.get(DEVICES, "") not in ("", os.environ.get(OURS))
    if said or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return 0
    count = min(available_cores(), MOST_DEVICES)
    if "jax" not in sys.modules:
        os.environ[DEVICES] = os.environ[OURS] = str(count)
        return count
    with contextlib.suppress(RuntimeError):
        sys.modules["jax"].config.update(DEVICES.lower(), count)
        return count
    return 0


def keep_memory() -> bool:
    """Memory that was freed stays this process's own. False where the C library is not glibc, or the user has told it
    what to do."""
    if sys.platform != "linux" or any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(what, value) for what, value in _SETTINGS.items())
