"""Whether a run fits, and what it costs: the peak memory of one process, by part, and its FLOPs, from a model's config alone.

What a process without others holds is counted in a dry run. What launchers then do to weights, gradients and optimizer state is arithmetic
(`_Sharding`): that of ZeRO is its paper's (https://huggingface.co/papers/1910.02054), with the sizes of buffers that DeepSpeed has by default.

Bytes throughout.
"""

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig

from . import flex, head
from .architectures import check_supported
from .config import ThinkTokConfig
from .dry_run import DryRun, Phase, Rows, attend_without_data, count_flops, model_without_data
from .errors import first_line
from .loading import check_attention
from .memory import Part
from .replay import LARGEST_SHARE

# DeepSpeed's defaults, in numbers: a bucket of gradients, and the parameters that ZeRO-3 may hold gathered, or steps at a time.
ZERO_BUCKET, ZERO_GATHERED, ZERO_GROUP = 500_000_000, 1_000_000_000, 1_000_000_000


@dataclass
class Plan:
    """Peak memory of one process, in bytes.

    Attributes:
        nodes: what the model runs of one row in the gradient pass: the nodes of its tree, or with the replicated path the tokens of all its rows.
        visible_pairs: pairs of nodes of a row's tree of which one sees the other.
        parameters, trainable: numbers of the whole model.
        phases: the parts at the peak of each phase of a step.
    """

    nodes: int
    visible_pairs: int
    parameters: int
    trainable: int
    phases: dict[str, dict[str, int]]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        return sum(self.phases[self.peak_phase].values())


def plan(
    config: PretrainedConfig,
    args: ThinkTokConfig,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    peft_config: Any = None,
    zero: int = 0,
    fsdp2: bool = False,
    num_processes: int = 1,
    gpu: bool = True,
    gpu_gib: float | None = None,
) -> Plan:
    """Plans a training step of one process, on rows of `args.max_length` tokens, and with `args.do_eval` an evaluation.

    Args:
        config: of a causal LM, with thinking tokens or without.
        dtype, attn_implementation, peft_config: as the trainer gets them.
        zero: the stage of DeepSpeed's ZeRO; 0 for none.
        gpu: the head multiplies low-precision numbers as on a GPU, long rows attend by FlexAttention, and rollouts are replayed; on a CPU the head makes fp32
            copies.
        gpu_gib: what the GPU has: keys and values stay for replayed rollouts up to a part of it.

    Raises:
        ValueError: one sentence on what cannot be planned.
    """
    _check(args, attn_implementation, zero, fsdp2, num_processes)
    check_supported(config)
    compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    rows = Rows(args, args.per_device_train_batch_size, args.num_generations, args.num_markovian)
    without_kernels = patch.object(flex, "attend", attend_without_data)
    with patch.object(head, "sums_in_fp32", lambda hidden_MD: gpu), without_kernels, warnings.catch_warnings(action="ignore"):
        model, vocabulary = model_without_data(config, args, dtype, attn_implementation, peft_config)
        sharding = _Sharding(model, compute, zero, fsdp2, num_processes, args.gather_for_rollout)
        with _one_sentence(config):
            device, autocast = torch.device("cuda" if gpu else "cpu"), None if sharding.shards else compute
            run = DryRun(model, vocabulary, args, device, autocast, sharding.gradient_share, sharding.divides)
            parts = {Phase.STEP: run.optimizer_step()} | (rollout := run.rollout(rows)) | {Phase.PASS: run.gradient_pass(rows)}
            kept = run.stays(rows, rollout)
            evaluated = {}
            if args.do_eval:  # thoughts are drawn, and then scored beside as many random ones
                scored, drawn = (Rows(args, args.per_device_eval_batch_size, groups * args.num_generations) for groups in (2, 1))
                evaluated = {Phase.EVALUATION: run.evaluation(scored)} | (rollout := run.rollout(drawn))
                kept += run.stays(drawn, rollout)
            limit = 0 if sharding.shards else math.inf if gpu_gib is None else LARGEST_SHARE * gpu_gib * 2**30
            for one in (*parts.values(), *evaluated.values()) if kept <= limit else ():
                one[Part.CACHE] = max(one.get(Part.CACHE, 0), kept)
            phases = {phase: sharding(phase, parts[phase]) for phase in parts}
            if evaluated:
                phases[Phase.EVALUATION] = max((sharding(phase, evaluated[phase]) for phase in evaluated), key=lambda found: sum(found.values()))
    nodes = rows.tree.num_nodes if args.engine != "replicated" else rows.tree.paths()[1].numel() // args.per_device_train_batch_size
    return Plan(
        nodes=nodes,
        visible_pairs=int(rows.tree.num_visible()[0].sum()),
        parameters=sharding.trained + sharding.frozen,
        trainable=sharding.trained,
        phases={phase: phases[phase] for phase in Phase if phase in phases},
    )


