# labkeeper: `make run` to see it, `make test` to prove it. Everything lives in .venv; nothing is installed elsewhere.
VENV ?= .venv
BIN = $(VENV)/bin
export PYTHONDONTWRITEBYTECODE =

.DEFAULT_GOAL := help
.PHONY: help setup run test bench lint format docs lock clean

help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## Make the environment in .venv
	@scripts/setup $(VENV)

run: setup ## Start a keeper and a first server, and print its link; Ctrl-C stops all
	@scripts/run $(BIN)

test: setup ## Run the whole suite
	@scripts/test $(BIN)

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

lock: setup ## Renew requirements/dev.lock (needs uv)
	uv pip compile --quiet pyproject.toml --extra lab --group dev --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-emit-find-links --no-annotate --no-header --upgrade -o requirements/dev.lock

clean: ## Remove the environment and all that was built
	rm -rf $(VENV) build dist docs/_build .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
