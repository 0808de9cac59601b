"""Policy losses, rewards, advantages, stopping times, forks and held-out gains against explicit loops."""

import copy
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_thinktok.advantages import EPSILON, ValueBaseline, group_advantages, posterior, token_advantages
from hf_thinktok.evaluation import GainByDocument
from hf_thinktok.forks import choose_forks, eligible_forks, ends_of
from hf_thinktok.losses import PolicyLoss, expected_length, stop_actions, stopping_logps
from hf_thinktok.rewards import REWARDS, masked_mean, resolve_rewards, total_reward

B, K, G, A = 2, 3, 4, 3
KINDS = ("dr_grpo", "grpo", "bnpo", "dapo", "cispo")
quick = settings(max_examples=40, deadline=None)


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def actions(seed=0, spread=0.4):
    """Log-probabilities now, when drawn and under a reference, advantages, and which actions were taken; one fork is not there, one thought is empty."""
    logps, old, reference = (-draw(B, K, G, A, seed=seed + i).abs() for i in range(3))
    old, reference = logps + (old - logps) * spread, logps + (reference - logps) * spread
    lengths = torch.randint(1, A + 1, (B, K, G), generator=torch.Generator().manual_seed(seed))
    lengths[1, 2], lengths[0, 1, 2] = 0, 0
    return logps.requires_grad_(), old, reference, draw(B, K, G, A, seed=seed + 9), torch.arange(A) < lengths[..., None]


# ---------------------------------------------------------------- policy losses


def loop_loss(kind, logps, old, advantages, mask, max_length, num_thoughts, low, high, delta, level, beta, reference, global_actions):
    """The papers' formulas, one action at a time."""
    total, per_thought, count = 0.0, [], 0
    for b in range(B):
        for k in range(K):
            for g in range(G):
                taken = [a for a in range(A) if mask[b, k, g, a]]
                of_thought = []
                for a in taken:
                    if level == "sequence":
                        ratio = torch.exp(sum(logps[b, k, g, i] - old[b, k, g, i] for i in taken) / len(taken))
                    else:
                        ratio = torch.exp(logps[b, k, g, a] - old[b, k, g, a])
                    advantage = advantages[b, k, g, a]
                    if kind == "cispo":
                        gain = min(ratio.item(), high) * advantage * logps[b, k, g, a]
                    else:
                        clipped = min(max(ratio, torch.tensor(1 - low)), torch.tensor(1 + high)) * advantage
                        gain = min((ratio if delta is None else min(ratio, torch.tensor(delta))) * advantage, clipped)
                    if beta:
                        away = reference[b, k, g, a] - logps[b, k, g, a]
                        gain = gain - beta * (torch.exp(away) - away - 1)
                    of_thought.append(-gain)
                total, count = total + sum(of_thought), count + len(taken)
                per_thought.append(sum(of_thought) / max(len(taken), 1))
    if kind == "dr_grpo":
        return total / (num_thoughts * max_length)
    if kind == "grpo":
        return sum(per_thought) / num_thoughts
    return total / (count if kind == "bnpo" or global_actions is None else global_actions)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("low", "high", "delta", "beta"), [(0.2, 0.2, None, 0.0), (0.1, 0.3, None, 0.0), (0.1, 0.3, 1.25, 0.04), (1e-3, 1e-3, 1e-2, 0.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_policy_loss_is_the_papers(kind, low, high, delta, beta, level):
    logps, old, reference, advantages, mask = actions()
    high = 1 + high if kind == "cispo" else high  # its bound is the ratio's own
    loss, metrics = PolicyLoss(kind, low, high, delta, level, beta)(logps, old, advantages, mask, 7, 12.5, reference if beta else None, 11.0)
    expected = loop_loss(kind, logps, old, advantages, mask, 7, 12.5, low, high, delta, level, beta, reference, 11.0)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, logps)[0], torch.autograd.grad(expected, logps)[0], atol=1e-6, rtol=1e-5)
    assert 0 < metrics["clip_ratio"] < 1


@pytest.mark.parametrize("kind", ["dapo", "cispo"])
def test_without_other_ranks_their_actions_are_ours(kind):
    logps, old, _, advantages, mask = actions()
    alone, same = (PolicyLoss(kind)(logps, old, advantages, mask, A, 12.5, None, count)[0] for count in (None, mask.sum()))
    assert torch.equal(alone, same)


