"""What cannot work is refused in one clear sentence, before a model is loaded."""

import copy
import itertools
import json
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from models import CORPUS, TINY, save_tiny, tiny_model, tiny_tokenizer
from peft import AdaLoraConfig, AutoPeftModelForCausalLM, LoraConfig, TaskType, get_peft_model, inject_adapter_in_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerFast
from trl import SFTConfig

import hf_thinktok.loading as loading_module
from hf_thinktok import ThinkTokConfig, ThinkTokTrainer, add_thinking_tokens, errors
from hf_thinktok.checkpoints import PushError
from hf_thinktok.cli import main
from hf_thinktok.data import check_dataset
from hf_thinktok.distributed import check_launcher
from hf_thinktok.loading import check_arguments
from hf_thinktok.results import COMPLETE_FILE
from hf_thinktok.sources import STANDARD_LIBRARY
from hf_thinktok.text import TextArguments, load_text

NOWHERE = "no-such-folder/no-such-model"


@pytest.fixture
def make_config(tmp_path):
    def make(**options):
        return ThinkTokConfig(str(tmp_path / "out"), **{"bf16": False, "use_cpu": True, "report_to": "none", "max_length": 48, "num_forks": 3} | options)

    return make


@pytest.fixture
def no_weights(monkeypatch):
    """Fails as soon as weights would be loaded."""

    def touched(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading_module, "create_model_from_path", touched)


@pytest.fixture
def train(make_config, corpus, no_weights):
    """Starts a trainer on a model that is not there: whatever it says, it says before a model is looked for."""

    def start(model=NOWHERE, train_dataset=corpus, args=None, processing_class=None, options=None, **kwargs):
        args = make_config(**{"max_steps": 1} | (options or {})) if args is None else args
        return ThinkTokTrainer(model, args=args, train_dataset=train_dataset, processing_class=processing_class, **kwargs)

    return start


def one_sentence(error, *words):
    """One line with an end, and the words that tell what to do."""
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    for word in words:
        assert re.search(word, text), f"{word!r} is not in {text!r}"


def test_where_a_sentence_comes_from_can_be_seen(monkeypatch):
    monkeypatch.setenv("THINKTOK_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such thing"), errors.one_sentence():
        raise ValueError("no such thing")
    with pytest.raises(errors.UsageError, match="nowhere"):
        main(["inspect", "nowhere", "a text"])


# ---------------------------------------------------------------- options


