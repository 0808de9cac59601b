"""Rows of text with their documents, and what a data set must have."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from ._compat import DataCollatorForLanguageModeling

# Rows looked at for missing text; more would make a large corpus wait.
CHECKED_ROWS = 100_000
# Columns that TRL can make a row from, beside the text column.
READABLE_COLUMNS = ("input_ids", "messages", "conversations", "prompt")
# What a data set may say about thinking: how hard a row is, how many thinking tokens it gets, and a thought of its own (numbers from 0).
TASK_COLUMNS = ("level", "think_length", "thoughts")


@dataclass
class TreeCollator(DataCollatorForLanguageModeling):
    """TRL's padding collator, and `documents`: which document of a packed row each token belongs to, -1 for padding.

    The columns of `TASK_COLUMNS` come along where the data has them; a row's `thoughts` are padded with -1.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        for column in TASK_COLUMNS:
            if column in examples[0] and column != "thoughts":
                batch[column] = torch.tensor([example[column] for example in examples])
        if "thoughts" in examples[0]:
            thoughts = [torch.tensor(example["thoughts"], dtype=torch.long) for example in examples]
            batch["thoughts"] = torch.nn.utils.rnn.pad_sequence(thoughts, batch_first=True, padding_value=-1)
        batch["documents"] = batch["attention_mask"] - 1
        for row, example in enumerate(examples):
            if (lengths := example.get("seq_lengths")) is not None:
                lengths = torch.as_tensor(lengths)
                batch["documents"][row, : int(lengths.sum())] = torch.arange(len(lengths)).repeat_interleave(lengths)
        return batch


def check_dataset(dataset, name: str, args, has_formatter: bool) -> None:
    """Refuses data that would fail later, or silently teach nothing.

    Raises:
        ValueError: no text column, empty rows, an unbounded stream.
    """
    if isinstance(dataset, IterableDataset):
        if name == "train" and args.max_steps <= 0:
            raise ValueError("A streaming data set has no length: set max_steps.")
        head = list(dataset.take(8))
    elif isinstance(dataset, Dataset):
        if len(dataset) == 0:
            raise ValueError(f"The {name} data set is empty.")
        head = list(dataset.select(range(min(8, len(dataset)))))
    else:
        raise TypeError(f"The {name} data set is a {type(dataset).__name__}; it must be a `datasets.Dataset` or `datasets.IterableDataset`.")
    if not head:
        raise ValueError(f"The {name} data set is empty.")
    columns = list(head[0])
    text = args.dataset_text_field
    if not has_formatter and text not in columns and not any(column in columns for column in READABLE_COLUMNS):
        raise ValueError(
            f"The {name} data set has the columns {columns} and no {text!r}: name the text column with dataset_text_field, or pass a formatting_func."
        )
    _check_task_columns(dataset, name, columns, args)
    if has_formatter or text not in columns:
        return
    rows = itertools.islice(dataset[text], CHECKED_ROWS) if isinstance(dataset, Dataset) else [row[text] for row in head]
    empty = next((i for i, row in enumerate(rows) if not isinstance(row, str) or not row.strip()), None)
    if empty is not None:
        raise ValueError(
            f"Row {empty} of the {name} data set has no text in {text!r}: drop empty rows, for example with dataset.filter(lambda row: row[{text!r}].strip())."
        )


def _check_task_columns(dataset, name: str, columns: list[str], args) -> None:
    """What the data says about thinking must fit the options."""
    if not args.thinks or args.stop != "fixed" or not isinstance(dataset, Dataset):
        return
    if args.supply_thoughts and "thoughts" not in columns:
        raise ValueError(f"supply_thoughts needs a column `thoughts` (lists of numbers from 0), and the {name} data set has {columns}.")
    if "think_length" in columns and (longest := max(dataset["think_length"])) > args.max_think_length:
        raise ValueError(
            f"The {name} data set asks for thoughts of {longest} tokens (column think_length): set max_think_length={longest}, or drop the column."
        )
    if args.supply_thoughts and (largest := max((max(thought, default=0) for thought in dataset["thoughts"]), default=0)) >= (args.num_think_tokens or 16):
        raise ValueError(f"The {name} data set's thoughts go up to {largest}: set num_think_tokens={largest + 1} or more.")


def levels_of(dataset) -> list[int]:
    """The levels of a data set with a column `level`, ascending.

    Raises:
        ValueError: a stream, or no such column.
    """
    if not isinstance(dataset, Dataset) or "level" not in dataset.column_names:
        raise ValueError(
            "curriculum_threshold needs a map-style data set with a column `level` (whole numbers, harder rows higher): add it, or leave the option out."
        )
    return sorted(set(dataset["level"]))
