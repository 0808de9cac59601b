"""Held-out text without thoughts, with them, and with every control that a sceptic asks for, at the same places.

Shape suffixes as in tree.py; S samples, F forks of the whole text.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import text_of
from ..engine import Engine, choose_engine
from ..forks import choose_forks, eligible_forks, ends_of, marker_ids
from ..generation import PieceDecoder
from ..head import HeadInputs, with_head
from ..models import EVALUABLE, evaluating, longest_row, unwrapped, without_autocast
from ..objective import speak
from ..results import digest_of, written_whole
from ..rewards import masked_sum
from ..rollout import Rollout, Sampling, random_thoughts, sample_thoughts
from ..scores import score_tree
from ..thoughts import another_row, at_same_places
from ..tokens import ThinkingVocabulary
from ..tree import Branching, ThoughtTree, before
from .intervals import bits_per_token

logger = logging.getLogger(__name__)

# What the model does at a fork, and what is put there in place of its thought.
PLACED = {
    "no_think": "no thought",
    "think": "where it wants to",
    "think_random": "where it wants to, random tokens",
    "always": "a thought everywhere",
    "shuffled": "its tokens shuffled",
    "earlier": "from an earlier place of the row",
    "other_document": "from another document",
    "random": "random tokens",
}
# What each way to think is compared with; as many random tokens come last.
CONTROLS = {"think": ("think_random",), "always": ("shuffled", "earlier", "other_document", "random")}
RANDOM = {arm: controls[-1] for arm, controls in CONTROLS.items()}
GROUPS = ("logps", "marginal", "correct")  # what an `Evaluation` knows of each arm
BUCKETS = 4


@dataclass
class Evaluation:
    """What was measured, fork by fork.

    Attributes:
        documents_F: which document each fork is in.
        tokens_F: how many real tokens judge it.
        logps: for each arm the log-probability of those tokens in nats, a mean over samples, `[F]`; NaN where the arm has nothing to put there.
        marginal: for `think` and `always` the log of the mean probability over samples, `[F]`.
        correct: for each arm how many of the tokens were the first choice, `[F]`.
        entropy_F: entropy of the prediction without a thought, nats.
        kinds_F: what the first judged token is.
        lengths_F: (expected) thinking tokens where the model decides.
        bytes_F: of the tokens that judge it, UTF-8.
        settings: what it was measured with.
    """

    documents_F: np.ndarray
    tokens_F: np.ndarray
    logps: dict[str, np.ndarray]
    marginal: dict[str, np.ndarray]
    correct: dict[str, np.ndarray]
    entropy_F: np.ndarray
    kinds_F: np.ndarray
    lengths_F: np.ndarray
    bytes_F: np.ndarray
    settings: dict[str, Any]

    def save(self, path: Path) -> None:
        """Writes all that was measured, whole or not at all; `load` reads it again."""
        parts = {f"{group}/{arm}": values_F for group in GROUPS for arm, values_F in getattr(self, group).items()}
        parts |= {name: getattr(self, name) for name in ("documents_F", "tokens_F", "entropy_F", "kinds_F", "lengths_F", "bytes_F")}
        with written_whole(path) as file:
            np.savez_compressed(file, settings=json.dumps(self.settings), **parts)

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        with np.load(path) as file:
            parts: dict[str, Any] = dict(file)
        groups: dict[str, Any] = {
            group: {name.removeprefix(f"{group}/"): parts.pop(name) for name in list(parts) if name.startswith(f"{group}/")} for group in GROUPS
        }
        settings = json.loads(str(parts.pop("settings")))
        if (mean := parts.pop("bytes_per_token", None)) is not None:  # all that older ones know
            parts["bytes_F"] = parts["tokens_F"] * mean
        return cls(**groups, **parts, settings=settings)

    def summary(self) -> dict[str, Any]:
        """Bits per token and byte and accuracy of each arm; gains in bits per token with 95 % intervals, bootstrapped over documents and paired."""
        arms = {}
        for arm, logps_F in self.logps.items():
            there_F = ~np.isnan(logps_F)
            tokens, size = self.tokens_F[there_F].sum(), self.bytes_F[there_F].sum()
            bits = -logps_F[there_F].sum() / math.log(2)
            accuracy = self.correct[arm][there_F].sum() / tokens
            arms[arm] = {"bits_per_token": bits / tokens, "bits_per_byte": bits / size if size else math.nan, "accuracy": accuracy, "forks": int(there_F.sum())}
            if arm in self.marginal:
                arms[arm]["bits_per_token_marginal"] = -self.marginal[arm].sum() / tokens / math.log(2)
        thoughts = [arm for arm in ("think", "always") if arm in self.logps]
        gains = {f"{arm} over no_think": self.gain(arm, "no_think") for arm in thoughts}
        pairs = [(arm, control) for arm, controls in CONTROLS.items() for control in controls]
        gains |= {f"{arm} over {control}": self.gain(arm, control) for arm, control in pairs if {arm, control} <= self.logps.keys()}
        edges = np.quantile(self.entropy_F, np.linspace(0, 1, BUCKETS + 1)[1:-1])
        bucket_F = np.searchsorted(edges, self.entropy_F, side="right")

        def part(where_F: np.ndarray) -> dict[str, Any]:
            gained = {f"{arm} over no_think": self.gain(arm, "no_think", where_F) for arm in thoughts}
            return {"mean_think_length": self.lengths_F[where_F].mean(), **gained}

        by_entropy = [
            {"mean_entropy_bits": self.entropy_F[where_F].mean() / math.log(2), **part(where_F)}
            for where_F in (bucket_F == b for b in range(BUCKETS))
            if where_F.any()
        ]
        by_kind = {
            kind: {"forks": int(where_F.sum()), **part(where_F)}
            for kind, where_F in ((kind, self.kinds_F == kind) for kind in np.unique(self.kinds_F).tolist())
        }
        return {
            "arms": arms, "gains": gains, "by_entropy": by_entropy, "by_kind": by_kind, "mean_think_length": self.lengths_F.mean(),
            "documents": len(np.unique(self.documents_F)), "forks": len(self.documents_F), "judged_tokens": int(self.tokens_F.sum()),
            "settings": self.settings,
        }  # fmt: skip

    def gain(self, arm: str, other: str, where_F: np.ndarray | None = None) -> dict[str, float]:
        """Bits per token that an arm saves over another, and its 95 % interval."""
        nats_F = self.logps[arm] - self.logps[other]
        there_F = ~np.isnan(nats_F) if where_F is None else ~np.isnan(nats_F) & where_F
        if not there_F.any():
            return dict.fromkeys(("bits_per_token", "low", "high"), math.nan)
        return bits_per_token(nats_F[there_F], self.documents_F[there_F], self.tokens_F[there_F])


def own_arm(settings: dict[str, Any]) -> str:
    """The arm that has a model's own thoughts: where their length is given they are always thought."""
    return "always" if settings.get("stop") == "fixed" else "think"


