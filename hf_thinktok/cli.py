"""The `thinktok` command. A subcommand is a function that adds its parser and a function that runs it; `COMMANDS` lists the former."""

import argparse
import contextlib
import json
import math
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from huggingface_hub import HfApi
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging as transformers_logging
from yaml import YAMLError

from . import __version__
from .generation import THOUGHTS, ThinkingBudget, ThinkingStreamer
from .peft import merge
from .sources import resolve_model
from .tokens import ThinkingVocabulary

DTYPES = ("auto", "float32", "bfloat16", "float16")


class UsageError(Exception):
    """What the user can put right, in one sentence: shown without a stack trace, with exit code 2."""


def add_generate(subparsers) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="stream text and thoughts of a model with thinking tokens",
        description="Streams what a model with thinking tokens says (blue) and thinks (cyan, thoughts as numbers, as in ‹3 0 7›). "
        "Without PROMPT and --file the prompt is read from standard input. The text goes to standard output, a closing line with counts to standard error.",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or Hub repository")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the text to go on from")
    parser.add_argument("--file", metavar="PATH", help="read the prompt from this UTF-8 file; as with standard input, one line break at its end is dropped")
    parser.add_argument("--chat", action="store_true", help="make the prompt a user message in the model's chat template")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max_new_tokens", type=_whole(1), default=256, metavar="N", help="tokens at most, thoughts included, while the context lasts (256)")
    sampling.add_argument("--temperature", type=_number(0, math.inf, "above 0"), metavar="T", help="divides the logits (1)")
    sampling.add_argument(
        "--top_p", type=_number(0, 1, "above 0 and at most 1"), metavar="P", help="sample from the likeliest tokens that together reach it (1)"
    )
    sampling.add_argument("--top_k", type=_whole(0), metavar="K", help="sample from this many likeliest tokens; 0: from all (0)")
    sampling.add_argument("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    sampling.add_argument("--seed", type=_whole(0), metavar="N", help="seed of the sampling (a new one each time)")

    thinking = parser.add_argument_group("thinking")
    thinking.add_argument("--thoughts", choices=THOUGHTS, default="show", help="whether thoughts are printed (show)")
    thinking.add_argument("--min_think", type=_whole(0), default=0, metavar="N", help="thinking tokens before every real token at least (0)")
    thinking.add_argument("--max_think", type=_whole(0), metavar="N", help="thinking tokens in a row at most; 0: never think (no bound)")
    thinking.add_argument("--max_total_think", type=_whole(0), metavar="N", help="thinking tokens in all at most (no bound)")
    thinking.add_argument("--think_bias", type=float, default=0.0, metavar="NATS", help="added to the thinking logits: above 0 think more, below 0 less (0)")

    _add_loading(parser)
    parser.set_defaults(run=run_generate)


def _add_loading(parser) -> None:
    loading = parser.add_argument_group("loading")
    loading.add_argument("--dtype", choices=DTYPES, default="auto", help="number format of the weights; auto: as they are stored (auto)")
    loading.add_argument("--device", help="where to run, such as cpu or cuda:1 (an accelerator if there is one)")


def run_generate(args: argparse.Namespace) -> None:
    chosen = {name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(args, name)) is not None}
    if args.greedy and chosen:
        raise UsageError(f"--greedy does not sample: leave out {', '.join(f'--{name}' for name in chosen)}.")
    # What can be wrong is looked at before the weights are read.
    prompt = _read_prompt(args)
    vocabulary = _read_vocabulary(args.model)
    try:
        budget = ThinkingBudget(vocabulary, args.min_think, args.max_think, args.max_total_think, args.think_bias)
    except ValueError as error:
        raise UsageError(str(error)) from error
    model, tokenizer = _load(args)
    inputs = _encode(prompt, tokenizer, args.chat).to(model.device)
    length = inputs.shape[1]
    room = (getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize) - length
    if room < 1:
        raise UsageError(f"The prompt has {length} tokens, which leaves no room in the model's context of {length + room}.")
    if args.seed is not None:
        set_seed(args.seed)

    start = time.perf_counter()
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=min(args.max_new_tokens, room),
        do_sample=not args.greedy,
        # Without these options the model's own distribution, whatever values for them its generation config has.
        **({} if args.greedy else {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | chosen),
        logits_processor=[budget],
        streamer=ThinkingStreamer(tokenizer, vocabulary, args.thoughts),
    )
    seconds = time.perf_counter() - start
    total = output.shape[1] - length
    thought = int(vocabulary.is_thought(output[0, length:]).sum())
    Console(stderr=True, highlight=False).print(f"{total - thought} tokens spoken, {thought} thought, {total / seconds:.1f} per second", style="dim")


