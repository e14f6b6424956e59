# Everything runs in .venv, which the first command makes. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
BIN := .venv/bin
# two at a time, the tests of a file after one another: most use one core. Real ranks have a thread each
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=12
PARALLEL := -n 2 --dist loadfile

.PHONY: demo test test-long lint

demo: .venv/installed
	@$(BIN)/python tools/demo.py

test: lint
	$(PYTEST) $(PARALLEL)

test-long: .venv/installed
	$(PYTEST) -m long $(PARALLEL) --ignore tests/launching
	$(PYTEST) -m long tests/launching

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml
	@echo "installing into .venv (2 to 4 minutes)" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]' >&2
	@touch $@
