"""Arms are compared at the same places, cost what they are said to cost, and a comparison goes on where it stopped."""

import dataclasses
import importlib
import json
import subprocess
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from commands import ROOT, InProcess, in_process
from datasets import Dataset
from models import CORPUS, save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from trl import ModelConfig

from hf_thinktok import ThinkTokConfig, ThinkTokTrainer
from hf_thinktok.dry_run import count_flops
from hf_thinktok.evaluation import Evaluation
from hf_thinktok.evaluation.comparison import AT_RANDOM, SILENT, Comparison
from hf_thinktok.evaluation.tables import comparison_verdict, evaluation_verdict, print_evaluation
from hf_thinktok.plan import step_flops
from hf_thinktok.results import COMPLETE_FILE, as_text, digest_of_files, weights_in
from hf_thinktok.text import TextArguments, load_parts

pytestmark = pytest.mark.timeout(900)  # the comparison that most tests look at is five trainings
SHAPE = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96,
    "vocab_size": 512, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
STEP = {
    "output_dir": "nowhere", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": 2, "max_length": 64,
    "num_think_tokens": 4, "num_forks": 8, "num_generations": 4, "max_think_length": 4, "report_to": "none",
}  # fmt: skip


def by_hand(scored: int, K: int = 8, G: int = 4, H: int = 1, sampled: bool = True, passes: int = 3) -> float:
    """The formula of docs/evaluation.md: two rows of 64 tokens, 4 thinking tokens a thought, and so many nodes that predict."""
    T, L, D, F, V, rows = 64, 4, SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"], 2
    body = SHAPE["num_hidden_layers"] * (4 * D * D + 3 * D * F)
    nodes, pairs = T + K * G * (L + H - 1), T**2 + sum(K * G * (T + K * G * depth) for depth in range(1, L))
    rollout = T + K * G * (L - 1) if sampled else 0
    seen = nodes**2 if K else nodes * (nodes + 1) / 2  # without thoughts nothing is masked, and what comes later not computed
    attention = 4 * D * SHAPE["num_hidden_layers"] * ((passes + 0.5) * seen + pairs * sampled)
    return rows * (2 * body * (passes * nodes + rollout) + attention + 8 * V * D * scored)


@pytest.mark.parametrize(
    ("options", "hand"),
    [
        # What predicts: all of the text but its last token, and as many lengths of each thought as count.
        ({"num_forks": 0}, by_hand(63, K=0, sampled=False)),
        ({}, by_hand(63 + 8 * 4 * 4)),
        ({"lookahead": 3, "stop": "fixed"}, by_hand(63 + 8 * 4 * 3, H=3)),
        ({"gradient_checkpointing": True}, by_hand(63 + 8 * 4 * 4, passes=4)),
        ({"gradient_accumulation_steps": 3}, 3 * by_hand(63 + 8 * 4 * 4)),
        ({"thoughts": "filler", "num_generations": 1}, by_hand(63 + 8 * 4, G=1, sampled=False)),
    ],
)
def test_flops_of_a_step_are_those_of_the_formula(options, hand):
    counted = step_flops(AutoConfig.for_model(**SHAPE), ThinkTokConfig(**STEP | options))
    # Thinking rows come on top, and runs of nodes that see each other are padded.
    assert counted == pytest.approx(hand, rel=0.03)


DRAWN = {"lookahead": 3, "stop": "sampled"}
SAMPLING = ThinkTokConfig.sampling
AGAIN = {"num_iterations": 4, "stop": "fixed", "max_steps": 4}


