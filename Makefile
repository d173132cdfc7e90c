# One place for every command; CI (.ci/run) and pre-commit call the same lines.

PYTHON ?= python3
# The simulator's Python. opensim 4.6 has wheels from 3.11 on, scipy 1.13.1 (osim-rl uses its interp2d) up to 3.12.
OSIM_PYTHON ?= $(PYTHON)

VENV := .venv
OSIM := .venv-osim
SB3 := .venv-sb3
# Pinned, so that where pip's index has a build without CUDA, that one stays: the others are gigabytes.
SB3_TORCH ?= torch==2.13.0
OSIM_PINS := opensim==4.6 osim-rl==3.0.11 numpy==2.2.6 scipy==1.13.1 gym==0.26.2
# Tests mostly wait for processes to start and end, so two at a time are nearly twice as fast; a file's run in one.
JOBS ?= 2
PYTEST := -m pytest -n $(JOBS) --dist loadfile
PIP := -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-benchmarks check osim sb3 interpreters format bench clean $(VENV)

help: ## show these lines
	@awk -F ':.*## ' '/^[a-z0-9.]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  PYTHON=$(PYTHON) makes $(VENV), OSIM_PYTHON=$(OSIM_PYTHON) makes $(OSIM); set either: make test PYTHON=python3.11"

demo: $(VENV)/.made ## train DDPG on a pendulum through a local farm, about 3 minutes
	$(VENV)/bin/python train.py --env Pendulum-v1 --agent ddpg --episodes 75 --seed 1 --out runs/demo

test: $(VENV)/.made $(OSIM)/.made interpreters ## set everything up and run all tests, OpenSim included
	$(VENV)/bin/python $(PYTEST)

check: $(VENV)/.made ## format, lint, types and the fast tests
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python $(PYTEST) -q -m "not slow and not osim" --timeout 60 tests

test-benchmarks: $(VENV)/.made ## the tests of the benchmarks alone
	$(VENV)/bin/python $(PYTEST) benchmarks/tests

format: $(VENV)/.made ## let ruff rewrite what it can
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(VENV)/.made $(OSIM)/.made ## what a step costs, beside other libraries and at scale, into docs/benchmarks.md, about 50 minutes
	-$(VENV)/bin/python -m benchmarks.peers.make vector remote-gym osim
	$(VENV)/bin/python -m benchmarks.page

osim: $(OSIM)/.made ## make the OpenSim environment, .venv-osim

sb3: $(SB3)/.made ## make the environment of Stable-Baselines3, .venv-sb3 (1 GB), which its tests want

interpreters: $(VENV)/.made ## make environments of other Pythons (2.7 to 3.13), for the tests
	@$(VENV)/bin/python tests/interpreters.py || { echo; \
	  echo "Not every Python that the tests run workers in was found, the reason stands above: their tests are skipped."; \
	  echo "  now: install the missing ones, or name them: FARM_PYTHONS=/path/to/python2.7:/path/to/python3.6 make $@"; }

clean: ## remove environments, caches and runs
	rm -rf $(VENV) $(OSIM) $(SB3) .venv-peers .interpreters runs logs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV): $(VENV)/.made

# The stamp is written last: an installation that broke off is tried again.
$(VENV)/.made: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "This project needs Python 3.10 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)"; \
	  echo "  now: name another one: make PYTHON=python3.11 ..."; exit 1; }
	@$(call has_venv,$(PYTHON))
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) -e '.[train,dev]'
	@touch $@

$(OSIM)/.made: Makefile
	@$(OSIM_PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || { \
	  echo "OpenSim needs Python 3.11 or 3.12, and '$(OSIM_PYTHON)' is: $$($(OSIM_PYTHON) --version 2>&1)"; \
	  echo "  why: opensim 4.6 has no wheel for 3.10, and scipy 1.13.1, which osim-rl needs, has none for 3.13"; \
	  echo "  now: name another one: make OSIM_PYTHON=python3.11 ..."; exit 1; }
	@$(call has_venv,$(OSIM_PYTHON))
	$(OSIM_PYTHON) -m venv $(OSIM)
	@$(OSIM)/bin/python $(PIP) --prefer-binary $(OSIM_PINS) && $(OSIM)/bin/python -c 'import opensim' || { \
	  echo "The OpenSim environment could not be made, and the reason stands above; without it its tests cannot run."; \
	  echo "  opensim's wheels are for Linux on x86-64 (glibc 2.28 or newer), macOS and Windows: this is $$(uname -sm)"; \
	  exit 1; }
	@touch $@

$(SB3)/.made: pyproject.toml
	@$(call has_venv,$(PYTHON))
	$(PYTHON) -m venv $(SB3)
	$(SB3)/bin/python $(PIP) '$(SB3_TORCH)'
	$(SB3)/bin/python $(PIP) -e '.[sb3]'
	@touch $@

# Debian and Ubuntu split this off, and say so only in the middle of a longer text.
has_venv = $(1) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(1)' cannot make virtual environments: its venv or ensurepip module is missing"; \
	  echo "  now: install it (Debian, Ubuntu: apt-get install python3-venv) or name another Python: make PYTHON=..."; exit 1; }
