"""The recipe as a user starts it: a real `accelerate launch`, every option in --help, every YAML file readable."""

import functools
import gzip
import importlib
import json
import re
from dataclasses import fields

import pandas
import pytest
import yaml
from commands import ROOT, in_process, started
from datasets import Dataset
from models import CORPUS, save_tiny
from transformers import AutoTokenizer
from trl import ModelConfig, TrlParser

from hf_thinktok import ThinkTokConfig
from hf_thinktok.card import render_card
from hf_thinktok.controls import control_of
from hf_thinktok.results import changed_options
from hf_thinktok.text import TextArguments, load_parts, load_text

RECIPE = ROOT / "recipes" / "pretrain_think.py"


@pytest.fixture
def tiny_folder(tmp_path):
    save_tiny(tmp_path / "model")
    rows = [{"question": f"{i} + {i}", "answer": f"{2 * i}. {CORPUS[i % 4]}"} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "data.txt").write_text("\n\n".join(f"{i} {text}" for i, text in enumerate(CORPUS)))
    (tmp_path / "broken.jsonl").write_text("question, answer\n")
    return tmp_path


TINY_OPTIONS = (
    "--max_length 48 --max_steps 2 --num_forks 3 --num_generations 2 --max_think_length 2 --per_device_train_batch_size 2 --held_out_documents 6 "
    "--bf16 false --gradient_checkpointing false --logging_steps 1 --report_to none --log_completions false"
).split()


LAUNCH = ("-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs" / "cpu.yaml")


@pytest.mark.parametrize(("config", "start"), [("quickstart", functools.partial(started, *LAUNCH)), ("gsm8k", in_process)], ids=["quickstart", "gsm8k"])
def test_a_config_trains_evaluates_and_saves(tiny_folder, config, start):
    done = start(
        RECIPE,
        *("--config", ROOT / "recipes" / "smollm2-135m" / f"{config}.yaml", "--model_name_or_path", tiny_folder / "model"),
        *("--data_files", tiny_folder / "data.jsonl", "--dataset_name", "", "--text_template", "Q: {question} A: {answer}"),
        *("--output_dir", tiny_folder / "out", *TINY_OPTIONS),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tiny_folder / "out" / "results.json").read_text())
    assert set(results["bits_per_token"]) == {"base", "no_think", "think", "random_thought"}
    assert {"gain", "gain_stderr", "mean_think_length", "steps_per_second", "config", "versions", "hardware", "commit"} <= set(results)
    assert results["config"]["max_steps"] == 2
    assert "bits per token" in done.stdout
    assert done.stdout.splitlines()[-1] == str(tiny_folder / "out" / "report.html")
    assert "Held-out text 1" in (tiny_folder / "out" / "report.html").read_text()
    reload = (
        "import sys; sys.modules['hf_thinktok'] = None; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"m, t = M.from_pretrained({str(tiny_folder / 'out')!r}), T.from_pretrained({str(tiny_folder / 'out')!r}); "
        "m.generate(**t('a', return_tensors='pt'), max_new_tokens=8)"
    )
    assert started("-c", reload).returncode == 0


def test_text_files_and_streams(tiny_folder):
    done = in_process(
        RECIPE,
        *("--model_name_or_path", tiny_folder / "model", "--data_files", tiny_folder / "data.txt", "--dataset_streaming", "--stop", "fixed"),
        *("--output_dir", tiny_folder / "out", *TINY_OPTIONS),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tiny_folder / "out" / "results.json").exists()


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.jsonl", "rows.jsonl.gz"])
def test_files_of_every_kind_are_read(tmp_path, name):
    rows = pandas.DataFrame({"text": CORPUS[:3]})
    if name.endswith(".parquet"):
        rows.to_parquet(tmp_path / name)
    elif name.endswith(".csv"):
        rows.to_csv(tmp_path / name, index=False)
    else:
        rows.to_json(tmp_path / name, orient="records", lines=True)
    assert list(load_text(TextArguments(data_files=[str(tmp_path / name)]))["text"]) == CORPUS[:3]


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize(
    ("rows", "template", "texts"),
    [
        ([{"text": "a"}, {"text": None}, {"text": " "}], None, ["a"]),
        ([{"q": "a", "n": 1}, {"q": None, "n": 2}], r"{q}\n\t{n}", ["a\n\t1"]),  # as it comes from a shell
        ([{"q": "a", "n": 1}], "{q}\n{n}", ["a\n1"]),  # as it comes from YAML
        ([{"q": ["a", "b"]}, {"q": None}], "{q[1]}", ["b"]),
    ],
    ids=["no template", "shell", "yaml", "nested"],
)
def test_rows_without_text_are_left_out(tmp_path, rows, template, texts, streaming, caplog):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = load_text(TextArguments(data_files=[str(tmp_path / "rows.jsonl")], text_template=template, dataset_streaming=streaming))
    assert [row["text"] for row in read] == texts
    told = "" if streaming or len(rows) == len(texts) else f"{len(rows) - len(texts)} of {len(rows)} rows have no text"
    assert told in caplog.text
    assert bool(told) == ("no text" in caplog.text)


