"""Running a model on a ThoughtTree: all nodes in one packed pass where its attention allows, else every path as an ordinary row.

Which of the two a model takes is measured, once, on the model itself (`choose_engine`). A model whose attention ignores a tree's mask (state-space
layers, convolutions, alibi, some windows) leaks one thought into another without any error, so nothing is taken on trust.

Shape suffixes as in tree.py; M scored nodes.
"""

import contextlib
import copy
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from . import flex
from .architectures import HALF, attention_inputs, counts_places, drops_attention
from .attention import RUN_LENGTH_ELSEWHERE, See, run_length
from .decoding import CachedDecoder, Decoder, unjudged
from .distributed import is_sharded
from .errors import first_line
from .head import Head, HeadInputs, HeadOutputs, ThoughtInputs, attach_head
from .models import cast_at_every_use, evaluating, fits_in_fp32, longest_row, products_in, unwrapped
from .peft import SPEAKER
from .replay import Room, Rooms
from .tokens import ThinkingVocabulary
from .tree import Branching, ThoughtTree

logger = logging.getLogger(__name__)

# Differences in units of the logits' standard deviation, fp32. Measured over about 60 families: at most 3.3e-6 where a path is exact,
# at least 2.9e-3 where it is not.
TOLERANCE = 1e-4
# Standard deviation of logits that gaps are measured in at least: log-probabilities near -11 are rounded by 1e-6, which nearly equal logits may differ by.
SMALLEST_SPREAD = 0.05
# The check's rows are as long as the run's, with fewer branches: what matters is distance, and who must not be seen.
PROBE_FORKS = 4
PROBE_LOOKAHEAD = 16
PROBE_TEXT = 256

# Devices whose passes can be replayed.
REPLAYED = {"cuda"}


class Pass(NamedTuple):
    """One pass over nodes of a tree.

    Args:
        head: what to score, in flat indices of `[B, S]`; for a list a list comes back.
        nodes_Q: run no more than these nodes, ascending, where that is possible. With each of them come all its ancestors.
        speaks: run the second model, or adapter, of `policies: split`.
    """

    head: Head
    nodes_Q: Tensor | None = None
    speaks: bool = False


class _Engine:
    """A pass over a tree: what the two engines share. How nodes become a model's input is each one's `_layout`.

    Attributes:
        generality: what runs a model exactly does so under an engine of more as well.
        dtype: that in which a launcher has the model compute, where its weights do not say so.
    """

    dtype: torch.dtype | None = None

    def can_replay(self, model, capacity: int, dtype: torch.dtype) -> bool:
        """Whether a rollout's passes over so many nodes of a row can be replayed, where there is a device for it."""
        return False

    def forks_at_once(self, model, branching: Branching, num_forks: int) -> int:
        """At so many forks of a row a rollout draws thoughts at a time."""
        return 1 if branching.persistent else num_forks

    @contextlib.contextmanager
    def room(self, model, batch: int, capacity: int) -> Iterator[Room | None]:
        """A place for the keys and values of a rollout's passes, where they can be replayed; see `hf_thinktok.replay`.

        Args:
            capacity: nodes of a row that the passes will have.
        """
        yield None

    def __call__(
        self,
        model,
        tree: ThoughtTree,
        tokens_BS: Tensor,
        head: Head,
        nodes_Q: Tensor | None = None,
        thoughts: ThoughtInputs | None = None,
    ) -> Any:
        """Scores nodes of a tree; see `Pass`."""
        return self.run(model, tree, tokens_BS, [Pass(head, nodes_Q)], thoughts)[0]

    def run(self, model, tree: ThoughtTree, tokens_BS: Tensor, passes: list[Pass], thoughts: ThoughtInputs | None = None) -> list[Any]:
        """What each pass gives. All passes are one call of the model: a launcher that wraps it synchronises gradients after every call.

        Args:
            thoughts: what nodes read in place of their tokens.
        """
        first, *others = (self._inputs(model, tree, tokens_BS, one, thoughts) for one in passes)
        return model(**first, then=others) if others else [model(**first)]

    def _inputs(self, model, tree: ThoughtTree, tokens_BS: Tensor, one: Pass, thoughts: ThoughtInputs | None) -> dict[str, Any]:
        picked, places_M, inputs = _as_rows(tree) if tree.is_text(one.nodes_Q) else self._layout(model, tree, one.nodes_Q, one.speaks)

        def moved(head):
            return replace(head, nodes_M=places_M[head.nodes_M])

        head = [moved(part) for part in one.head] if isinstance(one.head, Sequence) else moved(one.head)
        thoughts = None if thoughts is None else replace(thoughts, index_BS=thoughts.index_BS[picked])
        return {"input_ids": tokens_BS[picked], "use_cache": False, "head": head, "speaks": one.speaks, "thoughts": thoughts, **inputs}

    def _layout(self, model, tree: ThoughtTree, nodes_Q: Tensor | None, speaks: bool) -> tuple[tuple, Tensor, dict[str, Any]]:
        """Which nodes make up the model's rows (an index into `[B, S]`), where each node is in them (flat), and what else the model is told."""
        raise NotImplementedError

    def _dtype(self, model) -> torch.dtype:
        """That of the queries: a mask of another one is refused by some of PyTorch's GPU kernels, or copied in every layer."""
        device = unwrapped(model).device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.dtype or unwrapped(model).dtype


