"""What thoughts are drawn from, what is remembered of them, and how they are shown."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from plain_rows import thinker
from questions import batch_of, one_rollout, questions
from test_trainer import losses

from hf_thinktok import ThinkTokConfig
from hf_thinktok.callbacks import sample_thoughts_to_print
from hf_thinktok.curriculum import BatchesAgain
from hf_thinktok.objective import credit
from hf_thinktok.rollout import Sampling, random_thoughts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 2}, [5 / 8, 3 / 8, 0, 0]),
        ({"top_p": 0.7}, [5 / 8, 3 / 8, 0, 0]),
        ({"min_p": 0.25}, [10 / 19, 6 / 19, 3 / 19, 0]),
        ({"temperature": 0.5}, [100 / 146, 36 / 146, 9 / 146, 1 / 146]),
    ],
)
def test_thinking_tokens_are_drawn_among_the_likely_ones(options, expected):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert Sampling(**options).probabilities(logits)[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_random_thoughts_are_of_every_token_alike():
    vocabulary = thinker()[1]
    drawn = random_thoughts(torch.zeros(20, 20, 10, 4, dtype=torch.long), vocabulary, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn.flatten() - vocabulary.first_id, minlength=vocabulary.num_tokens)
    assert len(counts) == vocabulary.num_tokens
    assert (counts - 100.0).abs().max() < 6 * 10


def test_blind_thoughts_have_a_token_however_shut_the_gate(on_questions):
    rows = questions().remove_columns("think_length")
    trainer = on_questions(rows, blind=True, stop="sampled", num_generations=8)
    inputs, labels = batch_of(trainer, rows.select(range(8)))
    assert (one_rollout(trainer, inputs, labels).lengths_BKG >= 1).all()
    open_ = on_questions(rows, stop="sampled", num_generations=8)
    assert (one_rollout(open_, inputs, labels).lengths_BKG == 0).any(), "the gate must be nearly shut to be a test"


def test_a_rollout_asks_transformers_for_nothing_that_is_about_to_go(on_questions):
    trainer, rows = on_questions(), questions()
    inputs, labels = batch_of(trainer, rows.select(range(4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        one_rollout(trainer, inputs, labels)


def test_whole_numbers_are_numbers():
    """transformers takes a temperature of 2 for none, and numpy's whole numbers for no whole ones."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    halved = Sampling(temperature=2, top_k=np.int64(2)).warpers()(torch.zeros(1, 1, dtype=torch.long), logits)
    assert halved.tolist() == [[1.5, 1.0, -math.inf, -math.inf]]


