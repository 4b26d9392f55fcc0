# `make` prints the targets. Every target sets up .venv first, so on a fresh machine with Python >= 3.11, make and a
# C++ compiler one command does it all.

.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCHMARKS := preprocess plan_scale train_step networks

.PHONY: help setup lock fmt lint check test test-slow fuzz kill-storm kill-training demo science bench docs clean

help: ## print this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(STAMP) ## make .venv with everything in requirements.lock and the project (several GB of CUDA wheels)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python >= 3.11 is needed: install it, or say make PYTHON=python3.12 setup" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.9"
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --require-hashes -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $(STAMP)

lock: $(STAMP) ## resolve pyproject.toml into requirements.lock (UPGRADE=--upgrade takes newer versions)
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
	  --no-annotate --no-header --no-emit-index-url $(UPGRADE) -o requirements.lock

fmt: $(STAMP) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix --quiet . || true

lint: $(STAMP) ## ruff and pyright
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

check: lint ## lint and the policy tests
	$(BIN)/python -m pytest -q tests/policy

test: $(STAMP) ## the tests, at most 15 minutes on 2 cores
	$(BIN)/python -m pytest

test-slow: $(STAMP) ## the remaining kills, servers, browsers and end-to-end runs, at most 45 minutes and 15 GiB of disk
	$(BIN)/python -m pytest --durations=20 -m "(slow or browser) and not gpu and not weights"

fuzz: $(STAMP) ## 10,000 mutated media files through preprocess: no crash, no hang, no lost clip
	$(BIN)/python -m tests.fuzz.media --files 10000 --seed 0

kill-storm: $(STAMP) ## preprocess under random SIGKILLs; prints its digest beside a quiet run's
	$(BIN)/python -m tests.faults.kill_storm

kill-training: $(STAMP) ## a training of two workers under 50 random SIGKILLs; its weights beside a quiet run's
	$(BIN)/python -m tests.faults.kill_training

demo: $(STAMP) ## the whole line on a synthetic world, into runs/demo
	$(BIN)/python jobs/demo.py --out runs/demo

science: $(STAMP) ## the controlled study of preference rounds, into runs/science: hours; goes on where it was
	$(BIN)/python jobs/science.py --out runs/science

bench: $(STAMP) ## every benchmark, each prints a table
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name; done

docs: $(STAMP) ## regenerate docs/datasets.md from the contracts
	$(BIN)/python -m pipelines.data.contract_docs docs/datasets.md

clean: ## remove caches; leaves .venv and runs
	rm -rf .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
