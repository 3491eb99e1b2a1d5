"""How many cores this process may use; apart from what uses them, as every start of `mfl` asks."""

import os


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
