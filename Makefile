# make run · make test · make check · make ui · make bench · make up · make down · make vllm; each but the last sets up .venv first when it is missing or out of date.
PYTHON ?= python3.11
BIN := .venv/bin
# nobody's telemetry, services on loopback only
export DO_NOT_TRACK := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export DVC_NO_ANALYTICS := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: run test check ui bench up down vllm setup clean
.DEFAULT_GOAL := run

setup: .venv/.ready

.venv/.ready: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or name another with make PYTHON=..."; exit 2; }
	@echo "Setting up .venv (three to five minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --disable-pip-version-check --editable .
	@umask 077; mkdir -p .work/dvc
	@touch $@

run: setup
	@$(BIN)/lifecycle run

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@infra/audit

test: check
	$(BIN)/python -m pytest -n 3

ui: setup
	@$(BIN)/lifecycle ui

bench: setup
	@for benchmark in benchmarks/*.py; do echo "== $$benchmark"; $(BIN)/python $$benchmark || exit 1; done

up: setup
	@infra/up

down:
	@docker compose --file infra/compose.yaml down

vllm:
	@PYTHON=$(PYTHON) infra/vllm/install

clean:
	rm -rf .work build *.egg-info .pytest_cache .mypy_cache .ruff_cache
