# Everything a developer or a new user types. `make help` lists it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CPP    := $(shell git ls-files '*.c' '*.h' '*.cpp' '*.cu' '*.cuh')

# cmake and ninja are packages of the environment.
export PATH := $(CURDIR)/$(BIN):$(PATH)

# A fresh clone elsewhere shares the compiler's cache, if there is one.
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := 1

.DEFAULT_GOAL := help
.PHONY: help demo test build sanitized lint format bench bench-cpu system cross clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: build ## convert the example model, let it talk, and compare its speed and size
	$(BIN)/python examples/demo.py --output build/demo

test: lint build sanitized cross ## check everything
	$(BIN)/python -m pytest

build: system $(VENV)/installed ## build the patched llama.cpp into build/ and put it into .venv
	$(BIN)/pt2gguf build --build-dir build

# The loader with AddressSanitizer and UBSan, for the tests with damaged files.
sanitized: build
	$(BIN)/cmake -G Ninja -S cmake -B build/asan -DPT2_LLAMA_CPP_SOURCE="$(CURDIR)/build/llama.cpp" \
	    -DLLAMA_SANITIZE_ADDRESS=ON -DLLAMA_SANITIZE_UNDEFINED=ON -DGGML_OPENMP=OFF \
	    -DCMAKE_C_FLAGS_RELEASE='-O1 -DNDEBUG' -DCMAKE_CXX_FLAGS_RELEASE='-O1 -DNDEBUG'
	$(BIN)/cmake --build build/asan --target load-files

lint: $(VENV)/installed ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/installed ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Not the Qwen3-shaped model, which a GPU trains first (benchmarks/train_qwen3.py), nor bounds.py.
bench: build ## measure quality and speed (needs ../shared); fills benchmarks/results/ and the README's tables
	$(BIN)/python benchmarks/quality.py ../shared/models/llama-30m
	$(BIN)/python benchmarks/quality.py ../shared/models/tiny-4m
	$(BIN)/pt2gguf eval build/benchmarks/quality-tiny-4m/TQ1_1.gguf \
	    'build/benchmarks/quality-tiny-4m/TQ1_1, --method paper.gguf' --model ../shared/models/tiny-4m \
	    --text ../shared/data/wikitext2-test.txt --text ../shared/data/heldout-web.txt \
	    --text ../shared/data/ptb-test.txt --against rtn,gptq --engine transformers --window 512 \
	    --calibration ../shared/data/wikitext2-valid.txt --samples 128 --length 512 \
	    --json benchmarks/results/table1-tiny-4m.json
	$(BIN)/python benchmarks/ablation.py ../shared/models/tiny-4m
	$(BIN)/python benchmarks/fidelity.py ../shared/models/llama-30m \
	    --calibration ../shared/data/wikitext2-valid.txt --text ../shared/data/wikitext2-test.txt
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/plots.py

bench-cpu: build ## measure the CPU kernels on models with random weights; fills benchmarks/results/cpu.json
	$(BIN)/python benchmarks/cpu.py

# What pip does not bring. Root installs them, others are told.
system:
	@{ command -v c++ && command -v git && $(PYTHON) -c 'import ensurepip'; } >/dev/null 2>&1 || { \
	    test "$$(id -u)" = 0 && apt-get update -q && apt-get install -qy g++ git python3-venv; } || { \
	    echo "needed: apt-get install g++ git python3-venv" >&2; exit 1; }

# To run the NEON kernels; their tests are left out where these are missing.
cross:
	@{ command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } >/dev/null 2>&1 || { \
	    test "$$(id -u)" = 0 && apt-get update -q && apt-get install -qy g++-aarch64-linux-gnu qemu-user; } || \
	    echo "without g++-aarch64-linux-gnu and qemu-user the NEON kernels are not tested" >&2

# PyTorch first and at one version: where pip has its CPU build, that is taken, and what needs
# "torch" does not bring gigabytes of CUDA packages.
$(VENV)/installed: pyproject.toml | system
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean: ## remove .venv and build/
	rm -rf $(VENV) build
