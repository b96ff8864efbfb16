# `make demo` and `make test` need git, make, a C compiler and Python 3.11 with venv; nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes, since each may take a gigabyte. One that is idle takes over half of what the other
# has yet to run, so that few of a file's fixtures are made twice.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all lint types evaluate lock clean

demo: $(INSTALLED)
	$(BIN)/octavo demo

test: $(INSTALLED) lint types
	$(PYTEST) -m "not slow"

test-all: $(INSTALLED)
	$(PYTEST)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

# The bundled model's scores, as its model card states them.
evaluate: $(INSTALLED)
	$(BIN)/python -m training.evaluate

$(INSTALLED): requirements.lock pyproject.toml setup.py $(wildcard native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# The lock holds every package of the development install but octavo itself. `+cpu` is dropped
# since it names a build and not a version.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet torch==2.13.0 'setuptools>=77'
	build/lock/bin/python -m pip install --quiet --editable '.[dev]'
	build/lock/bin/python -m pip freeze --all --exclude-editable --exclude pip \
		| sed 's/+cpu$$//' > requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
