"""A small model from scratch, and a tokenizer of the text that it is for: where thousands of steps are wanted, and a pretrained model's would take days.

    python recipes/small_model.py --config recipes/small_text/model.yaml

Writes a folder for the `model_name_or_path` of recipes/pretrain_think.py and recipes/compare.py. Its weights are random, so train it on text alone first
(`num_think_tokens: 0`). The tokenizer is made of the text that is trained on, without what `held_out_documents` and `test_documents` keep from it.
"""

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, set_seed

from hf_thinktok.data import text_of
from hf_thinktok.errors import one_sentence
from hf_thinktok.loading import read_mappings
from hf_thinktok.recipe_options import read_options, recipe_parser
from hf_thinktok.sources import from_scratch
from hf_thinktok.text import TextArguments, load_parts

END = "<|endoftext|>"


@dataclass
class SmallModelArguments(TextArguments):
    """The model, and the text of its tokenizer."""

    model_shape: dict[str, Any] | str | None = field(default=None, metadata={"help": "Config of the model, with its model_type (JSON on the command line)."})
    vocab_size: int = field(default=512, metadata={"help": "Tokens of the tokenizer (byte-level BPE): 257 at least, for 256 bytes and the end of a text."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights."})
    output_dir: str = field(default="outputs/small_model", metadata={"help": "Where model and tokenizer go."})

    def __post_init__(self):
        super().__post_init__()
        read_mappings(self, "model_shape")
        if "model_type" not in (self.model_shape or {}):
            raise ValueError("There is no model: give model_shape with a model_type, as recipes/small_text/model.yaml does.")
        if self.vocab_size < 257:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 257: all bytes, and the end of a text.")


def train_tokenizer(texts: Any, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of some texts, which reads every other text as well."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def main(options: SmallModelArguments) -> None:
    train, _, _ = load_parts(options)
    tokenizer = train_tokenizer((text_of(row, None) for row in train), options.vocab_size)
    set_seed(options.seed)
    model = from_scratch(options.model_shape, tokenizer)
    for part in (model, tokenizer):
        part.save_pretrained(options.output_dir)
    Console(highlight=False).print(f"{options.output_dir}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    with one_sentence():
        main(*read_options(recipe_parser(__doc__, SmallModelArguments)))
