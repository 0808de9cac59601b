"""What a run writes down: its figures, and everything that it takes to get them again."""

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.table import Table

from .bench_tables import print_bench

THOUGHTS = {"think": "its own", "random": "random", "none": "none", "generate": "its own, in plain generate"}
# What pushes leave here: checkpoints; the reports, which hold whole held-out documents word for word; all options, with the token for the Hub; and what
# recipes/compare.py writes beside each arm, with paths of this machine.
_LEFT = ("checkpoint-*", "inspection.json", "report.html", "*training_args.bin", "config.yaml", "log.txt", "origin.json")
NOT_PUSHED = (*_LEFT, *(f"*/{name}" for name in _LEFT))
STATE_FILE = "thinktok_state.pt"
# Written when all ranks have written everything else. A rename would say the same, but pushes to the Hub read from the folder meanwhile.
COMPLETE_FILE = "complete"
# What of a checkpoint is there to go on with it, and is larger than its model.
TRAINING_STATE = (
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "trainer_state.json",
    STATE_FILE,
    COMPLETE_FILE,
    "global_step*",
    "latest",
    "pytorch_model_fsdp*",
    "zero_to_fp32.py",
)
LIBRARIES = ("hf-thinktok", "torch", "transformers", "trl", "accelerate", "peft", "datasets", "deepspeed")


