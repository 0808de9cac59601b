"""Where thoughts have room: the positions of a model, and rows that are longer or shorter than expected."""

import pytest
from datasets import Dataset
from models import CORPUS, tiny_model, tiny_tokenizer

from hf_thinktok import ThinkTokTrainer


@pytest.fixture
def forks_of(make_trainer, monkeypatch):
    """All places where a run thought, and how many tokens of their document stood before them."""

    def run(**options):
        seen = []
        original = ThinkTokTrainer._forks

        def watched(self, model, inputs, *args):
            forks_BK, documents_BT = original(self, model, inputs, *args), inputs["documents"]
            for row, fork in (forks_BK >= 0).nonzero().tolist():
                place = int(forks_BK[row, fork])
                document = documents_BT[row, place]
                seen.append((place, int((documents_BT[row, :place] == document).sum())))
            return forks_BK

        monkeypatch.setattr(ThinkTokTrainer, "_forks", watched)
        make_trainer(**options).train()
        return seen

    return run


def limited(positions: int, family: str = "llama"):
    return tiny_model(family, vocab_size=len(tiny_tokenizer()), **{"max_seq_len" if family == "mpt" else "max_position_embeddings": positions})


def test_long_rows_are_thought_in_to_their_end(forks_of):
    """Without max_length rows are as long as they are."""
    rows = Dataset.from_dict({"input_ids": [[5 + i % 40 for i in range(1500)]] * 2})
    seen = forks_of(train_dataset=rows, max_length=None, num_forks=16, model=limited(4096), max_steps=2, per_device_train_batch_size=1)
    assert max(place for place, _ in seen) > 1100


def test_a_document_s_place_counts_and_not_the_packed_row_s(forks_of):
    """Short documents in a row that is longer than the model's positions."""
    documents = Dataset.from_dict({"text": [text[:60] for text in CORPUS] * 8})
    seen = forks_of(train_dataset=documents, packing=True, max_length=192, num_forks=24, lookahead=2, stop="sampled", model=limited(64), max_steps=3)
    assert max(place for place, _ in seen) > 128


@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_no_thought_runs_out_of_positions(forks_of, family):
    rows = Dataset.from_dict({"input_ids": [[5 + i % 40 for i in range(60)]] * 2})
    seen = forks_of(
        train_dataset=rows, max_length=60, fork_positions="all", num_forks=16, lookahead=3, stop="sampled", max_think_length=8, model=limited(64, family),
        max_steps=1,
    )  # fmt: skip
    assert max(before for _, before in seen) == 64 - 8 - 3


@pytest.mark.parametrize("lookahead", [None, 4])
def test_a_row_without_room_for_thoughts_takes_none_from_the_others(forks_of, lookahead):
    """Of 64 positions a thought takes 4: a document of 63 tokens leaves too few for all that follows a thought, and those beside it do not care."""
    rows = Dataset.from_dict({"input_ids": [[5 + i % 40 for i in range(length)] for length in (8, 8, 63, 5)]})
    seen = forks_of(
        train_dataset=rows, max_length=None, num_forks=3, lookahead=lookahead, max_think_length=4, stop="sampled", model=limited(64), max_steps=1,
        per_device_train_batch_size=4,
    )  # fmt: skip
    assert len(seen) == (9 if lookahead is None else 12)
