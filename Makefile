# `make demo` and `make test` do all the set-up on a fresh machine: a virtual environment, then the package with its extras.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.torch_bilevel_installed
EXTRAS ?= experiments,test,baselines
CONFIG ?= configs/hyper_cleaning/digits.yaml
ARGS ?=
PYTEST_ARGS ?=
# One process a core and one thread a process: small tensors gain nothing from more, and idle threads spin.
JOBS ?= 2
BENCH ?= hypergradient hyper_hessian products scaling whole_run gpu
BENCH_ARGS ?= --quick

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-gpu bench lint clean

help:
	@echo "make demo       hyper-cleaning of the digits data (CONFIG=..., ARGS='key=value ...')"
	@echo "make test       the tests that need neither a GPU nor patience (PYTEST_ARGS='...')"
	@echo "make test-slow  the slow tests          make test-gpu  the tests that need a CUDA device"
	@echo "make bench      the benchmarks as smoke tests; one in earnest: BENCH=hypergradient BENCH_ARGS='--threads 2 --data-dir DATA'"
	@echo "make lint       ruff                    make clean     remove caches and build products (not .venv, not runs)"
	@echo "variables       PYTHON=$(PYTHON) VENV=$(VENV)"

install: $(STAMP)

$(STAMP): setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[$(EXTRAS)]"
	touch $@

demo: $(STAMP)
	$(BIN)/python -m experiments hyper_cleaning --config $(CONFIG) $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

# The peers that install here are compared with, the others are named as absent.
bench: $(STAMP)
	$(BIN)/python -m pip install -e ".[$(EXTRAS),bench]"
	for name in $(BENCH); do $(BIN)/python -m benchmarks.$$name $(BENCH_ARGS) || exit 1; done

lint: $(STAMP)
	$(BIN)/python -m ruff --version >/dev/null 2>&1 || $(BIN)/python -m pip install ruff
	$(BIN)/python -m ruff check .

clean:
	rm -rf build dist .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
