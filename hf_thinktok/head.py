"""Think, or speak, or which: everything that one context says, from one pass over the vocabulary.

A thinking model has one softmax over real rows `[0, V)` and thinking rows `[V0, V0+N)`. With `Z_real` and `Z_think` the sums of the
exponentiated logits over each set, it factorises exactly:

    p(speak | c)    = Z_real / (Z_real + Z_think)      the gate
    p(y | c, speak) = exp(logit_y) / Z_real            the prediction
    p(z | c, think) = exp(logit_z) / Z_think           the thought's content

Cross-entropy uses `Z_real` alone. With the full normaliser it would train the thinking rows down wherever text is spoken: a supervised
loss on thinking by the back door.

Shape suffixes: M scored nodes, D hidden size, R embedding rows, V real rows, N thinking tokens.
"""

import contextlib
import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ._compat import trainable_token_rows
from .architectures import LogitTransform
from .tokens import ThinkingVocabulary

# Logits are made tile by tile: this many numbers at most at a time, 64 MiB in fp32.
TILE_ELEMENTS = 2**24


@dataclass
class HeadInputs:
    """Which nodes of a forward to score, and against which real token.

    Args:
        nodes_M: flat indices into the `batch * nodes` hidden states.
        targets_M: the true next token of each, or -100 where only the gate or the thought is read.
        entropy: also give the entropy of the real prediction (fork positions by difficulty).
    """

    nodes_M: Tensor
    targets_M: Tensor
    entropy: bool = False


@dataclass
class HeadOutputs:
    """What the scored nodes say, in fp32.

    Attributes:
        target_logps_M: log p(target | c, speak) in nats; 0 where the target is -100.
        log_z_real_M: logsumexp of the real logits.
        think_logits_MN: the thinking logits.
        correct_M: whether the target is the real prediction's argmax (no gradient).
        entropy_M: entropy of the real prediction in nats where asked for (no gradient).
    """

    target_logps_M: Tensor
    log_z_real_M: Tensor
    think_logits_MN: Tensor
    correct_M: Tensor
    entropy_M: Tensor | None = None

    @property
    def gate_logit_M(self) -> Tensor:
        """log p(think) - log p(speak): positive where the model would rather think."""
        return self.think_logits_MN.logsumexp(-1) - self.log_z_real_M


