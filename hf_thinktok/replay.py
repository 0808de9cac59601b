"""Decoding passes as CUDA graphs: captured once, replayed in every step that has the same shapes.

A pass over few nodes keeps the host longer, which launches its thousand kernels one by one, than the device. Graphs need everything to be where it was,
so keys and values have a place of fixed size.
"""

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from transformers.cache_utils import Cache, DynamicLayer

from .head import HeadOutputs

logger = logging.getLogger(__name__)

# Rooms that are larger, together, than this part of the device's memory are not kept from step to step, and nothing is captured in those to come.
LARGEST_SHARE = 1 / 16

# Nodes up to which a pass keeps the host longer than the device. A graph keeps the working memory of its pass for itself.
MOST_NODES = 4096

# Part of their standard deviation by which replayed scores may differ. Seen: none.
TOLERANCE = 1e-2

Run = Callable[[dict[str, Any]], HeadOutputs]


@dataclass
class Places:
    """Where a pass puts keys and values: `places_Q` in rows for `capacity` nodes. Layers know it and not their room, which goes when nobody else has it."""

    capacity: int
    places_Q: Tensor = field(init=False)


class _Layer(DynamicLayer):
    """Keys and values of one layer, each at its place in a row of fixed length."""

    def __init__(self, places: Places):
        super().__init__()
        self.places = places

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        # Zeros: what no node sees still takes part, times 0.
        self.keys, self.values = (states.new_zeros(*states.shape[:2], self.places.capacity, states.shape[-1]) for states in (key_states, value_states))

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.index_copy_(2, self.places.places_Q, key_states)
        self.values.index_copy_(2, self.places.places_Q, value_states)
        return self.keys, self.values


class Room:
    """A KV cache of fixed size, and the passes that were captured on it.

    Attributes:
        places: of the nodes of the present pass, and how many nodes of a row there is place for.
        refused: whether a pass could not be captured: then a cache that grows is quicker.
    """

    def __init__(self, capacity: int):
        self.places = Places(capacity)
        self.cache = Cache(layer_class_to_replicate=functools.partial(_Layer, self.places))
        self._times: Counter = Counter()
        self._replays: dict[Any, Run] = {}
        self.refused = False

    def clear(self) -> None:
        """Forgets keys and values: places that no node sees take part, times 0, and what is not finite there would stay for ever."""
        for layer in self.cache.layers:
            if layer.keys is not None:
                layer.keys.zero_()
                layer.values.zero_()

    @property
    def nbytes(self) -> int:
        return sum(states.nbytes for layer in self.cache.layers for states in (layer.keys, layer.values) if states is not None)

    def __call__(self, run: Run, inputs: dict[str, Any], num_nodes: int, kind: Any = None) -> HeadOutputs:
        """`run(inputs)`, replayed where it can be.

        Args:
            run: depends on tensors in `inputs` alone, and on what never changes.
            kind: what else it depends on.
        """
        key = (kind, *((leaf.shape, leaf.dtype) for leaf in tree_leaves(inputs)))
        if key in self._replays:
            return self._replays[key](inputs)
        out = run(inputs)
        self._times[key] += 1
        if self._times[key] == 2 and num_nodes <= MOST_NODES:
            try:
                replay = capture(run, inputs)
                if not _close(replay(inputs).think_logits_MN, out.think_logits_MN):
                    raise RuntimeError("it gave other scores")
                self._replays[key] = replay
            except Exception as error:  # whatever a model does that no graph can: wait for the device, draw from its own generator
                what = " ".join(str(error.__context__ or error).split())[:300]  # to end a capture that failed is an error of its own
                logger.warning("A decoding pass of %d nodes could not be made a CUDA graph (%s): passes are launched kernel by kernel.", num_nodes, what)
                self.refused = True
                return run(inputs)  # over what a replay may have left
        return out


class Rooms:
    """The rooms of rollouts, which are kept from one to the next as long as they serve: those of the latest two kinds, as a step with a search has two."""

    def __init__(self) -> None:
        self._rooms: dict[Hashable, Room | None] = {}  # the latest kind last; its first rollout has none
        self._too_large: set[Hashable] = set()
        self._refused = False

    @property
    def nbytes(self) -> int:
        """Memory that stays in use between rollouts."""
        return sum(room.nbytes for room in self._rooms.values() if room is not None)

    @contextlib.contextmanager
    def take(self, kind: Hashable, capacity: int, device: torch.device) -> Iterator[Room | None]:
        """A room for the passes of one rollout; none where neither of the latest two was of this kind, where it could not be kept, and where passes cannot be
        captured.

        Args:
            kind: what has to be as it was for passes to be the same.
        """
        came_before, room = kind in self._rooms, self._rooms.pop(kind, None)
        self._rooms = dict([*self._rooms.items()][-1:]) | {kind: None}
        if self._refused or kind in self._too_large or not came_before:  # rows of other lengths in every step would all be a first time
            yield None
            return
        room = room or Room(capacity)
        room.clear()
        yield room
        self._refused = room.refused
        if room.refused:
            self._rooms = {}
        elif _stays(room.nbytes + self.nbytes, device):
            self._rooms[kind] = room
        else:
            self._too_large.add(kind)


def _stays(nbytes: int, device: torch.device) -> bool:
    """Whether so much memory may stay in use between rollouts."""
    return device.type != "cuda" or nbytes <= LARGEST_SHARE * torch.cuda.get_device_properties(device).total_memory


def _close(found: Tensor, wanted: Tensor) -> bool:
    return bool(((found - wanted).abs().amax() <= TOLERANCE * wanted.std().clamp(min=1e-3)) | ~wanted.isfinite().all())


def capture(run: Run, inputs: dict[str, Any]) -> Run:
    """`run` as a CUDA graph for inputs of these shapes.

    Raises:
        RuntimeError: it waits for the device, or does something else that no graph can.
    """
    leaves, form = tree_flatten(inputs)
    held = [leaf.clone() for leaf in leaves]
    with _waiting_is_an_error():  # a capture that fails leaves the allocator of some versions of PyTorch in pieces
        run(tree_unflatten(held, form))
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = run(tree_unflatten(held, form))
    finally:
        torch.cuda.set_stream(stream)  # where a capture fails PyTorch stays in that of the capture

    def replay(inputs: dict[str, Any]) -> HeadOutputs:
        for place, leaf in zip(held, tree_leaves(inputs), strict=True):
            place.copy_(leaf)
        graph.replay()
        return out._replace(**{name: value.clone() for name, value in out._asdict().items() if value is not None})

    return replay


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
