"""Thinking tokens: vocabulary ids without text, on any causal LM and its tokenizer.

The tokens are ordinary special tokens of an ordinary checkpoint. Two things are not left to the libraries' defaults:

- **Initial rows.** `resize_token_embeddings` puts all new rows within 4e-6 of each other, so no thought could be told from another; and a
  random row of ordinary norm makes the thinking logits of a context swing by several nats. See `initial_rows`.
- **Injection.** Special tokens match literal text by default, so a user who types `<|think_0|>` would write into the model's thoughts. Here
  the thinking tokens are matched on normalized text, after a *guard* token that matches their common beginning on raw text: whatever
  a user types, the guard takes the beginning away before a thinking token can match. This is stored in `tokenizer.json` and so
  holds wherever `tokenizer.json` is what text is read with: plain transformers, chat templates, servers built on it. Formats that know no such tokens, as GGUF,
  do not keep it.
"""

import copy
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .architectures import LogitTransform, backbone
from .distributed import embedding_rows, weight_rows, whole
from .errors import first_line
from .models import evaluating, lm_head, longest_row

logger = logging.getLogger(__name__)

TEMPLATE = "<|think_{}|>"
GUARD = "<|think_"
# What a config calls the rows of the LM head where it tells them from the vocabulary; transformers leaves them as they are when it adds rows.
HEAD_ROWS = ("output_vocab_size", "unpadded_vocab_size")
# Rows are padded to a multiple of this: matrix units want it.
ROW_MULTIPLE = 64
# Part of a typical context's probability that starts on thinking. A few per cent: enough to be sampled, too little to harm text.
THINK_MASS = 0.03
# Standard deviation, in nats, that the thinking logits of one context start with: distinct thoughts, high entropy.
LOGIT_SPREAD = 1.0

# Noise of a row that starts as a copy of a text's token, in standard deviations of that row: several copies of one token are several thoughts.
COPY_NOISE = 0.3

# The whole distribution, for `model.generate`: what a model's own generation config cuts off would change how much it thinks.
NO_CUTS: dict[str, float | None] = {"top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None}

# One position in so many of the sample holds a thought.
THOUGHTS_EVERY = 4

# Ordinary prose, arithmetic and code, to calibrate the new rows where no text of the user's own is given.
SAMPLE_TEXT = (
    "The harbour was quiet before dawn. Two fishermen untied their boat, rowed past the lighthouse and waited for the tide to turn, "
    "talking about the price of diesel and whether the bridge would ever be finished. By noon they had sold everything they caught.",
    "A bakery sells 48 rolls in the morning and half as many in the afternoon. Each roll costs 3 dollars. In the morning it earns "
    "48 * 3 = 144 dollars. In the afternoon it sells 48 / 2 = 24 rolls and earns 24 * 3 = 72 dollars. Together that is 144 + 72 = 216.",
    "def running_mean(values, window):\n    total = 0.0\n    for i, value in enumerate(values):\n        total += value\n        if i >= window:\n"
    "            total -= values[i - window]\n        yield total / min(i + 1, window)\n\n\nclass Counter:\n    def __init__(self):\n        self.n = 0\n",
    "Water expands when it freezes, which is why ice floats. In most other liquids the solid sinks. The difference comes from the open "
    "lattice that hydrogen bonds hold in place; under high pressure this structure collapses and denser forms of ice appear.",
)


@dataclass(frozen=True)
class ThinkingVocabulary:
    """Which ids of a model are thoughts.

    Attributes:
        first_id: the first thinking id. Real tokens are all ids below it.
        num_tokens: how many thinking ids follow.
        guard_id: the id of the guard token (see the module's text); never predicted, never a thought.
    """

    first_id: int
    num_tokens: int
    guard_id: int

    @property
    def num_real(self) -> int:
        return self.first_id

    @property
    def num_rows(self) -> int:
        """Rows of an embedding that grows to hold all ids."""
        return math.ceil((self.guard_id + 1) / ROW_MULTIPLE) * ROW_MULTIPLE

    @property
    def ids(self) -> range:
        return range(self.first_id, self.first_id + self.num_tokens)

    @property
    def tokens(self) -> list[str]:
        return [TEMPLATE.format(i) for i in range(self.num_tokens)]

    def is_thought(self, ids: Tensor) -> Tensor:
        return (ids >= self.first_id) & (ids < self.first_id + self.num_tokens)

    @classmethod
    def from_config(cls, config) -> "ThinkingVocabulary | None":
        """The vocabulary that a model config carries, or `None` for a model that does not think."""
        if (entry := getattr(config, "thinktok", None)) is None:
            return None
        return cls(entry["first_id"], entry["num_tokens"], entry["guard_id"])

    @classmethod
    def stored_in(cls, path: str | Path, **kwargs) -> "ThinkingVocabulary | None":
        """The vocabulary that the `config.json` of a folder or Hub repository names, if it does; no code of a model's own is run for it."""
        config, _ = PreTrainedConfig.get_config_dict(path, **kwargs)
        if not config:
            raise ValueError(f"there is no config.json in {path}.")
        return cls.from_config(SimpleNamespace(**config))

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs) -> "ThinkingVocabulary":
        """Reads the vocabulary of a checkpoint folder or Hub repository from its `config.json` alone."""
        vocabulary = cls.stored_in(path, **kwargs)
        if vocabulary is None:
            raise ValueError(f"{path} has no thinking tokens: its config.json lacks the entry `thinktok`. Make them with `add_thinking_tokens`.")
        return vocabulary


