# make demo: environment, then train, calibrate, run MD with error bars, flag, and write a page of results
# make test: environment, then the whole suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check slow data env clean

env: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), f'forcedrop needs Python 3.11 or newer, this is {sys.version.split()[0]}'"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev,label,cluster,examples]"
	touch $(STAMP)

demo: env
	$(BIN)/python examples/demo.py

test: env
	$(BIN)/python -m pytest -n 2

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

slow: env
	$(BIN)/python -m pytest -m slow

data: env
	$(BIN)/python scripts/generate_data.py

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache
