"""Attention in blocks is attention."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_rows import thinker
from torch.nn.functional import scaled_dot_product_attention

from hf_thinktok import attention, engine, flex
from hf_thinktok.attention import TreeMask
from hf_thinktok.flex import Blocks
from hf_thinktok.models import evaluating
from hf_thinktok.tree import Branching, ThoughtTree


def mask_of(seen_BQC: torch.Tensor, run_length: int) -> TreeMask:
    return TreeMask.of(lambda queries: seen_BQC[:, queries], tuple(seen_BQC.shape), run_length, torch.float32)


@settings(max_examples=200, deadline=None)
@given(
    batch=st.integers(1, 3),
    num_queries=st.integers(1, 20),
    cached=st.integers(0, 20),
    run_length=st.integers(1, 25),
    share=st.sampled_from([0.02, 0.2, 0.9]),
    seed=st.integers(0, 99),
)
def test_blocks_equal_one_call_over_all_keys(batch, num_queries, cached, run_length, share, seed):
    generator = torch.Generator().manual_seed(seed)
    num_keys = cached + num_queries
    seen_BQC = torch.rand(batch, num_queries, num_keys, generator=generator) < share
    seen_BQC[:, torch.arange(num_queries), cached + torch.arange(num_queries)] = True
    inputs = [torch.randn(batch, 2, length, 4, generator=generator, requires_grad=True) for length in (num_queries, num_keys, num_keys)]
    outputs = []
    for mask in (seen_BQC[:, None], mask_of(seen_BQC, run_length)):
        out = scaled_dot_product_attention(*inputs, attn_mask=mask, scale=0.7)
        outputs.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
    for whole, blocks in zip(*outputs, strict=True):
        torch.testing.assert_close(blocks, whole, atol=1e-5, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    num_queries=st.integers(1, 300),
    cached=st.integers(0, 200),
    run_length=st.sampled_from([128, 256]),
    share=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_blocks_of_flex_attention_equal_one_call_over_all_keys(batch, num_queries, cached, run_length, share, seed):
    """Its kernel on a CPU is the one that its authors hold theirs against, and has no backward pass; on a GPU `is_exact` compares both there."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, num_queries, cached + num_queries)
    seen_BQC = torch.rand(shape, generator=generator) < share
    seen_BQC |= (
        (torch.rand(batch, -(-shape[1] // 128), -(-shape[2] // 128), generator=generator) < 0.3)
        .repeat_interleave(128, 1)
        .repeat_interleave(128, 2)[:, : shape[1], : shape[2]]
    )  # whole blocks
    seen_BQC[:, torch.arange(num_queries), cached + torch.arange(num_queries)] = True
    inputs = [torch.randn(batch, 2, length, 8, generator=generator) for length in (num_queries, shape[2], shape[2])]
    blocks = Blocks.of(lambda queries: seen_BQC[:, queries], shape, run_length)
    mask = TreeMask.of_blocks(blocks, shape, torch.float32)
    for row, q in itertools.product(range(batch), range(-(-num_queries // 128))):  # which the kernel on a CPU does not look at
        pairs = [seen_BQC[row, 128 * q : 128 * (q + 1), first : first + 128].sum().item() for first in range(0, shape[2], 128)]
        for number, listed, inside in (
            (blocks.num_partial_B1q, blocks.partial_B1qc, lambda count: 0 < count < 128**2),
            (blocks.num_full_B1q, blocks.full_B1qc, lambda count: count == 128**2),
        ):
            assert listed[row, 0, q, : number[row, 0, q]].tolist() == [c for c, count in enumerate(pairs) if inside(count)]
    wanted = scaled_dot_product_attention(*inputs, attn_mask=seen_BQC[:, None], scale=0.7)
    torch.testing.assert_close(scaled_dot_product_attention(*inputs, attn_mask=mask, scale=0.7), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("autocast", [True, False])
def test_short_rows_in_bf16_are_as_exact_as_pytorch_s_kernel(autocast, monkeypatch):
    """A CPU takes two products there. Scores rounded to bf16 would be off by five times as much."""
    generator = torch.Generator().manual_seed(0)
    seen_BQC = torch.rand(4, 60, 60, generator=generator) < 0.5
    seen_BQC |= torch.eye(60, dtype=torch.bool)
    low = [(3 * torch.randn(4, 2, 60, 64, generator=generator)).bfloat16().requires_grad_() for _ in range(3)]

    def attend(inputs, mask):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = scaled_dot_product_attention(*inputs, attn_mask=mask)
        return [out.detach().double(), *(grad.double() for grad in torch.autograd.grad(out.double().square().sum(), inputs))]

    doubled = [one.detach().double().requires_grad_() for one in low]
    out = scaled_dot_product_attention(*doubled, attn_mask=seen_BQC[:, None])
    exact = [out.detach(), *torch.autograd.grad(out.square().sum(), doubled)]

    def errors():
        found = attend(low, TreeMask.of(lambda queries: seen_BQC[:, queries], (4, 60, 60), 64, torch.bfloat16))
        return [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]

    ours = errors()
    monkeypatch.setattr(attention, "SHORT_ROW", 0)
    theirs = errors()
    assert ours != theirs, "the two were not taken apart"
    for one, other in zip(ours, theirs, strict=True):
        assert one < 2 * other


def test_a_tree_costs_little_more_than_its_visible_pairs():
    forks_BK = torch.arange(0, 1024, 16)[None]
    tree = ThoughtTree(torch.zeros(1, 1024, dtype=torch.long), forks_BK, Branching(8, 8, 8))
    nodes = torch.arange(tree.num_nodes)[None]
    mask = TreeMask.of(lambda queries: tree.visible(nodes[:, queries], nodes), (1, tree.num_nodes, tree.num_nodes), 256, torch.bfloat16)
    assert mask.shape == (1, 1, tree.num_nodes, tree.num_nodes)
    visible = int((tree.position_ids_BS + 1).sum())
    assert visible < sum(part.numel() for part in mask.masks) < 1.5 * visible


def test_masks_are_as_gpu_kernels_want_them_where_autocast_begins_inside_the_model(make_trainer, monkeypatch):
    """Of the type of the queries, and with rows at multiples of 16 bytes: others are refused, or copied in every layer. Weights are fp32 here."""
    found, attend = [], attention._attend

    def watched(query, key, value, attn_mask, *args, **kwargs):
        found.extend((mask.dtype, mask.stride(-2) % 8, mask.shape[-1] % 8, query.requires_grad) for mask in attn_mask.masks)
        return attend(query, key, value, attn_mask, *args, **kwargs)

    monkeypatch.setattr(attention, "_attend", watched)
    make_trainer(bf16=True, max_steps=1).train()
    in_training = [one for one in found if one[0] != torch.float32 or one[3]]  # the check before it is in fp32, without gradients
    assert {dtype for dtype, *_ in in_training} == {torch.bfloat16}
    assert {stride for _, stride, *_ in in_training} == {0}
    assert any(width for *_, width, gradient in in_training if gradient), "all rows were of a multiple of 8 nodes"


def test_documents_of_a_packed_row_cost_nothing_of_each_other():
    documents_BT = torch.arange(4).repeat_interleave(64)[None]
    tree = ThoughtTree(documents_BT, torch.zeros(1, 0, dtype=torch.long), Branching(2, 1, 1))
    nodes = torch.arange(256)[None]
    mask = TreeMask.of(lambda queries: tree.visible(nodes[:, queries], nodes), (1, 256, 256), 64, torch.bfloat16)
    assert [part.shape for part in mask.masks] == [(1, 1, 64, 64)] * 4


@pytest.mark.parametrize("use", [lambda mask: mask + 1, lambda mask: mask[..., :2], lambda mask: mask.double(), lambda mask: torch.add(mask, 1)])
def test_a_tree_mask_cannot_be_taken_for_another_tensor(use):
    mask = mask_of(torch.eye(6, dtype=torch.bool)[None], 2)
    with pytest.raises(TypeError, match="tree's mask|TreeMask"):
        use(mask)
    assert mask.to(mask.device) is mask


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flex_attention_is_tried_in_the_precision_of_the_run(monkeypatch, dtype):
    """Its kernels are compiled and checked for each: else within the first checkpointed layer, which has to do the same twice."""
    seen, attend = set(), flex.attend
    monkeypatch.setattr(flex, "attend", lambda query, *args, **kwargs: (seen.add(query.dtype), attend(query, *args, **kwargs))[1])
    model, vocabulary = thinker("llama", "sdpa")
    with evaluating(model):
        assert engine._Probe(model, vocabulary, Branching(2, 2, 1), 2 * flex.BLOCK, 2).can_flex(dtype)
    assert seen == {dtype}