@pytest.mark.parametrize("kind", KINDS)
def test_actions_not_taken_do_not_count(kind):
    """Neither what is behind a thought's end nor a thought without tokens, whatever stands there."""
    logps, old, reference, advantages, mask = actions()
    loss = PolicyLoss(kind, beta=0.1)
    clean, clean_metrics = loss(logps, old, advantages, mask, A, 12.5, reference)
    other, other_metrics = loss(
        torch.where(mask, logps, -3.0), torch.where(mask, old, -1.0), torch.where(mask, advantages, 50.0), mask, A, 12.5, torch.where(mask, reference, -9.0)
    )
    assert torch.equal(clean, other)
    assert clean_metrics == other_metrics
    assert (torch.autograd.grad(clean, logps)[0][~mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_actions_no_loss(kind):
    logps, old, _, advantages, mask = actions()
    assert PolicyLoss(kind)(logps, old, advantages, torch.zeros_like(mask), A, 12.5)[0] == 0


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "options", "slope"),
    [
        (0.0, 1.0, {}, 1.0),
        (0.5, 1.0, {}, 0.0),  # above 1 + epsilon and good: no more of it
        (0.5, -1.0, {}, 1.0),  # above and bad: pushed back, however far it went
        (-0.5, -1.0, {}, 0.0),
        (-0.5, 1.0, {}, 1.0),
        (0.25, 1.0, {"epsilon_high": 0.3}, 1.0),  # higher above than below
        (-0.25, -1.0, {"epsilon_high": 0.3}, 0.0),
        (0.5, -1.0, {"delta": 1.5}, 0.0),  # two-sided: not even then
        (0.3, -1.0, {"delta": 1.5}, 1.0),
        (0.5, 1.0, {"kind": "cispo", "epsilon_high": 1.2}, 1.2 / math.exp(0.5)),  # cispo never stops the gradient, it bounds its weight
        (-0.5, -1.0, {"kind": "cispo", "epsilon_high": 1.2}, 1.0),
    ],
)
def test_clipping_by_sign(log_ratio, advantage, options, slope):
    """The gradient of one action, as a part of ratio * advantage."""
    logps = torch.full((1, 1, 1, 1), -1.0, requires_grad=True)
    loss, metrics = PolicyLoss(**options)(
        logps, logps.detach() - log_ratio, torch.full((1, 1, 1, 1), advantage), torch.ones(1, 1, 1, 1, dtype=torch.bool), 1, 1
    )
    grad = torch.autograd.grad(loss, logps)[0].item()
    assert grad == pytest.approx(-slope * math.exp(log_ratio) * advantage, abs=1e-6)
    if "kind" not in options and options.get("delta") is None:
        assert metrics["clip_ratio"] == float(slope == 0)


def test_sequence_ratio_is_the_geometric_mean():
    """Two tokens whose ratios cancel: clipped one by one, untouched as a sequence."""
    old = torch.full((1, 1, 1, 2), -1.0)
    logps, mask, good = old + torch.tensor([1.0, -1.0]), torch.ones(1, 1, 1, 2, dtype=torch.bool), torch.ones(1, 1, 1, 2)
    assert PolicyLoss("grpo")(logps, old, good, mask, 2, 1)[0].item() == pytest.approx(-(1.2 + math.exp(-1)) / 2)
    assert PolicyLoss("grpo", importance_sampling_level="sequence")(logps, old, good, mask, 2, 1)[0].item() == pytest.approx(-1.0)


def test_kl_is_k3():
    """k3 is never negative, 0 at the reference, and its mean over drawn actions is the KL divergence."""
    policy, reference = draw(5, seed=1).log_softmax(0), draw(5, seed=2).log_softmax(0)
    one = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    kls = []
    for z in range(5):
        at = torch.full((1, 1, 1, 1), policy[z].item())
        loss, metrics = PolicyLoss(beta=2.0)(at, at, torch.zeros(1, 1, 1, 1), one[..., :1], 1, 1, torch.full((1, 1, 1, 1), reference[z].item()))
        assert loss.item() == pytest.approx(2.0 * metrics["kl"].item())
        kls.append(metrics["kl"].item())
    assert min(kls) >= 0
    exact = (policy.exp() * (policy - reference)).sum().item()
    assert sum(p * kl for p, kl in zip(policy.exp().tolist(), kls)) == pytest.approx(exact, abs=1e-5)
    assert PolicyLoss(beta=1.0)(policy[None, None, None], policy[None, None, None], torch.zeros(1, 1, 1, 5), one, 5, 1, policy[None, None, None])[0] == 0


