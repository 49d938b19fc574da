# `make train` and `make test` set everything up in .venv and run; the second time they install nothing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint types clean

train: .venv/runtime.stamp
	$(BIN)/onewarp train --data breeds

test: .venv/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=40 --cov --cov-report=term --cov-fail-under=85

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev.stamp
	$(BIN)/ty check

clean:
	rm -rf .venv

# Some distributions ship venv without pip in it: then the pip outside fills the environment.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is too old: Python 3.11 or newer is wanted. Name one: make train PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv || ($(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip)

.venv/runtime.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/dev.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch .venv/runtime.stamp $@