def stored_options(path: str | Path, **kwargs) -> dict[str, Any]:
    """What the `config.json` of a thinking model's folder or Hub repository says of its tokens and of its training."""
    return PreTrainedConfig.get_config_dict(path, **kwargs)[0]["thinktok"]


def add_thinking_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int | None = None,
    sample_text: list[str] | tuple[str, ...] = SAMPLE_TEXT,
    think_mass: float = THINK_MASS,
    logit_spread: float = LOGIT_SPREAD,
    seed: int = 0,
    words: Sequence[str] = (),
) -> ThinkingVocabulary:
    """Gives a causal LM and its tokenizer thinking tokens, in place.

    A model that has them already keeps them. The vocabulary is never made smaller: free rows of a padded embedding are used first, and a
    larger one is padded to a multiple of 64.

    Args:
        num_tokens: how many; `None` means as many as the model has, or 16.
        sample_text: text like that of the training data; the new rows are calibrated on it.
        think_mass: mean probability of thinking that a context of `sample_text` starts with.
        logit_spread: standard deviation in nats between the thinking logits of one context at the start.
        seed: for the rows' directions, or their noise. It must be the same on every rank.
        words: texts of one token each that the rows start as noisy copies of, in turn, in place of random directions: the model may then begin by thinking
            in silence what it would write. `logit_spread` has no effect on such rows.

    Returns:
        `ThinkingVocabulary`: also written to `model.config.thinktok`.

    Raises:
        ValueError: the tokenizer and the model disagree, the model has another number of thinking tokens, its embedding or LM head cannot grow, or its
            generation config could not be saved; a word is not one token, or there are more of them than thinking tokens.
    """
    if num_tokens is not None and num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens} must be 1 or more.")
    if isinstance(sample_text, str):
        sample_text = [sample_text]
    existing = ThinkingVocabulary.from_config(model.config)
    rows = embedding_rows(model)
    check_vocabulary(model.config, tokenizer, num_tokens, rows)
    if existing is not None:
        if words:
            raise ValueError("The model has thinking tokens, which cannot start anew as copies of words (think_init_words): leave these out, or take its base.")
        return existing
    num_tokens = 16 if num_tokens is None else num_tokens
    _check_head(model, rows)
    copied = _ids_of_words(words, tokenizer, num_tokens)
    generation = _sampling_all(model.generation_config)

    pieces = tokenizer(GUARD, add_special_tokens=False)["input_ids"]
    tokenizer.add_tokens([AddedToken(TEMPLATE.format(i), special=True, normalized=True) for i in range(num_tokens)], special_tokens=True)
    tokenizer.add_tokens([AddedToken(GUARD, special=False, normalized=False)])
    ids = tokenizer.convert_tokens_to_ids([*(TEMPLATE.format(i) for i in range(num_tokens)), GUARD])
    vocabulary = ThinkingVocabulary(ids[0], num_tokens, ids[-1])
    if ids != list(range(ids[0], ids[0] + num_tokens + 1)) or ids[-1] + 1 != len(tokenizer):
        raise ValueError(
            f"{type(tokenizer).__name__} gave the thinking tokens the ids {ids}, which do not follow its other ids; such a tokenizer is not supported."
        )
    _refuse_injection(tokenizer, vocabulary)
    if tokenizer.decode([*vocabulary.ids], skip_special_tokens=True).strip():
        logger.warning(
            "%s does not take thinking tokens for special ones when it decodes, as its normalizer puts something before every text: skip_special_tokens=True "
            "shows thoughts with it. Leave out the ids that ThinkingVocabulary.is_thought finds, or use `thinktok generate`.",
            type(tokenizer).__name__,
        )

    if vocabulary.guard_id >= rows:
        rows = vocabulary.num_rows
        try:
            model.resize_token_embeddings(rows, mean_resizing=False)
        except AttributeError as error:  # xLSTM's own way to fill new rows
            raise ValueError(f"transformers cannot add rows to the embedding of {model.config.model_type}, and thinking tokens need them: {error}.") from error
        text = model.config.get_text_config()
        for name in HEAD_ROWS:
            if getattr(text, name, None) is not None:
                setattr(text, name, rows)
    with whole(model, written_by=0):
        _write_rows(model, tokenizer, vocabulary, pieces, sample_text, think_mass, logit_spread, seed, copied)

    model.config.thinktok = asdict(vocabulary)
    # Rows that belong to no token stay out of plain sampling; the guard is only ever read.
    unused = range(vocabulary.guard_id, rows)
    generation.suppress_tokens = sorted({*(generation.suppress_tokens or []), *unused})
    model.generation_config = generation
    return vocabulary


