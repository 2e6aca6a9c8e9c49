# Two commands need no set-up: `make train` and `make test`. The first run builds .venv, later runs reuse it.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
CODE := dynmoe_tutel kernels benchmarks tests
TRAIN_ARGS ?=

.PHONY: train test lint typecheck clean
.DEFAULT_GOAL := test

$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install $(PIP_ARGS) -e '.[experiments,tensorboard,test]'
	touch $@

train: $(VENV)/.ready
	$(BIN)/dynmoe-tutel train $(TRAIN_ARGS)

test: lint typecheck
	$(BIN)/python -m pytest -n 2 $(TEST_ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

# mypy knows no package_dir: show it the tree as it is installed
typecheck: $(VENV)/.ready
	rm -rf build/typecheck && mkdir -p build/typecheck/dynmoe_tutel
	ln -s $(CURDIR)/dynmoe_tutel/* $(CURDIR)/kernels build/typecheck/dynmoe_tutel/
	cd build/typecheck && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p dynmoe_tutel

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