def own_length(measured: dict[str, Any], settings: dict[str, Any]) -> float:
    """Thinking tokens at a place in that arm, of places that were measured together."""
    return settings["max_think_length"] if own_arm(settings) == "always" else measured["mean_think_length"]


def evaluate_thinking(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | Iterable[dict[str, Any] | str],
    text_field: str = "text",
    max_length: int = 512,
    rows_per_document: int | None = None,
    num_forks: int = 16,
    num_samples: int = 4,
    max_think_length: int | None = None,
    lookahead: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    progress: Any = None,
    fork_markers: Sequence[str] | None = None,
) -> Evaluation:
    """Measures what thoughts do for the real tokens after them.

    Forks are evenly spaced, in a row or among its places behind a marker, so that they are the same for every model and batch size. Thoughts are sampled at
    temperature 1.

    Args:
        model: with thinking tokens; an adapter as well, on a base that has them. Of an adapter's folder `load_whole` makes a model.
        dataset: documents: texts, or rows with a column of them, with prompt and completion, or with messages, of which all that the tokenizer's chat template
            makes is text. One longer than `max_length` tokens is cut into rows, of which the first `rows_per_document` are taken.
        num_samples: thoughts at each fork. Log-probabilities are means over them, an upper bound of the bits (Jensen); `marginal` is the log of the mean
            probability, a tighter bound (IWAE, Burda et al. 2016). 0: only the text without thoughts is measured, at the same places.
        max_think_length, lookahead: as the model was trained where not given; 4 and 1 for one that was not.
        fork_markers: texts behind which to think and nowhere else; as the model was trained where not given, and `[]` for places anywhere.
        progress: wraps the batches, as `tqdm` does.

    Raises:
        ValueError: a model without thinking tokens, one whose thoughts are no tokens of their own, no text, none behind a marker, or chats without a template.
    """
    for name, number, least in (
        ("max_length", max_length, 2), ("rows_per_document", rows_per_document, 1), ("num_forks", num_forks, 1), ("num_samples", num_samples, 0),
        ("lookahead", lookahead, 1), ("batch_size", batch_size, 1),
    ):  # fmt: skip
        if number is not None and number < least:
            raise ValueError(f"{name}={number} must be at least {least}.")
    base, vocabulary, length, blind, filler, trained = check_evaluable(model, max_think_length)
    ahead = lookahead or trained.get("lookahead", 1) or max_length  # null is all that follows
    behind = trained.get("fork_markers", ()) if fork_markers is None else fork_markers
    if isinstance(behind, str):
        raise ValueError(f"fork_markers={behind!r} is one text: give a list of them.")
    if not all(behind):
        raise ValueError(f"fork_markers={list(behind)} has one without text: leave it out, or give [] for places anywhere.")
    markers = marker_ids(behind, tokenizer)
    samples = min(num_samples, 1) if filler and ahead == 1 else num_samples  # then all thoughts are the same, and their lengths are summed out
    branching = Branching(samples, length, ahead, blind=blind)
    texts = _texts(dataset, tokenizer, text_field)
    rows = _rows(tokenizer, texts, min(max_length, room_for_text(base, length)), rows_per_document)
    longest = len(rows[0][1])
    generator = torch.Generator(base.device).manual_seed(seed)
    records: list[dict[str, np.ndarray]] = []
    batches = [padded(rows[start : start + batch_size], tokenizer.pad_token_id or 0, base.device) for start in range(0, len(rows), batch_size)]
    with without_autocast(model), evaluating(model), with_head(base, vocabulary):
        engine = choose_engine(base, vocabulary, replace(branching, num_generations=max(samples, 1)), longest, min(num_forks, longest))
        for tokens_BT, documents_BT in progress(batches) if progress else batches:
            labels_BT = torch.where((documents_BT >= 0) & (tokens_BT < vocabulary.num_real), tokens_BT, -100)
            eligible_BT = eligible_forks(labels_BT, documents_BT)
            if behind:
                eligible_BT &= ends_of(markers, tokens_BT, documents_BT)
            forks_BK = choose_forks(eligible_BT, min(num_forks, tokens_BT.shape[1]), "stride", generator)
            forks_BK = forks_BK[:, : max(int((forks_BK >= 0).sum(1).max()), 1)]  # rows may have far fewer markers
            here = replace(branching, lookahead=min(ahead, tokens_BT.shape[1]))
            batch = _Batch(engine, model, vocabulary, here, tokens_BT, documents_BT, labels_BT, forks_BK, generator, filler)
            records.append(_measure(batch, tokenizer))
    joined = {name: np.concatenate([record[name] for record in records]) for name in records[0]}
    if behind and not len(joined["documents"]):
        raise ValueError(
            f"None of fork_markers={list(behind)} ends in the text with a token after it, so there is nothing to judge: look how they are written."
        )
    if not len(joined["documents"]):
        raise ValueError("There is no text to evaluate on: no document has two tokens of text.")
    settings = {
        "max_length": max_length, "rows_per_document": rows_per_document, "num_forks": num_forks, "num_samples": num_samples, "max_think_length": length,
        "lookahead": ahead, "batch_size": batch_size, "seed": seed, "text": digest_of(texts),
        "longest_row": longest, "engine": engine.name,
        "thoughts": trained.get("thoughts", "discrete"), "stop": trained.get("stop", "learned"),
        "fork_positions": trained.get("fork_positions"), "fork_markers": list(behind),
    }  # fmt: skip
    arms = [arm for arm in PLACED if f"logps {arm}" in joined and not np.isnan(joined[f"logps {arm}"]).all()]
    return Evaluation(
        documents_F=joined["documents"],
        tokens_F=joined["tokens"],
        logps={arm: joined[f"logps {arm}"] for arm in arms},
        marginal={arm: joined[f"marginal {arm}"] for arm in arms if f"marginal {arm}" in joined},
        correct={arm: joined[f"correct {arm}"] for arm in arms},
        entropy_F=joined["entropy"],
        kinds_F=joined["kinds"],
        lengths_F=joined["lengths"],
        bytes_F=joined["bytes"],
        settings=settings,
    )


