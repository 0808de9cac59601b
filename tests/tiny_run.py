"""Trains a tiny model with options from the command line, or several in turn, in a process of its own: for each a folder and JSON.

The first rank writes losses and weights, unless it is killed.
"""

import functools
import json
import os
import signal
import sys
import traceback
from unittest.mock import patch

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from datasets import Dataset
from models import CORPUS, tiny_model, tiny_tokenizer
from peft import LoraConfig
from questions import questions
from transformers import TrainerCallback

from hf_thinktok import ThinkTokConfig, ThinkTokTrainer, revival
from hf_thinktok.distributed import is_sharded, whole


class KilledAtStep(TrainerCallback):
    """Sends the first rank a signal."""

    def __init__(self, step: int, how: signal.Signals):
        self.step, self.how = step, how

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and state.is_world_process_zero:
            os.kill(os.getpid(), self.how)


def kill_while_writing(count: int) -> None:
    """Ends this process in the middle of its n-th `torch.save`."""
    save, left = torch.save, [count]

    def write(value, file, *args, **kwargs):
        left[0] -= 1
        save(value, file, *args, **kwargs)
        if left[0] == 0:
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = write


def bring_up_fsdp2_on_cpu(state_dict_type: str) -> None:
    """accelerate's own FSDP2 on CPU processes: its sharding works there, and only its launcher does not choose it."""
    start = Accelerator.__init__

    @functools.wraps(start)
    def init(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type=state_dict_type, cpu_ram_efficient_loading=False
        )
        if self.mixed_precision != "no":
            self.state.fsdp_plugin.set_mixed_precision(self.mixed_precision, override=True)

    Accelerator.__init__ = init


def partition_small_parameters(args: ThinkTokConfig) -> None:
    """ZeRO-3 leaves parameters whole that are small, which all of a tiny model are."""
    if (plugin := getattr(args, "deepspeed_plugin", None)) is not None and plugin.zero_stage == 3:
        plugin.hf_ds_config.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


def main(folder: str, options: dict) -> ThinkTokTrainer:
    torch.set_num_threads(1)
    options, tokenizer = dict(options), tiny_tokenizer()
    adapter = LoraConfig(r=4, target_modules="all-linear") if options.pop("adapter", False) else None
    kill_step, kill_write, terminate_step, resume, model_folder = (
        options.pop(name, None) for name in ("kill_step", "kill_write", "terminate_step", "resume", "model_folder")
    )
    tie, streaming, constants = options.pop("tie", True), options.pop("streaming", False), options.pop("revival", {})
    levels = (2, 3) if options.get("blind") else (1, 2, 3)  # where the text is hidden nothing can be said without a thought
    text = questions(levels=levels) if options.pop("questions", False) else Dataset.from_dict({"text": CORPUS})
    if state_dict_type := options.pop("fsdp2_on_cpu", None):
        bring_up_fsdp2_on_cpu(state_dict_type)
    defaults = {
        "bf16": False, "use_cpu": True, "max_length": 48, "max_steps": 3, "learning_rate": 1e-3, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "logging_steps": 1, "num_think_tokens": 4, "num_forks": 3, "num_generations": 2, "max_think_length": 2,
        "gradient_checkpointing": False, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0,
    }  # fmt: skip
    args = ThinkTokConfig(folder, **defaults | options)
    partition_small_parameters(args)
    trainer = ThinkTokTrainer(
        model_folder or tiny_model(vocab_size=len(tokenizer), tie=tie),
        args,
        train_dataset=text.to_iterable_dataset() if streaming else text,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    if kill_step is not None:
        trainer.add_callback(KilledAtStep(kill_step, signal.SIGKILL))
    if terminate_step is not None:
        trainer.add_callback(KilledAtStep(terminate_step, signal.SIGTERM))
    if kill_write is not None:
        kill_while_writing(kill_write)
    with patch.dict(vars(revival), constants):
        trainer.train(resume_from_checkpoint=resume)
    sharded = is_sharded(trainer.model)
    with whole(trainer.model):
        weights = {name: getattr(value, "full_tensor", lambda value=value: value)().detach().cpu().clone() for name, value in trainer.model.named_parameters()}
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        spread = [entry["reward_std"] for entry in trainer.state.log_history if "reward_std" in entry]
        result = {"losses": losses, "reward_std": spread, "weights": weights, "world": trainer.accelerator.num_processes, "sharded": sharded}
        result["revived"] = trainer.revival.revived if trainer.revival is not None else 0
        result["precision"] = trainer.accelerator.mixed_precision
        torch.save(result | {"launcher": trainer.accelerator.distributed_type.value}, f"{folder}/result.pt")
    return trainer


if __name__ == "__main__":
    for run_folder, told in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        run_options = json.loads(told)
        refused = run_options.pop("refused", False)
        try:
            main(run_folder, run_options)
        except ValueError:
            if not refused:
                raise
            traceback.print_exc()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads now and then abort a process that tidies up
