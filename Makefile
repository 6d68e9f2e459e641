# Everything that people and CI do, by name. Targets need only git and Python 3.11 or 3.12.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/installed
INSTALLED_SCALE := $(VENV)/installed-scale
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# One worker more than cores, because tests often wait for a server or another process. Five at
# most, because a test may take a gigabyte of memory.
WORKERS := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
PYTEST := pytest -n $(WORKERS) --maxprocesses 5
# Tests that share a clone or a server run on one worker, in the order of tests/conftest.py.
PIPELINES := $(PYTEST) --dist loadgroup --no-loadscope-reorder
# Stages run `python`. Make sure that it is .venv's, whatever environment is active.
export VIRTUAL_ENV := $(CURDIR)/$(VENV)

PIP := $(VENV)/bin/pip install -qq --disable-pip-version-check
# Twice quiet, because pip warns of a user's settings in words that look like faults; errors still show.
# Make the environment from the lock file that is the target's first prerequisite. uv takes a third of
# pip's time. If uv fails, pip tries: uv does not read pip's settings, such as a company's index.
define environment
@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
  { echo 'error: Python 3.11 or 3.12 is needed: make PYTHON=python3.11 ...'; exit 1; }
@$(PYTHON) -m venv $(VENV) || \
  { echo 'error: Python cannot make .venv, as it says above; on Debian, apt-get install python3-venv may help'; exit 1; }
@sed -n '/^uv==/,/[^\]$$/p' $< > $(VENV)/uv.txt
$(PIP) --require-hashes --no-deps -r $(VENV)/uv.txt
$(VENV)/bin/uv pip install --quiet --no-config --compile-bytecode --require-hashes -r $< || \
  $(PIP) --require-hashes -r $<
$(PIP) --no-deps --no-build-isolation --editable .
@touch $(INSTALLED) $@
endef

.DEFAULT_GOAL := help
.PHONY: help install install-scale repro report gate ci sweep seeds test test-fast test-scale campaign matrix fuzz lint audit format params deps lock ui demo serve bench verify-reproducible clean clean-cache

help: ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

install: $(INSTALLED) ## make the environment in .venv from requirements.lock

$(INSTALLED): requirements.lock pyproject.toml
	$(environment)

install-scale: $(INSTALLED_SCALE) ## also install what docs/scaling.md needs

$(INSTALLED_SCALE): requirements-scale.lock pyproject.toml
	$(environment)

repro: $(INSTALLED) ## run the pipeline: images to a judged model (dvc repro)
	dvc repro
	@dvc metrics show metrics/test.json
	@git diff --quiet -- dvc.lock metrics docs/model-card.md || echo 'git diff lists new results:' \
	  'timings always differ, and another CPU gives other bytes (docs/reproducibility.md)'
	@echo 'page: metrics/report.html; plots: dvc plots show; runs: make ui'

report: $(INSTALLED) ## write report.html, which compares the results with main or BASELINE=REV
	dvc repro report
	facegender report $(if $(BASELINE),--baseline '$(BASELINE)')

gate: $(INSTALLED) ## fail if the model is worse than the previous one (BASELINE=REV, GATE=--format...)
	facegender gate $(if $(BASELINE),--baseline '$(BASELINE)') $(GATE)

# Stops at the first step that fails. The steps call `make`, not $(MAKE), so that `make -n ci` only
# prints them. With REQUIRED=1 the audit fails if it cannot reach the list of vulnerabilities.
ci: $(INSTALLED) ## all that CI checks: lint, audit, repro, gate, test; each step timed
	@for step in 'make lint' 'make audit' 'make repro' .ci/gate 'make test'; do \
	  echo "== $$step"; start=$$(date +%s); code=0; $$step || code=$$?; \
	  echo "== $$step: exit code $$code after $$(($$(date +%s) - start)) s"; \
	  [ $$code -eq 0 ] || exit $$code; \
	done

test: test-fast ## all tests, quick ones first; skips those whose extras are not installed
	$(PIPELINES) -m 'not campaign' tests/scale tests/pipeline

