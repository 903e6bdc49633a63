# `make help` lists the targets. demo, test and lint need nothing but Python >= 3.11 and a package index: they create
# $(VENV) and install what they need, pinned by requirements/dev.txt.
#
# torch goes in first and on its own, so that no later requirement replaces it. Where the index's torch is a CUDA
# build and a CPU one is wanted:
#   make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" TORCH="torch==2.13.0+cpu"

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := help
.PHONY: help demo test test-lowest gpu-test gpu-fuzz gpu-sanitize gpu-soak coverage-page curves engines lint format types clean
.PHONY: pytest-cpu pytest-interpreter pytest-distributed pytest-hopper

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
VENV_LOWEST ?= .venv-lowest
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
WORKERS ?= 2
# What curves and engines hand on to their scripts.
ARGS ?=

# Waiting threads sleep instead of spinning: on two busy cores training is several times faster so.
export OMP_WAIT_POLICY ?= PASSIVE

BIN := $(VENV)/bin
SOURCES := hf_flash_plus examples tests

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- environments: one stamp file per layer, so that the second target is quick ---

%/.torch:
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade pip
	$*/bin/python -m pip install $(PIP_FLAGS) $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml requirements/dev.txt
	$(BIN)/python -m pip install $(PIP_FLAGS) -c requirements/dev.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml requirements/dev.txt
	$(BIN)/python -m pip install $(PIP_FLAGS) -c requirements/dev.txt -e '.[bench,dev,examples]'
	touch $@ $(VENV)/.demo

$(VENV_LOWEST)/.dev: $(VENV_LOWEST)/.torch pyproject.toml requirements/lowest.txt
	$(VENV_LOWEST)/bin/python -m pip install $(PIP_FLAGS) -c requirements/lowest.txt -e . pytest pytest-xdist hypothesis
	touch $@

# --- for users ---

demo: $(VENV)/.demo ## train a small LLaMA and a small BERT on the CPU, then generate
	$(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml examples/finetune_llama.py configs/train/llama_demo.yaml
	$(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml examples/finetune_bert.py configs/train/bert_demo.yaml

# --- for developers ---

CHECKS := lint types pytest-cpu pytest-hopper pytest-interpreter pytest-distributed

test: $(VENV)/.dev ## every check that needs no GPU: lint, types, tests, kernels in Triton's interpreter
	@failed=""; \
	for check in $(CHECKS); do \
	  echo "== $$check"; $(MAKE) --no-print-directory $$check || failed="$$failed $$check"; \
	done; \
	echo "== summary"; \
	for log in pytest-cpu pytest-hopper pytest-interpreter pytest-distributed; do \
	  echo "$$log: $$(tail -n 1 $(VENV)/$$log.log)"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi; \
	echo "all checks passed"

lint: $(VENV)/.dev ## ruff check, ruff format --check
	@status=0; \
	$(BIN)/ruff check $(SOURCES) || status=1; \
	$(BIN)/ruff format --check $(SOURCES) || status=1; \
	exit $$status

format: $(VENV)/.dev ## let ruff repair and format the sources
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: $(VENV)/.dev ## mypy on the package
	$(BIN)/mypy

# One thread per worker: two workers with two threads each are slower than two with one.
pytest-cpu: $(VENV)/.dev ## the tests that need neither a GPU nor Triton's interpreter
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not distributed" \
	  tests/unit tests/fuzz tests/transformers tests/examples tests/kernels/aot \
	  | tee $(VENV)/$@.log

# On their own: each starts two to four processes.
pytest-distributed: $(VENV)/.dev ## the examples with several processes on the CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m distributed tests/examples \
	  | tee $(VENV)/$@.log

# The Hopper kernels are written in Gluon, which is experimental: they serve on the Triton they were tested with only.
HOPPER_TRITON := triton==3.6.0

$(VENV)/hopper/.done: $(VENV)/.dev
	$(BIN)/python -m pip install $(PIP_FLAGS) --quiet --no-deps --upgrade --target $(VENV)/hopper $(HOPPER_TRITON)
	touch $@

pytest-hopper: $(VENV)/hopper/.done ## the Hopper kernels, compiled ahead of time by the Triton they are made for
	PYTHONPATH=$(VENV)/hopper OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/kernels/aot -k hopper \
	  | tee $(VENV)/$@.log

pytest-interpreter: $(VENV)/.dev ## the kernels in Triton's interpreter
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/kernels/interpreter \
	  | tee $(VENV)/$@.log

test-lowest: $(VENV_LOWEST)/.dev ## unit and Transformers tests against the oldest versions supported
	OMP_NUM_THREADS=1 $(VENV_LOWEST)/bin/python -m pytest -n $(WORKERS) tests/unit tests/transformers

curves: ## one GPU: loss curves of flash_plus, sdpa and eager over three seeds, into examples/benchmark
	PYTHONPATH=. python examples/compare_curves.py $(ARGS)

engines: ## two GPUs: DDP, FSDP2 and TP against one GPU, into examples/benchmark
	PYTHONPATH=. python examples/compare_engines.py $(ARGS)

RECORDS := tests/transformers/coverage

coverage-page: ## COVERAGE.md from the records in tests/transformers (hf-flash-plus coverage makes those)
	PYTHONPATH=. python -m hf_flash_plus coverage --from-json $(RECORDS).json \
	  $(addprefix --beside ,$(sort $(wildcard $(RECORDS)-*.json))) --report COVERAGE.md

# The GPU's targets use the current python: no environment is created. Order of gpu-test: kernels are compiled, tests
# run in parallel, then random calls, then the tests that need the GPU alone (-m exclusive), then compute-sanitizer.
GPU_ARGS ?=
FUZZ_EXAMPLES ?= 2000
SOAK_MINUTES ?= 10

gpu-test: ## all GPU tests, into tests/gpu/record.json (GPU_ARGS="--budget 600 --parts parallel,exclusive")
	python -m tests.gpu.suite $(GPU_ARGS)

gpu-fuzz: ## thousands of random calls on the GPU: FUZZ_EXAMPLES of each kind and provider, into outputs/fuzz.json
	python -m tests.gpu.suite --parts fuzz --fuzz-examples $(FUZZ_EXAMPLES) --output outputs/fuzz.json

gpu-sanitize: ## memcheck and racecheck of our kernels, into outputs/sanitizer.json
	python -m tests.gpu.sanitizer --output outputs/sanitizer.json

gpu-soak: ## SOAK_MINUTES of mixed training and generation on the GPU, into tests/gpu/soak.json
	python examples/soak.py --minutes $(SOAK_MINUTES) --result_file tests/gpu/soak.json

clean: ## remove the environments and the tools' caches
	rm -rf $(VENV) $(VENV_LOWEST) .mypy_cache .pytest_cache .ruff_cache .hypothesis outputs *.egg-info
