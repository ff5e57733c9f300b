# Two commands on a fresh machine: make demo, make test.   make help lists the rest.
PYTHON ?= python3
VENV ?= .venv
PACKAGES ?= requirements.txt
BIN := $(VENV)/bin

.PHONY: help demo test long lint nnunet clean

help:
	@echo "make demo   train a small sparse E2ENet on procedural CT phantoms (minutes, no download)"
	@echo "make test   run the test suite"
	@echo "make long   run the long tests too"
	@echo "make lint   ruff, import-linter and mypy"
	@echo "make nnunet an environment of its own for the nnU-Net plug-in: .venv-nnunet"
	@echo "make clean  remove the environment"

# Every file that pip installs has one of the hashes that tools/lock.py wrote, those that build packages too.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps
HASHED := $(INSTALL) --require-hashes

$(BIN)/.installed: pyproject.toml $(wildcard requirements*.txt)
	$(PYTHON) -m venv $(VENV)
	$(HASHED) -r requirements-build.txt
	@# torch for CPUs alone, where an index of pip has it; the others will do, but not a file of another hash
	@$(HASHED) -r requirements-cpu.txt 2>$(VENV)/cpu.log || ! grep "DO NOT MATCH" $(VENV)/cpu.log
	$(HASHED) --no-build-isolation -r $(PACKAGES)
	@if $(BIN)/pip show torch 2>/dev/null | grep nvidia- >/dev/null; then $(HASHED) -r requirements-cuda.txt; fi
	$(INSTALL) --no-build-isolation -e .
	$(BIN)/pip check
	@touch $@

demo: $(BIN)/.installed
	$(BIN)/python examples/e2enet_amos.py --engine

test: $(BIN)/.installed
	$(BIN)/python -m pytest -q -n 2

long: $(BIN)/.installed
	$(BIN)/python -m pytest -q -n 2 -m "long or not long"

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

nnunet:
	$(MAKE) .venv-nnunet/bin/.installed VENV=.venv-nnunet PACKAGES=requirements-nnunet.txt

clean:
	rm -rf $(VENV)
