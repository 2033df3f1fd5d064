# Each target does all the set-up it needs. PYTHON chooses the interpreter that makes .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test slow bench lint

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -c "import sys; sys.exit('error: Python 3.11 or newer is needed, this is ' + sys.version.split()[0] + '; make PYTHON=python3.11 ...' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(READY)

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/demo.sh

test: lint
	$(BIN)/python -m pytest -n 2

slow: setup
	$(BIN)/python -m pytest -n 2 -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python bench/step.py
	$(BIN)/python bench/reading.py
	$(BIN)/python bench/lung_speed.py
	$(BIN)/python bench/loop.py
	$(BIN)/python bench/compiled.py
	$(BIN)/python bench/predict.py
	$(BIN)/python -m pip install --quiet grad-cam captum
	$(BIN)/python bench/peers.py
	$(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" && $(BIN)/python bench/gpu.py || true
	$(BIN)/python bench/table.py
