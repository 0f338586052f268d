# Every target sets itself up: a virtual environment in $(VENV), and the project in it with the extras that it needs.
# PYTHON chooses the interpreter (3.11 or newer). What pip reads from its environment or configuration, such as
# PIP_INDEX_URL, is left alone; PIP_EXTRA_ARGS is added to its command line.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# Two blank lines end a poem; the shell strips them from what it substitutes, hence the full stop.
WRITE = end="$$(printf '\n\n\n.')"; $(BIN)/andromeda generate runs/verse --stop "$${end%.}"

.PHONY: demo test test-slow test-gpu async-io check format clean

demo: $(VENV)/installed-train
	$(BIN)/andromeda train recipes/verse.yaml
	$(BIN)/andromeda eval runs/verse --text examples/verse/validation.txt --lengths 256,1024,4096
	@echo "loss curve: runs/verse/loss.png"
	@$(WRITE) --prompt "$$(printf 'THE SEA\n\nThe')" --seed 1
	@$(WRITE) --prompt "$$(printf 'TO THE MOON\n\nO')" --seed 2

test: $(VENV)/installed-test
	$(PYTEST) -n 2

test-slow: $(VENV)/installed-test
	-$(MAKE) async-io
	$(PYTEST) -m "slow and not gpu"
	$(PYTEST) -n 2 -m "hypothesis and not slow and not gpu"  # four times the examples

test-gpu: $(VENV)/installed-test
	$(PYTEST) -m gpu -n 4

# What ZeRO-3 needs for NVMe: libaio's headers, and DeepSpeed's async_io, which is built once, in 5 minutes of one core.
async-io: $(VENV)/installed-test
	test -e /usr/include/libaio.h || $(SUDO) apt-get install --yes libaio-dev
	timeout 1800 $(BIN)/python -m andromeda.training.engines.async_io

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info runs/verse .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is younger than pyproject.toml once its extras are installed.
$(VENV)/installed-%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=...")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_EXTRA_ARGS) --editable ".[$*]"
	@touch $@
