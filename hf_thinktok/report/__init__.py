"""The report of runs: one HTML page with tables, pictures, and the text with what was thought in it. It needs no network and no other file."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, select_autoescape
from rich.table import Table
from safetensors import SafetensorError

from ..card import read_results
from ..commands import naming_trust
from ..data import text_of
from ..distributed import where_it_is_fast
from ..errors import first_line
from ..evaluation.inspection import InspectedToken, inspect_text
from ..evaluation.tables import comparison_says, comparison_tables, evaluation_says, evaluation_tables, in_order, placed
from ..evaluation.thinking import PLACED, own_arm, own_length, pieces
from ..peft import load_whole
from ..results import run_table, verdict, weights_in, where, whole_results, write_json, written_whole
from ..text import TextArguments, unseen_text
from .charts import draw_costs, draw_curves, draw_intervals

GAINS = "bits per token saved, with 95 % intervals over documents"


@dataclass
class Run:
    """What is known of one folder or file.

    Attributes:
        path: of it, whole and without a file's ending.
        results: of its results file.
        logs: what its trainings logged, by name.
        texts: inspected texts, each with a title, its first token and the others.
        note: what is missing, and why.
    """

    path: Path
    results: dict[str, Any]
    logs: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    texts: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""

    def __post_init__(self):
        self.name = self.path.name

    @classmethod
    def read(cls, path: Path, documents: int, max_length: int, trust_remote_code: bool = False) -> "Run":
        """A results file, or a folder with one: a training run's, or a comparison's.

        Args:
            documents: so many of the text that was held out are read by the model token by token, where it is there.
            max_length: tokens of each.
            trust_remote_code: run code that comes with the model.

        Raises:
            ValueError: there are no results, or not whole ones.
        """
        run = cls(path.resolve() if path.is_dir() else path.absolute().with_suffix(""), read_results(path))
        if not {"comparison", "evaluation", "bits_per_token"} & set(run.results):
            raise ValueError(f"{path} is of another kind: reports are of pretrain_think.py, compare.py and `thinktok eval --output`.")
        if path.is_dir():
            arms = [state for state in sorted(path.glob("*/trainer_state.json")) if not state.parent.name.startswith("checkpoint-")]
            with whole_results(str(path)):
                run.logs = {state.parent.name: json.loads(state.read_text())["log_history"] for state in [*path.glob("trainer_state.json")] or arms}
                if documents:
                    run._read_texts(path, documents, max_length, trust_remote_code)
        return run

    def _read_texts(self, folder: Path, documents: int, max_length: int, trust_remote_code: bool) -> None:
        """Inspects held-out text, or takes what was inspected before of the same text by the same weights."""
        file = folder / "inspection.json"
        model = folder / f"think-seed{self.results['seeds'][0]}" if "comparison" in self.results else folder
        weights = {one.name: [one.stat().st_size, one.stat().st_mtime_ns] for one in weights_in(model)}
        text = {name: self.results.get("settings", {}).get(name) for name in ("text", "test_files")}
        of = {"documents": documents, "max_length": max_length, "weights": weights, "text": text, "config": self.results.get("config")}
        seen = json.loads(file.read_text()) if file.exists() else {}
        if "of" not in seen or seen["of"] != of:
            try:
                seen = {"of": of, "texts": inspect_texts(model, held_out_rows(self.results, documents), max_length, trust_remote_code)}
            except (OSError, ValueError, SafetensorError) as error:
                self.note = f"The text is not shown: {first_line(error)}"
                return
            with contextlib.suppress(OSError):  # a folder that cannot be written to: it is inspected again another time
                write_json(file, seen)
        self.texts = [text | {"title": f"Held-out text {number}"} for number, text in enumerate(seen["texts"], 1)]

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """Evaluations of models that think, by name."""
        if "evaluation" in self.results:
            return {self.name: self.results["evaluation"]}
        runs = self.results["comparison"]["runs"] if "comparison" in self.results else {}
        return {f"{arm}, seed {seed}": one for arm, seeds in runs.items() for seed, one in seeds.items() if "think over no_think" in one["gains"]}

    def page(self, number: int) -> dict[str, Any]:
        """What the template shows of it."""
        results = self.results
        pictures: list[tuple[str, str | None]] = []
        if "comparison" in results:
            says, tables = comparison_says(results["comparison"]), comparison_tables(results["comparison"], results["seeds"], results["training"])
            gains = in_order(results["comparison"]["gains"])
            pictures.append(("What thinking gains", draw_intervals({name.replace(" over ", ", over "): gain for name, gain in gains.items()}, GAINS)))
        elif "evaluation" in results:
            says, tables = evaluation_says(results["evaluation"]), evaluation_tables(results["evaluation"])
        else:
            says, tables = verdict(results), [run_table(results)]
        pictures.append(("Training", draw_curves(self.logs)))
        more: list[tuple[str, str | None]] = []
        for name, one in self.evaluations.items():
            how = own_arm(one["settings"])
            buckets = {
                f"{i}. {bucket['mean_entropy_bits']:.1f} bits of entropy": bucket[f"{how} over no_think"] for i, bucket in enumerate(one["by_entropy"], 1)
            }
            more.append(
                (f"{name}: thoughts and what is put in their place", draw_intervals({placed(gain): one["gains"][gain] for gain in one["gains"]}, GAINS))
            )
            more.append((f"{name}: {PLACED[how]}, by how uncertain it is without a thought", draw_intervals(buckets, GAINS)))
        told = {name: results[name] for name in ("model", "config", "arms", "settings", "seeds", "versions", "hardware", "commit") if name in results}
        shown = {name: [(title, data) for title, data in group if data] for name, group in (("pictures", pictures), ("more", more))}
        return {
            "name": self.name, "number": number, "says": says, "where": where(results), "texts": self.texts,
            "tables": [as_cells(table) for table in tables], "note": self.note, "settings": json.dumps(told, indent=2), **shown,
        }  # fmt: skip


def as_cells(table: Table) -> dict[str, Any]:
    """A terminal's table for HTML: its title, and cells with the side that they are set to."""
    sides = ["right" if column.justify == "right" else "left" for column in table.columns]
    header = [str(column.header) for column in table.columns]
    rows = [list(zip(map(str, row), sides, strict=True)) for row in zip(*(column.cells for column in table.columns), strict=True)]
    return {"title": str(table.title or ""), "header": header, "header_cells": list(zip(header, sides, strict=True)), "rows": rows}


