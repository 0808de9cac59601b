"""Rows of text with their documents, and what a data set must have."""

import itertools
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from trl import maybe_convert_to_chatml

from ._compat import DataCollatorForLanguageModeling
from .config_checks import SEVERAL_LENGTHS, no_effect, only_divides
from .distributed import embedding_rows
from .errors import first_line
from .models import has_position_table, longest_row
from .tokens import ThinkingVocabulary

logger = logging.getLogger(__name__)

# Rows looked at for missing text; more would make a large corpus wait.
CHECKED_ROWS = 100_000
# Rows of a stream that are looked at, and of any data set those that thinking rows are calibrated on.
STREAMED_ROWS = 64
# Rows whose ids are looked at.
LOOKED_AT_ROWS = 1_000
# Columns that TRL can make a row from, beside the text column; the first that are there.
READABLE_COLUMNS = (("input_ids",), ("prompt", "completion"), ("messages",), ("conversations",))
# What each message of a chat has there.
MESSAGE_KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}
# What a data set may say about thinking: how hard a row is, how many thinking tokens it gets, and a thought of its own (numbers from 0).
TASK_COLUMNS = ("level", "think_length", "thoughts")


def columns_of_text(columns: Iterable[str], text: str) -> tuple[str, ...]:
    """Those that TRL makes a row's text from: the text column where there are no others."""
    return next((names for names in READABLE_COLUMNS if set(names) <= set(columns)), (text,))


def columns_of_document(columns: Iterable[str], text: str = "text") -> tuple[str, ...]:
    """Those that a document is read from where it is to be text: the text column where there is one, which TRL takes last; none where there are only ids."""
    return next((names for names in ((text,), *READABLE_COLUMNS[1:]) if set(names) <= set(columns)), ())


def text_of(document: dict[str, Any] | str, tokenizer, text: str = "text") -> str | None:
    """A document's text, as the trainer reads it from a row: a prompt with its completion, a chat by the tokenizer's template. `None` where there is none.

    Args:
        document: a row, or its text itself.
        tokenizer: the model's; `None` where there is none.
        text: the text column, which is taken where it is there.

    Raises:
        ValueError: a chat, and no chat template that takes it; or columns that are of different kinds.
    """
    if isinstance(document, str):
        return document
    columns = columns_of_document(document, text)
    if columns in ((), (text,)):
        return document.get(text) if isinstance(document.get(text), str) else None
    try:
        read = maybe_convert_to_chatml({name: document[name] for name in columns})  # conversations are messages under other names
        chat = read["messages"] if "messages" in read else read["prompt"] + read["completion"]
        if isinstance(chat, str):
            return chat
        if getattr(tokenizer, "chat_template", None) is None:
            mend = "give the model's tokenizer one, or make the text with text_template"
            raise ValueError(f"The data has chats, and the tokenizer no chat template to make texts of them: {mend}.")
        tools = document.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options = document.get("chat_template_kwargs") or {}
        made = tokenizer.apply_chat_template(chat, tools=tools or None, tokenize=False, **options)
    except (TemplateError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"A row's {' and '.join(columns)} cannot be made text: {first_line(error)}; give strings, or messages that the template takes."
        ) from error
    # Whoever reads the text has the tokenizer begin it, and templates begin it themselves.
    begins = tokenizer.bos_token is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return made.removeprefix(tokenizer.bos_token) if begins else made


def task_columns(args) -> list[str]:
    """Those that the options make use of; to others a data set's columns of the same names are no concern."""
    used = {"level": args.curriculum_threshold is not None, "think_length": args.stop == "fixed", "thoughts": args.supply_thoughts}
    return [column for column in TASK_COLUMNS if used[column]]


