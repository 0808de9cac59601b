"""How much better a thought did than the others at the same place in the same text.

Only thoughts of one fork are compared, so an easy next token credits nobody. Shape suffixes as in tree.py.
"""

import torch
from torch import Tensor

EPSILON = 1e-4


def group_advantages(rewards_BKG: Tensor, valid_BK: Tensor, advantage: str = "group", scale_rewards: str = "none") -> Tensor:
    """Reward minus a baseline from the fork's own group, `[B, K, G]`; 0 at forks that are not there.

    Args:
        advantage: `group`: minus the group's mean (GRPO, https://huggingface.co/papers/2402.03300). `loo`: minus the mean of the others (RLOO,
            https://huggingface.co/papers/2402.14740), which makes the gradient unbiased; it is G / (G - 1) times the former.
        scale_rewards: divide by the standard deviation: `none` (Dr. GRPO), `group`, or of the whole `batch`.
    """
    advantages_BKG = rewards_BKG - rewards_BKG.mean(-1, keepdim=True)
    if advantage == "loo":
        advantages_BKG = advantages_BKG * (rewards_BKG.shape[-1] / (rewards_BKG.shape[-1] - 1))
    return _scaled(advantages_BKG, rewards_BKG, valid_BK, scale_rewards)


def token_advantages(prefix_logps_BKGP: Tensor, reach_BKGP: Tensor, valid_BK: Tensor, scale_rewards: str = "none") -> Tensor:
    """Credit of each thinking token by itself, `[B, K, G, L]`, for one judged token.

    The l-th token earns r_l = log p(y | z_1..l) - log p(y | z_1..l-1), and so do the later ones that it led to, as far as thinking gets there.
    What came before it cancels. The baseline is the mean of the same depth in the group, without the thought itself (G / (G - 1)).

    Args:
        prefix_logps_BKGP: log p(y | z_1..l) for l = 0..L (P = L + 1), nats.
        reach_BKGP: probability that the thought has at least l tokens; 1 for `stop: fixed`.
    """
    gained_BKGL = reach_BKGP[..., 1:] * prefix_logps_BKGP.diff(dim=-1)
    to_come_BKGL = gained_BKGL.flip(-1).cumsum(-1).flip(-1)
    groups = to_come_BKGL.shape[2]
    advantages_BKGL = (to_come_BKGL - to_come_BKGL.mean(2, keepdim=True)) * (groups / (groups - 1))
    return _scaled(advantages_BKGL.transpose(2, 3), to_come_BKGL.transpose(2, 3), valid_BK, scale_rewards).transpose(2, 3)


def posterior(log_likelihoods_BKG: Tensor, valid_BK: Tensor) -> Tensor:
    """The group's posterior over its thoughts, w = softmax of their log-likelihoods, `[B, K, G]`; 0 at forks that are not there.

    The gradient of `log (1/G) sum_g p(y | z_g)` weights the speaker's cross-entropy by w; w - 1/G is the thought's advantage under the same
    objective (multi-sample bounds: IWAE, https://huggingface.co/papers/1509.00519; VIMCO, https://huggingface.co/papers/1602.06725).
    """
    return log_likelihoods_BKG.softmax(-1) * valid_BK[:, :, None]


def _scaled(advantages: Tensor, rewards: Tensor, valid_BK: Tensor, scale_rewards: str) -> Tensor:
    """Divides by a standard deviation (`rewards` has the group as its last dimension) and clears forks that are not there."""
    valid = valid_BK.view(*valid_BK.shape, *[1] * (advantages.ndim - 2))
    if scale_rewards == "group":
        advantages = advantages / (rewards.std(-1, keepdim=True) + EPSILON)
    elif scale_rewards == "batch":
        count = (valid.expand_as(rewards)).sum().clamp(min=2)
        mean = torch.where(valid, rewards, 0.0).sum() / count
        variance = torch.where(valid, (rewards - mean).square(), 0.0).sum() / (count - 1)
        advantages = advantages / (variance.sqrt() + EPSILON)
    return torch.where(valid, advantages, 0.0)
