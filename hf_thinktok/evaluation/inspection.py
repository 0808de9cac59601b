"""One text, token by token: what the model thinks before each, and what that does to its prediction.

Shape suffixes as in tree.py; X the likeliest tokens.
"""

import math
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architectures import LogitTransform
from ..engine import Pass, choose_engine
from ..head import HiddenInputs, with_head
from ..models import evaluating, without_autocast
from ..objective import speak
from ..rollout import Sampling, sample_thoughts
from ..scores import score_tree
from ..tokens import ThinkingVocabulary
from ..tree import Branching, ThoughtTree
from .thinking import check_evaluable, pieces, room_for_text

# Logits of so many places at a time.
PLACES = 256


@dataclass
class InspectedToken:
    """A token of the text, and what was thought before it.

    Attributes:
        text: what it adds to the text before it.
        thought: the likeliest thinking tokens, one after the other, from 0.
        thought_logp: log-probability of that thought, nats; of its content, not of having one.
        gate: probability of thinking at all.
        before, after: log-probability of this token without a thought and after this one, nats.
        own: the same where the model itself decides how much of the thought it thinks.
        top_before, top_after: the likeliest tokens and their probabilities, without the thought and after it.
    """

    text: str
    thought: list[int]
    thought_logp: float
    gate: float
    before: float
    after: float
    own: float
    top_before: list[tuple[str, float]]
    top_after: list[tuple[str, float]]


@torch.no_grad()
def inspect_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, max_length: int = 256, max_think_length: int | None = None, top: int = 5
) -> list[InspectedToken]:
    """Thinks before every token of a text but the first, greedily, as if each were the only place with a thought.

    Args:
        model: with thinking tokens, trained with `thoughts=discrete` or `filler`.
        max_length: tokens of the text that are read.
        max_think_length: as the model was trained where not given.

    Raises:
        ValueError: a model without thinking tokens, one whose thoughts are no tokens of their own, or no text.
    """
    base, vocabulary, length, blind, filler, trained = check_evaluable(model, max_think_length)
    fixed = trained.get("stop") == "fixed"  # it thinks everywhere, and its gate was taught nothing
    ids = tokenizer(text)["input_ids"][: min(max_length, room_for_text(base, length))]
    if len(ids) < 2:
        raise ValueError("There is nothing to inspect: the text has fewer than two tokens.")
    tokens_BT = torch.tensor([ids], device=base.device)
    documents_BT = torch.zeros_like(tokens_BT)
    labels_BT = torch.where(tokens_BT < vocabulary.num_real, tokens_BT, -100)
    forks_BK = torch.arange(len(ids) - 1, device=base.device)[None]
    branching = Branching(1, length, 1, blind=blind)
    sampling = Sampling(top_k=1, filler=filler)
    with without_autocast(model), evaluating(model), with_head(base, vocabulary):
        engine = choose_engine(base, vocabulary, branching, len(ids), forks_BK.shape[1])
        rollout = sample_thoughts(engine, model, tokens_BT, documents_BT, forks_BK, branching, sampling, vocabulary, torch.Generator(base.device))
        tree = ThoughtTree(documents_BT, forks_BK, branching, rollout.lengths_BKG)
        tokens_BS = tree.tokens(tokens_BT, rollout.thoughts_BKGL)
        scores = score_tree(lambda passes: engine.run(model, tree, tokens_BS, passes), tree, labels_BT, rollout, vocabulary, every_prefix=True)
        speech = speak(scores, rollout, "learned", 0.0, branching.blind)
        nodes_M = torch.cat([forks_BK[0], tree.predictors()[0, :, 0, 0]])
        ((hidden_MD,),) = engine.run(model, tree, tokens_BS, [Pass([HiddenInputs(nodes_M)])])
        likely = _likeliest(base, hidden_MD, vocabulary, top)

    texts, places = pieces(tokenizer, ids), forks_BK.shape[1]

    def words(place: int, where: int) -> list[tuple[str, float]]:
        """As they would go on after a place, with the tokens before from where its character begins."""
        begin = next((i + 1 for i in range(place - 1, -1, -1) if texts[i]), 0)
        return [(pieces(tokenizer, [*ids[begin : place + 1], token])[-1], probability) for token, probability in likely[where]]

    return [
        InspectedToken(
            text=texts[place + 1],
            thought=(rollout.thoughts_BKGL[0, place, 0] - vocabulary.first_id).tolist(),
            thought_logp=scores.thought_logps_BKGL[0, place, 0].sum().item(),
            gate=1.0 if blind or fixed else scores.gate_logits_BKGL[0, place, 0, 0].sigmoid().item(),
            before=scores.baseline_logps_BKH[0, place, 0].item(),
            after=scores.logps_BKGH[0, place, 0, 0].item(),
            own=(scores if fixed else speech).logps_BKGH[0, place, 0, 0].item(),
            top_before=words(place, place),
            top_after=words(place, places + place),
        )
        for place in range(places)
    ]


def logits_of(model: PreTrainedModel, hidden_XD: Tensor) -> Tensor:
    """Logits of all rows from hidden states that enter the LM head, fp32."""
    head = model.get_output_embeddings()
    return LogitTransform.from_config(model.config)(head(hidden_XD.to(head.weight.dtype)).float())  # Mamba's are fp32 in a model of 16 bits


def _likeliest(model, hidden_MD: Tensor, vocabulary: ThinkingVocabulary, top: int) -> list[list[tuple[int, float]]]:
    """The likeliest real tokens at nodes, with their probabilities among real ones."""
    found = []
    for part_MD in hidden_MD.split(PLACES):
        probabilities_MX, tokens_MX = logits_of(model, part_MD)[:, : vocabulary.num_real].softmax(-1).topk(top)
        found += [list(zip(*row, strict=True)) for row in zip(tokens_MX.tolist(), probabilities_MX.tolist(), strict=True)]
    return found


def print_inspection(first: str, inspected: list[InspectedToken], console: Console | None = None, places: int = 12) -> None:
    """The text, each token but the first coloured by what thinking before it does to it where the model decides, and the places where that is most."""
    console = console or Console(highlight=False)

    def gain(token: InspectedToken) -> float:
        return (token.own - token.before) / math.log(2)

    text = Text(first)
    for token in inspected:
        strength = min(abs(gain(token)), 1.0)
        text.append(
            token.text, f"on rgb(0,{round(110 * strength)},40)" if gain(token) > 0 else f"on rgb({round(150 * strength)},60,0)" if strength > 0.01 else ""
        )
    console.print(text)
    table = Table(title="Where thinking does most")
    for name in ("token", "bits saved", "with the whole thought", "thinks, %", "thought"):
        table.add_column(name, justify="left" if name in ("token", "thought") else "right")
    for token in sorted(inspected, key=lambda token: -abs(gain(token)))[:places]:
        forced = (token.after - token.before) / math.log(2)
        table.add_row(Text(repr(token.text)[1:-1]), f"{gain(token):+.4f}", f"{forced:+.3f}", f"{100 * token.gate:.3g}", " ".join(map(str, token.thought)))
    console.print(table)
    own, forced = (sum(getattr(token, how) - token.before for token in inspected) / len(inspected) / math.log(2) for how in ("own", "after"))
    apart = "" if own == forced else f" where it wants to, {forced:+.4f} everywhere"
    console.print(f"Over {len(inspected)} tokens thinking saves {own:+.4f} bits a token{apart}. Below 0 it costs bits.")
