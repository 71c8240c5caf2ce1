# make PYTHON=/path/to/python picks the interpreter; make setup EXTRAS=test,cuda13 adds the GPU build of JAX.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LINTERS := $(VENV)/.linters-installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
EXTRAS ?= test
# Arguments for pytest: make test ARGS="tests/test_hf_config.py -x"
ARGS ?=

# Each candidate has to run and to say its version: a pyenv shim may exist and fail.
CANDIDATES := python3.13 python3.12 python3 python $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.1[2-9]*/bin/python
ASK_VERSION := import sys, venv, ensurepip; print("%d%02d" % sys.version_info[:2])

# Python keeps what it compiled, or each of the many programs that tests start would compile all of JAX once more.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo notebooks test test-all lint format clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
		printf '  make %-9s %s\n' "$$name" "$$text"; \
	done

setup: $(INSTALLED) ## make .venv with the package and everything its tests need

demo: $(INSTALLED) ## train and run a tiny model, and show what its cache does
	$(BIN)/nosa demo

notebooks: $(INSTALLED) ## make the .ipynb of experiments/notebooks from their scripts
	$(BIN)/python -m experiments.notebooks.convert

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED) ## run the tests but for slow ones (ARGS="..." goes to pytest)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(INSTALLED) ## run all tests
	$(PYTEST) $(ARGS)

lint: $(LINTERS) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(LINTERS) ## bring the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build leftovers; .venv stays
	rm -rf $${XDG_CACHE_HOME:-$$HOME/.cache}/nosa-jax/tests
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	@if ! $(BIN)/python -c '$(ASK_VERSION)' >/dev/null 2>&1; then \
		for python in $(PYTHON) $(CANDIDATES); do \
			version=$$("$$python" -c '$(ASK_VERSION)' 2>/dev/null) || continue; \
			if [ "$$version" -ge 312 ]; then found=$$python; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "No Python >= 3.12 with venv found among $(PYTHON) python3.13, python3.12, python3, python and the versions of pyenv." >&2; \
			echo "Install one (pyenv install 3.12, or apt install python3.12-venv) or run: make PYTHON=/path/to/python" >&2; \
			exit 1; \
		fi; \
		echo "Making $(VENV) with $$found"; \
		"$$found" -m venv --clear $(VENV); \
	fi
	$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@

$(LINTERS): $(INSTALLED)
	$(PIP) --editable '.[lint]'
	@touch $@