@dataclass
class TreeCollator(DataCollatorForLanguageModeling):
    """TRL's padding collator, and `documents`: which document of a packed row each token belongs to, -1 for padding.

    Rows are padded with their first token, as a model's own row for padding may be zero, where some layers have no gradient (Gemma 3n's, by a standard
    deviation): nothing sees padding, and a zero times what is no number is none.

    Args:
        columns: of `TASK_COLUMNS`, which come along where the data has them; a row's `thoughts` are padded with -1.
    """

    columns: Sequence[str] = TASK_COLUMNS

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        if batch["labels"].shape != batch["input_ids"].shape:
            raise ValueError("A row has labels of another number than its input_ids: give each token one (-100 for none), or drop the column 'labels'.")
        for column in self.columns:
            if column in examples[0] and column != "thoughts":
                values = [torch.as_tensor(example[column], dtype=torch.long) for example in examples]  # of an empty list it would be another
                batch[column] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True) if values[0].ndim else torch.stack(values)
        if "thoughts" in self.columns and "thoughts" in examples[0]:
            thoughts = [torch.as_tensor(example["thoughts"], dtype=torch.long) for example in examples]
            batch["thoughts"] = torch.nn.utils.rnn.pad_sequence(thoughts, batch_first=True, padding_value=-1)
        batch["input_ids"] = batch["input_ids"].where(batch["attention_mask"].bool(), batch["input_ids"][:, :1])
        batch["documents"] = batch["attention_mask"] - 1
        for row, example in enumerate(examples):
            if (lengths := example.get("seq_lengths")) is not None:
                lengths = torch.as_tensor(lengths)
                batch["documents"][row, : int(lengths.sum())] = torch.arange(len(lengths)).repeat_interleave(lengths)
                batch["labels"][row, lengths.cumsum(0) - lengths] = -100  # nothing predicts a packed document's first token, and TRL does not count it
        return batch


def check_dataset(dataset, name: str, args, formatter: Callable[[dict], str] | None) -> None:
    """Refuses data that would fail later, or silently teach nothing.

    Raises:
        ValueError: no text column, empty rows, an unbounded stream.
    """
    if isinstance(dataset, IterableDataset):
        if name == "train" and args.max_steps <= 0:
            raise ValueError("A streaming data set has no length: set max_steps.")
        if name != "train" and args.world_size > 1:  # its last batch would be filled up, and nobody could tell with what
            raise ValueError(f"The {name} data set is streamed, and {args.world_size} processes would count rows twice: give a Dataset.from_list(list(rows)).")
        head = list(dataset.take(STREAMED_ROWS))
    elif isinstance(dataset, Dataset):
        if len(dataset) == 0:
            raise ValueError(f"The {name} data set is empty.")
        head = list(dataset.select(range(min(8, len(dataset)))))
    else:
        instead = f"give one of its splits ({', '.join(map(str, dataset))})" if isinstance(dataset, dict) else "make one with Dataset.from_list(rows)"
        raise TypeError(f"The {name} data set is a {type(dataset).__name__}, not a `datasets.Dataset` or `datasets.IterableDataset`: {instead}.")
    if not head:
        raise ValueError(f"The {name} data set is empty.")
    _check_task_columns(dataset, name, head, args)
    if formatter is not None and "input_ids" in head[0]:
        raise ValueError(f"The {name} data set has input_ids, and formatting_func makes texts: leave one of the two out.")
    if formatter is not None:
        _check_loss_columns(name, [args.dataset_text_field], args)
        for row in head:
            if not isinstance(text := formatter(row), str) or not text.strip():
                raise ValueError(f"formatting_func made {text!r} of a row of the {name} data set: it must return a text.")
        return
    columns, text = list(head[0]), args.dataset_text_field
    used = columns_of_text(columns, text)
    if "prompt" in columns and used not in READABLE_COLUMNS[:2]:
        raise ValueError(f"The {name} data set has prompts and no column 'completion': add what follows them, or drop the column 'prompt'.")
    if not set(used) <= set(columns):
        raise ValueError(
            f"The {name} data set has the columns {columns} and no {text!r}: name the text column with dataset_text_field, or pass a formatting_func."
        )
    _check_loss_columns(name, columns, args)
    stored = isinstance(dataset, Dataset) and dataset.format["type"] != "custom"  # a transform makes its columns as rows are read
    some = dataset.with_format(None).take(LOOKED_AT_ROWS) if stored else head
    if "labels" in columns and (used != ("input_ids",) or any(_differ(row["labels"], row["input_ids"]) for row in some)):
        raise ValueError(
            f"The {name} data set has a column 'labels' that is not one for each of its input_ids, and would be trained towards: drop it, or rename it."
        )
    if keys := MESSAGE_KEYS.get(used[0]):
        for message in itertools.chain.from_iterable(row[used[0]] or () for row in head):
            if not isinstance(message, dict) or not set(keys) <= set(message):
                there = list(message) if isinstance(message, dict) else type(message).__name__
                raise ValueError(f"The {name} data set has a message with {there} in {used[0]!r}, where {keys[0]} and {keys[1]} are due: rename its parts.")
    if "attention_mask" in columns and used == ("input_ids",) and any(0 in row["attention_mask"] for row in some):
        raise ValueError(f"The {name} data set has padded rows (0 in attention_mask), and padding would be trained on: tokenize without padding.")
    if "seq_lengths" in columns and used == ("input_ids",):
        if any(sum(row["seq_lengths"]) != len(row["input_ids"]) for row in some):
            raise ValueError(f"The {name} data set has seq_lengths that do not add up to the row's input_ids: give the tokens of each of its documents.")
        _check_packed(column_of(dataset, "seq_lengths", head), name, "labels" in columns, args)
    for column in used:
        values = itertools.islice(dataset.with_format(None)[column], CHECKED_ROWS) if stored else (row[column] for row in head)
        for number, value in enumerate(values):
            if says_something(column, value, text):
                continue
            if column == text and not isinstance(value, str | None):
                raise ValueError(f"Row {number} of the {name} data set has a {type(value).__name__} in {column!r}, where a text is due: make a text of it.")
            said = f"(row[{column!r}] or '').strip()" if column == text or isinstance(value, str) else f"row[{column!r}]"
            raise ValueError(
                f"Row {number} of the {name} data set has no text in {column!r}: drop empty rows, for example with dataset.filter(lambda row: {said})."
            )