test-fast: $(INSTALLED) ## only the quick tests
	$(PYTEST) -m 'not campaign' tests/unit

test-scale: $(INSTALLED_SCALE) ## storage, servers and clusters (Debian: postgresql, a Java runtime)
	$(PIPELINES) -m 'not campaign' tests/scale

campaign: $(INSTALLED_SCALE) ## the long form of the tests, 30 kills of the pipeline, and the matrix
	$(PIPELINES) -m campaign
	python -m bench.faults
	make matrix

matrix: $(INSTALLED) ## the quick tests on other CPUs and threads, and without optional programs
	python -m tools.matrix $(PYTEST) -q -m 'not campaign' tests/unit

fuzz: $(INSTALLED) ## run the property and fuzz tests for longer (FUZZ_EXAMPLES=5000 each)
	HYPOTHESIS_PROFILE=fuzz $(PYTEST) tests/unit/test_properties.py tests/unit/test_fuzz.py

lint: $(INSTALLED) ## ruff, mypy, and import-linter for the order of the folders
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-logo --no-cache

audit: $(INSTALLED) ## check requirements.lock for known vulnerabilities (REQUIRED=1: fail if unreachable)
	python -m tools.audit $(if $(REQUIRED),--required)

format: $(INSTALLED) ## format the code
	ruff check --fix .
	ruff format .

params: $(INSTALLED) ## compose params.yaml from conf/, and print what differs from HEAD
	python -m tools.compose_params params.yaml
	@git --no-pager diff --no-ext-diff --no-color --unified=0 HEAD -- params.yaml

deps: $(INSTALLED) ## write each stage's modules and packages into dvc.yaml, from its imports
	python -m tools.stage_deps

lock: $(INSTALLED) ## pin the newest versions that pyproject.toml allows, with hashes
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --upgrade \
	  --generate-hashes --no-emit-index-url --quiet --output-file requirements.lock
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade \
	  --constraint requirements.lock \
	  --generate-hashes --no-emit-index-url --quiet --output-file requirements-scale.lock
	python -m tools.pin_packages requirements.lock conf/packages.yaml

sweep: $(INSTALLED) ## run the grid of conf/sweep.yaml as experiments (GRID=file JOBS=n)
	facegender sweep $(GRID) --jobs $(or $(JOBS),1)

seeds: $(INSTALLED) ## train with N=5 seeds, and print how far chance moves the results (JOBS=n)
	facegender seeds $(or $(N),5) --jobs $(or $(JOBS),1) $(SEEDS)

ui: $(INSTALLED) ## MLflow's pages, for this machine only, on port 5000 or PORT=n
	@python -m tools.ui $(if $(PORT),--port $(PORT))

demo: $(INSTALLED) ## a page to try the model, for this machine only, on port 5002 or PORT=n
	@facegender demo $(if $(PORT),--port $(PORT))

serve: $(INSTALLED) ## serve the champion over HTTP, for this machine only, on port 5001
	@facegender models --json | grep -q '"champion"' || \
	  { echo 'error: no model is the champion: `facegender promote RUN` makes one'; exit 1; }
	mlflow models serve -m models:/facegender@champion --env-manager local \
	  --host 127.0.0.1 --port 5001

verify-reproducible: $(INSTALLED) ## run the commit twice, in clones, and compare the bytes of all outputs
	python -m bench.reproducible

bench: $(INSTALLED) ## measure speed and memory, as ratios within one run
	python -m bench.input_pipeline
	python -m bench.preprocess
	python -m bench.memory
	python -m bench.predict
	python -m bench.duplicates
	python -m bench.determinism
	python -m bench.pipeline_overhead

clean: ## remove the pipeline's outputs; `dvc checkout` brings them back from DVC's cache
	rm -rf data/raw data/splits data/processed models
	rm -rf .dvc/tmp/facegender .dvc/tmp/kaggle .dvc/tmp/sweep-*

clean-cache: $(INSTALLED) ## remove from DVC's cache what the work tree does not use (asks first)
	dvc gc --workspace
