# Everything in one virtual environment, set up on first use. `make demo` and `make test` need Python >= 3.10 with pip, git
# and a C++17 compiler; ninja comes from pip, ccache is used where it is installed.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
# Test processes; each computes with one thread.
JOBS ?= auto
PYTEST_ARGS ?=

BIN := $(VENV)/bin
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)
NATIVE := $(shell find csrc -type f -name '*.cpp' -o -type f -name '*.h' -o -type f -name '*.cu' -o -type f -name '*.cuh')
EMULATION := $(shell find tests/emulation -type f -name '*.cpp' -o -type f -name '*.h' -o -type f -name '*.cu')
# The version is in the name, so that another TORCH installs another torch.
TORCH_STAMP := $(VENV)/.torch-$(TORCH)
INSTALL_STAMP := $(VENV)/.install-$(TORCH)
BUILD_STAMP := $(VENV)/.build-$(TORCH)
TOOLS_STAMP := $(VENV)/.tools
DOCS_STAMP := $(VENV)/.docs

.PHONY: help demo test test-fast lint format table docs bench bench-ops bench-cpu gpu-check gpu-model wheel clean

help:
	@echo "make demo        load the example checkpoint, generate text, print a table"
	@echo "make test        all tests"
	@echo "make test-fast   without those marked slow"
	@echo "make lint        ruff, mypy, clang-format"
	@echo "make format      rewrite the sources as lint wants them"
	@echo "make table       write the table of ops into README.md"
	@echo "make docs        build the documentation into build/docs"
	@echo "make bench       time the ops"
	@echo "make bench-ops   time them beside eager torch and inductor's code, into benchmarks/results/cpu_ops.txt"
	@echo "make bench-cpu   time Ferrum next to the engines of benchmarks/peers that are installed"
	@echo "make gpu-check   build, test and measure on an NVIDIA GPU, with the torch of GPU_PYTHON (python3)"
	@echo "make gpu-model   expert block beside its peers and the whole model on an NVIDIA GPU, with the library that gpu-check built"
	@echo "make wheel       build dist/*.whl"
	@echo "make clean       remove what the build made (make VENV=... keeps its environment elsewhere)"

demo: $(BUILD_STAMP)
	$(BIN)/python examples/demo.py

test: $(BUILD_STAMP)
	$(TESTS)

test-fast: $(BUILD_STAMP)
	$(TESTS) -m "not slow"

lint: $(BUILD_STAMP) $(TOOLS_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE) $(EMULATION)

format: $(TOOLS_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE) $(EMULATION)

table: $(BUILD_STAMP)
	$(BIN)/python -m ferrum_ops.table --write README.md

docs: $(BUILD_STAMP) $(DOCS_STAMP)
	$(BIN)/python docs/reference.py build/docs-source
	$(BIN)/python -m sphinx -q -E -W --keep-going -c docs build/docs-source build/docs

bench: $(BUILD_STAMP)
	@set -e; for file in benchmarks/ops/bench_*.py; do echo; echo "$$file"; \
	  $(BIN)/python $$file; \
	done

bench-ops: $(BUILD_STAMP)
	$(BIN)/python -m benchmarks.cpu_ops --out benchmarks/results/cpu_ops.txt

bench-cpu: $(BUILD_STAMP)
	for section in experts linear model gguf scaling summary; do $(BIN)/python -m benchmarks.cpu $$section --save || exit 1; done

# Installs nothing: it wants a Python that has a torch with CUDA. Results go to GPU_OUT, and name GPU_COMMIT where the
# sources lie outside a git checkout.
GPU_PYTHON ?= python3
GPU_OUT ?= build/gpu
gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu_check --out $(GPU_OUT) $(if $(GPU_COMMIT),--commit $(GPU_COMMIT))

# After gpu-check, which has built the library and measures this without the compiler.
gpu-model:
	$(GPU_PYTHON) -m benchmarks.gpu_experts --out $(GPU_OUT)
	$(GPU_PYTHON) -m benchmarks.gpu_model --out $(GPU_OUT)

wheel: export PATH := $(abspath $(BIN)):$(PATH)
wheel: $(BUILD_STAMP) $(TOOLS_STAMP)
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf build dist *.egg-info ferrum_ops/*.so $(VENV)/.install-* $(VENV)/.build-*

# torch first: the build compiles against it, and an isolated build would download another one.
$(TORCH_STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(BIN)/python -m pip install --quiet "pip>=23" "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install --quiet "torch==$(TORCH)"
	rm -f $(VENV)/.torch-* $(VENV)/.install-* $(VENV)/.build-*
	touch $@

# pip installs the dependencies and compiles once; from then on ninja recompiles what changed.
$(BUILD_STAMP): export PATH := $(abspath $(BIN)):$(PATH)
$(BUILD_STAMP): $(TORCH_STAMP) setup.py $(NATIVE)
	if test -e $(INSTALL_STAMP); then \
	  $(BIN)/python setup.py --quiet build_ext --inplace; \
	else \
	  $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test]"; \
	fi
	touch $(INSTALL_STAMP) $@

$(TOOLS_STAMP): $(TORCH_STAMP)
	$(BIN)/python -m pip install --quiet ruff mypy pre-commit clang-format build torch-abi-audit
	touch $@

$(DOCS_STAMP): $(TORCH_STAMP)
	$(BIN)/python -m pip install --quiet sphinx myst-parser furo
	touch $@
