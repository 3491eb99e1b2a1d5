"""The README is run as it stands: every sh block, then every python block, in one empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 10
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    shell, python = blocks("sh"), blocks("python")
    assert len(shell) >= 2
    assert python
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    for script in shell:
        subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=environment, check=True, timeout=900)
    for code in python:
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=300)
    assert (tmp_path / "batch.png").stat().st_size > 10_000
    assert (tmp_path / "pairs.png").stat().st_size > 10_000
