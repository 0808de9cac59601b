"""The subcommands of `thinktok` that measure and show: eval, inspect, lm-eval, report, card."""

import argparse
import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

from .commands import LARGEST_SEED, TextHelp, add_loading, check_output, file_to_write, load, read_prompt, read_recipe, read_vocabulary, whole
from .errors import UsageError, usage

PAGE = b"<!doctype html>"


def add_eval(subparsers) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="measure on held-out text what thoughts do for the tokens after them",
        description="Measures bits per token of text without thoughts, with them, and with controls at the same places: thoughts shuffled, from before, "
        "and random. The text is that of --data_files or --dataset_name, all of it, or what --held_out_documents and --data_split_seed kept from "
        "training, or with --config recipe.yaml what that recipe held out (its test_files or its test part if it has one). "
        "The recipe's other options about text are taken as well.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action=TextHelp, nargs=0, help="show this help message and exit")
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or Hub repository")
    for name, default, lowest, what in (
        ("max_length", 512, 2, "tokens of a row; longer documents are cut into rows"),
        ("num_forks", 16, 1, "places of a row to think at, evenly spaced"),
        ("num_samples", 4, 1, "thoughts at each"),
        ("batch_size", 4, 1, "rows at a time"),
    ):
        parser.add_argument(f"--{name}", type=whole(lowest), default=default, metavar="N", help=f"{what} ({default})")
    parser.add_argument("--seed", type=whole(0, LARGEST_SEED), default=0, metavar="N", help="seed of the thoughts (0)")
    parser.add_argument("--rows_per_document", type=whole(1), metavar="N", help="rows of a document at most (all)")
    parser.add_argument("--max_think_length", type=whole(1), metavar="N", help="thinking tokens of a thought at most (as trained)")
    parser.add_argument("--lookahead", type=whole(1), metavar="N", help="real tokens after a thought that judge it (as trained)")
    parser.add_argument(
        "--fork_markers", nargs="*", metavar="TEXT", help="texts behind which to think and nowhere else; none of them for places anywhere (as trained)"
    )
    parser.add_argument("--output", type=file_to_write, metavar="FILE", help="write the figures as JSON, too")
    add_loading(parser)
    parser.set_defaults(run=run_eval, recipe=[])


def run_eval(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import track

    from .evaluation import evaluate_thinking
    from .evaluation.tables import print_evaluation
    from .recipe_options import command_line
    from .results import changed_options, environment, read_json, write_json
    from .text import ReportArguments, TextArguments, another_part, files_of, load_parts, unseen_text

    # What can be wrong is looked at before the weights are read.
    first = next(iter(args.recipe), "=")
    if "=" not in first and args.words.index(first) < args.words.index(args.model):  # whose value would be taken for MODEL
        raise UsageError("MODEL comes first: thinktok eval MODEL --data_files held_out.jsonl")
    text, report = read_recipe(args, TextArguments, ReportArguments)
    told = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in args.recipe if word.startswith("--")}
    if {"data_files", "test_files"} <= told:
        raise UsageError("--data_files and --test_files each name the text to evaluate on: leave one of the two out.")
    has_parts = bool(told & {"config", "held_out_documents", "test_documents"})
    if "data_split_seed" in told and not has_parts and text.max_documents is None:
        raise UsageError("--data_split_seed has no effect without --held_out_documents, --test_documents or --max_documents: leave it out, or give one.")
    if text.dataset_test_split is not None and not has_parts:
        raise UsageError("--dataset_test_split has no effect without --held_out_documents or --test_documents: give one, or name it as --dataset_train_split.")
    read_vocabulary(args.model, args.revision)
    texts = [file for name in (*(text.data_files or ()), *(report.test_files or ())) for file in files_of(name)]
    configs = [value for name, value in itertools.pairwise(command_line(args.recipe)) if name == "--config"]
    check_output(args.output, [args.model, *texts, *configs], b'"evaluation": {')
    console = Console(stderr=True, highlight=False)
    with usage():
        if has_parts or report.test_files:
            documents = unseen_text(text, report.test_files)
            if documents is None:
                raise UsageError("The recipe holds nothing out to evaluate on: give --held_out_documents, or the text alone with --data_files.")
        else:
            documents = load_parts(replace(text, held_out_documents=0, test_documents=0)).train
        run = Path(args.model) / "results.json"
        trained = read_json(run) if has_parts and not report.test_files and run.is_file() else {}
        if other := another_part(text, trained.get("config", {})):
            console.print(f"{args.model} was trained with {other}: some of these documents may be among those it was trained on.", style="yellow")
        model, tokenizer = load(args)
        names = ("max_length", "rows_per_document", "num_forks", "num_samples", "batch_size", "seed", "max_think_length", "lookahead", "fork_markers")
        chosen = {name: getattr(args, name) for name in names}
        found = evaluate_thinking(model, tokenizer, documents, **chosen, progress=lambda batches: track(batches, "evaluating", console=console, transient=True))
        results = {"evaluation": found.summary(), "model": args.model, "config": changed_options(text, report), **environment()}
        if trained and not text.test_documents:
            results["evaluation"]["best_of"] = trained.get("best_of", 1)  # of the same documents, which may have chosen the checkpoint
    print_evaluation(results)
    if args.output is not None:
        with usage():
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
    parser.add_argument("--max_length", type=whole(2), default=256, metavar="N", help="tokens that are read (256)")
    parser.add_argument("--max_think_length", type=whole(1), metavar="N", help="thinking tokens of a thought (as trained)")
    parser.add_argument("--output", type=file_to_write, metavar="FILE", help="write an HTML page, too, which shows each thought and the likeliest tokens")
    add_loading(parser)
    parser.set_defaults(run=run_inspect)