def check_vocabulary(config, tokenizer: PreTrainedTokenizerBase, num_tokens: int | None, num_rows: int | None = None) -> None:
    """Refuses a model and a tokenizer that do not belong together, before anything is changed.

    Args:
        config: the model's config.
        num_tokens: the thinking tokens asked for; `None` for whatever the model has.
        num_rows: the embedding's rows, where they are known better than `config.vocab_size`.
    """
    existing = ThinkingVocabulary.from_config(config)
    num_rows = config.get_text_config().vocab_size if num_rows is None else num_rows
    in_tokenizer = TEMPLATE.format(0) in tokenizer.get_vocab()
    if existing is None and in_tokenizer:
        raise ValueError(
            "The tokenizer has thinking tokens but the model has none: load both from the same checkpoint, or take the base model's own tokenizer."
        )
    if existing is None:
        _refuse_look_alikes(tokenizer)
        if not getattr(config, "return_dict", True):
            raise ValueError("The model's config has return_dict=False, and what it gives is looked up by name: set model.config.return_dict=True.")
    largest = max(tokenizer.get_vocab().values())
    if existing is not None:
        if tokenizer.convert_tokens_to_ids(TEMPLATE.format(0)) != existing.first_id or tokenizer.convert_tokens_to_ids(GUARD) != existing.guard_id:
            raise ValueError(
                f"The model thinks in the ids {existing.first_id} to {existing.ids[-1]}, which the tokenizer does not know: load both from the same "
                "checkpoint, or, where a trainer of this process added them, pass its processing_class."
            )
        if num_tokens is not None and num_tokens != existing.num_tokens:
            raise ValueError(
                f"The model has {existing.num_tokens} thinking tokens and {num_tokens} are asked for: set num_think_tokens={existing.num_tokens} "
                "(or leave it out) to train this checkpoint on, or start from its base model."
            )
        if largest > existing.guard_id:
            raise ValueError(
                f"The tokenizer has the token {tokenizer.convert_ids_to_tokens(largest)!r} after the thinking tokens, which are to be the last: add tokens, "
                "and a chat template with tokens of its own (chat_template_path), to the base model before it gets thinking tokens."
            )
    if largest >= num_rows:
        raise ValueError(f"The tokenizer has ids up to {largest} and the model {num_rows} embedding rows: they do not belong together.")


