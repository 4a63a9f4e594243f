PYTHON ?= python3
PIP_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP = $(BIN)/python -m pip --disable-pip-version-check --no-input install -qq -c constraints.txt $(PIP_ARGS)
LOWEST := .venv-lowest
PIP_LOWEST = $(LOWEST)/bin/python -m pip --disable-pip-version-check --no-input install -qq -c constraints-lowest.txt $(PIP_ARGS)
CORE := $(addprefix tests/kernels/test_,layout.py dispatch.py sample_token.py linear_logprob.py) \
    $(addprefix tests/quietstar/test_,model.py rollout.py golden.py drop_in.py architectures.py generate.py checkpoint.py cli.py)
CPP := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.cuh)

# On a busy machine OpenMP threads that spin while they wait make small operations tens of times slower.
demo test test-all test-lowest: export OMP_WAIT_POLICY ?= PASSIVE

# Most tests keep one core busy: a process for each, but not so many that memory runs out.
SPREAD := -q -n logical --maxprocesses=4 --dist=worksteal

.PHONY: help setup demo test test-all test-lowest lint bench gpu clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'
	@echo
	@echo "PYTHON=python3.12   the interpreter .venv is made from, 3.10 or newer"
	@echo "PIP_ARGS=\"...\"      more arguments for pip install, such as an index that has torch builds for CPU only"

setup: $(READY)  ## make .venv with everything; quick when nothing changed

# No build isolation, which fetches a torch of its own for a build that needs one; so what builds comes first.
$(READY): setup.py pyproject.toml constraints.txt Makefile
	@echo "Setting up $(VENV): some minutes the first time."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	        echo "Python 3.10 or newer is needed, and $(PYTHON) is not: name one with PYTHON=..." >&2; exit 1; }; \
	    $(PYTHON) -m venv --clear $(VENV); }
	@$(PIP) setuptools wheel torch
	@$(PIP) --no-build-isolation -e '.[train,dev]'
	@touch $@

demo: $(READY)  ## digit sums, where thinking helps, then the English that ships with Python
	$(BIN)/python examples/digit_sums.py --quick
	$(BIN)/python examples/english.py

test: $(READY)  ## the tests, without the slow ones
	$(BIN)/pytest $(SPREAD) -m "not slow"

test-all: $(READY) test-lowest  ## all tests
	$(BIN)/pytest $(SPREAD)

test-lowest: $(LOWEST)/.ready  ## core tests with the oldest versions of what the package needs
	$(LOWEST)/bin/pytest -q -p no:cacheprovider -m "not slow" -k "not triton or golden" $(CORE)

$(LOWEST)/.ready: setup.py pyproject.toml constraints-lowest.txt
	@echo "Setting up $(LOWEST), the oldest versions: some minutes the first time."
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	@$(PIP_LOWEST) setuptools wheel torch
	@$(PIP_LOWEST) --no-build-isolation -e '.[train]' pytest
	@touch $@

lint: $(READY)  ## ruff, mypy, clang-format
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(if $(CPP),$(BIN)/clang-format --dry-run --Werror $(CPP))

bench: $(READY)  ## benchmarks of this machine against what people use without this package; under five minutes
	$(BIN)/python benchmarks/run.py

# A machine with a GPU often has a PyTorch of its own and no .venv: then its python3 runs, and nothing is installed.
gpu:  ## tests, sanitizers and benchmarks of a GPU, with a page to paste into an issue; under eight minutes
	$(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py

clean:  ## remove build outputs and caches; .venv and .venv-lowest stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -prune -exec rm -rf {} +
