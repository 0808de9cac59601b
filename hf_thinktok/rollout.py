"""Sampling thoughts into a tree: the trunk once, then all branches in lockstep.

Only the thinking rows are drawn from; whether to think at all is the gate's business. Every rank makes the same number of forward passes,
whatever it draws.

Shape suffixes as in tree.py.
"""

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .engine import Engine
from .head import Draw, HeadOutputs, gumbel_noise
from .models import evaluating
from .tokens import ThinkingVocabulary
from .tree import Branching, ThoughtTree


@dataclass
class Rollout:
    """Sampled thoughts.

    Attributes:
        forks_BK: where they were thought.
        thoughts_BKGL: vocabulary ids.
        lengths_BKG: thinking tokens of each thought before it stopped, 0 to L.
        logps_BKGL: log p(z_l | its prefix, think) at the sampling temperature, in nats.
        rarity_BKG: -log of each thought's running frequency, nats, where there is a bonus for it.
        chosen: whether the first thought of each group was put there for what follows it, by a search or by the data, and not drawn.
        supplied: whether it is the data's own.
        noise_BKGLN: the Gumbel noise of each draw, where it has a gradient.
        soft_BKGLX: what thought nodes read where that is no id; see `hf_thinktok.thoughts`.
        text: whether thoughts are written in ordinary tokens, between a start and an end token that nobody draws.
        filler: whether all thinking tokens are the same one, which nobody draws.
        markovian: so many of the last thoughts of each group see their latest token alone.
        old_logps_BKGA, reference_logps_BKGA: log-probabilities of its actions (`hf_thinktok.objective.actions`) under the model that was first trained on it,
            where it is trained on more than once, and under the reference model, where there is one.
        advantages_BKGL: by that first model as well.
    """

    forks_BK: Tensor
    thoughts_BKGL: Tensor
    lengths_BKG: Tensor
    logps_BKGL: Tensor
    rarity_BKG: Tensor | None = None
    chosen: bool = False
    supplied: bool = False
    noise_BKGLN: Tensor | None = None
    soft_BKGLX: Tensor | None = None
    text: bool = False
    filler: bool = False
    markovian: int = 0
    old_logps_BKGA: Tensor | None = None
    advantages_BKGL: Tensor | None = None
    reference_logps_BKGA: Tensor | None = None

    @property
    def said_BKGL(self) -> Tensor:
        """Which thinking tokens came before the thought's end."""
        return torch.arange(self.thoughts_BKGL.shape[-1], device=self.thoughts_BKGL.device) < self.lengths_BKG[..., None]

    @property
    def drawn_BKGL(self) -> Tensor:
        """Which of them were drawn."""
        if self.filler:
            return torch.zeros_like(self.said_BKGL)
        place_L = torch.arange(self.thoughts_BKGL.shape[-1], device=self.thoughts_BKGL.device)
        return self.said_BKGL & (place_L > 0) & (place_L < self.lengths_BKG[..., None] - 1) if self.text else self.said_BKGL

    @property
    def drawn_G(self) -> slice:
        """Which thoughts of each group were drawn: all but a supplied one."""
        return slice(int(self.supplied), None)

    @property
    def num_chosen(self) -> int:
        """So many of the first thoughts of each group were not drawn, where any were."""
        return int(self.chosen and self.thoughts_BKGL.shape[2] > 1)

    @classmethod
    def empty(cls, forks_BK: Tensor, branching: Branching) -> "Rollout":
        """Thoughts of length 0."""
        shape = (*forks_BK.shape, branching.num_generations)
        thoughts_BKGL = forks_BK.new_zeros(*shape, branching.max_length)
        logps_BKGL = torch.zeros(thoughts_BKGL.shape, device=forks_BK.device)
        return cls(forks_BK, thoughts_BKGL, forks_BK.new_zeros(shape), logps_BKGL, markovian=branching.markovian)

    def beside(self, other: "Rollout") -> "Rollout":
        """The thoughts of two rollouts at the same forks in one group."""
        thoughts_BKGL, lengths_BKG, logps_BKGL = (
            torch.cat([getattr(one, name) for one in (self, other)], 2) for name in ("thoughts_BKGL", "lengths_BKG", "logps_BKGL")
        )
        soft_BKGLX = None if self.soft_BKGLX is None or other.soft_BKGLX is None else torch.cat([self.soft_BKGLX, other.soft_BKGLX], 2)
        return Rollout(self.forks_BK, thoughts_BKGL, lengths_BKG, logps_BKGL, soft_BKGLX=soft_BKGLX, text=self.text, filler=self.filler)


