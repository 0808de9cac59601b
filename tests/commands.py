"""Recipes with a command line: as a user starts them, or in this process, which saves the seconds in which a new one loads its libraries."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

ROOT = Path(__file__).parent.parent


def started(*command: str | Path | int, **options) -> subprocess.CompletedProcess:
    """Runs Python in a process of its own: one thread, with this package on its path."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, **{"cwd": ROOT, "timeout": 900} | options)


def in_process(script: Path, *options: str | Path | int) -> subprocess.CompletedProcess:
    """Runs a script in this process, and takes back what it did to it; an error that is no exit is raised."""
    arguments, path, handler = sys.argv, list(sys.path), signal.getsignal(signal.SIGTERM)
    sys.argv = [str(script), *map(str, options)]
    sys.path.insert(0, str(script.parent))
    try:
        with contextlib.chdir(ROOT), patch.dict(os.environ):
            return captured(lambda: runpy.run_path(str(script), run_name="__main__"))
    finally:
        sys.argv, sys.path[:] = arguments, path
        signal.signal(signal.SIGTERM, handler)


class InProcess:
    """In the place of `subprocess.run` or `subprocess.Popen`: a script is run in this process, anything else as before.

    Args:
        real: what it stands for.
        script: whose commands are run here, all words before its name left out.
        started: so many of them are started as processes first.
    """

    def __init__(self, real: Callable, script: Path, started: int = 0):
        self.real, self.script, self.started = real, str(script), started

    def __call__(self, command, **options):
        if self.script not in command or self.started:
            self.started -= self.script in command
            return self.real(command, **options)
        done = in_process(Path(self.script), *command[command.index(self.script) + 1 :])
        if "stdout" in options:
            options["stdout"].write(done.stdout + done.stderr)
        return SimpleNamespace(poll=lambda: done.returncode, returncode=done.returncode)


def captured(call: Callable[[], object]) -> subprocess.CompletedProcess:
    """What a call prints and the exit code that it ends with or returns."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            code = call()
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):  # as Python does at its own end
                print(code, file=sys.stderr)
                code = 1
    return subprocess.CompletedProcess("", code if isinstance(code, int) else 0, out.getvalue(), errors.getvalue())
