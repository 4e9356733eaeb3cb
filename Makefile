# Two commands for everyone: `make demo` and `make test`. Each sets up .venv by itself; a second run is quick.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_VERSION ?= 2.13.0
# Where to find CPU builds of torch, if pip does not find them by itself: make test TORCH_INDEX=<URL of the index>
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
READY := $(VENV)/.ready

.PHONY: help demo test lint format types check families kernels kernels-oldest versions trl bench bench-routes bench-scaling bench-metamath \
        bench-apply bench-compare pictures doctor wheel sdist clean \
        gpu gpu-install gpu-test gpu-sanitize gpu-bench gpu-steps

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 17

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

# A process for each core, and a file for each process: WORKERS=0 runs all in one.
WORKERS ?= auto
test: $(READY)  ## run all tests
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile $(ARGS)

lint: $(READY)  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)  ## check types
	$(BIN)/mypy

check: test lint types docs  ## all of CI

kernels: $(READY)  ## compile every Triton kernel for every chip, without a GPU, and tabulate the result
	$(BIN)/python -m benches.compile_table --write docs/kernels-compiled.md

OLDEST_TRITON := build/triton-3.6.0
kernels-oldest: $(READY)  ## the same with the oldest Triton that is supported
	test -d $(OLDEST_TRITON) || $(BIN)/python -m pip install -q --no-deps --target $(OLDEST_TRITON) triton==3.6.0
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m benches.compile_table

families: $(READY)  ## check every family of transformers, in about 25 minutes, and write docs/families.md
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m families.sweep --write docs/families.md \
	  --remember tests/families/ever_failed.txt $(ARGS)

# The oldest PEFT and transformers that `apply` takes, beside the newest, which `make test` runs. transformers brings no
# torch along; PEFT would, so it comes alone. 50 s in all. Another pair: make versions PEFT=0.19.1 TRANSFORMERS=5.6.2
PEFT ?= 0.17.0
TRANSFORMERS ?= 4.57.1
PAIR = build/peft-$(PEFT)-transformers-$(TRANSFORMERS)
versions: $(READY)  ## run the tests of `apply` with the oldest PEFT and transformers
	test -d $(PAIR)/peft || { $(BIN)/python -m pip install -q --target $(PAIR) transformers==$(TRANSFORMERS) \
	  && $(BIN)/python -m pip install -q --no-deps --target $(PAIR) peft==$(PEFT); }
	PYTHONPATH=$(PAIR) $(BIN)/python -m pytest -q tests/test_apply_patch.py tests/test_apply_results.py \
	  tests/test_apply_training.py tests/test_apply_multitask.py tests/test_lm_head.py tests/test_tools_attributes.py \
	  tests/test_tools_files.py tests/test_tools_parallel.py tests/test_tools_trainer.py $(ARGS)

# TRL alone, because it is installed for nothing else; its datasets come along. It needs Python 3.11: without it nothing is
# collected, which is pytest's status 5. 35 s in all.
TRL := build/trl-1.16.0
trl: $(READY)  ## run the tests that need TRL
	test -d $(TRL)/datasets || { $(PIP) --no-deps --target $(TRL) 'trl==1.16.0; python_version >= "3.11"' \
	  && $(PIP) --target $(TRL) datasets==5.2.0; }
	PYTHONPATH=$(TRL) $(BIN)/python -m pytest -q tests/test_apply_trl.py tests/test_tools_trl.py $(ARGS) || test $$? = 5

# Each part is one run of pytest-benchmark, kept in benches/results/<machine>[-part].json.
run_bench = $(BIN)/python -m pytest $(1) -q --benchmark-quiet --benchmark-json=.benchmarks/$(2).json $(ARGS) \
  && $(BIN)/python -m benches.report .benchmarks/$(2).json --save --part "$(3)"
BENCHES := $(addprefix benches/test_bench_,$(addsuffix .py,encode lstm head cpt splice layout step inference))

