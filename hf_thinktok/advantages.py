"""How much better a thought did than the others at the same place in the same text, or than was to be expected there.

Only thoughts of one fork are compared, so an easy next token credits nobody. Shape suffixes as in tree.py; D features, M forks in a row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-4


def group_advantages(rewards_BKG: Tensor, valid_BK: Tensor, advantage: str = "group", scale_rewards: str = "none", expected_BK: Tensor | None = None) -> Tensor:
    """Reward minus a baseline from the fork's own group, or minus what was expected, `[B, K, G]`; 0 at forks that are not there.

    Args:
        advantage: `group`: minus the group's mean (GRPO, https://huggingface.co/papers/2402.03300). `loo`: minus the mean of the others (RLOO,
            https://huggingface.co/papers/2402.14740), which makes the gradient unbiased; it is G / (G - 1) times the former.
        scale_rewards: divide by the standard deviation: `none` (Dr. GRPO), `group`, or of the whole `batch`.
        expected_BK: a `ValueBaseline`'s, which takes the place of the group's mean.
    """
    baseline_BK = rewards_BKG.mean(-1) if expected_BK is None else expected_BK
    advantages_BKG = rewards_BKG - baseline_BK[..., None]
    if advantage == "loo":
        advantages_BKG = advantages_BKG * (rewards_BKG.shape[-1] / (rewards_BKG.shape[-1] - 1))
    valid_BKG = valid_BK[:, :, None].expand_as(rewards_BKG)
    return torch.where(valid_BKG, _scaled(advantages_BKG, rewards_BKG, valid_BKG, scale_rewards), 0.0)


def token_advantages(prefix_logps_BKGP: Tensor, reach_BKGP: Tensor, valid_BK: Tensor, scale_rewards: str = "none") -> Tensor:
    """Credit of each thinking token by itself, `[B, K, G, L]`, for one judged token.

    The l-th token earns r_l = log p(y | z_1..l) - log p(y | z_1..l-1), and so do the later ones that it led to, as far as thinking gets there.
    What came before it cancels. The baseline is the mean of the same depth in the group, without the thought itself (G / (G - 1)).

    Args:
        prefix_logps_BKGP: log p(y | z_1..l) for l = 0..L (P = L + 1), nats.
        reach_BKGP: probability that the thought has at least l tokens; 1 or 0 where its length is given. What stands behind it may be anything.
    """
    reached_BKGL = reach_BKGP[..., 1:] > 0
    gained_BKGL = torch.where(reached_BKGL, reach_BKGP[..., 1:] * prefix_logps_BKGP.diff(dim=-1), 0.0)
    to_come_BKGL = gained_BKGL.flip(-1).cumsum(-1).flip(-1)
    groups = to_come_BKGL.shape[2]
    advantages_BKGL = (to_come_BKGL - to_come_BKGL.mean(2, keepdim=True)) * (groups / (groups - 1))
    valid_BK11 = valid_BK[:, :, None, None]
    there_BKGL = reached_BKGL & valid_BK11
    scaled_BKLG = _scaled(advantages_BKGL.transpose(2, 3), to_come_BKGL.transpose(2, 3), there_BKGL.transpose(2, 3), scale_rewards)
    return torch.where(valid_BK11, scaled_BKLG.transpose(2, 3), 0.0)


def posterior(log_likelihoods_BKG: Tensor, valid_BK: Tensor) -> Tensor:
    """The group's posterior over its thoughts, w = softmax of their log-likelihoods, `[B, K, G]`; 0 at forks that are not there.

    The gradient of `log (1/G) sum_g p(y | z_g)` weights the speaker's cross-entropy by w (multi-sample bounds: IWAE,
    https://huggingface.co/papers/1509.00519). w - 1/G is the thought's advantage: as G grows the gradient of log p(y), for few thoughts an estimate of it
    and not the gradient of that bound (which VIMCO has, https://huggingface.co/papers/1602.06725).
    """
    return log_likelihoods_BKG.softmax(-1) * valid_BK[:, :, None]


class ValueBaseline:
    """What a fork's thoughts are expected to earn, from its hidden state before anything is thought: a linear value function.

    The baseline of an actor with a critic (https://huggingface.co/papers/1602.01783), for one thought at a fork as well as for many. It is fitted in
    closed form, by ridge regression on running moments, so that it has no learning rate, and no parameters that a launcher or a checkpoint would
    have to know of.

    Args:
        reduce: the mean of a tensor over all ranks.
        decay: what remains of the moments at each optimizer step.
        ridge: in parts of a feature's variance.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor, decay: float = 0.95, ridge: float = 0.1):
        self.reduce, self.decay, self.ridge = reduce, decay, ridge
        self.moments: Tensor | None = None  # sums over forks of (1, x, y) times (1, x), each weighted by its age

    def __call__(self, hidden_BKD: Tensor, rewards_BK: Tensor, valid_BK: Tensor, share: float = 1.0) -> Tensor:
        """The expected reward of each fork, nats; then learns from what it was. The first batch with any is expected to earn its mean.

        Args:
            share: of an optimizer step, which this batch is.
        """
        x_MD, y_M = hidden_BKD.detach().float().flatten(0, 1), rewards_BK.detach().flatten()
        x_MD = x_MD / x_MD.square().mean(-1, keepdim=True).sqrt().clamp(min=EPSILON)
        row_MC = torch.cat([torch.ones_like(y_M)[:, None], x_MD, y_M[:, None]], 1).where(valid_BK.flatten()[:, None], 0.0)
        new_CC = self.reduce(row_MC.T @ row_MC)
        first = self.moments is None
        old_CC = new_CC if self.moments is None else self.moments.to(new_CC)  # a checkpoint's are in main memory
        count = old_CC[0, 0].clamp(min=torch.finfo(old_CC.dtype).tiny)  # a mean over ranks, which may be below 1
        mean_C = old_CC[0] / count
        covariance_CC = old_CC / count - mean_C.outer(mean_C)
        gram_DD = covariance_CC[1:-1, 1:-1]
        damping = self.ridge * gram_DD.diagonal().mean() + EPSILON
        slope_D = torch.linalg.solve(gram_DD + damping * torch.eye(len(gram_DD), device=gram_DD.device), covariance_CC[1:-1, -1])
        values_M = mean_C[-1] + (x_MD - mean_C[1:-1]) @ (torch.zeros_like(slope_D) if first else slope_D)
        if torch.isfinite(new_CC).all() and new_CC[0, 0] > 0:  # one reward that is not finite skips its step, and is forgotten
            self.moments = new_CC if first else self.decay**share * old_CC + new_CC
        return values_M.view_as(rewards_BK)

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self.moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moments = state["moments"]


def _scaled(advantages: Tensor, rewards: Tensor, there: Tensor, scale_rewards: str) -> Tensor:
    """Divides by a standard deviation: of the group, which is the last dimension, or of the rewards that are there."""
    if scale_rewards == "group":
        return advantages / (rewards.std(-1, keepdim=True) + EPSILON)
    if scale_rewards == "batch":
        count = there.sum().clamp(min=2)
        mean = torch.where(there, rewards, 0.0).sum() / count
        variance = torch.where(there, (rewards - mean).square(), 0.0).sum() / (count - 1)
        return advantages / (variance.sqrt() + EPSILON)
    return advantages