def run_inspect(args: argparse.Namespace) -> None:
    from .evaluation.inspection import inspect_text, print_inspection
    from .report import for_page, write_page

    text = read_prompt(args)
    read_vocabulary(args.model, args.revision)
    check_output(args.output, [args.model, args.file], PAGE)
    model, tokenizer = load(args)
    with usage():
        inspected = inspect_text(model, tokenizer, text, args.max_length, args.max_think_length)
    shown = for_page(inspected, tokenizer, text)
    print_inspection(shown["first"], inspected)
    if args.output is not None:
        page = {
            "name": args.model,
            "number": 0,
            "texts": [shown | {"title": "Text"}],
            "settings": json.dumps({name: value for name, value in vars(args).items() if not callable(value)}, default=str),
        }
        with usage():
            write_page(args.output, [page])


def add_card(subparsers) -> None:
    parser = subparsers.add_parser(
        "card",
        help="write the model card of a run",
        description="Writes a model card from a results file: what the model is, how to use it in plain transformers, text and licences, figures with their "
        "controls, limits, hardware, time, and how to do it again.",
    )
    parser.add_argument("results", metavar="RUN", type=Path, help="output_dir of a run, or its results file")
    parser.add_argument("repository", metavar="REPOSITORY", help="the model's name on the Hub, as in me/my-model")
    parser.add_argument("--title", help="the card's title (the repository's name)")
    parser.add_argument("--output", type=file_to_write, metavar="FILE", help="where the card goes (standard output)")
    parser.set_defaults(run=run_card)


def run_card(args: argparse.Namespace) -> None:
    from huggingface_hub.utils import validate_repo_id

    from .card import read_results, render_card, thinking_tokens_of
    from .results import written_whole

    with usage():
        validate_repo_id(args.repository)
        card = render_card(read_results(args.results), args.repository, args.title, thinking_tokens_of(args.results))
    if args.output is None:
        print(card)
        return
    with usage():
        if args.output.is_file() and not re.match(r"---\n.*thinktok", args.output.read_text(errors="replace"), re.DOTALL):
            raise ValueError(f"{args.output} is there, and no model card: name another file.")
        with written_whole(args.output) as file:
            file.write(card.encode())


def add_lm_eval(subparsers) -> None:
    parser = subparsers.add_parser(
        "lm-eval",
        help="run lm-evaluation-harness, which then knows the model type thinktok",
        description="The command of lm-evaluation-harness with all its options, and with --model thinktok for models with thinking tokens. Its --model_args "
        "are pretrained=FOLDER, thoughts=none|own|always, max_think_length=N, max_total_think=N, think_bias=NATS and those of the model type hf, all in one "
        "word with commas between.",
        usage=argparse.SUPPRESS,  # the harness's own help follows
        add_help=False,
    )
    parser.set_defaults(run=run_lm_eval, recipe=[], about=parser.format_help)


def run_lm_eval(args: argparse.Namespace) -> None:
    if {"-h", "--help"} & set(args.recipe):
        print(args.about())
    try:
        from lm_eval.__main__ import cli_evaluate

        from .evaluation import harness  # noqa: F401, registers the model type
    except ImportError as error:
        raise UsageError("lm-evaluation-harness is not installed: pip install 'hf-thinktok[eval]'.") from error
    sys.argv = ["lm-eval", *args.recipe]
    with usage():
        cli_evaluate()


def add_report(subparsers) -> None:
    parser = subparsers.add_parser(
        "report",
        help="make one HTML page of runs",
        description="Makes one HTML page of runs: verdicts, tables, intervals, curves, and held-out text with what was thought before each token. It needs no "
        "network and no other file. RUN is the output_dir of recipes/pretrain_think.py or recipes/compare.py, or a file of `thinktok eval --output`.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder, or results file")
    parser.add_argument("--output", type=file_to_write, default=Path("report.html"), metavar="FILE", help="the page (report.html)")
    parser.add_argument("--documents", type=whole(0), default=2, metavar="N", help="held-out documents to show token by token; 0: none (2)")
    parser.add_argument("--max_length", type=whole(2), default=256, metavar="N", help="tokens of each (256)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model, where its architecture is its own")
    parser.set_defaults(run=run_report)


def run_report(args: argparse.Namespace) -> None:
    from .report import Run, write_report

    check_output(args.output, args.runs, PAGE)
    with usage():
        write_report([Run.read(path, args.documents, args.max_length, args.trust_remote_code) for path in args.runs], args.output)
    print(args.output)
