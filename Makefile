# Everything a developer or a new user types. `make help` lists it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := build/demo

.DEFAULT_GOAL := help
.PHONY: help demo test build lint format bench clean

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: build ## convert the example model, let it talk, and compare its speed and size
	$(BIN)/python examples/demo.py --output $(DEMO)

test: build ## run every test
	$(BIN)/python -m pytest

build: $(VENV)/installed ## build the patched llama.cpp into build/ and put it into .venv
	@tools/system-packages c++ git
	$(BIN)/pt2gguf build --build-dir build

lint: $(VENV)/installed ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'ggml_patches/src/*.c' 'ggml_patches/src/*.cpp' 'ggml_patches/src/*.h' 'tests/*.c' 'tests/*.cpp')

format: $(VENV)/installed ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: build ## measure quality and speed; writes benchmarks/results/
	$(BIN)/python benchmarks/quality.py

# PyTorch's CPU build first: a plain "torch" would bring gigabytes of CUDA packages.
$(VENV)/installed: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean: ## remove .venv and build/
	rm -rf $(VENV) build