@pytest.mark.parametrize("at_once", [512, 12])
@pytest.mark.parametrize("options", [{}, {"num_forks": 0}, DRAWN, DRAWN | {"thoughts": "filler"}, {"fork_positions": "entropy"}, AGAIN])
def test_flops_without_data_are_those_of_a_real_step(options, at_once, tmp_path, monkeypatch):
    """Whether its 32 thoughts are drawn all at once or in three parts. What is behind a drawn end meets no vocabulary, and is planned as if it did."""
    monkeypatch.setattr("hf_thinktok.tree.MOST_BRANCHES", at_once)
    monkeypatch.setattr(ThinkTokConfig, "sampling", lambda self, step=0: dataclasses.replace(SAMPLING(self, step), min_length=self.max_think_length))
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    full = [{"text": " ".join(CORPUS * 4)}] * 4
    args = ThinkTokConfig(**STEP | {"output_dir": str(tmp_path), "max_steps": 1, "save_strategy": "no", "disable_tqdm": True, "packing": True} | options)
    trainer = ThinkTokTrainer(model, args, train_dataset=Dataset.from_list(full), processing_class=tokenizer)
    planned = step_flops(trainer.model.config, args)
    with count_flops() as counter:
        trainer.train()
    assert counter.get_total_flops() / args.max_steps == pytest.approx(planned, rel=0.03)


def test_flops_of_experts_are_counted():
    """They multiply in 16 bits alone, by a kernel that PyTorch's counter does not know. Wider ones, or more for each token, add their three products."""
    shape = SHAPE | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 1, "head_dim": 16, "moe_intermediate_size": 32}
    flops = [
        step_flops(AutoConfig.for_model(**shape | more), ThinkTokConfig(**STEP)) for more in ({}, {"moe_intermediate_size": 64}, {"num_experts_per_tok": 2})
    ]
    T, K, G, L, rows, one_expert = 64, 8, 4, 4, 2, 2 * 3 * SHAPE["hidden_size"] * 32
    computed = 3 * (T + K * G * L) + T + K * G * (L - 1)  # in a forward and a backward pass, and in a rollout
    assert flops[1] - flops[0] == flops[2] - flops[0] == SHAPE["num_hidden_layers"] * rows * one_expert * computed


def evaluation(seed: int, gain: float, thinks: bool = True, stop: str = "learned", documents: int = 30) -> Evaluation:
    draw = np.random.default_rng(seed)
    count = 8 * documents
    plain = -3 + np.random.default_rng(99).normal(0, 0.3, count)
    arms = {"no_think": plain}
    if thinks:
        arms |= {"think": plain + gain + draw.normal(0, 0.01, count), "think_random": plain - 0.5, "always": plain - 1, "random": plain - 2}
    return Evaluation(
        documents_F=np.arange(count) // 8, tokens_F=np.ones(count, int), logps=arms, marginal={}, correct={arm: np.zeros(count) for arm in arms},
        entropy_F=-plain, kinds_F=np.array(["word begins"] * count), lengths_F=np.ones(count), bytes_F=np.full(count, 4.0),
        settings={"stop": stop, "num_samples": 2},
    )  # fmt: skip


def test_gains_are_paired_and_averaged_over_seeds():
    base = evaluation(0, 0.0, thinks=False)
    found = Comparison({"base": {0: base, 1: base}, "cpt": {0: base, 1: base}, "think": {0: evaluation(0, 0.1), 1: evaluation(1, 0.3)}}).summary()
    gain = found["gains"]["think over cpt"]
    assert gain["bits_per_token"] == pytest.approx(0.2 / np.log(2), abs=0.005)
    assert gain["seeds"]["0"]["bits_per_token"] == pytest.approx(0.1 / np.log(2), abs=0.005)
    # The text's own spread, 0.3 nats a token, is common to both and does not widen the interval.
    assert gain["high"] - gain["low"] < 0.01
    assert gain["low"] < gain["bits_per_token"] < gain["high"]
    assert found["gains"][f"think over think{SILENT}"]["bits_per_token"] == pytest.approx(gain["bits_per_token"])
    assert found["gains"][f"think over think{AT_RANDOM}"]["bits_per_token"] == pytest.approx(gain["bits_per_token"] + 0.5 / np.log(2))
    assert found["arms"]["think"]["bits_per_token"] == pytest.approx(found["arms"]["cpt"]["bits_per_token"] - gain["bits_per_token"])


def test_a_model_trained_to_think_always_is_compared_so():
    one = evaluation(0, 0.5, stop="fixed")
    found = Comparison({"cpt": {0: evaluation(0, 0.0, thinks=False)}, "think": {0: one}}).summary()
    assert found["gains"]["think over cpt"]["bits_per_token"] == pytest.approx(-1 / np.log(2))
    assert found["gains"][f"think over think{AT_RANDOM}"]["bits_per_token"] == pytest.approx(1 / np.log(2))