class Thinker(NamedTuple):
    """A model that thinks, and how it was trained to.

    Args:
        base: the model itself, without what an adapter wraps around it.
        vocabulary: its thinking tokens.
        max_think_length: of a thought, in tokens.
        blind, filler: as the options of these names.
        trained: all that its config says.
    """

    base: PreTrainedModel
    vocabulary: ThinkingVocabulary
    max_think_length: int
    blind: bool
    filler: bool
    trained: dict[str, Any]


def check_evaluable(model: PreTrainedModel, max_think_length: int | None = None) -> Thinker:
    """How this model thinks.

    Args:
        max_think_length: in place of what it was trained with.

    Raises:
        ValueError: it has no thinking tokens, or its thoughts are no tokens of their own.
    """
    base = unwrapped(model)
    if (vocabulary := ThinkingVocabulary.from_config(base.config)) is None:
        if base is not model:
            raise ValueError(
                "The adapter's base has no thinking tokens, which stand in the config of the adapter's folder: load both with "
                "`hf_thinktok.peft.load_whole(FOLDER)`, or make a checkpoint of them with `thinktok merge`."
            )
        raise ValueError("The model has no thinking tokens: its config lacks the entry `thinktok`. Make them with `add_thinking_tokens`.")
    trained = base.config.thinktok
    for name, usual in EVALUABLE.items():
        if (value := trained.get(name, usual[0])) not in usual:
            raise ValueError(
                f"The model was trained with {name}={value}, and only {name}={' or '.join(usual)} can be evaluated so: look at its run's own evaluation."
            )
    if max_think_length is not None and (not isinstance(max_think_length, int) or max_think_length < 1):
        raise ValueError(f"max_think_length={max_think_length!r} must be at least 1, a whole number.")
    length = trained.get("max_think_length", 4) if max_think_length is None else max_think_length
    return Thinker(base, vocabulary, length, trained.get("blind", False), trained.get("thoughts") == "filler", trained)


