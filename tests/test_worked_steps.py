"""Steps go away from the last one on, results never do, and the recipe trains on what is left."""

import json

import pytest
from commands import ROOT, in_process
from models import save_tiny

from hf_thinktok.worked_steps import worked_steps


@pytest.fixture
def file(tmp_path):
    rows = [{"question": f"What is {i} + 1 + 1?", "answer": f"{i} + 1 = {i + 1}\n{i + 1} + 1 = {i + 2}\n#### {i + 2}"} for i in range(20)]
    rows[3]["answer"] = "4 + 1 = 5\n#### 5"
    path = tmp_path / "solved.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_one_more_step_is_taken_away_at_each_level(file):
    task = worked_steps(str(file), tokens_per_step=3, test_questions=4)
    assert len(task.train) == 16 * 3
    assert len(task.test) == 4 * 3
    assert task.test["level"][:] == [0, 1, 2] * 4
    every = [*task.train, *task.test]
    of_five = [row for row in every if "What is 5 +" in row["prompt"]]
    assert [row["prompt"].split("Answer:")[1] for row in of_five] == ["\n5 + 1 = 6\n6 + 1 = 7\n####", "\n5 + 1 = 6\n####", "\n####"]
    assert [(row["level"], row["think_length"]) for row in of_five] == [(0, 0), (1, 3), (2, 6)]
    assert {row["completion"] for row in of_five} == {" 7"}
    short = [row for row in every if "What is 3 +" in row["prompt"]]  # it has one step alone
    assert [row["think_length"] for row in short] == [0, 3, 3]


def test_no_question_is_both_trained_and_tested(file):
    task = worked_steps(str(file), levels=[0, 2], test_questions=5, max_questions=12)
    trained, tested = ({row["prompt"].split("\n")[0] for row in rows} for rows in (task.train, task.test))
    assert (len(trained), len(tested), len(trained & tested)) == (7, 5, 0)


def test_questions_of_their_own_are_tested_and_none_of_them_is_trained_on(file, tmp_path):
    other = tmp_path / "test.jsonl"
    other.write_text(json.dumps({"question": "What is 9 times 3?", "answer": "9 * 3 = 27\n#### 27"}))
    task = worked_steps(str(file), levels=[1], test_file=str(other))
    assert (len(task.train), [row["prompt"] for row in task.test]) == (20, ["Question: What is 9 times 3?\nAnswer:\n####"])
    other.write_text("\n".join(file.read_text().splitlines()[:6]))
    task = worked_steps(str(file), levels=[1], test_file=str(other))
    assert (len(task.train), len(task.test)) == (14, 6)
    assert not set(task.train["prompt"]) & set(task.test["prompt"])
    with pytest.raises(ValueError, match="has no question that the test has not"):
        worked_steps(str(file), levels=[1], test_file=str(file))
    other.write_text("")
    with pytest.raises(ValueError, match="test.jsonl has no question to test"):
        worked_steps(str(file), levels=[1], test_file=str(other))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"file": "nowhere.jsonl"}, "There is no file 'nowhere.jsonl'"),
        ({"separator": "THE END"}, "Line 1 of .* is no worked solution"),
        ({"answer": "steps"}, "needs 'question', and 'steps'"),
        ({"test_questions": 20}, "below the 20 questions"),
        ({"test_file": "nowhere.jsonl", "test_questions": None}, "There is no file 'nowhere.jsonl'"),
        ({"test_file": "solved.jsonl"}, "test_questions=4 has no effect with test_file"),
        ({"levels": [3]}, "levels=.3. must be different whole numbers"),
        ({"tokens_per_step": -1}, "tokens_per_step=-1 must be a whole number"),
        ({"max_questions": -3}, "max_questions=-3 must be a whole number"),
    ],
)
def test_wrong_options_are_told_in_a_sentence(file, options, sentence):
    options = {"file": str(file), "test_questions": 4} | options
    with pytest.raises(ValueError, match=sentence):
        worked_steps(**options)


@pytest.mark.parametrize("line", ['{"question": "a", "answer": null}', '{"question": null, "answer": "b #### 1"}', "7", "{", '{"question": "a", "answer": 3}'])
def test_lines_that_are_no_worked_solutions_are_named(file, line):
    file.write_text(file.read_text() + "\n\n" + line)
    with pytest.raises(ValueError, match="Line 22 of .* is no worked solution"):
        worked_steps(str(file), test_questions=4)


@pytest.mark.parametrize("control", ["none", "filler"])
def test_the_recipe_trains_and_tests_each_level(file, tmp_path, control):
    save_tiny(tmp_path / "model")
    options = json.dumps({"file": str(file), "test_questions": 4, "tokens_per_step": 1})
    config = ROOT / "recipes" / "smollm2-135m" / "gsm8k_steps.yaml"
    done = in_process(
        ROOT / "recipes" / "toy.py", "--config", config, "--model_name_or_path", tmp_path / "model", "--task_options", options,
        "--max_steps", 2, "--max_think_length", 2, "--num_think_tokens", 4, "--per_device_train_batch_size", 2, "--max_length", 96,
        "--use_cpu", "--bf16", "false", "--output_dir", tmp_path / "out", "--control", control,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert set(run["accuracy"]["think"]) == {"0", "1", "2"}
    assert ("random" in run["accuracy"]) == (control == "none")
