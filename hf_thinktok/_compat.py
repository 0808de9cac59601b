"""Every import of a private or semi-public name of TRL, PEFT, accelerate or transformers, and nothing else of them elsewhere; and PyTorch's fake tensors."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from huggingface_hub import HfApi
from peft.tuners.tuners_utils import DUMMY_TARGET_MODULES, BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from torch._decomp import decomposition_table
from torch._subclasses.fake_impls import register_op_impl
from torch._subclasses.fake_tensor import FakeTensorMode
from trl.models.utils import add_hooks, prepare_deepspeed, remove_hooks
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import RepeatSampler, create_model_from_path

__all__ = [
    "DUMMY_TARGET_MODULES",
    "BaseTunerLayer",
    "DataCollatorForLanguageModeling",
    "FakeTensorMode",
    "RepeatSampler",
    "add_hooks",
    "check_target_module_exists",
    "create_model_from_path",
    "fsdp2_prepare_model",
    "prepare_deepspeed",
    "remove_hooks",
    "running_adapter",
    "same_processes",
    "trainable_token_rows",
    "uploads_without",
]

_addmm = torch.ops.aten.addmm
if decomposition_table.get(_addmm.dtype_out) is decomposition_table[_addmm.default]:  # torch 2.11 takes the type of the sums for a factor
    for _overload in (_addmm.dtype, _addmm.dtype_out):
        del decomposition_table[_overload]

    @register_op_impl([_addmm.dtype_out])
    def _sums_in_place(mode, func, *args, out, **kwargs):
        return out


@contextlib.contextmanager
def running_adapter(model: torch.nn.Module, name: str) -> Iterator[None]:
    """Runs another adapter than the active one. Unlike `set_adapter` it leaves alone what requires gradients."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [name]
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


@contextlib.contextmanager
def same_processes() -> Iterator[None]:
    """Training arguments that are made within leave accelerate's state as it is. They begin it anew, and a trainer that there is would no longer find it."""
    states = [(kind._shared_state, dict(kind._shared_state)) for kind in (AcceleratorState, PartialState)]
    try:
        yield
    finally:
        for state, before in states:
            state.clear()
            state.update(before)


@contextlib.contextmanager
def uploads_without(*patterns: str) -> Iterator[None]:
    """Leaves files out of what `Trainer` uploads, beside those of its own fixed patterns."""
    upload = HfApi.upload_folder

    def upload_less(self, *, ignore_patterns=(), **kwargs):
        return upload(self, ignore_patterns=[*ignore_patterns, *patterns], **kwargs)

    HfApi.upload_folder = upload_less  # type: ignore[method-assign]
    try:
        yield
    finally:
        HfApi.upload_folder = upload  # type: ignore[method-assign]


def trainable_token_rows(lm_head: Any) -> tuple[Tensor, Tensor | None]:
    """The LM head's weight, and the rows that PEFT trains beside it (`trainable_token_indices`), if any.

    PEFT keeps trained rows as a small parameter of their own; the large weight stays frozen and is read as it is.
    """
    layer = getattr(lm_head, "token_adapter", None)
    if layer is None:
        return lm_head.weight, None
    weight = layer.get_base_layer().weight
    if layer.disable_adapters or not lm_head.active_adapters:
        return weight, None
    return weight, layer.trainable_tokens_delta[lm_head.active_adapters[0]]
