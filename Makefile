# make demo   check a variant, prove its schedule, train a small GPT with it
# make test   linters, types, import rules and tests: all that a change must pass
#
# Both make .venv and install into it what is missing; a second run starts at once. PYTHON=... picks the interpreter.
# Without an NVIDIA GPU the CPU build of PyTorch comes first, so that nothing later pulls in CUDA. Where pip knows of no
# CPU build, it stops instead of fetching gigabytes: name one by TORCH=... (a wheel, say), or accept CUDA by CUDA=yes.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install
READY  := $(VENV)/.ready
NEWEST := $(VENV)/newest

CUDA   ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
ifeq ($(CUDA),yes)
TORCH  ?= torch>=2.11
TRITON ?= triton>=3.6
else
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.6.0
endif

define REFUSE_CUDA
import json, sys
names = [item["metadata"]["name"] for item in json.load(sys.stdin)["install"]]
if any(name.startswith("nvidia-") for name in names):
    sys.exit("pip would fetch the CUDA build, and there is no NVIDIA GPU: give TORCH=<a CPU build> or CUDA=yes")
endef
export REFUSE_CUDA

.PHONY: demo test docs format clean
.DEFAULT_GOAL := demo

demo: $(READY)
	@echo "== The text: errors would be shown here, all at once"
	$(BIN)/attn-dsl check sliding_window
	@echo "== The proof: which tiles a kernel may skip, and why"
	$(BIN)/attn-dsl prove sliding_window --set window=512 --q-len 2048 --kv-len 2048 --block 128 128
	@echo "== The use: a small GPT whose attention comes from a .attn file"
	$(BIN)/python examples/train_char_lm.py

test: $(READY)
	@echo "== Lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== Types"
	$(BIN)/mypy
	@echo "== Import rules"
	$(BIN)/lint-imports
	@echo "== Tests"
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not gpu"
	@echo "== Kernels, interpreted"
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest -n 2
	@echo "== Kernels, ahead of time with the newest Triton"
	test "$$(uname -s)" != Linux || test -d $(NEWEST) || $(PIP) --no-deps --target $(NEWEST) triton
	OMP_NUM_THREADS=1 PYTHONPATH=$(NEWEST) $(BIN)/pytest -n 2 tests/backend/test_portable_aot.py \
		tests/backend/test_decode_aot.py

docs: $(READY)
	$(BIN)/python docs/generate.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	@echo "== [1/4] Virtual environment in $(VENV)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "== [2/4] PyTorch ($(TORCH))"
	@test "$(CUDA)" = yes || $(PIP) --dry-run --quiet --report - '$(TORCH)' | $(BIN)/python -c "$$REFUSE_CUDA"
	$(PIP) '$(TORCH)'
	@echo "== [3/4] Triton ($(TRITON))"
	test "$$(uname -s)" != Linux || $(PIP) '$(TRITON)'
	@echo "== [4/4] attn-dsl and the tools that test it"
	$(PIP) --editable '.[dev]'
	@touch $@
