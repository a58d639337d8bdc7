# Everything is installed into .venv, and nowhere else.
# PYTHON=python3.13 uses another interpreter, in an environment of its own.
VENV ?= .venv$(if $(PYTHON),-$(notdir $(PYTHON)))
BIN = $(VENV)/bin
export PYTHONDONTWRITEBYTECODE =

.DEFAULT_GOAL := help
.PHONY: help setup run test test-all test-docker soak bench lint format docs screenshots lock clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## Create the environment in .venv
	@scripts/setup $(VENV)

run: setup ## Start a keeper and a first server, and print its link; Ctrl-C stops all
	@scripts/run $(BIN)

test: setup ## Run the tests of the main promises, in about three minutes
	@scripts/test $(BIN) quick

test-all: setup ## Run every test except those of containers, with coverage (best as root, on Debian)
	@scripts/test $(BIN) all

soak: setup ## Run the soak tests for long: CHAOS_ROUNDS, WRONG_TOKENS, CYCLES, FUZZ_SECONDS
	@scripts/test $(BIN) soak

test-docker: setup ## Build the images, and test them on a Docker Engine (ENGINE=own: start one, as root on Debian)
	@scripts/test-docker $(BIN)

bench: setup ## Compare with jupyter lab and JupyterHub, in about an hour (BENCH=--quick: a quick look)
	$(BIN)/python bench $(BENCH)

lint: setup ## Check style, types, import contracts and spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: setup ## Format the code
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

docs: setup ## Build the documentation into docs/_build
	$(BIN)/sphinx-build --fail-on-warning --quiet docs docs/_build

screenshots: setup ## Take the pictures in docs/images anew (needs Chromium)
	$(BIN)/python scripts/take-screenshots

lock: setup ## Update the hashed requirements (needs uv)
	@scripts/lock --upgrade

clean: ## Remove the environments and everything that was built
	rm -rf .venv .venv-* build dist docs/_build .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
