"""Every option of thinking, in one place, checked before anything is loaded."""

import os
import re
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from trl import SFTConfig

from .config_checks import (
    LISTS,
    MORE_IS_BETTER,
    OF_THOUGHTS,
    SCHEDULES,
    check_choice,
    check_effect,
    check_fit,
    check_reporters,
    check_run,
    check_search,
    check_text,
    check_values,
)
from .exploration import scheduled
from .losses import PolicyLoss
from .rollout import Sampling
from .tree import Branching

FORK_POSITIONS = ("random", "entropy", "stride", "all", "markers")

A_SCHEDULE = "A schedule: a value, or start, end, steps (and the step it begins at)."


def option(default, choices: tuple[str, ...] | None = None, help: str = ""):
    """A dataclass field; its choices are checked here as well as on the command line, and its help is what the docstring says, unless it is given."""
    metadata = {"help": help} | ({"choices": choices} if choices else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def documented(cls):
    """Gives a dataclass's options the help that its docstring has for them."""
    for names, told in re.findall(r"^ {8}(\w+ \(.*):\n((?: {12}.+\n)+)", cls.__doc__ or "", re.MULTILINE):
        for name in re.findall(r"(\w+) \(", names):
            entry = cls.__dataclass_fields__[name]
            entry.metadata = {**entry.metadata, "help": " ".join([*told.split(), *([A_SCHEDULE] if "(schedule" in names else [])])}
    return cls


@documented
@dataclass
class ThinkTokConfig(SFTConfig):
    r"""
    Configuration of [`ThinkTokTrainer`]: [`~trl.SFTConfig`] and everything about thinking.

    `num_think_tokens=0` or `num_forks=0` switches thinking off and leaves plain continued pretraining, the control arm of the same recipe.
    An option that would do nothing in the chosen mode is an error.

    > [!NOTE]
    > These parameters have other defaults than in [`~trl.SFTConfig`]:
    > - `packing_strategy`: `"bfd_split"` instead of `"bfd"`, which leaves out what of a document is longer than a row.
    > - `eval_packing`: `False` instead of the value of `packing`, as gains are counted in documents.
    > - `metric_for_best_model`: `"bits_think"` instead of `"loss"`, which is that of the text without thoughts, where the model thinks.
    > - `use_cpu`: `True` where there is no accelerator or the launcher asks for it; `ddp_find_unused_parameters`: `True` for a speaker that rests at first.

    Parameters:
        > The vocabulary

        num_think_tokens (`int`, *optional*):
            Thinking tokens N. `None`: as many as the model has, or 16. 0 on a model that has some lets the text unlearn them; `num_forks=0` does not.
        think_init_words (`list[str]`, *optional*):
            Texts of one token each that new thinking tokens start as noisy copies of, in turn: the model may then begin by thinking in silence what it would
            write. Where left out they start in random directions, and mean nothing.

        > The tree

        num_forks (`int`, defaults to `16`):
            Places K in each row where the model may think.
        fork_positions (`str`, defaults to `"random"`):
            Where the model may think: `random`, `entropy` (the hardest next tokens, by the model without thinking), `stride` (evenly), `all`, or `markers`
            (after a text).
        fork_markers (`list[str]`, *optional*):
            The texts, for `fork_positions="markers"`. Each ends where what it asks for begins: the next token has to be one to predict.
        num_generations (`int`, defaults to `4`):
            Thoughts G at each fork, compared with each other.
        max_think_length (`int`, defaults to `4`):
            Thinking tokens L of a thought at most.
        lookahead (`int` or `None`, defaults to `1`):
            Following real tokens H that judge a thought; `None` (`null` in YAML and on the command line): all that follow in the
            row.
        stop (`str`, defaults to `"learned"`):
            How thoughts end. `fixed`: all have L tokens, or as many as the data's column `think_length` says, a number or with
            `fork_positions="markers"` a list with one for each marker of the row.
            `learned`: the stopping time is summed out exactly, for one judged token. `sampled`: drawn from
            the gate.
        stop_smoothing (schedule, defaults to `[0.5]`):
            With `stop="learned"`: this fraction of a uniform distribution over lengths is mixed into the learned one when thoughts and the tokens after them
            are trained, so that long thoughts are trained while the model still rarely thinks. 0: exact.
        gate_smoothing (schedule, defaults to `[0.0]`):
            With `stop="learned"`: the same fraction when the gate learns which length was best. It then finds a length that it would hardly take itself;
            trained exactly, it stays with lengths that are right now and then. 0: exact.
        memory (`str`, defaults to `"none"`):
            `none`: a thought is forgotten once a real token follows. `persistent`: one thought per fork stays in the text, as in generation.
            With `fork_positions="markers"` prompts are then thought in as well, where nothing is judged.
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
            `discrete`: drawn from the thinking vocabulary. `filler`: always the first thinking token, the control that computes without saying anything;
            with `stop=sampled` how many of them is drawn and rewarded. `text`: drawn from the real vocabulary, between the first and the last thinking token,
            which begin and end a thought and count as two of `max_think_length` (Quiet-STaR, RLP).
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
            `[n, m]`: n steps in which the speaker learns from thoughts, then m in which the thinker does, and so on. The text itself is learned in all of them.

        > Finding a language

        A schedule is a number, or a list of start, end, the steps between them and, where it is not 0, the step at which it begins to change; with a curriculum
        each level's rows have a clock of their own.

        think_start (`int`, defaults to `0`):
            Step at which thinking begins, a multiple of `num_iterations`; before it the model only learns the text. Schedules count from there.
        search (schedule, defaults to `[0.0]`):
            One thought of each group is the best of so many candidates for the text that follows. All thoughts where there are no more than that. The gate
            of `stop="learned"` learns from it as from the others, so it opens for thoughts that the policy does not have yet: let the search end in time.
        search_random (`float`, defaults to `0.5`):
            Fraction of the candidates that are drawn uniformly; the others are drawn by the policy.
        search_changes (`int`, *optional*):
            A random candidate is one of the policy's thoughts with so many tokens drawn anew. All of them where it is left out.
        epsilon_greedy (schedule, defaults to `[0.0]`):
            Probability that a thinking token is drawn uniformly.
        coverage_coef (schedule, defaults to `[0.0]`):
            Bonus of a thought for being rare: times -log of its frequency, nats.
        coverage_of (`str`, defaults to `"thought"`):
            What is counted: each whole `thought`, or each `token` at its position in the thought, whose bonuses add up.
        coverage_where (`str`, defaults to `"everywhere"`):
            Where the bonus is paid: `everywhere`, or as far as the group's best thought does not tell the judged text yet (`unsolved`), times 1 - p.
        coverage_decay (`float`, defaults to `0.8`):
            Decay of the moving average of thought frequencies, for each step.
        balance_coef (schedule, defaults to `[0.0]`):
            Weight of a term that keeps many thinking tokens in use: the entropy of the batch's mean distribution over them.
        balance_given (`str`, defaults to `"position"`):
            For what that mean is taken: each `position` of a thought, or each position and `token` before it.
        thought_entropy_target (schedule, *optional*):
            Entropy of the next thinking token, as a fraction of ln N, that a controller holds from both sides: it pushes up when entropy is below and down
            when it is above.
        revive_every (`int`, defaults to `0`):
            After so many steps, thinking tokens that are hardly used are initialized again, as noisy copies of those after which the text is predicted worst:
            two meanings that share a token do not separate by themselves. `0`: never.
        markovian_share (`float`, defaults to `0.0`):
            Part of each group that sees of its own thought the latest token alone, in thinking and in what follows, so that each token comes to stand for
            all that matters (as the chunks of https://huggingface.co/papers/2510.06557 do). The others see all, as in generation.
        curriculum_threshold (`list[float]`, *optional*):
            Running accuracy at which the next `level` of the data begins: one number, or one for each level but the last. `None`: all rows from the start.
        curriculum_replay (`float`, defaults to `0.4`):
            Part of the steps that goes to all reached levels alike.
        curriculum_think_length (`list[int]`, *optional*):
            Thinking tokens of a thought at most while a level is the hardest reached, on all rows, a number for each level: with `stop="learned"` lengths are
            then learned one after the other. The next level then begins when all those reached have their threshold, and not the hardest alone.
            `None`: `max_think_length` from the start.

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
            `log_prob`, `accuracy`, `prob`, `information_gain`, `exact`, or the place of a function of your own, `my_rewards.surprise`; functions themselves are
            passed to the trainer. They are of what is thought: with
            `stop="learned"` when to think is learned from the log-probability of the judged tokens, whatever the rewards.
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
            Divide advantages by the rewards' standard deviation of the `group` or the `batch` (of the rows that a process has at a time, other than in TRL).

        > The loss

        think_loss_type (`str`, defaults to `"dr_grpo"`):
            `dr_grpo`, `grpo`, `bnpo`, `dapo` or `cispo`; see [`~hf_thinktok.losses.PolicyLoss`].
        think_loss_weight (`float`, defaults to `1.0`):
            Weight of the policy loss, by which rewards train thoughts.
        gate_loss_weight (`float`, defaults to `1.0`):
            With `stop: learned`, weight of the gate's loss and of the price. At 1 a fork's decision weighs as much as the text's tokens for each fork do,
            with one fork a row as the whole row: where the gate is right already and the text matters, less leaves more of each clipped step to the text.
            Where thoughts stay longer than what they tell is worth, more keeps the gate's gradient from being lost among that of the thoughts.
        detach_gate (`bool`, defaults to `False`):
            With `stop: learned`, the gate trains the thinking rows alone, and where to think is read from hidden states that do not change for it: whatever
            it gets wrong, the text has no part in mending it.
        think_ce_weight (`float`, defaults to `1.0`):
            Weight of the cross-entropy of real tokens after a thought. At 1 a fork's weigh as much, all together, as one token of the text.
        text_ce_weight (`float`, defaults to `1.0`):
            Weight of the cross-entropy of the text itself, without thoughts.
        speaker_learning_rate (`float`, *optional*):
            Learning rate of the speaker, where it differs.
        think_learning_rate (`float`, *optional*):
            Learning rate of the thinking rows beside an adapter, where it differs. They are new, and may want larger steps than what is there.
        think_cost (schedule, defaults to `[0.0]`):
            Price of a thinking token, nats. A high one from the start shuts the gate before it has learned where to stop; raised slowly, later or not at all.
        beta (`float`, defaults to `0.0`):
            Weight of the KL divergence of thoughts from the initial model. It is part of the policy loss, so `think_loss_weight` multiplies it.
        num_iterations (`int`, defaults to `1`):
            Optimizer steps on each rollout. What its thoughts are worth is found in the first of them, and kept. Rows that fill no whole batch of an
            epoch are left out of it, others in each.
        epsilon (`float`, defaults to `0.2`), epsilon_high (`float`, *optional*), delta (`float`, *optional*):
            Clipping of the importance ratio, which differs from 1 only with `num_iterations > 1`. For `cispo`, `epsilon_high` is the ratio's bound itself (5).
        importance_sampling_level (`str`, defaults to `"token"`):
            `token` or `sequence`.
        disable_dropout (`bool`, defaults to `True`):
            Set all dropout to 0, an adapter's as well: thoughts of one place are compared, and each would be judged under another mask.

        > Logging and safety

        log_completions (`bool`, defaults to `False`):
            Print coloured sample thoughts at every log.
        num_completions_to_print (`int`, defaults to `6`):
            How many thoughts `log_completions` prints.
        max_nonfinite_steps (`int`, defaults to `10`):
            Steps in a row with a loss or reward that is not finite before training stops. Such steps are skipped and counted.
    """

    packing_strategy: str = option(
        "bfd_split",
        ("bfd", "bfd_split", "wrapped"),
        help="How documents make up rows: whole ones, and with bfd_split the rest of a longer one, which bfd drops.",
    )
    eval_packing: bool | None = option(None, help="Pack held-out text as well, the begin of each document. Not unless set: gains are counted in documents.")

    num_think_tokens: int | None = option(None)
    think_init_words: list[str] | None = option(None)

    num_forks: int = option(16)
    fork_positions: str = option("random", FORK_POSITIONS)
    fork_markers: list[str] | None = option(None)
    num_generations: int = option(4)
    max_think_length: int = option(4)
    lookahead: int | None = option(1)
    stop: str = option("learned", ("fixed", "learned", "sampled"))
    stop_smoothing: list[float] = option([0.5])
    gate_smoothing: list[float] = option([0.0])
    memory: str = option("none", ("none", "persistent"))
    blind: bool = option(False)
    gather_for_rollout: bool = option(True)
    engine: str = option("auto", ("auto", "tree", "replicated"))

    policies: str = option("shared", ("shared", "split"))
    freeze: str = option("none", ("none", "thinker", "speaker"))
    thoughts: str = option("discrete", ("discrete", "text", "filler", "gumbel", "continuous"))
    continuous_layer: int = option(-1)
    supply_thoughts: bool = option(False)
    thought_ce_weight: float = option(0.0)
    alternate: list[int] | None = option(None)

    think_start: int = option(0)
    search: list[float] = option([0.0])
    search_random: float = option(0.5)
    search_changes: int | None = option(None)
    epsilon_greedy: list[float] = option([0.0])
    coverage_coef: list[float] = option([0.0])
    coverage_of: str = option("thought", ("thought", "token"))
    coverage_where: str = option("everywhere", ("everywhere", "unsolved"))
    coverage_decay: float = option(0.8)
    balance_coef: list[float] = option([0.0])
    balance_given: str = option("position", ("position", "token"))
    thought_entropy_target: list[float] | None = option(None)
    revive_every: int = option(0)
    markovian_share: float = option(0.0)
    curriculum_threshold: list[float] | None = option(None)
    curriculum_replay: float = option(0.4)
    curriculum_think_length: list[int] | None = option(None)

    teacher: str | None = option(None)
    rollout: str = option("fork", ("fork", "free"))
    prompt_length: int = option(32)

    temperature: float = option(1.0)
    top_k: int = option(0)
    top_p: float = option(1.0)
    min_p: float | None = option(None)

    reward_funcs: list[str] = option(["log_prob"])
    reward_weights: list[float] | None = option(None)
    objective: str = option("expected", ("expected", "marginal"))
    posterior_temperature: float = option(1.0)
    posterior_smoothing: float = option(0.0)
    advantage: str = option("group", ("group", "loo", "token", "value"))
    scale_rewards: str = option("none", ("none", "group", "batch"))

    think_loss_type: str = option("dr_grpo", ("dr_grpo", "grpo", "bnpo", "dapo", "cispo"))
    think_loss_weight: float = option(1.0)
    gate_loss_weight: float = option(1.0)
    detach_gate: bool = option(False)
    think_ce_weight: float = option(1.0)
    text_ce_weight: float = option(1.0)
    speaker_learning_rate: float | None = option(None)
    think_learning_rate: float | None = option(None)
    think_cost: list[float] = option([0.0])
    beta: float = option(0.0)
    num_iterations: int = option(1)
    epsilon: float = option(0.2)
    epsilon_high: float | None = option(None)
    delta: float | None = option(None)
    importance_sampling_level: str = option("token", ("token", "sequence"))
    disable_dropout: bool = option(True)

    log_completions: bool = option(False)
    num_completions_to_print: int = option(6)
    max_nonfinite_steps: int = option(10)

    def __post_init__(self):
        if isinstance(self.reward_funcs, str):
            self.reward_funcs = [self.reward_funcs]
        for name in (*SCHEDULES, *LISTS, "curriculum_threshold"):
            if isinstance(getattr(self, name), tuple):
                setattr(self, name, list(getattr(self, name)))
        for name in (*SCHEDULES, "curriculum_threshold"):
            if isinstance(value := getattr(self, name), Real) and not isinstance(value, bool):
                setattr(self, name, [float(value)])
        if self.packing and self.eval_packing is None:
            self.eval_packing = False  # forks are counted in rows, and gains are over documents
        check_values(self, ThinkTokConfig.__annotations__)
        if self.num_think_tokens != 0:
            check_text(self)
        elif self.think_init_words:
            raise ValueError("think_init_words has no effect with num_think_tokens=0: leave it out.")
        elif self.teacher is not None:
            raise ValueError("teacher has no effect with num_think_tokens=0: for a student that does not think, set num_forks=0.")
        if self.thinks:
            check_fit(self)
            check_choice(self, self.num_think_tokens)
            check_search(self, self.num_think_tokens)
            check_effect(self)
            if self.max_steps >= 0:  # else it is known when the data is
                check_run(self, self.max_steps)
        # Where there is nothing but a CPU, or the launcher asks for it, bf16 and devices follow without another option.
        self.use_cpu: bool = self.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.accelerator.is_available()
        if self.policies == "split" and self.think_start and self.ddp_find_unused_parameters is None:  # type: ignore[has-type]
            self.ddp_find_unused_parameters = True  # the speaker's, until thinking starts
        if self.metric_for_best_model is None and self.chooses_best and self.thinks:
            self.metric_for_best_model: str | None = "bits_think"  # a loss is that of the text without thoughts
        metric = self.metric_for_best_model or ""
        if metric.endswith(OF_THOUGHTS):  # transformers knows it of losses alone
            greater = metric.endswith(MORE_IS_BETTER)
            if self.greater_is_better is (not greater):
                raise ValueError(f"greater_is_better={not greater} would keep the worst model by {metric}: leave it out (with dataclasses.replace, set None).")
            self.greater_is_better: bool | None = greater
        super().__post_init__()
        check_reporters(self)
        given: dict[str, Any] = self.model_init_kwargs or {}
        if "torch_dtype" in given:  # the older name, beside which TRL's default for the newer one would win
            self.model_init_kwargs: dict[str, Any] | None = {"dtype" if name == "torch_dtype" else name: value for name, value in given.items()}

    @property
    def thinks(self) -> bool:
        return self.num_think_tokens != 0 and self.num_forks != 0

    @property
    def chooses_best(self) -> bool:
        """Whether evaluations are compared with each other."""
        return self.load_best_model_at_end or self.save_strategy == "best" or self.lr_scheduler_type == "reduce_lr_on_plateau"

    @property
    def policy_learns(self) -> bool:
        """Whether rewards of thoughts move the thinker."""
        return self.freeze != "thinker" and self.think_loss_weight > 0

    @property
    def reads_thinking(self) -> bool:
        """Whether thoughts after markers stay in the text: then prompts have them as well."""
        return self.fork_positions == "markers" and self.memory == "persistent"

    def stored(self) -> dict[str, Any]:
        """What a checkpoint says of how its model thinks."""
        names = ["max_think_length", "stop", "memory", "blind", "lookahead", "policies", "thoughts", "fork_positions"]
        names += ["continuous_layer"] * (self.thoughts == "continuous") + ["fork_markers"] * (self.fork_positions == "markers")
        return {name: getattr(self, name) for name in names}

    def branching(self, trunk_length: int, length: int | None = None, num_generations: int | None = None, markovian: int = 0) -> Branching:
        """The shape of a row's thoughts for rows of `trunk_length` tokens, with thoughts of up to `length` tokens, and so many of them, where that is known."""
        lookahead = max(trunk_length - 1, 1) if self.lookahead is None else self.lookahead
        groups, length = num_generations or self.num_generations, length or self.max_think_length
        return Branching(groups, length, lookahead, self.blind, self.memory == "persistent", markovian)

    @property
    def num_markovian(self) -> int:
        return round(self.markovian_share * self.num_generations)

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
    def rewards_draws(self) -> bool:
        """Whether anything is drawn that a reward can be for: thoughts, or of fillers how many."""
        return self.thoughts in ("discrete", "text") or (self.thoughts == "filler" and self.stop == "sampled")

    @property
    def needs_gate(self) -> bool:
        return self.stop != "fixed"

    @property
    def needs_every_prefix(self) -> bool:
        return self.stop == "learned" or self.advantage == "token"

    def scoring(self, training: bool = True) -> dict[str, Any]:
        """What `score_tree` is to look at."""
        return {
            "temperature": self.draw_temperature,
            "every_prefix": self.needs_every_prefix,
            "gate": self.needs_gate,
            "detach_gate": self.detach_gate and training,
            "split": self.policies == "split",
            "fork_hidden": self.advantage == "value" and training,
            "last_hidden": self.revive_every > 0 and training,
        }

    def policy_loss(self) -> PolicyLoss:
        # As in TRL, cispo's bound is absolute; 5 is ScaleRL's. The others' is counted from 1.
        high = self.epsilon_high if self.epsilon_high is not None else 5.0 if self.think_loss_type == "cispo" else self.epsilon
        return PolicyLoss(self.think_loss_type, self.epsilon, high, self.delta, self.importance_sampling_level, self.beta)