def held_out_rows(results: dict[str, Any], documents: int) -> list[dict[str, Any]]:
    """The first documents that a run kept from training."""
    config, known = results.get("config", {}), {entry.name for entry in fields(TextArguments)}
    script = TextArguments(**{name: value for name, value in config.items() if name in known})  # of a recipe's options those about text
    if (unseen := unseen_text(script, results.get("settings", {}).get("test_files"))) is None:
        raise ValueError("the run held none out.")
    return list(unseen.take(documents))


def inspect_texts(folder: Path, documents: Sequence[dict[str, Any] | str], max_length: int, trust_remote_code: bool = False) -> list[dict[str, Any]]:
    """Documents, texts or rows, as a model reads them, for the page."""
    with naming_trust():
        model, tokenizer = load_whole(str(folder), trust_remote_code=trust_remote_code)
    texts = [text_of(document, tokenizer) or "" for document in documents]
    with where_it_is_fast(model, torch.accelerator.current_accelerator(check_available=True) or model.device):
        return [for_page(inspect_text(model, tokenizer, text, max_length), tokenizer, text) for text in texts]


def for_page(inspected: list[InspectedToken], tokenizer, text: str) -> dict[str, Any]:
    """An inspected text as the template takes it: its first token, before which nothing is thought, and the others."""
    return {"first": pieces(tokenizer, tokenizer(text)["input_ids"][: len(inspected) + 1])[0], "tokens": [asdict(token) for token in inspected]}


def tell_apart(runs: list[Run]) -> None:
    """Puts as many folders before a run's name as tell it from the others."""
    for run in runs:
        parts, others = run.path.parts, [other.path.parts for other in runs if other.path != run.path]
        count = 1
        while any(other[-count:] == parts[-count:] for other in others):
            count += 1
        run.name = str(Path(*parts[-count:]))


def write_report(runs: list[Run], path: Path) -> None:
    """Writes the page of some runs."""
    pages: list[dict[str, Any]] = []
    points: list[tuple[str, float, dict[str, float]]] = []
    tell_apart(runs)
    for number, run in enumerate(runs):
        with whole_results(run.name):
            pages.append(run.page(number))
            for name, one in run.evaluations.items():
                settings, named = one["settings"], name if len(runs) == 1 or name == run.name else f"{run.name}: {name}"
                points.append((named, own_length(one, settings), one["gains"][f"{own_arm(settings)} over no_think"]))
    write_page(path, pages, draw_costs(points))


def write_page(path: Path, runs: list[dict[str, Any]], costs: str | None = None) -> None:
    """Writes a page whole or not at all."""
    template = Environment(loader=PackageLoader("hf_thinktok.report", ""), autoescape=select_autoescape(["j2"])).get_template("page.html.j2")
    with written_whole(path) as file:
        file.write(template.render(title="Thinking tokens", runs=runs, costs=costs).encode())