def test_other_places_are_refused():
    with pytest.raises(ValueError, match="arm think was evaluated at other places than cpt"):
        Comparison({"cpt": {0: evaluation(0, 0.0)}, "think": {0: evaluation(0, 0.0, documents=29)}})


CONTROL_ARMS = ("cpt", "cpt_flops", "filler", f"think{SILENT}", f"think{AT_RANDOM}")


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        (dict.fromkeys(CONTROL_ARMS, (0.1, 0.2)), "Thinking helps: it beats every control, in the one seed that was run."),
        (dict.fromkeys(CONTROL_ARMS, (0.1, 0.2)) | {"base": (-0.2, -0.1)}, "Thinking helps"),
        (dict.fromkeys(CONTROL_ARMS, (0.1, 0.2)) | {"cpt_flops": (-0.1, 0.2)}, "cannot be told apart from cpt_flops; it beats cpt, filler"),
        (dict.fromkeys(CONTROL_ARMS, (0.1, 0.2)) | {"cpt": (-0.2, -0.1)}, "No gain from thinking is shown: it loses to cpt; it beats cpt_flops"),
        (dict.fromkeys(CONTROL_ARMS[:3], (0.1, 0.2)), f"it beats cpt, cpt_flops, filler; it was not compared with think{SILENT}, think{AT_RANDOM}."),
    ],
)
def test_verdict_needs_every_control(gains, words):
    found = {arm: {"low": low, "high": high, "seeds": {"0": {"bits_per_token": low + high}}} for arm, (low, high) in gains.items()}
    assert words in comparison_verdict({"gains": {f"think over {arm}": gain for arm, gain in found.items()}})


def test_an_arm_is_beaten_by_all_seeds_or_not_at_all():
    """Intervals are over documents, and leave seeds out."""
    gains = {arm: {"low": 0.1, "high": 0.2, "seeds": {str(seed): {"bits_per_token": 0.15} for seed in range(2)}} for arm in CONTROL_ARMS}
    verdict = "Thinking helps: it beats every control."
    assert comparison_verdict({"gains": {f"think over {arm}": gain for arm, gain in gains.items()}}) == verdict
    gains["filler"]["seeds"] = {"0": {"bits_per_token": 0.4}, "1": {"bits_per_token": -0.1}}
    gains["cpt_flops"]["seeds"] = {"0": {"bits_per_token": 0.25}, "1": {"bits_per_token": 0.05}}  # on one side, and as far from each other as from 0
    assert "its seeds leave open how it stands against cpt_flops, filler; it beats cpt, think" in comparison_verdict(
        {"gains": {f"think over {arm}": gain for arm, gain in gains.items()}}
    )


@pytest.mark.parametrize(("stop", "words"), [("learned", "No gain from thinking"), ("fixed", "predicts better with its thoughts")])
def test_a_model_that_always_thinks_is_judged_by_its_thoughts(stop, words):
    """Its gate was never trained, and says nothing."""
    found = evaluation(0, 0.0, stop=stop)
    found.logps["always"] = found.logps["no_think"] + 1
    assert words in evaluation_verdict(found.summary())


def test_one_document_has_no_interval(capsys):
    print_evaluation({"evaluation": evaluation(0, 0.5, documents=1).summary()})
    assert "+0.7" in (printed := capsys.readouterr().out)
    assert "nan" not in printed


def test_a_control_at_fewer_places_says_at_how_many(capsys):
    """Its bits are not those of the rows beside it."""
    one = evaluation(0, 0.5)
    places = len(one.documents_F)
    one.logps["earlier"] = np.where(np.arange(places) % 4, one.logps["always"], np.nan)
    one.correct["earlier"] = np.zeros(places)
    print_evaluation({"evaluation": one.summary()})
    printed = capsys.readouterr().out
    assert f"from an earlier place of the row, {places * 3 // 4} places" in printed
    assert printed.count(" places") == 2, "there, and in the title"


