"""The trainer as a whole: what it reduces to, what it learns, how it resumes, what it writes."""

import contextlib
import copy
import dataclasses
import functools
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from models import CORPUS, save_tiny, tiny_model, tiny_tokenizer
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch.nn.utils import parameters_to_vector
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, PreTrainedTokenizerFast, TrainerCallback
from trl import ModelConfig, SFTConfig, SFTTrainer

from hf_thinktok import ThinkingVocabulary, ThinkTokConfig, ThinkTokTrainer, add_thinking_tokens, curriculum, loading, measuring
from hf_thinktok import trainer as trainer_module
from hf_thinktok.answers import answer
from hf_thinktok.architectures import drops_attention
from hf_thinktok.cli import main
from hf_thinktok.config_checks import LESS_IS_BETTER, MORE_IS_BETTER
from hf_thinktok.controls import control_of
from hf_thinktok.curriculum import Curriculum
from hf_thinktok.evaluation import GainByDocument, evaluate_thinking
from hf_thinktok.forks import ends_of, marker_ids
from hf_thinktok.head import HeadInputs
from hf_thinktok.models import untie
from hf_thinktok.objective import speak
from hf_thinktok.peft import merge, thinking_tokens_alone


def losses(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def open_minded():
    """A tiny model that thinks in half of all contexts, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), tie=False)
    add_thinking_tokens(model, tokenizer, 4, sample_text=CORPUS, think_mass=0.5)
    return {"model": model, "tokenizer": tokenizer}


@pytest.fixture
def sft(tmp_path, corpus):
    """Plain SFT with the same options."""

    def make(**options):
        tokenizer = tiny_tokenizer()
        args = SFTConfig(
            **{
                "output_dir": str(tmp_path / "sft"),
                "bf16": False,
                "use_cpu": True,
                "max_length": 48,
                "max_steps": 3,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-3,
                "report_to": "none",
                "save_strategy": "no",
                "disable_tqdm": True,
                "logging_steps": 1,
            }
            | options
        )
        return SFTTrainer(tiny_model("llama", vocab_size=len(tokenizer)), args=args, train_dataset=corpus, processing_class=tokenizer)

    return make


@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_thinking_tokens_is_plain_sft_bit_for_bit(make_trainer, sft, accumulation):
    ours, theirs = make_trainer(num_think_tokens=0, max_steps=3, gradient_accumulation_steps=accumulation), sft(gradient_accumulation_steps=accumulation)
    ours.train(), theirs.train()
    assert losses(ours) == losses(theirs)
    assert all(torch.equal(a, b) for a, b in zip(weights(ours).values(), weights(theirs).values(), strict=True))


def test_a_run_without_thinking_evaluates_as_it_goes(make_trainer, corpus):
    trainer = make_trainer(num_think_tokens=0, eval_dataset=corpus, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.log_history[-1]["eval_loss"])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_real_token_weighs_the_same_after_a_thought_as_in_the_text(make_trainer, accumulation):
    """However few the forks: what their tokens add to the loss is their sum over all tokens of the step, as it is for the text."""
    counts = []

    class Counting(ThinkTokTrainer):
        def compute_loss(self, *args, num_items_in_batch=None, **kwargs):
            counts.append(int(num_items_in_batch))
            return super().compute_loss(*args, num_items_in_batch=num_items_in_batch, **kwargs)

    found, forks = {}, 2 * 3 * accumulation
    for weight in (0.0, 1.0):
        options = {"stop": "fixed", "num_forks": 3, "max_steps": 1, "learning_rate": 0.0, "logging_steps": 1, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(think_ce_weight=weight, trainer_class=Counting, **options)
        trainer.train()
        found[weight], reward = losses(trainer)[0], losses(trainer, "reward")[0]  # the mean log-probability after a thought
    assert len(set(counts)) == 1
    assert counts[0] > 10 * forks / 3
    assert found[1.0] - found[0.0] == pytest.approx(-reward * forks / counts[0], rel=1e-3)


@pytest.mark.parametrize("options", [{"gate_loss_weight": 1.0}, {"think_cost": 0.3, "gate_loss_weight": 0.5, "think_ce_weight": 1.0}], ids=str)
def test_rows_of_any_length_weigh_the_same_however_a_step_is_divided(make_trainer, options):
    """With fillers nothing is left to chance. A fork in a row of two tokens is one of all forks of the step, and not half of it."""
    texts = ["a cat", "the cat sat on the mat and looked at the moon.", "hm", "3 + 4 = 7, and 7 + 5 = 12"]
    options = {
        "text_ce_weight": 0.0,
        "think_ce_weight": 0.0,
        "thoughts": "filler",
        "num_forks": 16,
        "fork_positions": "all",
    } | options
    options |= {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "logging_steps": 1, "max_think_length": 2}
    model, found = tiny_model("llama", vocab_size=len(tiny_tokenizer())), {}
    for rows in (4, 2, 1):
        own, data = copy.deepcopy(model), Dataset.from_dict({"text": texts})
        trainer = make_trainer(model=own, train_dataset=data, per_device_train_batch_size=rows, gradient_accumulation_steps=4 // rows, **options)
        trainer.train()
        found[rows] = parameters_to_vector(trainer.model.parameters()).detach()
    assert (found[4] - parameters_to_vector(make_trainer(model=model, **options).model.parameters())).norm() > 1e-3
    torch.testing.assert_close(found[2], found[4], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found[1], found[4], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_forks_is_plain_sft_on_real_rows(make_trainer, sft, accumulation):
    ours, theirs = make_trainer(num_forks=0, max_steps=3, gradient_accumulation_steps=accumulation), sft(gradient_accumulation_steps=accumulation)
    start = weights(ours)["model.embed_tokens.weight"]
    ours.train(), theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-4)
    for (name, a), b in zip(weights(ours).items(), weights(theirs).values(), strict=True):
        torch.testing.assert_close(a[: len(b)], b, atol=2e-5, rtol=0, msg=name)
    rows = slice(ours.vocabulary.first_id, None)
    assert torch.equal(weights(ours)["model.embed_tokens.weight"][rows], start[rows]), "nothing may train thinking rows where nothing is thought"


def test_packed_text_weighs_as_in_trl(make_trainer, sft):
    """A packed document's first token is never predicted, and is none of the tokens that a loss is divided by."""
    options = {"packing": True, "max_length": 64, "max_steps": 2}
    ours, theirs = make_trainer(num_forks=0, **options), sft(**options)
    ours.train(), theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-4)


def test_batches_without_forks_do_not_dilute_what_is_logged(make_trainer):
    texts = ["the cat sat on the mat. Q and then", *["nothing of the kind is in here at all"] * 3]
    options = {"fork_positions": "markers", "fork_markers": ["Q"], "per_device_train_batch_size": 1, "max_steps": 1, "learning_rate": 0.0, "stop": "fixed"}
    some, all_of_them = (
        make_trainer(train_dataset=Dataset.from_dict({"text": rows * 4}), gradient_accumulation_steps=4 * len(rows), **options) for rows in (texts, texts[:1])
    )
    some.train(), all_of_them.train()
    for name in ("think_length", "thought_entropy", "reward"):
        assert losses(some, name) == pytest.approx(losses(all_of_them, name), rel=0.2), name
    assert losses(some, "think_length") == [2.0]


@pytest.mark.parametrize("marker", ["=", " =", "7", "sat on"])
def test_a_marker_is_found_however_it_is_written(make_trainer, marker):
    rows = Dataset.from_dict({"text": ["2 + 5 = 7 and the cat sat on it", "3+4=7, and so the dog sat on it"] * 4})
    trainer = make_trainer(fork_positions="markers", fork_markers=[marker], train_dataset=rows, max_steps=1, stop="fixed")
    trainer.train()
    assert losses(trainer, "think_length") == [2.0]


def test_a_marker_that_is_nowhere_is_told(make_trainer):
    with pytest.raises(ValueError, match=r"None of fork_markers=\['@@@'\] ends anywhere"):
        make_trainer(fork_positions="markers", fork_markers=["@@@"])


def test_a_marker_that_ends_where_nothing_is_to_be_predicted_is_told(make_trainer):
    rows = Dataset.from_dict({"prompt": ["3 + 4 = ", "5 + 6 = "] * 4, "completion": ["7", "8"] * 4})
    where = {"fork_positions": "markers", "stop": "fixed", "max_steps": 1, "completion_only_loss": True}
    with pytest.raises(ValueError, match=r"After none of fork_markers=\[' \+'\] the next token is one to predict.* let a marker end where the answer begins"):
        make_trainer(train_dataset=rows, fork_markers=[" +"], **where)
    trainer = make_trainer(train_dataset=rows, fork_markers=["= "], **where)
    trainer.train()
    assert losses(trainer, "think_length") == [2.0]


