# Two commands for everyone: `make demo` and `make test`. Each sets up .venv by itself; a second run is quick.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_VERSION ?= 2.13.0
# Where to find CPU builds of torch, if pip does not find them by itself: make test TORCH_INDEX=<URL of the index>
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
READY := $(VENV)/.ready

.PHONY: help demo test lint format types check kernels kernels-oldest versions bench bench-routes doctor wheel sdist clean \
        gpu gpu-install gpu-test gpu-sanitize gpu-bench

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

NATIVE := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h csrc/*.cuh)

$(READY): constraints.txt pyproject.toml setup.py $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fusedprompt needs Python >= 3.10; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first, and its CPU build where pip can find one: whatever asks for torch later finds it installed.
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) 'torch==$(TORCH_VERSION)+cpu' 2>/dev/null \
	  || $(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) 'torch==$(TORCH_VERSION)'
	$(PIP) setuptools wheel ninja
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

demo: $(READY)  ## P-tune a small language model on real words, from nothing, in under 4 minutes
	$(BIN)/python -m fusedprompt demo $(ARGS)

test: $(READY)  ## run all tests
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)  ## check types
	$(BIN)/mypy

check: test lint types  ## all of CI

kernels: $(READY)  ## compile every Triton kernel for every chip, without a GPU, and tabulate the result
	$(BIN)/python -m benches.compile_table --write docs/kernels-compiled.md

OLDEST_TRITON := build/triton-3.6.0
kernels-oldest: $(READY)  ## the same with the oldest Triton that is supported
	test -d $(OLDEST_TRITON) || $(BIN)/python -m pip install -q --no-deps --target $(OLDEST_TRITON) triton==3.6.0
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m benches.compile_table

# The oldest PEFT and transformers that `apply` takes, beside the newest, which `make test` runs. transformers brings no
# torch along; PEFT would, so it comes alone.
OLDEST_PEFT := build/peft-0.17.0-transformers-4.57.1
versions: $(READY)  ## run the tests of `apply` with the oldest PEFT and transformers
	test -d $(OLDEST_PEFT)/peft || { $(BIN)/python -m pip install -q --target $(OLDEST_PEFT) transformers==4.57.1 \
	  && $(BIN)/python -m pip install -q --no-deps --target $(OLDEST_PEFT) peft==0.17.0; }
	PYTHONPATH=$(OLDEST_PEFT) $(BIN)/python -m pytest -q tests/test_apply_patch.py tests/test_apply_results.py \
	  tests/test_apply_training.py $(ARGS)

bench: $(READY)  ## measure ops and training steps against PEFT on this machine, in about 7 minutes
	$(BIN)/python -m pytest benches --ignore=benches/test_bench_shared.py --ignore=benches/test_bench_mixed.py -q \
	  --benchmark-quiet \
	  --benchmark-json=.benchmarks/latest.json $(ARGS)
	$(BIN)/python -m benches.report .benchmarks/latest.json --save

bench-routes: $(READY)  ## measure the shared route against PEFT and LoRA, in about 20 minutes
	$(BIN)/python -m pytest benches/test_bench_shared.py benches/test_bench_mixed.py -q --benchmark-quiet \
	  --benchmark-json=.benchmarks/routes.json $(ARGS)
	$(BIN)/python -m benches.report .benchmarks/routes.json --save --part routes

# On a machine with a GPU, torch, Triton and nvcc, and without a network: make gpu PYTHON=python3 OUT=somewhere
OUT ?= benches/results

gpu: gpu-test gpu-sanitize gpu-bench  ## all three of the following, each in less than 8 minutes

gpu-install:
	$(PYTHON) -m pip --disable-pip-version-check install -q --no-build-isolation --no-deps -e .

gpu-test: gpu-install  ## run the GPU tests
	$(PYTHON) -m fusedprompt doctor
	$(PYTHON) -m pytest -q tests/gpu

gpu-sanitize: gpu-install  ## look for bad accesses and races in the kernels
	for tool in memcheck racecheck; do for part in triton lstm; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 115 compute-sanitizer --tool $$tool --error-exitcode 9 \
	    $(PYTHON) -m benches.gpu.small $$part || exit; done; done

gpu-bench: gpu-install  ## measure the GPU, then the ops on it, into OUT
	mkdir -p $(OUT) build
	nvcc -O3 -std=c++17 -arch=native -o build/probe benches/gpu/probe.cu && build/probe > $(OUT)/probe.json
	$(PYTHON) -m benches.gpu.run --probe $(OUT)/probe.json --out $(OUT)

doctor: $(READY)  ## what is installed here, and which backend each op uses
	$(BIN)/python -m fusedprompt doctor

wheel: $(READY)  ## build a wheel into dist/
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .

sdist: $(READY)  ## build a source distribution into dist/
	$(BIN)/python setup.py -q sdist

clean:  ## remove what was built, and .venv
	rm -rf $(VENV) build dist *.egg-info fusedprompt/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