def test_an_evaluation_is_read_as_it_was_written(tmp_path):
    one = evaluation(3, 0.2)
    one.save(tmp_path / "one.npz")
    two = Evaluation.load(tmp_path / "one.npz")
    assert json.dumps(one.summary(), default=float) == json.dumps(two.summary(), default=float)
    parts = dict(np.load(tmp_path / "one.npz"))
    assert parts.pop("bytes_F").tolist() == [4.0] * 8 * len(set(one.documents_F))
    np.savez_compressed(tmp_path / "older.npz", **parts, bytes_per_token=4.0)  # of all places together
    assert json.dumps(Evaluation.load(tmp_path / "older.npz").summary(), default=float) == json.dumps(one.summary(), default=float)


def test_the_test_part_is_seen_by_nobody_else(tmp_path):
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(30)))
    script = TextArguments(data_files=[str(tmp_path / "text.jsonl")], held_out_documents=5, test_documents=7)
    parts = [set(part["text"]) for part in load_parts(script)]
    assert [len(part) for part in parts] == [18, 5, 7]
    assert len(set.union(*parts)) == 30
    script.held_out_documents = 12
    assert set(load_parts(script).test["text"]) == parts[2]


def test_parts_of_a_part_and_of_a_stream(tmp_path):
    every = [f"document {i}" for i in range(30)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in every))

    def parts(**options):
        script = TextArguments(data_files=[str(tmp_path / "text.jsonl")], held_out_documents=5, test_documents=7, **options)
        return [[row["text"] for row in part] for part in load_parts(script)]

    for options, count in (({"dataset_streaming": True}, 30), ({"max_documents": 20}, 20), ({"dataset_streaming": True, "max_documents": 20}, 20)):
        found = parts(**options)
        assert [len(part) for part in found] == [count - 12, 5, 7]
        assert len(set(sum(found, []))) == count
    drawn = set(sum(parts(max_documents=20), []))
    assert drawn != set(every[:20])
    assert parts(max_documents=20, data_split_seed=3) != parts(max_documents=20) == parts(max_documents=20)
    assert parts(data_split_seed=3)[2] != parts()[2]


@pytest.mark.parametrize(
    "options", [{"held_out_documents": 30}, {"held_out_documents": 20, "test_documents": 11}, {"max_documents": 5, "held_out_documents": 5}]
)
@pytest.mark.parametrize("streams", [False, True])
def test_nothing_is_left_to_train_on(tmp_path, options, streams):
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(30)))
    script = TextArguments(data_files=[str(tmp_path / "text.jsonl")], dataset_streaming=streams, **{"held_out_documents": 0} | options)
    with pytest.raises(ValueError, match=r"(held_out|test)_documents=\d+ leaves nothing of \d+ documents"):
        load_parts(script)


# ---------------------------------------------------------------- the recipe


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A folder with a tiny model, text, a config, and the comparison that was made of them."""
    folder = tmp_path_factory.mktemp("compare")
    save_tiny(folder / "model")
    (folder / "data.jsonl").write_text("\n".join(json.dumps({"text": f"{i} {CORPUS[i % 4]}"}) for i in range(40)))
    (folder / "recipe.yaml").write_text(
        f"""
