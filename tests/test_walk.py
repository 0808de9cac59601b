"""The task `walk`, whose steps are told one after another, against an oracle that reads nothing but the text."""

import re
from collections import Counter

import numpy as np
import pytest

from hf_thinktok.tasks import make_task, word_tokenizer

ROWS = {"train_rows": 300, "test_rows": 150}
CASES = {
    "one question a row": {"nodes": 5, "levels": [1, 2, 3], "test_levels": [1, 3, 7]},
    "several": {"nodes": 6, "together": 7, "levels": [1, 2, 3, 9], "test_levels": [2, 9]},
    "mixed": {"nodes": 6, "together": 7, "mixed": True, "levels": [1, 2, 3, 9], "test_levels": [2, 9]},
    "onward": {"nodes": 6, "together": 7, "onward": True, "levels": [1, 2, 3, 9], "test_levels": [2, 9]},
}


@pytest.fixture(scope="module")
def walks():
    return {case: make_task("walk", **options | ROWS) for case, options in CASES.items()}


@pytest.fixture(params=CASES)
def walk(request, walks):
    return walks[request.param], CASES[request.param]


def walked(prompts):
    """The facts of a row's questions, and of each its start, its steps and the nodes that they lead to. One that names no start goes on from the answer."""
    *lines, first = prompts[0].split("\n")
    arrows, found = dict(tuple(map(int, line.split(">"))) for line in lines), []
    for question in (first, *(prompt.removeprefix("\n") for prompt in prompts[1:])):
        start, told = question.split(" ", 1)
        start = start or found[-1][2][-1]
        steps = re.findall(r"> > =|\+\d+ =", told)
        assert " ".join(steps) == told
        nodes = [int(start)]
        for step in steps:
            nodes.append(arrows[nodes[-1]] if step == "> > =" else (nodes[-1] + int(step[1:-2])) % len(arrows))
        found.append((int(start), steps, nodes[1:]))
    return arrows, found


def test_steps_lead_where_the_oracle_goes(walk):
    task, options = walk
    for row in [*task.train, *task.test]:
        arrows, found = walked(row["prompt"])
        assert sorted(arrows) == sorted(arrows.values()) == list(range(options["nodes"]))
        assert [str(nodes[-1]) for _, _, nodes in found] == row["completion"]
        assert all(len(steps) == row["level"] for _, steps, _ in found)
        start, steps, nodes = found[0]
        assert (row["thoughts"], row["answer"]) == (nodes[:-1], nodes[-1])
        numbers = [-1 if step == "> > =" else int(step[1:-2]) for step in steps]
        assert row["inputs"] == [start, *(arrows[node] for node in sorted(arrows)), *numbers]


def test_each_step_has_its_place_for_a_thought_and_the_last_none(walk):
    task, options = walk
    for rows, together in ((task.train, options.get("together", 1)), (task.test, 1)):
        for row in rows:
            assert len(row["prompt"]) == len(row["completion"]) == max(together // row["level"], 1)
            assert row["think_length"] == ([1] * (row["level"] - 1) + [0]) * len(row["prompt"])
            assert len(row["think_length"]) == sum(prompt.count("=") for prompt in row["prompt"])


def test_number_and_arrow_take_turns_unless_rows_are_mixed(walks):
    def alternates(steps):
        return all((a == "> > =") != (b == "> > =") for a, b in zip(steps, steps[1:]))

    for case, task in walks.items():
        questions = {side: [steps for row in rows for _, steps, _ in walked(row["prompt"])[1]] for side, rows in (("train", task.train), ("test", task.test))}
        assert all(map(alternates, questions["test"]))
        assert 0.3 < np.mean([steps[0] == "> > =" for steps in questions["test"]]) < 0.7
        if case == "mixed":  # two steps are of four kinds, alike
            kinds = Counter(tuple(step == "> > =" for step in steps) for steps in questions["train"] if len(steps) == 2)
            assert min(kinds.values()) / sum(kinds.values()) > 0.2
        else:
            assert all(map(alternates, questions["train"]))


def test_only_onward_rows_go_on_from_their_answers(walks):
    for case, task in walks.items():
        on = [prompt.startswith(" ") for row in task.train for prompt in row["prompt"][1:]]
        assert all(on) if case == "onward" else not any(on)
        assert all(row["prompt"][0].split("\n")[-1][0].isdigit() for row in [*task.train, *task.test])


def test_maps_of_tests_are_new_where_rows_go_on(walks):
    """An answer may be any node, so that no start could be kept for tests."""
    sides = [{tuple(sorted(walked(row["prompt"])[0].items())) for row in rows} for rows in (walks["onward"].train, walks["onward"].test)]
    assert not sides[0] & sides[1]


def test_no_question_of_a_test_is_asked_in_training_not_even_as_another_of_its_row(walks):
    for task in walks.values():
        sides = [
            {(start, *(arrows[node] for node in sorted(arrows))) for row in rows for arrows, found in [walked(row["prompt"])] for start, _, _ in found}
            for rows in (task.train, task.test)
        ]
        assert not sides[0] & sides[1]


def test_other_questions_of_a_row_are_other_ones(walks):
    found = [walked(row["prompt"])[1] for row in walks["several"].train if row["level"] == 2]
    assert np.mean([len({(start, *steps) for start, steps, _ in questions}) for questions in found]) > 2.5  # of three


def test_rows_are_those_of_seed_and_options(walk):
    task, options = walk
    again, other = (make_task("walk", seed=seed, **options | ROWS) for seed in (0, 1))
    assert again.train.to_dict() == task.train.to_dict()
    assert other.train["prompt"] != task.train["prompt"]


def test_every_word_is_one_token(walk):
    task, _ = walk
    tokenizer = word_tokenizer(task.words)
    texts = [text for row in [*task.train, *task.test] for text in (*row["prompt"], *row["completion"])]
    assert {word for text in texts for word in text.split()} == set(task.words)
    assert all(tokenizer.unk_token_id not in ids for ids in tokenizer(texts)["input_ids"])


def test_who_does_a_single_step_is_at_chance_from_three_on(walk):
    task, options = walk
    nodes = options["nodes"]
    assert task.shortcut == {level: {1: 1.0, 2: 2 / nodes}.get(level, 1 / nodes) for level in {*options["levels"], *options["test_levels"]}}
    told = nothing = 0
    for row in task.test.filter(lambda row: row["level"] == 2):
        start, *rest = row["inputs"]
        (number,) = (step for step in rest[nodes:] if step >= 0)
        follows = rest[start] == row["answer"]
        assert follows == (number == 0), "where 0 is added the arrow alone tells, and elsewhere it leads to another node"
        told, nothing = told + follows, nothing + 1
    assert 0 < told < nothing or 2 not in options["test_levels"]
    assert task.chance == 1 / options["nodes"]
    assert task.stepwise


@pytest.mark.parametrize(("options", "said"), [({"together": 0}, "together=0 must be a whole number of 1 or more"), ({"mixed": 1}, "mixed=1 must be True or")])
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make_task("walk", **options)