BAD_VALUES = [
    ({"dataloader_num_workers": -1}, ["dataloader_num_workers=-1", "at least 0"]),
    ({"report_to": "wandbb"}, ["report_to=wandbb", "set wandb"]),
    ({"num_forks": 3.5}, ["num_forks=3.5 is not made of whole numbers"]),
    ({"num_forks": "3"}, ["num_forks='3' is not made of whole numbers"]),
    ({"num_generations": 2.0}, ["num_generations=2.0 is not made of whole numbers"]),
    ({"lookahead": 1.5, "stop": "fixed"}, ["lookahead=1.5 is not made of whole numbers"]),
    ({"temperature": "hot"}, ["temperature='hot' is not made of numbers"]),
    ({"stop_smoothing": "much"}, ["stop_smoothing='much' is not made of numbers"]),
    ({"think_cost": "high"}, ["think_cost=.*high.* is not made of numbers"]),
    ({"think_cost": ["a", 0.1, 5]}, ["think_cost=.*a.* is not made of numbers"]),
    ({"reward_weights": ["a"]}, ["reward_weights=.*a.* is not made of numbers"]),
    ({"alternate": [1.5, 2]}, ["alternate=.1.5, 2. is not made of whole numbers"]),
    ({"num_generations": 1}, ["num_generations=1", "compare", "2 or more"]),
    ({"num_generations": 0}, ["num_generations=0", "at least 1"]),
    ({"max_think_length": 0}, ["max_think_length=0", "at least 1"]),
    ({"num_forks": -1}, ["num_forks=-1", "at least 0"]),
    ({"alternate": 5}, ["alternate=5", "give a list"]),
    ({"reward_weights": 2.0}, ["reward_weights=2.0", "give a list"]),
    ({"fork_markers": [7], "fork_positions": "markers"}, ["fork_markers=.7.", "put numbers in quotes"]),
    ({"fork_markers": "=", "fork_positions": "markers"}, ["fork_markers='='", "give a list"]),
    ({"num_forks": None}, ["num_forks is null", "its default, 16"]),
    ({"stop_smoothing": None}, ["stop_smoothing is null"]),
    ({"temperature": float("nan")}, ["temperature=nan is not finite"]),
    ({"think_cost": float("inf")}, ["think_cost=.inf. is not finite"]),
    ({"reward_funcs": ["log_prob", len]}, ["reward_funcs", "ThinkTokTrainer", "functions"]),
    ({"learning_rate": -1e-4}, ["learning_rate=-0.0001", "at least 0"]),
    ({"per_device_train_batch_size": 0}, ["per_device_train_batch_size=0", "at least 1"]),
    ({"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps=0", "at least 1"]),
    ({"max_length": -1}, ["max_length=-1", "at least 1"]),
    ({"report_to": "clearml"}, ["report_to=clearml", "not installed", "report_to=none"]),
    ({"num_think_tokens": -4}, ["num_think_tokens=-4"]),
    ({"num_iterations": 0}, ["num_iterations=0"]),
    ({"top_k": -1}, ["top_k=-1"]),
    ({"revive_every": -1, "stop": "fixed"}, ["revive_every=-1", "at least 0"]),
    ({"revive_every": 2.5, "stop": "fixed"}, ["revive_every=2.5", "whole numbers"]),
    ({"revive_every": 3, "num_iterations": 2, "stop": "fixed"}, ["revive_every must be a multiple of num_iterations"]),
    ({"revive_every": 5, "stop": "learned"}, ["revive_every", "last token", "stop=fixed or stop=sampled"]),
    ({"revive_every": 5, "stop": "fixed", "policies": "split"}, ["policies=split", "revive_every=0"]),
    *(({"revive_every": 5, "stop": "fixed", "freeze": frozen}, [f"freeze={frozen}", "revive_every", "choose one"]) for frozen in ("thinker", "speaker")),
    ({"revive_every": 5, "stop": "fixed", "thoughts": "filler"}, ["revive_every=5", "no effect", "thoughts=discrete"]),
    ({"markovian_share": 1.5}, ["markovian_share=1.5", "between 0 and 1"]),
    ({"markovian_share": 0.1}, ["markovian_share=0.1 of num_generations=4", "none or all", "change one of the two"]),
    ({"markovian_share": 0.75, "search": 8}, ["markovian_share=0.75 of num_generations=4", "all of those that are drawn"]),
    ({"markovian_share": 1.0}, ["markovian_share=1.0 of num_generations=4", "none or all"]),
    ({"markovian_share": 0.5, "blind": True}, ["blind", "markovian_share", "choose one"]),
    ({"markovian_share": 0.5, "engine": "replicated"}, ["markovian_share", "set engine=auto or tree"]),
    ({"markovian_share": 0.5, "max_think_length": 1}, ["markovian_share=0.5", "no effect", "max_think_length above 1"]),
    ({"markovian_share": 0.5, "thoughts": "gumbel", "stop": "fixed"}, ["markovian_share=0.5", "no effect", "thoughts=discrete"]),
    ({"markovian_share": 0.5, "thoughts": "text", "stop": "fixed", "max_think_length": 4}, ["markovian_share=0.5", "no effect", "thoughts=discrete"]),
    ({"epsilon": "0.2", "num_iterations": 2}, ["epsilon='0.2' is not made of numbers"]),
    ({"epsilon": -0.5, "num_iterations": 2}, ["epsilon=-0.5", "between 0 and 1"]),
    ({"epsilon_high": -0.5, "num_iterations": 2}, ["epsilon_high=-0.5", "at least 0"]),
    ({"delta": 1.1, "num_iterations": 2}, ["delta=1.1", r"above 1 \+ epsilon_high, here 1.2"]),
    ({"continuous_layer": 1.0, "thoughts": "continuous", "stop": "fixed"}, ["continuous_layer=1.0 is not made of whole numbers"]),
    ({"search": True}, ["search=True is not made of numbers"]),
    ({"curriculum_threshold": True, "max_steps": 2}, ["curriculum_threshold=True is not made of numbers"]),
    ({"alternate": [4, 1], "max_steps": 4}, ["alternate=.4, 1.", "no turn in 4 steps", "freeze=thinker"]),
    ({"reward_funcs": "no_such_module.surprise"}, ["no_such_module.surprise", "cannot be imported", "MODULE.FUNCTION"]),
    ({"reward_funcs": "math.no_such_function"}, ["math.no_such_function", "cannot be imported"]),
    ({"curriculum_threshold": 0.9, "max_steps": -1, "num_forks": 0}, ["curriculum_threshold draws rows step by step: set max_steps"]),
    ({"max_nonfinite_steps": 0}, ["max_nonfinite_steps=0"]),
    ({"num_completions_to_print": 0, "log_completions": True}, ["num_completions_to_print=0"]),
    ({"num_forks": 48}, ["num_forks=48", "max_length=48", "do not fit"]),
    ({"num_forks": 500}, ["num_forks=500", "max_length=48", "lower num_forks"]),
    ({"lookahead": 0}, ["lookahead=0", "at least 1", "null"]),
    ({"lookahead": 48, "stop": "sampled"}, ["lookahead=48", "leaves no room in a row", "max_length=48"]),
    ({"temperature": 0.0}, ["temperature=0.0", "above 0"]),
    ({"stop_smoothing": 1.5}, ["stop_smoothing=.1.5.", "between 0 and 1"]),
    ({"gate_smoothing": [1.0, 1.5, 10]}, ["gate_smoothing=.1.0, 1.5, 10.", "between 0 and 1"]),
    ({"epsilon_greedy": [0.5, 2.0, 10]}, ["epsilon_greedy=.0.5, 2.0, 10.", "between 0 and 1"]),
    ({"top_p": -0.1}, ["top_p=-0.1", "between 0 and 1"]),
    ({"min_p": 1.5}, ["min_p=1.5", "between 0 and 1"]),
    *(({name: -0.5}, [f"{name}=-0.5", "negative"]) for name in ("think_loss_weight", "think_ce_weight", "beta")),
    *(
        ({name: "sometimes"}, [f"{name}='sometimes'", "one of", known])
        for name, known in {
            "fork_positions": "entropy",
            "stop": "learned",
            "memory": "persistent",
            "engine": "replicated",
            "objective": "marginal",
            "advantage": "loo",
            "scale_rewards": "batch",
            "think_loss_type": "dr_grpo",
            "importance_sampling_level": "sequence",
        }.items()
    ),
    ({"think_start": -1}, ["think_start=-1", "at least 0"]),
    ({"think_start": 1, "num_iterations": 2}, ["think_start must be a multiple of num_iterations=2"]),
    ({"posterior_temperature": 0.0, "objective": "marginal"}, ["posterior_temperature=0.0", "above 0"]),
    ({"curriculum_threshold": 1.5}, ["curriculum_threshold=.1.5.", "between 0 and 1"]),
    ({"coverage_decay": 1.0, "coverage_coef": 0.3, "stop": "fixed"}, ["coverage_decay=1.0 keeps", "set it below 1"]),
    ({"reward_funcs": []}, ["reward_funcs is empty", "name a reward"]),
    ({"learning_rate": "5e-5"}, ["learning_rate='5e-5' is not made of numbers"]),
    ({"max_length": "512"}, ["max_length='512' is not made of whole numbers"]),
    ({"per_device_train_batch_size": "2"}, ["per_device_train_batch_size='2' is not made of whole numbers"]),
    ({"curriculum_threshold": []}, ["curriculum_threshold=..", "one number"]),
    ({"curriculum_threshold": [0.9, "0.8"]}, ["curriculum_threshold", "numbers"]),
    *(
        (
            {"curriculum_threshold": 0.9, "max_steps": 4, "curriculum_think_length": lengths} | more,
            [f"curriculum_think_length={re.escape(str(lengths))}", words],
        )
        for lengths, more, words in (
            ([], {}, "a whole number for each level"),
            ([0, 3], {}, "to max_think_length=4"),
            ([2, 1, 4], {}, "must rise"),
            ([-1, 4], {}, "from 0 or more"),
            ([0, 4], {"blind": True}, "from 1 or more"),
            ([0, 1.5, 4], {}, "whole numbers"),
            (4, {}, "is no list"),
        )
    ),
    ({"alternate": [3]}, ["alternate=.3.", "two numbers"]),
    ({"alternate": [0, 3]}, ["alternate=.0, 3.", "at least 1"]),
    *(
        ({name: value}, [f"{name}=", "no schedule", "start, end and the steps"])
        for name in ("search", "coverage_coef", "balance_coef", "thought_entropy_target", "epsilon_greedy", "think_cost", "stop_smoothing", "gate_smoothing")
        for value in ([], [0.1, 0.2], [-0.1], [0.3, 0.0, 0], [0.3, 0.0, 10, -1], [0.3, 0.0, 10, 1, 1])
    ),
    *(
        ({name: "nobody"}, [f"{name}='nobody'", "one of", known])
        for name, known in {"policies": "split", "freeze": "speaker", "thoughts": "filler", "balance_given": "token"}.items()
    ),
    ({"reward_funcs": ["log_prob", "acuracy"]}, ["'acuracy'", "did you mean 'accuracy'", "information_gain"]),
    ({"reward_funcs": ["log_prob", "prob"], "reward_weights": [1.0]}, ["reward_weights has 1", "reward_funcs 2"]),
    ({"reward_funcs": "prob", "reward_weights": [1.0, 2.0]}, ["reward_weights has 2", "reward_funcs 1"]),
]
# What cannot be done together.
BAD_FITS = [
    ({"lookahead": 2}, ["stop=learned", "one judged token", "lookahead=1"]),
    ({"lookahead": None}, ["stop=learned", "one judged token"]),
    ({"advantage": "token", "lookahead": 2, "stop": "fixed"}, ["advantage=token", "lookahead=1"]),
    ({"advantage": "token", "stop": "sampled"}, ["advantage=token", "stop=sampled", "stop=learned or stop=fixed"]),
    ({"blind": True, "memory": "persistent"}, ["blind", "memory=persistent", "choose one"]),
    ({"blind": True, "advantage": "token"}, ["blind", "advantage=token", "group, loo or value"]),
    ({"fork_positions": "markers"}, ["fork_positions=markers", "fork_markers"]),
    ({"fork_positions": "markers", "fork_markers": ["A:", ""]}, ["fork_markers"]),
    ({"loss_type": "dft"}, ["loss_type=dft", "not supported"]),
    ({"label_smoothing_factor": 0.1}, ["label_smoothing_factor", "not supported"]),
    ({"padding_free": True}, ["padding_free", "packing=True"]),
    ({"use_liger_kernel": True}, ["use_liger_kernel", "leave it out"]),
    ({"num_iterations": 2, "save_steps": 3}, ["save_steps", "multiple of num_iterations"]),
    ({"search": 8, "search_changes": 0, "stop": "fixed"}, ["search_changes=0", "at least 1"]),
    ({"search": [0.0, 0.4, 100], "stop": "fixed"}, ["search=", "never as much as one candidate"]),
    ({"search": 8, "stop": "sampled"}, ["search", "stop=fixed or stop=learned"]),
    ({"curriculum_threshold": 0.9, "max_steps": 9, "dataloader_num_workers": 2}, ["dataloader_num_workers", "set dataloader_num_workers=0"]),
    ({"supply_thoughts": True}, ["supply_thoughts", "stop=fixed"]),
    ({"supply_thoughts": True, "stop": "fixed"}, ["supply_thoughts", "num_forks=1"]),
    ({"supply_thoughts": True, "stop": "fixed", "num_forks": 1, "search": 8}, ["supply_thoughts and search", "choose one"]),
    ({"supply_thoughts": True, "stop": "fixed", "num_forks": 1, "num_generations": 2}, ["num_generations=2", "set num_generations to 3"]),
    (
        {"supply_thoughts": True, "stop": "fixed", "num_forks": 1, "num_generations": 3, "objective": "marginal", "posterior_smoothing": 0.1},
        ["posterior_smoothing=0.1 has no effect", "no supply_thoughts"],
    ),
    ({"advantage": "value", "num_generations": 1, "scale_rewards": "group"}, ["scale_rewards=group", "set num_generations"]),
    ({"advantage": "loo", "num_generations": 1}, ["num_generations=1", "set num_generations to 2"]),
    ({"rollout": "free", "packing": True}, ["rollout=free", "packing=False"]),
    ({"teacher": "x", "num_iterations": 2, "save_steps": 2}, ["A teacher", "num_iterations > 1"]),
    ({"rollout": "free", "thoughts": "text", "stop": "fixed"}, ["rollout=free", "thoughts=discrete or gumbel"]),
    ({"rollout": "free", "supply_thoughts": True, "num_forks": 1, "stop": "fixed"}, ["rollout=free", "leave supply_thoughts"]),
    ({"rollout": "free", "prompt_length": 64, "max_length": 64}, ["prompt_length=64", "max_length=64"]),
    ({"advantage": "value", "num_iterations": 2, "save_steps": 2}, ["advantage=value", "num_iterations > 1"]),
    ({"thoughts": "text", "stop": "fixed", "num_generations": 1}, ["num_generations=1", "set num_generations to 2"]),
    ({"rollout": "free", "policies": "split"}, ["rollout=free", "policies=shared"]),
    ({"teacher": "x", "num_think_tokens": 0}, ["teacher", "num_forks=0"]),
    ({"thoughts": "text"}, ["thoughts=text", "set stop=fixed"]),
    *(
        ({"thoughts": "text", "stop": "fixed", **options}, ["thoughts=text", *words])
        for options, words in [
            ({"max_think_length": 2}, ["max_think_length=2", "3 or more"]),
            ({"num_think_tokens": 1}, ["num_think_tokens=1", "2 or more"]),
            ({"temperature": 0.7}, ["temperature=0.7", "temperature=1"]),
            ({"memory": "persistent"}, ["memory=none"]),
            ({"advantage": "token"}, ["advantage=group, loo or value"]),
        ]
    ),
    ({"num_think_tokens": 1}, ["thoughts=discrete", "num_think_tokens=1", "set thoughts=filler", "2 or more"]),
    ({"num_think_tokens": 1, "thoughts": "gumbel", "stop": "fixed"}, ["thoughts=gumbel", "nothing to choose from", "set thoughts=filler"]),
    ({"reward_funcs": ["exact"]}, ["exact", "supply_thoughts=True"]),
    ({"curriculum_threshold": 0.9}, ["curriculum_threshold", "set max_steps"]),
    ({"num_forks": 0, "text_ce_weight": 0.0}, ["num_forks=0", "set text_ce_weight above 0"]),
    ({"advantage": "value", "num_generations": 1, "search": 4}, ["num_generations=1", "set num_generations to 2"]),
    ({"curriculum_threshold": 0.9, "max_steps": 4, "num_iterations": 2, "save_steps": 2}, ["curriculum_threshold", "num_iterations"]),
    ({"policies": "split", "beta": 0.1}, ["policies=split", "beta=0"]),
    ({"policies": "split", "memory": "persistent"}, ["policies=split", "memory=none"]),
    ({"thoughts": "filler", "stop": "fixed", "policies": "split"}, ["policies=split", "set policies=shared"]),
    ({"thoughts": "filler", "blind": True}, ["thoughts=filler", "blind=False"]),
    ({"thoughts": "filler", "stop": "sampled", "num_generations": 1}, ["num_generations=1", "set num_generations to 2 or more"]),
    ({"thoughts": "filler", "stop": "sampled", "search": 4}, ["search", "stop=fixed or stop=learned"]),
    ({"thoughts": "filler", "stop": "sampled", "top_k": 4}, ["top_k=4", "thoughts=discrete or"]),
    ({"think_start": 5, "text_ce_weight": 0.0}, ["think_start", "text_ce_weight above 0"]),
    ({"router_aux_loss_coef": 0.01}, ["router_aux_loss_coef", "not supported"]),
    ({"neftune_noise_alpha": 5.0}, ["neftune_noise_alpha", "leave it out"]),
    ({"think_start": 2, "max_steps": 2}, ["think_start=2 is not reached in a run of 2 steps"]),
    ({"coverage_coef": [0, 0.3, 50, 7], "think_start": 2, "max_steps": 9}, ["coverage_coef=.0, 0.3, 50, 7. is 0", "the 7 steps in which", "begin earlier"]),
    ({"curriculum_threshold": 0.9, "max_steps": 9, "alternate": [2, 1]}, ["alternate takes its turns by it", "leave one"]),
    ({"curriculum_threshold": 0.9, "max_steps": 9, "ignore_data_skip": True}, ["ignore_data_skip=True begins to count anew"]),
    ({"debug": "underflow_overflow"}, ["leave debug out"]),
    ({"debug": ["underflow_overflow"]}, ["leave debug out"]),
    ({"memory": "persistent"}, ["stop=learned", "memory=persistent", "stop=sampled or stop=fixed"]),
    ({"memory": "persistent", "stop": "fixed", "search": 4}, ["search", "memory=none"]),
    (
        {"memory": "persistent", "stop": "sampled", "lookahead": 3, "reward_funcs": ["information_gain"]},
        ["information_gain", "memory=persistent", "lookahead=1, or log_prob"],
    ),
    ({"fork_positions": "markers", "fork_markers": "A: "}, ["fork_markers='A: '", "a list"]),
    ({"think_init_words": "no"}, ["think_init_words='no'", "a list"]),
    ({"think_init_words": [0, 1]}, ["think_init_words=.0, 1.", "put numbers in quotes"]),
    ({"think_init_words": ["no"], "num_think_tokens": 0}, ["think_init_words", "num_think_tokens=0", "leave it out"]),
]
NO_EFFECT = [
    ({"prompt_length": 5}, ["prompt_length=5", "rollout=free"]),
    ({"fork_markers": ["A:"]}, ["fork_markers", "fork_positions=markers"]),
    ({"fork_positions": "all", "num_forks": 3}, ["num_forks=3", "fork_positions other than all"]),
    ({"stop": "fixed", "stop_smoothing": 0.1}, ["stop_smoothing=.0.1.", "stop=learned"]),
    ({"stop": "sampled", "stop_smoothing": 0.1}, ["stop_smoothing=.0.1.", "stop=learned"]),
    ({"stop": "sampled", "gate_smoothing": 0.1}, ["gate_smoothing=.0.1.", "stop=learned and gate_loss_weight above 0"]),
    ({"stop": "learned", "gate_loss_weight": 0.0, "gate_smoothing": 0.1}, ["gate_smoothing=.0.1.", "gate_loss_weight above 0"]),
    ({"stop": "fixed", "gate_loss_weight": 0.1}, ["gate_loss_weight=0.1", "stop=learned"]),
    ({"stop": "learned", "freeze": "thinker", "gate_loss_weight": 0.1}, ["gate_loss_weight=0.1", "frozen thinker"]),
    ({"stop": "sampled", "detach_gate": True}, ["detach_gate=True", "stop=learned and gate_loss_weight above 0"]),
    ({"stop": "learned", "gate_loss_weight": 0.0, "detach_gate": True}, ["detach_gate=True", "gate_loss_weight above 0"]),
    ({"stop": "learned", "freeze": "thinker", "detach_gate": True}, ["detach_gate=True", "frozen thinker"]),
    ({"stop": "fixed", "think_cost": 0.1}, ["think_cost=.0.1.", "stop=learned or stop=sampled"]),
    ({"stop": "learned", "think_loss_type": "cispo"}, ["think_loss_type='cispo'", "stop=sampled, or stop=fixed with"]),
    ({"stop": "learned", "num_iterations": 2, "think_loss_type": "dapo"}, ["think_loss_type='dapo'", "stop=sampled, or stop=fixed with"]),
    ({"objective": "marginal", "advantage": "loo"}, ["advantage='loo'", "objective=expected"]),
    ({"objective": "marginal", "scale_rewards": "group"}, ["scale_rewards='group'", "objective=expected"]),
    ({"objective": "marginal", "reward_funcs": ["prob"]}, ["reward_funcs=", "objective=expected"]),
    ({"objective": "marginal", "reward_weights": [2.0]}, ["reward_weights=", "objective=expected"]),
    ({"advantage": "token", "reward_funcs": ["accuracy"]}, ["reward_funcs=", "advantage=group, loo or value"]),
    ({"advantage": "token", "reward_weights": [2.0]}, ["reward_weights=", "advantage=group, loo or value"]),
    ({"search": 16, "num_think_tokens": 4, "max_think_length": 2, "search_random": 0.2}, ["search_random=0.2", "search below 16"]),
    ({"search": 16, "num_think_tokens": 4, "max_think_length": 2, "search_changes": 1}, ["search_changes=1", "search below 16"]),
    (
        {"num_iterations": 2, "importance_sampling_level": "sequence", "stop": "fixed", "max_think_length": 1},
        ["importance_sampling_level='sequence'", "more than one choice"],
    ),
    ({"objective": "marginal", "freeze": "thinker", "think_ce_weight": 0.0, "stop": "fixed"}, ["objective='marginal'", "a speaker that learns"]),
    ({"epsilon": 0.1}, ["epsilon=0.1", "num_iterations > 1"]),
    ({"epsilon": 0.1, "num_iterations": 2, "think_loss_type": "cispo"}, ["epsilon=0.1", "other than cispo"]),
    ({"epsilon_high": 0.3}, ["epsilon_high=0.3", "num_iterations > 1"]),
    ({"delta": 2.0}, ["delta=2.0", "num_iterations > 1"]),
    ({"delta": 2.0, "num_iterations": 2, "think_loss_type": "cispo"}, ["delta=2.0", "other than cispo"]),
    ({"importance_sampling_level": "sequence"}, ["importance_sampling_level='sequence'", "num_iterations > 1"]),
    ({"importance_sampling_level": "sequence", "num_iterations": 2, "freeze": "thinker"}, ["importance_sampling_level=", "freeze=none or speaker"]),
    ({"epsilon": 0.1, "num_iterations": 2, "think_loss_weight": 0.0}, ["epsilon=0.1", "think_loss_weight above 0"]),
    ({"posterior_temperature": 0.5}, ["posterior_temperature=0.5", "objective=marginal"]),
    ({"posterior_smoothing": 0.5}, ["posterior_smoothing=0.5", "objective=marginal"]),
    ({"thought_ce_weight": 0.5}, ["thought_ce_weight=0.5", "supply_thoughts=True"]),
    ({"speaker_learning_rate": 1e-3}, ["speaker_learning_rate=0.001", "policies=split"]),
    ({"search_random": 0.1}, ["search_random=0.1", "search"]),
    ({"search_changes": 1}, ["search_changes=1", "search"]),
    ({"search_changes": 4, "search": 8, "max_think_length": 4, "stop": "fixed"}, ["search_changes=4", "max_think_length above it"]),
    ({"blind": True, "max_think_length": 1, "stop": "sampled"}, ["stop='sampled'", "under blind"]),
    ({"blind": True, "max_think_length": 1, "think_cost": 0.1}, ["think_cost=", "under blind max_think_length above 1"]),
    ({"blind": True, "max_think_length": 1, "detach_gate": True}, ["detach_gate=True", "under blind max_think_length above 1"]),
    ({"coverage_decay": 0.1}, ["coverage_decay=0.1", "coverage_coef"]),
    ({"coverage_of": "token"}, ["coverage_of='token'", "coverage_coef"]),
    ({"coverage_of": "token", "coverage_coef": [0.1], "max_think_length": 1}, ["coverage_of='token'", "max_think_length above 1"]),
    ({"coverage_where": "unsolved"}, ["coverage_where='unsolved'", "coverage_coef"]),
    ({"balance_given": "token"}, ["balance_given='token'", "balance_coef"]),
    ({"balance_given": "token", "balance_coef": [0.1], "max_think_length": 1}, ["balance_given='token'", "max_think_length above 1"]),
    ({"curriculum_replay": 0.1}, ["curriculum_replay=0.1", "curriculum_threshold"]),
    ({"curriculum_think_length": [0, 4]}, ["curriculum_think_length=.0, 4.", "curriculum_threshold and stop=learned"]),
    ({"curriculum_think_length": [0, 4], "curriculum_threshold": 0.9, "max_steps": 4, "stop": "fixed"}, ["curriculum_think_length", "stop=learned"]),
    ({"advantage": "token", "coverage_coef": [0.1]}, ["coverage_coef=.0.1.", "objective=marginal"]),
    ({"num_iterations": 2, "train_sampling_strategy": "group_by_length"}, ["train_sampling_strategy='group_by_length'", "num_iterations=1"]),
    *(
        ({"thoughts": "filler", "stop": "fixed", name: value}, [f"{name}=", "thoughts=discrete or"])
        for name, value in {
            "search": 4,
            "epsilon_greedy": [0.1],
            "coverage_coef": [0.1],
            "balance_coef": [0.1],
            "thought_entropy_target": [0.1],
            "beta": 0.1,
            "advantage": "loo",
            "think_loss_weight": 2.0,
            "temperature": 0.5,
            "reward_funcs": ["accuracy"],
        }.items()
    ),
    *(
        ({"thoughts": "text", "stop": "fixed", name: value}, [f"{name}=", "thoughts=discrete", "real vocabulary"])
        for name, value in {"search": 4, "balance_coef": [0.1], "thought_entropy_target": [0.1], "top_k": 3, "min_p": 0.1}.items()
    ),
    *(
        ({frozen: value, name: given}, [f"{name}=", "freeze=none or speaker"])
        for frozen, value in {"freeze": "thinker", "think_loss_weight": 0.0}.items()
        for name, given in {"beta": 0.1, "think_loss_type": "bnpo", "reward_funcs": ["prob"], "reward_weights": [2.0], "advantage": "loo"}.items()
    ),
    *(
        ({"freeze": "thinker", name: given}, [f"{name}=", "freeze=none or speaker"])
        for name, given in {"balance_coef": [0.1], "thought_entropy_target": [0.1], "think_cost": [0.1], "think_loss_weight": 2.0}.items()
    ),
    ({"freeze": "thinker", "coverage_coef": [0.1]}, ["coverage_coef=", "search"]),
    ({"think_loss_weight": 0.0, "stop": "sampled", "think_cost": 0.1}, ["think_cost=.0.1.", "think_loss_weight above 0"]),
    ({"think_loss_weight": 0.0, "gate_loss_weight": 0.0, "think_cost": 0.1}, ["think_cost=.0.1.", "a gate that learns"]),
    *(({"freeze": frozen, "alternate": [1, 1]}, ["alternate=.1, 1.", "freeze=none"]) for frozen in ("thinker", "speaker")),
    ({"freeze": "speaker", "think_ce_weight": 2.0}, ["think_ce_weight=2.0", "freeze=none or thinker"]),
    ({"objective": "marginal", "stop": "fixed", "think_ce_weight": 0.0, "posterior_smoothing": 0.1}, ["posterior_smoothing=0.1", "think_ce_weight above 0"]),
    ({"num_completions_to_print": 3}, ["num_completions_to_print=3", "log_completions=True"]),
]


