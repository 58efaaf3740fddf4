# `make prune` and `make test` work on a fresh machine that has Python >= 3.10 with venv, make and a C++ compiler.
# Another interpreter: `make prune PYTHON=python3.12`. What is installed already is not installed again.

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
INSTALLED := $(VENV)/installed
# Which tests `make test` runs; all of them: `make test MARKERS=`.
MARKERS ?= not slow and not browser
# More options for pytest: `make test PYTEST="-x -k gates"`.
PYTEST ?=
# Processes that test files are shared among, one thread each; what a failing test prints is shown at its end.
WORKERS ?= 2
TESTING := OMP_NUM_THREADS=1 pytest --numprocesses $(WORKERS) --dist loadfile
# How much of it: `make chaos CHAOS="--kills 10 --outages 5 --seed 1"`.
CHAOS ?=

.PHONY: help prune sweep test check lint unit fuzz chaos bench demo-model install

help:
	@echo "make prune       install, then prune the embedded demo model"
	@echo "make sweep       install, then compare methods on the demo model: tables, and build/comparison.html"
	@echo "make test        install, then run the tests"
	@echo "make check       install, then format, lint, types and unit tests"
	@echo "make fuzz        install, then 180,000 cases of wrong text in files and options"
	@echo "make chaos       install, then kill jobs, stop the tracking server, run many jobs at once: a table, an hour"
	@echo "make bench       install, then measure into benchmarks/results.json"
	@echo "make demo-model  install, then train the demo model from scratch into build/demo-model"

prune: $(INSTALLED)
	PATH="$(BIN):$$PATH" deepspeed launchers/prune.py --ds ds_configs/zero3.json

sweep: $(INSTALLED)
	PATH="$(BIN):$$PATH" deepspeed launchers/prune.py --ds ds_configs/zero3.json --config experiments/demo.yaml
	mkdir -p build
	PATH="$(BIN):$$PATH" tsp compare demo-sweep --report build/comparison.html

test: $(INSTALLED)
	PATH="$(BIN):$$PATH" $(TESTING) -m "$(MARKERS)" $(PYTEST)

check: lint unit

lint: $(INSTALLED)
	PATH="$(BIN):$$PATH" ruff format --check .
	PATH="$(BIN):$$PATH" ruff check .
	PATH="$(BIN):$$PATH" mypy

unit: $(INSTALLED)
	PATH="$(BIN):$$PATH" $(TESTING) -m "not slow and not multiproc and not browser" tests/unit tests/policy $(PYTEST)

fuzz: $(INSTALLED)
	PATH="$(BIN):$$PATH" pytest --hypothesis-profile=fuzz --hypothesis-show-statistics tests/contract/test_fuzz.py

chaos: $(INSTALLED)
	PATH="$(BIN):$$PATH" python -m tests.chaos $(CHAOS)

bench: $(INSTALLED)
	PATH="$(BIN):$$PATH" python benchmarks/run.py

demo-model: $(INSTALLED)
	PATH="$(BIN):$$PATH" tsp demo train --output build/demo-model

install: $(INSTALLED)

# torch comes first, alone: deepspeed is built from source and looks at it.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed: make PYTHON=python3.11 ...")'
	@test -x "$(BIN)/pip" || $(PYTHON) -m venv --clear $(VENV) || { \
		echo "$(PYTHON) cannot make a virtual environment (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || { \
		echo "a C++ compiler is needed (Debian, Ubuntu: apt-get install g++)" >&2; exit 1; }
	"$(BIN)/python" -m pip install --quiet -c constraints.txt torch
	"$(BIN)/python" -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@
