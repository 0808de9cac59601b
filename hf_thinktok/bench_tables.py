"""What steps cost, as tables: the results of `recipes/bench.py`."""

from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

BENCH_ARMS = ("ours", "sft", "plain", "trunk", "dense", "replicated", "grpo")
# What our step is compared by. Of memory less is better.
RATIOS = {
    "pairs_per_second_vs_trl": "judged thoughts a second, ours / grpo",
    "pairs_per_second_vs_replicated": "judged thoughts a second, ours / replicated",
    "step_vs_sft": "nodes a second, ours / sft",
    "gradient_vs_sft": "  without the rollout",
    "step_vs_plain": "nodes a second, ours / plain",
    "gradient_vs_plain": "  without the rollout",
    "step_vs_dense": "nodes a second, ours / dense",
    "gradient_vs_dense": "  without the rollout",
    "peak_memory_vs_sft": "peak memory, ours / sft",
    "peak_memory_vs_plain": "peak memory, ours / plain",
}


def print_bench(results: dict[str, Any], console: Console | None = None) -> None:
    """What steps cost, medians with the range over rounds: a column for each cell, or of many a line."""
    cells = results["cells"]
    if len(cells) > 3:
        _print_many_cells(results, console or Console())
        return
    table = Table(padding=0, title=f"{results['model']}: a training step")
    table.add_column("")
    for cell in cells:
        table.add_column("T={T} K={K}\nG={G} L={L} H={H}".format(**cell), justify="right")
    table.add_row("nodes of a row", *(f"{cell['nodes']:,}" for cell in cells))
    for arm in _arms(cells):
        table.add_row(f"seconds: {arm}", *(_median_and_range(cell["seconds"].get(arm, [])) for cell in cells))
        if arm == "ours":
            table.add_row("  of it the rollout", *(_median_and_range(cell["rollout_seconds"]) for cell in cells))
        if arm in ("replicated", "grpo"):
            table.add_row("  at so many forks", *(str(cell["some_forks"]) for cell in cells))
    table.add_section()
    for name, label in RATIOS.items():
        if any(name in cell for cell in cells):
            table.add_row(label, *(f"{cell[name]:.2f}" if name in cell else "" for cell in cells))
    (console or Console()).print(table)


def _print_many_cells(results: dict[str, Any], console: Console) -> None:
    cells = results["cells"]
    arms = _arms(cells)
    ratios = [name for name in ("step_vs_sft", "step_vs_plain") if any(name in cell for cell in cells)]
    table = Table(padding=0, title=f"{results['model']}: seconds of a training step")
    for name in ("T", "K", "G", "L", "H", "nodes", *arms, *(name.replace("step_vs_", "ours / ") for name in ratios)):
        table.add_column(name, justify="right")
    for cell in cells:
        seconds = (f"{median(cell['seconds'][arm]):.2f}" if arm in cell["seconds"] else "" for arm in arms)
        table.add_row(*(str(cell[name]) for name in "TKGLH"), f"{cell['nodes']:,}", *seconds, *(f"{cell[name]:.2f}" if name in cell else "" for name in ratios))
    console.print(table)


def _arms(cells: list[dict[str, Any]]) -> list[str]:
    return [arm for arm in BENCH_ARMS if any(arm in cell["seconds"] for cell in cells)]


def _median_and_range(seconds: list[float]) -> str:
    if not seconds:
        return ""
    digits = 2 if median(seconds) >= 1 else 3
    return f"{median(seconds):.{digits}f}" + (f" ({min(seconds):.{digits}f}-{max(seconds):.{digits}f})" if len(seconds) > 1 else "")
