# msm_dist: `make pretrain` and `make test` do everything from nothing; `make help` lists the rest.
#   PYTHON=python3.12   the interpreter to build .venv from
#   VENV=0              no .venv: PYTHON and its packages as they are, without touching a network
#   TORCH_INDEX=URL     take torch from this wheel index (a CPU build, another CUDA)
#   PYTEST_ARGS=...     passed to pytest
#   WORKERS=1           how many test files `make test` runs at a time; by default as many as cores, 4 at most
#   SEED=N              repeats the draw of `make chaos`
#   BENCH_ARGS=...      passed to the benchmarks: --minutes 2, --out FOLDER
#   HEAR_MODEL=runs/x   the weights that test-hear runs the HEAR tools on: a run or an export

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PYTEST_ARGS ?=
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || echo 1); echo $$((cores < 4 ? cores : 4)))
STUDY_ARGS ?=
SEED ?=
BENCH_ARGS ?=
HEAR_PYTHON ?= python3.11
HEAR_VENV ?= build/hear/venv
HEAR_MODEL ?= $(patsubst %/model.safetensors,%,$(wildcard runs/quickstart/export/model.safetensors))
# With VENV=0: the packages that a target needs; empty is all of setup.py.
NEEDS :=

define CHECK_PYTHON
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
  echo "Python 3.11 or newer is needed; PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1 || true)."; \
  echo "Name another one with PYTHON=..., or on Debian 12 and Ubuntu 24.04: apt-get install python3 python3-venv"; \
  exit 2; }
endef

ifeq ($(VENV),0)
PY := $(PYTHON)
DEEPSPEED := $(PYTHON) -m deepspeed.launcher.runner
export PYTHONPATH := $(CURDIR):$(CURDIR)/build/importable$(if $(PYTHONPATH),:$(PYTHONPATH))
.PHONY: ready
ready:
	@$(CHECK_PYTHON)
	@$(PYTHON) -m tools.setup_env --venv 0 $(if $(NEEDS),--needs $(NEEDS))
else
PY := $(VENV)/bin/python
DEEPSPEED := $(VENV)/bin/deepspeed
export PATH := $(abspath $(VENV))/bin:$(PATH)
.PHONY: ready
ready: $(VENV)/.setup-done
endif

.PHONY: help setup pretrain study test test-slurm test-aot test-engine test-hear test-gpu chaos bench bench-data tune gpu-session gpu-reference lint doctor clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18
	@sed -n '/^#   /s/^#/ /p' $(MAKEFILE_LIST)

SET_UP_BEFORE := $(wildcard $(VENV)/.setup-done)
setup: ready ## make .venv: everything that training and the tests need
	@$(if $(filter 0,$(VENV)),echo "set-up: $(PYTHON) has what is needed",$(if $(SET_UP_BEFORE),cat $(SET_UP_BEFORE)))

$(VENV)/.setup-done: setup.py constraints.txt
	@$(CHECK_PYTHON)
	@$(PYTHON) -m tools.setup_env --venv $(VENV) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

# The embedded corpus: its shards' index.json is written last, so that it stands for all of them.
data/embedded/.complete: | ready
	$(PY) -m msm_dist data synth data/embedded
	@touch $@

data/quickstart/%/index.json: data/embedded/.complete | ready
	$(PY) -m msm_dist data pack data/embedded/$* data/quickstart/$*

