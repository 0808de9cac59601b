"""Text to train and to evaluate on, from files or the Hub, and its held-out part."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from glob import escape, glob, has_magic
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from .config_checks import default_of
from .data import READABLE_COLUMNS, TASK_COLUMNS, columns_of, columns_of_document, says_something
from .sources import STANDARD_LIBRARY, standard_library

logger = logging.getLogger(__name__)

# Builders of `datasets` by the ends of files' names.
KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
OF_PARTS = ("dataset_test_split", "max_documents", "test_documents", "held_out_documents", "data_split_seed")
# What says how a data set is read, of which the standard library's text is none.
OF_DATA_SETS = ("dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming", "text_template")


@dataclass
class TextArguments:
    """Where the text comes from, and which part of it is held out."""

    dataset_name: str | None = field(default=None, metadata={"help": f"A data set on the Hub or in a folder, or {STANDARD_LIBRARY}, in place of data_files."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_train_split: str = field(default="train", metadata={"help": "Its split to take the text from; held-out parts as well, without dataset_test_split."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Its split to take held_out_documents and test_documents from."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read it as it is needed."})
    data_files: list[str] | None = field(default=None, metadata={"help": f"Local files ({', '.join(KINDS)}; all of one kind), in place of dataset_name."})
    text_template: str | None = field(
        default=None,
        metadata={
            "help": "Makes a row's text from its columns, for example '{question}\\n{answer}'. Without it a row has text, prompt and completion, or messages."
        },
    )
    sample_by: str = field(default="line", metadata={"help": "What one document of a .txt file is.", "choices": ["line", "paragraph", "document"]})
    max_documents: int | None = field(default=None, metadata={"help": "Use only so many documents, drawn with seed data_split_seed (a stream: the first)."})
    held_out_documents: int = field(
        default=64, metadata={"help": "Documents kept from training to evaluate on, drawn with seed data_split_seed. 0: no evaluation."}
    )
    test_documents: int = field(
        default=0, metadata={"help": "Documents kept from training and from its evaluation, to report on (recipes/compare.py, thinktok eval)."}
    )
    data_split_seed: int = field(default=0, metadata={"help": "Seed of both held-out parts; the same for all runs that are compared."})

    def __post_init__(self):
        for name, least in (("max_documents", 1), ("held_out_documents", 0), ("test_documents", 0)):
            if (count := getattr(self, name)) is not None and count < least:
                raise ValueError(f"{name}={count} must be at least {least}.")
        for name in ("held_out_documents", "test_documents"):
            if getattr(self, name) == 1:
                raise ValueError(f"{name}=1 is too few for an interval over documents: give 2 or more, or 0 for none.")
        if isinstance(self.data_files, str):
            self.data_files = [self.data_files]
        for name in self.data_files or []:
            if Path(name).is_dir():
                raise ValueError(f"data_files names {name}, which is a folder: give the files in it, as in '{name}/*.jsonl', or dataset_name={name}.")
            if "://" not in name and not files_of(name):
                raise ValueError(f"data_files names {name}, and there is no such file: give its path from here, {Path.cwd()}, or a whole one.")
        if self.data_files and all(Path(name).is_file() and not Path(name).stat().st_size for name in self.data_files):
            raise ValueError(f"data_files has no text: {', '.join(self.data_files)} is empty.")
        if len(kinds := {kind_of(name) for name in self.data_files or []}) > 1:
            raise ValueError(f"data_files has files of several kinds ({', '.join(sorted(kinds))}): give files of one.")
        if self.sample_by != "line" and kinds != {"text"}:
            raise ValueError(f"sample_by={self.sample_by} has no effect here: it says what a document of a .txt file in data_files is. Leave it out.")
        given = [name for name in OF_DATA_SETS if getattr(self, name) != default_of(TextArguments, name)]
        if given and self.dataset_name == STANDARD_LIBRARY and not self.data_files:
            raise ValueError(f"{given[0]} has no effect with dataset_name={STANDARD_LIBRARY}, which is one text: leave it out.")
        if self.dataset_test_split is not None:
            self._check_test_split()
        if self.text_template is not None:
            if not columns_named(self.text_template):
                raise ValueError(f"text_template={self.text_template!r} names no column, so that all documents would be alike: name one, as in '{{question}}'.")
            # from a shell they come as two characters each
            self.text_template = self.text_template.replace("\\n", "\n").replace("\\t", "\t")

    def _check_test_split(self) -> None:
        given = f"dataset_test_split={self.dataset_test_split}"
        if self.data_files:
            raise ValueError(f"{given} has no effect with data_files, which have no splits: leave it out.")
        if not (self.held_out_documents or self.test_documents):
            raise ValueError(f"{given} has no effect without held_out_documents or test_documents, which are taken from it: give one, or leave it out.")
        if self.dataset_test_split == self.dataset_train_split:
            raise ValueError(f"{given} is the split that is trained on, from which documents are held out anyway: name another, or leave it out.")


@dataclass
class PretrainArguments(TextArguments):
    """The text that recipes/pretrain_think.py trains on, and what is reported of it."""

    report_documents: int = field(default=1, metadata={"help": "Held-out documents that the report shows token by token; 0: none."})

    def __post_init__(self):
        super().__post_init__()
        if self.report_documents < 0:
            raise ValueError(f"report_documents={self.report_documents} must be at least 0.")


@dataclass
class UnreadText(PretrainArguments):
    """The same where no text is read, so that it need not be there."""

    def __post_init__(self):
        pass


@dataclass
class ReportArguments:
    """The text that results are reported on, where it is no part of the one that is trained on."""

    test_files: list[str] | None = field(default=None, metadata={"help": "Local files to report on, in place of test_documents."})


def files_of(name: str) -> list[Path]:
    """The local files that a name of `data_files` stands for: itself, or those of its pattern."""
    if Path(name).exists():
        return [Path(name)]
    return sorted(map(Path, glob(name, recursive=True))) if has_magic(name) else []


def kind_of(file: str) -> str:
    """The builder of `datasets` that reads a file, by the end of its name, compressed or not."""
    suffixes = [suffix for suffix in Path(file.split("?")[0]).suffixes if suffix not in COMPRESSED]
    if not suffixes or suffixes[-1] not in KINDS:
        raise ValueError(f"data_files names {file}, which is no kind of text that is known: give files that end in {', '.join(KINDS)}.")
    return KINDS[suffixes[-1]]


def load_text(script: TextArguments) -> Dataset | IterableDataset:
    """Rows of a script's training split as the trainer reads them: text, prompts and completions, or chats. Empty ones are dropped: where text is blank or
    no string, where a column that makes it is null, or where there are no messages.

    Raises:
        ValueError: there is no text, it cannot be read, or not in one of these columns.
    """
    try:
        return _rows_with_text(script)
    except UnicodeDecodeError as error:  # some readers look at bytes when they are asked for
        raise ValueError(f"{', '.join(script.data_files or [str(script.dataset_name)])} cannot be read as text in UTF-8: {error}.") from error


def _rows_with_text(script: TextArguments) -> Dataset | IterableDataset:
    if script.data_files:
        kind = kind_of(script.data_files[0])
        options = {"sample_by": script.sample_by} if kind == "text" else {}
        files = [escape(name) if Path(name).exists() else name for name in script.data_files]
        try:
            text = load_dataset(kind, data_files=files, split="train", streaming=script.dataset_streaming, **options)
        except (DatasetGenerationError, EOFError, OSError, ValueError) as error:
            raise ValueError(f"{', '.join(script.data_files)} cannot be read as {kind}: {error.__cause__ or error}") from error
    elif script.dataset_name == STANDARD_LIBRARY:
        return standard_library()
    elif script.dataset_name:
        try:
            text = load_dataset(script.dataset_name, script.dataset_config, split=script.dataset_train_split, streaming=script.dataset_streaming)
        except ValueError as error:
            if Path(script.dataset_name, "state.json").is_file():  # one that `save_to_disk` wrote
                raise ValueError(f"{script.dataset_name} was written by save_to_disk, which is for Python alone: write it with to_parquet.") from error
            raise
        except DatasetGenerationError as error:  # such as files of a folder that have other columns each
            raise ValueError(
                f"{script.dataset_name} cannot be read as one data set: its files have different columns, or one is broken: name those that fit in data_files."
            ) from error
    else:
        raise ValueError("There is no text: give dataset_name (on the Hub) or data_files (local).")
    if template := script.text_template:
        text = text.map(
            lambda row: {"text": filled(template, row)}, remove_columns=[name for name in text.column_names or [] if name not in ("text", *TASK_COLUMNS)]
        )
    columns = columns_of(text)
    read = columns_of_document(columns)
    if columns and not read:
        strings = [name for name, kind in (text.features or {}).items() if getattr(kind, "dtype", None) in ("string", "large_string")]
        how = f"make it with text_template, for example --text_template '{{{strings[0]}}}'" if strings else "give data with a column of strings to make it of"
        raise ValueError(f"The data has the columns {columns} and no 'text', 'prompt' with 'completion', or 'messages': {how}.")
    # TRL would read others rather than the text, and more than one of them not at all.
    text = text.remove_columns(sorted({name for names in READABLE_COLUMNS for name in names} & set(columns) - set(read)))
    with_text = text.filter(lambda row: all(says_something(name, row[name]) for name in read))
    if isinstance(text, Dataset) and not len(with_text):
        raise ValueError("No row of the data has text: give data with a column 'text' of strings, or make it with text_template.")
    if isinstance(text, Dataset) and len(with_text) < len(text):
        logger.warning("%d of %d rows have no text, and are left out.", len(text) - len(with_text), len(text))
    return with_text


def columns_named(template: str) -> list[str]:
    """Columns that a template names.

    Raises:
        ValueError: it is none, as its braces do not match.
    """
    try:
        return [name.partition(".")[0].partition("[")[0] for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"text_template={template!r} cannot be read: {error}.") from None


def filled(template: str, row: dict[str, Any]) -> str:
    """A row's text; none where a column that the template names is null.

    Raises:
        ValueError: the row has no such column, or not of such a kind.
    """
    try:
        if any(row[name] is None for name in columns_named(template)):
            return ""
        return template.format(**row)
    except KeyError as missing:
        raise ValueError(f"text_template={template!r} names the column {missing}, and the data has {list(row)}.") from None
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"text_template={template!r} does not fit the data: {error}.") from None


class TextParts(NamedTuple):
    """Documents to train on, to evaluate on while settings are chosen, and to report on; `None` where there are none."""

    train: Dataset | IterableDataset
    held_out: Dataset | None
    test: Dataset | None


def check_column(name: str) -> None:
    """Recipes read, compare and report one column of their text.

    Raises:
        ValueError: the trainer was told of another one.
    """
    if name != "text":
        raise ValueError(f"dataset_text_field={name!r} would be trained on and 'text' be evaluated: make the text with --text_template '{{{name}}}' instead.")


def load_parts(script: TextArguments, prepare: Callable | None = None) -> TextParts:
    """The parts of a script's text. The test part is the same whatever is held out besides, and both for all runs with the same seed. What is held out is
    drawn from `dataset_test_split` where that is given, and its word for word copies are left out of what is trained on.

    Args:
        prepare: what is made of the rows before they are divided.

    Raises:
        ValueError: there is no text, or not enough of it.
    """
    made = prepare or (lambda rows: rows)
    text, seed = made(load_text(script)), script.data_split_seed
    if script.max_documents is not None:
        limit = script.max_documents
        text = text.take(limit) if isinstance(text, IterableDataset) else text.shuffle(seed=seed).select(range(min(limit, len(text))))
    splits = [text]
    if script.dataset_test_split is not None:
        held = replace(script, dataset_train_split=script.dataset_test_split, dataset_test_split=None)
        splits = [made(load_text(held)), text]
    parts: list[Dataset | None] = []
    for name in ("test_documents", "held_out_documents"):
        if (count := getattr(script, name)) == 0:
            parts.append(None)
            continue
        drawn, splits[0] = _drawn(splits[0], count, seed)
        if len(splits) == 1 and not next(iter(splits[0]), None):
            raise ValueError(f"{name}={count} leaves nothing of {len(drawn)} documents: give a smaller number, or 0 for none.")
        if len(drawn) < count:
            raise ValueError(
                f"{name}={count} is more than the {len(drawn)} documents that dataset_test_split={script.dataset_test_split} has: give a smaller number."
            )
        parts.append(distinct(drawn, name))
        splits = [without(rows, drawn, f"the {count} of {name}") for rows in splits]
    return TextParts(splits[-1], held_out=parts[1], test=parts[0])


def _drawn(text: Dataset | IterableDataset, count: int, seed: int) -> tuple[Dataset, Dataset | IterableDataset]:
    """So many rows, and the others; of a stream the first."""
    if isinstance(text, IterableDataset):
        return Dataset.from_list(list(text.take(count))), text.skip(count)
    order = np.random.default_rng(seed).permutation(len(text))  # as train_test_split has it, which must leave a row
    return text.select(order[:count]), text.select(order[count:])


def distinct(text: Dataset, of: str) -> Dataset:
    """Each document once: intervals are over documents, of which those that repeat each other are one.

    Args:
        of: what it is, as a part of a sentence.
    """
    first: dict[str, int] = {}
    for row, one in enumerate(_read_of(text)):
        first.setdefault(one, row)
    if len(first) == len(text):
        return text
    logger.warning("%s of the %s documents of %s repeat others word for word, and are left out.", f"{len(text) - len(first):,}", f"{len(text):,}", of)
    return text.select(first.values())


def without(text: Dataset | IterableDataset, others: Dataset, of: str) -> Dataset | IterableDataset:
    """The rows of a text that are not word for word among others.

    Args:
        of: the others, as a part of a sentence.

    Raises:
        ValueError: all are.
    """
    seen, read = set(_read_of(others)), list(columns_of_document(columns_of(text)))
    kept = text.filter(lambda *values: [one not in seen for one in _keys(*values)], batched=True, input_columns=read)  # which the next run finds done
    if not next(iter(kept), None) and next(iter(text), None):
        raise ValueError(f"All other documents are word for word among {of}: give text that does not repeat itself.")
    if isinstance(kept, Dataset) and len(kept) < len(text):
        logger.warning("%s of %s documents are word for word among %s, and are left out.", f"{len(text) - len(kept):,}", f"{len(text):,}", of)
    return kept


def _read_of(text: Dataset) -> list[str]:
    """What is read of each row."""
    return _keys(*(text[name] for name in columns_of_document(text.column_names)))


def _keys(*columns: list[Any]) -> list[str]:
    """The values of each row as one string."""
    return [json.dumps(_without_nulls(values), sort_keys=True, default=str) for values in zip(*columns, strict=True)]


def _without_nulls(value: Any) -> Any:
    """A value without the keys that its table alone has: Arrow gives each message the keys of all."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list | tuple) else value


