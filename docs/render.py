"""Renders the figures in README.md and docs/, and model_cards/, from the results files that runs wrote: `python docs/render.py`, or `--check` to say
whether they agree.

Between `<!-- results: FILE -->` and `<!-- end -->` stands the table of that file, as the run printed it, or of several files as one that had made all their
runs would have, and below `<!-- comparisons: NAME NAME -->` what thinking gains in each of `docs/results/NAME.json`. Between
`<!-- NAME: KEY/KEY | FORMAT -->` and `<!-- -->` in a sentence stands one figure of `docs/results/NAME.json`, in a format of Python's; of several below the
key the least, and with `-KEY` its negative. In a table the bar is `\\|`, or it would end the cell. A picture `docs/results/NAME.svg` is drawn from
`docs/results/NAME.json`, and `model_cards/NAME.md` is the card of that file's run; a new one is begun as an empty file.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from hf_thinktok.card import render_card
from hf_thinktok.pictures import draw_ablation, draw_bench, draw_task
from hf_thinktok.results import as_text, read_json

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- results: (?P<files>[^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
FIGURE = re.compile(r"(<!-- (?P<name>[\w-]+): (?P<sign>-?)(?P<keys>[^|>\\]+) \\?\| (?P<format>\S+) -->).*?(<!-- -->)")
COMPARISONS = re.compile(r"(<!-- comparisons: (?P<names>[\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
# What thinking is compared with, and in which words.
OVER = {
    "cpt": "the same text", "cpt_flops": "as much compute", "filler": "fillers", "think without thoughts": "itself without thoughts",
    "think with random thoughts": "itself with random ones",
}  # fmt: skip
PICTURE = re.compile(r"\(((?:docs/)?results/\S+\.svg)\)")
# Models that runs made, by the name of their results file.
CARDS = {path.stem: ROOT / "docs" / "results" / f"{path.stem}.json" for path in sorted((ROOT / "model_cards").glob("*.md"))}
NOT_UPLOADED = "> An example: this model was not uploaded. The last section says how to make it."
PAGES = [ROOT / "README.md", ROOT / "docs" / "toy_study.md", ROOT / "docs" / "scaling.md", ROOT / "docs" / "speed.md", ROOT / "docs" / "evaluation.md"]


def table(files: list[str]) -> str:
    return f"```text\n{as_text(joined([read_json(ROOT / file) for file in files]))}```\n"


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Results of one recipe, or of variants of one, that were run in several turns: its runs by seed, and of what is best without serial steps the most that
    was known."""
    first, *others = parts
    if not others:
        return first
    for other in others:
        if any(other[name] != first[name] for name in ("task", "task_options", "levels")) or other.get("control") != first.get("control"):
            raise ValueError(f"Runs of {first['task']} with {first['task_options']} and of {other['task']} with {other['task_options']} share no table.")
    whole = first | {"parts": others}
    if "ablation" in first:
        names = sorted({name for part in parts for name in part["ablation"]})
        return whole | {"ablation": {name: by_seed([run for part in parts for run in part["ablation"].get(name, [])]) for name in names}}
    shortcut = {level: max(part["shortcut"][level] for part in parts) for level in first["shortcut"]}
    return whole | {"runs": by_seed([run for part in parts for run in part["runs"]]), "shortcut": shortcut}


def by_seed(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(runs, key=lambda run: run["seed"])


def gains(names: list[str]) -> str:
    """A row for each comparison: bits per token, with 95 % intervals over documents."""
    rows = [["text", "steps, seeds", *(f"over {meaning}" for meaning in OVER.values())], ["---"] * (2 + len(OVER))]
    for name in names:
        results = read_json(ROOT / "docs" / "results" / f"{name}.json")
        found = (results["comparison"]["gains"].get(f"think over {arm}") for arm in OVER)
        cells = [f"{gain['bits_per_token']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})" if gain else "not measured" for gain in found]
        seeds = ", ".join(map(str, results["seeds"]))
        rows.append([results["config"]["dataset_name"], f"{results['training']['think']['steps']}; {seeds}", *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def figure(match: re.Match) -> str:
    value = json.loads((ROOT / "docs" / "results" / f"{match['name']}.json").read_text())
    for key in match["keys"].split("/"):
        value = value[int(key) if isinstance(value, list) else key]
    return format((-1 if match["sign"] else 1) * least(value), match["format"])


def least(value: Any) -> float:
    return min(map(least, value.values())) if isinstance(value, dict) else value


def rendered(text: str) -> str:
    text = BLOCK.sub(lambda match: match[1] + table(match["files"].split()) + match[3], text)
    text = COMPARISONS.sub(lambda match: match[1] + gains(match["names"].split()) + match[3], text)
    text = FIGURE.sub(lambda match: match[1] + figure(match) + match[6], text)
    if "-->?<!-- -->" in text:
        sys.exit(f"A figure is named in a way that is not understood: {text.split('-->?<!-- -->')[0].rpartition('<!--')[2]}")
    return text


def draw(picture: Path, to: Path) -> None:
    """Draws a picture from the results file beside it."""
    results = read_json(picture.with_suffix(".json"))
    kind = draw_ablation if "ablation" in results else draw_bench if "cells" in results else draw_task
    kind(results, to)


def card(name: str) -> str:
    """The card as `thinktok card` writes it, and below its title what is true here alone."""
    text = render_card(read_json(CARDS[name]), f"hf-thinktok/{name.replace('_', '-')}")
    return re.sub(r"(?m)^(# .*)$", rf"\1\n\n{NOT_UPLOADED}", text, count=1)


if __name__ == "__main__":
    for name in CARDS:
        path = ROOT / "model_cards" / f"{name}.md"
        if "--check" not in sys.argv:
            path.write_text(card(name))
        elif path.read_text() != card(name):
            sys.exit(f"{path.name} does not agree with the results files: run python docs/render.py")
    for page in PAGES:
        text = rendered(page.read_text())
        if "--check" in sys.argv:
            if text != page.read_text():
                sys.exit(f"{page.name} does not agree with the results files: run python docs/render.py")
            continue
        for picture in PICTURE.findall(text):
            draw(page.parent / picture, page.parent / picture)
        page.write_text(text)
