"""The factorised head against full logits and autograd: what a context says about speaking, thinking and which thought."""

import copy
import dataclasses
import inspect

import pytest
import torch
from models import tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from torch import Tensor

from hf_thinktok import ThinkingVocabulary, add_thinking_tokens, head
from hf_thinktok._compat import FakeTensorMode
from hf_thinktok.architectures import LogitTransform
from hf_thinktok.head import HeadInputs, HeadOutputs, attach_head, score
from hf_thinktok.peft import add_thinking_rows

# 70 real rows, 5 thinking rows, the guard, 20 rows of padding.
VOCABULARY = ThinkingVocabulary(70, 5, 75)
ROWS, SIZE, NODES = 96, 24, 53
TRANSFORMS = [LogitTransform(), LogitTransform(scale=0.25), LogitTransform(softcap=4.0), LogitTransform(scale=2.0, softcap=6.0)]


def layer(bias: bool, dtype: torch.dtype = torch.float32, gain: float = 1.0) -> torch.nn.Linear:
    linear = torch.nn.Linear(SIZE, ROWS, bias=bias, dtype=dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(ROWS, SIZE) * gain)
        if bias:
            linear.bias.copy_(torch.randn(ROWS))
    return linear


def nodes() -> tuple[Tensor, HeadInputs]:
    generator = torch.Generator().manual_seed(1)
    targets_M = torch.randint(VOCABULARY.num_real, (NODES,), generator=generator)
    targets_M[::4] = -100
    hidden_MD = torch.randn(NODES, SIZE, generator=generator)
    hidden_MD[::4] = layer(False).weight[0].detach() / 2  # without a target, and the prediction is token 0
    return hidden_MD, HeadInputs(torch.arange(NODES), targets_M, entropy=True)


def naive(logits_MR: Tensor, targets_M: Tensor, vocabulary: ThinkingVocabulary) -> HeadOutputs:
    """The definition, from full logits."""
    real, think = logits_MR[:, : vocabulary.first_id], logits_MR[:, vocabulary.first_id : vocabulary.first_id + vocabulary.num_tokens]
    logps, judged = real.log_softmax(-1), targets_M >= 0
    target_logps_M = torch.where(judged, logps.gather(1, targets_M.clamp(min=0)[:, None])[:, 0], 0.0)
    return HeadOutputs(target_logps_M, real.logsumexp(-1), think, judged & (logps.argmax(-1) == targets_M), -(logps.exp() * logps).sum(-1))


def full_logits(hidden_MD: Tensor, linear: torch.nn.Linear, transform: LogitTransform) -> Tensor:
    logits_MR = torch.nn.functional.linear(hidden_MD, linear.weight, linear.bias) * transform.scale
    return logits_MR if transform.softcap is None else transform.softcap * torch.tanh(logits_MR / transform.softcap)


def close(a: HeadOutputs, b: HeadOutputs, tolerance: float) -> None:
    for name in ("target_logps_M", "log_z_real_M", "think_logits_MN", "gate_logit_M", "entropy_M"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name).float(), atol=tolerance, rtol=0.0, msg=lambda text, name=name: f"{name}: {text}")
    assert torch.equal(a.correct_M, b.correct_M)


def scalar(out: HeadOutputs) -> Tensor:
    """A function that every differentiable output takes part in, each node in its own way."""
    weight_M = torch.linspace(-1.0, 2.0, len(out.log_z_real_M))
    weight_MN = torch.linspace(-2.0, 1.0, out.think_logits_MN.numel()).view_as(out.think_logits_MN)
    terms = (
        weight_M * out.target_logps_M.exp(),
        weight_M.flip(0) * (out.log_z_real_M / 3).sin(),
        weight_M * out.gate_logit_M.sigmoid(),
        weight_MN * out.think_logits_MN.cos(),
    )
    return sum(term.sum() for term in terms)


def thinker(family: str, **options):
    tokenizer = tiny_tokenizer()
    model = tiny_model(family, "eager", scale=2.0, **options)
    vocabulary = add_thinking_tokens(model, tokenizer, 4)
    attach_head(model, vocabulary)
    return model, vocabulary


def text(model, vocabulary) -> tuple[Tensor, HeadInputs]:
    generator = torch.Generator().manual_seed(2)
    ids_BT = torch.randint(vocabulary.num_real, (2, 12), generator=generator)
    targets_M = ids_BT.roll(-1, 1).flatten()
    targets_M[11::12] = -100
    nodes_M = torch.randperm(24, generator=generator)[:20]
    return ids_BT, HeadInputs(nodes_M, targets_M[nodes_M], entropy=True)


