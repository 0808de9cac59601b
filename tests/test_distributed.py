"""Two processes under `accelerate launch`, with every launcher, against one process that accumulates as many batches."""

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from commands import in_process
from launchers import HERE, LAUNCHERS, ZERO, alone, launch, launch_tiny, weight_gap
from models import CORPUS, EAGER_REVIVAL, save_tiny, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from hf_thinktok.checkpoints import CheckpointError
from hf_thinktok.distributed import check_launcher, for_rollout

pytestmark = pytest.mark.timeout(600)

BATCHES_OF_ONE = {"per_device_train_batch_size": 1}  # of two ranks, one of a longer row
# Running statistics (coverage, the value baseline) are over all ranks' batches, so they see more at once than one process does: not among these.
CASES = {
    "learned stop": {},
    "sampled stop, thoughts that stay": {"stop": "sampled", "memory": "persistent", "lookahead": 3},
    "two models": {"policies": "split", "stop": "fixed", "blind": True, "objective": "marginal", "search": 6},
    "two models, checkpointed, one of them idle at first": {
        "policies": "split",
        "stop": "fixed",
        "blind": True,
        "think_start": 1,
        "gradient_checkpointing": True,
    },
    "two adapters": {"policies": "split", "stop": "fixed", "adapter": True},
    "revived tokens": {
        "revive_every": 2,
        "stop": "fixed",
        "revival": EAGER_REVIVAL,
        "num_think_tokens": 16,
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 3,
    },
    "text thoughts": {"thoughts": "text", "stop": "fixed", "max_think_length": 4, "lookahead": 2, "think_loss_type": "dapo"},
    "varied thoughts, of which one process may have none": {
        "fork_positions": "markers",
        "fork_markers": [" =", " at"],
        "num_forks": 8,
        "stop": "fixed",
        "balance_coef": 1.0,
        "thought_entropy_target": 0.5,
        "learning_rate": 0.05,
        "max_steps": 4,
        **BATCHES_OF_ONE,
    },
}
EPOCHS = {"num_train_epochs": 2, "max_steps": -1}
UNEVEN = {
    "a short batch": {"per_device_train_batch_size": 3, **EPOCHS},
    "batches cut in two": {"per_device_train_batch_size": 4, "accelerator_config": {"split_batches": True}, **EPOCHS},
}
HALVES = {"optim": "adamw_torch", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
SAVED = {
    name: {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "optim": "adamw_torch", "tie": False, "stop": "fixed"} | options
    for name, options in {"adapter": {"adapter": True}, "two adapters": {"adapter": True, "policies": "split"}, "two models": {"policies": "split"}}.items()
}
UNLIKE = {
    "fewer places": {"stop": "fixed", "memory": "persistent", "num_forks": 40, "gather_for_rollout": False, **BATCHES_OF_ONE},
    "texts of their own": {"rollout": "free", "prompt_length": 4, "optim": "adamw_torch", **BATCHES_OF_ONE},
}
REFUSED = {
    "FSDP2 would save no model so": {"fsdp2_on_cpu": "SHARDED_STATE_DICT", "refused": True},
    "With FSDP2 an adapter needs an LM head of its own": {"adapter": True, "refused": True},
}
RESUMED_ANEW = ("zero3", "fsdp2")  # where parameters are divided: by processes that did not write the checkpoint
KINDS = {"ddp": "MULTI_CPU", "zero1": "DEEPSPEED", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}


def assert_same(one: dict, together: dict, launcher: str) -> None:
    assert (one["world"], together["world"], together["launcher"]) == (1, 2, KINDS[launcher])
    assert together["sharded"] == (launcher in ("zero3", "fsdp2"))
    assert together["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert weight_gap(one, together) < 1e-5


def runs_of(launcher: str, folder: Path) -> dict[str, dict]:
    """All that is made under a launcher, by name. A resumed run is the second half of another one."""
    if launcher == "ddp":
        return CASES | UNEVEN | {"revived tokens, resumed": CASES["revived tokens"] | {"resume": str(folder / "revived tokens" / "checkpoint-3")}}
    model = str(folder / "model")
    whole = HALVES | {"model_folder": model} | ({"beta": 0.5} if launcher in ("zero2", "fsdp2") else {})  # a frozen copy of the model beside it
    one_by_one = {"gather_for_rollout": False} if launcher in ("zero3", "fsdp2") else {}
    runs = {"whole": whole, "whole, resumed": whole | one_by_one | {"resume": str(folder / "whole" / "checkpoint-2")}}
    if launcher == "zero2":
        runs["adapter"] = {"adapter": True, "optim": "adamw_torch"}
    if launcher == "zero3":
        own = {"teacher": {"teacher": model}, "continuous": {"thoughts": "continuous", "stop": "fixed"}}
        runs |= {name: {"model_folder": model, "optim": "adamw_torch"} | options for name, options in own.items()}
    if launcher == "fsdp2":
        runs |= SAVED | {f"{name}, resumed": SAVED[name] | {"resume": str(folder / name / "checkpoint-1")} for name in SAVED}
        runs |= {name: {"model_folder": model} | options for name, options in UNLIKE.items()}
        runs["texts of their own"]["teacher"] = model
        runs |= {"in low precision": {"model_folder": model, "optim": "adamw_torch", "bf16": True}} | REFUSED
    return runs


class Made(dict):
    """What two processes make under a launcher: its runs one after another, as most of the time is that of bringing them up. Two others resume, for some."""

    def __init__(self, launcher: str, folder: Path):
        save_tiny(folder / "model")
        self.launcher, self.folder, self.options = launcher, folder, runs_of(launcher, folder)
        anew = {name for name, options in self.options.items() if "resume" in options and launcher in RESUMED_ANEW}
        parts = [name for name in self.options if name not in anew], sorted(anew)
        self.said = "".join(launch_tiny(launcher, *((folder / name, self.options[name]) for name in part)).stderr for part in parts if part)
        super().__init__({name: torch.load(result) for name in self.options if (result := folder / name / "result.pt").exists()})

    def __missing__(self, name: str):
        pytest.fail(f"{name} left no result: {self.said[-3000:]}")

    def assert_as_alone(self, name: str, folder: Path) -> dict:
        """One process that accumulates as many batches makes the same; gives what it makes."""
        one = alone(folder, {option: value for option, value in self.options[name].items() if option != "gather_for_rollout"})
        assert_same(one, self[name], self.launcher)
        return one


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return functools.cache(lambda launcher: Made(launcher, tmp_path_factory.mktemp(launcher)))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_under_ddp_are_one_that_accumulates(made, tmp_path, case):
    one = made("ddp").assert_as_alone(case, tmp_path)
    assert one["revived"] == made("ddp")[case]["revived"]
    assert (one["revived"] > 0) is ("revive_every" in CASES[case])


def test_what_each_process_remembers_of_thoughts_is_resumed(made):
    """The checkpoint lies between two times at which tokens are revived."""
    whole, resumed = made("ddp")["revived tokens"], made("ddp")["revived tokens, resumed"]
    assert resumed["revived"] == whole["revived"]
    assert weight_gap(whole, resumed) == 0.0


@pytest.mark.parametrize("launcher", [*ZERO, "fsdp2"])
def test_every_launcher_trains_what_one_process_trains_and_resumes(made, tmp_path, launcher):
    """Layers are gathered one by one in the resumed run, where that is a choice."""
    runs = made(launcher)
    one = runs.assert_as_alone("whole", tmp_path)
    assert_same(one, runs["whole, resumed"], launcher)
    assert weight_gap(runs["whole"], runs["whole, resumed"]) < 1e-6

    with pytest.raises(CheckpointError, match=r"was made with launcher=(ZeRO-\d on 2 processes|FSDP), and this run has launcher=one process or DDP"):
        alone(tmp_path / "goes on", runs.options["whole"] | {"resume": str(runs.folder / "whole" / "checkpoint-2")})

    for name in ("whole", "whole, resumed"):
        plain = AutoModelForCausalLM.from_pretrained(runs.folder / name / "checkpoint-4")
        for parameter, value in plain.named_parameters():
            torch.testing.assert_close(value.detach(), one["weights"][parameter], atol=1e-5, rtol=0.0, msg=parameter)


@pytest.mark.parametrize(("case", "steps"), zip(UNEVEN, (2 * 6, 2 * 8), strict=True))
def test_batches_that_do_not_divide_evenly(made, case, steps):
    """32 rows, two epochs: the last batch of an epoch is short, or all are cut in two."""
    losses = made("ddp")[case]["losses"]
    assert len(losses) == steps
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("launcher", ["zero2", "fsdp2"])
def test_an_adapter_and_its_rows_are_trained_alike(made, tmp_path, launcher):
    """With tied embeddings, and with FSDP2 without."""
    made(launcher).assert_as_alone("adapter", tmp_path)


@pytest.mark.parametrize(("launcher", "how"), [("zero2", {"started": True}), ("zero3", {})])
def test_the_recipe_trains_and_compares_as_in_one_process(tmp_path, launcher, how):
    """Evaluation included, before training and after it; once in processes that start as a user's do."""
    (tmp_path / "text.txt").write_text("\n".join(f"{i} {' '.join(text.split())}" for i, text in enumerate(CORPUS)))
    options = {
        "model_name_or_path": save_tiny(tmp_path / "model"), "data_files": tmp_path / "text.txt", "max_steps": 2, "max_length": 48,
        "num_forks": 3, "num_generations": 2, "num_think_tokens": 4, "held_out_documents": 8, "bf16": False, "report_to": "none", "optim": "adamw_torch",
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "gradient_checkpointing": False, "save_strategy": "no",
    }  # fmt: skip
    recipe, words = HERE.parent / "recipes/pretrain_think.py", [word for name, value in options.items() for word in (f"--{name}", value)]
    done = launch(launcher, recipe, *words, "--output_dir", tmp_path / "two", "--ddp_backend", "gloo", **how)
    # gloo's threads now and then abort a process at its very end, when all is written.
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr[-3000:]
    assert in_process(recipe, *words, "--output_dir", tmp_path / "one", "--gradient_accumulation_steps", 2).returncode == 0
    together, one = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("two", "one"))
    assert together["bits_per_token"]["base"] == pytest.approx(one["bits_per_token"]["base"], abs=1e-4)
    assert together["bits_per_token"]["no_think"] == pytest.approx(one["bits_per_token"]["no_think"], abs=1e-4)
    assert together["bits_per_token"]["no_think"] < together["bits_per_token"]["base"]
    assert together["documents"] == one["documents"] == 8


def test_ranks_whose_rows_have_fewer_places_to_think_at_make_as_many_passes(made, tmp_path):
    made("fsdp2").assert_as_alone("fewer places", tmp_path)


def test_fsdp2_in_low_precision_scores_as_exactly_as_one_process(made, tmp_path):
    together, one = made("fsdp2")["in low precision"], alone(tmp_path, made("fsdp2").options["in low precision"])
    assert one["precision"] == together["precision"] == "bf16"
    assert together["losses"] == pytest.approx(one["losses"], abs=0.02)
    # Rewards compare log-probabilities; as bf16 numbers around 5 they would be 0.03 apart from each other.
    assert together["reward_std"] == pytest.approx(one["reward_std"], rel=0.05)


def test_ranks_that_write_texts_of_their_own_wait_for_each_other(made):
    losses = made("fsdp2")["texts of their own"]["losses"]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("case", ["teacher", "continuous"])
def test_a_teacher_and_soft_thoughts_work_where_parameters_are_divided(made, tmp_path, case):
    made("zero3").assert_as_alone(case, tmp_path)


@pytest.mark.parametrize("case", SAVED)
def test_what_has_two_policies_or_an_adapter_is_saved_by_one_rank_and_resumed(made, case):
    """With FSDP2 the others are given no weights to save."""
    whole, resumed = (made("fsdp2")[name] for name in (case, f"{case}, resumed"))
    assert weight_gap(whole, resumed) < 1e-7


def test_all_ranks_save_and_end_when_one_is_asked_to(tmp_path):
    options = {"streaming": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 100}
    ended = launch_tiny("ddp", (tmp_path / "two", options | {"terminate_step": 1}))
    assert "SIGTERM: saved after step 2" in ended.stderr
    newest = {"resume": str(tmp_path / "two" / "checkpoint-4")}  # of the run that this launch resumes first
    done = launch_tiny("ddp", (tmp_path / "two", options | {"resume": True}), (tmp_path / "again", options | newest))
    assert done.returncode == 0, done.stderr[-3000:]
    resumed, again = (torch.load(tmp_path / name / "result.pt") for name in ("two", "again"))
    assert_same(alone(tmp_path / "one", options), resumed, "ddp")
    assert weight_gap(resumed, again) == 0  # it had ended


@pytest.mark.parametrize("reshard", [True, False], ids=["given back", "kept"])
def test_a_rollout_leaves_fsdp2_as_the_launcher_set_it_up(reshard):
    """What is gathered for the forward is kept for the backward afterwards too, where the launcher's config says so."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = tiny_model(tie=False)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh)
        for _ in range(2):
            with for_rollout(model, SimpleNamespace(), True) as whole_model:
                whole_model(input_ids=torch.ones(1, 2, dtype=torch.long))
            model(input_ids=torch.ones(1, 2, dtype=torch.long))
            kept = [not isinstance(next(module.parameters()), DTensor) for module in (*model.model.layers, model.model.norm)]
            assert kept == [not reshard] * len(model.model.layers) + [True]
            model.reshard()
    finally:
        torch.distributed.destroy_process_group()


def test_processes_that_do_not_know_of_each_other_are_refused():
    with pytest.raises(ValueError, match="started 2 processes, and this one knows of 1"):
        check_launcher(Accelerator(cpu=True), tiny_model(), {"WORLD_SIZE": "2"})


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_fsdp2_cannot_do_is_refused(made, sentence):
    assert sentence not in made("fsdp2")
    assert f"ValueError: {sentence}" in made("fsdp2").said


def test_processes_that_would_train_alone_and_say_nothing_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(LAUNCHERS, "cpu mode", (["--cpu"], {}))
    done = launch_tiny("cpu mode", (tmp_path, {}))
    assert "ValueError: The launcher was asked for several processes and started one" in done.stderr

    if not torch.cuda.is_available():
        monkeypatch.setitem(LAUNCHERS, "as on GPUs", (["--config_file", str(HERE.parent / "accelerate_configs/fsdp2.yaml")], {}))
        assert "ValueError: The launcher's config asks for FSDP, and MULTI_CPU came up" in launch_tiny("as on GPUs", (tmp_path, {})).stderr