def room_for_text(model: PreTrainedModel, max_think_length: int) -> int:
    """How many tokens of text go before a thought.

    Raises:
        ValueError: fewer than two.
    """
    if (room := longest_row(model) - max_think_length) < 2:
        raise ValueError(f"max_think_length={max_think_length} leaves no room for text in the model's {longest_row(model)} positions: lower it.")
    return room


def _texts(dataset, tokenizer, text_field: str) -> list[str]:
    if isinstance(dataset, Mapping) or hasattr(dataset, "columns"):  # which would give their names
        raise ValueError(f"The text is in parts or columns ({', '.join(map(str, dataset))}): give one of them, such as data['test'] or list(data['text']).")
    texts = []
    for document, one in enumerate([dataset] if isinstance(dataset, str) else dataset):
        text = text_of(one, tokenizer, text_field) if isinstance(one, dict | str) else None
        if text is None:
            there = f" (it has {', '.join(one)})" if isinstance(one, dict) else ""
            raise ValueError(f"Document {document} has no text in {text_field!r}{there}: name the column of the text with text_field, or give texts.")
        texts.append(text)
    once = list(dict.fromkeys(texts))
    if len(once) < len(texts):  # which would count as documents of their own, and as what is thought of another one
        logger.warning("%s of %s documents repeat others word for word, and are left out.", f"{len(texts) - len(once):,}", f"{len(texts):,}")
    return once


def _rows(tokenizer, texts: list[str], max_length: int, rows_per_document: int | None) -> list[tuple[int, list[int]]]:
    """Each row's document and ids, the longest first."""
    rows = []
    for document, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        begin = ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []  # of every row, where of texts
        room = max_length - len(begin)
        kept = ids if rows_per_document is None else ids[: len(begin) + room * rows_per_document]
        rows += [(document, begin + kept[start : start + room]) for start in range(len(begin), len(kept), room)]
    rows = sorted((row for row in rows if len(row[1]) > 1), key=lambda row: (-len(row[1]), row[0]))
    if not rows:
        raise ValueError("There is no text to evaluate on: no document has two tokens.")
    return rows


