"""What a run measures of itself: averages over forks and processes, its speed, samples of its thoughts, held-out gains, and steps that are not finite."""

import copy
import dataclasses
import math
import time
from collections import defaultdict

import torch
from accelerate import DistributedType
from torch import Tensor

from .callbacks import NonFiniteGuard, Spent, print_thoughts, sample_thoughts_to_print
from .checkpoints import CheckpointingTrainer
from .config_checks import OF_THOUGHTS
from .curriculum import Curriculum
from .data import check_dataset, columns_of, columns_of_text, formatted, is_prepared, named_sets
from .errors import RunError
from .evaluation import GainByDocument
from .objective import gained, speak
from .revival import Revival
from .rollout import Rollout
from .scores import TreeScores
from .tree import ThoughtTree


class MeasuringTrainer(CheckpointingTrainer):
    """A trainer that says how its run goes."""

    curriculum: Curriculum | None = None
    revival: Revival | None = None
    _micro_step = (-1, -1)  # optimizer step, and forward within it

    def _begin_to_measure(self) -> None:
        self.spent, self.guard = Spent(), NonFiniteGuard(self.args.max_nonfinite_steps)
        self.add_callback(self.spent)
        self.add_callback(self.guard)
        self._start_clock()
        # Since the last log: each metric times its forks, and these.
        self._sums: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        self._gains = GainByDocument()
        self._recorded: tuple[list[str], Tensor, Tensor | None] | None = None  # of the micro-step under way
        self._printable: tuple[Tensor, Rollout, Tensor, Tensor, Tensor] | None = None  # of the latest micro-step

    def _start_clock(self) -> None:
        self._clock, self._nodes_since, self._tokens_since = time.perf_counter(), 0, 0

    def _global_mean(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value.detach(), reduction="mean")

    def _record(self, loss: Tensor, metrics: dict[str, Tensor], tree: ThoughtTree, inputs: dict[str, Tensor], rollout: Rollout, scores: TreeScores) -> None:
        """What the forward pass found, of all ranks. It is looked at when the backward pass is under way (`_look`): a host that waited here would have nothing
        for the device to do next."""
        labels_BT, right_BT = scores.trunk_mask_BT, scores.trunk_correct_BT > 0.5
        counted = tree.documents_BT >= 0, tree.valid_BS, scores.valid_BK, labels_BT, labels_BT & right_BT
        counts = torch.stack([there.sum() for there in counted]).float()
        values = torch.stack([loss.detach().float(), *(value.detach().float() for value in metrics.values())])
        self._recorded = list(metrics), self.accelerator.gather(torch.cat([counts, values])[None]), inputs.get("level")
        if self.args.log_completions and tree.num_forks:
            kept = dataclasses.replace(rollout, soft_BKGLX=None)
            with torch.no_grad():
                speech = speak(scores, rollout, self.args.stop, 0.0, self.args.blind)
                self._printable = inputs["input_ids"], kept, speech.lengths_BKG, scores.labels_BKH, gained(scores, speech)

    def training_step(self, *args, **kwargs) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self._recorded is not None:
            self._look(*self._recorded)
            self._recorded = None
        return loss

    def _look(self, names: list[str], recorded: Tensor, level_B: Tensor | None) -> None:
        """Averages the metrics over the forks of all ranks, and flags a step that is not finite: one synchronisation for all."""
        gathered = recorded.cpu()
        if not torch.isfinite(gathered).all():
            self.guard.flag()
        tokens, nodes, num_forks, labels, right = gathered[:, :5].sum(0).tolist()
        means = (gathered[:, 6:] * gathered[:, 2:3]).sum(0) / max(num_forks, 1)
        found = dict(zip(names, means.tolist(), strict=True)) if num_forks else {}  # a batch without forks has nothing to say of thoughts
        if self.curriculum is not None and not num_forks and labels:  # an easy level may have no place to think at
            found["accuracy"] = right / labels
        for name, value in found.items():
            if math.isfinite(value):  # one skipped step must not blank the average of a log
                self._sums[name] += torch.tensor([value, 1.0], dtype=torch.float64) * (num_forks or labels)
        if self.curriculum is not None and math.isfinite(found.get("accuracy", math.nan)):
            assert level_B is not None
            self.curriculum.observe(self.state.global_step, int(level_B[0]), found["accuracy"], 1 / self.current_gradient_accumulation_steps)
            self._metrics["train"]["level"] = [self.curriculum.reached(self.state.global_step)[-1]]
        self.spent.tokens += int(tokens)
        self._tokens_since += tokens
        self._nodes_since += nodes
        self._metrics["train"]["num_tokens"] = [self.spent.tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            self._metrics["train"] |= {name: [(total / weight).item()] for name, (total, weight) in self._sums.items()}
            self._sums.clear()
        if "loss" in logs:
            logs["skipped_steps"] = self.guard.total
        if not self.plain:
            logs.pop("total_flos", None)  # of the text alone; `plan.step_flops` counts a step's
        if not self.plain and self.model.training and self._tokens_since:
            now = time.perf_counter()
            logs["tokens_per_second"] = self._tokens_since / (now - self._clock)
            logs["nodes_per_second"] = self._nodes_since / (now - self._clock)
            if self.revival is not None:
                logs["revived_tokens"] = self.revival.revived
            self._start_clock()
            if self._printable and self.is_world_process_zero():
                samples = sample_thoughts_to_print(*self._printable, self.args.num_completions_to_print)
                print_thoughts(self._tokenizer, samples, self.vocabulary.first_id, self.state.global_step)
        if "train_runtime" in logs:
            seconds, done = max(self.spent.seconds, 1e-9), self.state.global_step
            planned = logs["train_samples_per_second"] * logs["train_runtime"]  # rows of all steps, as the base class counts them
            rows = planned * done / max(self.state.max_steps, 1)
            logs |= {"train_step_seconds": self.spent.seconds, "train_steps_per_second": done / seconds, "train_samples_per_second": rows / seconds}
        super().log(logs, start_time)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """TRL prepares whatever `evaluate` is given, also what is prepared, and would pack once more what is packed."""
        columns = columns_of(dataset)
        if {"seq_lengths", "labels"} <= set(columns) or is_prepared(dataset, args, packing):
            return dataset
        if formatting_func is not None and "input_ids" not in columns:
            dataset = formatted(dataset, formatting_func, args)
        elif (text := args.dataset_text_field) in columns and text not in columns_of_text(columns, text):
            dataset = dataset.remove_columns(text)  # TRL does not read it, and would end this text and not the other
        if packing and dataset_name != "train":  # the begin of each document, as in rows that are not packed: its pieces would count as documents
            args = copy.copy(args)
            args.packing_strategy = "bfd"
        return super()._prepare_dataset(dataset, processing_class, args, packing, None, dataset_name)

    def evaluate(self, eval_dataset=None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Held-out text: `eval_loss` without thoughts, bits per token without thinking, with it and with a random thought, and the gain with its
        standard error over documents."""
        for name, dataset in named_sets(None, eval_dataset).items():
            if not isinstance(dataset, str):  # the name of one that was looked at
                makes_text = self._formatting_func is not None and "input_ids" not in columns_of(dataset)  # no stream is opened once more without need
                check_dataset(dataset, name, self.args, self._formatting_func if makes_text else None)
        step, self._micro_step = self._micro_step, (-1, -1)
        start, clock = time.perf_counter(), self._clock
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._micro_step = step  # an evaluation within one leaves it as it is
        self._clock = clock + time.perf_counter() - start  # no part of the training that tokens per second are of; several sets have their own calls within
        return metrics

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._gains = GainByDocument()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self._gains.summary().items()})
        best = self.args.metric_for_best_model or ""
        awaited = f"eval_{best.removeprefix('eval_')}" in {f"{metric_key_prefix}_{name}" for name in OF_THOUGHTS}  # of this set, where there are several
        if self.is_in_train and self.args.chooses_best and awaited and not self._gains.rows:
            raise RunError(f"The held-out text has no place to think at, and {best} chooses the best model: give longer rows, or choose by loss.")
        return output

    def _get_grad_norm(self, model, grad_norm=None):
        """A finite loss can have a gradient that is not, on all ranks alike. DeepSpeed has its own scale for fp16, and skips what overflows by itself."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2 has a part of it on each rank
            if not math.isfinite(norm):
                self.guard.flag()
        return norm
