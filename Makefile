# Every target sets itself up in .venv; a second call starts at once.
VENV := .venv
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
# Workers of the tests; two suit a laptop.
WORKERS ?= 2

.PHONY: help demo demo-rl test test-fast test-costs faults audit lint docs bench aot scale results clean

help:
	@echo "make demo     fine-tune SmolLM2-135M on a real task and show what changed (ten minutes)"
	@echo "make demo-rl  a small model learns to add from verified answers, with controls (ten minutes)"
	@echo "make test     run the tests, in about half an hour on two cores"
	@echo "make test-fast  run two thirds of them, of every folder, in about five minutes"
	@echo "make test-costs measure them, and write which of them are slow (tests/slow.txt)"
	@echo "make faults   kill, fill and corrupt runs at twenty random points of each kind"
	@echo "make audit    look up known vulnerabilities of what is installed"
	@echo "make lint     check style and spelling"
	@echo "make docs     build the site in build/site; warnings are errors"
	@echo "make bench    compare speed with transformers + peft and trl"
	@echo "make scale    compile for slices that are not here, and write docs/scale.md"
	@echo "make results  write docs/results.md from the records of the papers (seconds; nothing trains)"

demo: $(VENV)/.text
	rm -rf runs/demo
	$(BIN)/python experiments/sft.py --output-dir runs/demo

demo-rl: $(VENV)/.text
	rm -rf runs/demo-rl
	$(BIN)/python experiments/demo_rl.py

test: $(VENV)/.test aot
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# Without what tests/slow.txt lists and without tests that start processes.
test-fast: $(VENV)/.test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

# Writes tests/slow.txt: measures all tests, then the fast ones alone. Each time the cache of compiled
# programs begins empty.
test-costs: $(VENV)/.test aot
	JAX_COMPILATION_CACHE_DIR=$$(mktemp -d) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --costs
	JAX_COMPILATION_CACHE_DIR=$$(mktemp -d) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal \
		-m "not slow" --costs

faults: $(VENV)/.test
	FAULT_POINTS=20 JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) tests/train/test_fault_matrix.py $(ARGS)

audit: $(VENV)/.test .venv-audit/.ready
	.venv-audit/bin/python .ci/audit.py $(BIN)/python

.venv-audit/.ready:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	@touch $@

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python .ci/words.py

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(VENV)/.bench .venv-tunix/.ready
	$(BIN)/python -m benchmarks.run $(ARGS)

scale: $(VENV)/.test aot
	$(BIN)/python -m benchmarks.scale $(ARGS)

results: $(VENV)/.text
	$(BIN)/python -m experiments --results

# Tunix pins other releases than the tests run with.
.venv-tunix/.ready:
	$(PYTHON) -m venv .venv-tunix
	.venv-tunix/bin/python -m pip install --quiet --disable-pip-version-check google-tunix==0.1.7
	@touch $@

# Compilers for TPUs and H100s, where no other process stumbles over them: tests compile for both.
aot: $(VENV)/aot/.ready
$(VENV)/aot/.ready: | $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/aot \
		$$($(BIN)/python -m jaxft.parallel.compilers)
	@touch $@

# One stamp for each set of extras: reinstalled when setup.cfg changes.
$(VENV)/.%: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11, 3.12 or 3.13 is needed; set PYTHON=/path/to/it"; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .jax_cache runs build *.egg-info
