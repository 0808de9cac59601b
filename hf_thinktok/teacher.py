"""A frozen LM that supervises text: what a student's own text should have gone on with.

With a teacher the label of every position is drawn from the teacher's prediction there. The cross-entropy of such labels is, in expectation, that of
the teacher's whole distribution, and a thought is rewarded by how likely it makes what the teacher says next. The teacher reads real tokens only.

With `rollout: free` the text behind a short prompt is the student's own: it goes on from the model's full softmax, thoughts included, which are then
taken out. So the student is taught where it goes by itself, as in on-policy distillation (GKD, https://huggingface.co/papers/2306.13649, with the
teacher's samples in place of its logits, so the forward KL divergence).

Shape suffixes as in tree.py; P prompt tokens.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from .distributed import embedding_rows
from .head import HeadInputs, attach_head
from .models import evaluating
from .tokens import ThinkingVocabulary
from .tree import document_positions


def real_tokens_only(model: PreTrainedModel, vocabulary: ThinkingVocabulary) -> PreTrainedModel:
    """The teacher, frozen, able to draw tokens of the student's real vocabulary.

    Raises:
        ValueError: it has fewer rows than the student has real tokens, or is no model of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"The teacher is a {type(model).__name__}; it must be a plain transformers model.")
    if (rows := embedding_rows(model)) < vocabulary.num_real:
        raise ValueError(
            f"The teacher has {rows} tokens and the model {vocabulary.num_real} real ones: it must be a model of the same family, with the same tokenizer."
        )
    attach_head(model, ThinkingVocabulary(vocabulary.num_real, 0, vocabulary.num_real))
    return model.requires_grad_(False)


def taught(teacher, inputs: dict[str, Any], vocabulary: ThinkingVocabulary, generator: torch.Generator) -> dict[str, Any]:
    """A batch whose labels are drawn from the teacher's predictions, wherever there was a label. Each document is a row of its own to the teacher, which
    reads the first token in place of one that it has not: the guard, should a text contain it."""
    tokens_BT, documents_BT = inputs["input_ids"], inputs["documents"]
    tokens_BT = tokens_BT.where(tokens_BT < vocabulary.num_real, 0)
    there_BT, place_BT = documents_BT >= 0, document_positions(documents_BT)
    row_BT = ((there_BT & (place_BT == 0)).flatten().cumsum(0) - 1).view_as(tokens_BT)
    rows_M, places_M = row_BT[there_BT], place_BT[there_BT]
    # At least one row and place: every rank makes as many passes.
    sizes = torch.stack([row_BT.max(), place_BT.where(there_BT, 0).max()]).clamp(min=0) + 1
    tokens_RP = tokens_BT.new_zeros(sizes.tolist()).index_put((rows_M, places_M), tokens_BT[there_BT])
    nodes_M = rows_M * tokens_RP.shape[1] + places_M
    with evaluating(teacher):
        drawn_M = teacher(input_ids=tokens_RP, use_cache=False, head=HeadInputs(nodes_M, draw=generator)).drawn_M
    drawn_BT = torch.zeros_like(tokens_BT).masked_scatter(there_BT, drawn_M)
    return inputs | {"labels": torch.where((inputs["labels"] >= 0) & (place_BT > 0), drawn_BT.roll(1, 1), -100)}


def own_text(
    model, inputs: dict[str, Any], prompt_length: int, vocabulary: ThinkingVocabulary, end_id: int | None, generator: torch.Generator
) -> dict[str, Any]:
    """A batch whose rows go on as the model itself would write, without the thoughts it had meanwhile.

    A row stays as long as it was, or becomes shorter where the model thinks or ends it, and has labels where it had some.

    Args:
        model: not wrapped by a launcher.
        prompt_length: tokens of each row that are kept; fewer where a row of the batch is shorter.
        end_id: ends a text, where the tokenizer has such a token.
    """
    tokens_BT, there_BT = inputs["input_ids"], inputs["documents"] >= 0
    row_length = tokens_BT.shape[1]
    if row_length == 1:
        return inputs  # there is nothing to write
    prompt_BP = tokens_BT[:, : max(1, min(prompt_length, int(there_BT.sum(1).min()), row_length - 1))]
    on_cpu = prompt_BP.device.type == "cpu"
    devices, kind = ([], "cuda") if on_cpu else ([prompt_BP.device], prompt_BP.device.type)
    with evaluating(model), _plain_sampling(model), torch.random.fork_rng(devices, device_type=kind):
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator, device=generator.device)))
        written_BT = model.generate(
            input_ids=prompt_BP,
            attention_mask=torch.ones_like(prompt_BP),
            do_sample=True,
            max_new_tokens=row_length - prompt_BP.shape[1],
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=vocabulary.guard_id,  # no text contains it
            eos_token_id=end_id,
        )
    written_BT = torch.nn.functional.pad(written_BT, (0, row_length - written_BT.shape[1]), value=vocabulary.guard_id)
    real_BT = written_BT < vocabulary.num_real
    order_BT = real_BT.int().argsort(dim=1, descending=True, stable=True)  # thoughts and padding move behind the text
    text_BT = written_BT.gather(1, order_BT)
    real_BT = real_BT.gather(1, order_BT) & there_BT
    text_BT = text_BT.where(real_BT, 0)
    labels_BT = text_BT.where(real_BT & (inputs["labels"] >= 0), -100)
    return inputs | {"input_ids": text_BT, "labels": labels_BT, "documents": real_BT.long() - 1, "attention_mask": real_BT.long()}


@contextlib.contextmanager
def _plain_sampling(model) -> Iterator[None]:
    """Generation from the model's own distribution, whatever its generation config would make of it."""
    models = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    before = [one.generation_config for one in models]
    try:
        for one in models:
            one.generation_config = GenerationConfig(suppress_tokens=before[0].suppress_tokens)
        yield
    finally:
        for one, config in zip(models, before, strict=True):
            one.generation_config = config
