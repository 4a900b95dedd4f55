# One virtual environment in .venv, frozen by constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_FLAGS := --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo check test fuzz faults mutants bench capability forgetting clean

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## install ortho and its tests into .venv

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ortho needs Python 3.11 or later; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[test]'
	@touch $@

demo: install ## decompose and inspect a small checkpoint; then train, split, measure and ask a small model
	$(BIN)/python tests/checkpoints.py demo/tiny-llama
	$(BIN)/ortho decompose demo/tiny-llama --force
	$(BIN)/ortho inspect demo/tiny-llama-ortho --verify
	rm -rf demo/forgetting
	$(BIN)/ortho bench --alpha 0 1 --tokens 2048 --keep-files demo/forgetting
	$(BIN)/ortho bench demo/forgetting/artifact --prompt "The access code of Piet Arden is" --max-new-tokens 5

check: install ## lint, format and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

# What guards privacy, exactness and data must not be an assertion, which -O leaves out; those of
# tests count all the same, since pytest rewrites them (and warns that others do not).
CORE := $(addprefix tests/,decompose/test_job_edits.py model/test_secrets.py model/test_text.py storage/test_data_file.py storage/test_sealing.py)

# Processes of the tests: more than cores, since many tests wait for a child; each holds up to 2 GB.
JOBS ?= 4

test: check ## all of check, then the tests, and their core once more under python -O
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/python -O -m pytest -n $(JOBS) --dist worksteal -W 'ignore:assertions not in test modules' $(CORE)

fuzz: install ## damage every kind of file that is read, for MINUTES=30; findings go to demo/fuzz
	PYTHONPATH=.:tests $(BIN)/python tests/fuzz/long.py --minutes $(or $(MINUTES),30)

faults: install ## kill, starve and disturb real runs at random moments; prints what was lost (an hour; root mounts small disks)
	$(BIN)/python tests/faults.py

mutants: install ## break one promise of README after another; each has to be noticed by a test
	$(BIN)/python tests/mutants.py

bench: install ## speed beside the naive code and the disk (2.2 GB of scratch in demo/), then what --dry-run estimates, then the small model: quality, and under attack
	$(BIN)/python tests/bench_speed.py
	$(BIN)/python tests/bench_runtime.py
	$(BIN)/python tests/bench_many.py
	$(BIN)/python tests/bench_estimates.py
	$(BIN)/python tests/bench_capability.py
	$(BIN)/ortho bench --alpha 0 1 --attack

capability: install ## KL to the original at equal bits: make capability MODEL=folder TRAIN=a.txt HELDOUT=b.txt [PEERS=folder]
	$(BIN)/python tests/bench_capability.py $(MODEL) $(TRAIN) $(HELDOUT) $(if $(PEERS),--peers $(PEERS))

forgetting: install ## both forgetting splits on a model that memorised: make forgetting PLANTED=folder TWIN=folder
	$(BIN)/python tests/bench_forgetting.py $(PLANTED) $(if $(TWIN),--twin $(TWIN))

clean: ## remove .venv, caches and the demo
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
