# `make demo` and `make test`, and for maintainers `make coverage` and `make release`. Each makes its own virtual environment
# first.
# Other versions need a virtual environment of their own. The newest releases, and the lowest that pyproject.toml names:
#   make test PYTHON=python3.13 VENV=.venv-3.13 CONSTRAINTS=
#   make test VENV=.venv-lowest CONSTRAINTS=lowest.txt
PYTHON := $(shell command -v python3.11 || command -v python3)
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# By environment, so that the constraints reach what building this package installs, too.
export PIP_CONSTRAINT := $(CONSTRAINTS)
export PIP_BUILD_CONSTRAINT := $(CONSTRAINTS)

# The file and its columns that `make demo` integrates; an empty DATA stands for simulated cells.
DATA ?=
BATCH ?= batch
LABELS ?= $(if $(DATA),,cell_type)

# The processes that `make test` shares the tests among, each with one thread. WORKERS=0 uses one process with all
# threads.
WORKERS ?= 2

.PHONY: demo test coverage release

demo: $(VENV)/scores
	mkdir -p demo
	$(if $(DATA),,$(BIN)/scgen simulate -o demo/simulated.h5ad --overwrite)
	$(BIN)/scgen integrate "$(or $(DATA),demo/simulated.h5ad)" -o demo/integrated.h5ad --overwrite \
	  --batch-key "$(BATCH)" $(if $(LABELS),--labels-key "$(LABELS)") --report demo

test: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

coverage: $(VENV)/test
	$(PIP) pytest-cov
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov=scgen --cov-report=term-missing:skip-covered

# What is published for a tag: dist/, of the version that the tag, scgen/__init__.py and CHANGELOG.md all name.
release: $(VENV)/base
	grep -q '^__version__ = "$(TAG:v%=%)"$$' scgen/__init__.py || { echo 'scgen/__init__.py names another version than $(TAG)'; exit 1; }
	grep -q '^## \[$(TAG:v%=%)\]' CHANGELOG.md || { echo 'CHANGELOG.md has no section [$(TAG:v%=%)]'; exit 1; }
	$(PIP) build
	rm -rf dist
	$(BIN)/python -m build

# torch alone first: its wheel is found by its exact version, before anything else can ask for another.
$(VENV)/base: $(CONSTRAINTS) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/scores: $(VENV)/base
	$(PIP) --editable ".[scores]"
	touch $@

$(VENV)/test: $(VENV)/base
	$(PIP) --editable ".[test]"
	touch $@

lowest.txt: pyproject.toml
	sed -n 's/^ *"\([a-z-]*\)>=\([0-9.]*\)",.*/\1==\2/p' $< > $@
