"""Rows with one answer each, and what a trainer makes of them."""

import numpy as np
from datasets import Dataset

N = 4


def questions(count=24, levels=(1, 2, 3)):
    """Rows of one length with one answer each, and thoughts of `level - 1` tokens."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(count):
        level = levels[i % len(levels)]
        ids = random.integers(10, 200, 6).tolist()
        thoughts = random.integers(0, N, level - 1).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 5 + ids[5:], "level": level, "think_length": level - 1, "thoughts": thoughts})
    return Dataset.from_list(rows)


def batch_of(trainer, rows):
    inputs = trainer.data_collator([rows[i] for i in range(len(rows))])
    return inputs, trainer._labels(inputs)


def one_rollout(trainer, inputs, labels):
    """What the trainer would learn from at its first step."""
    trainer.current_gradient_accumulation_steps = 1
    return trainer._rollout(trainer.model, inputs, labels, 0, trainer._schedule_step(inputs))
