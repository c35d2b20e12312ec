# One command sets up and trains, one command tests: `make fit`, `make test`. `make help` lists all.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= configs/sine_maml.yaml
WORKERS ?= 2

.PHONY: help install fit examples compare bench test test-long test-trust test-cluster test-gpu lint tensorboard clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(BIN)/installed ## make .venv with everything, at the versions that were tested

$(BIN)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

fit: install ## train CONFIG, test its best checkpoint, print the table of errors and where everything is
	$(BIN)/metalit fit --config $(CONFIG)
	$(BIN)/metalit test --config $(CONFIG) --ckpt_path best

examples: install ## run the five examples, that answer the questions of the notebooks
	@for file in examples/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

compare: install ## train sgd_digits and sam_digits with five seeds each, and print the table of their test scores
	$(BIN)/python scripts/compare_seeds.py configs/sgd_digits.yaml configs/sam_digits.yaml --seeds 5

# backpack declares torchvision, does not import it, and pip's is of another build than a CPU torch
bench: install ## install what metalit is compared with, measure, and write benchmarks/results.md
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps backpack-for-pytorch unfoldnd
	$(BIN)/python -m benchmarks

test: install ## run the quick tests, those of a file in one of WORKERS processes
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 10 -m "not long and not trust and not cluster and not gpu"

test-long: install ## run the tests that take minutes
	$(BIN)/python -m pytest -m long

test-trust: install ## kill runs, fill disks and feed nonsense for an hour, and print the counts
	$(BIN)/python -m pytest -m trust tests/trust

test-cluster: install ## run a job on a real SLURM of two nodes on this machine; needs root, slurm-wlm and munge
	$(BIN)/python -m pytest -m cluster -rs tests/cluster

test-gpu: install ## run the tests of a GPU, that of torch or, with METALIT_DEVICE=cpu, as far as they go without one
	$(BIN)/python -m pytest -m gpu tests/gpu

lint: install ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tensorboard: install ## watch the runs in a browser
	$(BIN)/tensorboard --logdir lightning_logs

clean: ## remove the environment and what the tools cache; runs in lightning_logs stay
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
