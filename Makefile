# Everything runs in .venv, which `make install` creates from nothing but python3.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Further arguments: make test ARGS="tests/test_hub.py -k stub", make quickstart ARGS="--steps 40"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install test test-lowest lint format docs claims quickstart clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(INSTALLED) ## create .venv with the package (editable) and every extra

# torch and torchvision are chosen together, and first: resolved later, they could be moved to versions that do not match.
$(INSTALLED): setup.py pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf_attn needs Python 3.11 or later; set PYTHON, as in: make install PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install torch==2.14.1 torchvision==0.29.1
	$(BIN)/python -m pip install -e '.[test]'
	@touch $@

test: $(INSTALLED) ## run the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

# The lowest version of transformers that setup.py allows, beside the newest in .venv; what can tell them apart is run.
LOWEST := 5.23.0
test-lowest: $(INSTALLED) ## run the tests of registration, Hub, generation and goldens on the lowest supported transformers
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/lowest transformers==$(LOWEST)
	PYTHONPATH=$(CURDIR)/$(VENV)/lowest OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/test_registration.py tests/test_hub.py tests/goldens tests/attention tests/modeling/echo_att tests/modeling/landmark tests/modeling/sigmoid_attention $(ARGS)

lint: $(INSTALLED) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## apply style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## write what README.md and docs/ take from the catalogue and from results, and build the site into build/site
	$(BIN)/python scripts/make_docs.py

claims: $(INSTALLED) ## measure again what the papers claim, up to four hours, into outputs/claims; store: ARGS=--store
	OMP_NUM_THREADS=1 $(BIN)/hf-attn claim --all $(ARGS)

quickstart: $(INSTALLED) ## train a small HAT that beats bicubic enlargement, two minutes, into outputs/quickstart
	$(BIN)/hf-attn quickstart --output outputs/quickstart $(ARGS)

clean: ## remove .venv and what the tools leave behind
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
