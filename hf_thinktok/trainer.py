"""ThinkTokTrainer: continued pretraining of a causal LM that thinks in tokens of its own."""

import contextlib
import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import DistributedType
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.models import unwrap_model_for_generation

from .advantages import ValueBaseline
from .callbacks import SayWhatIsTrained, StartOver
from .config import ThinkTokConfig
from .config_checks import check_choice, check_rewards, check_run, check_search, checked_scheduler
from .curriculum import Curriculum, order_of_rows
from .data import TreeCollator, check_prepared, check_thinking_numbers, column_of, is_packed, levels_of, named_sets, task_columns
from .distributed import autocast, check_launcher, computes_in, for_rollout, is_partitioned, prepare_frozen, set_up_fsdp2, where_it_is_fast, whole
from .engine import Pass, choose_engine, small_twin
from .evaluation import GainByDocument
from .forks import check_markers, check_positions, choose_forks, count_forks, ends_of, given_lengths, marker_ids, may_think, room_for
from .head import HeadInputs, attach_head
from .loading import check_arguments, check_optimizer, check_parts, find_speaker, load_model, load_teacher, sample_text, used_by_now
from .measuring import MeasuringTrainer
from .models import disable_dropout, evaluating, set_learning_rate, unwrapped
from .objective import actions, speak, thinking_loss
from .peft import SPEAKER, add_speaker, add_thinking_rows, check_mergeable, is_speaker, is_thinking_row, rows_in_fp32
from .revival import Revival
from .rewards import RewardFunction, masked_sum, resolve_rewards
from .rollout import Rollout, Sampling, sample_thoughts
from .scores import TreeScores, score_tree
from .search import Explorer
from .teacher import own_text, real_tokens_only, taught
from .thoughts import check_feedback, control_thoughts, think_softly, thought_inputs
from .tokens import add_thinking_tokens, check_vocabulary
from .tree import ThoughtTree, before

NO_LOGITS = "ThinkTokTrainer makes no logits, so there is nothing to predict: call evaluate."


