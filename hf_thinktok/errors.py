"""What the user can put right is told in one sentence, without a stack trace."""

import contextlib
import os
import sys
from collections.abc import Iterator

from yaml import YAMLError

# transformers and datasets raise an OSError for what they do not find.
MENDABLE = (ImportError, OSError, ValueError)


class UsageError(Exception):
    """What the user of a command can put right: shown as it is, with exit code 2."""


class RunError(ValueError):
    """A run that cannot be what was asked for, which shows when it begins or in that nothing happened."""


def traceback_wanted() -> bool:
    """Whether errors are to show where they come from, and not end in their sentence."""
    return os.environ.get("THINKTOK_TRACEBACK") == "1"


def first_line(error: BaseException) -> str:
    """What an error says, without what follows its first line; its kind where it says nothing.

    A first line that ends with a colon says nothing without the next one.
    """
    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {more[0].rstrip(',;')}" if more and first.endswith(":") else first


@contextlib.contextmanager
def usage(*more: type[Exception], before: str = "", after: str = "") -> Iterator[None]:
    """Makes a `UsageError` of what can be put right: the first line of what was said, and what stands before and after it.

    Args:
        more: further errors to take so.
    """
    mendable: tuple[type[Exception], ...] = (*MENDABLE, *more)
    try:
        yield
    except mendable as error:
        raise UsageError(before + first_line(error) + after) from error


@contextlib.contextmanager
def one_sentence(*kinds: type[Exception]) -> Iterator[None]:
    """Ends a recipe that was given what it cannot use with the sentence that says so.

    Args:
        kinds: the errors to take so; by default all that the user can put right. Where a traceback is wanted none is.
    """
    mendable = kinds or (*MENDABLE, YAMLError)
    try:
        yield
    except mendable as error:
        if traceback_wanted():
            raise
        sys.exit(f"error: the config is no YAML: {' '.join(str(error).split())}" if isinstance(error, YAMLError) else f"error: {error}")
