"""What stands in for CUDA graphs where there is no such GPU."""

import contextlib
from collections.abc import Callable

from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def captured(run: Callable, inputs, capturing: contextlib.AbstractContextManager) -> Callable:
    """As `hf_thinktok.replay.capture`: runs the function again on the tensors of its capture, with other values in them."""
    leaves, form = tree_flatten(inputs)
    held = [leaf.clone() for leaf in leaves]
    with capturing:
        run(tree_unflatten(held, form))

    def replay(inputs):
        for place, leaf in zip(held, tree_leaves(inputs), strict=True):
            place.copy_(leaf)
        return run(tree_unflatten(held, form))

    return replay