def named(options):
    return "-".join(f"{k}={v}" for k, v in options.items()) if isinstance(options, dict) else ""


@pytest.mark.parametrize(("options", "words"), [*BAD_VALUES, *BAD_FITS], ids=named)
def test_options_that_cannot_be(make_config, options, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        make_config(**options)
    one_sentence(error, *words)


@pytest.mark.parametrize(("options", "words"), NO_EFFECT, ids=named)
def test_options_without_effect(make_config, options, words):
    with pytest.raises(ValueError, match="has no effect here") as error:
        make_config(**options)
    one_sentence(error, *words, "Leave .* out or change that")


@pytest.mark.parametrize("off", [{"num_think_tokens": 0}, {"num_forks": 0}], ids=named)
def test_the_control_arm_takes_every_option(make_config, off):
    """One recipe serves both arms: with thinking switched off nothing about thinking can be wrong together."""
    assert not make_config(**{"stop": "fixed", "think_cost": 0.1, "epsilon": 0.1} | off).thinks
    with pytest.raises(ValueError, match="stop='sometimes'"):
        make_config(**{"stop": "sometimes"} | off)


@pytest.mark.parametrize(
    "options", [{"markovian_share": 0.5}, {"fork_positions": "markers", "fork_markers": ["no such text"]}, {"curriculum_threshold": 0.9}], ids=named
)
def test_the_control_arm_trains_whatever_its_recipe_thinks_like(make_trainer, options):
    rows = Dataset.from_dict({"text": CORPUS, "level": [1, 2] * (len(CORPUS) // 2)})
    trainer = make_trainer(train_dataset=rows, num_forks=0, num_generations=4, **options)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("options", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}], ids=named)
def test_text_losses_that_a_model_with_thoughts_does_not_take(make_config, options):
    """Also without forks: the loss of the text is the trainer's own as soon as there are thinking tokens."""
    with pytest.raises(ValueError, match="not supported") as error:
        make_config(num_forks=0, **options)
    one_sentence(error)
    assert make_config(num_think_tokens=0, **options)


def refused(stop, objective, memory, blind, advantage):
    """The combinations that the design rules out."""
    token = advantage == "token" and (stop == "sampled" or blind)
    return (memory == "persistent" and (blind or stop == "learned")) or token or (objective == "marginal" and advantage != "group")


COMBINATIONS = list(
    itertools.product(("fixed", "learned", "sampled"), ("expected", "marginal"), ("none", "persistent"), (False, True), ("group", "loo", "token", "value"))
)
# Enough thoughts for a gate that is nearly closed to open for some.
MANY = {"max_steps": 1, "max_length": 20, "num_forks": 8, "num_generations": 4, "per_device_train_batch_size": 4}
ALLOWED = [c for c in COMBINATIONS if not refused(*c)]


def test_combinations_that_are_refused(make_config):
    for stop, objective, memory, blind, advantage in set(COMBINATIONS) - set(ALLOWED):
        with pytest.raises(ValueError, match="blind|advantage|memory=persistent"):
            make_config(stop=stop, objective=objective, memory=memory, blind=blind, advantage=advantage)


@pytest.mark.parametrize(("stop", "objective", "memory", "blind", "advantage"), ALLOWED)
def test_combinations_that_are_allowed_train(make_trainer, stop, objective, memory, blind, advantage):
    trainer = make_trainer(stop=stop, objective=objective, memory=memory, blind=blind, advantage=advantage, **MANY)
    before = trainer.model.get_input_embeddings().weight.detach().clone()
    assert trainer.train().training_loss > 0
    after = trainer.model.get_input_embeddings().weight.detach()
    assert after.isfinite().all()
    assert not after[list(trainer.vocabulary.ids)].equal(before[list(trainer.vocabulary.ids)])
    assert trainer.guard.total == 0


VALID = [
    {"think_cost": [0.0, 0.3, 100], "coverage_coef": 0.1},
    {"advantage": "value", "num_generations": 1},
    {"lookahead": None, "stop": "sampled"},
    {"lookahead": 47, "stop": "fixed"},
    {"num_forks": 47},
    {"num_forks": 2000, "max_length": None, "stop": "fixed", "lookahead": 9},
    {"fork_positions": "all", "num_forks": 16, "max_length": 8},
    {"fork_positions": "markers", "fork_markers": ["A:", "="]},
    {"num_iterations": 2, "save_steps": 4, "epsilon": 0.1, "epsilon_high": 0.3, "delta": 2.0},
    {"num_iterations": 2, "save_steps": 3, "save_strategy": "no"},
    {"num_iterations": 2, "think_loss_type": "cispo", "epsilon_high": 0.3},
    {"reward_funcs": ["accuracy", "prob"], "reward_weights": [1.0, 0.5], "scale_rewards": "batch"},
    {"stop": "sampled", "think_cost": 0.1, "objective": "marginal"},
    {"think_loss_weight": 0.0, "think_cost": 0.1},  # the gate pays it
    {"think_loss_weight": 0.0, "gate_loss_weight": 0.0, "think_cost": 0.1, "search": 4},  # a shorter thought is a better one
    {"log_completions": True, "num_completions_to_print": 2},
    {"beta": 0.1, "temperature": 0.7, "top_k": 2, "top_p": 0.9, "min_p": 0.1},
    {"num_forks": np.int64(3), "think_ce_weight": np.float32(0.5), "beta": 1},
]


@pytest.mark.parametrize("options", VALID, ids=named)
def test_options_that_fit(make_config, options):
    config = make_config(**options)
    assert config.thinks
    assert all(getattr(config, name) in (value, [value]) for name, value in options.items()), "a schedule may be one number"


# ---------------------------------------------------------------- rewards given to the trainer


def test_unknown_reward_of_the_trainer(train):
    with pytest.raises(ValueError, match="'informaton_gain'; did you mean 'information_gain'") as error:
        train(reward_funcs=["informaton_gain"])
    one_sentence(error)


def test_a_reward_by_its_place(make_trainer, tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text("def by_length(lengths, **kwargs):\n    return -lengths.float()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])  # as for a recipe
    trainer = make_trainer(reward_funcs=["log_prob", "rewards_of_mine.by_length"], stop="fixed", max_steps=1)
    trainer.train()
    assert [entry["rewards/by_length"] for entry in trainer.state.log_history if "rewards/by_length" in entry] == [-2.0]


@pytest.mark.parametrize(
    ("reward", "options", "told"),
    [("information_gain", {"memory": "persistent", "stop": "fixed", "lookahead": 3}, "lookahead=1, or log_prob"), ("exact", {}, "set supply_thoughts=True")],
)
def test_rewards_of_the_trainer_that_cannot_be_told(train, reward, options, told):
    """As where the options name them."""
    with pytest.raises(ValueError, match=told) as error:
        train(reward_funcs=reward, options=options)
    one_sentence(error)


def test_no_weights_for_the_trainers_rewards(train):
    with pytest.raises(ValueError, match="reward_weights has 0 entries for 1 rewards"):
        train(options={"reward_weights": []})


def test_weights_of_the_trainers_rewards(train):
    with pytest.raises(ValueError, match="reward_weights") as error:
        train(reward_funcs=["log_prob", "prob"], options={"reward_weights": [1.0]})
    one_sentence(error, "1 entries", "2 rewards")


def test_functions_can_be_weighted(make_trainer):
    """Reward functions are passed to the trainer and their weights stand in the config: the config alone cannot tell how many there are."""

    def long_words(logps, mask, **kwargs):
        return logps.sum(-1)

    trainer = make_trainer(reward_funcs=["log_prob", long_words], reward_weights=[1.0, 0.5])
    assert trainer.reward_weights == [1.0, 0.5]


def test_rewards_that_cannot_be_called(train):
    for rewards, words in (
        ([lambda completions, **kwargs: [1.0]], ["<lambda>", "missing a required argument: 'completions'", "logps, correct"]),
        ([lambda logps: logps.sum(-1)], ["<lambda>", "unexpected keyword argument 'correct'", "kwargs"]),
        (torch.mean, ["mean", "no signature"]),
        (3, ["int", "3 is not a callable object"]),
        (["log_prob", None], ["NoneType", "None is not a callable object"]),
    ):
        with pytest.raises(ValueError, match="The reward .* cannot be called") as error:
            train(reward_funcs=rewards)
        one_sentence(error, *words)


@pytest.mark.parametrize(
    ("reward", "found"),
    [
        (lambda logps, **kwargs: logps, "a tensor of shape .2, 3, 2, 1."),
        (lambda logps, **kwargs: logps.mean((-1, -2))[..., None], "a tensor of shape .2, 3, 1."),
        (lambda **kwargs: 1.0, "a float"),
    ],
)
def test_rewards_that_return_something_else(make_trainer, reward, found):
    with pytest.raises(ValueError, match="it must return a tensor") as error:
        make_trainer(reward_funcs=[reward]).train()
    one_sentence(error, f"The reward <lambda> returned {found}", "here .2, 3, 2.")


def test_rewards_of_one_name_are_told_apart(make_trainer):
    trainer = make_trainer(reward_funcs=["prob", lambda logps, **kwargs: logps[..., 0], lambda logps, **kwargs: 3 * logps[..., 0]], max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert float(logged["rewards/<lambda>_2"]) == pytest.approx(3 * float(logged["rewards/<lambda>_1"]), rel=1e-3)
    assert "rewards/prob" in logged


@pytest.mark.parametrize("options", [{"objective": "marginal"}, {"advantage": "token"}, {"freeze": "thinker"}, {"think_loss_weight": 0.0}], ids=named)
def test_rewards_of_the_trainer_without_effect(train, options):
    with pytest.raises(ValueError, match="reward_funcs.*no effect") as error:
        train(reward_funcs=["accuracy"], options=options)
    one_sentence(error)


# ---------------------------------------------------------------- arguments and data


@pytest.mark.parametrize(
    "args", [lambda folder: SFTConfig(folder, bf16=False, use_cpu=True, report_to="none"), lambda folder: {"output_dir": folder}], ids=["SFTConfig", "dict"]
)
def test_wrong_arguments(train, tmp_path, args):
    with pytest.raises(TypeError, match="needs a ThinkTokConfig") as error:
        train(args=args(str(tmp_path)))
    one_sentence(error, "args is a (SFTConfig|dict)")


BAD_DATA = {
    "missing": (lambda: None, {}, ["train_dataset is missing"]),
    "list": (lambda: [{"text": "a"}], {}, ["is a list", "datasets.Dataset", "Dataset.from_list"]),
    "no text column": (lambda: Dataset.from_dict({"body": CORPUS}), {}, ["columns", "'body'", "no 'text'", "dataset_text_field"]),
    "other text column": (lambda: Dataset.from_dict({"text": CORPUS}), {"dataset_text_field": "body"}, ["no 'body'", "dataset_text_field"]),
    "empty": (lambda: Dataset.from_dict({"text": []}), {}, ["train data set is empty"]),
    "all splits": (
        lambda: DatasetDict(train=Dataset.from_dict({"text": CORPUS}), test=Dataset.from_dict({"text": CORPUS})),
        {},
        ["train data set is a DatasetDict", "one of its splits .train, test."],
    ),
    "types of loss, one length": (
        lambda: Dataset.from_dict({"text": CORPUS}),
        {"stop": "fixed", "think_loss_type": "dapo"},
        ["think_loss_type='dapo'", "column think_length"],
    ),
    "empty row": (lambda: Dataset.from_dict({"text": ["a b c"] * 20 + [""]}), {}, ["Row 20", "no text", "filter"]),
    "blank row": (lambda: Dataset.from_dict({"text": ["a b c", " \n\t", "d"]}), {}, ["Row 1 ", "no text"]),
    "row without": (lambda: Dataset.from_dict({"text": ["a b c", None]}), {}, ["Row 1 ", "no text"]),
    "no strings": (lambda: Dataset.from_dict({"text": [1, 2]}), {}, ["Row 0 ", "has a int in 'text'", "where a text is due"]),
    "prompts and text": (lambda: Dataset.from_dict({"prompt": CORPUS, "text": CORPUS}), {}, ["prompts and no column 'completion'", "drop the column"]),
    "prompts alone": (lambda: Dataset.from_dict({"prompt": CORPUS}), {}, ["prompts and no column 'completion'", "add what follows"]),
    "no completion": (lambda: Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", None]}), {}, ["Row 1 ", "no text in 'completion'"]),
    "labels beside a text": (lambda: Dataset.from_dict({"text": CORPUS, "labels": [[3]] * 32}), {}, ["column 'labels' that is not one for each", "drop it"]),
    "too few labels": (lambda: Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[5]]}), {}, ["column 'labels' that is not one for each"]),
    "no completion to learn": (lambda: Dataset.from_dict({"text": CORPUS}), {"completion_only_loss": True}, ["completion_only_loss=True has no effect"]),
    "a chat of another kind": (
        lambda: Dataset.from_dict({"messages": [[{"from": "user", "value": "a"}]]}),
        {},
        ["a message with .'from', 'value'. in 'messages', where role and content are due"],
    ),
    "packed and left as it is": (
        lambda: Dataset.from_dict({"input_ids": [[5, 6, 7]]}),
        {"packing": True, "dataset_kwargs": {"skip_prepare_dataset": True}},
        ["packing has no effect on rows that skip_prepare_dataset leaves"],
    ),
    "no messages": (lambda: Dataset.from_dict({"messages": [[{"role": "user", "content": "a"}], []]}), {}, ["Row 1 ", "no text in 'messages'"]),
    "no ids": (lambda: Dataset.from_dict({"input_ids": [[5, 6], []]}), {}, ["Row 1 ", "no text in 'input_ids'"]),
    "endless stream": (lambda: Dataset.from_dict({"text": CORPUS}).to_iterable_dataset(), {"max_steps": -1}, ["streaming", "set max_steps"]),
    "empty stream": (lambda: IterableDataset.from_generator(lambda: iter(())), {}, ["train data set is empty"]),
    "stream of empty rows": (lambda: Dataset.from_dict({"text": ["a", ""]}).to_iterable_dataset(), {}, ["Row 1 ", "no text"]),
    "stream without text": (lambda: Dataset.from_dict({"body": CORPUS}).to_iterable_dataset(), {}, ["no 'text'", "dataset_text_field"]),
    "stream that must repeat": (
        lambda: Dataset.from_dict({"text": CORPUS}).to_iterable_dataset(),
        {"num_iterations": 2},
        ["num_iterations", "come again", "map-style"],
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_cannot_be_trained_on(train, case):
    make, options, words = BAD_DATA[case]
    with pytest.raises((ValueError, TypeError), match=re.compile(words[0], re.IGNORECASE)) as error:
        train(train_dataset=make(), options=options)
    one_sentence(error, *(f"(?i){word}" for word in words))


def test_an_evaluation_may_have_thoughts_of_one_length(make_trainer):
    rows = Dataset.from_dict({"text": CORPUS, "think_length": [1 + i % 2 for i in range(len(CORPUS))]})
    trainer = make_trainer(train_dataset=rows, eval_dataset=rows.remove_columns("think_length"), stop="fixed", max_think_length=2, think_loss_type="dapo")
    assert "eval_loss" in trainer.evaluate()


def test_rows_that_are_left_as_they_are_must_fit(make_trainer):
    with pytest.raises(ValueError, match="has a row of 60 tokens, and with skip_prepare_dataset rows are not cut to max_length=48") as error:
        make_trainer(train_dataset=Dataset.from_dict({"input_ids": [list(range(60))]}), dataset_kwargs={"skip_prepare_dataset": True})
    one_sentence(error)
    chosen = Dataset.from_dict({"input_ids": [list(range(60)), *[list(range(9, 29))] * 4]}).select([4, 2, 1])  # the table still has the long one
    make_trainer(train_dataset=chosen, dataset_kwargs={"skip_prepare_dataset": True})


def test_a_formatting_function_beside_ids(train):
    with pytest.raises(ValueError, match="has input_ids, and formatting_func makes texts") as error:
        train(train_dataset=Dataset.from_dict({"input_ids": [[5, 6]]}), formatting_func=str)
    one_sentence(error, "leave one of the two out")


def test_what_is_given_to_evaluate_is_looked_at(make_trainer):
    trainer = make_trainer()
    for dataset, words in (
        (Dataset.from_dict({"body": ["a b"]}), "The eval data set has the columns .'body'. and no 'text'"),
        ({"far": Dataset.from_dict({"text": ["a b", None]})}, "Row 1 of the far data set has no text"),
        (Dataset.from_dict({"text": []}), "The eval data set is empty"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            trainer.evaluate(dataset)
        one_sentence(error)


@pytest.mark.parametrize("made", ["", None, ["a"]], ids=str)
def test_a_formatting_function_that_makes_no_text(train, made):
    with pytest.raises(ValueError, match="formatting_func made") as error:
        train(formatting_func=lambda row: made)
    one_sentence(error, "must return a text")


def test_prepared_rows_are_looked_at(make_trainer):
    """All cut before what is to be learned, or made with another tokenizer."""
    long = Dataset.from_dict({"prompt": ["3 + 4 = 7, and 7 + 5 = 12; " * 9] * 8, "completion": [" 7"] * 8})
    with pytest.raises(ValueError, match="No row of the train data set has a token to predict within max_length=48") as error:
        make_trainer(train_dataset=long)
    one_sentence(error, "raise max_length")
    short = Dataset.from_dict({"prompt": ["3 + 4 ="], "completion": [" 7"]})
    with pytest.raises(ValueError, match="No row of the far data set has"):
        make_trainer(train_dataset=short, eval_dataset={"near": short, "far": long})
    with pytest.raises(ValueError, match="has the id 5000 and the model 384 rows") as error:
        make_trainer(train_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7], [5, 5000, 7]]}))
    one_sentence(error)


def test_bad_held_out_data_is_named(train, corpus):
    with pytest.raises(ValueError, match="Row 1 of the hard data set has no text"):
        train(eval_dataset={"easy": corpus, "hard": Dataset.from_dict({"text": ["a b", ""]})})
    with pytest.raises(ValueError, match="The eval data set has the columns"):
        train(eval_dataset=Dataset.from_dict({"body": ["a b"]}))


def test_held_out_data_with_the_name_of_the_training_data(train, corpus):
    """As those have it who evaluate on a part of it."""
    empty = Dataset.from_dict({"text": ["a b", ""]})
    with pytest.raises(ValueError, match="Row 1 of the train data set has no text"):
        train(train_dataset=empty, eval_dataset={"train": corpus})
    with pytest.raises(ValueError, match="Row 1 of the eval train data set has no text"):
        train(eval_dataset={"train": empty})


def test_data_that_can_be_trained_on(train, corpus):
    """Conversations, and any columns with a formatting function, get as far as looking for the model."""
    talk = Dataset.from_dict({"messages": [[{"role": "user", "content": "hello"}]]})
    for dataset, formatter in [
        (corpus, None),
        (corpus.to_iterable_dataset(), None),
        (talk, None),
        (Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}), None),
        (Dataset.from_dict({"input_ids": [[5, 6], [7]]}).with_format("torch"), None),
        (Dataset.from_dict({"input_ids": [[5, 6], [7]]}).with_format("torch").to_iterable_dataset(), None),
        (Dataset.from_dict({"body": ["x"]}), lambda row: row["body"]),
    ]:
        with pytest.raises(ValueError, match="There is no model at"):
            train(train_dataset=dataset, formatting_func=formatter)


@pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics", "data_collator"])
def test_hooks_that_would_never_be_called(train, name):
    with pytest.raises(ValueError, match=f"{name} is not supported with thinking") as error:
        train(**{name: lambda *args: {}})
    one_sentence(error, "Leave it out")


def test_nothing_to_predict(make_trainer, corpus):
    trainer = make_trainer()
    with pytest.raises(ValueError, match="nothing to predict: call evaluate") as error:
        trainer.predict(corpus)
    one_sentence(error)


def test_thinking_that_begins_after_the_last_epoch(make_trainer):
    with pytest.raises(ValueError, match="think_start=1000 is not reached in a run of 16 steps") as error:
        make_trainer(max_steps=-1, num_train_epochs=1, think_start=1000).train()
    one_sentence(error, "lower it")


@pytest.mark.parametrize("schedule", [{"coverage_coef": [0, 0.3, 50, 6]}, {"coverage_coef": [0.3, 0, 1, 9]}, {"thought_entropy_target": [0, 0.5, 1, 9]}])
def test_a_schedule_that_says_something_within_the_run_is_none_of_these(schedule):
    ThinkTokConfig("unused", think_start=2, max_steps=9, report_to="none", **schedule)


def test_no_epoch_at_all(make_trainer):
    with pytest.raises(ValueError, match="num_train_epochs=0 is a run of no step") as error:
        make_trainer(max_steps=-1, num_train_epochs=0).train()
    one_sentence(error, "or max_steps")


def test_rows_that_fill_no_batch(make_trainer, corpus):
    with pytest.raises(ValueError, match="No step was taken: with dataloader_drop_last") as error:
        make_trainer(train_dataset=corpus.select(range(3)), per_device_train_batch_size=4, dataloader_drop_last=True).train()
    one_sentence(error)


def test_rows_that_were_packed_before(make_trainer):
    packed = Dataset.from_dict({"input_ids": [[5, 6, 7, 8, 9]] * 4, "seq_lengths": [[2, 3]] * 4})
    trainer = make_trainer(train_dataset=packed)
    assert trainer.data_collator([trainer.train_dataset[0]])["documents"].tolist() == [[0, 0, 1, 1, 1]]
    with pytest.raises(ValueError, match=r"has seq_lengths, so it is packed, and packing=True would lose where documents begin: set packing=False"):
        make_trainer(train_dataset=packed, packing=True)
    for labels in ({}, {"labels": packed["input_ids"][:]}):
        with pytest.raises(ValueError, match=r"packed rows of 5 tokens: set max_length=5, or pack to max_length=4"):
            make_trainer(train_dataset=Dataset.from_dict(packed[:] | labels), max_length=4)


def test_ids_that_are_thoughts_here(make_trainer, thinker):
    model, tokenizer, vocabulary = thinker
    rows = lambda odd: Dataset.from_dict({"input_ids": [[5, 6, odd, 7]] * 4})
    with pytest.raises(ValueError, match=rf"train data set has the id {vocabulary.first_id + 1}, a thinking token of this model: make its input_ids with"):
        make_trainer(model=model, tokenizer=tokenizer, train_dataset=rows(vocabulary.first_id + 1))
    make_trainer(model=model, tokenizer=tokenizer, train_dataset=rows(vocabulary.guard_id))  # a text may have that


def test_a_text_column_that_is_not_read(make_trainer):
    rows = Dataset.from_dict({"prompt": ["the cat"] * 12, "completion": [" sat"] * 12, "text": ["the dog"] * 9 + [None] * 3})
    make_trainer(train_dataset=rows)


def test_a_formatting_function_that_makes_no_text_of_a_later_row(make_trainer, corpus):
    rows = corpus.add_column("number", list(range(len(corpus))))
    with pytest.raises(ValueError, match=r"formatting_func made None of a row: it must return a text"):
        make_trainer(train_dataset=rows, formatting_func=lambda row: row["text"] if row["number"] < 20 else None)


def test_lengths_of_held_out_thoughts_fit_their_places(make_trainer):
    rows = lambda lengths: Dataset.from_dict({"input_ids": [[5, 9, 6, 9, 7]] * 4, "think_length": [lengths] * 4})
    where = {"fork_positions": "markers", "fork_markers": [tiny_tokenizer().decode([9])], "stop": "fixed"}
    make_trainer(train_dataset=rows([1, 2]), eval_dataset=rows([2, 1]), **where)
    with pytest.raises(ValueError, match=r"has the lengths of 1 thoughts in think_length, and 2 ends of fork_markers"):
        make_trainer(train_dataset=rows([1, 2]), eval_dataset=rows([2]), **where)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_columns_about_thinking_may_be_arrays(make_trainer, kind):
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 8, "level": [1, 2] * 4, "think_length": [1, 2] * 4}).with_format(kind)
    trainer = make_trainer(train_dataset=rows, stop="fixed", curriculum_threshold=0.9)
    trainer.train()
    assert trainer.curriculum.levels == [1, 2]


