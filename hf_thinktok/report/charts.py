"""Pictures of a report: SVG that is readable on light and on dark ground."""

import base64
import math
from io import BytesIO
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

INK = "#7d8590"  # of axes and words: as far from white as from black
COLOURS = ("#2f81f7", "#db6d28", "#3fb950", "#a371f7", "#d29922", "#f778ba", "#6e7781")
STROKES = ("-", "--", ":")
MARKERS = ("o", "s", "^", "D")
STYLE: Any = {  # of what is drawn and of what is written of it; names of runs are no formulas
    "svg.fonttype": "path", "text.parse_math": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip
# What is drawn of a training's log, and what it is called.
CURVES = {
    "loss": "loss, nats",
    "reward": "reward",
    "think_gain": "gain of a thought, bits",
    "accuracy": "hits after a thought",
    "think_length": "thinking tokens",
    "gate": "probability to think",
    "thought_entropy": "entropy of thoughts, nats",
    "eval_gain": "held-out gain, bits",
}


def as_image(figure: Figure) -> str:
    """A figure as a data URI."""
    file = BytesIO()
    figure.savefig(file, format="svg", transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def _in_legend(name: str) -> str:
    """A run's name: what begins with an underscore is left out of legends."""
    return f" {name}" if name.startswith("_") else name


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize="small")
        axes.grid(color=INK, alpha=0.2)
        for spine in axes.spines.values():
            spine.set_color(INK)
    return figure, panels


@rc_context(STYLE)
def draw_curves(logs: dict[str, list[dict[str, float]]]) -> str | None:
    """What was logged against the step, a panel for each quantity and a line for each run; nothing where no two steps were logged."""
    points = {
        name: {run: [(entry["step"], float(entry[name])) for entry in log if name in entry and "step" in entry] for run, log in logs.items()} for name in CURVES
    }
    shown = [name for name, lines in points.items() if any(len(line) > 1 for line in lines.values())]
    if not shown:
        return None
    figure, panels = _figure(4, 2.8, math.ceil(len(shown) / 3), min(len(shown), 3))
    for axes, name in zip(panels, shown, strict=False):
        for i, (run, line) in enumerate(points[name].items()):
            if line:
                how = {"color": COLOURS[i % len(COLOURS)], "linestyle": STROKES[i // len(COLOURS) % len(STROKES)], "linewidth": 1.4}
                axes.plot(*zip(*line, strict=True), label=_in_legend(run), **how)
        axes.set_title(CURVES[name], color=INK, fontsize="medium")
        axes.set_xlabel("step", color=INK, fontsize="small")
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    if len(logs) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), fontsize="small", labelcolor=INK, framealpha=0.0, loc="outside lower center", ncols=4)
    return as_image(figure)


@rc_context(STYLE)
def draw_intervals(gains: dict[str, dict[str, float]], label: str) -> str | None:
    """Gains with their intervals, one below the other."""
    gains = {name: gain for name, gain in gains.items() if gain["bits_per_token"] == gain["bits_per_token"]}
    if not gains:
        return None
    figure, (axes,) = _figure(9, 0.8 + 0.34 * len(gains))
    for i, gain in enumerate(gains.values()):
        colour = COLOURS[2] if gain["low"] > 0 else COLOURS[1] if gain["high"] < 0 else INK
        axes.plot([gain["low"], gain["high"]], [-i, -i], color=colour, linewidth=2)
        axes.plot([gain["bits_per_token"]], [-i], "o", color=colour)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks([-i for i in range(len(gains))], list(gains))
    axes.set_xlabel(label, color=INK)
    return as_image(figure)


@rc_context(STYLE)
def draw_costs(points: list[tuple[str, float, dict[str, float]]]) -> str | None:
    """Gain over not thinking against thinking tokens spent, a point for each run; nothing where one run alone thinks."""
    if len(points) < 2:
        return None
    figure, (axes,) = _figure(6, 3.4)
    for i, (name, length, gain) in enumerate(points):
        colour = COLOURS[i % len(COLOURS)]
        axes.plot([length, length], [gain["low"], gain["high"]], color=colour)
        axes.plot([length], [gain["bits_per_token"]], MARKERS[i // len(COLOURS) % len(MARKERS)], color=colour, label=_in_legend(name))
    axes.axhline(0, color=INK, linewidth=1)
    axes.set_xlabel("thinking tokens at a place", color=INK)
    axes.set_ylabel("bits per token saved by thinking", color=INK)
    axes.legend(fontsize="x-small", labelcolor=INK, framealpha=0.0)
    return as_image(figure)