@contextlib.contextmanager
def _fp32_sums(dtype: torch.dtype) -> Iterator[None]:
    """For low-precision inputs on CPU: their products are exact in fp32, so let the library multiply in bf16 and sum in fp32.

    Measured on an AVX512-BF16 CPU, 1,024 x 576 @ 576 x 49,152: 0.175 s against 0.367 s in fp32, largest error 7e-6 against 3e-2 in bf16.
    """
    matmul = torch.backends.mkldnn.matmul
    if dtype not in (torch.bfloat16, torch.float16) or not hasattr(matmul, "fp32_precision"):
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` with fp32 sums and an fp32 result, whatever the inputs' type."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class _VocabularyPass(torch.autograd.Function):
    """Target logit, log Z_real, thinking logits: one pass, tile by tile over nodes; the backward makes each tile anew."""

    @staticmethod
    def forward(ctx, hidden_MD, weight_RD, bias_R, think_weight_ND, targets_M, vocabulary, transform, want_entropy):
        low_precision = hidden_MD.dtype in (torch.bfloat16, torch.float16)
        compute = hidden_MD.dtype if low_precision else torch.promote_types(hidden_MD.dtype, weight_RD.dtype)
        with torch.autocast(hidden_MD.device.type, enabled=False), _fp32_sums(compute):
            rows_D, bias = _softmax_rows(weight_RD, bias_R, think_weight_ND, vocabulary, compute)
            hidden = hidden_MD.to(compute)
            num_real, num_nodes = vocabulary.num_real, len(hidden_MD)
            new = functools.partial(torch.empty, num_nodes, device=hidden_MD.device, dtype=torch.float32)
            target_logits, log_z_real, entropy = new(), new(), new() if want_entropy else None
            think_logits = hidden_MD.new_empty(num_nodes, len(rows_D) - num_real, dtype=torch.float32)
            correct = torch.empty(num_nodes, device=hidden_MD.device, dtype=torch.bool)
            for tile in _tiles(num_nodes, len(rows_D)):
                logits = _logits(hidden[tile], rows_D, bias, transform)
                real, targets = logits[:, :num_real], targets_M[tile].clamp(min=0)
                torch.logsumexp(real, -1, out=log_z_real[tile])
                target_logits[tile] = real.gather(1, targets[:, None])[:, 0]
                correct[tile] = real.argmax(-1) == targets
                think_logits[tile] = logits[:, num_real:]
                if entropy is not None:
                    logps = real - log_z_real[tile, None]
                    entropy[tile] = -(logps.exp() * logps).sum(-1)
        ctx.save_for_backward(hidden_MD, weight_RD, bias_R, think_weight_ND, targets_M, log_z_real)
        ctx.vocabulary, ctx.transform, ctx.compute = vocabulary, transform, compute
        ctx.mark_non_differentiable(correct, *([] if entropy is None else [entropy]))
        return target_logits, log_z_real, think_logits, correct, entropy

    @staticmethod
    def backward(ctx, grad_target, grad_log_z, grad_think, *_):
        hidden_MD, weight_RD, bias_R, think_weight_ND, targets_M, log_z_real = ctx.saved_tensors
        vocabulary, compute = ctx.vocabulary, ctx.compute
        num_real = vocabulary.num_real
        needs_rows = any(ctx.needs_input_grad[i] for i in (1, 2, 3))
        with torch.autocast(hidden_MD.device.type, enabled=False), _fp32_sums(compute):
            rows_D, bias = _softmax_rows(weight_RD, bias_R, think_weight_ND, vocabulary, compute)
            hidden = hidden_MD.to(compute)
            grad_hidden = torch.zeros_like(hidden_MD, dtype=torch.float32)
            grad_rows = torch.zeros_like(rows_D, dtype=torch.float32) if needs_rows else None
            grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None else None
            for tile in _tiles(len(hidden), len(rows_D)):
                logits = _logits(hidden[tile], rows_D, bias, ctx.transform)
                grad = torch.empty_like(logits)
                torch.sub(logits[:, :num_real], log_z_real[tile, None], out=grad[:, :num_real])
                grad[:, :num_real].exp_().mul_(grad_log_z[tile, None])
                grad.scatter_add_(1, targets_M[tile].clamp(min=0)[:, None], grad_target[tile, None])
                grad[:, num_real:] = grad_think[tile]
                grad = ctx.transform.backward_(grad, logits).to(compute)
                grad_hidden[tile] = _product(grad, rows_D)
                if grad_rows is not None:
                    grad_rows += _product(grad.T, hidden[tile])
                if grad_bias is not None:
                    grad_bias += grad.sum(0, dtype=torch.float32)
        grad_weight = grad_think_weight = grad_bias_R = None
        if grad_rows is not None and think_weight_ND is not None:
            grad_think_weight = grad_rows[num_real:].to(think_weight_ND.dtype)
        if grad_rows is not None and ctx.needs_input_grad[1]:
            kept = grad_rows[:num_real] if think_weight_ND is not None else grad_rows
            grad_weight = torch.zeros_like(weight_RD)
            grad_weight[: len(kept)] = kept
        if grad_bias is not None and ctx.needs_input_grad[2]:
            grad_bias_R = torch.zeros_like(bias_R)
            grad_bias_R[: len(grad_bias)] = grad_bias
        return grad_hidden.to(hidden_MD.dtype), grad_weight, grad_bias_R, grad_think_weight, None, None, None, None


def _softmax_rows(weight_RD, bias_R, think_weight_ND, vocabulary, dtype):
    """The rows that take part in the softmax, real then thinking (padding rows and the guard never do), and their biases."""
    last = vocabulary.first_id + vocabulary.num_tokens
    if think_weight_ND is None:
        rows = weight_RD[:last].to(dtype)
    else:
        rows = torch.cat([weight_RD[: vocabulary.num_real].to(dtype), think_weight_ND.to(dtype)])
    return rows, None if bias_R is None else bias_R[: len(rows)].float()


def _logits(hidden, rows, bias, transform):
    logits = _product(hidden, rows.T)
    return transform(logits if bias is None else logits.add_(bias))


def _tiles(num_nodes: int, num_rows: int) -> Iterator[slice]:
    size = max(16, TILE_ELEMENTS // num_rows)
    return (slice(start, min(start + size, num_nodes)) for start in range(0, num_nodes, size))


def score(hidden_MD: Tensor, lm_head: torch.nn.Module, head: HeadInputs, vocabulary: ThinkingVocabulary, transform: LogitTransform) -> HeadOutputs:
    """Scores hidden states against the vocabulary of `lm_head`.

    Args:
        hidden_MD: hidden states as they enter the LM head, in any floating type. Sums are fp32 whatever it is: bf16 noise in a
            log-probability is as large as a typical reward.
    """
    weight_RD, think_weight_ND = trainable_token_rows(lm_head)
    targets_M = head.targets_M
    target_logits, log_z_real, think_logits, correct, entropy = _VocabularyPass.apply(
        hidden_MD, weight_RD, getattr(lm_head, "bias", None), think_weight_ND, targets_M, vocabulary, transform, head.entropy
    )
    judged = targets_M >= 0
    return HeadOutputs(torch.where(judged, target_logits - log_z_real, 0.0), log_z_real, think_logits, correct & judged, entropy)


def attach_head(model: PreTrainedModel, vocabulary: ThinkingVocabulary) -> None:
    """Lets `model(..., head=HeadInputs)` return `HeadOutputs` in place of logits.

    Without `head` the forward is the original one. The head lives inside the forward because DDP, DeepSpeed and FSDP gather
    parameters there. The backbone and the LM head are looked up at each call: PEFT and FSDP replace them later.

    Args:
        model: a causal LM whose backbone is `model.base_model`, before it is wrapped by a launcher.
    """
    original = model.forward
    transform = LogitTransform.from_config(model.config)

    @functools.wraps(type(model).forward)
    def forward(self, *args, head: HeadInputs | None = None, **kwargs):
        if head is None:
            return original(*args, **kwargs)
        outputs = self.base_model(*args, **kwargs)
        hidden_MD = outputs.last_hidden_state.flatten(0, 1)[head.nodes_M]
        return score(hidden_MD, self.get_output_embeddings(), head, vocabulary, transform)

    model.forward = types.MethodType(forward, model)
