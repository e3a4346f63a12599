# `make train`: install, train and measure an encoder.  `make test`: lint, types, tests and the examples in docstrings.
PYTHON ?= python3
BIN := .venv/bin
SHARED := $(abspath $(wildcard ../shared/data))
ifneq ($(SHARED),)
export TERCET_DATA ?= $(SHARED)
endif
export TOKENIZERS_PARALLELISM ?= false

PEERS := .venv-peers/bin
# Two processes of one thread each use two cores better than one process of two threads.
WORKERS ?= 2
# A file of tests stays in one process, which makes its fixtures once.
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: train test test-all test-triton benchmark docs lint fix clean
train: .venv/quickstart
	@echo "Training. The same without make: $(BIN)/python train.py"
	$(BIN)/python train.py

test: lint
	@echo "Testing$(if $(TERCET_DATA), with the data in TERCET_DATA=$(TERCET_DATA),; tests that need TERCET_DATA are skipped)."
	$(PYTEST) -m "not slow and not gpu"

test-all: lint
	$(PYTEST)

# Kernels for a GPU, in Triton's interpreter. Triton comes with CUDA builds of torch; beside another: pip install triton.
test-triton: .venv/dev
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/models/test_triton_kernels.py -m "not gpu"

benchmark: .venv-peers/ready
	@echo "Benchmarks against other libraries: a quarter of an hour, outputs/benchmarks/."
	HF_HUB_OFFLINE=1 $(PEERS)/python -m benchmarks

# The documentation as a site, in site/: pages of docs/, and the reference from docstrings and conf/. A broken link is an error.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-peers

# torch is installed first and alone, so that no other package pulls in another build of it.
.venv/torch: constraints.txt
	@echo "Creating .venv with $$($(PYTHON) --version) and installing torch (a few minutes, once)."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@touch $@

# The libraries that the benchmarks compare with, in an environment of their own.
.venv-peers/ready: pyproject.toml constraints.txt
	@echo "Creating .venv-peers (a few minutes, once)."
	$(PYTHON) -m venv .venv-peers
	$(PEERS)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(PEERS)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quickstart,export]' \
		sentence-transformers accelerate pytorch-metric-learning scikit-learn
	@touch $@

.venv/quickstart .venv/dev .venv/docs: .venv/%: .venv/torch pyproject.toml constraints.txt
	@echo "Installing tercet[$*] with the versions of constraints.txt."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@
