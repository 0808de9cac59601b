"""The part of the loss that is about thinking, from a tree's scores.

    think_ce_weight * share * CE(real tokens after thoughts) + think_loss_weight * policy loss(thoughts)
    + gate_loss_weight * (exact gate + think_cost * E[length] + end of the longest) - balance_coef * H(mean choice) - servo * H(choice)
    + thought_ce_weight * CE(supplied thoughts)

Each part is a mean over the forks that are there. The share of the cross-entropy is that of the forks among all tokens of the text: what follows a thought
weighs as one token of the text (its judged tokens together: a mean). As a plain mean a few forks would outweigh the rows that they stand in.

Soft thoughts (`hf_thinktok.thoughts`) have no policy loss: the cross-entropy's own gradient goes through them.

Shape suffixes as in tree.py; P = L + 1 prefixes, A actions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from .advantages import group_advantages, posterior, token_advantages
from .config import ThinkTokConfig
from .exploration import coverage_share, entropy_servo, ever, marginal_entropy, scheduled, thought_entropy
from .losses import expected_length, stop_actions, stopping_logps
from .rewards import RewardFunction, masked_mean, masked_sum, names_of, total_reward
from .rollout import Rollout, of_thoughts
from .scores import TreeScores

# The gate's logit where there is nothing to think: finite, so that its logarithms have gradients.
SHUT = -50.0


@dataclass
class Speech:
    """How the real tokens fare after each thought, its length summed out where it is learned.

    Attributes:
        logps_BKGH: log p(judged token | text, thought), with the gradient of the speaker alone.
        correct_BKGH: whether it is the most likely token, or how probably.
        own_correct_BKGH: the same with the thought's own length, where `correct_BKGH` has the smoothed one.
        own_logps_BKG: the log-probability of all judged tokens with the thought's own length, where that is learned (no gradient).
        gate_logps_BKG: the same with the gradient of the gate alone, as it is smoothed for the gate.
        lengths_BKG: (expected) thinking tokens, with the gate's gradient.
        reach_BKGP: probability to think at least l tokens, as content and speaker are weighted.
        longest_BKG: probability to think all L, with the thought's own length (no gradient).
    """

    logps_BKGH: Tensor
    correct_BKGH: Tensor
    own_correct_BKGH: Tensor
    own_logps_BKG: Tensor | None
    gate_logps_BKG: Tensor | None
    lengths_BKG: Tensor
    reach_BKGP: Tensor
    longest_BKG: Tensor


def smoothed(stop_logps_BKGP: Tensor, even_BKGP: Tensor, part: float) -> Tensor:
    """Log-weights of lengths, of which a part goes to all possible ones alike."""
    own, alike = (math.log(share) if share else -math.inf for share in (1 - part, part))
    return torch.logaddexp(own + stop_logps_BKGP, alike + even_BKGP.log())


def speak(scores: TreeScores, rollout: Rollout, stop: str, smoothing: float, blind: bool, gate_smoothing: float = 0.0) -> Speech:
    """Sums out the stopping time: log p(y) = logsumexp_l(log w_l + log p(y | z_1..l)), exactly; the gradients of gate and speaker apart.

    Args:
        smoothing: part of the weight of speaker and content that goes to all lengths alike.
        gate_smoothing: the same part for the gate. Its gradient is that of sum_l q_l log w_l with the posterior q of the lengths, under what is smoothed: at 0
            it is the gradient of log p(y), as in EM, whose E-step has a broader prior while there is something to find.
    """
    if stop != "learned":
        lengths = rollout.lengths_BKG.float()
        reach = (torch.arange(scores.prefix_logps_BKGP.shape[-1], device=lengths.device) <= rollout.lengths_BKG[..., None]).float()
        return Speech(scores.logps_BKGH, scores.correct_BKGH, scores.correct_BKGH, None, None, lengths, reach, reach[..., -1])
    possible_BKGL = rollout.said_BKGL  # all, but where the curriculum has no thoughts yet
    stop_logps_BKGP = stopping_logps(scores.gate_logits_BKGL.masked_fill(~possible_BKGL, SHUT), must_think=blind)
    even_BKGP = nn.functional.pad(possible_BKGL.float(), (1, 0), value=0.0 if blind else 1.0)
    even_BKGP = even_BKGP / even_BKGP.sum(-1, keepdim=True)
    own_logps_BKGP = stop_logps_BKGP.detach()
    log_weights_BKGP = smoothed(own_logps_BKGP, even_BKGP, smoothing)
    weights_BKGP, own_BKGP = log_weights_BKGP.exp(), own_logps_BKGP.exp()
    # By how much each length weighs more; of one that cannot be (log w = -inf both times) nothing.
    more_BKGP = (smoothed(own_logps_BKGP, even_BKGP, gate_smoothing) - own_logps_BKGP).masked_fill(own_logps_BKGP.isinf(), 0.0)
    told_BKGP = scores.prefix_logps_BKGP.detach()
    return Speech(
        logps_BKGH=(log_weights_BKGP + scores.prefix_logps_BKGP).logsumexp(-1, keepdim=True),
        correct_BKGH=(weights_BKGP * scores.prefix_correct_BKGP).sum(-1, keepdim=True),
        own_correct_BKGH=(own_BKGP * scores.prefix_correct_BKGP).sum(-1, keepdim=True),
        own_logps_BKG=(own_logps_BKGP + told_BKGP).logsumexp(-1),
        gate_logps_BKG=(stop_logps_BKGP + more_BKGP + told_BKGP).logsumexp(-1),
        lengths_BKG=expected_length(stop_logps_BKGP),
        reach_BKGP=weights_BKGP.flip(-1).cumsum(-1).flip(-1),
        longest_BKG=own_BKGP[..., -1],
    )


def gained(scores: TreeScores, speech: Speech) -> Tensor:
    """Bits a token that each thought saves over the text without it, as the model would really think: with a learned stop at its own lengths, `[B, K, G]`."""
    spoken_BKGH = speech.logps_BKGH if speech.own_logps_BKG is None else speech.own_logps_BKG[..., None]
    return masked_mean(spoken_BKGH - scores.baseline_logps_BKH[:, :, None], scores.compared_BKH[:, :, None]) / math.log(2)


def actions(scores: TreeScores, rollout: Rollout, config: ThinkTokConfig) -> tuple[Tensor, Tensor]:
    """Log-probabilities of what was drawn, and which of it counts, each `[B, K, G, A]`: the thinking tokens and, where they are drawn, the stops."""
    valid = scores.valid_BK[:, :, None, None]
    logps, mask = scores.thought_logps_BKGL, rollout.drawn_BKGL & valid
    if config.stop == "sampled":
        stop_logps, drawn = stop_actions(scores.gate_logits_BKGL, rollout.lengths_BKG, must_think=config.blind)
        logps, mask = torch.cat([logps, stop_logps], -1), torch.cat([mask, drawn & valid], -1)
    return logps, mask


def credit(
    scores: TreeScores,
    speech: Speech,
    rollout: Rollout,
    config: ThinkTokConfig,
    rewards: list[RewardFunction],
    weights: list[float],
    step: int = 0,
    value: Callable[..., Tensor] | None = None,
):
    """Rewards and what they mean for each thought.

    Args:
        value: what `advantage: value` compares with: a `ValueBaseline`.

    Returns:
        speaker_weights_BKG: how much each thought's real tokens train the speaker; sums to 1 over a group.
        advantages_BKGL: of those that were drawn: all but a supplied one.
        rewards_BKG, and each reward function's value by itself `[F, B, K, G]`.
    """
    valid_BK, length = scores.valid_BK, rollout.thoughts_BKGL.shape[-1]
    logps_BKGH = speech.logps_BKGH.detach()
    rewards_BKG, each_FBKG = total_reward(
        rewards,
        weights,
        logps=logps_BKGH,
        correct=speech.correct_BKGH.float(),
        baseline_logps=scores.baseline_logps_BKH,
        mask=scores.mask_BKH,
        thoughts=rollout.thoughts_BKGL,
        lengths=rollout.lengths_BKG,
        targets=scores.labels_BKH,
        supplied=rollout.thoughts_BKGL[:, :, 0] if rollout.supplied else None,
    )
    cost = scheduled(config.think_cost, step)
    extra_BKG = -cost * speech.lengths_BKG.detach()
    told_BKG = masked_sum(logps_BKGH, scores.mask_BKH[:, :, None])
    if rollout.rarity_BKG is not None:
        share_BK1 = coverage_share(config.coverage_where, told_BKG)
        extra_BKG = extra_BKG + scheduled(config.coverage_coef, step) * share_BK1 * rollout.rarity_BKG
    rewards_BKG = rewards_BKG + extra_BKG
    # A supplied thought was not drawn: it is no part of the comparison, and alone teaches the speaker.
    drawn = rollout.drawn_G
    group_size = rewards_BKG[..., drawn].shape[-1]
    speaker_weights_BKG = valid_BK[:, :, None].expand(*valid_BK.shape, group_size) / group_size
    if config.objective == "marginal":
        posterior_BKG = posterior((told_BKG + extra_BKG)[..., drawn] / config.posterior_temperature, valid_BK)
        # The policy loss is a mean over the group; the posterior's weights are its share of a sum.
        advantages_BKG = (posterior_BKG - 1 / group_size) * valid_BK[:, :, None] * group_size
        speaker_weights_BKG = (1 - config.posterior_smoothing) * posterior_BKG + config.posterior_smoothing * speaker_weights_BKG
        advantages_BKGL = advantages_BKG[..., None].expand(-1, -1, -1, length)
    elif config.advantage == "token":
        reach_BKGP = speech.reach_BKGP.detach()
        charged_BKGP = scores.prefix_logps_BKGP.detach() - cost * torch.arange(length + 1, device=reach_BKGP.device)
        advantages_BKGL = token_advantages(charged_BKGP[:, :, drawn], reach_BKGP[:, :, drawn], valid_BK, config.scale_rewards)
    else:
        expected_BK = None
        if value is not None:
            assert scores.fork_hidden_BKD is not None
            expected_BK = value(scores.fork_hidden_BKD, rewards_BKG[..., drawn].mean(-1), valid_BK)
        advantages_BKG = group_advantages(rewards_BKG[..., drawn], valid_BK, config.advantage, config.scale_rewards, expected_BK)
        advantages_BKGL = advantages_BKG[..., None].expand(-1, -1, -1, length)
    if rollout.supplied:
        speaker_weights_BKG = torch.zeros_like(rewards_BKG)
        speaker_weights_BKG[..., 0] = valid_BK.float()
    return speaker_weights_BKG, advantages_BKGL, rewards_BKG, each_FBKG


def gate_loss(speech: Speech, config: ThinkTokConfig, valid_BK: Tensor, cost: float) -> Tensor:
    """Minus the log-likelihood of what follows under the lengths that the gate gives, plus their price, summed over forks.

    Its gradient is exact for the thoughts at hand, unless `gate_smoothing` says otherwise; their posterior is not smoothed here.
    """
    told_BKG = speech.gate_logps_BKG
    assert told_BKG is not None
    told_BK = told_BKG.logsumexp(-1) - math.log(told_BKG.shape[-1]) if config.objective == "marginal" else told_BKG.mean(-1)
    return torch.where(valid_BK, cost * speech.lengths_BKG.mean(-1) - told_BK, 0.0).sum()


def ending_loss(scores: TreeScores, speech: Speech) -> Tensor:
    """Minus log p(speak) behind the last token that a thought can have, as often as it comes so far, summed over forks.

    A rollout ends there whatever the gate says, so nothing else trains it, and plain generation, which knows no most, would think on.
    """
    end_BK = (speech.longest_BKG * softplus(scores.last_gate_logits_BKG)).mean(-1)
    return torch.where(scores.valid_BK, end_BK, 0.0).sum()


def thinking_loss(
    scores: TreeScores,
    rollout: Rollout,
    config: ThinkTokConfig,
    rewards: list[RewardFunction],
    weights: list[float],
    token_weight: Tensor | float,
    global_mean=None,
    step: int = 0,
    first_id: int = 0,
    value: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The thinking part of the loss, a mean over forks, and its metrics.

    Args:
        token_weight: what a token of the text weighs in the loss, and so what follows a thought.
        global_mean: averages a tensor over all ranks, which do not have as many forks each.
        step: the clock of the schedules.
        first_id: the first thinking id.
        value: as in `credit`.
    """
    smoothings = scheduled(config.stop_smoothing, step), scheduled(config.gate_smoothing, step)
    speech = speak(scores, rollout, config.stop, smoothings[0], config.blind, smoothings[1])
    speaker_weights_BKG, advantages_BKGL, rewards_BKG, each_FBKG = credit(scores, speech, rollout, config, rewards, weights, step, value)
    across = global_mean or (lambda count: count)
    num_forks = across(scores.valid_BK.sum().float())
    num_forks = torch.where(num_forks > 0, num_forks, 1.0)  # every part is 0 where no rank has any
    speaks, thinks = _turns(config, step)

    spoken_BKG = masked_mean(speech.logps_BKGH, scores.mask_BKH[:, :, None])
    loss = speaks * config.think_ce_weight * token_weight * -(speaker_weights_BKG * spoken_BKG).sum()
    if config.stop == "learned":
        gate = gate_loss(speech, config, scores.valid_BK, scheduled(config.think_cost, step))
        loss = loss + thinks * config.gate_loss_weight * gate / num_forks
    if config.needs_gate and rollout.thoughts_BKGL.shape[-1] == config.max_think_length:  # and not what a curriculum allows for now
        # Where stops are drawn it is one action more, of advantage 1.
        weight = config.gate_loss_weight if config.stop == "learned" else config.think_loss_weight / config.max_think_length
        loss = loss + thinks * weight * ending_loss(scores, speech) / num_forks
    metrics = _metrics(scores, speech, rollout, rewards_BKG, each_FBKG, rewards, config)
    if not config.rewards_draws and config.thoughts != "gumbel":  # nothing was drawn
        return loss, metrics

    logps_BKGA, mask_BKGA = actions(scores, rollout, config)
    if rollout.advantages_BKGL is not None:
        advantages_BKGL = rollout.advantages_BKGL
    elif config.num_iterations > 1:  # of the model that drew them, for the iterations to come
        rollout.old_logps_BKGA, rollout.advantages_BKGL = logps_BKGA.detach(), advantages_BKGL
    diversity_loss, diversity_metrics = _diversity(scores, rollout, mask_BKGA[..., : rollout.thoughts_BKGL.shape[-1]], config, step, first_id)
    diversity_loss = diversity_loss * scores.valid_BK.sum() / num_forks  # a mean over this rank's forks, of which it may have fewer than others
    if config.thoughts == "gumbel":  # the cross-entropy above reaches thoughts through what the speaker reads
        return loss + diversity_loss, metrics | diversity_metrics
    advantages_BKGA = advantages_BKGL.repeat(1, 1, 1, logps_BKGA.shape[-1] // advantages_BKGL.shape[-1])
    counts_globally = config.think_loss_type in ("dapo", "cispo")
    drawn = rollout.drawn_G
    old_logps_BKGA = logps_BKGA.detach() if rollout.old_logps_BKGA is None else rollout.old_logps_BKGA
    policy_loss, policy_metrics = config.policy_loss()(
        logps_BKGA[:, :, drawn],
        old_logps_BKGA[:, :, drawn],
        advantages_BKGA,
        mask_BKGA[:, :, drawn],
        config.max_think_length,
        num_forks * max(advantages_BKGA.shape[2], 1),
        reference_logps_BKGA=None if rollout.reference_logps_BKGA is None else rollout.reference_logps_BKGA[:, :, drawn],
        global_actions=across(mask_BKGA[:, :, drawn].sum().float()) if counts_globally else None,
    )
    loss = loss + thinks * config.think_loss_weight * policy_loss
    loss = loss + thinks * diversity_loss
    if rollout.supplied and config.thought_ce_weight:
        logps_BKL = of_thoughts(scores.think_logps_BKGLN[:, :, 0], rollout.thoughts_BKGL[:, :, 0], first_id)  # whatever the temperature of sampling
        supplied_BK = masked_mean(logps_BKL, mask_BKGA[:, :, 0, : rollout.thoughts_BKGL.shape[-1]])
        loss = loss - thinks * config.thought_ce_weight * supplied_BK.sum() / num_forks
    return loss, metrics | policy_metrics | diversity_metrics


def _turns(config: ThinkTokConfig, step: int) -> tuple[float, float]:
    """Whether speaker and thinker learn at this step."""
    speaks = config.alternate is None or step % sum(config.alternate) < config.alternate[0]
    thinks = config.alternate is None or not speaks
    return float(speaks and config.freeze != "speaker"), float(thinks and config.freeze != "thinker")


def _diversity(scores: TreeScores, rollout: Rollout, mask_BKGL: Tensor, config: ThinkTokConfig, step: int, first_id: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Varied thoughts over the batch (balance), and as much doubt about each as the schedule asks for (servo)."""
    loss, metrics = scores.trunk_logps_BT.new_zeros(()), {}
    if ever(config.balance_coef):
        choices_BKGL = (rollout.thoughts_BKGL - first_id).clamp(min=0) if config.balance_given == "token" else None
        coefficient = scheduled(config.balance_coef, step)
        with torch.set_grad_enabled(coefficient != 0 and torch.is_grad_enabled()):  # at 0 it is only logged
            entropy = marginal_entropy(scores.think_logps_BKGLN, mask_BKGL, choices_BKGL)
        loss = loss - coefficient * entropy
        metrics["mean_choice_entropy"] = entropy.detach()
    if config.thought_entropy_target is not None:
        entropy = thought_entropy(scores.think_logps_BKGLN, mask_BKGL)
        weight = entropy_servo(entropy, scheduled(config.thought_entropy_target, step) * math.log(scores.think_logps_BKGLN.shape[-1]))
        loss = loss - weight * entropy
        metrics["entropy_weight"] = weight
    return loss, metrics


@torch.no_grad()
def _metrics(
    scores: TreeScores,
    speech: Speech,
    rollout: Rollout,
    rewards_BKG: Tensor,
    each_FBKG: Tensor,
    rewards: list[RewardFunction],
    config: ThinkTokConfig,
) -> dict[str, Tensor]:
    """What the policy does: a thought that was chosen in the light of what follows is left out, and one that sees its latest token alone, but from what is
    said of the group that learns."""
    valid_BK = scores.valid_BK
    own = slice(rollout.num_chosen, rewards_BKG.shape[-1] - rollout.markovian)
    valid = valid_BK[:, :, None]
    thought_BKGL = torch.where(rollout.said_BKGL, rollout.thoughts_BKGL, -1)
    same_BKGG = (thought_BKGL[:, :, :, None] == thought_BKGL[:, :, None]).all(-1)
    first_of_kind_BKG = ~(same_BKGG.tril(-1).any(-1))
    drawn = slice(int(rollout.chosen), own.stop)  # by the policy, and written down with what it gave them
    differences_BKGL = (scores.thought_logps_BKGL - rollout.logps_BKGL).abs()
    metrics = {
        "reward": masked_mean(rewards_BKG[..., own], valid, None),
        "think_length": masked_mean(speech.lengths_BKG[..., own], valid, None),
        "accuracy": masked_mean(speech.own_correct_BKGH[:, :, own].float(), scores.mask_BKH[:, :, None], None),
        "distinct_thoughts": masked_mean(first_of_kind_BKG.sum(-1).float(), valid_BK, None),
        "think_gain": masked_mean(gained(scores, speech)[..., own], valid, None),
        "sampling_logp_difference": masked_mean(differences_BKGL[:, :, drawn], (rollout.drawn_BKGL & valid[..., None])[:, :, drawn], None),
    }
    if rewards_BKG.shape[-1] > 1:
        spread_BK = rewards_BKG.std(-1)
        metrics["reward_std"] = masked_mean(spread_BK, valid_BK, None)
        metrics["frac_reward_zero_std"] = masked_mean((spread_BK < 1e-6).float(), valid_BK, None)
    if not rollout.text:  # of the thinking vocabulary, which does not write text
        metrics["thought_entropy"] = thought_entropy(scores.think_logps_BKGLN, rollout.said_BKGL & valid[..., None])
    if config.needs_gate:
        possible_BKG = rollout.said_BKGL[..., 0] | (config.stop == "sampled")
        thinks_BKG = torch.ones_like(speech.lengths_BKG) if config.blind else scores.gate_logits_BKGL[..., 0].sigmoid()
        metrics["gate"] = masked_mean(thinks_BKG * possible_BKG, valid, None)
    for name, values_BKG in zip(names_of(rewards), each_FBKG, strict=True):
        metrics[f"rewards/{name}"] = masked_mean(values_BKG[..., own], valid, None)
    return metrics
