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
# Test files that run side by side; some start four processes.
JOBS ?= 2

.PHONY: help quickstart testbed testbed-full test check soak test-slurm test-long test-gpu bench install

help:
	@sed -n 's/^## //p' Makefile

## make quickstart   train a tiny Qwen3 with PAINT on 4 CPU processes and show that it got better
quickstart: $(READY)
	$(BIN)/megatron-paint train examples/quickstart/paint.yaml --processes 4

## make testbed      SFT, GRPO, OPSD, PAINT and PAINT's parts on small models, with a report: some hours
testbed: $(READY)
	$(BIN)/python tools/testbed.py --jobs $(JOBS)

## make testbed-full the same with more seeds, and every control on every kind of teacher: a night
testbed-full: $(READY)
	$(BIN)/python tools/testbed.py --jobs $(JOBS) --full

## make test         every test that needs no GPU and is not long
# In the order of the files: tests/unit, whose files are short, comes last, so that all processes end together.
test: $(READY)
	$(BIN)/python -m pytest -m "not gpu and not long" -n $(JOBS) --dist loadfile --no-loadscope-reorder

## make check        lint and the fast tests
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q tests --ignore=tests/end_to_end --ignore=tests/reliability --ignore=tests/slurm --ignore=tests/gpu --ignore=tests/convert --ignore=tests/mcore

## make soak         a run whose ranks are killed 100 times, and goes on each time
soak: $(READY)
	MEGATRON_PAINT_KILLS=100 $(BIN)/python -m pytest -q -s tests/reliability/test_soak.py

## make test-slurm   everything on a Slurm cluster that it starts itself, as root: half an hour
test-slurm: $(READY)
	$(BIN)/python -m pytest -n 0 -rP tests/slurm

## make test-long    the long tests: of the quickstart, and on that cluster
test-long: $(READY)
	$(BIN)/python -m pytest -n 0 -m long

## make test-gpu     the tests that need a GPU
test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu tests/gpu

## make bench        the benchmarks of docs/benchmarks.md
bench: $(READY)
	for name in masker loss bf16_logits evaluation checkpoint; do $(BIN)/python benchmarks/$$name.py || exit 1; done

## make install      the package and what its tests need, into the environment
install: $(READY)

.venv/.ready: setup.py
	@echo "No virtual environment is active: making one in .venv and installing megatron_paint into it (some minutes)."
	$(PYTHON) -m venv .venv
	$(if $(TORCH),.venv/bin/python -m pip install -q $(TORCH))
	.venv/bin/python -m pip install -q -e ".[test,tensorboard]"
	touch $@
