# Every target sets itself up; `make help` lists them. PYTHON=: which Python; TORCH=: what to install without a torch.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup build build-all demo test test-all bench lint format asan spills clean

TORCH ?= torch==2.13.0
JOBS ?= $(shell nproc)

# An activated environment with torch is used as it is. Else .venv, which sees the torch of python3 where there is one.
VERSION := from importlib.metadata import version as v;
HAS_TORCH := $(VERSION) import sys; sys.exit(tuple(map(int, v("torch").split(".")[:2])) < (2, 11))
IN_VENV := import sys; sys.exit(sys.prefix == sys.base_prefix)
ifndef PYTHON
  ifneq ($(wildcard .venv/bin/python),)
    PYTHON := .venv/bin/python
  else ifeq ($(shell python3 -c '$(IN_VENV)' 2>/dev/null && python3 -c '$(HAS_TORCH)' 2>/dev/null && echo yes),yes)
    PYTHON := $(shell command -v python3)
  else
    PYTHON := .venv/bin/python
  endif
endif
ifeq ($(PYTHON),.venv/bin/python)
  STAMP := .venv/effvit-setup.stamp
else
  STAMP := build/setup.stamp
endif
PIP := $(PYTHON) -m pip install --quiet --disable-pip-version-check
# What is built: the CPU library for this machine (demo), what the suite runs (test), everything (test-all, bench).
DEMO_BUILD := -DEFFVIT_ISAS=native -DEFFVIT_BUILD_CUDA=OFF -DEFFVIT_BUILD_EMU=OFF -DEFFVIT_BUILD_BENCH=OFF
TEST_BUILD := '-DEFFVIT_ISAS=native;emulated' -DEFFVIT_BUILD_CUDA=ON -DEFFVIT_CUDA_ARCHS=90a -DEFFVIT_CUDA_PTX=OFF \
  -DEFFVIT_CUTLASS_OUTPUTS=float16 -DEFFVIT_BUILD_EMU=ON -DEFFVIT_BUILD_BENCH=OFF
FULL_BUILD := -DEFFVIT_ISAS=all -DEFFVIT_BUILD_CUDA=ON '-DEFFVIT_CUDA_ARCHS=80;90a' -DEFFVIT_CUDA_PTX=ON \
  '-DEFFVIT_CUTLASS_OUTPUTS=float32;bfloat16;float16;int8' -DEFFVIT_BUILD_EMU=ON -DEFFVIT_BUILD_BENCH=ON
BUILD := EFFVIT_CMAKE_ARGS="$$args $(EFFVIT_CMAKE_ARGS)" $(PYTHON) setup.py --quiet build_ext --inplace --parallel $(JOBS)

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20

.venv/bin/python:
	@echo "effvit: creating .venv"
	python3 -m venv $$(python3 -c '$(HAS_TORCH)' 2>/dev/null && echo --system-site-packages) .venv

# With their dependencies triton, torchvision and timm would replace torch; CUTLASS's headers need none of theirs.
# torchvision 0.N+15 goes with torch 2.N.
$(STAMP): requirements-test.txt pyproject.toml Makefile | $(PYTHON)
	@echo "effvit: setting up $(PYTHON)"
	@$(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null || $(PIP) '$(TORCH)'
	@$(PIP) -r requirements-test.txt
	@$(PYTHON) -c '$(VERSION) v("triton")' 2>/dev/null || $(PIP) --no-deps triton==3.6.0
	@$(PYTHON) -c '$(VERSION) v("torchvision")' 2>/dev/null || \
	  $(PIP) --no-deps torchvision==0.$$($(PYTHON) -c '$(VERSION) print(int(v("torch").split(".")[1]) + 15)').0
	@$(PYTHON) -c '$(VERSION) v("timm")' 2>/dev/null || $(PIP) --no-deps 'timm>=1.0.15'
	@$(PYTHON) -c '$(VERSION) v("nvidia-cutlass")' 2>/dev/null || $(PIP) --no-deps 'nvidia-cutlass>=4.2'
	@EFFVIT_NO_NATIVE=1 $(PIP) --no-deps --no-build-isolation -e .
	@mkdir -p $(@D) && touch $@

setup: $(STAMP)  ## the Python environment, with effvit installed in editable mode

build: setup  ## the native libraries as the suite runs them: this machine's instruction set, emulated ones, one GPU
	@args="$(TEST_BUILD)"; $(BUILD)

build-all: setup  ## every instruction set and GPU architecture, and the C++ microbenchmarks
	@args="$(FULL_BUILD)"; $(BUILD)

demo: setup  ## Swin-T on a photograph, before and after effvit.patch: differences, times, a chart
	@args="$(DEMO_BUILD)"; $(BUILD)
	$(PYTHON) benchmarks/demo.py

test: build  ## build, then the suite; ARGS="-k name" selects
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

test-all: build-all  ## every instruction set, backend, sample and dtype, and what takes long; before a release
	EFFVIT_TEST_ALL=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

bench: setup  ## every benchmark beside its peers; appends to benchmarks/results, redraws pictures and tables
	@args="$(DEMO_BUILD) -DEFFVIT_BUILD_BENCH=ON"; $(BUILD)
	for bench in benchmarks/bench_*.py; do $(PYTHON) $$bench $(ARGS); done
	$(PYTHON) benchmarks/plot.py
	$(PYTHON) benchmarks/table.py --write README.md docs/benchmarks.md

lint: setup  ## ruff and clang-format, checking only
	$(PYTHON) -m pytest -q tests/test_layout.py -k 'ruff or clang_format'

format: setup  ## ruff and clang-format, rewriting
	$(PYTHON) -m ruff check --fix . && $(PYTHON) -m ruff format .
	git ls-files -co --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -r $(dir $(PYTHON))clang-format -i

asan: setup  ## the CPU kernels over the sample inputs under AddressSanitizer and UndefinedBehaviorSanitizer
	$(PYTHON) -m pytest -q tests/test_asan.py -m asan

spills: build-all  ## rewrite the committed record of registers and spills of the CUDA kernels
	$(PYTHON) tests/test_cuda_build.py

clean:  ## remove what was built (not .venv)
	rm -rf build dist python/effvit/lib *.egg-info python/*.egg-info .pytest_cache .ruff_cache
