"""What of a program's tensors is alive, and what for; and how much a real step takes."""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainerCallback


class Part(StrEnum):
    """What memory is held for."""

    PARAMETERS = "parameters"
    GATHERED = "gathered parameters"
    CAST = "cast parameters"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer state"
    BUFFERS = "communication buffers"
    ATTENTION = "masks and scores"
    CACHE = "KV cache"
    ACTIVATIONS = "activations"
    WORKING = "working memory"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, by part, and keeps the counts of the moment when their sum is largest.

    Args:
        gradient_share: how much of the gradients counts in the sum.
    """

    def __init__(self, gradient_share: float = 1.0):
        super().__init__()
        self.gradient_share = gradient_share
        self.square = (-1, -1)  # tensors that end in this shape are masks and scores
        self.in_place: tuple[int, ...] = (-1,)  # sums of this shape take no room of their own
        self.part_of: dict[int, str] = {}
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:  # fake tensors are asked all the time
            return out
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.part_of:
                cast = func is torch.ops.aten._to_copy.default and self.part_of.get(args[0].untyped_storage()._cdata) == Part.PARAMETERS
                sum_in_place = func is torch.ops.aten.add.Tensor and tensor.shape == self.in_place  # its terms are freed at once
                self.add(tensor, Part.CAST if cast else Part.ATTENTION if tensor.shape[-2:] == self.square else Part.WORKING, peaks=not sum_in_place)
        return out

    def add(self, tensor: Tensor, part: str, peaks: bool = True) -> None:
        """Counts a tensor's storage as a part, whatever it was before; `peaks` says whether this moment may be the peak."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.part_of:
            self.live[self.part_of[key]] -= size
        else:
            weakref.finalize(storage, self._freed, key, size)
        self.part_of[key] = part
        self.live[part] += size
        if peaks and self._sum(self.live) > self._sum(self.peak):
            self.peak = self.live.copy()

    def _freed(self, key: int, size: int) -> None:
        self.live[self.part_of.pop(key)] -= size

    def _sum(self, counts: Counter[str]) -> float:
        return counts.total() - (1 - self.gradient_share) * counts[Part.GRADIENTS]

    def settle(self, part: str) -> None:
        """What is alive of the working memory is kept for longer, as this part."""
        self.live[part] += self.live.pop(Part.WORKING, 0)
        self.part_of = {key: part if old == Part.WORKING else old for key, old in self.part_of.items()}

    def since(self) -> dict[str, int]:
        """The parts at the peak since the last call."""
        peak, self.peak = self.peak, self.live.copy()
        return {part: size for part, size in peak.items() if size}


def held_bytes(trainer: Trainer) -> int:
    """Weights, optimizer state, and the KV cache that is kept for replayed passes."""
    state = [value for values in trainer.optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    tensors = (*trainer.model.parameters(), *trainer.model.buffers(), *state)
    held = sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
    return held + getattr(getattr(trainer, "engine", None), "kept_bytes", 0)


@contextlib.contextmanager
def peak_bytes(trainer: Trainer) -> Iterator[list[int]]:
    """The largest sum of bytes that a trainer has allocated, in a list that is filled at the end. Other trainers may hold memory meanwhile.

    On a CPU PyTorch's profiler sees what comes and goes, beside weights and state.
    """
    found: list[int] = []
    held = held_bytes(trainer)
    if trainer.args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found.append(held + torch.cuda.max_memory_allocated() - before)
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    live = peak = held
    for event in sorted((event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    found.append(peak)


class PeakOfLastStep(TrainerCallback):
    """Measures the last step of a run; `found` has the bytes. An optimizer makes its state in the first step that it ever takes: that one tells less."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1:
            self.measuring = peak_bytes(self.trainer)
            self.found = self.measuring.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            self.measuring.__exit__(None, None, None)
