"""What `thinktok plan` says of models of known shapes, and how far that is from what a step really takes.

    python recipes/memory.py plans       # the table of docs/scaling.md: outputs/memory/plans.json
    python recipes/memory.py measured    # real steps of a small model, on the GPU if there is one: outputs/memory/measured.json

Neither needs a download.
"""

import argparse
import gc
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from hf_thinktok import ThinkTokConfig, ThinkTokTrainer
from hf_thinktok.dry_run import Phase
from hf_thinktok.memory import PeakOfLastStep, peak_bytes
from hf_thinktok.plan import plan
from hf_thinktok.results import environment, print_measured, print_plans, write_json
from hf_thinktok.tasks import word_tokenizer

# The shapes of published models, from their config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
        "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
    "SmolLM2-1.7B": {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 8192,
        "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
        "vocab_size": 152064, "tie_word_embeddings": False, "max_position_embeddings": 131072,
    },
    "Qwen2.5-32B": {
        "model_type": "qwen2", "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8, "intermediate_size": 27648,
        "vocab_size": 152064, "tie_word_embeddings": False, "max_position_embeddings": 131072,
    },
}  # fmt: skip
LORA = LoraConfig(r=16, target_modules="all-linear")
# The rows of the table: options of the plan, and of the trainer.
HOWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1 GPU": ({}, {}),
    "1 GPU, no checkpointing": ({}, {"gradient_checkpointing": False}),
    "ZeRO-2, 8 GPUs": ({"zero": 2, "num_processes": 8}, {}),
    "ZeRO-3, 8 GPUs": ({"zero": 3, "num_processes": 8}, {}),
    "the same, layer by layer": ({"zero": 3, "num_processes": 8}, {"gather_for_rollout": False}),
    "LoRA, 1 GPU": ({"dtype": torch.bfloat16, "peft_config": LORA}, {}),
    "1 GPU, evaluation": ({}, {"do_eval": True}),
}
TREE = {"max_length": 2048, "num_forks": 64, "num_generations": 8, "max_think_length": 8, "lookahead": 8, "stop": "fixed", "num_think_tokens": 16}

# A small model for real steps, with enough nodes that weights are not all; a case named after a shape is of that.
SMALL = {
    "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 768,
    "vocab_size": 8192, "tie_word_embeddings": True, "max_position_embeddings": 1024,
}  # fmt: skip
SMALL_TREE = {"max_length": 256, "num_forks": 32, "num_generations": 4, "max_think_length": 4, "lookahead": 4, "stop": "fixed", "num_think_tokens": 16}
PLAIN = {"bf16": False, "gradient_checkpointing": False}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({}, PLAIN),
    "full, checkpointing": ({}, PLAIN | {"gradient_checkpointing": True}),
    "LoRA": ({"peft_config": LORA}, PLAIN),
    "LoRA, bf16 weights, checkpointing": ({"peft_config": LORA, "dtype": torch.bfloat16}, {}),
    "bf16 autocast": ({}, {"gradient_checkpointing": False}),
    "bf16 autocast, checkpointing": ({}, {}),
    "bf16 weights, checkpointing": ({"dtype": torch.bfloat16}, {}),
    "eager attention": ({"attn_implementation": "eager"}, PLAIN),
    "2 rows, stop=learned, accumulation": ({}, PLAIN | {"lookahead": 1, "stop": "learned", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "memory=persistent": ({}, PLAIN | {"memory": "persistent", "stop": "sampled", "num_forks": 8, "num_generations": 16}),
    "replicated path": ({}, PLAIN | {"engine": "replicated", "gradient_checkpointing": True, "num_forks": 4}),
    "SmolLM2-135M": ({}, {}),
    "evaluation of 2 rows": ({}, PLAIN | {"do_eval": True, "per_device_eval_batch_size": 2, "gradient_checkpointing": True}),
}


def config_of(shape: dict[str, Any]) -> PretrainedConfig:
    return AutoConfig.for_model(**shape)


def options(tree: dict[str, Any], changes: dict[str, Any], folder: str = "outputs/memory") -> ThinkTokConfig:
    quiet = {"max_steps": 2, "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    return ThinkTokConfig(folder, **quiet | {"per_device_train_batch_size": 1} | tree | changes)


def measure(case: str) -> dict[str, Any]:
    """The peak of a real step, or of a real evaluation, and what the plan says of it, in bytes."""
    (loading, changes), shape = CASES[case], SHAPES.get(case, SMALL)
    adapter, how = loading.get("peft_config"), {name: value for name, value in loading.items() if name != "peft_config"}
    gc.collect()  # what an earlier case left on the GPU
    torch.manual_seed(0)
    tokenizer = word_tokenizer(f"w{i}" for i in range(shape["vocab_size"] - 3))
    with tempfile.TemporaryDirectory() as folder:
        args = options(SMALL_TREE, changes, folder)
        text = Dataset.from_dict({"input_ids": torch.randint(3, shape["vocab_size"], (4 * args.train_batch_size, args.max_length)).tolist()})
        model = AutoModelForCausalLM.from_config(config_of(shape), **{"dtype": torch.float32} | how)
        trainer = ThinkTokTrainer(model, args, train_dataset=text, eval_dataset=text if args.do_eval else None, processing_class=tokenizer, peft_config=adapter)
        last = PeakOfLastStep(trainer)
        trainer.add_callback(last)
        trainer.train()
        found = last.found
        if args.do_eval:
            with peak_bytes(trainer) as found:
                trainer.evaluate()
        made = plan(config_of(shape), args, **loading, gpu=args.device.type == "cuda")
    planned = sum(made.phases[Phase.EVALUATION].values()) if args.do_eval else made.peak
    return {"case": case, "nodes": made.nodes, "planned": planned, "measured": found[0], "ratio": planned / found[0]}


def plan_of(name: str, how: str) -> dict[str, Any]:
    """A row of the table: the parts at the peak of a step."""
    sharding, changes = HOWS[how]
    made = plan(config_of(SHAPES[name]), options(TREE, {"bf16": True} | changes), **sharding)
    return {"model": name, "how": how, **asdict(made), "peak": made.peak, "peak_phase": made.peak_phase}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("plans", "measured"))
    parser.add_argument("--results", type=Path, help="where the figures go")
    chosen, measured_on = parser.parse_args(), environment()
    if chosen.what == "plans":
        large = ("Qwen2.5-7B", "Qwen2.5-32B")
        only = {"LoRA, 1 GPU": large, "the same, layer by layer": large, "1 GPU, evaluation": ("SmolLM2-135M",)}
        wanted = [(name, how) for name in SHAPES for how in HOWS if name in only.get(how, SHAPES)]
        results = {"plans": [plan_of(*each) for each in wanted], "tree": TREE}
        print_plans(results)
    else:
        results = {"measured": [measure(case) for case in CASES], "shape": SMALL, "tree": SMALL_TREE}
        print_measured(results)
    write_json(chosen.results or Path("outputs/memory", f"{chosen.what}.json"), results | measured_on)
