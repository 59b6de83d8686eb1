# `make` lists the targets. Each installs what it needs into $(VENV) the first time; after that it starts at once.
#
#   PYTHON=python3.12       the interpreter that creates the environment
#   VENV=.venv              where the environment is
#   CONSTRAINTS=            install the newest releases that pyproject.toml admits, instead of the tested ones
#   JOBS=2                  processes that run the tests, of one thread each; 0 for the tests in make's own, with two
#   ARGS="-k timestep -x"   more arguments for pytest

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((n < 8 ? n : 8)))
ARGS ?=

BIN := $(VENV)/bin
# -qq hides pip's progress and notices and still shows its errors.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
# Long tests are not together: who has finished takes from who has not.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
BENCHMARKS := $(sort $(wildcard benchmarks/bench_*.py))

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint format bench docs clean distclean
.SECONDARY:
.DELETE_ON_ERROR:

help:
	@echo "make demo       train a small 1-bit super-resolution model, compare it with bicubic, write demo-output/"
	@echo "make test       run every test"
	@echo "make test-fast  run the tests that are not marked slow"
	@echo "make lint       ruff check, ruff format --check and mypy"
	@echo "make format     let ruff fix and format what it can"
	@echo "make bench      run the benchmarks"
	@echo "make docs       build the documentation into site/"
	@echo "make clean      remove what the targets above wrote, but not the environment"
	@echo "make distclean  remove the environment too"

demo: $(VENV)/.installed-all
	$(BIN)/binarize demo --force

test: $(VENV)/.installed-test
	$(PYTEST) $(ARGS)

test-fast: $(VENV)/.installed-test
	$(PYTEST) -m "not slow" $(ARGS)

# With the test dependencies, so that mypy sees the same libraries everywhere.
lint: $(VENV)/.installed-test $(VENV)/.installed-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed-test
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site demo-output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./.venv*" -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: there is no '$(PYTHON)' here; install Python 3.10 or newer, or name one: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: binarize needs Python 3.10 or newer and '$(PYTHON)' is $$($(PYTHON) --version 2>&1);" \
	       "name another one: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu it is a package of its own:" \
	       "sudo apt install python3-venv" >&2; \
	  exit 1; }
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(VENV)/.created
	@echo "installing binarize[$*] into $(VENV), once (PyTorch is large: this takes minutes on a slow line)"
	@$(INSTALL) --editable '.[$*]'
	@touch $@
