"""What a thought is worth: functions of how the real tokens after it fare.

A reward function takes keyword arguments and returns `[B, K, G]`. Write your own with the arguments it needs and `**kwargs` for the rest.
One after which a thought is worth what the worst token after it is:

    def surprise(logps, mask, **kwargs):
        return logps.masked_fill(~mask[:, :, None], 0.0).amin(-1)

Arguments, all without gradient (B rows, K forks, G thoughts, L thinking tokens, H judged real tokens):

- `logps` `[B, K, G, H]`: log p(true token | text, thought), nats, fp32
- `correct` `[B, K, G, H]`: is the true token the most likely one (with `stop=learned`, its expectation over the stopping time)
- `baseline_logps` `[B, K, H]`: log p(true token | text), without the thought
- `mask` `[B, K, H]`: which judged tokens exist
- `thoughts` `[B, K, G, L]`, `lengths` `[B, K, G]`, `targets` `[B, K, H]`: ids
- `supplied` `[B, K, L]`: the data's own thoughts, `None` where it has none
"""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

RewardFunction = Callable[..., Tensor]
JUDGEMENT = ("logps", "correct", "baseline_logps", "mask", "thoughts", "lengths", "targets", "supplied")


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the marked entries of the last dimension; what is not marked may be anything."""
    return torch.where(mask, values, 0.0).sum(-1)


def failing(logps: Tensor) -> Tensor:
    """1 - p, exact where p is nearly 1."""
    return -torch.expm1(logps)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = -1) -> Tensor:
    """Mean over the marked entries of `dim` (or of all); 0 where there are none."""
    values = torch.where(mask, values, 0.0)
    if dim is None:
        return values.sum() / mask.expand_as(values).sum().clamp(min=1)
    return values.sum(dim) / mask.expand_as(values).sum(dim).clamp(min=1)


def log_prob(logps: Tensor, mask: Tensor, **kwargs) -> Tensor:
    """Mean log-probability of the judged tokens, nats (likelihood rewards: https://huggingface.co/papers/2602.03979)."""
    return masked_mean(logps, mask[:, :, None])


def accuracy(correct: Tensor, mask: Tensor, **kwargs) -> Tensor:
    """Part of the judged tokens that are the model's first choice."""
    return masked_mean(correct.float(), mask[:, :, None])


def prob(logps: Tensor, mask: Tensor, **kwargs) -> Tensor:
    """Mean probability of the judged tokens."""
    return masked_mean(logps.exp(), mask[:, :, None])


def information_gain(logps: Tensor, baseline_logps: Tensor, mask: Tensor, **kwargs) -> Tensor:
    """Mean log-probability gained over no thought, nats (RLP, https://huggingface.co/papers/2510.01265, eq. 3, with the model itself as the baseline)."""
    return masked_mean(logps - baseline_logps[:, :, None], mask[:, :, None])


def exact(thoughts: Tensor, lengths: Tensor, supplied: Tensor | None = None, **kwargs) -> Tensor:
    """1 for a thought that is the data's own, else 0: a hand-made signal, for experiments that take the reward's noise away."""
    if supplied is None:
        raise ValueError("The reward `exact` compares with the data's own thoughts: set supply_thoughts=True.")
    there = torch.arange(thoughts.shape[-1], device=thoughts.device) < lengths[..., None]
    return ((thoughts == supplied[:, :, None]) | ~there).all(-1).float()


REWARDS: dict[str, RewardFunction] = {f.__name__: f for f in (log_prob, accuracy, prob, information_gain, exact)}


def resolve_rewards(rewards: Sequence[str | RewardFunction] | str | RewardFunction) -> list[RewardFunction]:
    """Reward functions from names, from places of one's own (`module.function`) and callables.

    Raises:
        ValueError: an unknown name, for which the nearest known one is suggested, or a function that cannot be called with what there is.
    """
    names: list[Any] = [rewards] if isinstance(rewards, str) or callable(rewards) or not isinstance(rewards, Iterable) else list(rewards)
    names = [_imported(name) if isinstance(name, str) and "." in name else name for name in names]
    for name in names:
        if isinstance(name, str) and name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]
            known = f"Known: {', '.join(REWARDS)}, or MODULE.FUNCTION of your own, or a function."
            raise ValueError(f"reward_funcs has the unknown name {name!r}; did you mean {near!r}? {known}")
        if not isinstance(name, str):
            try:
                inspect.signature(name).bind(**dict.fromkeys(JUDGEMENT))
            except (TypeError, ValueError) as error:  # not a function, or one of C, which does not say what it takes
                raise ValueError(
                    f"The reward {name_of(name)} cannot be called ({error}): it gets {', '.join(JUDGEMENT)} as keywords, and **kwargs takes the rest."
                ) from None
    if not names:
        raise ValueError("reward_funcs is empty: name a reward, or leave it out; for thoughts without one set think_loss_weight=0.")
    return [REWARDS[r] if isinstance(r, str) else r for r in names]


def _imported(place: str) -> Any:
    """A function by the name of its module and its own; modules in the folder that a command was started in are found as well."""
    module, _, name = place.rpartition(".")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"reward_funcs names {place}, which cannot be imported ({error}): give MODULE.FUNCTION, of a module that is found from here."
        ) from error


def name_of(reward: RewardFunction) -> str:
    return getattr(reward, "__name__", type(reward).__name__)


def names_of(rewards: Sequence[RewardFunction]) -> list[str]:
    """What each is called in logs; those of one name are numbered."""
    names = [name_of(reward) for reward in rewards]
    return [name if names.count(name) == 1 else f"{name}_{names[: i + 1].count(name)}" for i, name in enumerate(names)]


def total_reward(functions: list[RewardFunction], weights: list[float], **judgement: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weighted sum `[B, K, G]`, and each reward by itself `[F, B, K, G]`.

    Raises:
        ValueError: a function returns anything but a tensor `[B, K, G]`.
    """
    lengths_BKG = judgement["lengths"]
    assert lengths_BKG is not None
    values = []
    for function in functions:
        own = judgement if function in REWARDS.values() else {name: None if tensor is None else tensor.clone() for name, tensor in judgement.items()}
        value = function(**own)  # what works in place changes nothing of the loss
        if not isinstance(value, Tensor) or value.shape != lengths_BKG.shape:
            found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(f"The reward {name_of(function)} returned {found}; it must return a tensor [B, K, G], here {list(lengths_BKG.shape)}.")
        values.append(value.float())
    # Weights stay on the host: to send them a GPU would be waited for.
    total_BKG = sum((weight * value for weight, value in zip(weights, values, strict=True)), torch.zeros_like(values[0]))
    return total_BKG, torch.stack(values)
