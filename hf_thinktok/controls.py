"""Runs to compare a thinking one with: what differs in their options, and nothing else does."""

from .config_checks import OF_DRAWN_THOUGHTS, OF_REWARDED_THOUGHTS

# What a run that draws no thoughts leaves at its default.
ABOUT_THOUGHTS = (
    *OF_REWARDED_THOUGHTS, *OF_DRAWN_THOUGHTS, "posterior_temperature", "posterior_smoothing", "search_random", "search_changes",
    "coverage_of", "coverage_where", "coverage_decay", "balance_given", "curriculum_threshold", "curriculum_replay",
    "thought_ce_weight", "continuous_layer", "num_completions_to_print",
)  # fmt: skip
# no_think: the same model and text, nothing is thought. filler: thoughts as long, which say nothing.
CONTROLS = {"no_think": {"num_forks": 0, "text_ce_weight": 1.0}, "filler": {"thoughts": "filler", "num_generations": 1}}
