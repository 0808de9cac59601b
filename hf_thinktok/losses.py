"""Policy losses on thinking tokens, and the exact gate.

Shape suffixes as in tree.py; A actions of one thought (its tokens, and with `stop: sampled` its stops), P = L + 1 prefixes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .rewards import masked_mean


@dataclass(frozen=True)
class PolicyLoss:
    """GRPO's family of losses over the actions of thoughts. Names and defaults are those of `trl.GRPOConfig`.

    Args:
        kind: how the actions' terms are summed up. `dr_grpo` (https://huggingface.co/papers/2503.20783): over the number of thoughts of all ranks times
            `max_length`, however long they are. `grpo` (https://huggingface.co/papers/2402.03300): mean of each thought, then of thoughts.
            `bnpo`: over the actions of this micro-batch. `dapo` (https://huggingface.co/papers/2503.14476): over those of all ranks at a time. `cispo`
            (https://huggingface.co/papers/2506.13585): the clipped ratio as a weight without gradient, summed as `dapo`.
        epsilon, epsilon_high: the ratio is clipped to `[1 - epsilon, 1 + epsilon_high]`; for `cispo` to at most `epsilon_high`.
        delta: upper bound of the ratio where the advantage is negative (two-sided clipping, https://huggingface.co/papers/2505.07291).
        importance_sampling_level: one ratio per `token`, or their geometric mean per `sequence` (GSPO, https://huggingface.co/papers/2507.18071).
        beta: weight of the KL divergence to a reference model (the k3 estimate, GRPO eq. 4).
    """

    kind: str = "dr_grpo"
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    importance_sampling_level: str = "token"
    beta: float = 0.0

    def __call__(
        self,
        logps_BKGA: Tensor,
        old_logps_BKGA: Tensor,
        advantages_BKGA: Tensor,
        mask_BKGA: Tensor,
        max_length: int,
        num_thoughts: Tensor | float,
        reference_logps_BKGA: Tensor | None = None,
        global_actions: Tensor | float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and how often the ratio was clipped and how far the policy is from the reference.

        Args:
            mask_BKGA: which actions were taken.
            num_thoughts: mean number of thoughts per rank, for `dr_grpo` and `grpo`.
            global_actions: mean number of actions per rank, for `dapo` and `cispo`; `None` for those of this rank.
        """
        log_ratio = logps_BKGA - old_logps_BKGA
        if self.importance_sampling_level == "sequence":
            log_ratio = masked_mean(log_ratio, mask_BKGA)[..., None].expand_as(log_ratio)
        ratio = log_ratio.exp()
        if self.kind == "cispo":
            clipped = ratio > self.epsilon_high
            terms = -ratio.clamp(max=self.epsilon_high).detach() * advantages_BKGA * logps_BKGA
        else:
            bounded = ratio.clamp(1 - self.epsilon, 1 + self.epsilon_high)
            first = (ratio if self.delta is None else ratio.clamp(max=self.delta)) * advantages_BKGA
            terms = -torch.minimum(first, bounded * advantages_BKGA)
            clipped = ((ratio < 1 - self.epsilon) & (advantages_BKGA < 0)) | ((ratio > 1 + self.epsilon_high) & (advantages_BKGA > 0))
        metrics = {"clip_ratio": masked_mean(clipped.float(), mask_BKGA, None)}
        if reference_logps_BKGA is not None:
            away = reference_logps_BKGA - logps_BKGA
            kl = away.exp() - away - 1
            terms = terms + self.beta * kl
            metrics["kl"] = masked_mean(kl.detach(), mask_BKGA, None)
        terms = torch.where(mask_BKGA, terms, 0.0)
        if self.kind == "dr_grpo":
            return terms.sum() / (num_thoughts * max_length), metrics
        if self.kind == "grpo":
            return masked_mean(terms, mask_BKGA).sum() / num_thoughts, metrics
        actions = mask_BKGA.sum() if self.kind == "bnpo" or global_actions is None else global_actions
        return terms.sum() / torch.as_tensor(actions).clamp(min=1), metrics


def stopping_logps(gate_logits_BKGL: Tensor, must_think: bool = False) -> Tensor:
    """The distribution of a thought's length: log w_l for l = 0..L, `[B, K, G, L+1]`.

    With s_l = p(speak | z_1..l): w_l = s_l * prod_{j<l} (1 - s_j), and what remains on l = L (PonderNet, https://huggingface.co/papers/2107.05407, eq. 3).

    Args:
        gate_logits_BKGL: log p(think) - log p(speak) before each thinking token.
        must_think: the first token is always thought (`blind`, where nothing can be said without one).
    """
    if must_think:
        first = torch.full_like(gate_logits_BKGL[..., :1], torch.inf)
        gate_logits_BKGL = torch.cat([first, gate_logits_BKGL[..., 1:]], -1)
    start = torch.zeros_like(gate_logits_BKGL[..., :1])
    reach_BKGP = torch.cat([start, logsigmoid(gate_logits_BKGL).cumsum(-1)], -1)
    return reach_BKGP + torch.cat([logsigmoid(-gate_logits_BKGL), start], -1)


def expected_length(stop_logps_BKGP: Tensor) -> Tensor:
    """sum_l l * w_l, `[B, K, G]`."""
    return (stop_logps_BKGP.exp() * torch.arange(stop_logps_BKGP.shape[-1], device=stop_logps_BKGP.device)).sum(-1)


def stop_actions(gate_logits_BKGL: Tensor, lengths_BKG: Tensor, must_think: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the drawn stops, and which were drawn, each `[B, K, G, L]`: to think on before each token, to speak after the last."""
    step_L = torch.arange(gate_logits_BKGL.shape[-1], device=gate_logits_BKGL.device)
    went_on = step_L < lengths_BKG[..., None]
    drawn = step_L <= lengths_BKG[..., None]
    if must_think:
        drawn = drawn & (step_L > 0)
    return logsigmoid(torch.where(went_on, gate_logits_BKGL, -gate_logits_BKGL)), drawn
