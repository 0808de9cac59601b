"""A training step on weights that have shapes and types and no data, and what of it is alive.

It is made by the trainer's own tree, engine, head and loss on PyTorch's fake tensors. So architectures, attention implementations, checkpointing and
adapters need no description of their own here.

Bytes throughout. Shape suffixes as in tree.py.
"""

import contextlib
import copy
import inspect
import math
from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForCausalLM, PretrainedConfig, Trainer

from ._compat import FakeTensorMode
from .architectures import drops_attention
from .attention import TreeMask, by_kernels, run_length
from .config import ThinkTokConfig
from .engine import ReplicatedEngine, TreeEngine
from .forks import choose_forks, eligible_forks
from .head import HeadInputs, attach_head
from .memory import LiveBytes, Part
from .models import disable_dropout, evaluating
from .objective import thinking_loss
from .peft import add_thinking_rows
from .rewards import resolve_rewards
from .rollout import Rollout
from .scores import TreeScores, score_tree
from .tokens import ThinkingVocabulary
from .tree import ThoughtTree


@contextlib.contextmanager
def count_flops() -> Iterator[FlopCounterMode]:
    """PyTorch's counter of what products of matrices compute, with those that it leaves out: sums of products in place, and a CPU's attention."""
    aten = torch.ops.aten

    def attention(query, key, value, dropout=0.0, is_causal=False, **kwargs) -> int:
        return seen(sdpa_flop_count(query, key, value), query, is_causal)

    def attention_backward(grad_out, query, key, value, out, log_z, dropout=0.0, is_causal=False, **kwargs) -> int:
        return seen(sdpa_backward_flop_count(grad_out, query, key, value), query, is_causal)

    def seen(flops: int, query, is_causal: bool) -> int:  # the kernel skips what nobody sees
        return flops * (query[2] + 1) // (2 * query[2]) if is_causal else flops

    def sum_of_product(total, one, other, *args, **kwargs) -> int:  # PyTorch's own fails where sums have a type of their own
        return 2 * one[0] * one[1] * other[1]

    def grouped(one, other, *args, **kwargs) -> int:  # of experts: rows of one by the matrices of the other, or sums over rows of each group
        return 2 * math.prod(one[-2:]) * other[-1]

    kernels = {
        aten._grouped_mm: grouped,
        aten.addmm: sum_of_product,
        aten.addmm_: sum_of_product,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with by_kernels(), FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        yield counter


class _Flex(torch.autograd.Function):
    """What FlexAttention's kernels keep and make: inputs, mask and output, a number for each query and head, and no scores."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        ctx.mask = mask
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


def attend_without_data(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, **kwargs) -> Tensor:
    """In the place of `hf_thinktok.flex.attend`."""
    return _Flex.apply(query, key, value, mask)


class Phase(StrEnum):
    """What a step does, one after the other."""

    TEXT = "rollout: text"
    THOUGHTS = "rollout: thoughts"
    PASS = "gradient pass"
    STEP = "optimizer step"
    EVALUATION = "evaluation"


def model_without_data(config: PretrainedConfig, args: ThinkTokConfig, dtype: torch.dtype, attn_implementation: str | None, peft_config: Any):
    """The model as the trainer makes it ready, on the meta device, and its thinking vocabulary."""
    vocabulary = ThinkingVocabulary.from_config(config)
    if vocabulary is None:  # a tokenizer might leave rows of the embedding free; here none are
        config = copy.deepcopy(config)
        text, num_tokens = config.get_text_config(), args.num_think_tokens or 16
        vocabulary = ThinkingVocabulary(text.vocab_size, num_tokens, text.vocab_size + num_tokens)
        text.vocab_size = vocabulary.num_rows
    with torch.device("meta"):
        how = {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": args.trust_remote_code}
        model = base = AutoModelForCausalLM.from_config(config, **how)
        if peft_config is not None:
            model = get_peft_model(base, add_thinking_rows(peft_config, base, vocabulary))
    attach_head(base, vocabulary)
    if args.disable_dropout:
        disable_dropout(model)
    if args.gradient_checkpointing:
        options = dict(args.gradient_checkpointing_kwargs or {})
        layers = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None, **layers)
        if peft_config is not None:
            model.enable_input_require_grads()
    return model.train(), vocabulary


class Rows:
    """Full rows of text with forks evenly spaced, and thoughts of full length."""

    def __init__(self, args: ThinkTokConfig, batch: int, num_generations: int, markovian: int = 0):
        documents_BT = torch.zeros(batch, args.max_length, dtype=torch.long)
        self.labels_BT = torch.zeros_like(documents_BT)
        how = "all" if args.fork_positions == "all" else "stride"
        forks_BK = choose_forks(eligible_forks(self.labels_BT, documents_BT), args.num_forks, how, torch.Generator())
        branching = args.branching(args.max_length, num_generations=num_generations, markovian=markovian)
        self.rollout = replace(Rollout.empty(forks_BK, branching), supplied=args.supply_thoughts, text=args.thoughts == "text")
        self.rollout.lengths_BKG.fill_(branching.max_length)
        self.tree = ThoughtTree(documents_BT, forks_BK, branching)


class DryRun:
    """The phases of a step; each gives its parts at its peak.

    Args:
        model: of `model_without_data`.
        device: what the run will be on; the dry run is on none.
        autocast: the type that the launcher casts to, if it does.
        gradient_share: as in `LiveBytes`. Where it is below 1, as where they are accumulated, gradients are there all the time.
        sharded: whether the launcher shares out parameters, so that thoughts are drawn all at once (`TreeEngine.forks_at_once`).
    """

    def __init__(
        self,
        model,
        vocabulary: ThinkingVocabulary,
        args: ThinkTokConfig,
        device: torch.device,
        autocast: torch.dtype | None = None,
        gradient_share: float = 1.0,
        sharded: bool = False,
    ):
        self.model, self.vocabulary, self.args, self.device, self.autocast_type, self.sharded = model, vocabulary, args, device, autocast, sharded
        length = None if args.torch_compile else run_length(device)
        can_flex = length is not None and device.type == "cuda" and not drops_attention(model)
        self.engine = ReplicatedEngine() if args.engine == "replicated" else TreeEngine(length, can_flex)
        model.register_forward_pre_hook(self._take_masks, with_kwargs=True)
        self.fake, self.live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(gradient_share)
        self._make_fake()
        for tensor in (*model.parameters(), *model.buffers()):
            self.live.add(tensor, Part.PARAMETERS)
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.keeps_gradients = args.gradient_accumulation_steps > 1 or gradient_share < 1
        for parameter in self.trainable:
            parameter.register_post_accumulate_grad_hook(self._take_gradient)
        # Autograd adds up the gradients that such weights get from several places: in place, but for fake tensors.
        self.live.in_place = model.get_output_embeddings().weight.shape

    def _make_fake(self) -> None:
        """Puts fake tensors of the CPU in the place of meta ones, which autocast does not know; tied ones stay tied."""
        made: dict[Tensor, Tensor] = {}
        for table in (table for module in self.model.modules() for table in (module._parameters, module._buffers)):
            for name, meta in table.items():
                if meta is not None and meta not in made:
                    with self.fake:
                        empty = torch.empty_like(meta, device="cpu")
                    made[meta] = torch.nn.Parameter(empty, meta.requires_grad) if isinstance(meta, torch.nn.Parameter) else empty
                table[name] = None if meta is None else made[meta]

    def _take_gradient(self, parameter: Tensor) -> None:
        """Counts a new gradient, or adds it to the one that is there."""
        if self.keeps_gradients:
            parameter.grad = None
        elif parameter.grad is not None:
            self.live.add(parameter.grad, Part.GRADIENTS)

    def _take_masks(self, model, args, kwargs) -> None:
        for mask in tree_leaves((args, kwargs)):
            if isinstance(mask, TreeMask):
                for part in mask.masks or tree_leaves(mask.parts):
                    self.live.add(part, Part.ATTENTION)

    def optimizer_step(self) -> dict[str, int]:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(self.args)
        if self.device.type == "cuda" and "foreach" in inspect.signature(kind).parameters and not options.get("fused"):
            options["foreach"] = True  # PyTorch's choice on a GPU, which makes a number for each parameter at once
        with self.live:
            self.optimizer = kind(self.trainable, **options)
            for parameter in self.trainable:
                parameter.grad = torch.empty_like(parameter)
                self.live.add(parameter.grad, Part.GRADIENTS)
            self.optimizer.step()  # makes the state
            self.live.settle(Part.OPTIMIZER)
            self.live.since()
            self.optimizer.step()
            parts = self.live.since()
            self.kept = [parameter.grad for parameter in self.trainable if self.keeps_gradients]
            self.optimizer.zero_grad()
        return parts

    def look_for_hard_places(self, rows: Rows) -> None:
        """The pass that `fork_positions: entropy` makes before a rollout."""
        if self.args.fork_positions != "entropy" or not self.args.thinks:
            return
        tree = ThoughtTree(rows.tree.documents_BT, rows.tree.forks_BK[:, :0], rows.tree.branching)
        nodes_M = torch.arange(tree.documents_BT.numel())
        with self.live, self._autocast(), evaluating(self.model):
            self.engine(self.model, tree, torch.zeros_like(tree.documents_BT), HeadInputs(nodes_M, entropy=True))

    def rollout(self, rows: Rows, every_part: bool = False) -> dict[str, dict[str, int]]:
        """The pass over the text, and the last one over the thoughts that are drawn at a time, on the largest cache.

        Nothing for the replicated path: it keeps no cache, and its passes are shorter than the gradient pass.

        Args:
            every_part: draw all thoughts, for what is counted beside; else the first part of them, which is the largest.
        """
        branching, sampling, num_forks = rows.tree.branching, self.args.sampling(), rows.tree.num_forks
        if self.engine.name == "replicated" or not sampling.draws or not self.args.thinks:
            return {}
        depths = range(1, branching.max_length + branching.persistent)  # only text behind a thought reads its last token
        at_once = num_forks if branching.persistent or self.sharded else branching.forks_at_once(num_forks)
        tree = ThoughtTree(rows.tree.documents_BT, rows.tree.forks_BK, replace(branching, lookahead=1, blind=False))
        passes: list[tuple[str, Tensor, bool]] = [(Phase.TEXT, torch.arange(tree.trunk_length), False)]
        parts = torch.arange(num_forks).split(at_once) if depths else ()
        for part in parts if every_part else parts[:1]:
            *before, last = (tree.branch_nodes(depth).view(num_forks, -1)[part].flatten() for depth in depths)
            anew = bool(part[0] > 0)  # what was drawn before is forgotten
            passes += [("between", torch.cat(before), anew)] if before else []
            passes.append((Phase.THOUGHTS, last, anew and not before))
        phases: dict[str, dict[str, int]] = {}
        with self.live, self._autocast(), evaluating(self.model):
            tokens_BS = torch.zeros_like(tree.position_ids_BS)
            decode = self.engine.decoder(self.model)
            for name, nodes_Q, anew in passes:
                nodes_BQ = nodes_Q.expand(len(tokens_BS), -1)
                real_BQ, think_only = torch.ones_like(nodes_BQ, dtype=torch.bool), not (sampling.draw_stops or sampling.text)
                scored_BM = rows.tree.forks_BK if name == Phase.TEXT else torch.arange(nodes_BQ.shape[1]).expand_as(nodes_BQ)
                self.live.since()
                decode(tree, tokens_BS, nodes_BQ, real_BQ, scored_BM, think_only, keep=tree.trunk_length if anew else None)
                found = self.live.since()
                self.live.settle(Part.CACHE)
                # At the peak the larger cache is nearly made, and the smaller one nearly gone.
                grown = min(self.live.live[Part.CACHE] - found.get(Part.CACHE, 0), found[Part.WORKING])
                found |= {Part.CACHE: self.live.live[Part.CACHE], Part.WORKING: found[Part.WORKING] - grown}
                phases.setdefault(name, found)
        phases.pop("between", None)
        return phases

    def stays(self, rows: Rows, rollout: dict[str, dict[str, int]]) -> int:
        """The keys and values that are kept for the next rollout, whose passes are replayed on them (`TreeEngine.room`, for a process that has the model)."""
        if self.device.type != "cuda" or self.args.memory == "persistent" or self.args.thoughts == "text" or Phase.THOUGHTS not in rollout:
            return 0
        capacity = rows.tree.branching.num_decoded(rows.tree.trunk_length, rows.tree.num_forks)
        replayed = self.engine.can_replay(self.model, capacity, self.autocast_type or self.model.dtype)
        return rollout[Phase.THOUGHTS][Part.CACHE] if replayed else 0

    def gradient_pass(self, rows: Rows) -> dict[str, int]:
        args = self.args
        with self.live:
            self.live.since()
            scores = self._score(rows)
            self.live.settle(Part.ACTIVATIONS)
            loss = -scores.trunk_logps_BT.sum()
            if args.thinks:
                rewards = resolve_rewards(args.reward_funcs)
                loss = loss + thinking_loss(scores, rows.rollout, args, rewards, [1.0] * len(rewards), 1.0, first_id=self.vocabulary.first_id)[0]
            loss.backward()
            return self.live.since()

    def evaluation(self, rows: Rows) -> dict[str, int]:
        with self.live, evaluating(self.model):
            self.optimizer.zero_grad()
            self.kept = self.kept if self.live.gradient_share < 1 else []  # sharded ones stay
            self.live.since()
            self._score(rows, training=False)
            return self.live.since()

    def _score(self, rows: Rows, training: bool = True) -> TreeScores:
        """The trainer's scores. The tree and its masks are real, and whatever a model makes is fake."""
        args, tree = self.args, rows.tree
        self.live.square = (tree.num_nodes, tree.num_nodes)

        def run(passes):
            with self._autocast():
                return self.engine.run(self.model, tree, torch.zeros_like(tree.position_ids_BS), passes)

        labels_BT = rows.labels_BT if training else tree.evaluated_labels(rows.labels_BT)
        return score_tree(run, tree, labels_BT, rows.rollout, self.vocabulary, **args.scoring(training))

    def _autocast(self):
        return torch.autocast("cpu", self.autocast_type, enabled=self.autocast_type is not None)
