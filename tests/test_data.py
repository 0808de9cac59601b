"""What is made of a data set's rows before they are trained on, against TRL."""

import math
from types import SimpleNamespace

from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import SFTTrainer

from hf_thinktok.data import is_prepared

LABELS = st.lists(st.sampled_from([-100, 9]), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(labels=st.lists(LABELS, min_size=1, max_size=4), longest=st.sampled_from([None, 3, 6]), every_second=st.booleans())
def test_rows_that_are_left_alone_are_those_that_trl_would_leave(labels, longest, every_second):
    dataset = Dataset.from_dict({"input_ids": [[9] * len(row) for row in labels], "labels": labels})
    if every_second:  # of the table
        dataset = dataset.select(range(0, len(labels), 2))
    args = SimpleNamespace(max_length=longest, truncation_mode="keep_start", shuffle_dataset=False, dataset_num_proc=None)
    by_trl = SFTTrainer._prepare_dataset(SimpleNamespace(completion_only_loss=False), dataset, None, args, False, None, "train")
    assert is_prepared(dataset, args, packing=False) == (longest is not None and by_trl.to_list() == dataset.to_list())


def test_rows_with_labels_are_not_written_anew(make_trainer):
    rows = Dataset.from_dict({"input_ids": [[9, 10, 11 + row] for row in range(8)], "labels": [[-100, 10, 11 + row] for row in range(8)]})
    trainer = make_trainer(train_dataset=rows)
    assert trainer.train_dataset is rows
    trainer.train()
    assert math.isfinite(trainer.evaluate(rows)["eval_loss"])
    assert make_trainer(train_dataset=rows, max_length=2, num_forks=1).train_dataset["input_ids"][:] == [[9, 10]] * 8
    shuffled = make_trainer(train_dataset=rows, shuffle_dataset=True).train_dataset["labels"][:]
    assert shuffled != rows["labels"][:]
    assert sorted(shuffled) == rows["labels"][:]
    packed = make_trainer(train_dataset=rows, packing=True).train_dataset
    assert len(packed) == 1
    assert packed["seq_lengths"][0] == [3] * 8
