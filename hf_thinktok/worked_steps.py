"""Worked solutions whose last steps are taken away, one more at each level, with thinking tokens in their place.

The question that Coconut asked (https://huggingface.co/papers/2412.06769, section 4, there from the first step on): can what was written out be thought? At
level 0 all steps are there and the answer is read off; at the highest none is. The thought stands before the result, which alone is judged.
"""

import json
from pathlib import Path

import numpy as np
from datasets import Dataset

from .tasks import Task, check_levels
from .tasks.recipe import check_whole


def worked_steps(
    file: str,
    levels: list[int] | None = None,
    tokens_per_step: int = 2,
    test_questions: int | None = None,
    test_file: str | None = None,
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
        test_questions: kept from training, drawn with `seed`; at each level the same. 200 by default.
        test_file: solutions of the same form to test on, all of them, in place of `test_questions`. A question that is tested is not trained on.
        max_questions: use only so many of `file`, the test's included.

    Raises:
        ValueError: no such file, or rows that are no worked solutions.
    """
    check_whole(0, tokens_per_step=tokens_per_step)
    if max_questions is not None:
        check_whole(1, max_questions=max_questions)
    if test_file is not None and test_questions is not None:
        raise ValueError(f"test_questions={test_questions} has no effect with test_file: leave one of the two out.")
    rows = _read(file, question, answer, separator)
    train = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:max_questions]]
    if test_file is not None:
        test = _read(test_file, question, answer, separator)
    else:
        kept = 200 if test_questions is None else test_questions
        if not 0 < kept < len(train):
            raise ValueError(f"test_questions={kept} must be above 0 and below the {len(train)} questions there are.")
        train, test = train[kept:], train[:kept]
    tested = {asked for asked, *_ in test}
    train = [row for row in train if row[0] not in tested]
    if not test:
        raise ValueError(f"{test_file} has no question to test: name a file with worked solutions.")
    if not train:
        raise ValueError(f"{file} has no question that the test has not: name files with different questions.")
    most = max(len(steps) for _, steps, _ in (*train, *test))
    chosen = check_levels("worked_steps", "levels", range(most + 1) if levels is None else levels, 0, most)
    return Task(
        name="worked_steps",
        train=_rows(train, chosen, tokens_per_step, separator),
        test=_rows(test, chosen, tokens_per_step, separator),
        chance=0.0,
        shortcut={level: float(level == 0) for level in chosen},  # with all steps there, the result is
        stepwise=False,
        words=(),
    )


def _read(file: str, question: str, answer: str, separator: str) -> list[tuple[str, list[str], str]]:
    """The solutions of a file, or a ValueError."""
    if not Path(file).is_file():
        raise ValueError(f"There is no file {file!r}: name one with worked solutions, such as gsm8k_train.jsonl, in task_options.")
    found = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in (question, answer)) or separator not in row[answer]:
            raise ValueError(f"Line {number} of {file} is no worked solution: it needs {question!r}, and {answer!r} with the result behind {separator!r}.")
        found.append(solution(row, question, answer, separator))
    return found


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
