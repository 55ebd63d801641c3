# Each target sets up .venv by itself when it is missing or stale. PYTHON picks the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
SLURM := tests/slurm/cluster.sh
# Tests of one process side by side on all cores, a file at a time (pytest-xdist 3.8 has lost its groups with pytest 9.2)
# and the long ones first; then, one at a time, those that start ranks, batch jobs and GPU work.
LONG_TESTS := tests/laws/ tests/export/ tests/memory/
RANK_TESTS := tests/distributed/ tests/slurm/ tests/gpu/
ALL_TESTS := $(wildcard tests/test_*.py) $(sort $(dir $(wildcard tests/*/test_*.py)))

.DEFAULT_GOAL := help
.PHONY: help demo test soak lint format slurm-up slurm-down

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

demo: $(STAMP) ## Train, export and chat with a small Qwen on 2 CPU processes (about three minutes)
	@$(VENV)/bin/python examples/demo/demo.py

test: $(STAMP) ## Run all tests that this machine can run
	@failed=0; \
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
	  $(LONG_TESTS) $(filter-out $(LONG_TESTS) $(RANK_TESTS),$(ALL_TESTS)) || failed=1; \
	$(VENV)/bin/python -m pytest $(filter $(ALL_TESTS),$(RANK_TESTS)) || failed=1; \
	exit $$failed
	@echo
	@echo "All tests passed. Next: make demo, or qwen-dist init for a run of your own"
	@[ -f .slurm/slurm.conf ] || echo "(tests on a real Slurm: make slurm-up, then make test again)"

soak: $(STAMP) ## Train 2,000 steps through random kills, stops and signals, and compare (ten minutes)
	@$(VENV)/bin/python -m tests.soak.soak

lint: $(STAMP) ## Check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP) ## Rewrite the code in the project's style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

slurm-up: $(STAMP) ## Start a Slurm of two nodes on this machine (needs root, slurm-wlm and munge)
	@$(SLURM) up

slurm-down: ## Stop it and remove its state
	@$(SLURM) down

$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): PyTorch, DeepSpeed and the rest, some GB the first time; this takes minutes."
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("error: Python 3.10 or newer is needed; name one: make PYTHON=python3.12 ...")'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)
	@echo "Ready: $(VENV)/bin/qwen-dist"
