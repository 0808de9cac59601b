"""lm-evaluation-harness: without thoughts its own `hf`, with them what the model says of ordinary rows, whatever the batch."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from unittest.mock import patch

import datasets
import pytest
import torch
from commands import ROOT, captured, started
from lm_eval import tasks as lm_eval_tasks
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string
from models import CORPUS, save_tiny, tiny_model, tiny_tokenizer, tokenizer_of_kind
from peft import LoraConfig
from plain_rows import thinker

from hf_thinktok import add_thinking_tokens
from hf_thinktok.cli import main
from hf_thinktok.evaluation.harness import ThinkTokLM
from hf_thinktok.evaluation.inspection import inspect_text
from hf_thinktok.peft import load_whole

PAIRS = [(f"{CORPUS[i % 4]} {i}", f" {CORPUS[(i + 1) % 4][: 7 + 5 * i]}") for i in range(6)]
PROMPTS = [(f"{text} {i}", {"until": ["."], "max_gen_toks": 12, "do_sample": False}) for i, text in enumerate(CORPUS[:4])]


def asked(kind: str, arguments: list) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


def harness(model, kind=ThinkTokLM, **options):
    return kind(pretrained=model, tokenizer=tiny_tokenizer_of(model), device="cpu", max_length=128, **options)


def tiny_tokenizer_of(model):
    tokenizer = tiny_tokenizer()
    if hasattr(model.config, "thinktok"):
        add_thinking_tokens(tiny_model(vocab_size=len(tokenizer)), tokenizer, model.config.thinktok["num_tokens"])
    return tokenizer


@pytest.fixture
def pair():
    """A model before and after it got thinking tokens."""
    tokenizer = tiny_tokenizer()
    plain, model = (tiny_model("llama", vocab_size=len(tokenizer)) for _ in range(2))
    add_thinking_tokens(model, tokenizer, 4)
    return plain, model


def test_without_thoughts_it_is_the_harness_own_model(pair):
    plain, model = pair
    theirs, ours = harness(plain, HFLM, batch_size=3), harness(model, thoughts="none", batch_size=3)
    for kind, arguments in (("loglikelihood", PAIRS), ("loglikelihood_rolling", [(text,) for text in CORPUS[:3]])):
        for one, other in zip(getattr(theirs, kind)(asked(kind, arguments)), getattr(ours, kind)(asked(kind, arguments)), strict=True):
            assert one == pytest.approx(other, abs=1e-4)
    assert theirs.generate_until(asked("generate_until", PROMPTS)) == ours.generate_until(asked("generate_until", PROMPTS))


@pytest.mark.parametrize("thoughts", ["own", "always"])
def test_a_likelihood_is_that_of_the_inspected_text(thoughts):
    model = thinker(scale=1.0)[0]
    tokenizer = tiny_tokenizer_of(model)
    found = harness(model, thoughts=thoughts, max_think_length=2, batch_size=4).loglikelihood(asked("loglikelihood", PAIRS))
    for (context, continuation), (logp, greedy) in zip(PAIRS, found, strict=True):
        inspected = inspect_text(model, tokenizer, context + continuation, max_length=500, max_think_length=2, top=1)
        judged = inspected[len(tokenizer(context)["input_ids"]) - 1 :]
        assert logp == pytest.approx(sum(token.own if thoughts == "own" else token.after for token in judged), abs=1e-3)
        if thoughts == "always":
            assert greedy == all(token.top_after[0][0] == token.text for token in judged)


@pytest.mark.parametrize("thoughts", ["none", "own", "always"])
def test_a_text_that_would_be_a_thought_is_never_predicted(thoughts):
    """What the guard stands for; the others of the batch are as they are without it."""
    model = thinker(scale=1.0)[0]
    lm = harness(model, thoughts=thoughts, batch_size=2)
    alone = lm.loglikelihood(asked("loglikelihood", PAIRS[:1]))[0]
    guarded, other = lm.loglikelihood(asked("loglikelihood", [("the cat", " sat <|think_ on"), PAIRS[0]]))
    assert guarded == (-math.inf, False)
    assert other[0] == pytest.approx(alone[0], abs=1e-3)


@pytest.mark.parametrize("thoughts", ["own", "always"])
def test_batches_change_nothing(thoughts):
    model = thinker(scale=1.0)[0]
    one, many = (harness(model, thoughts=thoughts, max_think_length=2, batch_size=size) for size in (1, 8))
    for a, b in zip(one.loglikelihood(asked("loglikelihood", PAIRS)), many.loglikelihood(asked("loglikelihood", PAIRS)), strict=True):
        assert a == pytest.approx(b, abs=1e-3)
    assert one.generate_until(asked("generate_until", PROMPTS)) == many.generate_until(asked("generate_until", PROMPTS))


def test_a_generation_thinks_within_its_budget_and_shows_no_thought():
    model = thinker(scale=1.0)[0]
    tokenizer = tiny_tokenizer_of(model)
    lm = harness(model, thoughts="always", max_think_length=2, max_total_think=10, batch_size=1)
    made = []
    generate = model.generate
    model.generate = lambda **kwargs: made.append(generate(**kwargs)) or made[-1]
    (text,) = lm.generate_until(asked("generate_until", [(CORPUS[0], {"until": ["@@"], "max_gen_toks": 12, "do_sample": False})]))
    thoughts = lm.vocabulary.is_thought(made[0][0])
    assert thoughts.sum() == 10
    spoken = made[0][0][len(tokenizer(CORPUS[0])["input_ids"]) :]
    assert (~lm.vocabulary.is_thought(spoken)).sum() == 12 or tokenizer.eos_token_id in spoken  # thoughts come on top
    assert "think" not in text


def test_a_generation_shows_no_thought_where_the_tokenizer_would():
    """Llama 2's normalizer hides from the tokenizer which tokens are special."""
    tokenizer = tokenizer_of_kind("prepend")
    model = tiny_model("llama", vocab_size=len(tokenizer))
    vocabulary = add_thinking_tokens(model, tokenizer, 4)
    lm = ThinkTokLM(pretrained=model, tokenizer=tokenizer, device="cpu", max_length=128, thoughts="always", max_think_length=2, batch_size=1)
    assert "think" in tokenizer.decode([*vocabulary.ids], skip_special_tokens=True)
    (text,) = lm.generate_until(asked("generate_until", [(CORPUS[0], {"until": ["@@"], "max_gen_toks": 12, "do_sample": False})]))
    assert text.strip()
    assert "think" not in text


