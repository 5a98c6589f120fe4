# Every target installs what it needs into .venv; repeated calls cost nothing.
PYTHON ?= python3
BIN := .venv/bin
# Where this is set, every process compiles torch again: seconds, dozens of times.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install benchmark strategies test test-slow lint bench clean

install: .venv/installed

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[demo,dev]'
	touch $@

benchmark: install
	$(BIN)/python benchmark.py --upstream merged

# Strategies on speakers with three fine-tuning seeds, other scenarios with one, in one table.
STRATEGIES := recipes/demo/strategies

strategies: install
	$(BIN)/python benchmark.py --suite $(STRATEGIES) --upstream $(STRATEGIES)/study.yaml

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

bench: install
	$(BIN)/python -m tests.bench

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
