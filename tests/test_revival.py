"""Revived thinking tokens: which are chosen, that the two parts differ where they should, in trainers of whole models and adapters, and over a resume."""

import pytest
import torch
from models import EAGER_REVIVAL, tiny_model, tiny_tokenizer
from peft import LoraConfig

import hf_thinktok.revival as revival_module
from hf_thinktok.revival import Revival, apart, shared_and_free, split, thinking_rows


@pytest.fixture
def eager(monkeypatch):
    for name, value in EAGER_REVIVAL.items():
        monkeypatch.setattr(revival_module, name, value)


def test_the_worst_tokens_get_those_that_are_hardly_said():
    said = torch.tensor([400.0, 300, 300, 300, 100, 2, 0, 1, *[300] * 4])
    ended = torch.tensor([400, 200, 200, 180, 120, 1, 0, 1, *[200] * 4])
    choices = torch.cat([torch.arange(12).repeat_interleave(ended), torch.full((500,), -1)])
    room = torch.ones(500)  # where none is remembered yet: it must count for nothing

    def chosen(said, rates):
        return shared_and_free(said, choices, torch.cat([torch.tensor(rates).repeat_interleave(ended), room]))

    rates = [0.01, 0.6, 0.02, 0.5, 0.9, 0.9, 0.0, 0.9, *[0.0] * 4]
    parents, copies = chosen(said, rates)
    assert parents.tolist() == [1, 3], "by how much fails in all; what is chosen less often than others stands for less"
    assert copies.tolist() == [6, 7], "the least said first"
    none, _ = chosen(said, [rate * 0.05 for rate in rates])
    assert not len(none), "nothing fails"
    some, free = chosen(said.clamp(min=100), rates)
    assert len(some) == len(free) == 0, "none is free"
    one, _ = chosen(torch.where(said < 2, 100.0, said), rates)
    assert one.tolist() == [1], "the worst goes first"


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("tied", [False, True])
def test_the_copy_is_chosen_where_the_shared_token_fails_and_there_alone(tied, share):
    """Two meanings of one token, of which `share` is mostly right: hidden states of either around a point of their own."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, size, count = 12, 32, 400
    choosing = torch.randn(num_tokens, size, generator=generator)
    reading = choosing if tied else torch.randn(num_tokens, size, generator=generator)
    centre = 6 * choosing[4] / choosing[4].norm()
    right, wrong = (centre + torch.randn(size, generator=generator) / 4 for _ in range(2))
    is_right = torch.rand(count, generator=generator) < share
    hidden = torch.where(is_right[:, None], right, wrong) + torch.randn(count, size, generator=generator) / 40
    fails = torch.where(is_right, 0.3, 0.8)
    chose_others = torch.randint(num_tokens, (100,), generator=generator).where(torch.arange(100) % 2 == 0, -1)
    choices = torch.cat([torch.full((count,), 4), chose_others.masked_fill(chose_others == 4, 5)])
    remembered = (choices, torch.cat([fails, torch.rand(100, generator=generator)]), torch.cat([hidden, torch.randn(100, size, generator=generator)]))
    before, read = choosing.clone(), reading.clone()
    parents, copies = torch.tensor([4]), torch.tensor([9])
    assert ((hidden @ before.T).argmax(-1) == 4).all(), "both meanings choose it"
    difference, middle = apart(*remembered, parents)
    assert (difference @ middle.T).abs() < 1e-3 * difference.norm() * middle.norm(), "in the middle of all it says nothing"
    split(reading, choosing, parents, copies, difference, middle, generator)
    chosen = (hidden @ choosing.T).argmax(-1)
    assert (chosen[is_right] == 4).float().mean() > 0.95
    assert (chosen[~is_right] == 9).float().mean() > 0.95
    others = [i for i in range(num_tokens) if i not in (4, 9)]
    assert torch.equal(choosing[others], before[others])
    assert (choosing[4] - before[4]).norm() <= 0.26 * before[4].norm(), "the shared token keeps most of what it was"
    if not tied:
        assert torch.equal(reading[4], read[4])
        assert 0.05 < (reading[9] - read[4]).std() / read[4].std() < 0.2, "read as the shared one is, nearly"


def observed(trainer):
    """Trains, and gives what the revival saw at its first batch."""
    seen, observe = [], trainer.revival.observe
    trainer.revival.observe = lambda rollout, scores: (seen.append((rollout, scores)), observe(rollout, scores))
    trainer.train()
    return seen[0]


@pytest.mark.parametrize(("family", "stop"), [("llama", "fixed"), ("mamba", "fixed"), ("mamba", "sampled")])  # mamba runs ordinary rows
def test_a_token_is_judged_by_the_state_that_it_was_chosen_from(make_trainer, family, stop):
    options = {"num_generations": 16, "learning_rate": 0.0, "max_steps": 1, "lookahead": 2}
    trainer = make_trainer(family, revive_every=50, max_think_length=3, stop=stop, num_forks=2, **options)
    rows = []
    collate = trainer.data_collator
    trainer.data_collator = lambda batch: rows.append(made := collate(batch)) or made
    rollout, scores = observed(trainer)
    model, text = trainer.model, rows[0]["input_ids"]
    compared = 0
    for row, fork, group in (rollout.lengths_BKG * (rollout.forks_BK >= 0)[..., None]).nonzero().tolist():
        thought = rollout.thoughts_BKGL[row, fork, group, : rollout.lengths_BKG[row, fork, group]]
        whole = torch.cat([text[row, : rollout.forks_BK[row, fork] + 1], thought[:-1]])
        with torch.no_grad():
            hidden = model.eval()(whole[None], output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(scores.last_hidden_BKGD[row, fork, group], hidden, atol=1e-3, rtol=1e-3)
        compared += 1
    assert compared > 2
    since, said = trainer.revival.since, rollout.said_BKGL & (rollout.forks_BK >= 0)[:, :, None, None]
    ended = said.any(-1)
    assert since["said_N"].sum() == said.sum()
    told = (scores.logps_BKGH * scores.mask_BKH[:, :, None]).sum(-1).detach()
    count = int(ended.sum())
    assert (since["choice_R"] >= 0).tolist() == [False] * (len(since["choice_R"]) - count) + [True] * count, "the latest come last"
    torch.testing.assert_close(since["wrong_R"][-count:], 1 - told.exp()[ended], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(since["hidden_RD"][-count:], scores.last_hidden_BKGD[ended])


def test_the_latest_thoughts_are_remembered(make_trainer, monkeypatch):
    monkeypatch.setattr(revival_module, "REMEMBERED", 5)
    trainer = make_trainer(revive_every=50, stop="fixed", max_steps=2, num_generations=4)
    rollout, scores = observed(trainer)
    trainer.revival.observe(rollout, scores)
    last = (rollout.said_BKGL & scores.valid_BK[:, :, None, None]).any(-1)
    torch.testing.assert_close(trainer.revival.since["hidden_RD"], scores.last_hidden_BKGD[last][-5:])


def test_a_step_that_is_not_finite_leaves_no_trace(make_trainer):
    trainer = make_trainer(revive_every=50, stop="fixed", max_steps=1)
    rollout, scores = observed(trainer)
    before = {name: values.clone() for name, values in trainer.revival.since.items()}
    scores.logps_BKGH = scores.logps_BKGH * float("nan")
    trainer.revival.observe(rollout, scores)
    for name in ("choice_R", "wrong_R", "hidden_RD"):
        assert torch.equal(trainer.revival.since[name], before[name]), name


def test_nothing_is_revived_between_times(make_trainer, eager):
    untouched, revived = (make_trainer(revive_every=every, stop="fixed", max_steps=3, learning_rate=0.0) for every in (4, 3))
    for trainer in (untouched, revived):
        trainer.train()
    assert untouched.revival.revived == 0 < revived.revival.revived
    assert [entry["revived_tokens"] for entry in revived.state.log_history if "revived_tokens" in entry][-1] == revived.revival.revived
    rows = [torch.cat([table.rows_ND for table in thinking_rows(trainer.model, trainer.vocabulary)]) for trainer in (untouched, revived)]
    assert not torch.equal(*rows)
    real = [trainer.model.get_output_embeddings().weight[: trainer.vocabulary.num_real] for trainer in (untouched, revived)]
    assert torch.equal(*real), "text's own rows are left alone"


@pytest.mark.parametrize("tie", [True, False])
def test_with_an_adapter_the_rows_beside_the_base_are_revived(make_trainer, eager, tie):
    model = tiny_model(tie=tie, vocab_size=len(tiny_tokenizer()))
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = make_trainer(model=model, revive_every=2, stop="fixed", max_steps=2, learning_rate=0.0, peft_config=adapter)
    before = [table.rows_ND.detach().clone() for table in thinking_rows(trainer.model, trainer.vocabulary)]
    frozen = {name: value.clone() for name, value in trainer.model.named_parameters() if not value.requires_grad}
    trainer.train()
    assert trainer.revival.revived > 0
    after = thinking_rows(trainer.model, trainer.vocabulary)
    assert all(table.parameter.requires_grad for table in after)
    assert all(not torch.equal(rows, table.rows_ND) for rows, table in zip(before, after, strict=True))
    assert all(torch.equal(value, frozen[name]) for name, value in trainer.model.named_parameters() if name in frozen)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_a_copy_takes_over_what_the_optimizer_remembers_of_its_parent(make_trainer, eager, monkeypatch, optim):
    pairs = []
    monkeypatch.setattr(revival_module, "shared_and_free", lambda *counts: pairs.append(shared_and_free(*counts)) or pairs[-1])
    trainer = make_trainer(revive_every=2, stop="fixed", max_steps=2, optim=optim, num_think_tokens=8)
    trainer.train()
    (parents, copies), tables = pairs[0], thinking_rows(trainer.model, trainer.vocabulary)
    assert len(parents) > 0
    remembered = [rows for table in tables for rows in table.of_optimizer(trainer.optimizer)]
    assert bool(remembered) is (optim == "adamw_torch"), "the others keep nothing, or no number for each row and column"
    for rows in remembered:
        assert rows[parents].abs().sum() > 0
        assert torch.equal(rows[copies], rows[parents])


def test_a_resumed_run_revives_what_the_interrupted_one_would_have(make_trainer, eager, resumed):
    """The checkpoint lies between two times, so what was counted before it has to be in it."""
    whole, again = resumed(make_trainer, max_steps=6, revive_every=4, stop="fixed", num_think_tokens=8)
    assert whole.revival.revived == again.revival.revived > 0


def test_a_run_goes_on_with_another_number_of_processes(make_trainer):
    """All have as much room as the others: they could not gather else."""
    trainer = make_trainer(revive_every=50, stop="fixed", max_steps=1)
    observed(trainer)
    kept = trainer.revival.state_dict()
    again = Revival(trainer.vocabulary, 50, 0, num_processes=4)
    again.load_state_dict(kept)
    again.on_train_begin(None, None, None, model=trainer.model)
    back = Revival(trainer.vocabulary, 50, 0)
    back.load_state_dict(again.state_dict())
    back.on_train_begin(None, None, None, model=trainer.model)
    for name, values in kept["since"].items():
        assert len(again.since[name]) == len(values) // (1 if name == "said_N" else 4), name
        assert torch.equal(back.since[name], values), "no thought is lost that there is room for"