def test_several_targets_of_a_node_are_scored_as_one_by_one():
    hidden_MD, inputs = nodes()
    targets_MU = torch.randint(VOCABULARY.num_real, (NODES, 3), generator=torch.Generator().manual_seed(5))
    targets_MU[::4, 1] = -100
    weights_U, gradients, scored = torch.tensor([1.0, -2.0, 0.5]), [], []
    for told in ([targets_MU], list(targets_MU.T)):
        hidden, linear = hidden_MD.clone().requires_grad_(), layer(True)
        outs = [score(hidden, linear, HeadInputs(inputs.nodes_M, targets), VOCABULARY, LogitTransform(softcap=4.0)) for targets in told]
        logps_MU = outs[0].target_logps_M if len(outs) == 1 else torch.stack([out.target_logps_M for out in outs], 1)
        scored.append((logps_MU, outs[0].correct_M if len(outs) == 1 else torch.stack([out.correct_M for out in outs], 1)))
        (logps_MU * weights_U).sum().backward()
        gradients.append([hidden.grad, linear.weight.grad, linear.bias.grad])
    torch.testing.assert_close(*[logps_MU for logps_MU, _ in scored])
    assert torch.equal(*[correct_MU for _, correct_MU in scored])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("small_tiles", [False, True], ids=["tile", "tiles"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_scores_and_gradients_are_those_of_full_logits(monkeypatch, transform, bias, small_tiles):
    if small_tiles:
        monkeypatch.setattr(head, "TILE_ELEMENTS", 20 * VOCABULARY.guard_id)
    hidden_MD, inputs = nodes()
    inputs.targets_M[1::3] = full_logits(hidden_MD, layer(bias), transform)[1::3, : VOCABULARY.num_real].argmax(-1)
    outs, gradients = [], []
    for compute in (
        lambda hidden, linear: score(hidden, linear, inputs, VOCABULARY, transform),
        lambda hidden, linear: naive(full_logits(hidden, linear, transform), inputs.targets_M, VOCABULARY),
    ):
        hidden, linear = hidden_MD.clone().requires_grad_(), layer(bias)
        outs.append(compute(hidden, linear))
        scalar(outs[-1]).backward()
        gradients.append([hidden.grad, *(parameter.grad for parameter in linear.parameters())])
    close(*outs, 1e-5)
    assert outs[0].correct_M.any()
    assert not outs[0].correct_M.all()
    for ours, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("output", ["target_logps_M", "log_z_real_M", "think_logits_MN", "gate_logit_M"])
def test_gradients_of_one_output_alone(output):
    hidden_MD, inputs = nodes()
    gradients = []
    for compute in (
        lambda hidden, linear: score(hidden, linear, inputs, VOCABULARY, TRANSFORMS[3]),
        lambda hidden, linear: naive(full_logits(hidden, linear, TRANSFORMS[3]), inputs.targets_M, VOCABULARY),
    ):
        hidden, linear = hidden_MD.clone().requires_grad_(), layer(True)
        getattr(compute(hidden, linear), output).square().sum().backward()
        gradients.append([hidden.grad, linear.weight.grad, linear.bias.grad])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_a_detached_gate_is_the_same_and_its_gradient_ends_at_the_thinking_rows(transform, bias):
    hidden_MD, inputs = nodes()
    inputs.spoken = NODES - 5  # the gate of the others is not known
    gradients = []
    for detach, hidden_grad in ((True, False), (False, True)):
        hidden, linear = hidden_MD.clone().requires_grad_(), layer(bias)
        out = score(hidden, linear, dataclasses.replace(inputs, detach_gate=detach), VOCABULARY, transform)
        out.gate_logit_M[: inputs.spoken].sigmoid().sum().backward()
        assert (hidden.grad is not None and hidden.grad.abs().max() > 1e-3) == hidden_grad
        gradients.append((out.gate_logit_M[: inputs.spoken].detach(), [parameter.grad for parameter in linear.parameters()]))
    (ours_M, ours), (expected_M, expected) = gradients
    torch.testing.assert_close(ours_M, expected_M)
    thinking = slice(VOCABULARY.first_id, VOCABULARY.guard_id)
    for one, other in zip(ours, expected, strict=True):
        assert other[thinking].abs().max() > 1e-2
        torch.testing.assert_close(one[thinking], other[thinking], atol=1e-6, rtol=1e-4)
        assert one[: thinking.start].abs().max() == 0
        assert other[: thinking.start].abs().max() > 1e-3


def test_frozen_parts_get_no_gradient_and_change_none():
    hidden_MD, inputs = nodes()
    hidden, linear = hidden_MD.clone().requires_grad_(), layer(True)
    scalar(score(hidden, linear, inputs, VOCABULARY, TRANSFORMS[0])).backward()
    frozen_hidden, frozen = hidden_MD.clone().requires_grad_(), layer(True).requires_grad_(False)
    scalar(score(frozen_hidden, frozen, inputs, VOCABULARY, TRANSFORMS[0])).backward()
    assert frozen.weight.grad is None
    assert frozen.bias.grad is None
    torch.testing.assert_close(frozen_hidden.grad, hidden.grad)
    bias_alone = layer(True)
    bias_alone.weight.requires_grad_(False)
    scalar(score(hidden_MD, bias_alone, inputs, VOCABULARY, TRANSFORMS[0])).backward()
    torch.testing.assert_close(bias_alone.bias.grad, linear.bias.grad)


def test_no_nodes_give_no_scores():
    linear = layer(True)
    out = score(torch.empty(0, SIZE, requires_grad=True), linear, HeadInputs(torch.arange(0), torch.arange(0)), VOCABULARY, TRANSFORMS[0])
    assert out.target_logps_M.shape == (0,)
    assert out.think_logits_MN.shape == (0, 5)
    scalar(out).backward()
    assert not linear.weight.grad.any()


@pytest.mark.parametrize("spoken", [0, 3])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_nodes_that_only_think_give_the_same_thinking_logits_and_gradients(transform, bias, spoken):
    found = []
    for count in (None, spoken):
        hidden_MD, inputs = nodes()
        linear, inputs.spoken = layer(bias), count
        hidden_MD = hidden_MD.detach().requires_grad_()
        out = score(hidden_MD, linear, inputs, VOCABULARY, transform)
        (out.think_logits_MN.square().sum() + out.target_logps_M[:spoken].sum()).backward()
        found.append([out.think_logits_MN, hidden_MD.grad, *(parameter.grad for parameter in linear.parameters())])
    for whole, apart in zip(*found, strict=True):
        torch.testing.assert_close(apart, whole, atol=1e-4, rtol=1e-4)


def test_speaking_gives_thinking_rows_no_gradient():
    hidden_MD, inputs = nodes()
    linear = layer(True)
    score(hidden_MD, linear, inputs, VOCABULARY, TRANSFORMS[3]).target_logps_M.sum().backward()
    assert not linear.weight.grad[VOCABULARY.first_id :].any()
    assert not linear.bias.grad[VOCABULARY.first_id :].any()
    assert linear.weight.grad[: VOCABULARY.first_id].any(1).all()


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_cross_entropy_gives_a_model_s_thinking_rows_no_gradient(tie):
    model, vocabulary = thinker("llama", tie=tie)
    ids_BT, inputs = text(model, vocabulary)
    out = model(input_ids=ids_BT, head=inputs)
    out.target_logps_M.mean().backward(retain_graph=True)
    rows = model.get_output_embeddings().weight.grad
    assert not rows[vocabulary.first_id :].any()
    assert rows[: vocabulary.first_id].any()
    out.gate_logit_M.mean().backward()
    assert rows[list(vocabulary.ids)].any(1).all()
    assert not rows[vocabulary.guard_id :].any()  # never a choice: neither the guard nor the padding


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"tie": True}), ("llama", {"tie": False}), ("gpt2", {}), ("gemma2", {"tie": True}), ("granite", {"tie": False}), ("cohere2", {}), ("opt", {})],
    ids=str,
)
def test_a_model_with_the_head_scores_like_its_own_logits(monkeypatch, family, options):
    monkeypatch.setattr(head, "TILE_ELEMENTS", 1)  # 16 nodes a tile
    model, vocabulary = thinker(family, **options)
    ids_BT, inputs = text(model, vocabulary)
    out = model(input_ids=ids_BT, head=inputs)
    logits = type(model).forward(model, input_ids=ids_BT).logits.flatten(0, 1)[inputs.nodes_M]
    expected = naive(logits, inputs.targets_M, vocabulary)
    close(out, expected, 1e-5)
    gradients = []
    for each in (out, expected):
        model.zero_grad()
        scalar(each).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected_grad in gradients[1].items():
        torch.testing.assert_close(
            gradients[0][name], expected_grad, atol=1e-5 * max(1.0, expected_grad.abs().max().item()), rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("tie", "frozen"), [(True, True), (False, True), (False, False)], ids=["tied", "untied", "with the other rows"])