def digest_of(texts: Iterable[str]) -> str:
    """Tells texts apart in settings, which are published and do not hold them."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def digest_of_files(files: Iterable[Path]) -> str:
    """Of what some files hold, whatever their names."""
    found = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:12]


def weights_in(folder: Path) -> list[Path]:
    """The files of a model or an adapter that have its weights."""
    return sorted(path for kind in ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin") for path in folder.glob(kind))


@functools.cache
def _versions() -> dict[str, str]:
    """Of what is loaded, whatever is installed meanwhile."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def environment() -> dict[str, Any]:
    """Library versions, hardware and the commit of the code."""
    hardware = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    return {"versions": dict(_versions()), "hardware": hardware, "commit": _commit()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this source tree, marked where files differ from it; `None` outside a checkout."""
    folder = Path(__file__).parent
    try:
        # An installed package may lie within somebody else's repository.
        subprocess.run(["git", "ls-files", "--error-unmatch", Path(__file__).name], cwd=folder, capture_output=True, check=True)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("-changed" if changed else "")


def without_tokens(options: dict[Any, Any]) -> dict[Any, Any]:
    """Options without the tokens for the Hub, as results go there: neither `hub_token` nor what loads a model or data with one (`model_init_kwargs`)."""
    kept = {name: value for name, value in options.items() if not str(name).endswith("hub_token")}
    loads = {name: value for name, value in kept.items() if str(name).endswith("kwargs") and isinstance(value, dict)}
    return kept | {name: {key: one for key, one in value.items() if key not in ("token", "use_auth_token")} for name, value in loads.items()}


def changed_options(*groups: Any) -> dict[str, Any]:
    """The options that differ from their defaults: what makes this run, in one session or several, without tokens for the Hub."""
    from ._compat import same_processes

    changed: dict[str, Any] = {}
    for group in groups:
        with same_processes():
            plain = type(group)(output_dir=group.output_dir) if hasattr(group, "output_dir") else type(group)()
        told = {name: value for name, value in without_tokens(vars(group)).items() if not name.startswith("_") and not name.endswith("_state")}
        changed |= {name: value for name, value in told.items() if value != getattr(plain, name, None) and name != "resume_from_checkpoint"}
    return changed


def training_results(
    before: dict[str, float], after: dict[str, float], training: dict[str, float], config: dict[str, Any], steps: int, best_of: int = 1
) -> dict[str, Any]:
    """The results of one run.

    Args:
        before, after: what `ThinkTokTrainer.evaluate()` gave before and after training.
        training: the metrics of `trainer.train()`.
        config: the options that differ from their defaults.
        steps: of the optimizer, when the model was as it is.
        best_of: evaluations on the same documents, by which it was chosen.
    """
    return {
        "steps": steps,
        "best_of": best_of,
        "bits_per_token": {
            "base": before["eval_bits_no_think"],
            "no_think": after["eval_bits_no_think"],
            "think": after["eval_bits_think"],
            "random_thought": after["eval_bits_random_thought"],
        },
        "gain": after["eval_gain"],
        "gain_stderr": after["eval_gain_stderr"],
        "gain_over_random": after["eval_gain_over_random"],
        "gain_over_random_stderr": after["eval_gain_over_random_stderr"],
        "mean_think_length": after["eval_mean_think_length"],
        "steps_per_second": training["train_steps_per_second"],
        "train_seconds": training["train_step_seconds"],
        "documents": after["eval_documents"],
        "judged_tokens": after["eval_judged_tokens"],
        "config": config,
    }


# Figures of a few documents may be no numbers.
FIGURES = ("bits_per_token", "bits_per_byte", "low", "high", "gain_stderr", "gain_over_random_stderr")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes its name, and another's place, when it is complete. A link stays one, and a device is written to as it is."""
    if is_device(path):
        with open(path, "wb") as file:
            yield file
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            yield file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """A folder to write to that takes its name when it is complete, and an empty one's place.

    Raises:
        OSError: there is one by then that is not empty.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def is_device(path: Path) -> bool:
    """Whether there is what nothing can take the place of, such as /dev/stdout or a pipe."""
    return path.exists() and not path.is_file() and not path.is_dir()


def unwritable(folder: Path) -> Path | None:
    """What keeps a folder from being made or written to: the nearest place to it that is there, if that is no folder or closed; else `None`."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return None if there.is_dir() and os.access(there, os.W_OK) else there


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Writes the file whole or not at all, without tokens for the Hub. A figure that is not a number, as an interval over one document, is null."""
    with written_whole(path) as file:
        file.write(f"{json.dumps(_plain(results), indent=2, sort_keys=True, default=str, allow_nan=False)}\n".encode())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in without_tokens(value).items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """What `write_json` wrote, with the figures of gains and intervals that are no numbers as such again."""

    def figures(found: dict[str, Any]) -> dict[str, Any]:
        return found | {name: math.nan for name in FIGURES if name in found and found[name] is None}

    return json.loads(path.read_text(), object_hook=figures)


def minutes_of(logs: Iterable[dict[str, Any]]) -> float:
    """Of the steps of some runs, from the ends of their logs; older ones have the evaluations between them as well."""
    return sum(log.get("train_step_seconds", log["train_runtime"]) for log in logs) / 60


@contextlib.contextmanager
def whole_results(what: str) -> Iterator[None]:
    """Makes one sentence of results that lack what is looked for in them."""
    try:
        yield
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{what} lacks what a run writes ({type(error).__name__}: {error}): name a results file as its recipe or command left it.") from error


def machine(results: dict[str, Any]) -> str:
    """What a run was made on."""
    hardware = results["hardware"]
    return f"{hardware['cores']} cores, {', '.join(hardware['gpus']) or hardware['cpu']}"


def environments(results: Any) -> list[dict[str, Any]]:
    """The parts of a results file that say what they were run in."""
    parts = results.values() if isinstance(results, dict) else results if isinstance(results, list) else ()
    told = [part for part in parts if isinstance(part, dict) and {"hardware", "versions", "commit"} <= part.keys()]
    return told + [one for part in parts for one in environments(part)]


def where(results: dict[str, Any]) -> str:
    """The machines, the libraries and the code of a run, or of its parts."""
    every = [*environments(results), results]
    parts = [part for one in every for part in one.get("commits", {}).values()]  # of runs, or of runs by seed
    commits = [one["commit"] for one in every] + [commit for part in parts for commit in (part.values() if isinstance(part, dict) else [part])]
    libraries = (f"torch {one['versions']['torch']}, transformers {one['versions']['transformers']}" for one in every)
    told = [dict.fromkeys(map(machine, every)), dict.fromkeys(libraries), dict.fromkeys((commit or "unknown")[:12] for commit in commits)]
    machines, versions, codes = (" and ".join(one) for one in told)
    return f"{machines}; {versions}; commit{'s' * (len(told[2]) > 1)} {codes}"


def as_text(results: dict[str, Any]) -> str:
    """The table of a results file as its run printed it, and where it ran."""
    file = StringIO()
    console = Console(file=file, width=100)
    from .evaluation.tables import print_comparison, print_evaluation, print_mixture

    kinds = {
        "ablation": print_ablation,
        "cells": print_bench,
        "comparison": print_comparison,
        "evaluation": print_evaluation,
        "launchers": print_launchers,
        "measured": print_measured,
        "mixture": print_mixture,
        "plans": print_plans,
        "task": print_task,
    }
    next((printer for name, printer in kinds.items() if name in results), print_results)(results, console)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    return "\n".join([*lines, f"{where(results)}\n"])


def print_task(results: dict[str, Any], console: Console | None = None) -> None:
    """Accuracy of runs on a task in per cent: levels across; for each seed a row with its own thoughts, one with random thoughts and one without any. A star
    says what nothing was trained on: at a level no run, at a figure that run."""
    levels = levels_of_runs(results["runs"])
    control = "" if results["control"] == "none" else f", {results['control']} control"
    trained = [trained_levels(run, results["levels"]) for run in results["runs"]]
    by_any = sorted(set().union(*trained))
    table = level_table(f"{results['task']}: accuracy on test rows, %{control}", "thoughts", levels, by_any, any(one != by_any for one in trained))
    for how in hows_of(results["runs"]):
        for run, by_this in zip(results["runs"], trained, strict=True):
            beyond = {str(level) for level in by_any if level not in by_this}
            table.add_row(THOUGHTS[how], str(run["seed"]), *(per_cent(run["accuracy"][how][level]) + "*" * (level in beyond) for level in levels))
        table.add_section()
    for run in results["runs"]:
        if lengths := run.get("think_length"):
            table.add_row("mean length", str(run["seed"]), *mean_lengths(lengths, levels))
    table.add_section()
    # Under `blind` whoever answers sees no question: no shortcut is open to it.
    best = dict.fromkeys(levels, results["chance"]) if results["config"].get("blind") else results["shortcut"]
    table.add_row("chance" if results["config"].get("blind") else "shortcut", "", *(per_cent(best[level]) for level in levels))
    console = console or Console()
    console.print(table)
    took = ", ".join(f"{run['seconds']:.0f} s for {run['steps']} steps" for run in results["runs"])
    console.print(f"Training took {took}.")


def print_ablation(results: dict[str, Any], console: Console | None = None) -> None:
    """Accuracy of variants of a recipe in per cent, as each thinks or does not: levels across, one row for each variant and seed."""
    levels = levels_of_runs(next(iter(results["ablation"].values())))
    table = Table(padding=0, title=f"{results['task']}: accuracy on test rows, %")
    table.add_column("variant")
    for column in ("seed", *levels, "steps"):
        table.add_column(column, justify="right")
    for name, runs in results["ablation"].items():
        how = hows_of(runs)[0]
        for run in runs:
            table.add_row(name, str(run["seed"]), *(per_cent(run["accuracy"][how][level]) for level in levels), str(run["steps"]))
            if lengths := run.get("think_length"):
                table.add_row("  mean length", "", *mean_lengths(lengths, levels), "")
    (console or Console()).print(table, markup=False)  # variants are named by users


def print_launchers(results: dict[str, Any], console: Console | None = None) -> None:
    """How far each launcher's run is from that of one process which accumulates as many batches."""
    runs = results["launchers"]
    table = Table(padding=0, title=f"{len(runs['one process']['losses'])} steps of a tiny model")
    for column in ("launcher", "processes", "last loss", "largest difference of a weight"):
        table.add_column(column, justify="left" if column == "launcher" else "right")
    for name in sorted(runs, key=lambda name: (runs[name]["processes"], name)):
        table.add_row(name, str(runs[name]["processes"]), f"{runs[name]['losses'][-1]:.6f}", f"{runs[name]['weight_gap']:.1e}")
    (console or Console()).print(table)


# Why a gain of fillers says nothing about thoughts, though unfamiliar tokens do worse in their place.
ALL_ALIKE = "Its thoughts are all alike, so it is not what is thought: it may be the time, or any change of its input."


def conclusion(helps: bool, hurts: bool, then: str) -> str:
    """What is said of one model, measured with its thoughts and without; `then` is of its thoughts beside others, where it gains by them.

    That is never that thinking is worth it, nor that what is thought matters: training with thoughts may cost what they give back, and a token that says
    nothing does better than random ones as well, which a model does not expect.
    """
    if helps:
        return (
            f"This model predicts better with its thoughts than without them. {then} Whether thinking is worth it is seen beside models that were trained "
            "without thoughts and with fillers: recipes/compare.py."
        )
    return "Thinking hurts." if hurts else "No gain from thinking that can be told from zero."


def per_cent(part: float) -> str:
    """With two places close to 100, which means every one."""
    return "100" if part == 1 else f"{100 * part:.2f}" if part > 0.99 else f"{100 * part:.1f}"


def levels_of_runs(runs: list[dict[str, Any]]) -> list[str]:
    return sorted(next(iter(runs[0]["accuracy"].values())), key=int)


def trained_levels(run: dict[str, Any], levels: list[int]) -> list[int]:
    """Those of a task's levels that a run was trained on: with a curriculum no further than it came."""
    checked = run["curve"][-1] if run.get("curve") else {}  # all that older files know
    reached = run.get("level", checked.get("level"))
    return [level for level in levels if reached is None or level <= reached]


def level_table(title: str, what: str, levels: list[str], trained: list[int], other_stars: bool = False) -> Table:
    """A table with a column for each level, of which those that nothing was trained on have a star; there may be `other_stars`."""
    starred = [level + ("" if int(level) in trained else "*") for level in levels]
    caption = "* never trained on" if other_stars or starred != levels else None
    table = Table(padding=0, title=title, caption=caption, caption_justify="left")
    table.add_column(what)
    for column in ("seed", *starred):
        table.add_column(column, justify="right")
    return table


def mean_lengths(lengths: dict[str, float], levels: list[str]) -> list[str]:
    return [f"{lengths[level]:.2f}" for level in levels]


def hows_of(runs: list[dict[str, Any]]) -> list[str]:
    """How the questions were answered, the model's own thoughts first where it has any."""
    return [how for how in THOUGHTS if how in runs[0]["accuracy"]]


def verdict(results: dict[str, Any]) -> str:
    """What the figures of a run carry: a t test at 5 %, over documents. Fewer than five of them carry nothing, as in intervals; nor do those of documents
    that chose the model."""
    from .evaluation.intervals import FEWEST, t_quantile

    if chosen := of_chosen(results):
        return f"{chosen} Whether thinking helps is seen on others: `thinktok eval`, on a file of its own or a run's test_documents."
    documents = int(results["documents"])
    margin = t_quantile(0.975, documents - 1) if documents >= FEWEST else math.nan
    gain, over_random = (results[name] for name in ("gain", "gain_over_random"))
    sure, sure_over_random = (margin * results[f"{name}_stderr"] for name in ("gain", "gain_over_random"))
    better = (
        "They do better than random ones, which it does not expect." if over_random > sure_over_random else "They are not shown to do better than random ones."
    )
    then = ALL_ALIKE if results["config"].get("thoughts") == "filler" else better
    return conclusion(gain > sure, gain < -sure, then)


def of_chosen(results: dict[str, Any]) -> str:
    """What is to be said of figures on the documents that chose the model, if they did."""
    count = results.get("best_of", 1)
    return f"The same documents chose this checkpoint, the best of {count} evaluations, so that these figures flatter it." if count > 1 else ""


def print_results(results: dict[str, Any], console: Console | None = None) -> None:
    """The table that ends a run, and its verdict."""
    console = console or Console()
    console.print(run_table(results))
    console.print(verdict(results))


def run_table(results: dict[str, Any]) -> Table:
    """Held-out text before and after a run."""
    table = Table(title=f"Held-out text, {results['judged_tokens']:.0f} tokens of {results['documents']:.0f} documents: bits per token", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    labels = {"base": "before training", "no_think": "trained, without thinking", "think": "trained, thinking", "random_thought": "trained, a random thought"}
    for arm, label in labels.items():
        table.add_row(label, f"{results['bits_per_token'][arm]:.4f}")
    table.add_section()
    table.add_row("gain from thinking, ± standard error", f"{results['gain']:+.4f} ± {results['gain_stderr']:.4f}")
    table.add_row("gain over a random thought, ± standard error", f"{results['gain_over_random']:+.4f} ± {results['gain_over_random_stderr']:.4f}")
    table.add_row("mean thought length, tokens", f"{results['mean_think_length']:.3f}")
    table.add_row("steps per second", f"{results['steps_per_second']:.3f}")
    return table


def print_plans(results: dict[str, Any], console: Console | None = None) -> None:
    """Planned peaks of models, GiB: what weights, gradients, the optimizer and the passes take of each."""
    from .memory import Part

    columns = {
        "weights": (Part.PARAMETERS, Part.GATHERED, Part.CAST),
        "gradients": (Part.GRADIENTS, Part.BUFFERS),
        "optimizer": (Part.OPTIMIZER,),
        "passes": (Part.ATTENTION, Part.CACHE, Part.ACTIVATIONS, Part.WORKING),
    }
    table = Table(padding=0, title="Planned peak memory of one process, GiB")
    for name in ("model", "how"):
        table.add_column(name)
    for name in (*columns, "peak"):
        table.add_column(name, justify="right")
    for i, made in enumerate(results["plans"]):
        if i and made["model"] != results["plans"][i - 1]["model"]:
            table.add_section()
        parts = made["phases"][made["peak_phase"]]
        sums = [sum(parts.get(part, 0) for part in members) for members in columns.values()]
        table.add_row(made["model"], made["how"], *(f"{size / 2**30:.1f}" for size in (*sums, made["peak"])))
    (console or Console()).print(table)


def print_measured(results: dict[str, Any], console: Console | None = None) -> None:
    """Planned against measured peaks, MiB."""
    table = Table(padding=0, title="Peak memory, MiB")
    table.add_column("")
    for name in ("planned", "measured", "ratio"):
        table.add_column(name, justify="right")
    for row in results["measured"]:
        table.add_row(row["case"], f"{row['planned'] / 2**20:.1f}", f"{row['measured'] / 2**20:.1f}", f"{row['ratio']:.3f}")
    (console or Console()).print(table)
