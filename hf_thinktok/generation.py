"""Watching and steering a model that thinks, in plain `model.generate`.

None of them is needed to think: thinking tokens are ordinary ids of an ordinary softmax, and vanilla `generate` draws them. `ThinkingStreamer` prints
them as they come, `ThinkingBudget` bounds how many there are, and `think_while_reading` puts them into a prompt.

    budget = ThinkingBudget(vocabulary, max_think_length=4)
    model.generate(**inputs, do_sample=True, logits_processor=[budget], streamer=ThinkingStreamer(tokenizer))
"""

import math

import torch
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from .callbacks import TEXT_STYLE, THOUGHT_STYLE
from .forks import ends_of
from .tokens import GUARD, TEMPLATE, ThinkingVocabulary

THOUGHTS = ("show", "hide")
# Nats either way: more than any logits differ, and within what 16 bits hold.
MOST_BIAS = 10_000
# What a byte-level tokenizer decodes the first bytes of an unfinished character to.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class PieceDecoder:
    """Text as its tokens come, piece by piece: joined, the pieces are what decoding all tokens in one go gives, without the clean-up of spaces."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.before: list[int] = []  # the tokens of the last piece
        self.held: list[int] = []  # those of an unfinished character

    def put(self, token: int) -> str:
        """What the token adds; nothing while a character is unfinished."""
        self.held.append(token)
        return "" if self._decode(self.before + self.held).endswith(INCOMPLETE) else self.end()

    def end(self) -> str:
        """What is held back, as it is."""
        # The piece before is decoded along: some decoders drop the space that a text begins with, and this is no beginning.
        piece = self._decode(self.before + self.held)[len(self._decode(self.before)) :]
        self.before, self.held = self.held or self.before, []
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


class ThinkingStreamer(BaseStreamer):
    """Prints one sequence while `model.generate(streamer=...)` makes it: text in blue, thoughts in cyan, as in `The ‹3 0 7›answer`.

    Thoughts are numbered 0 to N-1 within the thinking vocabulary. Text is exactly what decoding the real tokens in one go gives (without the
    clean-up of spaces, which would take back what is printed already); other special tokens are not printed. It can be used for one
    generation after another.

    Args:
        tokenizer: of the model.
        vocabulary: which ids are thoughts; `None`: as the tokenizer has them, which may be none.
        thoughts: `show` or `hide`.
        skip_prompt: print only what the model adds.
        console: a rich console to print on; `None`: standard output.

    Raises:
        ValueError: `thoughts` is neither `show` nor `hide`; or, while streaming, the batch has more than one sequence.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: ThinkingVocabulary | None = None,
        thoughts: str = "show",
        skip_prompt: bool = True,
        console: Console | None = None,
    ):
        if thoughts not in THOUGHTS:
            raise ValueError(f"thoughts must be one of {', '.join(THOUGHTS)}; got {thoughts!r}.")
        self.tokenizer = tokenizer
        self.vocabulary = _vocabulary_of(tokenizer) if vocabulary is None else vocabulary
        self.thoughts = thoughts
        self.skip_prompt = skip_prompt
        self.console = Console(highlight=False) if console is None else console
        self.silent_ids = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
        self._begin()

    def _begin(self) -> None:
        self.at_prompt = True
        self.in_thought = False
        self.pieces = PieceDecoder(self.tokenizer)

    def put(self, value: Tensor) -> None:
        """Takes the prompt, then each new token; called by `generate`."""
        if value.ndim > 1 and value.shape[0] > 1:
            raise ValueError(f"ThinkingStreamer prints one sequence at a time and got a batch of {value.shape[0]}.")
        skip, self.at_prompt = self.at_prompt and self.skip_prompt, False
        if skip:
            return
        for token in value.flatten().tolist():
            if self.vocabulary is not None and token in self.vocabulary.ids:
                self._put_thought(token - self.vocabulary.first_id)
            elif token not in self.silent_ids:
                self._put_real(token)

    def _put_thought(self, number: int) -> None:
        if self.thoughts == "show":
            self._print(f" {number}" if self.in_thought else f"‹{number}", THOUGHT_STYLE)
            self.in_thought = True

    def _put_real(self, token: int) -> None:
        self._close_thought()
        self._print(self.pieces.put(token), TEXT_STYLE)

    def end(self) -> None:
        """Prints what is left and a line break; called by `generate`."""
        self._close_thought()
        self._print(self.pieces.end() + "\n", TEXT_STYLE)
        self._begin()

    def _close_thought(self) -> None:
        if self.in_thought:
            self._print("›", THOUGHT_STYLE)
            self.in_thought = False

    def _print(self, text: str, style: str) -> None:
        # A bare segment: rich would wrap and crop each piece as if it began a line, and replace tabs.
        self.console.print(Segments([Segment(text, Style.parse(style))]), end="", soft_wrap=True)