def test_rows_that_an_adapter_trains_score_like_its_logits(tie, frozen):
    model, vocabulary = thinker("llama", tie=tie)
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, add_thinking_rows(config, model, vocabulary))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    peft_model.get_base_model().get_output_embeddings().token_adapter.get_base_layer().weight.requires_grad_(not frozen)
    ids_BT, inputs = text(model, vocabulary)
    ids_BT[:, 5] = vocabulary.first_id + 2
    out = peft_model(input_ids=ids_BT, head=inputs)
    expected = naive(peft_model(input_ids=ids_BT).logits.flatten(0, 1)[inputs.nodes_M], inputs.targets_M, vocabulary)
    close(out, expected, 1e-4)
    gradients = []
    for each in (out, expected):
        peft_model.zero_grad()
        scalar(each).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in peft_model.named_parameters() if parameter.requires_grad})
    assert sum("trainable_tokens_delta" in name for name in gradients[0]) == (1 if tie else 2)
    for name, expected_grad in gradients[1].items():
        torch.testing.assert_close(
            gradients[0][name], expected_grad, atol=1e-5 * max(1.0, expected_grad.abs().max().item()), rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    with peft_model.disable_adapter():
        plain = naive(peft_model(input_ids=ids_BT).logits.flatten(0, 1)[inputs.nodes_M], inputs.targets_M, vocabulary)
        close(peft_model(input_ids=ids_BT, head=inputs), plain, 1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite", "cohere2", "opt", "phi3", "mamba"])
@torch.no_grad()
def test_real_tokens_are_as_probable_as_before_the_thinking_tokens_came(family):
    tokenizer, model = tiny_tokenizer(), tiny_model(family, "eager", scale=2.0)
    ids_BT = torch.randint(320, (2, 12), generator=torch.Generator().manual_seed(2))
    before_MV = model(input_ids=ids_BT).logits.float().log_softmax(-1).flatten(0, 1)
    vocabulary = add_thinking_tokens(model, tokenizer, 16)
    attach_head(model, vocabulary)
    for shift in (1, 5):
        targets_M = ids_BT.roll(-shift, 1).flatten()
        out = model(input_ids=ids_BT, head=HeadInputs(torch.arange(24), targets_M))
        torch.testing.assert_close(out.target_logps_M, before_MV.gather(1, targets_M[:, None])[:, 0], atol=1e-5, rtol=0.0)


@torch.no_grad()
def test_free_rows_of_a_padded_vocabulary_take_no_probability_any_more():
    tokenizer, model = tiny_tokenizer(), tiny_model("llama", vocab_size=384)
    ids_BT = torch.randint(320, (2, 12), generator=torch.Generator().manual_seed(2))
    logits_MR = model(input_ids=ids_BT).logits.flatten(0, 1)
    vocabulary = add_thinking_tokens(model, tokenizer, 16)
    attach_head(model, vocabulary)
    targets_M = ids_BT.roll(-1, 1).flatten()
    out = model(input_ids=ids_BT, head=HeadInputs(torch.arange(24), targets_M))
    torch.testing.assert_close(out.target_logps_M, logits_MR[:, :320].log_softmax(-1).gather(1, targets_M[:, None])[:, 0], atol=1e-5, rtol=0.0)
    assert (out.target_logps_M > logits_MR.log_softmax(-1).gather(1, targets_M[:, None])[:, 0]).all()


def low_precision() -> tuple[Tensor, HeadInputs, torch.nn.Linear]:
    """bf16 numbers whose logits spread over tens of nats."""
    hidden_MD, inputs = nodes()
    return hidden_MD.bfloat16(), inputs, layer(False, torch.bfloat16, gain=2.0)


def test_bf16_is_scored_with_fp32_sums():
    hidden_MD, inputs, linear = low_precision()
    exact = naive(full_logits(hidden_MD.double(), copy.deepcopy(linear).double(), TRANSFORMS[0]), inputs.targets_M, VOCABULARY)
    plain = naive(full_logits(hidden_MD, linear, TRANSFORMS[0]).float(), inputs.targets_M, VOCABULARY)
    assert (plain.target_logps_M - exact.target_logps_M).abs().max() > 1e-2  # what bf16 logits would do to a reward
    out = score(hidden_MD, linear, inputs, VOCABULARY, TRANSFORMS[0])
    close(out, exact, 1e-4)
    assert out.target_logps_M.dtype == out.log_z_real_M.dtype == out.think_logits_MN.dtype == torch.float32
    inputs.spoken = 0
    thoughts = score(hidden_MD, linear, inputs, VOCABULARY, TRANSFORMS[0]).think_logits_MN
    torch.testing.assert_close(thoughts, exact.think_logits_MN.float(), atol=1e-4, rtol=0.0)


def test_bf16_gradients_are_those_of_fp32_but_for_rounding():
    hidden_MD, inputs, linear = low_precision()
    hidden = hidden_MD.clone().requires_grad_()
    scalar(score(hidden, linear, inputs, VOCABULARY, TRANSFORMS[0])).backward()
    exact_hidden, exact_linear = hidden_MD.float().requires_grad_(), copy.deepcopy(linear).float()
    exact_linear.weight.grad = None
    scalar(naive(full_logits(exact_hidden, exact_linear, TRANSFORMS[0]), inputs.targets_M, VOCABULARY)).backward()
    for ours, expected in ((hidden.grad, exact_hidden.grad), (linear.weight.grad, exact_linear.weight.grad)):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("think_only", [False, True])
def test_low_precision_scores_have_a_gradient_on_a_gpu(monkeypatch, think_only):
    """On tensors without data: a CPU cannot multiply so. Not every product that a GPU can make has a derivative."""
    monkeypatch.setattr(head, "sums_in_fp32", lambda hidden_MD: True)
    with FakeTensorMode():
        hidden = torch.randn(NODES, SIZE, dtype=torch.bfloat16, requires_grad=True)
        linear = torch.nn.Linear(SIZE, ROWS, dtype=torch.bfloat16)
        inputs = HeadInputs(torch.arange(NODES), torch.zeros(NODES, dtype=torch.long), spoken=0 if think_only else None)
        score(hidden, linear, inputs, VOCABULARY, TRANSFORMS[0]).gate_logit_M.sum().backward()
    assert hidden.grad.dtype == linear.weight.grad.dtype == torch.bfloat16


def test_autocast_does_not_round_the_scores():
    hidden_MD, inputs = nodes()
    linear = layer(True)
    expected = score(hidden_MD, linear, inputs, VOCABULARY, TRANSFORMS[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(score(hidden_MD, linear, inputs, VOCABULARY, TRANSFORMS[0]), expected, 1e-6)


def test_scoring_leaves_the_matmul_precision_as_it_was():
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        hidden_MD, inputs, linear = low_precision()
        hidden = hidden_MD.clone().requires_grad_()
        scalar(score(hidden, linear, inputs, VOCABULARY, TRANSFORMS[0])).backward()
        assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision = before


def test_without_head_the_forward_is_the_model_s_own():
    model = tiny_model("llama")
    ids_BT = torch.arange(12)[None]
    before, signature = model(input_ids=ids_BT, labels=ids_BT), inspect.signature(model.forward)
    attach_head(model, VOCABULARY)
    after = model(input_ids=ids_BT, labels=ids_BT)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
    # Trainers read the arguments' names off the forward.
    assert list(inspect.signature(model.forward).parameters) == list(signature.parameters)


def test_a_copied_model_runs_its_own_weights():
    model, vocabulary = thinker("llama")
    ids_BT, inputs = text(model, vocabulary)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_input_embeddings().weight.mul_(-0.5)
    plain, scored = model(input_ids=ids_BT).logits, model(input_ids=ids_BT, head=inputs).target_logps_M
    assert not torch.allclose(twin(input_ids=ids_BT, head=inputs).target_logps_M, scored, atol=1e-3)
    assert not torch.allclose(twin(input_ids=ids_BT).logits, plain, atol=1e-3)


def test_a_replaced_lm_head_is_the_one_that_scores():
    model, vocabulary = thinker("llama", tie=False)
    ids_BT, inputs = text(model, vocabulary)
    model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings()))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.5)
    close(model(input_ids=ids_BT, head=inputs), naive(model(input_ids=ids_BT).logits.flatten(0, 1)[inputs.nodes_M], inputs.targets_M, vocabulary), 1e-5)
