"""What happens around a step: starting over, timing, skipping numbers that are not finite, and printing thoughts."""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from .results import environment

logger = logging.getLogger(__name__)

THOUGHT_STYLE, TEXT_STYLE = "cyan", "blue"


class SayWhatIsTrained(TrainerCallback):
    """With an adapter: which part of the model gets gradients, and what it will take on disk."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        sizes = [(getattr(one, "ds_numel", one.numel()), one.element_size(), one.requires_grad) for one in model.parameters()]
        total, trained = sum(size for size, *_ in sizes), sum(size for size, _, trains in sizes if trains)
        megabytes = sum(size * width for size, width, trains in sizes if trains) / 1e6
        if state.is_world_process_zero:
            print(f"Training {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %): adapter and thinking rows, {megabytes:.1f} MB on disk.")


class StartOver(TrainerCallback):
    """Each attempt at training begins anew, one after an interruption or with a smaller batch (`auto_find_batch_size`) too.

    Args:
        forget: what drops the state of the attempt before.
    """

    def __init__(self, forget: Callable[[], None]):
        self.forget = forget

    def on_train_begin(self, args, state, control, **kwargs):
        self.forget()


class Spent(TrainerCallback):
    """What a run took in all its sessions: tokens of text, and seconds of the steps alone; `train_runtime` has the evaluations between and before them,
    and of a resumed run the rest. And where they were: the code, the libraries and the machine of each."""

    def __init__(self):
        self.tokens, self.seconds, self.start = 0, 0.0, 0.0
        self.here: dict[str, Any] = {}
        self.sessions: list[dict[str, Any]] = []

    def elsewhere(self, where: dict[str, Any]) -> dict[str, Any]:
        """For the results of a run that was resumed: what it was trained in besides."""
        others = [session for session in self.sessions if session != where]
        return {"sessions": others} if others else {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.here = self.here or environment()
        if self.here not in self.sessions:
            self.sessions.append(self.here)
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.start

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seconds": self.seconds, "sessions": self.sessions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens, self.seconds, self.sessions = int(state["tokens"]), state["seconds"], state.get("sessions", [])  # older checkpoints do not say


class NonFiniteGuard(TrainerCallback):
    """Skips optimizer steps whose loss, gradient or rewards were not finite, counts them, and ends a run that does nothing else.

    Args:
        limit: steps in a row before training stops.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.total = self.in_a_row = 0
        self.flagged = False

    def flag(self) -> None:
        """Marks the step under way; called on every rank alike."""
        self.flagged = True

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self.flagged and optimizer is not None:
            optimizer.zero_grad(set_to_none=True)  # fp16's scaler has seen the gradient, when the norm was asked for

    def on_step_end(self, args, state, control, **kwargs):
        if not self.flagged:
            self.in_a_row = 0
            return
        self.flagged = False
        self.total += 1
        self.in_a_row += 1
        logger.warning(
            "Step %d was skipped: its loss, gradient or a reward was not finite (%d in a row, %d in all).", state.global_step, self.in_a_row, self.total
        )
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"{self.in_a_row} steps in a row had a loss, gradient or reward that was not finite: training stopped at step {state.global_step}. Lower the "
                "learning rate, look at the reward functions, or raise max_nonfinite_steps."
            )


def print_thoughts(tokenizer, samples: list[dict], first_id: int, step: int, console: Console | None = None, most: int = 48) -> None:
    """A table of thoughts: the text before (blue), the thought (cyan; thinking tokens as 0..N-1), the true next text, and what the thought brought.

    With a learned stop a thought is shown at full length, and beside it how many of its tokens the model would think, and what these bring.

    Args:
        samples: dicts with `before`, `thought`, `after` (lists of ids), `length` ((expected) thinking tokens) and `gain` (bits per token).
        first_id: the first thinking id.
        most: characters of the text before.
    """
    table = Table(title=f"Thoughts at step {step}", show_lines=False)
    for column, justify in (("text so far", "right"), ("thought", "left"), ("tokens", "right"), ("what followed", "left"), ("gain, bits", "right")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for sample in samples:
        table.add_row(
            Text(_visible(tokenizer.decode(sample["before"])[-most:]), TEXT_STYLE),
            Text(" ".join(str(i - first_id) if i >= first_id else _visible(tokenizer.decode([i])) for i in sample["thought"]) or "-", THOUGHT_STYLE),
            f"{sample['length']:.2f}",
            Text(_visible(tokenizer.decode(sample["after"])), TEXT_STYLE),
            Text(f"{sample['gain']:+.2f}", "green" if sample["gain"] > 0 else "red"),
        )
    (console or Console()).print(table)


def _visible(text: str) -> str:
    return text.replace("\n", "⏎").replace("\t", "⇥")


def sample_thoughts_to_print(
    tokens_BT: torch.Tensor, rollout, lengths_BKG: torch.Tensor, labels_BKH: torch.Tensor, gains_BKG: torch.Tensor, count: int
) -> list[dict]:
    """Evenly chosen forks of a batch, each with the first thought that is the policy's own."""
    there = (rollout.forks_BK >= 0).nonzero().tolist()
    chosen = there[:: max(1, len(there) // count)][:count]
    own = rollout.num_chosen
    samples = []
    for row, fork in chosen:
        position = int(rollout.forks_BK[row, fork])
        length = int(rollout.lengths_BKG[row, fork, own])
        samples.append(
            {
                "before": tokens_BT[row, max(0, position - 15) : position + 1].tolist(),
                "thought": rollout.thoughts_BKGL[row, fork, own, :length].tolist(),
                "after": [i for i in labels_BKH[row, fork, :8].tolist() if i >= 0],
                "length": lengths_BKG[row, fork, own].item(),
                "gain": gains_BKG[row, fork, own].item(),
            }
        )
    return samples
