"""What a `ThinkTokConfig` is refused for, each with the sentence that mends it: impossible values, options that cannot go together, or do nothing."""

import contextlib
import difflib
import math
from collections.abc import Collection, Iterator
from dataclasses import MISSING, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING

from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from .errors import RunError
from .exploration import ever
from .rewards import REWARDS, RewardFunction, resolve_rewards
from .thoughts import SOFT

if TYPE_CHECKING:
    from .config import ThinkTokConfig

# Options that may change with the step: a number, or start, end, the steps between and the step it begins at.
SCHEDULES = ("search", "epsilon_greedy", "coverage_coef", "balance_coef", "thought_entropy_target", "think_cost", "stop_smoothing", "gate_smoothing")
SCHEDULED_FRACTIONS = ("epsilon_greedy", "thought_entropy_target", "stop_smoothing", "gate_smoothing")
LISTS = ("alternate", "reward_funcs", "reward_weights", "fork_markers", "think_init_words", "curriculum_think_length")
FRACTIONS = ("top_p", "min_p", "search_random", "posterior_smoothing", "coverage_decay", "curriculum_replay", "markovian_share", "epsilon")
WEIGHTS = ("think_loss_weight", "gate_loss_weight", "think_ce_weight", "text_ce_weight", "thought_ce_weight", "beta")
# Of what evaluations report of thoughts (`GainByDocument`), that of which the best model has least, and most.
LESS_IS_BETTER = ("bits_no_think", "bits_think", "bits_random_thought", "gain_stderr", "gain_over_random_stderr", "mean_think_length")
MORE_IS_BETTER = ("gain", "gain_over_random")
OF_THOUGHTS = (*LESS_IS_BETTER, *MORE_IS_BETTER)
RATES = ("speaker_learning_rate", "think_learning_rate")
LENGTHS_VARY = ", and under blind max_think_length above 1"
POLICY_LEARNS = "think_loss_weight above 0, and freeze=none or speaker"
SEVERAL_LENGTHS = "thoughts of several lengths, by which the types divide: stop=sampled, or stop=fixed with a column think_length"
REWARDED_BY_FUNCTIONS = "objective=expected with advantage=group, loo or value (the others use log_prob)"
# Options without effect where nothing that is drawn is rewarded (soft thoughts, fillers of given or learned length), on tokens that are not drawn and
# rewarded (those, and all fillers), and on thoughts that are not drawn at all.
OF_REWARDS = (
    "freeze", "alternate", "reward_funcs", "reward_weights", "advantage", "scale_rewards", "think_loss_type", "think_loss_weight", "beta", "num_iterations",
)  # fmt: skip
OF_REWARDED_TOKENS = ("search", "epsilon_greedy", "coverage_coef", "markovian_share", "supply_thoughts", "top_k", "top_p", "min_p")
OF_THINKING_VOCABULARY = (
    "search", "epsilon_greedy", "coverage_coef", "balance_coef", "thought_entropy_target", "revive_every", "markovian_share", "supply_thoughts", "top_k",
    "top_p", "min_p",
)  # fmt: skip
OF_DRAWN_THOUGHTS = ("temperature", "balance_coef", "thought_entropy_target", "revive_every", "log_completions")
# Without effect where the thinker gets no gradient, where its policy gets none, and there but for the marginal objective, whose posterior they change.
OF_LEARNING_THINKERS = ("balance_coef", "thought_entropy_target", "think_loss_weight", "gate_loss_weight", "detach_gate", "thought_ce_weight")
OF_POLICY_LOSS = ("think_loss_type", "beta", "epsilon", "epsilon_high", "delta", "importance_sampling_level")
OF_COMPARISON = ("reward_funcs", "reward_weights", "advantage", "scale_rewards")