def columns_of(dataset: Any) -> list[str]:
    """A data set's columns; of a stream that does not know them those of its first row."""
    if isinstance(dataset, IterableDataset) and dataset.column_names is None:
        return list(next(iter(dataset), {}))
    return getattr(dataset, "column_names", None) or []


def is_packed(dataset: Dataset | IterableDataset | None) -> bool:
    """Whether a row of this prepared set has, or may have, several documents."""
    return "seq_lengths" in (getattr(dataset, "column_names", None) or ("seq_lengths",))


def _check_packed(lengths: Iterable[list[int]], name: str, labelled: bool, args) -> None:
    """Rows that were packed before: TRL would pack them again, or cut them and not their documents."""
    packs = args.packing if name == "train" else args.eval_packing
    if packs and not labelled:  # those that have labels are left as they are
        raise ValueError(f"The {name} data set has seq_lengths, so it is packed, and packing=True would lose where documents begin: set packing=False.")
    longest = max(map(sum, lengths))
    if args.max_length is not None and longest > args.max_length:
        raise ValueError(f"The {name} data set has packed rows of {longest} tokens: set max_length={longest}, or pack to max_length={args.max_length}.")


def _check_loss_columns(name: str, columns: Collection[str], args) -> None:
    """Options about what of a row is learned need columns that say so."""
    if args.completion_only_loss and not ({"prompt", "completion"} <= set(columns) or {"completion_mask", "labels"} & set(columns)):
        raise ValueError(
            f"completion_only_loss=True has no effect on the {name} data set, which has the columns {list(columns)}: it needs prompt and completion, or "
            "completion_mask beside input_ids. For chats set assistant_only_loss=True."
        )


def _differ(labels: Any, ids: Any) -> bool:
    return not hasattr(labels, "__len__") or len(labels) != len(ids)


def formatted(dataset, formatter: Callable[[dict], str], args):
    """The texts that a `formatting_func` makes of rows, and what these say about thinking; TRL would look for a chat or a prompt first."""
    dropped = [column for column in next(iter(dataset)) if column not in (*task_columns(args), args.dataset_text_field)]

    def text_of(row: dict[str, Any]) -> dict[str, str]:
        if not isinstance(text := formatter(row), str):
            raise ValueError(f"formatting_func made {text!r} of a row: it must return a text.")
        return {args.dataset_text_field: text}

    with args.main_process_first(desc="formatting"):
        return dataset.map(text_of, remove_columns=dropped)


def says_something(column: str, value: Any, text: str = "text") -> bool:
    """Whether a row may have this value: a text that is not blank; beside the text column also messages or ids, where there are any."""
    if column == "prompt" and value == "":  # then all of the completion is learned
        return True
    return bool(value.strip()) if isinstance(value, str) else column != text and hasattr(value, "__len__") and len(value) > 0


