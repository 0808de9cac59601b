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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ._compat import running_adapter, trainable_token_rows
from .architectures import LogitTransform, backbone
from .models import products_in
from .peft import SPEAKER
from .tokens import ThinkingVocabulary

# Logits are made tile by tile: this many numbers at most at a time, 64 MiB in fp32. A GPU reads the whole head for each tile, so its tiles are larger.
TILE_ELEMENTS, TILE_ELEMENTS_GPU = 2**24, 2**26


Draw = torch.Generator | Literal["greedy"]


@dataclass
class HeadInputs:
    """Which nodes of a forward to score, and against which real token.

    Args:
        nodes_M: flat indices into the `batch * nodes` hidden states.
        targets_M: the true next token of each, or -100 where only the gate or the thought is read; `None` where that is all that any is read for. `[M, U]`
            gives log-probabilities of U tokens at each node.
        entropy: also give the entropy of the real prediction (fork positions by difficulty).
        spoken: only the first so many meet the real vocabulary. Of the others the thinking logits are given, the rest is 0, and the gate is not known.
        draw: draw each target from the real prediction instead: at temperature 1 with this generator, or the most likely one with `"greedy"`.
        detach_gate: the gate's gradient ends at the thinking rows: neither the hidden states nor the real rows have a part in it.
    """

    nodes_M: Tensor
    targets_M: Tensor | None = None
    entropy: bool = False
    spoken: int | None = None
    draw: Draw | None = None
    detach_gate: bool = False


@dataclass
class HiddenInputs:
    """Which nodes of a forward to give the hidden states of, `[M, D]`.

    Args:
        nodes_M: as in `HeadInputs`.
        layer: an index into `hidden_states`; -1 for those that enter the LM head.
    """

    nodes_M: Tensor
    layer: int = -1


@dataclass
class ThoughtInputs:
    """What thought nodes read in place of an id (`hf_thinktok.thoughts`).

    Args:
        index_BS: which of the vectors a node reads; -1 where it reads its id.
        vectors_MX: input embeddings `[M, D]`; or with `mixes` weights of thinking rows `[M, N]`, and what they make is added to the id's embedding.
    """

    index_BS: Tensor
    vectors_MX: Tensor
    mixes: bool = False

    def embed(self, embedding: torch.nn.Module, input_ids: Tensor, vocabulary: ThinkingVocabulary) -> Tensor:
        """Input embeddings of all nodes. All rows come out of the embedding module itself, which may scale them or train some of them apart (PEFT)."""
        embeds_BSD, vectors_MD = embedding(input_ids), self.vectors_MX
        if self.mixes:
            rows_ND = embedding(torch.arange(vocabulary.first_id, vocabulary.guard_id, device=input_ids.device)[None])[0]
            vectors_MD = vectors_MD.to(rows_ND.dtype) @ rows_ND
        if vectors_MD.shape[-1] != embeds_BSD.shape[-1]:
            raise ValueError(
                f"A thought's hidden state of {vectors_MD.shape[-1]} numbers cannot be read as an input embedding of {embeds_BSD.shape[-1]}: set "
                "another continuous_layer, or thoughts=gumbel."
            )
        # As an embedding, whose padding row has no gradient: that of an index adds up, one by one on a GPU, whatever reads the same row.
        rows_MD = torch.nn.functional.pad(vectors_MD.to(embeds_BSD.dtype), (0, 0, 1, 0))
        read_BSD = torch.nn.functional.embedding(self.index_BS + 1, rows_MD, padding_idx=0)
        return torch.where((self.index_BS >= 0)[..., None], embeds_BSD + read_BSD if self.mixes else read_BSD, embeds_BSD)


