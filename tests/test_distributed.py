"""Two processes under `accelerate launch` against one process that accumulates as many batches."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import main

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def launched(folder: Path, options: dict) -> dict:
    """What two processes on this machine's CPU make of it."""
    folder.mkdir()
    # accelerate's own CPU modes run a single process without a word; with this one `use_cpu` in the options makes it gloo.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", str(free_port()), str(HERE / "tiny_run.py"), str(folder), json.dumps(options)]
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    environment |= {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "result.pt")


# Running statistics (coverage, the value baseline) are over all ranks' batches, so they see more at once than one process does: not among these.
CASES = {
    "learned stop": {},
    "sampled stop, thoughts that stay": {"stop": "sampled", "memory": "persistent", "lookahead": 3},
    "two models": {"policies": "split", "stop": "fixed", "blind": True, "objective": "marginal", "search": 6},
    "two models, checkpointed, one of them idle at first": {
        "policies": "split",
        "stop": "fixed",
        "blind": True,
        "think_start": 1,
        "gradient_checkpointing": True,
    },
    "two adapters": {"policies": "split", "stop": "fixed", "adapter": True},
    "text thoughts": {"thoughts": "text", "stop": "fixed", "max_think_length": 4, "lookahead": 2, "think_loss_type": "dapo"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_two_processes_are_one_that_accumulates(tmp_path, options):
    together = launched(tmp_path / "two", {**options, "per_device_train_batch_size": 2})
    (tmp_path / "one").mkdir()
    main(str(tmp_path / "one"), {**options, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    alone = torch.load(tmp_path / "one" / "result.pt")
    assert (alone["world"], together["world"]) == (1, 2)
    assert together["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    for name, value in alone["weights"].items():
        torch.testing.assert_close(together["weights"][name.removeprefix("module.")], value, atol=1e-5, rtol=1e-4, msg=name)