def _as_rows(tree: ThoughtTree) -> tuple[tuple, Tensor, dict[str, Any]]:
    """The layout of a text alone: what ordinary rows are to any model, without a mask, which takes a kernel of its own and memory."""
    return (slice(None),), torch.arange(tree.position_ids_BS.numel(), device=tree.position_ids_BS.device), {}


class TreeEngine(_Engine):
    """The packed tree: one pass over all nodes under a 4D mask, and lockstep decoding on one KV cache.

    Args:
        run_length: attend in blocks of so many nodes (`hf_thinktok.attention`); `None` for a plain mask over all.
        flex: in FlexAttention's, where more nodes are seen.
    """

    name = "tree"

    @property
    def generality(self) -> int:
        return 0 if self.flex else 1 if self.run_length else 2

    def __init__(self, run_length: int | None = None, flex: bool = False):
        self.run_length, self.flex = run_length, flex
        self._rooms = Rooms()

    @property
    def kept_bytes(self) -> int:
        """Memory that stays in use between steps."""
        return self._rooms.nbytes

    def _layout(self, model, tree: ThoughtTree, nodes_Q: Tensor | None, speaks: bool) -> tuple[tuple, Tensor, dict[str, Any]]:
        every_S = torch.arange(tree.num_nodes, device=tree.position_ids_BS.device)
        nodes_Q = every_S if nodes_Q is None else nodes_Q
        rows_B1 = torch.arange(len(tree.position_ids_BS), device=nodes_Q.device)[:, None]
        place_S = torch.zeros_like(every_S).scatter_(0, nodes_Q, every_S[: len(nodes_Q)])
        nodes_BQ, positions_BQ = nodes_Q.expand(len(rows_B1), -1), tree.position_ids_BS[:, nodes_Q]

        def see(queries: slice) -> Tensor:
            return tree.visible(nodes_BQ[:, queries], nodes_BQ)

        mask = self._mask(model, see, positions_BQ, positions_BQ, self.flex, speaks)
        places_M = (rows_B1 * len(nodes_Q) + place_S).flatten()
        return (slice(None), nodes_Q), places_M, {"attention_mask": mask, "position_ids": positions_BQ}

    def _mask(self, model, see: See, query_positions_BQ: Tensor, key_positions_BC: Tensor, flex: bool, speaks: bool = False) -> Tensor | dict[str, Tensor]:
        return attention_inputs(see, query_positions_BQ, key_positions_BC, _config(model, speaks), self._dtype(model), self.run_length, flex)

    def forks_at_once(self, model, branching: Branching, num_forks: int) -> int:
        # Where every pass gathers layers all processes have to make as many, however many forks their rows have.
        return super().forks_at_once(model, branching, num_forks) if is_sharded(model) else branching.forks_at_once(num_forks)

    def can_replay(self, model, capacity: int, dtype: torch.dtype) -> bool:
        # Not several runs, whose stretches differ from step to step.
        in_one_mask = capacity <= (self.run_length or RUN_LENGTH_ELSEWHERE) or (self.flex and dtype in HALF)
        return in_one_mask and _can_be_captured(model)

    @contextlib.contextmanager
    def room(self, model, batch: int, capacity: int) -> Iterator[Room | None]:
        local, dtype = _local(model), self._dtype(model)
        if local.device.type not in REPLAYED or not self.can_replay(local, capacity, dtype):
            yield None
            return
        capacity = -(-capacity // 8) * 8  # so that a copied mask's rows are where kernels want them
        weights = (parameter.data_ptr() for parameter in local.parameters())
        kind = (batch, capacity, dtype, *weights)
        # A graph would read copies of autocast's that are gone when it is replayed, and keep those that it makes.
        with self._rooms.take(kind, capacity, local.device) as room, contextlib.nullcontext() if room is None else cast_at_every_use(local):
            yield room

    def decoder(self, model, room: Room | None = None) -> Decoder:
        # A call of FlexAttention takes the host several times as long as one of a run. Of a replay it is none.
        mask_of = functools.partial(self._mask, model, flex=self.flex and room is not None)
        # DDP's own forward may broadcast buffers, and whether passes are replayed is each process's affair.
        return CachedDecoder(_local(model), mask_of, room)


class ReplicatedEngine(_Engine):
    """Every path of the tree as an ordinary row: exact for any causal model, at the cost of the prefix once per thought. All nodes are run."""

    name, generality = "replicated", 3

    def _layout(self, model, tree: ThoughtTree, nodes_Q: Tensor | None, speaks: bool) -> tuple[tuple, Tensor, dict[str, Any]]:
        rows_R, nodes_RP, where_BS = tree.paths()
        return (rows_R[:, None], nodes_RP.clamp(min=0)), where_BS.flatten(), {}

    def decoder(self, model, room: Room | None = None) -> Decoder:
        def decode(tree, tokens_BS, nodes_BQ, real_BQ, scored_BM, think_only=False, draw=None, keep=None) -> HeadOutputs:
            return self(model, tree, tokens_BS, unjudged(nodes_BQ.gather(1, scored_BM), tree.num_nodes, think_only, draw))

        return decode


Engine = TreeEngine | ReplicatedEngine


def _local(model):
    """A model as this process alone has it, which without gradients is all there is to DDP."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _can_be_captured(model) -> bool:
    if not isinstance(model, (PreTrainedModel, PeftModel)) or is_sharded(model):
        return False
    if getattr(model, "is_loaded_in_8bit", False):  # its products wait for the device in every layer
        return False
    # An adapter's passes are captured with embeddings for ids, and some models' layers read ids besides.
    return not isinstance(model, PeftModel) or not getattr(_config(model).get_text_config(), "hidden_size_per_layer_input", None)


def _config(model, speaks: bool = False):
    model = unwrapped(model)
    return (getattr(model, SPEAKER, model) if speaks else model).config


def choose_engine(
    model: PreTrainedModel,
    vocabulary: ThinkingVocabulary,
    branching: Branching,
    trunk_length: int,
    num_forks: int,
    wanted: str = "auto",
    whole_masks: bool = False,
    computes_in: torch.dtype | None = None,
) -> Engine:
    """Finds out how this model can run a tree of this size, with about six forward passes.

    Checked in fp32: the head gives the model's own log-probabilities, and later tokens change nothing before them, on the beginning of a row; and at the
    lengths of the training run nodes that the last branch must not see change nothing in it, the last branch equals the same tokens as an ordinary row, and
    cached decoding equals the packed pass. Where its weights cannot be made fp32 beside what is there, a small random model of its architecture is checked
    in its place.

    Args:
        model: with `attach_head` applied, not yet wrapped by a launcher.
        wanted: `auto`, or `tree` or `replicated` to insist.
        whole_masks: do not attend in blocks (`torch.compile` knows plain masks only).
        computes_in: the precision of its products, where its weights do not say so.

    Raises:
        ValueError: the head does not fit the architecture, the model is not causal, or `tree` is asked for and is not exact.
    """
    half = next((dtype for dtype in (computes_in, model.dtype) if dtype in HALF), torch.bfloat16)
    if not fits_in_fp32(model):
        model = small_twin(model, vocabulary, model.device)
    with evaluating(model), _in_fp32(model):
        probe = _Probe(model, vocabulary, branching, trunk_length, num_forks)
        if (gap := probe.head_gap()) > TOLERANCE:
            raise ValueError(
                f"{model.config.model_type} does more between its hidden states and its logits than scale, cap and bias: our scores differ "
                f"from its own by {gap:.1e} standard deviations. This architecture is not supported."
            )
        if (gap := probe.future_gap()) > TOLERANCE:
            raise ValueError(
                f"{model.config.model_type} is not causal: later tokens change what is predicted before them, by {gap:.1e} standard deviations. "
                "Thinking tokens need a causal language model."
            )
        if wanted == "replicated":
            return ReplicatedEngine()
        # A model that does more with its mask than attend under it cannot take it in blocks.
        for length in (None,) if whole_masks else (run_length(model.device), None):
            reason = probe.why_not(TreeEngine(length and probe.run_length))
            if reason is None:
                if length is None and model.device.type == "cuda":
                    torch.backends.cuda.enable_cudnn_sdp(False)  # as `attention.KERNELS`, where the model itself attends under the mask
                nodes = trunk_length + num_forks * branching.num_generations * branching.width
                pays = length is not None and nodes > length and model.device.type == "cuda" and not drops_attention(model)
                return TreeEngine(length, flex=pays and probe.can_flex(half))
    if wanted == "tree":
        raise ValueError(
            f"engine=tree is not exact for {model.config.model_type} with attn_implementation={model.config._attn_implementation}: {reason}. "
            "Use engine=auto, or another attn_implementation."
        )
    logger.warning("%s cannot run a packed tree (%s): taking the replicated path, which is exact and slower.", model.config.model_type, reason)
    return ReplicatedEngine()


def small_twin(model: PreTrainedModel, vocabulary: ThinkingVocabulary, device: torch.device) -> PreTrainedModel:
    """A random model of the same architecture with as few layers as show every kind of them: what is checked where no process holds the whole model."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    kinds, layers = getattr(text, "layer_types", None) or [None], text.num_hidden_layers
    kept = min(layers, max(2, 1 + max(kinds.index(kind) for kind in set(kinds))))
    for name, value in vars(text).copy().items():
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:kept])
    text.num_hidden_layers = kept
    twin = type(model)(config).to(device=device, dtype=torch.float32)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)  # as it is initialised attention looks everywhere alike
    attach_head(twin, vocabulary)
    return twin