def another_part(script: TextArguments, trained: dict[str, Any]) -> str | None:
    """The option by which a run's text was divided in another way than this script divides the same text; `None` where it was not.

    Args:
        trained: the run's options that were told.
    """
    run = {name: trained.get(name, default_of(TextArguments, name)) for name in ("dataset_name", "data_files", "dataset_train_split", *OF_PARTS)}
    files = [[Path(file).name for file in (names or ())] for names in (script.data_files, run["data_files"])]  # from wherever it was started
    if files[0] != files[1] or (not files[0] and script.dataset_name != run["dataset_name"]):
        return None
    if (script.dataset_test_split or script.dataset_train_split) != run["dataset_train_split"]:  # of a split that was not trained on
        return None
    parts = [name for name in OF_PARTS if not (script.test_documents and name == "held_out_documents")]  # the test part comes first
    return next((f"{name}={run[name]}" for name in parts if getattr(script, name) != run[name]), None)


def unseen_text(script: TextArguments, test_files: list[str] | None) -> Dataset | IterableDataset | None:
    """What to report on, which training did not see: files of its own, made to text as the script's are, else the test part, else what was held out."""
    if test_files:
        own = load_text(replace(script, dataset_name=None, data_files=test_files, dataset_test_split=None))
        if not (script.data_files or script.dataset_name):
            return own
        trained = load_parts(script).train
        return own if isinstance(own, IterableDataset) or isinstance(trained, IterableDataset) else without(own, trained, "those to train on")
    parts = load_parts(replace(script, held_out_documents=0) if script.test_documents else script)
    return parts.test or parts.held_out
