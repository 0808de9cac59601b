"""From a forward pass over nodes to what the objective speaks of: forks, thoughts, prefixes, judged tokens.

Shape suffixes as in tree.py; P = L + 1 prefixes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .head import HeadInputs, HeadOutputs
from .rollout import Rollout, thought_logps
from .tokens import ThinkingVocabulary
from .tree import ThoughtTree


@dataclass
class TreeScores:
    """What the model says along a tree, in fp32 nats.

    Attributes:
        trunk_logps_BT: log p(next real token) along the text; 0 where it carries no label.
        trunk_mask_BT: where it carries one.
        logps_BKGH: log p(judged token) after each thought.
        correct_BKGH: whether that token is the most likely one.
        baseline_logps_BKH: log p(judged token) along the text, without the thought (no gradient).
        mask_BKH: which judged tokens exist.
        prefix_logps_BKGP, prefix_correct_BKGP: the first judged token if the thought ended after l tokens; read only where every prefix was judged.
        gate_logits_BKGL: log p(think) - log p(speak) before each thinking token.
        think_logits_BKGLN: the thinking logits there.
        thought_logps_BKGL: log p(z_l | prefix, think) at the sampling temperature.
    """

    trunk_logps_BT: Tensor
    trunk_mask_BT: Tensor
    logps_BKGH: Tensor
    correct_BKGH: Tensor
    baseline_logps_BKH: Tensor
    mask_BKH: Tensor
    prefix_logps_BKGP: Tensor
    prefix_correct_BKGP: Tensor
    gate_logits_BKGL: Tensor
    think_logits_BKGLN: Tensor
    thought_logps_BKGL: Tensor

    @property
    def valid_BK(self) -> Tensor:
        """Forks that are there and have something to be judged by."""
        return self.mask_BKH.any(-1)


def head_inputs(tree: ThoughtTree, labels_BT: Tensor, every_prefix: bool) -> HeadInputs:
    """All nodes of a tree with their true next tokens."""
    targets_BS = tree.targets(labels_BT, every_prefix)
    return HeadInputs(torch.arange(targets_BS.numel(), device=targets_BS.device), targets_BS.flatten())


def read_scores(
    out: HeadOutputs, tree: ThoughtTree, head: HeadInputs, labels_BT: Tensor, rollout: Rollout, vocabulary: ThinkingVocabulary, temperature: float
) -> TreeScores:
    """Gathers a head's outputs over all nodes (`head_inputs`) by fork and thought."""
    batch, num_nodes = len(labels_BT), tree.num_nodes
    logps_BS, correct_BS, gate_BS = (values.view(batch, num_nodes) for values in (out.target_logps_M, out.correct_M, out.gate_logit_M))
    think_BSN = out.think_logits_MN.view(batch, num_nodes, -1)

    def at(values_BS: Tensor, nodes: Tensor) -> Tensor:
        return values_BS.gather(1, nodes.flatten(1)).view(nodes.shape)

    predictors, speakers, thinkers = tree.predictors(), tree.speakers(), tree.prefixes()[..., :-1]
    places_BKH, mask_BKH = tree.judged(labels_BT)
    think_BKGLN = think_BSN.gather(1, thinkers.flatten(1)[..., None].expand(-1, -1, think_BSN.shape[-1])).view(*thinkers.shape, think_BSN.shape[-1])
    return TreeScores(
        trunk_logps_BT=logps_BS[:, : tree.trunk_length],
        trunk_mask_BT=head.targets_M.view(batch, num_nodes)[:, : tree.trunk_length] >= 0,
        logps_BKGH=at(logps_BS, predictors),
        correct_BKGH=at(correct_BS, predictors),
        baseline_logps_BKH=at(logps_BS, places_BKH - 1).detach(),
        mask_BKH=mask_BKH,
        prefix_logps_BKGP=at(logps_BS, speakers),
        prefix_correct_BKGP=at(correct_BS, speakers),
        gate_logits_BKGL=at(gate_BS, thinkers),
        think_logits_BKGLN=think_BKGLN,
        thought_logps_BKGL=thought_logps(think_BKGLN, rollout.thoughts_BKGL, vocabulary, temperature),
    )