# ---------------------------------------------------------------- stopping times


gates = st.lists(st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3), min_size=1, max_size=4)


@quick
@given(gates, st.booleans())
def test_stopping_times_are_a_distribution(rows, must_think):
    stops = stopping_logps(torch.tensor(rows)[None, None], must_think)[0, 0].double()
    torch.testing.assert_close(stops.exp().sum(-1), torch.ones(len(rows), dtype=torch.double), atol=1e-5, rtol=0)
    for row, weights in zip(rows, stops.exp().tolist()):
        thinks = [1.0 if must_think and i == 0 else 1 / (1 + math.exp(-x)) for i, x in enumerate(row)]
        expected = [math.prod(thinks[:i]) * (1 - thinks[i] if i < 3 else 1) for i in range(4)]
        assert weights == pytest.approx(expected, abs=1e-5)
        length = expected_length(torch.tensor(weights).log()).item()
        assert length == pytest.approx(sum(i * w for i, w in enumerate(expected)), abs=1e-4)


@quick
@given(gates, st.integers(0, 3), st.booleans())
def test_drawn_stops_have_the_stops_probability(rows, length, must_think):
    """The drawn decisions' log-probabilities add up to that of the length; a first token that must be thought is no decision."""
    length = max(length, int(must_think))
    gate = torch.tensor(rows)[None, None].double()
    logps, drawn = stop_actions(gate, torch.full(gate.shape[:3], length), must_think)
    stops = stopping_logps(gate, must_think)
    torch.testing.assert_close(torch.where(drawn, logps, 0.0).sum(-1), stops[..., length], atol=1e-5, rtol=1e-5)
    assert drawn.sum(-1).unique().tolist() == [min(length + 1, 3) - must_think]


# ---------------------------------------------------------------- rewards


H = 3


def judgement():
    mask = torch.tensor([[[1, 1, 1], [1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 0, 1], [0, 0, 0]]], dtype=torch.bool)
    logps = -draw(B, K, G, H, seed=3).abs()
    return {"logps": logps, "correct": logps > -0.5, "baseline_logps": -draw(B, K, H, seed=4).abs(), "mask": mask}


BY_HAND = {
    "log_prob": lambda logp, correct, baseline: logp,
    "accuracy": lambda logp, correct, baseline: float(correct),
    "prob": lambda logp, correct, baseline: math.exp(logp),
    "information_gain": lambda logp, correct, baseline: logp - baseline,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_rewards_are_means_over_the_judged_tokens(name):
    said = judgement()
    rewards = REWARDS[name](**said, thoughts=None, lengths=None, targets=None)
    for b in range(B):
        for k in range(K):
            for g in range(G):
                there = [h for h in range(H) if said["mask"][b, k, h]]
                values = [BY_HAND[name](said["logps"][b, k, g, h].item(), said["correct"][b, k, g, h], said["baseline_logps"][b, k, h].item()) for h in there]
                assert rewards[b, k, g].item() == pytest.approx(sum(values) / max(len(values), 1), abs=1e-6)


@pytest.mark.parametrize("name", BY_HAND)
def test_rewards_ignore_tokens_that_are_not_there(name):
    said = judgement()
    other = said | {
        key: torch.where(said["mask"][:, :, None] if said[key].ndim == 4 else said["mask"], said[key], -99.0) for key in ("logps", "baseline_logps")
    }
    assert torch.equal(REWARDS[name](**said), REWARDS[name](**other))


def test_total_reward_is_the_weighted_sum():
    def longest(lengths, **kwargs):
        return lengths

    said = judgement() | {"lengths": torch.randint(4, (B, K, G))}
    functions = resolve_rewards(["log_prob", longest])
    total, each = total_reward(functions, [2.0, -0.5], **said)
    assert torch.equal(total_reward(functions, [2, 1], **said)[0], total_reward(functions, [2.0, 1.0], **said)[0]), "whole numbers, as YAML has them"
    torch.testing.assert_close(total, 2 * REWARDS["log_prob"](**said) - 0.5 * said["lengths"])
    torch.testing.assert_close(each[1], said["lengths"].float())


@pytest.mark.parametrize(("typed", "meant"), [("logprob", "log_prob"), ("acuracy", "accuracy"), ("info_gain", "information_gain"), ("xyz", None)])
def test_unknown_reward_suggests_the_nearest(typed, meant):
    with pytest.raises(ValueError, match=f"{typed!r}; did you mean {meant!r}" if meant else "did you mean"):
        resolve_rewards(["prob", typed])


def test_masked_mean():
    values, mask = torch.tensor([[1.0, 2.0, math.nan], [4.0, 5.0, 6.0]]), torch.tensor([[True, True, False], [False, False, False]])
    assert masked_mean(values, mask).tolist() == [1.5, 0.0]
    assert masked_mean(values, mask, None).item() == 1.5
    assert masked_mean(values[:1, :2], torch.ones(1, 1, dtype=torch.bool), None).item() == 1.5


# ---------------------------------------------------------------- advantages


reward_grids = st.lists(st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=4), min_size=2, max_size=5)