def test_thoughts_without_a_limit_take_nothing_from_the_text():
    model = thinker(scale=1.0)[0]
    lm = harness(model, thoughts="always", max_think_length=2, batch_size=1)
    made, generate = [], model.generate
    model.generate = lambda **kwargs: made.append(generate(**kwargs)) or made[-1]
    lm.generate_until(asked("generate_until", [(CORPUS[0], {"until": ["@@"], "max_gen_toks": 12, "do_sample": False})]))
    spoken = made[0][0][len(lm.tokenizer(CORPUS[0])["input_ids"]) :]
    assert (~lm.vocabulary.is_thought(spoken)).sum() >= 12 or lm.tokenizer.eos_token_id in spoken


def test_a_stop_string_of_several_tokens_ends_a_generation_with_thoughts_in_between():
    """After as much text as without thoughts; of a batch when each row has said it."""
    model, spoken = thinker(scale=1.0)[0], {}
    for thoughts, options in (("none", {}), ("always", {"max_think_length": 2})):
        lm = harness(model, thoughts=thoughts, batch_size=2, **options)
        stop, budget, is_thought = lm.tokenizer("Question:")["input_ids"], lm.budget, lm.vocabulary.is_thought
        words = torch.tensor([stop + stop, [stop[0]] * 3 + stop + stop[3:]])

        def say(ids, scores, words=words, budget=budget, lm=lm):
            place = (~lm.vocabulary.is_thought(ids[:, 4:])).sum(1).clamp(max=words.shape[1] - 1)
            scores[:, : lm.vocabulary.num_real] = -50.0
            return budget(ids, scores.scatter(1, words.gather(1, place[:, None]), 0.0))

        lm.budget = say
        prompts = torch.ones(2, 4, dtype=torch.long)
        made = lm._model_generate(prompts, 44, ["Question:"], attention_mask=torch.ones_like(prompts), do_sample=False)[:, 4:]
        spoken[thoughts] = [lm.tokenizer.decode(row[~is_thought(row)][: len(stop) + 3]) for row in made]
        assert (~is_thought(made[1])).sum() == len(stop) + 3
        assert is_thought(made).any() == (thoughts == "always")
    assert spoken["none"] == spoken["always"]
    assert all("Question:" in text for text in spoken["always"])


def with_a_gate_at(nats):
    """A model that thinks never, or always, its first id and its guard."""
    model = thinker(scale=1.0)[0]
    first, guard = model.config.thinktok["first_id"], model.config.thinktok["guard_id"]
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
    with torch.no_grad():
        head.bias[first:guard] = nats
    return model, first, guard


