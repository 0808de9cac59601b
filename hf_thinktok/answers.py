"""Answers to questions with one right completion: thinking greedily, with random thoughts, and without any; and what plain generation makes of them.

Shape suffixes as in tree.py; D rows of a data set.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from .config import ThinkTokConfig
from .distributed import autocast
from .losses import stopping_logps
from .models import evaluating, unwrapped
from .objective import Speech, speak
from .rewards import masked_sum
from .rollout import Rollout
from .scores import TreeScores
from .thoughts import control_thoughts
from .tokens import NO_CUTS
from .tree import ThoughtTree

# Tokens of a batch at most: two hundred long rows at once are 16 GB.
BATCH_TOKENS = 1 << 14
# So many times as long as in training a generated thought may be: one that nothing ends is a wrong answer.
GENERATED_THOUGHTS = 4


@dataclass
class Answers:
    """What came of each row, in the order of the data.

    Attributes:
        correct_D: whether every token of the completion was the model's first choice; with `stop=learned` at lengths that together are likelier than not.
        thoughts_DL: the thoughts, numbers from 0 (those of text are vocabulary ids), padded with -1; nothing else for thoughts that are no tokens. With
            `stop=learned` those of the likeliest length.
        lengths_D: (expected) thinking tokens.
        logps_D: log-probability of the completion, nats; NaN of what was generated.
    """

    correct_D: np.ndarray
    thoughts_DL: np.ndarray
    lengths_D: np.ndarray
    logps_D: np.ndarray

    @property
    def accuracy(self) -> float:
        return float(self.correct_D.mean())


@torch.no_grad()
def answer(trainer, dataset: Dataset, how: str = "think", batch_size: int = 256, seed: int = 0) -> Answers:
    """Answers every row of a tokenised data set, rows of one thought length together.

    Args:
        trainer: a `ThinkTokTrainer`; its options say how thoughts end.
        dataset: columns `input_ids`, `labels` (-100 before the completion) and, where thoughts have given lengths, `think_length`.
        how: `think`: the most likely thinking token at each step; with `stop=sampled` where a thought ends is drawn. `random`: uniformly random thoughts of
            the same lengths (with a learned stop as long as the gate makes them), for `thoughts=continuous` those of other rows. `none`: no thought at all.
            `generate`: what plain `model.generate` samples, whose thoughts nobody ends but the model's own gate.
        batch_size: rows at once, fewer where they are long.
        seed: of the random thoughts.
    """
    args, model = trainer.args, trainer.model
    device = trainer.accelerator.device
    generator = torch.Generator(device).manual_seed(seed)
    if "labels" not in dataset.column_names:
        raise ValueError(f"The questions have the columns {dataset.column_names} and no `labels`: give each row the ids of its completion, and -100 before it.")
    batch_size = max(2, min(batch_size, BATCH_TOKENS // max(map(len, dataset["input_ids"]))))  # `random` may need another row
    if how == "generate":
        return _generated(trainer, dataset, batch_size, seed)
    columns = [name for name in ("input_ids", "labels", "think_length") if name in dataset.column_names]
    rows = dataset.select_columns(columns)
    given_D = rows["think_length"][:] if "think_length" in columns else [args.max_think_length] * len(rows)
    lengths_D = np.array([np.sum(given) for given in given_D])
    order_D = np.argsort(lengths_D, kind="stable")
    correct_D, logps_D, spent_D = np.zeros(len(rows), bool), np.zeros(len(rows)), np.zeros(len(rows))
    # All of an answer is judged, whatever judged a thought; where the text itself has the thoughts, in the text.
    judged = 1 if args.reads_thinking else max(len(labels) - next((i for i, label in enumerate(labels) if label >= 0), 0) for labels in rows["labels"])
    if judged > 1 and args.stop == "learned" and how != "none":
        raise ValueError(f"Answers have up to {judged} tokens, and stop=learned sums its lengths out for one: set stop=sampled, or make answers of one token.")
    thoughts_DL = np.full((len(rows), max(int(lengths_D.max()), 1) if args.stop == "fixed" else args.max_think_length), -1)
    with evaluating(model), autocast(trainer.accelerator):
        for index in np.array_split(order_D, max(1, min(math.ceil(len(rows) / batch_size), len(rows) // 2))):
            inputs = {name: value.to(device) for name, value in trainer.data_collator(list(rows.select(index))).items()}
            labels_BT, tokens_BT = trainer._labels(inputs), inputs["input_ids"]
            rollout = _thoughts(trainer, inputs, labels_BT, how, generator)
            branching = dataclasses.replace(args.branching(tokens_BT.shape[1], rollout.thoughts_BKGL.shape[-1], num_generations=1), lookahead=judged)
            tree = ThoughtTree(inputs["documents"], rollout.forks_BK, branching, rollout.lengths_BKG)
            scores = trainer._score(model, tree, tokens_BT, labels_BT, rollout)
            speech = speak(scores, rollout, args.stop if how != "none" else "fixed", 0.0, args.blind)
            logps_BH, right_BH, mask_BH = _judged(args, scores, speech)
            correct_D[index] = ((right_BH | ~mask_BH).all(-1) & mask_BH.any(-1)).cpu().numpy()
            logps_D[index] = masked_sum(logps_BH, mask_BH).float().cpu().numpy()
            spent_D[index] = speech.lengths_BKG[:, :, 0].sum(1).float().cpu().numpy()
            said_BL = _said(args, rollout, scores, how, trainer.vocabulary.first_id)
            thoughts_DL = np.pad(thoughts_DL, ((0, 0), (0, max(said_BL.shape[1] - thoughts_DL.shape[1], 0))), constant_values=-1)
            thoughts_DL[index, : said_BL.shape[1]] = said_BL
    return Answers(correct_D, thoughts_DL, spent_D, logps_D)


def _generated(trainer, dataset: Dataset, batch_size: int, seed: int) -> Answers:
    """What the model samples behind each prompt: its thought is all that comes before the first word, and all words but as many as the completion has are left
    out."""
    vocabulary, model = trainer.vocabulary, unwrapped(trainer.model)
    ids_D, labels_D = dataset["input_ids"][:], dataset["labels"][:]
    begins_D = np.array([next(place for place, label in enumerate(labels) if label >= 0) for labels in labels_D])
    right_D = [[label for label in labels if label >= 0] for labels in labels_D]
    most = max(map(len, right_D)) + GENERATED_THOUGHTS * trainer.args.max_think_length
    correct_D, lengths_D, thoughts_DL = np.zeros(len(ids_D), bool), np.zeros(len(ids_D)), np.full((len(ids_D), most), -1)
    with evaluating(model), autocast(trainer.accelerator), torch.random.fork_rng():
        torch.manual_seed(seed)
        for begin in np.unique(begins_D):  # so that no prompt is padded
            for index in np.array_split(alike := np.flatnonzero(begins_D == begin), math.ceil(len(alike) / batch_size)):
                prompts_BT = torch.tensor([ids_D[i][:begin] for i in index], device=model.device)
                made_BT = model.generate(
                    prompts_BT, attention_mask=torch.ones_like(prompts_BT), do_sample=True, temperature=1.0, max_new_tokens=most, pad_token_id=0, **NO_CUTS
                )[:, begin:].cpu()  # fmt: skip
                thought_BT, made_BT = vocabulary.is_thought(made_BT).numpy(), made_BT.numpy()
                first_BT = np.cumprod(thought_BT, axis=1).astype(bool)
                lengths_D[index] = first_BT.sum(1)
                thoughts_DL[index, : made_BT.shape[1]] = np.where(first_BT, made_BT - vocabulary.first_id, -1)
                for i, made_T, words_T in zip(index, made_BT, ~thought_BT, strict=True):
                    correct_D[i] = made_T[words_T][: len(right_D[i])].tolist() == right_D[i]
    return Answers(correct_D, thoughts_DL[:, : max(int(lengths_D.max(initial=0)), 1)], lengths_D, np.full(len(ids_D), math.nan))


def _thoughts(trainer, inputs: dict[str, Tensor], labels_BT: Tensor, how: str, generator: torch.Generator) -> Rollout:
    """One thought at each place: before the completion, or wherever the text has them."""
    args, model, tokens_BT = trainer.args, trainer.model, inputs["input_ids"]
    if args.reads_thinking:
        forks_BK = trainer._forks(model, inputs, labels_BT, generator, "all")
    else:
        forks_BK = (labels_BT >= 0).int().argmax(1, keepdim=True) - 1
    given_BK = trainer._given_lengths(inputs, forks_BK)
    longest = args.max_think_length if given_BK is None or not given_BK.numel() else max(int(given_BK.max()), 1)
    rollout = Rollout.empty(forks_BK, args.branching(tokens_BT.shape[1], longest, num_generations=1))
    rollout.text = args.thoughts == "text"
    # Without thoughts, and with random ids of given lengths, there is nothing to sample.
    if how == "think" or (how == "random" and (args.stop == "sampled" or args.thoughts == "continuous")):
        likeliest = dataclasses.replace(args.sampling(), top_k=1, epsilon=0.0, gumbel=False)  # whatever the rest
        rollout = trainer._think(model, inputs, trainer._sample(model, inputs, forks_BK, generator, likeliest, num_generations=1))
    elif how == "random":
        given_BK = torch.full_like(forks_BK, longest) if given_BK is None else given_BK
        rollout = dataclasses.replace(rollout, lengths_BKG=given_BK[:, :, None])
    rollout = dataclasses.replace(rollout, lengths_BKG=rollout.lengths_BKG * (forks_BK >= 0)[:, :, None])  # a row may have fewer places than others
    return control_thoughts(rollout, trainer.vocabulary, generator) if how == "random" else rollout


def _judged(args: ThinkTokConfig, scores: TreeScores, speech: Speech) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the completion's tokens, which of them are right, and where there is one: behind the one fork, or in the text that has thoughts."""
    if args.reads_thinking:
        return scores.trunk_logps_BT, scores.trunk_correct_BT > 0.5, scores.trunk_mask_BT
    return speech.logps_BKGH[:, 0, 0], speech.correct_BKGH[:, 0, 0] > 0.5, scores.mask_BKH[:, 0]


def _said(args: ThinkTokConfig, rollout: Rollout, scores: TreeScores, how: str, first_id: int) -> np.ndarray:
    """A row's thoughts one after the other, `[B, L]`, -1 behind them."""
    said_BL = (rollout.thoughts_BKGL[:, :, 0].flatten(1) - (0 if rollout.text else first_id)).cpu().numpy()
    there_BL = rollout.said_BKGL[:, :, 0].flatten(1).cpu().numpy() & (args.thoughts != "continuous")
    if args.stop == "learned" and how != "none":  # what the gate would not take was drawn, and is not said
        likeliest_B = stopping_logps(scores.gate_logits_BKGL, args.blind)[:, 0, 0].argmax(-1).cpu().numpy()
        there_BL &= np.arange(there_BL.shape[1]) < likeliest_B[:, None]
    behind_BL = np.argsort(~there_BL, axis=1, kind="stable")
    return np.take_along_axis(np.where(there_BL, said_BL, -1), behind_BL, 1)[:, : there_BL.sum(1).max(initial=0)]
