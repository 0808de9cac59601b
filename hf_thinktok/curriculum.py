"""In which order rows are trained on: harder ones when the easier are done, and batches that come again.

The level of a step depends on the seed, the step and the levels passed so far, so a resumed run draws the rows that the interrupted one would have drawn.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from ._compat import RepeatSampler
from .config import ThinkTokConfig

# A data loader fetches ahead of training; a level that is passed takes effect so many steps later, in an interrupted run as in one that was not.
LAG = 2
# Weight of a step's accuracy in its running average, which takes so many steps at least to pass a level.
RATE, LEAST_STEPS = 0.1, 10


class Curriculum:
    """The current level, from the running accuracy at it.

    Args:
        levels: those of the data set, ascending.
        thresholds: running accuracy at which the next level begins: one for all, or one for each level but the last.
        lengths: thinking tokens of a thought at most while each level is the current one, where they are bounded by it. Then the levels before must be
            passed as well for the next one to begin: longer thoughts are one more way to be wrong at them.

    Raises:
        ValueError: not as many.
    """

    def __init__(self, levels: list[int], thresholds: list[float], lengths: list[int] | None = None):
        between = len(levels) - 1
        if not between:
            raise ValueError(f"curriculum_threshold has no effect on data of one level, {levels[0]}: leave it out.")
        if len(thresholds) not in (1, between):
            raise ValueError(
                f"curriculum_threshold has {len(thresholds)} numbers and the data {len(levels)} levels ({', '.join(map(str, levels))}): give one number, "
                f"or one for each level but the last ({between})."
            )
        if lengths is not None and len(lengths) != len(levels):
            raise ValueError(
                f"curriculum_think_length has {len(lengths)} numbers and the data {len(levels)} levels ({', '.join(map(str, levels))}): give one for each."
            )
        self.lengths = lengths
        self.levels, self.thresholds = levels, thresholds * between if len(thresholds) == 1 else thresholds
        self.begins = [0]  # the step at which each reached level begins
        self.sums: dict[int, float] = {}
        self.counts: dict[int, float] = {}  # optimizer steps

    @property
    def accuracy(self) -> dict[int, float]:
        """The running average at each level, its start without weight (as Adam's, https://huggingface.co/papers/1412.6980, algorithm 1)."""
        return {level: total / (1 - (1 - RATE) ** self.counts[level]) for level, total in self.sums.items()}

    def reached(self, step: int) -> list[int]:
        """The levels that are drawn from at a step; the last is the current one."""
        return self.levels[: sum(begin <= step for begin in self.begins)]

    def longest(self, step: int) -> int | None:
        """Thinking tokens of a thought at most, where the level bounds them."""
        return None if self.lengths is None else self.lengths[len(self.reached(step)) - 1]

    def stage_step(self, step: int, level: int) -> int:
        """Steps since a level began, the clock of all schedules on its rows: a new level explores, and those below it keep what they have found."""
        return step - self.begins[self.levels.index(level)]

    def observe(self, step: int, level: int, accuracy: float, share: float = 1.0) -> None:
        """Takes in the accuracy of a batch, which is a `share` of an optimizer step."""
        kept = (1 - RATE) ** share
        self.sums[level] = self.sums.get(level, 0.0) * kept + (1 - kept) * accuracy
        self.counts[level] = self.counts.get(level, 0.0) + share
        reached = len(self.begins)
        if reached == len(self.levels):
            return
        if all(self._passed(number) for number in (range(reached) if self.lengths else [reached - 1])):
            self.begins.append(step + LAG)

    def _passed(self, number: int) -> bool:
        level = self.levels[number]
        return round(self.counts.get(level, 0.0), 6) >= LEAST_STEPS and self.accuracy[level] >= self.thresholds[number]

    def state_dict(self) -> dict[str, Any]:
        return {"levels": self.levels, "begins": self.begins, "sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (levels := state.get("levels", self.levels)) != self.levels:
            raise ValueError(
                f"The checkpoint's data has the levels {', '.join(map(str, levels))} and this run's {', '.join(map(str, self.levels))}: they must agree."
            )
        self.begins, self.sums, self.counts = list(state["begins"]), dict(state["sums"]), dict(state["counts"])


class LevelSampler(Sampler[int]):
    """Row numbers, all of one level within an optimizer step.

    Args:
        levels_D: the level of each row.
        batch: rows of an optimizer step over all ranks.
        replay: part of the steps that goes to all reached levels alike; the rest goes to the current one.
        steps: optimizer steps of the run.
    """

    def __init__(self, levels_D: np.ndarray, curriculum: Curriculum, batch: int, replay: float, steps: int, seed: int):
        self.curriculum, self.batch, self.replay, self.steps, self.seed = curriculum, batch, replay, steps, seed
        self.rows = {level: np.flatnonzero(levels_D == level) for level in curriculum.levels}

    def __len__(self) -> int:
        return self.steps * self.batch

    def __iter__(self) -> Iterator[int]:
        for step in range(self.steps):
            random = np.random.default_rng([self.seed, step])
            reached = self.curriculum.reached(step)
            level = random.choice(reached) if random.random() < self.replay else reached[-1]
            yield from random.choice(self.rows[level], self.batch).tolist()


class BatchesAgain(RepeatSampler):
    """TRL's sampler that repeats batches, in an order that depends on seed and epoch alone: a resumed run goes on in the order of the interrupted one."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


def order_of_rows(dataset, args: ThinkTokConfig, batch: int, curriculum: Curriculum | None) -> Sampler:
    """Level by level with a curriculum; else every batch of an optimizer step as often as `num_iterations` says, in the same order.

    Args:
        batch: rows of an optimizer step, of all processes.

    Raises:
        ValueError: there are fewer rows.
    """
    seed = args.seed if args.data_seed is None else args.data_seed
    if curriculum is not None:
        return LevelSampler(np.asarray(dataset["level"][:]), curriculum, batch, args.curriculum_replay, args.max_steps, seed)
    if len(dataset) < batch:
        raise ValueError(f"num_iterations={args.num_iterations} repeats whole batches, and {len(dataset)} rows are fewer than one of {batch}: lower it.")
    return BatchesAgain(dataset, mini_repeat_count=1, batch_size=batch, repeat_count=args.num_iterations, seed=seed)
