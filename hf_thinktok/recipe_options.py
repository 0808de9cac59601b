"""The options of a recipe: what `--help` shows of them, and how they are read from the command line and a YAML file."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments
from trl import ModelConfig, SFTConfig, TrlParser

from .config import ThinkTokConfig
from .config_checks import default_of

FROM_A_FILE = "Options may stand in a YAML file, `--config FILE`; those of the command line come before them."
COMMAND_LINE = "The command line"
ITS_OWN_SEED = "seed has no effect here, where each run has one of its own: give seeds."


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the options, and a recipe's description as it was written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.const is False:  # transformers gives --no_disable_dropout the help of its opposite
            return f"Sets {action.dest} to false."
        return super()._get_help_string(action)


class OptionParser(TrlParser):
    """Refuses a config's numbers where a text belongs: they would only fail where it is read."""

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        for entry in (entry for kind in self.dataclass_types for entry in fields(kind) if entry.type in (str, str | None)):
            if isinstance(value := config.get(entry.name), int | float) and not isinstance(value, bool):  # resume_from_checkpoint may be true
                raise ValueError(f"{entry.name}={value!r} is no text: put it in quotes.")
        return super().set_defaults_with_config(**config)


def recipe_parser(doc: str, *kinds: type) -> TrlParser:
    """A parser of these dataclasses whose help has a group for each, and thinking apart from what transformers and TRL know.

    Args:
        doc: the recipe's docstring.
    """
    described = {"usage": "%(prog)s [--config FILE] [--option value ...]", "description": f"{doc.strip()}\n\n{FROM_A_FILE}"}
    parser = OptionParser(kinds, **described, formatter_class=_Help, allow_abbrev=False)
    trained = {entry.name for entry in fields(SFTConfig)}
    models = {entry.name for entry in fields(ModelConfig)}
    own = {entry.name for kind in kinds if kind not in (ThinkTokConfig, ModelConfig) for entry in fields(kind)} - trained
    groups = {
        "this recipe": own,
        "thinking": {entry.name for entry in fields(ThinkTokConfig)} - trained - own,
        "model": models - trained - own,
        "training, of TRL": trained - {entry.name for entry in fields(TrainingArguments)},
        "training, of transformers": trained,
    }
    left = list(parser._optionals._group_actions)
    for title, names in groups.items():
        chosen = [action for action in left if action.dest in names]
        left = [action for action in left if action.dest not in names]
        if chosen:
            parser.add_argument_group(title)._group_actions.extend(chosen)
    parser._optionals._group_actions[:] = left
    return parser


def command_line(words: Sequence[str] | None = None) -> list[str]:
    """The words of a command line, by default of this one, in the form that TRL knows a config by."""
    words = sys.argv[1:] if words is None else words
    return [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]


def parse(parser: TrlParser, words: Sequence[str]) -> tuple[list[Any], list[str], list[str]]:
    """The parser's dataclasses, and the options of the config and of the command line that it does not know.

    Raises:
        ValueError: the config is not there, or a value cannot be read.
        YAMLError: the config is no YAML.
    """
    if words and words[-1] == "--config":
        raise ValueError("--config needs a YAML file.")

    def refuse(message: str):
        raise ValueError(f"{message[0].upper()}{message[1:].rstrip('.')}.")

    parser.error = refuse
    try:
        *options, of_file, of_line = parser.parse_args_and_config(words, return_remaining_strings=True, separate_remaining_strings=True)
    except OSError as error:
        raise ValueError(f"The file {error.filename} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"The file {words[words.index('--config') + 1]} is not in UTF-8: save it so.") from error
    return options, of_file, of_line


def read_options(parser: TrlParser, words: Sequence[str] | None = None) -> tuple[Any, ...]:
    """The parser's dataclasses as they are told.

    Args:
        words: by default the command line's.

    Raises:
        ValueError, YAMLError: as `parse`; or an option is not known, of which the nearest is named.
    """
    words = command_line() if words is None else words
    options, of_file, of_line = parse(parser, words)
    if of_file or of_line:
        refuse_option(words[words.index("--config") + 1] if of_file else COMMAND_LINE, (of_file or of_line)[0], parser)
    return tuple(options)


def read_config(kinds: Sequence[type], config: dict[str, Any], where: str) -> tuple[Any, ...]:
    """The dataclasses as a config tells them.

    Args:
        where: what the config is of, as the beginning of a sentence.

    Raises:
        ValueError: an option is not known, of which the nearest is named, or a value cannot be.
    """
    parser = OptionParser(kinds, allow_abbrev=False)
    if unknown := parser.set_defaults_with_config(**config):
        refuse_option(where, unknown[0], parser)
    return parser.parse_args_into_dataclasses([])


def check_seeds(args: ThinkTokConfig) -> None:
    """Of a recipe that makes several runs and gives each its own seed.

    Raises:
        ValueError: the one of `TrainingArguments` is set as well.
    """
    if args.seed != default_of(ThinkTokConfig, "seed"):
        raise ValueError(ITS_OWN_SEED)


def refuse_option(where: str, option: str, *parsers: argparse.ArgumentParser) -> None:
    """Raises a ValueError that names the nearest option that one of the parsers knows."""
    if where == COMMAND_LINE and not option.startswith("--"):
        raise ValueError(f"{where} has {option!r}, which is the value of no option: give it after one, or leave it out.")
    name = option.split("=")[0].removeprefix("--")
    known = [word.removeprefix("--") for parser in parsers for action in parser._actions for word in action.option_strings]
    near = difflib.get_close_matches(name, known, n=1)
    raise ValueError(f"{where} has the option {name}, which is not known" + (f"; did you mean {near[0]}?" if near else "."))
