# Needs Python 3.11 to 3.13 (with its venv module), git, make and a C compiler; everything else comes from the
# Python package index into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := requirements.lock requirements-vision.lock pyproject.toml setup.py $(wildcard src/wanda/kernels/*.[ch])

.PHONY: demo test lint format install clean

demo: $(READY)  ## prune a real model by magnitude and by Wanda, and compare
	$(BIN)/wanda demo

test: $(READY)  ## the test suite
	$(BIN)/python -m pytest

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(READY)  ## the environment alone

$(READY): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "make: $$($(PYTHON) --version 2>&1) will not do, 3.11 to 3.13 will: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "make: this Python has no venv module; on Debian: apt install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/vision \
	  -r requirements-vision.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(READY)

clean:  ## remove the environment and what was built
	rm -rf $(VENV) build dist src/*.egg-info src/wanda/kernels/*.so
