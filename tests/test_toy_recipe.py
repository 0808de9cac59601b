"""The toy recipe as a user starts it, and every config of it and of the peers on a tiny model."""

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from commands import ROOT, InProcess, in_process
from datasets import Dataset
from models import CORPUS, save_tiny, tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerControl
from trl import ModelConfig

from hf_thinktok import ThinkTokConfig, ThinkTokTrainer, results
from hf_thinktok.curriculum import Curriculum
from hf_thinktok.peft import load_whole
from hf_thinktok.tasks import make_task
from hf_thinktok.tokens import ThinkingVocabulary

TOYS = sorted(path for path in (ROOT / "recipes" / "toy").glob("*.yaml") if "\ntask:" in path.read_text() and "\nmodel_shape:" in path.read_text())
PEERS = sorted(path for path in (ROOT / "recipes" / "peers").glob("*.yaml") if "dataset_name" in path.read_text())


def run_toy(config, *options):
    return in_process(ROOT / "recipes" / "toy.py", "--config", config, *options)


@pytest.mark.parametrize("config", [*TOYS, ROOT / "recipes" / "peers" / "thinktokens.yaml"], ids=lambda path: path.stem)
def test_a_toy_config_trains_measures_and_reports(config, tmp_path):
    options = yaml.safe_load(config.read_text())
    small = {"train_rows": 64, "test_rows": 40} | ({"levels": [1, 2, 3], "test_levels": [3, 4]} if "levels" in options["task_options"] else {})
    thresholds = options.get("curriculum_threshold", 0.9)
    passes, lengths = thresholds[:2] if isinstance(thresholds, list) else [thresholds], options.get("curriculum_think_length", [])
    done = run_toy(
        config, "--output_dir", tmp_path, "--seeds", 3, 11, "--max_steps", 2, "--per_device_train_batch_size", 8, "--check_every", 1, "--check_rows", 8,
        "--test_rows", 16, "--save_models", "true", "--think_start", 0, "--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", "{}",
        "--task_options", json.dumps(options["task_options"] | small), *(["--curriculum_threshold", *passes] if "curriculum_threshold" in options else []),
        *(["--curriculum_think_length", *lengths[:2], lengths[-1]] if lengths else []),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last["seeds"] == [3, 11]
    assert len(last["accuracy"]) == 2
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"task", "config", "versions", "hardware", "commit", "levels", "shortcut"} <= set(results)
    assert [run["seed"] for run in results["runs"]] == [3, 11]
    assert all(run["level"] == (1 if "curriculum_threshold" in options else max(results["levels"])) for run in results["runs"]), "in so few steps"
    if "levels" in small and results["runs"][0]["language"]:
        of = 4 if "curriculum_threshold" in options else 3  # the hardest that is tested, of those that were trained on where there is one
        assert [run["language"]["level"] for run in results["runs"]] == [of, of]
    asked_by_thoughts = options.get("blind", False) or options["task_options"].get("fill", False)  # then nothing is asked without them
    assert ("none" in results["runs"][0]["accuracy"]) != asked_by_thoughts
    assert (tmp_path / "accuracy.svg").exists() == (len(results["shortcut"]) > 1), "a picture of accuracy against level needs levels"
    if results["config"].get("thoughts", "discrete") == "discrete":
        assert json.loads((tmp_path / "seed-3" / "language.json").read_text())
        assert (tmp_path / "seed-3" / "language.png").stat().st_size > 1000
        assert done.stdout.count("Thoughts at step 2") == (0 if options.get("memory") == "persistent" else 2), "samples, but of rows with one question each"
    AutoModelForCausalLM.from_pretrained(tmp_path / "seed-11")