def step_flops(config: PretrainedConfig, args: ThinkTokConfig, attn_implementation: str | None = None, peft_config: Any = None) -> int:
    """What the products of matrices in one training step of one process compute, each multiplication and each addition counted once: its part of a rollout
    and the gradient pass, on rows of `args.max_length` tokens, and all that is accumulated.

    Raises:
        ValueError: one sentence on what cannot be counted.
    """
    _check(args, attn_implementation, zero=0, fsdp2=False, num_processes=1)
    check_supported(config)
    rows = Rows(args, args.per_device_train_batch_size, args.num_generations, args.num_markovian)
    with warnings.catch_warnings(action="ignore"):
        model, vocabulary = model_without_data(config, args, torch.bfloat16, attn_implementation, peft_config)  # which experts want
        with _one_sentence(config):
            run = DryRun(model, vocabulary, args, torch.device("cpu"))
            with count_flops() as rollout:
                run.look_for_hard_places(rows)
                run.rollout(rows, every_part=True)
            with count_flops() as gradient:
                run.gradient_pass(rows)
    return (rollout.get_total_flops() // args.num_iterations + gradient.get_total_flops()) * args.gradient_accumulation_steps


class _Sharding:
    """What a launcher makes of the parts that one process alone would hold.

    Args:
        model: of `model_without_data`; where weights are sharded it becomes one of type `compute`, which they are gathered in.
        gathers: whether all of them are, for a rollout.
    """

    def __init__(self, model, compute: torch.dtype | None, zero: int, fsdp2: bool, num_processes: int, gathers: bool):
        self.zero, self.fsdp2, self.processes, self.shards, self.divides = zero, fsdp2, num_processes, zero > 0 or fsdp2, zero == 3 or fsdp2
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        self.frozen, self.frozen_bytes = sum(p.numel() for p in frozen), sum(p.nbytes for p in frozen)
        if self.shards and compute is not None:
            model.to(compute)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trained, self.trained_bytes = sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
        self.size = model.dtype.itemsize
        total = self.trained + self.frozen
        blocks = [list(module.parameters()) for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
        sizes = [sum(p.numel() for p in block) for block in blocks]
        # FSDP2 gathers the next block while it runs one, and keeps what belongs to no block; DeepSpeed gathers up to a number.
        self.gathered = self.size * (total - sum(sizes) + 2 * max(sizes, default=0) if fsdp2 else min(total, ZERO_GATHERED))
        self.gathered_for_rollout = self.size * total if gathers else self.gathered
        # What waits to be reduced: FSDP2's gradients of a block, in fp32; DeepSpeed's bucket.
        self.waiting = 4 * max((sum(p.numel() for p in block if p.requires_grad) for block in blocks), default=0) if fsdp2 else self.size * ZERO_BUCKET
        self.gradient_share = (4 / self.size if fsdp2 else 1) / num_processes if zero >= 2 or fsdp2 else 1.0

    def __call__(self, phase: str, alone: dict[str, int]) -> dict[str, int]:
        parts = {part: float(alone[part]) for part in Part if part in alone}
        if not self.shards and self.processes > 1:
            parts[Part.BUFFERS] = self.trained_bytes  # DDP's buckets are a copy of the gradients
        if self.shards:
            share, fp32 = 1 / self.processes, 4 * self.trained
            states = alone.get(Part.OPTIMIZER, 0) / self.trained_bytes * fp32  # the optimizer's own, two for AdamW
            parts[Part.GRADIENTS] = parts.get(Part.GRADIENTS, 0) * self.gradient_share
            parts[Part.OPTIMIZER] = (states + (0 if self.fsdp2 else fp32)) * share
            if self.zero and phase == Phase.STEP:  # the process's own gradients once more, flat, and in fp32
                group = self.trained * share
                parts[Part.GRADIENTS] += (self.size + 4) * (min(group, ZERO_GROUP) if self.zero == 3 else group)
            if phase == Phase.PASS:
                parts[Part.BUFFERS] = self.waiting
            if self.fsdp2:
                parts[Part.PARAMETERS] = (fp32 + self.frozen_bytes) * share
            if self.zero == 3:
                parts[Part.PARAMETERS] *= share
            if self.divides and phase != Phase.STEP:
                parts[Part.GATHERED] = self.gathered if phase == Phase.PASS else self.gathered_for_rollout
        return {part: round(parts[part]) for part in Part if parts.get(part)}


# What a plan does not count, with the values that it does.
NOT_COUNTED = {
    "policies": ("shared",),
    "teacher": (None,),
    "beta": (0.0,),
    "search": ([0.0],),
    "thoughts": ("discrete", "text", "filler"),
    "rollout": ("fork",),
    "activation_offloading": (False,),
}


def _check(args: ThinkTokConfig, attn_implementation: str | None, zero: int, fsdp2: bool, num_processes: int) -> None:
    if args.num_think_tokens == 0:
        raise ValueError("num_think_tokens=0 trains as TRL does, and a plan is of training with thoughts: leave it out, or set num_forks=0.")
    if args.max_length is None:
        raise ValueError("max_length=null has no longest row to plan for: set max_length.")
    for name, counted in NOT_COUNTED.items():
        if (value := getattr(args, name)) not in counted:
            raise ValueError(f"{name}={value} takes passes, a model or a place that a plan does not count: leave {name} out.")
    if zero and fsdp2:
        raise ValueError("zero and fsdp2 both shard the model: choose one.")
    if (zero or fsdp2) and num_processes < 2:
        raise ValueError(f"{f'zero={zero}' if zero else 'fsdp2'} shares a model out among processes, and there is one: set num_processes to 2 or more.")
    check_attention(attn_implementation)


@contextlib.contextmanager
def _one_sentence(config: PretrainedConfig) -> Iterator[None]:
    """Any architecture may fail without data in its own way."""
    traces = logging.getLogger("torch._subclasses.fake_tensor")
    traces.disabled = True
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"A step of {config.model_type} cannot be made without data, so it cannot be planned ({type(error).__name__}: {first_line(error)[:160]}); "
            "where it cannot run a packed tree, set engine=replicated."
        ) from error
    finally:
        traces.disabled = False


def print_plan(made: Plan, gpu_gib: float | None = None, console: Console | None = None) -> None:
    """The parts at the peak of each phase, and whether the largest fits."""
    console = console or Console(highlight=False)
    table = Table(title="Peak memory of one process, GiB")
    table.add_column("", no_wrap=True)
    for phase in made.phases:
        table.add_column(phase, justify="right")
    for part in Part:
        if any(part in parts for parts in made.phases.values()):
            table.add_row(part, *(_gib(parts[part]) if part in parts else "" for parts in made.phases.values()))
    table.add_section()
    table.add_row("sum", *(_gib(sum(parts.values())) for parts in made.phases.values()), style="bold")
    console.print(table)
    console.print(f"{made.parameters:,} parameters, {made.trainable / made.parameters:.2%} of them trained.")
    console.print(f"{made.nodes:,} nodes a row; {made.visible_pairs:,} pairs of its tree see each other.")
    share = "" if gpu_gib is None else f", {made.peak / gpu_gib / 2**30:.0%} of {gpu_gib:g} GiB: {'fits' if made.peak <= gpu_gib * 2**30 else 'does not fit'}"
    console.print(f"Peak {_gib(made.peak)} GiB in the {made.peak_phase}{share}.")


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f}"
