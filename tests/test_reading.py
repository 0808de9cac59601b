"""Thinking while a prompt is read: thoughts after markers stay in the text, for whatever comes later, and nothing has to judge them at once."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import tiny_tokenizer
from questions import batch_of, one_rollout

from hf_thinktok.answers import answer

MARKER = " ="


@pytest.fixture
def marker():
    (token,) = tiny_tokenizer()(MARKER, add_special_tokens=False)["input_ids"]
    return token


def steps(marker, counts, answers=1):
    """Rows of so many steps, three tokens and a marker each; one token after the last is the answer. There is a thought after each step but the last."""
    random, rows = np.random.default_rng(0), []
    for count in counts:
        ids, labels = [], []
        for _ in range(answers):
            for _ in range(count):
                ids += [*random.integers(100, 200, 3).tolist(), marker]
            labels += [-100] * (4 * count)
            ids.append(int(random.integers(100, 200)))
            labels.append(ids[-1])
        rows.append({"input_ids": ids, "labels": labels, "level": count, "think_length": ([1] * (count - 1) + [0]) * answers})
    return Dataset.from_list(rows)


@pytest.fixture
def reading(make_trainer, marker):
    """A trainer that thinks while it reads; `counts` are the steps of its rows."""

    def build(counts=(3, 3, 3, 3), answers=1, rows=None, **options):
        defaults = {"stop": "fixed", "memory": "persistent", "fork_positions": "markers", "fork_markers": [MARKER], "num_forks": 16, "max_think_length": 1}
        defaults |= {"lookahead": 5, "per_device_train_batch_size": 4, "num_generations": 2}
        return make_trainer(train_dataset=steps(marker, counts, answers) if rows is None else rows, **defaults | options)

    return build


def places_of(marker, ids):
    return [place for place, token in enumerate(ids) if token == marker]


def test_it_thinks_after_every_marker_of_the_prompt_but_where_the_data_says_none(reading, marker):
    trainer = reading(counts=(3, 2, 4, 1))
    rows = steps(marker, (3, 2, 4, 1))
    inputs, labels = batch_of(trainer, rows)
    rollout = one_rollout(trainer, inputs, labels)
    assert rollout.forks_BK.shape[1] == 3  # and no column that no row has a place for
    for row, forks, lengths in zip(rows, rollout.forks_BK.tolist(), rollout.lengths_BKG.tolist()):
        wanted = places_of(marker, row["input_ids"])[:-1]
        assert [fork for fork in forks if fork >= 0] == wanted
        assert all(length == [1, 1] for length in lengths[: len(wanted)])


def test_a_batch_weighs_by_the_places_that_something_judges(reading, marker):
    """However many others its prompts have: the loss is a mean over those that are judged."""
    trainer = reading(counts=(2, 2, 4, 8), lookahead=9, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    trainer.model.train()
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 4, trainer.args.device)
    judged = []
    for inputs in batches:
        tree = trainer._tree(inputs, one_rollout(trainer, inputs, inputs["labels"]))
        judged.append(int((tree.judged(inputs["labels"])[1] >= 0).any(-1).sum()))
    assert sorted(judged) == [1, 1, 2, 2]
    torch.testing.assert_close(torch.stack([*trainer._weights]), torch.tensor(judged) / sum(judged))


@pytest.mark.parametrize(("answers", "most"), [(1, 1), (3, 4)])
def test_forks_that_no_row_has_are_not_run(reading, make_trainer, marker, answers, most):
    """Of thirty places a row may have one; a power of two, so that rows of nearly as many places have the same shape."""
    rows = steps(marker, (2, 3, 2, 3), answers).remove_columns("think_length")
    trainer = make_trainer(train_dataset=rows, fork_positions="all", num_forks=16, per_device_train_batch_size=4)
    inputs, labels = batch_of(trainer, rows)
    forks_BK = one_rollout(trainer, inputs, labels).forks_BK
    assert forks_BK.shape == (4, most)
    assert ((forks_BK >= 0).sum(1) == answers).all()


def test_several_answers_of_a_row_each_have_their_steps(reading, marker):
    trainer = reading(answers=2)
    rows = steps(marker, (3, 3, 3, 3), answers=2)
    inputs, labels = batch_of(trainer, rows)
    forks = one_rollout(trainer, inputs, labels).forks_BK.tolist()
    assert forks == [[3, 7, 16, 20]] * 4


def test_a_checkpoint_says_after_what_it_thinks(reading, marker):
    assert reading().model.config.thinktok["fork_markers"] == [MARKER]
    rows = steps(marker, (3, 3)).remove_columns("think_length")  # which asks for thoughts that are read
    assert reading(memory="none", num_generations=2, rows=rows, lookahead=1).model.config.thinktok["fork_markers"] == [MARKER]


def test_a_checkpoint_says_how_it_thinks_now_and_nothing_of_the_run_before(reading, make_trainer):
    before = reading()
    assert before.model.config.thinktok["fork_markers"] == [MARKER]
    said = make_trainer(model=before.model, tokenizer=before.processing_class).model.config.thinktok
    assert "fork_markers" not in said
    assert (said["memory"], said["num_tokens"]) == ("none", before.vocabulary.num_tokens)


def test_where_thoughts_are_forgotten_prompts_have_none(reading, marker):
    rows = steps(marker, (3, 3)).remove_columns("think_length")
    trainer = reading(rows=rows, memory="none", per_device_train_batch_size=2)
    inputs, labels = batch_of(trainer, rows)
    forks = one_rollout(trainer, inputs, labels).forks_BK
    assert [[fork for fork in row if fork >= 0] for row in forks.tolist()] == [[11], [11]]  # before the answer


@pytest.mark.parametrize("how", ["think", "random", "none"])
def test_answers_are_those_of_plain_rows_with_the_thoughts_written_in(reading, marker, how):
    trainer = reading(counts=(3, 1, 2, 4, 3), num_forks=2)  # questions may be longer than those that were trained on
    rows = steps(marker, (3, 1, 2, 4, 3))
    said = answer(trainer, rows, how)
    model, first = trainer.model, trainer.vocabulary.first_id
    for row, thoughts, correct, logp, spent in zip(rows, said.thoughts_DL, said.correct_D, said.logps_D, said.lengths_D):
        words = [int(word) for word in thoughts if word >= 0]
        assert len(words) == spent == (0 if how == "none" else len(row["think_length"]) - 1)
        ids, left = [], list(words)
        for place, token in enumerate(row["input_ids"][:-1]):
            ids.append(token)
            if token == marker and left and place < len(row["input_ids"]) - 2:
                if how == "think":  # each is the most likely one there
                    logits = type(model).forward(model, input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
                    assert logits[first : first + trainer.vocabulary.num_tokens].argmax() == left[0]
                ids.append(first + left.pop(0))
        logits = type(model).forward(model, input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :first].float()
        assert logp == pytest.approx(logits.log_softmax(-1)[row["input_ids"][-1]].item(), abs=1e-4)
        assert correct == (logits.argmax().item() == row["input_ids"][-1])


@pytest.mark.parametrize("how", ["think", "random"])
@pytest.mark.parametrize("given", [None, 1])
def test_thoughts_are_counted_where_a_row_has_a_place_for_one(reading, marker, how, given):
    """Rows with fewer markers than the longest of the batch, and all of as many tokens, as the options or the data say."""
    rows = steps(marker, (3, 1, 2, 4)).remove_columns("think_length")
    rows = rows if given is None else rows.add_column("think_length", [given] * 4)
    said, each = answer(reading(rows=rows, max_think_length=2), rows, how), given or 2
    assert said.lengths_D.tolist() == [3 * each, each, 2 * each, 4 * each]
    assert (said.thoughts_DL >= 0).sum(1).tolist() == said.lengths_D.tolist()


def test_what_is_thought_before_a_step_is_judged_by_the_answer_after_it(reading, marker):
    """The last thought's branches reach the answer; earlier ones have nothing to be judged by, and are read by it."""
    trainer = reading()
    inputs, labels = batch_of(trainer, steps(marker, (3, 3, 3, 3)))
    rollout = one_rollout(trainer, inputs, labels)
    tree = trainer._tree(inputs, rollout)
    scores = trainer._score(trainer.model, tree, inputs["input_ids"], labels, rollout)
    assert scores.valid_BK.tolist() == [[False, True]] * 4
    other = rollout.thoughts_BKGL.clone()
    other[:, 0, 0] = trainer.vocabulary.first_id + (other[:, 0, 0] - trainer.vocabulary.first_id + 1) % trainer.vocabulary.num_tokens
    rollout.thoughts_BKGL = other
    changed = trainer._score(trainer.model, tree, inputs["input_ids"], labels, rollout)
    assert (changed.logps_BKGH[:, 1] - scores.logps_BKGH[:, 1])[scores.mask_BKH[:, 1, None].expand_as(scores.logps_BKGH[:, 1])].abs().min() > 1e-6