def test_a_model_that_thinks_goes_on_to_learn_when_to_stop(tmp_path):
    toys = ROOT / "recipes" / "toy"
    small = ["--max_steps", 2, "--per_device_train_batch_size", 8, "--check_every", 0, "--test_rows", 16, "--task_options"]
    small.append(json.dumps({"nodes": 5, "levels": [1, 2, 3], "train_rows": 32, "test_rows": 32}))
    first = run_toy(toys / "pointer_chasing_positions.yaml", "--output_dir", tmp_path / "first", "--seeds", 3, *small)
    assert first.returncode == 0, first.stderr[-2000:]
    then = run_toy(
        toys / "pointer_chasing_stop.yaml", "--output_dir", tmp_path / "then", "--seeds", 5, "--model_name_or_path", tmp_path / "first" / "seed-3", *small
    )  # fmt: skip
    assert then.returncode == 0, then.stderr[-2000:]
    assert "mean length" in then.stdout
    (run,) = json.loads((tmp_path / "then" / "results.json").read_text())["runs"]
    assert set(run["accuracy"]) == {"think", "random", "none", "generate"}, "its gate alone ends its thoughts there"
    assert set(run["accuracy"]["generate"]) == set(run["think_length"]) == {"1", "2", "3"}
    assert "its own, in plain generate" in then.stdout
    assert all(0 < length < 7 for length in run["think_length"].values())


def test_a_task_in_text_is_measured_on_both(tmp_path):
    save_tiny(tmp_path / "model", think_tokens=32)
    (tmp_path / "text.txt").write_text("\n".join(f"{text.strip()} {i}".replace("\n", " ") for i, text in enumerate(CORPUS * 2)))
    command = [
        ROOT / "recipes" / "serial_in_text.py", "--config", ROOT / "recipes" / "smollm2-135m" / "serial_in_text.yaml", "--model_name_or_path",
        tmp_path / "model", "--data_files", tmp_path / "text.txt", "--held_out_documents", 8, "--text_length", 24, "--max_steps", 2, "--test_rows", 8,
        "--held_out_forks", 4, "--max_think_length", 3, "--output_dir", tmp_path / "out", "--save_strategy", "steps", "--save_steps", 1, "--beta", 0.1,
        "--task_options", json.dumps({"nodes": 5, "levels": [1, 2], "test_levels": [1, 2, 3], "train_rows": 32, "test_rows": 32}),
    ]  # fmt: skip
    assert in_process(*command, "--push_to_hub", "true").stderr.startswith("error: push_to_hub would put several models into one place")
    two = in_process(*command, "--settle_steps", 1, "--policies", "split", "--beta", 0).stderr.splitlines()[-1]
    assert two.startswith("error: settle_steps are for one model with thoughts of tokens")
    assert in_process(*command, "--settle_steps", -1).stderr.splitlines()[-1] == "error: settle_steps=-1 must be 0 or more."
    nowhere = in_process(*command, "--model_name_or_path", "outputs/not/there").stderr.splitlines()[-1]
    assert nowhere.startswith("error: There is no model at 'outputs/not/there': give a folder")
    done = in_process(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "twin without thinking" in done.stdout
    assert "think, over cpt" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    twin, thinks = results["mixture"]
    assert list(twin["accuracy"]) == ["none"]
    assert set(thinks["accuracy"]) == {"think", "random", "none"}
    assert set(thinks["think_length"]) == {"1", "2", "3"}
    assert results["text"]["documents"] == 8
    assert results["levels"] == [1, 2], "what was trained on"
    start, trained = (results["text"]["arms"][arm]["bits_per_token"] for arm in ("base", "cpt"))
    assert trained != start
    assert load_whole(str(tmp_path / "out" / "think-seed0"))[0].config.thinktok["stop"] == "learned"
    shutil.rmtree(tmp_path / "out" / "think-seed0" / "checkpoint-2")  # as if it had been cut off, and the twin not
    kept = [tmp_path / "out" / folder / "complete" for folder in ("think-seed0/checkpoint-1", "cpt-seed0/checkpoint-2")]
    written = [file.stat().st_mtime_ns for file in kept]
    again = in_process(*command, "--resume_from_checkpoint", "true")
    assert again.returncode == 0, again.stderr[-2000:]
    assert [file.stat().st_mtime_ns for file in kept] == written, "steps were made again"
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["mixture"], found["text"]) == (results["mixture"], results["text"])
    # The gate may settle in the end, which changes thoughts alone.
    stale = tmp_path / "out" / "think-seed0" / "settled" / "adapter_config.json"
    stale.parent.mkdir()
    stale.write_text("{}")
    settled = in_process(*command, "--resume_from_checkpoint", "true", "--settle_steps", 3)
    assert settled.returncode == 0, settled.stderr[-2000:]
    assert not stale.exists(), "it would be loaded in the model's place"
    after = json.loads((tmp_path / "out" / "results.json").read_text())
    assert after["mixture"][1]["think_length"] != thinks["think_length"]
    assert after["mixture"][1]["accuracy"]["none"] == thinks["accuracy"]["none"]
    arms, before = after["text"]["arms"], results["text"]["arms"]
    assert arms["think"]["bits_per_token"] != before["think"]["bits_per_token"]
    assert arms["think without thoughts"]["bits_per_token"] == pytest.approx(before["think without thoughts"]["bits_per_token"], abs=1e-5)  # but for merging
    assert all(arms[arm] == before[arm] for arm in ("base", "cpt"))
    gate, whole = (load_whole(str(tmp_path / "out" / "think-seed0" / folder), dtype="float32")[0] for folder in ("settled", ""))
    vocabulary = ThinkingVocabulary.from_config(gate.config)
    ids = slice(vocabulary.first_id, vocabulary.guard_id)
    embedding, moved = whole.get_input_embeddings().weight, gate.get_output_embeddings().weight - whole.get_output_embeddings().weight
    torch.testing.assert_close(gate.get_input_embeddings().weight, embedding)
    assert moved[ids].abs().max() > 1e-3
    torch.testing.assert_close(moved[ids], moved[ids].mean(0).expand_as(moved[ids]), msg="what is thought has changed")
    # Or the thinking model is the twin, and learns when to think: without thoughts they are one.
    assert in_process(*command, "--on_twin", "true").stderr.splitlines()[-1].startswith("error: on_twin leaves it to settle_steps")
    grown = in_process(*command, "--resume_from_checkpoint", "true", "--on_twin", "true", "--settle_steps", 3)
    assert grown.returncode == 0, grown.stderr[-2000:]
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    arms = found["text"]["arms"]
    assert arms["cpt"] == before["cpt"]
    assert arms["think without thoughts"]["bits_per_token"] == arms["cpt"]["bits_per_token"] != arms["think"]["bits_per_token"]
    assert found["mixture"][1]["accuracy"]["none"] == twin["accuracy"]["none"]
    fixed = in_process(
        command[0], "--model_name_or_path", tmp_path / "model", "--data_files", tmp_path / "text.txt", "--held_out_documents", 8, "--stop", "fixed",
        "--settle_steps", 3, "--output_dir", tmp_path / "fixed",
    ).stderr.splitlines()[-1]  # fmt: skip
    assert fixed.startswith("error: settle_steps=3 train the gate, and stop=fixed has none that learns")


