"""What makes a language form where there is none yet: schedules, coverage, balance, an entropy servo, and search.

At the start thoughts say nothing, so the speaker learns nothing from them, so no reward tells them apart: uniform is a saddle. A frozen choice of a
few thoughts is the other trap. The parts here keep a run out of both; `docs/lab_notebook.md` has what each is worth.

Shape suffixes as in tree.py; P candidates.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .rewards import failing, masked_mean

logger = logging.getLogger(__name__)

# Frequencies below this count as this: a bonus for never having been said has a limit.
LEAST_FREQUENCY = 1e-4
# Thoughts are counted one by one up to so many, and by a hash of as many values beyond.
LARGEST_TABLE = 2**20
# Of the hash: a thought is a number modulo this prime (2^31 - 1), of which a multiple's middle bits are taken (Knuth's golden ratio).
PRIME, MULTIPLIER = 2**31 - 1, 2654435761
# The servo's gain and its bounds on the weight of the entropy.
SERVO_GAIN, SERVO_LIMIT = 0.5, 0.5


def scheduled(schedule: Sequence[float], step: int) -> float:
    """The value of a schedule at a step: `[value]`, or `[start, end, steps]`, which goes linearly and then stays; a fourth number is the step it begins at."""
    if len(schedule) == 1:
        return schedule[0]
    start, end, steps, *begin = schedule
    since = step - sum(begin)
    if since >= steps:
        return end
    return start + (end - start) * max(0.0, since) / max(1.0, steps)


def ever(schedule: Sequence[float]) -> bool:
    """Whether a schedule is anything but 0 at any step."""
    return any(schedule[:2])


class Coverage:
    """How often each whole thought is used, or each token in its place, as a running average over steps.

    Args:
        num_tokens, max_length: N and L.
        decay: what remains of the average at each update.
        by_place: count tokens, each in its place, in place of whole thoughts.
    """

    def __init__(self, num_tokens: int, max_length: int, decay: float, device: torch.device, by_place: bool = False):
        self.radix, self.length, self.decay, self.by_place = num_tokens + 1, max_length, decay, by_place  # one more symbol for "ended before"
        self.size = self.radix * max_length if by_place else min(self.radix**max_length, LARGEST_TABLE)
        alike = num_tokens if by_place else min(num_tokens**max_length, LARGEST_TABLE)
        self.frequency_C = torch.full((self.size,), 1 / alike, device=device)

    def codes(self, choices: Tensor, lengths: Tensor) -> Tensor:
        """Numbers of what is counted, `[..., 1]` or by place `[..., L]`: choices `[..., L]` from 0, lengths `[...]`."""
        place_L = torch.arange(self.length, device=choices.device)  # a thought is the same however long the batch's longest is
        choices = torch.nn.functional.pad(choices, (0, self.length - choices.shape[-1]))
        said = torch.where(place_L < lengths[..., None], choices, self.radix - 1)
        if self.by_place:
            return place_L * self.radix + said
        code = torch.zeros_like(lengths)
        for place in range(self.length):  # L small integer operations
            code = (code * self.radix + said[..., place]) % PRIME
        return (code if self.radix**self.length <= LARGEST_TABLE else (code * MULTIPLIER % 2**40) >> 20)[..., None]

    def update(self, codes: Tensor, valid: Tensor, total=lambda counts: counts, share: float = 1.0) -> None:
        """Counts the thoughts of a batch, `valid` `[...]`, which is a `share` of an optimizer step; `total` sums counts over ranks."""
        counts_C = total(torch.bincount(codes[valid].flatten(), minlength=self.size).float())
        thoughts = counts_C.sum().clamp(min=1) / codes.shape[-1]
        kept = torch.where(counts_C.sum() > 0, self.decay**share, 1.0)  # a batch without forks says nothing
        self.frequency_C = kept * self.frequency_C + (1 - kept) * counts_C / thoughts

    def rarity(self, codes: Tensor) -> Tensor:
        """-log of the frequency, nats, `[...]`: of a thought, or of its tokens, and of the places behind its end, as if they were independent."""
        return -self.frequency_C[codes].clamp(min=LEAST_FREQUENCY).log().sum(-1)

    def state_dict(self) -> dict[str, Tensor]:
        return {"frequency": self.frequency_C, "counted": self._counted()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on counting, or with options that count other things begins anew."""
        if len(state["frequency"]) != self.size or not torch.equal(state.get("counted", self._counted()), self._counted()):
            logger.warning("The checkpoint counted other thoughts (coverage_of, max_think_length, num_think_tokens): how rare each is is counted anew.")
            return
        self.frequency_C = state["frequency"].to(self.frequency_C)

    def _counted(self) -> Tensor:
        return torch.tensor([self.radix, self.length, self.by_place])


