# make test | test-fast | demo | bench | docs | gpu | lint | clean; `make help` explains.
PYTHON ?= python3
VENV ?= .venv
GPU_PYTHON ?= python3
ARGS ?=

BIN := $(VENV)/bin
# One process a processor. Tests that share something costly stay together, and what takes long comes first (tests/conftest.py).
# Of ARGS, -n 0 is one process, in which a debugger works.
pytest = $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadscope --no-loadscope-reorder
install = $(BIN)/python -m pip install -c constraints.txt -e ".[$(1)]"

.DELETE_ON_ERROR:
.PHONY: help test test-fast lint demo bench docs gpu clean

help:
	@echo "make test    ruff, mypy and pytest, in $(VENV) (made on first use; PYTHON=... chooses the interpreter)"
	@echo "make test-fast    pytest without what is marked slow: something of every module, in a tenth of the time"
	@echo "make lint    ruff (checks and format) and mypy only"
	@echo "make demo    python -m fused_losses demo, in $(VENV); no GPU needed"
	@echo "make bench   python -m bench: ours beside every peer that runs here, tables and pictures in bench/out; under ten minutes"
	@echo "make docs    the documentation as a site, in site/; needs no network once it is installed"
	@echo "make gpu     bench/gpu.py with \$$(GPU_PYTHON), which has torch and triton already; installs nothing"
	@echo "make clean   remove $(VENV), build products and caches"
	@echo "ARGS=... is passed on: to pytest (--seed 3 draws other numbers), the demo, the benchmark or bench/gpu.py"

test: lint
	$(pytest) $(ARGS)

test-fast: $(VENV)/.dev
	$(pytest) -m "not slow" $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

demo: $(VENV)/.demo
	$(BIN)/python -m fused_losses demo $(ARGS)

bench: $(VENV)/.bench
	env -u PYTHONPATH $(BIN)/python -m bench --grid quick --limit 540 $(ARGS)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

gpu:
	env -u PYTHONPATH $(GPU_PYTHON) bench/gpu.py $(ARGS)

# An old pip will do if it cannot be upgraded.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	-$(BIN)/python -m pip install --quiet --upgrade pip

# dev includes demo, bench and docs; after an edit of the metadata each is installed again by the target that needs it.
$(VENV)/.dev: setup.py pyproject.toml constraints.txt | $(BIN)/python
	$(call install,dev)
	touch $(VENV)/.demo $(VENV)/.bench $(VENV)/.docs $@

$(VENV)/.demo: setup.py pyproject.toml constraints.txt | $(BIN)/python
	$(call install,demo)
	touch $@

$(VENV)/.bench: setup.py pyproject.toml constraints.txt | $(BIN)/python
	$(call install,bench)
	touch $@

$(VENV)/.docs: setup.py pyproject.toml constraints.txt | $(BIN)/python
	$(call install,docs)
	touch $@

clean:
	rm -rf $(VENV) .bench_cache bench/out site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