def _refuse_look_alikes(tokenizer: PreTrainedTokenizerBase) -> None:
    """The guard is found in a text before tokens that are looked for in the normalized one, and would break those that it is a part of."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.content == GUARD or re.fullmatch(TEMPLATE.replace("|", r"\|").format(r"\d+"), token.content):
            raise ValueError(f"The tokenizer has the token {token.content!r} already, which thinking tokens need for themselves: take one without it.")
        if GUARD in token.content and token.normalized:
            raise ValueError(
                f"The tokenizer's token {token.content!r} would no longer be read, as thinking tokens begin with {GUARD!r} too: "
                f"add it as AddedToken({token.content!r}, normalized=False), or under another name."
            )


def _check_head(model: PreTrainedModel, rows: int) -> None:
    """A new token needs a row in the embedding and one in the LM head, of the same number and nothing else: that is what transformers adds."""
    head, family = lm_head(model), model.config.model_type
    if more := [name for name, _ in head.named_parameters() if name not in ("weight", "bias")]:
        raise ValueError(f"The LM head of {family} has more than weight and bias ({', '.join(more)}), which does not grow with the vocabulary: not supported.")
    if (made := weight_rows(head)) != rows:
        raise ValueError(
            f"The LM head of this {family} has {made} rows and its embedding {rows}: some ids are only read, and thinking tokens behind them would be saved "
            "as a model that cannot be loaded. Not supported."
        )


def _ids_of_words(words: Sequence[str], tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[int]:
    """The token that each thinking token is to start as a copy of; none without words."""
    if len(words) > num_tokens:
        raise ValueError(f"{num_tokens} thinking tokens cannot be copies of {len(words)} words (think_init_words): give fewer, or raise num_think_tokens.")
    pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    for word, piece in zip(words, pieces, strict=True):
        if len(piece) != 1:
            raise ValueError(f"The word {word!r} (think_init_words) is {len(piece)} tokens of this tokenizer, and a thinking token is a copy of one.")
    return [pieces[i % len(words)][0] for i in range(num_tokens)] if words else []


def _sampling_all(config: GenerationConfig) -> GenerationConfig:
    """The same generation config for a model that thinks: plain `generate` draws from the whole distribution, where a base's own cuts, or the likeliest token
    alone, would leave out thinking tokens, each of which is improbable.

    Raises:
        ValueError: transformers would not save it, and would say so after training only.
    """
    config = copy.deepcopy(config)
    config.update(do_sample=True, temperature=1.0, **NO_CUTS)
    try:
        config.validate(strict=True)
    except ValueError as error:
        flags = ", ".join(re.findall(r"^- `(\w+)`", str(error), re.MULTILINE)) or first_line(error).rstrip(".")
        raise ValueError(
            f"transformers would not save this model's generation config, in which other flags contradict or rule out some ({flags}): take them out of "
            "generation_config.json or model.generation_config."
        ) from error
    return config


def _refuse_injection(tokenizer, vocabulary) -> None:
    """The guard holds as long as the tokenizer's normalizer makes none of its characters from another one (as lowercasing and NFKC do), and drops none."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer is not None:
        forged = {"x", *("x" + character for character in GUARD)}
        for point in (*range(0xD800), *range(0xE000, 0x30000)):
            if chr(point) not in GUARD and normalizer.normalize_str("x" + chr(point)).removeprefix("▁") in forged:
                raise ValueError(
                    f"{type(tokenizer).__name__} rewrites {chr(point)!r} before it matches tokens, so a text could be made into a thinking token. "
                    "Thinking tokens need a tokenizer that does not lowercase, strip or fold characters."
                )
    for text in (*vocabulary.tokens, " " + vocabulary.tokens[0], "a" + vocabulary.tokens[-1] + "b", "\n".join(vocabulary.tokens)):
        if any(i in vocabulary.ids for i in tokenizer(text)["input_ids"]):
            raise ValueError(
                f"{type(tokenizer).__name__} turns the literal text {text[:40]!r} into a thinking token, so anybody could write the model's thoughts. "
                "It needs a tokenizer of the tokenizers library (one with a tokenizer.json, a PreTrainedTokenizerFast)."
            )