class ThinkTokTrainer(MeasuringTrainer):
    r"""
    Trains a pretrained causal LM to think in extra vocabulary ids where that helps it predict real text.

    Real tokens get cross-entropy. Thoughts get no supervision: G thoughts sampled at the same place of the same text are rewarded by what they do to the
    real tokens that follow, compared with each other. The checkpoint is an ordinary `AutoModelForCausalLM`.

    Args:
        model (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`]):
            Name, folder or instance of a decoder-only LM. It gets thinking tokens unless it has them.
        args ([`ThinkTokConfig`], *optional*):
            Options; the defaults where not given.
        train_dataset, eval_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Text, in any form that [`~trl.SFTTrainer`] takes.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer; the model's own where not given.
        speaker ([`~transformers.PreTrainedModel`], *optional*):
            The second model of `policies="split"`, of the same vocabulary; else the first one's own or its copy, and with `peft_config` a second adapter.
        teacher ([`~transformers.PreTrainedModel`], *optional*):
            In place of `args.teacher`.
        reward_funcs (names, functions or a list of both, *optional*):
            In place of `args.reward_funcs`; see `hf_thinktok.rewards`.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Trains an adapter and the thinking rows.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Loads a model given by name in 4 or 8 bits, for `peft_config` (QLoRA).
        kwargs:
            Whatever else [`~trl.SFTTrainer`] takes.

    Raises:
        ValueError: one sentence on what does not fit, before a model is loaded where possible.
    """

    _tag_names = ["trl", "thinktok"]
    _name = "ThinkTok"

    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel,
        args: ThinkTokConfig | None = None,
        *,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_funcs: RewardFunction | str | list[RewardFunction | str] | None = None,
        peft_config: Any = None,
        speaker: PreTrainedModel | None = None,
        teacher: PreTrainedModel | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ):
        args = ThinkTokConfig("thinktok-output") if args is None else args
        check_arguments(args, train_dataset, eval_dataset, formatting_func, kwargs)
        self.rewards = resolve_rewards(args.reward_funcs if reward_funcs is None else reward_funcs)
        self.reward_weights = [1.0] * len(self.rewards) if args.reward_weights is None else args.reward_weights
        if len(self.reward_weights) != len(self.rewards):
            raise ValueError(f"reward_weights has {len(self.reward_weights)} entries for {len(self.rewards)} rewards: give one weight for each reward.")
        two_adapters = args.policies == "split" and peft_config is not None and args.num_think_tokens != 0
        if args.thinks:
            check_rewards(args, self.rewards)
        check_parts(args, model, reward_funcs, peft_config, two_adapters, speaker, teacher, quantization_config)
        model, tokenizer = load_model(model, processing_class, args, train_dataset, quantization_config, formatting_func, peft_config is not None)
        if args.teacher is not None and teacher is None:
            teacher = load_teacher(args.teacher, tokenizer, args)

        self.plain = args.num_think_tokens == 0
        if not self.plain:
            speaker = find_speaker(speaker, model, args, two_adapters)
            self._give_thinking_tokens(model, tokenizer, args, train_dataset, formatting_func, speaker, two_adapters)
            peft_config = add_thinking_rows(peft_config, model, self.vocabulary, (args.model_init_kwargs or {}).get("revision"))
        with used_by_now(args):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                peft_config=peft_config,
                formatting_func=formatting_func,
                **kwargs,
            )
        check_prepared(self.train_dataset, self.eval_dataset, model, args, None if self.plain else self.vocabulary)
        if not self.plain:
            check_vocabulary(model.config, self._tokenizer, None)  # chat_template_path adds tokens
        check_launcher(self.accelerator, self.model)
        set_up_fsdp2(self.accelerator)
        if two_adapters:
            add_speaker(self.model, peft_config)
        if is_peft_model(self.model):
            check_mergeable(self.model)
            rows_in_fp32(self.model)
            self.add_callback(SayWhatIsTrained())
        if args.disable_dropout:  # an adapter's as well
            disable_dropout(self.model)
        check_optimizer(self.optimizer, self.model)
        self._begin_to_measure()
        self.add_callback(StartOver(self._start_over))
        self._forget_rollouts()
        if not self.plain:
            self._prepare_to_think(teacher)
        self._fresh = self._snapshot()

    def _give_thinking_tokens(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: ThinkTokConfig,
        train_dataset: Dataset | IterableDataset,
        formatting_func: Callable[[dict], str] | None,
        speaker: PreTrainedModel | None,
        two_adapters: bool,
    ) -> None:
        """Rows for the model, and for the speaker its own; the tokenizer learns the tokens once."""
        stored = getattr(model.config, "thinktok", None) or {}
        how = {"num_tokens": args.num_think_tokens, "seed": args.seed, "words": args.think_init_words or ()}
        how["sample_text"] = sample_text(train_dataset, args.dataset_text_field, tokenizer, formatting_func)
        if speaker is not None:
            with where_it_is_fast(speaker, args.device):
                add_thinking_tokens(speaker, copy.deepcopy(tokenizer), **how)
        with where_it_is_fast(model, args.device):
            self.vocabulary = add_thinking_tokens(model, tokenizer, **how)
        if args.supply_thoughts and args.num_think_tokens is None:  # else it was looked at before the model was loaded
            check_thinking_numbers(column_of(train_dataset, "thoughts"), "train", self.vocabulary.num_tokens)
        if args.thinks:
            check_choice(args, self.vocabulary.num_tokens)
            check_search(args, self.vocabulary.num_tokens)
        if args.policies == "split" and not two_adapters:
            if is_partitioned(model):
                raise ValueError("policies=split trains two whole models, which ZeRO-3 cannot: take ZeRO-2, or two adapters of one model (peft_config).")
            model.speaker = copy.deepcopy(model) if speaker is None else speaker
        # Nothing of an earlier run's, unless this one leaves thoughts as they are.
        model.config.thinktok = (args.stored() if args.thinks or "stop" not in stored else stored) | dataclasses.asdict(self.vocabulary)
        if hasattr(model, SPEAKER):  # a folder of its own, by which it is known for what it is
            model.speaker.config.thinktok = dict(model.config.thinktok)

    def _prepare_to_think(self, teacher: PreTrainedModel | None) -> None:
        args, base = self.args, unwrapped(self.model)
        models = [base, base.speaker] if hasattr(base, SPEAKER) else [base]
        for one in models:
            attach_head(one, self.vocabulary)
        if args.thoughts == "continuous":
            with whole(base):
                check_feedback(base, args.continuous_layer, args.policies == "split")
        self.data_collator = TreeCollator(pad_token_id=self._tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of, columns=task_columns(args))
        check_positions(args, base)
        self.markers = marker_ids(args.fork_markers or (), self._tokenizer)
        if args.thinks and args.fork_positions == "markers":
            check_markers(self.markers, args, named_sets(self.train_dataset, self.eval_dataset), self._may_think)
        longest = args.max_length or 1024
        sharded = is_partitioned(base) or self.accelerator.distributed_type == DistributedType.FSDP
        if args.revive_every and self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise ValueError("revive_every writes rows of the embeddings, of which DeepSpeed and FSDP2 keep copies or parts: leave it out, or take DDP.")
        if args.thinks and not sharded and not args.gather_for_rollout:
            raise ValueError("gather_for_rollout=False has no effect here; it needs ZeRO-3 or FSDP2.")
        for one in models:
            if not sharded and one.device != args.device:  # DeepSpeed would do it later
                one.to(args.device)
        tried = [small_twin(one, self.vocabulary, self.accelerator.device) if sharded else one for one in models]
        dtype = computes_in(self.accelerator)
        wanted = args.engine if args.num_forks or is_packed(self.train_dataset) else "replicated"  # ordinary rows
        how = self.vocabulary, args.branching(min(longest, 1024)), longest, args.num_forks, wanted, args.torch_compile, dtype
        self.engine = max((choose_engine(one, *how) for one in tried), key=lambda engine: engine.generality)  # exact for both
        self.engine.dtype = dtype
        if args.thinks and args.num_markovian and self.engine.name == "replicated":
            raise ValueError(f"markovian_share hides tokens by the packed tree's mask, which {base.config.model_type} cannot run: leave markovian_share out.")
        self.reference = self._reference_model() if args.beta > 0 else None
        self.teacher = None if teacher is None else prepare_frozen(real_tokens_only(teacher, self.vocabulary), self.accelerator)
        self.explore = Explorer(self)
        self.value = ValueBaseline(self._global_mean) if args.advantage == "value" else None
        if args.revive_every:
            ranks = self.accelerator.gather, self.accelerator.num_processes, self.accelerator.process_index
            self.revival = Revival(self.vocabulary, args.sampling(), args.revive_every, args.seed, *ranks)
            self.add_callback(self.revival)
        if args.curriculum_threshold is not None:
            self.curriculum = Curriculum(levels_of(self.train_dataset), args.curriculum_threshold, args.curriculum_think_length)

    def _forget_rollouts(self) -> None:
        self._rollouts: list[Rollout] = []  # of the present batches, for num_iterations > 1
        self._micro_step = (-1, -1)
        self._weights: Iterator[Tensor] | None = None  # of the thinking loss, for each of the batches to come; 1 where there is a single one

    # ---------------------------------------------------------------- the algorithm

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.plain:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs:
            raise ValueError(NO_LOGITS)
        if not self.model.training:
            return self._evaluate_batch(model, inputs, self._labels(inputs))
        args, turn = self.args, self._next_micro_step()
        inputs = inputs if self.teacher is None else self._taught(model, inputs, turn)
        tokens_BT, labels_BT = inputs["input_ids"], self._labels(inputs)

        step = self._schedule_step(inputs)
        rollout = self._think(model, inputs, self._rollout(model, inputs, labels_BT, turn, step))
        tree = self._tree(inputs, rollout)
        scores = self._score(model, tree, tokens_BT, labels_BT, rollout)
        # A token of the text weighs as in TRL.
        tokens = scores.trunk_mask_BT.sum() if num_items_in_batch is None else num_items_in_batch
        token_weight = self._ranks_to_average(num_items_in_batch) / torch.as_tensor(tokens).clamp(min=1)
        weight = 1.0 if self._weights is None else next(self._weights)
        loss = args.text_ce_weight * token_weight * -scores.trunk_logps_BT.sum()
        metrics: dict[str, Tensor] = {}
        if tree.num_forks:
            if args.beta > 0 and rollout.reference_logps_BKGA is None:
                rollout.reference_logps_BKGA = self._reference_actions(tree, tokens_BT, labels_BT, rollout)
            thinking, metrics = thinking_loss(
                scores,
                rollout,
                args,
                self.rewards,
                self.reward_weights,
                token_weight / weight,
                global_mean=self._global_mean,
                step=step,
                first_id=self.vocabulary.first_id,
                value=self.value and functools.partial(self.value, share=1 / self.current_gradient_accumulation_steps),
            )
            loss = loss + weight * thinking
            if self.revival is not None:
                self.revival.observe(rollout, scores)
        self._record(loss, metrics, tree, inputs, rollout, scores)
        return loss

    def _schedule_step(self, inputs: dict[str, Tensor]) -> int:
        """The clock of all schedules: optimizer steps since thinking began, with a curriculum those since then of the batch's level."""
        step = self.state.global_step
        stage_step = step if self.curriculum is None else self.curriculum.stage_step(step, int(inputs["level"][0]))
        return max(min(stage_step, step - self.args.think_start), 0)

    def _taught(self, model, inputs: dict[str, Tensor], turn: int) -> dict[str, Tensor]:
        """The batch with labels of the teacher's, and with `rollout: free` with text of the model's own. The loss counts tokens as the data had them."""
        generator = self._generator(2, turn, self.state.global_step)
        if self.args.rollout == "free":
            gather, checkpointing = self.args.gather_for_rollout, self.args.gradient_checkpointing_kwargs
            writing = unwrap_model_for_generation(model, self.accelerator, gather, gradient_checkpointing_kwargs=checkpointing)
            with autocast(self.accelerator), writing as writer:  # as in `_sample`: weights are cast once
                inputs = own_text(writer, inputs, self.args.prompt_length, self.vocabulary, self._tokenizer.eos_token_id, generator)
        return taught(self.teacher, inputs, self.vocabulary, generator)

    def _rollout(self, model, inputs: dict[str, Tensor], labels_BT: Tensor, turn: int, step: int) -> Rollout:
        """Thoughts for this batch: new ones, or with `num_iterations` those of the iteration before."""
        if self.state.global_step % self.args.num_iterations == 0 or turn >= len(self._rollouts):
            del self._rollouts[turn:]
            generator = self._generator(0, turn, self.state.global_step)
            forks_BK = self._forks(model, inputs, labels_BT, generator, self.args.fork_positions)
            sampling = self.args.sampling(step)
            rollout = self._sample(model, inputs, forks_BK, generator, sampling, markovian=self.args.num_markovian)
            self._rollouts.append(self.explore(model, inputs, labels_BT, rollout, generator, sampling, step))
        return self._rollouts[turn]

    def _sample(
        self,
        model,
        inputs: dict[str, Tensor],
        forks_BK: Tensor,
        generator: torch.Generator,
        sampling: Sampling,
        num_generations: int | None = None,
        markovian: int = 0,
    ) -> Rollout:
        given_BK = self._given_lengths(inputs, forks_BK)
        length = None if given_BK is None else max(self._largest_of_ranks(given_BK), 1)
        branching = self.args.branching(inputs["input_ids"].shape[1], length, num_generations, markovian)
        # Around all passes, so that weights are cast, and gathered, once and not at every token.
        with autocast(self.accelerator), for_rollout(model, self.accelerator, self.args.gather_for_rollout) as whole_model:
            return sample_thoughts(
                self.engine, whole_model, inputs["input_ids"], inputs["documents"], forks_BK, branching, sampling, self.vocabulary, generator, given_BK
            )

    def _given_lengths(self, inputs: dict[str, Tensor], forks_BK: Tensor) -> Tensor | None:
        """Thinking tokens of each fork, where the data says so, or at most so many, where the curriculum of this training does."""
        trained = self.is_in_train or self.state.global_step
        if trained and self.curriculum is not None and (longest := self.curriculum.longest(self.state.global_step)) is not None:
            return torch.full_like(forks_BK, longest)
        if "think_length" not in inputs:
            return None
        return given_lengths(inputs["think_length"], ends_of(self.markers, inputs["input_ids"])).gather(1, forks_BK.clamp(min=0))

    def _think(self, model, inputs: dict[str, Tensor], rollout: Rollout) -> Rollout:
        """The rollout with what its thought nodes read, where that is no id."""
        args = self.args
        return think_softly(self.engine, model, inputs["input_ids"], inputs["documents"], rollout, args.thoughts, args.continuous_layer, args.temperature)

    def _tree(self, inputs: dict[str, Tensor], rollout: Rollout) -> ThoughtTree:
        """The batch's rows with a rollout's thoughts."""
        num_generations, length = rollout.thoughts_BKGL.shape[2:]
        branching = self.args.branching(inputs["input_ids"].shape[1], length, num_generations, rollout.markovian)
        return ThoughtTree(inputs["documents"], rollout.forks_BK, branching, rollout.lengths_BKG)

    def _may_think(self, row: dict[str, Any]) -> bool:
        """Whether a row has a place to think at."""
        inputs = self.data_collator([row])
        return bool(may_think(self.args, unwrapped(self.model), inputs, self._labels(inputs), self.markers).any())

    def _forks(self, model, inputs: dict[str, Tensor], labels_BT: Tensor, generator: torch.Generator, how: str) -> Tensor:
        args, tokens_BT, documents_BT, entropy_BT = self.args, inputs["input_ids"], inputs["documents"], None
        if not args.thinks or (self.model.training and self.state.global_step < args.think_start):
            return tokens_BT.new_zeros(len(tokens_BT), 0)
        eligible_BT = may_think(args, unwrapped(self.model), inputs, labels_BT, self.markers)
        if how == "entropy":
            entropy_BT = self._entropy(model, tokens_BT, documents_BT)
        forks_BK = choose_forks(eligible_BT, args.num_forks, how, generator, entropy_BT)
        if args.memory == "persistent":  # a pass for each, and none for those that no row has
            most = self._largest_of_ranks((forks_BK >= 0).sum(1))
            forks_BK = nn.functional.pad(forks_BK, (0, max(most - forks_BK.shape[1], 0)), value=-1)[:, :most]
        elif how in ("markers", "all"):  # rows may have far fewer
            forks_BK = forks_BK[:, : room_for(int((forks_BK >= 0).sum(1).max()))]
        return forks_BK

    def _score(self, model, tree: ThoughtTree, tokens_BT: Tensor, labels_BT: Tensor, rollout: Rollout) -> TreeScores:
        args, tokens_BS = self.args, tree.tokens(tokens_BT, rollout.thoughts_BKGL)
        run = functools.partial(self.engine.run, model, tree, tokens_BS, thoughts=thought_inputs(tree, rollout.soft_BKGLX, args.thoughts))
        return score_tree(run, tree, labels_BT, rollout, self.vocabulary, **args.scoring(self.model.training))

    # ---------------------------------------------------------------- evaluation

    @torch.no_grad()
    def _evaluate_batch(self, model, inputs: dict[str, Tensor], labels_BT: Tensor) -> Tensor:
        """Adds this batch to the held-out gains; returns the loss of the text without thoughts.

        Half of the branches hold the model's thoughts and half random ones of the same lengths, in one tree; where thoughts stay in the text, each kind has
        a tree of its own. The places and draws depend on the batch alone, so that evaluations of different models can be compared text by text.
        """
        args, turn, tokens_BT, documents_BT = self.args, self._next_micro_step(), inputs["input_ids"], inputs["documents"]
        persistent = args.memory == "persistent"
        if persistent or not args.thinks:  # else the text is the tree's trunk, which sees no thoughts
            nothing = Rollout.empty(tokens_BT.new_zeros(len(tokens_BT), 0), args.branching(tokens_BT.shape[1]))
            text = self._score(model, self._tree(inputs, nothing), tokens_BT, labels_BT, nothing)
            if not args.thinks:
                return text.trunk_loss
        generator = self._generator(1, turn)
        forks_BK = self._forks(model, inputs, labels_BT, generator, "random" if args.fork_positions == "entropy" else args.fork_positions)
        rollout = self._think(model, inputs, self._sample(model, inputs, forks_BK, generator, dataclasses.replace(args.sampling(), epsilon=0.0)))
        control = control_thoughts(rollout, self.vocabulary, generator)
        summed, lengths = [], []
        for thoughts in (rollout, control) if persistent else (rollout.beside(control),):
            tree = self._tree(inputs, thoughts)
            scores = self._score(model, tree, tokens_BT, tree.evaluated_labels(labels_BT), thoughts)
            if args.stop == "learned":
                scores = scores.under_gates_of_first(args.num_generations)
            speech = speak(scores, thoughts, args.stop, 0.0, args.blind)
            summed.append(masked_sum(speech.logps_BKGH, scores.mask_BKH[:, :, None]))
            lengths.append(speech.lengths_BKG)
        text = text if persistent else scores
        mask_BKH = scores.mask_BKH
        without_BKH = before(text.trunk_logps_BT, tree.judged(labels_BT)[0])
        think_BKG, random_BKG = torch.cat(summed, 2).chunk(2, dim=2)
        logps = {"no_think": masked_sum(without_BKH, mask_BKH), "think": think_BKG.mean(-1), "random_thought": random_BKG.mean(-1)}
        document_BK = documents_BT.gather(1, forks_BK.clamp(min=0))
        collected = GainByDocument.collect(document_BK, mask_BKH.sum(-1), logps, lengths[0][:, :, : args.num_generations].mean(-1))
        for row in self.accelerator.gather_for_metrics(collected, use_gather_object=True):
            self._gains.rows += row
        return text.trunk_loss

    def predict(self, *args, **kwargs):
        if self.plain:
            return super().predict(*args, **kwargs)
        raise ValueError(NO_LOGITS)

    # ---------------------------------------------------------------- around it

    def _labels(self, inputs: dict[str, Tensor]) -> Tensor:
        """Labels, without those that are no real token: the guard, should a text contain it."""
        labels_BT = inputs["labels"]
        return torch.where((inputs["documents"] >= 0) & (labels_BT < self.vocabulary.num_real), labels_BT, -100)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if not self.plain:
            self._signature_columns += [column for column in task_columns(self.args) if column not in self._signature_columns]

    def _next_micro_step(self) -> int:
        """How many forwards this optimizer step, or this evaluation, has had before this one."""
        step = self.state.global_step if self.model.training else -1
        self._micro_step = (step, self._micro_step[1] + 1 if self._micro_step[0] == step else 0)
        return self._micro_step[1]

    def _generator(self, kind: int, turn: int, step: int = 0) -> torch.Generator:
        """Randomness from the seed and the batch's number alone: a resumed run draws what the interrupted one would have drawn, and several processes
        what one would have drawn that accumulates as many batches."""
        batch = turn * self.accelerator.num_processes + self.accelerator.process_index
        seed = np.random.SeedSequence([self.args.seed, kind, step, batch]).generate_state(1, np.uint64)[0]
        return torch.Generator(self.accelerator.device).manual_seed(int(seed) % 2**63)

    def _entropy(self, model, tokens_BT: Tensor, documents_BT: Tensor) -> Tensor:
        tree = ThoughtTree(documents_BT, tokens_BT.new_zeros(len(tokens_BT), 0), self.args.branching(tokens_BT.shape[1]))
        nodes_M = torch.arange(tokens_BT.numel(), device=tokens_BT.device)
        speaks = self.args.policies == "split" and not self.args.blind  # who predicts the text
        with evaluating(model):
            (out,) = self.engine.run(model, tree, tokens_BT, [Pass(HeadInputs(nodes_M, entropy=True), speaks=speaks)])
        assert out.entropy_M is not None
        return out.entropy_M.view_as(tokens_BT)

    def _reference_model(self) -> PreTrainedModel | None:
        """A frozen copy of the model as it starts; with an adapter, the model without it serves."""
        if is_peft_model(self.model):
            return None
        if is_partitioned(self.model):
            raise ValueError("beta > 0 keeps a copy of the model, which ZeRO-3 cannot make: take ZeRO-2, or an adapter (peft_config), whose base is its copy.")
        return prepare_frozen(copy.deepcopy(self.model), self.accelerator)

    def _reference_actions(self, tree: ThoughtTree, tokens_BT: Tensor, labels_BT: Tensor, rollout: Rollout) -> Tensor:
        """Log-probabilities of the rollout's actions under the reference model."""
        reference = self.model if self.reference is None else self.reference
        with evaluating(reference), self.model.disable_adapter() if self.reference is None else contextlib.nullcontext():
            scores = self._score(reference, tree, tokens_BT, labels_BT, rollout)
        return actions(scores, rollout, self.args)[0].detach()

    def get_batch_samples(self, *args, **kwargs):
        """Counts the forks of each of a step's batches too (in the data's text, whatever `rollout: free` makes of it), over all processes, as the base class
        counts tokens: a step's loss is a mean over all, however its rows are divided. `Trainer` divides it by the batches where it counts no tokens."""
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        config, self._weights = self.args, None
        if config.thinks and len(batches) > 1 and self.state.global_step >= config.think_start:
            counts = [count_forks(config, unwrapped(self.model), inputs, self._labels(inputs), self.markers).sum() for inputs in batches]
            counts_A = self.accelerator.reduce(torch.stack(counts), reduction="sum")
            shares_A = torch.where(counts_A > 0, counts_A / counts_A.sum(), 1 / len(batches))  # where there is none there is nothing to weigh
            self._weights = iter(shares_A * (len(batches) if num_items_in_batch is None else 1))
        return batches, num_items_in_batch

    def _ranks_to_average(self, num_items_in_batch) -> int:
        return self.accelerator.num_processes if self.args.average_tokens_across_devices and num_items_in_batch is not None else 1

    def _largest_of_ranks(self, counts: Tensor) -> int:
        """The largest of all ranks' counts, 0 of none, for what takes a pass each: where layers are gathered in every pass, all have to make as many."""
        return int(self.accelerator.gather(nn.functional.pad(counts.flatten(), (1, 0)).max()[None]).max())

    def _stateful(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"step_time": self.spent, "guard": self.guard}
        if not self.plain:
            parts |= {"curriculum": self.curriculum, "coverage": self.explore.coverage, "value": self.value, "revival": self.revival}
        return {name: part for name, part in parts.items() if part is not None}

    def create_scheduler(self, num_training_steps: int, *args, **kwargs):
        if self.args.thinks:
            check_run(self.args, num_training_steps)
        with checked_scheduler(self.args):
            return super().create_scheduler(num_training_steps, *args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        """Thinking rows, also the speaker's, and its other parameters in groups of their own where their learning rate differs."""
        optimizer = super().create_optimizer(*args, **kwargs)
        for belongs, rate in ((is_speaker, self.args.speaker_learning_rate), (is_thinking_row, self.args.think_learning_rate)):
            if rate is not None:
                set_learning_rate(optimizer, rate, [weight for name, weight in self.model.named_parameters() if belongs(name)])
        return optimizer

    def _get_train_sampler(self, dataset=None):
        """With a curriculum rows come level by level. With `num_iterations` every batch of an optimizer step comes again, in the same order, as often."""
        if self.plain or (self.args.num_iterations == 1 and self.curriculum is None):
            return super()._get_train_sampler(dataset)
        # `auto_find_batch_size` lowers the first, which with `split_batches` is that of all processes.
        ranks = 1 if self.accelerator.split_batches else self.accelerator.num_processes
        batch = self._train_batch_size * ranks * self.args.gradient_accumulation_steps
        return order_of_rows(self.train_dataset if dataset is None else dataset, self.args, batch, self.curriculum)
