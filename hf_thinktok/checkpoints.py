"""Checkpoints: what is written, when one counts, and how a run goes on from it as if it had never stopped."""

import contextlib
import copy
import functools
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import SFTTrainer

from ._compat import uploads_without
from .card import read_results, render_card, snippet, use, why_not_generated
from .errors import RunError, first_line
from .models import unwrapped
from .peft import SPEAKER, is_speaker, load_adapters, save_adapter, start_in_base
from .results import COMPLETE_FILE, NOT_PUSHED, STATE_FILE, changed_options, environment, read_json, write_json
from .tokens import ThinkingVocabulary

logger = logging.getLogger(__name__)

MADE_WITH = "made_with"  # in the file of a trainer's state, beside its parts


def newest_checkpoint(folder: str | Path) -> str | None:
    """The checkpoint of a run that was last written to its end, if there is one. One that went back, or began anew, may be at an earlier step than others."""
    whole = []
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (step := _step(path)) is None:
            continue
        if (written := _written(path)) is not None:
            whole.append((written, step, path))
        else:
            logger.warning("%s was not written to its end and is left alone.", path)
    return str(max(whole)[-1]) if whole else None


def _step(folder: Path) -> int | None:
    """The step of a checkpoint that a run wrote, by its name; other folders may begin with the same word."""
    return None if (match := re.search(r"-(\d+)$", folder.name)) is None else int(match[1])


def _written(checkpoint: Path) -> int | None:
    """When a checkpoint was written to its end, if it was, in nanoseconds since 1970. It says so itself, as copies have other times; older ones do not."""
    if not (checkpoint / COMPLETE_FILE).exists():
        return None
    said = (checkpoint / COMPLETE_FILE).read_text()
    return int(said) if said.isdecimal() else (checkpoint / COMPLETE_FILE).stat().st_mtime_ns


CARD = """
## Thinking tokens

This model has {num_tokens} thinking tokens without text, `{first}` to `{last}`, whose meaning nobody gave. {use} Trained with
[hf-thinktok](https://github.com/hf-thinktok/hf-thinktok).

{snippet}
"""
# Of TRL's card: a prompt for chats, which not every model has a template for, and the base where it has no name on the Hub.
QUICK_START = re.compile(r"## Quick start\n.*?(?=^## )", re.DOTALL | re.MULTILINE)
NO_BASE = "[None](https://huggingface.co/None)"