def test_a_marker_is_found_in_a_token_that_ends_with_it():
    """A tokenizer may have a token for a bracket and what follows it. Neither a word's end nor a special token is a marker."""
    vocab = {token: i for i, token in enumerate(["(", ")", "=", "x", "7", ")=", "x=", "=7"])}
    own = Tokenizer(models.BPE(vocab=vocab, merges=[(")", "="), ("x", "=")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<=")
    found = ends_of(
        marker_ids(["="], tokenizer), torch.tensor([tokenizer("()=7")["input_ids"] + [vocab["x="], tokenizer.eos_token_id, vocab["="], vocab["=7"]]])
    )
    assert found.tolist() == [[False, True, False, False, False, True, False]]


def test_a_marker_is_found_within_one_document():
    tokens, documents = torch.tensor([[1, 5, 6, 5, 6, 5]]), torch.tensor([[0, 0, 0, 0, 1, 1]])
    assert ends_of([[5, 6]], tokens).tolist() == [[False, False, True, False, True, False]]
    assert ends_of([[5, 6]], tokens, documents).tolist() == [[False, False, True, False, False, False]]


def test_packed_documents_do_not_see_each_other(make_trainer):
    rows = Dataset.from_dict({"text": CORPUS[:4]})
    packed = make_trainer(num_forks=0, packing=True, eval_packing=True, max_length=64, per_device_eval_batch_size=4, eval_dataset=rows, train_dataset=rows)
    plain = make_trainer(num_forks=0, max_length=64, per_device_eval_batch_size=4, eval_dataset=rows, train_dataset=rows)
    assert len(packed.eval_dataset) < len(plain.eval_dataset)
    assert packed.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-5)


ALONE = {"advantage": "value", "num_generations": 1}  # nothing to compare with but what was expected


@pytest.mark.parametrize(
    "options",
    [*({"think_loss_type": kind, "num_generations": 8} for kind in ("dr_grpo", "grpo", "bnpo", "dapo", "cispo")), ALONE | {"num_forks": 24}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_rewarded_thought_becomes_likely(make_trainer, options):
    def prefers_two(thoughts, **kwargs):
        return (thoughts[..., 0] == vocabulary.first_id + 2).float()

    trainer = make_trainer(
        train_dataset=Dataset.from_dict({"text": CORPUS, "think_length": [1 + i % 2 for i in range(len(CORPUS))]}),  # what the types divide by
        reward_funcs=prefers_two,
        stop="fixed",
        max_steps=60,
        max_think_length=2,
        think_ce_weight=0.0,
        learning_rate=6e-3,
        **options,
    )
    vocabulary = trainer.vocabulary
    trainer.train()
    rewards = losses(trainer, "reward")
    assert sum(rewards[:10]) / 10 < 0.5 < 0.8 < sum(rewards[-10:]) / 10


@pytest.mark.parametrize("stop", ["learned", "sampled"])
def test_a_price_closes_the_gate(make_trainer, stop):
    def mean_length(cost):
        options = {"think_cost": cost, "max_steps": 40, "learning_rate": 3e-3, "stop": stop, "think_ce_weight": 0.0, "num_forks": 8}
        trainer = make_trainer(**options, **open_minded(), reward_funcs=None if stop == "learned" else lambda lengths, **kwargs: 0.0 * lengths)
        trainer.train()
        return sum(losses(trainer, "gate")[-10:]) / 10

    assert mean_length(3.0) < 0.5 * mean_length(0.0)


def test_plain_generation_ends_the_longest_thoughts(make_trainer):
    """It knows no most. Where longer is better only the gate behind the last token, which no rollout asks, ends a thought there."""

    def thinks(count):
        texts = torch.tensor([tiny_tokenizer()(text)["input_ids"][:6] for text in CORPUS[:8]])
        thoughts = vocabulary.first_id + torch.arange(8 * count).view(8, count) % vocabulary.num_tokens
        probabilities = trainer.model.eval()(input_ids=torch.cat([texts, thoughts], 1)).logits[:, -1].softmax(-1)
        return probabilities[:, vocabulary.first_id : vocabulary.guard_id].sum(-1).mean().item()

    options = {"stop": "sampled", "max_steps": 200, "num_forks": 8, "text_ce_weight": 0.0, "lr_scheduler_type": "constant", "logging_strategy": "no"}
    trainer = make_trainer(**options, **open_minded(), reward_funcs=lambda lengths, **kwargs: lengths.float())
    vocabulary = trainer.vocabulary
    assert thinks(2) > 0.2
    trainer.train()
    assert min(thinks(0), thinks(1)) > 0.5
    assert thinks(2) < 0.1


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)], ids=["", "lora"])
def test_a_detached_gate_trains_thinking_rows_alone(make_trainer, adapter):
    silent = {"text_ce_weight": 0.0, "think_ce_weight": 0.0, "think_loss_weight": 0.0, "weight_decay": 0.0}
    trainer = make_trainer(peft_config=adapter, detach_gate=True, think_cost=1.0, max_steps=2, learning_rate=1e-2, **silent)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    vocabulary = trainer.vocabulary
    thinking = range(vocabulary.num_tokens) if adapter else range(vocabulary.first_id, vocabulary.guard_id)  # an adapter has no others, and the guard's last
    changed = {name: (value != before[name]).nonzero()[:, 0].unique().tolist() for name, value in trainer.model.state_dict().items()}
    assert {row for name, rows in changed.items() if "embed" in name or "lm_head" in name for row in rows} == {*thinking}
    assert not any(rows for name, rows in changed.items() if "embed" not in name and "lm_head" not in name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stop": "sampled", "lookahead": 3, "memory": "persistent", "packing": True},
        {"num_iterations": 2},
        {"beta": 0.1, "fork_positions": "entropy", "gradient_accumulation_steps": 2},
        ALONE | {"scale_rewards": "batch"},
    ],
    ids=["learned", "persistent", "iterations", "entropy", "value"],
)
def test_resumed_equals_never_interrupted_bit_for_bit(make_trainer, resumed, options):
    whole, again = resumed(make_trainer, lr_scheduler_type="linear", **options)
    assert losses(whole)[2:] == losses(again)[2:]
    assert losses(whole, "reward")[2:] == losses(again, "reward")[2:]


def test_repeated_batches_resume_in_a_later_epoch(make_trainer, resumed, corpus):
    rows = corpus.select(range(4))
    resumed(make_trainer, max_steps=12, train_dataset=rows, num_iterations=2, stop="fixed")  # two epochs of four steps are done where it is resumed


def test_a_smaller_batch_repeats_the_same_rows(make_trainer):
    """`auto_find_batch_size` halves the batch when memory runs out; thoughts must not come back with another batch's text."""
    seen = []

    class Small(ThinkTokTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            loss = super().training_step(model, inputs, *args, **kwargs)
            seen.append((inputs["input_ids"].sum().item(), self._rollouts[0].thoughts_BKGL.sum().item()))
            return loss

    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "num_iterations": 2, "stop": "fixed", "max_steps": 4, "save_strategy": "no"}
    make_trainer(trainer_class=Small, **options).train()
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert seen[0] != seen[2]


def test_a_stream_that_begins_again_ends_no_step(make_trainer, corpus):
    """Of its last batches, which are too few, transformers makes the beginning of the next step."""
    for rows, accumulated in ((6, 2), (10, 4)):
        stream = corpus.select(range(rows)).to_iterable_dataset()
        trainer = make_trainer(train_dataset=stream, gradient_accumulation_steps=accumulated, max_steps=6, logging_steps=1)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 6
        assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("split", [False, True])
def test_rows_come_again_with_their_own_thoughts_however_batches_are_divided(make_trainer, monkeypatch, split):
    """Two processes with batches of two, or of four that are cut in two."""
    rows = Dataset.from_dict({"text": CORPUS})
    options = {"per_device_train_batch_size": 4 if split else 2, "accelerator_config": {"split_batches": split}}
    trainer = make_trainer(train_dataset=rows, num_iterations=2, stop="fixed", **options)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    order = list(trainer._get_train_sampler())
    steps = [order[start : start + 4] for start in range(0, len(order), 4)]
    assert steps[::2] == steps[1::2]
    assert len(set(map(tuple, steps[::2]))) == len(steps) / 2


@pytest.mark.parametrize(
    ("options", "said"),
    [({}, True), ({"packing": True}, False), ({"packing": True, "packing_strategy": "wrapped"}, False), ({"max_length": 48}, False)],
    ids=str,
)
def test_text_that_is_cut_off_is_said(make_trainer, caplog, options, said):
    trainer = make_trainer(**{"max_length": 8} | options)
    full = sum(len(ids) == trainer.args.max_length for ids in trainer.train_dataset["input_ids"])
    assert (f"{full} of the first {len(trainer.train_dataset)} training rows were cut" in caplog.text) == said
    assert caplog.text.count("set packing=True to train on the rest") == said  # of the held-out text the beginning is meant


def test_a_stage_on_text_alone_leaves_what_is_said_of_thoughts(make_trainer, tmp_path):
    thinks = {"stop": "sampled", "max_think_length": 3, "memory": "persistent", "fork_positions": "markers", "fork_markers": [" the"]}
    trainer = make_trainer(output_dir=str(tmp_path / "thinks"), save_strategy="no", **thinks)
    trainer.save_model()
    stored = trainer.model.config.thinktok
    on = {"model": str(tmp_path / "thinks"), "tokenizer": AutoTokenizer.from_pretrained(tmp_path / "thinks"), "num_think_tokens": None}
    assert make_trainer(**on, num_forks=0).model.config.thinktok == stored
    assert make_trainer(**on, stop="fixed").model.config.thinktok["stop"] == "fixed"


@pytest.mark.parametrize("where", ["_sample", "_score"])
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_training_starts_over_after_memory_ran_out_or_an_interruption(make_trainer, monkeypatch, where, num_iterations):
    """Whatever the first attempt had drawn is forgotten."""
    options = {"per_device_train_batch_size": 4, "num_iterations": num_iterations, "stop": "fixed", "max_steps": 4}
    for failure in (RuntimeError("CUDA out of memory."), KeyboardInterrupt()):
        trainer = make_trainer(auto_find_batch_size=isinstance(failure, RuntimeError), **options)
        pending, method = [failure], getattr(trainer, where)

        def first_fails(*args, pending=pending, method=method, **kwargs):
            if pending:
                raise pending.pop()
            return method(*args, **kwargs)

        monkeypatch.setattr(trainer, where, first_fails)
        if isinstance(failure, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        trainer.train()
        assert trainer.state.global_step == 4
        assert len(trainer._rollouts) == 1
        assert all(map(math.isfinite, losses(trainer)))


def levels(rows, *numbers):
    """Rows of these levels in turn."""
    return rows.add_column("level", [numbers[i % len(numbers)] for i in range(len(rows))])


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
@pytest.mark.parametrize("engine", ["tree", "replicated"])
def test_thoughts_may_be_longer_with_every_level(make_trainer, corpus, smoothing, engine):
    """Without any at the first: what is said there is what is said without thoughts, and the gate has nothing to learn."""
    options = {"curriculum_threshold": 0.0, "curriculum_think_length": [0, 1, 3], "max_think_length": 3, "stop_smoothing": smoothing, "logging_steps": 1}
    trainer = make_trainer(
        train_dataset=levels(corpus, 1, 2, 3), eval_dataset=corpus, stop="learned", engine=engine, curriculum_replay=0.5, max_steps=40, **options
    )
    gates = [trainer.model.get_output_embeddings().weight[trainer.vocabulary.first_id :].clone()]
    seen = {}  # by the thoughts that may be had at most

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            gates.append(trainer.model.get_output_embeddings().weight[trainer.vocabulary.first_id :].clone())

        def on_log(self, args, state, control, logs, **kwargs):
            if "think_length" in logs:
                seen.setdefault(trainer.curriculum.longest(state.global_step - 1), []).append((logs, gates[-1].equal(gates[-2])))

    trainer.add_callback(Watch())
    trainer.train()
    assert list(seen) == [0, 1, 3]
    for logs, same in seen[0]:
        assert (logs["think_length"], logs["gate"]) == pytest.approx((0.0, 0.0), abs=1e-12)
        assert logs["think_gain"] == pytest.approx(0.0, abs=1e-5)
        assert same, "nobody thought"
    for logs, same in seen[1]:
        assert logs["think_length"] == pytest.approx(logs["gate"])
        assert not same
    for logs, _ in seen[3]:
        assert 1.01 < logs["think_length"] / logs["gate"] < 3
    assert 0 < trainer.evaluate()["eval_mean_think_length"] < 3
    trainer.save_model(saved := str(Path(trainer.args.output_dir).parent / "saved"))
    fresh = make_trainer(
        model=saved, tokenizer=trainer.processing_class, train_dataset=levels(corpus, 1, 2, 3), eval_dataset=corpus, stop="learned", engine=engine,
        max_steps=40, **options,
    )  # fmt: skip
    assert fresh.evaluate()["eval_mean_think_length"] > 1e-4, "no level bounds what is not in training"
    trainer.curriculum.begins = [0]
    assert trainer.evaluate()["eval_mean_think_length"] == pytest.approx(0.0, abs=1e-12)
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 2, "labels": [[-100, -100, -100, 8]] * 2})
    assert answer(trainer, rows, "think").lengths_D.tolist() == pytest.approx([0.0, 0.0], abs=1e-12)


