"""Every import of a private or semi-public name of TRL, PEFT or transformers, and nothing else of them elsewhere."""

from typing import Any

from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import RepeatSampler, create_model_from_path, disable_dropout_in_model

__all__ = [
    "DataCollatorForLanguageModeling",
    "RepeatSampler",
    "create_model_from_path",
    "disable_dropout_in_model",
    "trainable_token_rows",
]


def trainable_token_rows(lm_head: Any) -> tuple[Tensor, Tensor | None]:
    """The LM head's weight, and the rows that PEFT trains beside it (`trainable_token_indices`), if any.

    PEFT keeps trained rows as a small parameter of their own; the large weight stays frozen and is read as it is.
    """
    layer = getattr(lm_head, "token_adapter", None)
    if layer is None:
        return lm_head.weight, None
    weight = layer.get_base_layer().weight
    if layer.disable_adapters or not lm_head.active_adapters:
        return weight, None
    return weight, layer.trainable_tokens_delta[lm_head.active_adapters[0]]
