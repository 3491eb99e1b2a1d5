"""Fixtures that several test modules share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.pop("JAX_NUM_CPU_DEVICES", None)  # tests say themselves how many there are

DATA = Path(os.environ.get("MFL_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """real_data('slides/x.svs') is that file of the folder of real data, or skips the test where it is absent."""

    def find(name: str) -> Path:
        path = DATA / name
        if not path.exists():
            pytest.skip(f"needs real data: {name} is not in {DATA} (name the folder in MFL_DATA)")
        return path

    return find
