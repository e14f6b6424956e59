# Everything runs in .venv, which the first command makes: what requirements.lock names, installed by uv, which is fetched
# if it is not on PATH, or by pip if uv is not available. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
BIN := .venv/bin
UV = $(shell PATH="$$PATH:$(CURDIR)/$(BIN)" command -v uv 2>/dev/null)
# two at a time, the tests of a file after one another: most use one core. Real ranks have a thread each
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=12
PARALLEL := -n 2 --dist loadfile
# these start jobs of their own, or measure the clock
ALONE := tests/launching tests/distributed/test_cluster_model.py
# what meets each of the libraries: timm, torch, DeepSpeed, the readers and decoders, MLflow
OLDEST := $(addprefix tests/,test_config.py attacks methods/test_methods.py models/test_families.py models/test_adapter_file.py \
	distributed/test_parity.py data/test_decode.py data/test_shard_stream.py registry/test_champion.py tracking/test_run_plots.py)

.PHONY: demo docs test test-long test-oldest lint lock

demo: .venv/installed-demo
	@$(BIN)/python tools/demo.py

# the API pages, from the docstrings
docs: .venv/installed-docs
	@$(BIN)/python tools/api_pages.py

test: lint
	$(PYTEST) $(PARALLEL)

test-long: .venv/installed-test
	$(PYTEST) -m long $(PARALLEL) $(addprefix --ignore=,$(ALONE))
	$(PYTEST) -m long $(ALONE)

# on the oldest versions that pyproject.toml allows of what the package itself names
test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest --durations=12 $(PARALLEL) $(OLDEST)

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# $(call install,EXTRAS): the package and what it needs, at the versions and hashes of the lock
define install
	@echo "installing into .venv: about a minute on a fast link, 4 by pip; 6 GB with CUDA's libraries" >&2
	@if [ -n "$(UV)" ]; then \
		"$(UV)" pip install --quiet --compile-bytecode --python $(BIN)/python --constraint requirements.lock --editable '.[$(1)]' >&2; \
	else \
		$(BIN)/python -m pip install --quiet --requirement requirements.lock >&2 && \
		$(BIN)/python -m pip install --quiet --no-deps --editable . >&2; \
	fi
	@touch $@
endef

.venv/installed-demo: pyproject.toml requirements.lock | $(BIN)/python
	$(call install,demo)

.venv/installed-docs: pyproject.toml requirements.lock | $(BIN)/python
	$(call install,docs)

.venv/installed-test: pyproject.toml requirements.lock | $(BIN)/python
	$(call install,test)
	@touch .venv/installed-demo .venv/installed-docs

.venv-oldest/installed: pyproject.toml | $(BIN)/python
	@test -n "$(UV)" || { echo "make test-oldest needs uv: https://docs.astral.sh/uv" >&2; exit 1; }
	@UV_VENV_CLEAR=1 "$(UV)" venv --quiet --python 3.11 .venv-oldest >&2
	@"$(UV)" pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct \
		--editable '.[demo,s3]' 'hypothesis>=6.120' 'pytest>=8.3' 'pytest-xdist>=3.6' >&2
	@touch $@

$(BIN)/python:
	@if command -v uv >/dev/null; then \
		UV_VENV_CLEAR=1 uv venv --quiet --seed --python $(PYTHON) .venv >&2; \
	else \
		$(PYTHON) -m venv --clear .venv >&2 && \
		{ $(BIN)/python -m pip install --quiet uv >&2 || echo "uv is not available; installing with pip, which takes longer" >&2; }; \
	fi

# the newest versions of everything, for every platform and Python
lock: .venv/installed-test
	"$(UV)" pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
		--custom-compile-command "make lock" --extra test pyproject.toml --output-file requirements.lock
