# make demo   sets a fresh machine up and runs the main job on the embedded digits
# make test   sets a fresh machine up and passes the tests
PYTHON ?= python3
BIN := .venv/bin
# Tests take one core each.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all bench soak fuzz docs check clean

demo: .venv/app
	$(BIN)/robust-app train

test: .venv/dev
	$(PYTEST)

test-all: .venv/dev
	$(PYTEST) -m ""

bench: .venv/dev
	$(BIN)/python -m tests.benchmarks

soak: .venv/dev
	$(BIN)/python -m tests.soak

fuzz: .venv/dev
	$(BIN)/python -m tests.fuzz

docs: .venv/dev
	$(BIN)/mkdocs build --strict --config-file .mkdocs.yml

check: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf .venv site .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/pip:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "pip>=25.1"  # the first that knows dependency groups
	touch $@

.venv/app: .venv/pip pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[app]"
	touch $@

.venv/dev: .venv/pip pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[app]" --group dev
	touch $@
