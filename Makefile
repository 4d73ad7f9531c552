# Each target builds .venv by itself, with uv where it is installed, else with venv and pip.
# A second run installs nothing again; a change of pyproject.toml does.

PYTHON ?= $(shell for each in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$each && break; done)
UV := $(shell command -v uv 2>/dev/null)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-hub check

help:  ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: .venv/.demo  ## Set up, then encode, load and search real text with a real OpenSearch
	$(BIN)/sparse-ingest demo

test: .venv/.test  ## Set up, then run every test that needs no model hub and takes seconds
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not slow and not hub"

test-all: .venv/.test  ## Set up, then run the slow tests too
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not hub"

test-hub: .venv/.test  ## Set up, then check the numbers of the model cards; needs a model hub, downloads 1.5 GB
	$(BIN)/python -m pytest -m hub

check: .venv/.test  ## Set up, then lint, check the format and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.%: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed, and none was found."; exit 1; }
	@test -d .venv/lib || echo "Setting up .venv: torch and its libraries are a download of about 3.0 GB on Linux, once."
ifdef UV
	@test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON) .venv
	$(UV) pip install --python $(BIN)/python -e ".[$*]"
else
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo "$(PYTHON) cannot make a virtual environment: install uv, or python3-venv (apt)."; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[$*]"
endif
	@touch $@
