# Every target sets itself up in $(VENV); a step is repeated only when a file it depends on has changed.
#   make test PYTHON=python3.12                another interpreter
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"    another build of torch
#   EARLYEXIT_BUILD=auto|cpu|cuda|none         what setup.py builds

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=

PY := $(VENV)/bin/python
# a test process a core, up to four; a file's tests stay in one process, where they share what they set up
PYTEST := $(PY) -m pytest -n auto --maxprocesses=4 --dist loadfile
PIP_INSTALL := $(PY) -m pip install -qq --disable-pip-version-check
NATIVE_SOURCES := $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz sanitize-cpu lint bench bench-compare gpu-check gpu-sanitize build clean setup

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 15

demo: setup ## train a small model on generated text and watch its rows leave early (a few minutes on a CPU)
	@echo "running the demo"
	@$(VENV)/bin/earlyexit demo $(ARGS)

test: setup ## run the tests plainly, then the Triton kernels under the interpreter; ARGS goes to pytest
	@echo "testing"
	@$(PYTEST) -m "not triton" $(ARGS)
	@echo "testing the Triton kernels under the interpreter"
	@TRITON_INTERPRET=1 $(PYTEST) -m triton $(ARGS)

fuzz: setup ## fuzz the package, an hour by default; goes on where it stopped: make fuzz ARGS="--minutes 5 --only ops,cli"
	@$(PY) -m python_tests.fuzz $(ARGS)

sanitize-cpu: setup ## build the CPU extension with ASan and UBSan, and run its tests and some fuzzing under them
	@$(PY) -m python_tests.fuzz.sanitize $(ARGS)

lint: $(VENV)/.lint ## ruff and mypy
	@echo "checking style, format and types"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy earlyexit_kernels

bench: setup $(VENV)/.peers ## measure this machine: JSON, plots and the READMEs' tables (about ten minutes)
	@echo "running the benchmarks"
	@$(PY) -m benchmarks.run $(ARGS)

bench-compare: setup ## time this version beside another in turns: make bench-compare BASE=<git ref>
	@echo "comparing with $(BASE)"
	@$(PY) -m benchmarks.compare $(BASE) $(ARGS)

gpu-check: ## build, test and measure for the GPU that is here within nine minutes; run again, it goes on (PYTHON=...)
	@$(PYTHON) -m benchmarks.gpu.check $(ARGS)

gpu-sanitize: ## replay the graph engine under compute-sanitizer, after gpu-check or build (PYTHON=...)
	@$(PYTHON) -m benchmarks.gpu.sanitize $(ARGS)

build: ## build the extension in place for an environment that has torch (PYTHON=...); needs no network
	@$(PYTHON) setup.py build_ext --inplace

setup: $(VENV)/.extension ## only set up: the environment, the package and its extension

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info earlyexit_kernels/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .fuzz
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch:
	@echo "creating the environment $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH)"
	@$(PIP_INSTALL) $(TORCH)
	@touch $@

# the extension is left to the next step, where ninja compiles only what changed
$(VENV)/.package: $(VENV)/.torch pyproject.toml
	@echo "installing the build requirements"
	@$(PIP_INSTALL) "setuptools>=77" wheel ninja pybind11
	@echo "installing earlyexit_kernels with its extras test, train, plot and bench"
	@EARLYEXIT_BUILD=none $(PIP_INSTALL) --no-build-isolation -e ".[test,train,plot,bench]"
	@touch $@

$(VENV)/.extension: $(VENV)/.package setup.py $(NATIVE_SOURCES)
	@echo "building the extension (log: $(VENV)/build.log)"
	@$(PY) setup.py build_ext --inplace > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@grep '^earlyexit_kernels: ' $(VENV)/build.log
	@touch $@

$(VENV)/.peers: $(VENV)/.package
	@echo "installing the runtimes to compare with"
	@EARLYEXIT_BUILD=none $(PIP_INSTALL) --no-build-isolation -e ".[peers]" \
		|| echo "they couldn't be installed, and will be recorded as not measured"
	@touch $@

$(VENV)/.lint: $(VENV)/.package
	@echo "installing the linters"
	@EARLYEXIT_BUILD=none $(PIP_INSTALL) --no-build-isolation -e ".[dev]"
	@touch $@