@pytest.mark.parametrize("control", ["no_think", "filler"])
def test_a_control_cannot_think(control, tmp_path):
    done = run_toy(
        ROOT / "recipes" / "toy" / "pointer_chasing.yaml", "--control", control, "--output_dir", tmp_path, "--seeds", 0, "--max_steps", 2,
        "--per_device_train_batch_size", 8, "--test_rows", 8, "--check_every", 0, "--task_options",
        json.dumps({"nodes": 5, "levels": [1, 2, 3], "train_rows": 32, "test_rows": 16}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["control"] == control
    assert list(results["runs"][0]["accuracy"]) == (["none"] if control == "no_think" else ["think"])


@pytest.mark.parametrize(("control", "hows"), [("none", ["think", "random", "none"]), ("no_think", ["none"]), ("filler", ["think"])])
def test_a_pretrained_model_thinks_while_it_reads_and_its_controls_do_not(control, hows, tmp_path):
    save_tiny(tmp_path / "model")
    done = run_toy(
        ROOT / "recipes" / "toy" / "serial_smollm2_walk.yaml", "--model_name_or_path", tmp_path / "model", "--control", control, "--output_dir",
        tmp_path / "out", "--max_steps", 2, "--per_device_train_batch_size", 4, "--test_rows", 8, "--check_every", 1, "--check_rows", 8, "--task_options",
        json.dumps({"nodes": 5, "together": 4, "levels": [2, 4], "test_levels": [1, 2, 5], "train_rows": 32, "test_rows": 16}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {how: list(levels) for how, levels in results["runs"][0]["accuracy"].items()} == dict.fromkeys(hows, ["1", "2", "5"])
    assert len({levels["1"] for levels in results["runs"][0]["accuracy"].values()}) == 1  # a single step has no place to think at
    if control == "none":
        language = json.loads((tmp_path / "out" / "seed-0" / "language.json").read_text())
        assert language["length"] == 1  # of two steps, the hardest that are both trained and tested
        assert language["states"]  # what a word should mean, by the task
    load_whole(str(tmp_path / "out" / "seed-0"))


@pytest.mark.parametrize("config", PEERS, ids=lambda path: path.stem)
def test_a_peer_s_config_runs_a_few_steps(config, tmp_path):
    known = {field.name for field in dataclasses.fields(ThinkTokConfig)}
    options = {name: value for name, value in yaml.safe_load(config.read_text()).items() if name in known}
    small = {"output_dir": str(tmp_path), "max_length": 64, "max_steps": 2, "per_device_train_batch_size": 2, "max_think_length": 3, "save_strategy": "no"}
    small |= {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "num_forks": 4} if options.get("fork_positions") != "all" else {
        "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True
    }  # fmt: skip
    tokenizer = tiny_tokenizer()
    trainer = ThinkTokTrainer(
        tiny_model(vocab_size=len(tokenizer)),
        ThinkTokConfig(**options | small | {"lookahead": min(options.get("lookahead", 1), 4), "logging_steps": 1}),
        train_dataset=Dataset.from_dict({"text": CORPUS}),
        processing_class=tokenizer,
    )
    row = 10 if options.get("thoughts") == "continuous" else trainer.vocabulary.first_id  # continuous thoughts have no ids
    before = trainer.model.get_input_embeddings().weight[row].clone()
    trainer.train()
    assert all(float(entry["loss"]) > 0 for entry in trainer.state.log_history if "loss" in entry)
    assert not before.equal(trainer.model.get_input_embeddings().weight[row])


@pytest.mark.parametrize(
    ("curriculum", "stop", "ends"),
    [(None, "fixed", False), (Curriculum([1, 2], [0.9]), "fixed", True), (Curriculum([1, 2], [0.9]), "learned", False)],
    ids=["all levels", "a curriculum", "a learned stop"],
)
def test_a_run_ends_when_every_level_that_it_trains_at_once_is_learned(curriculum, stop, ends, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    toy = importlib.import_module("toy")
    monkeypatch.setattr(toy, "answer", lambda trainer, rows, how: SimpleNamespace(accuracy={1: 0.5, 2: 1.0}[rows["level"][0]]))
    args = SimpleNamespace(thinks=True, think_start=1, stop=stop)
    trainer = SimpleNamespace(args=args, curriculum=curriculum, spent=SimpleNamespace(seconds=1.0))
    progress, control = toy.Progress(trainer, Dataset.from_dict({"level": [1, 2, 2]}), every=1, count=1, enough=0.9, hows=["think", "none"]), TrainerControl()
    logged = []
    progress.on_step_end(None, SimpleNamespace(global_step=1, log_history=logged), control)
    assert not logged  # there were no thoughts yet
    progress.on_step_end(None, SimpleNamespace(global_step=2, log_history=logged), control)
    assert [entry["check"]["accuracy"] for entry in logged] == [1.0 if ends else 0.5]
    assert control.should_training_stop == ends
    cells = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]  # of a curriculum, what its thoughts are compared with
    assert [[cell.strip() for cell in row] for row in cells] == ([["1", "begins", "50.0"]] if curriculum else [])


def test_each_seed_goes_on_from_its_own_checkpoint(tmp_path):
    """One was cut off after two steps and one had not begun; what they come to is what a run comes to that nobody cut off."""
    small = ["--max_steps", 4, "--per_device_train_batch_size", 8, "--check_every", 1, "--check_rows", 8, "--stop_accuracy", 2, "--test_rows", 16]
    small += ["--save_strategy", "steps", "--save_steps", 2, "--seeds", 3, 11, "--save_models", "true", "--think_start", 0]
    small += ["--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", "{}"]
    config, whole, cut = ROOT / "recipes" / "toy" / "mod_add_100_shared.yaml", tmp_path / "whole", tmp_path / "cut"
    assert run_toy(config, "--output_dir", whole, *small).returncode == 0
    shutil.copytree(whole / "seed-3" / "checkpoint-2", cut / "seed-3" / "checkpoint-2")
    kept = (cut / "seed-3" / "checkpoint-2" / "complete").stat().st_mtime_ns
    done = run_toy(config, "--output_dir", cut, *small, "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (cut / "seed-3" / "checkpoint-2" / "complete").stat().st_mtime_ns == kept, "its first steps were made again"
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (whole, cut))
    for run in (*one["runs"], *other["runs"]):
        assert [check["step"] for check in run["curve"]] == [1, 2, 3, 4]
        assert run.pop("seconds") >= run["curve"][-1]["seconds"] - 0.1  # a check's are rounded
        run["curve"] = [check | {"seconds": None} for check in run["curve"]]
    assert (one["runs"], one["config"]) == (other["runs"], other["config"])
    for seed in (3, 11):
        weights = [load_file(folder / f"seed-{seed}" / "model.safetensors") for folder in (whole, cut)]
        assert all(weights[0][name].equal(weights[1][name]) for name in weights[0]), seed


@pytest.mark.parametrize(("name", "options", "stepwise"), [("mod_add", {"modulus": 10, "slack": 0}, False), ("sorting", {"levels": [12]}, True)])
def test_a_language_is_compared_with_what_its_task_has(name, options, stepwise, monkeypatch, tmp_path):
    """Sums have no steps on the way, and the number of a sorted list is too large to count up to."""
    monkeypatch.syspath_prepend(ROOT / "recipes")
    toy = importlib.import_module("toy")
    task = make_task(name, train_rows=50, test_rows=50, **options)
    thoughts = np.asarray(task.test["thoughts"])
    monkeypatch.setattr(toy, "answer", lambda trainer, rows: SimpleNamespace(thoughts_DL=thoughts))
    trainer = SimpleNamespace(vocabulary=SimpleNamespace(num_tokens=10), args=SimpleNamespace(output_dir=tmp_path))
    report = toy.report_language(trainer, task.test, task)
    assert (report["states"] is not None) == stepwise
    assert report["distinct_answers"] == len(set(task.test["answer"]))
    figures = toy.figures_of(report)
    assert figures["information"] == report["information"]
    assert figures.get("purity") == (1.0 if stepwise else None), "thoughts that are the task's own steps name them"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--load_in_4bit", "true"), "error: load_in_4bit and load_in_8bit have no effect here"),
        (("--task", "mod_ad"), "error: There is no task 'mod_ad'; did you mean 'mod_add'?"),
        (("--search", "-3"), "search=[-3.0] is no schedule"),
        (("--task", "worked_steps", "--task_options", "{}"), "do not fit task=worked_steps: missing a required argument: 'file'"),
        (("--use_peft", "--lora_target_modules", "nowhere"), "nowhere"),
        (("--model_name_or_path", "somebody/model"), "error: model_shape has no effect with model_name_or_path: leave one of the two out."),
        (("--model_name_or_path", "somebody/model", "--word_sums", 1), "error: word_sums has no effect with model_name_or_path: leave one of the two out."),
        (("--word_sums", -1), "error: word_sums=-1 must be a standard deviation"),
        (("--word_sums", 1), "error: word_sums: no word of this task has several parts"),
        (("--model_init_kwargs", '{"dtype": "bfloat16"}'), "error: The model is loaded already and model_init_kwargs would do nothing"),
        (("--push_to_hub", "true"), "error: push_to_hub would put several models into one place"),
        (("--resume_from_checkpoint", "true"), "error: There is no whole checkpoint in"),
        (("--seed", 7), "error: seed has no effect here, where each run has one of its own: give seeds."),
        (("--seeds", 3, 4, "--resume_from_checkpoint", "checkpoint-2"), "error: resume_from_checkpoint=checkpoint-2 is one run's, and there are 2"),
        (
            ("--control", "no_think", "--task", "permutations", "--task_options", '{"pad_to": 4, "fill": true}'),
            "error: control=no_think: these task_options let the number of thoughts tell what is asked, as fill does: leave that out.",
        ),
    ],
)
def test_wrong_options_end_in_one_sentence(options, sentence, tmp_path):
    done = run_toy(ROOT / "recipes" / "toy" / "mod_add_100_shared.yaml", "--output_dir", tmp_path, *options)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert sentence in last


@pytest.mark.parametrize(
    ("variants", "sentence"),
    [
        ("- a list", "must have for each variant's name the options that it changes"),
        ("", "must have for each variant's name the options that it changes"),
        ("a: [1", "cannot be read"),
        ("good: {}\nbad: 5", "has 5 for bad"),
        ("good:\nbad: {num_fork: 3}", "bad: has the option num_fork, which is not known; did you mean num_forks?"),
        ("good:\nbad: {stop: never}", "stop='never'"),
    ],
)
def test_wrong_variants_are_found_before_the_first_is_run(variants, sentence, tmp_path):
    (tmp_path / "variants.yaml").write_text(variants)
    config = ROOT / "recipes" / "toy" / "mod_add_100.yaml"
    done = in_process(ROOT / "recipes" / "ablate.py", "--config", config, "--variants", tmp_path / "variants.yaml", "--output_dir", tmp_path / "out")
    assert done.returncode != 0
    assert re.fullmatch(r"error: [^\n]*\n", done.stderr)
    assert sentence in done.stderr
    assert not (tmp_path / "out").exists()


def test_words_that_begin_as_sums_share_their_parts(monkeypatch):
    """What tells two ends of an arrow apart is the same wherever it begins; words of one part stay as they were."""
    monkeypatch.syspath_prepend(ROOT / "recipes")
    words = [f"{a}>{b}" for a in range(12) for b in range(12)] + ["3", "3>", "k2", "<pad>"]
    vocabulary = {word: token for token, word in enumerate(words)}
    before_VD = torch.randn(len(words), 4000)
    after_VD = before_VD.clone()
    importlib.import_module("toy").begin_as_sums(after_VD, vocabulary, 0.5)
    row = {word: after_VD[token] for word, token in vocabulary.items()}
    torch.testing.assert_close(row["3>7"] - row["3>11"], row["10>7"] - row["10>11"])
    torch.testing.assert_close(row["3>7"] - row["5>7"], row["3>3"] - row["5>3"])
    assert row["3>7"].std().item() == pytest.approx(0.5 * 2**0.5, rel=0.1), "two vectors, each of this standard deviation"
    assert not torch.equal(row["3>7"], row["7>3"]), "a node is another vector where an arrow ends"
    assert torch.equal(after_VD[-4:], before_VD[-4:])


def test_ablations_go_on_where_they_stopped_and_end_in_a_table(tmp_path, monkeypatch):
    toy = ROOT / "recipes" / "toy.py"
    monkeypatch.setattr(subprocess, "run", InProcess(subprocess.run, toy, partial(in_process, toy), started=1))
    variants = tmp_path / "variants.yaml"
    variants.write_text(yaml.safe_dump({"as it is": {}, "without search": {"search": 0, "search_random": 0.5}}))
    small = ["--max_steps", 1, "--per_device_train_batch_size", 8, "--check_every", 0, "--test_rows", 8, "--think_start", 0]
    small += ["--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", "{}"]
    command = [ROOT / "recipes" / "ablate.py", "--config", ROOT / "recipes" / "toy" / "mod_add_30.yaml", "--variants", variants]
    command += ["--seeds", 5, "--output_dir", tmp_path / "out", *small]
    assert re.fullmatch(r"error: [^\n]*nowhere\.yaml[^\n]*\n", in_process(*command, "--variants", "nowhere.yaml").stderr)
    assert "--only names 'search'" in in_process(*command, "--only", "search").stderr
    only = in_process(*command, "--only", "without search")
    assert only.returncode == 0, only.stderr[-2000:]
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())["ablation"]) == {"without search"}
    mistyped = in_process(*command, "--max_stepz", 1)
    assert "max_stepz" in mistyped.stderr, "and what did not run is not in the way:"
    first = in_process(*command)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "without search" in first.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["ablation"]) == {"as it is", "without search"}
    assert (tmp_path / "out" / "accuracy.svg").exists()
    assert yaml.safe_load((tmp_path / "out" / "without_search" / "config.yaml").read_text())["search"] == 0
    file = tmp_path / "out" / "as_it_is" / "seed-5" / "results.json"
    written = file.stat().st_mtime_ns
    more = in_process(*command, "--seeds", 5, 6)
    assert more.returncode == 0, more.stderr[-2000:]
    assert file.stat().st_mtime_ns == written, "a seed that has its results is not run again"
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["seed"] for run in results["ablation"]["as it is"]] == [5, 6]
    assert all({"commit", "hardware", "versions"} <= run.keys() for run in results["ablation"]["as it is"])
    again = in_process(*command, "--seeds", 6, "--only", "as it is")
    assert again.returncode == 0
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())["ablation"]) == {"as it is", "without search"}, "what has been stays"
    assert [run["seed"] for run in json.loads((tmp_path / "out" / "results.json").read_text())["ablation"]["as it is"]] == [6]
    variants.write_text(yaml.safe_dump({"as it is": {"search": 8}}))
    changed = in_process(*command, "--seeds", 6)
    assert "holds a run with other settings" in changed.stderr


