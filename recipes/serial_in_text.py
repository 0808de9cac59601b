"""A model that thinks on a task goes on with ordinary text: does it keep its text, and does it think where that pays?

    python recipes/toy.py --config recipes/toy/serial_smollm2.yaml --save_models true
    thinktok merge outputs/serial/seed-0 outputs/serial/merged
    python recipes/serial_in_text.py --config recipes/smollm2-135m/serial_in_text.yaml --text_files wikitext.txt

Task rows are a small part of the training rows, the rest is text. The model learns when to think, and pays for it. The results have its accuracy and the
length of its thoughts by level of the task, and on held-out text bits per token and the length of its thoughts. `--num_forks 0` trains the twin that
does not think.
"""

import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from toy import by_level, read_mappings, tokenized
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import ModelConfig, TrlParser, get_peft_config

from hf_thinktok import ThinkTokConfig, ThinkTokTrainer
from hf_thinktok.loading import fit_to_cpu
from hf_thinktok.results import changed_options, environment, print_mixture, write_json
from hf_thinktok.sources import resolve_model
from hf_thinktok.tasks import make_task
from hf_thinktok.text import TextArguments, load_text, split


@dataclass
class MixtureArguments:
    """The task, the text, and how much of the training rows is what."""

    task: str = field(default="pointer_chasing", metadata={"help": "A task of hf_thinktok.tasks."})
    task_options: dict[str, Any] | str | None = field(default=None, metadata={"help": "Its difficulty, a mapping (JSON on the command line)."})
    test_rows: int = field(default=200, metadata={"help": "Test rows of each level at most; 0 for all."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One run for each; the last one's checkpoint is kept."})
    text_files: list[str] = field(default_factory=list, metadata={"help": "Local .txt files with a paragraph a line."})
    text_rows: int = field(default=20_000, metadata={"help": "Training rows of text at most."})
    text_length: int = field(default=96, metadata={"help": "Tokens of a row of text."})
    held_out_documents: int = field(default=300, metadata={"help": "Documents kept from training to measure on, the same for every seed."})
    task_share: float = field(default=0.1, metadata={"help": "Part of the training rows that are the task's."})


def rows_of(text: Dataset, tokenizer, length: int) -> Dataset:
    """Documents as rows of ids, cut to a length; shorter ones stay as they are. Very short ones are headings."""
    ids = [row[:length] for row in tokenizer(list(text["text"]), add_special_tokens=False)["input_ids"]]
    return Dataset.from_dict({"input_ids": [row for row in ids if len(row) >= 16]})


def mixture(task_rows: Dataset, text_rows: Dataset, share: float, seed: int) -> Dataset:
    """Training rows in random order: every row of text once, and as many of the task's as make up their share."""
    count = round(len(text_rows) * share / (1 - share))
    chosen = task_rows.select(np.random.default_rng(seed).choice(len(task_rows), count, replace=count > len(task_rows)))
    text = Dataset.from_dict({"input_ids": list(text_rows["input_ids"]), "labels": list(text_rows["input_ids"])})
    return concatenate_datasets([chosen.select_columns(["input_ids", "labels"]), text]).shuffle(seed=seed)


def on_text(trainer: ThinkTokTrainer, held_out: Dataset) -> dict[str, float]:
    """Bits per token of held-out text, and how long its thoughts are where it may think."""
    metrics = trainer.evaluate(held_out)
    names = ["bits_no_think", "bits_think", "bits_random_thought", "gain", "gain_stderr", "mean_think_length"] if trainer.args.thinks else []
    return {"loss": metrics["eval_loss"]} | {name: metrics[f"eval_{name}"] for name in names}


def main(mixed: MixtureArguments, args: ThinkTokConfig, model: ModelConfig) -> None:
    task = make_task(mixed.task, **mixed.task_options or {})
    text = TextArguments(data_files=mixed.text_files, held_out_documents=mixed.held_out_documents)
    train_text, test_text, _ = split(load_text(text), text)
    folder = resolve_model(model.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task_train, task_test = tokenized(task.train, tokenizer), tokenized(task.test, tokenizer)
    train_rows = rows_of(train_text, tokenizer, mixed.text_length)
    train_rows = train_rows.select(range(min(mixed.text_rows, len(train_rows))))
    held_out = rows_of(test_text, tokenizer, mixed.text_length)
    results: dict[str, Any] = {
        "task": task.name, "mixture": [], "levels": sorted(task.shortcut), "shortcut": {str(level): best for level, best in task.shortcut.items()},
        "config": changed_options(mixed, args, model), "held_out_rows": len(held_out),
    }  # fmt: skip
    for seed in mixed.seeds:
        set_seed(seed)
        args.seed = seed
        trainer = ThinkTokTrainer(
            AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype),
            args,
            train_dataset=mixture(task_train, train_rows, mixed.task_share, seed),
            eval_dataset=held_out,
            processing_class=copy.deepcopy(tokenizer),  # it learns the thinking tokens
            peft_config=get_peft_config(model),
        )
        before = on_text(trainer, held_out)
        trainer.train()
        accuracy, lengths = by_level(trainer, task_test, mixed.test_rows)
        results["mixture"].append({"seed": seed, "before": before, "text": on_text(trainer, held_out), "accuracy": accuracy, "think_length": lengths})
        write_json(Path(args.output_dir) / "results.json", results | environment())
    trainer.save_model(args.output_dir)
    print_mixture(results)


if __name__ == "__main__":
    parser = TrlParser((MixtureArguments, ThinkTokConfig, ModelConfig), description=__doc__.split("\n")[0])
    try:
        mixture_args, think_args, model_args = parser.parse_args_and_config(fail_with_unknown_args=True)
        read_mappings(mixture_args, "task_options")
        if not mixture_args.text_files:
            raise ValueError("There is no text: name local files with --text_files.")
        if not model_args.model_name_or_path:
            raise ValueError("There is no model: give model_name_or_path.")
        if not 0 < mixture_args.task_share < 1:
            raise ValueError(f"task_share={mixture_args.task_share} must be between 0 and 1.")
    except ValueError as error:
        sys.exit(f"error: {error}")
    main(mixture_args, fit_to_cpu(think_args), model_args)
