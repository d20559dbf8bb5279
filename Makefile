# Two commands: `make run` (the main job) and `make test` (lint, types, import contracts, the whole suite).
# Both set up their own virtual environment and need nothing but Python >= 3.11.

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
REPORT ?= build/report.html
JOBS ?= 2
# Without the marker, pip would repeat the whole resolution on every call.
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

export OMP_NUM_THREADS ?= 1
export PYTHONWARNINGS ?= ignore::ResourceWarning

.PHONY: run test lint types contracts suite docs clean

run: $(VENV)/.run
	$(BIN)/gradwise diagnose digits --with-trial --report $(REPORT)

test: lint types contracts suite docs

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

contracts: $(VENV)/.dev
	$(BIN)/lint-imports

suite: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --cov --cov-report=term:skip-covered

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "gradwise needs Python 3.11 or newer; none was found on PATH (set PYTHON=/path/to/python)."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage*
