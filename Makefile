# `make demo` and `make test` need Python 3.11 or newer and make; each sets everything up by itself, in .venv.
#   make PYTHON=python3.12        another interpreter
#   make TORCH_INDEX=URL          torch from that index (default: a CPU build, wherever pip finds one)
# A torch that is already in .venv is kept. Every path here is relative, because a checkout's path may have a space in it.
PYTHON ?= python3
PY := .venv/bin/python
export TORCH_INDEX

.PHONY: help install demo test test-all lint format lock train-embedded clean

help:
	@echo "make demo | test | test-all | lint | format | install | lock | train-embedded | clean"

install:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=...")'
	@$(PYTHON) tools/install.py

demo: install
	@$(PY) -m shoal demo

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m mypy tools
	$(PY) -c 'from importlinter.cli import lint_imports_command as run; run()'

test: lint
	$(PY) -m pytest -m "not slow"

test-all: lint
	$(PY) -m pytest

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Writes requirements/ anew from what is installed in .venv.
lock: install
	$(PY) tools/lock.py

# About an hour on one core; may be stopped and goes on where it was. Remove the work folder to start afresh.
train-embedded: install
	nice -n 10 $(PY) tools/train_embedded_model.py --out node/embedded/model --work .train --compile

clean:
	rm -rf .venv build dist .train .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
