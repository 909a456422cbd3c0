# Every target sets itself up: a virtual environment in .venv, from pyproject.toml. Needs Python >= 3.11 and make.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo pds-demo test test-slow lint format clean

demo: .venv/plot
	$(BIN)/python -m lab.demo

pds-demo: .venv/pds
	$(BIN)/python -m lab.pds_demo

test: .venv/dev
	$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: .venv/dev
	$(BIN)/python -m pytest -m slow

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/python:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python >= 3.11 is needed, this is " + sys.version'
	$(PYTHON) -m venv .venv
	@touch $@

# .venv/dev, .venv/plot, ...: the core's packages and those of one extra
.venv/%: .venv/python pyproject.toml .ci/install.py
	$(BIN)/python .ci/install.py $*
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
