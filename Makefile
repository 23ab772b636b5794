# Two commands are enough for a newcomer: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
SEED ?= 0

.PHONY: demo test test-all lint bench clean

demo: $(VENV)/.train ## install, train the quickstart recipe, say where the report is
	$(BIN)/exgrpo-fast train quickstart --out $(RUN) --train.seed $(SEED)

test: $(VENV)/.dev ## install the dev extras and run the whole suite
	$(BIN)/pytest

test-all: $(VENV)/.dev ## the suite with the long tests
	$(BIN)/pytest -m "not gpu"

lint: $(VENV)/.dev ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/.dev ## the fused loss against its peers on this machine
	$(BIN)/python bench/loss.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,gym]"
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,gym,dev]"
	touch $@
