"""Several processes, and parameters of which each process holds a part (DeepSpeed ZeRO-3, FSDP2)."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import is_peft_model, str_to_bool
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ._compat import add_hooks, fsdp2_prepare_model, prepare_deepspeed, remove_hooks

# What a launcher tells its processes, and what must have come of it.
ASKED_FOR = {"ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED, "ACCELERATE_USE_FSDP": DistributedType.FSDP}


def check_launcher(accelerator: Accelerator, model: PreTrainedModel, environment: Mapping[str, str] = os.environ) -> None:
    """Refuses to train in silence as something else than the launcher was asked for.

    Raises:
        ValueError: fewer processes than were started know of each other, DeepSpeed or FSDP did not come up, or they cannot divide this model.
    """
    check_parallelism(getattr(accelerator, "parallelism_config", None))
    asked, kind = int(environment.get("WORLD_SIZE", 1)), accelerator.distributed_type
    cpu = "On CPUs take `accelerate launch --multi_gpu --num_processes N` and use_cpu=True, or for DeepSpeed ddp_backend=gloo."
    if asked != accelerator.num_processes:
        raise ValueError(f"The launcher started {asked} processes, and this one knows of {accelerator.num_processes}, so each would train alone. {cpu}")
    if asked == 1 and "MASTER_PORT" in environment and str_to_bool(environment.get("ACCELERATE_USE_CPU", "false")):
        raise ValueError(f"The launcher was asked for several processes and started one, as accelerate's CPU modes do without mpirun. {cpu}")
    if asked > 1 and accelerator.device.type == "cpu" and torch.cuda.is_available() and environment.get("ACCELERATE_USE_CPU") == "false":
        raise ValueError("The launcher's config is for GPUs, and use_cpu=True has its processes train on CPUs: set use_cpu=False, as --use_cpu false does.")
    for name, wanted in ASKED_FOR.items():
        if str_to_bool(environment.get(name, "false")) and kind != wanted:
            raise ValueError(f"The launcher's config asks for {wanted.value}, and {kind.value} came up: it needs a GPU here, or use_cpu=False.")
    if kind == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError("FSDP 1 is not supported: set fsdp_version: 2 in the launcher's config, as accelerate_configs/fsdp2.yaml does.")
    if kind == DistributedType.FSDP and "FULL_STATE_DICT" not in str(accelerator.state.fsdp_plugin.state_dict_type):
        raise ValueError("FSDP2 would save no model so: set fsdp_state_dict_type: FULL_STATE_DICT in its config, as accelerate_configs/fsdp2.yaml does.")
    if kind == DistributedType.FSDP and is_peft_model(model) and model.config.get_text_config().tie_word_embeddings:
        raise ValueError("With FSDP2 an adapter needs an LM head of its own, and this model's is tied to its input rows: take DDP or ZeRO-2.")


def check_parallelism(config: Any) -> None:
    """Refuses a launcher's, or the arguments', `ParallelismConfig` that cuts rows or layers apart."""
    if config is not None and (config.cp_enabled or config.sp_enabled or config.tp_enabled):
        raise ValueError("Context, sequence and tensor parallelism cut rows or layers apart, and a tree needs them whole: use data parallelism, ZeRO or FSDP2.")


def set_up_fsdp2(accelerator: Accelerator) -> None:
    """What accelerate would have otherwise, before it divides a model.

    Inputs and results of modules stay as they are: cast to the low precision of the weights a tree's mask would be refused, and scores would lose what they
    are compared by. Gradients are summed over ranks in fp32, as DDP's are, and after every pass: whoever waits for the last one of a step keeps them whole.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    if (policy := accelerator.state.fsdp_plugin.mixed_precision_policy) is not None:
        accelerator.state.fsdp_plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False)


def autocast(accelerator: Accelerator) -> contextlib.AbstractContextManager:
    """The precision of the trained model's own pass, for several passes together: weights are cast once. FSDP2 has cast them where it gathers them."""
    return contextlib.nullcontext() if accelerator.distributed_type == DistributedType.FSDP else accelerator.autocast()


def computes_in(accelerator: Accelerator) -> torch.dtype | None:
    """The low precision of a model's products, which weights do not show: autocast begins inside the model, and FSDP2 casts layer by layer."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)


def is_partitioned(model: torch.nn.Module) -> bool:
    """Whether ZeRO-3 has divided the model's parameters among the processes."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether each process holds a part of the model's parameters."""
    return is_partitioned(model) or any(isinstance(module, FSDPModule) for module in model.modules())


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the input embedding."""
    return weight_rows(model.get_input_embeddings())


def weight_rows(layer: Any) -> int:
    """Rows of an embedding or an LM head."""
    return getattr(layer.weight, "ds_shape", layer.weight.shape)[0]  # ZeRO-3 leaves an empty tensor behind


@contextlib.contextmanager
def whole(model: torch.nn.Module, written_by: int | None = None) -> Iterator[None]:
    """All parameters of a model on every process for a while; with `written_by`, what that rank has made of them is kept."""
    if not is_partitioned(model):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=written_by):
        yield


@contextlib.contextmanager
def where_it_is_fast(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """A model that lies in main memory on this process's GPU for a while, where it fits: beside others a process has one CPU thread."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    if device.type != "cuda" or model.device.type != "cpu" or is_partitioned(model) or torch.cuda.mem_get_info(device)[0] < 1.5 * size:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")  # whence FSDP2 divides it
        torch.cuda.empty_cache()


@contextlib.contextmanager
def for_rollout(model: torch.nn.Module, accelerator: Accelerator, gather: bool) -> Iterator[torch.nn.Module]:
    """The model as it is sampled from. Sharded parameters are gathered once where asked for, and not layer by layer at every token.

    Args:
        model: as the launcher has wrapped it.
    """
    if not gather or not is_sharded(model):
        yield model
    elif is_partitioned(model):
        with whole(model):
            remove_hooks(model)  # they would give every layer's parameters back after its pass
            try:
                yield accelerator.unwrap_model(model)
            finally:
                add_hooks(model)
    else:
        shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
        # Before its first forward the root does not know yet that it keeps its parameters.
        before = [shard is not model and _reshards(shard) for shard in shards]
        for shard in shards:
            shard.set_reshard_after_forward(False, recurse=False)
        try:
            yield model
        finally:
            for shard, reshards in zip(shards, before, strict=True):
                shard.reshard()
                shard.set_reshard_after_forward(reshards, recurse=False)


def _reshards(shard: FSDPModule) -> bool:
    """Whether a module gives its parameters back after its forward. FSDP has a way to say so and none to ask."""
    state = shard._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # several in newer versions
    return any(group is not None and group.post_forward_mesh_info is not None for group in groups)


def prepare_frozen(model: PreTrainedModel, accelerator: Accelerator) -> torch.nn.Module:
    """A model that is only read: on this process's device, or in parts where the trained one is."""
    model.requires_grad_(False)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        return fsdp2_prepare_model(accelerator, model).eval()
    return accelerator.prepare_model(model, evaluation_mode=True)
