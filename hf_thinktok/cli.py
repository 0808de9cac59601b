"""The `thinktok` command. A subcommand is a function that adds its parser and a function that runs it; `COMMANDS` lists the former."""

import argparse
import io
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .cli_measure import add_card, add_eval, add_inspect, add_lm_eval, add_report
from .commands import LARGEST_SEED, add_loading, add_source, load, loading, naming_trust, number, read_prompt, read_recipe, read_vocabulary, source, whole
from .errors import UsageError, traceback_wanted, usage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# The libraries take seconds to load: each command loads what it runs with, once its options are read, and help and a mistyped option need none of it.


def add_generate(subparsers) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="stream text and thoughts of a model with thinking tokens",
        description="Streams what a model with thinking tokens says (blue) and thinks (cyan, thoughts as numbers, as in ‹3 0 7›). "
        "Without PROMPT and --file the prompt is read from standard input. The text goes to standard output, a closing line with counts to standard error.",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or Hub repository")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the text to go on from; one that begins with a hyphen goes after --, or into --file")
    parser.add_argument("--file", metavar="PATH", help="read the prompt from this UTF-8 file; as with standard input, one line break at its end is dropped")
    parser.add_argument("--chat", action="store_true", help="make the prompt a user message in the model's chat template")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max_new_tokens", type=whole(1), default=256, metavar="N", help="tokens at most, thoughts included, while the context lasts (256)")
    sampling.add_argument("--temperature", type=number(1e-6, 1e6, "above 0.000001 and at most 1000000"), metavar="T", help="divides the logits (1)")
    sampling.add_argument(
        "--top_p", type=number(0, 1, "above 0 and at most 1"), metavar="P", help="sample from the likeliest tokens that together reach it (1)"
    )
    sampling.add_argument("--top_k", type=whole(0), metavar="K", help="sample from this many likeliest tokens; 0: from all (0)")
    sampling.add_argument("--greedy", action="store_true", help="think where that is likelier than to speak, and take the likeliest token, instead of sampling")
    sampling.add_argument("--seed", type=whole(0, LARGEST_SEED), metavar="N", help="seed of the sampling (a new one each time)")

    thinking = parser.add_argument_group("thinking")
    thinking.add_argument("--thoughts", choices=("show", "hide"), default="show", help="whether thoughts are printed (show)")
    thinking.add_argument("--min_think_length", type=whole(0), default=0, metavar="N", help="thinking tokens before every real token at least (0)")
    thinking.add_argument("--max_think_length", type=whole(0), metavar="N", help="thinking tokens in a row at most; 0: never think (no bound)")
    thinking.add_argument("--max_total_think", type=whole(0), metavar="N", help="thinking tokens in all at most (no bound)")
    thinking.add_argument(
        "--think_after",
        nargs="+",
        metavar="TEXT",
        help="think in the prompt, which goes before this option, as well, after each of these texts (where the model was trained so, after its own): a "
        "thought of as many tokens as in training, or, where a stop was learned, as its gate wants. The options above are about what is generated",
    )
    thinking.add_argument("--think_bias", type=float, default=0.0, metavar="NATS", help="added to the thinking logits: above 0 think more, below 0 less (0)")

    add_loading(parser)
    parser.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> None:
    import torch
    from rich.console import Console

    from .card import why_not_generated
    from .forks import ends_of, marker_ids
    from .generation import StopsInText, ThinkingBudget, ThinkingStreamer, think_while_reading
    from .models import longest_row
    from .tokens import NO_CUTS, stored_options

    chosen = {name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(args, name)) is not None}
    told = [*chosen, *["seed"] * (args.seed is not None)]
    if args.greedy and told:
        raise UsageError(f"--greedy does not sample: leave out {', '.join(f'--{name}' for name in told)}.")
    # What can be wrong is looked at before the weights are read.
    prompt = read_prompt(args)
    vocabulary = read_vocabulary(args.model, args.revision)
    trained = stored_options(args.model, revision=args.revision)
    if why := why_not_generated(trained):
        raise UsageError(f"{args.model} cannot generate as it was trained to: {why}.")
    with usage():
        budget = ThinkingBudget(vocabulary, args.min_think_length, args.max_think_length, args.max_total_think, args.think_bias, by_gate=args.greedy)
    model, tokenizer = load(args)
    inputs = _encode(prompt, tokenizer, args.chat).to(model.device)
    # Without these options the model's own distribution, whatever values for them its generation config has.
    sampling: dict[str, Any] = {"do_sample": not args.greedy, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    sampling |= {"guidance_scale": None, "prompt_lookup_num_tokens": None, "token_healing": False}
    if not args.greedy:
        sampling |= {"temperature": 1.0} | NO_CUTS | chosen
    stops, model.generation_config.stop_strings = model.generation_config.stop_strings, None
    if args.seed is not None:
        torch.manual_seed(args.seed)
    stays = trained.get("memory") == "persistent"  # also in prompts then
    markers = marker_ids(args.think_after or (trained.get("fork_markers", ()) if stays else ()), tokenizer)
    thoughts, each = int(ends_of(markers, inputs)[0, :-1].sum()), trained.get("max_think_length", 1)
    if args.think_after and not thoughts:
        raise UsageError(f"None of --think_after {' '.join(map(repr, args.think_after))} ends within the prompt: look at how they are written.")
    length = inputs.shape[1] + thoughts * each
    room = longest_row(model) - length
    if room < 1:
        raise UsageError(f"The prompt has {length} tokens, which leaves no room in the model's context of {length + room}.")
    before = 0  # thinking tokens in the prompt
    if thoughts:
        least = 0 if trained.get("stop") in ("learned", "sampled") else None
        read = think_while_reading(model, inputs, vocabulary, markers, each, least, **sampling)
        before, inputs = read.shape[1] - inputs.shape[1], read
        length = inputs.shape[1]

    start = time.perf_counter()
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=min(args.max_new_tokens, room),
        **sampling,
        logits_processor=[budget],
        stopping_criteria=[StopsInText(tokenizer, stops, vocabulary)] if stops else None,
        streamer=ThinkingStreamer(tokenizer, vocabulary, args.thoughts, skip_prompt=not thoughts),
        return_dict_in_generate=False,
    )
    seconds = time.perf_counter() - start
    total = output.shape[1] - length
    thought = int(vocabulary.is_thought(output[0, length:]).sum())
    read_with = f" and {before} while reading" if before else ""
    Console(stderr=True, highlight=False).print(f"{total - thought} tokens spoken, {thought} thought{read_with}, {total / seconds:.1f} per second", style="dim")