@pytest.mark.parametrize(("folder", "words"), [("", ["output_dir is empty"]), ("/dev/null/out", ["output_dir=/dev/null/out", "written to /dev/null"])])
def test_folders_that_nothing_can_be_written_to(train, folder, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        train(args=ThinkTokConfig(folder, max_steps=1, use_cpu=True))
    one_sentence(error, *words)


def test_a_best_metric_that_is_misspelt(train, corpus):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    with pytest.raises(ValueError, match="metric_for_best_model=eval_gian is not known; did you mean gain"):
        train(options=best | {"metric_for_best_model": "eval_gian", "greater_is_better": True}, eval_dataset=corpus)


def test_the_best_of_several_evaluations(train, corpus):
    options = {"save_strategy": "best", "eval_strategy": "steps"}
    several = {"long": corpus, "short": corpus}
    with pytest.raises(ValueError, match=r"metric_for_best_model=bits_think is of no eval_dataset, which are long, short: set metric_for_best_model=long_bits"):
        train(eval_dataset=several, options=options)


@pytest.mark.parametrize("family", ["phi", "gptj"])
@pytest.mark.parametrize("tie", [True, False])
def test_an_adapter_beside_a_head_with_a_bias(make_trainer, family, tie):
    with pytest.raises(ValueError, match="LM head of this model has a bias, which PEFT leaves out beside trained rows: train the whole model"):
        make_trainer(model=tiny_model(family, tie=tie, vocab_size=len(tiny_tokenizer())), peft_config=LoraConfig(r=2, target_modules="all-linear"))


def test_an_adapter_beside_an_embedding_in_every_layer(make_trainer):
    model = tiny_model("gemma4_text", vocab_size=len(tiny_tokenizer()), hidden_size_per_layer_input=8)
    with pytest.raises(ValueError, match="Each layer of this model embeds its input anew, with rows that an adapter would lose: train the whole model"):
        make_trainer(model=model, peft_config=LoraConfig(r=2, target_modules="all-linear"))


def test_a_template_in_a_file_is_no_tokenizer(make_trainer, tmp_path):
    rows = Dataset.from_dict({"messages": [[{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]] * 8})
    for name in ("template.jinja", "template.j2"):
        (tmp_path / name).write_text("{% for message in messages %}{{ message['content'] }} {% endfor %}")
        make_trainer(train_dataset=rows, chat_template_path=str(tmp_path / name))


def test_a_quantized_model_without_an_adapter(train):
    with pytest.raises(ValueError, match="A quantized model is trained by an adapter") as error:
        train("nowhere", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    one_sentence(error, "peft_config")


def test_chats_without_a_template(make_trainer):
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4)

    def made(rows, **options):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = None
        return make_trainer(tokenizer=tokenizer, train_dataset=rows, **options)

    with pytest.raises(ValueError, match="no chat template to make texts of them: set chat_template_path") as error:
        made(rows)
    one_sentence(error)
    made(rows, formatting_func=lambda row: row["messages"][0]["content"] * 9)  # then nothing is made of the chats
    made(rows.add_column("input_ids", [[5, 6, 7, 8]] * 4))


def test_ids_beside_a_tokenizer_that_pads_with_nothing(make_trainer):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    with pytest.raises(ValueError, match="neither a padding nor an end token.*set pad_token") as error:
        make_trainer(tokenizer=tokenizer, train_dataset=Dataset.from_list([{"input_ids": [5, 6, 7]}] * 4))
    one_sentence(error)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_rows_longer_than_a_table_of_positions(make_trainer, family):
    with pytest.raises(ValueError, match="max_length=257 exceeds the 256 positions that the model has learned: lower max_length") as error:
        make_trainer(family, max_length=257)
    one_sentence(error)
    make_trainer(family, max_length=256)
    make_trainer("llama", max_length=257)  # rotary positions go on
    rows = Dataset.from_dict({"input_ids": [[5] * 20, [5] * 257]})
    with pytest.raises(ValueError, match="The train data set has a row of 257 tokens, and the model has learned 256 positions") as error:
        make_trainer(family, max_length=None, train_dataset=rows)
    one_sentence(error, "set max_length=256")
    make_trainer(family, max_length=256, train_dataset=rows)
    make_trainer("llama", max_length=None, train_dataset=rows)


def test_several_gpus_in_one_process_are_one(make_trainer, make_config, caplog):
    """transformers would make nn.DataParallel of them, whose copies a tree cannot be divided among."""
    args = make_config(max_steps=1)
    args._n_gpu = 4
    with caplog.at_level(logging.WARNING):
        check_arguments(args, Dataset.from_dict({"text": CORPUS}), None, None, {})
    assert args.n_gpu == 1
    assert "4 GPUs are there and one process" in caplog.text


def test_loading_on_one_process_alone(train, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ValueError, match="set fsdp_cpu_ram_efficient_loading: false") as error:
        train()
    one_sentence(error)


def test_offloading_from_a_cpu(train):
    with pytest.raises(ValueError, match="activation_offloading has nowhere to offload from on a CPU") as error:
        train(options={"activation_offloading": True, "gradient_checkpointing": False})
    one_sentence(error)


def test_gathering_what_is_whole(make_trainer):
    with pytest.raises(ValueError, match="gather_for_rollout=False has no effect here; it needs ZeRO-3 or FSDP2"):
        make_trainer(gather_for_rollout=False)


def test_context_parallel(train, make_config):
    class Parallelism:
        cp_enabled, sp_enabled, tp_enabled = True, False, False

    args = make_config(max_steps=1)
    args.parallelism_config = Parallelism()
    with pytest.raises(ValueError, match="cut rows or layers apart") as error:
        train(args=args)
    one_sentence(error, "data parallelism, ZeRO or FSDP2")
    launched = SimpleNamespace(parallelism_config=Parallelism())  # a launcher's config is known to its accelerator alone
    with pytest.raises(ValueError, match="cut rows or layers apart"):
        check_launcher(launched, None, {})


# ---------------------------------------------------------------- models


@pytest.fixture
def config_folder(tmp_path):
    """A folder with a tokenizer and a model's config.json, without weights."""

    def make(**config):
        folder = tmp_path / "model"
        tiny_tokenizer().save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return make


LLAMA = {"model_type": "llama", "vocab_size": 320} | TINY["llama"]
BAD_MODELS = {
    "encoder-decoder": ({"model_type": "t5", "vocab_size": 320, "d_model": 32, "num_layers": 1}, ["t5 is an encoder-decoder", "decoder-only"]),
    "vision": (
        {"model_type": "llava", "text_config": LLAMA, "vision_config": {"model_type": "clip_vision_model", "hidden_size": 32, "num_attention_heads": 4}},
        ["llava reads images", "AutoModelForCausalLM"],
    ),
    "audio": (
        {"model_type": "qwen2_audio", "text_config": {"model_type": "qwen2"}, "audio_config": {"model_type": "qwen2_audio_encoder"}},
        ["qwen2_audio reads images or audio"],
    ),
    "no LM head": ({"model_type": "vit"}, ["vit has no causal LM head"]),
    "smaller vocabulary": (LLAMA | {"vocab_size": 100}, ["tokenizer has ids up to", "100 embedding rows", "do not belong together"]),
    "thinking model, other tokenizer": (
        LLAMA | {"vocab_size": 384, "thinktok": {"first_id": 320, "num_tokens": 4, "guard_id": 324}},
        ["ids 320 to 323", "which the tokenizer does not know: load both from the same checkpoint"],
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_models_that_cannot_think(train, config_folder, case):
    config, words = BAD_MODELS[case]
    with pytest.raises(ValueError, match=words[0]) as error:
        train(config_folder(**config))
    one_sentence(error, *words)


def test_thinking_tokenizer_on_a_plain_model(train, config_folder, thinker):
    _, tokenizer, _ = thinker
    with pytest.raises(ValueError, match="tokenizer has thinking tokens but the model has none") as error:
        train(config_folder(**LLAMA), processing_class=tokenizer)
    one_sentence(error, "same checkpoint")


def test_another_number_of_thinking_tokens(train, config_folder, thinker):
    model, tokenizer, _ = thinker
    folder = config_folder(**LLAMA | {"vocab_size": model.config.vocab_size, "thinktok": model.config.thinktok})
    with pytest.raises(ValueError, match="has 4 thinking tokens and 8 are asked for") as error:
        train(folder, processing_class=tokenizer, options={"num_think_tokens": 8})
    one_sentence(error, "num_think_tokens=4")


def test_a_model_that_fits_is_loaded(train, config_folder):
    """The refusals above do not come from the folder."""
    with pytest.raises(AssertionError, match="a model was loaded"):
        train(config_folder(**LLAMA))


def test_flash_attention(make_trainer):
    model = tiny_model("llama", vocab_size=320)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 cannot take a tree's mask") as error:
        make_trainer(model=model)
    one_sentence(error, "sdpa or eager")


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn2", "flex_attention"])
def test_flash_attention_by_name(train, config_folder, name):
    with pytest.raises(ValueError, match="cannot take a tree's mask") as error:
        train(config_folder(**LLAMA), options={"model_init_kwargs": {"attn_implementation": name}})
    one_sentence(error, name, "sdpa or eager")


def test_tree_where_attention_ignores_its_mask(make_trainer):
    with pytest.raises(ValueError, match="engine=tree is not exact for bloom") as error:
        make_trainer(family="bloom", engine="tree")
    one_sentence(error, "engine=auto")


@pytest.mark.parametrize("what", ["model", "speaker"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("frozen", [lambda model: model, lambda model: model.get_input_embeddings()], ids=["whole", "embedding"])
def test_frozen_embeddings(train, what, tie, frozen):
    """Of a model that came out of merge_and_unload, for example, all of it is frozen."""
    model = tiny_model(tie=tie)
    frozen(model).requires_grad_(False)
    with pytest.raises(ValueError, match=f"The {what}'s input embedding is frozen") as error:
        train(**{what: model}, processing_class=tiny_tokenizer(), options={"policies": "split"} if what == "speaker" else {})
    one_sentence(error, "requires_grad_", "peft_config")


def test_a_frozen_head(train):
    model = tiny_model(tie=False)
    model.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match="The model's output embedding is frozen") as error:
        train(model, processing_class=tiny_tokenizer())
    one_sentence(error)


def test_a_model_whose_thinking_the_text_would_unlearn_is_told(make_trainer, tmp_path, caplog):
    make_trainer(max_steps=1).save_model(tmp_path / "thinks")
    tokenizer, told = AutoTokenizer.from_pretrained(tmp_path / "thinks"), "with num_think_tokens=0 the text unlearns them"
    for options, count in (({"num_think_tokens": 0}, 1), ({"num_think_tokens": None, "num_forks": 0}, 0)):
        for model in (str(tmp_path / "thinks"), AutoModelForCausalLM.from_pretrained(tmp_path / "thinks")):
            caplog.clear()
            make_trainer(model=model, tokenizer=tokenizer, **options)
            assert caplog.text.count(told) == count
    caplog.clear()
    make_trainer(num_think_tokens=0)
    assert told not in caplog.text


def test_what_may_be_frozen(make_trainer):
    """Runs on the text alone, adapters, and of two models the one that is to learn nothing."""
    tokenizer = tiny_tokenizer()
    frozen = tiny_model(vocab_size=len(tokenizer), tie=False).requires_grad_(False)
    speaker = copy.deepcopy(frozen).requires_grad_(True)
    make_trainer(model=frozen, tokenizer=tokenizer, num_think_tokens=0)
    args = make_trainer(tokenizer=tiny_tokenizer(), policies="split", freeze="thinker").args
    rows = Dataset.from_dict({"text": CORPUS})
    ThinkTokTrainer(frozen, args, train_dataset=rows, processing_class=tokenizer, speaker=speaker).train()
    del frozen.speaker
    make_trainer(model=frozen, tokenizer=tokenizer, num_forks=0)
    make_trainer(model=frozen, tokenizer=tokenizer, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("saved", [8, None], ids=["other number", "none"])
def test_checkpoint_with_another_thinking_vocabulary(make_trainer, tmp_path, saved):
    model, tokenizer, folder = tiny_model("llama", vocab_size=320), tiny_tokenizer(), tmp_path / "checkpoint-1"
    if saved:
        add_thinking_tokens(model, tokenizer, saved)
    model.save_pretrained(folder)
    (folder / COMPLETE_FILE).touch()
    trainer = make_trainer()
    before = trainer.model.get_input_embeddings().weight.detach().clone()
    with pytest.raises(ValueError, match="has the thinking vocabulary") as error:
        trainer.train(resume_from_checkpoint=str(folder))
    one_sentence(error, "checkpoint-1", "num_think_tokens")
    assert trainer.state.global_step == 0
    assert trainer.model.get_input_embeddings().weight.equal(before)


def test_a_model_that_is_not_there(corpus):
    with pytest.raises(ValueError, match="There is no model at"):
        ThinkTokTrainer("/nowhere/model", ThinkTokConfig("out", bf16=False), train_dataset=corpus)


def test_parts_of_a_model_that_are_not_there(make_trainer, corpus, tmp_path):
    with pytest.raises(ValueError, match="There is no teacher at"):
        make_trainer(teacher=str(tmp_path / "nowhere"))
    args = ThinkTokConfig("out", bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="There is no tokenizer at '' .the model was not loaded from anywhere.: pass processing_class") as error:
        ThinkTokTrainer(tiny_model(), args, train_dataset=corpus)
    one_sentence(error)
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"There is no tokenizer at .* \(Couldn't .*from one of: .+\): pass processing_class") as error:
        ThinkTokTrainer(str(tmp_path), args, train_dataset=corpus)
    one_sentence(error)
    (tmp_path / "config.json").write_text("{not JSON")
    with pytest.raises(ValueError, match="The model .* cannot be read: .*JSON"):
        ThinkTokTrainer(str(tmp_path), args, train_dataset=corpus)
    with pytest.raises(TypeError, match="The speaker is a str; it must be a model that is loaded") as error:
        ThinkTokTrainer(tiny_model(), ThinkTokConfig("out", bf16=False, policies="split"), train_dataset=corpus, speaker="base")
    one_sentence(error)


def test_loading_options_of_a_model_that_is_loaded(train):
    with pytest.raises(ValueError, match="The model is loaded already and model_init_kwargs would do nothing") as error:
        train(tiny_model(), processing_class=tiny_tokenizer(), options={"model_init_kwargs": {"dtype": "bfloat16"}})
    one_sentence(error, "give its name")


@pytest.mark.parametrize("given", [{"torch_dtype": "bfloat16"}, '{"torch_dtype": "bfloat16"}'], ids=["mapping", "JSON"])
def test_the_older_name_of_a_dtype(make_config, corpus, tmp_path, given):
    save_tiny(tmp_path / "model")
    trainer = ThinkTokTrainer(str(tmp_path / "model"), make_config(model_init_kwargs=given), train_dataset=corpus)
    assert trainer.model.dtype == torch.bfloat16


def test_what_is_no_model_and_no_tokenizer(train):
    with pytest.raises(TypeError, match="The model is a NoneType; it must be a name, a folder, or a model") as error:
        train(None)
    one_sentence(error)
    with pytest.raises(TypeError, match="processing_class is a str; it must be a tokenizer") as error:
        train(processing_class="gpt2")
    one_sentence(error, "leave it out")


@pytest.mark.parametrize("what", ["model", "speaker", "teacher"])
@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_a_model_without_a_head_for_tokens(train, what, kind):
    headless = kind.from_config(tiny_model().config)
    with pytest.raises(ValueError, match=rf"The {what} is a Llama\w+, which has no LM head: load it with AutoModelForCausalLM\.$"):
        train(**{what: headless}, processing_class=tiny_tokenizer(), options={"policies": "split"} if what == "speaker" else {})


def test_a_model_at_a_path(make_config, corpus, tmp_path):
    save_tiny(tmp_path / "model")
    trainer = ThinkTokTrainer(tmp_path / "model", make_config(), train_dataset=corpus)
    assert trainer.model.config._name_or_path == str(tmp_path / "model")


def test_a_model_is_no_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.save_model(str(tmp_path))
    trainer.save_state()
    with pytest.raises(ValueError, match="is a model, and no checkpoint of a run: start a run from it") as error:
        trainer.train(resume_from_checkpoint=str(tmp_path))
    one_sentence(error)


def test_a_thought_longer_than_the_model(make_trainer):
    with pytest.raises(ValueError, match="exceed the model's 256 positions: lower max_think_length") as error:
        make_trainer(max_think_length=300, max_length=8, lookahead=1)
    one_sentence(error)


# ---------------------------------------------------------------- what the data says about thinking


def thoughtful(**columns):
    return Dataset.from_dict({"text": CORPUS[:2]} | {name: [value] * 2 for name, value in columns.items()})


@pytest.mark.parametrize(
    ("options", "columns", "words"),
    [
        ({"max_think_length": 2}, {"think_length": 3}, ["thoughts of 3 tokens", "max_think_length=3"]),
        ({"blind": True}, {"think_length": 0}, ["think_length of 0", "blind=False"]),
        ({"supply_thoughts": True, "num_generations": 3}, {}, ["supply_thoughts needs a column `thoughts`"]),
        ({"supply_thoughts": True, "num_generations": 3, "num_think_tokens": 4}, {"thoughts": [1, 5]}, ["go up to 5", "num_think_tokens=6"]),
    ],
)
def test_data_that_does_not_fit_the_thoughts(train, options, columns, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        train(train_dataset=thoughtful(**columns), options={"stop": "fixed", "num_forks": 1} | options)
    one_sentence(error, *words)


def test_a_place_without_a_thought_is_nothing_to_blind(make_trainer):
    """In a list a length of 0 says that nobody thinks there, so nothing has to be said without a thought."""
    rows = Dataset.from_dict({"text": ["3 + 4 = 7, and 7 + 5 = 12"] * 2, "think_length": [[1, 0], [2, 1]]})
    options = {"stop": "fixed", "num_forks": 2, "blind": True, "fork_positions": "markers", "fork_markers": [" ="], "max_think_length": 2}
    trainer = make_trainer(train_dataset=rows, max_steps=1, **options)
    trainer.train()
    assert trainer.state.log_history[0]["think_length"] == pytest.approx(4 / 3)


def test_a_model_of_one_thinking_token_has_fillers(make_trainer):
    model, tokenizer = tiny_model(vocab_size=len(tiny_tokenizer())), tiny_tokenizer()
    add_thinking_tokens(model, tokenizer, 1)
    for thoughts, words in (("discrete", ["has nothing to choose from", "set thoughts=filler"]), ("text", ["cannot tell the begin"])):
        with pytest.raises(ValueError, match=f"thoughts={thoughts} with a model of one thinking token") as error:
            make_trainer(model=model, tokenizer=tokenizer, num_think_tokens=None, thoughts=thoughts, stop="fixed", max_think_length=3)
        one_sentence(error, *words, "start from its base model")
    make_trainer(model=model, tokenizer=tokenizer, num_think_tokens=None, thoughts="filler")


def test_a_curriculum_needs_levels(make_trainer):
    with pytest.raises(ValueError, match="curriculum_threshold") as error:
        make_trainer(curriculum_threshold=0.9)
    one_sentence(error, "column `level`")


def test_a_curriculum_has_one_threshold_or_as_many_as_it_passes(make_trainer):
    rows = Dataset.from_dict({"text": ["one two three four"] * 6, "level": [1, 2, 4] * 2})
    with pytest.raises(ValueError, match="curriculum_threshold") as error:
        make_trainer(train_dataset=rows, curriculum_threshold=[0.9, 0.8, 0.7], max_steps=2)
    one_sentence(error, "3 numbers", "3 levels .1, 2, 4.", "each level but the last .2.")


SECOND = [
    ({}, {"speaker": object()}, ["policies=shared", "set policies=split"]),
    ({"policies": "split"}, {"speaker": object(), "peft_config": object()}, ["second adapter", "leave one of the two out"]),
    ({"policies": "split", "gradient_checkpointing": True}, {"peft_config": object()}, ["gradient_checkpointing=False"]),
    ({"think_learning_rate": 1e-3}, {}, ["think_learning_rate", "give peft_config"]),
    ({"think_learning_rate": 1e-3, "num_think_tokens": 0}, {"peft_config": object()}, ["think_learning_rate", "of thinking rows"]),
]


@pytest.mark.parametrize(("options", "extra", "words"), SECOND)
def test_two_models_and_what_does_not_go_with_them(train, options, extra, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        train(options=options, **extra)
    one_sentence(error, *words)


def test_text_that_is_not_there_is_one_sentence():
    with pytest.raises(ValueError, match="data_files names nowhere.jsonl, and there is no such file"):
        TextArguments(data_files=["nowhere.jsonl"])
    for name, count, least in (("max_documents", 0, 1), ("held_out_documents", -3, 0), ("test_documents", -1, 0)):
        with pytest.raises(ValueError, match=f"^{name}={count} must be at least {least}.$"):
            TextArguments(**{name: count})
    assert TextArguments(data_files=["hf://datasets/me/mine/a.jsonl"]).data_files


@pytest.mark.parametrize("end", ["jsonl", "txt", "csv"])
def test_an_empty_file_is_one_sentence(tmp_path, end):
    empty, full = tmp_path / f"empty.{end}", tmp_path / f"full.{end}"
    empty.touch()
    with pytest.raises(ValueError, match=f"data_files has no text: .*empty.{end} is empty"):
        load_text(TextArguments(data_files=[str(empty)]))
    full.write_text('{"text": "some"}')
    assert TextArguments(data_files=[str(empty), str(full)]).data_files


@pytest.mark.parametrize("name", ["a[1].jsonl", "what*.jsonl"])
def test_a_file_s_name_is_no_pattern(tmp_path, name):
    (tmp_path / "what else.jsonl").write_text('{"text": "something else"}')
    (tmp_path / name).write_text('{"text": "this"}')
    assert load_text(TextArguments(data_files=[str(tmp_path / name)]))["text"][:] == ["this"]


def test_files_take_the_place_of_a_recipe_s_own_text(tmp_path):
    (tmp_path / "mine.txt").write_text("one line\nand another\n")
    rows = load_text(TextArguments(dataset_name=STANDARD_LIBRARY, data_files=[str(tmp_path / "mine.txt")]))
    assert rows["text"][:] == ["one line", "and another"]


@pytest.mark.parametrize("option", [{"dataset_streaming": True}, {"dataset_config": "v1"}, {"dataset_train_split": "test"}, {"text_template": "{text}!"}])
def test_the_standard_library_is_one_text(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} has no effect with dataset_name={STANDARD_LIBRARY}"):
        TextArguments(dataset_name=STANDARD_LIBRARY, **option)


# ---------------------------------------------------------------- adapters


def test_adapters_in_place_of_a_model(make_trainer, tmp_path):
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an adapter") as error:
        make_trainer(model=str(tmp_path))
    one_sentence(error, "thinktok merge")
    with pytest.raises(ValueError, match="has an adapter") as error:
        make_trainer(model=adapted)
    one_sentence(error, "peft_config", "merge_and_unload")


@pytest.mark.parametrize("what", ["model", "speaker", "teacher"])
def test_adapters_that_transformers_put_into_a_model(train, what):
    """They look like the model itself, and its thinking rows would be frozen without a word."""
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), tiny_model())  # `add_adapter` of transformers 5.24 wants the next PEFT
    with pytest.raises(ValueError, match=f"The {what} has an adapter") as error:
        train(**{what: adapted}, processing_class=tiny_tokenizer(), options={"policies": "split"} if what == "speaker" else {})
    one_sentence(error, "merge_and_unload")


def test_a_whole_model_is_not_saved_beside_an_adapter(train, make_config):
    """Loaders take the adapter where there is one."""
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    adapter.save_pretrained(make_config().output_dir)
    with pytest.raises(ValueError, match="holds an adapter") as error:
        train()
    one_sentence(error, "in the place of the whole model", "name another folder")
    with pytest.raises(ValueError, match=NOWHERE):  # the next thing that is wrong
        train(peft_config=adapter)


def test_an_adapter_is_not_saved_beside_a_whole_model(train, make_config):
    """Loaders take the whole model as the adapter's base."""
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    adapter.save_pretrained(folder := make_config().output_dir)
    Path(folder, "adapter_model.safetensors").touch()  # of an earlier run's adapter, which this one may follow
    with pytest.raises(ValueError, match=NOWHERE):  # the next thing that is wrong
        train(peft_config=adapter)
    Path(folder, "model-00001-of-00002.safetensors").touch()
    with pytest.raises(ValueError, match="holds a whole model") as error:
        train(peft_config=adapter)
    one_sentence(error, "base of this run's adapter", "name another folder")


def test_an_adapter_on_the_hub_in_place_of_a_model(make_trainer, tmp_path, monkeypatch):
    """As it lies in the Hub's cache, where transformers would load its base, with thinking rows that nothing trains."""
    cached = tmp_path / "models--me--mine"
    get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="me/mine is an adapter") as error:
        make_trainer(model="me/mine")
    one_sentence(error, "thinktok merge")


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("where", ["target_modules", "modules_to_save", "pattern", "end of its name", "parameter"])
def test_adapters_of_whole_embeddings(make_trainer, tie, name, where):
    options = {"pattern": {"target_modules": f".*(q_proj|{name})"}, "target_modules": {"target_modules": ["q_proj", name]}}
    options["end of its name"] = {"target_modules": ["q_proj"], "modules_to_save": [name.split("_")[1]]}
    options["parameter"] = {"target_modules": ["q_proj"], "target_parameters": [f"{name}.weight"]}
    adapter = LoraConfig(r=2, **options.get(where, {"target_modules": ["q_proj"], "modules_to_save": [name]}))
    with pytest.raises(ValueError, match=f"peft_config trains all of {name}") as error:
        make_trainer(model=tiny_model(tie=tie), peft_config=adapter)
    one_sentence(error, "take it out")


@pytest.mark.parametrize("task_type", ["SEQ_CLS", TaskType.TOKEN_CLS])
def test_adapters_for_another_task(make_trainer, task_type):
    with pytest.raises(ValueError, match="peft_config is for task_type=") as error:
        make_trainer(peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type=task_type))
    one_sentence(error, "task_type=(SEQ_CLS|TOKEN_CLS|TaskType.TOKEN_CLS)", "set task_type='CAUSAL_LM'")


@pytest.mark.parametrize("saved", [False, True])
def test_an_adapter_of_a_model_made_here(make_trainer, tmp_path, caplog, saved):
    model = save_tiny(tmp_path / "base") if saved else None
    make_trainer(model=model, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    assert ("its adapter can be loaded by no name: save the model first" in caplog.text) is not saved


@pytest.mark.parametrize("added", ["text", "thoughts", "nothing"])
def test_an_adapter_of_a_model_that_was_given_tokens_since(make_trainer, tmp_path, added):
    """It would be loaded onto the folder's model, which lacks them."""
    save_tiny(tmp_path / "base")
    model, tokenizer = (kind.from_pretrained(tmp_path / "base") for kind in (AutoModelForCausalLM, AutoTokenizer))
    if added == "text":
        tokenizer.add_tokens(["<a>", "<b>"])
        model.resize_token_embeddings(len(tokenizer))
    elif added == "thoughts":
        add_thinking_tokens(model, tokenizer, 4)
    options = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"]), "num_think_tokens": 4, "max_steps": 1}
    if added == "nothing":
        make_trainer(model=model, tokenizer=tokenizer, **options)
        return
    with pytest.raises(ValueError, match=f"The model has tokens that {tmp_path}/base lacks") as error:
        make_trainer(model=model, tokenizer=tokenizer, **options)
    one_sentence(error, "save the model and its tokenizer first")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "more")
    trainer = make_trainer(model=AutoModelForCausalLM.from_pretrained(tmp_path / "more"), tokenizer=tokenizer, **options)
    trainer.train()
    trainer.save_model()
    ids = torch.arange(len(tokenizer) - 8, len(tokenizer))[None]
    again = AutoPeftModelForCausalLM.from_pretrained(trainer.args.output_dir)
    ours, theirs = (one.eval()(ids).logits[..., : len(tokenizer)] for one in (trainer.model, again))  # whatever their rows are a multiple of
    torch.testing.assert_close(theirs, ours)


def test_an_adapter_without_a_base_is_pushed_with_a_word(tmp_path, monkeypatch, capsys):
    save_tiny(tmp_path, think_tokens=4)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    monkeypatch.setattr("huggingface_hub.HfApi", MagicMock())
    assert main(["push", str(tmp_path), "me/model"]) == 0
    assert "config names no base" in capsys.readouterr().err


def test_the_advice_for_blank_rows_is_enough(make_trainer):
    rows = Dataset.from_dict({"text": ["a cat", "  ", None, "a dog"] * 8})
    with pytest.raises(ValueError, match="Row 1 of the train data set has no text") as error:
        make_trainer(train_dataset=rows)
    advice = re.search(r"dataset\.filter\((.*)\)\.$", str(error.value))[1]
    assert len(make_trainer(train_dataset=rows.filter(eval(advice))).train_dataset) == 16


def test_a_hub_that_is_not_reached(make_trainer, monkeypatch):
    def unreachable(*args, **kwargs):
        raise RuntimeError("[Errno 111] Connection refused")  # an error of the library that speaks HTTP, which no other knows

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", unreachable)
    with pytest.raises(ValueError, match="push_to_hub cannot make the repository .*Connection refused") as error:
        make_trainer(push_to_hub=True, hub_model_id="me/mine")
    one_sentence(error, "thinktok push")


def test_padded_rows(train, tokenizer):
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 0, 0]] * 4, "attention_mask": [[1, 1, 1, 0, 0]] * 4})
    with pytest.raises(ValueError, match="padded") as error:
        train(train_dataset=rows, processing_class=tokenizer)
    one_sentence(error, "padded rows", "without padding")


