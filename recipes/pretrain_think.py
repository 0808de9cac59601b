"""Continued pretraining of a causal LM that thinks in tokens of its own.

A first run, with a real model and real text that need no account and no network:

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/pretrain_think.py --config recipes/smollm2-135m/quickstart.yaml

Your own model and text:

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/pretrain_think.py \\
        --model_name_or_path Qwen/Qwen3-0.6B-Base --dataset_name Salesforce/wikitext --dataset_config wikitext-103-v1 \\
        --max_length 1024 --packing --num_forks 32 --output_dir outputs/mine

    ... --data_files corpus.jsonl --text_template "{question}\\n{answer}"

Writes a checkpoint that plain `AutoModelForCausalLM` loads, and `results.json`: held-out bits per token before training, and after it without
thinking, with thinking, and with a random thought.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset, load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from hf_thinktok import ThinkTokConfig, ThinkTokTrainer
from hf_thinktok.results import changed_options, print_results, training_results, write_json
from hf_thinktok.sources import STANDARD_LIBRARY, resolve_model, standard_library


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


def main(script: TextArguments, args: ThinkTokConfig, model: ModelConfig, config: dict) -> None:
    if not model.model_name_or_path:
        raise ValueError("There is no model: give model_name_or_path.")
    train, held_out = split(load_text(script), script.max_documents, script.held_out_documents, script.data_split_seed)
    loading = {"revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype}
    args.model_init_kwargs = {name: value for name, value in loading.items() if value is not None} | (args.model_init_kwargs or {})
    compares = held_out is not None and args.thinks
    args.eval_on_start = args.eval_on_start or compares  # within training, where launchers have set up what they run
    trainer = ThinkTokTrainer(
        resolve_model(model.model_name_or_path),
        args,
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    training = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    trainer.save_model(args.output_dir)
    if compares:
        before = next(entry for entry in trainer.state.log_history if "eval_gain" in entry)
        results = training_results(before, trainer.evaluate(), training, config)
        if trainer.is_world_process_zero():
            write_json(Path(args.output_dir) / "results.json", results)
            print_results(results)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    parser = TrlParser((TextArguments, ThinkTokConfig, ModelConfig), description=__doc__.split("\n")[0])
    try:
        script_args, think_args, model_args = parser.parse_args_and_config(fail_with_unknown_args=True)
    except ValueError as error:
        sys.exit(f"error: {error}")
    main(script_args, think_args, model_args, changed_options(script_args, think_args, model_args))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