def test_results_name_the_commit_that_a_run_started_with(tmp_path, monkeypatch):
    """A checkout may move on while a run takes hours."""
    monkeypatch.syspath_prepend(ROOT / "recipes")
    toy = importlib.import_module("toy")
    commits = ["the first", "a later one"]
    monkeypatch.setattr(results, "_commit", lambda: commits[0])

    def run(seed, *_):
        commits.pop(0)
        return {"seed": seed, "accuracy": {"none": {"1": 1.0}}, "seconds": 1.0, "steps": 1}

    monkeypatch.setattr(toy, "run", run)
    toy.main(
        make_task("pointer_chasing", nodes=5, levels=[1], train_rows=2, test_rows=2),
        toy.ToyArguments(),
        ThinkTokConfig(str(tmp_path)),
        ModelConfig(model_name_or_path=None),
    )
    assert json.loads((tmp_path / "results.json").read_text())["commit"] == "the first"


def test_a_model_is_kept_before_its_tests(tmp_path, monkeypatch):
    """They may take as long as the training, and who stops them has trained for nothing otherwise."""
    monkeypatch.syspath_prepend(ROOT / "recipes")
    toy = importlib.import_module("toy")

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "by_level", stopped)
    args = ThinkTokConfig(
        str(tmp_path), num_think_tokens=5, max_think_length=1, stop="fixed", num_forks=1, num_generations=2, lookahead=1, completion_only_loss=True,
        max_length=32, max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to="none", save_strategy="no",
    )  # fmt: skip
    small = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    with pytest.raises(KeyboardInterrupt):
        toy.main(
            make_task("pointer_chasing", nodes=5, levels=[2], train_rows=4, test_rows=4),
            toy.ToyArguments(save_models=True, model_shape=small),
            args,
            ModelConfig(model_name_or_path=None),
        )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "seed-0").config.thinktok["num_tokens"] == 5
