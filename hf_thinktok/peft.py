"""Adapters that train thinking rows as well, and a second one that speaks."""

import copy
import os
from typing import Any

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedModel

from .tokens import ThinkingVocabulary

# The second model of `policies: split`, or the second adapter, and the folder it is saved in.
SPEAKER = "speaker"


def add_speaker(model: PeftModel, peft_config: Any) -> None:
    """A second adapter of the same shape. Both get gradients; the first one stays active."""
    model.add_adapter(SPEAKER, copy.deepcopy(peft_config))
    for name, parameter in model.named_parameters():
        if is_speaker(name):
            parameter.requires_grad_(True)


def is_speaker(parameter: str) -> bool:
    """Whether a parameter of this name belongs to the speaker, a model or an adapter."""
    return SPEAKER in parameter.split(".")


def load_adapters(model: PeftModel, folder: str) -> None:
    """The weights of both adapters, from where `save_pretrained` puts them."""
    for name in model.peft_config:
        weights = load_peft_weights(os.path.join(folder, SPEAKER) if name == SPEAKER else folder, device="cpu")
        set_peft_model_state_dict(model, weights, adapter_name=name)


def add_thinking_rows(peft_config: Any, model: PreTrainedModel, vocabulary: ThinkingVocabulary) -> Any:
    """A copy of a PEFT config that also trains the thinking rows of the input and output embedding; `None` stays `None`.

    Tied embeddings are named once; untied ones both, or PEFT would leave the LM head's rows untrained.
    """
    if peft_config is None:
        return None
    peft_config = copy.deepcopy(peft_config)
    ids = list(vocabulary.ids)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    wanted = {names[inputs]: ids} if inputs.weight is outputs.weight else {names[inputs]: ids, names[outputs]: ids}
    given = peft_config.trainable_token_indices or []
    given = set(given if isinstance(given, list) else (i for rows in given.values() for i in rows))
    if given - set(ids):
        raise ValueError(
            f"trainable_token_indices names other tokens ({sorted(given - set(ids))[:5]}): only thinking tokens can be trained beside an adapter. Leave it out."
        )
    peft_config.trainable_token_indices = wanted
    return peft_config
