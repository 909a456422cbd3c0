# Every target sets itself up: a virtual environment in .venv, from requirements*.txt. Needs Python >= 3.11 and make.
PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test test-slow lint format clean

demo: .venv/plot
	$(BIN)/python -m lab.demo

test: .venv/dev
	$(BIN)/python -m pytest -m "not slow"

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

.venv/core: .venv/python requirements.txt
	$(PIP) -r requirements.txt
	@touch $@

.venv/plot: .venv/core requirements-plot.txt
	$(PIP) -r requirements-plot.txt
	@touch $@

.venv/dev: .venv/core requirements-plot.txt requirements-pds.txt requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