class HeadOutputs(NamedTuple):
    """What the scored nodes say, in fp32.

    Attributes:
        target_logps_M: log p(target | c, speak) in nats; 0 where the target is -100.
        log_z_real_M: logsumexp of the real logits.
        think_logits_MN: the thinking logits.
        correct_M: whether the target is the real prediction's argmax (no gradient).
        entropy_M: entropy of the real prediction in nats where asked for (no gradient).
        drawn_M: the targets that were drawn.
        log_z_think_M: where the gate is detached, logsumexp of the thinking logits with the gradient of the thinking rows alone.
    """

    target_logps_M: Tensor
    log_z_real_M: Tensor
    think_logits_MN: Tensor
    correct_M: Tensor
    entropy_M: Tensor | None = None
    drawn_M: Tensor | None = None
    log_z_think_M: Tensor | None = None

    @property
    def gate_logit_M(self) -> Tensor:
        """log p(think) - log p(speak): positive where the model would rather think."""
        gate_logit_M = self.think_logits_MN.logsumexp(-1) - self.log_z_real_M
        return gate_logit_M if self.log_z_think_M is None else self.log_z_think_M + (gate_logit_M - self.log_z_think_M).detach()


Head = HeadInputs | HiddenInputs | list[HeadInputs | HiddenInputs]


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise: the argmax of logits plus it is a draw from their softmax."""
    waiting = torch.empty(shape, device=generator.device).exponential_(generator=generator)
    return -waiting.clamp(min=torch.finfo(waiting.dtype).tiny).log()


def sums_in_fp32(hidden_MD: Tensor) -> bool:
    """Whether the device itself sums products of low-precision numbers in fp32."""
    return hidden_MD.is_cuda


@contextlib.contextmanager
def _fp32_sums(hidden_MD: Tensor, mixed: bool) -> Iterator[torch.dtype]:
    """Products of low-precision numbers with fp32 sums and fp32 results; gives the type to multiply in. Autocast is off meanwhile.

    On CPU the matrices are made fp32 and the library may multiply in bf16, which loses nothing of low-precision inputs. Measured on an
    AVX512-BF16 CPU, 1,024 x 576 @ 576 x 49,152: 0.175 s against 0.367 s in full fp32; largest error 7e-6 against 3e-2 for a bf16 result.

    Args:
        mixed: whether autocast was on: then fp32 numbers, which a last norm may give, are multiplied in TF32 on a GPU.
    """
    low_precision, on_gpu = hidden_MD.dtype in (torch.bfloat16, torch.float16), sums_in_fp32(hidden_MD)
    backend = torch.backends.cuda.matmul if on_gpu else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    precision = ("tf32" if mixed and not low_precision else None) if on_gpu else ("bf16" if low_precision else None)
    with torch.autocast(hidden_MD.device.type, enabled=False), products_in(precision, backend):
        yield hidden_MD.dtype if low_precision and on_gpu else torch.float32


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, summed up in fp32 and given in fp32."""
    return torch.mm(a, b) if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, in fp32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


