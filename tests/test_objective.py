"""The thinking loss against exact gradients: every thought and every stopping time written out, on ordinary rows with full logits."""

import copy
import dataclasses
import functools
import itertools
import math

import pytest
import torch
from models import tiny_model

from hf_thinktok import ThinkTokConfig
from hf_thinktok.engine import TreeEngine
from hf_thinktok.exploration import entropy_servo
from hf_thinktok.head import attach_head
from hf_thinktok.losses import PolicyLoss, stopping_logps
from hf_thinktok.objective import credit, speak, thinking_loss
from hf_thinktok.rewards import resolve_rewards
from hf_thinktok.rollout import Rollout, sample_thoughts
from hf_thinktok.scores import score_tree
from hf_thinktok.tokens import ThinkingVocabulary
from hf_thinktok.tree import Branching, ThoughtTree

REAL, N, L, G = 8, 3, 2, 2
VOCABULARY = ThinkingVocabulary(first_id=REAL, num_tokens=N, guard_id=REAL + N)
NAMES = {"ids": lambda value: "-".join(f"{k}={v}" for k, v in value.items()) or "defaults" if isinstance(value, dict) else None}
TEXT = torch.tensor([[3, 1, 4, 1, 5, 2, 6]])
FORK = 2
THOUGHTS = list(itertools.product(range(N), repeat=L))
PREFIXES = [prefix for length in range(L + 1) for prefix in itertools.product(range(N), repeat=length)]


@pytest.fixture(scope="module")
def model():
    """A tiny Llama whose gate is half open and whose thoughts matter."""
    size = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32, "head_dim": 8}
    model = tiny_model("llama", vocab_size=REAL + N + 1, tie=False, scale=6.0, seed=3, **size)
    attach_head(model, VOCABULARY)
    return model


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("config"))

    @functools.cache
    def make(stop="fixed", **options):
        defaults = {"num_generations": G, "max_think_length": L, "think_loss_weight": float(L)}  # the normaliser of dr_grpo divides by L
        if stop == "learned":
            defaults["stop_smoothing"] = 0.0
        return ThinkTokConfig(folder, bf16=False, use_cpu=True, report_to="none", stop=stop, **defaults | options)

    return make


# ---------------------------------------------------------------- by hand


def explicit(model, fork=FORK, temperature=1.0, horizon=1, blind=False):
    """For every thought prefix: log p(z | prefix, think), p(think), log p of each judged token, and log p(speak) whether it has to or not. Ordinary rows, the
    model's own logits, no tree."""
    before, ahead = TEXT[0, : fork + 1].tolist(), TEXT[0, fork + 1 : fork + 1 + horizon].tolist()
    tables = {}
    for prefix in PREFIXES:
        ids = [REAL + z for z in prefix]
        logits = model(input_ids=torch.tensor([before + ids]), use_cache=False).logits[0, -1]
        think, real = logits[REAL : REAL + N], logits[:REAL]
        thinks = torch.sigmoid(think.logsumexp(0) - real.logsumexp(0))
        speaks = (1 - thinks).log()
        said = torch.full((horizon,), torch.nan)
        if row := (ids if blind else before + ids):
            spoken = model(input_ids=torch.tensor([row + ahead[:-1]]), use_cache=False).logits[0, -horizon:, :REAL].log_softmax(-1)
            said = spoken[range(horizon), ahead]
        if blind and not prefix:
            thinks = torch.ones(())
        tables[prefix] = ((think / temperature).log_softmax(-1), thinks if len(prefix) < L else torch.zeros(()), said, speaks)
    return tables


def thought_prob(tables, thought):
    return torch.stack([tables[thought[:i]][0][z] for i, z in enumerate(thought)]).sum().exp()


def stop_probs(tables, thought):
    """w_l = s_l * prod_{j<l} (1 - s_j), the remainder on L."""
    reach, weights = torch.ones(()), []
    for length in range(L + 1):
        thinks = tables[thought[:length]][1]
        weights.append(reach * (1 - thinks))
        reach = reach * thinks
    return weights


def fixed_value(tables, reward=None):
    """E_z[log p(y|z)]; where the reward is another one, the thinker maximises that."""
    total = 0.0
    for thought in THOUGHTS:
        prob, logp = thought_prob(tables, thought), tables[thought][2].mean()
        total = total + prob * (logp if reward is None else reward(tables, thought)).detach() + prob.detach() * logp
    return total


def learned_value(tables, cost=0.0, content=None):
    """E_z[log sum_l w_l p(y|z_1..l) - cost * sum_l l w_l]; `content`: what the thinker maximises, where it is another reward."""
    total = 0.0
    for thought in THOUGHTS:
        weights = stop_probs(tables, thought)
        likelihood = sum(w * tables[thought[:i]][2][0].exp() for i, w in enumerate(weights) if i or not w.eq(0))
        gain = likelihood.log() - cost * sum(i * w for i, w in enumerate(weights))
        prob = thought_prob(tables, thought)
        total = total + prob * (gain if content is None else content(tables, thought)).detach() + prob.detach() * gain
    return total


