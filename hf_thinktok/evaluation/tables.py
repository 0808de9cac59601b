"""Tables of what was measured on held-out text, and the sentence that their intervals carry."""

import math
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from ..results import ALL_ALIKE, THOUGHTS, conclusion, level_table, levels_of_runs, mean_lengths, minutes_of, of_chosen, per_cent
from .comparison import ARMS, AT_RANDOM, SILENT
from .intervals import t_quantile
from .thinking import CONTROLS, PLACED, own_arm, own_length

# Controls in a sentence.
CALLED = PLACED | {
    "think_random": "random tokens",
    "shuffled": "their own tokens shuffled",
    "earlier": "thoughts from an earlier place",
    "other_document": "thoughts of another document",
}


def print_evaluation(results: dict[str, Any], console: Console | None = None) -> None:
    """Held-out text in every arm, what thoughts are worth against each control, and where they are worth it."""
    _print(evaluation_tables(results["evaluation"]), evaluation_says(results["evaluation"]), console)


def _print(tables: list[Table], says: str, console: Console | None) -> None:
    console = console or Console()
    for table in tables:
        console.print(table, markup=False)  # arms are named by users
    console.print(says)


def evaluation_says(found: dict[str, Any]) -> str:
    """How much is thought, and the verdict, unless the text chose the model."""
    if not found["gains"]:
        return "Nothing was thought, so there is nothing to compare."
    if own_arm(found["settings"]) == "always":
        how = f"It was trained to think {found['settings']['max_think_length']} tokens everywhere, and does so in what is judged here."
    else:
        how = f"Where it decides, it thinks {found['mean_think_length']:.3f} tokens at a place."
    if markers := found["settings"].get("fork_markers"):
        how += f" The places are those behind {', '.join(map(repr, markers))}."
    elif found["settings"].get("fork_positions") == "markers":
        how += " It was trained to think behind markers, and these places are others, evenly spaced: fork_markers measures it at its own."
    return f"{how} {of_chosen(found) or evaluation_verdict(found)}"


def evaluation_tables(found: dict[str, Any]) -> list[Table]:
    """Every arm of an evaluation, and its gains."""
    table = Table(padding=0, title=f"{found['forks']:,} places in {found['documents']:,} documents, {found['judged_tokens']:,} judged tokens")
    for name in ("thoughts", "bits/token", "bits/byte", "accuracy, %"):
        table.add_column(name, justify="left" if name == "thoughts" else "right")
    for arm, label in PLACED.items():
        if (one := found["arms"].get(arm)) is not None:
            fewer = one.get("forks", found["forks"]) < found["forks"]  # not to be compared with the rows beside it, but by the gains below
            table.add_row(
                f"{label}, {one['forks']:,} places" if fewer else label,
                f"{one['bits_per_token']:.4f}",
                "" if math.isnan(one["bits_per_byte"]) else f"{one['bits_per_byte']:.4f}",  # tokens without text have none
                f"{100 * one['accuracy']:.2f}",
            )
            if "bits_per_token_marginal" in one and found["settings"]["num_samples"] > 1:
                table.add_row(f"  mean probability of {found['settings']['num_samples']}", f"{one['bits_per_token_marginal']:.4f}", "", "")
    tables = [table]
    if not found["gains"]:
        return tables
    table = Table(padding=0, title="Bits gained per token, with 95 % intervals over documents")
    table.add_column("")
    table.add_column("", justify="right")
    for name, gain in found["gains"].items():
        table.add_row(placed(name), _interval(gain))
    table.add_section()
    how = own_arm(found["settings"])
    for bucket in found["by_entropy"]:
        label = f"{PLACED[how]}; entropy about {bucket['mean_entropy_bits']:.1f} bits, {own_length(bucket, found['settings']):.2f} tokens"
        table.add_row(label, _interval(bucket[f"{how} over no_think"]))
    table.add_section()
    for kind, one in found["by_kind"].items():
        table.add_row(f"{PLACED[how]}; {kind}, {own_length(one, found['settings']):.2f} tokens", _interval(one[f"{how} over no_think"]))
    return [*tables, table]


