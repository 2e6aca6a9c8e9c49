# Two commands need no set-up: `make train` and `make test`. The first run builds .venv, later runs reuse it.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
CODE := dynmoe_tutel kernels benchmarks tests
TRAIN_ARGS ?=
AOT_ARGS ?= --all
GPU_ARGS ?=
RESULTS ?= benchmarks/results

.PHONY: train test lint typecheck gpu aot clean
.DEFAULT_GOAL := test

$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install $(PIP_ARGS) -e '.[experiments,tensorboard,test]'
	# alone: the torchvision that it asks for must be built against this very torch, which an index may not have
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install $(PIP_ARGS) --no-deps timm
	touch $@

train: $(VENV)/.ready
	$(BIN)/dynmoe-tutel train $(TRAIN_ARGS)

test: lint typecheck
	$(BIN)/python -m pytest -n 2 $(TEST_ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

typecheck: $(VENV)/.ready
	$(BIN)/mypy -p dynmoe_tutel

# no network and no venv: PYTHON= names an interpreter with torch and Triton, whose peers are measured too
gpu:
	$(PYTHON) -m benchmarks.gpu --results $(RESULTS) $(GPU_ARGS)

aot: $(VENV)/.ready
	$(BIN)/python -m benchmarks.aot $(AOT_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
