"""What the subcommands of `thinktok` share: errors in a sentence, options, reading prompts, recipes and models."""

import argparse
import contextlib
import math
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yaml import YAMLError

from .errors import UsageError, first_line, usage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .tokens import ThinkingVocabulary

LARGEST_SEED = 2**32 - 1  # that numpy takes
LARGEST = 2**31 - 1  # of what is counted
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_source(parser):
    """What a model and its tokenizer are read as, and from which revision."""
    loading = parser.add_argument_group("loading")
    loading.add_argument("--dtype", choices=DTYPES, default="auto", help="number format of the weights; auto: as they are stored (auto)")
    loading.add_argument("--revision", metavar="BRANCH", help="branch, tag or commit of a Hub repository (main)")
    loading.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model, where its architecture is its own")
    return loading


def source(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_source` for `load_whole` and `merge`."""
    return {name: getattr(args, name) for name in ("dtype", "revision", "trust_remote_code")}


def add_loading(parser) -> None:
    loading = add_source(parser)
    loading.add_argument("--device", help="where to run, such as cpu or cuda:1 (an accelerator if there is one)")


class TextHelp(argparse.Action):
    """The help of a command that takes a recipe's options about text besides its own."""

    def __call__(self, parser, *_) -> None:
        from .text import ReportArguments, TextArguments

        group = parser.add_argument_group("the text")
        group.add_argument("--config", metavar="FILE", help="A recipe's YAML file, which may have all of these.")
        for entry in (*fields(TextArguments), *fields(ReportArguments)):
            group.add_argument(f"--{entry.name}", help=entry.metadata["help"].replace("%", "%%"))
        parser.print_help()
        parser.exit()


def read_recipe(args: argparse.Namespace, *kinds: type) -> tuple:
    """A training recipe's options, those of some kinds, besides the command's own; whatever else its file says is of no concern here."""
    from .recipe_options import COMMAND_LINE, OptionParser, command_line, parse, refuse_option

    words, parser = command_line(args.recipe), OptionParser(kinds, allow_abbrev=False)
    try:
        with warnings.catch_warnings(action="ignore"):
            options, _, unknown = parse(parser, words)
        if unknown:
            refuse_option(COMMAND_LINE, unknown[0], parser, args.command)
    except YAMLError as error:
        raise UsageError("--config needs a YAML file.") from error
    except ValueError as error:
        raise UsageError(first_line(error)) from error
    return tuple(options)


def read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None and args.file is not None:
        raise UsageError("Give the prompt as an argument or with --file, not both.")
    try:
        if args.prompt is not None:
            prompt = args.prompt
            prompt.encode()  # bytes of a command line that are no UTF-8 come as surrogates
        else:
            prompt = (sys.stdin.read() if args.file is None else Path(args.file).read_text(encoding="utf-8")).removesuffix("\n")
    except OSError as error:
        raise UsageError(f"The prompt file {args.file} cannot be read: {error.strerror}.") from error
    except UnicodeError as error:
        place = "on the command line" if args.prompt is not None else f"in {args.file or 'standard input'}"
        raise UsageError(f"The prompt {place} is not text in UTF-8.") from error
    if not prompt.strip():
        raise UsageError("The prompt is empty.")
    return prompt


def read_vocabulary(path: str, revision: str | None = None) -> "ThinkingVocabulary":
    from .tokens import ThinkingVocabulary

    if revision is not None and Path(path).is_dir():
        raise UsageError(f"--revision is of a Hub repository, and {path} is a folder here: leave it out.")
    with loading(path):
        vocabulary = ThinkingVocabulary.stored_in(path, revision=revision)
    if vocabulary is None:
        raise UsageError(f"{path} has no thinking tokens: its config.json lacks the entry `thinktok`.")
    return vocabulary


def load(args: argparse.Namespace) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model and tokenizer of `args.model`, an adapter on its base, in `args.dtype` on `args.device`."""
    import torch

    from .peft import load_whole

    device = args.device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        torch.empty(0, device=device).cpu()  # the device meta holds nothing
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"The device {device} is not available here.") from error
    with loading(args.model):
        model, tokenizer = load_whole(args.model, **source(args))
    return model.to(device), tokenizer


@contextlib.contextmanager
def loading(path: str) -> Iterator[None]:
    """Makes one sentence of what `from_pretrained` raises."""
    from safetensors import SafetensorError

    with usage(SafetensorError, LookupError, RuntimeError, TypeError, before=f"{path} cannot be loaded: "), naming_trust():
        try:
            yield
        except OSError as error:
            if Path(path).is_dir():
                raise
            raise UsageError(f"{path} is neither a folder nor a Hub repository that can be read from here.") from error


@contextlib.contextmanager
def naming_trust() -> Iterator[None]:
    """transformers names its own argument, on a later line, where a model's code is not to be run."""
    try:
        yield
    except ValueError as error:
        if "`trust_remote_code=True`" not in str(error):
            raise
        raise ValueError("the model comes with code of its own. Where you trust it, give --trust_remote_code.") from error


def whole(lowest: int, highest: int = LARGEST):
    bounds = f"{lowest} or more" if highest == LARGEST else f"{lowest} to {highest}"

    def parse(text: str) -> int:
        value = int(text[:20]) if text.isdecimal() else lowest - 1
        if value > highest == LARGEST:
            raise argparse.ArgumentTypeError(f"must be at most {highest}; got {text!r}")
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"must be a whole number, {bounds}; got {text!r}")
        return value

    return parse


def file_to_write(text: str) -> Path:
    from .results import is_device, unwritable

    if (path := Path(text)).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: name a file")
    if not is_device(path) and (there := unwritable(path.absolute().parent)):
        raise argparse.ArgumentTypeError(f"nothing can be written to {there}: name another file")
    return path


def check_output(output: Path | None, read: Iterable[str | Path | None], mark: bytes) -> None:
    """An output takes the place of nothing that is read: no such file, and in such a folder only one that has this mark of what the command writes."""
    if output is None or not output.is_file():
        return
    for place in (Path(name) for name in read if name):
        is_in_it = place.is_dir() and output.resolve().is_relative_to(place.resolve())
        if (place.exists() and output.samefile(place)) or (is_in_it and mark not in _head(output)):
            raise UsageError(f"--output {output} is among what is read here: name another file.")


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(1 << 16)


def number(above: float, highest: float, meaning: str):
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (above < value <= highest and value < math.inf):
            raise argparse.ArgumentTypeError(f"must be a number {meaning}; got {text!r}")
        return value

    return parse
