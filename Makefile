# labkeeper: `make run` to see it, `make test` to prove it. Everything lives in .venv; nothing is installed elsewhere.
# PYTHON=python3.13 chooses another interpreter, which has an environment of its own.
VENV ?= .venv$(if $(PYTHON),-$(notdir $(PYTHON)))
BIN = $(VENV)/bin
export PYTHONDONTWRITEBYTECODE =

.DEFAULT_GOAL := help
.PHONY: help setup run test test-all test-docker soak bench lint format docs lock clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## Make the environment in .venv
	@scripts/setup $(VENV)

run: setup ## Start a keeper and a first server, and print its link; Ctrl-C stops all
	@scripts/run $(BIN)

test: setup ## Prove the main promises, in a few minutes
	@scripts/test $(BIN) quick

test-all: setup ## Run everything but containers, with the coverage bars (best as root, on Debian)
	@scripts/test $(BIN) all

soak: setup ## Run the long tests at length: CHAOS_ROUNDS, WRONG_TOKENS, CYCLES, FUZZ_SECONDS
	@scripts/test $(BIN) soak

test-docker: setup ## Build the images, and prove them on a Docker Engine (ENGINE=own: start one, as root on Debian)
	@scripts/test-docker $(BIN)

bench: setup ## Compare with jupyter lab and JupyterHub, in about half an hour (BENCH=--quick for a look)
	$(BIN)/python bench $(BENCH)

lint: setup ## Check style, types, the direction of imports, and spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: setup ## Put the code into its form
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

docs: setup ## Build the documentation into docs/_build
	$(BIN)/sphinx-build --fail-on-warning --quiet docs docs/_build

lock: setup ## Renew the lists of hashed requirements (needs uv)
	@scripts/lock --upgrade

clean: ## Remove the environment and all that was built
	rm -rf .venv .venv-* build dist docs/_build .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