def test_a_length_for_each_level(make_trainer, corpus):
    with pytest.raises(ValueError, match="curriculum_think_length has 2 numbers and the data 3 levels .1, 2, 3.: give one for each"):
        make_trainer(train_dataset=levels(corpus, 1, 2, 3), curriculum_threshold=0.9, curriculum_think_length=[0, 2], max_steps=2)


def test_a_log_says_a_level_that_there_is(make_trainer, corpus, monkeypatch):
    """The one that was come to, and not the mean over steps."""
    monkeypatch.setattr(curriculum, "LEAST_STEPS", 1)
    trainer = make_trainer(train_dataset=levels(corpus, 1, 2, 3), curriculum_threshold=0.0, max_steps=8, logging_steps=8, stop="fixed")
    trainer.train()
    assert trainer.curriculum.begins == [0, 2, 4]
    assert losses(trainer, "level") == [3]


def test_an_attempt_after_memory_ran_out_has_its_levels_to_pass_again(make_trainer, corpus):
    """A level with longer thoughts is where memory runs out: the smaller batches begin with the first one."""
    seen = []

    class Small(ThinkTokTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append((self.state.global_step, len(inputs["input_ids"]), inputs["level"][0].item()))
            if seen[-1][1] > 2 and seen[-1][2] > 1:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

        def _record(self, *args):
            passed = seen[-1][1] > 2
            self.curriculum.observe = functools.partial(Curriculum.observe, self.curriculum) if passed else lambda *args: None
            super()._record(*args)

    options = {"curriculum_threshold": 0.0, "curriculum_replay": 0.0, "max_steps": 14, "per_device_train_batch_size": 4, "save_strategy": "no"}
    trainer = make_trainer(trainer_class=Small, auto_find_batch_size=True, stop="fixed", train_dataset=levels(corpus, 1, 2), **options)
    trainer.train()
    assert {level for _, batch, level in seen if batch == 4} == {1, 2}
    assert {level for _, batch, level in seen if batch == 2} == {1}
    assert trainer.curriculum.begins == [0]


@pytest.mark.parametrize("memory", ["none", "persistent"])
def test_a_level_without_a_place_to_think_is_passed_by_its_answers(make_trainer, monkeypatch, memory):
    monkeypatch.setattr("hf_thinktok.curriculum.LEAST_STEPS", 1)
    rows = Dataset.from_list(
        [{"input_ids": [20, 21, 22, 23], "labels": [-100, -100, -100, 23], "level": 1 + i % 2, "think_length": [2 * (i % 2)]} for i in range(16)]
    )
    where = {"fork_positions": "markers", "fork_markers": [tiny_tokenizer().decode([22])], "lookahead": 1}
    trainer = make_trainer(train_dataset=rows, memory=memory, stop="fixed", curriculum_threshold=0.9, max_steps=30, learning_rate=1e-2, **where)
    trainer.train()
    assert len(trainer.curriculum.begins) == 2
    assert losses(trainer, "accuracy")


def test_one_bad_step_does_not_hold_a_curriculum(make_trainer, corpus):
    class Bad(ThinkTokTrainer):
        def _score(self, *args):
            scores = super()._score(*args)
            bad = self.state.global_step == 1
            return dataclasses.replace(scores, gate_logits_BKGL=scores.gate_logits_BKGL * (math.nan if bad else 1.0))

    trainer = make_trainer(trainer_class=Bad, max_steps=14, curriculum_threshold=0.0, save_strategy="no", train_dataset=levels(corpus, 1, 2))
    trainer.train()
    assert trainer.guard.total == 1
    assert len(trainer.curriculum.begins) == 2


def test_schedules_count_from_the_first_thought_with_a_curriculum_too(make_trainer, corpus):
    clocks = []

    class Clocked(ThinkTokTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            clocks.append((self._schedule_step(inputs), self._rollouts[-1].forks_BK.shape[1] > 0))
            return loss

    rows = levels(corpus, 1, 2)
    make_trainer(trainer_class=Clocked, think_start=3, max_steps=6, curriculum_threshold=0.9, save_strategy="no", train_dataset=rows).train()
    assert clocks == [*[(0, False)] * 3, (0, True), (1, True), (2, True)]


def test_the_reference_is_asked_once_about_each_rollout(make_trainer, monkeypatch):
    trainer = make_trainer(beta=0.1, num_iterations=3, max_steps=6, stop="fixed", save_strategy="no")
    asked, score = [], trainer._score

    def counted(model, *args):
        asked.append(model is trainer.reference)
        return score(model, *args)

    monkeypatch.setattr(trainer, "_score", counted)
    trainer.train()
    assert sum(asked) == 2
    assert len(asked) == 2 + 6


def test_means_over_forks_are_the_same_however_a_step_is_divided_and_logged(make_trainer):
    """Of rows with one place and with many, whose thoughts are given, so that nothing is drawn."""
    marker, texts = tiny_tokenizer().decode([22]), [[22, 5, 6, 7, 8], [22, 9] * 8, [10, 22, 11, 12], [22, 5] * 5]
    rows = Dataset.from_dict({"input_ids": texts})
    same = {"thoughts": "filler", "stop": "fixed", "fork_positions": "markers", "fork_markers": [marker], "num_forks": 8, "learning_rate": 0.0}
    found = []
    for batch, accumulated, every in ((4, 1, 1), (1, 4, 1), (1, 1, 4)):
        how = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated, "max_steps": every, "logging_steps": every}
        trainer = make_trainer(train_dataset=rows, train_sampling_strategy="sequential", **same, **how)
        trainer.train()
        found.append(trainer.state.log_history[0])
    for name in ("think_gain", "reward", "accuracy"):
        assert found[1][name] == pytest.approx(found[0][name], abs=1e-5)
        assert found[2][name] == pytest.approx(found[0][name], abs=1e-5)


@pytest.mark.parametrize("policies", ["shared", "split"])
def test_a_copy_of_the_model_as_the_reference_is_stays_what_the_model_was(make_trainer, policies):
    trainer = make_trainer(max_steps=3, beta=0.1 if policies == "shared" else 0.0, policies=policies, learning_rate=0.1, save_strategy="no")
    reference = trainer.reference if policies == "shared" else copy.deepcopy(trainer.model)
    tokens, nodes = torch.arange(5, 12)[None], torch.arange(7)

    def says(model):
        model.eval()
        with torch.no_grad():
            return model(input_ids=tokens, head=HeadInputs(nodes, nodes), speaks=policies == "split").target_logps_M

    began = says(trainer.model)
    trainer.train()
    assert torch.equal(says(reference), began)
    assert not torch.allclose(says(trainer.model), began)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stop": "fixed"},
        {"stop": "sampled", "memory": "persistent"},
        {"engine": "replicated"},
        {"policies": "split"},
        {"lookahead": None, "stop": "sampled"},
        {"fork_positions": "all", "num_forks": 16},
        {"fork_positions": "all", "num_forks": 16, "coverage_coef": 0.1},
    ],
    ids=str,
)
def test_rows_of_one_token_have_nothing_to_judge(make_trainer, options):
    """A batch of nothing else, as packers leave them at the end of a text."""
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8, 9]] * 3 + [[5]] + [[6, 7, 8, 9]] * 6}).to_iterable_dataset()
    trainer = make_trainer(train_dataset=rows, eval_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7]] * 2 + [[5]]}), per_device_train_batch_size=1,
                           per_device_eval_batch_size=2, max_steps=10, **options)  # fmt: skip
    trainer.train()
    assert trainer.guard.total == 0
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_packed_rows_have_all_of_a_long_document(make_trainer):
    """TRL's own default drops what is longer than a row."""
    text = Dataset.from_dict({"text": [" ".join(CORPUS * 3), "the cat sat"]})
    trainer = make_trainer(train_dataset=text, packing=True, max_length=32)
    whole = sum(len(trainer.processing_class(row["text"])["input_ids"]) for row in text)
    assert sum(map(len, trainer.train_dataset["input_ids"])) >= whole > 4 * 32


@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
def test_errors_of_packed_text_count_documents(make_trainer, strategy):
    """`wrapped` loses where documents begin, and in other rows they share the forks: held-out text is not packed with the training text."""
    documents = Dataset.from_dict({"text": [" ".join(CORPUS), *["the cat sat"] * 7]})
    trainer = make_trainer(eval_dataset=documents, packing=True, packing_strategy=strategy, max_length=64, num_forks=2)
    assert trainer.evaluate()["eval_documents"] == 8


