"""Results of tasks and benchmarks as pictures."""

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from .results import THOUGHTS, hows_of, levels_of_runs, trained_levels


def _save(figure: Figure, path: Path) -> None:
    """The same file from the same results: matplotlib's ids are random otherwise, and it writes down when."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})


LABELS = THOUGHTS | {"none": "left out"}


def draw_task(results: dict[str, Any], path: Path) -> None:
    """Accuracy against level as a picture: one line for each seed, and what can be had without serial steps. Nothing where there is one level."""
    if len(levels := levels_of_runs(results["runs"])) == 1:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    places = [int(level) for level in levels]
    for how, colour in zip(hows_of(results["runs"]), ("tab:blue", "tab:orange", "tab:gray", "tab:red"), strict=False):
        for i, run in enumerate(results["runs"]):
            axes.plot(places, [run["accuracy"][how][level] for level in levels], color=colour, marker="o", label=None if i else f"thoughts: {LABELS[how]}")
    axes.plot(places, [results["shortcut"][level] for level in levels], color="black", linestyle=":", label="best guess from one step")
    if max(places) > (longest := max(max(trained_levels(run, results["levels"])) for run in results["runs"])):
        axes.axvspan(longest + 0.5, max(places) + 0.5, color="tab:green", alpha=0.12, label="harder than any trained")
    axes.set(
        xlabel="level",
        ylabel="accuracy on test rows",
        ylim=(0, 1.03),
        title=f"{results['task']}, seeds {', '.join(str(run['seed']) for run in results['runs'])}",
    )
    axes.legend(loc="center", bbox_to_anchor=(0.6, 0.72), fontsize="small")
    _save(figure, path)


def draw_ablation(results: dict[str, Any], path: Path) -> None:
    """Accuracy of variants against level, a mean over seeds with each of them thin beside it; where models end their thoughts themselves, how long they are."""
    variants = results["ablation"]
    levels = levels_of_runs(next(iter(variants.values())))
    ends_itself = any(run.get("think_length") for runs in variants.values() for run in runs)
    figure = Figure(figsize=(10 if ends_itself else 6, 4), layout="constrained")
    panels = figure.subplots(1, 1 + ends_itself, squeeze=False)[0]

    def draw(axes, name: str, tables: list[dict[str, float]]) -> None:
        lines = [[table[level] for level in levels] for table in tables]
        (mean,) = axes.plot(places, [sum(values) / len(lines) for values in zip(*lines, strict=True)], marker="o", label=name)
        for line in lines if len(lines) > 1 else []:
            axes.plot(places, line, color=mean.get_color(), linewidth=0.7, alpha=0.5)

    places = [int(level) for level in levels]
    for name, runs in variants.items():
        how = hows_of(runs)[0]
        draw(panels[0], name, [run["accuracy"][how] for run in runs])
        if ends_itself and all(run.get("think_length") for run in runs):
            draw(panels[1], name, [run["think_length"] for run in runs])
    several = max(map(len, variants.values()))
    seeds = f", means of {several} seeds (thin: each)" if several > 1 else ""
    panels[0].set(xlabel="level", ylabel="accuracy on test rows", ylim=(0, 1.03), title=f"{results['task']}{seeds}")
    if ends_itself:
        panels[1].set(xlabel="level", ylabel="mean length of thoughts", title="thinking tokens")
    panels[0].legend(fontsize="small")
    _save(figure, path)


def draw_bench(results: dict[str, Any], path: Path) -> None:
    """Seconds of a step against each number of a cell, the others as in the first cell."""
    first, names = results["cells"][0], "TKGLH"
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), sharey=True), names, strict=True):
        line = sorted((cell for cell in results["cells"] if all(cell[other] == first[other] for other in names if other != name)), key=lambda cell: cell[name])
        for arm, colour in {"ours": "tab:blue", "sft": "tab:gray", "plain": "tab:orange", "trunk": "tab:green"}.items():
            if known := [cell for cell in line if arm in cell["seconds"]]:
                axes.plot([cell[name] for cell in known], [median(cell["seconds"][arm]) for cell in known], marker="o", color=colour, label=arm)
        others = ", ".join(f"{other}={first[other]}" for other in names if other != name)
        axes.set(xscale="log", yscale="log", xlabel=name, title=others)
    figure.axes[0].set_ylabel("seconds of a step")
    figure.axes[0].legend(fontsize="small")
    _save(figure, path)