bench: $(READY)  ## measure ops, training steps, prefill and generate against PEFT, in under 10 minutes
	$(call run_bench,$(BENCHES),latest,)

bench-routes: $(READY)  ## measure the shared route closely, in about 12 minutes
	$(call run_bench,benches/test_bench_shared.py benches/test_bench_mixed.py,routes,routes)

bench-scaling: $(READY)  ## measure time against size, in about 8 minutes
	$(call run_bench,benches/test_scaling.py,scaling,scaling)

bench-metamath: $(READY)  ## measure the shapes of PEFT's MetaMathQA comparison, in about 14 minutes
	$(call run_bench,benches/test_bench_metamath.py,metamath,metamath)

bench-compare: $(READY)  ## what changed between two results: make bench-compare OLD=... NEW=...
	$(BIN)/python -m benches.compare $(OLD) $(NEW)

pictures: $(READY)  ## draw the committed results into docs/pictures, and write them into README's and docs' tables
	$(BIN)/python -m benches.pictures
	$(BIN)/python -m benches.tables

bench-apply: $(READY)  ## measure patched PEFT models against unpatched ones, in about 4 minutes
	$(call run_bench,benches/test_bench_apply.py,apply,apply)

# On a machine with a GPU, torch, Triton and nvcc, and without a network: make gpu PYTHON=python3 OUT=somewhere
OUT ?= benches/results

gpu: gpu-test gpu-sanitize gpu-bench gpu-steps  ## all four of the following, each in less than 8 minutes

gpu-install:
	$(PYTHON) -m pip --disable-pip-version-check install -q --no-build-isolation --no-deps -e .

gpu-test: gpu-install  ## run the GPU tests
	$(PYTHON) -m fusedprompt doctor
	$(PYTHON) -m pytest -q tests/gpu

gpu-sanitize: gpu-install  ## look for bad accesses and races in the kernels
	for tool in memcheck racecheck; do for part in triton lstm; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 115 compute-sanitizer --tool $$tool --error-exitcode 9 \
	    $(PYTHON) -m benches.gpu.small $$part || exit; done; done

GPU_STEPS := benches/test_bench_step.py benches/test_bench_inference.py
gpu-bench: gpu-install  ## measure the GPU, then the kernels on it, into OUT
	mkdir -p $(OUT) build
	nvcc -O3 -std=c++17 -arch=native -o build/probe benches/gpu/probe.cu && build/probe > $(OUT)/probe.json
	$(PYTHON) -m pytest benches/gpu -q --device cuda --benchmark-quiet --benchmark-json=$(OUT)/gpu.json
	$(PYTHON) -m benches.report $(OUT)/gpu.json

gpu-steps: gpu-install  ## measure training steps, prefill and generate on the GPU, and PEFT's MetaMathQA shapes with all layers
	mkdir -p $(OUT)
	FUSEDPROMPT_BENCH_LAYERS=28 $(PYTHON) -m pytest benches/test_bench_metamath.py -q --device cuda --benchmark-quiet \
	  --benchmark-json=$(OUT)/gpu-metamath.json
	$(PYTHON) -m pytest $(GPU_STEPS) -q --device cuda --benchmark-quiet --benchmark-json=$(OUT)/gpu-steps.json
	$(PYTHON) -m benches.report $(OUT)/gpu-steps.json $(OUT)/gpu-metamath.json

$(VENV)/.docs: $(READY)
	$(PIP) sphinx myst-parser furo
	@touch $@

.PHONY: docs
docs: $(VENV)/.docs  ## build the documentation site into build/site; a broken link or a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -c docs -d build/doctrees . build/site
	@echo build/site/index.html

doctor: $(READY)  ## what is installed here, and which backend each op uses
	$(BIN)/python -m fusedprompt doctor

wheel: $(READY)  ## build a wheel into dist/
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .

sdist: $(READY)  ## build a source distribution into dist/
	$(BIN)/python setup.py -q sdist

clean:  ## remove what was built, and .venv
	rm -rf $(VENV) build dist *.egg-info fusedprompt/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
