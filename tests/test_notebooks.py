"""Every notebook of colab/ runs from the first cell to the last, at its smallest size, and holds no outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
SMALLEST = {'SIZE, CASES = "phantom", 12': 'SIZE, CASES = "tiny", 4'}


def cells(path: Path) -> list[str]:
    found = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in found if cell["outputs"] or cell["execution_count"]] == []
    return ["".join(cell["source"]) for cell in found]


def test_there_are_notebooks_without_outputs():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        for number, code in enumerate(cells(path)):
            compile(code, f"{path.name}, cell {number}", "exec")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    code = "\n".join(cells(path))
    for usual, smallest in SMALLEST.items():
        assert code.count(usual) == 1
        code = code.replace(usual, smallest)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=900)
    assert (tmp_path / "more_from_less" / "eval" / "report.html").stat().st_size > 20_000
