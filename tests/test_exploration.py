"""Schedules, coverage, balance, the servo, curricula: against closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_thinktok.curriculum import LAG, LEAST_STEPS, Curriculum, LevelSampler
from hf_thinktok.exploration import Coverage, all_thoughts, candidate_thoughts, coverage_share, entropy_servo, marginal_entropy, scheduled, thought_entropy

CPU = torch.device("cpu")


@given(start=st.floats(0, 2), end=st.floats(0, 2), steps=st.integers(1, 50), step=st.integers(0, 100))
def test_a_schedule_goes_from_start_to_end_and_stays(start, end, steps, step):
    value = scheduled([start, end, steps], step)
    assert min(start, end) - 1e-9 <= value <= max(start, end) + 1e-9
    assert scheduled([start, end, steps], 0) == pytest.approx(start)
    assert scheduled([start, end, steps], steps + step) == pytest.approx(end)
    assert scheduled([start, end, 2 * steps], steps) == pytest.approx((start + end) / 2)
    assert scheduled([start], step) == start


@given(start=st.floats(0, 2), end=st.floats(0, 2), steps=st.integers(0, 50), begin=st.integers(0, 50), step=st.integers(0, 100))
def test_a_schedule_may_begin_later(start, end, steps, begin, step):
    value = scheduled([start, end, steps, begin], step)
    if step < begin:
        assert value == start
    else:
        assert value == (pytest.approx(scheduled([start, end, steps], step - begin)) if steps else end), "no steps between: it jumps"


@pytest.mark.parametrize(("num_tokens", "length"), [(3, 3), (10, 3), (7, 2)])
def test_every_thought_of_every_length_has_a_code_of_its_own(num_tokens, length):
    coverage = Coverage(num_tokens, length, 0.5, CPU)
    codes = []
    for ended in range(length + 1):
        choices = torch.zeros(num_tokens**ended, length, dtype=torch.long)
        if ended:
            choices[:, :ended] = all_thoughts(num_tokens, ended, CPU)
        choices[:, ended:] = 1  # whatever stands behind the end says nothing
        codes += coverage.codes(choices, torch.full((len(choices),), ended)).flatten().tolist()
    assert len(set(codes)) == len(codes)
    assert max(codes) < coverage.size


def test_thoughts_beyond_the_table_are_spread_over_it():
    coverage = Coverage(256, 8, 0.5, CPU)
    choices = torch.randint(256, (4096, 8), generator=torch.Generator().manual_seed(0))
    codes = coverage.codes(choices, torch.full((4096,), 8))
    assert codes.min() >= 0
    assert codes.max() < coverage.size
    assert len(codes.unique()) > 4000


@pytest.mark.parametrize(("num_tokens", "length"), [(15, 6), (31, 6), (63, 5), (3, 40)])
def test_thoughts_that_differ_in_one_token_are_told_apart_beyond_the_table(num_tokens, length):
    coverage = Coverage(num_tokens, length, 0.5, CPU)
    for place in (0, length - 1):
        choices = torch.zeros(num_tokens, length, dtype=torch.long)
        choices[:, place] = torch.arange(num_tokens)
        assert len(coverage.codes(choices, torch.full((num_tokens,), length)).unique()) == num_tokens


@pytest.mark.parametrize(("num_tokens", "length"), [(4, 3), (31, 6)])
def test_a_thought_has_one_code_in_every_batch(num_tokens, length):
    coverage, seen = Coverage(num_tokens, length, 0.5, CPU), set()
    for said in ([1], [0, 1], [0, 0, 1]):
        codes = {coverage.codes(torch.tensor([said + [0] * more]), torch.tensor([len(said)])).item() for more in range(length - len(said) + 1)}
        assert len(codes) == 1
        seen |= codes
    assert len(seen) == 3


def test_frequencies_are_a_running_average_and_the_rare_are_worth_more():
    coverage = Coverage(4, 1, 0.75, CPU)
    codes = torch.tensor([[0], [0], [0], [1]])
    coverage.update(codes, torch.tensor([True, True, True, True]))
    coverage.update(codes, torch.tensor([True, True, False, False]))
    first, second = 0.25 * 0.75 + 0.25 * 0.75, 0.25 * 0.75 + 0.25 * 0.25
    assert coverage.frequency_C[0].item() == pytest.approx(0.75 * first + 0.25)
    assert coverage.frequency_C[1].item() == pytest.approx(0.75 * second)
    rarity = coverage.rarity(torch.tensor([[0], [1]]))
    assert rarity.tolist() == pytest.approx([-math.log(0.75 * first + 0.25), -math.log(0.75 * second)])
    coverage.update(codes, torch.zeros(4, dtype=torch.bool))
    assert torch.equal(coverage.rarity(torch.tensor([[0], [1]])), rarity), "a batch without thoughts changes nothing"
    again = Coverage(4, 1, 0.75, CPU)
    again.load_state_dict(coverage.state_dict())
    assert torch.equal(again.rarity(codes), coverage.rarity(codes))


@pytest.mark.parametrize("other", [{"by_place": True}, {"max_length": 3}, {"num_tokens": 5}], ids=str)
def test_what_another_run_counted_is_no_start_for_other_counts(other, caplog):
    counted = Coverage(**{"num_tokens": 4, "max_length": 2, "by_place": False} | other, decay=0.5, device=CPU)
    counted.frequency_C.zero_()
    coverage = Coverage(4, 2, 0.5, CPU)
    coverage.load_state_dict(counted.state_dict())
    assert (coverage.frequency_C > 0).all()
    assert "counted anew" in caplog.text


def test_tokens_are_counted_in_their_places():
    """Token 0 is common in the first place and unknown in the second; a place behind the end is a symbol of its own."""
    coverage = Coverage(3, 2, 0.0, CPU, by_place=True)
    assert coverage.rarity(coverage.codes(torch.tensor([[2, 1]]), torch.tensor([2]))).item() == pytest.approx(2 * math.log(3))
    choices, lengths = torch.tensor([[[0, 1], [0, 2]], [[0, 2], [1, 2]]]), torch.tensor([[2, 2], [1, 2]])
    codes = coverage.codes(choices, lengths)
    coverage.update(codes, torch.ones(2, 2, dtype=torch.bool))
    expected = [[[3 / 4, 1 / 4], [3 / 4, 2 / 4]], [[3 / 4, 1 / 4], [1 / 4, 2 / 4]]]
    torch.testing.assert_close(coverage.rarity(codes), -torch.tensor(expected).log().sum(-1))
    never = coverage.rarity(coverage.codes(torch.tensor([[0, 0]]), torch.tensor([2])))
    assert never.item() == pytest.approx(-math.log(3 / 4) - math.log(1e-4))
    coverage.update(codes, torch.tensor([[True, True], [False, False]]))
    assert coverage.rarity(codes)[0].tolist() == pytest.approx([math.log(2), math.log(2)])


def test_places_that_no_thought_of_a_batch_reaches_are_counted_as_ended():
    """A level of short thoughts must not make all tokens behind them equally unheard of."""
    coverage = Coverage(3, 4, 0.0, CPU, by_place=True)
    coverage.update(coverage.codes(torch.tensor([[0, 1]]), torch.tensor([2])), torch.ones(1, dtype=torch.bool))
    assert coverage.rarity(coverage.codes(torch.tensor([[0, 1, 2, 2]]), torch.tensor([2]))).item() == pytest.approx(0.0)
    places = coverage.frequency_C.view(4, 4)
    torch.testing.assert_close(places.sum(1), torch.ones(4))


def test_a_batch_in_parts_is_remembered_as_long_as_a_whole_one():
    whole, parts = Coverage(4, 1, 0.8, CPU), Coverage(4, 1, 0.8, CPU)
    said = torch.zeros(8, 1, dtype=torch.long)
    whole.update(whole.codes(said, torch.ones(8, dtype=torch.long)), torch.ones(8, dtype=torch.bool))
    for part in said.chunk(4):
        parts.update(parts.codes(part, torch.ones(2, dtype=torch.long)), torch.ones(2, dtype=torch.bool), share=1 / 4)
    torch.testing.assert_close(parts.frequency_C, whole.frequency_C)


def certain(thoughts, num_tokens):
    """Log-probabilities of a policy that is certain of the given thoughts `[M, L]`, as `[M, 1, 1, L, N]`."""
    return (torch.nn.functional.one_hot(thoughts, num_tokens).float()[:, None, None] * 60).log_softmax(-1)


def test_the_bonus_is_paid_everywhere_or_as_far_as_the_best_thought_fails():
    logps_BKG = torch.tensor([[[0.5, 0.25], [1.0, 0.1]], [[0.01, 0.02], [1e-6, 1e-9]]]).log()
    assert coverage_share("everywhere", logps_BKG).flatten().tolist() == [1, 1, 1, 1]
    assert coverage_share("unsolved", logps_BKG).flatten().tolist() == pytest.approx([0.5, 0, 0.98, 1], abs=1e-5)


def test_the_mean_choice_of_copied_tokens_is_varied_by_position_and_not_given_the_token_before():
    copied = torch.arange(4)[:, None].expand(4, 3)
    mask = torch.ones(4, 1, 1, 3, dtype=torch.bool)
    by_position = marginal_entropy(certain(copied, 4), mask)
    given_token = marginal_entropy(certain(copied, 4), mask, copied[:, None, None])
    assert by_position.item() == pytest.approx(math.log(4), abs=1e-4)
    assert given_token.item() == pytest.approx(math.log(4) / 3, abs=1e-4), "only the first position is free"


def test_a_varied_code_is_balanced_given_the_token_before_too():
    every = all_thoughts(3, 3, CPU)
    mask = torch.ones(27, 1, 1, 3, dtype=torch.bool)
    assert marginal_entropy(certain(every, 3), mask, every[:, None, None]).item() == pytest.approx(math.log(3), abs=1e-4)
    assert thought_entropy(certain(every, 3), mask).item() == pytest.approx(0, abs=1e-4)


def test_thoughts_that_ended_are_not_counted():
    thoughts = torch.tensor([[0, 1], [1, 1], [2, 1], [3, 1]])
    ended = torch.tensor([[True, False]] * 4)[:, None, None]
    assert marginal_entropy(certain(thoughts, 4), ended).item() == pytest.approx(math.log(4), abs=1e-4)
    undecided = torch.zeros(4, 1, 1, 2, 4).log_softmax(-1)
    undecided[..., 1, :] = certain(thoughts, 4)[..., 1, :]
    assert thought_entropy(undecided, ended).item() == pytest.approx(math.log(4), abs=1e-4)


@pytest.mark.parametrize("start", [0.1, 3.0], ids=["undecided", "certain"])
def test_the_servo_drives_the_entropy_to_its_target_from_both_sides(start):
    logits = (start * torch.randn(8, 1, 1, 2, 6, generator=torch.Generator().manual_seed(0))).requires_grad_()
    mask, target = torch.ones(8, 1, 1, 2, dtype=torch.bool), 1.0
    optimizer = torch.optim.Adam([logits], lr=0.05)
    before = thought_entropy(logits.log_softmax(-1), mask).item()
    for _ in range(300):
        entropy = thought_entropy(logits.log_softmax(-1), mask)
        (-entropy_servo(entropy, target) * entropy).backward()
        optimizer.step(), optimizer.zero_grad()
    assert abs(before - target) > 0.3
    assert thought_entropy(logits.log_softmax(-1), mask).item() == pytest.approx(target, abs=0.05)


def test_all_thoughts_are_all():
    assert sorted(map(tuple, all_thoughts(3, 2, CPU).tolist())) == [(a, b) for a in range(3) for b in range(3)]


def test_candidates_are_all_where_they_fit_and_else_own_and_random():
    generator = torch.Generator().manual_seed(0)

    def own(count):
        return torch.full((count, 3), 9)

    assert len(candidate_thoughts(own, 1000, 0.5, 10, 3, generator)) == 1000
    few = candidate_thoughts(own, 400, 0.25, 10, 3, generator)
    own = (few == 9).all(-1).sum().item()
    assert len(few) == 400
    assert 300 <= own <= 303


@pytest.mark.parametrize("changes", [1, 2])
def test_random_candidates_can_be_small_changes_of_own_thoughts(changes):
    generator = torch.Generator().manual_seed(0)
    thoughts = candidate_thoughts(lambda count: torch.full((7, count, 3), 9), 400, 0.5, 10, 3, generator, places=(7,), changes=changes)
    changed = (thoughts != 9).sum(-1)
    assert thoughts.shape == (7, 400, 3)
    assert changed.max() == changes
    assert (changed[:, :200] == 0).all()
    assert (changed[:, 200:] == changes).float().mean().item() == pytest.approx(0.9**changes, abs=0.05), "one token in ten stays as it was"
    assert (thoughts[:, 200:] != 9).float().mean((0, 1)).tolist() == pytest.approx([0.9 * changes / 3] * 3, abs=0.05), "at every place alike"


def test_a_level_begins_after_the_one_before_is_passed():
    curriculum = Curriculum([1, 2, 5], [0.9])
    for step in range(100):
        wrong = curriculum.reached(step)[-1] == 5 or step < 20
        curriculum.observe(step, curriculum.reached(step)[-1], 0.0 if wrong else 1.0)
    # Level 1: the weight of 20 wrong answers must fall to a tenth of all; level 2: as soon as there are enough of them.
    share = next(n for n in range(1, 99) if (0.9**n - 0.9 ** (n + 20)) / (1 - 0.9 ** (n + 20)) <= 0.1)
    first = 20 + share - 1 + LAG
    assert curriculum.begins == [0, first, first + LEAST_STEPS - 1 + LAG]
    assert curriculum.reached(first - 1) == [1]
    assert curriculum.reached(first) == [1, 2]
    assert curriculum.stage_step(first, 2) == 0
    assert [curriculum.stage_step(99, level) for level in (1, 2, 5)] == [99, 99 - first, 99 - curriculum.begins[-1]]
    again = Curriculum([1, 2, 5], [0.9])
    again.load_state_dict(curriculum.state_dict())
    assert again.begins == curriculum.begins
    assert again.accuracy == curriculum.accuracy


@pytest.mark.parametrize("lengths", [None, [0, 1, 2]])
def test_where_thoughts_get_longer_the_levels_before_are_to_be_right_as_well(lengths):
    curriculum = Curriculum([1, 2, 3], [0.9], lengths)
    for step in range(LEAST_STEPS):
        curriculum.observe(step, 1, 1.0)
    for step in range(20, 40):  # the first level is forgotten while the second is learned
        curriculum.observe(step, 1, 0.0)
        curriculum.observe(step, 2, 1.0)
    assert (curriculum.reached(99)[-1], curriculum.longest(99)) == ((2, 1) if lengths else (3, None))
    for step in range(40, 80):
        curriculum.observe(step, 1, 1.0)
    assert curriculum.reached(99)[-1] == 3
    assert curriculum.longest(0) == (0 if lengths else None)
    assert curriculum.longest(99) == (2 if lengths else None)


def test_each_level_has_a_threshold_of_its_own():
    curriculum = Curriculum([1, 2, 4], [0.9, 0.5])
    begun = []
    for step in range(60):
        curriculum.observe(step, curriculum.reached(step)[-1], 0.6 if step >= 20 else 0.95)
        begun.append(curriculum.reached(step)[-1])
    assert begun[:20].count(1) == LEAST_STEPS - 1 + LAG, "0.95 passes the first"
    assert begun[-1] == 4, "0.6 passes the second"
    strict = Curriculum([1, 2, 4], [0.9])
    for step in range(60):
        strict.observe(step, strict.reached(step)[-1], 0.6 if step >= 20 else 0.85)
    assert strict.begins == [0], "and neither passes where 0.9 is asked of all"


def test_accumulated_batches_are_parts_of_a_step():
    whole, parts = Curriculum([1, 2], [0.9]), Curriculum([1, 2], [0.9])
    for step in range(LEAST_STEPS):
        assert whole.begins == parts.begins == [0]
        whole.observe(step, 1, 0.95)
        for _ in range(3):
            parts.observe(step, 1, 0.95, 1 / 3)
    assert whole.begins == parts.begins != [0]
    assert parts.accuracy[1] == pytest.approx(0.95)


def test_accuracy_on_easier_levels_passes_nothing():
    curriculum = Curriculum([1, 2, 3], [0.5])
    curriculum.begins = [0, 10]
    for step in range(10, 200):
        curriculum.observe(step, 1, 1.0)
    assert curriculum.begins == [0, 10]


def test_rows_of_a_step_are_of_one_reached_level_and_do_not_depend_on_what_comes_later():
    levels = np.repeat([1, 2, 3], 50)
    curriculum = Curriculum([1, 2, 3], [0.9])
    curriculum.begins = [0, 4, 30]
    rows = list(LevelSampler(levels, curriculum, batch=6, replay=0.5, steps=40, seed=1))
    assert len(rows) == 240
    drawn = levels[np.array(rows)].reshape(40, 6)
    assert (drawn == drawn[:, :1]).all()
    assert (drawn[:4] == 1).all()
    assert (drawn[4:30].max(), drawn[30:].max()) == (2, 3)
    assert set(drawn[4:30].flatten()) == {1, 2}
    curriculum.begins = [0, 4]
    assert list(LevelSampler(levels, curriculum, 6, 0.5, 40, 1))[:180] == rows[:180]


def test_replay_is_the_part_of_the_steps_that_all_levels_share():
    curriculum = Curriculum([1, 2, 3], [0.9])
    curriculum.begins = [0, 0, 0]
    rows = list(LevelSampler(np.array([1, 2, 3]), curriculum, batch=1, replay=0.3, steps=3000, seed=0))
    assert (np.bincount(rows) / 3000).tolist() == pytest.approx([0.1, 0.1, 0.8], abs=0.03)
