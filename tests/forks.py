"""Processes of their own that need not load their libraries first: one has loaded them, and every command is run by a fork of it."""

import contextlib
import importlib
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from commands import WITH_PACKAGE
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

HERE = Path(__file__).parent
OURS = ("tiny_run", "hf_thinktok.cli")


@contextlib.contextmanager
def forks(*modules: str, **environment: str) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """Gives what runs Python's command lines (`-c`, `-m` or a script), one after another.

    Args:
        modules: what is loaded; by default this package and what it needs.
        environment: of the process that loads the libraries, which read theirs then.
    """
    environment |= {"PYTHONPATH": f"{HERE}{os.pathsep}{WITH_PACKAGE}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *(modules or OURS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as loaded:

        def python(*command: str | Path | int) -> subprocess.CompletedProcess:
            with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as errors:
                print(json.dumps([out.name, errors.name, *map(str, command)]), file=loaded.stdin, flush=True)
                return subprocess.CompletedProcess("", int(loaded.stdout.readline()), out.read(), errors.read())

        try:
            yield python
        finally:
            loaded.kill()


def run(kind: str, *words: str) -> None:
    """As Python does with these words."""
    if kind == "-c":
        sys.argv = ["-c", *words[1:]]
        exec(words[0], {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = [*words]
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *words]
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")


class Forked:
    """In the place of the `subprocess.Popen` that `torch.distributed.run` starts a rank with: a fork of the launcher, in a session of its own."""

    def __init__(self, command: tuple[str, ...], environment: dict[str, str]):
        self.returncode: int | None = None
        if pid := os.fork():
            self.pid = pid
            return
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for handled in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # by the launcher
                signal.signal(handled, signal.SIG_DFL)
            os.environ.clear()
            os.environ |= environment
            run(*(word for word in command[1:] if word != "-u"))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)  # what the launcher holds is not this one's to tidy up

    def poll(self) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def wait(self, timeout: float = math.inf) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(0.05)
        return self.returncode


def serve(answers: IO[str]) -> None:
    for line in sys.stdin:
        out, errors, *command = json.loads(line)
        if not (child := os.fork()):
            for name, stream in ((out, sys.stdout), (errors, sys.stderr)):
                with open(name, "w") as file:
                    os.dup2(file.fileno(), stream.fileno())
            SubprocessHandler._popen = lambda self, command, environment: Forked(command, environment)
            run(*command)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as stdout:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries say while they are loaded is no answer
        for module in sys.argv[1:]:
            importlib.import_module(module)
        serve(stdout)
