"""Shared fixtures. Every test makes its own tiny model; nothing is downloaded."""

import functools
import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import pytest
import torch
from accelerate.utils import imports
from datasets import Dataset
from models import CORPUS, tiny_model, tiny_tokenizer
from questions import N, questions

from hf_thinktok import ThinkTokConfig, ThinkTokTrainer, add_thinking_tokens
from hf_thinktok.head import attach_head

torch.set_num_threads(1)
gc.set_threshold(20_000, 50, 50)
# It parses a package's metadata at each call, and is called all the time.
imports._is_package_available = functools.cache(imports._is_package_available)


# Files that take long, most of them because their tests start processes. Last, one of them would keep the workers of all others waiting.
LONG = (
    "test_distributed.py", "test_trainer.py", "test_compare.py", "test_plan.py", "test_toy_recipe.py", "test_other_device.py", "test_recipe.py",
    "test_resume.py", "test_bench.py", "test_hub.py", "test_harness.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="module", autouse=True)
def what_is_loaded_stays():
    """Keeps the libraries out of the garbage collector, which accelerate runs at the end of every training: there, it took a third of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def thinker(tokenizer):
    """A tiny Llama with four thinking tokens and the head attached: model, tokenizer, vocabulary."""
    model = tiny_model("llama", vocab_size=len(tokenizer))
    vocabulary = add_thinking_tokens(model, tokenizer, 4)
    attach_head(model, vocabulary)
    return model, tokenizer, vocabulary


@pytest.fixture
def corpus():
    return Dataset.from_dict({"text": CORPUS})


@pytest.fixture
def resumed(tmp_path):
    """A run without interruption, and one resumed from its checkpoint at half of `max_steps`; their weights are equal bit for bit."""

    def run(make, max_steps=4, **options):
        options |= {"max_steps": max_steps, "save_strategy": "steps", "save_steps": max_steps // 2}
        whole = make(output_dir=str(tmp_path / "whole"), **options)
        whole.train()
        again = make(output_dir=str(tmp_path / "again"), **options)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{max_steps // 2}"))
        for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
            assert torch.equal(a, b), name
        return whole, again

    return run


@pytest.fixture
def make_trainer(tmp_path, corpus):
    """Builds a trainer on a tiny model; keyword arguments are options of ThinkTokConfig, `model`, `family`, `peft_config`, `reward_funcs`, `train_dataset`."""

    def make(
        family="llama",
        model=None,
        tokenizer=None,
        train_dataset=None,
        eval_dataset=None,
        trainer_class=ThinkTokTrainer,
        peft_config=None,
        reward_funcs=None,
        formatting_func=None,
        **options,
    ):
        tokenizer = tokenizer or tiny_tokenizer()
        model = tiny_model(family, vocab_size=len(tokenizer)) if model is None else model
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "bf16": False,
            "use_cpu": True,
            "max_length": 48,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 1,
            "num_think_tokens": 4,
            "num_forks": 3,
            "num_generations": 2,
            "max_think_length": 2,
        }
        extra = {} if reward_funcs is None else {"reward_funcs": reward_funcs}
        return trainer_class(
            model,
            args=ThinkTokConfig(**defaults | options),
            train_dataset=corpus if train_dataset is None else train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            formatting_func=formatting_func,
            **extra,
        )

    return make


@pytest.fixture
def on_questions(make_trainer):
    """A trainer on questions, thoughts of given lengths."""

    def build(rows=None, **options):
        defaults = {"stop": "fixed", "num_forks": 1, "max_think_length": 2, "num_think_tokens": N, "per_device_train_batch_size": 4, "lookahead": 1}
        return make_trainer(train_dataset=questions() if rows is None else rows, **defaults | options)

    return build
