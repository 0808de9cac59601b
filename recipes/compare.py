"""Is it the thoughts, or the compute, the text, or the length alone? A thinking run beside its controls, on the same places of text that none of them saw.

    python recipes/compare.py --config recipes/smollm2-135m/compare_quick.yaml
    python recipes/compare.py --config recipes/smollm2-135m/compare_gsm8k.yaml --seeds 0 1 2 --use_cpu false \\
        --accelerate_config accelerate_configs/multi_gpu.yaml

The config is one of recipes/pretrain_think.py, with `test_documents`, and what is listed below. Five arms, each trained by that recipe under
`accelerate launch`, with the same data order, seed and optimizer:

    base       not trained
    cpt        the same rows and steps, no thoughts
    cpt_flops  no thoughts, as many steps as the FLOPs of `think` allow; further rows are the next ones, the text again where it ends
    filler     thoughts of the same length whose tokens are all the same
    think      the recipe

`arms` in the config adds further ones, each with the options that it changes. What is finished is not run again: the command goes on where it stopped.
Writes results.json and report.html into output_dir.
"""

import argparse
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from rich.console import Console
from rich.progress import Progress, track
from transformers import AutoConfig, AutoTokenizer
from trl import ModelConfig, get_peft_config, pack_dataset

from hf_thinktok import ThinkTokConfig, add_thinking_tokens
from hf_thinktok.checkpoints import check_not_pushed, newest_checkpoint
from hf_thinktok.config_checks import default_of
from hf_thinktok.controls import control
from hf_thinktok.data import text_of
from hf_thinktok.errors import one_sentence
from hf_thinktok.evaluation import Evaluation, evaluate_thinking
from hf_thinktok.evaluation.comparison import ARMS, AT_RANDOM, SILENT, Comparison
from hf_thinktok.evaluation.tables import print_comparison
from hf_thinktok.forks import ends_of, marker_ids, room_for
from hf_thinktok.loading import fit_to_cpu, init_kwargs, read_mappings
from hf_thinktok.peft import load_whole
from hf_thinktok.plan import step_flops
from hf_thinktok.recipe_options import ITS_OWN_SEED, command_line, read_config, read_options, recipe_parser
from hf_thinktok.report import Run, write_report
from hf_thinktok.results import digest_of, digest_of_files, environment, read_json, weights_in, write_json
from hf_thinktok.sources import resolve_model
from hf_thinktok.text import ReportArguments, TextArguments, check_column, files_of, load_parts, unseen_text

COUNTED_DOCUMENTS = 1000
PRETRAIN = Path(__file__).parent / "pretrain_think.py"
KINDS = (TextArguments, ThinkTokConfig, ModelConfig)
console = Console(highlight=False)


@dataclass
class CompareArguments(ReportArguments):
    """Options of the comparison itself."""

    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of training; each arm is trained with each."})
    arms: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arms: for each name, the options of `think` that it changes (JSON on the command line)."}
    )
    rows_per_document: int | None = field(default=1, metadata={"help": "Rows of a document that are measured, from its beginning; null for all."})
    num_samples: int = field(default=4, metadata={"help": "Thoughts at each place that is measured."})
    report_documents: int = field(default=2, metadata={"help": "Documents of the test part that the report shows token by token."})
    accelerate_config: str | None = field(default=None, metadata={"help": "Config of `accelerate launch`; your own default where not given."})

    def __post_init__(self):
        for name, given, least in (
            ("seeds", min(self.seeds, default=0), 0),
            ("num_samples", self.num_samples, 1),
            ("report_documents", self.report_documents, 0),
        ):
            if given < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.accelerate_config and not Path(self.accelerate_config).is_file():
            raise ValueError(f"accelerate_config={self.accelerate_config} is no file: give its path from here, {Path.cwd()}, or a whole one.")


