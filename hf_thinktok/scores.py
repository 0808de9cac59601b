"""From forward passes over nodes to what the objective speaks of: forks, thoughts, prefixes, judged tokens.

Shape suffixes as in tree.py; P = L + 1 prefixes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .engine import Pass
from .head import HeadInputs, HiddenInputs
from .rollout import Rollout, of_thoughts, thought_logps
from .tokens import ThinkingVocabulary
from .tree import ThoughtTree, before

# Passes over nodes, and what each of them gives.
Run = Callable[[list[Pass]], list]


@dataclass
class TreeScores:
    """What the model says along a tree, in fp32 nats.

    Attributes:
        trunk_logps_BT: log p(next real token) along the text; 0 where it carries no label.
        trunk_mask_BT: where it carries one.
        trunk_correct_BT: whether that token is the most likely one.
        logps_BKGH: log p(judged token) after each thought.
        correct_BKGH: whether that token is the most likely one.
        baseline_logps_BKH: log p(judged token) along the text, without the thought (no gradient).
        labels_BKH: the judged tokens, -100 for those that do not exist.
        compared_BKH: of these, which the text without the thought predicts as well. A thought that stays is part of that text after the next token.
        prefix_logps_BKGP, prefix_correct_BKGP: the first judged token if the thought ended after l tokens; read only where every prefix was judged.
        gate_logits_BKGL: log p(think) - log p(speak) before each thinking token; 0 where nobody asked for the gate.
        last_gate_logits_BKG: the same behind L thinking tokens, where every thought ends; 0 where it ended before.
        think_logps_BKGLN: log p(each thinking token | think) there.
        thought_logps_BKGL: log p(z_l | prefix, think) at the sampling temperature.
        fork_hidden_BKD: hidden states at the forks where they were asked for (no gradient).
        last_hidden_BKGD: those that each thought's last token was chosen from, likewise.
    """

    trunk_logps_BT: Tensor
    trunk_mask_BT: Tensor
    trunk_correct_BT: Tensor
    logps_BKGH: Tensor
    correct_BKGH: Tensor
    baseline_logps_BKH: Tensor
    labels_BKH: Tensor
    compared_BKH: Tensor
    prefix_logps_BKGP: Tensor
    prefix_correct_BKGP: Tensor
    gate_logits_BKGL: Tensor
    last_gate_logits_BKG: Tensor
    think_logps_BKGLN: Tensor
    thought_logps_BKGL: Tensor
    fork_hidden_BKD: Tensor | None = None
    last_hidden_BKGD: Tensor | None = None

    def under_gates_of_first(self, count: int) -> "TreeScores":
        """The same with the gates of the first thoughts of a group for all: controls behind them are thought as often, and as long."""
        gates_BKGL = self.gate_logits_BKGL
        return replace(self, gate_logits_BKGL=gates_BKGL[:, :, :count].repeat(1, 1, gates_BKGL.shape[2] // count, 1))

    @property
    def trunk_loss(self) -> Tensor:
        """Mean cross-entropy of the text."""
        return -self.trunk_logps_BT.sum() / self.trunk_mask_BT.sum().clamp(min=1)

    @property
    def mask_BKH(self) -> Tensor:
        """Which judged tokens exist."""
        return self.labels_BKH >= 0

    @property
    def valid_BK(self) -> Tensor:
        """Forks that are there and have something to be judged by."""
        return self.mask_BKH.any(-1)


def score_tree(
    run: Run,
    tree: ThoughtTree,
    labels_BT: Tensor,
    rollout: Rollout,
    vocabulary: ThinkingVocabulary,
    temperature: float = 1.0,
    every_prefix: bool = False,
    gate: bool = True,
    detach_gate: bool = False,
    split: bool = False,
    fork_hidden: bool = False,
    last_hidden: bool = False,
) -> TreeScores:
    """Runs a model, or under `split` a thinker and a speaker, over a tree, and gathers what they say by fork and thought.

    Only nodes with a target, and where the gate is asked for those where a thought goes on or ends, meet the real vocabulary.

    Args:
        every_prefix: also judge what would be said if the thought ended early.
        detach_gate: its gradient reaches the thinking rows alone.
        fork_hidden, last_hidden: also give these hidden states.
        split: the speaker predicts wherever it sees what it needs: everywhere, or under `blind` in the rereading alone. The thinker does the rest.
    """
    targets_BS, prefixes = tree.targets(labels_BT, every_prefix), tree.prefixes()
    thinkers = prefixes[..., :-1]
    written_BS = torch.zeros_like(targets_BS, dtype=torch.bool)
    if rollout.text:  # the policy's own tokens are scored as text is
        written_BS.scatter_(1, thinkers.flatten(1), rollout.drawn_BKGL.flatten(1))
        targets_BS = targets_BS.scatter(1, thinkers[..., 1:].flatten(1), rollout.thoughts_BKGL[..., 1:].flatten(1)).where(written_BS, targets_BS)
    judged_BS = targets_BS >= 0
    asked = prefixes if gate else thinkers
    thinks_BS = torch.zeros_like(judged_BS).scatter_(1, asked.flatten(1), True) & tree.valid_BS  # what would be thought behind an end, nobody reads
    logps, correct, gates = (torch.zeros(targets_BS.numel(), device=targets_BS.device) for _ in range(3))

    speaker_nodes = tree.speaker_nodes if split else targets_BS.new_zeros(0)
    speaks_S = torch.zeros(tree.num_nodes, dtype=torch.bool, device=judged_BS.device).index_fill(0, speaker_nodes, True)
    own_BS = judged_BS & (~speaks_S | written_BS)
    spoken_BS = own_BS | thinks_BS if gate else own_BS
    full_M, silent_M = (nodes_BS.flatten().nonzero()[:, 0] for nodes_BS in (spoken_BS, thinks_BS & ~spoken_BS))
    scored_M = torch.cat([full_M, silent_M])
    head = HeadInputs(scored_M, targets_BS.flatten()[scored_M].where(own_BS.flatten()[scored_M], -100), spoken=len(full_M), detach_gate=detach_gate)
    hidden: dict[str, Tensor] = {}  # whose states are asked for
    if fork_hidden:
        hidden["fork_hidden_BKD"] = thinkers[:, :, 0, 0]
    if last_hidden:
        hidden["last_hidden_BKGD"] = thinkers.gather(-1, (rollout.lengths_BKG - 1).clamp(min=0)[..., None])[..., 0]
    rows_B1 = torch.arange(len(targets_BS), device=targets_BS.device)[:, None] * targets_BS.shape[1]
    extra = [HiddenInputs((nodes.flatten(1) + rows_B1).flatten()) for nodes in hidden.values()]
    passes = [Pass([head, *extra], tree.thinker_nodes if split else None)]
    heads = [head]
    if len(speaker_nodes):  # under `blind` there is nothing to read before thinking starts
        spoken_M = (judged_BS & ~own_BS).flatten().nonzero()[:, 0]
        heads.append(HeadInputs(spoken_M, targets_BS.flatten()[spoken_M]))
        passes.append(Pass(heads[-1], speaker_nodes, speaks=True))
    (out, *states), *spoken = run(passes)
    if gate:
        gates = gates.index_put((full_M,), out.gate_logit_M)
    for inputs, one in zip(heads, [out, *spoken], strict=True):
        logps, correct = logps.index_put((inputs.nodes_M,), one.target_logps_M), correct.index_put((inputs.nodes_M,), one.correct_M.float())

    def at(values: Tensor, nodes: Tensor) -> Tensor:
        return values.view(targets_BS.shape).gather(1, nodes.flatten(1)).view(nodes.shape)

    predictors, speakers = tree.predictors(), tree.speakers()
    places_BKH, labels_BKH = tree.judged(labels_BT)
    mask_BKH = labels_BKH >= 0
    scored_at_BS = torch.zeros_like(targets_BS).flatten().index_copy(0, scored_M, torch.arange(len(scored_M), device=scored_M.device))
    think_BKGLN = out.think_logits_MN.index_select(0, at(scored_at_BS, thinkers).flatten()).view(*thinkers.shape, vocabulary.num_tokens).log_softmax(-1)
    if rollout.text:
        thought_logps_BKGL = at(logps, thinkers)
    elif temperature == 1.0:
        thought_logps_BKGL = of_thoughts(think_BKGLN, rollout.thoughts_BKGL, vocabulary.first_id)
    else:
        thought_logps_BKGL = thought_logps(think_BKGLN, rollout.thoughts_BKGL, vocabulary, temperature)
    return TreeScores(
        trunk_logps_BT=logps.view(targets_BS.shape)[:, : tree.trunk_length],
        trunk_mask_BT=judged_BS[:, : tree.trunk_length],
        trunk_correct_BT=correct.view(targets_BS.shape)[:, : tree.trunk_length],
        logps_BKGH=at(logps, predictors),
        correct_BKGH=at(correct, predictors),
        baseline_logps_BKH=before(logps.view(targets_BS.shape), places_BKH).detach(),
        labels_BKH=labels_BKH,
        compared_BKH=mask_BKH & (torch.arange(mask_BKH.shape[-1], device=mask_BKH.device) == 0) if tree.branching.persistent else mask_BKH,
        prefix_logps_BKGP=at(logps, speakers),
        prefix_correct_BKGP=at(correct, speakers),
        gate_logits_BKGL=at(gates, thinkers),
        last_gate_logits_BKG=at(gates, prefixes[..., -1:])[..., 0],
        think_logps_BKGLN=think_BKGLN,
        thought_logps_BKGL=thought_logps_BKGL,
        **{name: state.detach().float().unflatten(0, nodes.shape) for (name, nodes), state in zip(hidden.items(), states, strict=True)},
    )
