# Two commands: `make demo` and `make test`. Each sets up its own .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-system check audit docs clean

demo: $(STAMP)
	$(BIN)/python -m pmgaft_serve.demo --output-dir demo-output

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# What also needs programs that pip does not bring; the tests name what is missing.
test-system: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m system

# The pages that are made from code.
docs: $(STAMP)
	$(BIN)/python -m pmgaft_serve.documents docs

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Known vulnerabilities of what is pinned. Not a part of `check`: it asks PyPI, and its answer changes by itself.
audit: $(STAMP)
	$(BIN)/python -m pip install --quiet pip-audit==2.10.1
	$(BIN)/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo-output dist
