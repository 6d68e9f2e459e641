# Everything people and CI do, by name. `make repro` and `make test` need nothing before them but
# Python 3.11 or 3.12 and git.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/installed
INSTALLED_SCALE := $(VENV)/installed-scale
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# A test may take a core and a gigabyte, and often waits: for a server, or another process.
WORKERS := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
PYTEST := pytest -n $(WORKERS) --maxprocesses 5
# What shares a clone or a server runs on one worker; the files that take longest come first.
PIPELINES := $(PYTEST) --dist loadgroup --no-loadscope-reorder
# Stages run `python`; theirs is the one of the environment, whatever else is active.
export VIRTUAL_ENV := $(CURDIR)/$(VENV)

PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check
# Makes the environment from the lock that is the target's first prerequisite. uv, as the lock
# pins it, takes a third of pip's time; pip steps in where uv does not get through, for uv does not
# read pip's settings, such as a company's index.
define environment
@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
  { echo 'error: Python 3.11 or 3.12 is needed: make PYTHON=python3.11 ...'; exit 1; }
@$(PYTHON) -m venv $(VENV) || \
  { echo 'error: Python has no venv: on Debian, apt-get install python3-venv'; exit 1; }
@sed -n '/^uv==/,/[^\]$$/p' $< > $(VENV)/uv.txt
$(PIP) --require-hashes --no-deps -r $(VENV)/uv.txt
$(VENV)/bin/uv pip install --quiet --no-config --compile-bytecode --require-hashes -r $< || \
  $(PIP) --require-hashes -r $<
$(PIP) --no-deps --no-build-isolation --editable .
@touch $(INSTALLED) $@
endef

.DEFAULT_GOAL := help
.PHONY: help install install-scale repro report gate sweep test test-fast test-scale campaign fuzz lint audit format params lock ui serve bench verify-reproducible clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

install: $(INSTALLED) ## make the environment in .venv from requirements.lock

$(INSTALLED): requirements.lock pyproject.toml
	$(environment)

install-scale: $(INSTALLED_SCALE) ## the same, and all that docs/scaling.md needs

$(INSTALLED_SCALE): requirements-scale.lock pyproject.toml
	$(environment)

repro: $(INSTALLED) ## run the pipeline: images to a judged model (dvc repro)
	dvc repro
	@dvc metrics show metrics/test.json
	@git diff --quiet -- dvc.lock metrics docs/model-card.md || echo 'git diff lists new results:' \
	  'timings always differ, and another CPU gives other bytes (docs/reproducibility.md)'
	@echo 'page: metrics/report.html; plots: dvc plots show; runs: make ui'

report: $(INSTALLED) ## metrics/report.html, and report.html compared with main or BASELINE=REV
	dvc repro report
	facegender report $(if $(BASELINE),--baseline '$(BASELINE)')

gate: $(INSTALLED) ## refuse a model worse than the one before it (BASELINE=REV, GATE=--format...)
	facegender gate $(if $(BASELINE),--baseline '$(BASELINE)') $(GATE)

test: test-fast ## the tests, the quick ones first; those of extras that are not installed skip
	$(PIPELINES) -m 'not campaign' tests/scale tests/pipeline

test-fast: $(INSTALLED) ## the quick tests alone
	$(PYTEST) -m 'not campaign' tests/unit

test-scale: $(INSTALLED_SCALE) ## storage, servers and clusters (Debian: postgresql, a Java runtime)
	$(PIPELINES) -m 'not campaign' tests/scale

campaign: $(INSTALLED_SCALE) ## what CI has in short at full length: tests, 30 kills of the pipeline
	$(PIPELINES) -m campaign
	python -m bench.faults

fuzz: $(INSTALLED) ## properties and fuzzing for longer: FUZZ_EXAMPLES=5000 of each
	HYPOTHESIS_PROFILE=fuzz $(PYTEST) tests/unit/test_properties.py tests/unit/test_fuzz.py

lint: $(INSTALLED) ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy

audit: $(INSTALLED) ## look requirements.lock up among known vulnerabilities (REQUIRED=1: or fail)
	python -m tools.audit $(if $(REQUIRED),--required)

format: $(INSTALLED) ## format the code
	ruff check --fix .
	ruff format .

params: $(INSTALLED) ## compose params.yaml from conf/
	python -m tools.compose_params params.yaml

lock: $(INSTALLED) ## pin the newest versions that pyproject.toml allows, with hashes
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --upgrade \
	  --generate-hashes --no-emit-index-url --quiet --output-file requirements.lock
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade \
	  --constraint requirements.lock \
	  --generate-hashes --no-emit-index-url --quiet --output-file requirements-scale.lock

sweep: $(INSTALLED) ## run the grid of conf/sweep.yaml as experiments (GRID=file JOBS=n)
	facegender sweep $(GRID) --jobs $(or $(JOBS),1)

ui: $(INSTALLED) ## MLflow's pages, on this machine only, at port 5000 or PORT=n
	@python -m tools.ui $(if $(PORT),--port $(PORT))

serve: $(INSTALLED) ## the champion behind HTTP, on this machine only, at port 5001
	mlflow models serve -m models:/facegender@champion --env-manager local \
	  --host 127.0.0.1 --port 5001

verify-reproducible: $(INSTALLED) ## run the commit twice in clones, and compare all outputs' bytes
	python -m bench.reproducible

bench: $(INSTALLED) ## measure; prints ratios taken in one run
	python -m bench.input_pipeline
	python -m bench.preprocess
	python -m bench.memory
	python -m bench.predict
	python -m bench.duplicates
	python -m bench.determinism
	python -m bench.pipeline_overhead

clean: ## remove what the pipeline made; the environment and MLflow's runs stay
	rm -rf data/raw data/splits data/processed models .dvc/cache .dvc/tmp