class _VocabularyPass(torch.autograd.Function):
    """Target logit, log Z_real, thinking logits: one pass, tile by tile over nodes; the backward makes each tile anew."""

    @staticmethod
    def forward(ctx, hidden_MD, weight_RD, bias_R, think_weight_ND, targets_MU, vocabulary, transform, spoken, want_entropy, draw):
        num_real, num_nodes = vocabulary.num_real, len(hidden_MD)
        new = functools.partial(torch.zeros, device=hidden_MD.device, dtype=torch.float32)
        target_logits, log_z_real, entropy = new(targets_MU.shape), new(num_nodes), new(num_nodes) if want_entropy else None
        think_logits = hidden_MD.new_empty(num_nodes, vocabulary.num_tokens, dtype=torch.float32)
        correct = torch.zeros(targets_MU.shape, device=hidden_MD.device, dtype=torch.bool)
        ctx.mixed = torch.is_autocast_enabled(hidden_MD.device.type)
        with _fp32_sums(hidden_MD, ctx.mixed) as dtype:
            rows_D, bias, silent_ND, silent_bias = _softmax_rows(weight_RD, bias_R, think_weight_ND, vocabulary, dtype, spoken)
            think_logits[spoken:] = _logits(hidden_MD[spoken:].to(dtype), silent_ND, silent_bias, transform)
            for tile in _tiles(spoken, len(rows_D), sums_in_fp32(hidden_MD)):
                logits = _logits(hidden_MD[tile].to(dtype), rows_D, bias, transform)
                real = logits[:, :num_real]
                think_logits[tile] = logits[:, num_real:]
                if draw is not None:
                    targets_MU[tile] = (real if draw == "greedy" else real + gumbel_noise(real.shape, draw)).argmax(-1, keepdim=True)
                target = real.gather(1, targets_MU[tile].clamp(min=0))
                largest = real.amax(-1)
                if entropy is None:
                    log_z = real.sub_(largest[:, None]).exp_().sum(-1).log_() + largest
                else:
                    log_z = real.logsumexp(-1)
                    logps = real - log_z[:, None]
                    entropy[tile] = -(logps.exp() * logps).sum(-1)
                target_logits[tile], log_z_real[tile], correct[tile] = target, log_z, target >= largest[:, None]
        ctx.save_for_backward(hidden_MD, weight_RD, bias_R, think_weight_ND, targets_MU, log_z_real)
        ctx.vocabulary, ctx.transform, ctx.spoken = vocabulary, transform, spoken
        ctx.mark_non_differentiable(correct, *([] if entropy is None else [entropy]))
        return target_logits, log_z_real, think_logits, correct, entropy

    @staticmethod
    def backward(ctx, grad_target, grad_log_z, grad_think, *_):
        hidden_MD, weight_RD, bias_R, think_weight_ND, targets_MU, log_z_real = ctx.saved_tensors
        vocabulary, num_real = ctx.vocabulary, ctx.vocabulary.num_real
        grad_hidden = torch.empty_like(hidden_MD)
        with _fp32_sums(hidden_MD, ctx.mixed) as dtype:
            rows_D, bias, silent_ND, silent_bias = _softmax_rows(weight_RD, bias_R, think_weight_ND, vocabulary, dtype, ctx.spoken)
            # As long as the parameters, where rows that take no part get zero; beside a frozen weight, only thinking rows.
            first, last = 0 if ctx.needs_input_grad[1] else num_real, num_real + vocabulary.num_tokens
            length = len(weight_RD) if think_weight_ND is None else last - first
            grad_rows = rows_D.new_zeros(length, rows_D.shape[1], dtype=torch.float32) if ctx.needs_input_grad[1] or ctx.needs_input_grad[3] else None
            grad_bias = bias.new_zeros(len(bias_R)) if bias is not None and ctx.needs_input_grad[2] else None

            def propagate(grad, nodes, hidden, rows, columns) -> None:
                """From the gradient of some nodes' logits, whose columns are those ids, to that of all they were made of."""
                grad_hidden[nodes] = _product(grad.to(dtype), rows).to(grad_hidden.dtype)
                if grad_rows is not None:
                    trained = max(columns.start, first)
                    _add_product(grad_rows[trained - first : columns.stop - first], grad[:, trained - columns.start :].to(dtype).T, hidden)
                if grad_bias is not None:
                    grad_bias[columns] += grad.sum(0, dtype=torch.float32)

            hidden, nodes = hidden_MD[ctx.spoken :].to(dtype), slice(ctx.spoken, None)
            slope = ctx.transform.slope(_logits(hidden, silent_ND, silent_bias, ctx.transform))
            propagate(grad_think[nodes] if slope is None else grad_think[nodes] * slope, nodes, hidden, silent_ND, slice(num_real, last))
            for tile in _tiles(ctx.spoken, len(rows_D), sums_in_fp32(hidden_MD)):
                hidden = hidden_MD[tile].to(dtype)
                logits = _logits(hidden, rows_D, bias, ctx.transform)
                slope = ctx.transform.slope(logits)
                # In place: d loss / d logit is softmax times that of log Z, plus that of the target's logit.
                logits[:, :num_real].sub_(log_z_real[tile, None]).exp_().mul_(grad_log_z[tile, None])
                logits[:, num_real:] = grad_think[tile]
                logits.scatter_add_(1, targets_MU[tile].clamp(min=0), grad_target[tile])
                propagate(logits if slope is None else logits.mul_(slope), tile, hidden, rows_D, slice(0, last))

        grad_weight = grad_think_weight = None
        if grad_rows is not None and think_weight_ND is None:
            grad_weight = grad_rows.to(weight_RD.dtype)
        elif grad_rows is not None:
            grad_think_weight = grad_rows[-vocabulary.num_tokens :].to(think_weight_ND.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = torch.zeros_like(weight_RD)
                grad_weight[:num_real] = grad_rows[:num_real]
        return grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(bias_R.dtype), grad_think_weight, None, None, None, None, None, None


def _softmax_rows(weight_RD, bias_R, think_weight_ND, vocabulary, dtype, spoken):
    """The rows that take part in the softmax, real then thinking (padding rows and the guard never do), and their biases; and those of the thinking rows
    alone, beside which the real ones are not touched where nothing is spoken."""
    first, last = 0 if spoken else vocabulary.num_real, vocabulary.num_real + vocabulary.num_tokens
    rows = weight_RD[first : last if think_weight_ND is None else vocabulary.num_real].to(dtype)
    rows = rows if think_weight_ND is None else torch.cat([rows, think_weight_ND.to(dtype)])
    bias = None if bias_R is None else bias_R[first:last].float()
    silent = slice(vocabulary.num_real - first, None)
    return rows, bias, rows[silent], None if bias is None else bias[silent]


def _logits(hidden, rows, bias, transform):
    logits = _product(hidden, rows.T)
    return transform(logits if bias is None else logits.add_(bias))


def _tiles(num_nodes: int, num_rows: int, on_gpu: bool) -> Iterator[slice]:
    size = max(16, (TILE_ELEMENTS_GPU if on_gpu else TILE_ELEMENTS) // max(num_rows, 1))
    return (slice(start, min(start + size, num_nodes)) for start in range(0, num_nodes, size))


def score(hidden_MD: Tensor, lm_head: torch.nn.Module, head: HeadInputs, vocabulary: ThinkingVocabulary, transform: LogitTransform) -> HeadOutputs:
    """Scores hidden states against the vocabulary of `lm_head`.

    Args:
        hidden_MD: hidden states as they enter the LM head, in any floating type. Sums are fp32 whatever it is: bf16 noise in a
            log-probability is as large as a typical reward.
    """
    weight_RD, trained_rows = trainable_token_rows(lm_head)
    think_weight_ND = None if trained_rows is None else trained_rows[: vocabulary.num_tokens]  # without the guard
    bias_R = getattr(lm_head, "bias", None)
    targets_M = torch.full_like(head.nodes_M, -100) if head.targets_M is None or head.draw is not None else head.targets_M  # what is drawn fills them
    targets_MU = targets_M[:, None] if targets_M.ndim == 1 else targets_M
    spoken = len(hidden_MD) if head.spoken is None else head.spoken
    target_logits, log_z_real, think_logits, correct, entropy = _VocabularyPass.apply(
        hidden_MD, weight_RD, bias_R, think_weight_ND, targets_MU, vocabulary, transform, spoken, head.entropy, head.draw
    )
    judged, drawn_M = targets_M >= 0, None if head.draw is None else targets_M
    target_logps, correct = (values.view(targets_M.shape) for values in (target_logits - log_z_real[:, None], correct))
    log_z_think = None
    if head.detach_gate:  # another small product, for its gradient
        with torch.autocast(hidden_MD.device.type, enabled=False):
            *_, rows_ND, bias_N = _softmax_rows(weight_RD, bias_R, think_weight_ND, vocabulary, torch.float32, spoken=0)
            log_z_think = _logits(hidden_MD.detach().float(), rows_ND, bias_N, transform).logsumexp(-1)
    return HeadOutputs(torch.where(judged, target_logps, 0.0), log_z_real, think_logits, correct & judged, entropy, drawn_M, log_z_think)


def attach_head(model: PreTrainedModel, vocabulary: ThinkingVocabulary) -> None:
    """Lets `model(..., head=HeadInputs)` return `HeadOutputs` in place of logits, for `HiddenInputs` hidden states, for a list of them a list.

    With `thoughts=ThoughtInputs` some nodes read vectors in place of their ids. With `speaks=True` the call goes to the second policy of
    `policies: split`: the model `model.speaker`, or this model with the adapter of that name. With `then`, keyword arguments of further calls, all are
    made in one, and a list comes back.
    Without `head` the forward is the original one. The head lives inside the forward, and there inside that of the LM head, because DDP, DeepSpeed and
    FSDP gather parameters there. The backbone and the LM head are looked up at each call: PEFT and FSDP replace them later.

    Args:
        model: a causal LM, before it is wrapped by a launcher.
    """
    original = model.forward.__func__  # unbound: a copy of the model must run itself
    transform = LogitTransform.from_config(model.config)

    @functools.wraps(type(model).forward)
    def forward(
        self, *args, head: Head | None = None, thoughts: ThoughtInputs | None = None, speaks: bool = False, then: list[dict[str, Any]] | None = None, **kwargs
    ):
        if then is not None:
            return [forward(self, *args, head=head, thoughts=thoughts, speaks=speaks, **kwargs), *(forward(self, **one) for one in then)]
        if speaks and hasattr(self, SPEAKER):
            return self.speaker(*args, head=head, thoughts=thoughts, **kwargs)
        if speaks:
            with running_adapter(self, SPEAKER):
                return forward(self, *args, head=head, thoughts=thoughts, **kwargs)
        if head is None:
            return original(self, *args, **kwargs)
        if thoughts is not None:
            kwargs["inputs_embeds"] = thoughts.embed(self.get_input_embeddings(), kwargs.pop("input_ids"), vocabulary)
        wanted = head if isinstance(head, list) else [head]
        if any(isinstance(one, HiddenInputs) and one.layer != -1 for one in wanted):
            kwargs["output_hidden_states"] = True
        out = backbone(self)(*args, **kwargs)

        lm_head = self.get_output_embeddings()

        def give(last_hidden: Tensor, one: HeadInputs | HiddenInputs) -> HeadOutputs | Tensor:
            if isinstance(one, HiddenInputs):
                return (last_hidden if one.layer == -1 else _hidden_states(out, one.layer)).flatten(0, 1)[one.nodes_M]
            return score(last_hidden.flatten(0, 1)[one.nodes_M], lm_head, one, vocabulary, transform)

        given = _as_forward_of(lm_head, lambda last_hidden: [give(last_hidden, one) for one in wanted], out.last_hidden_state)
        return given if isinstance(head, list) else given[0]

    model.forward = types.MethodType(forward, model)


@contextlib.contextmanager
def with_head(model: PreTrainedModel, vocabulary: ThinkingVocabulary) -> Iterator[None]:
    """Attaches the head for a while, as to a model that somebody else goes on using."""
    with _forward_kept(model):
        attach_head(model, vocabulary)
        yield


@contextlib.contextmanager
def _forward_kept(module: torch.nn.Module) -> Iterator[None]:
    """Gives a module the forward back that it has now."""
    before = module.__dict__.get("forward")
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)
        if before is not None:
            module.forward = before


def _as_forward_of(module: torch.nn.Module, function: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """Calls a module with another forward: launchers that divide parameters gather a module's own for its forward, and again for its backward."""
    with _forward_kept(module):
        module.forward = function
        return module(hidden)


def _hidden_states(out, layer: int) -> Tensor:
    if not -len(out.hidden_states) <= layer < len(out.hidden_states):
        raise ValueError(f"continuous_layer={layer} is no layer: this model has hidden states 0 to {len(out.hidden_states) - 1}, and -1 is the last.")
    return out.hidden_states[layer]
