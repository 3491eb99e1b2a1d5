# Each target makes its own environment from nothing: Python 3.11 or newer with pip is all it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo

.PHONY: demo test test-slow lint bench clean

demo: $(VENV)/.core
	$(BIN)/mfl demo --out $(DEMO)

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m "slow" -n 2 --dist loadfile

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	for script in tests/benchmarks/bench_*.py; do echo "== $$script"; PYTHONPATH=. $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"mfl_jax needs Python 3.11 or newer; {sys.executable} is {v[0]}.{v[1]}. Name a newer one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# pip would compile all of tensorflow, which takes longer than to load the rest: what the demo imports is enough.
IMPORTS := flax.linen, imagecodecs, ml_collections, optax, orbax.checkpoint, scipy.ndimage, scipy.optimize, tifffile, tqdm

# An extra is installed over what is there; a stamp is older than setup.cfg when the requirements have changed.
$(VENV)/.core: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -e .
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -c "import $(IMPORTS)"
	touch $@

$(VENV)/.test: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@ $(VENV)/.core

$(VENV)/.bench: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,bench]'
	touch $@ $(VENV)/.core $(VENV)/.test
