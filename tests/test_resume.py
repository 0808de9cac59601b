"""A run that is killed, wherever, and resumed equals one that never was, bit for bit."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from forks import forks
from models import CORPUS, save_tiny, tiny_model, tiny_tokenizer, with_own_code
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_run import KilledAtStep, main
from transformers import TrainerCallback

from hf_thinktok import ThinkTokTrainer, results
from hf_thinktok.checkpoints import COMPLETE_FILE, STATE_FILE, CheckpointError, newest_checkpoint

HERE = Path(__file__).parent
# Checkpoints after two and four of six steps, each with several files: a kill hits between them, in the first of them, or in a later file.
KILLS = [{"kill_step": 3}, {"kill_write": 1}, {"kill_write": 4}, {"kill_step": 5}, {"kill_write": 6}]
OPTIONS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "lr_scheduler_type": "linear"}
# Everything that has a memory: running frequencies, a value function, a thought that stays.
MEMORIES = {"advantage": "value", "coverage_coef": [0.1], "stop": "sampled", "memory": "persistent", "lookahead": 3}
EACH_STEP = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    main(str(folder), OPTIONS | MEMORIES)
    return torch.load(folder / "result.pt")


@pytest.fixture(scope="module")
def run():
    with forks(**os.environ) as python:
        yield lambda folder, options: python(HERE / "tiny_run.py", folder, json.dumps(options))


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: "-".join(f"{name}={at}" for name, at in kill.items()))
def test_killed_and_resumed_is_never_killed(uninterrupted, run, kill, tmp_path):
    done = run(tmp_path, OPTIONS | MEMORIES | kill)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not (tmp_path / "result.pt").exists()
    whole = newest_checkpoint(tmp_path)
    assert whole is None or torch.load(Path(whole) / "thinktok_state.pt")
    main(str(tmp_path), OPTIONS | MEMORIES | {"resume": whole is not None and "true"})
    resumed = torch.load(tmp_path / "result.pt")
    for name, value in uninterrupted["weights"].items():
        assert torch.equal(resumed["weights"][name], value), name


@pytest.mark.parametrize("data", [{}, {"streaming": True}], ids=["rows", "stream"])
def test_asked_to_end_it_saves_and_says_how_to_go_on(run, data, tmp_path):
    options = OPTIONS | MEMORIES | data | {"save_steps": 100}
    handler = signal.getsignal(signal.SIGTERM)
    (tmp_path / "whole").mkdir()
    main(str(tmp_path / "whole"), dict(options))
    done = run(tmp_path, options | {"terminate_step": 3})
    assert done.returncode == 128 + signal.SIGTERM, done.stderr[-2000:]
    assert f"SIGTERM: saved after step 4 in {tmp_path}. Go on with resume_from_checkpoint=true." in done.stderr
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    main(str(tmp_path), options | {"resume": True})
    for name, value in torch.load(tmp_path / "whole" / "result.pt")["weights"].items():
        assert torch.equal(torch.load(tmp_path / "result.pt")["weights"][name], value), name
    assert signal.getsignal(signal.SIGTERM) is handler


def test_asked_to_end_within_a_rollout_it_finishes_that_first(tmp_path, capsys):
    options = OPTIONS | {"num_iterations": 3, "save_steps": 300, "max_grad_norm": 1.0, "learning_rate": 1e-2}
    main(str(tmp_path / "whole"), dict(options))
    with pytest.raises(SystemExit):
        main(str(tmp_path / "cut"), options | {"terminate_step": 1})
    assert "SIGTERM: saved after step 3" in capsys.readouterr().err
    main(str(tmp_path / "cut"), options | {"resume": True})
    whole, resumed = (torch.load(tmp_path / name / "result.pt")["weights"] for name in ("whole", "cut"))
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_a_checkpoint_within_a_rollout_says_what_it_lacks(make_trainer, caplog):
    class Saves(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = True

    trainer = make_trainer(num_iterations=2, max_steps=2)
    trainer.add_callback(Saves())
    trainer.train()
    told = [record.getMessage() for record in caplog.records if "rollout" in record.getMessage()]
    assert len(told) == 1, "the second step ends it"
    assert "The checkpoint of step 1 lacks the rollout" in told[0]
    assert "multiples of num_iterations=2" in told[0]


class Worse(ThinkTokTrainer):
    """The first of its models is the best one."""

    def evaluate(self, *args, **kwargs):
        self.state.log_history.append({"evaluated": self.state.global_step})
        return super().evaluate(*args, **kwargs) | {"eval_loss": float(self.state.global_step)}


@pytest.fixture
def asked_to_end(make_trainer, corpus, capsys):
    """Trains the worse and worse, with a signal at a step's begin or whenever else; gives the trainer and what it said."""

    def run(callback, **options):
        trainer = make_trainer(trainer_class=Worse, eval_dataset=corpus.select(range(2)), max_steps=4, optim="sgd", **options)
        trainer.add_callback(callback)
        with pytest.raises(SystemExit) as end:
            trainer.train()
        assert end.value.code == 128 + signal.SIGTERM
        return trainer, capsys.readouterr().err

    return run


