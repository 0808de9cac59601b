"""Variants of one mechanism: who speaks, what is thought, where candidates come from. Against ordinary rows and brute force."""

import copy
import itertools
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import CORPUS, save_tiny, tiny_model, tiny_tokenizer
from peft import AutoPeftModelForCausalLM, LoraConfig
from questions import N, batch_of, one_rollout, questions
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_thinktok import add_thinking_tokens
from hf_thinktok.answers import answer
from hf_thinktok.cli import main
from hf_thinktok.curriculum import LAG, LEAST_STEPS
from hf_thinktok.distributed import autocast
from hf_thinktok.engine import ReplicatedEngine, TreeEngine
from hf_thinktok.exploration import candidate_thoughts
from hf_thinktok.head import HeadInputs
from hf_thinktok.models import unwrapped
from hf_thinktok.objective import actions, credit, speak
from hf_thinktok.peft import is_speaker, is_thinking_row
from hf_thinktok.scores import score_tree

ADAPTER = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


@pytest.fixture
def make(on_questions):
    return on_questions


def test_what_is_markovian_forgets_all_but_its_latest_token_in_training_alone(make):
    rows = questions(levels=(3,))
    trainer = make(rows, num_generations=4, markovian_share=0.5, search=8, max_steps=1)
    inputs, labels_BT = batch_of(trainer, rows)

    def depend(rollout):
        """Whether the answer depends on the thought's first token, for each thought of a group."""
        other = replace(rollout, thoughts_BKGL=rollout.thoughts_BKGL.clone())
        other.thoughts_BKGL[..., 0] = trainer.vocabulary.first_id + (other.thoughts_BKGL[..., 0] - trainer.vocabulary.first_id + 1) % N
        logps = [trainer._score(trainer.model, trainer._tree(inputs, one), inputs["input_ids"], labels_BT, one).logps_BKGH for one in (rollout, other)]
        return (logps[0] - logps[1]).abs().amax((0, 1, 3)) > 1e-6

    rollout = one_rollout(trainer, inputs, labels_BT)
    assert depend(rollout).tolist() == [True, True, False, False]
    elsewhere = trainer._sample(trainer.model, inputs, rollout.forks_BK, torch.Generator().manual_seed(0), trainer.args.sampling())
    assert depend(elsewhere).all(), "searched and evaluated as thoughts are used"
    trainer.train()
    assert math.isfinite(trainer.evaluate(rows)["eval_gain"])


def test_what_is_logged_of_thoughts_is_of_those_that_are_used(make):
    """Neither of the one that a search put there nor of those that see their latest token alone."""
    rows = questions(levels=(3,))
    trainer = make(rows, num_generations=4, markovian_share=0.5, search=8, max_steps=1, learning_rate=0.0, logging_steps=1)
    seen, observe = [], trainer._record
    trainer._record = lambda *args: (seen.append(args), observe(*args))
    trainer.train()
    scores, logged = seen[0][-1], trainer.state.log_history[0]
    own_BH = scores.logps_BKGH[:, 0, 1].detach()
    assert logged["reward"] == pytest.approx(own_BH.mean().item(), abs=1e-3)
    assert logged["accuracy"] == pytest.approx(scores.correct_BKGH[:, 0, 1].float().mean().item(), abs=1e-3)
    assert abs(logged["reward"] - scores.logps_BKGH.mean().item()) > 1e-3, "the others' is another"


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_what_is_markovian_needs_the_packed_tree(make, family):
    with pytest.raises(ValueError, match=rf"markovian_share hides .* which {family} cannot run: leave markovian_share out\.$"):
        make(family=family, markovian_share=0.5, num_generations=2)


def plain_logps(model, vocabulary, prompt, thought, target):
    """log p(target | prompt, thought) over real rows, from an ordinary row."""
    return logps_of_each(model, vocabulary, prompt, [thought], target)[0]


def logps_of_each(model, vocabulary, prompt, thoughts, target):
    """The same of many thoughts of one length, a row each."""
    rows = torch.tensor([[*prompt, *thought] for thought in thoughts])
    return model(input_ids=rows).logits[:, -1, : vocabulary.num_real].log_softmax(-1)[:, target]


@torch.no_grad()
def plain_logps_of_each(*args):
    return logps_of_each(*args).numpy()


# ---------------------------------------------------------------- who speaks


@pytest.mark.parametrize("blind", [False, True])
def test_split_reads_each_model_alone(make, blind):
    """The speaker's predictions and the thinker's choices are those of each model on ordinary rows; so are their gradients."""
    rows = questions(levels=(3,))
    trainer = make(rows, policies="split", blind=blind)
    with torch.no_grad():  # a copy of the thinker would hide a mix-up
        for parameter in trainer.model.speaker.parameters():
            parameter.mul_(1.2)
    inputs, labels = batch_of(trainer, rows.select(range(3)))
    rollout = one_rollout(trainer, inputs, labels)
    tree = trainer._tree(inputs, rollout)
    scores = trainer._score(trainer.model, tree, inputs["input_ids"], labels, rollout)
    thinker, speaker, vocabulary = trainer.model, trainer.model.speaker, trainer.vocabulary
    for row, group in itertools.product(range(3), range(2)):
        ids, thought = rows[row]["input_ids"], rollout.thoughts_BKGL[row, 0, group].tolist()
        expected = plain_logps(speaker, vocabulary, [] if blind else ids[:5], thought, ids[5])
        assert scores.logps_BKGH[row, 0, group, 0].item() == pytest.approx(expected.item(), abs=1e-4)
        logits = thinker(input_ids=torch.tensor([[*ids[:5], *thought]])).logits[0, 4:-1, vocabulary.first_id : vocabulary.guard_id].log_softmax(-1)
        chosen = logits.gather(1, torch.tensor(thought)[:, None] - vocabulary.first_id)[:, 0]
        torch.testing.assert_close(scores.thought_logps_BKGL[row, 0, group], chosen, atol=1e-4, rtol=0)
    scores.logps_BKGH.sum().backward(retain_graph=True)
    assert all(p.grad is None or not p.grad.any() for name, p in thinker.named_parameters() if not name.startswith("speaker."))
    thinker.zero_grad()
    scores.thought_logps_BKGL.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in speaker.parameters())
    # The replicated path is the oracle of the packed one.
    again = score_tree(
        lambda passes: ReplicatedEngine().run(thinker, tree, tree.tokens(inputs["input_ids"], rollout.thoughts_BKGL), passes),
        tree, labels, rollout, vocabulary, gate=False, split=True,
    )  # fmt: skip
    torch.testing.assert_close(again.logps_BKGH, scores.logps_BKGH, atol=1e-4, rtol=0)
    assert isinstance(trainer.engine, TreeEngine)