def test_seconds_are_those_of_the_steps(make_trainer, corpus, tmp_path):
    """Not those of evaluations, and with those of the run that was resumed."""
    slow = []

    class Slow(ThinkTokTrainer):
        def evaluate(self, *args, **kwargs):
            slow.append(time.sleep(2.0))
            return super().evaluate(*args, **kwargs)

    options = {"eval_dataset": corpus, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "save_strategy": "steps", "save_steps": 2}
    first = make_trainer(trainer_class=Slow, max_steps=2, **options)
    done = first.train().metrics
    assert len(slow) == 3
    assert done["train_runtime"] > 6 > done["train_step_seconds"] > 0
    assert done["train_steps_per_second"] == pytest.approx(2 / done["train_step_seconds"])
    assert done["train_samples_per_second"] == pytest.approx(2 * done["train_steps_per_second"], rel=0.01)
    second = make_trainer(max_steps=3, **options)
    resumed = second.train(resume_from_checkpoint=True).metrics
    assert resumed["train_step_seconds"] > done["train_step_seconds"]


def test_too_few_rows_to_repeat_are_told(make_trainer, corpus):
    with pytest.raises(ValueError, match="3 rows are fewer than one of 4"):
        make_trainer(train_dataset=corpus.select(range(3)), num_iterations=2, per_device_train_batch_size=4).train()


def test_rows_are_padded_to_a_multiple(make_trainer):
    trainer = make_trainer(pad_to_multiple_of=32)
    assert all(batch["input_ids"].shape[1] % 32 == 0 for batch in trainer.get_train_dataloader())


@pytest.mark.parametrize("columns", [{"level": "Level 5"}, {"level": None}, {"think_length": "long"}, {"thoughts": "deep"}], ids=str)
def test_a_data_set_s_own_columns_are_no_concern(make_trainer, columns):
    rows = Dataset.from_list([{"text": text} | columns for text in CORPUS])
    trainer = make_trainer(train_dataset=rows, max_steps=1)
    trainer.train()
    assert len(losses(trainer)) == 1


@pytest.mark.parametrize(
    ("columns", "options", "sentence"),
    [
        ({"level": "Level 5"}, {"curriculum_threshold": 0.9}, "column 'level' has 'Level 5' where whole numbers from 0 are due"),
        ({"think_length": 1}, {"stop": "fixed", "packing": True}, "column 'think_length' is about a row, and packing=True joins rows"),
        ({"think_length": -1}, {"stop": "fixed"}, "column 'think_length' has -1"),
        ({"thoughts": "deep"}, {"supply_thoughts": True, "stop": "fixed", "num_forks": 1, "num_generations": 3}, "column 'thoughts' has 'deep'"),
        ({"thoughts": [1]}, {"supply_thoughts": True, "stop": "fixed", "num_forks": 1, "num_generations": 3}, "a thought of 1 tokens where 2 are thought"),
        (
            {"thoughts": [1], "think_length": 2},
            {"supply_thoughts": True, "stop": "fixed", "num_forks": 1, "num_generations": 3},
            "a thought of 1 tokens where 2 are thought",
        ),
    ],
)
def test_columns_about_thinking_are_checked(make_trainer, columns, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_trainer(train_dataset=Dataset.from_list([{"text": text} | columns for text in CORPUS]), **options)


@pytest.mark.parametrize("stream", [False, True], ids=["", "stream"])
def test_supplied_thoughts_are_numbers_of_the_model_s_own_tokens(make_trainer, stream):
    """Of a model that thinks already, whose number of tokens no option says."""
    rows = Dataset.from_list([{"text": text, "thoughts": [3, 4]} for text in CORPUS])
    rows = rows.to_iterable_dataset() if stream else rows
    options = {"train_dataset": rows, "supply_thoughts": True, "stop": "fixed", "num_forks": 1, "num_generations": 3, "num_think_tokens": None}
    with pytest.raises(ValueError, match="go up to 4, and there are 4 thinking tokens"):
        make_trainer(**open_minded(), **options)
    make_trainer(**options)  # a model without any gets 16


def test_tokens_after_the_thinking_tokens_are_refused(make_trainer):
    """They would never be learned, nor generated."""
    trainer = make_trainer()
    trainer.processing_class.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    with pytest.raises(ValueError, match="after the thinking tokens, which are to be the last"):
        make_trainer(model=trainer.model, tokenizer=trainer.processing_class)


@pytest.mark.parametrize("new", [False, True], ids=["of the same tokens", "with a token of its own"])
def test_a_chat_template_comes_before_the_thinking_tokens(make_trainer, tmp_path, new):
    """With what it needs, and without tokens for rows that are left over."""
    other = tiny_tokenizer()
    mark = "<|turn|>" if new else "turn: "
    if new:
        other.add_special_tokens({"additional_special_tokens": [mark]})
    other.chat_template = "{% for m in messages %}" + mark + "{{ m['content'] }}{{ eos_token }}{% endfor %}"
    other.save_pretrained(tmp_path / "other")
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]} for text in CORPUS])
    options = {"chat_template_path": str(tmp_path / "other"), "train_dataset": rows}
    trainer = make_trainer(**options, max_steps=1)
    trainer.train()
    tokenizer, vocabulary = trainer.processing_class, trainer.vocabulary
    assert tokenizer.chat_template == other.chat_template
    assert trainer.args.chat_template_path == options["chat_template_path"]
    assert "<|think_3|>" in tokenizer.get_vocab()
    if new:
        assert tokenizer.convert_tokens_to_ids(mark) < vocabulary.first_id
        with pytest.raises(ValueError, match="needs the tokens <.turn.>, which an adapter's base has not"):
            make_trainer(**options, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    else:
        assert "<extra_id_0>" not in tokenizer.get_vocab()


def test_seeds_differ_and_repeat(make_trainer):
    def run(seed):
        trainer = make_trainer(seed=seed, max_steps=1)
        trainer.train()
        return losses(trainer, "reward")

    assert run(1) == run(1) != run(2)


def test_evaluation_at_every_position_is_the_loss(make_trainer, corpus):
    trainer = make_trainer(fork_positions="all", num_forks=16, eval_dataset=corpus.select(range(6)), per_device_eval_batch_size=8)
    result = trainer.evaluate()
    assert result["eval_bits_no_think"] * math.log(2) == pytest.approx(result["eval_loss"], rel=1e-4)
    assert result["eval_documents"] == 6


def test_evaluation_repeats_and_compares_the_same_places(make_trainer, corpus, monkeypatch):
    trainer = make_trainer(eval_dataset=corpus.select(range(6)), max_steps=3, fork_positions="entropy")
    first, second = trainer.evaluate(), trainer.evaluate()
    names = ["eval_bits_no_think", "eval_bits_think", "eval_bits_random_thought", "eval_gain", "eval_gain_stderr", "eval_mean_think_length"]
    assert [first[name] for name in names] == [second[name] for name in names]
    assert first["eval_gain"] == pytest.approx(first["eval_bits_no_think"] - first["eval_bits_think"], abs=1e-9)
    places, forks = [], trainer._forks

    def noted(*args):
        found = forks(*args)
        if not trainer.model.training:
            places.append(found)
        return found

    monkeypatch.setattr(trainer, "_forks", noted)
    trainer.evaluate(), trainer.train(), trainer.evaluate()
    half = len(places) // 2
    assert half
    assert all(map(torch.equal, places[:half], places[half:])), "whatever was learned in between"
    assert trainer.evaluate()["eval_bits_no_think"] != first["eval_bits_no_think"]
    trainer = make_trainer(eval_dataset=corpus.select(range(6)), max_steps=2, learning_rate=0.0)
    first = trainer.evaluate()
    trainer.train()
    assert [trainer.evaluate()[name] for name in names] == [first[name] for name in names], "whatever the step"


def test_the_length_that_is_told_is_that_of_the_models_own_thoughts(make_trainer, corpus, monkeypatch):
    trainer = make_trainer(eval_dataset=corpus.select(range(6)))
    first = trainer.evaluate()

    def others(rollout, vocabulary, generator):
        return dataclasses.replace(rollout, thoughts_BKGL=torch.full_like(rollout.thoughts_BKGL, vocabulary.first_id))

    monkeypatch.setattr(trainer_module, "control_thoughts", others)
    second = trainer.evaluate()
    assert second["eval_mean_think_length"] == first["eval_mean_think_length"]
    assert second["eval_bits_random_thought"] != first["eval_bits_random_thought"]


def test_a_thought_that_tells_the_answer_shows_up_as_gain(make_trainer, corpus):
    """A model that is trained on the thinking path alone must end with think < no_think: evaluation measures what thoughts do."""
    options = {"max_steps": 60, "stop": "fixed", "learning_rate": 3e-3, "max_think_length": 1, "text_ce_weight": 0.0}
    trainer = make_trainer(eval_dataset=corpus.select(range(6)), **options)
    trainer.train()
    result = trainer.evaluate()
    assert result["eval_mean_think_length"] == 1.0
    assert result["eval_bits_think"] < result["eval_bits_no_think"] - 0.1


def test_logs_what_a_user_needs(make_trainer, capsys):
    trainer = make_trainer(log_completions=True, num_completions_to_print=2)
    trainer.train()
    wanted = {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "gate",
        "think_length",
        "thought_entropy",
        "distinct_thoughts",
        "think_gain",
        "tokens_per_second",
        "num_tokens",
    }
    assert wanted <= set(trainer.state.log_history[0])
    assert "Thoughts at step 1" in capsys.readouterr().out


def test_what_is_printed_of_a_thought_is_what_is_logged(make_trainer, monkeypatch):
    """With a learned stop, under the lengths that the model takes: here hardly any thought, where those of full length would bring something."""
    printed = []
    monkeypatch.setattr(measuring, "print_thoughts", lambda tokenizer, samples, *others: printed.append(samples))
    trainer = make_trainer(log_completions=True, max_steps=3, num_forks=1, num_generations=1, advantage="value", per_device_train_batch_size=1)
    trainer.train()
    gains = losses(trainer, "think_gain")
    assert [one["gain"] for (one,) in printed] == pytest.approx(gains, abs=1e-6)
    assert max(map(abs, gains)) > 1e-6
    assert [one["length"] for (one,) in printed] == pytest.approx(losses(trainer, "think_length"), abs=1e-6)


def test_streams_and_accepts_names(make_trainer, tmp_path, corpus):
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = make_trainer(model=str(tmp_path / "model"), train_dataset=corpus.to_iterable_dataset(), max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


COMPLETED = {"text": "whole text", "prompt": "the river ", "completion": "runs"}
PACKED = {"input_ids": list(range(5, 17)), "labels": list(range(5, 17)), "seq_lengths": [6, 6]}


@pytest.mark.parametrize(("row", "options"), [(COMPLETED, {}), (PACKED, {"packing": True, "max_length": 24})], ids=["text_beside_a_completion", "packed"])
def test_a_stream_that_does_not_know_its_columns_is_read_as_any_other(make_trainer, row, options):
    """As those that `map` makes: TRL would end the text that nobody reads, and pack once more what is packed."""
    rows = Dataset.from_list([row] * 8)
    known, unknown = rows.to_iterable_dataset(), rows.to_iterable_dataset().map(lambda row: row)
    assert unknown.column_names is None
    read, same = (next(iter(make_trainer(train_dataset=stream, max_steps=1, **options).train_dataset)) for stream in (known, unknown))
    assert read["input_ids"] == same["input_ids"]
    assert list(read.get("seq_lengths", [])) == list(same.get("seq_lengths", []))


@pytest.mark.parametrize("tie", [True, False])
def test_adapter_trains_itself_and_the_thinking_rows_only(make_trainer, tie):
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), tie=tie)
    trainer = make_trainer(model=model, tokenizer=tokenizer, peft_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), max_steps=3)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in changed)
    rows = [name for name in changed if "trainable_tokens_delta" in name]
    assert len(rows) == (1 if tie else 2)
    for name in rows:
        after, then = weights(trainer)[name], before[name]
        assert len(then) == trainer.vocabulary.num_tokens + 1
        assert torch.equal(after[-1], then[-1]), "nothing trains the guard"
        assert not (after[:-1] == then[:-1]).all(-1).any()


