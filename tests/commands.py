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

from hf_thinktok.cli import main as thinktok

ROOT = Path(__file__).parent.parent
WITH_PACKAGE = f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'startup'}"  # the Python path of a process
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": WITH_PACKAGE}  # what it has beside this one's


def started(*command: str | Path | int, **options) -> subprocess.CompletedProcess:
    """Runs Python in a process of its own: one thread, with this package on its path."""
    environment = os.environ | ENVIRONMENT | options.pop("env", {})
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, **{"cwd": ROOT, "timeout": 900} | options)


class InProcess:
    """In the place of `subprocess.run` or `subprocess.Popen`: one command is run in this process, any other one as before.

    Args:
        real: what it stands for.
        word: the word by which the command is known; those behind it are its arguments.
        call: what runs it.
        started: so many are started as processes first.
    """

    def __init__(self, real: Callable, word: str | Path, call: Callable[..., subprocess.CompletedProcess], started: int = 0):
        self.real, self.word, self.call, self.started = real, str(word), call, started

    def __call__(self, command, **options):
        if self.word not in command or self.started:
            self.started -= self.word in command
            return self.real(command, **options)
        done = self.call(*command[command.index(self.word) + 1 :])
        options.get("stdout", sys.stdout).write(done.stdout)
        options.get("stdout", sys.stderr).write(done.stderr)
        return SimpleNamespace(poll=lambda: done.returncode, returncode=done.returncode)


def in_process(script: Path, *options: str | Path | int) -> subprocess.CompletedProcess:
    """Runs a script in this process, and the report that it ends with; takes back what it did to the process. An error that is no exit is raised."""
    arguments, path, handler = sys.argv, list(sys.path), signal.getsignal(signal.SIGTERM)
    sys.argv = [str(script), *map(str, options)]
    sys.path.insert(0, str(script.parent))
    command_line = InProcess(subprocess.run, "hf_thinktok.cli", lambda *words: captured(lambda: thinktok([*words])))
    try:
        with contextlib.chdir(ROOT), patch.dict(os.environ), patch("subprocess.run", command_line):
            return captured(lambda: runpy.run_path(str(script), run_name="__main__"))
    finally:
        sys.argv, sys.path[:] = arguments, path
        signal.signal(signal.SIGTERM, handler)


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
