"""Freed memory that is kept costs no page faults when it is used again."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, sys
from mfl_jax import heap
kept = heap.keep() if "keep" in sys.argv else None
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (64 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([kept, max(faults[2:])]))
"""


def run(*arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES" and not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean | environment)
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_what_was_freed_is_used_again_without_a_page_fault():
    kept, faults = run("keep")
    if not kept:
        pytest.skip("the C library is not glibc")
    assert faults < 100
    assert run()[1] > 5000


def test_who_tells_the_allocator_what_to_do_is_left_alone():
    assert run("keep", MALLOC_ARENA_MAX="2")[0] is False
