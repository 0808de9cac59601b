"""A small task whose answer takes steps: does a model invent a language of thought from reward alone?

    python recipes/toy.py --config recipes/toy/mod_add_100.yaml --seeds 0 1 2

Trains one model for each seed, from scratch or pretrained, with `ThinkTokTrainer`; prints accuracy by level with thoughts, with uniformly random
thoughts and without any, and writes `results.json`, what the thoughts mean (`language.json`, `language.png`) and, with `save_models`, the checkpoints. The
last line of the output is JSON with `seeds` and `accuracy`, a list over them.
"""

import copy
import functools
import inspect
import itertools
import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from trl import ModelConfig, get_peft_config

from hf_thinktok import ThinkTokConfig, ThinkTokTrainer
from hf_thinktok.answers import answer
from hf_thinktok.callbacks import print_thoughts
from hf_thinktok.card import why_not_generated
from hf_thinktok.checkpoints import check_not_pushed, resume_points
from hf_thinktok.controls import control_of
from hf_thinktok.data import levels_of
from hf_thinktok.errors import RunError, one_sentence
from hf_thinktok.language import describe_language, single_figures
from hf_thinktok.loading import check_unquantized, fit_to_cpu, init_kwargs, read_mappings, there
from hf_thinktok.pictures import draw_task
from hf_thinktok.recipe_options import check_seeds, read_options, recipe_parser
from hf_thinktok.report.language import draw_language, print_language
from hf_thinktok.results import THOUGHTS, changed_options, environment, per_cent, print_task, write_json
from hf_thinktok.sources import from_scratch, resolve_model
from hf_thinktok.tasks import Task, make_task, word_tokenizer
from hf_thinktok.worked_steps import worked_steps


@dataclass
class ToyArguments:
    """The task, the model and the seeds."""

    task: str = field(default="mod_add", metadata={"help": "A task of hf_thinktok.tasks, or worked_steps."})
    task_options: dict[str, Any] | str | None = field(default=None, metadata={"help": "Its difficulty, a mapping (JSON on the command line)."})
    model_shape: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Config of a model made from scratch (JSON on the command line), in place of model_name_or_path."}
    )
    word_sums: float = field(
        default=0.0,
        metadata={
            "help": "Words of several parts, as 3>7, begin in a model made from scratch as the sum of a vector for each part at its place: normal numbers of "
            "this standard deviation. 0: each as a vector of its own."
        },
    )
    control: str = field(
        default="none",
        metadata={
            "help": "Train a model that cannot think in its place, on all levels at once: without thoughts, or with fillers of the same lengths.",
            "choices": ["none", "no_think", "filler"],
        },
    )
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "One run for each: weights, order of rows, draws. The data are the same for all (task_options has a seed)."},
    )
    check_every: int = field(default=0, metadata={"help": "Steps between checks of the accuracy on training rows. 0: no checks."})
    check_rows: int = field(
        default=1000,
        metadata={"help": "How many rows a check answers: of each level, where the least counts; after a curriculum with given lengths, of the hardest."},
    )
    stop_accuracy: float = field(default=0.999, metadata={"help": "Checked accuracy at which training ends."})
    test_rows: int = field(default=1000, metadata={"help": "Test rows of each level at most; 0 for all."})
    save_models: bool = field(default=False, metadata={"help": "Keep each seed's checkpoint."})


KINDS = (ToyArguments, ThinkTokConfig, ModelConfig)
# Rows of each level that a check answers with random thoughts and without any: enough to see whether they guess.
COMPARED_ROWS = 32
SAMPLES = 6