def test_a_tokenizer_without_an_end(train, tokenizer):
    tokenizer.eos_token, model = None, tiny_model(vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match="end token") as error:
        train(model, processing_class=tokenizer)
    one_sentence(error, "eos_token")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_tokenizer_that_another_one_would_be_read_in_place_of(make_trainer, tokenizer, tmp_path, caplog, family):
    """transformers takes some model types' own class whatever was saved: the run says so, and what it says is true."""
    trainer = make_trainer(family, tokenizer=tokenizer)
    trainer.save_model(str(tmp_path / "saved"))
    text = "cafe\u0301"  # Qwen2Tokenizer writes the letter and its accent as one
    saved, automatic = (kind.from_pretrained(tmp_path / "saved")(text)["input_ids"] for kind in (PreTrainedTokenizerFast, AutoTokenizer))
    assert saved == tokenizer(text)["input_ids"]
    assert ("AutoTokenizer would read this tokenizer as a Qwen2Tokenizer" in caplog.text) is (automatic != saved) is (family == "qwen2")


def test_a_stream_with_a_gap_among_the_rows_that_are_looked_at(train, tokenizer):
    rows = Dataset.from_dict({"text": [*CORPUS * 4][:20] + [None] + CORPUS}).to_iterable_dataset()
    with pytest.raises(ValueError, match="Row 20") as error:
        train(train_dataset=rows, processing_class=tokenizer)
    one_sentence(error, "Row 20", "no text")


