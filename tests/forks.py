"""Processes of their own that need not load their libraries first: one has loaded them, and every command is run by a fork of it."""

import contextlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from commands import WITH_PACKAGE

HERE = Path(__file__).parent


@contextlib.contextmanager
def forks(**environment: str) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """Gives what runs Python's command lines (`-c`, `-m` or a script), one after another.

    Args:
        environment: of the process that loads the libraries, which read theirs then.
    """
    environment |= {"PYTHONPATH": f"{HERE}{os.pathsep}{WITH_PACKAGE}", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as loaded:

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


def serve() -> None:
    for line in sys.stdin:
        out, errors, *command = json.loads(line)
        if not (child := os.fork()):
            for name, stream in ((out, sys.stdout), (errors, sys.stderr)):
                with open(name, "w") as file:
                    os.dup2(file.fileno(), stream.fileno())
            run(*command)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    import tiny_run  # noqa: F401  (and with it what every command needs)

    import hf_thinktok.cli  # noqa: F401

    serve()
