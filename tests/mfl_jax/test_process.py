"""What a process settles: a device of jax a core, and freed memory that costs no page faults when it is used again."""

import json
import os
import subprocess
import sys

import pytest

FREED = """
import json, resource, sys
from mfl_jax import process
kept = process.keep_memory() if "keep" in sys.argv else None
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (64 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([kept, max(faults[2:])]))
"""


DEVICES = """
import json, os, sys
if "late" in sys.argv:
    import jax
if "too_late" in sys.argv:
    import jax; jax.devices()
from mfl_jax import process
process.available_cores = lambda: int(sys.argv[1])
said = process.spread()
import jax
print(json.dumps([said, jax.device_count()]))
"""
SAID = ("GLIBC_TUNABLES", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "MFL_NUM_CPU_DEVICES")


def run(script, *arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in SAID and not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=clean | {"JAX_PLATFORMS": "cpu"} | environment
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("when", ["early", "late"])
def test_there_is_a_device_for_each_core(when):
    assert run(DEVICES, "3", when) == [3, 3]


def test_there_are_no_more_than_four():
    assert run(DEVICES, "64") == [4, 4]


def test_who_says_how_many_devices_there_are_is_left_alone():
    assert run(DEVICES, "3", JAX_NUM_CPU_DEVICES="2") == [0, 2]
    assert run(DEVICES, "3", XLA_FLAGS="--xla_force_host_platform_device_count=2") == [0, 2]
    assert run(DEVICES, "3", "too_late") == [0, 1]


def test_what_mfl_has_said_on_another_machine_does_not_bind_this_one():
    assert run(DEVICES, "3", JAX_NUM_CPU_DEVICES="2", MFL_NUM_CPU_DEVICES="2") == [3, 3]
    assert run(DEVICES, "3", JAX_NUM_CPU_DEVICES="1", MFL_NUM_CPU_DEVICES="2") == [0, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_what_was_freed_is_used_again_without_a_page_fault():
    kept, faults = run(FREED, "keep")
    if not kept:
        pytest.skip("the C library is not glibc")
    assert faults < 100
    assert run(FREED)[1] > 5000


def test_who_tells_the_allocator_what_to_do_is_left_alone():
    assert run(FREED, "keep", MALLOC_ARENA_MAX="2")[0] is False
