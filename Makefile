# What a person types. Each target is quiet when all is well.
PYTHON ?= python3
VENV ?= .venv
# An index with the build of torch that is wanted, such as https://download.pytorch.org/whl/cpu on a machine
# without a GPU. Empty: pip's own configuration decides.
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
RELEASED := proto/released.binpb
# What computes and times nothing may take two cores; the rest has clocks and processes that end, one after the other.
COMPUTING := tests/core tests/executor tests/kernels tests/config tests/lint tests/peers \
  tests/local/test_measure.py tests/local/test_tune.py tests/system/test_equality.py
ALONE := $(BIN)/python -m pytest $(COMPUTING:%=--ignore=%)
TOGETHER := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
INTERPRETED := TRITON_INTERPRET=1 $(TOGETHER)

.DELETE_ON_ERROR:
.PHONY: help venv demo test test-long test-gpu lint lint-code lint-proto proto bench clean

help:
	@echo "make demo       stream one completion through every role and draw its trace"
	@echo "make test       the tests; make test-long: those that take longer, too; make test-gpu: those for a GPU"
	@echo "make lint       ruff, mypy, import-linter, buf, generated code"
	@echo "make venv       .venv with all that development needs"
	@echo "make proto      generate the messages anew"
	@echo "make bench      measure; results go to bench/results"
	@echo "make clean      remove .venv and caches"

# What runs: Python ≥ 3.11, torch first (from its own index if one is named), then the rest.
$(VENV)/.runs: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than Python 3.11; name another one: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) …"
	@$(PIP) install $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX) --extra-index-url https://pypi.org/simple)
	@$(PIP) install -c constraints.txt 'hatchling>=1.27' 'editables>=0.5'
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[all]'
	@touch $@

# What develops: the tools, too.
$(VENV)/.develops: $(VENV)/.runs
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

venv: $(VENV)/.develops

demo: $(VENV)/.runs
	@$(BIN)/penstock demo

test: $(VENV)/.develops
	@$(ALONE) -m "not gpu and not long"
	@$(TOGETHER) -m "not gpu and not long" $(COMPUTING)
	@$(INTERPRETED) -m "not gpu and not long" tests/kernels

test-long: $(VENV)/.develops
	@$(ALONE) -m "not gpu"
	@$(TOGETHER) -m "not gpu" $(COMPUTING)
	@$(INTERPRETED) -m "not gpu" tests/kernels

# On a machine with an NVIDIA GPU; PENSTOCK_SOAK_SECONDS=240 makes the soak as long as a release is held to.
test-gpu: $(VENV)/.develops
	@$(BIN)/python -m pytest -m gpu

lint: lint-code lint-proto

lint-code: $(VENV)/.develops
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@said=$$($(BIN)/lint-imports --no-logo 2>&1) || { echo "$$said"; exit 1; }

lint-proto: $(VENV)/.develops
	@cd proto && ../$(BIN)/buf lint
	@if [ -f $(RELEASED) ]; then cd proto && ../$(BIN)/buf breaking --against ../$(RELEASED); fi
	@$(BIN)/python tools/generate_messages.py --check

proto: $(VENV)/.develops
	@$(BIN)/python tools/generate_messages.py

bench: $(VENV)/.develops
	@for name in engine_step engine_memory link served codec; do \
	  echo "bench/$$name.py" && $(BIN)/python bench/$$name.py || exit 1; done
	@$(BIN)/python tools/performance_table.py

clean:
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
