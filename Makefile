# Baton's commands; `make help` lists them. Variables: PYTHON (3.11 or 3.12), CONFIG (for make serve).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
CONFIG ?= deploy/configs/demo-cpu.yaml

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
CONSTRAINTS := constraints-cpu.txt
STUBS := proto/baton_proto

# uv finds the CPU build of torch in the folders that pip is told of, else where PyTorch publishes it.
empty :=
space := $(empty) $(empty)
comma := ,
FIND_LINKS := $(or $(UV_FIND_LINKS),$(subst $(space),$(comma),$(strip $(PIP_FIND_LINKS))))
TORCH_SOURCE ?= $(if $(FIND_LINKS),,--torch-backend cpu)
export UV_FIND_LINKS := $(FIND_LINKS)
export UV_HTTP_TIMEOUT ?= 180

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(STAMP) ## Create .venv and install Baton with the CPU engine and the developer tools
	@echo "setup: $(VENV) is ready"

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 13) or sys.exit( \
	  "Baton needs Python 3.11 or 3.12, $(PYTHON) is %d.%d: make setup PYTHON=python3.11" % v)'
	@echo "setup: virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "setup: uv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) uv
	@echo "setup: Baton with the extras cpu and dev (4 GB, a few minutes the first time)"
	@$(BIN)/uv pip install --python $(BIN)/python --constraint $(CONSTRAINTS) $(TORCH_SOURCE) --editable '.[cpu,dev]'
	@echo "setup: byte code (every engine start imports half of it)"
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m compileall -q -j 0 $(VENV)/lib/*/site-packages >/dev/null 2>&1 || true
	@touch $@

.PHONY: demo
demo: $(STAMP) ## Run 2 prefill + 2 decode workers on CPU with a tiny model, show who does what and one role switch
	@$(BIN)/baton demo

.PHONY: serve
serve: $(STAMP) ## Serve CONFIG=path/to/config.yaml
	@$(BIN)/baton serve $(CONFIG)

TESTS = not slow and not endurance
.PHONY: test
test: $(STAMP) ## Run all tests but the slow ones, real engines included, or those marked TESTS
	@$(BIN)/python -m pytest -m '$(TESTS)'

.PHONY: test-slow
test-slow: ## Run the slow tests: the longer faults, orphans
	@$(MAKE) test TESTS='slow and not endurance'

.PHONY: test-all
test-all: $(STAMP) ## Run all tests
	@$(BIN)/python -m pytest

MINUTES ?= 30
.PHONY: soak
soak: $(STAMP) ## Break a loaded cluster every 20 s for MINUTES=30; writes docs/images/soak.png and docs/reliability.md
	@$(BIN)/python -m tests.faults.soak --minutes $(MINUTES) --plot docs/images/soak.png --page

.PHONY: bench
bench: $(STAMP) ## Compare with plain vLLM and find the router's ceiling; writes docs/benchmarks.md
	@$(BIN)/python -m benchmarks

.PHONY: lint
lint: lint-ruff lint-types lint-layers lint-stubs lint-docs ## Check style, types, layers and generated files

.PHONY: lint-ruff
lint-ruff: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

.PHONY: lint-types
lint-types: $(STAMP)
	@$(BIN)/mypy

.PHONY: lint-layers
lint-layers: $(STAMP)
	@$(BIN)/lint-imports

PROTOC = $(BIN)/python -m grpc_tools.protoc -Iproto --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) \
  proto/baton_proto/worker.proto

.PHONY: lint-stubs
lint-stubs: $(STAMP)
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; $(call PROTOC,$$out); \
	for stub in "$$out"/baton_proto/*; do \
	  diff -u "$(STUBS)/$${stub##*/}" "$$stub" || { echo "$(STUBS) is not up to date: run make proto"; exit 1; }; \
	done

.PHONY: lint-docs
lint-docs: $(STAMP)
	@$(BIN)/python -m deploy.config_docs --check
	@$(BIN)/python -m telemetry.metrics_docs --check

.PHONY: format
format: $(STAMP) ## Format the code and fix what ruff can fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: proto
proto: $(STAMP) ## Regenerate the gRPC stubs from proto/baton_proto/worker.proto
	@$(call PROTOC,proto)

.PHONY: docs
docs: $(STAMP) ## Regenerate docs/configuration.md and docs/metrics.md from the code
	@$(BIN)/python -m deploy.config_docs
	@$(BIN)/python -m telemetry.metrics_docs

.PHONY: constraints
constraints: $(STAMP) ## Resolve the dependencies anew and write constraints-cpu.txt
	@$(BIN)/uv pip compile pyproject.toml --extra cpu --extra dev --python-version 3.11 $(TORCH_SOURCE) \
	  --upgrade --no-annotate --custom-compile-command 'make constraints' --quiet --output-file $(CONSTRAINTS)