def check_values(config: "ThinkTokConfig", own: Collection[str]) -> None:
    """Each option by itself; choices of those named `own`, the others' are their libraries'."""
    for name in own:
        if name != "lookahead" and getattr(config, name) is None and (default := default_of(type(config), name)) is not None:  # that may have no bound
            raise ValueError(f"{name} is null: give a value, or leave it out for its default, {default}.")
    for name in LISTS:
        if not isinstance(value := getattr(config, name), list | None):
            raise ValueError(f"{name}={value!r} is no list: give a list of them.")
    for entry in fields(config):
        allowed = entry.metadata.get("choices") if entry.name in own else None
        if allowed and (value := getattr(config, entry.name)) not in allowed:
            raise ValueError(f"{entry.name}={value!r} is not known; it is one of {', '.join(allowed)}.")
    least = {
        "num_forks": 0,
        "num_generations": 1,
        "max_think_length": 1,
        "num_iterations": 1,
        "think_start": 0,
        "top_k": 0,
        "max_nonfinite_steps": 1,
        "num_completions_to_print": 1,
        "prompt_length": 1,
        "revive_every": 0,
        "learning_rate": 0,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "dataloader_num_workers": 0,
    }
    counts = "num_think_tokens", "lookahead", "search_changes", "alternate", "max_length", "curriculum_think_length", "continuous_layer"
    _check_numbers(config, (*(name for name in least if name != "learning_rate"), *counts))
    for name, bound in least.items():
        if getattr(config, name) < bound:
            raise ValueError(f"{name}={getattr(config, name)} must be at least {bound}.")
    if config.max_length is not None and config.max_length < 1:
        raise ValueError(f"max_length={config.max_length} must be at least 1, or null for rows as long as they are.")
    if config.num_think_tokens is not None and config.num_think_tokens < 0:
        raise ValueError(f"num_think_tokens={config.num_think_tokens} must be 0 (no thinking) or more.")
    if config.lookahead is not None and config.lookahead < 1:
        raise ValueError(f"lookahead={config.lookahead} must be at least 1, or null for all tokens that follow.")
    if config.search_changes is not None and config.search_changes < 1:
        raise ValueError(f"search_changes={config.search_changes} must be at least 1, or null for all tokens.")
    for name in RATES:
        if getattr(config, name) is not None and getattr(config, name) < 0:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 0, or left out for that of the others, learning_rate.")
    if config.temperature <= 0:
        raise ValueError(f"temperature={config.temperature} must be above 0: thoughts are explored by sampling.")
    for name in FRACTIONS:
        if getattr(config, name) is not None and not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name}={getattr(config, name)} must be between 0 and 1.")
    for name in SCHEDULES:
        schedule = getattr(config, name)
        if schedule is not None and (len(schedule) not in (1, 3, 4) or min(schedule) < 0 or schedule[2:] == [0]):
            raise ValueError(
                f"{name}={schedule} is no schedule: give one number, or start, end and the steps between them (and the step it begins at), none negative."
            )
    if ever(config.search) and round(max(config.search[:2])) == 0:
        raise ValueError(f"search={config.search} is never as much as one candidate: give a number of them, or leave search out.")
    for name in SCHEDULED_FRACTIONS:
        if max((schedule := getattr(config, name) or [0])[:2]) > 1:
            raise ValueError(f"{name}={schedule} must stay between 0 and 1.")
    thresholds = config.curriculum_threshold
    if thresholds is not None and (not thresholds or min(thresholds) < 0 or max(thresholds) > 1):
        raise ValueError(f"curriculum_threshold={thresholds} must be between 0 and 1: one number, or one for each level of the data but the last.")
    lengths, most = config.curriculum_think_length, config.max_think_length
    if lengths is not None and (not lengths or lengths != sorted(lengths) or lengths[0] < int(config.blind) or lengths[-1] != most):
        raise ValueError(
            f"curriculum_think_length={lengths} must rise from {int(config.blind)} or more to max_think_length={most}: give a whole number for each level."
        )
    for name in ("fork_markers", "think_init_words"):
        if any(not isinstance(text, str) for text in getattr(config, name) or ()):
            raise ValueError(f"{name}={getattr(config, name)!r} is to be a list of texts: put numbers in quotes.")
    if config.alternate is not None and (len(config.alternate) != 2 or min(config.alternate) < 1):
        raise ValueError(f"alternate={config.alternate} must be two numbers: steps of prediction and steps of thinking, each at least 1.")
    if config.coverage_decay == 1:
        raise ValueError("coverage_decay=1.0 keeps the frequencies as they began, and a bonus for rare tokens has none to go by: set it below 1.")
    if config.posterior_temperature <= 0:
        raise ValueError(f"posterior_temperature={config.posterior_temperature} must be above 0.")
    for name in WEIGHTS:
        if getattr(config, name) < 0:
            raise ValueError(f"{name}={getattr(config, name)} must not be negative.")
    if config.epsilon_high is not None and config.epsilon_high < 0:
        raise ValueError(f"epsilon_high={config.epsilon_high} must be at least 0, or left out for that of epsilon.")
    highest = 1 + (config.epsilon if config.epsilon_high is None else config.epsilon_high)
    if config.delta is not None and config.delta <= highest:
        raise ValueError(f"delta={config.delta} would cut what epsilon lets pass: it must be above 1 + epsilon_high, here {highest:g}.")
    if any(not isinstance(name, str) for name in config.reward_funcs):
        raise ValueError("reward_funcs has what is no name, and a checkpoint keeps names: give functions to ThinkTokTrainer(..., reward_funcs=[...]).")
    resolve_rewards(config.reward_funcs)
    # Functions are passed to the trainer, which counts them.
    if (
        config.reward_weights is not None
        and config.reward_funcs != default_of(type(config), "reward_funcs")
        and len(config.reward_weights) != len(config.reward_funcs)
    ):
        raise ValueError(
            f"reward_weights has {len(config.reward_weights)} entries and reward_funcs {len(config.reward_funcs)}: give one weight for each reward."
        )