def sampled_value(tables, cost=0.0, prefix=()):
    """E over all thoughts and all their stops of log p(y|z_1..len) - cost * len."""
    logps, thinks, said, _ = tables[prefix]
    here = 0.0 if thinks.eq(1) else (1 - thinks) * (said.mean() - cost * len(prefix))
    if len(prefix) == L:
        return here
    return here + thinks * sum(logps[z].exp() * sampled_value(tables, cost, (*prefix, z)) for z in range(N))


# ---------------------------------------------------------------- by the package


def tree_scores(model, outcomes, config, fork=FORK):
    """Scores of one fork with the given `(thought, length)` as its branches, from one packed pass."""
    thoughts = torch.tensor([[[(*z, *[0] * (L - len(z))) for z, _ in outcomes]]]) + REAL
    lengths = torch.tensor([[[length for _, length in outcomes]]])
    forks, documents = torch.tensor([[fork]]), torch.zeros_like(TEXT)
    tree = ThoughtTree(documents, forks, Branching(len(outcomes), L, config.lookahead, config.blind), lengths)
    rollout = Rollout(forks, thoughts, lengths, torch.zeros(thoughts.shape))
    run = functools.partial(TreeEngine().run, model, tree, tree.tokens(TEXT, thoughts))
    scores = score_tree(run, tree, TEXT, rollout, VOCABULARY, config.temperature, config.needs_every_prefix, config.needs_gate)
    return scores, rollout


def pick(scores, rollout, members):
    """The same fork with some of its branches."""
    per_thought = [f.name for f in dataclasses.fields(scores) if "_BKG" in f.name and getattr(scores, f.name) is not None]
    scores = dataclasses.replace(scores, **{name: getattr(scores, name)[:, :, members] for name in per_thought})
    return scores, dataclasses.replace(rollout, **{name: getattr(rollout, name)[:, :, members] for name in ("thoughts_BKGL", "lengths_BKG", "logps_BKGL")})


def loss_of(scores, rollout, config):
    rewards = resolve_rewards(config.reward_funcs)
    return thinking_loss(scores, rollout, config, rewards, [1.0] * len(rewards), token_weight=1 / scores.valid_BK.sum())


def ending_value(tables, thought):
    """p(the thought has all L tokens) * log p(speak | z), whose gradient moves the last gate alone."""
    return torch.stack([tables[thought[:i]][1] for i in range(L)]).prod().detach() * tables[thought][3]


def expected_ending(tables):
    return sum(thought_prob(tables, thought).detach() * ending_value(tables, thought) for thought in THOUGHTS)


def expected_loss(model, tables, config):
    """The mean of the loss over every pair of outcomes, by their probabilities."""
    if config.stop == "sampled":
        reach = {z: torch.stack([tables[z[:i]][1] for i in range(len(z))]).prod() if z else torch.ones(()) for z in PREFIXES}
        probs = {z: (reach[z] * (1 - tables[z][1]) * (thought_prob(tables, z) if z else 1)).item() for z in PREFIXES}
    else:
        probs = {z: thought_prob(tables, z).item() for z in THOUGHTS}
    probs = {z: p for z, p in probs.items() if p > 0}
    assert sum(probs.values()) == pytest.approx(1, abs=1e-5)
    scores, rollout = tree_scores(model, [(z, len(z)) for z in probs], config)
    pairs = itertools.product(enumerate(probs.values()), repeat=G)
    return sum(p * q * loss_of(*pick(scores, rollout, [i, j]), config)[0] for (i, p), (j, q) in pairs)


def gradient(model, value):
    parameters = list(model.parameters())
    grads = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, grads, strict=True)])


def assert_same_gradient(model, loss, value, tolerance=2e-4):
    """The gradient of `loss` is that of `-value`, over all parameters."""
    got, expected = gradient(model, loss), -gradient(model, value)
    assert expected.norm() > 1e-2
    assert (got - expected).norm() < tolerance * expected.norm(), (
        f"off by {((got - expected).norm() / expected.norm()).item():.2e}, length {(got.norm() / expected.norm()).item():.3f}"
    )


# ---------------------------------------------------------------- fixed length


@pytest.mark.parametrize(
    ("options", "reward"),
    [
        ({"advantage": "loo"}, None),
        ({"advantage": "token"}, None),
        ({"advantage": "group", "think_loss_weight": L * G / (G - 1)}, None),
        ({"advantage": "loo", "lookahead": 3}, None),
        ({"advantage": "group", "think_loss_weight": L * G / (G - 1), "lookahead": 3}, None),
        ({"advantage": "loo", "temperature": 0.6}, None),
        ({"advantage": "token", "temperature": 1.7}, None),
        ({"advantage": "loo", "blind": True}, None),
        ({"advantage": "loo", "blind": True, "lookahead": 3}, None),
        ({"advantage": "loo", "reward_funcs": ("prob",), "lookahead": 3}, lambda tables, z: tables[z][2].exp().mean()),
        ({"advantage": "loo", "reward_funcs": ("information_gain",), "lookahead": 3}, None),
        *(({"advantage": "loo", "think_loss_type": kind}, None) for kind in ("grpo", "bnpo", "dapo", "cispo")),
    ],
    **NAMES,
)
def test_fixed_length_is_unbiased(model, make_config, options, reward):
    config = make_config("fixed", **options)
    config.reward_funcs = list(config.reward_funcs)
    tables = explicit(model, temperature=config.temperature, horizon=config.lookahead, blind=config.blind)
    assert_same_gradient(model, expected_loss(model, tables, config), fixed_value(tables, reward))