@torch.no_grad()
def _write_rows(model, tokenizer, vocabulary, guard_pieces, sample_text, think_mass, logit_spread, seed, copied) -> None:
    """Fills the thinking rows, the guard's and the padding rows of the input and the output embedding."""
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = inputs is outputs or inputs.data_ptr() == outputs.data_ptr()
    first, last, num_real = vocabulary.first_id, vocabulary.guard_id, vocabulary.num_real
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        bias[first:] = 0.0
    output_norm = _typical_norm(outputs[:num_real])
    directions_ND = torch.randn(vocabulary.num_tokens, inputs.shape[1], generator=torch.Generator().manual_seed(seed))
    if copied:
        inputs[first:last] = _noisy(inputs[copied], directions_ND).to(inputs)
    elif not tied:
        inputs[first:last] = (directions_ND * (_typical_norm(inputs[:num_real]).cpu() / directions_ND.norm(dim=-1, keepdim=True))).to(inputs)
    inputs[last] = inputs[guard_pieces].float().mean(0).to(inputs.dtype)
    # Calibrated on text first, then also on contexts that end in a thought: those decide whether thinking goes on, and depend on the rows themselves.
    for thoughts_every in (None, THOUGHTS_EVERY):
        hidden_MD = _sample_hidden(model, tokenizer, sample_text, vocabulary, thoughts_every)
        outputs[first:last] = initial_rows(
            hidden_MD,
            outputs[:num_real],
            getattr(model.get_output_embeddings(), "bias", None),
            LogitTransform.from_config(model.config),
            directions_ND,
            norm=output_norm if tied else None,
            think_mass=think_mass,
            logit_spread=logit_spread,
            copied_ND=_noisy(outputs[copied], directions_ND) if copied else None,
        ).to(outputs.dtype)
    if not tied:
        inputs[last + 1 :] = inputs[last]  # nobody reads them, and as they were made no two runs would save the same
    # Output rows that nothing may choose point away from what hidden states have in common; a tied guard is read and keeps its input row.
    mean_D = hidden_MD.mean(0)
    outputs[last + tied :] = (-output_norm * mean_D / mean_D.norm().clamp_min(1e-12)).to(outputs.dtype)


def _noisy(rows_ND: Tensor, directions_ND: Tensor) -> Tensor:
    rows_ND = rows_ND.float()
    return rows_ND + COPY_NOISE * rows_ND.std(-1, keepdim=True) * directions_ND.to(rows_ND)


