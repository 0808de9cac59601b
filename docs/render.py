"""Renders the figures in README.md and docs/ from the results files that runs wrote: `python docs/render.py`, or `--check` to say whether they agree.

Between `<!-- results: FILE -->` and `<!-- end -->` stands the table of that file, as the run printed it. A picture `docs/results/NAME.svg` is drawn from
`docs/results/NAME.json`.
"""

import json
import re
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console

from hf_thinktok.results import draw_ablation, draw_task, print_ablation, print_measured, print_mixture, print_plans, print_results, print_task

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- results: (?P<file>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

PICTURE = re.compile(r"\(((?:docs/)?results/\S+\.svg)\)")
PAGES = [ROOT / "README.md", ROOT / "docs" / "toy_study.md", ROOT / "docs" / "scaling.md"]


def table(file: str) -> str:
    results = json.loads((ROOT / file).read_text())
    console = Console(file=StringIO(), width=80)
    kinds = {"ablation": print_ablation, "mixture": print_mixture, "task": print_task, "plans": print_plans, "measured": print_measured}
    printer = next((print_kind for name, print_kind in kinds.items() if name in results), print_results)
    printer(results, console)
    hardware, versions = results["hardware"], results["versions"]
    where = f"{hardware['cores']} cores, {', '.join(hardware['gpus']) or hardware['cpu']}; torch {versions['torch']}, transformers {versions['transformers']}"
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    return "```text\n" + "\n".join(lines) + f"\n{where}; commit {results['commit'][:12]}\n```\n"


def rendered(text: str) -> str:
    return BLOCK.sub(lambda match: match[1] + table(match["file"]) + match[3], text)


if __name__ == "__main__":
    for page in PAGES:
        text = rendered(page.read_text())
        if "--check" in sys.argv:
            if text != page.read_text():
                sys.exit(f"{page.name} does not agree with the results files: run python docs/render.py")
            continue
        for picture in PICTURE.findall(text):
            results = json.loads((page.parent / picture).with_suffix(".json").read_text())
            (draw_ablation if "ablation" in results else draw_task)(results, page.parent / picture)
        page.write_text(text)