@dataclass(frozen=True)
class Sampling:
    """How thinking tokens are drawn; the names are those of `transformers.GenerationConfig`.

    Args:
        draw_stops: end each thought by its gate; else all have L tokens.
        min_length: no stop before so many tokens.
        epsilon: probability that a token is drawn uniformly.
        filler: no token is drawn; every one is the first of the vocabulary.
        text: tokens are drawn from the real vocabulary at temperature 1, or with `top_k=1` the most likely ones; the first and the last token of the
            thinking vocabulary begin and end a thought.
        gumbel: tokens are drawn as the largest logit plus noise, and the noise is kept; temperature, truncation and `epsilon` have no part in it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    draw_stops: bool = False
    min_length: int = 0
    epsilon: float = 0.0
    filler: bool = False
    gumbel: bool = False
    text: bool = False

    @property
    def draws(self) -> bool:
        """Whether the model is asked for anything."""
        return self.draw_stops or not self.filler

    def warpers(self) -> LogitsProcessorList:
        warpers = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            warpers.append(TopKLogitsWarper(int(self.top_k)))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            warpers.append(MinPLogitsWarper(self.min_p))
        return warpers

    def probabilities(self, think_MN: Tensor) -> Tensor:
        """Those that thinking tokens are drawn with for thinking logits, but for `epsilon`."""
        return self.warpers()(None, think_MN).softmax(-1)

    def choose(self, think_BFGN: Tensor, generator: torch.Generator, noise_BFGN: Tensor | None = None) -> Tensor:
        """Thinking tokens from 0 for thinking logits, `[B, F, G]`."""
        if noise_BFGN is not None:
            return (think_BFGN + noise_BFGN).argmax(-1)
        num_tokens = think_BFGN.shape[-1]
        # Logits that are not finite draw anything: the loss shows them, and the step is skipped on all ranks alike.
        probabilities_MN = self.probabilities(think_BFGN.reshape(-1, num_tokens)).nan_to_num(1.0)
        if self.epsilon:
            probabilities_MN = (1 - self.epsilon) * probabilities_MN + self.epsilon / num_tokens
        # As `torch.multinomial` draws one of each row, without its checks, for which a GPU would be waited for at every token.
        waiting_MN = torch.empty_like(probabilities_MN).exponential_(generator=generator)
        return (probabilities_MN / waiting_MN).argmax(-1).view(think_BFGN.shape[:-1])


def thought_logps(think_logits: Tensor, thoughts: Tensor, vocabulary: ThinkingVocabulary, temperature: float) -> Tensor:
    """log p(z | c, think) of given thinking ids, from thinking logits `[..., N]`."""
    return of_thoughts((think_logits / temperature).log_softmax(-1), thoughts, vocabulary.first_id)


def of_thoughts(values: Tensor, thoughts: Tensor, first_id: int) -> Tensor:
    """Those of given thinking ids, from values of each thinking token `[..., N]`."""
    choice = (thoughts - first_id).clamp(0, values.shape[-1] - 1)
    return values.gather(-1, choice[..., None])[..., 0]


def random_thoughts(thoughts_BKGL: Tensor, vocabulary: ThinkingVocabulary, generator: torch.Generator) -> Tensor:
    """Uniformly random thinking ids in the place of thoughts, `[B, K, G, L]`: the control that says nothing."""
    return vocabulary.first_id + torch.randint(vocabulary.num_tokens, thoughts_BKGL.shape, generator=generator, device=thoughts_BKGL.device)


def between_markers(tokens: Tensor, place: Tensor | int, lengths: Tensor, vocabulary: ThinkingVocabulary) -> Tensor:
    """Ordinary tokens of a text thought at a place (from 0), or the token that begins or ends it there."""
    tokens = torch.where(torch.as_tensor(place, device=tokens.device) == 0, vocabulary.first_id, tokens)
    return torch.where((place == lengths - 1) & (lengths > 1), vocabulary.guard_id - 1, tokens)


def sample_thoughts(
    engine: Engine,
    model,
    tokens_BT: Tensor,
    documents_BT: Tensor,
    forks_BK: Tensor,
    branching: Branching,
    sampling: Sampling,
    vocabulary: ThinkingVocabulary,
    generator: torch.Generator,
    given_BK: Tensor | None = None,
) -> Rollout:
    """Thinks G thoughts after each fork.

    With `memory: none` forks are thought at once: one pass over the trunk, then L - 1 of `[B, K*G]`, or as many for each part of the forks where there are
    many (`Engine.forks_at_once`). With `persistent` a thought may depend on the thoughts that stayed in the text before it, so forks are thought in order,
    each on the cache of what came before: K*L smaller passes.

    Args:
        generator: on the tokens' device; its state decides the draw entirely.
        given_BK: thinking tokens of each fork's thoughts, where the data says so.
    """
    batch, num_forks = forks_BK.shape
    groups, length, device = branching.num_generations, branching.max_length, tokens_BT.device
    rollout = replace(Rollout.empty(forks_BK, branching), text=sampling.text, filler=sampling.filler)
    draw: Draw | None = None if not sampling.text else "greedy" if sampling.top_k == 1 else generator
    if num_forks == 0:
        return rollout
    longest_BKG = torch.full_like(rollout.lengths_BKG, length) if given_BK is None else given_BK[:, :, None].expand_as(rollout.lengths_BKG)
    if not sampling.draws:
        return replace(rollout, thoughts_BKGL=torch.full_like(rollout.thoughts_BKGL, vocabulary.first_id), lengths_BKG=longest_BKG.clone())
    thoughts_BKGL, lengths_BKG, logps_BKGL = rollout.thoughts_BKGL, rollout.lengths_BKG, rollout.logps_BKGL
    if sampling.gumbel:
        noise_BKGLN = gumbel_noise((*thoughts_BKGL.shape, vocabulary.num_tokens), generator)
        rollout = replace(rollout, noise_BKGLN=noise_BKGLN)
    branching = replace(branching, lookahead=1, blind=False)  # what judges a thought comes later
    at_once = engine.forks_at_once(model, branching, num_forks)
    parts = [slice(first, min(first + at_once, num_forks)) for first in range(0, num_forks, at_once)]
    if not sampling.draw_stops:  # where ends are known beforehand one layout serves every pass
        lengths_BKG.copy_(longest_BKG)
    tree = ThoughtTree(documents_BT, forks_BK, branching, lengths_BKG)

    # Thoughts that stay are thought in passes of other lengths each time, and what is written comes from a generator of its own.
    same_shapes, capacity = not branching.persistent and draw is None, branching.num_decoded(tokens_BT.shape[1], num_forks)
    with evaluating(model), engine.room(model, batch, capacity) if same_shapes else contextlib.nullcontext() as room:
        decode = engine.decoder(model, room)
        done_B1 = torch.full((batch, 1), -1, device=device)
        for part in parts:
            if part.start == 0 or branching.persistent:  # the text up to the forks that it has all for
                turn = part if branching.persistent else slice(0, num_forks)
                tokens_BS = tree.tokens(tokens_BT, thoughts_BKGL)
                forks_BF = forks_BK[:, turn]
                nodes_BQ, real_BQ, scored_BF = _stretch(done_B1, forks_BF, None if room is None else tokens_BT.shape[1])
                if turn.start > 0:  # with the text goes what it sees and was not run yet, the last token of the thought that stays in it
                    kept_B1 = tree.branch_nodes(length).view(num_forks, groups)[turn.start - 1, :1].expand(batch, 1)
                    nodes_BQ, real_BQ, scored_BF = torch.cat([kept_B1, nodes_BQ], 1), nn.functional.pad(real_BQ, (1, 0), value=True), scored_BF + 1
                done_B1 = torch.maximum(done_B1, forks_BF.amax(1, keepdim=True))
                read, num_read = decode(tree, tokens_BS, nodes_BQ, real_BQ, scored_BF, think_only=not sampling.draw_stops), nodes_BQ.shape[1]
            of_turn = slice(part.start - turn.start, part.stop - turn.start)
            think_BFGN, gate_BFG = (values[:, of_turn].expand(-1, -1, groups, *values.shape[3:]) for values in _by_branch(read, batch, 1))
            thinking_BFG = torch.ones(gate_BFG.shape, dtype=torch.bool, device=device)
            longest_BFG = longest_BKG[:, part]
            written_BFG, written_logps_BFG = torch.zeros_like(longest_BFG), torch.zeros_like(gate_BFG)  # what a text thought goes on with
            for depth in range(1, length + 1):
                if sampling.draw_stops:
                    if depth > sampling.min_length:
                        thinking_BFG = thinking_BFG & (torch.rand(gate_BFG.shape, generator=generator, device=device) < gate_BFG.sigmoid())
                    lengths_BKG[:, part] += thinking_BFG & (depth <= longest_BFG)
                    tree = ThoughtTree(documents_BT, forks_BK, branching, lengths_BKG)
                if sampling.text:
                    chosen_BFG = between_markers(written_BFG, depth - 1, longest_BFG, vocabulary)
                    logps_BFG = torch.where(chosen_BFG < vocabulary.first_id, written_logps_BFG, 0.0)
                elif sampling.filler:
                    chosen_BFG, logps_BFG = torch.full_like(longest_BFG, vocabulary.first_id), torch.zeros_like(gate_BFG)
                else:
                    noise_BFGN = noise_BKGLN[:, part, :, depth - 1] if sampling.gumbel else None
                    chosen_BFG = vocabulary.first_id + sampling.choose(think_BFGN, generator, noise_BFGN)
                    logps_BFG = thought_logps(think_BFGN, chosen_BFG, vocabulary, sampling.temperature)
                thoughts_BKGL[:, part, :, depth - 1], logps_BKGL[:, part, :, depth - 1] = chosen_BFG, logps_BFG
                if depth == length:
                    break
                tokens_BS = tree.tokens(tokens_BT, thoughts_BKGL)
                nodes_BQ = tree.branch_nodes(depth).view(num_forks, groups)[part].reshape(1, -1).expand(batch, -1)
                every_BQ = torch.arange(nodes_BQ.shape[1], device=device).expand_as(nodes_BQ)
                think_only = not sampling.draw_stops and not sampling.text
                keep = num_read if depth == 1 and part.start > turn.start else None  # no thought sees those of the part before
                out = decode(tree, tokens_BS, nodes_BQ, torch.ones_like(nodes_BQ, dtype=torch.bool), every_BQ, think_only, draw, keep)
                think_BFGN, gate_BFG = _by_branch(out, batch, groups)
                if out.drawn_M is not None:
                    written_BFG, written_logps_BFG = out.drawn_M.view(gate_BFG.shape), out.target_logps_M.view(gate_BFG.shape)
    return rollout


def _by_branch(out: HeadOutputs, batch: int, groups: int) -> tuple[Tensor, Tensor]:
    return out.think_logits_MN.view(batch, -1, groups, out.think_logits_MN.shape[-1]), out.gate_logit_M.view(batch, -1, groups)


def _stretch(done_B1: Tensor, forks_BF: Tensor, longest: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The trunk from behind what is done up to the last of the given forks, padded to a length, or to that of the longest of the rows.

    Returns:
        nodes_BQ, real_BQ (not padding), and the place of each fork among them (0 for a fork that is not there).
    """
    last_B1 = forks_BF.amax(1, keepdim=True)
    longest = longest or max(int((last_B1 - done_B1).max()), 1)
    nodes_BQ = done_B1 + 1 + torch.arange(longest, device=forks_BF.device)
    return nodes_BQ.minimum(last_B1.clamp(min=0)), nodes_BQ <= last_B1, (forks_BF - done_B1 - 1).clamp(min=0)
