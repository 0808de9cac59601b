"""Soft thoughts: what a thought node reads is a vector, and the speaker's cross-entropy reaches the thinker through it.

- **gumbel** (straight-through, https://huggingface.co/papers/1611.01144): the token drawn is argmax(logits + noise), and its node reads its embedding, as a
  discrete thought's does. The gradient is that of softmax((logits + noise) / temperature) times the thinking rows.
- **continuous** (Coconut, https://huggingface.co/papers/2412.06769): a node reads the hidden state of the node before it.

What a node reads comes from the node before, so the L nodes of a thought take L passes, each over the text and the nodes known so far, and one more pass
scores them. All passes have their gradient and none needs a cache: exact for any model that an engine can run.

Shape suffixes as in tree.py; X numbers say what a node reads: an input embedding's D, or the weights of N thinking rows.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .engine import Engine
from .head import HeadInputs, HiddenInputs, ThoughtInputs
from .models import evaluating
from .rollout import Rollout, between_markers, random_thoughts
from .tokens import ThinkingVocabulary
from .tree import Branching, ThoughtTree

SOFT = ("gumbel", "continuous")


def think_softly(
    engine: Engine, model, tokens_BT: Tensor, documents_BT: Tensor, rollout: Rollout, kind: str, layer: int = -1, temperature: float = 1.0
) -> Rollout:
    """The rollout with what its thought nodes read, with the gradient that goes through it; as it is for kinds that read ids.

    All thoughts are thought to their full length: the first nodes of a longer thought are those of a shorter one.

    Args:
        kind: as `ThinkTokConfig.thoughts`.
        layer: of the hidden states that `continuous` feeds back.
        temperature: of the mixture whose gradient `gumbel` has.
    """
    wanted = kind == "continuous" or (kind == "gumbel" and torch.is_grad_enabled())  # without gradient gumbel's thoughts are their ids
    if not wanted or rollout.forks_BK.shape[1] == 0:
        return rollout
    groups, length = rollout.thoughts_BKGL.shape[2:]
    tree = ThoughtTree(documents_BT, rollout.forks_BK, Branching(groups, length, 1))  # what judges a thought comes later
    tokens_BS = tree.tokens(tokens_BT, rollout.thoughts_BKGL)
    rows_B111 = torch.arange(len(tokens_BS), device=tokens_BS.device)[:, None, None, None]
    nodes_BKGP = tree.prefixes() + rows_B111 * tree.num_nodes
    read_BKGX: list[Tensor] = []
    for depth in range(length):
        nodes_M = nodes_BKGP[..., depth].flatten()
        head = HiddenInputs(nodes_M, layer) if kind == "continuous" else HeadInputs(nodes_M, spoken=0)
        known = thought_inputs(tree, torch.stack(read_BKGX, 3), kind) if read_BKGX else None
        out = engine(model, tree, tokens_BS, head, tree.nodes_up_to(depth), thoughts=known)
        if kind == "continuous":
            read_BKGX.append(out.view(*rollout.lengths_BKG.shape, -1))
        else:
            assert rollout.noise_BKGLN is not None
            logits_BKGN = out.think_logits_MN.view(*rollout.lengths_BKG.shape, -1)
            soft_BKGN = ((logits_BKGN + rollout.noise_BKGLN[..., depth, :]) / temperature).softmax(-1)
            read_BKGX.append(soft_BKGN - soft_BKGN.detach())  # exactly 0: the node's id makes the value, this makes the gradient
    return replace(rollout, soft_BKGLX=torch.stack(read_BKGX, 3))


def thought_inputs(tree: ThoughtTree, soft_BKGLX: Tensor | None, kind: str) -> ThoughtInputs | None:
    """Which node of a tree reads what, rereading nodes included. Where only the first nodes of each thought are known the others read their ids."""
    if soft_BKGLX is None:
        return None
    number_BKGL = torch.arange(soft_BKGLX[..., 0].numel(), device=soft_BKGLX.device).view(soft_BKGLX.shape[:-1])
    number_BKGL = pad(number_BKGL, (0, tree.branching.max_length - number_BKGL.shape[-1]), value=-1)
    return ThoughtInputs(tree.tokens(torch.full_like(tree.documents_BT, -1), number_BKGL), soft_BKGLX.flatten(0, -2), mixes=kind == "gumbel")


def another_row(forks_BK: Tensor, differs_BB: Tensor) -> tuple[Tensor, Tensor]:
    """The next row, around the batch, that differs and has forks, `[B]`; and whether there is one. A later thought of the row itself would have read what
    judges here."""
    rows_B = torch.arange(len(forks_BK), device=forks_BK.device)
    following_BB = (rows_B[:, None] + rows_B) % len(rows_B)
    fits_BB = (differs_BB & (forks_BK >= 0).any(1)).gather(1, following_BB)
    return following_BB.gather(1, fits_BB.long().argmax(1, keepdim=True))[:, 0], fits_BB.any(1)


def at_same_places(thoughts_BK: Tensor, other_B: Tensor, forks_BK: Tensor) -> Tensor:
    """The other row's thoughts `[B, K, ...]`, over again where it has fewer."""
    count_B1 = (forks_BK >= 0).sum(1, keepdim=True).clamp(min=1)
    index_BK = torch.arange(forks_BK.shape[1], device=forks_BK.device) % count_B1[other_B]
    return thoughts_BK[other_B[:, None], index_BK]


def swapped(soft_BKGLX: Tensor, forks_BK: Tensor) -> Tensor:
    """The next row's thoughts; zeros where no other row of the batch has any. They are vectors, so none can be drawn at random."""
    other_B, has_B = another_row(forks_BK, ~torch.eye(len(forks_BK), dtype=torch.bool, device=forks_BK.device))
    return torch.where(has_B[:, None, None, None, None], at_same_places(soft_BKGLX, other_B, forks_BK), 0.0)


def control_thoughts(rollout: Rollout, vocabulary: ThinkingVocabulary, generator: torch.Generator) -> Rollout:
    """Thoughts of the same lengths that know nothing of the text: uniformly random ids or words, and vectors of another row."""
    ids_BKGL = random_thoughts(rollout.thoughts_BKGL, vocabulary, generator)
    if rollout.text:
        place_L = torch.arange(ids_BKGL.shape[-1], device=ids_BKGL.device)
        words_BKGL = torch.randint(vocabulary.num_real, ids_BKGL.shape, generator=generator, device=ids_BKGL.device)
        ids_BKGL = between_markers(words_BKGL, place_L, rollout.lengths_BKG[..., None], vocabulary)
    soft_BKGLX = None if rollout.soft_BKGLX is None else swapped(rollout.soft_BKGLX, rollout.forks_BK)
    return replace(rollout, thoughts_BKGL=ids_BKGL, soft_BKGLX=soft_BKGLX)


def check_feedback(model, layer: int, split: bool) -> None:
    """Tries on one token whether hidden states of a layer can be read as input embeddings.

    Raises:
        ValueError: there is no such layer, or the sizes differ.
    """
    token_BS = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with evaluating(model):
        hidden_MD = model(input_ids=token_BS, use_cache=False, head=HiddenInputs(token_BS[0], layer))
        head, thoughts = HiddenInputs(token_BS[0]), ThoughtInputs(token_BS, hidden_MD)
        model(input_ids=token_BS, use_cache=False, head=head, thoughts=thoughts)
        if split:
            model(input_ids=token_BS, use_cache=False, head=head, thoughts=thoughts, speaks=True)
