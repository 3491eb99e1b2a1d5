"""A small cohort of phantom slides, drawn once, for the steps that begin with slides."""

import shutil
from pathlib import Path

import pytest

from input_pipeline.phantom import write_cohort

SEED = 1  # two cases, three slides


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """slides.csv of two cases at 768 px with every kind of partner; not to be changed."""
    out = tmp_path_factory.mktemp("phantom")
    return write_cohort(out, cases=2, size=768, seed=SEED, workers=1, progress=False)


@pytest.fixture
def cohort_csv(drawn, tmp_path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(drawn.parent, tmp_path / "cohort")
    return tmp_path / "cohort" / drawn.name