def test_a_split_pair_is_saved_as_two_ordinary_checkpoints_and_resumed_bit_for_bit(make, resumed, tmp_path):
    options = {"search": 5, "coverage_coef": [0.3, 0.0, 10], "objective": "marginal", "speaker_learning_rate": 5e-3, "rows": questions(levels=(3,))}
    whole, again = resumed(make, policies="split", blind=True, **options)
    assert torch.equal(whole.explore.coverage.frequency_C, again.explore.coverage.frequency_C)
    groups = [(len(group["params"]), group["initial_lr"]) for group in whole.optimizer.param_groups]
    assert {rate for _, rate in groups} == {1e-3, 5e-3}
    assert sum(size for size, rate in groups if rate == 5e-3) == len(list(whole.model.speaker.parameters()))
    folder = tmp_path / "whole" / "checkpoint-4"
    assert not any(name.startswith("speaker") for name in load_file(folder / "model.safetensors"))
    for path, trained in ((folder, whole.model), (folder / "speaker", whole.model.speaker)):
        assert AutoTokenizer.from_pretrained(path).get_vocab() == whole.processing_class.get_vocab()
        plain = AutoModelForCausalLM.from_pretrained(path)
        row = torch.arange(20)[None]
        assert torch.equal(plain(input_ids=row).logits, trained.eval()(input_ids=row).logits)
    whole.train()
    assert groups == [(len(group["params"]), group["initial_lr"]) for group in whole.optimizer.param_groups], "divided once, and none is empty"
    assert all(size for size, _ in groups)


@pytest.mark.parametrize("options", [{}, {"num_think_tokens": 0}, {"peft_config": LoraConfig(target_modules=["q_proj"]), "policies": "split"}])
def test_a_model_that_was_one_of_a_pair_is_trained_without_the_other(make, corpus, tmp_path, caplog, options):
    """In the same process, where it has its speaker still."""
    pair = make(policies="split")
    names = set(tiny_model("llama", vocab_size=len(pair.processing_class)).state_dict())
    rows = corpus if "num_think_tokens" in options else None
    pair.save_model(str(tmp_path / "pair"))
    how = {"tokenizer": pair.processing_class, "gradient_checkpointing": False} | {"num_think_tokens": None} | options
    for model in (str(tmp_path / "pair"), pair.model):
        caplog.clear()
        trainer = make(rows, model=model, **how)
        assert caplog.text.count("was trained with a speaker, which this run has no use for") == 1
    trainer.train()
    trainer.save_model()
    assert not any("speaker.model" in name for name, _ in trainer.model.named_parameters())
    if "peft_config" not in options:
        assert {name for name, _ in trainer.model.named_parameters()} <= names
        assert not (Path(trainer.args.output_dir) / "speaker").exists()


def test_a_run_from_a_split_pair_goes_on_with_both(make, tmp_path):
    """From its folder, from a thinker loaded from there, and from what another trainer has in memory; not with a copy of the thinker."""
    first = make(policies="split")
    with torch.no_grad():
        for parameter in first.model.speaker.parameters():
            parameter.add_(1.0)
    first.save_model(str(tmp_path / "pair"))
    spoken = load_file(tmp_path / "pair" / "speaker" / "model.safetensors")
    for model in (str(tmp_path / "pair"), AutoModelForCausalLM.from_pretrained(tmp_path / "pair"), first.model):
        again = make(model=model, tokenizer=first.processing_class, policies="split")
        assert torch.equal(again.model.get_input_embeddings().weight, first.model.get_input_embeddings().weight)
        theirs = dict(again.model.speaker.named_parameters())
        assert set(spoken) <= set(theirs)
        assert all(torch.equal(theirs[name], weight) for name, weight in spoken.items())
    (tmp_path / "pair" / "speaker").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="was trained with a speaker, which is not in its folder 'speaker': pass the trainer's speaker"):
        make(model=str(tmp_path / "pair"), tokenizer=first.processing_class, policies="split")


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_two_adapters_are_two_policies(make, tokenizer, tie, tmp_path):
    """Each adapter, loaded alone onto the plain model, says what it said as thinker or speaker; each has its own gradient."""
    rows = questions(levels=(3,))
    tiny_model("llama", tie=tie, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    trainer = make(rows, model=str(tmp_path / "base"), tokenizer=tokenizer, policies="split", peft_config=ADAPTER, gradient_checkpointing=False)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if is_speaker(name):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    inputs, labels = batch_of(trainer, rows.select(range(3)))
    rollout = one_rollout(trainer, inputs, labels)
    scores = trainer._score(trainer.model, trainer._tree(inputs, rollout), inputs["input_ids"], labels, rollout)
    learn = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {is_speaker(name) for name in learn} == {True, False}
    for value, speaks in ((scores.logps_BKGH, True), (scores.thought_logps_BKGL, False)):
        trainer.model.zero_grad()
        value.sum().backward(retain_graph=True)
        assert {is_speaker(name) for name, p in trainer.model.named_parameters() if p.grad is not None and p.grad.any()} == {speaks}

    trainer.save_model(str(tmp_path / "both"))
    folders = {"thinker": tmp_path / "both", "speaker": tmp_path / "both" / "speaker"}
    said = {who: AutoPeftModelForCausalLM.from_pretrained(folder).eval() for who, folder in folders.items()}
    first, guard = trainer.vocabulary.first_id, trainer.vocabulary.guard_id
    for row, group in itertools.product(range(3), range(2)):
        ids, thought = rows[row]["input_ids"], rollout.thoughts_BKGL[row, 0, group].tolist()
        expected = plain_logps(said["speaker"], trainer.vocabulary, ids[:5], thought, ids[5])
        assert scores.logps_BKGH[row, 0, group, 0].item() == pytest.approx(expected.item(), abs=1e-4)
        logits = said["thinker"](input_ids=torch.tensor([[*ids[:5], *thought]])).logits[0, 4:-1, first:guard].log_softmax(-1)
        chosen = logits.gather(1, torch.tensor(thought)[:, None] - first)[:, 0]
        torch.testing.assert_close(scores.thought_logps_BKGL[row, 0, group], chosen, atol=1e-4, rtol=0)


def test_two_adapters_are_merged_into_two_models(make, tmp_path):
    save_tiny(tmp_path / "base")
    trainer = make(model=str(tmp_path / "base"), policies="split", peft_config=ADAPTER, gradient_checkpointing=False)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if is_speaker(name):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    trainer.save_model(str(tmp_path / "both"))
    assert main(["merge", str(tmp_path / "both"), str(tmp_path / "merged")]) == 0
    pair = make(model=str(tmp_path / "merged"), tokenizer=AutoTokenizer.from_pretrained(tmp_path / "merged"), policies="split").model
    row, end = torch.arange(20)[None], trainer.vocabulary.guard_id
    for place, model in (("", pair), ("speaker", pair.speaker)):
        adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "both" / place).eval()
        torch.testing.assert_close(model.eval()(input_ids=row).logits[..., :end], adapted(input_ids=row).logits[..., :end], atol=1e-4, rtol=1e-4)
    assert not torch.equal(pair(input_ids=row).logits, pair.speaker(input_ids=row).logits)


