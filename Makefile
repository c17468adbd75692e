# Every target works in the active virtual environment, or makes one in .venv and says so.
PYTHON ?= python3
ifdef VIRTUAL_ENV
BIN := $(VIRTUAL_ENV)/bin
READY :=
else
BIN := $(CURDIR)/.venv/bin
READY := .venv/.ready
endif
# pip chooses the newest torch; set TORCH to pin one, such as TORCH=torch==2.13.0 (a CPU build on Python 3.11).
TORCH ?=
# How many test files run at the same time. Many wait: for other ranks, or for a time limit. So three keep two cores busy.
JOBS ?= 3
# More options for pytest, such as OPTIONS=--slow-limit=90 or OPTIONS="-k parity".
OPTIONS ?=
PYTEST = $(BIN)/python -m pytest
# A file stays with one worker. tests/conftest.py puts the longest files first.
PARALLEL = -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=25 $(OPTIONS)
# `make test` leaves out what a run uses only if its settings or its command name it; `make test-further` runs these files.
BY_VLLM = end_to_end/test_vllm.py end_to_end/test_vllm_devices.py rollouts/test_device_transfer.py mcore/test_weight_source.py
EXPERTS = $(patsubst tests/%,%,$(wildcard tests/mcore/test_expert_*.py)) end_to_end/test_experts.py
DOMAINS = masker/test_code_anchors.py masker/test_code_tokens.py masker/test_text_anchors.py grading/test_graders.py \
    end_to_end/test_domains.py
OPTIONAL = mcore/test_fixed_steps.py mcore/test_fp8_emulation.py mcore/test_offloaded_optimizer.py mcore/test_pipeline_checkpoint.py \
    mcore/test_vocabulary.py end_to_end/test_profile.py end_to_end/test_shown.py reliability/test_preflight.py \
    run/test_lock_hosts.py run/test_lock_slurm.py
BESIDE = planning report run/loggers search tools cli/test_plan.py cli/test_push.py cli/test_search.py test_site.py test_wheel.py \
    grading/test_add_a_grader.py objectives/test_add_an_objective.py
FURTHER = $(BY_VLLM) $(EXPERTS) $(DOMAINS) $(OPTIONAL) $(BESIDE)
# `make check` leaves out those too, and the folders and files that start ranks, nodes or compilers, or that train.
STARTS = end_to_end reliability slurm gpu convert mcore losses/test_losses_parallel.py losses/test_losses_triton.py

.PHONY: help quickstart testbed testbed-full test test-further check test-all test-slurm test-vllm test-vllm-all test-engine soak test-gpu \
        bench docs docs-serve install

help:
	@sed -n 's/^## //p' Makefile

## make quickstart   train a tiny Qwen3 with PAINT on 4 CPU processes and show that it got better
quickstart: $(READY)
	$(BIN)/megatron-paint train examples/quickstart/paint.yaml --processes 4

# A run of the testbed keeps one core busy, so the default is lower here.
testbed testbed-full: JOBS := $(if $(filter file,$(origin JOBS)),2,$(JOBS))

## make testbed      SFT, GRPO, OPSD, PAINT and PAINT's parts on small models: 540 runs, five hours or more
testbed: $(READY)
	$(BIN)/python tools/testbed.py --jobs $(JOBS)

## make testbed-full the same with more seeds, and every control on every variant: 3,840 runs, a day or more
testbed-full: $(READY)
	$(BIN)/python tools/testbed.py --jobs $(JOBS) --full

## make test         what every run relies on: method, converter, trainer, faults, Slurm's scripts; no GPU, nothing long
test: $(READY)
	$(PYTEST) -m "not gpu and not cluster and not long" $(FURTHER:%=--ignore=tests/%) $(PARALLEL)

## make test-further what a run uses only if it is asked for: vLLM, experts, domains, search, report; no GPU, nothing long
test-further: $(READY)
	$(PYTEST) -m "not gpu and not cluster and not long" $(PARALLEL) $(FURTHER:%=tests/%)

## make check        lint, and those tests of `make test` that start no ranks
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -q -m "not gpu and not cluster and not long" $(patsubst %,--ignore=tests/%,$(FURTHER) $(STARTS)) $(PARALLEL)

## make test-all     everything that needs no GPU; as root, also on a Slurm cluster that it starts: hours
test-all: $(READY)
	$(PYTEST) -m "not gpu and not cluster" $(PARALLEL)
	$(PYTEST) -m cluster -n 0 $(OPTIONS) tests/slurm

## make test-slurm   everything about Slurm, on a cluster that it starts, as root: half an hour
test-slurm: $(READY)
	$(PYTEST) -n 0 -rP $(OPTIONS) tests/slurm

## make test-vllm VLLM=PYTHON   tests that talk to vLLM itself, in the environment of this Python (docs/vllm.md)
test-vllm: $(READY)
	$(VLLM) -m pip install -q --no-deps -e .
	MEGATRON_PAINT_VLLM=$(VLLM) $(PYTEST) -m vllm -n 0 $(OPTIONS) tests/rollouts tests/end_to_end/test_real_vllm.py::test_a_run

## make test-vllm-all VLLM=PYTHON   all of them, with adapters, one step ahead and faults
test-vllm-all: $(READY)
	$(VLLM) -m pip install -q --no-deps -e .
	MEGATRON_PAINT_VLLM=$(VLLM) $(PYTEST) -m vllm -n 0 $(OPTIONS) tests/rollouts tests/end_to_end

## make test-engine TE=FOLDER   builds Transformer Engine's layers on a CPU; FOLDER holds transformer_engine (docs/testing.md)
test-engine: $(READY)
	MEGATRON_PAINT_TE=$(TE) $(PYTEST) -m engine -n 0 $(OPTIONS) tests/engine

## make soak         a run whose ranks are killed 100 times, and which resumes each time
soak: $(READY)
	MEGATRON_PAINT_KILLS=100 $(PYTEST) -q -s $(OPTIONS) tests/reliability/test_soak.py

## make test-gpu     the tests that need a GPU
test-gpu: $(READY)
	$(PYTEST) -m gpu $(OPTIONS) tests/gpu

## make bench        benchmarks that need no other program; docs/benchmarks.md has the commands of all
bench: $(READY)
	for name in masker loss bf16_logits evaluation rollout checkpoint planner; do $(BIN)/python benchmarks/$$name.py || exit 1; done

## make docs         the documentation site, in site/; a broken link, or a cell of a notebook that fails, ends it
docs: $(READY)
	$(BIN)/python tools/run_notebooks.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

## make docs-serve   the site on 127.0.0.1:8000, built again at every change
docs-serve: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

# $(1) is the Python of an environment.
define INSTALL
	$(if $(TORCH),$(1) -m pip install $(TORCH))
	$(1) -m pip install -e ".[test,docs,tensorboard,wandb,mlflow]"
endef

## make install      the package and what these targets need, into the active environment or a new .venv
install: $(READY)
ifdef VIRTUAL_ENV
	$(call INSTALL,$(BIN)/python)
endif

.venv/.ready: setup.py
	@echo "No virtual environment is active. Making one in .venv and installing megatron_paint into it: some minutes."
	$(PYTHON) -m venv .venv
	$(call INSTALL,.venv/bin/python)
	touch $@
