# Two commands need no set-up: `make train` and `make test`. The first run builds .venv, later runs reuse it.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
CODE := dynmoe_tutel kernels benchmarks tests examples
TRAIN_ARGS ?=
AOT_ARGS ?= --all
GPU_ARGS ?=
RESULTS ?= benchmarks/results

# tests of the core, new files too: all but Triton's interpreter, ranks, experiments, hosts, tools and what is slow
CHECK_TESTS := tests -m 'not slow' $(addprefix --ignore=tests/, \
	kernels/gpu gpu parallel stock_deepspeed stock_tutel experiments integrations benchmarks cli test_packaging.py)
# of these what computes, and a training in the interpreter: under the vector units and sums of other processors, and
# under the first without the loops that numba compiles
PROCESSOR_TESTS := $(CHECK_TESTS) $(addprefix --ignore=tests/,checkpoint test_compile.py test_documents.py test_examples.py \
	test_architecture.py test_old_paths.py test_bad_input.py test_tutel_stand_in.py test_torch_machinery.py)
INTERPRETED := tests/kernels/gpu/test_gpu_whole_layer.py::test_training_grows_as_on_the_cpu
OTHER_UNITS := DYNMOE_TUTEL_NUMBA=0 ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41
OTHER_UNITS_2 := ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2

.PHONY: train test check test-processors lint typecheck gpu aot clean
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

check: lint typecheck
	$(BIN)/python -m pytest -n 2 $(CHECK_TESTS) $(TEST_ARGS)

# threads that wait must not spin: there are as many processes
test-processors: $(VENV)/.ready
	$(OTHER_UNITS) OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 $(PROCESSOR_TESTS) $(TEST_ARGS)
	$(OTHER_UNITS) $(BIN)/python -m pytest $(INTERPRETED) $(TEST_ARGS)
	$(OTHER_UNITS_2) $(BIN)/python -m pytest -n 2 $(PROCESSOR_TESTS) $(TEST_ARGS)

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
