"""TRL's formats of data in the recipes: what is trained on, held out, and made into text, and from which split."""

import json
import re
import subprocess
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
from commands import ROOT, InProcess, captured, in_process
from models import CORPUS, save_tiny, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from hf_thinktok.cli import main
from hf_thinktok.data import text_of
from hf_thinktok.evaluation import evaluate_thinking
from hf_thinktok.peft import load_whole
from hf_thinktok.report import held_out_rows
from hf_thinktok.results import digest_of, read_json
from hf_thinktok.sources import STANDARD_LIBRARY
from hf_thinktok.text import TextArguments, another_part, load_parts, load_text, unseen_text

# With the marks of what an assistant says, which `assistant_only_loss` needs.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY_OPTIONS = (
    "--max_length 128 --max_steps 2 --use_cpu true --num_think_tokens 4 --num_forks 96 --num_generations 2 --max_think_length 2 "
    "--per_device_train_batch_size 2 --bf16 false --gradient_checkpointing false --logging_steps 1 --report_to none --log_completions false "
    "--held_out_documents 6"
).split()


def chat(user: str, assistant: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def of_format(name: str, number: int) -> dict:
    """A row, and of all formats the same question and answer."""
    question, answer = f"what is {number} + {number}?", f" It is {2 * number}. {CORPUS[number % 4]}"
    if name == "messages":
        return {"messages": chat(question, answer)}
    if name == "conversations":
        return {"conversations": [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]}
    if name == "prompt and completion of chats":
        return dict(zip(("prompt", "completion"), ([message] for message in chat(question, answer)), strict=True))
    return {"prompt": question, "completion": answer}


FORMATS = ("prompt and completion", "prompt and completion of chats", "messages", "conversations")


def said_in(row: dict) -> str:
    """The answer of a row of any format."""
    last = row["completion"] if "completion" in row else next(iter(row.values()))
    return last if isinstance(last, str) else next(last[-1][key] for key in ("content", "value") if key in last[-1])


def written(path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def thinktok(*words):
    return captured(lambda: main([*map(str, words)]))


@pytest.fixture
def model_folder(tmp_path):
    save_tiny(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("name", "option"), [("messages", "assistant_only_loss"), ("prompt and completion", "completion_only_loss")], ids=["messages", "prompt"]
)
def test_a_recipe_trains_measures_and_shows_other_formats_than_text(model_folder, tmp_path, name, option):
    data, out = written(tmp_path / "data.jsonl", [of_format(name, number) for number in range(24)]), tmp_path / "out"
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: {model_folder}\ndata_files: {data}\n{option}: true\noutput_dir: {out}\n")
    done = in_process(ROOT / "recipes" / "pretrain_think.py", "--config", tmp_path / "run.yaml", *TINY_OPTIONS)
    assert done.returncode == 0, done.stderr[-3000:]
    results = read_json(out / "results.json")
    assert results["config"][option] is True

    # With a place to think at before each token that is learned, all that is judged is answers.
    held_out, tokenizer = held_out_rows(results, 6), AutoTokenizer.from_pretrained(out)
    answers = [said_in(row) for row in held_out]
    assert results["judged_tokens"] == sum(len(tokenizer(answer)["input_ids"]) + 1 for answer in answers)  # and the end of each

    (shown,) = json.loads((out / "inspection.json").read_text())["texts"]
    assert "Held-out text 1" in (out / "report.html").read_text()
    text = shown["first"] + "".join(token["text"] for token in shown["tokens"])
    assert text.startswith(text_of(held_out[0], tokenizer)[:20])

    measured = thinktok("eval", out, "--config", tmp_path / "run.yaml", "--held_out_documents", 6, "--num_samples", 1, "--output", tmp_path / "eval.json")
    assert measured.returncode == 0, measured.stderr[-3000:]
    assert "may be among those" not in measured.stderr
    found = read_json(tmp_path / "eval.json")["evaluation"]
    assert found["documents"] == 6


def test_arms_are_compared_on_chats(model_folder, tmp_path):
    data, out = written(tmp_path / "data.jsonl", [of_format("messages", number) for number in range(24)]), tmp_path / "out"
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: {model_folder}\ndata_files: {data}\nassistant_only_loss: true\noutput_dir: {out}\n")
    pretrain, chosen = ROOT / "recipes" / "pretrain_think.py", ("--test_documents", 5, "--report_documents", 1, "--num_samples", 1)
    with patch("subprocess.Popen", InProcess(subprocess.Popen, pretrain, partial(in_process, pretrain))):
        done = in_process(ROOT / "recipes" / "compare.py", "--config", tmp_path / "run.yaml", *TINY_OPTIONS, "--packing", "true", *chosen)
    assert done.returncode == 0, done.stderr[-3000:]
    results, tokenizer = read_json(out / "results.json"), AutoTokenizer.from_pretrained(model_folder)
    test = load_parts(TextArguments(data_files=[data], test_documents=5, held_out_documents=6)).test
    assert results["settings"]["text"] == digest_of(text_of(row, tokenizer) for row in test)
    assert "Held-out text 1" in (out / "report.html").read_text()


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_come_as_they_are_without_empty_ones(tmp_path, name, streaming, caplog):
    full = [of_format(name, number) for number in range(3)]
    read = list(full[0])
    empty = [dict.fromkeys(read), {column: [] if isinstance(full[0][column], list) else " " for column in read}]
    data = written(tmp_path / "data.jsonl", [{"id": number, **row} for number, row in enumerate([*full, *empty])])
    rows = list(load_text(TextArguments(data_files=[data], dataset_streaming=streaming)))
    assert [{column: row[column] for column in read} for row in rows] == full
    assert [row["id"] for row in rows] == [0, 1, 2]
    assert ("2 of 5 rows have no text, and are left out" in caplog.text) is not streaming


def test_a_prompt_may_be_empty_where_all_of_the_completion_is_learned(tmp_path):
    data = written(tmp_path / "data.jsonl", [{"prompt": "", "completion": "all"}, {"prompt": "a", "completion": ""}])
    assert list(load_text(TextArguments(data_files=[data]))) == [{"prompt": "", "completion": "all"}]


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
def test_a_template_and_a_text_come_before_other_formats(tmp_path, streaming):
    row = of_format("prompt and completion", 1) | of_format("messages", 1)
    data = written(tmp_path / "data.jsonl", [row] * 2)
    options = {"data_files": [data], "dataset_streaming": streaming}
    assert list(load_text(TextArguments(**options, text_template="{prompt}|{completion}")))[0] == {"text": f"{row['prompt']}|{row['completion']}"}
    assert list(load_text(TextArguments(**options)))[0] == of_format("prompt and completion", 1)
    written(tmp_path / "data.jsonl", [{"prompt": "alone", **of_format("messages", 1)}] * 2)
    assert list(load_text(TextArguments(**options)))[0] == of_format("messages", 1)  # TRL would look for what follows the prompt
    written(tmp_path / "data.jsonl", [{"text": "this", **row}] * 2)
    assert list(load_text(TextArguments(**options)))[0] == {"text": "this"}


def test_the_text_of_each_format():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    plain = of_format("prompt and completion", 3)
    assert text_of(plain, tokenizer) == text_of(plain, None) == plain["prompt"] + plain["completion"]
    made = {text_of(of_format(name, 3), tokenizer) for name in FORMATS[1:]}
    assert made == {f"<|im_start|>user\n{plain['prompt']}<|im_end|><|im_start|>assistant\n{plain['completion']}<|im_end|>"}
    assert text_of({"text": "this", **plain}, None) == text_of("this", None) == "this"
    assert text_of({"question": "?"}, tokenizer) is text_of({"text": 3}, tokenizer) is None


def test_a_row_s_own_tools_and_template_options_are_those_of_training():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ tools[0]['name'] if tools }} {{ mood }} {{ messages[0]['content'] }}"
    tools = [{"name": "clock"}]
    for written in (tools, json.dumps(tools)):
        row = {"messages": chat("what time?", "noon"), "tools": written, "chat_template_kwargs": {"mood": "calm"}}
        assert text_of(row, tokenizer) == "clock calm what time?"


