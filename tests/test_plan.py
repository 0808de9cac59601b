"""What a plan says of memory, against real steps, published figures and the formulas of docs/scaling.md."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import TINY, save_tiny, with_own_code
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_thinktok import ThinkTokConfig
from hf_thinktok.cli import main
from hf_thinktok.dry_run import Phase
from hf_thinktok.memory import Part
from hf_thinktok.plan import plan
from hf_thinktok.tree import ThoughtTree

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "memory.py"

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
OPTIONS = {
    "output_dir": "nowhere",
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 1,
    "max_length": 256,
    "num_think_tokens": 4,
    "num_forks": 8,
    "num_generations": 4,
    "max_think_length": 4,
}


def made(shape=None, loading=None, **options):
    return plan(AutoConfig.for_model(**LLAMA | (shape or {})), ThinkTokConfig(**OPTIONS | options), **loading or {})


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    return importlib.import_module("memory")


# ---------------------------------------------------------------- against what happens


@pytest.mark.parametrize("case", ["full", "full, checkpointing", "LoRA"])
def test_a_plan_is_what_a_step_takes(memory, case):
    assert 0.97 < memory.measure(case)["ratio"] < 1.03


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_plan_is_what_a_step_takes_on_a_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"} | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, RECIPE, "measured", "--results", tmp_path / "measured.json"], env=environment, check=True)
    for row in json.loads((tmp_path / "measured.json").read_text())["measured"]:
        assert 0.7 < row["ratio"] < 1.4, row


ADAPTER = {"dtype": torch.bfloat16, "peft_config": LoraConfig(target_modules="all-linear", r=16)}
PEAKS = {"bench_h200": ("SmolLM2-135M", {}), "bench_h200_lora": ("SmolLM2-1.7B", ADAPTER)}


@pytest.mark.parametrize(("results", "cell"), [("bench_h200", 0), ("bench_h200", 2), ("bench_h200_lora", 1)])
def test_a_plan_is_what_a_step_took_on_a_gpu(memory, results, cell, monkeypatch):
    """Long rows by FlexAttention, short ones under a mask; with the keys and values that stay for the next rollout."""
    monkeypatch.setattr("hf_thinktok.tree.MOST_BRANCHES", 1024)  # these were measured when thoughts were all drawn at once
    found = json.loads((ROOT / f"docs/results/{results}.json").read_text())
    one, (shape, loading) = found["cells"][cell], PEAKS[results]
    names = {"max_length": "T", "num_forks": "K", "num_generations": "G", "max_think_length": "L", "lookahead": "H"}
    options = found["config"] | {"use_cpu": True, "num_think_tokens": 16, "stop": "fixed", "fork_positions": "stride"}
    args = ThinkTokConfig("nowhere", **options | {name: one[number] for name, number in names.items()})
    assert 0.97 < plan(memory.config_of(memory.SHAPES[shape]), args, **loading).peak / one["peak_bytes"]["ours"] < 1.03


def test_what_stays_for_the_next_rollout_is_limited_and_not_sharded():
    shape = {"num_hidden_layers": 4}
    phases = made(shape).phases
    cache = phases[Phase.THOUGHTS][Part.CACHE]
    assert phases[Phase.PASS][Part.CACHE] == phases[Phase.STEP][Part.CACHE] == cache
    limited = {"gpu_gib": 15 * cache / 2**30}, {"zero": 2, "num_processes": 2}, {"gpu": False}
    assert all(Part.CACHE not in made(shape, loading).phases[Phase.PASS] for loading in limited)
    assert Part.CACHE in made(shape, {"gpu_gib": 17 * cache / 2**30}).phases[Phase.PASS]
    assert Part.CACHE not in made(shape, memory="persistent", stop="sampled").phases[Phase.PASS], "passes of other lengths each time are not replayed"


# ---------------------------------------------------------------- formulas


@pytest.mark.parametrize(("dtype", "bf16", "numbers"), [("float32", False, (24, 16)), ("float32", True, (26, 8)), ("bfloat16", True, (16, 8))])
def test_a_layer_keeps_what_the_page_says(dtype, bf16, numbers):
    """Per node: for the hidden size, and for attention and MLP. All layers attend under the same mask."""
    hidden, inner = numbers
    shape, loading = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}, {"dtype": getattr(torch, dtype)}

    def kept(layers: int):
        one = made(shape | {"num_hidden_layers": layers}, loading, bf16=bf16, max_length=512, num_forks=16)
        return sum(one.phases[Phase.PASS].get(part, 0) for part in (Part.ACTIVATIONS, Part.WORKING, Part.ATTENTION)), one.nodes

    (less, nodes), (more, _) = kept(2), kept(3)
    assert (more - less) / nodes == pytest.approx(hidden * 256 + inner * (256 + 512), rel=0.01)


def test_the_cache_holds_the_text_and_all_thoughts_but_their_last_tokens():
    cache = made(per_device_train_batch_size=2).phases[Phase.THOUGHTS][Part.CACHE]
    assert cache == pytest.approx(2 * (256 + 8 * 4 * 3) * 2 * 2 * 2 * 16 * 4, rel=0.05)  # rows, nodes, layers, keys and values, heads, size, fp32


@pytest.mark.parametrize(("loading", "at_once"), [({}, 33), ({"zero": 2, "num_processes": 2}, 33), ({"zero": 3, "num_processes": 2}, 66)])
def test_the_cache_holds_the_thoughts_that_are_drawn_at_a_time(loading, at_once):
    """528 of them in two parts, but where layers are gathered for each pass."""
    cache = made({"num_hidden_layers": 4}, loading, num_forks=66, num_generations=8).phases[Phase.THOUGHTS][Part.CACHE]
    assert cache == pytest.approx((256 + at_once * 8 * 3) * 4 * 2 * 2 * 16 * 4, rel=0.05)


@pytest.mark.parametrize(
    "options", [{}, {"memory": "persistent", "stop": "sampled"}, {"blind": True}, {"lookahead": 3, "stop": "fixed"}, {"stop": "fixed", "markovian_share": 0.5}]
)
def test_nodes_and_pairs_are_those_of_the_tree(options):
    args = ThinkTokConfig(**OPTIONS | options)
    forks = (torch.arange(0.5, 8) * 255 / 8).long()[None]  # the middles of eight parts of the row
    tree = ThoughtTree(torch.zeros(1, 256, dtype=torch.long), forks, args.branching(256, markovian=args.num_markovian))
    one = made(**options)
    assert one.nodes == tree.num_nodes
    assert one.visible_pairs == int(tree.visible().sum())


def test_an_evaluation_draws_its_thoughts_before_it_scores_them():
    """Keys and values of all layers and heads may take more than scoring."""
    shape = {"num_hidden_layers": 16, "num_key_value_heads": LLAMA["num_attention_heads"]}
    evaluated, on_cpu = {"do_eval": True, "per_device_eval_batch_size": 2, "lookahead": 1}, {"gpu": False}
    one, two = (made(shape, on_cpu, per_device_train_batch_size=rows, lookahead=1).phases[Phase.THOUGHTS][Part.CACHE] for rows in (1, 2))
    assert made(shape, on_cpu, **evaluated).phases[Phase.EVALUATION][Part.CACHE] == pytest.approx(two, rel=0.01)
    assert made(shape, **evaluated).phases[Phase.PASS][Part.CACHE] == pytest.approx(one + two, rel=0.01), "on a GPU both stay"


def test_an_optimizer_on_a_gpu_makes_a_number_for_each_parameter_unless_it_is_fused():
    """PyTorch's choice there takes all square roots at once; on a CPU, one tensor's."""

    def step(**options):
        found = made(**options)
        return sum(found.phases[Phase.STEP].values()), found

    fused, _ = step(optim="adamw_torch_fused")
    on_gpu, found = step(optim="adamw_torch")
    on_cpu, _ = step(optim="adamw_torch", loading={"gpu": False})
    assert on_gpu - fused == pytest.approx(4 * found.parameters, rel=0.02)
    assert on_cpu < on_gpu


def test_an_evaluation_is_planned_by_its_own_batch():
    def evaluation(rows: int) -> int:
        parts = made(do_eval=True, per_device_eval_batch_size=rows).phases[Phase.EVALUATION]
        assert Part.GRADIENTS not in parts
        return sum(parts.values()) - parts[Part.PARAMETERS] - parts[Part.OPTIMIZER]

    assert evaluation(6) == pytest.approx(3 * evaluation(2), rel=0.05)
    assert Phase.EVALUATION not in made().phases


def test_the_replicated_path_runs_every_path():
    assert made(engine="replicated").nodes == (8 * 4 + 1) * 256  # one row for each thought, and one for the text


@pytest.mark.parametrize("steps", [1, 2])
def test_gradients_of_tied_embeddings(steps):
    """They come from two places and are summed up in place, and what is accumulated is there beside them."""
    one = made({"vocab_size": 20000, "num_hidden_layers": 1}, max_length=16, num_forks=1, gradient_accumulation_steps=steps)
    parts, embedding = one.phases[Phase.PASS], 4 * 64 * 20032
    new = sum(parts.values()) - parts[Part.PARAMETERS] - parts[Part.OPTIMIZER] - (steps - 1) * 4 * one.parameters
    assert new / embedding == pytest.approx(2, abs=0.2)
    assert steps == 1 or parts[Part.GRADIENTS] == 4 * one.parameters


# Figure 1 of the ZeRO paper (https://huggingface.co/papers/1910.02054): 7.5e9 parameters, 64 processes; 120, 31.4, 16.6 and 1.9 GB.
@pytest.mark.parametrize(("sharding", "gigabytes"), [({}, 120), ({"zero": 1}, 31.4), ({"zero": 2}, 16.6), ({"zero": 3}, 1.9), ({"fsdp2": True}, 1.9)])
def test_weights_gradients_and_optimizer_are_shared_out_as_published(sharding, gigabytes):
    one = made(loading=sharding | {"num_processes": 64}, bf16=True, gradient_accumulation_steps=2)
    held = sum(one.phases[Phase.PASS][part] for part in (Part.PARAMETERS, Part.GRADIENTS, Part.OPTIMIZER))
    assert held / one.parameters * 7.5 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize(
    ("family", "options"), [("gpt2", {}), ("gemma2", {}), ("qwen3", {"thoughts": "text", "stop": "fixed"}), ("bloom", {"engine": "replicated"})]
)
def test_other_architectures_are_planned_as_they_are(family, options):
    def config(rows: int):
        return AutoConfig.for_model(family, **TINY[family] | {"vocab_size": rows})

    one = plan(config(320), ThinkTokConfig(**OPTIONS | {"max_length": 64} | options))
    assert one.parameters == AutoModelForCausalLM.from_config(config(384)).num_parameters()  # 4 thinking tokens and the guard, padded to 64
    assert one.peak > 4 * 4 * one.parameters


def test_dropout_that_the_trainer_turns_off_takes_no_memory():
    """GPT-2's is 0.1 unless its config says otherwise, and attention with dropout keeps all its weights."""
    shape = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4}
    peaks = [made(shape | one, **options).peak for one, options in (({}, {}), ({"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, {}))]
    assert peaks[0] == peaks[1]
    assert made(shape, disable_dropout=False).peak > peaks[0]


def test_what_launchers_add():
    def parts(**sharding):
        one = made(loading=sharding | {"num_processes": 4}, bf16=True)
        return one.parameters, one.phases[Phase.PASS], one.phases[Phase.STEP]

    number, ddp, _ = parts()
    assert ddp[Part.BUFFERS] == 4 * number  # a copy of the gradients
    _, zero2, _ = parts(zero=2)
    assert zero2[Part.BUFFERS] == 1_000_000_000  # DeepSpeed's bucket
    _, zero3, step = parts(zero=3)
    assert zero3[Part.GATHERED] == 2 * number  # all of so small a model
    assert Part.GATHERED not in step
    _, fsdp2, _ = parts(fsdp2=True)
    assert fsdp2[Part.GATHERED] == 2 * number  # two of two blocks, and the rest


def test_an_adapter_alone_has_gradients_and_state():
    one = made(loading={"peft_config": LoraConfig(r=4, target_modules=["q_proj"])})
    assert one.trainable == 2 * 4 * (64 + 64) + (4 + 1) * 64  # two layers' adapters; thinking rows and the guard's
    step = one.phases[Phase.STEP]
    assert step[Part.GRADIENTS] == 4 * one.trainable
    assert step[Part.OPTIMIZER] == pytest.approx(8 * one.trainable, rel=0.01)
    assert step[Part.PARAMETERS] == pytest.approx(4 * one.parameters, rel=0.01)
    assert one.parameters > 10 * one.trainable


# ---------------------------------------------------------------- the command


@pytest.fixture
def folder(tmp_path):
    """A model's config, and nothing else of it."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


SMALL = "--max_length 64 --num_forks 4 --num_generations 2 --max_think_length 2 --per_device_train_batch_size 1".split()


def test_the_command_prints_a_table_or_json(folder, capsys):
    assert main(["plan", "--model", folder, *SMALL, "--gpu_gib", "1"]) == 0
    table = capsys.readouterr().out
    assert "% of 1 GiB: fits." in table
    assert "80 nodes a row" in table
    assert main(["plan", "--model", folder, *SMALL, "--gpu_gib", "0.0001", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["nodes"] == 80
    assert figures["peak"] == sum(figures["phases"][figures["peak_phase"]].values()) > 0
    assert figures["fits"] is False


def test_a_model_with_code_of_its_own_is_planned(tmp_path, capsys):
    words = ["plan", "--model", with_own_code(save_tiny(tmp_path)), *SMALL]
    assert main(words) == 2
    assert "give --trust_remote_code" in capsys.readouterr().err
    assert main([*words, "--trust_remote_code", "true"]) == 0


def test_the_command_takes_a_recipe_and_changes_to_it(folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: {folder}\ndataset_name: of-no-concern-here\nmax_length: 64\nnum_forks: 4\nuse_peft: true\nlora_r: 4\n")

    def figures(*words):
        assert main(["plan", "--config", str(recipe), "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    one, other = figures(), figures("--num_forks", "8", "--lora_r", "8", "--data_files", "nowhere.jsonl", "--packing")
    assert one["nodes"] == 64 + 4 * 4 * 4  # the defaults for what nobody says
    assert other["nodes"] == 64 + 8 * 4 * 4
    rows = 17 * 64  # of 16 thinking tokens and the guard
    assert other["trainable"] - rows == 2 * (one["trainable"] - rows) > 0
    assert Phase.EVALUATION in one["phases"], "the recipe makes one before its first step"
    assert Phase.EVALUATION not in figures("--held_out_documents", "0")["phases"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "nowhere/at-all"], "neither a folder nor a Hub repository"),
        ([], "There is no model: give --model"),
        (["--bogus", "3"], "the option bogus, which is not known"),
        (["{folder}"], "which is the value of no option"),
        (["--model", "{folder}", "--model_revision", "old"], "model_revision=old has no effect on a folder"),
        (["--num_forks", "many"], "num_forks.*invalid int value: 'many'"),
        (["--num_generations", "1"], "num_generations=1 leaves nothing to compare"),
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["--zero", "2"], "zero=2.*set num_processes to 2 or more"),
        (["--fsdp2"], "fsdp2.*set num_processes to 2 or more"),
        (["--zero", "2", "--fsdp2", "--num_processes", "2"], "choose one"),
        (["--num_think_tokens", "0"], "num_think_tokens=0.*set num_forks=0"),
        (["--beta", "0.1"], "beta=0.1.*leave beta out"),
        (["--activation_offloading", "true", "--gradient_checkpointing", "false"], "activation_offloading=True.*leave activation_offloading out"),
        (["--load_in_4bit", "true"], "Quantized weights are not planned"),
        (["--attn_implementation", "flash_attention_2"], "use sdpa or eager"),
    ],
)
def test_what_cannot_be_planned_is_told_in_a_sentence(folder, capsys, words, sentence):
    model = [] if "--model" in words or not words else ["--model", folder]
    assert main(["plan", *model, *(word.format(folder=folder) for word in words)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(f"thinktok: [^\n]*{sentence}[^\n]*\\.\n", printed.err), printed.err


def test_a_mistyped_option_of_the_command_s_own_is_named_with_the_nearest(folder, capsys):
    assert main(["plan", "--model", folder, "--num_proceses", "2"]) == 2
    assert capsys.readouterr().err == "thinktok: The command line has the option num_proceses, which is not known; did you mean num_processes?\n"


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ({"model_type": "t5"}, "t5 is an encoder-decoder model"),
        ({"model_type": "bloom", "n_layer": 2, "n_head": 4}, "step of bloom cannot be made.*set engine=replicated"),
    ],
)
def test_models_that_cannot_be_planned(tmp_path, capsys, shape, sentence):
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert main(["plan", "--model", str(tmp_path), *SMALL]) == 2
    assert re.fullmatch(f"thinktok: [^\n]*{sentence}[^\n]*\\.\n", capsys.readouterr().err)


def test_an_adapter_is_not_planned_as_its_base(folder, tmp_path, capsys):
    """Its config would lead on to the base's, all of whose weights a plan then trains."""
    get_peft_model(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), *SMALL]) == 2
    assert re.fullmatch(f"thinktok: {tmp_path} is an adapter: [^\n]*thinktok merge[^\n]*\\.\n", capsys.readouterr().err)


def test_a_rollout_gathers_all_or_layer_by_layer():
    def gathered(gathers):
        one = made({"num_hidden_layers": 8}, {"fsdp2": True, "num_processes": 4}, bf16=True, gather_for_rollout=gathers)
        return one.phases[Phase.THOUGHTS][Part.GATHERED] / one.parameters / 2

    assert gathered(True) == pytest.approx(1)
    assert gathered(False) < 0.5


def test_a_plan_of_evaluation_is_what_it_takes(memory):
    assert 0.97 < memory.measure("evaluation of 2 rows")["ratio"] < 1.03
