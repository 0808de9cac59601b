"""A model that thinks on a task goes on with ordinary text: does it keep its text, and does it think where that pays?

    make demo-serial
    thinktok merge outputs/serial/seed-1 outputs/serial/merged
    python recipes/toy.py --config recipes/toy/serial_smollm2_stop.yaml
    thinktok merge outputs/serial_stop/seed-1 outputs/serial_stop/merged
    python recipes/serial_in_text.py --config recipes/smollm2-135m/serial_in_text.yaml --data_files wikitext.txt

Task rows are a small part of the training rows, the rest is text. The model decides when to think, and pays for it. A twin is trained on the same rows
without thinking. The results have accuracy and length of thoughts by level of the task, and both models side by side on the same places of held-out text,
with intervals over its documents.
"""

import copy
import functools
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from toy import by_level, tokenized, ways_to_answer
from transformers import AutoTokenizer, set_seed
from trl import ModelConfig, get_peft_config

from hf_thinktok import ThinkTokConfig, ThinkTokTrainer
from hf_thinktok.checkpoints import check_not_pushed, resume_points
from hf_thinktok.controls import at_defaults, control, control_of
from hf_thinktok.data import levels_of, text_of
from hf_thinktok.errors import RunError, one_sentence
from hf_thinktok.evaluation import Evaluation, evaluate_thinking
from hf_thinktok.evaluation.comparison import Comparison
from hf_thinktok.evaluation.tables import print_mixture
from hf_thinktok.loading import check_unquantized, fit_to_cpu, init_kwargs, read_mappings, there
from hf_thinktok.models import untie
from hf_thinktok.peft import load_whole
from hf_thinktok.recipe_options import check_seeds, read_options, recipe_parser
from hf_thinktok.results import changed_options, environment, write_json
from hf_thinktok.sources import resolve_model
from hf_thinktok.tasks import Task, make_task
from hf_thinktok.text import TextArguments, check_column, load_parts

# Tokens of a document at least; shorter ones are headings.
SHORTEST = 16
# When layers rest: one direction of the LM head has far to go, and rows are as many of the task as of text.
SETTLE_LEARNING_RATE = 4e-3
SETTLE_TASK_SHARE = 0.5


@dataclass
class MixtureArguments:
    """The task, and how much of the training rows it is."""

    task: str = field(default="pointer_chasing", metadata={"help": "A task of hf_thinktok.tasks."})
    task_options: dict[str, Any] | str | None = field(default=None, metadata={"help": "Its difficulty, a mapping (JSON on the command line)."})
    test_rows: int = field(default=200, metadata={"help": "Test rows of each level at most; 0 for all."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "A run that thinks and its twin for each."})
    text_length: int = field(default=96, metadata={"help": "Tokens of a row of text."})
    held_out_forks: int = field(default=16, metadata={"help": "Places of each held-out document where models are compared."})
    task_share: float = field(default=0.1, metadata={"help": "Part of the training rows that are the task's."})
    settle_steps: int = field(
        default=0,
        metadata={"help": "Further steps of the thinking model, on as many rows of the task as of text, in which layers rest and only the gate learns."},
    )
    on_twin: bool = field(
        default=False,
        metadata={"help": "The thinking model is its twin, which thinks as the model did that it began as, and learns in `settle_steps` when to."},
    )


def with_ids(text: Dataset, tokenizer, length: int) -> Dataset:
    """Documents and their ids, cut to a length; shorter ones stay as they are, headings are left out."""
    text = text.map(lambda row: {"text": text_of(row, tokenizer)})
    rows = text.map(lambda rows: {"input_ids": tokenizer(rows["text"], add_special_tokens=False)["input_ids"]}, batched=True)
    return rows.filter(lambda row: len(row["input_ids"]) >= SHORTEST).map(lambda row: {"input_ids": row["input_ids"][:length]})


def mixture(task_rows: Dataset, text_rows: Dataset, share: float, seed: int) -> Dataset:
    """Training rows in random order: every row of text once, and as many of the task's as make up their share."""
    count = round(len(text_rows) * share / (1 - share))
    chosen = task_rows.select(np.random.default_rng(seed).choice(len(task_rows), count, replace=count > len(task_rows)))
    text = Dataset.from_dict({"input_ids": text_rows["input_ids"][:], "labels": text_rows["input_ids"][:]})
    return concatenate_datasets([chosen.select_columns(["input_ids", "labels"]), text]).shuffle(seed=seed)