def test_two_adapters_resume_bit_for_bit(make, resumed):
    options = {"policies": "split", "peft_config": ADAPTER, "gradient_checkpointing": False, "speaker_learning_rate": 5e-3, "think_learning_rate": 2e-2}
    whole, _ = resumed(make, rows=questions(levels=(3,)), **options)
    rate_of = {id(parameter): group["initial_lr"] for group in whole.optimizer.param_groups for parameter in group["params"]}
    rates = {(is_thinking_row(name), is_speaker(name)): rate_of.pop(id(one)) for name, one in whole.model.named_parameters() if one.requires_grad}
    assert rates == {(False, False): 1e-3, (False, True): 5e-3, (True, False): 2e-2, (True, True): 2e-2}
    assert not rate_of


@pytest.mark.parametrize("peft_config", [None, ADAPTER], ids=["models", "adapters"])
def test_the_best_pair_is_restored_whole(make, tmp_path, peft_config):
    rows = questions(levels=(3,))
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-2}
    trainer = make(
        rows, policies="split", peft_config=peft_config, gradient_checkpointing=False, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True, eval_dataset=rows, output_dir=str(tmp_path / "out"), **options,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("-1"), "training makes the loss smaller, and the largest is asked for"
    folders = {False: best, True: f"{best}/speaker"}
    for speaks, folder in folders.items():
        saved = load_file(f"{folder}/{'model' if peft_config is None else 'adapter_model'}.safetensors")
        name = "model.layers.0.mlp.up_proj.weight" if peft_config is None else "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
        own = name.replace("lora_A", f"lora_A.{'speaker' if speaks else 'default'}") if peft_config else ("speaker." if speaks else "") + name
        assert torch.equal(dict(trainer.model.named_parameters())[own], saved[name])


# ---------------------------------------------------------------- lengths, levels


def test_thoughts_are_as_long_as_the_data_says(make):
    rows = questions()
    trainer = make(rows)
    inputs, labels = batch_of(trainer, rows.select(range(6)))
    rollout = one_rollout(trainer, inputs, labels)
    assert rollout.lengths_BKG[:, 0, 0].tolist() == [0, 1, 2, 0, 1, 2]
    tree = trainer._tree(inputs, rollout)
    scores = trainer._score(trainer.model, tree, inputs["input_ids"], labels, rollout)
    for row in range(6):
        ids, length = rows[row]["input_ids"], rows[row]["think_length"]
        expected = plain_logps(trainer.model, trainer.vocabulary, ids[:5], rollout.thoughts_BKGL[row, 0, 1, :length].tolist(), ids[5])
        assert scores.logps_BKGH[row, 0, 1, 0].item() == pytest.approx(expected.item(), abs=1e-4)


def test_a_curriculum_resumes_bit_for_bit(make, resumed, monkeypatch):
    monkeypatch.setattr("hf_thinktok.curriculum.LEAST_STEPS", 1)
    whole, again = resumed(make, max_steps=8, curriculum_threshold=0.0, curriculum_replay=0.5, learning_rate=1e-2)
    assert [entry["level"] for entry in whole.state.log_history if "level" in entry][-1] > 1, "the run must pass a level to be a test"
    assert again.curriculum.begins == whole.curriculum.begins


@pytest.mark.parametrize("replay", [0.0, 1.0])
def test_accumulated_batches_are_one_step_of_a_curriculum(make, replay):
    trainer = make(max_steps=16, gradient_accumulation_steps=2, curriculum_threshold=0.0, curriculum_replay=replay, logging_steps=1)
    trainer.train()
    curriculum, first = trainer.curriculum, LEAST_STEPS - 1 + LAG
    assert curriculum.begins[:2] == [0, first]
    assert [entry["level"] for entry in trainer.state.log_history if "level" in entry][: first + 1] == [1] * first + [2]
    assert sum(curriculum.counts.values()) == pytest.approx(16), "optimizer steps, of two batches each"
    assert (curriculum.counts[1] > first) is (replay > 0), "with replay easier rows come back"


def test_the_hardest_tokens_are_those_of_who_predicts_them(make_trainer, corpus):
    trainer = make_trainer(policies="split", fork_positions="entropy", max_steps=1)
    with torch.no_grad():
        for weight in trainer.model.speaker.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    inputs = trainer.data_collator([trainer.train_dataset[0]])
    entropy_BT = trainer._entropy(trainer.model, inputs["input_ids"], inputs["documents"])
    for model, same in ((trainer.model.speaker, True), (trainer.model, False)):
        logps = model.eval()(input_ids=inputs["input_ids"]).logits[..., : trainer.vocabulary.num_real].log_softmax(-1)
        assert torch.allclose(entropy_BT, -(logps.exp() * logps).sum(-1), atol=1e-4) is same


# ---------------------------------------------------------------- candidates


@pytest.mark.parametrize("policies", ["shared", "split"])
def test_blind_search_finds_the_best_of_all_thoughts(make, policies):
    rows = questions(levels=(3,))
    trainer = make(rows, blind=True, search=N**2, policies=policies)
    inputs, labels = batch_of(trainer, rows.select(range(5)))
    rollout = one_rollout(trainer, inputs, labels)
    speaker = trainer.model.speaker if policies == "split" else trainer.model
    every = [[trainer.vocabulary.first_id + z for z in thought] for thought in itertools.product(range(N), repeat=2)]
    for row in range(5):
        values = plain_logps_of_each(speaker, trainer.vocabulary, [], every, rows[row]["input_ids"][5])
        assert rollout.thoughts_BKGL[row, 0, 0].tolist() == every[int(np.argmax(values))]


def test_blind_search_tells_close_thoughts_apart_under_mixed_precision(make):
    """A bf16 logit near 40 has steps of 0.25, and thoughts that mean little yet differ by less."""
    rows = questions(levels=(3,))
    trainer = make(rows, blind=True, search=N**2, bf16=True)
    with torch.no_grad():
        unwrapped(trainer.model).model.norm.weight.mul_(20.0)  # large logits
    inputs, labels = batch_of(trainer, rows.select(range(5)))
    rollout = one_rollout(trainer, inputs, labels)
    thoughts_PL = trainer.vocabulary.first_id + torch.tensor(list(itertools.product(range(N), repeat=2)))
    last_P = torch.arange(len(thoughts_PL)) * 2 + 1
    with torch.no_grad(), autocast(trainer.accelerator):
        for row in range(5):
            told = trainer.model(input_ids=thoughts_PL, use_cache=False, head=HeadInputs(last_P, torch.full_like(last_P, rows[row]["input_ids"][5])))
            assert rollout.thoughts_BKGL[row, 0, 0].tolist() == thoughts_PL[told.target_logps_M.argmax()].tolist()


def test_blind_search_reads_thoughts_of_given_lengths(make):
    """Rows whose thoughts are shorter than the batch's longest: the best of their length, and a bonus for what is said alone."""
    rows = questions(levels=(2, 3))
    trainer = make(rows, blind=True, search=N**2, coverage_coef=[5.0])
    inputs, labels = batch_of(trainer, rows.select(range(6)))
    coverage = trainer.explore.coverage
    coverage.frequency_C = torch.rand(coverage.frequency_C.shape, generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(coverage)
    rollout = one_rollout(trainer, inputs, labels)
    rarity = lambda thought: before.rarity(before.codes(torch.tensor([thought + [0] * (2 - len(thought))]), torch.tensor([len(thought)]))).item()
    first = trainer.vocabulary.first_id
    for row in range(6):
        length, target = rows[row]["think_length"], rows[row]["input_ids"][5]
        every = [list(thought) for thought in itertools.product(range(N), repeat=length)]
        logps = plain_logps_of_each(trainer.model, trainer.vocabulary, [], [[first + z for z in z_L] for z_L in every], target)
        values = [logp + 5.0 * rarity(z_L) for logp, z_L in zip(logps, every, strict=True)]
        assert (rollout.thoughts_BKGL[row, 0, 0, :length] - first).tolist() == every[int(np.argmax(values))]


@pytest.mark.parametrize("options", [{"search": N**2}, {"supply_thoughts": True, "num_generations": 4}], ids=["search", "supplied"])
def test_what_is_logged_is_what_the_policy_does(make, options):
    """A thought that was chosen with the answer in hand is no part of the accuracy, which decides about levels."""
    rows = questions(levels=(3,))
    trainer = make(rows, learning_rate=0.0, max_steps=1, **options)
    inputs, labels = batch_of(trainer, rows.select(range(8)))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, dict(inputs))
    rollout = trainer._rollouts[0]
    scores = trainer._score(trainer.model, trainer._tree(inputs, rollout), inputs["input_ids"], labels, rollout)
    own_BG = scores.logps_BKGH[:, 0, 1:, 0].detach()
    trainer.log({})
    assert trainer.state.log_history[-1]["rewards/log_prob"] == pytest.approx(own_BG.mean().item(), abs=1e-4)
    assert own_BG.mean().item() != pytest.approx(scores.logps_BKGH.mean().item(), abs=1e-3)


def test_the_gain_of_a_thought_that_stays_is_over_the_text_without_it(make):
    """After the next token the text has the thought in it and tells nothing of what would have been without."""
    rows = questions(levels=(3,)).map(lambda row: {"input_ids": row["input_ids"] + [11, 12], "labels": row["labels"] + [11, 12]})
    trainer = make(rows, memory="persistent", lookahead=3)
    inputs, labels = batch_of(trainer, rows.select(range(4)))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, dict(inputs))
    rollout, gains = trainer._rollouts[0], []
    for row in range(4):
        ids, fork = rows[row]["input_ids"], rollout.forks_BK[row, 0].item() + 1
        said = [plain_logps(trainer.model, trainer.vocabulary, ids[:fork], thought, ids[fork]) for thought in [[], *rollout.thoughts_BKGL[row, 0].tolist()]]
        gains += [(one - said[0]).item() / math.log(2) for one in said[1:]]
    trainer.log({})
    assert trainer.state.log_history[-1]["think_gain"] == pytest.approx(np.mean(gains), abs=1e-4)