def _interval(gain: dict[str, float]) -> str:
    ends = "" if math.isnan(gain["low"]) else f" ({gain['low']:+.4f} to {gain['high']:+.4f})"  # one document has none
    return f"{gain['bits_per_token']:+.4f}{ends}"


def evaluation_verdict(found: dict[str, Any]) -> str:
    """What the intervals carry. Thoughts where the model wants them and thoughts that it is made to think are told of apart: each has its own controls."""
    gains, own = found["gains"], own_arm(found["settings"])
    gain = gains[f"{own} over no_think"]
    if found["settings"].get("thoughts") == "filler":
        then = ALL_ALIKE
    else:
        arms = {own: "They"} if own == "always" else {own: "They", "always": "Those that it is made to think everywhere"}
        then = " ".join(filter(None, (_beside_controls(gains, arm, which) for arm, which in arms.items())))
    return conclusion(gain["low"] > 0, gain["high"] < 0, then)


def _beside_controls(gains: dict[str, Any], arm: str, which: str) -> str:
    """What thoughts are shown to do more than, and what not."""
    measured = [control for control in CONTROLS[arm] if f"{arm} over {control}" in gains]
    beaten = [control for control in measured if gains[f"{arm} over {control}"]["low"] > 0]
    groups = {"are": beaten, "are not": [control for control in measured if control not in beaten]}
    told = [f"{how} shown to do more than {'; '.join(CALLED[control] for control in controls)}" for how, controls in groups.items() if controls]
    return f"{which} {', and '.join(told)}." if told else ""


def print_comparison(results: dict[str, Any], console: Console | None = None) -> None:
    """Arms side by side: bits per token and what they cost, then what thinking gains over each, and the verdict."""
    _print(comparison_tables(results["comparison"], results["seeds"], results["training"]), comparison_says(results["comparison"]), console)


def print_mixture(results: dict[str, Any], console: Console | None = None) -> None:
    """Models of a task and of text: by level how often each is right and how long it thinks, then both on held-out text."""
    runs = results["mixture"]
    levels = levels_of_runs(runs)
    table = level_table(f"{results['task']} in text: accuracy on test rows, %", "", levels, results["levels"])
    for run in runs:
        name = "twin without thinking" if run["arm"] == "cpt" else "thinks"
        for how, by_level in run["accuracy"].items():
            label = name if len(run["accuracy"]) == 1 else f"{name}: {THOUGHTS[how]}"
            table.add_row(label, str(run["seed"]), *(per_cent(by_level[level]) for level in levels))
        if run["think_length"]:
            table.add_row("  mean length", "", *mean_lengths(run["think_length"], levels))
        table.add_section()
    table.add_row("shortcut", "", *(per_cent(results["shortcut"][level]) for level in levels))
    found = results["text"]
    _print([table, *comparison_tables(found, results["seeds"])], comparison_says(found), console)


def comparison_says(found: dict[str, Any]) -> str:
    """How much is thought, and the verdict."""
    lengths = [own_length(run, run["settings"]) for run in found["runs"]["think"].values()]
    return f"It thinks {sum(lengths) / len(lengths):.3f} tokens at a place. {comparison_verdict(found)}"


