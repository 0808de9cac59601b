"""Worked solutions whose last steps are taken away, one more at each level, with thinking tokens in their place.

The question that Coconut asked (https://huggingface.co/papers/2412.06769, section 4, there from the first step on): can what was written out be thought? At
level 0 all steps are there and the answer is read off; at the highest none is. The thought stands before the result, which alone is judged.
"""

import json
from pathlib import Path

import numpy as np
from datasets import Dataset

from .tasks import Task, check_levels


def worked_steps(
    file: str,
    levels: list[int] | None = None,
    tokens_per_step: int = 2,
    test_questions: int = 200,
    max_questions: int | None = None,
    question: str = "question",
    answer: str = "answer",
    separator: str = "####",
    seed: int = 0,
) -> Task:
    """Rows with the columns prompt, completion, level and think_length, from a file of worked solutions such as GSM8K's.

    Args:
        file: JSON lines. The answer's lines are its steps; behind `separator` stands the result, which alone is to be said.
        levels: how many steps are taken away, from the last one on; a solution with fewer loses all. By default 0 to the most that any has.
        tokens_per_step: thinking tokens in the place of each step.
        test_questions: kept from training, drawn with `seed`; at each level the same.
        max_questions: use only so many, the test's included.

    Raises:
        ValueError: no such file, or rows that are no worked solutions.
    """
    if not Path(file).is_file():
        raise ValueError(f"There is no file {file!r}: name one with worked solutions, such as gsm8k_train.jsonl, in task_options.")
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if not {question, answer} <= set(row) or separator not in row[answer]:
            raise ValueError(f"Line {number} of {file} is no worked solution: it needs {question!r}, and {answer!r} with the result behind {separator!r}.")
    order = np.random.default_rng(seed).permutation(len(rows))[:max_questions]
    if not 0 < test_questions < len(order):
        raise ValueError(f"test_questions={test_questions} must be above 0 and below the {len(order)} questions there are.")
    solutions = [solution(rows[i], question, answer, separator) for i in order]
    most = max(len(steps) for _, steps, _ in solutions)
    chosen = check_levels("worked_steps", "levels", range(most + 1) if levels is None else levels, 0, most)
    return Task(
        name="worked_steps",
        train=_rows(solutions[test_questions:], chosen, tokens_per_step, separator),
        test=_rows(solutions[:test_questions], chosen, tokens_per_step, separator),
        chance=0.0,
        shortcut={level: float(level == 0) for level in chosen},  # with all steps there, the result is
        words=(),
    )


def solution(row: dict[str, str], question: str, answer: str, separator: str) -> tuple[str, list[str], str]:
    """Question, steps and result."""
    *worked, result = row[answer].split(separator)
    return row[question].strip(), [step for step in separator.join(worked).strip().split("\n") if step], result.strip()


def _rows(solutions: list[tuple[str, list[str], str]], levels: list[int], tokens_per_step: int, separator: str) -> Dataset:
    """All questions at each level; levels take turns, so that the first rows are of each."""
    table = []
    for asked, steps, result in solutions:
        for level in levels:
            removed = min(level, len(steps))
            prompt = "\n".join([f"Question: {asked}", "Answer:", *steps[: len(steps) - removed], separator])
            table.append({"prompt": prompt, "completion": f" {result}", "level": level, "think_length": tokens_per_step * removed})
    return Dataset.from_list(table)
