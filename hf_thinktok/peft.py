"""Adapters that train thinking rows as well."""

import copy
from typing import Any

from transformers import PreTrainedModel

from .tokens import ThinkingVocabulary


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