@quick
@given(reward_grids, st.sampled_from(["group", "loo"]), st.sampled_from(["none", "group", "batch"]), st.integers(0, 2**5 - 1))
def test_group_advantages(grid, advantage, scale, present):
    rewards, valid = torch.tensor(grid)[None], torch.tensor([[bool(present >> i & 1) for i in range(len(grid))]])
    advantages = group_advantages(rewards, valid, advantage, scale)[0]
    seen = [r for row, there in zip(grid, valid[0]) if there for r in row]
    for row, got, there in zip(grid, advantages, valid[0]):
        if not there:
            assert got.tolist() == [0.0] * 4
            continue
        for g in range(4):
            others = row[:g] + row[g + 1 :]
            expected = row[g] - (sum(others) / 3 if advantage == "loo" else sum(row) / 4)
            if scale != "none":
                sample = row if scale == "group" else seen
                mean = sum(sample) / len(sample)
                expected /= math.sqrt(sum((r - mean) ** 2 for r in sample) / (len(sample) - 1)) + EPSILON
            assert got[g].item() == pytest.approx(expected, abs=2e-4, rel=1e-3)
        assert got.mean().item() == pytest.approx(0, abs=2e-3)


@quick
@given(reward_grids, st.floats(-50, 50))
def test_an_easy_next_token_credits_nobody(grid, bonus):
    """What all thoughts of a fork share changes no advantage."""
    rewards, valid = torch.tensor(grid).double()[None], torch.ones(1, len(grid), dtype=torch.bool)
    shifted = rewards.clone()
    shifted[0, 0] += bonus
    for advantage in ("group", "loo"):
        torch.testing.assert_close(group_advantages(shifted, valid, advantage), group_advantages(rewards, valid, advantage), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("given", [False, True], ids=["gate", "given_lengths"])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_token_advantages(scale, given):
    """Each token: what it and its followers gained, weighted by how far thinking gets, minus the mean of the others at this depth. What no thought has got to
    is no part of the batch's deviation."""
    prefix_logps, valid = -draw(B, K, G, A + 1, seed=5).abs(), torch.ones(B, K, dtype=torch.bool)
    valid[1, 2] = False
    reach = torch.rand(B, K, G, A + 1, generator=torch.Generator().manual_seed(6)).cumprod(-1)
    if given:
        reach = (torch.arange(A + 1) <= torch.tensor([1, A, A - 1])[:K, None, None]).float().expand_as(reach)
    to_come, reached = torch.zeros(B, K, G, A), valid[:, :, None, None] & (reach[..., 1:] > 0)
    for i in range(A):
        for later in range(i, A):
            to_come[..., i] += reach[..., later + 1] * (prefix_logps[..., later + 1] - prefix_logps[..., later])
    got = token_advantages(prefix_logps, reach, valid, scale)
    for b in range(B):
        for k in range(K):
            for a in range(A):
                group = to_come[b, k, :, a]
                spread = {"none": 1.0, "group": group.std().item() + EPSILON, "batch": to_come[reached].std().item() + EPSILON}[scale]
                for g in range(G):
                    expected = (group[g] - (group.sum() - group[g]) / (G - 1)).item() / spread if valid[b, k] else 0.0
                    assert got[b, k, g, a].item() == pytest.approx(expected, abs=1e-4)


def test_a_value_baseline_foresees_what_hidden_states_tell():
    """Rewards of batches it has not seen: all but the noise is explained. Forks that are not there count for nothing."""
    generator, value = torch.Generator().manual_seed(0), ValueBaseline()
    slope = torch.randn(16, generator=generator)

    def batch():
        hidden = torch.randn(8, 16, 16, generator=generator)
        rewards = 2.0 + hidden @ slope + 0.1 * torch.randn(8, 16, generator=generator)
        valid = torch.rand(8, 16, generator=generator) < 0.8
        return hidden, rewards.where(valid, float("nan")), valid

    hidden, rewards, valid = batch()
    torch.testing.assert_close(value(hidden, rewards, valid), rewards[valid].mean().expand(8, 16))
    for _ in range(20):
        value(*batch())
    hidden, rewards, valid = batch()
    rewards[0, :3] = float("nan")
    valid[0, :3] = True
    value(hidden, rewards, valid)  # is forgotten
    state = copy.deepcopy(value.state_dict())
    hidden, rewards, valid = batch()
    expected = value(hidden, rewards, valid)
    assert (rewards - expected)[valid].var() < 0.1 * rewards[valid].var()
    again = ValueBaseline()
    again.load_state_dict(state)
    assert torch.equal(again(hidden, rewards, valid), expected)


def test_a_value_baseline_begins_with_the_first_fork_that_is_there():
    """A batch without one says nothing, and one of four ranks with a single one has its reward as the mean."""
    hidden, rewards = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([[-5.0, -4.0, -6.0], [-5.5, -4.5, -5.0]])
    value, none = ValueBaseline(), torch.zeros(2, 3, dtype=torch.bool)
    value(hidden, rewards, none)
    torch.testing.assert_close(value(hidden, rewards, ~none), torch.full((2, 3), -5.0))
    of_four = ValueBaseline(lambda sums: sums / 4)
    torch.testing.assert_close(of_four(hidden[:1, :1], rewards[:1, :1], ~none[:1, :1]), torch.tensor([[-5.0]]))


def test_a_value_baseline_remembers_as_many_steps_in_however_many_batches_they_come():
    generator, whole, parts = torch.Generator().manual_seed(0), ValueBaseline(), ValueBaseline()
    for _ in range(60):
        hidden, rewards, valid = torch.randn(8, 4, 4, generator=generator), torch.randn(8, 4, generator=generator), torch.ones(8, 4, dtype=torch.bool)
        whole(hidden, rewards, valid)
        for row in range(8):
            parts(hidden[row, None], rewards[row, None], valid[row, None], share=1 / 8)
    assert parts.moments[0, 0].item() == pytest.approx(whole.moments[0, 0].item(), rel=0.05)


def test_token_credit_telescopes():
    """At fixed length, the first token's credit is the whole gain, and equal ends with equal beginnings differ nowhere."""
    prefix_logps, ones = -draw(1, 1, G, A + 1, seed=7).abs(), torch.ones(1, 1, G, A + 1)
    prefix_logps[..., 0] = -2.0
    whole = group_advantages(prefix_logps[..., -1], torch.ones(1, 1, dtype=torch.bool), "loo")
    torch.testing.assert_close(token_advantages(prefix_logps, ones, torch.ones(1, 1, dtype=torch.bool))[..., 0], whole)


@quick
@given(reward_grids)
def test_posterior(grid):
    logps, valid = torch.tensor(grid).double()[None], torch.ones(1, len(grid), dtype=torch.bool)
    valid[0, 0] = False
    weights = posterior(logps, valid)[0]
    assert (weights[0] == 0).all()
    for row, got in zip(grid[1:], weights[1:]):
        likelihoods = [math.exp(x) for x in row]
        assert got.tolist() == pytest.approx([x / sum(likelihoods) for x in likelihoods])


# ---------------------------------------------------------------- forks


eligible_rows = st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3)