class Progress(TrainerCallback):
    """Says now and then how far a run is, and ends one that has learned its task.

    Args:
        hows: `ways_to_answer`: its own, and what that is compared with at the levels that a curriculum has reached.
    """

    def __init__(self, trainer: ThinkTokTrainer, rows: Dataset, every: int, count: int, enough: float, hows: list[str]):
        levels = levels_of(rows)
        # With given lengths whoever is right at the hardest level is so at those before; where a stop is learned, each has its own to learn.
        self.each = trainer.curriculum is None or trainer.args.stop != "fixed"
        checked = levels if self.each else levels[-1:]
        self.trainer, self.rows, self.every, self.enough = trainer, [of_level(rows, level, count) for level in checked], every, enough
        self.own, *self.others = hows
        self.compared = {} if trainer.curriculum is None else {level: of_level(rows, level, COMPARED_ROWS) for level in levels}
        self.console = Console()

    def on_step_end(self, args, state, control, **kwargs):
        if not self.every or state.global_step % self.every or state.global_step <= self.trainer.args.think_start:  # nothing has been thought yet
            return
        accuracy = min(answer(self.trainer, rows, self.own).accuracy for rows in self.rows)
        seconds, curriculum = self.trainer.spent.seconds, self.trainer.curriculum
        reached = [] if curriculum is None else curriculum.reached(state.global_step)
        check = {"step": state.global_step, "accuracy": accuracy, "seconds": round(seconds, 1), "level": max(reached, default=None)}
        state.log_history.append({"step": state.global_step, "check": check})  # which checkpoints have as well
        self.console.print(f"step {state.global_step}, {seconds:.0f} s: accuracy at the {'least learned' if self.each else 'hardest'} level {accuracy:.4f}")
        if reached:
            table = Table(title="training rows, % right, by thoughts")
            table.add_column("level")
            for column in ("its own", *(THOUGHTS[how] for how in self.others)):
                table.add_column(column, justify="right")
            for level in reached:
                own = per_cent(curriculum.accuracy[level]) if level in curriculum.accuracy else "begins"  # sampled, of the latest steps
                table.add_row(str(level), own, *(per_cent(answer(self.trainer, self.compared[level], how).accuracy) for how in self.others))
            self.console.print(table)
        control.should_training_stop |= accuracy >= self.enough


def tokenized(rows: Dataset, tokenizer) -> Dataset:
    """Prompts and completions as ids, tokenised apart so that their borders are borders of tokens. A row may have several of each, one after the other."""
    texts = [[text if isinstance(text, list) else [text] for text in rows[name][:]] for name in ("prompt", "completion")]
    how = dict.fromkeys(("add_special_tokens", "return_attention_mask", "return_token_type_ids"), False)
    ids = [iter(tokenizer(list(itertools.chain.from_iterable(column)), **how)["input_ids"]) for column in texts]
    columns: dict[str, list] = {"input_ids": [], "labels": []}
    for turns in texts[0]:
        parts = [part for prompt, completion in zip(*(itertools.islice(one, len(turns)) for one in ids), strict=True) for part in (prompt, completion)]
        columns["input_ids"].append([token for part in parts for token in part])
        columns["labels"].append([token if place % 2 else -100 for place, part in enumerate(parts) for token in part])
    about = [name for name in ("level", "think_length", "thoughts", "answer", "inputs") if name in rows.column_names]
    return Dataset.from_dict(columns | {name: rows[name][:] for name in about})


def make_tokenizer(args: ThinkTokConfig, model: ModelConfig, task: Task) -> PreTrainedTokenizerBase:
    """A pretrained model's own, or one with a word for each word of the task."""
    if model.model_name_or_path:
        with there("model", name := resolve_model(model.model_name_or_path)):
            return AutoTokenizer.from_pretrained(name, revision=model.model_revision, trust_remote_code=args.trust_remote_code)
    return word_tokenizer(task.words)