@pytest.mark.parametrize(("rates", "moved"), [((0.0, 1e-2), {"trainable_tokens_delta"}), ((1e-2, 0.0), {"lora_A", "lora_B"})], ids=["rows", "layers"])
def test_thinking_rows_learn_at_a_rate_of_their_own(make_trainer, rates, moved):
    rate, of_rows = rates
    adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    trainer = make_trainer(peft_config=adapter, learning_rate=rate, think_learning_rate=of_rows, max_steps=2)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert {part for name in changed for part in name.split(".")} >= moved
    assert all(moved & set(name.split(".")) for name in changed)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_thinking_tokens_alone_leave_text_as_it_was(make_trainer, tmp_path, tie):
    tokenizer = tiny_tokenizer()
    base = tiny_model("llama", vocab_size=len(tokenizer), tie=tie).eval()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = make_trainer(model=str(tmp_path / "base"), tokenizer=tokenizer, peft_config=thinking_tokens_alone(), max_steps=3, learning_rate=1e-2)
    before = weights(trainer)
    trainer.train()
    changed = [name for name, value in weights(trainer).items() if not torch.equal(value, before[name])]
    assert len(changed) == (1 if tie else 2)
    trainer.save_model(str(tmp_path / "adapter"))
    merged, _ = merge(str(tmp_path / "adapter"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(
            merged.eval()(input_ids=ids).logits[..., : trainer.vocabulary.num_real], base(input_ids=ids).logits[..., : trainer.vocabulary.num_real]
        )


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_an_adapter_folder_and_its_base_are_the_thinking_model(make_trainer, tmp_path, tie, capsys):
    """In plain PEFT, in a process without this package; merged, in plain transformers; and small."""
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer), tie=tie).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = LoraConfig(r=2, target_modules="all-linear")
    trainer = make_trainer(model=str(tmp_path / "base"), tokenizer=tokenizer, peft_config=adapter, max_steps=3, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    ids = torch.tensor([[5, 6, trainer.vocabulary.first_id + 1, 7, trainer.vocabulary.guard_id, 8]])
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=ids).logits[..., : len(trainer.processing_class)]
    torch.save({"ids": ids, "logits": logits}, tmp_path / "expected.pt")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not any(len(value) > 128 for value in weights.values()), "no embedding is in it"
    assert f"Training {sum(value.numel() for value in weights.values()):,} of " in capsys.readouterr().out
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    suppressed = GenerationConfig.from_pretrained(tmp_path / "merged").suppress_tokens
    assert trainer.vocabulary.guard_id in suppressed
    assert ThinkingVocabulary.from_pretrained(tmp_path / "merged") == ThinkingVocabulary.from_pretrained(tmp_path / "adapter") == trainer.vocabulary
    assert main(["generate", str(tmp_path / "adapter"), "the cat"]) == 0
    program = f"""
import sys
sys.modules["hf_thinktok"] = None
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
expected = torch.load({str(tmp_path / "expected.pt")!r})
for kind, folder in ((AutoPeftModelForCausalLM, "adapter"), (AutoModelForCausalLM, "merged")):
    model = kind.from_pretrained({str(tmp_path)!r} + "/" + folder).eval()
    torch.testing.assert_close(model(input_ids=expected["ids"]).logits, expected["logits"], atol=1e-4, rtol=1e-4)
    assert model.generate(input_ids=expected["ids"], max_new_tokens=4).shape[1] > 6
    model.generation_config = GenerationConfig.from_pretrained({str(tmp_path)!r} + "/" + folder)
    said = model.generate(input_ids=expected["ids"], max_new_tokens=1, output_scores=True, return_dict_in_generate=True)
    assert said.scores[0][0, {trainer.vocabulary.guard_id}] == -torch.inf
    AutoTokenizer.from_pretrained({str(tmp_path)!r} + "/" + folder)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_adapter_keeps_its_precision_and_loses_its_dropout(make_trainer):
    adapter = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)
    model = tiny_model("llama", vocab_size=len(tiny_tokenizer())).bfloat16()
    trainer = make_trainer(model=model, peft_config=adapter, max_steps=1)
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    assert all(module.p == 0 for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout))
    trainer.train()


DROPPING = {
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}, "opt": {"dropout": 0.5, "layerdrop": 0.5}, "llama": {"attention_dropout": 0.5},
    "bloom": {"hidden_dropout": 0.5, "attention_dropout": 0.5}, "xglm": {"dropout": 0.5, "attention_dropout": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("family", DROPPING)
def test_thoughts_of_a_place_are_compared_without_dropout(make_trainer, family, caplog):
    """Two thoughts that are the same are worth the same, which dropout would hide; the checkpoint goes on with its own."""
    for disable in (True, False):
        model = tiny_model(family, vocab_size=len(tiny_tokenizer()), **DROPPING[family])
        trainer = make_trainer(model=model, thoughts="filler", stop="fixed", max_steps=1, disable_dropout=disable)
        assert ("Dropout is off in" in caplog.text) is disable
        caplog.clear()
        attention = any("att" in name for name in DROPPING[family])
        assert drops_attention(trainer.model) is (attention and not disable), "which kernels may be taken hangs on it"
        trainer.train()
        assert (losses(trainer, "reward_std")[0] < 1e-5) is disable
        assert all(getattr(trainer.model.config, name) == 0.5 for name in DROPPING[family])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_says_the_same_until_it_is_changed(family, tied, tmp_path):
    model, ids = tiny_model(family, tie=tied), torch.arange(5)[None]
    before = model(ids).logits
    untie(model)
    with torch.no_grad():
        model.get_output_embeddings().weight[7] += 1.0
    model.tie_weights()  # as loaders and wrappers do
    model.save_pretrained(tmp_path)
    for one in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        after = one(ids).logits
        assert not torch.equal(after[..., 7], before[..., 7])
        after[..., 7] = before[..., 7]
        torch.testing.assert_close(after, before)


def test_adapters_that_cannot_carry_thoughts(make_trainer):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="LM head of this model has a bias"):
        make_trainer(model=tiny_model("phi", tie=False, vocab_size=len(tokenizer)), peft_config=LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="IA3Config, which cannot train new rows"):
        make_trainer(peft_config=IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="lora_bias=True gives layers a bias"):
        make_trainer(peft_config=LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    make_trainer(family="gpt2", peft_config=LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_bias=True))  # it has biases, but for its head


def test_two_models_with_the_same_seed_are_the_same_whatever_was_drawn_before():
    made = []
    for drawn in (1, 7):
        model, tokenizer = tiny_model("llama", vocab_size=320, tie=False), tiny_tokenizer()
        torch.rand(drawn)
        add_thinking_tokens(model, tokenizer, 4)
        made.append(model.state_dict())
    assert all(torch.equal(one, made[1][name]) for name, one in made[0].items())


def test_the_value_baseline_waits_for_thoughts_and_is_missed_on_resume(make_trainer, tmp_path):
    options = {"advantage": "value", "stop": "fixed", "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    make_trainer(think_start=2, **options).train()
    make_trainer(**options | {"advantage": "group", "output_dir": str(tmp_path / "plain")}).train()
    with pytest.raises(ValueError, match="was made without value"):
        make_trainer(**options).train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-1"))


def test_checkpoint_thinks_in_plain_transformers(make_trainer, tmp_path):
    trainer = make_trainer(output_dir=str(tmp_path / "out"), max_steps=2, **open_minded())
    trainer.train()
    trainer.save_model()
    ids = torch.randint(300, (1, 12))
    with torch.no_grad():
        torch.save({"ids": ids, "logits": trainer.model.eval()(input_ids=ids).logits}, tmp_path / "expected.pt")
    program = f"""
import sys
sys.modules["hf_thinktok"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained({str(tmp_path / "out")!r}) for kind in (AutoModelForCausalLM, AutoTokenizer))
expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(model(input_ids=expected["ids"]).logits, expected["logits"])
torch.manual_seed(0)
out = model.generate(expected["ids"], max_new_tokens=64, do_sample=True)
first = model.config.thinktok["first_id"]
assert (out >= first).any(), "a gate that is half open thinks in 64 tokens"
assert "think_" in tokenizer.decode(out[0]) and "think_" not in tokenizer.decode(out[0], skip_special_tokens=True)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["thinktok"]
    assert {"first_id", "num_tokens", "guard_id", "max_think_length", "stop", "memory", "blind", "lookahead"} <= set(config)


