"""A script as one process or several of one run, as tests of preemption, of death and of several hosts start them."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def start(script: str, arguments: Sequence[Any], count: int, **more: str) -> list[subprocess.Popen]:
    """`more` goes into the environment. Several processes find each other at a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command, processes = [sys.executable, "-c", script, *map(str, arguments)], []
    for index in range(count):
        many = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        environment = os.environ | {"JAX_PLATFORMS": "cpu"} | more | (many if count > 1 else {})
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, **pipes))
    return processes


def completed(script: str, arguments: Sequence[Any], count: int, **more: str) -> list[str]:
    """The last line of each; all of them end well."""
    processes = start(script, arguments, count, **more)
    try:
        told = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * count, [errors[-2000:] for _, errors in told]
    return [out.strip().splitlines()[-1] for out, _ in told]
