# A fresh machine with Python 3.11+ and make needs no more than `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow quality style clean

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(READY)

demo: $(READY)  ## cut out a photo, offline
	$(BIN)/python scripts/demo.py

test: $(READY) quality  ## lint and the default test suite
	$(BIN)/python -m pytest

test-slow: $(READY)  ## everything, also what takes minutes
	$(BIN)/python -m pytest -m "slow or not slow"

quality: $(READY)  ## ruff, without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(READY)  ## ruff, fixing
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist src/*.egg-info demo_output