def add_merge(subparsers) -> None:
    parser = subparsers.add_parser(
        "merge",
        help="make one plain checkpoint of an adapter and its base",
        description="Adds an adapter trained with thinking tokens to its base model and writes a checkpoint that plain transformers loads. Of two adapters "
        "(policies=split) both, the speaker in a folder of that name.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder or Hub repository")
    parser.add_argument("output", metavar="FOLDER", type=Path, help="where the checkpoint goes; must not exist, or be empty")
    add_source(parser)
    parser.set_defaults(run=run_merge)


def run_merge(args: argparse.Namespace) -> None:
    from rich.console import Console

    from .peft import adapters_in, merge
    from .results import folder_written_whole

    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UsageError(f"{args.output} exists: name a new folder.")
    read_vocabulary(args.adapter, args.revision)
    made = []
    with usage(), folder_written_whole(args.output) as unfinished:
        for place, adapter in adapters_in(args.adapter, args.revision).items():
            with usage(RuntimeError, LookupError, before=f"{adapter} cannot be merged into its base: "), naming_trust():
                model, tokenizer = merge(adapter, **source(args))
            for part in (model, tokenizer):
                part.save_pretrained(unfinished / place)
            made.append(f"{args.output / place}: {model.num_parameters():,} parameters in {str(model.dtype).removeprefix('torch.')}")
    Console(stderr=True, highlight=False).print("\n".join(made), style="dim")