def test_a_best_checkpoint_within_a_rollout(make_config):
    options = {"num_iterations": 2, "save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "eval_loss"}
    with pytest.raises(ValueError, match="eval_steps") as error:
        make_config(eval_steps=3, **options)
    one_sentence(error, "eval_steps must be a multiple of num_iterations")
    make_config(eval_steps=4, **options)


def test_saves_at_a_part_of_the_run_end_rollouts_too(make_config, make_trainer):
    options = {"num_iterations": 2, "save_strategy": "steps", "max_steps": 8}
    make_config(save_steps=0.5, **options)
    with pytest.raises(ValueError, match="save_steps") as error:
        make_config(save_steps=0.3, **options)  # every three steps
    one_sentence(error, "save_steps must be a multiple of num_iterations")
    by_epochs = {"max_steps": -1, "num_train_epochs": 1.0, "per_device_train_batch_size": 4}
    with pytest.raises(ValueError, match="save_steps must be a multiple"):
        make_trainer(save_steps=0.01, **options | by_epochs).train()


def test_processes_do_not_divide_a_stream_to_evaluate_on():
    rows, args = Dataset.from_dict({"text": ["a b c"]}).to_iterable_dataset(), SimpleNamespace(world_size=2, max_steps=1)
    with pytest.raises(ValueError, match=r"eval data set is streamed, and 2 processes .*Dataset.from_list"):
        check_dataset(rows, "eval", args, None)


@pytest.mark.parametrize(
    ("adapter", "options", "words"),
    [
        ({"alora_invocation_tokens": [5, 6]}, {}, "alora_invocation_tokens works by where they are"),
        ({"layer_replication": [[0, 2], [1, 2]]}, {}, "layer_replication makes layers"),
        ({"init_lora_weights": "pissa"}, {"beta": 0.1}, "init_lora_weights=pissa changes the base that beta compares with"),
        (
            {"init_lora_weights": "olora"},
            {"policies": "split", "gradient_checkpointing": False},
            r"init_lora_weights=olora changes the base that a second adapter \(policies=split\) stands on",
        ),
        *(({"init_lora_weights": start}, {}, f"init_lora_weights={start} changes the base") for start in ("pissa_niter_4", "corda", "lora_ga")),
        ({"bias": "lora_only"}, {"beta": 0.1}, "bias=lora_only trains biases of the base that beta compares with"),
        (
            {"bias": "all"},
            {"policies": "split", "gradient_checkpointing": False},
            r"bias=all trains biases of the base that a second adapter \(policies=split\)",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_adapters_that_would_be_trained_for_something_else(make_trainer, adapter, options, words):
    with pytest.raises(ValueError, match=words):
        make_trainer(peft_config=LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | adapter), **options)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"input_ids": [[5, 6, 7, 8]] * 8, "labels": [[5, 9999, 7, 8]] * 8}, ["the id 9999", "with the model's tokenizer"]),
        ({"input_ids": [[5, 6, 7, 8]] * 8, "labels": [[5, -1, 7, 8]] * 8}, ["the label -1", "or -100"]),
        ({"input_ids": [[5, 6, 7, 8]] * 8, "labels": [[5, -100, -100, -100]] * 8}, ["None of the first 8 rows", "all are -100"]),
        ({"input_ids": [[5, 6, 7, 8]] * 8, "seq_lengths": [[2, 1]] * 8}, ["seq_lengths that do not add up", "of each of its documents"]),
    ],
    ids=["label of no row", "label below 0", "no label", "documents that end early"],
)
def test_tokenized_rows_that_would_teach_something_else(make_trainer, rows, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        make_trainer(train_dataset=Dataset.from_dict(rows), max_length=48)
    one_sentence(error, *words)


def test_a_curriculum_of_one_level(make_trainer):
    rows = Dataset.from_dict({"text": CORPUS, "level": [3] * len(CORPUS)})
    with pytest.raises(ValueError, match="curriculum_threshold has no effect on data of one level, 3") as error:
        make_trainer(train_dataset=rows, curriculum_threshold=0.9, max_steps=2)
    one_sentence(error, "leave it out")


def test_the_best_model_by_thoughts_where_there_are_none(make_trainer):
    rows = Dataset.from_dict({"input_ids": [[5]] * 8})
    trainer = make_trainer(eval_dataset=rows, eval_strategy="steps", eval_steps=1, save_strategy="best")
    with pytest.raises(ValueError, match="no place to think at, and bits_think chooses the best model") as error:
        trainer.train()
    one_sentence(error, "choose by loss")


def test_the_best_model_by_another_data_set_than_one_without_thoughts(make_trainer, corpus):
    sets = {"near": Dataset.from_dict({"input_ids": [[5]] * 8}), "far": corpus.select(range(4))}
    how = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "max_steps": 1}
    trainer = make_trainer(eval_dataset=sets, metric_for_best_model="far_bits_think", **how)
    trainer.train()
    assert trainer.state.best_metric > 0
    found = trainer.evaluate()
    assert "eval_far_bits_think" in found
    assert "eval_near_bits_think" not in found