def new_model(toy: ToyArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model from scratch."""
    model = from_scratch(toy.model_shape, tokenizer)
    if toy.word_sums != 0:
        begin_as_sums(model.get_input_embeddings().weight, tokenizer.get_vocab(), toy.word_sums)
    return model


@torch.no_grad()
def begin_as_sums(weight_VD: torch.Tensor, vocabulary: dict[str, int], std: float) -> None:
    """Embeddings of words of several parts become sums of one vector for each part at its place: those of `3>7` and `3>4` have one in common."""
    if not 0 < std < math.inf:
        raise ValueError(f"word_sums={std:g} must be a standard deviation, such as 1.0, or 0 for words that begin on their own.")
    parts = {token: tuple(enumerate(re.findall(r"\w+", word))) for word, token in vocabulary.items()}
    if not (composed := {token: found for token, found in sorted(parts.items()) if len(found) > 1}):
        raise ValueError("word_sums: no word of this task has several parts, as 3>7 has. Leave it out.")
    vectors: dict[tuple[int, str], torch.Tensor] = {}
    for token, found in composed.items():
        weight_VD[token] = sum(vectors.setdefault(part, std * torch.randn_like(weight_VD[0])) for part in found)


def of_level(rows: Dataset, level: int, limit: int) -> Dataset:
    """The rows of one level, no more than `limit`; 0 for all."""
    return rows.select(np.flatnonzero(np.asarray(rows["level"][:]) == level)[: limit or None])


def ways_to_answer(args: ThinkTokConfig, asked_by_length: bool) -> list[str]:
    """How `answer` can answer for this model, its own way first: with its thoughts, with random ones, and with none (nothing to speak from under `blind`).

    Args:
        asked_by_length: without thoughts another question is asked, that of the first level.
    """
    if not args.thinks:
        return ["none"]
    if args.thoughts == "filler":
        return ["think"]
    return ["think", "random"] if args.blind or asked_by_length else ["think", "random", "none"]


def ends_by_itself(args: ThinkTokConfig) -> bool:
    """Whether plain generation can do what the model was trained to, its gate alone ending thoughts."""
    return args.thinks and args.stop != "fixed" and not args.reads_thinking and why_not_generated(args.stored()) is None


def by_level(trainer: ThinkTokTrainer, test: Dataset, limit: int, hows: list[str]) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Accuracy by level, of each way to answer; and the mean length of its thoughts, where the model itself ends them."""
    table: dict[str, dict[str, float]] = {}
    lengths: dict[str, float] = {}
    for level in track(levels_of(test), "Tests, level by level", transient=True):
        rows = of_level(test, level, limit)
        for how in hows:
            answers = answer(trainer, rows, how)
            table.setdefault(how, {})[str(level)] = answers.accuracy
            if how == "think" and trainer.args.stop != "fixed":
                lengths[str(level)] = float(answers.lengths_D.mean())
    return table, lengths


def show_samples(trainer: ThinkTokTrainer, rows: Dataset, other: str) -> None:
    """Prints questions with their thoughts and right answers, and what these thoughts brought over the other way to answer."""
    said, first_id = answer(trainer, rows), trainer.vocabulary.first_id
    gains_D = (said.logps_D - answer(trainer, rows, other).logps_D) / math.log(2)
    samples = []
    for tokens, labels, thought_L, gain in zip(rows["input_ids"][:], rows["labels"][:], said.thoughts_DL, gains_D, strict=True):
        begins = next(place for place, label in enumerate(labels) if label >= 0)
        thought = [first_id + int(number) for number in thought_L if number >= 0]
        samples.append({"before": tokens[:begins], "thought": thought, "length": len(thought), "after": tokens[begins:], "gain": gain})
    print_thoughts(trainer.processing_class, samples, first_id, trainer.state.global_step, most=100)


def report_language(trainer: ThinkTokTrainer, rows: Dataset, task: Task) -> dict[str, Any]:
    """Which thought means what on these rows: tables, a picture and JSON."""
    said = answer(trainer, rows)
    states = np.asarray(rows["thoughts"][:]) if task.stepwise and set(map(len, rows["thoughts"])) == {said.thoughts_DL.shape[1]} else None
    answers, names = np.asarray(rows["answer"][:]), None
    if not task.name.startswith("mod_add"):  # only sums are numbers; a node or a group element is a name
        values, answers = np.unique(answers, return_inverse=True)
        names = [f"no. {value}" for value in values]
    report = describe_language(
        np.maximum(said.thoughts_DL, 0), answers, np.asarray(rows["inputs"][:]), trainer.vocabulary.num_tokens,
        lengths_Q=(said.thoughts_DL >= 0).sum(1), states_QL=states, answer_names=names,
    )  # fmt: skip
    print_language(report)
    write_json(Path(trainer.args.output_dir) / "language.json", report)
    draw_language(report, Path(trainer.args.output_dir) / "language.png")
    return report


def figures_of(report: dict[str, Any]) -> dict[str, float]:
    """The single figures of a language's report, and how pure the dictionary of its tokens is, where a task has steps for them to name."""
    figures = single_figures(report)
    return figures if report["states"] is None else figures | {"purity": report["states"]["pooled"]["purity"]}


def run(
    toy: ToyArguments,
    args: ThinkTokConfig,
    model: ModelConfig,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    test: Dataset,
    where: dict[str, Any],
) -> dict[str, Any]:
    """Trains and measures one model on tokenised rows. `where` the results say that it was."""
    set_seed(args.seed)
    args = control_of(args, toy.control)
    own = copy.deepcopy(tokenizer)  # it learns the thinking tokens
    with one_sentence():
        if model.model_name_or_path:  # whose speaker is its own, a copy, or a second adapter
            thinker, speaker = resolve_model(model.model_name_or_path), None
            args = replace(args, model_init_kwargs=init_kwargs(model, args.model_init_kwargs))
        else:
            thinker = new_model(toy, tokenizer)
            speaker = new_model(toy, tokenizer) if args.policies == "split" else None
        trainer = ThinkTokTrainer(thinker, args, train_dataset=train, processing_class=own, peft_config=get_peft_config(model), speaker=speaker)
    hows = ways_to_answer(args, task.asked_by_length)
    trainer.add_callback(Progress(trainer, train, toy.check_every, toy.check_rows, toy.stop_accuracy, hows))
    with one_sentence(RunError):
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if toy.save_models:  # first, as tests may take as long
        trainer.save_model(args.output_dir)
    accuracy, lengths = by_level(trainer, test, toy.test_rows, [*hows, *(["generate"] if ends_by_itself(args) else [])])
    curriculum = trainer.curriculum
    reached = levels_of(task.train) if curriculum is None else curriculum.reached(trainer.state.global_step - 1)  # in its last step
    language = {}
    if args.thinks and args.thoughts in ("discrete", "gumbel") and "inputs" in test.column_names:  # of text nothing says what a thought might mean
        tested = levels_of(test)
        hardest = max(set(tested) & set(reached), default=max(tested))
        if not args.reads_thinking:  # there a row has several questions and their answers
            show_samples(trainer, of_level(test, hardest, SAMPLES), hows[-1])
        language = {"level": hardest} | figures_of(report_language(trainer, of_level(test, hardest, toy.test_rows), task))
    return {
        "seed": args.seed, "level": max(reached), "accuracy": accuracy, "think_length": lengths, "language": language, "seconds": trainer.spent.seconds,
        "steps": trainer.state.global_step, "curve": [entry["check"] for entry in trainer.state.log_history if "check" in entry],
        **trainer.spent.elsewhere(where),
    }  # fmt: skip


def main(task: Task, toy: ToyArguments, args: ThinkTokConfig, model: ModelConfig) -> None:
    where = environment()  # of the start: a checkout may move on meanwhile
    results = {
        "task": task.name, "task_options": toy.task_options, "control": toy.control, "chance": task.chance, "config": changed_options(toy, args, model),
        "levels": levels_of(task.train), "shortcut": {str(level): accuracy for level, accuracy in task.shortcut.items()}, "runs": [],
        **where,
    }  # fmt: skip
    folders = [str(Path(args.output_dir) / f"seed-{seed}") for seed in toy.seeds]
    with one_sentence():
        checkpoints = resume_points(args.resume_from_checkpoint, folders)
        tokenizer = make_tokenizer(args, model, task)
    train, test = tokenized(task.train, tokenizer), tokenized(task.test, tokenizer)
    for seed, folder, checkpoint in zip(toy.seeds, folders, checkpoints, strict=True):
        own = replace(args, seed=seed, output_dir=folder, resume_from_checkpoint=checkpoint)
        results["runs"].append(run(toy, own, model, task, tokenizer, train, test, where))
        write_json(Path(args.output_dir) / "results.json", results)
    draw_task(results, Path(args.output_dir) / "accuracy.svg")
    print_task(results)
    own = (next(iter(run["accuracy"].values())) for run in results["runs"])
    print(json.dumps({"seeds": toy.seeds, "accuracy": [float(np.mean(list(levels.values()))) for levels in own]}))


if __name__ == "__main__":
    with one_sentence():
        toy_args, think_args, model_args = read_options(recipe_parser(__doc__, *KINDS))
        read_mappings(toy_args, "task_options", "model_shape")
        check_unquantized(model_args)
        check_not_pushed(think_args)
        check_seeds(think_args)
        if not model_args.model_name_or_path and "model_type" not in (toy_args.model_shape or {}):
            raise ValueError("There is no model: give model_name_or_path, or model_shape with a model_type, as the files in recipes/toy do.")
        for name in ("word_sums", "model_shape"):
            if model_args.model_name_or_path and getattr(toy_args, name):
                raise ValueError(f"{name} has no effect with model_name_or_path: leave one of the two out.")
        make = worked_steps if toy_args.task == "worked_steps" else functools.partial(make_task, toy_args.task)
        try:
            inspect.signature(make).bind(**toy_args.task_options or {})
        except TypeError as error:
            raise ValueError(f"task_options={toy_args.task_options} do not fit task={toy_args.task}: {error}.") from None
        the_task = make(**toy_args.task_options or {})
        if toy_args.control == "no_think" and the_task.asked_by_length:
            raise ValueError("control=no_think: these task_options let the number of thoughts tell what is asked, as fill does: leave that out.")
    main(the_task, toy_args, fit_to_cpu(think_args), model_args)