def coverage_share(where: str, logps: Tensor) -> Tensor:
    """How much of the bonus for rarity is paid at each place, `[..., 1]`: all of it, or 1 - p of what follows after its best thought (`unsolved`).

    Texts that share a thought are told apart by none, p is 1/2 at most, and both look for a rarer one; who has a thought of its own keeps it.

    Args:
        logps: log p of what follows after each thought, `[..., G]`, nats.
    """
    best = logps.max(-1, keepdim=True).values
    return torch.ones_like(best) if where == "everywhere" else failing(best)


def thought_entropy(think_logps_BKGLN: Tensor, mask_BKGL: Tensor) -> Tensor:
    """Mean entropy of the next thinking token, nats, of its log-probabilities."""
    return masked_mean(-(think_logps_BKGLN.exp() * think_logps_BKGLN).sum(-1), mask_BKGL, None)


def marginal_entropy(think_logps_BKGLN: Tensor, mask_BKGL: Tensor, choices_BKGL: Tensor | None = None) -> Tensor:
    """Entropy of the batch's mean choice at each position, nats, averaged over positions by how often they are reached.

    Args:
        choices_BKGL: with the thoughts (from 0), the mean is taken given the token before, so that copying one varied token L times earns nothing.
    """
    num_positions, num_tokens = think_logps_BKGLN.shape[-2:]
    context_BKGL = torch.arange(num_positions, device=mask_BKGL.device).expand(mask_BKGL.shape)
    if choices_BKGL is not None:
        before_BKGL = torch.cat([torch.zeros_like(choices_BKGL[..., :1]), choices_BKGL[..., :-1]], -1)
        context_BKGL = context_BKGL * num_tokens + before_BKGL
    num_contexts = num_positions * (1 if choices_BKGL is None else num_tokens)
    mask_M = mask_BKGL.flatten()
    probabilities_MN = think_logps_BKGLN.exp().flatten(0, -2) * mask_M[:, None]
    sums_CN = probabilities_MN.new_zeros(num_contexts, num_tokens).index_add(0, context_BKGL.flatten(), probabilities_MN)
    counts_C = sums_CN.detach().sum(-1)
    mean_CN = sums_CN / counts_C.clamp(min=1e-6)[:, None]
    entropy_C = -(mean_CN * mean_CN.clamp(min=1e-9).log()).sum(-1)
    return (entropy_C * counts_C).sum() / counts_C.sum().clamp(min=1e-6)


def entropy_servo(entropy: Tensor, target: float) -> Tensor:
    """The weight of an entropy bonus that drives the entropy to its target from both sides: negative above it, positive below."""
    return (SERVO_GAIN * (target - entropy.detach())).clamp(-SERVO_LIMIT, SERVO_LIMIT)


def candidate_thoughts(
    own: Callable[[int], Tensor],
    num_candidates: int,
    random_part: float,
    num_tokens: int,
    length: int,
    generator: torch.Generator,
    places: tuple[int, ...] = (),
    changes: int | None = None,
) -> Tensor:
    """Thoughts to search among, `[..., P, L]` from 0: all there are if they are no more than asked for, else some of the policy's own and some random ones.

    Args:
        own: gives so many thoughts of the policy at each place.
        places: the leading dimensions, one search each.
        changes: a random candidate is one of the policy's thoughts with so many tokens redrawn; `None`: with all of them.
    """
    if num_tokens**length <= num_candidates:
        return all_thoughts(num_tokens, length, generator.device).expand(*places, -1, -1)
    kept = num_candidates - round(random_part * num_candidates)
    redrawn = length if changes is None else changes
    needed = num_candidates if redrawn < length else kept  # one rollout, also for those that are changed
    sampled = own(needed) if needed else torch.empty(*places, 0, length, dtype=torch.long, device=generator.device)
    random = torch.randint(num_tokens, (*places, num_candidates - kept, length), generator=generator, device=generator.device)
    if redrawn < length:
        rank = torch.rand(random.shape, generator=generator, device=generator.device).argsort(-1)
        random = torch.where(rank < redrawn, random, sampled[..., kept:, :])
    return torch.cat([sampled[..., :kept, :], random], -2)


def all_thoughts(num_tokens: int, length: int, device: torch.device) -> Tensor:
    """Every thought of a length, `[N**L, L]` from 0."""
    numbers_P = torch.arange(num_tokens**length, device=device)
    return torch.stack([numbers_P // num_tokens**place % num_tokens for place in reversed(range(length))], -1)