def comparison_tables(found: dict[str, Any], seeds: list[int], training: dict[str, Any] | None = None) -> list[Table]:
    """Every arm of a comparison, with its cost where `training` has it, and what thinking gains over it."""
    training = training or {}
    table = Table(padding=0, title=f"{found['judged_tokens']:,} judged tokens in {found['documents']:,} documents, {_seeds(seeds)}")
    for name in ("arm", "bits/token", "95 % interval", *(("steps", "TFLOP", "minutes") if training else ())):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for arm in sorted(found["arms"], key=_place):
        one, cost = found["arms"][arm], training.get(arm)
        minutes = "" if cost is None else f"{minutes_of(cost['seeds'].values()) / len(cost['seeds']):.1f}"
        flops = "" if cost is None or cost["flops"] is None else f"{cost['flops'] / 1e12:.1f}"
        interval = "" if math.isnan(one["low"]) else f"{one['low']:.3f} to {one['high']:.3f}"
        costs = ("" if cost is None else str(cost["steps"]), flops, minutes) if training else ()
        table.add_row(named(arm), f"{one['bits_per_token']:.4f}", interval, *costs)
    tables = [table]
    table = Table(padding=0, title="Bits gained per token, with 95 % intervals over documents")
    for name in ("", "gain", *(f"seed {seed}" for seed in seeds if len(seeds) > 1)):
        table.add_column(name, justify="right" if name else "left")
    for name, gain in in_order(found["gains"]).items():
        one, other = name.split(" over ")
        each = [f"{gain['seeds'][str(seed)]['bits_per_token']:+.4f}" for seed in seeds] if len(seeds) > 1 else []
        table.add_row(f"{one}, over {other}", _interval(gain), *each)
    return [*tables, table]


def named(arm: str) -> str:
    """An arm and what it stands for."""
    meaning = ARMS.get(arm)
    return arm if meaning is None else f"{arm}: {meaning}"


def placed(gain: str) -> str:
    """What a gain of an evaluation compares."""
    one, other = (PLACED.get(arm, arm) for arm in gain.split(" over "))  # a file of an earlier version may know others
    return f"{one}, over: {other}"


def in_order(gains: dict[str, Any]) -> dict[str, Any]:
    """The gains of a comparison as they are to be read: those of `think` over each arm first. A file has them by the alphabet."""

    def key(name: str) -> tuple[bool, list[tuple[int, str]]]:
        return (not name.startswith("think over "), [_place(arm) for arm in name.split(" over ")])

    return {name: gains[name] for name in sorted(gains, key=key)}


def _place(arm: str) -> tuple[int, str]:
    """Where an arm stands among others: the known ones in their order, each before itself without thoughts or with random ones."""
    known = [*ARMS]
    name = arm.removesuffix(SILENT).removesuffix(AT_RANDOM)
    return (known.index(name) if name in known else len(known), arm)


def _seeds(seeds: list[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"mean of seeds {', '.join(map(str, seeds))}"


def seeds_agree(gains: list[float]) -> bool:
    """Whether the gains of several seeds are on one side of 0, and further than their spread says: a t test at 5 %. One seed agrees with itself."""
    if len(gains) < 2:
        return True
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    return abs(statistics.fmean(gains)) > t_quantile(0.975, len(gains) - 1) * error and len({gain > 0 for gain in gains}) == 1


def comparison_verdict(found: dict[str, Any]) -> str:
    """Whether thinking beats every control, and if not, which ones it does not beat."""
    against = {name.removeprefix("think over "): gain for name, gain in found["gains"].items() if name.startswith("think over ")}
    needed = ("cpt", "cpt_flops", "filler", f"think{SILENT}", f"think{AT_RANDOM}")
    controls = {arm: gain for arm, gain in against.items() if arm in needed}
    told: dict[str, list[str]] = {
        "it loses to": [],
        "it cannot be told apart from": [],
        "its seeds leave open how it stands against": [],
        "it beats": [],
        "it was not compared with": [],
    }
    for arm, gain in controls.items():
        if gain["low"] <= 0 <= gain["high"] or math.isnan(gain["low"]):
            told["it cannot be told apart from"].append(arm)
        elif not seeds_agree([one["bits_per_token"] for one in gain["seeds"].values()]):  # an interval over documents says nothing of seeds
            told["its seeds leave open how it stands against"].append(arm)
        else:
            told["it beats" if gain["low"] > 0 else "it loses to"].append(arm)
    told["it was not compared with"] = [arm for arm in needed if arm not in controls]
    if len(told["it beats"]) == len(needed):
        seeds = min(len(gain["seeds"]) for gain in controls.values())
        return f"Thinking helps: it beats every control{', in the one seed that was run' if seeds == 1 else ''}."
    parts = [f"{what} {', '.join(arms)}" for what, arms in told.items() if arms]
    return f"No gain from thinking is shown: {'; '.join(parts)}."
