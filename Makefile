# make demo and make test need python3 (3.10 or newer), a C++ compiler and the network; all else they install.
# Variables: PYTHON=python3.12 (who makes the environment), VENV=.venv, OUTPUT=runs/demo.
# Without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes.

PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= runs/demo
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test lint bench doctor clean

help:
	@echo "make demo    install into $(VENV), then fine-tune, distil and print one table (runs/demo)"
	@echo "make test    install into $(VENV), then run all tests"
	@echo "make lint    ruff (lint and format) and mypy"
	@echo "make doctor  what was built, and which backend each device gets"
	@echo "make bench   the benchmarks"
	@echo "make clean   remove $(VENV), build products and caches"

$(BIN)/python:
	@echo "== making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo "== installing torch ($$(grep '^torch==' constraints.txt))"
	@$(BIN)/pip install -q -c constraints.txt torch
	@touch $@

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*) $(VENV)/.torch
	@echo "== installing cot2align with the pinned versions of constraints.txt, compiling csrc/"
	@$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m cot2align.doctor | sed -n '/^Built/,/^$$/p'
	@touch $@

demo: $(STAMP)
	@echo "== running the demo: fine-tune teacher and student, distil, evaluate; results in $(OUTPUT)"
	@$(BIN)/python -m cot2align.train demo --output $(OUTPUT)

test: $(STAMP)
	@echo "== running the tests"
	@$(BIN)/python -m pytest -q -n auto --dist worksteal
	@echo "== running the tests of the Triton kernels, and of Liger's, in Triton's interpreter"
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n auto --dist worksteal tests/kernels tests/train/test_liger.py \
		-k 'triton or liger'

lint: $(STAMP)
	@echo "== ruff and mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

doctor: $(STAMP)
	@$(BIN)/python -m cot2align.doctor

bench: $(STAMP)
	@$(BIN)/python -m benchmarks run

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find cot2align -name '*.so' -delete
