"""Every option of thinking, in one place, checked before anything is loaded."""

import os
from dataclasses import MISSING, dataclass, field, fields

import torch
from trl import SFTConfig

from .exploration import scheduled
from .losses import PolicyLoss
from .rewards import resolve_rewards
from .rollout import Sampling
from .thoughts import SOFT
from .tree import Branching

FORK_POSITIONS = ("random", "entropy", "stride", "all", "markers")
# Options that may change with the step: a number, or start, end and the steps between.
SCHEDULES = ("epsilon_greedy", "coverage_coef", "balance_coef", "thought_entropy_target", "think_cost")
REWARDED_BY_FUNCTIONS = "objective=expected with advantage=group, loo or value (the others use log_prob)"
# Options without effect on thoughts without rewards, soft ones and fillers, and further ones on thoughts that are not drawn.
OF_REWARDED_THOUGHTS = (
    "search", "epsilon_greedy", "coverage_coef", "supply_thoughts", "freeze", "alternate", "top_k", "top_p", "min_p", "reward_funcs", "reward_weights",
    "advantage", "scale_rewards", "think_loss_type", "think_loss_weight", "beta", "num_iterations",
)  # fmt: skip
OF_THINKING_VOCABULARY = (
    "search", "epsilon_greedy", "coverage_coef", "balance_coef", "thought_entropy_target", "supply_thoughts", "top_k", "top_p", "min_p",
)  # fmt: skip
OF_DRAWN_THOUGHTS = ("temperature", "balance_coef", "thought_entropy_target", "objective", "log_completions")