@quick
@given(eligible_rows, st.integers(1, 8), st.sampled_from(["random", "entropy", "stride", "all", "markers"]), st.integers(0, 99))
def test_chosen_forks(rows, num_forks, how, seed):
    """Eligible places only, none twice, ascending, -1 behind them, and as many as there are places for."""
    eligible = torch.tensor([row[:-1] + [False] for row in rows])
    chosen = choose_forks(eligible, num_forks, how, torch.Generator().manual_seed(seed), draw(len(rows), 9, seed=seed))
    for row, forks in zip(eligible, chosen.tolist()):
        there = [f for f in forks if f >= 0]
        assert forks == there + [-1] * (len(forks) - len(there))
        assert there == sorted(set(there))
        assert all(row[f] for f in there)
        assert len(there) == (row.sum() if how == "all" else min(int(row.sum()), num_forks))
    assert chosen.shape[1] == (8 if how == "all" else num_forks)


def test_entropy_takes_the_hardest():
    eligible, entropy = torch.tensor([[True, True, False, True, True, False]]), torch.tensor([[0.5, 3.0, 9.0, 1.0, 2.0, 7.0]])
    assert choose_forks(eligible, 2, "entropy", torch.Generator(), entropy).tolist() == [[1, 4]]


@quick
@given(st.integers(8, 60), st.integers(1, 8))
def test_stride_is_even(length, num_forks):
    """Gaps between neighbours, and to both ends, differ by one token at most around the even spacing."""
    eligible = torch.ones(1, length, dtype=torch.bool)
    forks = choose_forks(eligible, num_forks, "stride", torch.Generator())[0].tolist()
    gaps = [b - a for a, b in zip(forks, forks[1:])]
    assert all(abs(gap - length / num_forks) < 1 for gap in gaps)
    assert abs(forks[0] - length / num_forks / 2) < 1
    assert abs(length - forks[-1] - length / num_forks / 2) <= 1


