"""Attention over a tree in blocks: a node sees the text before its fork and its own thought, which is a small part of all nodes.

Queries and keys are cut into runs of equal length. What the queries of a run see lies in a few stretches of keys, and attention between the two, under
the exact mask, is what one call over all keys and the full mask would give: nothing that has no probability is computed. On GPUs, where long rows are
computed in 16 bits, one kernel does so in smaller blocks (`hf_thinktok.flex`).

Architectures are not told. The mask is a tensor to them, and takes over where they call `torch.nn.functional.scaled_dot_product_attention` with it, as
PyTorch's own `torch.nn.attention.bias.CausalBias` does.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from . import flex

# Nodes in a run. On a CPU a short run wastes fewer pairs and costs no more; elsewhere each run is several kernels to launch.
RUN_LENGTH = {"cpu": 256}
RUN_LENGTH_ELSEWHERE = 2048

# Nodes of a row up to which a CPU is quicker with two products than with PyTorch's kernel, whose backward takes ten times its forward there.
SHORT_ROW = 200

# Of those that take a mask; flash takes none, and cuDNN's plans anew for every shape of mask, of which each step has others.
KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

See = Callable[[slice], Tensor]


@contextlib.contextmanager
def by_kernels() -> Iterator[None]:
    """Attends to short rows as to long ones, and as other devices do: so that FLOPs are counted alike everywhere."""
    global SHORT_ROW
    before, SHORT_ROW = SHORT_ROW, 0
    try:
        yield
    finally:
        SHORT_ROW = before


def run_length(device: torch.device) -> int:
    return RUN_LENGTH.get(device.type, RUN_LENGTH_ELSEWHERE)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as something to add to scores: 0 where it is true, else the most negative number."""
    # Its rows begin at multiples of eight numbers: others PyTorch's GPU kernels copy, in every layer.
    *shape, width = seen.shape
    mask = torch.zeros(*shape, -(-width // 8) * 8, dtype=dtype, device=seen.device)[..., :width]
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)


class Stretch(NamedTuple):
    """The keys `first` to `last` (exclusive) of a run."""

    run: int
    first: int
    last: int


class TreeMask(Tensor):
    """Who sees whom, `[B, 1, Q, C]`, in blocks; the whole is never made. Nothing can be done with it but to attend under it.

    Attributes:
        parts: the tensors that it is made of, where they are all there is to it.
        block_mask: all of it, for FlexAttention. Without it there are runs:
        run_length: nodes in a run of queries or keys.
        stretches: for each run of queries the keys that any of them sees, in any row of the batch.
        masks: for each run of queries who of them sees whom of those keys, `[B, 1, q, c]`, to add to scores.
    """

    parts: flex.Blocks | Tensor | None
    block_mask: BlockMask | None
    run_length: int
    stretches: list[list[Stretch]]
    masks: list[Tensor]

    @classmethod
    def of(cls, see: See, shape: tuple[int, int, int], run_length: int, dtype: torch.dtype) -> "TreeMask":
        """Makes the mask run by run.

        Args:
            see: which keys the queries of a slice see, `[B, q, C]` bool. Every query has to see one.
            shape: B, Q and C.
            dtype: that of the queries.
        """
        _, num_queries, num_keys = shape
        stretches, masks = [], []
        for start in range(0, num_queries, run_length):
            seen_BqC = see(slice(start, start + run_length))
            if num_queries > run_length:  # a single run takes all keys as they are
                stretches.append(_stretches(seen_BqC.any(1).any(0), run_length))
                keys = [seen_BqC[:, :, run * run_length + first : run * run_length + last] for run, first, last in stretches[-1]]
                seen_BqC = torch.cat(keys, -1)
            masks.append(additive(seen_BqC[:, None], dtype))
        mask = cls._of_shape(shape, masks[0])
        mask.parts, mask.block_mask = masks[0] if len(masks) == 1 else None, None
        mask.run_length, mask.stretches, mask.masks = run_length, stretches, masks
        return mask

    @classmethod
    def of_blocks(cls, blocks: flex.Blocks, shape: tuple[int, int, int], dtype: torch.dtype) -> "TreeMask":
        """As `of`, for FlexAttention."""
        mask = cls._of_shape(shape, torch.empty(1, dtype=dtype, device=blocks.bits_BQb.device))
        mask.parts, mask.block_mask = blocks, blocks.mask(*shape[1:], gradient=torch.is_grad_enabled())
        mask.run_length, mask.stretches, mask.masks = shape[1], [], []
        return mask

    def made_again(self, parts: flex.Blocks | Tensor) -> "TreeMask":
        """A mask of this kind and shape from other parts."""
        batch, _, num_queries, num_keys = self.shape
        shape = batch, num_queries, num_keys
        if not isinstance(parts, Tensor):
            return self.of_blocks(parts, shape, self.dtype)
        mask = self._of_shape(shape, parts)
        mask.parts, mask.block_mask, mask.run_length, mask.stretches, mask.masks = parts, None, shape[1], [], [parts]
        return mask

    @classmethod
    def _of_shape(cls, shape: tuple[int, int, int], like: Tensor) -> "TreeMask":
        batch, num_queries, num_keys = shape
        return like.new_empty(1).expand(batch, 1, num_queries, num_keys).as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        if isinstance(out, Tensor) and not any(out is each for each in args) and any(isinstance(each, cls) for each in args):
            raise TypeError(f"{getattr(func, '__name__', func)} of a tree's mask, which is there to attend under and is no tensor otherwise.")
        return out

    def __deepcopy__(self, memo):
        raise TypeError("A tree's mask belongs to one pass and cannot be copied.")


def _stretches(seen_C: Tensor, run_length: int) -> list[Stretch]:
    """The shortest stretch of each run of keys that has all that are seen."""
    padded = torch.nn.functional.pad(seen_C, (0, -len(seen_C) % run_length)).view(-1, run_length).long()
    first, last = padded.argmax(1), run_length - padded.flip(1).argmax(1)
    found = torch.stack([first, last, padded.amax(1)], 1).tolist()
    return [Stretch(run, first, last) for run, (first, last, any_seen) in enumerate(found) if any_seen]


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: TreeMask, dropout_p: float = 0.0, is_causal: bool = False, **kwargs: Any) -> Tensor:
    """`scaled_dot_product_attention` of each run of queries, `[B, heads, Q, D]`, with the keys that it sees."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    if attn_mask.block_mask is not None:
        if dropout_p:
            raise ValueError("FlexAttention knows no dropout.")
        return flex.attend(query.to(dtype), key.to(dtype), value.to(dtype), attn_mask.block_mask, **kwargs)
    attn_mask.masks[:] = [mask.to(dtype) for mask in attn_mask.masks]  # once for all layers
    length, masks = attn_mask.run_length, attn_mask.masks
    if len(masks) == 1:
        short = query.shape[2] * key.shape[2] <= SHORT_ROW**2 and not dropout_p and not kwargs.get("enable_gqa")
        if short and device == "cpu" and query.requires_grad:
            return _attend_by_products(query, key, value, masks[0], **kwargs)
    with sdpa_kernel(KERNELS) if device == "cuda" else contextlib.nullcontext():
        if len(masks) == 1:
            return scaled_dot_product_attention(query, key, value, masks[0], dropout_p, **kwargs)
        keys, values = key.split(length, 2), value.split(length, 2)
        out = [
            scaled_dot_product_attention(queries, _gather(keys, stretches), _gather(values, stretches), mask, dropout_p, **kwargs)
            for queries, stretches, mask in zip(query.split(length, 2), attn_mask.stretches, masks, strict=True)
        ]
        return torch.cat(out, 2)


def _attend_by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """`scaled_dot_product_attention` without dropout, written out. Scores are fp32, as in its kernels."""
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.matmul(query.float() * (query.shape[-1] ** -0.5 if scale is None else scale), key.float().transpose(-1, -2)) + mask
        return torch.matmul(scores.softmax(-1).to(mask.dtype), value.to(mask.dtype))


def _gather(runs: tuple[Tensor, ...], stretches: list[Stretch]) -> Tensor:
    """Whole runs are not sliced: the gradient of a slice is a tensor as large as what it was cut from."""
    parts = [runs[run] if first == 0 and last >= runs[run].shape[2] else runs[run][:, :, first:last] for run, first, last in stretches]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