@pytest.mark.parametrize("options", [{"temperature": 0.6}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_a_trainer_draws_as_it_was_told_and_scores_as_it_drew(on_questions, options):
    rows = questions(levels=(3,))
    trainer = on_questions(rows, num_generations=6, **options)
    inputs, labels = batch_of(trainer, rows.select(range(6)))
    rollout = one_rollout(trainer, inputs, labels)
    scores = trainer._score(trainer.model, trainer._tree(inputs, rollout), inputs["input_ids"], labels, rollout)
    torch.testing.assert_close(scores.thought_logps_BKGL, rollout.logps_BKGL, atol=1e-5, rtol=0)
    alike = (rollout.thoughts_BKGL == rollout.thoughts_BKGL[:, :, :1]).all()
    assert alike == ("temperature" not in options), "the likeliest alone, or several"


def test_a_rollout_that_is_learned_from_again_remembers_who_drew_it(make_trainer):
    trainer = make_trainer(num_iterations=2, stop="fixed", max_steps=2, learning_rate=0.1, epsilon=1e-3, lr_scheduler_type="constant")
    trainer.train()
    (rollout,) = trainer._rollouts
    drawn = rollout.drawn_BKGL & (rollout.forks_BK >= 0)[..., None, None]
    torch.testing.assert_close(rollout.old_logps_BKGA[drawn], rollout.logps_BKGL[drawn], atol=1e-3, rtol=0)
    first, second = losses(trainer, "clip_ratio")
    assert first == 0 < second, "the second step is clipped where it went too far"


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"stop": "sampled"},
        {"stop": "fixed", "search": [8], "objective": "marginal"},
        {"thoughts": "text", "stop": "fixed", "max_think_length": 4},
        {"thoughts": "gumbel", "stop": "fixed"},
        {"markovian_share": 0.5, "stop": "fixed"},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_what_was_drawn_is_as_likely_in_the_training_pass(make_trainer, options):
    """Drawn on the cached prefix, learned from in the packed tree, with what a search put in its place left out."""
    trainer = make_trainer(max_steps=2, logging_steps=1, **options)
    trainer.train()
    assert all(0 <= difference < 1e-4 for difference in losses(trainer, "sampling_logp_difference"))


def test_after_a_step_a_rollout_is_another_policys(make_trainer):
    trainer = make_trainer(num_iterations=2, stop="fixed", max_steps=2, learning_rate=0.05, lr_scheduler_type="constant")
    trainer.train()
    same, moved = losses(trainer, "sampling_logp_difference")
    assert same < 1e-4 < 1e-3 < moved


def test_what_a_thought_is_worth_does_not_change_while_it_is_learned_from_again(make_trainer, monkeypatch):
    trainer, told, found, policy_loss = make_trainer(num_iterations=3, stop="fixed", max_steps=6, learning_rate=0.05), [], [], ThinkTokConfig.policy_loss
    monkeypatch.setattr(ThinkTokConfig, "policy_loss", lambda self: lambda *args, **more: (told.append(args[2]), policy_loss(self)(*args, **more))[1])
    monkeypatch.setattr("hf_thinktok.objective.credit", lambda *args: (found.append(credit(*args)[1]), credit(*args))[1])
    trainer.train()
    assert len(told) == 6
    for first in (0, 3):
        assert torch.equal(told[first], found[first])
        for again in (first + 1, first + 2):
            assert torch.equal(told[again], told[first])
            assert not torch.allclose(found[again], found[first], atol=1e-4), "the model has learned from them meanwhile"


def test_batches_that_come_again_are_others_in_another_epoch():
    sampler = BatchesAgain(range(32), mini_repeat_count=1, batch_size=4, repeat_count=2, seed=3)
    orders = []
    for epoch in (0, 1, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] != orders[1] == orders[2]
    assert orders[0][:4] == orders[0][4:8]


def test_printed_thoughts_stand_between_what_was_read_and_what_followed(on_questions):
    rows = questions(levels=(3,))
    trainer = on_questions(rows, log_completions=True)
    inputs, labels = batch_of(trainer, rows.select(range(2)))
    rollout = one_rollout(trainer, inputs, labels)
    gains, lengths = torch.tensor([[[0.5, 0.0]], [[-1.0, 0.0]]]), torch.tensor([[[2.0, 1.4]], [[1.6, 0.3]]])
    for own, told in ((0, rollout), (1, dataclasses.replace(rollout, chosen=True))):  # the first of them may be another's than the policy's
        said = sample_thoughts_to_print(inputs["input_ids"], told, lengths, labels[:, 5:][:, None], gains, 2)
        for row, one in enumerate(said):
            ids = rows[row]["input_ids"]
            assert (one["before"], one["after"], one["gain"]) == (ids[:5], ids[5:], gains[row, 0, own].item())
            assert (one["thought"], one["length"]) == (rollout.thoughts_BKGL[row, 0, own].tolist(), lengths[row, 0, own].item())


def test_epsilon_greedy_begins_when_it_is_to(on_questions):
    rows = questions(levels=(3,))
    trainer, never, always = (on_questions(rows, epsilon_greedy=epsilon, max_steps=4) for epsilon in ([0.0, 1.0, 0, 3], [0.0], [1.0]))
    inputs, labels = batch_of(trainer, rows.select(range(8)))
    for step, other in ((2, never), (3, always)):
        for one in (trainer, other):
            one._rollouts, one.state.global_step = [], step
        assert torch.equal(one_rollout(trainer, inputs, labels).thoughts_BKGL, one_rollout(other, inputs, labels).thoughts_BKGL)
