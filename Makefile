# `make` alone prints this help. Every target sets up what it needs in .venv.

PYTHON ?= python3
BIN := .venv/bin
DATA ?= ../shared/data
RUNS ?= runs
# Of bench-compare and bench-paper; what is empty is taken from the preset, a file of benchmarks/configs.
PRESET ?= quick
DATASET ?= har
LEVEL ?= 10
SEEDS ?=
METHODS ?=
JOBS ?= 0

.PHONY: help demo test cover lint types layers check clean
.PHONY: bench-planner bench-har bench-compare bench-paper bench-codecs bench-simulation bench-streaming bench-throttled
.PHONY: bench-floor bench-transport bench-load bench-speed bench-overlap
.DEFAULT_GOAL := help

help:  ## print this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(BIN)/.ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	touch $@

demo: $(BIN)/.ready  ## set up and train on this machine: 1 parameter server, 10 worker processes over TCP
	$(BIN)/mergesfl run benchmarks/configs/demo.toml --overwrite --set output.folder=$(RUNS)

test: $(BIN)/.ready  ## set up and run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=

cover: test  ## the tests' line coverage (at least 90 %)
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

bench-compare: $(BIN)/.ready  ## methods against each other, simulated: DATASET=har LEVEL=10 SEEDS=0,1,2 METHODS= PRESET=quick JOBS=
	$(BIN)/python -m benchmarks.compare benchmarks/configs/$(PRESET).toml --dataset "$(DATASET)" --level "$(LEVEL)" \
		--seeds "$(SEEDS)" --methods "$(METHODS)" --jobs $(JOBS) --data $(DATA) --out $(RUNS)/bench-$(PRESET)

bench-paper: $(BIN)/.ready  ## all data sets, levels and methods with the numbers of the paper; Ctrl-C, and the same again, goes on
	$(BIN)/python -m benchmarks.compare benchmarks/configs/paper.toml \
		--seeds "$(SEEDS)" --methods "$(METHODS)" --jobs $(JOBS) --data $(DATA) --out $(RUNS)/bench-paper

bench-codecs: $(BIN)/.ready  ## accuracy with and without int8 features + fp16 gradients, and bytes: HAR, Fashion-MNIST, seeds 0-2
	$(BIN)/python -m benchmarks.compare benchmarks/configs/codecs.toml --ours mergesfl@int8 \
		--seeds "$(SEEDS)" --methods "$(METHODS)" --jobs $(JOBS) --data $(DATA) --out $(RUNS)/bench-codecs

bench-speed: $(BIN)/.ready  ## time to accuracy of mergesfl+ with streaming, steps in parts and codecs against plain mergesfl
	$(BIN)/python -m benchmarks.compare benchmarks/configs/codecs.toml --ours mergesfl+@fast \
		--methods mergesfl,mergesfl+@fast --seeds "$(SEEDS)" --jobs $(JOBS) --data $(DATA) --out $(RUNS)/bench-speed

bench-simulation: $(BIN)/.ready  ## what the simulation costs beside the computing itself, and 10,000 workers
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.micro.simulation --dataset har:$(DATA)/uci-har/uci_har.npz --rounds 6 --repeats 9

bench-streaming: $(BIN)/.ready  ## barrier against streaming merge: 80 simulated devices, then ten throttled processes
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.micro.streaming --dataset har:$(DATA)/uci-har/uci_har.npz --out $(RUNS)/streaming
	$(BIN)/python -m benchmarks.micro.streaming benchmarks/configs/throttled.toml --dataset har:$(DATA)/uci-har/uci_har.npz \
		--set model.cut=conv2 --jitters 0.1 --regulations off --real --rounds 6 --parts 4 --out $(RUNS)/streaming-real

bench-throttled: $(BIN)/.ready  ## ten throttled processes against their simulation: seconds of every round of both
	$(BIN)/python -m benchmarks.micro.throttled --out $(RUNS)/throttled

bench-floor: $(BIN)/.ready  ## memory, ipc and tcp runs against the same steps in plain torch: HAR, M5, AlexNet (DATA=)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.micro.against_floor --data $(DATA)

bench-transport: $(BIN)/.ready  ## round trips of our protocol against bare pyzmq, pickle and gRPC, 4 KiB to 16 MiB
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.micro.roundtrips

bench-overlap: $(BIN)/.ready  ## steps in parts with features encoded beside computing against the same in one thread
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.micro.overlap

bench-load: $(BIN)/.ready  ## one parameter server under 10 to 400 live workers that replay features
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.micro.load

clean:  ## remove .venv, caches and builds (runs/ stays)
	rm -rf .venv build dist *.egg-info .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
