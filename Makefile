# PYTHON chooses the interpreter of a new environment, for example `make venv PYTHON=python3.12`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
WORKERS ?= auto

.PHONY: venv demo test slow lint format capabilities atlas compatibility clean

venv: $(STAMP)

# torch goes first, alone, by its exact pin: what is installed later then takes it as it is.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tunewise needs Python 3.11 or newer; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/tunewise demo

test: lint
	$(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 4

slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What the conformance suite finds each method to be able to do; minutes, for compiling takes part.
capabilities: $(STAMP)
	$(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 4 -m "slow or not slow" tests/conformance \
		--capabilities benchmarks/results/capabilities.json

atlas: $(STAMP)
	$(BIN)/python docs/make_atlas.py

# Which forms of deltas stand together on one backbone, tried pair by pair.
compatibility: $(STAMP)
	$(BIN)/python docs/make_compatibility.py

clean:
	rm -rf $(VENV) build dist *.egg-info
