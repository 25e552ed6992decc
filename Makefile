# Every target sets itself up in $(VENV); a step is repeated only when a file it depends on has changed.
#   make test PYTHON=python3.12                another interpreter
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"    another build of torch
#   make test TORCH=torch==2.11.0 TRITON=triton==3.6.0 VENV=.venv-2.11    another torch and its Triton
#   EARLYEXIT_BUILD=auto|cpu|cuda|none         what setup.py builds

PYTHON ?= python3
TORCH ?= torch==2.13.0
# the version that comes with CUDA builds of this torch; installed where torch has brought none, as a build for the CPU
TRITON ?= triton==3.7.1
VENV ?= .venv
ARGS ?=

PY := $(VENV)/bin/python
# a test process a core, up to four; a file's tests stay in one process, where they share what they set up; files run in
# their order, since those with the fewest tests are not the shortest
PYTEST := $(PY) -m pytest -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder
# each run of the tests adds a line to this file, which says what ran where
SUMMARY := $(VENV)/tests.txt
# exit status of pytest where ARGS selects no test of a run; `make test` fails if none of its runs has any
NO_TESTS := 5
# in a variable, since `call` takes a comma for the end of an argument
EXTRAS := .[test,train,plot,bench,serve]
PIP_INSTALL := $(PY) -m pip install -qq --disable-pip-version-check --no-compile
# $(call timed,COMMAND): run it and print the seconds that it took
timed = started=$$(date +%s) && $(1) && echo "    done in $$(( $$(date +%s) - started )) s"
DOCS_VENV := $(VENV)-docs
NATIVE_SOURCES := $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-thorough docs fuzz mutants sanitize-cpu lint bench bench-compare evidence gpu-check build clean setup

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 15

demo: setup ## train a small model on generated text and measure what early exit saves (a few minutes on a CPU)
	@echo "running the demo"
	@$(VENV)/bin/earlyexit demo $(ARGS)

# GPUs hidden, so that the tests are the same everywhere; a thread that waits leaves its core to the other test processes
ON_CPU := EARLYEXIT_TEST_SUMMARY=$(SUMMARY) CUDA_VISIBLE_DEVICES= OMP_WAIT_POLICY=passive
# $(call on_cpu,MARKS): run tests, those of the Triton kernels under the interpreter
define on_cpu
	@echo "testing on the CPU"
	@$(ON_CPU) $(PYTEST) -m "not triton and not gpu and $(1)" $(ARGS) \
		|| [ $$? = $(NO_TESTS) ]
	@echo "testing the Triton kernels under the interpreter"
	@$(ON_CPU) TRITON_INTERPRET=1 $(PYTEST) -m "triton and not gpu and $(1)" $(ARGS) || [ $$? = $(NO_TESTS) ]
endef

test: setup ## run the tests on the CPU, five minutes on two cores, then those of a GPU where there is one; ARGS goes to pytest
	@rm -f $(SUMMARY)
	$(call on_cpu,not thorough)
	@if $(PY) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		echo "testing on the GPU"; \
		EARLYEXIT_TEST_SUMMARY=$(SUMMARY) $(PY) -m pytest -m gpu $(ARGS) || [ $$? = $(NO_TESTS) ]; \
	else echo "no GPU: the tests of the mark gpu did not run" >> $(SUMMARY); fi
	@cat $(SUMMARY) && grep -q passed $(SUMMARY)

test-all: test test-thorough ## run every test

test-thorough: setup ## run the tests that make test leaves out
	@rm -f $(SUMMARY)
	$(call on_cpu,thorough)
	@cat $(SUMMARY)

docs: setup $(DOCS_VENV)/.mkdocs ## build the documentation in build/docs; warnings are errors
	@$(PY) -m benchmarks.readme --site build/tables
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet
	@echo "the documentation is in build/docs/index.html"

fuzz: setup ## run python_tests/deep on new examples, an hour by default; continues where it stopped: make fuzz ARGS="--minutes 5 --only ops,cli"
	@$(PY) -m python_tests.deep $(ARGS)

