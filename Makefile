# Guard. `make` alone says what there is to make.

VENV    ?= .venv
BIN     := $(VENV)/bin
PIP     ?= $(BIN)/python -m pip
# What to install as torch, in pip's words: another build of the pinned version, a wheel, an index.
TORCH   ?= torch
PYTHON  ?= $(firstword $(foreach python,python3.11 python3.12 python3.13 python3,\
             $(if $(shell $(python) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(python))))
LISTEN  ?= 127.0.0.1:50051
HTTP    ?= 127.0.0.1:9090
IMAGE   ?= guard
WORK    ?= train
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard guard/model/native/*.cpp)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve setup test lint types protos protos-check constraints bench model image clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: $(VENV)/.serve ## Serve the embedded model (LISTEN=127.0.0.1:50051 HTTP=127.0.0.1:9090)
	$(BIN)/guard serve --listen $(LISTEN) --http $(HTTP) --policies policies

setup: $(VENV)/.dev ## Install everything that development needs into .venv

# A process a core, each with one thread, so that they are not in each other's way.
test: $(VENV)/.dev ## Run the tests, with the coverage of guard/
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --cov --cov-report=term $(ARGS)

lint: $(VENV)/.dev ## ruff, and hadolint where it is installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@if [ -x $(BIN)/hadolint ]; then set -x; $(BIN)/hadolint Dockerfile; fi

types: $(VENV)/.dev ## mypy, strict
	$(BIN)/mypy

protos: $(VENV)/.dev ## Generate guard/v1 from protos/
	$(call generate,.)

# Breaking changes are looked for against the commit before, where there is one.
protos-check: $(VENV)/.dev ## buf lint, buf breaking, and guard/v1 is what protos/ generates
	$(BIN)/buf lint
	@if git rev-parse --quiet --verify HEAD~1:protos >/dev/null; then set -x; \
	  $(BIN)/buf breaking --against '.git#ref=HEAD~1'; fi
	@fresh=$$(mktemp -d) && trap 'rm -r "$$fresh"' EXIT && $(call generate,"$$fresh") && \
	  diff -r -x __pycache__ -x __init__.py guard/v1 "$$fresh/guard/v1"

constraints: $(VENV)/.dev ## Pin what is installed in .venv
	{ sed '/^[^#]/,$$d' constraints.txt; \
	  $(PIP) freeze --all --exclude-editable --exclude pip | sed 's/+[a-z0-9.]*$$//'; } > constraints.new
	mv constraints.new constraints.txt

bench: $(VENV)/.dev ## Compare the engine with others on this machine (takes minutes)
	$(BIN)/python -m loadtest.bench $(ARGS)

# Goes on from the last save if it was stopped, and ends with a model and what it is worth.
model: $(VENV)/.dev ## Train the embedded model anew (minutes on a GPU, else hours; DATA=rows, BASE=wheel, WORK=train: see docs/data.md)
	$(BIN)/guard train --recipe guard/model/default/recipe.yaml --data $(DATA) --base $(BASE) --work $(WORK)/run --out $(WORK)/model \
	  --name guard-smollm2-135m

image: ## Build the container image (IMAGE=guard; docker build)
	docker build --tag $(IMAGE) .

clean: ## Remove .venv and everything built or cached
	rm -rf $(VENV) build dist *.egg-info .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find guard tests loadtest -name __pycache__ -prune -exec rm -r {} +
	find guard -name '*.so' -delete

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo 'error: Guard needs Python 3.11 or newer (make PYTHON=...)' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: $(SOURCES) | $(BIN)/python
	$(PIP) install --constraint constraints.txt $(TORCH) --editable .
	touch $@

$(VENV)/.dev: $(SOURCES) | $(BIN)/python
	$(PIP) install --constraint constraints.txt $(TORCH) --editable '.[audit,crypto,dev,otel,ray,train]'
	touch $@ $(VENV)/.serve

define generate
PATH="$(BIN):$$PATH" python -m grpc_tools.protoc -Iprotos \
  --python_out=$(1) --mypy_out=$(1) --grpc_python_out=$(1) --mypy_grpc_out=$(1) \
  guard/v1/admin.proto guard/v1/envoy/ext_proc.proto guard/v1/moderation.proto
endef
