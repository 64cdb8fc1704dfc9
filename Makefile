# `make up` runs the product, `make test` proves it; everything else is below. The environment is .venv.
SHELL := /bin/bash
PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest
# Test processes side by side, each with a Postgres and a Redis of its own; one of them waits for schedules at first.
JOBS ?= $(shell echo $$(($$(nproc) + 1)))
# Types are checked where they are a promise; tests are run instead.
PACKAGES := warehouse control cloudoptim_pipelines dashboards migrations
STAMP := .venv/.installed
# A process that starts from compiled bytecode starts in 3 s of CPU instead of 7; tests start hundreds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help up install test lint format lock browser acceptance real-input soak storm crash bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

up: install ## start everything (installs first when needed)
	@exec .venv/bin/cloudoptim up $(ARGS)

install: $(STAMP) ## make .venv from requirements.lock, hashes checked

$(STAMP): requirements.lock pyproject.toml deploy/install
	@deploy/install
	@touch $@

test: install browser ## the default lane, without the marked long ones
	$(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Much of it waits for the product's own clocks: two of its modules at a time.
acceptance: install ## the whole product on real input, figures printed
	$(PYTEST) -m acceptance -n 2 --dist loadfile -rP $(ARGS)

real-input: install ## nine months of real Spot prices: ingest, gaps, cost and savings, figures printed
	$(PYTHON) -W ignore -m tests.acceptance.real_input --data "$${CLOUDOPTIM_SHARED_DATA:-../shared/data}"

soak: install ## long-running
	$(PYTEST) -m soak $(ARGS)

storm: install ## load
	$(PYTEST) -m storm $(ARGS)

crash: install ## kill -9 at every point
	$(PYTEST) -m crash $(ARGS)

# One of them with its options: make bench BENCH=lake ARGS="--rows 1000000"
BENCH ?= $(patsubst tests/benchmarks/bench_%.py,%,$(wildcard tests/benchmarks/bench_*.py))
bench: install ## speed figures beside a peer, one after the other
	@set -e; for name in $(BENCH); do echo "== $$name"; $(PYTHON) -m tests.benchmarks.bench_$$name $(ARGS); done

lint: install ## format, lint, types, layering
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy $(PACKAGES)
	.venv/bin/lint-imports

format: install ## rewrite to the house's format
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

browser: ## Chromium for browser tests: installed as root where missing, otherwise they say why they skip
	@deploy/browser

lock: ## resolve pyproject.toml anew into requirements.lock
	.venv/bin/uv pip compile --universal --python-version 3.11 --generate-hashes --all-extras --upgrade \
		--no-annotate --no-header --no-emit-index-url -q pyproject.toml -o requirements.lock

clean: ## remove the environment and caches; data in CLOUDOPTIM_HOME stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
