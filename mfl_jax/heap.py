"""Memory that this process has freed stays its own, and is not asked of the system again and again.

XLA:CPU allocates the scratch memory of a program anew whenever it runs, and glibc maps and unmaps what is large: every
page is then cleared and entered again, which took a fifth of a training step of a ViT, a tenth of the demo's.
"""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # of mallopt(3)
_SETTINGS = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 256 << 20}


def keep() -> bool:
    """False where the C library is not glibc, or the user has told it what to do."""
    if sys.platform != "linux" or any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(what, value) for what, value in _SETTINGS.items())
