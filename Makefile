# Everything runs in .venv, which the first command makes. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-long lint

demo: .venv/installed
	@$(BIN)/python tools/demo.py

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-long: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml
	@echo "installing into .venv (2 to 4 minutes)" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]' >&2
	@touch $@