def option(default, help: str, choices: tuple[str, ...] | None = None):
    """A dataclass field with a help text; the choices are checked here as well as on the command line."""
    metadata = {"help": help} | ({"choices": choices} if choices else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ThinkTokConfig(SFTConfig):
    r"""
    Configuration of [`ThinkTokTrainer`]: [`~trl.SFTConfig`] and everything about thinking.

    `num_think_tokens=0` or `num_forks=0` switches thinking off and leaves plain continued pretraining, the control arm of the same recipe.
    An option that would do nothing in the chosen mode is an error.

    Parameters:
        > The vocabulary

        num_think_tokens (`int`, *optional*):
            Thinking tokens N. `None`: as many as the model has, or 16.

        > The tree

        num_forks (`int`, defaults to `16`):
            Places K in each row where the model may think.
        fork_positions (`str`, defaults to `"random"`):
            Where: `random`, `entropy` (the hardest next tokens, by the model without thinking), `stride` (evenly), `all`, or `markers` (after a text).
        fork_markers (`list[str]`, *optional*):
            The texts, for `fork_positions="markers"`.
        num_generations (`int`, defaults to `4`):
            Thoughts G at each fork, compared with each other.
        max_think_length (`int`, defaults to `4`):
            Thinking tokens L of a thought at most.
        lookahead (`int` or `None`, defaults to `1`):
            Following real tokens H that judge a thought; `None` (`null` in YAML): all that follow in the row.
        stop (`str`, defaults to `"learned"`):
            How thoughts end. `fixed`: all have L tokens, or as many as the data's column `think_length` says.
            `learned`: the stopping time is summed out exactly, for one judged token. `sampled`: drawn from
            the gate.
        stop_smoothing (`float`, defaults to `0.5`):
            With `stop="learned"`: part of the weight that content and speaker give to all lengths alike, so that thoughts are learned while the gate
            is still nearly closed. The gate itself is always trained exactly. 0: everything exact.
        memory (`str`, defaults to `"none"`):
            `none`: a thought is forgotten once a real token follows. `persistent`: one thought per fork stays in the text, as in generation.
        blind (`bool`, defaults to `False`):
            The text is hidden from whoever predicts; all it knows is the thought.
        gather_for_rollout (`bool`, defaults to `True`):
            With ZeRO-3 or FSDP2: each process gathers the whole model once for a rollout. Without it layers are gathered one by one, at every token, which
            takes less memory and more time.
        engine (`str`, defaults to `"auto"`):
            `tree` (one packed pass), `replicated` (each thought in a row of its own), or `auto`: the tree where a check on this very model finds it exact.

        > Who thinks and who speaks

        policies (`str`, defaults to `"shared"`):
            `shared`: one model. `split`: a second model (the trainer's `speaker`), or with `peft_config` a second adapter of the same model, predicts
            real tokens after thoughts, and the first one thinks.
        freeze (`str`, defaults to `"none"`):
            `thinker`: thoughts get no gradient. `speaker`: predictions after thoughts get none.
        thoughts (`str`, defaults to `"discrete"`):
            `discrete`: drawn from the thinking vocabulary. `filler`: always the first thinking token, the control that computes without saying anything.
            `text`: drawn from the real vocabulary, between the first and the last thinking token, which begin and end a thought and count as two of
            `max_think_length` (Quiet-STaR, RLP).
            Two kinds have no rewards: the cross-entropy of what follows reaches them by its own gradient. `gumbel`: drawn, with the gradient of a soft
            mixture (straight-through). `continuous`: each node reads the hidden state of the one before (Coconut); nothing is drawn, so
            `num_generations=1` is enough. Both make a thought in `max_think_length` passes, and one more scores it.
        continuous_layer (`int`, defaults to `-1`):
            Which hidden state `thoughts="continuous"` feeds back, an index into `hidden_states`; -1 is the one that enters the LM head.
        supply_thoughts (`bool`, defaults to `False`):
            The first thought of each group is the data's (columns `thoughts`), and the speaker learns from it alone; the others are sampled and rewarded.
        thought_ce_weight (`float`, defaults to `0.0`):
            Weight of the cross-entropy of supplied thoughts.
        alternate (`list[int]`, *optional*):
            `[n, m]`: n steps of prediction, then m steps of thinking, and so on.

        > Finding a language

        A schedule is a number, or a list of start, end and the steps between them; with a curriculum each level's rows have a clock of their own.

        think_start (`int`, defaults to `0`):
            Step at which thinking begins; before it the model only learns the text. Schedules count from there.
        search (`int`, defaults to `0`):
            One thought of each group is the best of so many candidates for the text that follows. All thoughts where there are no more than that.
        search_random (`float`, defaults to `0.5`):
            Part of the candidates that are random; the others are the policy's.
        search_changes (`int`, *optional*):
            A random candidate is one of the policy's thoughts with so many tokens drawn anew. All of them where it is left out.
        search_until (`int`, *optional*):
            Last step of the search, on the clock of the schedules.
        epsilon_greedy (schedule, defaults to `[0.0]`):
            Probability that a thinking token is drawn uniformly.
        coverage_coef (schedule, defaults to `[0.0]`):
            Bonus of a thought for being rare: times -log of its frequency, nats.
        coverage_of (`str`, defaults to `"thought"`):
            What is counted: each whole `thought`, or each `token` in its place, whose bonuses add up.
        coverage_decay (`float`, defaults to `0.8`):
            What remains of the running frequencies at each step.
        balance_coef (schedule, defaults to `[0.0]`):
            Weight of the entropy of the batch's mean choice.
        balance_given (`str`, defaults to `"position"`):
            The mean is taken for each `position` of a thought, or for each position and `token` before it.
        thought_entropy_target (schedule, *optional*):
            Entropy of the next thinking token that a two-sided servo holds, as a part of ln N.
        curriculum_threshold (`float`, *optional*):
            Running accuracy at which the next `level` of the data begins; `None`: all rows from the start.
        curriculum_replay (`float`, defaults to `0.4`):
            Part of the steps that goes to all reached levels alike.

        > Whose text

        teacher (`str`, *optional*):
            Name or folder of a frozen LM of the same tokenizer, or the trainer's `teacher`: labels are drawn from its predictions, in place of the data's.
        rollout (`str`, defaults to `"fork"`):
            `fork`: thoughts in the data's text. `free`: behind a short prompt the text is what the model itself writes, and the teacher says what should
            have followed (on-policy distillation).
        prompt_length (`int`, defaults to `32`):
            Tokens of each row that `rollout="free"` keeps.

        > Sampling

        temperature (`float`, defaults to `1.0`), top_k (`int`, defaults to `0`), top_p (`float`, defaults to `1.0`), min_p (`float`, *optional*):
            How thinking tokens are drawn, among thinking tokens. With `thoughts="gumbel"` draws have temperature 1, and this is the soft mixture's.

        > Rewards

        reward_funcs (`list[str]`, defaults to `["log_prob"]`):
            `log_prob`, `accuracy`, `prob`, `information_gain`; functions are passed to the trainer.
        reward_weights (`list[float]`, *optional*):
            A weight for each reward; 1 by default.
        objective (`str`, defaults to `"expected"`):
            `expected`: the mean reward of the group (GRPO). `marginal`: the group's marginal likelihood, for speaker and thinker alike.
        posterior_temperature (`float`, defaults to `1.0`):
            With `objective="marginal"`: log-likelihoods are divided by it before they weight the group. Below 1: winners take more.
        posterior_smoothing (`float`, defaults to `0.0`):
            With `objective="marginal"`: part of the speaker's weight that goes to all thoughts alike.
        advantage (`str`, defaults to `"group"`):
            `group` (minus the group's mean), `loo` (minus the others' mean), `token` (credit of each thinking token; one judged token), or `value` (minus
            what a linear value function of the fork's hidden state expects; one thought at a fork is then enough).
        scale_rewards (`str`, defaults to `"none"`):
            Divide advantages by the rewards' standard deviation of the `group` or the `batch`.

        > The loss

        think_loss_type (`str`, defaults to `"dr_grpo"`):
            `dr_grpo`, `grpo`, `bnpo`, `dapo` or `cispo`; see [`~hf_thinktok.losses.PolicyLoss`].
        think_loss_weight (`float`, defaults to `1.0`):
            Weight of the policy loss.
        think_ce_weight (`float`, defaults to `1.0`):
            Weight of the cross-entropy of real tokens after a thought.
        text_ce_weight (`float`, defaults to `1.0`):
            Weight of the cross-entropy of the text itself, without thoughts.
        speaker_learning_rate (`float`, *optional*):
            Learning rate of the speaker, where it differs.
        think_cost (schedule, defaults to `[0.0]`):
            Price of a thinking token, nats. A high one from the start shuts the gate before it has learned where to stop; raised slowly it does not.
        beta (`float`, defaults to `0.0`):
            Weight of the KL divergence of thoughts from the initial model.
        num_iterations (`int`, defaults to `1`):
            Optimizer steps on each rollout.
        epsilon (`float`, defaults to `0.2`), epsilon_high (`float`, *optional*), delta (`float`, *optional*):
            Clipping of the importance ratio, which differs from 1 only with `num_iterations > 1`. For `cispo`, `epsilon_high` is the ratio's bound itself (5).
        importance_sampling_level (`str`, defaults to `"token"`):
            `token` or `sequence`.
        disable_dropout (`bool`, defaults to `False`):
            Set all dropout to 0, so that a rollout and its gradient pass agree.

        > Logging and safety

        log_completions (`bool`, defaults to `False`):
            Print coloured sample thoughts at every log.
        num_completions_to_print (`int`, defaults to `6`):
            How many.
        max_nonfinite_steps (`int`, defaults to `10`):
            Steps in a row with a loss or reward that is not finite before training stops. Such steps are skipped and counted.
    """

    num_think_tokens: int | None = option(None, "Thinking tokens; as many as the model has, or 16, where not given. 0 switches thinking off.")

    num_forks: int = option(16, "Places in each row where the model may think. 0 switches thinking off.")
    fork_positions: str = option("random", "Where the model may think.", FORK_POSITIONS)
    fork_markers: list[str] | None = option(None, "Texts after which the model may think, for fork_positions=markers.")
    num_generations: int = option(4, "Thoughts at each fork, compared with each other.")
    max_think_length: int = option(4, "Thinking tokens of a thought at most.")
    lookahead: int | None = option(1, "Following real tokens that judge a thought; null in a config file means all that follow in the row.")
    stop: str = option("learned", "How thoughts end.", ("fixed", "learned", "sampled"))
    stop_smoothing: float = option(0.5, "With stop=learned: part of the weight that content and speaker give to all lengths alike (0 to 1).")
    memory: str = option("none", "Whether a thought stays in the text.", ("none", "persistent"))
    blind: bool = option(False, "Hide the text from whoever predicts; all it knows is the thought.")
    gather_for_rollout: bool = option(True, "ZeRO-3, FSDP2: gather all parameters once for a rollout, not layer by layer at every token.")
    engine: str = option("auto", "How the model runs a tree of thoughts.", ("auto", "tree", "replicated"))

    policies: str = option("shared", "One model, or a second one that speaks.", ("shared", "split"))
    freeze: str = option("none", "Which of the two gets no gradient from thinking.", ("none", "thinker", "speaker"))
    thoughts: str = option("discrete", "What a thought is made of.", ("discrete", "text", "filler", "gumbel", "continuous"))
    continuous_layer: int = option(-1, "Hidden state that thoughts=continuous feeds back; -1 for the one that enters the LM head.")
    supply_thoughts: bool = option(False, "The speaker learns from the data's own thoughts (column `thoughts`).")
    thought_ce_weight: float = option(0.0, "Weight of the cross-entropy of supplied thoughts.")
    alternate: list[int] | None = option(None, "n steps of prediction, then m steps of thinking.")

    think_start: int = option(0, "Step at which thinking begins; before it the model only learns the text.")
    search: int = option(0, "One thought of each group is the best of so many candidates.")
    search_random: float = option(0.5, "Part of the candidates that are random.")
    search_changes: int | None = option(None, "Tokens drawn anew in a random candidate; all where left out.")
    search_until: int | None = option(None, "Last step of the search.")
    epsilon_greedy: list[float] = option([0.0], "Probability that a thinking token is drawn uniformly: a value, or start, end and steps.")
    coverage_coef: list[float] = option([0.0], "Bonus for rare thoughts: a value, or start, end and steps.")
    coverage_of: str = option("thought", "What the bonus counts: whole thoughts, or each token in its place.", ("thought", "token"))
    coverage_decay: float = option(0.8, "What remains of the running frequencies at each step.")
    balance_coef: list[float] = option([0.0], "Weight of the entropy of the batch's mean choice: a value, or start, end and steps.")
    balance_given: str = option("position", "What the mean choice is taken for.", ("position", "token"))
    thought_entropy_target: list[float] | None = option(None, "Entropy that a servo holds, in parts of ln N: a value, or start, end and steps.")
    curriculum_threshold: float | None = option(None, "Running accuracy at which the next level of the data begins.")
    curriculum_replay: float = option(0.4, "Part of the steps that goes to all reached levels alike.")

    teacher: str | None = option(None, "A frozen LM whose predictions are the labels.")
    rollout: str = option("fork", "Whether the text is the data's or the model's own.", ("fork", "free"))
    prompt_length: int = option(32, "Tokens of each row that rollout=free keeps.")

    temperature: float = option(1.0, "Temperature of thinking tokens.")
    top_k: int = option(0, "Draw among the k most likely thinking tokens; 0 for all.")
    top_p: float = option(1.0, "Draw among the most likely thinking tokens that make up this probability.")
    min_p: float | None = option(None, "Draw among thinking tokens with at least this part of the largest probability.")

    reward_funcs: list[str] = option(["log_prob"], "Rewards of a thought: log_prob, accuracy, prob, information_gain.")
    reward_weights: list[float] | None = option(None, "A weight for each reward.")
    objective: str = option("expected", "What speaker and thinker maximise.", ("expected", "marginal"))
    posterior_temperature: float = option(1.0, "With objective=marginal: divides log-likelihoods before they weight the group.")
    posterior_smoothing: float = option(0.0, "With objective=marginal: part of the speaker's weight that goes to all thoughts alike.")
    advantage: str = option("group", "What a thought's reward is compared with.", ("group", "loo", "token", "value"))
    scale_rewards: str = option("none", "Divide advantages by the standard deviation of rewards.", ("none", "group", "batch"))

    think_loss_type: str = option("dr_grpo", "Policy loss of thinking tokens.", ("dr_grpo", "grpo", "bnpo", "dapo", "cispo"))
    think_loss_weight: float = option(1.0, "Weight of the policy loss.")
    think_ce_weight: float = option(1.0, "Weight of the cross-entropy of real tokens after a thought.")
    text_ce_weight: float = option(1.0, "Weight of the cross-entropy of the text itself, without thoughts.")
    speaker_learning_rate: float | None = option(None, "Learning rate of the speaker, where it differs.")
    think_cost: list[float] = option([0.0], "Price of a thinking token in nats: a value, or start, end and steps.")
    beta: float = option(0.0, "Weight of the KL divergence of thoughts from the initial model.")
    num_iterations: int = option(1, "Optimizer steps on each rollout.")
    epsilon: float = option(0.2, "Clipping of the importance ratio, below and above.")
    epsilon_high: float | None = option(None, "Clipping above, where it differs; for cispo the bound of the ratio itself (5).")
    delta: float | None = option(None, "Upper bound of the ratio for negative advantages.")
    importance_sampling_level: str = option("token", "One importance ratio per token or per thought.", ("token", "sequence"))
    disable_dropout: bool = option(False, "Set all dropout to 0.")

    log_completions: bool = option(False, "Print coloured sample thoughts at every log.")
    num_completions_to_print: int = option(6, "How many thoughts to print.")
    max_nonfinite_steps: int = option(10, "Steps in a row that are not finite before training stops.")

    def __post_init__(self):
        for name in SCHEDULES:
            if isinstance(getattr(self, name), int | float):
                setattr(self, name, [float(getattr(self, name))])
        self._check_values()
        if self.num_think_tokens != 0:
            self._check_text()
        elif self.teacher is not None:
            raise ValueError("teacher has no effect with num_think_tokens=0: for a student that does not think, set num_forks=0.")
        if self.thinks:
            self._check_fit()
            self._check_effect()
        # Where there is nothing but a CPU, or the launcher asks for it, bf16 and devices follow without another option.
        self.use_cpu: bool = self.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.accelerator.is_available()
        if self.policies == "split" and self.think_start and self.ddp_find_unused_parameters is None:  # type: ignore[has-type]
            self.ddp_find_unused_parameters = True  # the speaker's, until thinking starts
        super().__post_init__()

    @property
    def thinks(self) -> bool:
        return self.num_think_tokens != 0 and self.num_forks != 0

    def branching(self, trunk_length: int, length: int | None = None) -> Branching:
        """The shape of a row's thoughts for rows of `trunk_length` tokens, with thoughts of up to `length` tokens where that is known."""
        lookahead = trunk_length - 1 if self.lookahead is None else self.lookahead
        return Branching(self.num_generations, length or self.max_think_length, lookahead, self.blind, self.memory == "persistent")

    def sampling(self, step: int = 0) -> Sampling:
        return Sampling(
            self.draw_temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            draw_stops=self.stop == "sampled",
            min_length=int(self.blind),
            epsilon=scheduled(self.epsilon_greedy, step),
            filler=self.thoughts in ("filler", "continuous"),
            gumbel=self.thoughts == "gumbel",
            text=self.thoughts == "text",
        )

    @property
    def draw_temperature(self) -> float:
        return 1.0 if self.thoughts == "gumbel" else self.temperature

    @property
    def needs_gate(self) -> bool:
        return self.stop != "fixed"

    @property
    def needs_every_prefix(self) -> bool:
        return self.stop == "learned" or self.advantage == "token"

    def policy_loss(self) -> PolicyLoss:
        # As in TRL, cispo's bound is absolute; 5 is its paper's. The others' is counted from 1.
        high = self.epsilon_high if self.epsilon_high is not None else 5.0 if self.think_loss_type == "cispo" else self.epsilon
        return PolicyLoss(self.think_loss_type, self.epsilon, high, self.delta, self.importance_sampling_level, self.beta)

    def _check_values(self) -> None:
        for entry in fields(ThinkTokConfig):
            allowed = entry.metadata.get("choices") if entry.name in ThinkTokConfig.__annotations__ else None
            if allowed and (value := getattr(self, entry.name)) not in allowed:
                raise ValueError(f"{entry.name}={value!r} is not known; it is one of {', '.join(allowed)}.")
        least = {
            "num_forks": 0,
            "num_generations": 1,
            "max_think_length": 1,
            "num_iterations": 1,
            "search": 0,
            "think_start": 0,
            "top_k": 0,
            "max_nonfinite_steps": 1,
            "num_completions_to_print": 1,
            "prompt_length": 1,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {bound}.")
        if self.num_think_tokens is not None and self.num_think_tokens < 0:
            raise ValueError(f"num_think_tokens={self.num_think_tokens} must be 0 (no thinking) or more.")
        if self.lookahead is not None and self.lookahead < 1:
            raise ValueError(f"lookahead={self.lookahead} must be at least 1, or null for all tokens that follow.")
        if self.search_changes is not None and self.search_changes < 1:
            raise ValueError(f"search_changes={self.search_changes} must be at least 1, or null for all tokens.")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0: thoughts are explored by sampling.")
        for name in ("stop_smoothing", "top_p", "min_p", "search_random", "posterior_smoothing", "coverage_decay", "curriculum_replay", "curriculum_threshold"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and 1.")
        for name in SCHEDULES:
            schedule = getattr(self, name)
            if schedule is not None and (len(schedule) not in (1, 3) or min(schedule) < 0 or schedule[2:] == [0]):
                raise ValueError(f"{name}={schedule} is no schedule: give one number, or start, end and the steps between them, none negative.")
        if self.alternate is not None and (len(self.alternate) != 2 or min(self.alternate) < 1):
            raise ValueError(f"alternate={self.alternate} must be two numbers: steps of prediction and steps of thinking, each at least 1.")
        if self.posterior_temperature <= 0:
            raise ValueError(f"posterior_temperature={self.posterior_temperature} must be above 0.")
        for name in ("think_loss_weight", "think_ce_weight", "text_ce_weight", "thought_ce_weight", "beta"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        resolve_rewards(self.reward_funcs)
        # Functions are passed to the trainer, which counts them.
        if (
            self.reward_weights is not None
            and self.reward_funcs != default_of(type(self), "reward_funcs")
            and len(self.reward_weights) != len(self.reward_funcs)
        ):
            raise ValueError(
                f"reward_weights has {len(self.reward_weights)} entries and reward_funcs {len(self.reward_funcs)}: give one weight for each reward."
            )

    def _check_text(self) -> None:
        """What the text's own loss cannot do on a model with thinking tokens, whether it thinks in this run or not."""
        free, taught = self.rollout == "free", self.rollout == "free" or self.teacher is not None
        refusals = {
            "loss_type=dft is not supported with thinking tokens: leave loss_type=nll.": self.loss_type == "dft",
            "label_smoothing_factor is not supported with thinking tokens: set it to 0.": self.label_smoothing_factor > 0,
            "A teacher says something new at every step, and num_iterations > 1 repeats a step: choose one.": taught and self.num_iterations > 1,
            "rollout=free would go on behind several documents at once: set packing=False.": free and self.packing,
            "rollout=free lets one model write the text: set policies=shared.": free and self.policies == "split",
            f"rollout=free writes with thinking tokens, not with thoughts={self.thoughts}: set thoughts=discrete or gumbel.": (
                free and self.thoughts not in ("discrete", "gumbel")
            ),
            "rollout=free replaces the text that the data's thoughts and levels belong to: leave supply_thoughts and curriculum_threshold out.": (
                free and (self.supply_thoughts or self.curriculum_threshold is not None)
            ),
            f"prompt_length={self.prompt_length} leaves nothing to write in rows of max_length={self.max_length}: lower it, or raise max_length.": (
                free and self.max_length is not None and self.prompt_length >= self.max_length
            ),
            "padding_free=True would lay a whole batch out as one row: set packing=True instead.": self.padding_free,
            "router_aux_loss_coef is not supported with thinking tokens: leave it out.": bool(self.router_aux_loss_coef),
        }
        _refuse(refusals)

    def _check_fit(self) -> None:
        """What cannot be done."""
        soft, text = self.thoughts in SOFT, self.thoughts == "text"
        compared = self.advantage != "value" or self.objective == "marginal"
        least = 1 + compared + self.supply_thoughts  # a supplied thought is no part of the comparison
        refusals = {
            f"num_generations={self.num_generations} leaves nothing to compare a thought with: set num_generations to {least} or more.": (
                self.num_generations < least and self.thoughts in ("discrete", "text")
            ),
            f"scale_rewards=group needs a group: set num_generations to {2 + self.supply_thoughts} or more, or scale_rewards=batch or none.": (
                self.scale_rewards == "group" and self.num_generations <= 1 + self.supply_thoughts
            ),
            f"thoughts={self.thoughts} makes thoughts of given lengths: set stop=fixed.": soft and self.stop != "fixed",
            f"thoughts={self.thoughts} with memory=persistent is not supported: set memory=none.": soft and self.memory == "persistent",
            f"thoughts={self.thoughts} learns from the cross-entropy after it, and think_ce_weight=0 leaves none: set think_ce_weight above 0.": (
                soft and self.think_ce_weight == 0
            ),
            "advantage=value learns from each rollout once, and num_iterations > 1 repeats it: choose one.": (
                self.advantage == "value" and self.num_iterations > 1
            ),
            "thoughts=text writes thoughts of given lengths: set stop=fixed.": text and self.stop != "fixed",
            f"thoughts=text with max_think_length={self.max_think_length} has no room between its first and its last token: set it to 3 or more.": (
                text and self.max_think_length < 3
            ),
            f"thoughts=text with num_think_tokens={self.num_think_tokens} cannot tell a thought's begin from its end: set num_think_tokens to 2 or more.": (
                text and self.num_think_tokens == 1
            ),
            f"thoughts=text with temperature={self.temperature} is not supported: set temperature=1.": text and self.temperature != 1.0,
            "thoughts=text with memory=persistent is not supported: set memory=none.": text and self.memory == "persistent",
            "thoughts=text with advantage=token is not supported: set advantage=group, loo or value.": text and self.advantage == "token",
            "The reward `exact` compares with the data's own thoughts: set supply_thoughts=True.": "exact" in self.reward_funcs and not self.supply_thoughts,
            "think_start leaves steps that learn nothing with text_ce_weight=0: set think_start=0, or text_ce_weight above 0.": (
                self.think_start > 0 and self.text_ce_weight == 0
            ),
            "search compares thoughts of one length: set stop=fixed or stop=learned.": bool(self.search and self.stop == "sampled"),
            "supply_thoughts has thoughts of given lengths: set stop=fixed.": self.supply_thoughts and self.stop != "fixed",
            "supply_thoughts gives one thought for each row: set num_forks=1.": self.supply_thoughts and self.num_forks != 1,
            "supply_thoughts and search both fill the first thought of a group: choose one.": self.supply_thoughts and self.search > 0,
            "curriculum_threshold draws rows step by step: set max_steps.": self.curriculum_threshold is not None and self.max_steps <= 0,
            "curriculum_threshold draws new rows at every step, and num_iterations > 1 repeats them: choose one.": (
                self.curriculum_threshold is not None and self.num_iterations > 1
            ),
            "policies=split with beta is not supported: set beta=0.": self.policies == "split" and self.beta > 0,
            "policies=split with memory=persistent is not supported: set memory=none.": self.policies == "split" and self.memory == "persistent",
            "thoughts=filler draws nothing, and stop=sampled draws the end of a thought: set stop=learned or stop=fixed.": (
                self.thoughts == "filler" and self.stop == "sampled"
            ),
            "blind leaves nothing to say at the thought's first token, so thoughts=filler would know nothing: set blind=False.": (
                self.blind and self.thoughts == "filler"
            ),
            f"lookahead={self.lookahead} is longer than the row (max_length={self.max_length}): lower lookahead or raise max_length.": (
                self.max_length is not None and self.lookahead is not None and self.lookahead >= self.max_length
            ),
            f"num_forks={self.num_forks} do not fit a row of max_length={self.max_length}: lower num_forks, raise max_length, or set fork_positions=all.": (
                self.fork_positions != "all" and self.max_length is not None and self.num_forks >= self.max_length
            ),
            "stop=learned sums the stopping time out exactly for one judged token: set lookahead=1, or stop=sampled.": self.stop == "learned"
            and self.lookahead != 1,
            "advantage=token credits each thinking token by one judged token: set lookahead=1, or advantage=group.": self.advantage == "token"
            and self.lookahead != 1,
            "advantage=token compares predictions after every thinking token, which stop=sampled does not make: set stop=learned or stop=fixed.": (
                self.advantage == "token" and self.stop == "sampled"
            ),
            "blind hides the text from the speaker and memory=persistent puts thoughts into the text: choose one.": self.blind and self.memory == "persistent",
            "blind leaves nothing to predict from before the first thinking token, so advantage=token has no start: set advantage=group, loo or value.": (
                self.blind and self.advantage == "token"
            ),
            "fork_positions=markers needs fork_markers, the texts after which the model may think.": (
                self.fork_positions == "markers" and not (self.fork_markers and all(self.fork_markers))
            ),
            "save_steps must be a multiple of num_iterations, or a resumed run would lack the rollout it stopped in.": (
                self.num_iterations > 1 and self.save_strategy == "steps" and self.save_steps % self.num_iterations != 0
            ),
        }
        _refuse(refusals)

    def _check_effect(self) -> None:
        """What would do nothing."""
        effects = {
            "prompt_length": (self.rollout == "free", "rollout=free"),
            "fork_markers": (self.fork_positions == "markers", "fork_positions=markers"),
            "num_forks": (self.fork_positions != "all", "a fork_positions other than all"),
            "stop_smoothing": (self.stop == "learned", "stop=learned"),
            "think_cost": (self.stop != "fixed", "stop=learned or stop=sampled (with stop=fixed every thought costs the same)"),
            "advantage": (self.objective == "expected", "objective=expected (marginal has its own advantage)"),
            "posterior_temperature": (self.objective == "marginal", "objective=marginal"),
            "posterior_smoothing": (self.objective == "marginal", "objective=marginal"),
            "thought_ce_weight": (self.supply_thoughts, "supply_thoughts=True"),
            "speaker_learning_rate": (self.policies == "split", "policies=split"),
            "search_random": (self.search > 0, "search"),
            "search_changes": (self.search > 0 and self.search_random > 0, "search and search_random"),
            "search_until": (self.search > 0, "search"),
            **dict.fromkeys(("coverage_of", "coverage_decay"), (any(self.coverage_coef[:2]), "coverage_coef")),
            "balance_given": (any(self.balance_coef[:2]), "balance_coef"),
            "curriculum_replay": (self.curriculum_threshold is not None, "curriculum_threshold"),
            "continuous_layer": (self.thoughts == "continuous", "thoughts=continuous"),
            "scale_rewards": (self.objective == "expected", "objective=expected (marginal has its own advantage)"),
            **dict.fromkeys(("reward_funcs", "reward_weights"), (self.objective == "expected" and self.advantage != "token", REWARDED_BY_FUNCTIONS)),
            "epsilon": (
                self.num_iterations > 1 and self.think_loss_type != "cispo",
                "num_iterations > 1 and a think_loss_type other than cispo (the first ratio is 1)",
            ),
            "epsilon_high": (self.num_iterations > 1, "num_iterations > 1 (the first ratio is 1)"),
            "delta": (self.num_iterations > 1 and self.think_loss_type != "cispo", "num_iterations > 1 and a think_loss_type other than cispo"),
            "importance_sampling_level": (self.num_iterations > 1, "num_iterations > 1 (the first ratio is 1)"),
            "num_completions_to_print": (self.log_completions, "log_completions=True"),
        }
        for_soft_thoughts = {
            **dict.fromkeys(OF_REWARDED_THOUGHTS, (self.thoughts not in (*SOFT, "filler"), f"thoughts=discrete or text ({self.thoughts} has no rewards)")),
            **dict.fromkeys(OF_DRAWN_THOUGHTS, (self.thoughts not in ("continuous", "filler"), "thoughts=discrete or gumbel (nothing is drawn)")),
        }
        for_text = dict.fromkeys(OF_THINKING_VOCABULARY, (self.thoughts != "text", "thoughts=discrete (text is drawn from the real vocabulary)"))
        for name, (effective, needed) in [*for_soft_thoughts.items(), *for_text.items(), *effects.items()]:
            if not effective and getattr(self, name) != default_of(type(self), name):
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect here; it needs {needed}. Leave {name} out or change that.")


def _refuse(refusals: dict[str, bool]) -> None:
    for sentence, refused in refusals.items():
        if refused:
            raise ValueError(sentence)


def default_of(cls: type, name: str):
    """The default of a dataclass's field, without making the dataclass."""
    entry = next(f for f in fields(cls) if f.name == name)
    return entry.default_factory() if entry.default is MISSING else entry.default  # type: ignore[operator]