def check_prepared(train_dataset, eval_dataset, model, args, vocabulary: ThinkingVocabulary | None) -> None:
    """What was made of the rows: there are some, and their ids are the model's, of real tokens. Of many rows the first are looked at.

    Raises:
        ValueError: none is left, or ids are not in the embedding, or those of thinking tokens.
    """
    for name, dataset in named_sets(train_dataset, eval_dataset).items():
        if not isinstance(dataset, Dataset):
            continue
        if len(dataset) == 0:
            raise ValueError(f"No row of the {name} data set has a token to predict within max_length={args.max_length}: raise max_length.")
        if dataset.format["type"] == "custom":
            continue
        rows_read = dataset.with_format(None)[:LOOKED_AT_ROWS]
        ids = set(itertools.chain.from_iterable(rows_read.get("input_ids", [])))
        labels = rows_read.get("labels", [])
        if {label for row in labels for label in row[1:]} == {-100}:
            raise ValueError(f"None of the first {len(labels)} rows of the {name} data set has a label that a token predicts: all are -100, or their first.")
        learned = set(itertools.chain.from_iterable(labels)) - {-100}
        if (least := min(learned, default=0)) < 0:
            raise ValueError(f"The {name} data set has the label {least}: it is to be a token's id, or -100 where nothing is to be learned.")
        ids |= learned
        if (largest := max(ids, default=0)) >= (rows := embedding_rows(model)):
            raise ValueError(f"The {name} data set has the id {largest} and the model {rows} rows: make its input_ids with the model's tokenizer.")
        if vocabulary is not None and (thoughts := ids.intersection(vocabulary.ids)):
            raise ValueError(f"The {name} data set has the id {min(thoughts)}, a thinking token of this model: make its input_ids with the model's tokenizer.")
        if args.max_length is not None and not skips_preparing(args):  # rows were cut
            full = sum(len(row) == args.max_length for row in rows_read.get("input_ids", []))
            cut = name == "train" and not args.packing and not is_packed(dataset)  # what is evaluated is the beginning of each document, packed or not
            if cut and full > (looked_at := min(len(dataset), LOOKED_AT_ROWS)) / 100:
                how = "%d of the first %d training rows were cut at max_length=%d: set packing=True to train on the rest of them."
                logger.warning(how, full, looked_at, args.max_length)
            continue
        longest, positions = longest_of(dataset, "input_ids"), longest_row(model)
        if args.max_length is not None and longest > args.max_length:
            raise ValueError(
                f"The {name} data set has a row of {longest} tokens, and with skip_prepare_dataset rows are not cut to max_length={args.max_length}: cut them."
            )
        if args.max_length is None and has_position_table(model) and longest > positions:
            raise ValueError(f"The {name} data set has a row of {longest} tokens, and the model has learned {positions} positions: set max_length={positions}.")


def is_prepared(dataset, args, packing: bool) -> bool:
    """Whether rows are as TRL would leave them, which writes each anew to find out: rows of ids and labels that fit, each with something to learn."""
    if not isinstance(dataset, Dataset) or packing or args.shuffle_dataset or args.max_length is None or dataset.format["type"] == "custom":
        return False
    if not {"input_ids", "labels"} <= set(dataset.column_names) or not len(dataset):
        return False
    return longest_of(dataset, "input_ids") <= args.max_length and all(_all_learn(labels) for labels in _tables(dataset, "labels"))


def _all_learn(labels) -> bool:
    """Whether each of these rows has a label."""
    rows = pc.list_parent_indices(labels).filter(pc.not_equal(pc.list_flatten(labels), -100))
    return pc.count_distinct(rows).as_py() == len(labels)


def longest_of(dataset: Dataset, column: str) -> int:
    """Tokens of the longest row."""
    return max(pc.max(pc.list_value_length(rows)).as_py() for rows in _tables(dataset, column))


def _tables(dataset: Dataset, column: str) -> Iterator[Any]:
    """A column's rows from the table itself, some thousand at a time: a corpus read row by row takes minutes."""
    return (table[column].combine_chunks() for table in dataset.select_columns(column).with_format("arrow").iter(batch_size=1 << 14))


def skips_preparing(args) -> bool:
    """Whether TRL is told to leave rows as they are."""
    return bool((args.dataset_kwargs or {}).get("skip_prepare_dataset"))


def named_sets(train_dataset, eval_dataset) -> dict[str, Dataset | IterableDataset]:
    """The data sets that there are, with the names that errors call them by: one to evaluate on may have the name of the one that is trained on."""
    evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    sets = {"train": train_dataset, **{"eval train" if name == "train" else name: dataset for name, dataset in evaluated.items()}}
    return {name: dataset for name, dataset in sets.items() if dataset is not None}


