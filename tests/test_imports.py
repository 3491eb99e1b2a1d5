"""The rooms know only what design allows them to know; read from the source, and from what an import really loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(path: Path, *, lazy: bool = True) -> set[str]:
    """Top level names that a file imports; lazy=False leaves out imports inside functions."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if not lazy and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name.split(".")[0] for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.level == 0 and child.module:
                found.add(child.module.split(".")[0])
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def sources(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


@pytest.mark.parametrize("path", sources("input_pipeline"), ids=lambda p: str(p.relative_to(ROOT)))
def test_input_pipeline_knows_no_accelerator_code(path):
    assert not imported(path) & {"jax", "jaxlib", "flax", "optax", "orbax", "mfl_jax", "torch"}


@pytest.mark.parametrize("path", sources("mfl_jax"), ids=lambda p: str(p.relative_to(ROOT)))
def test_mfl_jax_knows_no_tensorflow(path):
    assert not imported(path) & {"tensorflow", "tensorflow_datasets", "torch"}


@pytest.mark.parametrize("path", sources("mfl_jax"), ids=lambda p: str(p.relative_to(ROOT)))
def test_flax_and_orbax_have_one_home_each(path):
    parts = path.relative_to(ROOT / "mfl_jax").parts
    if parts[0] != "models":
        assert "flax" not in imported(path)
    if parts != ("checkpoint.py",):
        assert "orbax" not in imported(path)


@pytest.mark.parametrize("path", sources("input_pipeline"), ids=lambda p: str(p.relative_to(ROOT)))
def test_tensorflow_is_imported_inside_functions_only(path):
    assert not imported(path, lazy=False) & {"tensorflow", "tensorflow_datasets"}


def test_the_command_line_starts_without_heavy_imports():
    code = "import sys, mfl_jax.cli; print(sorted({'jax', 'tensorflow', 'scipy', 'SimpleITK'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_a_process_that_reads_tiles_starts_without_jax():
    code = "import sys, input_pipeline.crew, input_pipeline.stream, mfl_jax.slides; print('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "False"
