"""Trains a tiny model with options from the command line, in a process of its own; the first rank writes losses and weights, unless it is killed."""

import json
import os
import signal
import sys

import torch
from datasets import Dataset
from models import CORPUS, tiny_model, tiny_tokenizer
from peft import LoraConfig
from transformers import TrainerCallback

from hf_thinktok import ThinkTokConfig, ThinkTokTrainer


class KilledAtStep(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


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


def main(folder: str, options: dict) -> None:
    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer()
    adapter = LoraConfig(r=4, target_modules="all-linear") if options.pop("adapter", False) else None
    kill_step, kill_write, resume = (options.pop(name, None) for name in ("kill_step", "kill_write", "resume"))
    defaults = {
        "bf16": False, "use_cpu": True, "max_length": 48, "max_steps": 3, "learning_rate": 1e-3, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "logging_steps": 1, "num_think_tokens": 4, "num_forks": 3, "num_generations": 2, "max_think_length": 2,
        "gradient_checkpointing": False, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0,
    }  # fmt: skip
    trainer = ThinkTokTrainer(
        tiny_model(vocab_size=len(tokenizer)),
        ThinkTokConfig(folder, **defaults | options),
        train_dataset=Dataset.from_dict({"text": CORPUS}),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    if kill_step is not None:
        trainer.add_callback(KilledAtStep(kill_step))
    if kill_write is not None:
        kill_while_writing(kill_write)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        weights = {name: value.detach().cpu() for name, value in trainer.model.named_parameters()}
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        torch.save({"losses": losses, "weights": weights, "world": trainer.accelerator.num_processes}, f"{folder}/result.pt")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
