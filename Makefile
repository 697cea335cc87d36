# Every target sets up .venv: once, and again when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready

.PHONY: setup demo claims test fast faults lint docs clean

# Python keeps its bytecode, also where a container's environment forbids it: without, each process
# that runs tests rewrites all of their assertions, which takes ten seconds.
export PYTHONDONTWRITEBYTECODE :=

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("sslrun needs Python 3.11 or newer; name one: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $(STAMP)

demo: setup
	$(BIN)/sslrun sweep recipes/quickstart.yaml

claims: setup
	$(BIN)/sslrun claims -o claims.md

# One process per core, at most eight; each computes on one thread.
WORKERS := -n auto --maxprocesses 8 --dist worksteal

test: setup
	$(BIN)/python -m pytest $(WORKERS)

fast: setup
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

# Kills, damaged files, failing machines and mutated recipes, for about an hour of two cores:
# make faults FAULTS='--only kills --cases 50 --seed 7'
faults: setup
	$(BIN)/python tests/faults/run.py $(FAULTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

DOCS := .venv/.docs

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $(DOCS)

# Pages are generated from the package. A warning, such as a broken link, is an error.
docs: $(DOCS)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs
	@echo build/docs/index.html

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache
