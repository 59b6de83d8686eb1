# `make` lists the targets. A target installs its dependencies into $(VENV) the first time it runs.
#
# Variables:
#   PYTHON=python3.12       Python interpreter that creates the environment
#   VENV=.venv              folder of the environment
#   CONSTRAINTS=            install the newest allowed releases instead of those in constraints.txt
#   JOBS=2                  number of test processes, each with one thread; 0 runs the tests in one process
#   ABUSE=40                mutations of each input in `make test-abuse`
#   ARGS="-k timestep -x"   more arguments for pytest

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((n < 8 ? n : 8)))
ABUSE ?= 40
ARGS ?=

BIN := $(VENV)/bin
# -qq shows errors only.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
# Distribute tests by work stealing, because their durations differ widely.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
BENCHMARKS := $(sort $(wildcard benchmarks/bench_*.py))

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-long test-zoo test-abuse test-paths test-arm test-web web lint audit format bench docs clean distclean
.SECONDARY:
.DELETE_ON_ERROR:

help:
	@echo "make demo        train a small 1-bit super-resolution model, compare it with bicubic, write demo-output/"
	@echo "make test        run the tests, except for those of test-long, test-zoo and most of test-abuse"
	@echo "make test-fast   run the tests that are not marked slow"
	@echo "make test-long   train the demo, kill and launch runs, compile networks and Triton kernels"
	@echo "make test-zoo    take networks of many families through a conversion's life"
	@echo "make test-abuse  try all bad inputs and faults of tests/abuse, of which 'make test' has a sample"
	@echo "make test-paths  run the numeric tests with the code that other x86 processors run"
	@echo "make test-arm    run the kernel and packing tests on an emulated 64-bit ARM processor (Debian only)"
	@echo "make web         build the page of 'binarize web' (needs Node)"
	@echo "make test-web    build the page and test it in the Chromium of the system"
	@echo "make lint        ruff check, ruff format --check, mypy, the import rules and bandit"
	@echo "make audit       compare the installed packages with published vulnerabilities, where PyPI can be reached"
	@echo "make format      fix and format the code with ruff"
	@echo "make bench       run the benchmarks"
	@echo "make docs        build the documentation into site/"
	@echo "make clean       remove all generated files except the environment"
	@echo "make distclean   remove the environment too"

demo: $(VENV)/.installed-all
	$(BIN)/binarize demo --force

test: $(VENV)/.installed-test
	$(PYTEST) -m "not long and not zoo and not web" $(ARGS)

test-fast: $(VENV)/.installed-test
	$(PYTEST) -m "not slow and not long and not zoo and not web" $(ARGS)

test-long: $(VENV)/.installed-test
	$(PYTEST) -m long $(ARGS)

test-zoo: $(VENV)/.installed-test
	$(PYTEST) -m zoo $(ARGS)

test-abuse: $(VENV)/.installed-test
	BINARIZE_ABUSE=$(ABUSE) $(PYTEST) tests/abuse $(ARGS)

test-paths: $(VENV)/.installed-test
	$(BIN)/python tools/test_paths.py --jobs $(JOBS) $(ARGS)

test-arm:
	tools/test_arm.sh $(ARGS)

web: $(VENV)/.installed-test
	cd web && npm ci --no-audit --no-fund && npm run build
	$(BIN)/python -m binarize.web

# One process: tests of the page share a browser.
test-web: web $(VENV)/.installed-browser
	$(BIN)/python -m pytest tests/web -m web $(ARGS)

# mypy needs the test dependencies: it reads the types of these libraries.
lint: $(VENV)/.installed-test $(VENV)/.installed-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/bandit -q -c pyproject.toml -r binarize models recipes

audit: $(VENV)/.installed-test $(VENV)/.installed-lint
	$(BIN)/python tools/audit.py

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed-test $(VENV)/.installed-bench
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site demo-output *.egg-info .arm .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./.venv*" -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: '$(PYTHON)' was not found. Install Python 3.10 or newer, or name one: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: binarize needs Python 3.10 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "make: '$(PYTHON) -m venv' failed. On Debian and Ubuntu, install it first: sudo apt install python3-venv" >&2; \
	  exit 1; }
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(VENV)/.created
	@echo "installing binarize[$*] into $(VENV) (takes minutes on a slow connection, because PyTorch is large)"
	@$(INSTALL) --editable '.[$*]'
	@touch $@