# configs/quickstart.yaml has a global batch of 32: spread over the largest power of two of processes up to 8.
pretrain: ready data/quickstart/train/index.json data/quickstart/valid/index.json ## pre-train on the embedded corpus
	@gpus=$$($(PY) -c 'import torch; print(torch.cuda.device_count())'); \
	case $$gpus in 0) processes=2 ;; 1) processes=1 ;; 2|3) processes=2 ;; [4-7]) processes=4 ;; *) processes=8 ;; esac; \
	micro_batch=$$(( processes > 2 ? 32 / processes : 16 )); \
	port=$$($(PY) -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'); \
	set -x; $(DEEPSPEED) --num_accelerators $$processes --master_port $$port \
	  --module msm_dist.pretrain configs/quickstart.yaml data.valid_shards=data/quickstart/valid \
	  train.micro_batch=$$micro_batch; \
	{ set +x; } 2>/dev/null; test -f runs/quickstart/export/model.safetensors || \
	  { echo "make pretrain: the run stopped before its end; make pretrain again continues it"; exit 1; }

# More clips to judge than by default: scores of 60 a class, not of 20.
data/probe-tasks/.complete: | ready
	$(PY) -m msm_dist data tasks data/probe-tasks --clips 50 60 10
	@touch $@

# Called again it goes on where it was stopped. STUDY_ARGS="train.steps=20 probe.clips=20" tries it.
study: ready data/quickstart/train/index.json data/quickstart/valid/index.json data/probe-tasks/.complete ## the paper's studies scaled down, under an hour on two cores
	$(PY) -m msm_dist submit configs/study/base.yaml $(STUDY_ARGS) --cluster local --tasks-per-node 2 \
	  --sweep configs/study/sweep.yaml
	$(PY) -m msm_dist study gather runs/study --out runs/study/results

test: ready ## run all the tests that this machine can run
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# make test takes a few cells of this matrix, and of fine-tuning's. The table of docs/engine.md: python -m tests.engine_matrix
test-engine: ready ## every ZeRO stage, precision and offload against plain AdamW and read by another one
	OMP_NUM_THREADS=1 $(PY) -m pytest -m engine tests/test_engine_matrix.py tests/test_divergence_engine.py tests/test_finetune.py $(PYTEST_ARGS)

# Ten rounds are part of `make test`.
chaos: ready ## a run under 25 drawn faults, which must end as one without: kills, disks, clocks, shards
	OMP_NUM_THREADS=1 $(PY) -m tests.chaos $(if $(SEED),--seed $(SEED))

# Part of `make test` where root and Slurm's packages are there; this one installs them, on Debian and Ubuntu.
test-slurm: ready ## bring up a real Slurm cluster of two nodes and run jobs, requeues, power cuts; needs root
	@test "$$(id -u)" = 0 || { echo "test-slurm: needs root (packages, network namespaces, daemons)"; exit 2; }
	@bash tests/cluster/slurm-up.sh install; \
	export OMP_NUM_THREADS=1 SLURM_LAB_NAME=msm$$(cksum <<< "$$PWD" | cut -c 1-6); \
	trap 'for more in "" t s; do SLURM_LAB_NAME=$$SLURM_LAB_NAME$$more bash tests/cluster/slurm-up.sh down; done' EXIT; \
	$(PY) -m pytest -m slurm $(PYTEST_ARGS)

# The tools are of 2021: their environment (kept) is made once, with Python 3.11. docs/hear.md: its size, the full task set.
test-hear: ready ## run the real hear-validator and hear-eval-kit over tiny tasks, in an environment of their own
	@$(HEAR_PYTHON) -c '' 2>/dev/null || { \
	  echo "test-hear: $(HEAR_PYTHON) is not there; the HEAR tools run on Python 3.11: HEAR_PYTHON=..."; exit 2; }
	@$(HEAR_PYTHON) -m tools.hear_env --venv $(HEAR_VENV) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))
	@echo "test-hear: weights: $(or $(HEAR_MODEL),random; make pretrain gives trained ones)"
	HEAR_VENV=$(abspath $(HEAR_VENV)) HEAR_MODEL=$(HEAR_MODEL) OMP_NUM_THREADS=1 \
	  $(PY) -m pytest -m hear tests/test_hear_real.py $(PYTEST_ARGS)

# Without deepspeed the tests of the engine are left out and named; `bench` says that plain AdamW took its place.
test-gpu: NEEDS := torch torchaudio numpy triton pydantic pyyaml safetensors pytest pytest-timeout hypothesis
test-gpu: ready ## run the tests that need a GPU; says so where there is none
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(PY) -m pytest -m gpu $(PYTEST_ARGS); \
	else echo "test-gpu: there is no GPU: skipped"; fi

bench tune: NEEDS := torch numpy triton pydantic pyyaml safetensors
bench: ready ## kernels and training step against what a user would pick instead; says so where there is no GPU
	@if ! $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  echo "bench: there is no GPU: skipped"; exit 0; fi; \
	code=0; $(PY) -m benchmarks.kernels $(BENCH_ARGS) || code=$$?; \
	$(PY) -m benchmarks.step $(BENCH_ARGS) || code=$$?; exit $$code

bench-data: ready ## how fast crops are read, beside webdataset and .npy files; needs no GPU
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.data $(BENCH_ARGS)

tune: ready ## measure launch configurations on this GPU and write kernels/configurations.json
	@$(PY) -m benchmarks.kernels --tune $(BENCH_ARGS)

gpu-session: $(if $(filter 0,$(VENV)),,ready) ## test-gpu, bench and a short training run in under 8 minutes, logged in OUT=folder
	@PYTHON=$(PY) benchmarks/gpu_session.sh  # with VENV=0 it checks packages itself, after WHEELS are unpacked

gpu-reference: ready ## the reference run on one GPU: 2,000 steps of base on made-up audio, kept under docs/reference
	@$(PY) -m benchmarks.reference_run

# One variant of each kernel for every GPU: make test-aot PYTEST_ARGS="-k one_variant"
test-aot: ready ## compile every variant of every kernel for four GPUs; needs none of them, takes long
	OMP_NUM_THREADS=1 $(PY) -m pytest -m aot tests/test_aot.py $(PYTEST_ARGS)

lint: ready ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

doctor: ready ## check this machine and the packages
	@$(PY) -m msm_dist.doctor

clean: ## remove what tools leave behind; .venv, data and runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