def test_goes_on_from_a_thinking_checkpoint(make_trainer, tmp_path):
    first = make_trainer(output_dir=str(tmp_path / "out"))
    first.train()
    first.save_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    second = make_trainer(model=model, tokenizer=tokenizer, num_think_tokens=None)
    assert second.vocabulary == first.vocabulary == ThinkingVocabulary.from_pretrained(tmp_path / "out")
    assert torch.equal(model.get_input_embeddings().weight, first.model.get_input_embeddings().weight)
    second.train()


@pytest.mark.parametrize("before", [ThinkTokTrainer, SFTTrainer])
def test_a_model_trained_before_in_bf16_is_trained_on(make_trainer, before, corpus, tmp_path):
    """accelerate leaves its autocast around the forward of a model that it trained."""
    if before is SFTTrainer:
        config = SFTConfig(str(tmp_path / "sft"), bf16=True, use_cpu=True, max_steps=1, report_to="none", save_strategy="no", gradient_checkpointing=False)
        first = SFTTrainer(tiny_model(vocab_size=len(tiny_tokenizer())), args=config, train_dataset=corpus, processing_class=tiny_tokenizer())
    else:
        first = make_trainer(bf16=True)
    first.train()
    second = make_trainer(model=first.model, tokenizer=first.processing_class, bf16=True)
    second.train()
    assert all(map(math.isfinite, losses(second)))


