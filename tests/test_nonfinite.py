"""Steps whose loss or rewards are not finite are skipped, counted, and end a run that does nothing else."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from models import tiny_model, tiny_tokenizer
from transformers import TrainerCallback

from hf_thinktok.callbacks import NonFiniteGuard

SOME = {"stop": "fixed", "weight_decay": 0.1, "lr_scheduler_type": "constant"}


def bad_at(*calls, value=math.nan, where=(0, 0, 0)):
    """A reward that is log-probability, except for one thought of the given micro-batches."""
    count = iter(range(10**6))

    def sometimes_bad(logps, mask, **kwargs):
        rewards = logps.mean(-1)
        if next(count) in calls:
            rewards[where] = value
        return rewards

    return sometimes_bad


class Weights(TrainerCallback):
    """The weights before the first step and after each."""

    def __init__(self, trainer):
        self.trainer, self.seen = trainer, [self._now(trainer)]
        trainer.add_callback(self)

    def _now(self, trainer):
        return torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])

    def on_step_end(self, *args, **kwargs):
        self.seen.append(self._now(self.trainer))

    def moved(self):
        return [not torch.equal(a, b) for a, b in zip(self.seen, self.seen[1:])]


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("num_forks", [0, 3])
def test_padding_has_no_part_in_gradients_where_a_zero_has_none(make_trainer, num_forks):
    """Gemma 3n takes standard deviations, whose gradient at a hidden state of zeros is no number; a model's row for padding may be zero."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("gemma3n_text", vocab_size=len(tokenizer))
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.pad_token_id] = 0
    rows = Dataset.from_list([{"input_ids": list(range(5, 5 + length))} for length in (20, 2, 9, 20)])  # two tokens have one place to think at
    trainer = make_trainer(model=model, tokenizer=tokenizer, train_dataset=rows, num_forks=num_forks)
    trainer.train()
    assert logged(trainer, "skipped_steps") == [0, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_step_with_a_bad_reward_is_skipped(make_trainer, value):
    """Bit for bit: no gradient, no weight decay, no momentum; the other steps train."""
    trainer = make_trainer(reward_funcs=[bad_at(1, 3, value=value)], max_steps=5, **SOME)
    weights = Weights(trainer)
    trainer.train()
    assert weights.moved() == [True, False, True, False, True]
    assert weights.seen[-1].isfinite().all()
    assert all(state.isfinite().all() for of_weight in trainer.optimizer.state.values() for state in of_weight.values() if torch.is_tensor(state))
    assert logged(trainer, "skipped_steps") == [0, 1, 1, 2, 2]
    assert len(logged(trainer, "reward")) == 3, "a skipped step has no reward to report"
    assert all(map(math.isfinite, logged(trainer, "reward")))


def test_step_with_a_bad_loss_is_skipped(make_trainer, monkeypatch):
    """The rewards are fine, the text's own loss is not."""
    trainer = make_trainer(max_steps=3, **SOME)
    score = trainer._score

    def scored(*args):
        scores = score(*args)
        return replace(scores, trunk_logps_BT=scores.trunk_logps_BT * (math.nan if trainer.state.global_step == 1 else 1.0))

    monkeypatch.setattr(trainer, "_score", scored)
    weights = Weights(trainer)
    trainer.train()
    assert weights.moved() == [True, False, True]
    assert weights.seen[-1].isfinite().all()
    assert logged(trainer, "skipped_steps") == [0, 1, 1]


def test_step_whose_scores_are_not_finite_is_skipped(make_trainer):
    """An overflow in the model itself, in one batch: thoughts are drawn from what is no distribution, and the step still only counts as skipped."""
    trainer = make_trainer(max_steps=3, **SOME)
    trainer.model.base_model.norm.register_forward_hook(lambda module, args, hidden: hidden * (math.nan if trainer.state.global_step == 1 else 1.0))
    weights = Weights(trainer)
    trainer.train()
    assert weights.moved() == [True, False, True]
    assert weights.seen[-1].isfinite().all()
    assert logged(trainer, "skipped_steps") == [0, 1, 1]


def test_an_overflow_in_fp16_is_skipped_and_lowers_the_scale():
    """`Trainer` unscales the gradient as it asks for its norm, whether it clips or not, and the scaler does not take that twice."""
    weight = torch.nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    Accelerator(cpu=True)  # an optimizer of accelerate's asks where it is
    optimizer = AcceleratedOptimizer(torch.optim.SGD([weight], 0.1), scaler=scaler)
    for factor in (math.inf, 1.0):
        scaler.scale((weight * factor).sum()).backward()
        scaler.unscale_(optimizer.optimizer)
        guard = NonFiniteGuard(3)
        if factor == math.inf:
            guard.flag()
        guard.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        scaler.step(optimizer.optimizer)
        scaler.update()
        optimizer.optimizer.zero_grad()
        assert scaler.get_scale() == 32.0
        assert torch.equal(weight, torch.full((2,), 1.0 if factor == math.inf else 0.9))


def test_later_steps_are_those_of_a_run_without_the_skipped_one(make_trainer):
    class Without(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            if state.global_step == 1:
                optimizer.zero_grad()

    options = SOME | {"max_steps": 4, "optim": "sgd", "learning_rate": 0.05}
    skipping, leaving_out = make_trainer(reward_funcs=[bad_at(1)], **options), make_trainer(reward_funcs=[bad_at()], **options)
    leaving_out.add_callback(Without())
    skipped, left_out = Weights(skipping), Weights(leaving_out)
    skipping.train()
    leaving_out.train()
    assert skipped.moved() == left_out.moved() == [True, False, True, True]
    assert torch.equal(skipped.seen[-1], left_out.seen[-1])


@pytest.mark.parametrize("bad_call", [2, 3], ids=["first", "last"])
def test_one_bad_micro_batch_skips_the_whole_step(make_trainer, bad_call):
    trainer = make_trainer(reward_funcs=[bad_at(bad_call)], max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=1, **SOME)
    weights = Weights(trainer)
    trainer.train()
    assert weights.moved() == [True, False, True]
    assert weights.seen[-1].isfinite().all()
    assert logged(trainer, "skipped_steps") == [0, 1, 1]


def test_bad_thoughts_taken_again_are_skipped_again(make_trainer):
    """With num_iterations the second step on a rollout counts by itself."""
    trainer = make_trainer(reward_funcs=[bad_at(2, 3)], max_steps=6, num_iterations=2, **SOME)
    weights = Weights(trainer)
    trainer.train()
    assert weights.moved() == [True, True, False, False, True, True]
    assert logged(trainer, "skipped_steps") == [0, 0, 1, 2, 2, 2]


def test_training_stops_where_nothing_else_happens(make_trainer):
    trainer = make_trainer(reward_funcs=[bad_at(1, 2, 3, 4, 5)], max_steps=6, max_nonfinite_steps=3, **SOME)
    weights = Weights(trainer)
    with pytest.raises(FloatingPointError, match="3 steps in a row .* training stopped at step 4") as error:
        trainer.train()
    assert "max_nonfinite_steps" in str(error.value)
    assert weights.moved()[:3] == [True, False, False]
    assert weights._now(trainer).equal(weights.seen[1])


def test_only_steps_in_a_row_stop_training(make_trainer):
    trainer = make_trainer(reward_funcs=[bad_at(0, 2, 4)], max_steps=5, max_nonfinite_steps=2, **SOME)
    trainer.train()
    assert trainer.state.global_step == 5
    assert logged(trainer, "skipped_steps") == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_a_reward_of_places_that_are_not_there_spoils_nothing(make_trainer, scale):
    """A function that divides by the number of judged tokens is 0 / 0 at forks that short rows do not have."""
    gaps = []

    def mean_by_hand(logps, mask, **kwargs):
        gaps.append(not mask.any(-1).all())
        return (logps * mask[:, :, None]).sum(-1) / mask.sum(-1)[:, :, None]

    short = Dataset.from_dict({"text": ["a cat", "the moon", "a mat"] * 4})
    trainer = make_trainer(reward_funcs=[mean_by_hand], train_dataset=short, num_forks=12, scale_rewards=scale, **SOME)
    weights = Weights(trainer)
    trainer.train()
    assert gaps == [True, True]
    assert weights.moved() == [True, True]
    assert logged(trainer, "skipped_steps") == [0, 0]
    assert all(map(math.isfinite, logged(trainer, "reward")))


@pytest.mark.parametrize("options", [SOME, SOME | {"max_grad_norm": 0.0}, {"num_think_tokens": 0}], ids=["", "not clipped", "no thinking"])
def test_step_with_a_bad_gradient_is_skipped(make_trainer, options):
    """The loss is finite and its gradient is not."""
    trainer = make_trainer(max_steps=3, **options)
    weights, count = Weights(trainer), iter(range(99))
    trainer.model.get_input_embeddings().weight.register_hook(lambda grad: grad * (math.nan if next(count) == 1 else 1.0))
    trainer.train()
    assert weights.moved() == [True, False, True]
    assert logged(trainer, "skipped_steps") == [0, 1, 1]
