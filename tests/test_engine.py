"""Packed trees, cached sampling and ordinary rows give the same numbers, and a model that cannot run a packed tree is found out."""

import copy
import logging

import pytest
import torch
from models import TINY
from plain_rows import T, Text, close, sample, thinker, thought_mask
from transformers import AutoConfig

from hf_thinktok import engine
from hf_thinktok.architectures import LogitTransform, check_supported
from hf_thinktok.attention import run_length
from hf_thinktok.engine import ReplicatedEngine, TreeEngine, choose_engine, small_twin
from hf_thinktok.rollout import Sampling, thought_logps
from hf_thinktok.tree import Branching

MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
QWEN_MIXED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
# family, attention, changes: what must run as one packed tree.
PACKABLE = [
    *(
        (family, attn, {})
        for family in ("llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "mistral", "gemma3_text", "phi3", "olmo2", "opt", "granite", "cohere2")
        for attn in ("sdpa", "eager")
    ),
    ("gemma2", "eager", {}),
    ("gemma2", "eager", {"sliding_window": 8}),
    *((family, attn, {"sliding_window": 8}) for family in ("mistral", "phi3", "gemma3_text", "cohere2") for attn in ("sdpa", "eager")),
    *((family, "sdpa", MIXED) for family in ("gemma3_text", "cohere2")),
    *((family, "sdpa", QWEN_MIXED) for family in ("qwen2", "qwen3")),
]
REPLICATED = [("bloom", "eager", {}), ("mamba", "eager", {})]
TREES = [TreeEngine(), TreeEngine(run_length=7)]
ENGINES = [*TREES, ReplicatedEngine()]
# Position tables, rotary positions, windows that the cache must respect, eager's additive masks.
DIVERSE = [("llama", "sdpa", {}), ("gpt2", "eager", {}), ("mistral", "sdpa", {"sliding_window": 8}), ("gemma2", "eager", {"sliding_window": 8})]


def name(case) -> str:
    return case if isinstance(case, str) else "-".join(str(v) for v in case.values()) if isinstance(case, dict) else None


@pytest.mark.parametrize(("family", "attn", "changes"), [*PACKABLE, *REPLICATED], ids=name)
@torch.no_grad()
def test_every_engine_equals_plain_rows(family, attn, changes):
    model, vocabulary = thinker(family, attn, **changes)
    for packed in (False, True):
        text = Text(vocabulary, packed, Branching(2, 3, 3))
        for each in ENGINES[2:] if family in ("bloom", "mamba") else ENGINES:
            text.check(text.scores(each, model), model, vocabulary)


NO_FORKS = {"one_document": ([0] * T, [0] * 20 + [-1] * 4), "two_documents": ([0] * T, [0] * 4 + [1] * 20), "begins_late": ([0] * T, [-1] * 4 + [0] * 20)}


@pytest.mark.parametrize("documents", NO_FORKS)
@pytest.mark.parametrize(("family", "attn", "changes"), DIVERSE, ids=name)
@torch.no_grad()
def test_a_text_without_thoughts_has_a_mask_where_it_needs_one(family, attn, changes, documents):
    model, vocabulary = thinker(family, attn, **changes)
    text = Text(vocabulary, False, Branching(2, 3, 3))
    text.documents_BT = torch.tensor(NO_FORKS[documents])
    text.labels_BT = torch.where(text.documents_BT >= 0, text.tokens_BT, -100)
    text.forks_BK, text.lengths_BKG, text.thoughts_BKGL = text.forks_BK[:, :0], text.lengths_BKG[:, :0], text.thoughts_BKGL[:, :0]
    masks = []
    model.register_forward_pre_hook(lambda _, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True)
    for each in ENGINES:
        masks.clear()
        out = text.scores(each, model)
        assert [mask is None for mask in masks] == [documents == "one_document" or each.name == "replicated"]
        text.check(out, model, vocabulary)


VARIANTS = [{"persistent": True}, {"blind": True}, {"blind": True, "persistent": True}]


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
@pytest.mark.parametrize(("family", "attn", "changes"), DIVERSE, ids=name)
@torch.no_grad()
def test_variants_equal_plain_rows(family, attn, changes, variant):
    model, vocabulary = thinker(family, attn, **changes)
    for packed in (False, True):
        text = Text(vocabulary, packed, Branching(2, 3, 3, **variant))
        for each in ENGINES:
            text.check(text.scores(each, model), model, vocabulary)


@pytest.mark.parametrize("persistent", [False, True], ids=["none", "persistent"])
@pytest.mark.parametrize(("family", "attn"), [("llama", "sdpa"), ("gpt2", "eager"), ("qwen3", "sdpa")])
@torch.no_grad()
def test_markovian_branches_equal_rows_without_the_thought_before(family, attn, persistent):
    model, vocabulary = thinker(family, attn)
    for packed in (False, True):
        text = Text(vocabulary, packed, Branching(3, 3, 3, persistent=persistent, markovian=2))
        for each in TREES:
            text.check(text.scores(each, model), model, vocabulary)


@pytest.mark.parametrize(("family", "attn", "changes"), [*PACKABLE, *REPLICATED], ids=name)
def test_every_model_gets_the_fastest_engine_that_is_exact(family, attn, changes):
    model, vocabulary = thinker(family, attn, **changes)
    engine = choose_engine(model, vocabulary, Branching(2, 3, 2), T, 3)
    assert engine.name == ("replicated" if family in ("bloom", "mamba") else "tree")
    assert engine.name == "replicated" or engine.run_length == run_length(torch.device("cpu"))
    assert getattr(choose_engine(model, vocabulary, Branching(2, 3, 2), T, 3, whole_masks=True), "run_length", None) is None


def test_two_models_get_the_engine_that_is_exact_for_both():
    engines = sorted([ReplicatedEngine(), TreeEngine(), TreeEngine(run_length=7)], key=lambda engine: engine.generality)
    assert [(engine.name, getattr(engine, "run_length", None)) for engine in engines] == [("tree", 7), ("tree", None), ("replicated", None)]


def test_a_model_that_changes_its_mask_gets_a_whole_one(monkeypatch):
    model, vocabulary = thinker("llama")
    forward = model.base_model.forward
    monkeypatch.setattr(
        model.base_model,
        "forward",
        lambda *args, attention_mask=None, **kwargs: forward(*args, attention_mask=None if attention_mask is None else attention_mask * 1, **kwargs),
    )
    engine = choose_engine(model, vocabulary, Branching(2, 3, 2), T, 3)
    assert engine.name == "tree"
    assert engine.run_length is None


FIVE = {"num_hidden_layers": 5}
DEEP = [
    ("llama", FIVE),
    ("gpt2", {"n_layer": 5}),
    ("gemma3_text", FIVE | {"sliding_window": 8, "layer_types": [*["sliding_attention"] * 3, "full_attention", "sliding_attention"]}),
    ("qwen2", FIVE | QWEN_MIXED | {"max_window_layers": 3}),
    ("bloom", {"n_layer": 5}),
    ("mamba", FIVE),
    ("lfm2", FIVE | {"layer_types": ["conv", "conv", "conv", "full_attention", "conv"]}),
]


@pytest.mark.parametrize(("family", "changes"), DEEP, ids=name)
def test_a_small_twin_is_run_as_the_model_itself(family, changes):
    model, vocabulary = thinker(family, **changes)
    twin = small_twin(model, vocabulary, torch.device("cpu"))
    assert sum(map(torch.numel, twin.parameters())) < sum(map(torch.numel, model.parameters()))
    kinds = [set(getattr(one.config, "layer_types", None) or ()) for one in (model, twin)]
    assert kinds[0] == kinds[1]
    shape = (Branching(2, 3, 2), T, 3)
    assert choose_engine(twin, vocabulary, *shape).name == choose_engine(model, vocabulary, *shape).name


@pytest.mark.parametrize("lookahead", [1, 2, 5, T])
@pytest.mark.parametrize("variant", [{}, *VARIANTS], ids="-".join)
def test_no_variant_or_lookahead_costs_a_model_the_tree(variant, lookahead):
    model, vocabulary = thinker("llama")
    for num_forks in (1, 3, T):
        assert choose_engine(model, vocabulary, Branching(2, 3, lookahead, **variant), T, num_forks).name == "tree"


@pytest.mark.parametrize(("family", "attn", "changes"), DIVERSE, ids=name)
def test_gradients_of_the_packed_tree_are_those_of_plain_rows(family, attn, changes):
    model, vocabulary = thinker(family, attn, **changes)
    text = Text(vocabulary, True, Branching(2, 2, 2))
    valid_M = text.tree().valid_BS.flatten()
    gradients = []
    for each in ENGINES:
        model.zero_grad()
        out = text.scores(each, model)
        (out.target_logps_M + out.gate_logit_M.sigmoid() + out.think_logits_MN.log_softmax(-1)[:, 1])[valid_M].mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    *packed, plain = gradients
    for tree in packed:
        assert tree.keys() == plain.keys()
        for name in plain:
            torch.testing.assert_close(tree[name], plain[name], atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_forks_at_the_end_of_a_position_table():
    # The longest row that exists fits; lookahead nodes behind the end of the text do not exist and must not ask for more.
    model, vocabulary = thinker("gpt2", n_positions=T + 2)
    text = Text(vocabulary, False, Branching(2, 2, 4))
    text.forks_BK[:] = torch.tensor([3, 9, T - 1])
    for each in ENGINES:
        text.check(text.scores(each, model), model, vocabulary)


def leak_siblings(original):
    def inputs(see, queries, keys, *args):
        causal_BQC = torch.ones(*queries.shape, keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - queries.shape[1])
        return original(lambda run: causal_BQC[:, run], queries, keys, *args)

    return inputs


def leak_in_cache(original):
    def inputs(see, queries, keys, *args):
        packed = queries.shape == keys.shape
        return original(see if packed else lambda run: torch.ones_like(see(run)), queries, keys, *args)

    return inputs


def ignore_windows(original):
    def inputs(see, queries, keys, config, *args):
        config = copy.deepcopy(config)
        config.sliding_window = None
        return original(see, queries, keys, config, *args)

    return inputs


@pytest.mark.parametrize("broken", [leak_siblings, leak_in_cache, ignore_windows])
def test_a_model_whose_mask_leaks_is_not_given_the_tree(monkeypatch, caplog, broken):
    model, vocabulary = thinker("mistral", sliding_window=8)
    shape = Branching(2, 3, 2)
    assert choose_engine(model, vocabulary, shape, T, 3).name == "tree"
    monkeypatch.setattr(engine, "attention_inputs", broken(engine.attention_inputs))
    with caplog.at_level(logging.WARNING):
        assert choose_engine(model, vocabulary, shape, T, 3).name == "replicated"
    assert "mistral cannot run a packed tree" in caplog.text
    with pytest.raises(ValueError, match="engine=tree is not exact for mistral"):
        choose_engine(model, vocabulary, shape, T, 3, "tree")


def test_a_model_that_ignores_position_ids_is_not_given_the_tree(monkeypatch):
    model, vocabulary = thinker("llama")
    forward = model.base_model.forward
    monkeypatch.setattr(model.base_model, "forward", lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs))
    assert choose_engine(model, vocabulary, Branching(2, 3, 2), T, 3).name == "replicated"


@pytest.mark.parametrize(("family", "changes"), [("gpt_neo", {"window_size": 100}), ("llama4_text", {"floor_scale": 100})])
@torch.no_grad()
def test_a_model_that_counts_places_is_not_given_the_tree(family, changes, monkeypatch):
    # In a tree as small as the check's nothing is wrong; in the run's it is.
    model, vocabulary = thinker(family, "eager", **changes)
    small, large = (Text(vocabulary, False, Branching(groups, 3, 3)) for groups in (2, 8))
    small.check(small.scores(TreeEngine(), model), model, vocabulary)
    with pytest.raises(AssertionError):
        large.check(large.scores(TreeEngine(), model), model, vocabulary)
    assert choose_engine(model, vocabulary, Branching(8, 3, 3), T, 3).name == "replicated"
    monkeypatch.setattr(engine, "counts_places", lambda config: False)
    assert choose_engine(model, vocabulary, Branching(8, 3, 3), T, 3).name == "tree"


@pytest.mark.parametrize("wanted", ["auto", "tree", "replicated"])
def test_a_model_that_sees_what_comes_later_is_refused(wanted):
    model, vocabulary = thinker("bert-generation", is_decoder=False)
    with pytest.raises(ValueError, match="bert-generation is not causal"):
        choose_engine(model, vocabulary, Branching(2, 3, 2), T, 3, wanted)


def test_a_model_that_does_more_to_its_logits_is_refused(monkeypatch):
    monkeypatch.setattr(LogitTransform, "from_config", classmethod(lambda cls, config: cls()))
    model, vocabulary = thinker("granite")
    with pytest.raises(ValueError, match="granite does more between its hidden states and its logits"):
        choose_engine(model, vocabulary, Branching(2, 3, 2), T, 3)


def test_logits_that_hardly_differ_yet_are_no_reason_to_refuse_a_model():
    """A model that nobody has trained, of many words: fp32 rounds its log-probabilities by a part of what they differ by."""
    model, vocabulary = thinker("cohere", vocab_size=50_000, scale=1 / 3, logit_scale=1 / 64)
    assert choose_engine(model, vocabulary, Branching(2, 3, 2), T, 3).name == "tree"


def test_insisting_on_the_tree_where_it_cannot_run_is_an_error():
    model, vocabulary = thinker("bloom", "eager")
    with pytest.raises(ValueError, match="engine=tree is not exact for bloom") as error:
        choose_engine(model, vocabulary, Branching(2, 2, 2), T, 3, "tree")
    message = str(error.value)
    assert "Use engine=auto" in message
    assert "\n" not in message
    assert len(message) < 400


def test_insisting_is_obeyed_where_it_is_exact():
    model, vocabulary = thinker("llama")
    names = [choose_engine(model, vocabulary, Branching(2, 2, 2), T, 3, wanted).name for wanted in ("auto", "tree", "replicated")]
    assert names == ["tree", "tree", "replicated"]


@pytest.mark.parametrize("family", ["llama", "xglm", "gemma4_text"])
def test_choosing_leaves_a_bf16_model_as_it_was(family):
    """Its buffers too: positions that are added to the text, a scale that is saved."""
    model, vocabulary = thinker(family, dtype=torch.bfloat16)
    model.train()
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert choose_engine(model, vocabulary, Branching(2, 2, 2), T, 3).name == "tree"
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert {name: buffer.dtype for name, buffer in model.named_buffers()} == buffers


@pytest.mark.parametrize("family", ["t5", "bart", "whisper", "llava", "gemma3", "qwen2_audio", "vit", "clip"])
def test_what_is_not_a_text_decoder_is_refused(family):
    with pytest.raises(ValueError, match=family):
        check_supported(AutoConfig.for_model(family))


@pytest.mark.parametrize("family", TINY)
def test_text_decoders_are_supported(family):
    check_supported(AutoConfig.for_model(family, **TINY[family]))


@pytest.mark.parametrize("draw_stops", [False, True], ids=["fixed", "stops"])
@pytest.mark.parametrize(
    ("family", "attn", "changes", "variant"),
    [
        *((*case, variant) for case in [*DIVERSE, ("qwen3", "sdpa", QWEN_MIXED), *REPLICATED] for variant in ({}, {"persistent": True})),
        *((*case, {"persistent": True, "markovian": 1}) for case in DIVERSE),
    ],
    ids=name,
)
def test_rollout_logps_are_the_gradient_pass_logps(family, attn, changes, variant, draw_stops):
    model, vocabulary = thinker(family, attn, **changes)
    for packed in (False, True):
        text = Text(vocabulary, packed, Branching(3, 3, 2, **variant))
        each = ReplicatedEngine() if family in ("bloom", "mamba") else TREES[packed]
        rollout = sample(each, model, vocabulary, text, Sampling(temperature=0.7, draw_stops=draw_stops))
        assert torch.isin(rollout.thoughts_BKGL, torch.tensor(vocabulary.ids)).all()
        lengths = rollout.lengths_BKG[text.forks_BK >= 0]
        assert len(lengths.unique()) >= 3 if draw_stops else (lengths == 3).all()
        text.thoughts_BKGL, text.lengths_BKG = rollout.thoughts_BKGL, rollout.lengths_BKG
        out = text.scores(each, model)
        assert out.think_logits_MN.requires_grad
        think_BKGLN = text.think_logits(out)
        logps_BKGL = thought_logps(think_BKGLN, rollout.thoughts_BKGL, vocabulary, temperature=0.7)
        assert torch.equal(logps_BKGL, (think_BKGLN / 0.7).log_softmax(-1).gather(-1, rollout.thoughts_BKGL[..., None] - vocabulary.first_id)[..., 0])
        mask_BKGL = thought_mask(text, rollout)
        close(rollout.logps_BKGL[mask_BKGL], logps_BKGL.detach()[mask_BKGL], 1e-5)


@pytest.mark.parametrize("draw_stops", [False, True], ids=["fixed", "stops"])
@pytest.mark.parametrize("persistent", [False, True], ids=["none", "persistent"])
@pytest.mark.parametrize(("family", "attn", "changes"), DIVERSE, ids=name)
def test_both_engines_draw_the_same_thoughts(family, attn, changes, persistent, draw_stops):
    model, vocabulary = thinker(family, attn, **changes)
    text, sampling = Text(vocabulary, True, Branching(2, 3, 2, persistent=persistent)), Sampling(draw_stops=draw_stops)
    *trees, replicated = (sample(each, model, vocabulary, text, sampling) for each in ENGINES)
    there_BK = text.forks_BK >= 0
    for tree in trees:
        assert torch.equal(tree.lengths_BKG[there_BK], replicated.lengths_BKG[there_BK])
        mask_BKGL = thought_mask(text, tree)
        assert torch.equal(tree.thoughts_BKGL[mask_BKGL], replicated.thoughts_BKGL[mask_BKGL])
        close(tree.logps_BKGL[mask_BKGL], replicated.logps_BKGL[mask_BKGL], 1e-5)
    other = sample(TreeEngine(), model, vocabulary, text, sampling, seed=1)
    assert not torch.equal(tree.thoughts_BKGL[there_BK], other.thoughts_BKGL[there_BK])


def test_sampling_in_training_mode_with_checkpointing_is_sampling():
    model, vocabulary = thinker("llama")
    text = Text(vocabulary, True, Branching(2, 3, 2))
    expected = sample(TreeEngine(), model, vocabulary, text, Sampling())
    model.train()
    model.gradient_checkpointing_enable()
    rollout = sample(TreeEngine(), model, vocabulary, text, Sampling())
    assert model.training
    assert torch.equal(rollout.thoughts_BKGL, expected.thoughts_BKGL)
    assert torch.equal(rollout.logps_BKGL, expected.logps_BKGL)


@torch.no_grad()
def test_thoughts_are_drawn_as_often_as_they_are_probable():
    model, vocabulary = thinker("llama")
    out = (text := Text(vocabulary, False, Branching(1, 1, 1))).scores(ReplicatedEngine(), model)
    nodes_BK = text.forks_BK + torch.tensor([[0], [text.tree().num_nodes]])
    draws = 2000
    text = Text(vocabulary, False, Branching(draws, 1, 1))
    rollout = sample(TreeEngine(), model, vocabulary, text, Sampling(temperature=0.5, draw_stops=True))
    greedy = sample(TreeEngine(), model, vocabulary, text, Sampling(top_k=1, min_length=1, draw_stops=True))
    for b, k in (text.forks_BK >= 0).nonzero().tolist():
        node = nodes_BK[b, k]
        probs_N, think = (out.think_logits_MN[node] / 0.5).softmax(-1), out.gate_logit_M[node].sigmoid()
        counts_N = torch.bincount(rollout.thoughts_BKGL[b, k, :, 0] - vocabulary.first_id, minlength=vocabulary.num_tokens)
        assert ((counts_N / draws - probs_N).abs() < 5 * (probs_N / draws).sqrt() + 2 / draws).all()
        assert (rollout.lengths_BKG[b, k].float().mean() - think).abs() < 5 * (think / draws).sqrt()
        assert (greedy.thoughts_BKGL[b, k] == vocabulary.first_id + probs_N.argmax()).all()
        assert (greedy.lengths_BKG[b, k] == 1).all()


@pytest.mark.parametrize("lookahead", [1, 3])
@pytest.mark.parametrize("each", ENGINES, ids=["tree", "blocks", "replicated"])
@torch.no_grad()
def test_blind_reading_does_not_see_the_text(each, lookahead):
    model, vocabulary = thinker("llama")
    text = Text(vocabulary, True, Branching(2, 3, lookahead, blind=True))
    before = text.scores(each, model)
    # Every token of the text but those that the lookahead itself reads.
    ahead_BT = torch.zeros_like(text.tokens_BT, dtype=torch.bool)
    for b, k in (text.forks_BK >= 0).nonzero().tolist():
        ahead_BT[b, text.forks_BK[b, k] + 1 : text.forks_BK[b, k] + lookahead] = True
    text.tokens_BT = torch.where(ahead_BT, text.tokens_BT, (text.tokens_BT + 7) % vocabulary.num_real)
    after, tree = text.scores(each, model), text.tree()
    logits = lambda out: torch.cat([out.think_logits_MN, out.log_z_real_M[:, None]], 1).view(2, tree.num_nodes, -1)
    difference_BS = (logits(before) - logits(after)).abs().amax(-1)
    for depth in range(1, tree.branching.width + 1):
        nodes = tree.branch_nodes(depth)
        difference = difference_BS[:, nodes][tree.valid_BS[:, nodes]]
        if depth <= 3:
            assert (difference > 1e-3).all()  # the thinker does see it
        else:
            assert (difference < 1e-5).all()


def test_the_check_has_rows_as_long_as_the_run_s(monkeypatch):
    model, vocabulary = thinker("mistral", sliding_window=100)
    monkeypatch.setattr(engine, "attention_inputs", ignore_windows(engine.attention_inputs))
    found = [choose_engine(model, vocabulary, Branching(2, 3, 2), length, 3).name for length in (64, 160)]
    assert found == ["tree", "replicated"], "no row of 64 tokens reaches beyond the window"