class _Probe:
    """A random tree on a model, and what must hold there."""

    def __init__(self, model, vocabulary: ThinkingVocabulary, branching: Branching, trunk_length: int, num_forks: int):
        self.model, self.vocabulary = model, vocabulary
        device = model.device
        generator = torch.Generator().manual_seed(0)
        branching = replace(branching, num_generations=2, lookahead=min(branching.lookahead, PROBE_LOOKAHEAD))
        num_forks = min(num_forks, PROBE_FORKS)
        stays = (num_forks - 1) * branching.max_length * branching.persistent  # of the thoughts before the last
        trunk_length = max(2, min(trunk_length, longest_row(model) - branching.width - stays))
        num_forks = max(1, min(num_forks, trunk_length - 1))
        forks = torch.linspace(0, trunk_length - 2, num_forks).long().unique()[None].to(device)
        self.tree = ThoughtTree(torch.zeros(1, trunk_length, dtype=torch.long, device=device), forks, branching)
        self.tokens_BT = torch.randint(vocabulary.num_real, (1, trunk_length), generator=generator).to(device)
        self.text_BT = self.tokens_BT[:, :PROBE_TEXT]
        shape = (1, forks.shape[1], branching.num_generations, branching.max_length)
        self.thoughts_BKGL = (torch.randint(vocabulary.num_tokens, shape, generator=generator) + vocabulary.first_id).to(device)
        self.tokens_BS = self.tree.tokens(self.tokens_BT, self.thoughts_BKGL)
        self.last = torch.arange(self.tree.num_nodes - branching.width, self.tree.num_nodes, device=device)
        self.last = self.last[self.tree.valid_BS[0, self.last]]  # a row that ends soon after its last fork cuts the lookahead short
        self.targets = torch.randint(vocabulary.num_real, (len(self.last),), generator=generator).to(device)
        self.trunk_targets = self.targets[torch.arange(trunk_length, device=device) % len(self.targets)]

    @property
    def run_length(self) -> int:
        """So short that attention here is in several blocks, as it is in the run."""
        return -(-self.tree.num_nodes // 4)

    def why_not(self, engine: TreeEngine) -> str | None:
        """What is wrong with running trees of this model so."""
        if counts_places(self.model.config):
            return "its attention counts places in the row, not positions"
        try:
            self.engine, self._packed = engine, self._scores(self.tokens_BS, engine)
            gaps = {"a hidden sibling changes it": self.leak_gap, "it differs from an ordinary row": self.path_gap, "cached decoding differs": self.cache_gap}
            return next((f"{text} by {gap:.1e} standard deviations" for text, check in gaps.items() if not (gap := check()) <= TOLERANCE), None)
        except Exception as error:  # any architecture may refuse a 4D mask, positions or a cache in its own way
            return f"{type(error).__name__}: {first_line(error)[:120]}"

    def can_flex(self, dtype: torch.dtype) -> bool:
        """Whether FlexAttention can be compiled for this model in 16 bits; it checks itself, here and not first within a checkpointed layer."""
        try:
            with torch.autocast(self.model.device.type, dtype):
                scores = self._scores(self.tokens_BS, TreeEngine(flex.BLOCK, flex=True))
            return bool(scores.isfinite().all())
        except Exception as error:  # no compiler, no room in a multiprocessor's memory, an odd head
            logger.info("FlexAttention cannot be used (%s): attending in runs of nodes.", first_line(error))
            return False

    def _scores(self, tokens_BS: Tensor, engine: TreeEngine) -> Tensor:
        """The last branch in the packed tree."""
        return self._columns(engine(self.model, self.tree, tokens_BS, HeadInputs(self.last, self.targets)))

    @staticmethod
    def _columns(out: HeadOutputs) -> Tensor:
        return torch.cat([out.target_logps_M[:, None], out.gate_logit_M[:, None], out.think_logits_MN], 1)

    def _gap(self, a: Tensor, b: Tensor) -> float:
        return ((a - b).abs().max() / self.scale).item()

    def _trunk(self, tokens_BT: Tensor) -> Tensor:
        """A text as an ordinary row."""
        nodes = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        return self._columns(self.model(input_ids=tokens_BT, use_cache=False, head=HeadInputs(nodes, self.trunk_targets[: len(nodes)])))

    @functools.cached_property
    def _plain(self) -> Tensor:
        return self._trunk(self.text_BT)

    def head_gap(self) -> float:
        """The head against the model's own logits, on the beginning of the trunk: of a long one they would take more than all else."""
        logits_TV = self.model(input_ids=self.text_BT, use_cache=False).logits[0].float()
        self.scale = logits_TV.std().clamp_min(SMALLEST_SPREAD)
        real, think = logits_TV[:, : self.vocabulary.num_real], logits_TV[:, self.vocabulary.first_id : self.vocabulary.guard_id]
        target = real.log_softmax(-1).gather(1, self.trunk_targets[: len(real), None])
        return self._gap(self._plain, torch.cat([target, (think.logsumexp(-1) - real.logsumexp(-1))[:, None], think], 1))

    def future_gap(self) -> float:
        """Changes the second half of that beginning, which the first half must not see.

        The median over places: in a mixture of experts rounding depends on who else is there, and may break a tie between two experts.
        """
        half = self.text_BT.shape[1] // 2
        other = torch.cat([self.text_BT[:, :half], (self.text_BT[:, half:] + 1) % self.vocabulary.num_real], 1)
        return ((self._trunk(other) - self._plain)[:half].abs().amax(-1).median() / self.scale).item()

    def leak_gap(self) -> float:
        """Changes every token that the last branch must not see."""
        hidden = ~self.tree.visible(self.last[None])[0].any(0)
        other = torch.where(hidden, (self.tokens_BS + 1) % self.vocabulary.num_real, self.tokens_BS)
        return self._gap(self._packed, self._scores(other, self.engine))

    def path_gap(self) -> float:
        """The last branch in the packed tree against the same tokens as ordinary rows."""
        _, nodes_RP, where_BS = self.tree.paths()
        where, longest = where_BS[0, self.last], nodes_RP.shape[1]
        paths, path = (where // longest).unique(return_inverse=True)
        tokens_RP = self.tokens_BS[0, nodes_RP[paths].clamp(min=0)]
        head = HeadInputs(path * longest + where % longest, self.targets)
        plain = self._columns(self.model(input_ids=tokens_RP, use_cache=False, head=head))
        return self._gap(self._packed, plain)

    def cache_gap(self) -> float:
        """The text first, then branches by depth on its cache, against the packed pass. Fork by fork where text sees the thoughts that stayed in it."""
        decode, tree, length = self.engine.decoder(self.model), self.tree, self.tree.branching.max_length
        turns = tree.forks_BK.T if tree.branching.persistent else tree.forks_BK[:, -1:]
        gathered: list[Tensor] = []
        done = -1
        for turn, end in enumerate(turns[:, 0].tolist()):
            last = turn == len(turns) - 1
            branches = slice(turn, turn + 1) if tree.branching.persistent else slice(None)
            depths = range(1, 1 + (len(self.last) if last else length))
            in_branches = [tree.branch_nodes(depth).view(tree.num_forks, -1)[branches].flatten() for depth in depths]
            for nodes in [torch.arange(done + 1, end + 1), *in_branches]:
                nodes_BQ = nodes.to(self.last)[None]
                scored_BM = torch.tensor([[nodes_BQ.shape[1] - 1]], device=self.last.device)
                out = decode(tree, self.tokens_BS, nodes_BQ, torch.ones_like(nodes_BQ, dtype=torch.bool), scored_BM)
                gathered.append(torch.cat([out.gate_logit_M[:, None], out.think_logits_MN], 1))
            done = end
        return self._gap(torch.cat(gathered[-len(self.last) :]), self._packed[:, 1:])


@contextlib.contextmanager
def _in_fp32(model) -> Iterator[None]:
    """fp32 weights and products for a while: the noise of bf16 (1e-2) and of TF32 would hide a leak.

    The way back is exact: each parameter gets its own type again, and buffers, which `float` replaces, are put back.
    """
    low = model.dtype != torch.float32
    types = [(parameter, parameter.dtype) for parameter in model.parameters() if low]
    buffers = [(module, dict(module._buffers)) for module in model.modules() if low]
    if low:
        model.float()
    try:
        with products_in("ieee", torch.backends.cuda.matmul):
            yield
    finally:
        for parameter, dtype in types:
            parameter.data = parameter.data.to(dtype)
        for module, own in buffers:
            module._buffers.update(own)