def test_token_credit_ends_with_the_thought(make):
    """In a batch of several lengths each thinking token is credited as ordinary rows of its own length say, leave-one-out."""
    rows = questions(levels=(2, 4))
    trainer = make(rows, advantage="token", num_generations=4, max_think_length=3)
    inputs, labels = batch_of(trainer, rows.select(range(4)))
    rollout = one_rollout(trainer, inputs, labels)
    tree = trainer._tree(inputs, rollout)
    scores = trainer._score(trainer.model, tree, inputs["input_ids"], labels, rollout)
    speech = speak(scores, rollout, "fixed", 0.0, False)
    _, advantages_BKGL, _, _ = credit(scores, speech, rollout, trainer.args, trainer.rewards, trainer.reward_weights)
    for row in range(4):
        ids, length = rows[row]["input_ids"], rows[row]["think_length"]
        said = rollout.thoughts_BKGL[row, 0].tolist()
        logps_GP = torch.stack(
            [torch.stack([plain_logps(trainer.model, trainer.vocabulary, ids[:5], z[:end], ids[5]) for end in range(length + 1)]) for z in said]
        )
        to_come_GL = logps_GP[:, -1:] - logps_GP[:, :-1]
        torch.testing.assert_close(advantages_BKGL[row, 0, :, :length], (to_come_GL - to_come_GL.mean(0)) * 4 / 3, atol=1e-4, rtol=1e-3)


def test_blind_search_in_a_batch_without_forks_changes_nothing(make):
    rows = questions(levels=(3,))
    trainer = make(rows, blind=True, search=5)
    inputs, labels = batch_of(trainer, rows.select(range(2)))
    rollout = one_rollout(trainer, inputs, torch.full_like(labels, -100))
    assert (rollout.forks_BK == -1).all()
    assert (rollout.thoughts_BKGL >= trainer.vocabulary.first_id).all()


@pytest.mark.parametrize(("blind", "judged", "options"), [(False, 1, {}), (True, 3, {}), (False, 1, {"num_generations": 16, "markovian_share": 0.9})])
def test_search_finds_the_best_thought_for_each_text(make, blind, judged, options):
    rows = questions(levels=(3,)).map(lambda row: {"input_ids": row["input_ids"] + [11, 12], "labels": row["labels"] + [11, 12]})
    trainer = make(rows, search=N**2, blind=blind, lookahead=judged, **options)
    inputs, labels = batch_of(trainer, rows.select(range(5)))
    rollout = one_rollout(trainer, inputs, labels)
    every = [[trainer.vocabulary.first_id + z for z in thought] for thought in itertools.product(range(N), repeat=2)]
    for row in range(5):
        ids, fork = rows[row]["input_ids"], rollout.forks_BK[row, 0].item() + 1
        read, follows = [] if blind else ids[:fork], ids[fork:][:judged]
        each = partial(plain_logps_of_each, trainer.model, trainer.vocabulary, read)
        values = sum(each([thought + follows[:h] for thought in every], follows[h]) for h in range(len(follows)))
        assert rollout.thoughts_BKGL[row, 0, 0].tolist() == every[int(np.argmax(values))]


@pytest.mark.parametrize("where", ["everywhere", "unsolved"])
@pytest.mark.parametrize("blind", [False, True])
def test_search_is_paid_for_rare_thoughts_where_asked(make, blind, where):
    """Every thought's value by itself: log p and the bonus for its rarity, which `unsolved` pays as far as the best thought fails."""
    rows = questions(levels=(3,))
    trainer = make(rows, search=N**2, blind=blind, coverage_coef=[0.2], coverage_where=where)
    inputs, labels = batch_of(trainer, rows.select(range(5)))
    coverage, every = trainer.explore.coverage, list(itertools.product(range(N), repeat=2))
    coverage.frequency_C = torch.rand(coverage.frequency_C.shape, generator=torch.Generator().manual_seed(0))
    rarity = coverage.rarity(coverage.codes(torch.tensor(every), torch.full((N**2,), 2))).numpy()
    with torch.no_grad():  # a speaker that is sure of some of it
        trainer.model.get_output_embeddings().weight.mul_(20)
    rollout = one_rollout(trainer, inputs, labels)
    for row in range(5):
        ids = rows[row]["input_ids"]
        thoughts = [[trainer.vocabulary.first_id + z for z in thought] for thought in every]
        logps = plain_logps_of_each(trainer.model, trainer.vocabulary, [] if blind else ids[:5], thoughts, ids[5])
        share = 1.0 if where == "everywhere" else 1 - math.exp(logps.max())
        assert rollout.thoughts_BKGL[row, 0, 0].tolist() == thoughts[int(np.argmax(logps + 0.2 * share * rarity))]


@pytest.mark.parametrize("price", [0.0, 0.2])
@pytest.mark.parametrize("blind", [False, True])
def test_search_where_thoughts_may_end_early_looks_at_every_end_and_its_price(make, blind, price):
    rows = questions(levels=(3,)).remove_columns(["think_length", "thoughts"])
    trainer = make(rows, stop="learned", think_cost=price, search=N**3, blind=blind, max_think_length=3)
    inputs, labels = batch_of(trainer, rows.select(range(8)))
    with torch.no_grad():  # a speaker to whom thoughts say much
        trainer.model.get_output_embeddings().weight.mul_(20)
    rollout = one_rollout(trainer, inputs, labels)
    short = 0
    for row in range(8):
        ids, worth = rows[row]["input_ids"], {}
        for end in (1, 2, 3):
            every = list(itertools.product(range(N), repeat=end))
            thoughts = [[trainer.vocabulary.first_id + one for one in z] for z in every]
            logps = plain_logps_of_each(trainer.model, trainer.vocabulary, [] if blind else ids[:5], thoughts, ids[5])
            worth |= dict(zip(every, logps - price * end, strict=True))
        best = max(worth, key=worth.get)
        short += len(best) < 3
        found = tuple((rollout.thoughts_BKGL[row, 0, 0] - trainer.vocabulary.first_id).tolist())
        assert max(worth[found[:end]] for end in (1, 2, 3)) == pytest.approx(worth[best], abs=1e-4)
    assert short, "or the last place alone would do"


def test_search_and_coverage_are_told_what_was_asked(make, monkeypatch):
    rows, asked, summed = questions(levels=(3,)), {}, []
    options = {"search_random": 0.25, "search_changes": 1, "coverage_coef": [0.1], "coverage_decay": 0.5, "coverage_of": "token"}
    trainer = make(rows, search=8, **options)
    monkeypatch.setattr("hf_thinktok.search.candidate_thoughts", lambda *args, **kwargs: asked.update(kwargs) or candidate_thoughts(*args, **kwargs))
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda counts: summed.append(counts) or 3 * counts)
    inputs, labels = batch_of(trainer, rows.select(range(4)))
    coverage = trainer.explore.coverage
    before = coverage.frequency_C.clone()
    rollout = one_rollout(trainer, inputs, labels)
    assert (asked["num_candidates"], asked["random_part"], asked["changes"]) == (8, 0.25, 1)
    said = rollout.thoughts_BKGL.flatten(0, 2) - trainer.vocabulary.first_id
    for place in range(2):  # by place, each a distribution, of which half is new; however many ranks there are
        share = torch.bincount(said[:, place], minlength=N) / len(said)
        begin = place * (N + 1)
        torch.testing.assert_close(coverage.frequency_C[begin : begin + N], 0.5 * before[begin : begin + N] + 0.5 * share)
    assert len(summed) == 1


def test_search_among_samples_is_no_worse_than_they_are(make):
    rows = questions(levels=(3,))
    trainer = make(rows, search=8, search_random=0.25, num_generations=4)
    inputs, labels = batch_of(trainer, rows)
    rollout = one_rollout(trainer, inputs, labels)
    tree = trainer._tree(inputs, rollout)
    logps = trainer._score(trainer.model, tree, inputs["input_ids"], labels, rollout).logps_BKGH[:, 0, :, 0]
    assert (logps[:, 0] > logps[:, 1:].mean(1)).float().mean() > 0.9


def test_the_search_ends(make):
    rows = questions(levels=(3,))
    trainer, without = make(rows, search=[N**2, 0, 0, 3]), make(rows)
    inputs, labels = batch_of(trainer, rows.select(range(8)))
    trainer.state.global_step = without.state.global_step = 3
    assert torch.equal(one_rollout(trainer, inputs, labels).thoughts_BKGL, one_rollout(without, inputs, labels).thoughts_BKGL)
    trainer._rollouts, trainer.state.global_step, without._rollouts, without.state.global_step = [], 2, [], 2
    assert not torch.equal(one_rollout(trainer, inputs, labels).thoughts_BKGL, one_rollout(without, inputs, labels).thoughts_BKGL)


def test_epsilon_greedy_draws_uniformly_at_one(make):
    rows = questions(96, levels=(3,))
    trainer = make(rows, epsilon_greedy=[1.0], num_generations=8)
    with torch.no_grad():
        weight = trainer.model.get_output_embeddings().weight
        weight[trainer.vocabulary.first_id] *= 50  # a policy with one favourite
    inputs, labels = batch_of(trainer, rows)
    counts = torch.bincount(one_rollout(trainer, inputs, labels).thoughts_BKGL.flatten() - trainer.vocabulary.first_id, minlength=N)
    assert (counts / counts.sum() - 1 / N).abs().max() < 0.05


# ---------------------------------------------------------------- supplied thoughts, fillers, who learns


def test_supplied_thoughts_teach_the_speaker_as_plain_text_would(make):
    """Nothing but the data's own thought reaches the speaker: the gradient is that of cross-entropy on ordinary rows with the thought written in."""
    rows = questions(levels=(3,)).select(range(4))
    trainer = make(rows, supply_thoughts=True, num_generations=3, text_ce_weight=0.0, think_loss_weight=0.0, thought_ce_weight=0.5)
    inputs, labels = batch_of(trainer, rows)
    twin = copy.deepcopy(trainer.model)
    del twin.forward
    trainer.model.train(), twin.train()
    trainer.compute_loss(trainer.model, inputs).backward()
    first, losses = trainer.vocabulary.first_id, []
    for row in rows:
        thought = [first + z for z in row["thoughts"]]
        logits = twin(input_ids=torch.tensor([[*row["input_ids"][:5], *thought]])).logits[0]
        answer_logp = logits[-1, :first].log_softmax(-1)[row["input_ids"][5]]
        thought_logps = logits[4:6, first : trainer.vocabulary.guard_id].log_softmax(-1).gather(1, torch.tensor(row["thoughts"])[:, None])
        losses.append(-answer_logp - 0.5 * thought_logps.mean())
    torch.stack(losses).mean().backward()
    for (name, a), b in zip(trainer.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=2e-5, rtol=1e-3, msg=name)


def test_exact_rewards_the_data_s_own_thought_alone(make):
    rows = questions(levels=(3,))
    trainer = make(rows, supply_thoughts=True, num_generations=3, reward_funcs=["exact"])
    inputs, labels = batch_of(trainer, rows.select(range(2)))
    rollout = one_rollout(trainer, inputs, labels)
    rollout.thoughts_BKGL[0, 0, 1] = rollout.thoughts_BKGL[0, 0, 0]
    rollout.thoughts_BKGL[:, 0, 2] = trainer.vocabulary.first_id + (rollout.thoughts_BKGL[:, 0, 0] - trainer.vocabulary.first_id + 1) % N
    values = trainer.rewards[0](rollout.thoughts_BKGL, rollout.lengths_BKG, supplied=rollout.thoughts_BKGL[:, :, 0])
    assert values[0, 0].tolist() == [1, 1, 0]
    assert values[1, 0, [0, 2]].tolist() == [1, 0]


def test_a_filler_says_nothing_and_trains_the_speaker(make):
    rows = questions(levels=(3,))
    trainer = make(rows, thoughts="filler", num_generations=1, text_ce_weight=0.0)
    inputs, labels = batch_of(trainer, rows.select(range(4)))
    assert (one_rollout(trainer, inputs, labels).thoughts_BKGL == trainer.vocabulary.first_id).all()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    filler = [trainer.vocabulary.first_id] * 2
    expected = [-plain_logps(trainer.model, trainer.vocabulary, row["input_ids"][:5], filler, row["input_ids"][5]) for row in rows.select(range(4))]
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), abs=1e-4)


def test_what_is_generated_is_judged_by_its_words(make, monkeypatch):
    """Whatever was thought before the first one or behind; a thought that nothing ended is no answer."""
    rows = questions(levels=(3,)).select(range(5))
    trainer = make(rows, stop="sampled")
    first, right = trainer.vocabulary.first_id, [row["input_ids"][-1] for row in rows]
    said = [[right[0], 5], [first + 2, right[1]], [first, first + 1, first, right[2]], [first, right[3] + 1, right[3]], [first] * 9]
    asked = {}

    def generate(ids, **options):
        asked.update(options, prompts=ids.tolist())
        return torch.tensor([[*prompt, *one, *[5] * (9 - len(one))] for prompt, one in zip(ids.tolist(), said, strict=True)])

    monkeypatch.setattr(trainer.model, "generate", generate)
    found = answer(trainer, rows, "generate")
    assert asked["prompts"] == [row["input_ids"][:-1] for row in rows]
    assert (asked["do_sample"], asked["temperature"], asked["top_k"], asked["max_new_tokens"]) == (True, 1.0, 0, 1 + 4 * 2)
    assert found.correct_D.tolist() == [True, True, True, False, False]
    assert found.lengths_D.tolist() == [0, 1, 3, 1, 9]
    assert [[number for number in thought if number >= 0] for thought in found.thoughts_DL.tolist()] == [[], [2], [0, 1, 0], [0], [0] * 9]


def test_a_model_that_never_thinks_generates_as_it_predicts(make, tokenizer):
    rows, model = questions(levels=(3,)), tiny_model("llama", vocab_size=len(tokenizer), tie=False, scale=6.0)
    vocabulary = add_thinking_tokens(model, tokenizer, N)
    likeliest = model(input_ids=torch.tensor(rows["input_ids"])[:, :-1]).logits[:, -1, : vocabulary.first_id].argmax(-1).tolist()
    ids = [[*row[:-1], token] for row, token in zip(rows["input_ids"], likeliest, strict=True)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": [[-100] * (len(row) - 1) + row[-1:] for row in ids]})
    model.generation_config.suppress_tokens = [*vocabulary.ids, vocabulary.guard_id]
    trainer = make(rows, model=model, tokenizer=tokenizer, stop="sampled")
    found = [answer(trainer, rows, "generate", seed=seed) for seed in range(24)]
    assert not any(one.lengths_D.any() for one in found)
    wanted = np.exp(answer(trainer, rows, "none").logps_D)
    error = np.sqrt((wanted * (1 - wanted)).sum() / len(found)) / len(rows)
    assert 0 < error < 0.02
    assert abs(np.mean([one.accuracy for one in found]) - wanted.mean()) < 4 * error
    assert not np.array_equal(found[0].correct_D, found[1].correct_D)


def test_how_many_fillers_is_drawn_and_rewarded(make, tokenizer):
    def many(lengths, **kwargs):
        return lengths.float()

    rows, model = questions(levels=(3,)), tiny_model("llama", vocab_size=len(tokenizer), tie=False)
    add_thinking_tokens(model, tokenizer, N, sample_text=CORPUS, think_mass=0.5)
    trainer = make(
        rows, model=model, tokenizer=tokenizer, thoughts="filler", stop="sampled", num_generations=8, reward_funcs=[many], learning_rate=1e-3,
        lr_scheduler_type="constant", max_steps=100, logging_strategy="no", text_ce_weight=0.0, think_ce_weight=0.0,
    )  # fmt: skip
    inputs, labels = batch_of(trainer, rows)
    before = one_rollout(trainer, inputs, labels)
    assert (before.thoughts_BKGL == trainer.vocabulary.first_id).all()
    assert set(before.lengths_BKG.unique().tolist()) == {0, 1, 2}
    scores = trainer._score(trainer.model, trainer._tree(inputs, before), inputs["input_ids"], labels, before)
    _, counts_BKGA = actions(scores, before, trainer.args)
    assert torch.equal(counts_BKGA.sum(-1), before.lengths_BKG.add(1).clamp(max=2)), "each stop that was drawn, and no token"
    trainer.train()
    trainer._rollouts = []
    assert one_rollout(trainer, inputs, labels).lengths_BKG.float().mean() > 1.5 > before.lengths_BKG.float().mean()


@pytest.mark.parametrize(
    ("options", "speaks", "thinks"),
    [
        ({"freeze": "speaker"}, False, True),
        ({"freeze": "thinker"}, True, False),
        ({"alternate": [1, 1]}, True, False),
        ({"alternate": [1, 1], "stop": "learned"}, True, False),
        ({"alternate": [1, 1], "supply_thoughts": True, "thought_ce_weight": 1.0}, True, False),
    ],
    ids=["freeze speaker", "freeze thinker", "alternate", "alternate, gate", "alternate, supplied"],
)
def test_who_is_frozen_gets_no_gradient(make, options, speaks, thinks):
    rows = questions(levels=(3,)).remove_columns(["think_length"] if "stop" in options else [])
    trainer = make(rows, policies="split", blind=True, text_ce_weight=0.0, num_generations=4, **options)
    inputs, _ = batch_of(trainer, rows.select(range(8)))
    trainer.model.train()
    for step in range(2 if "alternate" in options else 1):
        trainer.state.global_step = step
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, inputs).backward()
        learns = {name.startswith("speaker.") for name, p in trainer.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-9}
        assert learns == ({True} if speaks else set()) | ({False} if thinks else set())
        speaks, thinks = not speaks, not thinks


# ---------------------------------------------------------------- answers


def test_answers_are_those_of_greedy_ordinary_rows(make):
    rows = questions()
    trainer = make(rows)
    said = answer(trainer, rows)
    first, guard = trainer.vocabulary.first_id, trainer.vocabulary.guard_id
    for i, row in enumerate(rows):
        ids = row["input_ids"][:5]
        for _ in range(row["think_length"]):
            ids.append(first + int(trainer.model(input_ids=torch.tensor([ids])).logits[0, -1, first:guard].argmax()))
        logits = trainer.model(input_ids=torch.tensor([ids])).logits[0, -1, :first]
        assert said.correct_D[i] == (logits.argmax().item() == row["input_ids"][5])
        assert said.logps_D[i] == pytest.approx(logits.log_softmax(-1)[row["input_ids"][5]].item(), abs=1e-4)
        assert [z for z in said.thoughts_DL[i].tolist() if z >= 0] == [z - first for z in ids[5:]]
    without = answer(trainer, rows, "none")
    assert (without.lengths_D == 0).all()
    assert (without.thoughts_DL == -1).all()
    assert answer(trainer, rows, "random").thoughts_DL.max() < N


def test_long_rows_are_answered_few_at_once(make, monkeypatch):
    rows, sizes = questions().select(range(7)), []
    trainer = make(rows)
    whole, collate = answer(trainer, rows), trainer.data_collator
    monkeypatch.setattr("hf_thinktok.answers.BATCH_TOKENS", 4 * len(rows[0]["input_ids"]))
    monkeypatch.setattr(trainer, "data_collator", lambda examples: sizes.append(len(examples)) or collate(examples))
    few = answer(trainer, rows)
    assert sum(sizes) == len(rows)
    assert max(sizes) <= 4
    assert (few.correct_D == whole.correct_D).all()
    assert (few.thoughts_DL == whole.thoughts_DL).all()


@pytest.mark.parametrize("lookahead", [1, 3])
def test_an_answer_of_several_tokens_is_right_where_all_of_them_are(make, lookahead):
    """However many of them judged a thought in training."""
    rows = questions(levels=(2,)).map(lambda row: {"labels": [-100] * 3 + row["input_ids"][3:]})
    trainer = make(rows, lookahead=lookahead)
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[: trainer.vocabulary.num_real] *= 0.01  # nothing is sure
    first, guard = trainer.vocabulary.first_id, trainer.vocabulary.guard_id
    said = {how: answer(trainer, rows, how) for how in ("think", "none")}
    for i, row in enumerate(rows):
        prompt, target = row["input_ids"][:3], row["input_ids"][3:]
        thought = first + int(trainer.model(input_ids=torch.tensor([prompt])).logits[0, -1, first:guard].argmax())
        for how, ids in {"think": [*prompt, thought, *target], "none": [*prompt, *target]}.items():
            logps = trainer.model(input_ids=torch.tensor([ids])).logits[0, -4:-1, :first].log_softmax(-1)
            assert said[how].correct_D[i] == (logps.argmax(-1).tolist() == target)
            assert said[how].logps_D[i] == pytest.approx(logps.gather(1, torch.tensor(target)[:, None]).sum().item(), abs=1e-3)


def test_long_answers_and_a_learned_stop_do_not_go_together(make):
    rows = questions().map(lambda row: {"labels": [-100] * 4 + row["input_ids"][4:]}).remove_columns("think_length")
    trainer = make(rows, stop="learned")
    with pytest.raises(ValueError, match="Answers have up to 2 tokens, and stop=learned"):
        answer(trainer, rows)
    assert len(answer(trainer, rows, "none").correct_D) == len(rows)


@pytest.mark.parametrize(("gate", "length"), [(-30.0, 0), (4.0, None), (30.0, 2)])
def test_a_learned_stop_answers_as_the_mixture_of_its_lengths(make_trainer, gate, length):
    """And what it leaves unsaid is no thought."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), tie=False)
    vocabulary = add_thinking_tokens(model, tokenizer, N)
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
    head.bias.data[list(vocabulary.ids)] = gate
    rows = questions().remove_columns("think_length")
    trainer = make_trainer(model=model, tokenizer=tokenizer, train_dataset=rows, stop="learned", num_forks=1, max_think_length=2)
    said = answer(trainer, rows)
    assert length is None or ((said.thoughts_DL >= 0).sum(1) == length).all()
    first, guard = vocabulary.first_id, vocabulary.guard_id
    for i, row in enumerate(rows.select(range(8))):
        ids, likelihood, right, stay = row["input_ids"][:5], 0.0, 0.0, 1.0
        for end in range(3):
            logits = trainer.model(input_ids=torch.tensor([ids])).logits[0, -1]
            thinks = (logits[first:guard].logsumexp(0) - logits[:first].logsumexp(0)).sigmoid().item() if end < 2 else 0.0
            likelihood += stay * (1 - thinks) * logits[:first].softmax(0)[row["input_ids"][5]].item()
            right += stay * (1 - thinks) * (logits[:first].argmax().item() == row["input_ids"][5])
            stay *= thinks
            ids = [*ids, first + int(logits[first:guard].argmax())]
        assert said.logps_D[i] == pytest.approx(math.log(likelihood), abs=1e-4)
        assert said.correct_D[i] == (right > 0.5)


def test_random_thoughts_are_as_long_as_the_gate_has_them(make):
    rows = questions().remove_columns("think_length")
    trainer = make(rows, stop="sampled", max_think_length=2)
    random = answer(trainer, rows, "random")
    assert (random.lengths_D < 2).any()
    assert random.lengths_D.tolist() == (random.thoughts_DL >= 0).sum(1).tolist()


def test_answers_need_labels(make):
    rows = questions()
    with pytest.raises(ValueError, match="no `labels`"):
        answer(make(rows), rows.remove_columns("labels"))


def test_a_value_is_foretold_from_the_text_before_a_thought(make):
    rows = questions(levels=(3,))
    trainer = make(rows, advantage="value")
    inputs, labels = batch_of(trainer, rows.select(range(3)))
    rollout = one_rollout(trainer, inputs, labels)
    trainer.model.train()
    scores = trainer._score(trainer.model, trainer._tree(inputs, rollout), inputs["input_ids"], labels, rollout)
    for row in range(3):
        hidden = trainer.model(input_ids=torch.tensor([rows[row]["input_ids"][:5]]), output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(scores.fork_hidden_BKD[row, 0], hidden.detach(), atol=1e-4, rtol=1e-4)


def test_thoughts_are_counted_where_there_are_any_and_as_parts_of_a_step(make):
    rows = questions(levels=(3,))
    trainer = make(rows, coverage_coef=0.1, coverage_of="token")
    before, first = copy.deepcopy(trainer.explore.coverage), trainer.vocabulary.first_id
    inputs, labels = batch_of(trainer, rows.select(range(4)))
    labels[2:] = -100  # no place to think
    trainer.current_gradient_accumulation_steps = 4
    rollout = trainer._rollout(trainer.model, inputs, labels, 0, 0)
    codes = before.codes(rollout.thoughts_BKGL[:2] - first, rollout.lengths_BKG[:2])
    before.update(codes, torch.ones(2, 1, 2, dtype=torch.bool), share=1 / 4)
    torch.testing.assert_close(trainer.explore.coverage.frequency_C, before.frequency_C)


def test_a_level_that_is_passed_at_a_checkpoint_begins_as_if_nothing_had_happened(make, resumed, monkeypatch):
    monkeypatch.setattr("hf_thinktok.curriculum.LEAST_STEPS", 4)  # passed by the last step before the checkpoint
    whole, again = resumed(make, max_steps=8, curriculum_threshold=0.0, curriculum_replay=0.0, learning_rate=1e-2)
    assert whole.curriculum.begins == again.curriculum.begins
    assert len(whole.curriculum.begins) > 1
