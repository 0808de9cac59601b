"""ThinkTokTrainer: continued pretraining of a causal LM that thinks in tokens of its own."""

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer

from ._compat import RepeatSampler, create_model_from_path, disable_dropout_in_model
from .architectures import check_supported
from .callbacks import NonFiniteGuard, print_thoughts, sample_thoughts_to_print
from .config import ThinkTokConfig
from .data import TreeCollator, check_dataset
from .engine import choose_engine, evaluating, longest_row
from .evaluation import GainByDocument
from .forks import choose_forks, eligible_forks, ends_of
from .head import HeadInputs, attach_head
from .objective import actions, speak, thinking_loss
from .peft import add_thinking_rows
from .rewards import RewardFunction, masked_mean, resolve_rewards
from .rollout import Rollout, random_thoughts, sample_thoughts
from .scores import TreeScores, head_inputs, read_scores
from .tokens import SAMPLE_TEXT, ThinkingVocabulary, add_thinking_tokens, check_vocabulary
from .tree import ThoughtTree


class ThinkTokTrainer(SFTTrainer):
    r"""
    Trains a pretrained causal LM to think in extra vocabulary ids where that helps it predict real text.

    Real tokens get cross-entropy. Thoughts get no supervision: G thoughts sampled at the same place of the same text are rewarded by what they do to the
    real tokens that follow, compared with each other. The checkpoint is an ordinary `AutoModelForCausalLM`.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Name, folder or instance of a decoder-only LM. It gets thinking tokens unless it has them.
        args ([`ThinkTokConfig`], *optional*):
            Options; the defaults where not given.
        train_dataset, eval_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Text, in any form that [`~trl.SFTTrainer`] takes.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer; the model's own where not given.
        reward_funcs (names, functions or a list of both, *optional*):
            In place of `args.reward_funcs`; see `hf_thinktok.rewards`.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Trains an adapter and the thinking rows.
        kwargs:
            Whatever else [`~trl.SFTTrainer`] takes.

    Raises:
        ValueError: one sentence on what does not fit, before a model is loaded where possible.
    """

    _tag_names = ["trl", "thinktok"]
    _name = "ThinkTok"
    vocabulary: ThinkingVocabulary  # where num_think_tokens is not 0

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: ThinkTokConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_funcs: RewardFunction | str | list[RewardFunction | str] | None = None,
        peft_config: Any = None,
        formatting_func: Callable[[dict], str] | None = None,
        **kwargs: Any,
    ):
        args = ThinkTokConfig("thinktok-output") if args is None else args
        _check_arguments(args, train_dataset, eval_dataset, formatting_func, kwargs)
        self.rewards = resolve_rewards(args.reward_funcs if reward_funcs is None else reward_funcs)
        self.reward_weights = args.reward_weights or [1.0] * len(self.rewards)
        if len(self.reward_weights) != len(self.rewards):
            raise ValueError(f"reward_weights has {len(self.reward_weights)} entries for {len(self.rewards)} rewards: give one weight for each reward.")
        if reward_funcs is not None and (args.objective == "marginal" or args.advantage == "token"):
            raise ValueError("reward_funcs has no effect here; it needs objective=expected with advantage=group or loo (the others use log_prob).")
        model, tokenizer = _load(model, processing_class, args)

        self.plain = args.num_think_tokens == 0
        if not self.plain:
            sample_text = _sample_text(train_dataset, args.dataset_text_field)
            self.vocabulary = add_thinking_tokens(model, tokenizer, args.num_think_tokens, sample_text, seed=args.seed)
            model.config.thinktok |= {name: getattr(args, name) for name in ("max_think_length", "stop", "memory", "blind", "lookahead")}
            peft_config = add_thinking_rows(peft_config, model, self.vocabulary)
        if args.disable_dropout:
            disable_dropout_in_model(model)
        loading, args.model_init_kwargs = args.model_init_kwargs, None  # used by now; SFTTrainer would warn
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
        args.model_init_kwargs = loading
        self.guard = NonFiniteGuard(args.max_nonfinite_steps)
        if not self.plain:
            self._prepare_to_think()

    def _prepare_to_think(self) -> None:
        args, base = self.args, self.model.get_base_model() if is_peft_model(self.model) else self.model
        attach_head(base, self.vocabulary)
        self.data_collator = TreeCollator(pad_token_id=self._tokenizer.pad_token_id)
        self.markers = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in args.fork_markers or ()]
        longest = args.max_length or 1024
        branching = args.branching(min(longest, 1024))
        if branching.persistent and longest + args.num_forks * args.max_think_length > longest_row(base):
            raise ValueError(
                f"With memory=persistent a row of max_length={longest} and its thoughts exceeds the model's "
                f"{longest_row(base)} positions: lower max_length or num_forks."
            )
        # A thought near the end of the model's context would run out of positions.
        room, ahead = longest_row(base) - args.max_think_length, longest if args.lookahead is None else args.lookahead
        self._last_fork = longest if longest <= room else room - ahead
        if self._last_fork < 0:
            raise ValueError(
                f"max_length={longest} and a thought with its lookahead exceed the model's {longest_row(base)} positions: lower max_length or lookahead."
            )
        self.engine = choose_engine(base, self.vocabulary, branching, longest, max(args.num_forks, 1), args.engine)
        self.reference = self._reference_model() if args.beta > 0 else None
        self.add_callback(self.guard)
        self._rollouts: list[Rollout] = []  # of the present batches, for num_iterations > 1
        self._old_logps: list[Tensor | None] = []
        self._micro_step = (-1, -1)  # optimizer step, and forward within it
        self._gains, self._prefix = GainByDocument(), "eval"
        self._printable: list[dict] = []
        self._clock, self._nodes_since, self._tokens_since = time.perf_counter(), 0, 0

    # ---------------------------------------------------------------- the algorithm

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.plain:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs:
            raise ValueError("ThinkTokTrainer makes no logits: leave compute_metrics and preprocess_logits_for_metrics out.")
        tokens_BT, documents_BT, labels_BT = inputs["input_ids"], inputs["documents"], self._labels(inputs)
        if not self.model.training:
            return self._evaluate_batch(model, tokens_BT, documents_BT, labels_BT)
        args, turn = self.args, self._next_micro_step()

        rollout = self._rollout(model, tokens_BT, documents_BT, labels_BT, turn)
        tree = ThoughtTree(documents_BT, rollout.forks_BK, args.branching(tokens_BT.shape[1]), rollout.lengths_BKG)
        scores = self._score(model, tree, tokens_BT, labels_BT, rollout)
        loss = _text_loss(scores, num_items_in_batch, self._ranks_to_average(num_items_in_batch))
        metrics: dict[str, Tensor] = {}
        if tree.num_forks:
            reference = self._reference_scores(tree, tokens_BT, labels_BT, rollout)
            thinking, metrics = thinking_loss(
                scores, rollout, tree.judged_labels(labels_BT), args, self.rewards, self.reward_weights, self._old_logps[turn], reference, self._global_mean
            )
            self._old_logps[turn] = actions(scores, rollout, args)[0].detach() if self._old_logps[turn] is None else self._old_logps[turn]
            # `Trainer` leaves accumulation to the loss where it counts the batch's tokens, and divides it where it does not.
            loss = loss + thinking / (1 if num_items_in_batch is None else self.current_gradient_accumulation_steps)
        self._record(loss, metrics, tree, tokens_BT, labels_BT, rollout, scores)
        return loss

    def _rollout(self, model, tokens_BT: Tensor, documents_BT: Tensor, labels_BT: Tensor, turn: int) -> Rollout:
        """Thoughts for this batch: new ones, or with `num_iterations` those of the iteration before."""
        if self.state.global_step % self.args.num_iterations == 0 or turn >= len(self._rollouts):
            del self._rollouts[turn:], self._old_logps[turn:]
            generator = self._generator(0, self.state.global_step, turn)
            forks_BK = self._forks(model, tokens_BT, documents_BT, labels_BT, generator, self.args.fork_positions)
            self._rollouts.append(self._sample(model, tokens_BT, documents_BT, forks_BK, generator))
            self._old_logps.append(None)
        return self._rollouts[turn]

    def _sample(self, model, tokens_BT: Tensor, documents_BT: Tensor, forks_BK: Tensor, generator: torch.Generator) -> Rollout:
        branching = self.args.branching(tokens_BT.shape[1])
        with self.accelerator.autocast():  # around all passes, so that weights are cast once and not at every token
            return sample_thoughts(self.engine, model, tokens_BT, documents_BT, forks_BK, branching, self.args.sampling(), self.vocabulary, generator)

    def _forks(self, model, tokens_BT: Tensor, documents_BT: Tensor, labels_BT: Tensor, generator: torch.Generator, how: str) -> Tensor:
        args, entropy_BT = self.args, None
        eligible_BT = eligible_forks(labels_BT, documents_BT)
        eligible_BT[:, max(self._last_fork + 1, 0) :] = False
        if how == "markers":
            eligible_BT &= ends_of(self.markers, tokens_BT)
        elif how == "entropy":
            entropy_BT = self._entropy(model, tokens_BT, documents_BT)
        return choose_forks(eligible_BT, args.num_forks, how, generator, entropy_BT)

    def _score(self, model, tree: ThoughtTree, tokens_BT: Tensor, labels_BT: Tensor, rollout: Rollout) -> TreeScores:
        head = head_inputs(tree, labels_BT, every_prefix=self.args.stop == "learned" or self.args.advantage == "token")
        out = self.engine(model, tree, tree.tokens(tokens_BT, rollout.thoughts_BKGL), head)
        return read_scores(out, tree, head, labels_BT, rollout, self.vocabulary, self.args.temperature)

    # ---------------------------------------------------------------- evaluation

    @torch.no_grad()
    def _evaluate_batch(self, model, tokens_BT: Tensor, documents_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Adds this batch to the held-out gains; returns the loss of the text without thoughts.

        Half of the branches hold sampled thoughts and half uniformly random ones of the same lengths, in one tree. The places and draws depend on the
        batch alone, so that evaluations of different models can be compared text by text.
        """
        args, turn = self.args, self._next_micro_step()
        plain_tree = ThoughtTree(documents_BT, tokens_BT.new_zeros(len(tokens_BT), 0), args.branching(tokens_BT.shape[1]))
        plain = self._score(model, plain_tree, tokens_BT, labels_BT, Rollout.empty(plain_tree.forks_BK, plain_tree.branching))
        loss = -plain.trunk_logps_BT.sum() / plain.trunk_mask_BT.sum().clamp(min=1)
        if not args.thinks:
            return loss
        generator = self._generator(1, turn)
        how = "random" if args.fork_positions == "entropy" else args.fork_positions
        forks_BK = self._forks(model, tokens_BT, documents_BT, labels_BT, generator, how)
        rollout = self._sample(model, tokens_BT, documents_BT, forks_BK, generator)
        branching = args.branching(tokens_BT.shape[1])
        control = random_thoughts(forks_BK, branching, self.vocabulary, generator)
        both = Rollout(forks_BK, *(torch.cat(pair, 2) for pair in ((rollout.thoughts_BKGL, control), (rollout.lengths_BKG,) * 2, (rollout.logps_BKGL,) * 2)))
        tree = ThoughtTree(documents_BT, forks_BK, dataclasses.replace(branching, num_generations=2 * args.num_generations), both.lengths_BKG)
        scores = self._score(model, tree, tokens_BT, labels_BT, both)
        speech = speak(scores, both, args.stop, 0.0, args.blind)

        places_BKH, mask_BKH = tree.judged(labels_BT)
        without_BKH = plain.trunk_logps_BT.gather(1, (places_BKH - 1).flatten(1)).view_as(places_BKH)
        summed_BKG = torch.where(mask_BKH[:, :, None], speech.logps_BKGH, 0.0).sum(-1)
        think_BKG, random_BKG = summed_BKG.chunk(2, dim=2)
        logps = {"no_think": torch.where(mask_BKH, without_BKH, 0.0).sum(-1), "think": think_BKG.mean(-1), "random_thought": random_BKG.mean(-1)}
        document_BK = documents_BT.gather(1, forks_BK.clamp(min=0))
        collected = GainByDocument.collect(document_BK, mask_BKH.sum(-1), logps, speech.lengths_BKG[:, :, : args.num_generations].mean(-1))
        for row in self.accelerator.gather_for_metrics(collected, use_gather_object=True):
            self._gains.rows += row
        return loss

    # ---------------------------------------------------------------- around it

    def _labels(self, inputs: dict[str, Tensor]) -> Tensor:
        """Labels, without those that are no real token: the guard, should a text contain it."""
        labels_BT = inputs["labels"]
        return torch.where((inputs["documents"] >= 0) & (labels_BT < self.vocabulary.num_real), labels_BT, -100)

    def _next_micro_step(self) -> int:
        """How many forwards this optimizer step, or this evaluation, has had before this one."""
        step = self.state.global_step if self.model.training else -1
        self._micro_step = (step, self._micro_step[1] + 1 if self._micro_step[0] == step else 0)
        return self._micro_step[1]

    def _generator(self, *key: int) -> torch.Generator:
        """Randomness from the seed, the rank and the step alone: a resumed run draws what the interrupted one would have drawn."""
        seed = np.random.SeedSequence([self.args.seed, self.accelerator.process_index, *key]).generate_state(1, np.uint64)[0]
        return torch.Generator(self.accelerator.device).manual_seed(int(seed) % 2**63)

    def _entropy(self, model, tokens_BT: Tensor, documents_BT: Tensor) -> Tensor:
        tree = ThoughtTree(documents_BT, tokens_BT.new_zeros(len(tokens_BT), 0), self.args.branching(tokens_BT.shape[1]))
        nodes_M = torch.arange(tokens_BT.numel(), device=tokens_BT.device)
        with evaluating(model):
            out = self.engine(model, tree, tokens_BT, HeadInputs(nodes_M, torch.full_like(nodes_M, -100), entropy=True))
        assert out.entropy_M is not None
        return out.entropy_M.view_as(tokens_BT)

    def _reference_model(self) -> PreTrainedModel | None:
        """A frozen copy of the model as it starts; with an adapter, the model without it serves."""
        if is_peft_model(self.model):
            return None
        reference = copy.deepcopy(self.model)
        attach_head(reference, self.vocabulary)  # a copied forward would still be bound to the model it was copied from
        return self.accelerator.prepare_model(reference.requires_grad_(False), evaluation_mode=True)

    def _reference_scores(self, tree: ThoughtTree, tokens_BT: Tensor, labels_BT: Tensor, rollout: Rollout) -> TreeScores | None:
        if self.args.beta == 0:
            return None
        if self.reference is not None:
            with evaluating(self.reference):
                return self._score(self.reference, tree, tokens_BT, labels_BT, rollout)
        with evaluating(self.model), self.model.disable_adapter():
            return self._score(self.model, tree, tokens_BT, labels_BT, rollout)

    def _ranks_to_average(self, num_items_in_batch) -> int:
        return self.accelerator.num_processes if self.args.average_tokens_across_devices and num_items_in_batch is not None else 1

    def _global_mean(self, value: Tensor) -> Tensor:
        return self.accelerator.gather(value.detach()[None]).mean()

    def _record(
        self, loss: Tensor, metrics: dict[str, Tensor], tree: ThoughtTree, tokens_BT: Tensor, labels_BT: Tensor, rollout: Rollout, scores: TreeScores
    ) -> None:
        """Averages the metrics over ranks and flags a step that is not finite: one synchronisation for all."""
        real_tokens = (tree.documents_BT >= 0).sum()
        values = torch.stack([loss.detach().float(), real_tokens.float(), *(value.detach().float() for value in metrics.values())])
        gathered = self.accelerator.gather(values[None])
        if not torch.isfinite(gathered).all():
            self.guard.flag()
        _, tokens, *means = gathered.mean(0).tolist()
        for name, value in zip(metrics, means, strict=True):
            if math.isfinite(value):  # one skipped step must not blank the average of a log
                self._metrics["train"][name].append(value)
        ranks = len(gathered)
        self._total_train_tokens += int(tokens * ranks)
        self._tokens_since += tokens * ranks
        self._nodes_since += tree.valid_BS.numel() * ranks
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        if self.args.log_completions and tree.num_forks:
            gains_BKG = masked_mean(scores.logps_BKGH - scores.baseline_logps_BKH[:, :, None], scores.mask_BKH[:, :, None]).detach() / np.log(2)
            self._printable = sample_thoughts_to_print(
                tokens_BT, rollout, tree.judged_labels(labels_BT), gains_BKG, self.vocabulary.first_id, self.args.num_completions_to_print
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not self.plain and self.model.training and self._tokens_since:
            now = time.perf_counter()
            logs["tokens_per_second"] = self._tokens_since / (now - self._clock)
            logs["nodes_per_second"] = self._nodes_since / (now - self._clock)
            logs["skipped_steps"] = self.guard.total
            self._clock, self._nodes_since, self._tokens_since = now, 0, 0
            if self._printable and self.is_world_process_zero():
                print_thoughts(self._tokenizer, self._printable, self.state.global_step)
        if not self.plain and not self.model.training and self._gains.rows:
            logs.update({f"{self._prefix}_{name}": value for name, value in self._gains.summary().items()})
            self._gains, self._clock = GainByDocument(), time.perf_counter()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Held-out text: `eval_loss` without thoughts, bits per token without thinking, with it and with a random thought, and the gain with its
        standard error over documents."""
        if not self.plain:
            self._gains, self._micro_step, self._prefix = GainByDocument(), (-1, -1), metric_key_prefix
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        folder = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        if folder and not self.plain and not is_peft_model(self.model):
            found = ThinkingVocabulary.from_config(AutoConfig.from_pretrained(folder))
            if found != self.vocabulary:
                raise ValueError(f"The checkpoint {folder} has the thinking vocabulary {found} and this run {self.vocabulary}: set num_think_tokens as it was.")
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _get_train_sampler(self, dataset=None):
        """With `num_iterations` every batch of an optimizer step comes again, in the same order, as often."""
        if self.plain or self.args.num_iterations == 1:
            return super()._get_train_sampler(dataset)
        dataset = self.train_dataset if dataset is None else dataset
        batch = self.args.train_batch_size * self.accelerator.num_processes * self.args.gradient_accumulation_steps
        return RepeatSampler(dataset, mini_repeat_count=1, batch_size=batch, repeat_count=self.args.num_iterations, seed=self.args.seed)


def _text_loss(scores: TreeScores, num_items_in_batch: Tensor | int | None, ranks: int) -> Tensor:
    """Cross-entropy of the text itself over real rows; the normaliser is TRL's."""
    count = scores.trunk_mask_BT.sum() if num_items_in_batch is None else num_items_in_batch
    return -scores.trunk_logps_BT.sum() / torch.as_tensor(count).clamp(min=1) * ranks


def _check_arguments(args, train_dataset, eval_dataset, formatting_func, kwargs: dict[str, Any]) -> None:
    """What can be refused before a model is loaded."""
    if not isinstance(args, ThinkTokConfig):
        raise TypeError(f"args is a {type(args).__name__}; ThinkTokTrainer needs a ThinkTokConfig.")
    if train_dataset is None:
        raise ValueError("train_dataset is missing: pass a datasets.Dataset or IterableDataset of text.")
    for name, dataset in {"train": train_dataset, **(eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset})}.items():
        if dataset is not None:
            check_dataset(dataset, name, args, formatting_func is not None)
    if args.thinks and args.num_iterations > 1 and isinstance(train_dataset, IterableDataset):
        raise ValueError("num_iterations > 1 needs batches that can come again: use a map-style data set, or num_iterations=1.")
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        if args.num_think_tokens != 0 and kwargs.get(name) is not None:
            raise ValueError(f"{name} is not supported with thinking: the logits are never made. Leave it out; evaluate() reports likelihoods and gains.")
    if args.num_think_tokens != 0 and kwargs.get("data_collator") is not None:
        raise ValueError("data_collator is not supported with thinking: the tree needs each row's documents. Leave it out.")
    if torch.cuda.device_count() > 1 and args.n_gpu > 1:
        raise ValueError(
            "Several GPUs in one process would use nn.DataParallel, which is not supported: start with `accelerate launch`, or set "
            "CUDA_VISIBLE_DEVICES to one GPU."
        )
    if args.parallelism_config is not None and (args.parallelism_config.cp_enabled or args.parallelism_config.sp_enabled):
        raise ValueError("Context and sequence parallelism cut rows apart, and a tree of thoughts needs them whole: use data parallelism, ZeRO or FSDP2.")