def test_a_chat_begins_once():
    """Its template begins it, and so does the tokenizer where a text is read."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    first = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", first)])
    messages = chat("the cat", " sat")
    as_trained = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert tokenizer(text_of({"messages": messages}, tokenizer))["input_ids"] == as_trained
    assert as_trained.count(first) == 1


@pytest.mark.parametrize(
    ("row", "template", "sentence"),
    [
        (
            {"messages": chat("a", "b")},
            None,
            "The data has chats, and the tokenizer no chat template to make texts of them: give the model's tokenizer one, or",
        ),
        ({"messages": chat("a", "b")}, "{{ raise_exception('no users here') }}", "A row's messages cannot be made text: no users here; give"),
        ({"prompt": "a", "completion": chat("a", "b")}, TEMPLATE, "A row's prompt and completion cannot be made text: can only concatenate"),
        ({"messages": ["a"]}, TEMPLATE, "A row's messages cannot be made text: "),
        ({"messages": 3}, TEMPLATE, "A row's messages cannot be made text: "),
    ],
)
def test_what_cannot_be_made_text_is_one_sentence(row, template, sentence):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        text_of(row, tokenizer)
    assert "\n" not in str(error.value)


def test_chats_are_evaluated_as_the_text_that_they_are_and_not_without_a_template(model_folder, tmp_path):
    save_tiny(tmp_path / "thinker", think_tokens=4)
    data = written(tmp_path / "data.jsonl", [of_format("messages", number) for number in range(3)])
    model, tokenizer = load_whole(str(tmp_path / "thinker"))
    rows = list(load_text(TextArguments(data_files=[data])))
    few = {"num_forks": 4, "num_samples": 1, "max_think_length": 1}
    as_rows, as_texts = (evaluate_thinking(model, tokenizer, given, **few) for given in (rows, [text_of(row, tokenizer) for row in rows]))
    assert as_rows.settings == as_texts.settings
    assert as_rows.documents_F.tolist() == as_texts.documents_F.tolist()
    tokenizer.chat_template = None
    (tmp_path / "thinker" / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(tmp_path / "thinker")
    done = thinktok("eval", tmp_path / "thinker", "--data_files", data)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "The data has chats, and the tokenizer no chat template to make texts of them" in done.stderr


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize("name", FORMATS)
def test_chats_and_prompts_that_repeat_each_other_are_one(tmp_path, name, streaming):
    """Wherever they stand, and whatever keys other rows have that these have not."""
    rows = [of_format(name, number // 2 % 12) | {"id": number} for number in range(48)]
    data = written(tmp_path / "data.jsonl", rows)
    parts = load_parts(TextArguments(data_files=[data], held_out_documents=4, test_documents=4, dataset_streaming=streaming))
    seen = [[json.dumps({column: row[column] for column in row if column != "id"}) for row in part] for part in (parts.test, parts.held_out, parts.train)]
    assert [len(part) for part in seen[:2]] == [len(set(part)) for part in seen[:2]]
    assert not set(seen[0]) & set(seen[1]) | set(seen[0] + seen[1]) & set(seen[2])
    assert set(sum(seen, [])) == {json.dumps(of_format(name, number)) for number in range(12)}


def test_a_message_is_the_same_with_keys_of_other_messages(tmp_path):
    own = {"messages": [{"role": "user", "content": "a", "name": None}]}
    script = TextArguments(data_files=[written(tmp_path / "data.jsonl", [of_format("messages", number) for number in range(4)])], held_out_documents=0)
    test = written(tmp_path / "test.jsonl", [{"messages": [message | {"name": None} for message in of_format("messages", 1)["messages"]]}, own])
    assert [row["messages"][0]["content"] for row in unseen_text(script, [test])] == ["a"]


# ---------------------------------------------------------------- a split to hold out from


def of_splits(folder, train: list[str], validation: list[str]) -> str:
    written(folder / "train.jsonl", [{"text": text} for text in train])
    written(folder / "validation.jsonl", [{"text": text} for text in validation])
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
def test_documents_are_held_out_from_the_test_split(tmp_path, streaming):
    train, validation = [f"train {i}" for i in range(20)], [f"validation {i}" for i in range(9)]
    folder = of_splits(tmp_path / "data", [*train, *validation], validation)  # which stand among those to train on as well
    script = TextArguments(dataset_name=folder, dataset_test_split="validation", held_out_documents=4, test_documents=5, dataset_streaming=streaming)
    kept, held_out, test = ([row["text"] for row in part] for part in load_parts(script))
    assert (len(held_out), len(test)) == (4, 5)  # all that it has
    assert sorted(held_out + test) == validation
    assert kept == train
    assert [row["text"] for row in unseen_text(script, None)] == test
    assert [row["text"] for row in unseen_text(script, [written(tmp_path / "own.jsonl", [{"text": "of its own"}])])] == ["of its own"]
    fewer = load_parts(TextArguments(dataset_name=folder, dataset_test_split="validation", held_out_documents=4, max_documents=6, dataset_streaming=streaming))
    assert len(fewer.held_out) == 4
    assert len(list(fewer.train)) <= 6


def test_a_recipe_and_its_report_take_the_test_split(model_folder, tmp_path):
    folder = of_splits(tmp_path / "data", [f"train {i} {CORPUS[i % 4]}" for i in range(20)], [f"validation {i} {CORPUS[i % 4]}" for i in range(9)])
    out, options = tmp_path / "out", ("--dataset_name", folder, "--dataset_test_split", "validation")
    done = in_process(ROOT / "recipes" / "pretrain_think.py", "--model_name_or_path", model_folder, "--output_dir", out, *options, *TINY_OPTIONS)
    assert done.returncode == 0, done.stderr[-3000:]
    (shown,) = json.loads((out / "inspection.json").read_text())["texts"]
    assert (shown["first"] + "".join(token["text"] for token in shown["tokens"])).startswith("validation")
    for own, told in ((options, False), (options[:2], True), ((*options[:2], "--dataset_train_split", "validation"), False)):
        done = thinktok("eval", out, *own, "--held_out_documents", 5, "--num_forks", 2, "--num_samples", 1)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("was trained with dataset_test_split=validation: some of these documents may be" in " ".join(done.stderr.split())) is told


def test_a_part_that_was_held_out_in_another_way():
    run = {"dataset_name": "me/mine", "dataset_test_split": "validation", "held_out_documents": 8}
    same = TextArguments(dataset_name="me/mine", dataset_test_split="validation", held_out_documents=8)
    assert another_part(same, run) is None
    assert another_part(replace(same, held_out_documents=9), run) is None  # of a split that was not trained on
    assert another_part(replace(same, dataset_test_split=None), run) == "dataset_test_split=validation"
    assert another_part(replace(same, dataset_test_split=None), run | {"dataset_test_split": None}) is None
    assert another_part(replace(same, dataset_test_split="test"), run | {"dataset_test_split": None}) is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data_files": ["README.md.txt"]}, "dataset_test_split=test has no effect with data_files, which have no splits: leave it out."),
        ({"dataset_name": STANDARD_LIBRARY}, f"dataset_test_split has no effect with dataset_name={STANDARD_LIBRARY}, which is one text: leave it out."),
        ({"dataset_name": "me/mine", "held_out_documents": 0}, "dataset_test_split=test has no effect without held_out_documents or test_documents"),
        ({"dataset_name": "me/mine", "dataset_train_split": "test"}, "dataset_test_split=test is the split that is trained on"),
    ],
    ids=["files", "one text", "nothing held out", "the same"],
)
def test_a_test_split_that_would_say_nothing(options, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md.txt").write_text("a line")
    with pytest.raises(ValueError, match=re.escape(sentence)):
        TextArguments(dataset_test_split="test", **options)


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
def test_a_split_to_train_on_that_has_what_is_held_out_and_no_more(tmp_path, streaming):
    folder = of_splits(tmp_path / "data", ["a", "b"], ["a", "b"])
    script = TextArguments(dataset_name=folder, dataset_test_split="validation", held_out_documents=2, dataset_streaming=streaming)
    with pytest.raises(ValueError, match="All other documents are word for word among the 2 of held_out_documents: give text that does not repeat itself"):
        load_parts(script)


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
def test_a_test_split_that_has_too_few(tmp_path, streaming):
    folder = of_splits(tmp_path / "data", ["a", "b"], ["c", "d", "e"])
    script = TextArguments(dataset_name=folder, dataset_test_split="validation", held_out_documents=4, dataset_streaming=streaming)
    with pytest.raises(ValueError, match="held_out_documents=4 is more than the 3 documents that dataset_test_split=validation has: give a smaller number"):
        load_parts(script)
    with pytest.raises(ValueError, match='Unknown split "nowhere"|Bad split: nowhere'):
        load_parts(replace(script, dataset_test_split="nowhere"))


def test_eval_of_a_test_split_and_no_part_of_it(tmp_path):
    done = thinktok("eval", tmp_path, "--dataset_name", "me/mine", "--dataset_test_split", "test")
    assert done.returncode == 2
    assert "--dataset_test_split has no effect without --held_out_documents or --test_documents: give one, or name it as --dataset_train_split" in done.stderr
