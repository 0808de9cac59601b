"""A run that is killed, wherever, and resumed equals one that never was, bit for bit."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from commands import started
from models import save_tiny, with_own_code
from tiny_run import main

from hf_thinktok import ThinkTokTrainer
from hf_thinktok.checkpoints import newest_checkpoint

HERE = Path(__file__).parent
# Checkpoints after two and four of six steps, each with several files: a kill hits between them, in the first of them, or in a later file.
KILLS = [{"kill_step": 3}, {"kill_write": 1}, {"kill_write": 4}, {"kill_step": 5}, {"kill_write": 6}]
OPTIONS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "lr_scheduler_type": "linear"}
# Everything that has a memory: running frequencies, a value function, a thought that stays.
MEMORIES = {"advantage": "value", "coverage_coef": [0.1], "stop": "sampled", "memory": "persistent", "lookahead": 3}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    main(str(folder), OPTIONS | MEMORIES)
    return torch.load(folder / "result.pt")


def run(folder: Path, options: dict) -> subprocess.CompletedProcess:
    return started(HERE / "tiny_run.py", folder, json.dumps(options))


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: "-".join(f"{name}={at}" for name, at in kill.items()))
def test_killed_and_resumed_is_never_killed(uninterrupted, kill, tmp_path):
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
def test_asked_to_end_it_saves_and_says_how_to_go_on(data, tmp_path):
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


EACH_STEP = {"save_strategy": "steps", "save_steps": 1}


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

    monkeypatch.setattr(shutil, "rmtree", remove_and_die)
    trainer = make_trainer(**EACH_STEP, save_total_limit=1)
    with pytest.raises(Killed):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert newest_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")
    assert trainer.args.save_total_limit == 1
