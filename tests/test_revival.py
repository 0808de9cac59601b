"""Revived thinking tokens: which are chosen, that the two parts differ where they should, in trainers of whole models and adapters, and over a resume."""

import pytest
import torch
from models import EAGER_REVIVAL, tiny_model, tiny_tokenizer
from peft import LoraConfig

import hf_thinktok.revival as revival_module
from hf_thinktok.revival import Revival, apart, shared_and_free, split, thinking_rows, trained_biases
from hf_thinktok.rollout import Sampling


@pytest.fixture
def eager(monkeypatch):
    for name, value in EAGER_REVIVAL.items():
        monkeypatch.setattr(revival_module, name, value)


@pytest.fixture
def pairs(monkeypatch):
    """The parents and copies of each time."""
    seen = []
    monkeypatch.setattr(revival_module, "shared_and_free", lambda *counts: seen.append(shared_and_free(*counts)) or seen[-1])
    return seen


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
    came_up = choices.masked_fill(choices == 2, 6)
    _, free = shared_and_free(said, came_up, torch.cat([torch.tensor(rates).repeat_interleave(ended), room]))
    assert free.tolist() == [7, 5], "one that has come into use is not free, however little it was said before"


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


# Mamba runs ordinary rows.
@pytest.mark.parametrize(
    ("family", "stop", "explore"),
    [("llama", "fixed", {"search": 4, "temperature": 2.0}), ("mamba", "fixed", {"epsilon_greedy": 0.5}), ("mamba", "sampled", {})],
)
def test_a_token_is_judged_by_the_state_that_it_was_chosen_from(make_trainer, family, stop, explore):
    options = {"num_generations": 16, "learning_rate": 0.0, "max_steps": 1, "lookahead": 2} | explore
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
    assert rollout.chosen is ("search" in explore)
    said[:, :, : int(rollout.chosen)] = False  # it was not the policy that said it
    ended = said.any(-1)
    drawn_from = (scores.think_logps_BKGLN.detach()[said] / explore.get("temperature", 1.0)).softmax(-1)
    torch.testing.assert_close(since["said_N"], drawn_from.sum(0))
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
    scores.think_logps_BKGLN = scores.think_logps_BKGLN * float("nan")
    trainer.revival.observe(rollout, scores)
    for name, values in trainer.revival.since.items():
        assert torch.equal(values, before[name]), name


def test_nothing_is_revived_between_times(make_trainer, eager):
    untouched, revived = (make_trainer(revive_every=every, stop="fixed", max_steps=4, learning_rate=0.0) for every in (4, 3))
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
    trainer = make_trainer(model=model, revive_every=2, stop="fixed", max_steps=3, learning_rate=0.0, peft_config=adapter)
    before = [table.rows_ND.detach().clone() for table in thinking_rows(trainer.model, trainer.vocabulary)]
    frozen = {name: value.clone() for name, value in trainer.model.named_parameters() if not value.requires_grad}
    trainer.train()
    assert trainer.revival.revived > 0
    after = thinking_rows(trainer.model, trainer.vocabulary)
    assert all(table.parameter.requires_grad for table in after)
    assert all(not torch.equal(rows, table.rows_ND) for rows, table in zip(before, after, strict=True))
    assert all(torch.equal(value, frozen[name]) for name, value in trainer.model.named_parameters() if name in frozen)


def split_now(trainer):
    """What would be done before the next step."""
    trainer.revival.on_step_begin(trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=trainer.optimizer)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_a_copy_takes_over_what_belongs_to_its_parent(make_trainer, eager, pairs, optim):
    """The bias of its logit, and what the optimizer remembers."""
    trainer = make_trainer("phi", revive_every=2, stop="fixed", max_steps=2, optim=optim, num_think_tokens=8)
    trainer.train()
    assert not pairs, "what is saved and evaluated is what was trained"
    (bias,) = trained_biases(trainer.model, trainer.vocabulary)
    bias.rows_ND.data.normal_()
    split_now(trainer)
    (parents, copies), tables = pairs[0], [*thinking_rows(trainer.model, trainer.vocabulary), bias]
    assert len(parents) > 0
    assert torch.equal(bias.rows_ND[copies], bias.rows_ND[parents])
    remembered = [rows for table in tables for rows in table.of_optimizer(trainer.optimizer)]
    assert len(remembered) == {"adamw_torch": 6, "sgd": 0, "adafactor": 1}[optim], "of a matrix the last keeps no number for each row and column"
    for rows in remembered:
        assert rows[parents].abs().sum() > 0
        assert torch.equal(rows[copies], rows[parents])


@pytest.mark.parametrize("family", ["llama", "granite"])  # granite's logits are a part of hidden times row
def test_parent_and_copy_are_so_many_nats_apart(make_trainer, eager, pairs, monkeypatch, family):
    monkeypatch.setattr(revival_module, "LARGEST_PART", 1000.0)
    trainer = make_trainer(
        family, model=tiny_model(family, tie=False, vocab_size=len(tiny_tokenizer())), revive_every=2, stop="fixed", max_steps=2, num_think_tokens=8
    )
    trainer.train()
    since = trainer.revival.state_dict()["since"]
    split_now(trainer)
    (parents, copies), rows = pairs[0], thinking_rows(trainer.model, trainer.vocabulary)[1].rows_ND.detach()
    assert len(parents) > 0
    scale = 1 / getattr(trainer.model.config, "logits_scaling", 1)
    for parent, copy in zip(parents, copies, strict=True):
        gaps = scale * since["hidden_RD"][since["choice_R"] == parent] @ (rows[copy] - rows[parent])
        assert gaps.std(correction=0) == pytest.approx(revival_module.SHARPNESS, rel=1e-3)


def test_a_resumed_run_revives_what_the_interrupted_one_would_have(make_trainer, eager, resumed):
    """The checkpoint lies between two times, so what was counted before it has to be in it."""
    whole, again = resumed(make_trainer, max_steps=6, revive_every=4, stop="fixed", num_think_tokens=8)
    assert whole.revival.revived == again.revival.revived > 0


def test_a_run_goes_on_with_another_number_of_processes(make_trainer):
    """All have as much room as the others: they could not gather else."""
    trainer = make_trainer(revive_every=50, stop="fixed", max_steps=1)
    observed(trainer)
    kept = trainer.revival.state_dict()

    def resumed(state, num_processes):
        """The ranks, and what they put together."""
        ranks = [Revival(trainer.vocabulary, Sampling(), 50, 0, lambda _: next(gathered), num_processes, process) for process in range(num_processes)]
        for rank in ranks:
            rank.load_state_dict(state)
            rank.on_train_begin(None, None, None, model=trainer.model)
        gathered = (torch.cat([rank.since[name][None] if name == "said_N" else rank.since[name] for rank in ranks]) for name in ranks[0].since)
        return ranks, ranks[0].state_dict()

    four, of_four = resumed(kept, 4)
    one, of_one = resumed(of_four, 1)
    for name, values in kept["since"].items():
        assert all(len(rank.since[name]) == len(values) // (1 if name == "said_N" else 4) for rank in four), name
        assert torch.equal(of_four["since"][name], values), "each has a part, and none is counted twice"
        assert torch.equal(one[0].since[name], values), "no thought is lost that there is room for"


def test_what_was_remembered_is_forgotten_once_it_was_used(make_trainer, eager):
    trainer = make_trainer(revive_every=2, stop="fixed", max_steps=2)
    trainer.train()
    assert trainer.revival.since["said_N"].any()
    split_now(trainer)
    assert not trainer.revival.since["said_N"].any()
    assert (trainer.revival.since["choice_R"] == -1).all()
