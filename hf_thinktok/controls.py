"""Runs to compare a thinking one with: what differs in their options, and nothing else does."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from .config import ThinkTokConfig
from .config_checks import OF_DRAWN_THOUGHTS, OF_REWARDED_TOKENS, OF_REWARDS, default_of

# What a run that draws no thoughts leaves at its default: the options of rewards, and the others.
ABOUT_REWARDS = (
    *OF_REWARDS, "objective", "posterior_temperature", "posterior_smoothing", "epsilon", "epsilon_high", "delta", "importance_sampling_level",
)  # fmt: skip
ABOUT_THOUGHTS = (
    *OF_REWARDED_TOKENS, *OF_DRAWN_THOUGHTS, "search_random", "search_changes", "coverage_of", "coverage_where", "coverage_decay", "balance_given",
    "curriculum_threshold", "curriculum_replay", "thought_ce_weight", "continuous_layer", "num_completions_to_print",
)  # fmt: skip


def control(kind: str, stop: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What a control of a run with this `stop` leaves at its default, and what it sets.

    Args:
        kind: `no_think`, the same model and text, and nothing is thought; or `filler`, thoughts as long, which say nothing. Where a run draws how long its
            thoughts are its fillers do too, and are rewarded as its thoughts are.
    """
    if kind == "no_think":  # the best by the loss of its text, as no other figure is had of it
        return (*ABOUT_THOUGHTS, *ABOUT_REWARDS, "metric_for_best_model", "greater_is_better"), {"num_forks": 0, "text_ce_weight": 1.0}
    if stop == "sampled":
        return ABOUT_THOUGHTS, {"thoughts": "filler"}
    return (*ABOUT_THOUGHTS, *ABOUT_REWARDS), {"thoughts": "filler", "num_generations": 1}


def at_defaults(args: ThinkTokConfig, names: Iterable[str], **changes) -> ThinkTokConfig:
    """The same options with some at their defaults, and others as told."""
    return replace(args, **{name: default_of(ThinkTokConfig, name) for name in names} | changes)


def control_of(args: ThinkTokConfig, kind: str) -> ThinkTokConfig:
    """The options of a run's control; of `none`, the run itself."""
    if kind == "none":
        return args
    left_out, changes = control(kind, args.stop)
    return at_defaults(args, left_out, **changes)