def test_a_template_leaves_what_a_row_says_of_thinking(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "a", "level": 2, "think_length": [1, 0], "thoughts": [3]}))
    (row,) = load_text(TextArguments(data_files=[str(tmp_path / "rows.jsonl")], text_template="{q}"))
    assert row == {"text": "a", "level": 2, "think_length": [1, 0], "thoughts": [3]}


def test_a_data_set_that_python_alone_reads(tmp_path):
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="was written by save_to_disk, which is for Python alone: write it with to_parquet"):
        load_text(TextArguments(dataset_name=str(tmp_path / "saved")))


def test_a_folder_of_files_that_are_no_one_data_set(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({f"column {number}": "a"}))
    with pytest.raises(ValueError, match="its files have different columns") as error:
        load_text(TextArguments(dataset_name=str(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "template", "sentence"),
    [
        ({"q": "a"}, "{q} {}", "names the column '', and the data has ['q']."),
        ({"q": "a"}, "{q.x}", "text_template='{q.x}' does not fit the data"),
        ({"q": "a"}, "{q[x]}", "text_template='{q[x]}' does not fit the data"),
        ({"q": "a"}, "{q", "text_template='{q' cannot be read"),
        ({"n": 1, "q": "a"}, None, "for example --text_template '{q}'"),
        ({"messages": []}, None, "No row of the data has text"),
        ({"numbers": [1]}, None, "give data with a column of strings"),
        ({"prompt": "a"}, None, "no 'text', 'prompt' with 'completion', or 'messages': make it with text_template, for example --text_template '{prompt}'"),
        ({"text": 1}, None, "No row of the data has text"),
        ({"text": "a"}, "no column", "names no column, so that all documents would be alike"),
        ({"text": "a"}, "{text", "text_template='{text' cannot be read"),
    ],
)
def test_data_and_templates_that_make_no_text(tmp_path, row, template, sentence):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_text(TextArguments(data_files=[str(tmp_path / "rows.jsonl")], text_template=template))


def test_one_file_need_not_be_a_list(tmp_path):
    (tmp_path / "text.txt").write_text("a line\n")
    assert load_text(TextArguments(data_files=str(tmp_path / "text.txt")))["text"] == ["a line"]


def test_options_are_told_and_no_secret():
    args = ThinkTokConfig("out", bf16=False, use_cpu=True, eos_token="<|im_end|>", pad_token="<|endoftext|>", hub_token="hf_secret")
    changed = changed_options(args)
    assert {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}.items() <= changed.items()
    assert "hf_secret" not in str(changed)


def test_figures_of_the_documents_that_chose_a_checkpoint_are_said_to_flatter_it(tiny_folder):
    best = ("--load_best_model_at_end", "true", "--metric_for_best_model", "gain", "--eval_strategy", "steps", "--save_strategy", "steps")
    done = in_process(
        RECIPE,
        *("--model_name_or_path", tiny_folder / "model", "--data_files", tiny_folder / "data.jsonl", "--output_dir", tiny_folder / "out", *TINY_OPTIONS),
        *("--text_template", "Q: {question} A: {answer}", *best, "--eval_steps", "1", "--save_steps", "1", "--max_steps", "3", "--learning_rate", "0.1"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tiny_folder / "out" / "results.json").read_text())
    log = json.loads((tiny_folder / "out" / "trainer_state.json").read_text())["log_history"]
    gains = {entry["step"]: entry["eval_gain"] for entry in log if "eval_gain" in entry and entry["step"] > 0}
    assert (results["steps"], results["best_of"]) == (max(gains, key=gains.get), 3)
    assert results["gain"] == pytest.approx(max(gains.values()), abs=1e-6)
    words = "The same documents chose this checkpoint, the best of 3 evaluations"
    assert words in " ".join(done.stdout.split())
    assert words in (tiny_folder / "out" / "report.html").read_text()
    assert words in render_card(results, "me/model", num_tokens=4, whole=False)


def test_where_nothing_is_thought_the_run_ends_without_results(tiny_folder):
    rows = [{"text": text} for text in CORPUS[:31]] + [{"text": "one row alone has it: here"}]  # which is not held out
    (tiny_folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tiny_folder / "out").mkdir()
    (tiny_folder / "out" / "results.json").write_text('{"of": "an earlier run"}')
    done = in_process(
        RECIPE,
        *("--model_name_or_path", tiny_folder / "model", "--data_files", tiny_folder / "data.jsonl", "--output_dir", tiny_folder / "out", *TINY_OPTIONS),
        *("--fork_positions", "markers", "--fork_markers", "has it:", "--max_steps", "1"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Nothing was thought in the held-out text" in done.stderr
    assert (tiny_folder / "out" / "model.safetensors").exists()
    assert not (tiny_folder / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a line"}' * 100, mtime=0)[:20]),
        ("latin.jsonl", '{"text": "caf\xe9"}'.encode("latin-1")),
        ("mixed.jsonl", b'{"text": "a"}\n{"text": 3}\n{bad'),
        ("header.csv", b"text\n"),
        ("corrupt.parquet", b"PAR1"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} cannot be read as"):
        load_text(TextArguments(data_files=[str(tmp_path / name)]))


def test_help_names_every_option():
    done = in_process(RECIPE, "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    ours = [f.name for f in fields(ThinkTokConfig) if f.name in ThinkTokConfig.__annotations__]
    assert len(ours) > 30
    for name in (*ours, "data_files", "text_template", "held_out_documents", "model_name_or_path", "use_peft"):
        assert f"--{name}" in done.stdout


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--num_generations", "1"], "error: num_generations=1"),
        (["--text_template", "{qestion}"], "names the column"),
        (["--enable_jit_checkpoint", "true", "--text_template", "{question}"], "SIGTERM saves a checkpoint already"),
        (["--dataset_test_splits", "validation"], "dataset_test_splits, which is not known; did you mean dataset_test_split?"),
        (["--dataset_test_split", "validation"], "dataset_test_split=validation has no effect with data_files, which have no splits: leave it out."),
        ([], "make it with text_template"),
        (["--text_template", "{question}", "--dataset_text_field", "body"], "make the text with --text_template '{body}'"),
        (["--text_template", "{question}", "--resume_from_checkpoint", "true"], "There is no whole checkpoint in"),
        (["--text_template", "{question}", "--max_steps", "-1", "--num_train_epochs", "0"], "a run of no step"),
        (["--text_template", "{question}", "--max_steps", "-1", "--num_train_epochs", "1", "--think_start", "1000"], "is not reached in a run of"),
        (["--text_template", "{question}", "--per_device_train_batch_size", "64", "--dataloader_drop_last", "true"], "No step was taken"),
        (["--config", "{folder}/broken.yaml"], "the config is no YAML"),
        (["--data_files", "README.md"], "files that end in .txt, .jsonl"),
        (["--data_files", "{folder}/no*.jsonl"], "and there is no such file"),
        (["--data_files", "{folder}"], "which is a folder: give the files in it"),
        (["--sample_by", "paragraph"], "sample_by=paragraph has no effect here"),
        (["--held_out_documents", "1"], "held_out_documents=1 is too few for an interval"),
        (["--report_documents", "-1"], "report_documents=-1 must be at least 0"),
        (["--text_template", "{question}", "--lora_r", "4"], "lora_r has no effect without use_peft"),
        (["--text_template", "{question}", "--held_out_documents", "0", "--eval_strategy", "steps"], "eval_strategy=steps has nothing to evaluate on"),
        (["--text_template", "{question}", "--lr_scheduler_type", "warmup_stable_decay"], "lr_scheduler_type=warmup_stable_decay does not go with"),
        (["--text_template", "{question}", "--output_dir", "{folder}/model"], "is the model's own folder, which would be written over"),
        (["--max_steps", "0"], "max_steps=0 is a run of no step"),
        (["--text_template", "{question}", "--output_dir", "{folder}/data.txt/out"], "nothing can be written to {folder}/data.txt"),
        (["--data_files", "pyproject.toml", "README.md"], "pyproject.toml"),
        (["--data_files", "{folder}/data.txt", "{folder}/data.jsonl"], "several kinds (json, text)"),
        (["--data_files", "{folder}/broken.jsonl"], "broken.jsonl cannot be read as json"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--model_name_or_path", "{folder}/nowhere", "--text_template", "{question}"], "There is no model at"),
        (
            ["--held_out_documents", "1000", "--text_template", "{question}"],
            "held_out_documents=1000 leaves nothing of 40 documents: give a smaller number, or 0 for none.",
        ),
    ],
)
def test_wrong_input_ends_in_one_sentence(tiny_folder, options, sentence):
    (tiny_folder / "broken.yaml").write_text("num_forks: [1")
    done = in_process(
        RECIPE,
        *("--model_name_or_path", tiny_folder / "model", "--data_files", tiny_folder / "data.jsonl"),
        *("--output_dir", tiny_folder / "out", *TINY_OPTIONS, *(option.replace("{folder}", str(tiny_folder)) for option in options)),
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert sentence.replace("{folder}", str(tiny_folder)) in last


CONFIGS = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "lm_eval")  # those are the harness's own
COMPARISONS = [path for path in CONFIGS if path.stem.startswith("compare_")]
MIXTURES = [path for path in CONFIGS if "\ntask_share:" in path.read_text()]
TOYS = [path for path in CONFIGS if "\ntask:" in path.read_text() and path not in MIXTURES]
# Each with the config that it changes.
VARIANTS = {
    "ablations": "mod_add_30",
    "pointer_chasing_controls": "pointer_chasing",
    "pointer_chasing_offsets_controls": "pointer_chasing_offsets",
    "pointer_chasing_offsets_deep": "pointer_chasing_offsets",
    "pointer_chasing_offsets_fillers": "pointer_chasing_offsets",
    "s5_controls": "s5",
    "s5_controls_long": "s5",
    "s5_deep": "s5",
    "s5_fillers": "s5",
    "s5_fillers_long": "s5",
    "s5_super": "s5",
    "s5_places_controls": "s5_places",
    "s5_places_controls_long": "s5_places",
    "s5_places_super": "s5_places",
    "pointer_chasing_costs": "pointer_chasing_stop",
    "pointer_chasing_credit": "pointer_chasing",
    "pointer_chasing_deep": "pointer_chasing",
    "pointer_chasing_deep_fillers": "pointer_chasing",
    "pointer_chasing_deep_more": "pointer_chasing",
    "pointer_chasing_twice": "pointer_chasing",
    "pointer_chasing_doubling": "pointer_chasing",
    "serial_smollm2_walk_words": "serial_smollm2_walk",
    "gsm8k_steps_arms": "gsm8k_steps_cpu",
}


MODELS = [path for path in CONFIGS if "\nvocab_size:" in path.read_text()]
OTHERS = [*TOYS, *MIXTURES, *COMPARISONS, *MODELS]


@pytest.mark.parametrize("path", [path for path in CONFIGS if path not in OTHERS and path.stem not in VARIANTS], ids=lambda path: path.stem)
def test_every_yaml_file_is_read_as_it_stands(path, monkeypatch):
    monkeypatch.syspath_prepend(RECIPE.parent)
    recipe = importlib.import_module("pretrain_think")
    parser = TrlParser((recipe.PretrainArguments, ThinkTokConfig, ModelConfig))
    script, args, model = parser.parse_args_and_config(["--config", str(path)], fail_with_unknown_args=True)
    assert args.thinks or args.num_think_tokens == 0
    assert script.dataset_name
    assert model.model_name_or_path


def test_a_small_model_is_made_of_the_text_that_it_is_trained_on(tiny_folder):
    """Of that part alone, and for any text."""
    (tiny_folder / "words.jsonl").write_text("\n".join(json.dumps({"text": f"{word} " * 50}) for word in ("aardvark", "butterfly", "crocodile", "dragonfly")))
    (path,) = MODELS
    done = in_process(
        ROOT / "recipes" / "small_model.py",
        *("--config", path, "--data_files", tiny_folder / "words.jsonl", "--held_out_documents", 2, "--test_documents", 0, "--vocab_size", 290),
        *("--model_shape", '{"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}'),
        *("--output_dir", tiny_folder / "small"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tokenizer, text = AutoTokenizer.from_pretrained(tiny_folder / "small"), "Größe\n\t<b> 語 🙂 aardvark"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    parts = load_parts(TextArguments(data_files=[str(tiny_folder / "words.jsonl")], held_out_documents=2))
    for part, known in ((parts.train, True), (parts.held_out, False)):
        assert all((len(tokenizer(row["text"].split()[0])["input_ids"]) < 4) is known for row in part)
    done = in_process(
        RECIPE,
        *("--model_name_or_path", tiny_folder / "small", "--data_files", tiny_folder / "data.jsonl", "--text_template", "{question}: {answer}"),
        *("--output_dir", tiny_folder / "out", *TINY_OPTIONS),
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [(("--vocab_size", 256), "vocab_size=256 must be at least 257"), (("--model_shape", "{}"), "There is no model: give model_shape with a model_type")],
)
def test_a_small_model_that_cannot_be_made(options, sentence):
    done = in_process(ROOT / "recipes" / "small_model.py", "--config", MODELS[0], *options)
    assert done.returncode != 0
    assert sentence in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_comparison_is_read_as_it_stands(path, monkeypatch):
    monkeypatch.syspath_prepend(RECIPE.parent)
    recipe = importlib.import_module("compare")
    chosen, script, args, _ = TrlParser((recipe.CompareArguments, *recipe.KINDS)).parse_args_and_config(["--config", str(path)], fail_with_unknown_args=True)
    assert args.thinks
    assert args.max_steps > 0
    assert script.test_documents > 0
    assert (ROOT / chosen.accelerate_config).exists()


@pytest.fixture
def toy_parser(monkeypatch):
    monkeypatch.syspath_prepend(RECIPE.parent)
    # A new one for each file: a parser keeps what it has read as its defaults.
    return lambda: TrlParser((importlib.import_module("toy").ToyArguments, ThinkTokConfig, ModelConfig))


@pytest.mark.parametrize("path", TOYS, ids=lambda path: path.stem)
def test_every_toy_config_is_read_as_it_stands(path, toy_parser):
    toy, args, model = toy_parser().parse_args_and_config(["--config", str(path)], fail_with_unknown_args=True)
    assert args.thinks
    assert toy.task_options
    assert bool(toy.model_shape) != bool(model.model_name_or_path)


@pytest.mark.parametrize("path", MIXTURES, ids=lambda path: path.stem)
def test_every_mixture_is_read_as_it_stands(path, monkeypatch):
    monkeypatch.syspath_prepend(RECIPE.parent)
    parser = TrlParser((importlib.import_module("serial_in_text").MixtureArguments, TextArguments, ThinkTokConfig, ModelConfig))
    mixed, _, args, model = parser.parse_args_and_config(["--config", str(path)], fail_with_unknown_args=True)
    assert args.thinks
    assert mixed.task_options
    assert model.model_name_or_path


@pytest.mark.parametrize(("variants", "base"), VARIANTS.items())
def test_every_variant_is_a_run_that_can_be_made(variants, base, toy_parser, tmp_path):
    paths = {path.stem: path for path in CONFIGS}
    options = yaml.safe_load(paths[base].read_text())
    for name, changes in yaml.safe_load(paths[variants].read_text()).items():
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(options | changes))
        toy, args, _ = toy_parser().parse_args_and_config(["--config", str(tmp_path / "config.yaml")], fail_with_unknown_args=True)
        controlled = control_of(args, toy.control)
        assert controlled.thinks == (toy.control != "no_think"), name


@pytest.mark.parametrize("kind", ["no_think", "filler"])
def test_controls_of_thoughts_that_are_trained_on_more_than_once(kind):
    """Clipping is of ratios that a control has not."""
    again = {"num_iterations": 4, "epsilon": 0.3, "epsilon_high": 0.4, "delta": 3.0, "importance_sampling_level": "sequence", "max_steps": 4}
    assert control_of(ThinkTokConfig("out", stop="fixed", use_cpu=True, bf16=False, **again), kind).num_iterations == 1


@pytest.mark.parametrize("other", [{"messages": [{"role": "user", "content": "hello"}]}, {"prompt": "a", "completion": "b"}], ids=lambda other: [*other][0])
def test_the_text_is_trained_on_whatever_columns_stand_beside_it(other, tmp_path):
    """TRL would take a chat, or a prompt and its completion, rather than the text."""
    (tmp_path / "both.jsonl").write_text("".join(json.dumps({"text": f"the cat {i}", **other}) + "\n" for i in range(4)))
    assert load_text(TextArguments(data_files=[str(tmp_path / "both.jsonl")])).column_names == ["text"]
