"""Text to train and to evaluate on, from files or the Hub, and its held-out part."""

from dataclasses import dataclass, field

from datasets import Dataset, IterableDataset, load_dataset
from trl import ScriptArguments

from .sources import STANDARD_LIBRARY, standard_library


@dataclass
class TextArguments(ScriptArguments):
    """Where the text comes from, and which part of it is held out."""

    data_files: list[str] | None = field(default=None, metadata={"help": "Local .jsonl, .json or .txt files, in place of dataset_name."})
    text_template: str | None = field(default=None, metadata={"help": "Makes a row's text from its columns, for example '{question}\\n{answer}'."})
    sample_by: str = field(default="line", metadata={"help": "What one document of a .txt file is.", "choices": ["line", "paragraph", "document"]})
    max_documents: int | None = field(default=None, metadata={"help": "Use only so many documents, drawn with seed data_split_seed (a stream: the first)."})
    held_out_documents: int = field(
        default=64, metadata={"help": "Documents kept from training to evaluate on, drawn with seed data_split_seed. 0: no evaluation."}
    )
    data_split_seed: int = field(default=0, metadata={"help": "Seed of the held-out part; the same for all runs that are compared."})


def load_text(script: TextArguments) -> Dataset | IterableDataset:
    """Rows with a `text` column; rows without text are dropped."""
    if script.dataset_name == STANDARD_LIBRARY:
        return standard_library()
    if script.data_files:
        kind = "text" if script.data_files[0].endswith(".txt") else "json"
        options = {"sample_by": script.sample_by} if kind == "text" else {}
        text = load_dataset(kind, data_files=script.data_files, split="train", streaming=script.dataset_streaming, **options)
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


def split(text: Dataset | IterableDataset, limit: int | None, held_out: int, seed: int) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Training documents, and held-out ones, `limit` in all."""
    if limit is not None:
        text = text.take(limit) if isinstance(text, IterableDataset) else text.shuffle(seed=seed).select(range(min(limit, len(text))))
    if held_out == 0:
        return text, None
    if isinstance(text, IterableDataset):
        return text.skip(held_out), Dataset.from_list(list(text.take(held_out)))
    if held_out >= len(text):
        raise ValueError(f"held_out_documents={held_out} leaves nothing to train on: the data has {len(text)} documents.")
    parts = text.train_test_split(test_size=held_out, seed=seed)
    return parts["train"], parts["test"]