@pytest.mark.parametrize("options", [{"tie": False}, {"policies": "split"}], ids=str)
def test_an_optimizer_that_lacks_what_is_to_be_trained_is_refused(corpus, tokenizer, tmp_path, options):
    """New rows make a new LM head, and a second model is one more."""
    model = tiny_model(vocab_size=len(tokenizer), tie=options.pop("tie", True))
    own = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = ThinkTokConfig(str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none", num_think_tokens=4, **options)
    with pytest.raises(ValueError, match="lacks .*optimizer_cls_and_kwargs"):
        ThinkTokTrainer(model, args=config, train_dataset=corpus, processing_class=tokenizer, optimizers=(own, None))


def test_an_optimizer_built_after_the_thinking_rows_trains_them(corpus, tokenizer, tmp_path):
    model = tiny_model(vocab_size=len(tokenizer), tie=False)
    vocabulary = add_thinking_tokens(model, tokenizer, 4)
    own = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model.get_output_embeddings().weight[vocabulary.first_id].clone()
    config = ThinkTokConfig(str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no")
    trainer = ThinkTokTrainer(model, args=config, train_dataset=corpus, processing_class=tokenizer, optimizers=(own, None))
    trainer.train()
    assert not torch.equal(before, model.get_output_embeddings().weight[vocabulary.first_id])


@pytest.mark.parametrize("control", [{}, {"num_forks": 0}, {"num_think_tokens": 0}], ids=str)
def test_experts_train_alike_without_their_router_s_loss_and_their_config_says_so(make_trainer, control, caplog):
    """TRL would add it where nothing is thought, and thinking cannot."""
    model = tiny_model("mixtral", vocab_size=len(tiny_tokenizer()), router_aux_loss_coef=0.5)
    trainer = make_trainer(model=model, max_steps=1, **control)
    assert "without its load-balancing loss" in caplog.text
    trainer.train()
    assert not any("aux_loss" in entry for entry in trainer.state.log_history)
    assert not model.config.output_router_logits


def test_user_text_cannot_enter_a_thought_through_the_trainer(make_trainer):
    rows = Dataset.from_dict({"text": ["a <|think_0|> b <|think_3|><|think_1|> c and more text"] * 8})
    trainer = make_trainer(train_dataset=rows)
    ids = {i for row in trainer.train_dataset["input_ids"] for i in row}
    assert ids.isdisjoint(trainer.vocabulary.ids)
    trainer.train()


@pytest.mark.parametrize("family", ["bloom", "mamba", "gpt2", "gemma3_text"])
def test_other_families_train(make_trainer, family):
    trainer = make_trainer(family=family, max_steps=1)
    assert trainer.engine.name == ("replicated" if family in ("bloom", "mamba") else "tree")
    trainer.train()
    assert math.isfinite(losses(trainer)[0])


def test_the_engines_train_alike(make_trainer):
    packed, replicated = make_trainer(engine="tree", max_steps=2), make_trainer(engine="replicated", max_steps=2)
    packed.train(), replicated.train()
    assert losses(packed) == pytest.approx(losses(replicated), abs=1e-4)
    for (name, a), b in zip(weights(packed).items(), weights(replicated).values(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0, msg=name)


def test_calibrated_on_the_training_text(make_trainer, monkeypatch):
    calibrate, given = trainer_module.add_thinking_tokens, []
    monkeypatch.setattr(trainer_module, "add_thinking_tokens", lambda *args, **how: given.append(how["sample_text"]) or calibrate(*args, **how))
    trainer = make_trainer(max_steps=1)
    (texts,) = given
    assert set(texts) <= set(CORPUS)
    trainer.train()
    assert 0.005 < losses(trainer, "gate")[0] < 0.2


def test_add_thinking_tokens_alone_keeps_the_loss(corpus):
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    ids = tokenizer(CORPUS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
        vocabulary = add_thinking_tokens(model, tokenizer, 4)
        after = model(ids).logits
    torch.testing.assert_close(after[..., : vocabulary.num_real], before)


def test_several_evaluation_sets_keep_their_names(make_trainer, corpus):
    trainer = make_trainer(eval_dataset={"short": corpus.select(range(4)), "long": corpus.select(range(12))})
    result = trainer.evaluate()
    assert (result["eval_short_documents"], result["eval_long_documents"]) == (4, 12)
    assert "eval_long_gain" in result


def test_the_best_model_is_that_which_thinks_best():
    """Unless another metric is named: transformers' own is the loss of the text without thoughts."""
    options = {"output_dir": "out", "load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "use_cpu": True}
    found = [ThinkTokConfig(**options, **more) for more in ({}, {"num_forks": 0}, {"metric_for_best_model": "loss"})]
    assert [(args.metric_for_best_model, args.greater_is_better) for args in found] == [("bits_think", False), ("loss", False), ("loss", False)]


@pytest.mark.parametrize(("metric", "best"), [("bits_think", min), ("eval_far_bits_no_think", min), ("far_mean_think_length", min), ("far_gain", max)])
def test_the_best_model_has_the_fewest_bits_and_the_largest_gain(make_trainer, corpus, metric, best):
    """Without greater_is_better; transformers would take the most of whatever is no loss."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "max_steps": 3}
    rows = corpus.select(range(4))
    trainer = make_trainer(eval_dataset={"far": rows} if "far" in metric else rows, metric_for_best_model=metric, learning_rate=0.1, **options)
    trainer.train()
    found = [entry[name] for entry in trainer.state.log_history if (name := f"eval_{metric.removeprefix('eval_')}") in entry]
    assert len(set(found)) == 3
    assert trainer.state.best_metric == best(found)


def test_the_worst_model_is_not_taken_for_the_best():
    """Whoever changes a config hands on what was derived in it."""
    assert {*LESS_IS_BETTER, *MORE_IS_BETTER} <= set(GainByDocument([[1.0] * 6] * 2).summary())
    args = ThinkTokConfig("out", load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1, use_cpu=True)
    for changes in ({"metric_for_best_model": "gain"}, {"greater_is_better": True}):
        with pytest.raises(ValueError, match="would keep the worst model by .*: leave it out"):
            dataclasses.replace(args, **changes)
    assert dataclasses.replace(args, metric_for_best_model="gain", greater_is_better=None).greater_is_better
    assert dataclasses.replace(args, metric_for_best_model="loss", greater_is_better=True).greater_is_better, "of a loss transformers knows it"


def test_without_thoughts_the_best_model_is_of_its_text(make_trainer, corpus):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    for metric in (None, "gain"):
        control = control_of(ThinkTokConfig("out", **options, metric_for_best_model=metric, use_cpu=True), "no_think")
        assert (control.metric_for_best_model, control.greater_is_better) == ("loss", False)
    trainer = make_trainer(eval_dataset=corpus.select(range(4)), **{name: getattr(control, name) for name in (*options, "num_forks", "metric_for_best_model")})
    trainer.train()
    assert trainer.state.best_metric == min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    with pytest.raises(ValueError, match=r"metric_for_best_model=gain is of thoughts, and this run has none: leave it out"):
        make_trainer(eval_dataset=corpus, **options, num_forks=0, metric_for_best_model="eval_gain")


def test_an_evaluation_within_a_step_changes_nothing(make_trainer, corpus):
    """Each batch of an accumulated step draws by its number in the step."""

    class Evaluates(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            trainer.evaluate()

    found = []
    for callbacks in ([], [Evaluates()]):
        trainer = make_trainer(gradient_accumulation_steps=3, max_steps=2, eval_dataset=corpus.select(range(4)))
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1]


def test_rows_as_long_as_the_context(make_trainer):
    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt2", vocab_size=len(tokenizer), n_positions=24)
    trainer = make_trainer(model=model, tokenizer=tokenizer, max_length=24, num_forks=22, max_think_length=4)
    trainer.train()
    assert math.isfinite(losses(trainer)[-1])
    with pytest.raises(ValueError, match="24 positions"):
        make_trainer(model=model, tokenizer=tokenizer, max_length=24, num_forks=4, num_think_tokens=None, memory="persistent", stop="sampled")


@pytest.mark.parametrize("fork_positions", ["random", "entropy", "stride", "all"])
def test_without_forks_nothing_is_thought_wherever_they_would_be(make_trainer, fork_positions, monkeypatch):
    trainer = make_trainer(num_forks=0, fork_positions=fork_positions, max_steps=1)
    monkeypatch.setattr(trainer, "_entropy", lambda *inputs: pytest.fail("looked for places to think at"))
    trainer.train()
    assert "think_gain" not in trainer.state.log_history[0]
    assert trainer.state.log_history[0]["num_tokens"] > 0


def test_four_bits_and_an_adapter(tmp_path, corpus):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    tokenizer = tiny_tokenizer()
    tiny_model(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = {"max_length": 48, "max_steps": 2, "num_think_tokens": 4, "num_forks": 3, "learning_rate": 1e-5, "bf16": False, "use_cpu": True}
    args = ThinkTokConfig(str(tmp_path / "out"), report_to="none", **options)
    adapter, quantized = LoraConfig(r=4, target_modules="all-linear"), BitsAndBytesConfig(load_in_4bit=True)
    trainer = ThinkTokTrainer(str(tmp_path), args, train_dataset=corpus, peft_config=adapter, quantization_config=quantized)
    layer = trainer.model.get_base_model().model.layers[0].self_attn.q_proj
    assert isinstance(layer.base_layer, bitsandbytes.nn.Linear4bit)
    rows = next(one for name, one in trainer.model.named_parameters() if "trainable_tokens_delta" in name)
    before = layer.base_layer.weight.clone(), layer.lora_B["default"].weight.clone(), rows.clone()
    trainer.train()
    assert torch.equal(layer.base_layer.weight, before[0])
    assert not torch.equal(layer.lora_B["default"].weight, before[1])
    assert (rows != before[2])[:4].float().mean() > 0.9, "in bf16 steps this small round away"
    model = tiny_model(vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match="quantization_config would do nothing: give its name"):
        ThinkTokTrainer(model, args, train_dataset=corpus, processing_class=tokenizer, peft_config=adapter, quantization_config=quantized)


def test_a_tokenizer_serves_the_next_trainer_as_well(make_trainer, tmp_path):
    """Where the model is loaded by its name, each time anew."""
    folder = save_tiny(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    for _ in range(2):
        assert len(make_trainer(model=str(folder), tokenizer=tokenizer).processing_class) == size + 5
    assert len(tokenizer) == size


@pytest.mark.parametrize("packed", ["base", "at load"])
def test_an_adapter_beside_weights_of_few_bits_is_merged_into_those(tmp_path, corpus, packed):
    """Into what it was trained beside: among weights of four bits it would be rounded away, and whole ones are others."""
    pytest.importorskip("bitsandbytes")
    four, out = BitsAndBytesConfig(load_in_4bit=True), tmp_path / "out"
    tiny_model(vocab_size=len(tiny_tokenizer()), hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    if packed == "base":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four)
        model.save_pretrained(tmp_path / "base")
    options = {"max_length": 48, "max_steps": 3, "num_think_tokens": 4, "num_forks": 3, "learning_rate": 0.05, "bf16": False, "use_cpu": True}
    trainer = ThinkTokTrainer(
        str(tmp_path / "base"),
        ThinkTokConfig(str(out), report_to="none", **options),
        train_dataset=corpus,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        quantization_config=None if packed == "base" else four,
    )
    trainer.train()
    trainer.save_model()
    assert main(["merge", str(out), str(tmp_path / "merged")]) == 0
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        says = lambda model: model.eval()(input_ids=ids).logits[..., : trainer.vocabulary.num_real]
        trained, merged = says(trainer.model), says(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32"))
        with trainer.model.disable_adapter():
            learned = (says(trainer.model) - trained).abs().max()
    assert (merged - trained).abs().max() < 0.05 * learned


def test_a_model_in_parts_on_several_devices(make_trainer):
    model = tiny_model(vocab_size=len(tiny_tokenizer()))
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    with pytest.raises(ValueError, match="spread over 0, cpu, and each process trains on one device: leave device_map out"):
        make_trainer(model=model)


@pytest.mark.parametrize(
    ("device", "zero3", "fsdp", "there"), [("cpu", 0, 0, None), ("cuda:1", 0, 0, "cuda:1"), ("cuda:1", 1, 0, None), ("cuda:1", 0, 1, None)]
)
def test_models_are_loaded_where_they_are_trained(monkeypatch, device, zero3, fsdp, there):
    monkeypatch.setattr(loading, "is_deepspeed_zero3_enabled", lambda: bool(zero3))
    args = SimpleNamespace(device=torch.device(device), fsdp=["full_shard"] if fsdp else [])
    assert loading.placement(args) == (there and {"": torch.device(there)})


def test_what_a_recipe_says_of_its_model_is_told_where_it_is_loaded():
    model = ModelConfig("a", model_revision="b", attn_implementation="eager", dtype="bfloat16")
    assert loading.init_kwargs(model, {"dtype": "float16"}) == {"revision": "b", "attn_implementation": "eager", "dtype": "float16"}


@pytest.mark.parametrize(("mixed", "refused"), [("bf16", True), ("no", False)])
def test_what_a_launcher_set_deepspeed_to_cannot_be_changed(tmp_path, monkeypatch, mixed, refused):
    monkeypatch.setattr(loading, "_seconds_of_product", lambda dtype: 22.0 if dtype == torch.bfloat16 else 1.0)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    args = ThinkTokConfig(str(tmp_path), use_cpu=True, bf16=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", mixed)
    with pytest.raises(ValueError, match="--mixed_precision no") if refused else contextlib.nullcontext():
        assert not loading.fit_to_cpu(args).bf16


@pytest.mark.parametrize(("slower", "stays"), [(1.5, True), (22.0, False)])
def test_bf16_is_for_cpus_that_have_it(tmp_path, monkeypatch, slower, stays):
    monkeypatch.setattr(loading, "_seconds_of_product", lambda dtype: slower if dtype == torch.bfloat16 else 1.0)
    assert loading.fit_to_cpu(ThinkTokConfig(str(tmp_path), use_cpu=True, bf16=True)).bf16 is stays


def test_all_processes_compute_in_the_type_of_the_first(tmp_path, monkeypatch):
    """Each times products for itself, and one may have been kept waiting."""
    monkeypatch.setattr(loading, "_seconds_of_product", lambda dtype: 1.0)
    monkeypatch.setattr(loading, "broadcast_object_list", lambda found: found.__setitem__(0, True))
    assert not loading.fit_to_cpu(ThinkTokConfig(str(tmp_path), use_cpu=True, bf16=True)).bf16


def test_a_type_is_timed_by_one_thread(tmp_path, monkeypatch):
    """Several wait for each other on a busy machine, and fp32 seemed no faster than bf16 that is 50 times as slow."""
    threads, product = set(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda *matrices: threads.add(torch.get_num_threads()) or product(*matrices))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loading.fit_to_cpu(ThinkTokConfig(str(tmp_path), use_cpu=True, bf16=True))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == {1}


@pytest.mark.parametrize("lengths", [[0, 0], [0, 2]])
def test_supplied_thoughts_may_be_none(make_trainer, lengths):
    rows = Dataset.from_dict({"text": ["the cat sat on", "the cat sat off"], "think_length": lengths, "thoughts": [list(range(length)) for length in lengths]})
    options = {"supply_thoughts": True, "stop": "fixed", "num_forks": 1, "num_generations": 3, "max_steps": 1, "per_device_train_batch_size": 2}
    trainer = make_trainer(train_dataset=rows, **options)
    trainer.train()
    (rollout,) = trainer._rollouts
    assert rollout.lengths_BKG[:, 0, 0].sort().values.tolist() == lengths
    said = rollout.thoughts_BKGL[:, :, 0][rollout.said_BKGL[:, :, 0]] - trainer.vocabulary.first_id
    assert said.tolist() == list(range(max(lengths)))


def test_a_model_in_four_bits_is_evaluated(tmp_path):
    pytest.importorskip("bitsandbytes")
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128)
    add_thinking_tokens(model, tokenizer, 4)
    model.save_pretrained(tmp_path)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    found = evaluate_thinking(packed, tokenizer, [{"text": CORPUS[0]}], num_forks=4, num_samples=1).summary()
    plain = evaluate_thinking(model, tokenizer, [{"text": CORPUS[0]}], num_forks=4, num_samples=1).summary()
    assert found["arms"]["no_think"]["bits_per_token"] == pytest.approx(plain["arms"]["no_think"]["bits_per_token"], rel=0.2)


def test_tokens_per_second_are_of_training_whenever_evaluations_fall(make_trainer, corpus, monkeypatch):
    """On a clock that a step of training moves by a second and a batch of an evaluation by a hundred."""

    class Clock(TrainerCallback):
        now = 0.0

        def on_step_end(self, *args, **kwargs):
            self.now += 1

        def on_prediction_step(self, *args, **kwargs):
            self.now += 100

    def speeds(eval_steps, sets=1):
        clock = Clock()
        monkeypatch.setattr("hf_thinktok.measuring.time", SimpleNamespace(perf_counter=lambda: clock.now))
        options = {"eval_strategy": "steps", "eval_steps": eval_steps} if eval_steps else {}
        held_out = {f"part{i}": corpus.select(range(4)) for i in range(sets)} if sets > 1 else corpus.select(range(4))
        trainer = make_trainer(max_steps=12, logging_steps=4, eval_dataset=held_out, save_strategy="no", **options)
        trainer.add_callback(clock)
        clock.now += 1000  # a notebook's cells
        trainer.train()
        return [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]

    plain = speeds(None)
    assert len(plain) == 3
    assert max(plain) < 2 * min(plain)
    assert speeds(4) == speeds(3) == speeds(4, sets=2) == pytest.approx(plain)


def test_nodes_per_second_are_of_nodes_that_are_there(make_trainer):
    """Not of what fills up shorter rows."""
    text = Dataset.from_dict({"text": [CORPUS[0], "the cat sat on the mat"] * 2})
    trainer = make_trainer(train_dataset=text, stop="fixed", max_steps=1, num_forks=3, num_generations=2, max_think_length=2, lookahead=1)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "nodes_per_second" in entry)
    nodes = entry["num_tokens"] * entry["nodes_per_second"] / entry["tokens_per_second"]
    assert nodes == pytest.approx(entry["num_tokens"] + 2 * 3 * 2 * 2)  # rows, forks, thoughts, tokens


def test_rewards_are_weighted_as_asked(make_trainer):
    def one(lengths, **kwargs):
        return torch.ones_like(lengths)

    def three(lengths, **kwargs):
        return torch.full_like(lengths, 3)

    trainer = make_trainer(reward_funcs=[one, three], reward_weights=[2.0, -0.5], stop="fixed", max_steps=1)
    trainer.train()
    assert losses(trainer, "reward") == [pytest.approx(2.0 - 1.5)]


def test_rewards_are_given_nothing_with_a_gradient(make_trainer):
    seen = []

    def watched(logps, **judgement):
        seen.append([name for name, value in (judgement | {"logps": logps}).items() if torch.is_tensor(value) and value.requires_grad])
        return logps.mean(-1)

    make_trainer(reward_funcs=watched, max_steps=1).train()
    assert seen == [[]]


def test_a_shut_gate_gains_nothing_on_held_out_text(make_trainer, corpus):
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), tie=False)
    vocabulary = add_thinking_tokens(model, tokenizer, 4)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))
    model.lm_head.bias.data[list(vocabulary.ids)] = -50.0
    result = make_trainer(model=model, tokenizer=tokenizer, eval_dataset=corpus.select(range(4))).evaluate()
    assert result["eval_gain"] == pytest.approx(0.0, abs=1e-4)


def test_nothing_is_explored_on_held_out_text(make_trainer, corpus):
    found = []
    for epsilon in (0.0, 1.0):
        trainer = make_trainer(eval_dataset=corpus.select(range(4)), stop="fixed", epsilon_greedy=epsilon)
        with torch.no_grad():
            trainer.model.get_output_embeddings().weight[trainer.vocabulary.first_id] *= 50  # a policy with one favourite
        found.append(trainer.evaluate()["eval_bits_think"])
    assert found[0] == found[1]


def test_thoughts_are_kept_near_the_adapter_s_base(make_trainer):
    """Its reference is the model without the adapter, and not as it is now."""
    trainer = make_trainer(beta=0.1, stop="fixed", max_steps=3, learning_rate=0.05, peft_config=LoraConfig(r=2, target_modules="all-linear"))
    trainer.train()
    kls = losses(trainer, "kl")
    assert kls[0] == pytest.approx(0, abs=1e-6)
    assert kls[-1] > 1e-3


def test_it_thinks_where_the_next_token_is_hardest(make_trainer):
    trainer = make_trainer(fork_positions="entropy", num_forks=3)
    inputs = next(iter(trainer.get_train_dataloader()))
    forks = trainer._forks(trainer.model, inputs, trainer._labels(inputs), torch.Generator(), "entropy")
    for ids, found, documents in zip(inputs["input_ids"], forks, inputs["documents"], strict=True):
        ids = ids[documents >= 0]
        logps = trainer.model(input_ids=ids[None]).logits[0, :-1, : trainer.vocabulary.num_real].log_softmax(-1)
        assert found.tolist() == (-(logps.exp() * logps).sum(-1)).topk(3).indices.sort().values.tolist()


FORMATTED = {
    "a chat": (lambda text: {"messages": [{"role": "user", "content": text}]}, lambda row: "so: " + row["messages"][0]["content"], {}),
    "a text column of its own": (lambda text: {"content": text}, lambda row: "so: " + row["content"], {"dataset_text_field": "content"}),
    "a prompt and an answer": (lambda text: {"prompt": "so:", "answer": text}, lambda row: f"{row['prompt']} {row['answer']}", {}),
    "no text in some": (lambda text: {"text": text if "cat" in text else None}, lambda row: f"so: {row['text']}", {}),
}


@pytest.mark.parametrize("case", FORMATTED)
def test_what_a_formatting_function_makes_is_what_is_trained_on(make_trainer, corpus, case):
    make, formatter, options = FORMATTED[case]
    rows = Dataset.from_list([make(text) for text in corpus["text"]])
    trainer = make_trainer(train_dataset=rows, formatting_func=formatter, **options)
    texts = trainer.processing_class.batch_decode(trainer.train_dataset["input_ids"][:])
    assert all(text.startswith("so: ") for text in texts)
    assert math.isfinite(trainer.evaluate(rows.select(range(4)))["eval_loss"])


def test_packed_rows_are_packed_once(make_trainer, corpus):
    trainer = make_trainer(eval_dataset=corpus.select(range(9)), packing=True, eval_packing=True, max_length=64)
    found, again, of_dict = trainer.evaluate(), trainer.evaluate(trainer.eval_dataset), trainer.evaluate({"x": corpus.select(range(9))})
    assert found["eval_documents"] == again["eval_documents"] == of_dict["eval_x_documents"] > 4
    assert found["eval_bits_no_think"] == again["eval_bits_no_think"] == of_dict["eval_x_bits_no_think"]


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_a_long_document_that_is_packed_to_evaluate_on_counts_once(make_trainer, strategy):
    rows = Dataset.from_dict({"text": [text * 20 for text in CORPUS[:2]]})
    packed, plain = (make_trainer(eval_dataset=rows, packing=True, packing_strategy=strategy, eval_packing=packs, max_length=32) for packs in (True, False))
    found, wanted = packed.evaluate(), plain.evaluate()
    assert found["eval_documents"] == wanted["eval_documents"] == 2
    assert found["eval_loss"] == pytest.approx(wanted["eval_loss"], abs=1e-5)


def test_rows_that_are_made_as_they_are_read(make_trainer, corpus, tokenizer):
    made = corpus.with_transform(lambda rows: {"input_ids": tokenizer(rows["text"])["input_ids"], "labels": tokenizer(rows["text"])["input_ids"]})
    trainer = make_trainer(train_dataset=made, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False)
    trainer.train()
    assert len(losses(trainer)) == 2


def test_all_thoughts_that_stay_have_room(make_trainer):
    """Rows as long as they are, with positions for one thought and not for all."""
    rows = Dataset.from_dict({"input_ids": [list(range(10, 256))] * 4})
    trainer = make_trainer("gpt2", train_dataset=rows, max_length=None, memory="persistent", stop="fixed", num_forks=8)
    assert trainer.engine.name == "tree", "whose rows are tried with as many thoughts as fit"
    trainer.train()
    assert "reward" not in trainer.state.log_history[0], "there is no place where all of them fit"


def test_what_a_step_costs_is_not_told_of_the_text_alone(make_trainer):
    trainer = make_trainer()
    trainer.train()
    assert not any("total_flos" in entry for entry in trainer.state.log_history)


def test_an_end_token_may_be_an_option(make_trainer, tokenizer):
    tokenizer.eos_token = None
    assert make_trainer(tokenizer=tokenizer, eos_token="<|endoftext|>").processing_class.eos_token == "<|endoftext|>"


def test_random_thoughts_that_stay_are_random_everywhere(make_trainer, corpus, monkeypatch):
    """The control reads random thoughts at the places before as well, not the model's own."""
    trees = []
    trainer = make_trainer(memory="persistent", stop="fixed", lookahead=3, eval_dataset=corpus.select(range(2)))
    make = trainer._tree
    monkeypatch.setattr(trainer, "_tree", lambda inputs, rollout: trees.append(rollout.thoughts_BKGL) or make(inputs, rollout))
    monkeypatch.setattr(
        trainer_module,
        "control_thoughts",
        lambda rollout, vocabulary, generator: dataclasses.replace(rollout, thoughts_BKGL=0 * rollout.thoughts_BKGL + vocabulary.first_id),
    )
    trainer.evaluate()
    control = trees[-1]
    assert control.shape[2] == trainer.args.num_generations
    assert (control == trainer.vocabulary.first_id).all(), "the first of a group is what stays in the text"


def test_what_has_not_begun_to_think_is_evaluated_as_well(make_trainer, corpus):
    result = make_trainer(think_start=5, max_steps=6, eval_dataset=corpus.select(range(4))).evaluate()
    assert {"eval_bits_no_think", "eval_bits_think", "eval_gain"} <= set(result)


def test_random_thoughts_are_as_long_as_the_models_own_where_it_is_evaluated(make_trainer, monkeypatch):
    """The gate reads random tokens, too, and would end them elsewhere: then lengths and not words would be compared."""
    speeches, trainer = [], make_trainer(stop="learned", max_think_length=3)
    monkeypatch.setattr("hf_thinktok.trainer.speak", lambda *args: speeches.append(speak(*args)) or speeches[-1])
    trainer.evaluate(trainer.train_dataset)
    assert speeches
    for speech in speeches:
        own, random = speech.lengths_BKG.chunk(2, dim=2)
        assert torch.equal(own, random)
        assert not torch.equal(*speech.logps_BKGH.chunk(2, dim=2))


def test_a_reward_that_works_in_place_changes_nothing_else(make_trainer):
    def clipped(logps, mask, **kwargs):
        return logps.masked_fill_(~mask[:, :, None], 0.0).clamp_(min=-3.0).sum(-1)

    def copied(logps, mask, **kwargs):
        return clipped(logps.clone(), mask)

    def logged(reward):
        trainer = make_trainer(stop="fixed", reward_funcs=[reward, "log_prob"], logging_steps=1, max_steps=2)
        trainer.train()
        return [
            {name: value for name, value in log.items() if name in ("loss", "think_gain", "reward", "rewards/log_prob")} for log in trainer.state.log_history
        ]

    assert logged(clipped) == logged(copied)


def test_gains_are_there_whatever_a_subclass_logs(make_trainer, corpus):
    class Quiet(ThinkTokTrainer):
        def log(self, logs, start_time=None):
            super().log({name: value for name, value in logs.items() if name != "eval_gain"}, start_time)

    trainer = make_trainer(eval_dataset=corpus.select(range(4)), save_strategy="best", eval_strategy="steps", eval_steps=1, max_steps=1)
    trainer.__class__ = Quiet
    trainer.train()
    assert trainer.state.best_metric is not None
    assert "eval_gain" in trainer.evaluate()
    assert not any("eval_gain" in log for log in trainer.state.log_history)


def test_a_completion_may_stand_alone(make_trainer):
    """An empty prompt: all of the completion is learned, as of a text."""
    alone, text = (
        make_trainer(train_dataset=Dataset.from_dict(rows), max_steps=2, num_forks=0)
        for rows in ({"prompt": [""] * 8, "completion": CORPUS[:4] * 2}, {"text": CORPUS[:4] * 2})
    )
    assert alone.train().training_loss == pytest.approx(text.train().training_loss, abs=1e-5)


def test_options_may_be_tuples_and_numbers_of_numpy():
    args = ThinkTokConfig(
        "nowhere", use_cpu=True, think_cost=(0.0, 0.001, 1000), reward_weights=(1.0,), coverage_coef=np.float32(0.5), stop="learned", reward_funcs=("log_prob",)
    )
    assert args.think_cost == [0.0, 0.001, 1000]
    assert args.coverage_coef == [0.5]
