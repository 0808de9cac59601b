"""Text to train and to evaluate on, from files or the Hub, and its held-out part."""

from dataclasses import dataclass, field, replace
from glob import has_magic
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from trl import ScriptArguments

from .sources import STANDARD_LIBRARY, standard_library

# Builders of `datasets` by the ends of files' names.
KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}


@dataclass
class TextArguments(ScriptArguments):
    """Where the text comes from, and which part of it is held out."""

    data_files: list[str] | None = field(default=None, metadata={"help": f"Local files ({', '.join(KINDS)}; all of one kind), in place of dataset_name."})
    text_template: str | None = field(default=None, metadata={"help": "Makes a row's text from its columns, for example '{question}\\n{answer}'."})
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
        for name in self.data_files or []:
            if not (Path(name).exists() or has_magic(name) or "://" in name):
                raise ValueError(f"data_files names {name}, and there is no such file: give its path from here, {Path.cwd()}, or a whole one.")
        if len(kinds := {kind_of(name) for name in self.data_files or []}) > 1:
            raise ValueError(f"data_files has files of several kinds ({', '.join(sorted(kinds))}): give files of one.")


def kind_of(file: str) -> str:
    """The builder of `datasets` that reads a file, by the end of its name, compressed or not."""
    suffixes = [suffix for suffix in Path(file.split("?")[0]).suffixes if suffix not in COMPRESSED]
    if not suffixes or suffixes[-1] not in KINDS:
        raise ValueError(f"data_files names {file}, which is no kind of text that is known: give files that end in {', '.join(KINDS)}.")
    return KINDS[suffixes[-1]]


def load_text(script: TextArguments) -> Dataset | IterableDataset:
    """Rows with a `text` column; rows without text are dropped."""
    if script.data_files:
        kind = kind_of(script.data_files[0])
        options = {"sample_by": script.sample_by} if kind == "text" else {}
        try:
            text = load_dataset(kind, data_files=script.data_files, split="train", streaming=script.dataset_streaming, **options)
        except DatasetGenerationError as error:
            raise ValueError(f"{', '.join(script.data_files)} cannot be read as {kind}: {error.__cause__}") from error
    elif script.dataset_name == STANDARD_LIBRARY:
        return standard_library()
    elif script.dataset_name:
        text = load_dataset(script.dataset_name, script.dataset_config, split=script.dataset_train_split, streaming=script.dataset_streaming)
    else:
        raise ValueError("There is no text: give dataset_name (on the Hub) or data_files (local).")
    if script.text_template:
        columns = text.column_names
        try:
            text = text.map(lambda row: {"text": script.text_template.format(**row)}, remove_columns=[name for name in columns or [] if name != "text"])
        except KeyError as missing:
            raise ValueError(f"text_template={script.text_template!r} names the column {missing}, and the data has {columns}.") from None
    if text.column_names is not None and "text" not in text.column_names:
        raise ValueError(
            f"The data has the columns {text.column_names} and no 'text': make it with text_template, for example --text_template '{{{text.column_names[0]}}}'."
        )
    return text.filter(lambda row: bool(row["text"].strip()))


def load_files(script: TextArguments, files: list[str]) -> Dataset | IterableDataset:
    """All text of other files, made as a script's own is."""
    return load_text(replace(script, dataset_name=None, data_files=files))  # type: ignore[call-arg]


class TextParts(NamedTuple):
    """Documents to train on, to evaluate on while settings are chosen, and to report on; `None` where there are none."""

    train: Dataset | IterableDataset
    held_out: Dataset | None
    test: Dataset | None

    @property
    def unseen(self) -> Dataset | None:
        """What training did not see: the test part, or where there is none what was held out."""
        return self.test or self.held_out


def split(text: Dataset | IterableDataset, script: TextArguments) -> TextParts:
    """The parts of a text. The test part is the same whatever is held out besides, and both for all runs with the same seed."""
    seed = script.data_split_seed
    if script.max_documents is not None:
        limit = script.max_documents
        text = text.take(limit) if isinstance(text, IterableDataset) else text.shuffle(seed=seed).select(range(min(limit, len(text))))
    parts: list[Dataset | None] = []
    for name in ("test_documents", "held_out_documents"):
        count = getattr(script, name)
        if count == 0:
            parts.append(None)
        elif isinstance(text, IterableDataset):
            parts.append(Dataset.from_list(list(text.take(count))))
            text = text.skip(count)
        elif count >= len(text):
            raise ValueError(f"{name}={count} leaves nothing to train on: the data has {len(text)} documents.")
        else:
            divided = text.train_test_split(test_size=count, seed=seed)
            text = divided["train"]
            parts.append(divided["test"])
    return TextParts(text, held_out=parts[1], test=parts[0])
