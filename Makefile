# Two commands: `make demo` and `make test`. Each makes its own virtual environment first.
PYTHON := $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# By environment, so that the constraints reach what building this package installs, too.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)

# The file and its columns that `make demo` integrates; an empty DATA stands for simulated cells.
DATA ?=
BATCH ?= batch
LABELS ?= $(if $(DATA),,cell_type)

.PHONY: demo test

demo: .venv/scores
	mkdir -p demo
	$(if $(DATA),,$(BIN)/scgen simulate -o demo/simulated.h5ad --overwrite)
	$(BIN)/scgen integrate "$(or $(DATA),demo/simulated.h5ad)" -o demo/integrated.h5ad --overwrite \
	  --batch-key "$(BATCH)" $(if $(LABELS),--labels-key "$(LABELS)") --report demo

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

# torch alone first: its wheel is found by its exact version, before anything else can ask for another.
.venv/base: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

.venv/scores: .venv/base
	$(PIP) --editable ".[scores]"
	touch $@

.venv/test: .venv/base
	$(PIP) --editable ".[test]"
	touch $@