# Those that go on as they were, whatever the options say.
OF_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
LAUNCHER = "launcher"
# Those that say more than the shapes of an adapter's parameters, or what these do not show.
ADAPTER_OPTIONS = ("r", "lora_alpha", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern")


class CheckpointError(RunError):
    """There is no such checkpoint, or it does not fit the run."""


class NoRepositoryError(ValueError):
    """The Hub made no repository to push to."""


class PushError(RuntimeError):
    """The Hub did not take what was uploaded."""


def begins_anew(asked: str | bool | None) -> bool:
    """Whether `resume_from_checkpoint` asks for none; a shell's variable may be empty."""
    return str(asked).lower() in ("none", "false", "")


def resume_points(asked: str | bool | None, folders: Sequence[str | Path]) -> list[str | None]:
    """The checkpoint that the run in each of these folders goes on from; `None` where it begins anew.

    Args:
        asked: `resume_from_checkpoint`, as from a command line: true for the newest whole one of each folder, nothing or false for none, or one run's by name.

    Raises:
        CheckpointError: no folder has one, or one is named for several runs.
    """
    if begins_anew(asked):
        return [None] * len(folders)
    if str(asked).lower() != "true":
        if len(folders) > 1:
            raise CheckpointError(f"resume_from_checkpoint={asked} is one run's, and there are {len(folders)}: with true each goes on from its own newest.")
        return [str(asked)]
    found = [newest_checkpoint(folder) for folder in folders]
    if not any(found):
        raise CheckpointError(f"There is no whole checkpoint in {', '.join(map(str, folders))} to resume from: leave resume_from_checkpoint out.")
    return found


def check_not_pushed(args: TrainingArguments) -> None:
    """For recipes that train several models."""
    if args.push_to_hub:
        raise ValueError("push_to_hub would put several models into one place: leave it out, and push the one you want with `thinktok push FOLDER REPOSITORY`.")


class Preemption(TrainerCallback):
    """On SIGTERM, to any one of the processes: the step, and all with the same rollout, are finished, all save, and training stops."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.asked = self.agreed = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Signals can be handled in the main thread only; elsewhere they do what they did."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def agree(self) -> bool:
        """Whether any one was asked to end; all of them ask together."""
        if self.accelerator.num_processes == 1:  # nobody to ask, nor a device to wait for
            self.agreed |= self.asked
        elif not self.agreed:
            self.agreed = bool(self.accelerator.gather(torch.tensor([self.asked], device=self.accelerator.device)).any())
        return self.agreed

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.num_iterations == 0 and self.agree():
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        """It may have been asked while it evaluated or saved. What goes on later has no best model yet, for which this checkpoint would be removed."""
        if self.agree():
            control.should_training_stop = True
            state.best_model_checkpoint = None

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.agreed:  # the step's end has saved
            control.should_save = False
            control.should_evaluate &= not state.epoch % 1  # else it is not at its end


class CheckpointingTrainer(SFTTrainer):
    """A trainer whose checkpoints hold all that it knows. `_stateful` names what it knows beside weights, optimizer and position."""

    vocabulary: ThinkingVocabulary
    plain: bool
    _preemption: Preemption
    _began = 0.0  # when training did, in seconds since 1970
    _made_with: dict[str, Any]  # what a checkpoint says that it was made with
    _fresh: dict[str, Any] = {}  # what `_stateful` held before any training
    _start: dict[str, Any] = {}  # what it holds when this run begins

    def _stateful(self) -> dict[str, Any]:
        raise NotImplementedError

    def _snapshot(self) -> dict[str, Any]:
        return {name: copy.deepcopy(part.state_dict()) for name, part in self._stateful().items()}

    def _forget_rollouts(self) -> None:
        raise NotImplementedError

    def _what_it_trains(self) -> dict[str, Any]:
        """What weights and the optimizer's state have to fit: options, the most telling first, and then the shape of each parameter that is trained."""
        args = self.args
        found: dict[str, Any] = {
            "num_think_tokens": 0 if self.plain else self.vocabulary.num_tokens,
            "policies": args.policies,
            LAUNCHER: self._launcher(),
            "optim": args.optim.removesuffix("_fused"),  # their states are alike
            **{name: getattr(args, name) for name in OF_OPTIMIZER},
            "speaker_learning_rate": args.speaker_learning_rate,
            "think_learning_rate": args.think_learning_rate,
            "peft_config": None,
        }
        if is_peft_model(self.model):
            adapter = next(iter(self.model.peft_config.values()))
            found["peft_config"] = adapter.peft_type.value
            found |= {name: getattr(adapter, name, None) for name in ADAPTER_OPTIONS} | {"init_lora_weights": start_in_base(adapter)}
        trained = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        return found | {name: list(getattr(one, "ds_shape", one.shape)) for name, one in trained.items()}

    def _launcher(self) -> str:
        """By what the optimizer's state is kept, each in a way that the others do not read."""
        kind, ranks = self.accelerator.distributed_type, self.accelerator.num_processes
        if kind == DistributedType.DEEPSPEED:
            return f"ZeRO-{self.accelerator.state.deepspeed_plugin.zero_stage} on {ranks} processes"
        return "FSDP" if kind == DistributedType.FSDP else "one process or DDP"

    def _start_over(self) -> None:
        """Nothing of an attempt before is left, be it of this run (`auto_find_batch_size`) or an interrupted one."""
        self._forget_rollouts()
        self._start_clock()
        parts = self._stateful()
        for name, state in self._start.items():
            parts[name].load_state_dict(copy.deepcopy(state))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Trains. On SIGTERM, as of a cluster that wants its machines back, a checkpoint is written and the process ends.

        Args:
            resume_from_checkpoint: a checkpoint's folder; `True` (or `"true"`, as from a command line) for the newest of `output_dir` that is whole;
                `None`, `False`, `"false"` or nothing at all to start anew. A run that had ended takes no further step.

        Raises:
            ValueError: there is no such checkpoint, or it is of another run; or nothing would happen in this one, or did.
            SystemExit: with code 143, after SIGTERM.
        """
        (resume_from_checkpoint,) = resume_points(resume_from_checkpoint, [self.args.output_dir])
        self._made_with = self._what_it_trains()  # before launchers have wrapped it
        self._start = self._fresh | (self._read_checkpoint(str(resume_from_checkpoint)) if resume_from_checkpoint else {})
        self._preemption, self._began = Preemption(self.accelerator), time.time()
        train = functools.partial(super().train, resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        done = train() if self.args.save_strategy == "no" else self._until_asked(train)
        if self.state.global_step == 0:
            if self.args.dataloader_drop_last:
                raise RunError(
                    "No step was taken: with dataloader_drop_last the rows have to fill a batch. Lower per_device_train_batch_size, or leave it out."
                )
            # Of a stream, whose rows are not looked at before.
            raise RunError(f"No step was taken: no row has a token to predict within max_length={self.args.max_length}. Raise max_length.")
        return done

    def _until_asked(self, train: Callable[[], Any]) -> Any:
        """Trains; on SIGTERM ends the process with what was saved."""
        self.add_callback(self._preemption)
        try:
            with self._preemption.listening():
                done = train()
        finally:
            self.remove_callback(self._preemption)
        if self._preemption.agree():  # maybe after the last step, when there was nothing left to stop
            if self.is_world_process_zero():
                print(f"SIGTERM: {self._what_is_saved()}", file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM)
        return done

    def _what_is_saved(self) -> str:
        folder = self.args.output_dir
        if (newest := newest_checkpoint(folder)) is None:
            return f"ended after step {self.state.global_step}; there is no checkpoint in {folder}."
        go_on = "" if self.args.save_only_model else " Go on with resume_from_checkpoint=true."
        return f"saved after step {newest.rpartition('-')[2]} in {folder}.{go_on}"

    def _determine_best_metric(self, *args, **kwargs) -> bool:
        """Whether `save_strategy: best` saves: when asked to end, whatever the metric."""
        return super()._determine_best_metric(*args, **kwargs) or self._preemption.agreed

    def _run_epoch(self, *args, **kwargs) -> None:
        """The base class would take one more step before it asks whether that was the last."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _read_checkpoint(self, folder: str) -> dict[str, Any]:
        """What a run that goes on from this folder begins with."""
        if not os.path.exists(os.path.join(folder, COMPLETE_FILE)):
            if os.path.exists(os.path.join(folder, "config.json")) and not Path(folder).name.startswith(PREFIX_CHECKPOINT_DIR):
                raise CheckpointError(f"{folder} is a model, and no checkpoint of a run: start a run from it as its model, without resume_from_checkpoint.")
            why = "was not written to its end" if os.path.isdir(folder) else "does not exist"
            raise CheckpointError(f"The checkpoint {folder} {why}: resume from another one, or with resume_from_checkpoint=true from the newest whole one.")
        if not self.plain and (found := ThinkingVocabulary.stored_in(folder)) != self.vocabulary:
            raise CheckpointError(
                f"The checkpoint {folder} has the thinking vocabulary {found} and this run {self.vocabulary}: set num_think_tokens as it was."
            )
        if not os.path.exists(os.path.join(folder, STATE_FILE)):
            raise CheckpointError(
                f"The checkpoint {folder} holds the model alone (save_only_model), and no run goes on from that: start one from it as its model."
            )
        device = self.accelerator.device  # among several processes it is `cpu:0`, which `torch.load` does not know
        state = torch.load(os.path.join(folder, STATE_FILE), map_location="cpu" if device.type == "cpu" else device)
        have, parts = self._made_with, self._stateful()
        made = {name: have[name] for name in (*OF_OPTIMIZER, LAUNCHER)} | state.get(MADE_WITH, {})  # older ones do not say
        for name in have | made:
            if made.get(name) != have.get(name):
                raise CheckpointError(
                    f"The checkpoint {folder} was made with {name}={made.get(name)}, and this run has {name}={have.get(name)}: "
                    "resume with the model and the options it was made with."
                )
        if is_peft_model(self.model):
            base = next(iter(self.model.peft_config.values())).base_model_name_or_path
            if (before := read_json(Path(folder, "adapter_config.json"))["base_model_name_or_path"]) != base:
                logger.warning(
                    "The checkpoint %s is an adapter of %s, and this run's base is %s: it goes on right only if they are the same.", folder, before, base
                )
        if missing := set(parts) - set(state):
            raise CheckpointError(f"The checkpoint {folder} was made without {', '.join(sorted(missing))}: resume with the options it was made with.")
        return {name: state[name] for name in parts}

    def _save_checkpoint(self, model, trial) -> None:
        """Wherever this is killed, a checkpoint that counts is whole, and there is one if there was one."""
        run, limit = self._get_output_dir(trial=trial), self.args.save_total_limit
        if not self.plain and self.state.global_step % self.args.num_iterations:  # a callback's, or the last one
            logger.warning(
                "The checkpoint of step %d lacks the rollout that it stopped in: a run that goes on from it draws another one. Save at multiples of "
                "num_iterations=%d.", self.state.global_step, self.args.num_iterations,
            )  # fmt: skip
        folder = Path(run, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:  # a run that starts over writes into the folders of the one before
            (folder / COMPLETE_FILE).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        self.args.save_total_limit = None  # older ones go when this one counts
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save and folder.exists():
            (folder / COMPLETE_FILE).write_text(str(time.time_ns()))
            for path in Path(run).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):  # by which the oldest goes, and before it what was not written to its end
                if (written := _written(path)) is not None or _step(path) is not None:
                    os.utime(path, ns=(written or 0,) * 2)
            rotate_checkpoints(run, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """With a speaker, two ordinary checkpoints or adapters: the thinker's, and the speaker's in a folder of it."""
        folder = output_dir or self.args.output_dir
        if self.plain or not (is_peft_model(self.model) or hasattr(self.model, SPEAKER)):
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:  # every rank comes here, and where parameters are divided the first alone is given them
            return
        if is_peft_model(self.model):
            for each in save_adapter(self.model, folder, state_dict):
                self.processing_class.save_pretrained(each)
            torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))
            return
        weights = self.model.state_dict() if state_dict is None else state_dict
        theirs = {name.removeprefix(f"{SPEAKER}."): value for name, value in weights.items() if is_speaker(name)}
        super()._save(output_dir, {name: value for name, value in weights.items() if not is_speaker(name)})
        self.model.speaker.save_pretrained(os.path.join(folder, SPEAKER), state_dict=theirs)
        self.processing_class.save_pretrained(os.path.join(folder, SPEAKER))

    def _save_rng_state(self, output_dir: str) -> None:
        """What else a resumed run needs: running frequencies, the levels passed, what was expected."""
        super()._save_rng_state(output_dir)
        known = self._snapshot()  # which ranks put together
        if self.args.should_save:
            torch.save({MADE_WITH: self._made_with} | known, os.path.join(output_dir, STATE_FILE))

    def init_hf_repo(self, *args, **kwargs) -> None:
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:
            raise NoRepositoryError(
                f"push_to_hub cannot make the repository ({first_line(error)}): mend that, or leave push_to_hub out and run `thinktok push` after training."
            ) from error

    def create_model_card(self, model_name: str | None = None, *args, **kwargs) -> None:
        """TRL's card; with thinking tokens what they are, and after training what the results say that the run wrote beside the model."""
        card = Path(self.args.output_dir, "README.md")
        name = getattr(self, "hub_model_id", None) or self.args.hub_model_id or card.parent.name  # the first has the user's name before it
        super().create_model_card(model_name or name, *args, **kwargs)
        if self.plain or not self.is_world_process_zero():
            return
        tokens = self.vocabulary.tokens
        adapter, trained = name if is_peft_model(self.model) else None, self.args.stored()
        packed = getattr(unwrapped(self.model).config, "quantization_config", None)
        trained |= {bits: getattr(packed, bits, False) for bits in ("load_in_4bit", "load_in_8bit")}
        shown = "" if why_not_generated(trained) else snippet(name, adapter is not None)
        text = CARD.format(num_tokens=len(tokens), first=tokens[0], last=tokens[-1], use=use(trained, adapter), snippet=shown)
        with contextlib.suppress(ValueError, OSError):  # there are none, or none of ours
            if not self.is_in_train and (card.parent / "results.json").stat().st_mtime >= self._began:  # else an earlier run's
                text = render_card(read_results(card.parent), name, num_tokens=len(tokens), whole=False)
        about = QUICK_START.sub("", card.read_text()).replace(NO_BASE, "a model that is not on the Hub")
        if adapter:
            about = about.replace("library_name: transformers", "library_name: peft")
        card.write_text(f"{about.rstrip()}\n\n{text.lstrip()}")  # TRL's ends without a line's end

    def push_to_hub(self, *args, **kwargs):
        """Uploads model, tokenizer, card, and in `training.json` the options and the last metrics of this run; held-out text stays here."""
        if self.is_world_process_zero():
            metrics: dict[str, Any] = {}
            for entry in self.state.log_history:
                metrics |= entry
            write_json(Path(self.args.output_dir, "training.json"), {"config": changed_options(self.args), "metrics": metrics} | environment())
        try:
            with uploads_without(*NOT_PUSHED):
                return super().push_to_hub(*args, **kwargs)
        except Exception as error:
            folder = self.args.output_dir
            why: BaseException = error
            if isinstance(error, NoRepositoryError):  # the base class saves once there is a repository, and the other ranks, who make none, do so now
                self.save_model(_internal_call=True)
                why = error.__cause__ or error
            raise PushError(f"{folder} is whole, but its upload failed: {first_line(why)} Go on with `thinktok push {folder} REPOSITORY`.") from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if (speaker := Path(checkpoint_folder, SPEAKER)).is_dir() and self.is_world_process_zero():
            shutil.copytree(speaker, Path(self.args.output_dir, SPEAKER), dirs_exist_ok=True)  # the base class copies files alone
        with uploads_without(*NOT_PUSHED):
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, folder: str, model=None) -> None:
        if is_peft_model(self.model) and (SPEAKER in self.model.peft_config or not self.is_fsdp_enabled):
            load_adapters(self.model, folder)  # the base class would load one of two, and with PEFT make it fp32
            return
        super()._load_from_checkpoint(folder, model)
        if hasattr(self.model, SPEAKER) and not self.is_fsdp_enabled:  # whose own checkpoint has all of the model, in parts
            how = {"dtype": self.model.speaker.dtype, "trust_remote_code": self.args.trust_remote_code}
            saved = AutoModelForCausalLM.from_pretrained(os.path.join(folder, SPEAKER), **how)
            self.model.speaker.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        if self.args.policies == "split" and not self.plain:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()
