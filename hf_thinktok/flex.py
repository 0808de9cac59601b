"""Attention over a tree by PyTorch's FlexAttention (Dong et al. 2024, arXiv:2412.05496): one kernel, which passes over blocks of pairs that nobody sees.

Its kernels are compiled by Triton, on the device at hand. Before a model relies on them they are tried there (`is_exact`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

# Nodes in a side of a block.
BLOCK = 128

# Short rows have a kernel of their own, one more to compile. A program takes half a block of queries: in whole ones the few that are decoded at a time leave
# most of a GPU idle (thirty layers, 512 queries of 5,632 keys, on one H200: 9.2 ms, and 2.6 so), and a whole tree is the slower too (a layer 0.60 ms, 0.25 so).
OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True, "fwd_BLOCK_M": BLOCK // 2}

# One for each type, head dimension, and way that lengths divide by the block. Past the limit there is an error: PyTorch would store all scores.
MOST_KERNELS = 64

# Relative error of bf16 kernels; a key too many or too few makes one near 1.
TOLERANCE = 0.05


class Blocks(NamedTuple):
    """Who sees whom: which blocks of queries and keys are seen in part and which wholly, and single pairs.

    Attributes:
        bits_BQb: of each query a bit for each key, eight in a byte, the first one the lowest. Kernels keep one for each pair of a block at hand, and in words
            of 32 bits there is no room for them (245,760 of 232,448 bytes on a Hopper GPU).
        num_partial_B1q, partial_B1qc, num_full_B1q, full_B1qc: for each block of queries how many blocks of keys, and which; those come first.
    """

    bits_BQb: Tensor
    num_partial_B1q: Tensor
    partial_B1qc: Tensor
    num_full_B1q: Tensor
    full_B1qc: Tensor

    @classmethod
    def of(cls, see: Callable[[slice], Tensor], shape: tuple[int, int, int], run_length: int) -> "Blocks":
        """Looks at `run_length` queries at a time, a multiple of the block; else as `hf_thinktok.attention.TreeMask.of`."""
        _, num_queries, num_keys = shape
        bits, partial, full = [], [], []
        for start in range(0, num_queries, run_length):
            seen_BqC = see(slice(start, start + run_length))
            seen_BqC = pad(seen_BqC, (0, -num_keys % BLOCK, 0, -seen_BqC.shape[1] % BLOCK))
            bit_8 = 2 ** torch.arange(8, device=seen_BqC.device, dtype=torch.uint8)
            bits.append((seen_BqC.unflatten(2, (-1, 8)) * bit_8).sum(-1, dtype=torch.uint8))
            pairs_Bqc = seen_BqC.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).sum((2, 4))
            partial.append((pairs_Bqc > 0) & (pairs_Bqc < BLOCK**2))
            full.append(pairs_Bqc == BLOCK**2)
        return cls(torch.cat(bits, 1), *_in_front(torch.cat(partial, 1)), *_in_front(torch.cat(full, 1)))

    def mask(self, num_queries: int, num_keys: int, gradient: bool) -> BlockMask:
        """For so many queries and keys.

        Args:
            gradient: whether there will be a backward pass.
        """
        bits_BQb = self.bits_BQb

        def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return ((bits_BQb[row, query, key >> 3] >> (key & 7)) & 1) == 1

        return BlockMask.from_kv_blocks(*self[1:], BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(num_queries, num_keys), compute_q_blocks=gradient)


def _in_front(chosen_Bqc: Tensor) -> tuple[Tensor, Tensor]:
    """How many are chosen, and all in their order, those first. No views: a kernel compiled for a view is not taken for its copy, in a graph's capture."""
    chosen_B1qc = chosen_Bqc[:, None]
    return chosen_B1qc.sum(-1, dtype=torch.int32), chosen_B1qc.int().argsort(dim=-1, descending=True, stable=True).int()


@functools.cache
def _kernel(device: str) -> Callable[..., Any]:
    if device == "cpu":  # no backward there; for tests
        return flex_attention
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_KERNELS)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """`scaled_dot_product_attention` under a mask."""
    if query.is_cuda and not is_exact(query.device, query.dtype, query.shape[-1], value.shape[-1], query.shape[1] // key.shape[1]):
        raise RuntimeError("FlexAttention gives something else here than attention does.")
    return _kernel(query.device.type)(query, key, value, block_mask=mask, scale=scale, enable_gqa=enable_gqa, kernel_options=OPTIONS)


@functools.cache
def is_exact(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, heads_of_key: int) -> bool:
    """Whether its kernel, forward and backward, does what `scaled_dot_product_attention` does on random numbers under a random causal mask."""
    batch, heads, length = 2, 2, 3 * BLOCK - 1
    generator = torch.Generator(device).manual_seed(0)

    def numbers(heads: int, dim: int) -> Tensor:
        return torch.randn(batch, heads, length, dim, generator=generator, device=device).to(dtype).requires_grad_()

    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        inputs = numbers(heads * heads_of_key, head_dim), numbers(heads, head_dim), numbers(heads, value_dim)
        seen_BQC = torch.rand(batch, length, length, generator=generator, device=device) < 0.5
        seen_BQC = (seen_BQC | torch.eye(length, device=device, dtype=torch.bool)).tril()
        seen_BQC[:, BLOCK:, :BLOCK] = True
        mask = Blocks.of(lambda queries: seen_BQC[:, queries], (batch, length, length), 2 * BLOCK).mask(length, length, gradient=True)
        found = _kernel(device.type)(*inputs, block_mask=mask, enable_gqa=heads_of_key > 1, kernel_options=OPTIONS)
        exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
        wanted = scaled_dot_product_attention(exact[0], exact[1], exact[2], seen_BQC[:, None], enable_gqa=heads_of_key > 1)
        direction = torch.randn(wanted.shape, generator=generator, device=device)
        pairs = [(found, wanted), *zip(torch.autograd.grad(found, inputs, direction.to(dtype)), torch.autograd.grad(wanted, exact, direction), strict=True)]
    return all(bool((a.float() - b).norm() <= TOLERANCE * b.norm()) for a, b in pairs)
