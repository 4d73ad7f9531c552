# Each target sets up .venv first, with uv if it is installed, otherwise with venv and pip. The versions are those of
# constraints.txt. A second run installs nothing; a change of pyproject.toml or constraints.txt does.

PYTHON ?= $(shell for each in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$each && break; done)
UV := $(shell command -v uv 2>/dev/null)
BIN := .venv/bin
PYTEST := -m pytest -n 2 --dist loadscope --no-loadscope-reorder
FAST := -m "not slow and not hub"

# What each .venv/.NAME installs.
INSTALL_demo := -e ".[demo]"
INSTALL_test := -e ".[aws,demo,ray,remote,serve]" --group test --group docs
INSTALL_bench := -e ".[demo,serve]" --group bench
INSTALL_docs := -e . --group docs
INSTALL_build := --group build

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-hub coverage check fix docs build lock
# pip and uv must not change .venv twice at the same time.
.NOTPARALLEL:

help:  ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: .venv/.demo  ## Encode, load and search real text with a real OpenSearch
	$(BIN)/sparse-ingest demo

test: .venv/.test  ## Run the tests that need no model hub and take seconds
	$(BIN)/python $(PYTEST) $(FAST)

test-all: .venv/.test  ## Run the slow tests too
	$(BIN)/python $(PYTEST) -m "not hub"

test-hub: .venv/.test  ## Compare with the numbers of the model cards; needs a model hub, downloads 1.5 GB
	$(BIN)/python -m pytest -m hub

coverage: .venv/.test  ## Run the tests of `make test` and report the lines and branches that they cover
	$(BIN)/coverage erase
	$(BIN)/coverage run $(PYTEST) $(FAST)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --sort cover

check: .venv/.test  ## Lint; check format, types, spelling, docstrings; build the docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_public_names.py
	$(BIN)/zensical build --strict --clean

fix: .venv/.test  ## Fix what ruff can fix, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.docs  ## Build the documentation site in site/; a warning is an error
	$(BIN)/zensical build --strict --clean

build: .venv/.build  ## Build the wheel and the source distribution in dist/
	rm -rf dist
	$(BIN)/python -m hatchling build

# With uv: one resolution for every supported Python and platform, with the same versions on each where that is possible
# (the newest numpy does not type-check as Python 3.11). It writes no address of a registry.
lock: $(or $(UV),$(BIN)/uv)  ## Write the newest versions that pyproject.toml accepts to constraints.txt
	{ echo "# Exact versions of what make and CI install, for every supported Python. Written by make lock." && \
		$< pip compile --quiet --universal --python $(PYTHON) --python-version 3.11 --fork-strategy fewest \
		--upgrade --no-header --no-annotate --all-extras --group test --group bench --group docs pyproject.toml; } > constraints.new
	mv constraints.new constraints.txt

$(BIN)/uv: | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet uv

.venv/.%: pyproject.toml constraints.txt | $(BIN)/python
	@test -d .venv/lib/python3*/site-packages/torch || test $* = docs || test $* = build || \
		echo "Setting up .venv: torch and its libraries are a download of about 3.0 GB on Linux, once."
ifdef UV
	$(UV) pip install --python $(BIN)/python -c constraints.txt --build-constraint constraints.txt $(INSTALL_$*)
else
	@# pip knows --group since 25.1; the one that comes with Python may be older.
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt --upgrade pip
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --build-constraint constraints.txt $(INSTALL_$*)
endif
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed, and none was found."; exit 1; }
ifdef UV
	$(UV) venv --quiet --python $(PYTHON) .venv
else
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "$(PYTHON) cannot create a virtual environment: install uv, or python3-venv (apt)."; exit 1; }
endif