def test_rows_without_thoughts_may_be_evaluated_when_the_best_model_is_chosen(make_trainer, corpus):
    how = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "max_steps": 1}
    trainer = make_trainer(eval_dataset=corpus.select(range(4)), **how)
    trainer.train()
    assert "eval_bits_think" not in trainer.evaluate(Dataset.from_dict({"input_ids": [[5]] * 8}))


def test_adapters_whose_ranks_a_loop_of_their_own_moves(make_trainer):
    with pytest.raises(ValueError, match="AdaLoraConfig moves its ranks") as error:
        make_trainer(peft_config=AdaLoraConfig(target_modules=["q_proj"], total_step=10))
    one_sentence(error, "use a LoraConfig")


def test_a_base_that_its_name_does_not_lead_to(make_trainer, tmp_path, caplog):
    """What was rounded as it was loaded is still the base; what was trained since is not."""
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    folder = save_tiny(tmp_path / "base")
    make_trainer(model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float(), peft_config=adapter)
    trained = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        trained.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match="The model has weights that .*base lacks, onto which its adapter would be loaded") as error:
        make_trainer(model=trained, peft_config=adapter)
    one_sentence(error, "save the model")
    assert not caplog.text


def test_a_base_in_a_subfolder(make_trainer, tmp_path):
    save_tiny(tmp_path / "models" / "one")
    with pytest.raises(ValueError, match="model_init_kwargs has a subfolder") as error:
        make_trainer(model=str(tmp_path / "models"), model_init_kwargs={"subfolder": "one"}, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    one_sentence(error, "a folder of its own")


@pytest.mark.parametrize("asked", [None, "false", ""], ids=repr)
def test_a_run_in_its_models_own_folder(make_trainer, tmp_path, asked):
    model = save_tiny(tmp_path / "model")
    (tmp_path / "link").symlink_to(model)
    for folder in (model, str(tmp_path / "link")):
        with pytest.raises(ValueError, match="is the model's own folder") as error:
            make_trainer(model=model, output_dir=folder, resume_from_checkpoint=asked)
        one_sentence(error, "name another")


def test_a_run_that_would_remove_its_model(make_trainer, tmp_path):
    model = save_tiny(tmp_path / "out" / "checkpoint-2")
    with pytest.raises(ValueError, match="checkpoint-2 is a checkpoint in output_dir, from which save_total_limit=1 removes it") as error:
        make_trainer(model=model, output_dir=str(tmp_path / "out"), save_total_limit=1)
    one_sentence(error, "name another output_dir")


def test_a_run_where_another_ones_speaker_is(make_trainer, tmp_path):
    (tmp_path / "out" / "speaker").mkdir(parents=True)
    with pytest.raises(ValueError, match="out holds the speaker of an earlier run") as error:
        make_trainer(output_dir=str(tmp_path / "out"))
    one_sentence(error, "name another folder")
    make_trainer(output_dir=str(tmp_path / "out"), policies="split")


def test_a_model_that_gives_tuples(make_trainer):
    model = tiny_model(vocab_size=len(tiny_tokenizer()))
    model.config.return_dict = False
    with pytest.raises(ValueError, match="set model.config.return_dict=True"):
        make_trainer(model=model)


def test_a_push_without_a_hub_leaves_the_trained_model(make_trainer, monkeypatch):
    """The base class makes the repository before it saves anything."""

    def nobody(*args, **kwargs):
        raise ConnectionError("There is no network.")

    trainer = make_trainer(max_steps=1)
    trainer.train()
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", nobody)
    with pytest.raises(PushError, match=r"is whole, but its upload failed: There is no network. Go on with `thinktok push") as error:
        trainer.push_to_hub()
    assert "leave push_to_hub out" not in str(error.value)
    saved = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir)
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[name], weight, atol=0, rtol=0)
    trainer.train()  # the trainer goes on