def initial_rows(
    hidden_MD: Tensor,
    real_VD: Tensor,
    bias_R: Tensor | None,
    transform,
    noise_ND: Tensor,
    norm,
    think_mass: float,
    logit_spread: float,
    copied_ND: Tensor | None = None,
) -> Tensor:
    """Output rows for thinking tokens: distinct directions, and about the same think mass in every context.

    Each row is a shared part and a part of its own. The shared part is a ridge regression of log Z_real on the hidden state, so that the
    thinking logits rise and fall with the real ones; without it SmolLM2's log Z (standard deviation 7 nats between contexts) makes the
    think mass nearly 0 in one context and nearly 1 in the next. The own part is a random direction that avoids what hidden states vary in,
    as much as it takes for the logits of one context to spread by `logit_spread`: a random direction of ordinary norm spreads them by 7 nats on
    SmolLM2, which is a frozen choice of thought.

    Args:
        hidden_MD: hidden states of sample contexts at the LM head, fp32.
        real_VD: real output rows.
        noise_ND: a random direction for each row.
        norm: the norm that the rows get (tied embeddings: the rows are inputs too), or `None` for whatever the logits ask for.
        copied_ND: copies of real rows, which take the place of both parts: their logits rise and fall with the real ones.

    Returns:
        `[N, D]` rows in fp32.
    """
    num_samples, size = hidden_MD.shape
    real_DV, bias_V = real_VD.float().T, 0 if bias_R is None else bias_R[: len(real_VD)].float()
    log_z_M = torch.cat([transform(tile_MD @ real_DV + bias_V).logsumexp(-1) for tile_MD in hidden_MD.split(256)])  # of all at once: gigabytes
    covariance_DD = hidden_MD.T @ hidden_MD / num_samples
    ridge = 0.1 * covariance_DD.diagonal().mean()
    shared_D = torch.linalg.solve(covariance_DD + ridge * torch.eye(size).to(covariance_DD), hidden_MD.T @ log_z_M / num_samples)
    shared_D = shared_D / transform.scale

    noise_ND = noise_ND.to(hidden_MD)
    values, basis_DD = torch.linalg.eigh(covariance_DD)
    values = values.clamp_min(0)

    def own_part(log_damping: float) -> Tensor:
        rows = (noise_ND @ basis_DD * (values + values.mean() * 10**log_damping).rsqrt()) @ basis_DD.T
        target = math.sqrt(max(norm**2 - shared_D.norm() ** 2, 0.25 * norm**2)) if norm is not None else 1.0
        return rows / rows.norm(dim=-1, keepdim=True) * target

    def spread(rows: Tensor) -> float:
        return (hidden_MD @ rows.T * transform.scale).std(-1, correction=min(1, len(rows) - 1)).mean().item()

    if copied_ND is not None:
        own_ND, shared_D = copied_ND, torch.zeros_like(shared_D)
    elif norm is None:
        own_ND = own_part(8.0)
        # A thought of one token has no others to differ from.
        own_ND = own_ND * (logit_spread / max(spread(own_ND), 1e-6) if len(noise_ND) > 1 else 0.0)
    else:
        own_ND = own_part(_bisect(lambda log_damping: spread(own_part(log_damping)) - logit_spread, -6.0, 8.0))

    # What is left to set is the height: a step along the mean hidden state moves all logits alike.
    step_D = hidden_MD.mean(0) / hidden_MD.mean(0).square().sum().clamp_min(1e-12)

    def mass(height: float) -> float:
        think = transform(hidden_MD @ (own_ND + shared_D + height * step_D).T).logsumexp(-1)
        return torch.sigmoid(think - log_z_M).mean().item()

    common_D = shared_D + _bisect(lambda height: mass(height) - think_mass, -60.0, 60.0) * step_D
    if norm is not None:  # an untrained model may ask for rows of any size; as inputs they keep to an ordinary one
        room = math.sqrt(max((1.2 * norm) ** 2 - own_ND.norm(dim=-1).mean().item() ** 2, (0.5 * norm) ** 2))
        common_D = common_D * min(1.0, room / max(common_D.norm().item(), 1e-12))
    return own_ND + common_D


def _bisect(function, low: float, high: float) -> float:
    """Where an increasing function crosses zero, or the nearer end."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return (low + high) / 2


def _typical_norm(rows: Tensor) -> Tensor:
    return rows[:: max(1, len(rows) // 4096)].float().norm(dim=-1).median()


def _sample_hidden(model, tokenizer, sample_text, vocabulary: ThinkingVocabulary, thoughts_every: int | None, window: int = 256) -> Tensor:
    """Hidden states at the LM head over `sample_text`, without the first position of each window, `[M, D]` in fp32.

    Args:
        sample_text: as much of it is read as makes four contexts for every hidden dimension.
        thoughts_every: put a random thought in the place of one token in so many; `None` for text alone.
    """
    ids = [i for text in sample_text for i in tokenizer(text)["input_ids"]][: 4 * model.get_output_embeddings().weight.shape[1]]
    if len(ids) < 2:
        raise ValueError("sample_text has no context to calibrate thinking tokens on: give a few sentences like those of the training data, or leave it out.")
    window = min(window, len(ids), longest_row(model))
    rows = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
    if thoughts_every is not None:
        generator = torch.Generator().manual_seed(0)
        thoughts = vocabulary.first_id + torch.randint(vocabulary.num_tokens, rows.shape, generator=generator)
        rows = torch.where(torch.rand(rows.shape, generator=generator) < 1 / thoughts_every, thoughts, rows)
    rows = rows.to(model.device)
    with evaluating(model):
        return torch.cat([backbone(model)(row, use_cache=False).last_hidden_state[:, 1:].flatten(0, 1).float() for row in rows.split(4)])
