"""The benchmark as a user starts it, on a tiny model."""

import json
import statistics

import pytest
from commands import ROOT, in_process
from models import tiny_model, tiny_tokenizer

from hf_thinktok.bench_tables import BENCH_ARMS
from hf_thinktok.pictures import draw_bench
from hf_thinktok.results import as_text


@pytest.fixture
def bench(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def run(*options):
        command = [ROOT / "recipes" / "bench.py", "--model_name_or_path", tmp_path, "--use_cpu", "--bf16", "false", *options]
        return in_process(*command, "--results", tmp_path / "results.json")

    return run


def test_every_arm_is_timed_on_the_same_cell(bench, tmp_path):
    done = bench("--cells", "48,3,2,2,2", "64,4,4,1,1", "--rounds", 2, 1, "--gradient_checkpointing", "false", "--grpo_batch_size", 4, "--some_forks", 2, 1)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    small, large = results["cells"]
    assert (small["nodes"], large["nodes"]) == (48 + 3 * 2 * 3, 64 + 4 * 4 * 1)
    for cell, rounds, forks in ((small, 2, 2), (large, 1, 1)):
        assert {arm: len(seconds) for arm, seconds in cell["seconds"].items()} == dict.fromkeys(BENCH_ARMS, rounds)
        assert len(cell["rollout_seconds"]) == rounds
        seconds = {arm: statistics.median(each) for arm, each in cell["seconds"].items()}
        # A step of ours judges 8 rows of K x G thoughts, TRL's some prefixes of G each.
        assert cell["pairs_per_second_vs_trl"] == pytest.approx(8 * cell["K"] * cell["G"] / seconds["ours"] / (forks * cell["G"] / seconds["grpo"]))
        assert set(cell["peak_bytes"]) == {"ours", "sft", "plain"}
        if rounds == 1:
            assert cell["step_vs_plain"] == pytest.approx(seconds["plain"] / seconds["ours"])
            assert cell["gradient_vs_sft"] == pytest.approx(seconds["sft"] / (seconds["ours"] - cell["rollout_seconds"][0]))
    assert {"versions", "hardware", "commit"} <= set(results)
    for label in ("seconds: grpo", "at so many forks", "nodes a second, ours / sft"):
        assert label in done.stdout
        assert label in as_text(results)
    draw_bench(results, tmp_path / "growth.svg")
    assert (tmp_path / "growth.svg").stat().st_size > 1000


def test_a_model_without_weights_is_timed_on_random_ones(bench, tmp_path):
    (tmp_path / "model.safetensors").unlink()
    done = bench("--cells", "600,3,2,2,2", "--rounds", 1, "--arms", "ours", "dense", "--random_weights", "true", "--peaks", "false")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["model"].endswith(", random weights")
    assert set(results["cells"][0]["seconds"]) == {"ours", "dense"}, "a row longer than the model's positions"


def test_a_folder_without_weights_is_said(bench, tmp_path):
    (tmp_path / "model.safetensors").unlink()
    done = bench("--cells", "48,3,2,2,2")
    assert done.returncode == 1
    assert "model.safetensors" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--arms", "ours", "theirs"], "arms=theirs is none of ours"),
        (["--rounds", 1, 2], "rounds has 2 numbers for 1 cells"),
        (["--cells", "48,3,2"], "48,3,2"),
        (["--cells", "99999999,1,2,1,1"], "choose a smaller cell"),
    ],
)
def test_what_cannot_be_timed_is_said(bench, options, words):
    done = bench("--cells", "48,3,2,2,2", *options) if "--cells" not in options else bench(*options)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--frobnicate", "3"], "frobnicate"),
        (["--load_in_4bit", "true"], "have no effect here"),
        (["--model_name_or_path", "/nowhere/model"], "/nowhere/model"),
    ],
)
def test_wrong_input_ends_in_one_sentence(bench, options, sentence):
    done = bench(*options)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert sentence in last