def _load(model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, args: ThinkTokConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from what was given, refused before weights are loaded where they do not fit."""
    options = dict(args.model_init_kwargs or {})
    options.setdefault("trust_remote_code", args.trust_remote_code)
    where = {name: options[name] for name in ("revision", "trust_remote_code", "subfolder") if name in options}
    try:
        config = AutoConfig.from_pretrained(model, **where) if isinstance(model, str) else model.config
    except OSError as error:
        raise ValueError(f"There is no model at {model!r}: give a folder with a config.json, or a name on the Hub that this machine can reach.") from error
    check_supported(config)
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model if isinstance(model, str) else config._name_or_path, **where)
    if args.num_think_tokens != 0:
        rows = None if isinstance(model, str) else model.get_input_embeddings().weight.shape[0]
        check_vocabulary(config, tokenizer, args.num_think_tokens, rows)
    attention = options.get("attn_implementation", "") if isinstance(model, str) else model.config._attn_implementation
    if args.num_think_tokens != 0 and "flash" in (attention or ""):
        raise ValueError(f"attn_implementation={attention} cannot take a tree's mask: use sdpa or eager.")
    if isinstance(model, str):
        model = create_model_from_path(model, **options)
    return model, tokenizer


def _sample_text(dataset: Dataset | IterableDataset, column: str, count: int = 64):
    """Rows of the training text to calibrate thinking rows on, or the built-in sample where rows are no plain text."""
    rows = list(dataset.take(count))
    return [row[column][:4096] for row in rows] if isinstance(rows[0].get(column), str) else SAMPLE_TEXT
