"""What each part of a toy recipe is worth: one run of recipes/toy.py for each variant, one results file for all.

    python recipes/ablate.py --config recipes/toy/mod_add_30.yaml --variants recipes/toy/ablations.yaml --seeds 0 1 2

Further options go to every run. A variant's seed that has its results is not run again: the command goes on where it stopped, and takes further seeds.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from toy import KINDS

from hf_thinktok.errors import one_sentence
from hf_thinktok.pictures import draw_ablation
from hf_thinktok.recipe_options import read_config
from hf_thinktok.results import print_ablation, read_json, write_json

TOY = Path(__file__).parent / "toy.py"


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """A YAML file that is a mapping.

    Raises:
        ValueError: it is not there, or something else.
    """
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or ' '.join(str(error).split())}.") from error
    if not isinstance(told, dict) or not told:
        raise ValueError(f"{path} must have {what}.")
    return told


def run_variant(folder: Path, base: dict[str, Any], changes: dict[str, Any], seeds: list[int], more: list[str], only_read: bool) -> list[dict[str, Any]]:
    """The results of one variant, one for each seed, from runs or from their files; nothing where they are `only_read` and not all there."""
    config, told = folder / "config.yaml", f"# {' '.join(more)}\n{yaml.safe_dump(base | changes)}"
    same = config.exists() and config.read_text() == told
    if only_read and not (same and all((folder / f"seed-{seed}" / "results.json").exists() for seed in seeds)):
        return []
    if not same and any(folder.glob("seed-*/*")):
        raise SystemExit(f"{folder} holds a run with other settings: name another output_dir, or remove that folder.")
    folder.mkdir(parents=True, exist_ok=True)
    config.write_text(told)
    found = []
    for seed in seeds:
        output = folder / f"seed-{seed}"
        if not (output / "results.json").exists():
            command = [sys.executable, str(TOY), "--config", str(config), "--output_dir", str(output), "--seeds", str(seed), *more]
            if subprocess.run(command).returncode:
                raise SystemExit(f"error: {' '.join(command[1:])} failed, as is said above.")
        found.append(read_json(output / "results.json"))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="Config of recipes/toy.py.")
    parser.add_argument("--variants", type=Path, required=True, help="YAML: for each variant's name, the options that change.")
    parser.add_argument("--only", nargs="+", help="Names of the variants to run, beside those that have been; all where not given.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, help="Where runs and results go; outputs/toy/ and the name of the file of variants where not given.")
    args, further = parser.parse_known_args()
    args.output_dir = args.output_dir or Path("outputs/toy", args.variants.stem)
    with one_sentence():
        base = read_mapping(args.config, "the options of recipes/toy.py, by name")
        variants = read_mapping(args.variants, "for each variant's name the options that it changes")
        for name, changes in variants.items():
            if not isinstance(changes, dict | None):
                raise ValueError(f"{args.variants} has {changes!r} for {name}: give the options that it changes, as a mapping.")
            variants[name] = changes or {}
            read_config(KINDS, base | variants[name], f"{args.variants}, {name}:")
        for name in args.only or ():
            if name not in variants:
                raise ValueError(f"--only names {name!r}, and {args.variants} has {', '.join(map(repr, variants))}: name one of these.")
    results: dict[str, Any] = {"ablation": {}, "variants": {}}
    for name, changes in variants.items():
        only_read = name not in (args.only or variants)
        if not only_read:
            print(f"== {name}: {changes or 'nothing changed'}", flush=True)
        folder = args.output_dir / name.replace(" ", "_").replace(",", "")
        if not (found := run_variant(folder, base, changes, args.seeds, further, only_read)):
            continue
        where = ("versions", "hardware", "commit")
        results["variants"][name] = changes
        results["ablation"][name] = [run | {key: one[key] for key in where} for one in found for run in one["runs"]]
        results |= {key: found[-1][key] for key in ("task", "task_options", "levels", *where)}
        write_json(args.output_dir / "results.json", results)
    draw_ablation(results, args.output_dir / "accuracy.svg")
    print_ablation(results)
