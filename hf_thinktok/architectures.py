"""What differs between architectures: the step from hidden states to logits, and the form of an attention mask."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .attention import See, TreeMask, additive
from .flex import Blocks
from .models import dropouts

# Types in which FlexAttention is quick.
HALF = {torch.bfloat16, torch.float16}


def check_supported(config: PretrainedConfig) -> None:
    """Refuses what is not a decoder-only text model.

    Raises:
        ValueError: encoder-decoder models, vision and audio models, and models without a causal LM head.
    """
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; thinking tokens need a decoder-only causal LM such as Llama, Qwen or GPT-2.")
    if any(getattr(config, part, None) is not None for part in ("vision_config", "audio_config")):
        raise ValueError(f"{name} reads images or audio; thinking tokens are trained on text alone: give the text model (`AutoModelForCausalLM`).")
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "auto_map" not in config.to_dict():
        raise ValueError(f"{name} has no causal LM head in transformers (`AutoModelForCausalLM` does not know it).")


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """A causal LM without its LM head."""
    return model.model if model.base_model is model else model.base_model  # Llama 4's text model is no `base_model` of its causal LM


@dataclass(frozen=True)
class LogitTransform:
    """What an architecture does to `hidden @ weight.T` before the softmax: a scale (Cohere, Granite), then a soft cap (Gemma 2)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_config(cls, config) -> "LogitTransform":
        """Reads the scale and cap under the names that architectures give them. The self-check compares the result with the model's own logits."""
        text = config.get_text_config()
        scale = 1.0
        for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
            if isinstance(value := getattr(text, name, None), (int, float)):
                scale = float(value)
                break
        else:
            if isinstance(value := getattr(text, "logits_scaling", None), (int, float)):
                scale = value if text.model_type == "hyperclovax" else 1 / value
        caps = (getattr(text, name, None) for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"))
        return cls(scale, next((cap for cap in caps if cap is not None), None))

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale if self.scale != 1 else logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, logits: Tensor) -> Tensor | float | None:
        """The derivative at transformed `logits`; `None` for 1."""
        if self.softcap is not None:
            return (1 - (logits / self.softcap).square_()).mul_(self.scale)
        return self.scale if self.scale != 1 else None


def counts_places(config: PretrainedConfig) -> bool:
    """Whether attention depends on places in the row whatever the positions are (GPT-Neo's windows, Llama 4's temperature).

    It would do so from some number of nodes on. The self-check's tree may be smaller than that, and the run's may not.
    """
    text = config.get_text_config()
    return text.model_type == "gpt_neo" or bool(getattr(text, "attn_temperature_tuning", False))


def drops_attention(model) -> bool:
    """Whether attention drops some of its weights while it is trained: the config says so, and dropout was not turned off since."""
    says = vars(model.config.get_text_config()).items()
    return any("att" in name and "drop" in name and value for name, value in says) and bool(dropouts(model))


def attention_inputs(
    see: See,
    query_positions_BQ: Tensor,
    key_positions_BC: Tensor,
    config: PretrainedConfig,
    dtype: torch.dtype,
    run_length: int | None = None,
    flex: bool = False,
) -> Tensor | dict[str, Tensor]:
    """The `attention_mask` argument that makes an architecture see exactly what it should, within its own windows.

    Args:
        see: which keys the queries of a slice see, `[B, q, C]` bool.
        query_positions_BQ, key_positions_BC: `position_ids` of queries and keys; windows are distances between them.
        dtype: that of the queries.
        run_length: attend in blocks of so many nodes, where attention is sdpa's.
        flex: if there are more of them and they are of 16 bits, attend by FlexAttention.

    Returns:
        A `[B, 1, Q, C]` mask, or a dict of them by layer type where layers differ: a `TreeMask`, or one to add to scores. A bool mask would be made
        additive by sdpa in every layer, and eager silently misreads it.
    """
    text = config.get_text_config()

    def layer_sees(layer_type: str, queries: slice) -> Tensor:
        seen_BqC, position_Bq1, position_B1C = see(queries), query_positions_BQ[:, queries, None], key_positions_BC[:, None, :]
        if layer_type == "sliding_attention":
            return seen_BqC & (position_Bq1 - position_B1C < text.sliding_window)
        if layer_type == "chunked_attention":
            return seen_BqC & (position_Bq1 // text.attention_chunk_size == position_B1C // text.attention_chunk_size)
        return seen_BqC

    def form(layer_type: str) -> Tensor:
        sees = functools.partial(layer_sees, layer_type)
        if run_length is None or text._attn_implementation == "eager":
            return additive(sees(slice(None))[:, None], dtype)
        shape = (*query_positions_BQ.shape, key_positions_BC.shape[1])
        if flex and shape[2] > run_length and dtype in HALF:
            return TreeMask.of_blocks(Blocks.of(sees, shape, run_length), shape, dtype)
        return TreeMask.of(sees, shape, run_length, dtype)

    kinds = set(getattr(text, "layer_types", None) or ())
    if kinds & {"sliding_attention", "chunked_attention"}:
        return {kind: form(kind) for kind in kinds}
    windowed = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True) and not kinds
    return form("sliding_attention" if windowed else "full_attention")