class TerminatedAfter(TrainerCallback):
    """Sends the signal where the last step is over, in its evaluation or its save."""

    def __init__(self, event: str, step: int):
        setattr(self, event, lambda args, state, control, **kwargs: os.kill(os.getpid(), signal.SIGTERM) if state.global_step == step else None)


BEST = {
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
}


def test_asked_to_end_it_keeps_the_checkpoint_to_go_on_from_beside_the_best(asked_to_end, tmp_path):
    trainer, told = asked_to_end(KilledAtStep(2, signal.SIGTERM), **BEST)
    assert "SIGTERM: saved after step 3" in told
    assert {path.name for path in tmp_path.glob("out/checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    saved = load_file(tmp_path / "out" / "checkpoint-3" / "model.safetensors")
    assert torch.equal(trainer.model.get_input_embeddings().weight, saved["model.embed_tokens.weight"])
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "out" / "checkpoint-1")


def test_asked_to_end_it_saves_what_is_not_the_best(asked_to_end, tmp_path):
    _, told = asked_to_end(KilledAtStep(1, signal.SIGTERM), eval_strategy="steps", eval_steps=1, save_strategy="best", metric_for_best_model="loss")
    assert "SIGTERM: saved after step 2" in told
    assert newest_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")


def test_asked_to_end_within_an_epoch_it_evaluates_no_part_of_one(asked_to_end):
    trainer, told = asked_to_end(KilledAtStep(0, signal.SIGTERM), eval_strategy="epoch", save_strategy="epoch")
    assert "SIGTERM: saved after step 1" in told
    assert not any("evaluated" in entry for entry in trainer.state.log_history)


def test_asked_to_end_at_an_epoch_s_end_it_saves_once(asked_to_end):
    """A second save of the same step would begin by taking away that the first, maybe the only one there is, was whole."""
    saves = []

    class KilledBefore(KilledAtStep):
        def on_save(self, args, state, control, **kwargs):
            saves.append(state.global_step)

    _, told = asked_to_end(KilledBefore(1, signal.SIGTERM), per_device_train_batch_size=16, save_strategy="epoch", save_total_limit=1)
    assert "SIGTERM: saved after step 2" in told
    assert saves == [2]


@pytest.mark.parametrize(
    ("event", "options", "saved"),
    [
        ("on_evaluate", BEST, "saved after step 4"),
        ("on_save", BEST, "saved after step 4"),
        ("on_train_end", BEST, "saved after step 1"),  # the best, which the run ends with
        ("on_train_end", {"save_strategy": "epoch"}, "saved after step 4"),
    ],
)
def test_asked_to_end_after_the_last_step_it_ends_so(asked_to_end, event, options, saved):
    _, told = asked_to_end(TerminatedAfter(event, 4), **options)
    assert told.count("SIGTERM") == 1
    assert saved in told


def test_the_newest_is_what_was_written_last(tmp_path):
    """A run that began anew in the folder of another, or went back, has fewer steps than what lies there."""
    for step, second in ((6, 1000), (2, 2000), (4, 2000), (8, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if second:
            (folder / COMPLETE_FILE).touch()
            os.utime(folder / COMPLETE_FILE, (second, second))
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_a_copied_run_has_the_same_newest(make_trainer, corpus, tmp_path):
    """Copies were all written at the time of the copy, in whatever order; and the oldest is still the one that goes."""
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    shutil.copytree(trainer.args.output_dir, tmp_path / "copy", copy_function=shutil.copy)
    for path in (*(tmp_path / "copy").rglob("checkpoint-1"), *(tmp_path / "copy").rglob("checkpoint-1/*")):
        os.utime(path, (2e9, 2e9))
    assert newest_checkpoint(tmp_path / "copy") == str(tmp_path / "copy" / "checkpoint-2")
    again = make_trainer(max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=2, output_dir=str(tmp_path / "copy"))
    again.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in (tmp_path / "copy").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_an_adapter_goes_on_in_the_precision_that_it_had(make_trainer, tmp_path):
    """TRL makes one beside a quantized base bf16, and PEFT would load it as fp32."""
    trainer = make_trainer(**lora())
    weights = {name: weight for name, weight in trainer.model.named_parameters() if "lora_" in name}
    for weight in weights.values():
        weight.data = torch.randn(weight.shape).bfloat16()
    before = {name: weight.clone() for name, weight in weights.items()}
    trainer.save_model(str(tmp_path / "saved"))
    for weight in weights.values():
        weight.data.zero_()
    trainer._load_from_checkpoint(str(tmp_path / "saved"))
    after = {name: weight for name, weight in trainer.model.named_parameters() if "lora_" in name}
    assert all(torch.equal(after[name], weight) and after[name].dtype == torch.bfloat16 for name, weight in before.items())


def test_what_cannot_be_resumed_from(tmp_path):
    with pytest.raises(ValueError, match="no whole checkpoint"):
        main(str(tmp_path), OPTIONS | {"resume": True})
    with pytest.raises(ValueError, match="does not exist"):
        main(str(tmp_path), OPTIONS | {"resume": str(tmp_path / "checkpoint-9")})
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match="was not written to its end"):
        main(str(tmp_path), OPTIONS | {"resume": str(tmp_path / "checkpoint-2")})
    assert newest_checkpoint(tmp_path) is None


def test_a_model_saved_alone_is_no_checkpoint_to_resume_from(tmp_path, capsys):
    options = OPTIONS | {"save_only_model": True, "terminate_step": 1}
    with pytest.raises(SystemExit):
        main(str(tmp_path), options)
    told = capsys.readouterr().err
    assert "SIGTERM: saved after step 2" in told
    assert "resume_from_checkpoint" not in told
    with pytest.raises(ValueError, match="checkpoint-2 holds the model alone .save_only_model."):
        main(str(tmp_path), OPTIONS | {"resume": True})


def lora(**options):
    return {"peft_config": LoraConfig(**{"r": 4, "target_modules": "all-linear"} | options)}


@pytest.mark.parametrize(
    ("made", "now", "told"),
    [
        ({}, {"policies": "split"}, "policies=shared, and this run has policies=split"),
        ({}, {"optim": "sgd"}, "optim=adamw_torch, and this run has optim=sgd"),
        ({}, {"optim": "adafactor"}, "optim=adamw_torch, and this run has optim=adafactor"),
        ({}, {"learning_rate": 0.5}, r"learning_rate=[0-9.e-]+, and this run has learning_rate=0.5"),
        ({}, {"weight_decay": 0.5}, "weight_decay=0.0, and this run has weight_decay=0.5"),
        ({}, {"adam_beta2": 0.5}, "adam_beta2=0.999, and this run has adam_beta2=0.5"),
        (lora(init_lora_weights="pissa"), lora(), "init_lora_weights=pissa, and this run has init_lora_weights=None"),
        ({}, {"num_think_tokens": 0}, "num_think_tokens=4, and this run has num_think_tokens=0"),
        ({"num_think_tokens": 0}, {"num_think_tokens": 0, "optim": "sgd"}, "optim=adamw_torch, and this run has optim=sgd"),
        ({}, {"model": {"vocab_size": 900}}, r"embed_tokens.weight=.384, 32., and this run has model.embed_tokens.weight=.900, 32."),
        ({}, {"model": {"tie": False}}, r"lm_head.weight=None, and this run has lm_head.weight=.384, 32."),
        ({}, lora(), "peft_config=None, and this run has peft_config=LORA"),
        (lora(), {}, "peft_config=LORA, and this run has peft_config=None"),
        (lora(), lora(r=8), "r=4, and this run has r=8"),
        (lora(), lora(lora_alpha=64), "lora_alpha=8, and this run has lora_alpha=64"),
        (lora(), lora(target_modules=["q_proj"]), r"k_proj.lora_A.default.weight=.4, 32., and this run has .*=None"),
        (lora(), lora() | {"think_learning_rate": 1e-2}, "think_learning_rate=None, and this run has .*=0.01"),
        (lora(), lora(use_dora=True), "use_dora=False, and this run has use_dora=True"),
        ({"policies": "split"}, {"policies": "split", "speaker_learning_rate": 1e-2}, "speaker_learning_rate=None, and this run has .*=0.01"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_a_checkpoint_is_told(make_trainer, tmp_path, made, now, told):
    def trainer(model=None, **options):
        model = tiny_model(**{"vocab_size": len(tiny_tokenizer())} | (model or {}))
        return make_trainer(model=model, **EACH_STEP | options)

    trainer(max_steps=1, **made).train()
    other = trainer(**now)
    with pytest.raises(CheckpointError, match=told) as error:
        other.train(resume_from_checkpoint=True)
    assert str(error.value).count("\n") == 0
    assert other.state.global_step == 0


@pytest.mark.parametrize("options", [{}, {"num_think_tokens": 0}, lora()], ids=["whole", "plain", "adapter"])
def test_what_says_nothing_of_how_it_was_made_is_told(make_trainer, tmp_path, options):
    make_trainer(**EACH_STEP, **options).train()
    state_file = tmp_path / "out" / "checkpoint-1" / STATE_FILE
    state = torch.load(state_file)
    del state["made_with"]
    torch.save(state, state_file)
    with pytest.raises(CheckpointError, match="was made with .*=None, and this run has") as error:
        make_trainer(**EACH_STEP, **options).train(resume_from_checkpoint=str(state_file.parent))
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize("other", [False, True])
def test_an_adapter_that_goes_on_on_another_base_says_so(make_trainer, tmp_path, caplog, other):
    """Its parameters have the same shapes there."""
    bases = [save_tiny(tmp_path / name) for name in ("base", "instruct")]
    make_trainer(model=bases[0], **EACH_STEP, **lora()).train()
    make_trainer(model=bases[other], **EACH_STEP, **lora()).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    told = [record.getMessage() for record in caplog.records if "this run's base is" in record.getMessage()]
    assert len(told) == other
    assert all(bases[0] in one and bases[1] in one for one in told)


def test_a_checkpoint_that_does_not_say_its_learning_rate_is_gone_on_from(make_trainer, tmp_path):
    make_trainer(**EACH_STEP).train()
    state_file = tmp_path / "out" / "checkpoint-1" / STATE_FILE
    state = torch.load(state_file)
    del state["made_with"]["learning_rate"], state["made_with"]["weight_decay"]  # as they were once
    torch.save(state, state_file)
    assert make_trainer(**EACH_STEP).train(resume_from_checkpoint=str(state_file.parent)).global_step == 2


def test_a_curriculum_goes_on_with_its_own_levels(make_trainer, tmp_path):
    def trainer(*levels):
        rows = Dataset.from_dict({"text": CORPUS[:4] * 2, "level": [levels[i % len(levels)] for i in range(8)]})
        return make_trainer(train_dataset=rows, curriculum_threshold=0.9, stop="fixed", **EACH_STEP)

    trainer(1, 2).train()
    with pytest.raises(ValueError, match="data has the levels 1, 2 and this run's 5, 6"):
        trainer(5, 6).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("max_steps", [1, 2])
def test_a_run_that_had_ended_takes_no_further_step(make_trainer, tmp_path, max_steps):
    ended = make_trainer(**EACH_STEP, optim="adamw_torch")
    done = ended.train()
    resumed = make_trainer(**EACH_STEP, optim="adamw_torch", max_steps=max_steps)
    again = resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == again.global_step == 2
    assert again.metrics["train_step_seconds"] == pytest.approx(done.metrics["train_step_seconds"])
    for (name, one), other in zip(ended.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("nothing", ["", "false", False, None], ids=repr)
def test_no_checkpoint_to_resume_from_is_a_new_run(make_trainer, nothing):
    assert make_trainer(max_steps=1).train(resume_from_checkpoint=nothing).global_step == 1


def test_a_model_with_code_of_its_own_goes_on(make_trainer, tmp_path):
    options = {"model": with_own_code(save_tiny(tmp_path / "base")), "trust_remote_code": True, "save_strategy": "steps", "save_steps": 1}
    make_trainer(**options, max_steps=1).train()
    resumed = make_trainer(**options, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


class Killed(BaseException):
    """What a SIGKILL is to the files."""


def killed(*args, **kwargs):
    raise Killed


def test_killed_while_a_checkpoint_is_written_anew_it_no_longer_counts(make_trainer, tmp_path, monkeypatch):
    make_trainer(**EACH_STEP).train()
    monkeypatch.setattr(ThinkTokTrainer, "_save_rng_state", killed)
    with pytest.raises(Killed):
        make_trainer(**EACH_STEP).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert newest_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-1")


def test_older_checkpoints_go_when_the_new_one_counts(make_trainer, tmp_path, monkeypatch):
    remove = shutil.rmtree

    def remove_and_die(*args, **kwargs):
        remove(*args, **kwargs)
        killed()

    trainer = make_trainer(**EACH_STEP, save_total_limit=1)
    monkeypatch.setattr(shutil, "rmtree", remove_and_die)
    with pytest.raises(Killed):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert newest_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")
    assert trainer.args.save_total_limit == 1


def test_what_was_not_written_to_its_end_goes_before_what_was(make_trainer, tmp_path, monkeypatch):
    make_trainer(**EACH_STEP, max_steps=1).train()
    with monkeypatch.context() as dying:
        dying.setattr(ThinkTokTrainer, "_save_rng_state", killed)
        with pytest.raises(Killed):
            make_trainer(**EACH_STEP).train(resume_from_checkpoint=True)
    (tmp_path / "out" / "checkpoint-2").rename(tmp_path / "out" / "checkpoint-7")  # which the next attempt does not write again
    make_trainer(**EACH_STEP, save_total_limit=2).train(resume_from_checkpoint=True)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_folder_of_somebody_else_s_is_not_made_the_oldest(make_trainer, tmp_path):
    (theirs := tmp_path / "out" / "checkpoint-mine").mkdir(parents=True)
    os.utime(theirs, (2e9, 2e9))
    make_trainer(**EACH_STEP, save_total_limit=2).train()
    assert theirs.stat().st_mtime == 2e9


def test_totals_are_those_of_all_sessions(make_trainer, tmp_path):
    rewards = iter([math.nan, 1.0, 1.0])
    whole = make_trainer(**EACH_STEP, max_steps=3, reward_funcs=[lambda logps, mask, **kwargs: logps.mean(-1) * next(rewards)])
    whole.train()
    resumed = make_trainer(**EACH_STEP, max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for name in ("num_tokens", "skipped_steps"):
        one, other = ([entry[name] for entry in each.state.log_history if name in entry] for each in (whole, resumed))
        assert one == other
    assert other == [1, 1, 1]


@pytest.mark.parametrize("further", [0, 1])
def test_results_of_a_resumed_run_name_the_code_of_all_its_steps(make_trainer, tmp_path, monkeypatch, further):
    """Also where what had ended is measured once more."""
    monkeypatch.setattr(results, "_commit", lambda: "the first")
    trainer = make_trainer(**EACH_STEP, max_steps=2)
    trainer.train()
    assert trainer.spent.elsewhere(results.environment()) == {}
    monkeypatch.setattr(results, "_commit", lambda: "a later one")
    resumed = make_trainer(**EACH_STEP, max_steps=2 + further)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    here = results.environment()
    assert results.where({"runs": [resumed.spent.elsewhere(here)]} | here).endswith("; commits the first and a later one")
    resumed.train()
    assert resumed.spent.elsewhere(here) == {}, "a run that starts over"


@pytest.mark.parametrize("options", [{}, {"num_think_tokens": 0}], ids=["", "no thinking"])
def test_seconds_are_those_of_the_attempt_and_of_what_it_goes_on_from(make_trainer, tmp_path, options):
    trainer = make_trainer(**EACH_STEP, max_steps=2, **options)
    trainer.train()
    first = trainer.spent.seconds
    resumed = make_trainer(**EACH_STEP, max_steps=2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.spent.seconds == first, "no further step was taken"
    trainer.spent.seconds = 1e6
    trainer.train()
    assert trainer.spent.seconds < 1e6, "a run that starts over"