def test_a_level_without_a_thought_is_passed_by_what_the_text_alone_gets_right(reading, marker):
    rows = steps(marker, (1, 1, 1, 1, 2, 2, 2, 2))
    trainer = reading(rows=rows, curriculum_threshold=[0.9], text_ce_weight=1.0, max_steps=120, learning_rate=1e-2, logging_steps=1)
    trainer.train()
    assert trainer.curriculum.accuracy[1] > 0.9
    assert trainer.curriculum.reached(trainer.state.global_step) == [1, 2]
    first, *_, last = [entry for entry in trainer.state.log_history if "level" in entry]
    assert "think_gain" not in first  # nothing was thought
    assert first["accuracy"] < 0.5
    assert last["level"] == 2


def test_thoughts_that_a_rank_has_none_of_are_no_error(reading, marker):
    trainer = reading(counts=(1, 1, 1, 1), text_ce_weight=1.0, max_steps=1)
    trainer.train()
    assert "accuracy" not in trainer.state.log_history[0]  # without levels a text's accuracy is nobody's business


@pytest.mark.parametrize("batch", [1, 2])
def test_a_row_without_a_marker_has_an_empty_list(reading, marker, batch):
    rows = Dataset.from_list([{"input_ids": [101, 102, 103], "labels": [-100, 102, 103], "level": 1, "think_length": []}, *steps(marker, (3,))] * 4)
    trainer = reading(rows=rows, text_ce_weight=1.0, max_steps=4, per_device_train_batch_size=batch, shuffle_dataset=False)
    trainer.train()
    assert trainer.state.global_step == 4