@pytest.mark.parametrize("length", [2, 16])
def test_every_token_of_a_long_text_is_judged_whatever_room_thoughts_take(length):
    model, _, _ = with_a_gate_at(-50.0)
    asking = asked("loglikelihood_rolling", [("".join(CORPUS[:6]),)]) + asked("loglikelihood", [(CORPUS[0], "".join(CORPUS[1:6]))])
    sums = {}
    for thoughts, options in (("none", {}), ("own", {"max_think_length": length})):
        lm = ThinkTokLM(pretrained=model, tokenizer=tiny_tokenizer_of(model), device="cpu", max_length=48, batch_size=2, thoughts=thoughts, **options)
        counted = []
        answer = lm._answer
        lm._answer = lambda requests, answer=answer, counted=counted: counted.extend(count for _, count in requests) or answer(requests)
        sums[thoughts] = lm.loglikelihood_rolling(asking[:1])[0]
        if thoughts == "own":
            assert sum(counted) == len(lm.tokenizer(asking[0].args[0])["input_ids"])
            counted.clear()
            lm.loglikelihood(asking[1:])
            assert sum(counted) == len(lm.tokenizer(asking[1].args[1])["input_ids"])
    assert sums["own"] == pytest.approx(sums["none"], rel=0.02)  # contexts differ a little, the tokens do not


def test_who_does_not_think_has_no_more_text():
    model, _, _ = with_a_gate_at(-50.0)
    asking = asked("generate_until", [(CORPUS[0], {"until": ["@@"], "max_gen_toks": 12, "do_sample": False})])
    one, other = harness(model, thoughts="none", batch_size=1), harness(model, thoughts="own", max_think_length=2, max_total_think=10, batch_size=1)
    assert one.generate_until(asking) == other.generate_until(asking)


def test_a_model_that_would_think_does_not_where_it_is_told_not_to():
    model, first, guard = with_a_gate_at(50.0)
    made, generate = [], model.generate
    model.generate = lambda **kwargs: made.append(generate(**kwargs)) or made[-1]
    for thoughts in ("none", "own"):
        harness(model, thoughts=thoughts, batch_size=4).generate_until(asked("generate_until", PROMPTS))
    assert [bool(((ids >= first) & (ids < guard)).any()) for ids in made] == [False, True]


def test_without_sampling_it_thinks_where_that_is_likelier_than_to_speak():
    """The likeliest id may still be a word, of which there are as few likely ones as there are many thoughts."""
    model, first, guard = with_a_gate_at(0.0)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[first:guard] = 0.0
        head.bias[first:guard] = 3.0
        head.bias[:first] = -5.0
        head.bias[7] = 4.0
        head.weight[7] = 0.0
    made, generate = [], model.generate
    model.generate = lambda **kwargs: made.append(generate(**kwargs)) or made[-1]
    for do_sample in (False, True):
        options = {"until": ["@@"], "max_gen_toks": 6, "do_sample": do_sample} | ({"temperature": 1e-4} if do_sample else {})
        harness(model, batch_size=1, max_think_length=1).generate_until(asked("generate_until", [(CORPUS[0], options)]))
    assert [bool(((ids >= first) & (ids < guard)).any()) for ids in made] == [True, False]


def test_a_sampled_generation_draws_thoughts_of_which_each_is_improbable():
    """Sixty words are each likelier than any thought, and thinking as a whole is likelier than speaking: transformers' fifty likeliest are words."""
    model, first, guard = with_a_gate_at(0.0)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.zero_()
        head.bias[:] = -20.0
        head.bias[first:guard] = math.log(120 / (guard - first))
        head.bias[1:61] = max(0.0, head.bias[first].item()) + 0.1
    made, generate = [], model.generate
    model.generate = lambda **kwargs: made.append(generate(**kwargs)) or made[-1]
    options = {"until": ["@@"], "max_gen_toks": 20, "do_sample": True, "temperature": 1.0}
    for name, value in {"top_p": 0.95, "min_p": 0.9, "typical_p": 0.1, "epsilon_cutoff": 0.1, "top_h": 0.1}.items():
        setattr(model.generation_config, name, value)  # as checkpoints for chats have them
    for cut in ({}, {"top_k": 50}, {"min_p": 0.9}):
        harness(model, batch_size=1, max_think_length=2).generate_until(asked("generate_until", [(CORPUS[0], options | cut)]))
    assert [bool(((ids >= first) & (ids < guard)).any()) for ids in made] == [True, False, False], "a task that names one is taken at its word"