def padded(rows: list[tuple[int, list[int]]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and documents of rows, `[B, T]`, from each row's document and ids; where there is padding the document is -1."""
    longest = max(len(ids) for _, ids in rows)
    tokens = [ids + [pad] * (longest - len(ids)) for _, ids in rows]
    documents = [[document] * len(ids) + [-1] * (longest - len(ids)) for document, ids in rows]
    return torch.tensor(tokens, device=device), torch.tensor(documents, device=device)


class _Batch(NamedTuple):
    """Rows, the places to think at, and who thinks there."""

    engine: Engine
    model: PreTrainedModel
    vocabulary: ThinkingVocabulary
    branching: Branching
    tokens_BT: Tensor
    documents_BT: Tensor
    labels_BT: Tensor
    forks_BK: Tensor
    generator: torch.Generator
    filler: bool


def _measure(batch: _Batch, tokenizer: PreTrainedTokenizerBase) -> dict[str, np.ndarray]:
    """All arms at the forks of one batch."""
    engine, model, _, branching, tokens_BT, documents_BT, labels_BT, forks_BK, *_ = batch
    places_BKH, targets_BKH = ThoughtTree(documents_BT, forks_BK, branching).judged(labels_BT)
    mask_BKH = targets_BKH >= 0
    there_BK = mask_BKH.any(-1)
    found = _Thoughts({}, {}, {}, torch.zeros(forks_BK.shape, device=forks_BK.device))
    if branching.num_generations:
        found = _think(batch)

    # Without thoughts: an ordinary pass over the text, which knows the prediction's entropy as well.
    text = ThoughtTree(documents_BT, forks_BK[:, :0], branching)
    nodes_M = torch.arange(tokens_BT.numel(), device=tokens_BT.device)
    plain = engine(model, text, tokens_BT, HeadInputs(nodes_M, text.targets(labels_BT).flatten(), entropy=True))
    assert plain.entropy_M is not None

    def predicting(values_M: Tensor) -> Tensor:
        """At the nodes that predict the judged tokens."""
        return before(values_M.view(tokens_BT.shape), places_BKH)

    found.logps["no_think"], found.correct["no_think"] = predicting(plain.target_logps_M)[:, :, None], predicting(plain.correct_M.float())[:, :, None]

    def flat(values_BK: Tensor) -> np.ndarray:
        return values_BK[there_BK].cpu().double().numpy()

    summed = {arm: masked_sum(values_BKSH, mask_BKH[:, :, None]) for arm, values_BKSH in found.logps.items()}
    columns = {f"logps {arm}": flat(values_BKS.mean(-1).where(found.valid.get(arm, there_BK), math.nan)) for arm, values_BKS in summed.items()}
    columns |= {f"marginal {arm}": flat(summed[arm].logsumexp(-1) - math.log(summed[arm].shape[-1])) for arm in ("think", "always") if arm in summed}
    columns |= {f"correct {arm}": flat(masked_sum(values_BKSH, mask_BKH[:, :, None]).mean(-1)) for arm, values_BKSH in found.correct.items()}
    texts_BT = [pieces(tokenizer, row) for row in tokens_BT.tolist()]
    special = {*tokenizer.all_special_ids}  # these have a name and no bytes
    sizes = [
        [0 if i in special else len(text.encode()) for i, text in zip(ids, texts, strict=True)] for ids, texts in zip(tokens_BT.tolist(), texts_BT, strict=True)
    ]
    sizes_BKH = torch.tensor(sizes, device=mask_BKH.device).gather(1, places_BKH.flatten(1)).view(places_BKH.shape)
    return columns | {
        "documents": documents_BT.gather(1, forks_BK.clamp(min=0))[there_BK].cpu().numpy(),
        "tokens": mask_BKH.sum(-1)[there_BK].cpu().numpy(),
        "bytes": sizes_BKH.where(mask_BKH, 0).sum(-1)[there_BK].cpu().numpy(),
        "entropy": flat(predicting(plain.entropy_M)[..., 0]),
        "kinds": np.array([kind_of(texts_BT[b][t]) for b, t in zip(there_BK.nonzero()[:, 0].tolist(), places_BKH[..., 0][there_BK].tolist(), strict=True)]),
        "lengths": flat(found.lengths_BK),
    }


class _Thoughts(NamedTuple):
    """By arm: log-probabilities and hits of the judged tokens, `[B, K, S, H]`, and where there was something to put, `[B, K]`."""

    logps: dict[str, Tensor]
    correct: dict[str, Tensor]
    valid: dict[str, Tensor]
    lengths_BK: Tensor


def _think(batch: _Batch) -> _Thoughts:
    """The arms with thoughts."""
    engine, model, vocabulary, branching, tokens_BT, documents_BT, labels_BT, forks_BK, generator, filler = batch

    def sample(draw_stops: bool) -> Rollout:
        sampling = Sampling(draw_stops=draw_stops, min_length=int(branching.blind), filler=filler)
        return sample_thoughts(engine, model, tokens_BT, documents_BT, forks_BK, branching, sampling, vocabulary, generator)

    def judge(rollout: Rollout, every_prefix: bool = False):
        tree = ThoughtTree(documents_BT, forks_BK, replace(branching, num_generations=rollout.thoughts_BKGL.shape[2]), rollout.lengths_BKG)
        run = lambda passes: engine.run(model, tree, tree.tokens(tokens_BT, rollout.thoughts_BKGL), passes)
        return score_tree(run, tree, labels_BT, rollout, vocabulary, every_prefix=every_prefix, gate=every_prefix)

    always = sample(draw_stops=False)
    everything, sources = always, control_sources(always, documents_BT, vocabulary, generator)
    if filler:  # the others would put the same there
        sources = {"random": sources["random"]}
    for thoughts_BKSL, _ in sources.values():
        everything = everything.beside(replace(always, thoughts_BKGL=thoughts_BKSL))
    exact = branching.lookahead == 1  # then its lengths are summed out, not sampled
    scores = judge(everything, every_prefix=exact)
    samples, placed = branching.num_generations, ("always", *sources)

    def by_source(values_BKGH: Tensor) -> dict[str, Tensor]:
        return dict(zip(placed, values_BKGH.split(samples, 2), strict=True))

    logps, correct = by_source(scores.logps_BKGH), by_source(scores.correct_BKGH.float())
    if exact:
        speech = speak(scores.under_gates_of_first(samples), everything, "learned", 0.0, branching.blind)
        ended_logps, ended_correct, lengths_BKG = by_source(speech.logps_BKGH), by_source(speech.correct_BKGH.float()), speech.lengths_BKG
        logps |= {"think": ended_logps["always"], "think_random": ended_logps["random"]}
        correct |= {"think": ended_correct["always"], "think_random": ended_correct["random"]}
    else:
        own = sample(draw_stops=True)
        drawn = judge(own.beside(replace(own, thoughts_BKGL=random_thoughts(own.thoughts_BKGL, vocabulary, generator))))
        lengths_BKG = own.lengths_BKG.float()
        logps |= zip(("think", "think_random"), drawn.logps_BKGH.split(samples, 2), strict=True)
        correct |= zip(("think", "think_random"), drawn.correct_BKGH.float().split(samples, 2), strict=True)
    return _Thoughts(logps, correct, {arm: valid_BK for arm, (_, valid_BK) in sources.items()}, lengths_BKG[:, :, :samples].mean(-1))


def control_sources(rollout: Rollout, documents_BT: Tensor, vocabulary: ThinkingVocabulary, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """What controls put in the place of thoughts, `[B, K, S, L]`, and at which forks there is something to put, `[B, K]`."""
    thoughts_BKSL, forks_BK = rollout.thoughts_BKGL, rollout.forks_BK
    batch, num_forks, samples, length = thoughts_BKSL.shape
    there_BK = forks_BK >= 0
    rows_B1 = torch.arange(batch, device=forks_BK.device)[:, None]
    # Half of the row's forks before: a later thought would have read what judges here.
    earlier_BK = torch.arange(num_forks, device=forks_BK.device) - (there_BK.sum(1, keepdim=True) // 2).clamp(min=1)
    document_B = documents_BT[:, 0]
    other_B, has_other_B = another_row(forks_BK, document_B[:, None] != document_B)
    order_BKSL = torch.rand(thoughts_BKSL.shape, generator=generator, device=forks_BK.device).argsort(-1)
    as_it_was_BKS1 = (order_BKSL == torch.arange(length, device=forks_BK.device)).all(-1, keepdim=True)
    order_BKSL = torch.where(as_it_was_BKS1, order_BKSL.roll(1, -1), order_BKSL)
    return {
        "shuffled": (thoughts_BKSL.gather(-1, order_BKSL), there_BK & (length > 1)),
        "earlier": (thoughts_BKSL[rows_B1, earlier_BK.clamp(min=0)], there_BK & (earlier_BK >= 0)),
        "other_document": (at_same_places(thoughts_BKSL, other_B, forks_BK), there_BK & has_other_B[:, None]),
        "random": (random_thoughts(thoughts_BKSL, vocabulary, generator), there_BK),
    }


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """What each token adds to the text before it: joined they are the text. Of a character in several tokens all is in the last of them."""
    decoder = PieceDecoder(tokenizer)
    found = [decoder.put(token) for token in ids]
    return [*found[:-1], found[-1] + decoder.end()] if found else []


def kind_of(text: str) -> str:
    """What a token's text is: the begin of a word, its continuation, a number, or something else."""
    word = text.strip()
    if any(character.isdigit() for character in word):
        return "number"
    if not any(character.isalpha() for character in word):
        return "other"
    return "word begins" if text[:1].isspace() or word[:1].isupper() else "word goes on"
