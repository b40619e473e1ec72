# `make` alone prints this help. Every target sets up what it needs in .venv.

PYTHON ?= python3
BIN := .venv/bin
DATA ?= ../shared/data
RUNS ?= runs

.PHONY: help demo test cover lint types layers check bench-planner bench-har clean
.DEFAULT_GOAL := help

help:  ## print this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(BIN)/.ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	touch $@

demo: $(BIN)/.ready  ## set up and train on this machine: 1 parameter server, 10 worker processes over TCP
	$(BIN)/mergesfl run benchmarks/configs/demo.toml --overwrite --set output.folder=$(RUNS)

test: $(BIN)/.ready  ## set up and run all tests
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest

cover: test  ## the tests' line coverage (at least 90 %)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: $(BIN)/.ready  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/.ready  ## mypy --strict
	$(BIN)/mypy

layers: $(BIN)/.ready  ## imports only downwards
	$(BIN)/lint-imports

check: lint types layers cover  ## everything CI asks for

bench-planner: $(BIN)/.ready  ## seconds per plan and gap to brute force of the control module
	$(BIN)/python -m benchmarks.micro.planner

bench-har: $(BIN)/.ready  ## UCI HAR, 10 processes, Dir(0.1): mergesfl, splitfed-v1, fedavg, seeds 0-2 (DATA=folder of data sets)
	$(BIN)/python -m benchmarks.compare benchmarks/configs/har.toml --dataset har:$(DATA)/uci-har/uci_har.npz \
		--methods mergesfl,splitfed-v1,fedavg --seeds 0,1,2 --out $(RUNS)/bench-har

clean:  ## remove .venv, caches and builds (runs/ stays)
	rm -rf .venv build dist *.egg-info .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
