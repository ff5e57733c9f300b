# Two commands on a fresh machine: make demo, make test.   make help lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test long lint clean

help:
	@echo "make demo   train a small sparse E2ENet on procedural CT phantoms (minutes, no download)"
	@echo "make test   run the test suite"
	@echo "make long   run the long tests too"
	@echo "make lint   ruff, import-linter and mypy"
	@echo "make clean  remove the environment"

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[medical,viz,timm,trainers,dev]"
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

clean:
	rm -rf $(VENV)
