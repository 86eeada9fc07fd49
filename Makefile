# Whetstone: everything a person runs, from a fresh checkout with Python 3.11 and make.
#   make demo [SERVE=1] [JSON=FILE]   a whole study, live, in a few minutes
#   make test [T=tests/unit]          the tests, or some of them
#   make soak [SEED=n]                a thousand random schedules, outages of 0, 20 and 60 s (an hour; CONTRIBUTING.md)
#   make install                      only the virtual environment, in .venv
#   make bench [JSON=bench.json]      how fast, how much a minute learns, how well it searches (two hours on two cores)
#   make lint | make format           what must hold before anything lands | let ruff tidy up
# Each does its own set-up. PYTHON=python3.12 picks a Python, TORCH_INDEX_URL=https://... an index of torch builds.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := torch==2.13.0
T ?= tests

.DEFAULT_GOAL := help
.PHONY: help install demo test soak bench lint format

help:
	@sed -n '1,8s/^# \{0,1\}//p' Makefile

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (about a minute the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Whetstone needs Python 3.11 or newer; set PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq $(TORCH) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
	@$(PIP) install -qq --constraint constraints.txt --editable '.[all]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) install -qq --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(VENV)/.installed  ## the virtual environment

demo: $(VENV)/.installed
	@$(BIN)/whetstone demo $(if $(JSON),--json $(JSON)) $(if $(SERVE),--serve)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(T)

soak: $(VENV)/.installed-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak $(if $(SEED),--seed $(SEED)) \
		$(if $(SCHEDULES),--schedules $(SCHEDULES)) $(if $(ONLY),--only $(ONLY)) $(if $(OUTAGES),--outages $(OUTAGES))

bench: $(VENV)/.installed
	@$(BIN)/python -m benchmarks.every --json $(or $(JSON),bench.json) $(B)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