@pytest.mark.parametrize("thoughts", ["none", "own"])
def test_likelihoods_are_computed_in_the_precision_that_was_asked_for(thoughts):
    model, found = thinker(scale=1.0)[0], []
    lm = harness(model, thoughts=thoughts, batch_size=1, mixed_precision_dtype="bfloat16")
    lm.loglikelihood(asked("loglikelihood", PAIRS[:1]), disable_tqdm=True)  # an engine is checked in fp32
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
    lm.loglikelihood(asked("loglikelihood", PAIRS[1:2]), disable_tqdm=True)
    assert {*found} == {torch.bfloat16}


def test_an_adapter_is_read_with_its_base(make_trainer, tmp_path):
    trainer = make_trainer(model=str(save_tiny(tmp_path / "base")), tokenizer=tiny_tokenizer(), peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.save_model(adapter := str(tmp_path / "adapter"))
    model, tokenizer = load_whole(adapter)
    asking = asked("loglikelihood", PAIRS[:2])
    lm = ThinkTokLM(pretrained=adapter, device="cpu", max_length=128, batch_size=1, max_think_length=2)
    same = ThinkTokLM(pretrained=model, tokenizer=tokenizer, device="cpu", max_length=128, batch_size=1, max_think_length=2)
    assert lm.loglikelihood(asking) == same.loglikelihood(asking)


def test_no_thoughts_as_the_harness_reads_the_word():
    assert harness(thinker()[0], batch_size=1, **simple_parse_args_string("thoughts=none")).thoughts == "none"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"thoughts": "loud"}, "thoughts='loud' is not known"),
        ({"thoughts": "none", "max_think_length": 2}, "max_think_length has no effect with thoughts=none"),
        ({"batch_size": "auto"}, "batch_size=auto is found out without thoughts"),
        ({"batch_size": 1, "max_think_length": 127}, "max_think_length=127 leaves no room for text in max_length=128"),
    ],
)
def test_wrong_options_are_told_in_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        harness(thinker()[0], **options)


def test_a_blind_model_has_no_task_to_read():
    model = thinker()[0]
    model.config.thinktok |= {"blind": True}
    with pytest.raises(ValueError, match="blind=True and cannot read a task's text"):
        harness(model, batch_size=1)


def test_thinking_is_pushed_as_asked():
    assert harness(thinker()[0], batch_size=1, think_bias=2.0).budget.think_bias == 2.0


def lm_eval(*words):
    return started("-m", "lm_eval", *words, env={"HF_HOME": "home", "HF_DATASETS_OFFLINE": "1"}, cwd=Path.cwd())


def thinktok_lm_eval(*words):
    own_tasks = partial(lm_eval_tasks.TaskManager, include_defaults=False)  # and none of the 14,000 files of those that it brings
    with patch.object(lm_eval_tasks, "TaskManager", own_tasks):
        return captured(lambda: main(["lm-eval", *map(str, words)]))


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_names_the_options_of_thoughts_before_those_of_the_harness(word):
    done = thinktok_lm_eval(word)
    assert done.returncode == 0
    ours, theirs = done.stdout.split("usage: lm-eval")
    for option in ("pretrained=FOLDER", "thoughts=none|own|always", "max_think_length=N", "max_total_think=N", "think_bias=NATS"):
        assert option in ours
    assert "--help" in theirs


@pytest.mark.parametrize(
    ("command", "tasks"),
    [
        (thinktok_lm_eval, ["gsm8k_local,commonsenseqa_local", "--include_path", "tasks"]),
        (lm_eval, ["tasks/gsm8k_local.yaml,tasks/commonsenseqa_local.yaml"]),
    ],
)
@torch.no_grad()
def test_both_commands_run_local_tasks(command, tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = thinker(scale=1.0)[0]
    tokenizer = tiny_tokenizer_of(model)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    shutil.copytree(ROOT / "recipes" / "lm_eval", tmp_path / "tasks")
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(json.dumps({"question": f"{i}+{i}?", "answer": f"so\n#### {2 * i}"}) for i in range(4)))
    choices = [{"label": label, "text": text} for label, text in zip("ABCDE", CORPUS[0].split())]
    rows = [{"question": {"stem": CORPUS[i], "choices": choices}, "answerKey": "ABCDE"[i]} for i in range(4)]
    (tmp_path / "commonsenseqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    about_model = ["--model", "thinktok", "--model_args", f"pretrained={tmp_path / 'model'},max_think_length=2", "--device", "cpu", "--batch_size", 2]
    done = command(*about_model, "--tasks", *tasks, "--limit", 3)
    assert done.returncode == 0, done.stderr[-3000:]
    for words in ("gsm8k_local", "commonsenseqa_local", "exact_match", "acc_norm"):
        assert words in done.stdout