class Grid:
    """The arms of a comparison as configs of recipes/pretrain_think.py, and what each of them costs."""

    def __init__(self, recipe: dict[str, Any], arms: dict[str, dict[str, Any]]):
        for name, changes in arms.items():
            if name in ARMS:
                raise ValueError(f"arms changes {name}, which is to differ from the others in one thing alone: give the further arm another name.")
            if " over " in name or name.endswith((SILENT, AT_RANDOM)):
                raise ValueError(f"arms has {name!r}, and names like that are of gains and controls: give the further arm another name.")
            if not isinstance(changes, dict):
                raise ValueError(f"arms has {changes!r} for {name}: give the options that it changes, as a mapping.")
        stop = recipe.get("stop", default_of(ThinkTokConfig, "stop"))
        cannot = {}
        for kind in ("no_think", "filler"):
            left_out, changes = control(kind, stop)
            cannot[kind] = {name: value for name, value in recipe.items() if name not in left_out} | changes
        self.configs = {"cpt": cannot["no_think"], "cpt_flops": cannot["no_think"], "filler": cannot["filler"], "think": recipe}
        self.configs |= {name: recipe | changes for name, changes in arms.items()}
        self.options = {arm: read_config(KINDS, config, f"The arm {arm}") for arm, config in self.configs.items()}
        if not self.options["think"][1].thinks:
            raise ValueError("There is nothing to compare, as num_think_tokens=0 or num_forks=0 switches thinking off: leave it out.")
        if self.options["think"][1].max_steps <= 0:
            raise ValueError("Arms are compared step by step: set max_steps.")
        if self.options["think"][1].resume_from_checkpoint:
            raise ValueError("A comparison goes on by itself where it stopped: leave resume_from_checkpoint out, and name the same output_dir.")
        check_not_pushed(self.options["think"][1])
        if not self.options["think"][1].packing:
            raise ValueError("A step's FLOPs are those of full rows, and cpt_flops has to have as many as think: set packing=True.")
        if any(args.num_iterations > 1 for _, args, *_ in self.options.values()):
            raise ValueError("num_iterations above 1 shows a row several times, and the arms without thoughts see each once: set num_iterations=1.")
        self.flops = {arm: self._flops(*self.options[arm]) for arm in self.configs if arm != "cpt_flops"}
        if (known := self.flops["think"]) is None:
            raise ValueError("What these thoughts cost is not counted (`thinktok plan --config` says why), so cpt_flops would have no length.")
        a_step = self.flops["cpt"] // self.options["cpt"][1].max_steps
        steps = round(known / a_step)
        self.configs["cpt_flops"] = cannot["no_think"] | {"max_steps": steps}
        self.options["cpt_flops"] = read_config(KINDS, self.configs["cpt_flops"], "The arm cpt_flops")
        self.flops["cpt_flops"] = a_step * steps

    def costs(self, logs: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Steps, FLOPs of one process and the end of the logs, by arm."""
        steps = {arm: options[1].max_steps for arm, options in self.options.items()}
        return {arm: {"steps": steps[arm], "flops": self.flops[arm], "seeds": logs[arm]} for arm in self.configs}

    @staticmethod
    def _flops(script: TextArguments, args: ThinkTokConfig, model: ModelConfig) -> int | None:
        """Those of a run: before `think_start` its steps are without thoughts. `None` where they are not known."""
        shape = AutoConfig.from_pretrained(resolve_model(model.model_name_or_path), revision=model.model_revision, trust_remote_code=args.trust_remote_code)
        attention, adapter = init_kwargs(model, args.model_init_kwargs).get("attn_implementation"), get_peft_config(model)
        before = min(args.think_start, args.max_steps) if args.thinks else 0
        shares = forks_of_steps(script, args, model) if args.thinks and args.fork_positions == "markers" else {args.num_forks: 1.0}
        try:
            each = sum(share * step_flops(shape, replace(args, num_forks=forks), attention, adapter) for forks, share in shares.items())
            thinking = round(each * (args.max_steps - before))
            return thinking + (step_flops(shape, replace(args, num_forks=0), attention, adapter) * before if before else 0)
        except ValueError:
            return None


def tokenizer_of(args: ThinkTokConfig, model: ModelConfig) -> Any:
    """That of the model that all arms start from."""
    where = {"revision": model.model_revision, "trust_remote_code": args.trust_remote_code}
    return AutoTokenizer.from_pretrained(resolve_model(model.model_name_or_path), **where)


def forks_of_steps(script: TextArguments, args: ThinkTokConfig, model: ModelConfig) -> dict[int, float]:
    """For how many places in a row a step behind markers has room, as the trainer cuts it, each with its share of the steps: by the first documents, packed."""
    tokenizer = tokenizer_of(args, model)
    texts = [text_of(row, tokenizer) for row in itertools.islice(load_parts(script).train, COUNTED_DOCUMENTS)]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    markers, batch = marker_ids(args.fork_markers, tokenizer), args.per_device_train_batch_size
    marked = [ends_of(markers, torch.tensor([row]))[0] & (torch.arange(len(row)) < len(row) - 1) for row in ids]
    rows = pack_dataset(Dataset.from_dict({"input_ids": [row.long().tolist() for row in marked]}), args.max_length, args.packing_strategy).shuffle(seed=0)
    most = [min(max(map(sum, rows[start : start + batch]["input_ids"])), args.num_forks) for start in range(0, len(rows), batch)]
    found = Counter(min(room_for(count), args.num_forks) for count in most)
    return {forks: times / len(most) for forks, times in found.items()}


def origin(script: TextArguments, model: ModelConfig) -> dict[str, str]:
    """What is in the files that arms are made of, which may change under their names."""
    files = [file for name in script.data_files or () for file in files_of(name)]
    return {"model": digest_of_files(weights_in(Path(resolve_model(model.model_name_or_path)))), "text": digest_of_files(files)}


def train(arm: str, seed: int, config: dict[str, Any], folder: Path, launcher: str | None, made_of: dict[str, str]) -> dict[str, Any]:
    """Trains one arm unless it is trained, and gives the end of its log, with the code and machine that it was begun with."""
    config = config | {"seed": seed, "output_dir": str(folder)}
    told, state, begun = folder / "config.yaml", folder / "trainer_state.json", folder / "origin.json"
    if told.exists() and yaml.safe_load(told.read_text()) != config:
        raise ValueError(f"{folder} holds a run with other settings: name another output_dir, or remove that folder.")
    if begun.exists() and read_json(begun)["made_of"] != made_of:
        raise ValueError(f"{folder} holds a run of another model or text, as files have changed since: name another output_dir, or remove that folder.")
    if not state.exists():
        folder.mkdir(parents=True, exist_ok=True)
        told.write_text(yaml.safe_dump(config))
        if not begun.exists():
            write_json(begun, {"made_of": made_of, **environment()})
        command = [sys.executable, "-m", "accelerate.commands.launch", *(["--config_file", launcher] if launcher else []), str(PRETRAIN), "--config", str(told)]
        if checkpoint := newest_checkpoint(str(folder)):
            command += ["--resume_from_checkpoint", checkpoint]
        if run(command, folder / "log.txt", f"{arm}, seed {seed}"):
            raise ValueError(f"The arm {arm} of seed {seed} failed: {folder / 'log.txt'} says why.")
    where = {name: value for name, value in read_json(begun).items() if name != "made_of"} if begun.exists() else {}  # an older run has none
    return json.loads(state.read_text())["log_history"][-1] | where


def run(command: list[str], log: Path, label: str) -> int:
    """Runs a command with its output in a file, and shows how far its steps are. It ends when this process does."""
    with open(log, "a") as file, Progress(console=console, transient=True) as bar:
        shown = bar.add_task(label, total=None)
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None:
                time.sleep(1)
                if steps := re.findall(r"(\d+)/(\d+) \[", log.read_text(errors="replace")[-4000:]):
                    bar.update(shown, completed=int(steps[-1][0]), total=int(steps[-1][1]))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # a launcher does not pass it on
        return process.returncode


def load(name: str, revision: str | None, args: ThinkTokConfig) -> tuple[Any, Any]:
    """A trained arm, an adapter merged into its base; or the model that all arms start from, with thinking tokens, which it never uses."""
    model, tokenizer = load_whole(resolve_model(name), "float32", revision=revision, trust_remote_code=args.trust_remote_code)
    if not hasattr(model.config, "thinktok"):
        add_thinking_tokens(model, tokenizer, args.num_think_tokens)
    return model, tokenizer


def measure(arm: str, source: str, path: Path, grid: Grid, chosen: CompareArguments, test: list[str], base: str, revision: str | None = None) -> Evaluation:
    """What an arm does on the test part: measured, or from its file where that has the same settings.

    Args:
        base: the digest of the weights that all arms start from.
    """
    args, own = grid.options["think"][1], grid.options[arm][1] if arm in grid.options else None
    thinks = own is not None and own.thinks
    asked = {
        "max_length": args.max_length, "rows_per_document": chosen.rows_per_document, "num_forks": args.num_forks,
        "num_samples": chosen.num_samples if thinks else 0, "max_think_length": own.max_think_length if thinks else args.max_think_length,
        "lookahead": args.lookahead or args.max_length, "batch_size": args.per_device_eval_batch_size, "fork_markers": args.fork_markers or [],
    }  # fmt: skip
    # A model's name may be a path of this machine's, and settings are published.
    model_digest = digest_of([source, str(revision), base, digest_of_files(weights_in(Path(resolve_model(source))))])
    measured = {"model": model_digest, "text": digest_of(test)}
    if path.exists():
        found = Evaluation.load(path)
        if (asked | measured).items() <= found.settings.items():
            return found
    model, tokenizer = load(source, revision, args)
    if not args.use_cpu and (device := torch.accelerator.current_accelerator(check_available=True)):
        model.to(device)
    show = functools.partial(track, description=f"evaluating {arm}", console=console, transient=True)
    found = evaluate_thinking(model, tokenizer, test, **asked, progress=show)
    del model  # the next arm may be trained by other processes on the same device
    clear_device_cache(garbage_collection=True)
    found.settings |= measured
    found.save(path)
    return found


def compare(recipe: dict[str, Any], chosen: CompareArguments) -> None:
    output = Path(recipe.setdefault("output_dir", "outputs/compare"))
    script, args, model = read_config(KINDS, recipe, "The config")
    check_column(args.dataset_text_field)
    if not (chosen.test_files or script.test_documents):
        raise ValueError("There is no text to report on: set test_documents, or test_files.")
    tokenizer = tokenizer_of(args, model)  # one for all arms, which are compared on the same text
    test = [text_of(row, tokenizer) for row in unseen_text(script, chosen.test_files)]
    grid = Grid(recipe, chosen.arms or {})
    made_of = origin(script, model)
    base = measure("base", model.model_name_or_path, output / "base" / "evaluation.npz", grid, chosen, test, made_of["model"], model.model_revision)
    evaluations: dict[str, dict[int, Evaluation]] = {"base": dict.fromkeys(chosen.seeds, base)} | {arm: {} for arm in grid.configs}
    logs: dict[str, dict[str, Any]] = {arm: {} for arm in grid.configs}
    bf16, where = fit_to_cpu(args).bf16, environment()
    for done, seed in enumerate(chosen.seeds, 1):
        for arm, config in grid.configs.items():
            folder = output / f"{arm}-seed{seed}"
            logs[arm][str(seed)] = train(arm, seed, config, folder, chosen.accelerate_config, made_of)
            evaluations[arm][seed] = measure(arm, str(folder), folder / "evaluation.npz", grid, chosen, test, made_of["model"])
        evaluations["base"] = dict.fromkeys(chosen.seeds[:done], base)
        results = {
            "comparison": Comparison(evaluations).summary(), "training": grid.costs(logs), "arms": grid.configs, "settings": base.settings | asdict(chosen),
            "bf16": bf16, "config": recipe, "seeds": chosen.seeds[:done], **where,
        }  # fmt: skip
        write_json(output / "results.json", results)
    print_comparison(results, console)
    write_report([Run.read(output, chosen.report_documents, args.max_length, args.trust_remote_code)], output / "report.html")
    console.print(output / "report.html")


def read() -> tuple[dict[str, Any], CompareArguments]:
    """What the config and the command line say: the recipe's options, and the comparison's own."""
    parser, words = recipe_parser(__doc__, CompareArguments, *KINDS), command_line()
    chosen, *_ = read_options(parser, words)
    read_mappings(chosen, "arms")
    recipe = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text()) if "--config" in words else {}
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # leaves what was told
    told = vars(parser.parse_known_args(words)[0])
    if "seed" in told:
        raise ValueError(ITS_OWN_SEED)
    recipe |= told
    # Variables are set by now, and these may be secrets, which results and the arms' configs do not keep; a recipe's seed is that of a run of its own.
    left_out = {*vars(chosen), "env", "hub_token", "seed"}
    return {name: value for name, value in recipe.items() if name not in left_out}, chosen


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    warnings.filterwarnings("ignore", category=FutureWarning)
    with one_sentence():
        compare(*read())