model_name_or_path: {folder / "model"}
data_files: [{folder / "data.jsonl"}]
output_dir: {folder / "out"}
seeds: [0]
num_samples: 2
accelerate_config: {ROOT / "accelerate_configs" / "cpu.yaml"}
arms: {{look: {{lookahead: 2, stop: fixed, think_cost: [0.0]}}}}
held_out_documents: 0
test_documents: 6
num_think_tokens: 4
num_forks: 3
num_generations: 2
max_think_length: 2
think_cost: 0.01
log_completions: true
max_length: 48
packing: true
packing_strategy: wrapped
max_steps: 3
per_device_train_batch_size: 2
learning_rate: 1.0e-3
use_cpu: true
bf16: false
gradient_checkpointing: false
logging_steps: 1
save_strategy: "no"
report_to: none
hub_token: hf_secret
env: {{SOME_KEY: sk_secret}}
"""
    )
    pretrain = ROOT / "recipes" / "pretrain_think.py"
    with patch("subprocess.Popen", InProcess(subprocess.Popen, pretrain, partial(in_process, pretrain), started=1)):  # one arm under accelerate launch
        done = compare(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout, json.loads((folder / "out" / "results.json").read_text())


def compare(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return in_process(ROOT / "recipes" / "compare.py", "--config", folder / "recipe.yaml", *words)


def test_five_arms_and_one_more_make_one_results_file(grid):
    folder, printed, results = grid
    found = results["comparison"]
    assert {"base", "cpt", "cpt_flops", "filler", "think", f"think{SILENT}", f"filler{SILENT}", "look"} <= set(found["arms"])
    assert results["seeds"] == [0]
    assert results["bf16"] is False
    training = results["training"]
    assert training["cpt"]["steps"] == training["think"]["steps"] == training["filler"]["steps"] == 3
    # As much compute as thinking takes, to half a step.
    per_step = training["cpt"]["flops"] / 3
    assert abs(training["cpt_flops"]["flops"] - training["think"]["flops"]) <= per_step / 2
    assert training["filler"]["flops"] < training["think"]["flops"]
    for words in ("think, over cpt", "tokens at a place", "cpt_flops: as much compute"):
        assert words in printed
        assert words in as_text(results)
    for kept in ("results.json", "report.html", "think-seed0/config.yaml", "think-seed0/log.txt"):
        assert "_secret" not in (folder / "out" / kept).read_text()


def test_fillers_of_drawn_lengths_are_rewarded_as_thoughts_are(tmp_path, monkeypatch):
    """The recipe of four judged tokens: lengths cannot be summed out, so both arms draw them, from groups of one size, with one reward and one price."""
    monkeypatch.syspath_prepend(ROOT / "recipes")
    recipe = yaml.safe_load((ROOT / "recipes" / "smollm2-135m" / "wikitext.yaml").read_text())
    changes = {"max_steps": 4, "reward_funcs": ["accuracy"], "advantage": "loo", "bf16": False, "use_cpu": True, "model_name_or_path": str(tmp_path)}
    save_tiny(tmp_path)
    options = importlib.import_module("compare").Grid(recipe | changes, {}).options
    filler, think = options["filler"][1], options["think"][1]
    assert (filler.thoughts, filler.stop) == ("filler", "sampled")
    for name in ("num_generations", "reward_funcs", "advantage", "think_cost", "lookahead", "max_think_length", "think_loss_weight"):
        assert getattr(filler, name) == getattr(think, name), name


def test_think_start_leaves_steps_that_cost_less(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    recipe = yaml.safe_load((ROOT / "recipes" / "smollm2-135m" / "wikitext.yaml").read_text())
    recipe |= {"max_steps": 8, "bf16": False, "use_cpu": True, "model_name_or_path": str(tmp_path)}
    save_tiny(tmp_path)
    late, half, whole = (importlib.import_module("compare").Grid(recipe | {"think_start": start}, {}) for start in (7, 4, 0))
    assert late.flops["cpt"] == whole.flops["cpt"]
    assert late.flops["think"] == pytest.approx((7 * late.flops["cpt"] + whole.flops["think"]) / 8)
    assert half.flops["think"] == pytest.approx((late.flops["cpt"] + whole.flops["think"]) / 2)
    assert half.options["cpt_flops"][1].max_steps < whole.options["cpt_flops"][1].max_steps


def test_a_step_behind_markers_costs_what_its_places_do(tmp_path, monkeypatch, make_trainer):
    """As many as its rows have, for which the trainer makes room, and not as many as they might have."""
    monkeypatch.syspath_prepend(ROOT / "recipes")
    script, texts = importlib.import_module("compare"), [f"3 + 4 = 7, and 7 + 5 = 12; so {x} = 3 and the cat sat on the mat =" for x in "abcdefghijkl"]
    save_tiny(tmp_path)
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    told = {"packing": True, "max_length": 64, "num_forks": 16, "num_think_tokens": 4, "max_steps": 20, "gradient_checkpointing": False}
    behind = {"fork_positions": "markers", "fork_markers": [" ="]}
    recipe = told | {"bf16": False, "use_cpu": True, "held_out_documents": 0, "test_documents": 2, "data_files": [str(tmp_path / "text.jsonl")]}
    recipe |= {"model_name_or_path": str(tmp_path), "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2}
    anywhere, marked, fewer = (script.Grid(recipe | options, {}) for options in ({}, behind, behind | {"num_forks": 2}))
    trainer = make_trainer(train_dataset=Dataset.from_dict({"text": texts[:10]}), **told | behind | {"max_steps": 1})
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    generator = torch.Generator().manual_seed(0)
    places = trainer._forks(trainer.model, inputs, trainer._labels(inputs), generator, "markers").shape[1]
    assert 2 < places < 16
    assert script.forks_of_steps(*marked.options["think"]) == {places: 1.0}
    assert script.forks_of_steps(*fewer.options["think"]) == {2: 1.0}
    assert marked.flops["cpt"] == anywhere.flops["cpt"] < fewer.flops["think"] < marked.flops["think"] < anywhere.flops["think"]
    assert marked.options["cpt_flops"][1].max_steps < anywhere.options["cpt_flops"][1].max_steps


@torch.no_grad()
def test_arms_differ_by_what_they_are_and_nothing_else(grid):
    folder, _, _ = grid
    weights = {arm: AutoModelForCausalLM.from_pretrained(folder / "out" / f"{arm}-seed0").get_input_embeddings().weight for arm in ("cpt", "filler", "think")}
    assert len({len(weight) for weight in weights.values()}) == 1  # all have the new rows
    assert not torch.equal(weights["cpt"], weights["think"])
    configs = [json.loads((folder / "out" / f"{arm}-seed0" / "config.json").read_text())["thinktok"] for arm in ("filler", "think")]
    assert [config["thoughts"] for config in configs] == ["filler", "discrete"]


def test_what_is_finished_is_not_run_again(grid):
    folder, printed, results = grid
    (folder / "out" / "results.json").unlink()
    (folder / "out" / "think-seed0" / "evaluation.npz").unlink()
    kept = {path: path.stat().st_mtime_ns for kind in ("trainer_state.json", "evaluation.npz") for path in (folder / "out").glob(f"*/{kind}")}
    assert len(kept) == 10
    done = compare(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again = json.loads((folder / "out" / "results.json").read_text())
    assert again["comparison"]["gains"] == results["comparison"]["gains"]


def test_an_arm_goes_on_from_a_checkpoint_that_is_whole(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    script, commands = importlib.import_module("compare"), []

    def run(command, log, label):
        commands.append(command)
        (log.parent / "trainer_state.json").write_text('{"log_history": [{}]}')

    monkeypatch.setattr(script, "run", run)
    for step in (3, 5):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-3" / COMPLETE_FILE).touch()
    script.train("think", 0, {}, tmp_path, None, {})
    assert commands[0][-2:] == ["--resume_from_checkpoint", str(tmp_path / "checkpoint-3")]


def test_other_settings_of_measuring_measure_again(grid):
    folder, _, results = grid
    done = compare(folder, "--num_samples", "1", "--report_documents", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    again = json.loads((folder / "out" / "results.json").read_text())
    assert again["comparison"]["runs"]["think"]["0"]["settings"]["num_samples"] == 1
    assert again["comparison"]["runs"]["cpt"] == results["comparison"]["runs"]["cpt"]


def test_another_base_is_measured_again(grid, monkeypatch):
    """Its file lies where that of the model before it lay."""
    folder, _, _ = grid
    monkeypatch.syspath_prepend(ROOT / "recipes")
    script = importlib.import_module("compare")
    path = folder / "out" / "base" / "evaluation.npz"

    def load(name, *args):
        raise LookupError(name)

    monkeypatch.setattr(script, "load", load)
    config = yaml.safe_load((folder / "recipe.yaml").read_text())
    own = {name: config.pop(name) for name in ("seeds", "num_samples", "accelerate_config", "arms", "env")}
    grid_of_arms = script.Grid(config, own["arms"])
    test = [row["text"] for row in load_parts(grid_of_arms.options["think"][0]).test]
    chosen = script.CompareArguments(num_samples=own["num_samples"])
    name, revision = config["model_name_or_path"], grid_of_arms.options["think"][2].model_revision
    weights = digest_of_files(weights_in(Path(name)))
    script.measure("base", name, path, grid_of_arms, chosen, test, weights, revision)
    for other in (("/some/other/model", weights, revision), (name, "0123", revision), (name, weights, "another")):
        with pytest.raises(LookupError, match=other[0]):
            script.measure("base", other[0], path, grid_of_arms, chosen, test, *other[1:])
    file = folder / "model" / "model.safetensors"
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(LookupError, match=name):  # other weights in the same place
        script.measure("base", name, path, grid_of_arms, chosen, test, weights, revision)
    file.write_bytes(kept)


def test_an_arm_is_of_the_files_and_the_code_that_it_was_begun_with(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    script, commits = importlib.import_module("compare"), iter("ab")
    monkeypatch.setattr("hf_thinktok.results._commit", lambda: next(commits))
    monkeypatch.setattr(script, "run", lambda command, log, label: (log.parent / "trainer_state.json").write_text('{"log_history": [{"loss": 1.0}]}') and 0)
    save_tiny(tmp_path / "model")
    text, model = tmp_path / "text[1].txt", ModelConfig(model_name_or_path=str(tmp_path / "model"))
    text.write_text("one\ntwo")
    found = [script.origin(TextArguments(data_files=[str(text)]), model)]
    for _ in range(2):
        log = script.train("think", 0, {}, tmp_path / "out", None, found[0])
        assert log["commit"] == "a"
        assert {"loss", "hardware", "versions"} <= log.keys()
    text.write_text("one\nthree")
    found.append(script.origin(TextArguments(data_files=[str(text)]), model))
    text.write_text("one\ntwo")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    found.append(script.origin(TextArguments(data_files=[str(tmp_path / "*.txt")]), model))
    assert len({one["text"] for one in found}) == len({one["model"] for one in found}) == 2
    for other in found[1:]:
        with pytest.raises(ValueError, match="another model or text"):
            script.train("think", 0, {}, tmp_path / "out", None, other)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--learning_rate", "0.1"), "holds a run with other settings"),
        (("--test_documents", "0", "--output_dir", "{}/other"), "no text to report on"),
        (("--max_steps", "-1", "--output_dir", "{}/other"), "set max_steps"),
        (("--resume_from_checkpoint", "true", "--output_dir", "{}/other"), "goes on by itself where it stopped"),
        (("--push_to_hub", "true", "--output_dir", "{}/other"), "several models into one place"),
        (("--num_iterations", "2", "--output_dir", "{}/other"), "set num_iterations=1"),
        (("--packing", "false", "--output_dir", "{}/other"), "set packing=True"),
        (("--max-steps", "-1", "--output_dir", "{}/other"), "set max_steps"),
        (("--arms", "more", "--output_dir", "{}/other"), "arms must be a mapping"),
        (("--arms", '{{"more": null}}', "--output_dir", "{}/other"), "arms has None for more"),
        (("--arms", '{{"cpt_flops": {{"max_steps": 7}}}}', "--output_dir", "{}/other"), "give the further arm another name"),
        (("--arms", '{{"think over 8 tokens": {{}}}}', "--output_dir", "{}/other"), "names like that are of gains and controls"),
        (("--arms", '{{"x without thoughts": {{}}}}', "--output_dir", "{}/other"), "names like that are of gains and controls"),
        (("--seed", "7", "--output_dir", "{}/other"), "seed has no effect here, where each run has one of its own: give seeds."),
        (
            ("--arms", '{{"more": {{"num_fork": 2}}}}', "--output_dir", "{}/other"),
            "The arm more has the option num_fork, which is not known; did you mean num_forks?",
        ),
        (("--num_fork", "2"), "num_fork"),
        (("--seeds", "-1"), "seeds=[-1] must be at least 0"),
        (("--num_samples", "0"), "num_samples=0 must be at least 1"),
        (("--accelerate_config", "nowhere.yaml"), "accelerate_config=nowhere.yaml is no file"),
    ],
)
def test_wrong_words_are_told_in_a_sentence(grid, words, sentence):
    done = compare(grid[0], *(word.format(grid[0]) for word in words))
    assert done.returncode != 0
    assert sentence in done.stderr.splitlines()[-1]
