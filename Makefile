# Needs Python >= 3.11, pip and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
PROCESSES := 2
RUN := $(VENV)/bin/python
CHECKED := noisear_rl envs algos tests benchmarks docs examples

.PHONY: help install demo bench test test-lowest test-accelerator test-slow test-newcomer test-faults test-originals lint format docs clean
help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(VENV)/installed  ## Create .venv with the tested versions
$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python >= 3.11 is needed; set PYTHON="'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(RUN) -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

demo: install  ## Train a noise prior on the embedded denoiser and compare it with Gaussian noise (5 minutes)
	$(RUN) -m noisear_rl.cli demo

bench: install  ## Measure speed and memory against their limits (15 minutes on an idle machine)
	OMP_NUM_THREADS=1 $(RUN) benchmarks/bench.py

test: install  ## Run the test suite in two processes; PYTEST_OPTIONS=--cov prints its coverage and takes about 15 % longer
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(PROCESSES) --dist worksteal $(PYTEST_OPTIONS)

test-lowest:  ## Run the test suite with the lowest supported versions, in .venv-lowest (Python 3.11)
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

test-accelerator: install  ## Run what depends on the device on this machine's accelerator
	ACCELERATE_USE_CPU=false $(RUN) -m pytest tests/test_accelerator.py

test-slow: install  ## Run the tests that take minutes
	$(RUN) -m pytest -m slow

test-newcomer: install  ## Walk through a newcomer's first hour with nothing but the wheel, and print the seconds of each step
	$(RUN) -m pytest -s -m slow tests/test_newcomer.py

test-faults: install  ## Kill, damage and misuse everything many times (an hour), and print the counts
	$(RUN) -m pytest -s -m "faults or not faults" tests/faults

.originals/installed: tests/rewards/originals.txt
	$(RUN) -m pip install --quiet --no-deps --upgrade --target .originals --requirement $<
	@touch $@

test-originals: install .originals/installed  ## Compare ImageReward and HPSv2 with their authors' packages
	$(RUN) -m pytest tests/rewards/test_original_scorers.py

lint: install  ## Check style, the direction of imports, and types
	$(VENV)/bin/ruff check $(CHECKED)
	$(VENV)/bin/ruff format --check $(CHECKED)
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

format: install  ## Format the code
	$(VENV)/bin/ruff check --fix $(CHECKED)
	$(VENV)/bin/ruff format $(CHECKED)

docs: install  ## Build the documentation in site/ (offline); open site/index.html
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

clean:  ## Remove environments, caches, builds and runs
	rm -rf .venv .venv-lowest .originals build dist site *.egg-info runs .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .coverage