mutants: setup ## put each known mutant into a copy of the checkout and run the tests that cover it: an hour; make mutants ARGS="--only 'loop-*'"
	@$(PY) -m python_tests.mutants $(ARGS)

sanitize-cpu: setup ## build the CPU extension with ASan and UBSan, and run its tests and some fuzzing
	@$(PY) -m python_tests.deep.sanitize $(ARGS)

lint: $(VENV)/.lint ## ruff and mypy
	@echo "checking style, format and types"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

bench: setup $(VENV)/.peers ## measure the CPU of this machine: JSON, plots and the tables of the documents (about ten minutes)
	@echo "running the benchmarks"
	@CUDA_VISIBLE_DEVICES= $(PY) -m benchmarks.run $(ARGS)

bench-compare: setup ## time this version and another in alternation: make bench-compare BASE=<git ref>
	@echo "comparing with $(BASE)"
	@$(PY) -m benchmarks.compare $(BASE) $(ARGS)

evidence: setup ## test the papers' claims on real text; hours, continues where it stopped: make evidence ARGS="--only dact"
	@$(PY) -m benchmarks.evidence $(ARGS)

gpu-check: ## build, test and measure on the local GPU, ten minutes at most; run again to continue (PYTHON=...)
	@$(PYTHON) -m benchmarks.gpu.check $(ARGS)

build: ## build the extension in place for an environment that has torch (PYTHON=...); needs no network
	@$(PYTHON) setup.py build_ext --inplace

setup: $(VENV)/.package $(VENV)/.extension ## set up the environment, the package and its extension, nothing else

clean: ## remove the environment and everything built
	rm -rf $(VENV) $(DOCS_VENV) build dist *.egg-info earlyexit_kernels/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .fuzz
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch:
	@echo "creating the environment $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH); a large download, which may take minutes"
	@$(call timed,$(PIP_INSTALL) $(TORCH))
	@$(PY) -c "import importlib.util as util, sys; sys.exit(util.find_spec('triton') is None)" \
		|| { echo "installing $(TRITON)" && $(call timed,$(PIP_INSTALL) $(TRITON)); }
	@touch $@

# the extension is left to the next step, where ninja compiles only what changed
$(VENV)/.build-tools: $(VENV)/.torch
	@echo "installing the build requirements"
	@$(call timed,$(PIP_INSTALL) "setuptools>=77" wheel ninja pybind11)
	@touch $@

$(VENV)/.package: $(VENV)/.build-tools pyproject.toml
	@echo "installing earlyexit_kernels with its extras test, train, plot, bench and serve; this may take minutes"
	@export EARLYEXIT_BUILD=none && $(call timed,$(PIP_INSTALL) --no-build-isolation -e "$(EXTRAS)")
	@touch $@

# does not depend on the packages, so that make -j2 compiles while it installs them
$(VENV)/.extension: $(VENV)/.build-tools setup.py $(NATIVE_SOURCES)
	@echo "building the extension, a minute or more the first time (log: $(VENV)/build.log)"
	@$(call timed,{ $(PY) setup.py build_ext --inplace > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }; })
	@grep '^earlyexit_kernels: ' $(VENV)/build.log | tail -n 1
	@touch $@

$(VENV)/.peers: $(VENV)/.package
	@echo "installing the runtimes to compare with"
	@export EARLYEXIT_BUILD=none && $(call timed,$(PIP_INSTALL) --no-build-isolation -e ".[peers]") \
		|| echo "they could not be installed; their cases will be recorded as not measured"
	@touch $@

$(VENV)/.lint: $(VENV)/.package
	@echo "installing the linters"
	@export EARLYEXIT_BUILD=none && $(call timed,$(PIP_INSTALL) --no-build-isolation -e ".[dev]")
	@touch $@

# apart from $(VENV): the site needs no torch
$(DOCS_VENV)/.mkdocs: pyproject.toml
	@echo "creating the environment $(DOCS_VENV) with $(PYTHON), and installing mkdocs-material"
	@$(PYTHON) -m venv $(DOCS_VENV)
	@$(call timed,$(DOCS_VENV)/bin/python -m pip install -qq --disable-pip-version-check "mkdocs-material>=9.6")
	@touch $@
