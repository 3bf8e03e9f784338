# Two commands for a user: make demo, make test. Each sets up its own environment (.venv) from requirements.lock.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= $(if $(DATA),out/$(notdir $(patsubst %/,%,$(DATA))),out/demo)
ENTERPRISES ?= 20000

export FLWR_TELEMETRY_ENABLED = 0
export RAY_USAGE_STATS_ENABLED = 0
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint bench clean

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else "Python 3.11 is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# make demo: a generated federation (all relations invented); make demo DATA=folder: real data
demo: $(READY)
ifdef DATA
	$(BIN)/xinyi-sim run $(DATA) --out $(OUT) $(ARGS)
else
	$(BIN)/xinyi-sim demo --enterprises $(ENTERPRISES) --out $(OUT) $(ARGS)
endif

test: lint
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m simulations.benchmarks $(ARGS)

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache
