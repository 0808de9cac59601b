"""Thoughts written in ordinary tokens between a start and an end token, against ordinary rows."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_thinktok.answers import answer
from hf_thinktok.architectures import LogitTransform
from hf_thinktok.head import HeadInputs, score
from hf_thinktok.thoughts import control_thoughts

N, L, G = 3, 4, 3


def questions(count=8, length=None):
    """Rows with one answer each; with `length` their thoughts are of 0 to `length - 1` tokens."""
    random = np.random.default_rng(1)
    rows = [random.integers(10, 200, 6).tolist() for _ in range(count)]
    extra = [{} if length is None else {"think_length": i % length} for i in range(count)]
    return Dataset.from_list([{"input_ids": ids, "labels": [-100] * 5 + ids[5:], **more} for ids, more in zip(rows, extra, strict=True)])


@pytest.fixture
def make(make_trainer):
    def build(rows=None, **options):
        defaults = {"thoughts": "text", "stop": "fixed", "num_forks": 1, "max_think_length": L, "num_think_tokens": N, "num_generations": G}
        return make_trainer(train_dataset=questions() if rows is None else rows, **defaults | {"text_ce_weight": 0.0} | options)

    return build


def rolled_out(trainer, rows):
    inputs = trainer.data_collator([rows[i] for i in range(len(rows))])
    labels = trainer._labels(inputs)
    return inputs, labels, trainer._rollout(trainer.model, inputs, labels, 0, trainer._schedule_step(inputs))


def plain_logps(model, vocabulary, row, targets):
    """log p(target | what came before) over real rows for the last places of an ordinary row."""
    logits = model(input_ids=torch.tensor([row])).logits[0, -len(targets) :, : vocabulary.num_real]
    return logits.log_softmax(-1)[range(len(targets)), targets]


@pytest.mark.parametrize(
    "options", [{}, {"engine": "replicated"}, {"blind": True}, {"policies": "split"}, {"policies": "split", "blind": True}], ids=lambda o: str(o) or "default"
)
def test_what_is_written_and_what_follows_are_those_of_ordinary_rows(make, options):
    rows = questions(3)
    trainer = make(rows, **options)
    thinker, speaker = trainer.model, getattr(trainer.model, "speaker", trainer.model)
    if speaker is not thinker:
        with torch.no_grad():
            for parameter in speaker.parameters():
                parameter.mul_(1.2)
    inputs, labels, rollout = rolled_out(trainer, rows)
    scores = trainer._score(thinker, trainer._tree(inputs, rollout), inputs["input_ids"], labels, rollout)
    first, last = trainer.vocabulary.first_id, trainer.vocabulary.guard_id - 1
    for row, group in np.ndindex(3, G):
        ids, thought = rows[row]["input_ids"], rollout.thoughts_BKGL[row, 0, group].tolist()
        assert [thought[0], thought[-1]] == [first, last]
        assert max(thought[1:-1]) < trainer.vocabulary.num_real
        written = plain_logps(thinker, trainer.vocabulary, [*ids[:5], *thought[:-2]], thought[1:-1])
        torch.testing.assert_close(scores.thought_logps_BKGL[row, 0, group, 1:-1], written, atol=1e-4, rtol=0)
        torch.testing.assert_close(rollout.logps_BKGL[row, 0, group, 1:-1], written, atol=1e-3, rtol=0)
        said = plain_logps(speaker, trainer.vocabulary, [*([] if trainer.args.blind else ids[:5]), *thought], [ids[5]])
        assert scores.logps_BKGH[row, 0, group, 0].item() == pytest.approx(said.item(), abs=1e-4)


def test_the_gradient_is_the_policy_gradient_of_the_words_alone(make):
    """Neither the start nor the end token was drawn, so neither is credited, nor counted in the mean."""
    rows = questions(2)
    trainer = make(rows, think_ce_weight=0.0, think_loss_type="grpo")
    twin = copy.deepcopy(trainer.model)
    del twin.forward
    inputs, _, rollout = rolled_out(trainer, rows)
    trainer.model.train(), twin.train()
    trainer.compute_loss(trainer.model, inputs).backward()
    total = 0.0
    for row in range(2):
        ids, thoughts = rows[row]["input_ids"], rollout.thoughts_BKGL[row, 0].tolist()
        with torch.no_grad():
            rewards = torch.stack([plain_logps(twin, trainer.vocabulary, [*ids[:5], *thought], [ids[5]])[0] for thought in thoughts])
        for thought, advantage in zip(thoughts, rewards - rewards.mean(), strict=True):
            total = total - advantage * plain_logps(twin, trainer.vocabulary, [*ids[:5], *thought[:-2]], thought[1:-1]).mean() / (2 * G)
    total.backward()
    for (name, a), b in zip(trainer.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, torch.zeros_like(b) if b.grad is None else b.grad, atol=2e-5, rtol=1e-3, msg=name)


def test_words_are_drawn_as_often_as_the_model_says(thinker):
    model, _, vocabulary = thinker
    generator = torch.Generator().manual_seed(0)
    hidden_D = torch.randn(model.config.hidden_size, generator=generator) * 0.3
    nodes = torch.arange(20_000)
    head, transform = HeadInputs(nodes, torch.full_like(nodes, -100), draw=generator), LogitTransform.from_config(model.config)
    with torch.no_grad():
        out = score(hidden_D.expand(len(nodes), -1), model.lm_head, head, vocabulary, transform)
        probabilities = (model.lm_head.weight[: vocabulary.num_real] @ hidden_D).softmax(-1)
    counts = torch.bincount(out.drawn_M, minlength=vocabulary.num_real)
    error = (probabilities * (1 - probabilities) / len(nodes)).sqrt()
    assert ((counts / len(nodes) - probabilities).abs() < 5 * error + 1e-4).all()
    torch.testing.assert_close(out.target_logps_M, probabilities.log()[out.drawn_M], atol=1e-4, rtol=0)


def test_answers_are_those_of_greedy_words(make):
    rows = questions(6)
    trainer = make(rows)
    said, first = answer(trainer, rows), trainer.vocabulary.first_id
    for i, row in enumerate(rows):
        ids = [*row["input_ids"][:5], first]
        for _ in range(L - 2):
            ids.append(int(trainer.model(input_ids=torch.tensor([ids])).logits[0, -1, :first].argmax()))
        expected = plain_logps(trainer.model, trainer.vocabulary, [*ids, trainer.vocabulary.guard_id - 1], row["input_ids"][5:])
        assert said.logps_D[i] == pytest.approx(expected.item(), abs=1e-4)


def test_answers_after_random_words(make):
    rows = questions(6)
    trainer = make(rows)
    said = answer(trainer, rows, "random").thoughts_DL
    assert (said[:, 0] == trainer.vocabulary.first_id).all()
    assert (said[:, -1] == trainer.vocabulary.guard_id - 1).all()
    assert said[:, 1:-1].max() < trainer.vocabulary.num_real
    assert (answer(trainer, rows, "none").thoughts_DL == -1).all()


def test_thoughts_of_given_lengths_begin_and_end(make):
    rows = questions(5, length=5)
    trainer = make(rows)
    _, _, rollout = rolled_out(trainer, rows)
    first, last = trainer.vocabulary.first_id, trainer.vocabulary.guard_id - 1
    for row in range(5):
        length = rows[row]["think_length"]
        said = [i if i >= first else "word" for i in rollout.thoughts_BKGL[row, 0, 0, :length].tolist()]
        assert said == [[], [first], [first, last], [first, "word", last], [first, "word", "word", last]][length]
        assert rollout.drawn_BKGL[row, 0, 0].tolist() == [s == "word" for s in said] + [False] * (L - length)


def test_a_rewarded_word_becomes_likely(make):
    """Also through a checkpoint with text around it: random words are the control, and evaluation runs."""

    def prefers_small(thoughts, **kwargs):
        return (thoughts[..., 1:-1] < 40).float().mean(-1)

    trainer = make(reward_funcs=prefers_small, num_generations=16, max_steps=60, learning_rate=1e-2, think_ce_weight=0.0, eval_dataset=questions(4))
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert np.mean(rewards[:5]) < 0.4 < 0.8 < np.mean(rewards[-5:])
    assert "thought_entropy" not in trainer.state.log_history[0]
    assert {"eval_bits_think", "eval_bits_random_thought"} <= set(trainer.evaluate())


def test_the_control_writes_random_words(make):
    rows = questions(6, length=5)
    trainer = make(rows)
    _, _, rollout = rolled_out(trainer, rows)
    control = control_thoughts(rollout, trainer.vocabulary, torch.Generator().manual_seed(0))
    markers = rollout.said_BKGL & ~rollout.drawn_BKGL
    assert torch.equal(control.thoughts_BKGL[markers], rollout.thoughts_BKGL[markers])
    words = control.thoughts_BKGL[rollout.drawn_BKGL]
    assert len(set(words.tolist())) > 0.8 * len(words)
    assert words.max() < trainer.vocabulary.num_real


def test_words_are_printed(make, capsys):
    make(log_completions=True, max_steps=1, num_completions_to_print=1).train()
    printed = capsys.readouterr().out
    assert "Thoughts at step 1" in printed