def _vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> ThinkingVocabulary | None:
    ids = tokenizer.get_vocab()
    if TEMPLATE.format(0) not in ids:
        return None
    first, guard = ids[TEMPLATE.format(0)], ids[GUARD]
    return ThinkingVocabulary(first, guard - first, guard)


class StopsInText(StoppingCriteria):
    """Stop strings looked for in what is said, for `model.generate(stopping_criteria=[...])`: with thoughts in between `stop_strings` of `generate` would not
    see them, and would see the names of thoughts.

    Args:
        stop_strings: as of `generate`.
        prompt_length: tokens (padding included) at the beginning of each row in which nothing is looked for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: str | list[str], vocabulary: ThinkingVocabulary, prompt_length: int = 0):
        self.stops, self.vocabulary, self.prompt_length = StopStringCriteria(tokenizer, stop_strings), vocabulary, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        ids_BT = input_ids[:, self.prompt_length :].cpu()  # once, and not for each row
        thought_BT = self.vocabulary.is_thought(ids_BT)
        said = (row_T[~thought_T] for row_T, thought_T in zip(ids_BT, thought_BT, strict=True))
        done_B = torch.tensor([len(row_T) > 0 and bool(self.stops(row_T[None], scores)) for row_T in said])
        return (done_B & ~thought_BT[:, -1]).to(input_ids.device)  # or a prompt might stop what is thought first


class ThinkingBudget(LogitsProcessor):
    """How much a model may, must and tends to think, for `model.generate(logits_processor=[...])`. By default it changes nothing.

    Lengths count thinking tokens in a row before a real token, those that the prompt ends with included; the end of the sequence is a real token
    as well. Where `max_total_think` is used up, the model speaks, whatever `min_think_length` says. The bounds hold for each sequence of a batch or beam.

    Args:
        vocabulary: which ids are thoughts.
        min_think_length: thinking tokens before every real token at least.
        max_think_length: thinking tokens in a row at most; 0: never think; `None`: no bound.
        max_total_think: thinking tokens in one generation at most, the prompt's not counted; `None`: no bound.
        think_bias: nats added to every thinking logit, so that the odds of thinking change by `exp(think_bias)`. With beams, whose scores are sums, give
            `generate` the option `renormalize_logits=True`.
        prompt_length: tokens (padding included) of the prompt, for `max_total_think`. `None`: a generation is recognised by its prompts and by growing
            one token at a time, so one object serves many `generate` calls; call `reset` before a prompt that is what the last call returned. Give it for
            assisted decoding, which takes tokens back.
        by_gate: think where that is likelier than to speak, and else speak. For generation without sampling: a thought is one of many, so the likeliest id
            may be a word where the model rather thinks.

    Raises:
        ValueError: an argument is out of its range, or the bounds contradict each other.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        vocabulary: ThinkingVocabulary,
        min_think_length: int = 0,
        max_think_length: int | None = None,
        max_total_think: int | None = None,
        think_bias: float = 0.0,
        prompt_length: int | None = None,
        by_gate: bool = False,
    ):
        if not isinstance(vocabulary, ThinkingVocabulary):
            raise ValueError(
                "vocabulary must be a ThinkingVocabulary, such as ThinkingVocabulary.from_config(model.config), or of an adapter "
                f"ThinkingVocabulary.stored_in(its folder); got {vocabulary!r}."
            )
        if not isinstance(min_think_length, int) or min_think_length < 0:
            raise ValueError(f"min_think_length must be an integer, 0 or more; got {min_think_length!r}.")
        for name, value in (("max_think_length", max_think_length), ("max_total_think", max_total_think), ("prompt_length", prompt_length)):
            if value is not None and (not isinstance(value, int) or value < 0):
                raise ValueError(f"{name} must be None or an integer, 0 or more; got {value!r}.")
        if max_think_length is not None and max_think_length < min_think_length:
            raise ValueError(f"A thought cannot have at least {min_think_length} and at most {max_think_length} thinking tokens.")
        if max_total_think is not None and max_total_think < min_think_length:
            raise ValueError(f"A thought of at least {min_think_length} thinking tokens does not fit into {max_total_think} in all.")
        if not isinstance(think_bias, int | float) or not abs(think_bias) <= MOST_BIAS:
            raise ValueError(f"think_bias must be a number of nats, {MOST_BIAS:,} at most; got {think_bias!r}. To never think set max_think_length=0.")
        self.vocabulary = vocabulary
        self.min_think_length, self.max_think_length, self.max_total_think = min_think_length, max_think_length, max_total_think
        self.think_bias = think_bias
        self.prompt_length = prompt_length
        self.by_gate = by_gate
        self.reset()

    def reset(self) -> None:
        """The next call begins a generation, whatever its prompt: what one generation returned looks like its own next step."""
        self._prompts = torch.empty(0, 0, dtype=torch.long)
        self._length = -1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        thinking_V = self.vocabulary.is_thought(torch.arange(scores.shape[-1], device=scores.device))
        if self.think_bias:
            scores = torch.where(thinking_V, scores + self.think_bias, scores)
        run_B = self._run(input_ids)
        full_B = torch.zeros_like(run_B, dtype=torch.bool)
        if self.max_think_length is not None:
            full_B |= run_B >= self.max_think_length
        if self.max_total_think is not None:
            full_B |= self.vocabulary.is_thought(input_ids[:, self._start(input_ids) :]).sum(-1) >= self.max_total_think
        can_think_B = (thinking_V & (scores > -math.inf)).any(-1)  # what another processor ruled out cannot be asked for
        full_B &= (~thinking_V & (scores > -math.inf)).any(-1)
        must_B = (run_B < self.min_think_length) & ~full_B & can_think_B
        if self.by_gate:
            thinks_B = torch.where(thinking_V, scores, -math.inf).logsumexp(-1) > torch.where(thinking_V, -math.inf, scores).logsumexp(-1)
            full_B |= ~thinks_B & ~must_B
            must_B |= thinks_B & ~full_B
        return scores.masked_fill(full_B[:, None] & thinking_V | must_B[:, None] & ~thinking_V, -math.inf)

    def _run(self, input_ids: Tensor) -> Tensor:
        """Thinking tokens that each sequence ends with, counted as far as the bounds need it."""
        last = input_ids[:, -min(max(self.min_think_length, self.max_think_length or 0, 1), input_ids.shape[1]) :]
        return self.vocabulary.is_thought(last).flip(-1).int().cumprod(-1).sum(-1)

    def _start(self, input_ids: Tensor) -> int:
        """Where the generation under way began. Beams change places only under the same prompt, so the prompts tell one generation from another."""
        if self.prompt_length is not None:
            return self.prompt_length
        goes_on = input_ids.shape == (len(self._prompts), self._length + 1)
        if not goes_on or not torch.equal(input_ids[:, : self._prompts.shape[1]], self._prompts):
            self._prompts = input_ids.clone()
        self._length = input_ids.shape[1]
        return self._prompts.shape[1]


