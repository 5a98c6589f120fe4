# Every target installs what it needs into a venv of its own; repeated calls cost nothing.
PYTHON ?= python3
BIN := .venv/bin
# `make install TORCH=cpu`: a PyTorch without gigabytes of CUDA, from where uv takes such builds.
# Other values are uv's own (cu128, rocm6.4, auto, ...); without one, what the package index has.
TORCH ?=
BACKEND := $(if $(TORCH),--torch-backend $(TORCH),)
# Where this is set, every process compiles torch again: seconds, dozens of times.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install lock benchmark strategies test test-slow test-lowest test-newest test-cpu test-wheel \
	lint bench clean

install: .venv/installed

# Exact versions, also of what is needed indirectly: the lock file is a list of constraints.
.venv/installed: requirements.lock setup.cfg setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet $(BACKEND) --python $(BIN)/python \
		--constraint requirements.lock --editable '.[demo,dev,s3prl]'
	touch $@

# The newest versions that go together and with the s3prl extra, for CPython 3.11 to 3.14 on Linux
# and macOS. No addresses and no hashes: any package index serves it.
lock:
	test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet uv; }
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --upgrade \
		--custom-compile-command 'make lock' --output-file requirements.lock \
		--extra demo --extra s3prl --extra dev setup.py

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

# The ends of the ranges in setup.cfg, each in a venv of its own and without the lock file.
test-lowest: VERSIONS = --resolution lowest-direct
test-newest: VERSIONS = --upgrade
test-lowest test-newest: test-%: .venv-%/uv
	$(call in,$*) uv pip install --quiet $(BACKEND) $(VERSIONS) --editable '.[demo,dev]'
	$(call in,$*) python -m pytest -n 2 --dist loadfile

# A PyTorch without CUDA and nothing of s3prl. Where uv reaches no such builds, pip may have one.
CPU_TORCH ?= torch==2.13.0
test-cpu: .venv-cpu/uv
	$(call in,cpu) uv pip install --quiet --torch-backend cpu '$(CPU_TORCH)' \
		|| $(call in,cpu) python -m pip install --quiet '$(CPU_TORCH)'
	$(call in,cpu) python -c 'import torch; assert not torch.version.cuda, torch.__version__'
	$(call in,cpu) uv pip install --quiet --editable '.[demo,dev]'
	$(call in,cpu) python -m pytest -n 2 --dist loadfile

# The wheel as a stranger has it: installed without the clone, run from another folder.
test-wheel: .venv-wheel/uv
	rm -rf build dist
	$(call in,wheel) uv build --quiet --wheel --out-dir dist
	$(call in,wheel) uv pip install --quiet $(BACKEND) --reinstall-package speech-ft-bench \
		--constraint requirements.lock "$$(ls dist/*.whl)[demo]"
	.venv-wheel/bin/python -P tests/smoke_wheel.py

in = VIRTUAL_ENV=$(CURDIR)/.venv-$(1) PATH="$(CURDIR)/.venv-$(1)/bin:$$PATH"

.venv-%/uv:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check uv
	touch $@

bench: install
	$(BIN)/python -m tests.bench

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
