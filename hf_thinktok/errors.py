"""What the user can put right is told in one sentence, without a stack trace."""

import contextlib
import sys
from collections.abc import Iterator

# transformers and datasets raise an OSError for what they do not find.
MENDABLE = (ImportError, OSError, ValueError)


class UsageError(Exception):
    """What the user of a command can put right: shown as it is, with exit code 2."""


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
        raise UsageError(before + (str(error).splitlines() or [type(error).__name__])[0] + after) from error


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Ends a recipe that was given what it cannot use with the sentence that says so."""
    try:
        yield
    except MENDABLE as error:
        sys.exit(f"error: {error}")