def check_reporters(config: "ThinkTokConfig") -> None:
    """What is missing there transformers says in a stack trace, once the model is loaded."""
    for name in config.report_to:
        if name not in (*INTEGRATION_TO_CALLBACK, "all", "none"):
            near = difflib.get_close_matches(str(name), INTEGRATION_TO_CALLBACK, n=1, cutoff=0.0)[0]
            raise ValueError(f"report_to={name} is not known: set {near}, another that transformers reports to, or none.")
        if name in INTEGRATION_TO_CALLBACK and name not in (*get_available_reporting_integrations(), "flyte"):  # whose package it does not look for
            raise ValueError(f"report_to={name}: its package is not installed. Install it, or set report_to=none.")


def _check_numbers(config: "ThinkTokConfig", whole: Collection[str]) -> None:
    """Numbers, and lists of them, are no texts, and counts have no fractions."""
    others = "learning_rate", "curriculum_threshold", "temperature", "posterior_temperature", "reward_weights", "epsilon_high", "delta"
    for name in (*whole, *RATES, *FRACTIONS, *WEIGHTS, *SCHEDULES, *others):
        value = getattr(config, name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and (isinstance(one, bool) or not isinstance(one, Integral if name in whole else Real)):
                raise ValueError(f"{name}={value!r} is not made of {'whole ' if name in whole else ''}numbers.")
            if one is not None and not math.isfinite(one):
                raise ValueError(f"{name}={value!r} is not finite.")


def check_text(config: "ThinkTokConfig") -> None:
    """What the text's own loss cannot do on a model with thinking tokens, whether it thinks in this run or not."""
    free, taught = config.rollout == "free", config.rollout == "free" or config.teacher is not None
    refusals = {
        "loss_type=dft is not supported with thinking tokens: leave loss_type=nll.": config.loss_type == "dft",
        "neftune_noise_alpha would blur each thought's own copy of the text by another noise: leave it out.": config.neftune_noise_alpha is not None,
        "label_smoothing_factor is not supported with thinking tokens: set it to 0.": config.label_smoothing_factor > 0,
        "A teacher says something new at every step, and num_iterations > 1 repeats a step: choose one.": taught and config.num_iterations > 1,
        "rollout=free would go on behind several documents at once: set packing=False.": free and config.packing,
        "rollout=free lets one model write the text: set policies=shared.": free and config.policies == "split",
        f"rollout=free writes with thinking tokens, not with thoughts={config.thoughts}: set thoughts=discrete or gumbel.": (
            free and config.thoughts not in ("discrete", "gumbel")
        ),
        "rollout=free replaces the text that the data's thoughts and levels belong to: leave supply_thoughts and curriculum_threshold out.": (
            free and (config.supply_thoughts or config.curriculum_threshold is not None)
        ),
        f"prompt_length={config.prompt_length} leaves nothing to write in rows of max_length={config.max_length}: lower it, or raise max_length.": (
            free and config.max_length is not None and config.prompt_length >= config.max_length
        ),
        "num_forks=0 trains on the text alone, and text_ce_weight=0 leaves nothing of it: set text_ce_weight above 0.": (
            config.num_forks == 0 and config.text_ce_weight == 0
        ),
        "curriculum_threshold draws rows step by step: set max_steps.": config.curriculum_threshold is not None and config.max_steps <= 0,
        "padding_free=True would lay a whole batch out as one row: set packing=True instead.": config.padding_free,
        "use_liger_kernel puts a forward of its own in the place of that by which a model thinks: leave it out.": config.use_liger_kernel,
        "router_aux_loss_coef is not supported with thinking tokens: leave it out.": bool(config.router_aux_loss_coef),
    }
    _refuse(refusals)


def check_rewards(config: "ThinkTokConfig", rewards: list[RewardFunction]) -> None:
    """What some rewards cannot be told of, whether the options name them or the trainer is given them."""
    refusals = {
        "The reward `exact` compares with the data's own thoughts: set supply_thoughts=True.": REWARDS["exact"] in rewards and not config.supply_thoughts,
        "The reward `information_gain` compares with the text without the thought, which memory=persistent puts into the text: set lookahead=1, or log_prob.": (
            REWARDS["information_gain"] in rewards and config.memory == "persistent" and config.lookahead != 1
        ),
    }
    _refuse(refusals)


def check_fit(config: "ThinkTokConfig") -> None:
    """What cannot be done."""
    check_rewards(config, resolve_rewards(config.reward_funcs))
    soft, text, searches = config.thoughts in SOFT, config.thoughts == "text", ever(config.search)
    compared = config.advantage != "value" or config.objective == "marginal"
    # A thought that is supplied is no part of the comparison, and one that was searched is not the policy's.
    least = 1 + compared + config.supply_thoughts + (searches and not compared)
    refusals = {
        f"num_generations={config.num_generations} leaves nothing to compare a thought with: set num_generations to {least} or more.": (
            config.num_generations < least and config.rewards_draws
        ),
        f"scale_rewards=group needs a group: set num_generations to {2 + config.supply_thoughts} or more, or scale_rewards=batch or none.": (
            config.scale_rewards == "group" and config.num_generations <= 1 + config.supply_thoughts
        ),
        f"thoughts={config.thoughts} makes thoughts of given lengths: set stop=fixed.": soft and config.stop != "fixed",
        f"thoughts={config.thoughts} with memory=persistent is not supported: set memory=none.": soft and config.memory == "persistent",
        f"thoughts={config.thoughts} learns from the cross-entropy after it, and think_ce_weight=0 leaves none: set think_ce_weight above 0.": (
            soft and config.think_ce_weight == 0
        ),
        "advantage=value learns from each rollout once, and num_iterations > 1 repeats it: choose one.": (
            config.advantage == "value" and config.num_iterations > 1
        ),
        "thoughts=text writes thoughts of given lengths: set stop=fixed.": text and config.stop != "fixed",
        f"thoughts=text with max_think_length={config.max_think_length} has no room between its first and its last token: set it to 3 or more.": (
            text and config.max_think_length < 3
        ),
        f"thoughts=text with temperature={config.temperature} is not supported: set temperature=1.": text and config.temperature != 1.0,
        "thoughts=text with memory=persistent is not supported: set memory=none.": text and config.memory == "persistent",
        "thoughts=text with advantage=token is not supported: set advantage=group, loo or value.": text and config.advantage == "token",
        "think_start leaves steps that learn nothing with text_ce_weight=0: set think_start=0, or text_ce_weight above 0.": (
            config.think_start > 0 and config.text_ce_weight == 0
        ),
        "search compares thoughts of one length: set stop=fixed or stop=learned.": searches and config.stop == "sampled",
        "search changes a thought after those that follow it were drawn, and with memory=persistent these have read it: set memory=none.": (
            searches and config.memory == "persistent"
        ),
        "supply_thoughts has thoughts of given lengths: set stop=fixed.": config.supply_thoughts and config.stop != "fixed",
        "supply_thoughts gives one thought for each row: set num_forks=1.": config.supply_thoughts and config.num_forks != 1,
        "supply_thoughts and search both fill the first thought of a group: choose one.": config.supply_thoughts and searches,
        "debug=underflow_overflow reads numbers only, and the head gives more than these: leave debug out, `skipped_steps` counts what is not finite.": (
            "underflow_overflow" in (config.debug or "")
        ),
        "curriculum_threshold counts the rows that were drawn, and ignore_data_skip=True begins to count anew: leave it out.": (
            config.curriculum_threshold is not None and config.ignore_data_skip
        ),
        "curriculum_threshold begins the clock anew with every level, and alternate takes its turns by it: leave one of them out.": (
            config.curriculum_threshold is not None and config.alternate is not None
        ),
        "curriculum_threshold draws new rows at every step, and num_iterations > 1 repeats them: choose one.": (
            config.curriculum_threshold is not None and config.num_iterations > 1
        ),
        "curriculum_threshold chooses rows as training goes, and dataloader_num_workers fetch them far ahead: set dataloader_num_workers=0.": (
            config.curriculum_threshold is not None and config.dataloader_num_workers > 0
        ),
        "revive_every blames a thought's last token, and stop=learned has none before it is read: set stop=fixed or stop=sampled.": (
            config.revive_every > 0 and config.stop == "learned"
        ),
        f"revive_every changes how tokens are chosen and read, and freeze={config.freeze} is to leave one alone: choose one.": (
            config.revive_every > 0 and config.freeze != "none"
        ),
        "revive_every must be a multiple of num_iterations: one rollout is learned from with the rows that it was drawn with.": (
            _parts_rollout(config, config.revive_every)
        ),
        f"think_start must be a multiple of num_iterations={config.num_iterations}: steps that learn from one rollout all think, or none does.": (
            _parts_rollout(config, config.think_start)
        ),
        "policies=split with revive_every is not supported: set revive_every=0.": config.policies == "split" and config.revive_every > 0,
        f"markovian_share={config.markovian_share} of num_generations={config.num_generations} is none or all of those that are drawn, and a thought that "
        "is seen whole is what is used afterwards: change one of the two.": (
            config.markovian_share > 0 and not 0 < config.num_markovian < config.num_generations - (config.supply_thoughts or searches)
        ),
        "blind reads a thought again as a whole, and markovian_share hides all but its latest token: choose one.": config.blind and config.markovian_share > 0,
        "markovian_share hides tokens by the packed tree's mask: set engine=auto or tree.": config.markovian_share > 0 and config.engine == "replicated",
        "policies=split with beta is not supported: set beta=0.": config.policies == "split" and config.beta > 0,
        "policies=split with memory=persistent is not supported: set memory=none.": config.policies == "split" and config.memory == "persistent",
        "policies=split has a thinker with nothing to decide where all thoughts are fillers of one length: set policies=shared.": (
            config.policies == "split" and config.thoughts == "filler" and config.stop == "fixed"
        ),
        "blind leaves nothing to say at the thought's first token, so thoughts=filler would know nothing: set blind=False.": (
            config.blind and config.thoughts == "filler"
        ),
        f"lookahead={config.lookahead} leaves no room in a row of max_length={config.max_length}: lower lookahead or raise max_length.": (
            config.max_length is not None and config.lookahead is not None and config.lookahead >= config.max_length
        ),
        f"num_forks={config.num_forks} do not fit a row of max_length={config.max_length}: lower num_forks, raise max_length, or set fork_positions=all.": (
            config.fork_positions != "all" and config.max_length is not None and config.num_forks >= config.max_length
        ),
        "stop=learned sums the stopping time out exactly for one judged token: set lookahead=1, or stop=sampled.": config.stop == "learned"
        and config.lookahead != 1,
        "advantage=token credits each thinking token by one judged token: set lookahead=1, or advantage=group.": config.advantage == "token"
        and config.lookahead != 1,
        "advantage=token compares predictions after every thinking token, which stop=sampled does not make: set stop=learned or stop=fixed.": (
            config.advantage == "token" and config.stop == "sampled"
        ),
        "blind hides the text from the speaker and memory=persistent puts thoughts into the text: choose one.": config.blind and config.memory == "persistent",
        "blind leaves nothing to predict from before the first thinking token, so advantage=token has no start: set advantage=group, loo or value.": (
            config.blind and config.advantage == "token"
        ),
        "fork_positions=markers needs fork_markers, the texts after which the model may think.": (
            config.fork_positions == "markers" and not (config.fork_markers and all(config.fork_markers))
        ),
        saves_must_end_rollouts(config): (steps := steps_between_saves(config)) >= 1 and _parts_rollout(config, steps),
        "stop=learned ends no thought, and with memory=persistent thoughts of full length would stay in the text: set stop=sampled or stop=fixed.": (
            config.stop == "learned" and config.memory == "persistent"
        ),
    }
    _refuse(refusals)


def check_choice(config: "ThinkTokConfig", num_tokens: int | None) -> None:
    """What cannot be said with a single thinking token, whether the options ask for it or the model has no more.

    Raises:
        ValueError: tokens are to be drawn.
    """
    if num_tokens != 1 or config.thoughts in ("filler", "continuous"):
        return
    text, given = config.thoughts == "text", config.num_think_tokens == 1
    raise ValueError(
        f"thoughts={config.thoughts} with {'num_think_tokens=1' if given else 'a model of one thinking token'} "
        f"{'cannot tell the begin of a thought from its end' if text else 'has nothing to choose from'}: {'' if text else 'set thoughts=filler, or '}"
        f"{'set num_think_tokens to 2 or more' if given else 'start from its base model'}."
    )


def check_search(config: "ThinkTokConfig", num_tokens: int | None) -> None:
    """Where no more thoughts can be thought of than are tried, which of them are tried is no choice."""
    if num_tokens is None or len(config.search) > 1 or config.search[0] < num_tokens**config.max_think_length:
        return
    for name in ("search_random", "search_changes"):
        if getattr(config, name) != default_of(type(config), name):
            raise no_effect(config, name, f"search below {num_tokens**config.max_think_length}, as all thoughts that there are are tried")


def check_run(config: "ThinkTokConfig", steps: int) -> None:
    """A run of so many steps, and what would begin after it, and so never.

    Raises:
        RunError: it has no step, or is over before thinking begins, or before a schedule that stands at 0 until then; or saves a part of it that ends within
            a rollout.
    """
    if steps < 1:
        named = "max_steps=0" if config.max_steps == 0 else f"num_train_epochs={config.num_train_epochs}"
        raise RunError(f"{named} is a run of no step: set num_train_epochs above 0, or max_steps.")
    if config.think_start >= steps:
        raise RunError(f"think_start={config.think_start} is not reached in a run of {steps} steps, so nothing would be thought: lower it, or set num_forks=0.")
    if 0 < (share := steps_between_saves(config)) < 1 and _parts_rollout(config, math.ceil(share * steps)):
        raise RunError(saves_must_end_rollouts(config))
    thinking = steps - config.think_start
    if config.alternate is not None and config.alternate[0] >= thinking:
        raise RunError(f"alternate={config.alternate} gives thoughts no turn in {thinking} steps: let it begin earlier, or set freeze=thinker.")
    for name in SCHEDULES:
        schedule = getattr(config, name) or [0]
        # To be sure of every word is a target as well.
        if name != "thought_entropy_target" and len(schedule) == 4 and schedule[0] == 0 and schedule[3] >= thinking:
            raise RunError(f"{name}={schedule} is 0 for the {thinking} steps in which the run thinks: let it begin earlier, or leave {name} out.")


@contextlib.contextmanager
def checked_scheduler(config: "ThinkTokConfig") -> Iterator[None]:
    """Makes a `RunError` of what the making of a scheduler raises: which arguments it needs is its function's affair."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise RunError(
            f"lr_scheduler_type={config.lr_scheduler_type.value} does not go with lr_scheduler_kwargs={config.lr_scheduler_kwargs}: {error}"
        ) from error


def check_effect(config: "ThinkTokConfig") -> None:
    """What would do nothing."""
    thinker_learns, speaker_learns = config.freeze != "thinker", config.freeze != "speaker"
    gate_learns = thinker_learns and config.stop == "learned" and config.gate_loss_weight > 0
    lengths_vary = config.max_think_length > 1 or not config.blind  # under blind the first token is always thought
    effects = {
        "prompt_length": (config.rollout == "free", "rollout=free"),
        "fork_markers": (config.fork_positions == "markers", "fork_positions=markers"),
        "num_forks": (config.fork_positions != "all", "a fork_positions other than all"),
        "stop": (config.stop != "sampled" or lengths_vary, "max_think_length above 1 under blind, where the first token is always thought"),
        **dict.fromkeys(("stop_smoothing", "gate_loss_weight"), (config.stop == "learned" and lengths_vary, f"stop=learned{LENGTHS_VARY}")),
        **dict.fromkeys(("gate_smoothing", "detach_gate"), (gate_learns and lengths_vary, f"stop=learned and gate_loss_weight above 0{LENGTHS_VARY}")),
        "think_cost": (
            config.stop != "fixed" and lengths_vary,
            f"stop=learned or stop=sampled{LENGTHS_VARY} (with stop=fixed every thought costs the same)",
        ),
        "advantage": (config.objective == "expected", "objective=expected (marginal has its own advantage)"),
        "posterior_temperature": (config.objective == "marginal", "objective=marginal"),
        "posterior_smoothing": (config.objective == "marginal", "objective=marginal"),
        "thought_ce_weight": (config.supply_thoughts, "supply_thoughts=True"),
        "speaker_learning_rate": (config.policies == "split", "policies=split"),
        "search_random": (ever(config.search), "search"),
        "markovian_share": (config.max_think_length > 1, "max_think_length above 1"),
        "search_changes": (
            ever(config.search) and config.search_random > 0 and (config.search_changes or 0) < config.max_think_length,
            "search, search_random, and max_think_length above it (else all of a thought is redrawn, as without it)",
        ),
        **dict.fromkeys(("coverage_where", "coverage_decay"), (ever(config.coverage_coef), "coverage_coef")),
        "coverage_coef": (
            config.objective == "marginal" or (config.policy_learns and config.advantage != "token") or ever(config.search),
            "objective=marginal, search, or a policy that learns by another advantage than token (which credits predictions)",
        ),
        "coverage_of": (ever(config.coverage_coef) and config.max_think_length > 1, "coverage_coef, and max_think_length above 1"),
        "balance_given": (ever(config.balance_coef) and config.max_think_length > 1, "balance_coef, and max_think_length above 1"),
        "curriculum_replay": (config.curriculum_threshold is not None, "curriculum_threshold"),
        "curriculum_think_length": (config.curriculum_threshold is not None and config.stop == "learned", "curriculum_threshold and stop=learned"),
        "train_sampling_strategy": (
            config.num_iterations == 1 and config.curriculum_threshold is None,
            "num_iterations=1 and no curriculum_threshold, which have an order of their own",
        ),
        "continuous_layer": (config.thoughts == "continuous", "thoughts=continuous"),
        "scale_rewards": (config.objective == "expected", "objective=expected (marginal has its own advantage)"),
        **dict.fromkeys(("reward_funcs", "reward_weights"), (config.objective == "expected" and config.advantage != "token", REWARDED_BY_FUNCTIONS)),
        "think_loss_type": (config.stop != "learned" or not only_divides(config), SEVERAL_LENGTHS),
        "epsilon": (
            config.num_iterations > 1 and config.think_loss_type != "cispo",
            "num_iterations > 1 and a think_loss_type other than cispo (the first ratio is 1)",
        ),
        "epsilon_high": (config.num_iterations > 1, "num_iterations > 1 (the first ratio is 1)"),
        "delta": (config.num_iterations > 1 and config.think_loss_type != "cispo", "num_iterations > 1 and a think_loss_type other than cispo"),
        "importance_sampling_level": (
            config.num_iterations > 1 and (config.max_think_length > 1 or config.stop == "sampled"),
            "num_iterations > 1 (the first ratio is 1), and thoughts of more than one choice",
        ),
        "num_completions_to_print": (config.log_completions, "log_completions=True"),
    }
    spoken = config.thoughts not in ("continuous", "filler")
    for_soft_thoughts = {
        **dict.fromkeys(OF_REWARDS, (config.rewards_draws, f"thoughts=discrete or text ({config.thoughts} has no rewards)")),
        **dict.fromkeys(OF_REWARDED_TOKENS, (config.thoughts in ("discrete", "text"), f"thoughts=discrete or text ({config.thoughts} has no rewards)")),
        **dict.fromkeys(OF_DRAWN_THOUGHTS, (spoken, "thoughts=discrete or gumbel (nothing is drawn)")),
        "objective": (spoken or config.rewards_draws, "thoughts=discrete or gumbel (nothing is drawn)"),
    }
    for_learning = {
        **dict.fromkeys(OF_LEARNING_THINKERS, (thinker_learns, "freeze=none or speaker (a frozen thinker learns nothing)")),
        **dict.fromkeys(OF_POLICY_LOSS, (config.policy_learns, POLICY_LEARNS)),
        **dict.fromkeys(OF_COMPARISON, (config.policy_learns or config.objective == "marginal", POLICY_LEARNS)),
        "think_cost": (
            config.policy_learns or gate_learns or config.objective == "marginal" or ever(config.search),
            f"{POLICY_LEARNS}, a gate that learns, objective=marginal, or search",
        ),
        "objective": (
            config.policy_learns or gate_learns or (speaker_learns and config.think_ce_weight > 0 and not config.supply_thoughts),
            f"{POLICY_LEARNS}, a gate that learns, or a speaker that learns from what was drawn",
        ),
        "alternate": (config.freeze == "none", "freeze=none (in the turn of a frozen one no thought would teach anything)"),
        "think_ce_weight": (speaker_learns, "freeze=none or thinker (a frozen speaker learns nothing from thoughts)"),
        "posterior_smoothing": (
            speaker_learns and config.think_ce_weight > 0 and not config.supply_thoughts,
            "think_ce_weight above 0, freeze=none or thinker, and no supply_thoughts (it weighs what the speaker learns from)",
        ),
    }
    for_text = dict.fromkeys(OF_THINKING_VOCABULARY, (config.thoughts != "text", "thoughts=discrete (text is drawn from the real vocabulary)"))
    for name, (effective, needed) in [*for_soft_thoughts.items(), *for_text.items(), *for_learning.items(), *effects.items()]:
        if not effective and getattr(config, name) != default_of(type(config), name):
            raise no_effect(config, name, needed)


def only_divides(config: "ThinkTokConfig") -> bool:
    """Whether the type of the policy's loss says only by what it is divided: `cispo` weighs ratios besides, which at first are 1."""
    return config.think_loss_type != "cispo" or config.num_iterations == 1


def no_effect(config: "ThinkTokConfig", name: str, needed: str) -> ValueError:
    return ValueError(f"{name}={getattr(config, name)!r} has no effect here; it needs {needed}. Leave {name} out or change that.")


def steps_between_saves(config: "ThinkTokConfig") -> float:
    """0 where no number of steps says when to save; below 1 it is a part of the run."""
    if config.save_strategy == "best" and config.eval_strategy == "steps":
        return config.eval_steps or config.logging_steps
    return config.save_steps if config.save_strategy == "steps" else 0


def saves_must_end_rollouts(config: "ThinkTokConfig") -> str:
    what = "save_steps" if config.save_strategy == "steps" else "With save_strategy=best eval_steps"
    return f"{what} must be a multiple of num_iterations, or a resumed run would lack the rollout it stopped in."


def _parts_rollout(config: "ThinkTokConfig", steps: float) -> bool:
    """Whether so many steps end between those that learn from one rollout."""
    return config.num_iterations > 1 and steps % config.num_iterations != 0


def _refuse(refusals: dict[str, bool]) -> None:
    for sentence, refused in refusals.items():
        if refused:
            raise ValueError(sentence)


def default_of(cls: type, name: str):
    """The default of a dataclass's field, without making the dataclass."""
    entry = next(f for f in fields(cls) if f.name == name)
    return entry.default_factory() if entry.default is MISSING else entry.default  # type: ignore[operator]
