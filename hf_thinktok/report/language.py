"""The report on a language of thoughts (`hf_thinktok.language`) as a picture and as tables.

Arrays carry their shape as a suffix: R and C rows and columns of a table.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..language import ABSENT, single_figures


def draw_language(report: dict[str, Any], path: Path) -> None:
    """Draws a report, as the kind of file that the path's suffix says.

    Left: which thought goes with which answer or, where the states are known, which thinking token with which state. Right: what each position says, beside
    what it could; and whether like meanings have like thoughts, beside what chance gives.
    """
    # Imported here: whoever only measures need not wait for it. Without pyplot there is no global state, and Agg draws.
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(15, 8.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.05, 1))
    accuracy = "" if report["accuracy"] is None else f", accuracy {report['accuracy']:.1%}"
    figure.suptitle(
        f"{report['questions']:,} questions, {report['distinct_thoughts']:,} thoughts, {report['distinct_answers']:,} answers{accuracy}\n"
        f"I(thought; answer) {report['information']:.2f} bits (by chance {report['information_shuffled']:.2f}) of {report['answer_entropy']:.2f} bits "
        f"in the answers and {report['capacity']:.2f} bits of capacity"
    )
    if report["states"] is None:
        joint, total = report["joint"], report["distinct_thoughts"]
        shown = "all thoughts" if len(joint["rows"]) == total else f"the {len(joint['rows'])} most frequent of {total:,} thoughts"
        axes = left.subplots()
        left.colorbar(_draw_joint(axes, joint, joint, f"Share of each answer, by thought ({shown})"), ax=axes, fraction=0.04, pad=0.02)
        axes.set(xlabel="answer", ylabel="thought")
    else:
        dictionaries = [report["states"]["pooled"], *report["states"]["by_position"][:5]]
        columns = math.ceil(len(dictionaries) / 2) if len(dictionaries) > 1 else 1
        panels = left.subplots(math.ceil(len(dictionaries) / columns), columns, squeeze=False).flat
        for place, (dictionary, axes) in enumerate(zip(dictionaries, panels)):
            said, by_chance = dictionary["purity"], dictionary["purity_shuffled"]  # too few are as long to be shuffled
            purity = "no tokens" if said is None else f"purity {said:.2f}" + ("" if by_chance is None else f" (by chance {by_chance:.2f})")
            # The order of the first panel, so that positions with a dictionary of their own can be told.
            _draw_joint(axes, dictionary["joint"], dictionaries[0]["joint"], f"{f'Position {place}' if place else 'All positions'}\n{purity}", 12)
            axes.set(xlabel="state", ylabel="thinking token")
        for axes in panels:
            axes.set_axis_off()
        left.supxlabel("Colour: the share of each state, by thinking token, white 0 to dark 1", fontsize=9)
    upper, lower = right.subplots(2, 1, height_ratios=(1.2, 1))
    _draw_positions(upper, report)
    _draw_similarity(lower, report)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_joint(axes, joint: dict[str, Any], like: dict[str, Any], title: str, max_labels: int = 24):
    """A heat map of the share of each column in a row, rows and columns in the order of another."""
    counts_RC = np.zeros((len(like["rows"]) or 1, len(like["columns"]) or 1))
    rows, columns = ({label: place for place, label in enumerate(like[side])} for side in ("rows", "columns"))
    for row, column, count in joint["entries"]:
        if joint["rows"][row] in rows and joint["columns"][column] in columns:
            counts_RC[rows[joint["rows"][row]], columns[joint["columns"][column]]] += count
    shares_RC = counts_RC / counts_RC.sum(1, keepdims=True).clip(1)
    for axis, side in ((axes.yaxis, "rows"), (axes.xaxis, "columns")):
        ticks = range(0, len(like[side]), math.ceil(len(like[side]) / max_labels) or 1)
        axis.set_ticks(ticks, [str(like[side][tick])[:18] for tick in ticks])
    axes.tick_params(labelsize=8)
    axes.tick_params(axis="x", rotation=90 if any(len(str(label)) > 2 for label in like["columns"]) else 0)
    axes.set_title(title, fontsize=10)
    return axes.imshow(shares_RC, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")


def _draw_positions(axes, report: dict[str, Any]) -> None:
    positions = report["positions"]
    bars = [("entropy", "#bbbbbb", positions, "entropy"), ("about the answer", "#0072b2", positions, "information")]
    bars.append(("about the answer, given the tokens before", "#56b4e9", positions, "information_given_before"))
    if report["states"] is not None:
        bars.append(("about its step's state", "#d55e00", report["states"]["by_position"], "information"))
    width, middles = 0.8 / len(bars), np.arange(1, len(positions) + 1)
    for place, (name, colour, measured, key) in enumerate(bars):
        at = middles + (place - (len(bars) - 1) / 2) * width
        axes.bar(at, [m[key] or 0 for m in measured], width * 0.92, color=colour, label=name)
        if place:
            by_chance = [m[f"{key}_shuffled"] or 0 for m in measured]
            axes.hlines(by_chance, at - width * 0.46, at + width * 0.46, color="black", linewidth=1.2, label="by chance" if place == 1 else None)
    limit = math.log2(report["num_tokens"])
    axes.axhline(limit, color="black", linestyle="--", linewidth=1, label=f"log2 {report['num_tokens']} = {limit:.2f}")
    axes.set_ylim(0, max([limit, 0.1, *(p["max_entropy"] for p in positions)]) * 1.05)
    axes.set_xticks(middles[:: max(1, -(-len(positions) // 16))])
    axes.set(title="What each position says", xlabel="position", ylabel="bits")
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)


def _draw_similarity(axes, report: dict[str, Any]) -> None:
    rows = report["topographic_similarity"]
    for place, row in enumerate(rows):
        if row["value"] is None:
            axes.text(0, place, "not defined: nothing varies", va="center", fontsize=8)
            continue
        axes.barh(place, row["null_high"] - row["null_low"], 0.5, row["null_low"], color="#cccccc", label="95 % by chance")
        axes.plot(row["null_mean"], place, "|", color="black", markersize=14, label="mean by chance")
        axes.plot(row["value"], place, "o", color="#d55e00", label="this language")
        axes.text(1.01, place, f"{row['value']:+.2f}", va="center", fontsize=8, transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(rows)), [row["meaning"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(min([-0.3, *(row["value"] - 0.1 for row in rows if row["value"] is not None)]), 1.05)
    axes.axvline(0, color="black", linewidth=0.6, zorder=0)
    handle_of = dict(zip(*axes.get_legend_handles_labels()[::-1]))
    axes.legend(handle_of.values(), handle_of, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False)
    axes.set(title="Topographic similarity: do like meanings have like thoughts?", xlabel="Spearman correlation of distances")


def print_language(report: dict[str, Any], console: Console | None = None, max_rows: int = 15) -> None:
    """Tables of a report: its figures (in bits, where they are of information), the positions, the dictionary, and the most frequent thoughts."""
    rows = [(name.replace("_", " "), _shown(value)) for name, value in single_figures(report).items()]
    if report["positional_disentanglement"] is not None:
        rows.append(("positional disentanglement", _with_chance(report["positional_disentanglement"], "value")))
    for row in report["topographic_similarity"]:
        rows.append((f"topographic similarity, {row['meaning']}", f"{_shown(row['value'])} ({_shown(row['null_low'])} to {_shown(row['null_high'])})"))
    _print_table(console, "The language (by chance)", ("", "value"), rows)

    columns = ["position", "entropy", "at most", "about the answer", "given those before"]
    positions = [[_shown(p[key]) for key in ("position", "entropy", "max_entropy")] for p in report["positions"]]
    for row, position in zip(positions, report["positions"]):
        row += [_with_chance(position, key) for key in ("information", "information_given_before")]
    if (states := report["states"]) is not None:
        columns += ["about the state", "purity"]
        for row, dictionary in zip(positions, states["by_position"]):
            row += [_with_chance(dictionary, key) for key in ("information", "purity")]
    _print_table(console, "Bits at each position (by chance)", columns, positions)
    if states is not None:
        entries = [[str(value) for value in entry.values()] for entry in states["pooled"]["entries"][:max_rows]]
        _print_table(console, f"The dictionary, purity {_with_chance(states['pooled'], 'purity')}", ("token", "state", "times", "of"), entries)
    thoughts = []
    for row in report["thoughts"][:max_rows]:
        answers = ", ".join(f"{a['answer']} ({a['count']})" for a in row["answers"][:4]) + (", ..." if len(row["answers"]) > 4 else "")
        thoughts.append((" ".join(map(str, row["thought"])) or ABSENT, str(row["count"]), answers, " ".join(map(str, row["example_input"]))))
    _print_table(console, "The most frequent thoughts", ("thought", "times", "stands for", "an input"), thoughts)


def _shown(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def _with_chance(figures: dict[str, Any], key: str) -> str:
    return f"{_shown(figures[key])} ({_shown(figures[f'{key}_shuffled'])})"


def _print_table(console: Console | None, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        # Names of answers may hold square brackets; `Text` does not read them as markup.
        table.add_row(*(Text(value, overflow="fold") for value in row))
    (console or Console()).print(table)
