# Everything runs in one virtual environment, which ci/install.sh makes and keeps up to date.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo bench test unit lint coverage simulate faults fuzz soak fleet parity gpu-kit clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## Make or update the virtual environment (VENV=dir, default .venv)
	@VENV=$(VENV) ci/install.sh

demo: install ## Three real sglang servers on this machine's CPU, compared (options: ARGS="--help")
	@$(PYTHON) -m sglang_mm_conn demo $(ARGS)

bench: install ## Measure this connector beside sglang's own transports (options: ARGS="--quick", ARGS="--help")
	@$(PYTHON) -m sglang_mm_conn bench $(ARGS)

test: lint coverage ## Lint, types, and all tests, those with real sglang servers too
	@$(PYTHON) -m pytest -q --ignore=tests/core

unit: install ## All tests that need no sglang server
	@$(PYTHON) -m pytest -q -m "not servers"

lint: install ## ruff (rules and format) and mypy
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

coverage: install ## The tests of core/, and a floor for the branches of it that they take
	@$(PYTHON) -m coverage run -m pytest -q tests/core
	@$(PYTHON) -m coverage report

simulate: install ## Play 100,000 simulated schedules with faults (options: ARGS="--help")
	@$(PYTHON) -m tests.simulator $(ARGS)

faults: install ## Kill, freeze, restart and cut off real processes at every step (options: ARGS="--help")
	@$(PYTHON) -m tests.faults $(ARGS)

fuzz: install ## Random and mutated frames at real processes, beside healthy traffic (options: ARGS="--help")
	@$(PYTHON) -m tests.fuzz $(ARGS)

soak: install ## 100,000 rooms through a pool that is short, with aborts: minutes (options: ARGS="--help")
	@$(PYTHON) -m tests.soak $(ARGS)

fleet: install ## Whole sglang servers whose encoders end, freeze, lie or are slow: an hour (options: ARGS="--help")
	@$(PYTHON) -m tests.fleet $(ARGS)

parity: install ## Forms of requests, asked of a colocated sglang and of encoders and a language server (ARGS="--help")
	@$(PYTHON) -m tests.parity $(ARGS)

gpu-kit: install ## Collect what ci/gpu.sh needs on a machine with a GPU and no network (docs/gpu.md)
	@$(PYTHON) ci/gpu/kit.py $(ARGS)

clean: ## Remove what builds, tests and the demo leave behind (the environment stays)
	@rm -rf build dist .coverage .pytest_cache .hypothesis .mypy_cache .ruff_cache
	@rm -rf ci/cpu_bed/build
	@find . -name .git -prune -o -path './$(VENV)' -prune -o -name __pycache__ -type d -prune \
		-exec rm -rf {} +