def test_weights_of_speaker_and_thinker(model, make_config):
    config = make_config("fixed", advantage="loo", think_ce_weight=0.25, think_loss_weight=3.0 * L)
    tables, value = explicit(model), 0.0
    for thought in THOUGHTS:
        prob, logp = thought_prob(tables, thought), tables[thought][2][0]
        value = value + 3.0 * prob * logp.detach() + 0.25 * prob.detach() * logp
    assert_same_gradient(model, expected_loss(model, tables, config), value)


# ---------------------------------------------------------------- stop: learned


def token_gain(cost):
    """What advantage=token credits: the mean over stopping times of log p(y|z_1..l) - cost * l."""
    return lambda tables, thought: sum(w * (tables[thought[:i]][2][0] - cost * i) for i, w in enumerate(stop_probs(tables, thought)))


@pytest.mark.parametrize(
    ("options", "content"),
    [
        ({"advantage": "loo"}, None),
        ({"advantage": "group", "think_loss_weight": L * G / (G - 1)}, None),
        ({"advantage": "loo", "temperature": 0.6}, None),
        ({"advantage": "loo", "blind": True}, None),
        ({"advantage": "token"}, token_gain(0.0)),
        # A thought is charged for the length that it leads to, as with stop=sampled.
        ({"advantage": "loo", "think_cost": 0.5}, None),
        ({"advantage": "token", "think_cost": 0.5}, token_gain(0.5)),
    ],
    **NAMES,
)
def test_learned_stop_is_unbiased(model, make_config, options, content):
    config = make_config("learned", **options)
    tables = explicit(model, temperature=config.temperature, blind=config.blind)
    value = learned_value(tables, config.think_cost[0], content) + expected_ending(tables)
    assert_same_gradient(model, expected_loss(model, tables, config), value)


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize(("smoothing", "cost", "weight"), [(0.0, 0.0, 1.0), (0.0, 0.3, 1.0), (0.5, 0.3, 0.2), (1.0, 0.1, 1.0)])
def test_gate_is_exact_for_every_group(model, make_config, smoothing, cost, weight, blind):
    """Whatever was drawn, and however much content and speaker are smoothed: value, length and the gate's gradient, by a loop over stopping times."""
    config = make_config("learned", stop_smoothing=smoothing, think_cost=cost, gate_loss_weight=weight, blind=blind, advantage="loo")
    scores, rollout = tree_scores(model, [((0, 2), 2), ((1, 1), 2)], config)
    gate = scores.gate_logits_BKGL.detach().requires_grad_()
    loss, metrics = loss_of(dataclasses.replace(scores, gate_logits_BKGL=gate), rollout, config)

    logits, logps = gate.detach()[0, 0].double().requires_grad_(), scores.prefix_logps_BKGP[0, 0].detach().double()
    gate_loss, speaker_loss, ending, length = 0.0, 0.0, 0.0, 0.0
    for g in range(G):
        thinks = [torch.ones(()) if blind and i == 0 else logits[g, i].sigmoid() for i in range(L)]
        weights = [1 - thinks[0], thinks[0] * (1 - thinks[1]), thinks[0] * thinks[1]]
        lengths = [i for i in range(L + 1) if i or not blind]
        gate_loss = gate_loss - sum(weights[i] * logps[g, i].exp() for i in lengths).log() / G
        smooth = [(1 - smoothing) * weights[i].detach() + smoothing / len(lengths) for i in lengths]
        speaker_loss = speaker_loss - sum(w * logps[g, i].exp() for w, i in zip(smooth, lengths)).log() / G
        ending = ending + weights[-1].detach() * (1 + scores.last_gate_logits_BKG[0, 0, g].detach().exp()).log() / G
        length = length + sum(i * w for i, w in enumerate(weights)) / G
    expected = weight * (gate_loss + cost * length + ending) + speaker_loss
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert metrics["think_length"].item() == pytest.approx(length.item(), abs=1e-5)
    got, wanted = torch.autograd.grad(loss, gate)[0][0, 0].double(), torch.autograd.grad(weight * (gate_loss + cost * length), logits)[0]
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("objective", ["expected", "marginal"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_a_smoothed_gate_learns_the_lengths_that_fared_best(model, make_config, smoothing, objective, blind):
    """One step of EM by a loop: which lengths (with `marginal` also of which thought) explain what follows, where part of their prior is the same for all."""
    config = make_config("learned", gate_smoothing=smoothing, think_cost=0.2, objective=objective, blind=blind)
    scores, rollout = tree_scores(model, [((0, 2), 2), ((1, 1), 2)], config)
    gate = scores.gate_logits_BKGL.detach().requires_grad_()
    loss, metrics = loss_of(dataclasses.replace(scores, gate_logits_BKGL=gate), rollout, config)

    logits, logps = gate.detach()[0, 0].double().requires_grad_(), scores.prefix_logps_BKGP[0, 0].detach().double()
    lengths, joint, own, log_weights, price = range(1 if blind else 0, L + 1), {}, {}, {}, 0.0
    for g in range(G):
        thinks = [torch.ones(()) if blind and i == 0 else logits[g, i].sigmoid() for i in range(L)]
        weights = [1 - thinks[0], thinks[0] * (1 - thinks[1]), thinks[0] * thinks[1]]
        price = price + 0.2 * sum(i * weights[i] for i in lengths) / G
        for i in lengths:
            log_weights[g, i], own[g, i] = weights[i].log(), (weights[i] * logps[g, i].exp()).item()
            joint[g, i] = (((1 - smoothing) * weights[i] + smoothing / len(lengths)) * logps[g, i].exp()).item()
    groups = [joint.keys()] if objective == "marginal" else [[(g, i) for i in lengths] for g in range(G)]
    gained = sum(joint[key] / sum(joint[other] for other in group) * log_weights[key] for group in groups for key in group) / len(groups)
    got, wanted = torch.autograd.grad(loss, gate)[0][0, 0].double(), torch.autograd.grad(price - gained, logits)[0]
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)
    # What is said of the model is of the lengths that it takes.
    own_logp = sum(math.log(sum(own[g, i] for i in lengths)) for g in range(G)) / G
    assert metrics["think_gain"].item() == pytest.approx((own_logp - scores.baseline_logps_BKH[0, 0, 0].item()) / math.log(2), abs=1e-5)


# ---------------------------------------------------------------- stop: sampled


@pytest.mark.parametrize(
    "options",
    [
        {"advantage": "loo"},
        {"advantage": "loo", "think_cost": 0.5},
        {"advantage": "group", "think_loss_weight": L * G / (G - 1), "think_cost": 0.5},
        {"advantage": "loo", "lookahead": 3, "think_cost": 0.2},
        {"advantage": "loo", "temperature": 0.6},
        {"advantage": "loo", "blind": True, "think_cost": 0.5},
    ],
    **NAMES,
)
def test_sampled_stop_is_unbiased(model, make_config, options):
    config = make_config("sampled", **options)
    tables = explicit(model, temperature=config.temperature, horizon=config.lookahead, blind=config.blind)
    value = sampled_value(tables, config.think_cost[0]) + config.think_loss_weight / L * expected_ending(tables)
    assert_same_gradient(model, expected_loss(model, tables, config), value)


def test_nothing_is_computed_of_what_would_be_thought_behind_an_end(model, make_config):
    """A node behind the end of its thought is in no loss, and meets no vocabulary."""
    heads, config = [], make_config("sampled", lookahead=1)
    forks, lengths = torch.tensor([[FORK]]), torch.tensor([[[0, 1, L]]])
    thoughts = torch.full((1, 1, 3, L), REAL)
    tree = ThoughtTree(torch.zeros_like(TEXT), forks, config.branching(TEXT.shape[1], num_generations=3), lengths)

    def run(passes):
        heads.extend(one.head[0] for one in passes)
        return TreeEngine().run(model, tree, tree.tokens(TEXT, thoughts), passes)

    score_tree(run, tree, TEXT, Rollout(forks, thoughts, lengths, torch.zeros(thoughts.shape)), VOCABULARY)
    assert tree.valid_BS.flatten()[heads[0].nodes_M].all()
    assert not tree.valid_BS.all()


# ---------------------------------------------------------------- drawn, not enumerated


@pytest.mark.parametrize(
    ("stop", "options", "draws"),
    [("fixed", {"lookahead": 2}, 40), ("learned", {}, 40), ("sampled", {"think_cost": 0.3, "lookahead": 2}, 48)],
    **NAMES,
)
def test_mean_of_drawn_gradients(model, make_config, stop, options, draws):
    """Thoughts drawn by the package at two forks of a row: the mean gradient lies within 4 standard errors of the exact one, along 16 directions."""
    config, forks, rows = make_config(stop, advantage="loo", **options), torch.tensor([[1, 4]]), 48
    values = {"fixed": fixed_value, "learned": learned_value, "sampled": functools.partial(sampled_value, cost=config.think_cost[0])}
    tables = [explicit(model, fork, horizon=config.lookahead) for fork in forks[0].tolist()]
    weight = {"fixed": 0.0, "learned": 1.0, "sampled": config.think_loss_weight / L}[stop]
    exact = -gradient(model, sum(values[stop](one) + weight * expected_ending(one) for one in tables) / 2)
    generator = torch.Generator().manual_seed(0)
    directions = torch.cat([exact[:, None] / exact.norm(), torch.randn(len(exact), 15, generator=generator)], 1)
    tokens, forks, documents = TEXT.expand(rows, -1), forks.expand(rows, -1), torch.zeros_like(TEXT).expand(rows, -1)
    projections = []
    for _ in range(draws):
        rollout = sample_thoughts(TreeEngine(), model, tokens, documents, forks, config.branching(TEXT.shape[1]), config.sampling(), VOCABULARY, generator)
        tree = ThoughtTree(documents, forks, config.branching(TEXT.shape[1]), rollout.lengths_BKG)
        run = functools.partial(TreeEngine().run, model, tree, tree.tokens(tokens, rollout.thoughts_BKGL))
        scores = score_tree(run, tree, tokens, rollout, VOCABULARY, 1.0, config.needs_every_prefix, config.needs_gate)
        projections.append(gradient(model, loss_of(scores, rollout, config)[0]) @ directions)
    projections = torch.stack(projections)
    error = projections.std(0) / draws**0.5
    assert error[0] < 0.05 * exact.norm()  # sharp enough to tell
    off = (projections.mean(0) - exact @ directions).abs() / error
    assert off.max() < 4, f"off by {off.max().item():.1f} standard errors"


# ---------------------------------------------------------------- objective: marginal


@pytest.mark.parametrize(("stop", "lookahead"), [("fixed", 1), ("fixed", 3), ("learned", 1)])
def test_marginal_speaker_maximises_the_groups_mixture(model, make_config, stop, lookahead):
    """For any group, speaker and gate follow the gradient of log (1/G) sum_g p(y|z_g); over H tokens, along it (their loss is a mean)."""
    config = make_config(stop, objective="marginal", think_loss_weight=0.0, lookahead=lookahead)
    group = [(0, 2), (1, 1), (2, 0), (0, 0)]
    tables = explicit(model, horizon=lookahead)
    for table in tables.values():
        table[0].detach_()
    likelihoods = []
    for thought in group:
        weights = stop_probs(tables, thought) if stop == "learned" else [0.0] * L + [1.0]
        likelihoods.append(sum(w * tables[thought[:i]][2].sum().exp() for i, w in enumerate(weights)))
    scores, rollout = tree_scores(model, [(z, L) for z in group], config)
    loss, _ = loss_of(scores, rollout, config)
    ending = sum(ending_value(tables, thought) for thought in group) / len(group) if stop == "learned" else 0.0
    assert_same_gradient(model, loss * lookahead, torch.stack(likelihoods).mean().log() + ending)


@pytest.mark.parametrize("stop", ["fixed", "learned"])
def test_marginal_over_all_thoughts_is_the_mixture(model, make_config, stop):
    """With a thinker at uniform, all N^L thoughts once each are its distribution: the whole gradient is that of log sum_z p(z) p(y|z)."""
    config = make_config(stop, objective="marginal")
    rows = model.get_output_embeddings().weight
    before = rows.detach().clone()
    with torch.no_grad():
        rows[REAL : REAL + N] = rows[REAL : REAL + N].mean(0)
    try:
        tables = explicit(model)
        mixture = 0.0
        for thought in THOUGHTS:
            weights = stop_probs(tables, thought) if stop == "learned" else [0.0] * L + [1.0]
            mixture = mixture + thought_prob(tables, thought) * sum(w * tables[thought[:i]][2][0].exp() for i, w in enumerate(weights))
        scores, rollout = tree_scores(model, [(z, L) for z in THOUGHTS], config)
        assert_same_gradient(model, loss_of(scores, rollout, config)[0], mixture.log() + (expected_ending(tables) if stop == "learned" else 0.0))
    finally:
        with torch.no_grad():
            rows.copy_(before)


def test_accuracy_is_that_of_the_lengths_a_model_thinks(model, make_config):
    """Levels are passed by it: who stops where the answer is right is always right, however much the lengths are smoothed for learning."""
    config = make_config("learned", stop_smoothing=0.5)
    scores, rollout = tree_scores(model, [((0, 2), 2), ((1, 1), 2)], config)
    right_after_one = torch.tensor([0.0, 1.0, 0.0]).expand_as(scores.prefix_correct_BKGP)
    stops_after_one = torch.tensor([50.0, -50.0]).expand_as(scores.gate_logits_BKGL)
    scores = dataclasses.replace(scores, prefix_correct_BKGP=right_after_one, gate_logits_BKGL=stops_after_one)
    assert loss_of(scores, rollout, config)[1]["accuracy"].item() == pytest.approx(1.0)


@pytest.mark.parametrize(("stop", "cost"), [("fixed", 0.0), ("sampled", 0.0), ("sampled", 0.4), ("learned", 0.4)])
def test_marginal_weights_are_the_posterior(model, make_config, stop, cost):
    """The speaker's weights are the posterior of the group's thoughts, a thinking token counting as `think_cost` nats; the advantages are w - 1/G."""
    config = make_config(stop, objective="marginal", think_cost=cost)
    outcomes = [((0,), 1), ((1, 1), 2), ((), 0)] if stop == "sampled" else [((0, 0), L), ((1, 1), L), ((2, 1), L)]
    scores, rollout = tree_scores(model, outcomes, config)
    speech = speak(scores, rollout, stop, config.stop_smoothing[0], False)
    weights, advantages, _, _ = credit(scores, speech, rollout, config, resolve_rewards("log_prob"), [1.0])
    tables, joint = explicit(model), []
    for thought, length in outcomes:
        stops = stop_probs(tables, thought) if stop == "learned" else [0.0] * length + [1.0]
        lengths = sum(i * float(w.detach() if torch.is_tensor(w) else w) for i, w in enumerate(stops))
        likelihood = sum(w * tables[thought[:i]][2][0].exp() for i, w in enumerate(stops))
        joint.append((likelihood * math.exp(-cost * lengths)).detach())
    posterior = torch.stack(joint) / sum(joint)
    torch.testing.assert_close(weights[0, 0], posterior, atol=1e-5, rtol=1e-4)
    # The policy loss is a mean over the group, so the advantages come multiplied by its size.
    torch.testing.assert_close(advantages[0, 0] / len(outcomes), (posterior - 1 / len(outcomes))[:, None].expand(-1, L), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("where", "lookahead"), [("everywhere", 1), ("unsolved", 1), ("unsolved", 3)])
def test_a_rare_thought_is_paid_as_far_as_the_best_one_fails(model, make_config, where, lookahead):
    config = make_config("fixed", lookahead=lookahead, coverage_coef=0.3, coverage_where=where)
    scores, rollout = tree_scores(model, [((0, 0), L), ((1, 1), L), ((2, 1), L)], config)
    rarity = torch.tensor([0.5, 2.0, 4.0])
    rollout = dataclasses.replace(rollout, rarity_BKG=rarity.expand(rollout.lengths_BKG.shape))
    speech = speak(scores, rollout, "fixed", config.stop_smoothing[0], False)
    rewards = credit(scores, speech, rollout, config, resolve_rewards("log_prob"), [1.0])[2]
    logps = speech.logps_BKGH[0, 0].detach()
    share = 1.0 if where == "everywhere" else 1 - logps.sum(-1).exp().max()
    torch.testing.assert_close(rewards[0, 0], logps.mean(-1) + 0.3 * share * rarity, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- blind, and forks that are not there


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_blind_never_speaks_without_a_thought(model, make_config, smoothing):
    config = make_config("learned", blind=True, stop_smoothing=smoothing, advantage="loo", think_cost=0.1)
    scores, rollout = tree_scores(model, [((0, 2), 2), ((1, 1), 2)], config)
    stops = stopping_logps(scores.gate_logits_BKGL, must_think=True)
    assert (stops[..., 0].exp() == 0).all()
    torch.testing.assert_close(stops[..., 1:].exp().sum(-1), torch.ones(stops.shape[:-1]))
    assert (speak(scores, rollout, "learned", smoothing, True).lengths_BKG >= 1).all()
    loss, metrics = loss_of(scores, rollout, config)
    assert metrics["gate"] == 1
    other = scores.prefix_logps_BKGP.clone()
    other[..., 0] -= 5.0
    changed, _ = loss_of(dataclasses.replace(scores, prefix_logps_BKGP=other), rollout, config)
    assert torch.equal(changed, loss)
    assert gradient(model, loss).isfinite().all()


@pytest.mark.parametrize(
    "options",
    [{"stop": "fixed"}, {"stop": "learned", "think_cost": 0.2}, {"stop": "sampled", "think_cost": 0.2}, {"stop": "fixed", "objective": "marginal"}],
    **NAMES,
)
def test_absent_fork_adds_nothing(model, make_config, options):
    """A row with one place to think and one fork too many: the mean over the forks that are there, and no gradient from the absent one."""
    config = make_config(**options)
    scores, rollout = tree_scores(model, [((0, 2), 2), ((1, 1), 1 if config.stop == "sampled" else 2)], config)
    alone, metrics = loss_of(scores, rollout, config)
    if config.needs_gate:
        assert metrics["gate"].item() == pytest.approx(explicit(model)[()][1].item(), abs=1e-5)

    def double(values, fill):
        return torch.cat([values, torch.full_like(values, fill)], 1)

    absent, there = {"labels_BKH": -100}, [f.name for f in dataclasses.fields(scores) if "_BK" in f.name and getattr(scores, f.name) is not None]
    per_fork = {name: double(getattr(scores, name), absent.get(name, 0)) for name in there}
    both, as_told = loss_of(
        dataclasses.replace(scores, **per_fork),
        Rollout(
            double(rollout.forks_BK, -1),
            double(rollout.thoughts_BKGL, REAL),
            double(rollout.lengths_BKG, 0 if config.stop == "sampled" else L),
            double(rollout.logps_BKGL, 0.0),
        ),
        config,
    )
    assert_same_gradient(model, both, -alone, tolerance=1e-6)
    assert both.item() == pytest.approx(alone.item(), abs=1e-6)
    assert {name: value.item() for name, value in as_told.items()} == pytest.approx({name: value.item() for name, value in metrics.items()}, abs=1e-5)


def test_thoughts_are_told_apart_by_what_was_thought(model, make_config):
    """Tokens behind a thought's end do not make it another thought: two of no tokens, two of the same token, one of two."""
    config = make_config("sampled", advantage="loo")
    scores, rollout = tree_scores(model, [((0, 1), 0), ((2, 2), 0), ((1, 0), 1), ((1, 2), 1), ((1, 2), 2)], config)
    assert loss_of(scores, rollout, config)[1]["distinct_thoughts"].item() == 3


def test_gain_is_that_of_the_lengths_a_model_thinks(model, make_config):
    """Who never thinks gains nothing, however much the lengths are smoothed for learning."""
    config = make_config("learned", stop_smoothing=0.5)
    scores, rollout = tree_scores(model, [((0, 2), 2), ((1, 1), 2)], config)
    shut = torch.full_like(scores.gate_logits_BKGL, -50.0)
    metrics = loss_of(dataclasses.replace(scores, gate_logits_BKGL=shut), rollout, config)[1]
    assert metrics["think_gain"].item() == pytest.approx(0.0, abs=1e-5)


def test_gate_is_exact_under_the_marginal_objective(model, make_config):
    """However the posterior is sharpened and smoothed that content and speaker learn from."""
    config = make_config(
        "learned", objective="marginal", posterior_temperature=0.3, posterior_smoothing=0.1, stop_smoothing=0.5, think_cost=0.3, num_generations=4
    )
    scores, rollout = tree_scores(model, [((0, 2), 2), ((1, 1), 2), ((2, 0), 2), ((0, 0), 2)], config)
    gate = scores.gate_logits_BKGL.detach().requires_grad_()
    scores = dataclasses.replace(scores, gate_logits_BKGL=gate, prefix_logps_BKGP=scores.prefix_logps_BKGP.detach() * 3)
    loss, _ = loss_of(scores, rollout, config)

    logits, logps = gate.detach()[0, 0].double().requires_grad_(), scores.prefix_logps_BKGP[0, 0].double()
    thinks_GL = logits.sigmoid()
    weights_GP = torch.stack([1 - thinks_GL[:, 0], thinks_GL[:, 0] * (1 - thinks_GL[:, 1]), thinks_GL[:, 0] * thinks_GL[:, 1]], 1)
    told, length = (weights_GP * logps.exp()).sum(1).mean().log(), (weights_GP * torch.arange(3)).sum(1).mean()
    wanted = torch.autograd.grad(0.3 * length - told, logits)[0]
    assert wanted.abs().min() > 1e-4
    torch.testing.assert_close(torch.autograd.grad(loss, gate)[0][0, 0].double(), wanted, atol=1e-6, rtol=1e-4)


def test_a_supplied_thought_is_no_part_of_the_comparison(model, make_config):
    config = make_config("fixed", supply_thoughts=True, num_forks=1, num_generations=3, advantage="loo")
    scores, rollout = tree_scores(model, [((0, 0), L), ((1, 1), L), ((2, 1), L)], config)
    rollout = dataclasses.replace(rollout, supplied=True)
    speech = speak(scores, rollout, "fixed", 0.0, False)
    weights, advantages, rewards, _ = credit(scores, speech, rollout, config, resolve_rewards("log_prob"), [1.0])
    _, one, other = rewards[0, 0].tolist()
    assert advantages[0, 0, :, 0].tolist() == pytest.approx([one - other, other - one], abs=1e-6)
    assert weights[0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("kind", ["dr_grpo", "grpo", "bnpo", "dapo"])
def test_drawn_thoughts_learn_beside_a_supplied_one_what_they_learn_alone(model, make_config, kind):
    """The policy's gradient, and the distance from the reference, are of what was drawn."""
    drawn, grads = [((1, 1), L), ((2, 1), L)], []
    for supplied in ([], [((0, 0), L)]):
        options = {"supply_thoughts": True, "num_forks": 1} if supplied else {}
        config = make_config("fixed", num_generations=2 + len(supplied), advantage="loo", think_loss_type=kind, beta=0.5, think_ce_weight=0.0, **options)
        scores, rollout = tree_scores(model, supplied + drawn, config)
        logps = scores.thought_logps_BKGL.detach().requires_grad_()
        away = torch.linspace(-1, 1, logps[:, :, -2:].numel()).view_as(logps[:, :, -2:])
        reference = logps.detach() + torch.cat([torch.ones_like(logps[:, :, :-2]), away], 2)
        rollout = dataclasses.replace(rollout, supplied=bool(supplied), reference_logps_BKGA=reference)
        loss, metrics = loss_of(dataclasses.replace(scores, thought_logps_BKGL=logps), rollout, config)
        grads.append((torch.autograd.grad(loss, logps)[0], metrics["kl"]))
    (alone, kl_alone), (beside, kl_beside) = grads
    assert not beside[:, :, 0].any()
    torch.testing.assert_close(beside[:, :, 1:], alone)
    torch.testing.assert_close(kl_beside, kl_alone)


def test_what_keeps_thoughts_varied_waits_for_the_thinkers_turn(model, make_config):
    config = copy.copy(make_config("fixed", balance_coef=1.0, advantage="loo"))
    config.alternate = [2, 1]
    scores, rollout = tree_scores(model, [((0, 2), 2), ((1, 1), 2)], config)
    logits = scores.think_logps_BKGLN.detach().requires_grad_()
    scores = dataclasses.replace(scores, think_logps_BKGLN=logits)
    for step, learns in enumerate([False, False, True] * 2):
        loss, _ = thinking_loss(scores, rollout, config, resolve_rewards("log_prob"), [1.0], 1.0, step=step)
        assert torch.autograd.grad(loss, logits)[0].any() == learns


def test_forks_whose_rewards_tell_nothing_apart_are_counted(model, make_config):
    config = make_config("fixed")
    for group, share in (([(0, 2), (0, 2)], 1.0), ([(0, 2), (1, 1)], 0.0)):
        metrics = loss_of(*tree_scores(model, [(z, L) for z in group], config), config)[1]
        assert metrics["frac_reward_zero_std"].item() == share
        assert (metrics["reward_std"].item() < 1e-6) == bool(share)


@pytest.mark.parametrize(("temperature", "smoothing"), [(0.5, 0.0), (2.0, 0.25)])
def test_the_posterior_is_sharpened_and_smoothed_as_asked(model, make_config, temperature, smoothing):
    config = make_config("fixed", objective="marginal", posterior_temperature=temperature, posterior_smoothing=smoothing)
    scores, rollout = tree_scores(model, [((0, 0), L), ((1, 1), L), ((2, 1), L)], config)
    speech = speak(scores, rollout, "fixed", 0.0, False)
    weights, advantages, _, _ = credit(scores, speech, rollout, config, resolve_rewards("log_prob"), [1.0])
    posterior = (scores.logps_BKGH[0, 0, :, 0].detach() / temperature).softmax(-1)
    torch.testing.assert_close(weights[0, 0], (1 - smoothing) * posterior + smoothing / 3)
    torch.testing.assert_close(advantages[0, 0, :, 0], 3 * posterior - 1)


def test_options_of_the_policy_loss_reach_it(make_config):
    options = {"think_loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.3, "delta": 2.0, "importance_sampling_level": "sequence", "beta": 0.5}
    assert make_config("fixed", num_iterations=2, **options).policy_loss() == PolicyLoss("grpo", 0.1, 0.3, 2.0, "sequence", 0.5)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_rewards_are_scaled_as_asked(model, make_config, scale):
    config = make_config("fixed", scale_rewards=scale)
    scores, rollout = tree_scores(model, [((0, 0), L), ((1, 1), L), ((2, 1), L)], config)
    advantages, rewards = credit(scores, speak(scores, rollout, "fixed", 0.0, False), rollout, config, resolve_rewards("log_prob"), [1.0])[1:3]
    expected = (rewards[0, 0] - rewards[0, 0].mean()) / (rewards[0, 0].std() + 1e-4)
    torch.testing.assert_close(advantages[0, 0, :, 0], expected)


def test_the_servo_holds_a_part_of_the_largest_entropy(model, make_config):
    config = make_config("fixed", thought_entropy_target=0.5, advantage="loo")
    metrics = loss_of(*tree_scores(model, [((0, 2), 2), ((1, 1), 2)], config), config)[1]
    assert metrics["entropy_weight"].item() == pytest.approx(0.5 * (0.5 * math.log(N) - metrics["thought_entropy"].item()), abs=1e-5)
    assert [entropy_servo(torch.tensor(entropy), 2.0).item() for entropy in (4.0, 0.0)] == [-0.5, 0.5], "it has bounds"


def test_balance_is_over_places_or_given_the_token_before(model, make_config):
    group = [((0, 2), 2), ((1, 1), 2)]
    scores, rollout = tree_scores(model, group, make_config("fixed", balance_coef=1.0, advantage="loo"))
    probabilities = scores.think_logps_BKGLN[0, 0].exp()
    entropy = lambda p: -(p * p.log()).sum(-1)
    second = {"position": entropy(probabilities[:, 1].mean(0)), "token": entropy(probabilities[:, 1]).mean()}  # after two different tokens
    for given, expected in second.items():
        config = make_config("fixed", balance_coef=1.0, balance_given=given, advantage="loo")
        told = thinking_loss(scores, rollout, config, resolve_rewards("log_prob"), [1.0], 1.0, first_id=REAL)[1]["mean_choice_entropy"]
        torch.testing.assert_close(told, ((entropy(probabilities[:, 0].mean(0)) + expected) / 2).detach(), atol=1e-5, rtol=1e-5)


def test_a_ratio_is_clipped_alike_on_both_sides_where_nothing_else_is_said(make_config):
    assert make_config(num_iterations=2, epsilon=0.1).policy_loss().epsilon_high == 0.1
    assert make_config(num_iterations=2, epsilon=0.1, epsilon_high=0.3).policy_loss().epsilon_high == 0.3
    assert make_config(num_iterations=2, think_loss_type="cispo").policy_loss().epsilon_high == 5.0


SCHEDULED = [("sampled", "think_cost"), ("learned", "think_cost"), ("fixed", "coverage_coef"), ("fixed", "balance_coef"), ("fixed", "thought_entropy_target")]


@pytest.mark.parametrize(("stop", "name"), SCHEDULED)
def test_every_schedule_follows_the_clock(model, make_config, stop, name):
    def slope(value, step):
        config = copy.copy(make_config(stop, advantage="loo"))
        setattr(config, name, value)
        scores, rollout = tree_scores(model, [((0, 2), 2), ((1, 1), 1 if stop == "sampled" else 2)], config)
        rollout.rarity_BKG = torch.tensor([[[0.5, 2.0]]])
        return gradient(model, thinking_loss(scores, rollout, config, resolve_rewards("log_prob"), [1.0], 1.0, step=step)[0])

    for step, same in ((0, 0.1), (10, 0.9)):
        torch.testing.assert_close(slope([0.1, 0.9, 10], step), slope([same], step))
    assert not torch.allclose(slope([0.1], 0), slope([0.9], 0))
