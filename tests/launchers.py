"""Every launcher on two processes of this machine's CPU: `python tests/launchers.py` writes docs/results/launchers.json, how far each is from one process."""

import atexit
import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from commands import ENVIRONMENT
from forks import OURS, forks
from models import save_tiny
from tiny_run import main

HERE = Path(__file__).parent
# accelerate's own CPU modes run a single process without a word; as for GPUs, with these options, two of them meet over gloo.
DDP = ["--multi_gpu", "--num_machines", "1", "--dynamo_backend", "no"]
GLOO = {"use_cpu": False, "ddp_backend": "gloo"}
ZERO = ("zero1", "zero2", "zero3")
LAUNCHERS: dict[str, tuple[list[str], dict]] = {
    "ddp": (DDP, {"use_cpu": True}),
    **{name: (["--config_file", str(HERE.parent / f"accelerate_configs/{name}.yaml")], GLOO) for name in ZERO},
    "fsdp2": (DDP, {"use_cpu": True, "fsdp2_on_cpu": "FULL_STATE_DICT"}),
}
BATCH = {"per_device_train_batch_size": 2}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"} | ENVIRONMENT


@functools.cache
def loaded() -> Callable[..., subprocess.CompletedProcess]:
    """Runs launchers as forks of one process, and they their ranks: nearly all of a launch's time would be that of loading the libraries three times."""
    running = contextlib.ExitStack()
    atexit.register(running.close)
    return running.enter_context(forks(*OURS, "accelerate.commands.launch", "deepspeed.ops", **environment()))


def launch(launcher: str, script: Path, *arguments: str | Path, started: bool = torch.cuda.is_available()) -> subprocess.CompletedProcess:
    """Runs a script in two processes.

    Args:
        started: as processes that load all themselves, as they must where there is CUDA, which no fork can go on with.
    """
    command = ["-m", "accelerate.commands.launch", *LAUNCHERS[launcher][0], "--num_processes", "2", "--mixed_precision", "no"]
    command += ["--main_process_port", str(free_port()), *([str(HERE / "over_gloo.py")] if launcher in ZERO else []), str(script), *map(str, arguments)]
    if not started:
        return loaded()(*command)
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment(), timeout=550)


def launch_tiny(launcher: str, *runs: tuple[Path, dict]) -> subprocess.CompletedProcess:
    """Makes runs with these options in turn, each in its folder."""
    words: list[str | Path] = []
    for folder, options in runs:
        folder.mkdir(exist_ok=True)
        words += folder, json.dumps(BATCH | LAUNCHERS[launcher][1] | options)
    return launch(launcher, HERE / "tiny_run.py", *words)


def launched(launcher: str, folder: Path, options: dict) -> dict:
    """What two processes make of a run."""
    done = launch_tiny(launcher, (folder, options))
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "result.pt")


def alone(folder: Path, options: dict) -> dict:
    """What one process makes of it that accumulates as many batches."""
    folder.mkdir(exist_ok=True)
    main(str(folder), BATCH | {"gradient_accumulation_steps": 2} | options)
    return torch.load(folder / "result.pt")


def weight_gap(one: dict, other: dict) -> float:
    """The largest difference between two runs' weights."""
    theirs = {name.removeprefix("module."): value for name, value in other["weights"].items()}
    return max((theirs[name] - value).abs().max().item() for name, value in one["weights"].items())


if __name__ == "__main__":
    from hf_thinktok import results

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        options = {"model_folder": save_tiny(root / "model"), "optim": "adamw_torch"}
        one = alone(root / "one", options)
        rows = {"one process": {"processes": 1, "losses": one["losses"], "weight_gap": 0.0}}
        for launcher in LAUNCHERS:
            print(launcher, flush=True)
            run = launched(launcher, root / launcher, options)
            rows[launcher] = {"processes": run["world"], "losses": run["losses"], "weight_gap": weight_gap(one, run)}
    found = {"launchers": rows} | results.environment()
    results.write_json(HERE.parent / "docs/results/launchers.json", found)
    results.print_launchers(found)