def test_lists_of_lengths_fit_the_markers_or_are_refused(reading, marker):
    rows = steps(marker, (3, 3, 3, 3))
    wrong = rows.map(lambda row: {"think_length": [1, 0]})
    with pytest.raises(ValueError, match="Row 0 has the lengths of 2 thoughts in think_length, and 3 ends of fork_markers"):
        reading(rows=wrong)
    with pytest.raises(ValueError, match="think_length has lists, a number for each marked place: set fork_positions=markers"):
        reading(rows=rows, fork_positions="random", fork_markers=None)
    supplied = rows.add_column("thoughts", [[1, 1]] * len(rows))
    with pytest.raises(ValueError, match="think_length has lists, a number for each marked place: give each row one number"):
        reading(rows=supplied, supply_thoughts=True, num_forks=1, num_generations=3)
    with pytest.raises(ValueError, match="think_length has lists, a number for each marked place: give each row one number"):
        reading(rows=rows, rollout="free", teacher="nowhere", prompt_length=1)
    with pytest.raises(ValueError, match="Where think_length asks for thoughts the next token is none to predict.* set memory=persistent"):
        reading(rows=rows, memory="none")
    reading(rows=rows.map(lambda row: {"think_length": [0, 0, 1]}), memory="none")  # before the answer
    with pytest.raises(ValueError, match="asks for thoughts of 2 tokens"):
        reading(rows=rows.map(lambda row: {"think_length": [2, 1, 0]}))