def add_merge(subparsers) -> None:
    parser = subparsers.add_parser(
        "merge",
        help="make one plain checkpoint of an adapter and its base",
        description="Adds an adapter trained with thinking tokens to its base model and writes a checkpoint that plain transformers loads.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder or Hub repository")
    parser.add_argument("output", metavar="FOLDER", type=Path, help="where the checkpoint goes; must not exist, or be empty")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="number format of the weights; auto: as the base has them (auto)")
    parser.set_defaults(run=run_merge)


def run_merge(args: argparse.Namespace) -> None:
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UsageError(f"{args.output} exists: name a new folder.")
    _read_vocabulary(args.adapter)
    try:
        model, tokenizer = merge(args.adapter, dtype=args.dtype)
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        raise UsageError(f"{args.adapter} cannot be merged into its base: {str(error).splitlines()[0]}") from error
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    Console(stderr=True, highlight=False).print(
        f"{args.output}: {model.num_parameters():,} parameters in {str(model.dtype).removeprefix('torch.')}", style="dim"
    )


def add_push(subparsers) -> None:
    parser = subparsers.add_parser(
        "push",
        help="upload a trained folder to the Hub",
        description="Uploads a checkpoint or adapter folder to a Hub repository, which is made where there is none. Training checkpoints stay here. "
        "A push that was interrupted is completed by the same command.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="checkpoint or adapter folder")
    parser.add_argument("repository", metavar="REPOSITORY", help="its name on the Hub, as in me/my-model")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch to upload to (main)")
    parser.set_defaults(run=run_push)


def run_push(args: argparse.Namespace) -> None:
    if not args.folder.is_dir():
        raise UsageError(f"{args.folder} is not a folder.")
    _read_vocabulary(str(args.folder))
    adapter = args.folder / "adapter_config.json"
    if adapter.exists() and Path(base := json.loads(adapter.read_text())["base_model_name_or_path"]).is_dir():
        Console(stderr=True, highlight=False).print(
            f"The adapter's base is a folder of this machine, {base}: elsewhere nobody can load it by name. `thinktok merge` makes a model that stands alone.",
            style="yellow",
        )
    api = HfApi()
    try:
        api.create_repo(args.repository, private=args.private or None, exist_ok=True)
        if args.revision:
            api.create_branch(args.repository, branch=args.revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=args.repository, folder_path=args.folder, revision=args.revision, ignore_patterns=["checkpoint-*"], commit_message="Upload by thinktok"
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{args.folder} is whole, but its upload to {args.repository} failed: {str(error).splitlines()[0]} Run the command again.") from error
    Console(stderr=True, highlight=False).print(done.commit_url, style="dim")


def add_plan(subparsers) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="estimate the memory that a training run needs",
        description="Estimates the peak memory of one process of a training run, by part, from the model's config alone. All options of the training recipe "
        "are taken as well, such as --max_length, --num_forks, --per_device_train_batch_size, --gradient_checkpointing, --dtype, --use_peft, --lora_r and "
        "--config recipe.yaml.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="MODEL", help="folder with a config.json, or Hub repository (the recipe's model_name_or_path)")
    parser.add_argument("--zero", type=int, choices=range(4), default=0, help="stage of DeepSpeed's ZeRO (0)")
    parser.add_argument("--fsdp2", action="store_true", help="sharded by FSDP2")
    parser.add_argument("--num_processes", type=_whole(1), default=1, metavar="N", help="processes, one for each GPU (1)")
    parser.add_argument("--cpu", action="store_true", help="for training on a CPU, where the head makes fp32 copies of low-precision numbers")
    parser.add_argument("--gpu_gib", type=_number(0, math.inf, "above 0"), metavar="GIB", help="say whether it fits in so much memory")
    parser.add_argument("--json", action="store_true", help="print bytes as JSON instead of a table")
    parser.set_defaults(run=run_plan, recipe=[])


def run_plan(args: argparse.Namespace) -> None:
    from trl import ModelConfig, get_peft_config

    from .config import ThinkTokConfig
    from .plan import plan, print_plan

    config, model = _read_recipe(args.recipe, ThinkTokConfig, ModelConfig)
    if (name := args.model or model.model_name_or_path) is None:
        raise UsageError("There is no model: give --model, or a --config with model_name_or_path.")
    if model.load_in_4bit or model.load_in_8bit:
        raise UsageError("Quantized weights are not planned: leave load_in_4bit and load_in_8bit out.")
    loading = {"dtype": model.dtype, "attn_implementation": model.attn_implementation} | (config.model_init_kwargs or {})
    try:
        name = resolve_model(name)
        with _loading(name):
            shape = AutoConfig.from_pretrained(name, revision=model.model_revision, trust_remote_code=config.trust_remote_code)
        dtype = (shape.dtype or torch.float32) if loading["dtype"] == "auto" else getattr(torch, str(loading["dtype"]).removeprefix("torch."))
        made = plan(shape, config, dtype, loading["attn_implementation"], get_peft_config(model), args.zero, args.fsdp2, args.num_processes, gpu=not args.cpu)
    except (ImportError, ValueError) as error:
        raise UsageError(str(error)) from error
    if not args.json:
        print_plan(made, args.gpu_gib)
        return
    fits = {} if args.gpu_gib is None else {"fits": made.peak <= args.gpu_gib * 2**30}
    print(json.dumps(asdict(made) | {"peak": made.peak, "peak_phase": made.peak_phase} | fits, indent=2))


def add_eval(subparsers) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="measure on held-out text what thoughts do for the tokens after them",
        description="Measures bits per token of text without thoughts, with them, and with controls at the same places: thoughts shuffled, from elsewhere, "
        "and random. The text is that of --data_files or --dataset_name, all of it, or with --config recipe.yaml what that recipe held out (its test part if "
        "it has one). "
        "The recipe's other options about text are taken as well, such as --text_template and --max_documents.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or Hub repository")
    for name, default, lowest, what in (
        ("max_length", 512, 2, "tokens of a row; longer documents are cut into rows"),
        ("num_forks", 16, 1, "places of a row to think at, evenly spaced"),
        ("num_samples", 4, 1, "thoughts at each"),
        ("batch_size", 4, 1, "rows at a time"),
        ("seed", 0, 0, "seed of the thoughts"),
    ):
        parser.add_argument(f"--{name}", type=_whole(lowest), default=default, metavar="N", help=f"{what} ({default})")
    parser.add_argument("--rows_per_document", type=_whole(1), metavar="N", help="rows of a document at most (all)")
    parser.add_argument("--max_think_length", type=_whole(1), metavar="N", help="thinking tokens of a thought at most (as trained)")
    parser.add_argument("--lookahead", type=_whole(1), metavar="N", help="real tokens after a thought that judge it (as trained)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON, too")
    _add_loading(parser)
    parser.set_defaults(run=run_eval, recipe=[])


def run_eval(args: argparse.Namespace) -> None:
    from rich.progress import track

    from .evaluation import evaluate_thinking
    from .evaluation.tables import print_evaluation
    from .results import environment, write_json
    from .text import TextArguments, load_text, split

    # What can be wrong is looked at before the weights are read.
    (text,) = _read_recipe(args.recipe, TextArguments)
    _read_vocabulary(args.model)
    console = Console(stderr=True, highlight=False)
    try:
        documents = load_text(text)
        if "--config" in args.recipe:
            parts = split(documents, text)
            documents = parts.test or parts.held_out
            if documents is None:
                raise UsageError("The recipe holds nothing out to evaluate on: give --held_out_documents, or the text alone with --data_files.")
        else:
            documents = split(documents, replace(text, held_out_documents=0, test_documents=0)).train
        model, tokenizer = _load(args)
        names = ("max_length", "rows_per_document", "num_forks", "num_samples", "batch_size", "seed", "max_think_length", "lookahead")
        chosen = {name: getattr(args, name) for name in names}
        found = evaluate_thinking(model, tokenizer, documents, **chosen, progress=lambda batches: track(batches, "evaluating", console=console, transient=True))
    except (OSError, ValueError) as error:
        raise UsageError(str(error).splitlines()[0]) from error
    results = {"evaluation": found.summary(), "model": args.model, **environment()}
    print_evaluation(results)
    if args.output is not None:
        write_json(args.output, results)


def add_inspect(subparsers) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="show what a model thinks before each token of a text, and what that does",
        description="Thinks before every token of a text, the likeliest thinking tokens, and says what that does to the token's probability.",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or Hub repository")
    parser.add_argument("prompt", metavar="TEXT", nargs="?", help="the text; standard input where neither it nor --file is given")
    parser.add_argument("--file", metavar="PATH", help="read the text from this UTF-8 file")
    parser.add_argument("--max_length", type=_whole(2), default=256, metavar="N", help="tokens that are read (256)")
    parser.add_argument("--max_think_length", type=_whole(1), metavar="N", help="thinking tokens of a thought (as trained)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write an HTML page, too, which shows each thought and the likeliest tokens")
    _add_loading(parser)
    parser.set_defaults(run=run_inspect)


def run_inspect(args: argparse.Namespace) -> None:
    from .evaluation.inspection import inspect_text, print_inspection
    from .report import for_page, write_page

    text = _read_prompt(args)
    _read_vocabulary(args.model)
    model, tokenizer = _load(args)
    try:
        inspected = inspect_text(model, tokenizer, text, args.max_length, args.max_think_length)
    except ValueError as error:
        raise UsageError(str(error)) from error
    print_inspection(inspected)
    if args.output is not None:
        page = {
            "name": args.model,
            "number": 0,
            "texts": [for_page(inspected, tokenizer, text) | {"title": "Text"}],
            "settings": json.dumps(vars(args), default=str),
        }
        write_page(args.output, [page])


def add_report(subparsers) -> None:
    parser = subparsers.add_parser(
        "report",
        help="make one HTML page of runs",
        description="Makes one HTML page of runs: verdicts, tables, intervals, curves, and held-out text with what was thought before each token. It needs no "
        "network and no other file. RUN is the output_dir of recipes/pretrain_think.py or recipes/compare.py, or a file of `thinktok eval --output`.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder, or results file")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page (report.html)")
    parser.add_argument("--documents", type=_whole(0), default=2, metavar="N", help="held-out documents to show token by token; 0: none (2)")
    parser.add_argument("--max_length", type=_whole(2), default=256, metavar="N", help="tokens of each (256)")
    parser.set_defaults(run=run_report)


def run_report(args: argparse.Namespace) -> None:
    from .report import Run, write_report

    try:
        write_report([Run.read(path, args.documents, args.max_length) for path in args.runs], args.output)
    except (OSError, ValueError) as error:
        raise UsageError(str(error).splitlines()[0]) from error
    print(args.output)


def add_lm_eval(subparsers) -> None:
    subparsers.add_parser(
        "lm-eval",
        help="run lm-evaluation-harness, which then knows the model type thinktok",
        description="The command of lm-evaluation-harness with all its options, and with --model thinktok for models with thinking tokens: --model_args "
        "pretrained=FOLDER,thoughts=none|own|always,max_think_length=N,max_total_think=N,think_bias=NATS and those of its model type hf.",
        add_help=False,
    ).set_defaults(run=run_lm_eval, recipe=[])


def run_lm_eval(args: argparse.Namespace) -> None:
    try:
        from lm_eval.__main__ import cli_evaluate

        from .evaluation import harness  # noqa: F401, registers the model type
    except ImportError as error:
        raise UsageError("lm-evaluation-harness is not installed: pip install 'hf-thinktok[eval]'.") from error
    sys.argv = ["lm-eval", *args.recipe]
    try:
        cli_evaluate()
    except ValueError as error:
        raise UsageError(str(error).splitlines()[0]) from error


def _read_recipe(words: list[str], *kinds: type) -> tuple:
    """A training recipe's options, those of some kinds; whatever else its file says is of no concern here."""
    from trl import TrlParser

    parser = TrlParser(kinds, allow_abbrev=False)

    def refuse(message: str):
        raise UsageError(f"{message[0].upper()}{message[1:].rstrip('.')}.")

    parser.error = refuse
    try:
        with warnings.catch_warnings(action="ignore"):
            *options, _, unknown = parser.parse_args_and_config(words, return_remaining_strings=True, separate_remaining_strings=True)
    except OSError as error:
        raise UsageError(f"The file {error.filename} cannot be read: {error.strerror}.") from error
    except (ValueError, IndexError, YAMLError) as error:
        raise UsageError(str(error).splitlines()[0] if isinstance(error, ValueError) else "--config needs a YAML file.") from error
    if unknown:
        raise UsageError(f"There is no option {unknown[0]}.")
    return tuple(options)


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None and args.file is not None:
        raise UsageError("Give the prompt as an argument or with --file, not both.")
    try:
        if args.prompt is not None:
            prompt = args.prompt
        else:
            prompt = (sys.stdin.read() if args.file is None else Path(args.file).read_text(encoding="utf-8")).removesuffix("\n")
    except OSError as error:
        raise UsageError(f"The prompt file {args.file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"The prompt in {args.file or 'standard input'} is not text in UTF-8.") from error
    if not prompt.strip():
        raise UsageError("The prompt is empty.")
    return prompt


def _encode(prompt: str, tokenizer: PreTrainedTokenizerBase, chat: bool) -> torch.Tensor:
    """The prompt's ids, `[1, length]`."""
    if not chat:
        return tokenizer(prompt, return_tensors="pt")["input_ids"]
    if tokenizer.chat_template is None:
        raise UsageError("The model has no chat template: leave out --chat.")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]


def _read_vocabulary(path: str) -> ThinkingVocabulary:
    with _loading(path):
        vocabulary = ThinkingVocabulary.from_config(AutoConfig.from_pretrained(path))
    if vocabulary is None:
        raise UsageError(f"{path} has no thinking tokens: its config.json lacks the entry `thinktok`.")
    return vocabulary


def _load(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of `args.model`, in `args.dtype` on `args.device`."""
    device = args.device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"The device {device} is not available here.") from error
    if Path(args.model, "adapter_config.json").exists():
        raise UsageError(f"{args.model} is an adapter: make a checkpoint of it with `thinktok merge {args.model} FOLDER`, and generate with that.")
    with _loading(args.model):
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(device), tokenizer


@contextlib.contextmanager
def _loading(path: str) -> Iterator[None]:
    """Makes one sentence of what `from_pretrained` raises."""
    try:
        yield
    except (OSError, ValueError) as error:
        if not Path(path).is_dir():
            raise UsageError(f"{path} is neither a folder nor a Hub repository that can be read from here.") from error
        raise UsageError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error


def _whole(lowest: int):
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"must be a whole number, {lowest} or more; got {text!r}")
        return int(text)

    return parse


def _number(above: float, highest: float, meaning: str):
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (above < value <= highest and value < math.inf):
            raise argparse.ArgumentTypeError(f"must be a number {meaning}; got {text!r}")
        return value

    return parse


COMMANDS = (add_generate, add_inspect, add_eval, add_lm_eval, add_report, add_merge, add_push, add_plan)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and gives its exit code: 0, or 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="thinktok", description="Language models that think in tokens of their own.")
    parser.add_argument("--version", action="version", version=f"thinktok {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(subparsers)
    words = sys.argv[1:] if argv is None else argv
    # A known command's words go to its own parser: only a parser without subparsers lets options stand between MODEL and PROMPT.
    command = subparsers.choices.get(words[0]) if words else None
    if command is None:
        args = parser.parse_args(words)
    elif command.get_default("recipe") is None:
        args = command.parse_intermixed_args(words[1:])
    else:
        args, recipe = command.parse_known_args(words[1:])
        args.recipe = recipe
    # Errors are told in a sentence below; the libraries' warnings and bars would run into the streamed text.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        args.run(args)
    except UsageError as error:
        print(f"thinktok: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
