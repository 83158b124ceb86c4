# Two commands: `make site` reads the course in a browser, `make test` checks everything. Both make .venv if it is missing.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
SCALE ?= quick
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= agg
export PIP_DISABLE_PIP_VERSION_CHECK := 1
STAMP := $(VENV)/.installed

.PHONY: site test lab export format clean-notebooks keep smoke test-lowest bench install check notebooks pytest help
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(STAMP)  ## make .venv with the tested versions
$(STAMP): settings.ini constraints.txt setup.py
	@echo "== installing into $(VENV) (once; again only when settings.ini or constraints.txt change)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# pip 23, which Python 3.11 brings, needs a quarter of an hour to find the versions; 25 half a minute
	@$(BIN)/python -m pip install -q -U 'pip>=25' 2> >(grep -vE '^WARNING: Location' >&2) || echo "pip stays as it is: this takes longer"
	@$(BIN)/pip install -q -c constraints.txt -e '.[all,docs,dev]' 2> >(grep -vE '^WARNING: Location' >&2) || { echo "install failed: see the lines above"; exit 1; }
	@touch $@

site: $(STAMP)  ## build the docs site to _site/ (SERVE=1 serves it)
	@$(BIN)/python tests/check_repo.py --write
	@$(BIN)/diffkit site $(if $(SERVE),--serve)

lab: $(STAMP)  ## open JupyterLab
	@$(BIN)/jupyter lab nbs

export: $(STAMP)  ## notebooks -> package, front page -> README.md, folds
	@$(BIN)/python tests/check_repo.py --write

format: $(STAMP)  ## notebooks, tests and tools in one form
	@$(BIN)/ruff format --quiet .

clean-notebooks: $(STAMP)  ## strip what changes from run to run
	@$(BIN)/nbdev_clean

check: $(STAMP)  # export in sync, notebooks clean, style
	@echo "== package and notebooks agree"
	@$(BIN)/python tests/check_repo.py
	@echo "== style"
	@$(BIN)/ruff check --quiet . || { echo "ruff found the problems above"; exit 1; }
	@$(BIN)/ruff format --quiet --check . || { echo "run make format"; exit 1; }

notebooks: $(STAMP)
	@echo "== notebooks, top to bottom, at scale $(SCALE): what has not run as it stands, and a third of the rest$(if $(ALL),; here all)"
	@$(BIN)/diffkit run --scale $(SCALE) --jobs $(JOBS) $(if $(ALL),,--changed)

pytest: $(STAMP)
	@echo "== tests"
	@$(if $(ALL),DIFFKIT_ALL=1 )$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(if $(ALL),,--changed) || { s=$$?; [ $$s = 5 ]; }

test: check notebooks pytest  ## everything that a change can touch: sync, style, notebooks, tests (ALL=1: all tests)

keep: $(STAMP)  ## run notebooks that were changed at both sizes; outputs and records of the runs go into the checkout
	@$(BIN)/diffkit run --changed --keep --jobs $(JOBS)
	@$(BIN)/nbdev_clean
	@$(BIN)/python tests/check_repo.py --write
	@$(BIN)/diffkit run --changed --keep --scale smoke --jobs $(JOBS)

smoke: $(STAMP)  ## every notebook at the sizes of a GPU, two steps of everything
	@$(BIN)/diffkit run --scale smoke --jobs $(JOBS)

test-lowest: settings.ini  ## the tests on the lowest versions that settings.ini promises, in a virtual environment of its own
	@$(PYTHON) tests/lowest.py

bench: $(STAMP)  ## install the peers and run the benchmarks notebook (on a quiet machine)
	@$(BIN)/pip install -q -c constraints.txt -e '.[bench]' 2> >(grep -vE '^WARNING: Location' >&2)
	@$(BIN)/pip install -q -c constraints.txt --no-deps 'k-diffusion>=0.1.1' 2> >(grep -vE '^WARNING: Location' >&2)
	@$(BIN)/diffkit run benchmarks --jobs 1