def test_markers_that_a_data_set_to_evaluate_on_has_not(make_trainer, corpus, caplog):
    """Nothing is thought there: a warning, or where it would choose the best model an error, as of the text that is trained on."""
    options = {"fork_positions": "markers", "fork_markers": [" the"]}
    without, best = Dataset.from_dict({"text": ["3 + 4 = 7"] * 4}), {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    with caplog.at_level("WARNING", logger="hf_thinktok"):
        metrics = make_trainer(eval_dataset={"numbers": without}, **options).evaluate()
    assert "eval_numbers_loss" in metrics
    assert "ends anywhere in the first 10,000 rows of the numbers data set, so nothing would be thought" in caplog.text
    with pytest.raises(ValueError, match="of the eval data set, so nothing would be thought"):
        make_trainer(eval_dataset=without, **options | best)
    sets = {"eval_dataset": {"numbers": without, "text": corpus}}
    with pytest.raises(ValueError, match="of the numbers data set, so nothing would be thought"):
        make_trainer(**sets, **options | best, metric_for_best_model="numbers_gain")
    make_trainer(**sets, **options | best, metric_for_best_model="text_gain")
    make_trainer(eval_dataset=without, **options | best, metric_for_best_model="loss")
    make_trainer(eval_dataset=corpus, **options | best)


def test_a_stream_in_which_there_is_nothing_to_predict(make_trainer):
    rows = Dataset.from_list([{"prompt": "the cat sat " * 40, "completion": "on the mat"}] * 16)
    with pytest.raises(ValueError, match=r"No step was taken: no row has a token to predict within max_length=48\. Raise max_length\."):
        make_trainer(train_dataset=rows.to_iterable_dataset()).train()
