# Two commands for everyone: `make demo` and `make test`. Each sets up .venv by itself; a second run is quick.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_VERSION ?= 2.13.0
# Where to find CPU builds of torch, if pip does not find them by itself: make test TORCH_INDEX=<URL of the index>
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
READY := $(VENV)/.ready

.PHONY: help demo demo-real test lint format types check shim families kernels kernels-oldest triton-oldest versions trl models bench bench-prefix bench-routes bench-scaling bench-metamath \
        bench-apply bench-compare pictures doctor wheel sdist clean \
        gpu-first gpu-again gpu gpu-test gpu-sanitize gpu-bench gpu-steps

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

demo-real: models  ## tune three prompts of a small trained model on descriptions of packages, beside PEFT
	$(BIN)/python examples/package_sections.py $(ARGS)

# A process for each core, and a file for each process: WORKERS=0 runs all in one.
WORKERS ?= auto
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile
test: $(READY)  ## run all tests
	$(PYTEST) $(ARGS)

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
$(OLDEST_TRITON)/triton:
	$(BIN)/python -m pip install -q --no-deps --target $(OLDEST_TRITON) triton==3.6.0

kernels-oldest: $(READY) $(OLDEST_TRITON)/triton  ## the same with the oldest Triton that is supported
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m benches.compile_table

triton-oldest: $(READY) $(OLDEST_TRITON)/triton  ## launch every kernel with the oldest Triton on a stub driver, and compile some
	PYTHONPATH=$(OLDEST_TRITON) FUSEDPROMPT_STUB_DRIVER=1 $(BIN)/python -m pytest -q tests/stub_driver
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m benches.compile_table --chips 90 --every 9

SEEDS ?= 30
shim: $(READY)  ## run the LSTM's CUDA kernels on the CPU in many orders, looking for races
	FUSEDPROMPT_SHIM_SEEDS=$(SEEDS) $(BIN)/python -m pytest -q tests/test_lstm_cuda_shim.py tests/test_lstm_cuda_memory.py $(ARGS)

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
	PYTHONPATH=$(PAIR) $(PYTEST) -q tests/test_apply_patch.py tests/test_apply_results.py \
	  tests/test_apply_training.py tests/test_apply_multitask.py tests/test_lm_head.py tests/test_tools_attributes.py \
	  tests/test_tools_files.py tests/test_tools_parallel.py tests/test_tools_trainer.py $(ARGS)

# TRL alone, because it is installed for nothing else; its datasets come along. It needs Python 3.11: without it nothing is
# collected, which is pytest's status 5. 35 s in all.
TRL := build/trl-1.16.0
trl: $(READY)  ## run the tests that need TRL
	test -d $(TRL)/datasets || { $(PIP) --no-deps --target $(TRL) 'trl==1.16.0; python_version >= "3.11"' \
	  && $(PIP) --target $(TRL) datasets==5.2.0; }
	PYTHONPATH=$(TRL) $(BIN)/python -m pytest -q tests/test_apply_trl.py tests/test_tools_trl.py $(ARGS) || test $$? = 5

models: $(READY)  ## fetch two small trained models into build/models, in a minute, for examples and benchmarks
	$(BIN)/python -m benches.real_models

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

ATTENTION := benches/test_bench_prefix_attention.py benches/test_bench_attended.py
bench-prefix: $(READY)  ## measure prefixes of keys and values, and attention to one prefix, in about 15 minutes
	$(call run_bench,benches/test_bench_prefix.py,prefix,prefix)
	$(call run_bench,$(ATTENTION),attention,attention)

bench-compare: $(READY)  ## what changed between two results: make bench-compare OLD=... NEW=...
	$(BIN)/python -m benches.compare $(OLD) $(NEW)

pictures: $(READY)  ## draw the committed results into docs/pictures, and write them into README's and docs' tables
	$(BIN)/python -m benches.pictures
	$(BIN)/python -m benches.tables

bench-apply: $(READY)  ## measure patched PEFT models against unpatched ones, in about 4 minutes
	$(call run_bench,benches/test_bench_apply.py,apply,apply)

# On a machine with a GPU, torch, Triton and nvcc, and without a network: make gpu PYTHON=python3 OUT=somewhere
OUT ?= build/gpu

gpu-first:  ## what a GPU that is at hand for minutes can tell: at most 480 s, the most important first
	PYTHON="$(PYTHON)" benches/gpu/first.sh "$(OUT)"

gpu-again:  ## what failed in it, memcheck, and pairs: at most 200 s; make gpu-again FIRST=its-OUT OUT=...
	PYTHON="$(PYTHON)" benches/gpu/again.sh "$(FIRST)" "$(OUT)"

gpu:  ## all four of the following, in about half an hour; no failure stops it
	PYTHON="$(PYTHON)" benches/gpu/all.sh "$(OUT)"

gpu-test:  ## run doctor and the GPU tests
gpu-sanitize:  ## look for bad accesses and races in the kernels
gpu-bench:  ## measure the GPU, then the kernels on it
gpu-steps:  ## measure training steps, prefill and generate on the GPU, and PEFT's MetaMathQA shapes with all layers
gpu-test gpu-sanitize gpu-bench gpu-steps:
	PYTHON="$(PYTHON)" benches/gpu/all.sh "$(OUT)" $(@:gpu-%=%)

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