def settling(args: ThinkTokConfig, steps: int) -> ThinkTokConfig:
    """Options of the steps in which the gate settles: nothing is explored, rewarded or said, and thoughts are drawn as before."""
    left_out = {*control("no_think", args.stop)[0]} - {"temperature", "top_k", "top_p", "min_p"}
    changes = {
        "output_dir": f"{args.output_dir}/settled", "max_steps": steps, "learning_rate": SETTLE_LEARNING_RATE, "max_grad_norm": 1.0, "weight_decay": 0.0,
        "detach_gate": True, "text_ce_weight": 0.0, "think_ce_weight": 0.0, "think_loss_weight": 0.0, "think_start": 0, "save_strategy": "no",
        "model_init_kwargs": None,
    }  # fmt: skip
    return at_defaults(args, left_out, **changes)


def settled(folder: str, args: ThinkTokConfig, rows: Dataset) -> ThinkTokTrainer:
    """Lets the gate come to rest on layers that no longer change: in training they do for every text, and few rows tell it where thoughts pay.

    One direction is learned, along which the rows that thinking tokens are chosen by move alike. So the model thinks elsewhere, and what it thinks and how
    that is read stay as they are, and so does what it says without thoughts: the task may be heard louder here, and nothing needs clipping at the norm of
    the text's gradient. These rows are of an LM head of its own, and a model with tied embeddings gets one.

    Args:
        folder: the model, or its adapter, which is merged.
    """
    model, tokenizer = load_whole(folder, dtype="float32", trust_remote_code=args.trust_remote_code)
    untie(model)
    model.requires_grad_(False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.requires_grad_(True)
    shutil.rmtree(args.output_dir, ignore_errors=True)  # an adapter that an earlier call left there would be loaded in the place of what is saved
    gate = ThinkTokTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    thinking = slice(gate.vocabulary.first_id, gate.vocabulary.guard_id)

    def alike(grad_RD: torch.Tensor) -> torch.Tensor:
        shared_RD = torch.zeros_like(grad_RD)
        shared_RD[thinking] = grad_RD[thinking].sum(0)
        return shared_RD

    model.get_output_embeddings().weight.register_hook(alike)
    with one_sentence(RunError):
        gate.train()
    return gate


def on_text(model, tokenizer, held_out: Dataset, mixed: MixtureArguments, args: ThinkTokConfig, thinks: bool) -> Evaluation:
    """Held-out documents from their beginnings, at the same places whether the model thinks or not."""
    return evaluate_thinking(
        model.to(args.device), tokenizer, held_out, max_length=mixed.text_length, rows_per_document=1, num_forks=mixed.held_out_forks,
        num_samples=2 if thinks else 0, max_think_length=args.max_think_length, lookahead=1, batch_size=args.per_device_eval_batch_size,
        fork_markers=[],
    )  # fmt: skip


def main(task: Task, mixed: MixtureArguments, text: TextArguments, args: ThinkTokConfig, model: ModelConfig) -> None:
    folder = resolve_model(model.model_name_or_path)
    outputs = {(seed, arm): str(Path(args.output_dir) / f"{arm}-seed{seed}") for seed in mixed.seeds for arm in ("cpt", "think")}
    trained = {which: path for which, path in outputs.items() if which[1] == "cpt" or not mixed.on_twin}
    with one_sentence():
        args = replace(args, model_init_kwargs=init_kwargs(model, args.model_init_kwargs))
        checkpoints = dict(zip(trained, resume_points(args.resume_from_checkpoint, [*trained.values()]), strict=True))
    with one_sentence(), there("model", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=model.model_revision, trust_remote_code=args.trust_remote_code)
    with one_sentence():
        train_rows, held_out, _ = load_parts(text, prepare=lambda documents: with_ids(documents, tokenizer, mixed.text_length))
    task_train, task_test = tokenized(task.train, tokenizer), tokenized(task.test, tokenizer)
    evaluations = {arm: {} for arm in ("base", "cpt", "think")}
    load = functools.partial(load_whole, dtype="float32", trust_remote_code=args.trust_remote_code)
    before = on_text(*load(folder, revision=model.model_revision), held_out, mixed, args, thinks=False)
    where = environment()
    results: dict[str, Any] = {
        "task": task.name, "mixture": [], "levels": levels_of(task.train), "shortcut": {str(level): best for level, best in task.shortcut.items()},
        "config": changed_options(mixed, text, args, model), **where,
    }  # fmt: skip
    for done, seed in enumerate(mixed.seeds, 1):
        evaluations["base"][seed] = before
        for arm in ("cpt", "think"):
            set_seed(seed)
            output = outputs[seed, arm]
            options = replace(args if arm == "think" else control_of(args, "no_think"), seed=seed, output_dir=output)
            if (seed, arm) in trained:
                trainer = ThinkTokTrainer(
                    folder,
                    options,
                    train_dataset=mixture(task_train, train_rows, mixed.task_share, seed),
                    processing_class=copy.deepcopy(tokenizer),  # it learns the thinking tokens
                    peft_config=get_peft_config(model),
                )
                with one_sentence(RunError):
                    trainer.train(resume_from_checkpoint=checkpoints[seed, arm])
                trainer.save_model(output)
                steps, elsewhere = trainer.state.global_step, trainer.spent.elsewhere(where)
            else:  # what was trained is the twin, and so are the steps
                output = outputs[seed, "cpt"]
            if arm == "think" and mixed.settle_steps:
                options = settling(options, mixed.settle_steps)
                trainer = settled(output, options, mixture(task_train, train_rows, SETTLE_TASK_SHARE, seed))
                trainer.save_model(output := options.output_dir)
            accuracy, lengths = by_level(trainer, task_test, mixed.test_rows, ways_to_answer(trainer.args, task.asked_by_length))
            evaluations[arm][seed] = on_text(*load(output), held_out, mixed, args, thinks=arm == "think")
            results["mixture"].append({"arm": arm, "seed": seed, "accuracy": accuracy, "think_length": lengths, "steps": steps, **elsewhere})
        results |= {"text": Comparison(evaluations).summary(), "seeds": mixed.seeds[:done]}
        write_json(Path(args.output_dir) / "results.json", results)
    print_mixture(results)


if __name__ == "__main__":
    with one_sentence():
        mixture_args, text_args, think_args, model_args = read_options(recipe_parser(__doc__, MixtureArguments, TextArguments, ThinkTokConfig, ModelConfig))
        read_mappings(mixture_args, "task_options")
        check_seeds(think_args)
        if text_args.dataset_streaming:
            raise ValueError("Both models are trained on the same shuffled rows, which a stream has not: leave dataset_streaming out.")
        if text_args.held_out_documents < 2:
            raise ValueError(f"held_out_documents={text_args.held_out_documents} is too few for intervals over documents: give 2 or more.")
        if not model_args.model_name_or_path:
            raise ValueError("There is no model: give model_name_or_path.")
        if not think_args.thinks:
            raise ValueError("The twin that does not think is trained besides: leave num_forks and num_think_tokens above 0.")
        if not 0 < mixture_args.task_share < 1:
            raise ValueError(f"task_share={mixture_args.task_share} must be between 0 and 1.")
        if mixture_args.settle_steps < 0:
            raise ValueError(f"settle_steps={mixture_args.settle_steps} must be 0 or more.")
        if mixture_args.settle_steps:
            if think_args.stop != "learned":
                raise ValueError(f"settle_steps={mixture_args.settle_steps} train the gate, and stop={think_args.stop} has none that learns: leave them out.")
            if (think_args.policies, think_args.thoughts) != ("shared", "discrete"):
                raise ValueError("settle_steps are for one model with thoughts of tokens: leave them out, or take policies=shared and thoughts=discrete.")
            settling(think_args, mixture_args.settle_steps)  # what it refuses is told now, not after training
        elif mixture_args.on_twin:
            raise ValueError("on_twin leaves it to settle_steps to learn when to think, and there are none: give a number of them.")
        check_unquantized(model_args)
        check_not_pushed(think_args)
        check_column(think_args.dataset_text_field)
        the_task = make_task(mixture_args.task, **mixture_args.task_options or {})
    main(the_task, mixture_args, text_args, fit_to_cpu(think_args), model_args)