def test_stride_counts_eligible_places_only():
    eligible = torch.zeros(1, 20, dtype=torch.bool)
    eligible[0, [2, 3, 5, 11, 17, 18]] = True
    assert choose_forks(eligible, 3, "stride", torch.Generator()).tolist() == [[3, 11, 18]]


def test_random_covers_all_places_evenly():
    eligible = torch.tensor([[True, False, True, True, True, False, True, True, False]] * 4000)
    chosen = choose_forks(eligible, 2, "random", torch.Generator().manual_seed(0))
    counts = torch.bincount(chosen.flatten(), minlength=9)
    assert counts[~eligible[0]].sum() == 0
    assert ((counts[eligible[0]] / 4000 - 2 / 6).abs() < 0.04).all()


def test_random_forks_are_the_generators():
    eligible = torch.ones(3, 40, dtype=torch.bool)
    a, b, c = (choose_forks(eligible, 5, "random", torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_eligible_forks():
    """The next token must be of the same document and carry a label; the last place of a row has none."""
    documents = torch.tensor([[0, 0, 0, 1, 1, -1, -1], [0, 0, 0, 0, 0, 0, 0]])
    labels = torch.tensor([[5, 6, 7, 8, 9, -100, -100], [5, -100, -100, 8, 9, 4, -100]])
    expected = [[1, 1, 0, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0]]
    assert eligible_forks(labels, documents).tolist() == [[bool(x) for x in row] for row in expected]


@quick
@given(st.lists(st.integers(0, 2), min_size=6, max_size=12), st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=3))
def test_markers_end_where_they_end(tokens, markers):
    expected = [any(tokens[max(0, i + 1 - len(m)) : i + 1] == m for m in markers) for i in range(len(tokens))]
    assert ends_of(markers, torch.tensor([tokens, tokens[::-1]]))[0].tolist() == expected


# ---------------------------------------------------------------- held-out gains


def test_summary_by_hand():
    """Two documents: 4 judged tokens at 2 forks, 6 at 3. Columns: tokens, nats of no_think, think, random_thought, forks, lengths."""
    two = GainByDocument([[4.0, -8.0, -6.0, -9.0, 2.0, 3.0], [6.0, -9.0, -9.5, -9.0, 3.0, 6.0]]).summary()
    bit = math.log(2)
    assert two["bits_no_think"] == pytest.approx(17 / 10 / bit)
    assert two["bits_think"] == pytest.approx(15.5 / 10 / bit)
    assert two["bits_random_thought"] == pytest.approx(18 / 10 / bit)
    assert two["gain"] == pytest.approx(1.5 / 10 / bit) == pytest.approx(two["bits_no_think"] - two["bits_think"])
    assert two["gain_over_random"] == pytest.approx(2.5 / 10 / bit)
    # Ratio estimator: residuals 2 - 0.15 * 4 = 1.4 and -0.5 - 0.15 * 6 = -1.4.
    assert two["gain_stderr"] == pytest.approx(math.sqrt(2 / 1 * (1.4**2 + 1.4**2)) / 10 / bit)
    assert two["gain_over_random_stderr"] == pytest.approx(math.sqrt(2 / 1 * (2.0**2 + 2.0**2)) / 10 / bit)
    assert two["mean_think_length"] == pytest.approx(9 / 5)
    assert (two["documents"], two["judged_tokens"]) == (2, 10)


def test_summary_of_few():
    assert GainByDocument().summary() == {}
    one = GainByDocument([[4.0, -8.0, -6.0, -9.0, 2.0, 3.0]]).summary()
    assert one["gain"] == pytest.approx(0.5 / math.log(2))
    assert math.isnan(one["gain_stderr"])


def test_stderr_is_the_bootstraps():
    """Documents of very different lengths, whose tokens share a document's luck: the error counts documents."""
    rng = random.Random(0)
    rows = []
    for _ in range(150):
        tokens, luck = rng.choice([5, 20, 80]), rng.gauss(0.1, 0.3)
        rows.append([tokens, -2.0 * tokens, -2.0 * tokens + tokens * luck, -2.1 * tokens, tokens, tokens])
    summary = GainByDocument(rows).summary()
    draws = torch.tensor([GainByDocument(rng.choices(rows, k=len(rows))).summary()["gain"] for _ in range(800)])
    assert summary["gain_stderr"] == pytest.approx(draws.std().item(), rel=0.15)
    assert summary["gain"] == pytest.approx(draws.mean().item(), abs=3 * draws.std().item())


def test_gains_are_collected_by_document():
    """Each row's forks add up to its own documents; forks that are not there, or have nothing to judge them, to none."""
    documents = torch.tensor([[0, 0, 2, 2], [0, 1, 1, 0]])
    tokens = torch.tensor([[2, 1, 3, 0], [1, 2, 2, 0]])
    lengths = torch.tensor([[1.0, 2.0, 0.5, 9.0], [1.0, 1.5, 2.0, 9.0]])
    logps = {arm: draw(2, 4, seed=i) for i, arm in enumerate(("no_think", "think", "random_thought"))}
    rows = GainByDocument.collect(documents, tokens, logps, lengths)
    members = [[[0, 1], [2]], [[0], [1, 2]]]
    for b, of_row in enumerate(members):
        assert len(rows[b]) == len(of_row)
        for got, forks in zip(rows[b], of_row):
            nats = [logps[arm][b, forks].sum().item() for arm in ("no_think", "think", "random_thought")]
            assert got == pytest.approx([tokens[b, forks].sum().item(), *nats, len(forks), lengths[b, forks].sum().item()], abs=1e-6)


def test_a_value_is_foretold_before_its_reward_is_known_and_old_rewards_fade():
    generator, value = torch.Generator().manual_seed(0), ValueBaseline(decay=0.5)
    hidden, valid = torch.randn(4, 8, 6, generator=generator), torch.ones(4, 8, dtype=torch.bool)
    nothing, much = torch.zeros(4, 8), torch.full((4, 8), 5.0)
    for _ in range(10):
        value(hidden, nothing, valid)
    assert value(hidden, much, valid).abs().max() < 1e-3, "it would take away what a thought has just earned"
    for _ in range(12):
        value(hidden, much, valid)
    torch.testing.assert_close(value(hidden, much, valid), much, atol=0.05, rtol=0)


def test_exact_compares_a_thought_up_to_its_end():
    thoughts, supplied = torch.tensor([[[[1, 2, 3], [2, 0, 0]]]]), torch.tensor([[[1, 0, 0]]])
    assert REWARDS["exact"](thoughts, torch.tensor([[[1, 1]]]), supplied=supplied).tolist() == [[[1, 0]]]