def _check_task_columns(dataset, name: str, head: list[dict[str, Any]], args) -> None:
    """What the data says about thinking must fit the options. Of a stream its first rows are looked at."""
    if not args.thinks:
        return
    if args.supply_thoughts and "thoughts" not in head[0]:
        raise ValueError(f"supply_thoughts needs a column `thoughts` (lists of numbers from 0), and the {name} data set has {list(head[0])}.")
    all_as_long = name == "train" and args.stop == "fixed" and args.thoughts == "discrete" and "think_length" not in head[0]
    if all_as_long and args.think_loss_type not in ("dr_grpo", "bnpo") and only_divides(args):
        raise no_effect(args, "think_loss_type", SEVERAL_LENGTHS)
    found: dict[str, list[Any]] = {}
    for column in task_columns(args):
        if column not in head[0]:
            continue
        if args.packing:
            raise ValueError(f"The {name} data set's column {column!r} is about a row, and packing=True joins rows: set packing=False, or drop the column.")
        values = column_of(dataset, column, head)
        numbers = list(itertools.chain.from_iterable(values)) if column != "level" and all(isinstance(value, list) for value in values) else values
        # A thought that is supplied is of one length, and a text that the model writes has marks of its own.
        one_each = args.supply_thoughts or args.rollout == "free"
        if column == "think_length" and numbers is not values and (args.fork_positions != "markers" or one_each):
            mend = "give each row one number" if one_each else "set fork_positions=markers, or give each row one number"
            raise ValueError(f"The {name} data set's column think_length has lists, a number for each marked place: {mend}.")
        if wrong := [number for number in numbers if not isinstance(number, int) or number < 0]:
            whole = "lists of whole numbers" if column == "thoughts" else "whole numbers"
            raise ValueError(f"The {name} data set's column {column!r} has {wrong[0]!r} where {whole} from 0 are due: mend it, or drop or rename the column.")
        if args.blind and column == "think_length" and numbers is values and 0 in numbers:  # in a list it is a place without a fork
            raise ValueError(
                f"The {name} data set has a think_length of 0, and under blind nothing can be said without a thought: give each row 1 or more, or set "
                "blind=False."
            )
        found[column] = values if column == "thoughts" else numbers
    if (longest := max(found.get("think_length", ()), default=0)) > args.max_think_length:
        raise ValueError(
            f"The {name} data set asks for thoughts of {longest} tokens (column think_length): set max_think_length={longest}, or drop the column."
        )
    if not args.supply_thoughts:
        return
    if args.num_think_tokens is not None:
        check_thinking_numbers(found["thoughts"], name, args.num_think_tokens)
    for number, (thought, length) in enumerate(zip(found["thoughts"], found.get("think_length") or itertools.repeat(args.max_think_length))):
        if len(thought) != length:
            raise ValueError(
                f"Row {number} of the {name} data set has a thought of {len(thought)} tokens where {length} are thought: mend it, or give each row its length "
                "in a column think_length."
            )


def column_of(dataset: Dataset | IterableDataset, column: str, head: Iterable[dict[str, Any]] | None = None) -> list[Any]:
    """The values of a column; of a stream those of its first rows, which are read where `head` does not have them."""
    if isinstance(dataset, Dataset):
        return (dataset if dataset.format["type"] == "custom" else dataset.with_format(None))[column][:]  # a transform makes its columns as rows are read
    return [row[column] for row in (dataset.take(STREAMED_ROWS) if head is None else head)]


def check_thinking_numbers(thoughts: Iterable[list[int]], name: str, num_tokens: int) -> None:
    """Supplied thoughts consist of thinking tokens that there are."""
    largest = max(itertools.chain.from_iterable(thoughts), default=0)
    if largest >= num_tokens:
        raise ValueError(
            f"The {name} data set's thoughts go up to {largest}, and there are {num_tokens} thinking tokens: start from a model without any and set "
            f"num_think_tokens={largest + 1} or more, or number them from 0."
        )


def levels_of(dataset) -> list[int]:
    """The levels of a data set with a column `level`, ascending.

    Raises:
        ValueError: a stream, or no such column.
    """
    if not isinstance(dataset, Dataset) or "level" not in dataset.column_names:
        raise ValueError(
            "curriculum_threshold needs a map-style data set with a column `level` (whole numbers, harder rows higher): add it, or leave the option out."
        )
    return sorted(set(column_of(dataset, "level")))
