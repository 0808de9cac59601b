"""Scoring nodes while the tree still grows: the text first, then all branches by depth, on one KV cache.

Shape suffixes as in tree.py; M scored nodes.
"""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import DynamicCache

from .attention import See, TreeMask
from .head import Draw, HeadInputs, HeadOutputs
from .models import unwrapped
from .replay import Room
from .tree import ThoughtTree

Mask = Tensor | dict[str, Tensor]


class Decoder(Protocol):
    """Scores nodes while the tree still grows. Every call may read the nodes of earlier calls."""

    def __call__(
        self,
        tree: ThoughtTree,
        tokens_BS: Tensor,
        nodes_BQ: Tensor,
        real_BQ: Tensor,
        scored_BM: Tensor,
        think_only: bool = False,
        draw: Draw | None = None,
        keep: int | None = None,
    ) -> HeadOutputs:
        """Adds `nodes_BQ` (those marked in `real_BQ`; the rest is padding) and scores the nodes at the places `scored_BM` among them.

        Args:
            think_only: only the thinking logits are wanted.
            draw: draw the next real token of each.
            keep: so many nodes of earlier calls, the first ones, are all that is still wanted of them.
        """


class CachedDecoder:
    """The decoder of a packed tree.

    Args:
        mask_of: the model's mask of who sees whom, from that and the positions of queries and keys.
        room: keeps the keys and values, and replays passes; without it there is a cache that grows.
    """

    def __init__(self, model, mask_of: Callable[[See, Tensor, Tensor], Mask], room: Room | None = None):
        self.model, self.mask_of, self.room = model, mask_of, room
        self.cache = DynamicCache() if room is None else room.cache
        # Its name since transformers 5.24, and the one before.
        self.cache_name = "cache" if "cache" in inspect.signature(type(unwrapped(model)).forward).parameters else "past_key_values"
        self.columns_BC: Tensor | None = None  # the node of each place in the cache
        self.real_BC: Tensor | None = None
        self.done = 0

    def __call__(self, tree, tokens_BS, nodes_BQ, real_BQ, scored_BM, think_only=False, draw=None, keep=None) -> HeadOutputs:
        if keep is not None:
            self._forget(keep)
        self.columns_BC, self.real_BC = self._beside(self.columns_BC, nodes_BQ), self._beside(self.real_BC, real_BQ)
        places_Q = torch.arange(self.done, self.done + nodes_BQ.shape[1], device=nodes_BQ.device)
        self.done += nodes_BQ.shape[1]
        inputs = self._read(tokens_BS.gather(1, nodes_BQ)) | {"position_ids": tree.position_ids_BS.gather(1, nodes_BQ)}
        mask = self._mask(tree, nodes_BQ, places_Q)

        def run(scored_BM: Tensor, mask: Mask, **inputs: Tensor) -> HeadOutputs:
            head = unjudged(scored_BM, nodes_BQ.shape[1], think_only, draw)
            return self.model(**inputs, attention_mask=mask, use_cache=True, head=head, **{self.cache_name: self.cache})

        if self.room is None:
            return run(scored_BM, mask, **inputs)
        room = self.room

        def run_again(held: dict[str, Any]) -> HeadOutputs:
            room.places.places_Q = held["places_Q"]
            again = tree_map(lambda one, parts: one.made_again(parts) if isinstance(one, TreeMask) else parts, mask, held["parts"])
            return run(held["scored_BM"], again, **held["inputs"])

        parts = tree_map(lambda one: one.parts if isinstance(one, TreeMask) else one, mask)
        return room(run_again, {"inputs": inputs, "scored_BM": scored_BM, "places_Q": places_Q, "parts": parts}, nodes_BQ.numel(), think_only)

    def _forget(self, keep: int) -> None:
        """Others take the places behind the first ones."""
        assert self.columns_BC is not None
        assert self.real_BC is not None
        if self.room is None:
            self.cache.crop(keep - self.done)  # a negative number: so many fewer
            self.columns_BC, self.real_BC = self.columns_BC[:, :keep], self.real_BC[:, :keep]
        else:
            self.real_BC[:, keep:] = False
        self.done = keep

    def _read(self, ids_BQ: Tensor) -> dict[str, Tensor]:
        if self.room is None or not isinstance(self.model, PeftModel):
            return {"input_ids": ids_BQ}
        # PEFT finds an adapter's own rows by ids that it sends to the device at every call, which a graph cannot.
        return {"inputs_embeds": self.model.get_input_embeddings()(ids_BQ)}

    def _beside(self, before: Tensor | None, values: Tensor) -> Tensor:
        """The values at this pass's places beside those before; in a room there is a place for all that will come."""
        if self.room is None:
            return values if before is None else torch.cat([before, values], 1)
        before = values.new_zeros(len(values), self.room.places.capacity) if before is None else before
        before[:, self.done : self.done + values.shape[1]] = values
        return before

    def _mask(self, tree: ThoughtTree, nodes_BQ: Tensor, places_Q: Tensor) -> Mask:
        columns_BC, real_BC = self.columns_BC, self.real_BC
        assert columns_BC is not None
        assert real_BC is not None
        column_C = torch.arange(columns_BC.shape[1], device=nodes_BQ.device)

        def see(queries: slice) -> Tensor:
            itself_qC = places_Q[queries, None] == column_C
            return tree.visible(nodes_BQ[:, queries], columns_BC) & real_BC[:, None] | itself_qC

        return self.mask_of(see, *(tree.position_ids_BS.gather(1, nodes) for nodes in (nodes_BQ, columns_BC)))


def unjudged(scored_BM: Tensor, row_length: int, think_only: bool, draw: Draw | None) -> HeadInputs:
    """What to score at places in each row of nodes."""
    places_M = (scored_BM + torch.arange(len(scored_BM), device=scored_BM.device)[:, None] * row_length).flatten()
    return HeadInputs(places_M, spoken=0 if think_only else None, draw=draw)
