"""What a task is made of: a `Recipe`, and what those of all tasks draw, write and check with. Letters of shapes as in the package."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import numpy as np

# Questions drawn at once.
BATCH = 8192
# One question in so many is for tests only.
TEST_SHARE = 4


class Questions(NamedTuple):
    """Questions of one level, before they are text."""

    inputs_RC: np.ndarray
    thoughts_RL: np.ndarray
    answers_R: np.ndarray

    def at(self, rows) -> "Questions":
        return Questions(*(part[rows] for part in self))


@dataclass(frozen=True)
class Recipe:
    """How a task's questions are made."""

    answers: list[str]  # the completions, by number
    words: Callable[[Sequence[int]], Iterable[str]]  # of the prompts of these levels, or texts made of them
    count: Callable[[int], int]  # how many different questions a level has
    draw: Callable[[np.random.Generator, int], Questions]  # random questions of a level, as many of BATCH as will do
    prompts: Callable[[np.random.Generator, int, np.ndarray], list[str]]
    draw_tests: Callable[[np.random.Generator, int], Questions] | None = None  # where tests ask otherwise
    key: Callable[[np.ndarray], np.ndarray] = lambda inputs_RC: inputs_RC  # the integers that make a question a new one
    shortcut: Callable[[int], float] = lambda level: 1.0
    hint: Callable[[np.ndarray], np.ndarray] | None = None  # a whole number; as many of each answer for each of its values
    levels: tuple[int, float] = (1, math.inf)  # the easiest and the hardest there are
    completions: Callable[[Questions], list[str]] | None = None  # where an answer is not one word
    chance: Callable[[Sequence[int]], float] | None = None
    every: Questions | None = None  # all questions, where each is to be asked once
    held_out: float = 0.0  # the part of them that is only tested
    stepwise: bool = True  # a thought's tokens are what is known after each step
    asked_by_length: bool = False  # how many thoughts there are is part of the question
    # Where each token of a thought has its place in the prompt: the question as which a training row goes on behind another one, on the same facts, and its
    # prompt; up to so many steps in all.
    again: Callable[[np.random.Generator, int, Questions], tuple[Questions, list[str]]] | None = None
    together: int = 1


def held_back(keys_RC: np.ndarray) -> np.ndarray:
    """Which questions are for tests only: a hash of their integers."""
    hash_R = np.full(len(keys_RC), keys_RC.shape[1], dtype=np.uint64)
    for column_R in keys_RC.astype(np.uint64).T:
        hash_R = (hash_R ^ column_R) * np.uint64(0x9E3779B97F4A7C15)
        hash_R ^= hash_R >> np.uint64(29)
    return (hash_R * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(40)) % np.uint64(TEST_SHARE) == 0


def joined(words: Sequence[str], ids_RC: np.ndarray, sep: str = " ") -> list[str]:
    """Each row's words as one text."""
    return [sep.join(row) for row in np.array(words, dtype=object)[ids_RC].tolist()]


def decimals(count: int, before: str = "") -> list[str]:
    return [f"{before}{i}" for i in range(count)]


def choose(rng: np.random.Generator, population: int, size: int) -> np.ndarray:
    """`BATCH` rows of `size` different numbers below `population`, ascending."""
    return np.sort(rng.random((BATCH, population)).argsort(1)[:, :size], 1)


def shuffled(rng: np.random.Generator, table_RC: np.ndarray) -> np.ndarray:
    """Each row in a random order of its own."""
    return np.take_along_axis(table_RC, rng.random(table_RC.shape).argsort(1), 1)


def orders(rng: np.random.Generator, nodes: int, rows: int = BATCH) -> np.ndarray:
    """The nodes in a random order for each row."""
    return rng.permuted(np.tile(np.arange(nodes), (rows, 1)), axis=1)


def edges_of(nodes: int) -> list[str]:
    return [f"{a}>{b}" for a in range(nodes) for b in range(nodes)]


def facts_of(rng: np.random.Generator, map_RM: np.ndarray) -> list[str]:
    """A line `a>b` for each node of a map, in random order."""
    nodes = map_RM.shape[1]
    return joined(edges_of(nodes), shuffled(rng, np.arange(nodes) * nodes + map_RM), "\n")


def span(least: float, most: float) -> str:
    return f"of {least} or more" if most == math.inf else f"from {least} to {most}"


def check_whole(least: int, most: float = math.inf, **options) -> None:
    """Raises a ValueError for an option that is not a whole number of this range."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
            raise ValueError(f"{name}={value!r} must be a whole number {span(least, most)}.")


def check_flag(**options) -> None:
    """Raises a ValueError for an option that is neither True nor False."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be True or False.")