def add_push(subparsers) -> None:
    parser = subparsers.add_parser(
        "push",
        help="upload a trained folder to the Hub",
        description="Uploads a checkpoint or adapter folder to a Hub repository, which is made where there is none. Training checkpoints stay here, as does "
        "what of a checkpoint is there to go on with it, inspection.json and report.html, which hold held-out text, and training_args.bin, which holds the "
        "token for the Hub. A push that was interrupted is completed by the same command.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="checkpoint or adapter folder")
    parser.add_argument("repository", metavar="REPOSITORY", help="its name on the Hub, as in me/my-model; my-model alone is one of yours")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch to upload to (main)")
    parser.set_defaults(run=run_push)


def run_push(args: argparse.Namespace) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id
    from rich.console import Console

    from .results import NOT_PUSHED, TRAINING_STATE

    if not args.folder.is_dir():
        raise UsageError(f"{args.folder} is not a folder.")
    with usage():
        validate_repo_id(args.repository)
    read_vocabulary(str(args.folder))
    adapter, console = args.folder / "adapter_config.json", Console(stderr=True, highlight=False)
    if adapter.exists():
        with usage(AttributeError, before=f"{adapter} cannot be read: "):
            base = json.loads(adapter.read_text()).get("base_model_name_or_path")
        if base is None:
            console.print("The adapter's config names no base, and without one nobody can load it: write base_model_name_or_path into it.", style="yellow")
        elif Path(base).is_dir():
            console.print(
                f"The adapter's base is a folder of this machine, {base}: elsewhere nobody can load it by name. "
                "`thinktok merge` makes a model that stands alone.",
                style="yellow",
            )
    card = args.folder / "README.md"
    named = re.search(r'from_pretrained\("([^"]+)"\)', card.read_text(errors="replace")) if card.is_file() else None
    if named and named[1].split("/")[-1] != args.repository.split("/")[-1]:
        console.print(f"README.md loads {named[1]!r} and not {args.repository!r}: write its name there.", style="yellow")
    api = HfApi()
    with usage(Exception, before=f"{args.folder} is whole, but its upload to {args.repository} failed: ", after=" Run the command again."):
        repository = api.create_repo(args.repository, private=args.private or None, exist_ok=True).repo_id  # a bare name gets the user's before it
        if args.revision:
            api.create_branch(repository, branch=args.revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=args.folder,
            revision=args.revision,
            ignore_patterns=[*NOT_PUSHED, *TRAINING_STATE],
            commit_message="Upload by thinktok",
        )
    console.print(done.commit_url, style="dim")


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
    parser.add_argument("--num_processes", type=whole(1), default=1, metavar="N", help="processes, one for each GPU (1)")
    parser.add_argument("--cpu", action="store_true", help="for training on a CPU, where the head makes fp32 copies of low-precision numbers")
    parser.add_argument("--gpu_gib", type=number(0, math.inf, "above 0"), metavar="GIB", help="say whether it fits in so much memory")
    parser.add_argument("--json", action="store_true", help="print bytes as JSON instead of a table")
    parser.set_defaults(run=run_plan, recipe=[])


def run_plan(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoConfig
    from trl import ModelConfig, get_peft_config

    from .config import ThinkTokConfig
    from .loading import check_no_adapter, init_kwargs, there
    from .plan import plan, print_plan
    from .sources import resolve_model
    from .text import UnreadText

    text, config, model = read_recipe(args, UnreadText, ThinkTokConfig, ModelConfig)
    config.do_eval |= text.held_out_documents > 0 and config.thinks  # as the recipe does
    model.model_name_or_path = args.model or model.model_name_or_path
    if model.model_name_or_path is None:
        raise UsageError("There is no model: give --model, or a --config with model_name_or_path.")
    if model.load_in_4bit or model.load_in_8bit:
        raise UsageError("Quantized weights are not planned: leave load_in_4bit and load_in_8bit out.")
    with usage(RuntimeError):  # memory for the tree of a row that is far too long
        options, name = init_kwargs(model, config.model_init_kwargs), resolve_model(model.model_name_or_path)
        with there("model", name):
            check_no_adapter(name, revision=model.model_revision)
        with loading(name):
            shape = AutoConfig.from_pretrained(name, revision=model.model_revision, trust_remote_code=config.trust_remote_code)
        dtype = (shape.dtype or torch.float32) if options["dtype"] == "auto" else getattr(torch, str(options["dtype"]).removeprefix("torch."))
        how = {"zero": args.zero, "fsdp2": args.fsdp2, "num_processes": args.num_processes, "gpu": not args.cpu, "gpu_gib": args.gpu_gib}
        made = plan(shape, config, dtype, options.get("attn_implementation"), get_peft_config(model), **how)
    if not args.json:
        print_plan(made, args.gpu_gib)
        return
    fits = {} if args.gpu_gib is None else {"fits": made.peak <= args.gpu_gib * 2**30}
    print(json.dumps(asdict(made) | {"peak": made.peak, "peak_phase": made.peak_phase} | fits, indent=2))


def _encode(prompt: str, tokenizer: "PreTrainedTokenizerBase", chat: bool) -> "torch.Tensor":
    """The prompt's ids, `[1, length]`."""
    from jinja2 import TemplateError

    if not chat:
        return tokenizer(prompt, return_tensors="pt")["input_ids"]
    if tokenizer.chat_template is None:
        raise UsageError("The model has no chat template: leave out --chat.")
    messages = [{"role": "user", "content": prompt}]
    with usage(TemplateError, before="The model's chat template does not take the prompt: "):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]


COMMANDS = (add_generate, add_inspect, add_eval, add_lm_eval, add_report, add_card, add_merge, add_push, add_plan)


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
        args.recipe, args.words, args.command = recipe, words[1:], command
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or pipe that cannot write a character of the text gets it as an escape
        sys.stdout.reconfigure(errors="backslashreplace")
    from transformers.utils import logging as transformers_logging

    # Errors are told in a sentence below; the libraries' warnings and bars would run into the streamed text.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads along has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except UsageError as error:
        if traceback_wanted():
            raise
        print(f"thinktok: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