def think_while_reading(
    model, input_ids: Tensor, vocabulary: ThinkingVocabulary, markers: list[list[int]], think_length: int, least: int | None = None, **options
) -> Tensor:
    """A prompt with a thought after each of its markers, as a model reads that was trained with `fork_positions: markers` and `memory: persistent`.

    At the prompt's own end there is none: `model.generate` goes on from there.

    Args:
        input_ids: the prompt, `[1, T]`.
        markers: the ids of each marker (`forks.marker_ids`).
        think_length: thinking tokens of each thought, or at most.
        least: at least so many, and then as the model's gate wants; `think_length` where not given.
        options: for `model.generate`, such as `do_sample`.

    Returns:
        `[1, T + thoughts]`.

    Raises:
        ValueError: there is more than one prompt.
    """
    if len(input_ids) != 1:
        raise ValueError(f"think_while_reading reads one prompt at a time and got a batch of {len(input_ids)}.")
    if think_length == 0:
        return input_ids
    samples = options.get("do_sample", model.generation_config.do_sample)
    budget = ThinkingBudget(vocabulary, think_length if least is None else least, think_length, by_gate=not samples)
    read, begin = input_ids[:, :0], 0
    for end in (1 + ends_of(markers, input_ids)[0, :-1].nonzero().flatten()).tolist():
        read, begin = torch.cat([read, input_ids[:, begin:end]], 1), end
        end_of_text = read.shape[1]
        budget.reset()
        plain = {"attention_mask": torch.ones_like(read), "max_new_tokens": think_length, "return_dict_in_generate": False}
        read = model.generate(read, logits_processor=[budget], **plain, **options)
        thought_T = vocabulary.is_thought(read[0, end_of_text:]).long().cumprod(0)
        read = read[:, : end_of_text + int(thought_T.sum())]  # a word that the gate would rather say is not the prompt's
    return torch.cat([read, input_ids[:, begin:]], 1)
